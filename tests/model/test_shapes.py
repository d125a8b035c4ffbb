"""Architectures from sizes: the published one, known ones nearby, and the rules over the whole ladder."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.config import ModelConfig
from x1_pretrain.errors import UserError
from x1_pretrain.model import shapes
from x1_pretrain.model.flops import parameter_counts


def matrices(model: ModelConfig) -> int:
    return parameter_counts(model).matrices


def test_the_published_50m_run() -> None:
    found = shapes.shape_for(50.33e6)
    assert (found.d_model, found.layers, found.heads, found.kv_heads, found.d_ff) == (768, 8, 12, 4, 2048)
    assert matrices(found) == 50_331_648
    assert (found.context, found.tied_embeddings, found.vocab_size) == (1024, True, 50257)


@pytest.mark.parametrize("size", [5e6, 25e6, 100e6, 124e6, 500e6, 1e9, 7e9, 70e9])
def test_the_nearest_is_near(size: float) -> None:
    assert matrices(shapes.shape_for(size)) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize(
    ("size", "width", "depth"),
    [
        (6.48e9, 4096, 32),  # LLaMA 7B
        (12.7e9, 5120, 40),  # LLaMA 13B
        (68.5e9, 8192, 80),  # Llama 3 70B
        (1.0e9, 2048, 16),  # Llama 3.2 1B
        (85e6, 768, 12),  # GPT-2 small
    ],
)
def test_known_models_are_not_far(size: float, width: int, depth: int) -> None:
    """Ours have another d_ff here and there, so width and depth differ: by a third at most in width."""
    found = shapes.shape_for(size)
    assert 0.75 <= found.d_model / width <= 1.34
    assert 0.6 <= found.layers / depth <= 1.5


def test_70b_is_built_like_llama() -> None:
    found = shapes.shape_for(70e9)
    assert (found.head_size, found.kv_heads, found.context, found.tied_embeddings) == (128, 8, 4096, False)
    assert 8192 <= found.d_model <= 9216
    assert 72 <= found.layers <= 88


def test_the_ladder_climbs_in_small_steps() -> None:
    sizes = [matrices(model) for model in shapes.ladder(low=1e5, high=1e11)]
    assert sizes == sorted(set(sizes))  # strictly
    assert sizes[0] < 1.5e5
    assert sizes[-1] > 9e10
    steps = [(b / a, a) for a, b in pairwise(sizes) if b > 1e6 and a < 1e10]
    assert max(step for step, _ in steps) < 1.21  # the very smallest have few layers to vary
    assert max(step for step, at in steps if at > 3e6) < 1.17
    assert max(step for step, at in steps if at > 3e7) < 1.13


def test_every_shape_follows_the_rules() -> None:
    for model in shapes.ladder(low=1e5, high=5e11):
        size, heads = matrices(model), model.heads
        unit = 16 if model.d_model < 128 else 64 if model.d_model < 1024 else 128
        assert model.d_model % unit == 0
        assert model.d_model == heads * model.head_size
        width = model.d_model
        assert model.head_size == (16 if width <= 64 else 32 if width <= 128 else 64 if width < 2048 else 128)
        assert 2.5 <= model.d_ff / model.d_model <= 3.01
        assert model.d_ff % (64 if model.d_model < 1024 else 256) == 0
        assert heads % model.kv_heads == 0
        if heads < 4:
            assert model.kv_heads == heads
        else:
            assert model.kv_heads in (heads // 3, heads // 4, 8, 2)
            assert heads / model.kv_heads >= 2
        assert model.layers >= 2
        assert model.context == (1024 if size < 200e6 else 2048 if size < 3e9 else 4096)
        assert model.tied_embeddings == (size < 3e9)


def test_what_the_rules_give_grows_with_the_size() -> None:
    """Step by step width and depth trade places; from size to size ten times as large both grow."""
    chosen = [shapes.shape_for(10.0**exponent) for exponent in (6, 7, 8, 9, 10, 11)]
    for values in ([m.d_model for m in chosen], [m.context for m in chosen], [m.d_ff for m in chosen]):
        assert values == sorted(values)
    assert [shapes.aspect(d) for d in (256, 768, 1024)] == pytest.approx([55.4, 96, 110.9], abs=0.1)
    assert shapes.aspect(4096) == shapes.aspect(16384) == 128


@given(st.floats(math.log(2e5), math.log(1e11)))
def test_no_shape_of_the_ladder_would_be_nearer(log_size: float) -> None:
    """Against all candidates, not only those that the hull has kept."""
    found = shapes.shape_for(math.exp(log_size))

    def distance(size: float, width: int, layers: int) -> float:
        stray = shapes.STRAY * math.log(width / layers / shapes.aspect(width))
        return (math.log(size) - log_size) ** 2 + stray**2

    best = min(distance(math.exp(c.log_size), c.d_model, c.layers) for c in CANDIDATES)
    assert distance(matrices(found), found.d_model, found.layers) == pytest.approx(best, abs=1e-9)


CANDIDATES = list(shapes._candidates())


@given(st.floats(2e5, 1e11), st.floats(1.0, 3.0))
def test_a_larger_wish_is_never_met_by_a_smaller_model(size: float, factor: float) -> None:
    assert matrices(shapes.shape_for(size)) <= matrices(shapes.shape_for(size * factor))


def test_no_shape_of_the_ladder_is_odd() -> None:
    """What is never the nearest is left out: depths stay within a factor of two of the rule."""
    for model in shapes.ladder(low=2e7, high=1e11):
        assert 0.5 < model.d_model / model.layers / shapes.aspect(model.d_model) < 2


def test_vocabulary_and_context_are_as_asked() -> None:
    found = shapes.shape_for(50.33e6, vocab_size=32_000, context=512)
    assert (found.vocab_size, found.context, matrices(found)) == (32_000, 512, 50_331_648)
    assert {m.context for m in shapes.ladder(8000, 256, 1e6, 1e7)} == {256}
    assert all(1e6 <= matrices(m) <= 1e7 for m in shapes.ladder(8000, 256, 1e6, 1e7))


@pytest.mark.parametrize("size", [0.0, -5.0, math.nan, math.inf])
def test_no_size_at_all(size: float) -> None:
    with pytest.raises(UserError, match="expected a positive number"):
        shapes.shape_for(size)


def test_the_rules_are_said() -> None:
    assert {what for what, _ in shapes.RULES} >= {"width", "depth", "key-value heads", "d_ff", "context"}
    assert all(rule for _, rule in shapes.RULES)


def test_no_torch_and_no_numpy() -> None:
    code = (
        "import sys; from x1_pretrain.model import shapes; from x1_pretrain.money import prices; "
        "shapes.ladder(); print({'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
