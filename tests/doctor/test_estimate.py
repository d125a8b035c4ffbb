"""Hours and dollars against sums done another way: by walking through the run step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpora import tiny_config

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.doctor import estimate
from x1_pretrain.doctor.estimate import Price
from x1_pretrain.train import due


def config(steps: int = 100, every: int = 10, **checkpoint: object) -> RunConfig:
    return parse_config(
        tiny_config(
            training={"total_steps": steps},
            checkpoint={"every": every, **checkpoint},
            evaluation={"every": every},
            optimizer={"warmup_steps": 0},
        ),
        "test",
    )


class Walk:
    """Enough of a run for the loop's own `due`."""

    def __init__(self, steps: int) -> None:
        self.step, self.total_steps = 0, steps


@given(steps=st.integers(1, 60), every=st.integers(1, 70), at=st.lists(st.integers(1, 60), max_size=3))
def test_evaluations_and_checkpoints_are_as_many_as_the_loop_makes(
    steps: int, every: int, at: list[int]
) -> None:
    at = [step for step in at if step <= steps]
    run, last, evaluations, saves = Walk(steps), -1, 0, 0
    for run.step in range(steps + 1):
        evaluations += due(run, every, last)  # type: ignore[arg-type]
        saves += due(run, every, last, at)  # type: ignore[arg-type]
        last = run.step - 1
    made = config(steps, every, at=at)
    assert (estimate.evaluations(made), estimate.checkpoints(made)) == (evaluations, saves)


@given(
    steps=st.integers(1, 40),
    every=st.integers(1, 15),
    keep_last=st.integers(2, 4),
    keep_every=st.one_of(st.none(), st.integers(1, 12)),
)
def test_the_fullest_moment_on_the_disk(
    steps: int, every: int, keep_last: int, keep_every: int | None
) -> None:
    """A new one is written before an old one goes."""
    kept: list[int] = []
    fullest = 0
    for step in sorted({0, *range(every, steps + 1, every), steps}):
        kept.append(step)
        fullest = max(fullest, len(kept))
        old = kept[:-keep_last]
        kept = [s for s in kept if s not in old or (keep_every and s % keep_every == 0)]
    found = estimate.kept_checkpoints(config(steps, every, keep_last=keep_last, keep_every=keep_every))
    assert fullest <= found <= fullest + keep_last + 1


def test_a_step_is_its_micro_batches_the_update_and_the_sum_over_gpus() -> None:
    found = estimate.pace([0.5] * 20, 4, 0.1, 32, 1_000_000, 4, 1e9)
    assert found.sum_s == pytest.approx(2 * 3 / 4 * 4e6 / 1e9)
    assert found.step_s == pytest.approx(32 / 4 * 0.5 + 0.1 + 0.006)
    assert (found.low_s, found.high_s) == pytest.approx((found.step_s, found.step_s))
    assert found.tokens_per_sec(1000)[0] == pytest.approx(1000 / found.step_s)
    alone = estimate.pace([0.5], 4, 0.1, 32, 1_000_000, 1, None)
    assert alone.sum_s == 0.0


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=60))
def test_the_spread_is_numpys_percentiles(values: list[float]) -> None:
    low, high = estimate.spread(values)
    wanted = np.percentile(values, [10, 90]) if len(values) >= 10 else (min(values), max(values))
    assert (low, high) == pytest.approx(tuple(wanted))


def test_hours_and_dollars() -> None:
    made = config(steps=100, every=30)  # evaluated and saved at 0, 30, 60, 90, 100
    pace = estimate.pace([1.0] * 9 + [2.0], 1, 0.0, 10, 10, 1, None)
    found = estimate.estimate(made, pace, evaluation_s=7.0, checkpoint_s=3.0, price=Price(3.6, "x"))
    seconds = 100 * 10 * 1.0 + 5 * 7.0 + 5 * 3.0
    assert found.hours[0] == pytest.approx(seconds / 3600)
    assert found.hours[1] <= found.hours[0] <= found.hours[2]
    assert found.usd is not None
    assert found.usd[0] == pytest.approx(seconds / 1000)
    assert found.tokens_per_sec[0] == pytest.approx(256 / 10)
    assert found.tokens_per_sec[1] <= found.tokens_per_sec[0] <= found.tokens_per_sec[2]
    assert sum(found.parts_s.values()) == pytest.approx(seconds)
    assert found.to_json()["usd"] == found.usd[0]


def test_the_sentences_hold_what_they_must() -> None:
    made = config()
    pace = estimate.pace([1.0] * 10, 1, 0.0, 8, 10, 1, None)
    paid = estimate.estimate(made, pace, 0.0, 0.0, Price(2.0, "a list of a day"))
    text = estimate.sentences(paid, made, 2, "2 x H100")
    for words in (
        "32 tokens/s",
        "25,600 tokens take 0.22 h",
        "$0.44",
        "a list of a day",
        "2 x H100",
        "rank of 2",
    ):
        assert words in text, words
    assert "this CPU's" not in text
    assert "The speed is this CPU's" in estimate.sentences(paid, made, 2, "CPU", gpu=False)
    unread = estimate.estimate(made, pace, None, 0.0, None)
    assert "evaluation: not counted, the data did not open" in estimate.sentences(unread, made, 1, "CPU")
    assert unread.hours == paid.hours
    free = estimate.estimate(made, pace, 0.0, 0.0, None)
    assert free.usd is None
    assert "no price is known" in estimate.sentences(free, made, 1, "CPU")


def test_what_takes_years_is_rounded() -> None:
    made = config(steps=100, every=100)
    pace = estimate.pace([75_161.0] * 10, 1, 0.0, 8, 10, 1, None)
    text = estimate.sentences(estimate.estimate(made, pace, 0.0, 0.0, Price(2.0, "x")), made, 1, "CPU")
    assert "about 16,700 h [about 16,700 h, about 16,700 h]: training about 16,700 h" in text
    assert "$33,400 [" in text
