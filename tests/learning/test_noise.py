"""The gradient noise scale on problems whose answer is known in closed form."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.config import ModelConfig
from x1_pretrain.learning import noise
from x1_pretrain.learning.noise import NoiseScale, NoiseScales, mean_square
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import summed_loss

WIDTH = 48
CURVATURE = np.linspace(0.5, 2.0, WIDTH)  # of the quadratic L = sum of CURVATURE x (w - w*)^2 / 2
AWAY = 1.5 * np.cos(np.arange(WIDTH))  # w - w*, where the gradient is taken
TRUE = CURVATURE * AWAY  # the gradient there
DEVIATION = 1.0 + 3.0 * (np.arange(WIDTH) % 3)  # of one token's gradient about it
SIGNAL, NOISE = float((TRUE**2).sum()), float((DEVIATION**2).sum())


def squares_of_a_step(
    draws: np.random.Generator, small: int, micro_batches: int, ranks: int
) -> tuple[float, float]:
    """Squared norms of the mean gradient: over each rank's first micro-batch (their mean), and over all."""
    tokens = TRUE + DEVIATION * draws.standard_normal((ranks, micro_batches, small, WIDTH))
    first = tokens[:, 0].mean(axis=1)  # (ranks, WIDTH)
    return float((first**2).sum(axis=1).mean()), float((tokens.mean(axis=(0, 1, 2)) ** 2).sum())


SHAPES = [(1, 8, 1), (4, 2, 1), (4, 16, 1), (2, 4, 3), (4, 1, 4)]  # small batch, micro-batches, ranks


@pytest.mark.parametrize(("small", "micro_batches", "ranks"), SHAPES)
def test_both_terms_are_unbiased(small: int, micro_batches: int, ranks: int) -> None:
    draws = np.random.default_rng(small * 100 + micro_batches)
    signals, noises = [], []
    for _ in range(1500):
        scale = NoiseScale()  # after one update its averages are that update's
        big = small * micro_batches * ranks
        scale.update(*squares_of_a_step(draws, small, micro_batches, ranks), small, big)
        signals.append(scale.signal / scale.weight)
        noises.append(scale.noise / scale.weight)
    for values, truth in ((signals, SIGNAL), (noises, NOISE)):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert error < 0.12 * truth  # so that the next line says something
        assert abs(statistics.mean(values) - truth) < 4 * error


@pytest.mark.parametrize(("small", "micro_batches", "ranks"), SHAPES)
def test_the_noise_scale_is_the_known_one(small: int, micro_batches: int, ranks: int) -> None:
    draws, scale = np.random.default_rng(7), NoiseScale()
    for _ in range(600):
        squares = squares_of_a_step(draws, small, micro_batches, ranks)
        scale.update(*squares, small, small * micro_batches * ranks)
    found, error = scale.tokens(), scale.error()
    assert found is not None
    assert error is not None
    assert error < 0.35 * NOISE / SIGNAL
    assert abs(found - NOISE / SIGNAL) < 4 * error


def test_the_standard_error_is_that_of_repetitions() -> None:
    draws, found, errors = np.random.default_rng(3), [], []
    for _ in range(150):
        scale = NoiseScale()
        for _ in range(60):
            scale.update(*squares_of_a_step(draws, 4, 8, 1), 4, 32)
        found.append(scale.tokens())
        errors.append(scale.error())
    assert statistics.stdev(found) == pytest.approx(statistics.mean(errors), rel=0.25)


def test_the_averages_are_those_of_explicit_weights() -> None:
    draws, scale, steps = np.random.default_rng(4), NoiseScale(), []
    for _ in range(130):
        steps.append(squares_of_a_step(draws, 4, 8, 1))
        scale.update(*steps[-1], 4, 32)
    small, big = np.array(steps).T
    signal, spread = (32 * big - 4 * small) / 28, (small - big) / (1 / 4 - 1 / 32)
    weights = 0.99 ** np.arange(130)[::-1]
    weights /= weights.sum()
    ratio = (weights @ spread) / (weights @ signal)
    left = spread - ratio * signal
    variance = (weights @ left**2) * (weights**2).sum() / (1 - (weights**2).sum())
    assert scale.tokens() == pytest.approx(ratio, rel=1e-9)
    assert scale.error() == pytest.approx(math.sqrt(variance) / (weights @ signal), rel=1e-6)


def test_without_scatter_it_is_exact() -> None:
    scale = NoiseScale()
    for _ in range(noise.LEAST_UPDATES):
        scale.update(0.25 + 1000 / 8, 0.25 + 1000 / 64, 8, 64)
    assert scale.tokens() == pytest.approx(4000)
    assert scale.error() == pytest.approx(0, abs=0.1)


def test_it_forgets() -> None:
    scale = NoiseScale()
    for true in [100.0] * 300 + [1000.0] * 600:
        scale.update(1 + true / 8, 1 + true / 64, 8, 64)
    # what is left of the first 300 after 600 more: (1 - 1/100)^600 = 0.0024
    assert scale.tokens() == pytest.approx(1000 - 900 * 0.99**600, rel=1e-3)


def test_too_few_updates_say_nothing() -> None:
    scale = NoiseScale()
    assert (scale.tokens(), scale.error()) == (None, None)
    for _ in range(noise.LEAST_UPDATES - 1):
        scale.update(2.0, 1.0, 8, 64)
    assert (scale.tokens(), scale.error()) == (None, None)
    scale.update(2.0, 1.0, 8, 64)
    assert scale.tokens() is not None


def test_a_signal_lost_in_its_noise_says_nothing() -> None:
    draws, told = np.random.default_rng(1), 0
    for _ in range(10):
        scale = NoiseScale()
        for _ in range(400):  # no gradient at all: |G|^2 comes out on both sides of zero
            tokens = draws.standard_normal((64, WIDTH))
            small, big = tokens[:8].mean(axis=0), tokens.mean(axis=0)
            scale.update(float(small @ small), float(big @ big), 8, 64)
            told += scale.tokens() is not None
    assert told < 0.02 * 10 * 400
    for _ in range(400):  # and never a negative one
        scale.update(1.0, 2.0, 8, 64)
    assert (scale.tokens(), scale.error()) == (None, None)


@pytest.mark.parametrize(
    "update",
    [
        (math.nan, 1.0, 8, 64),
        (1.0, math.inf, 8, 64),
        (2.0, 1.0, 64, 64),
        (2.0, 1.0, 65, 64),
        (2.0, 1.0, 0, 64),
    ],
)
def test_what_tells_nothing_is_left_out(update: tuple[float, float, float, float]) -> None:
    scale = NoiseScale()
    scale.update(2.0, 1.0, 8, 64)
    before = scale.to_json()
    scale.update(*update)
    assert scale.to_json() == before


squares = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(squares, squares), min_size=20, max_size=40), squares, st.floats(0.01, 100))
def test_units(steps: list[tuple[float, float]], gradient: float, unit: float) -> None:
    """Gradients of another size give the same tokens; batches counted in another unit give that unit."""
    plain, scaled, counted = NoiseScale(), NoiseScale(), NoiseScale()
    for signal, spread in steps:
        small, big = signal + spread / 8, signal + spread / 64
        plain.update(small, big, 8, 64)
        scaled.update(gradient * small, gradient * big, 8, 64)
        counted.update(small, big, 8 * unit, 64 * unit)
    assert (plain.tokens() is None) == (scaled.tokens() is None) == (counted.tokens() is None)
    if plain.tokens() is not None:
        assert scaled.tokens() == pytest.approx(plain.tokens(), rel=1e-6)
        assert counted.tokens() == pytest.approx(unit * plain.tokens(), rel=1e-6)
        assert counted.error() == pytest.approx(unit * plain.error(), rel=1e-3, abs=1e-4 * counted.tokens())


def test_groups_are_estimates_of_their_own_and_the_total_is_of_their_sum() -> None:
    scales = NoiseScales(by_group=True)
    for _ in range(30):
        small = {"attention": 1 + 100 / 8, "mlp": 3 + 900 / 8}
        big = {"attention": 1 + 100 / 64, "mlp": 3 + 900 / 64}
        scales.update(small, big, 8, 64)
    row = scales.row()
    assert row.pop("noise_scale_error") == pytest.approx(0, abs=0.1)
    assert row == {
        "noise_scale": pytest.approx(1000 / 4),
        "noise_scale/attention": pytest.approx(100),
        "noise_scale/mlp": pytest.approx(300),
    }
    total = NoiseScales()
    total.update(small, big, 8, 64)
    assert total.groups == {}
    assert NoiseScales().row() == {}


def test_going_on_from_json_is_going_on() -> None:
    draws, whole, scales = np.random.default_rng(2), NoiseScales(True), NoiseScales(True)
    for step in range(50):
        small, big = squares_of_a_step(draws, 4, 8, 1)
        for each in (whole, scales):
            each.update({"mlp": small}, {"mlp": big}, 4, 32)
        if step == 25:
            scales = NoiseScales.from_json(json.loads(json.dumps(scales.to_json())), by_group=True)
    assert scales == whole
    assert NoiseScale.from_json({}) == NoiseScale()
    assert NoiseScales.from_json({}, by_group=True) == NoiseScales(True)
    assert NoiseScales.from_json(whole.to_json(), by_group=False).groups == {}


def test_mean_square_is_of_the_mean_gradient() -> None:
    """As the loop accumulates: its loss is divided by the tokens of the whole step."""
    config = ModelConfig(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=32, context=8, vocab_size=19)
    tokens = torch.randint(0, 19, (4, 9), generator=torch.Generator().manual_seed(0))

    def square(rows: int, divisor: float) -> float:
        decoder = Decoder(config, seed=1)
        hidden = decoder.hidden(tokens[:rows, :-1]).flatten(0, 1)
        loss = summed_loss(hidden, decoder.output_weight, tokens[:rows, 1:].flatten(), 19, 64) / divisor
        loss.backward()
        return sum(float((w.grad**2).sum()) for w in decoder.parameters())

    assert mean_square(square(1, 32.0), 32.0, 8.0) == pytest.approx(square(1, 8.0), rel=1e-5)
