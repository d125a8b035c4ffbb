"""Which checkpoints stay, against a definition that goes through the steps one at a time."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x1_pretrain.records.retention import kept, losses_at, to_go_back_to

STEPS = st.lists(st.integers(0, 40), max_size=25)
LOSS = st.one_of(st.sampled_from([1.0, 2.0, 2.5]), st.floats(width=32))


def stays(
    step: int,
    steps: set[int],
    last: int,
    every: int | None,
    at: set[int],
    losses: dict[int, float],
    best: int,
) -> bool:
    """By counting who is before it, not by sorting."""
    if step == max(steps):
        return True
    if sum(other > step for other in steps) < last:
        return True
    if every and step % every == 0:
        return True
    if step in at:
        return True
    mine = losses.get(step)
    if mine is None or not math.isfinite(mine):
        return False
    better = 0
    for other in steps - {step}:
        theirs = losses.get(other)
        if theirs is not None and math.isfinite(theirs):
            better += theirs < mine or (theirs == mine and other > step)
    return better < best


@given(
    STEPS,
    st.integers(-1, 6),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sets(st.integers(0, 40), max_size=4),
    st.dictionaries(st.integers(0, 40), LOSS, max_size=20),
    st.integers(-1, 5),
)
@example([3, 1, 2], 1, None, set(), {1: 2.0, 2: 2.0, 3: math.nan}, 1)
def test_it_is_the_definition(
    steps: list[int],
    last: int,
    every: int | None,
    at: set[int],
    losses: dict[int, float],
    best: int,
) -> None:
    there = set(steps)
    expected = {step for step in there if stays(step, there, last, every, at, losses, best)}
    assert kept(iter(steps), last, every, at, losses, best) == expected


@given(STEPS, st.dictionaries(st.integers(0, 40), LOSS), st.integers(0, 4), st.integers(0, 4))
def test_what_went_is_not_missed_later(
    steps: list[int], losses: dict[int, float], last: int, best: int
) -> None:
    """Pruning what was pruned before changes nothing: here and in the mirror the same stay, at whatever
    moment each of them looks."""
    once = kept(steps, last, None, (), losses, best)
    assert kept(once, last, None, (), losses, best) == once


def test_a_run_as_it_is_kept() -> None:
    losses = {0: 9.0, 10: 4.0, 20: 3.0, 30: 3.5, 40: math.nan, 50: math.inf}
    assert kept(range(0, 70, 10), 2, None, (), losses, 1) == {60, 50, 20}
    assert kept(range(0, 70, 10), 2, 30, (10,), losses, 0) == {60, 50, 30, 0, 10}
    assert kept([], 2, 30, (10,), losses, 3) == set()
    assert kept([0], 0, None, (), {}, 0) == {0}


def test_where_a_rewind_goes_back_to() -> None:
    assert to_go_back_to([10, 20, 30, 40], [25, 26, 41]) == {20, 40}
    assert to_go_back_to([10, 20], [20]) == {10}
    assert to_go_back_to([10, 20], [10]) == set()
    assert to_go_back_to([], [5]) == to_go_back_to([5], []) == set()


def test_a_tie_goes_to_the_later() -> None:
    assert kept([1, 2, 3, 9], 1, None, (), {1: 2.0, 2: 2.0, 3: 2.5}, 1) == {9, 2}


def test_losses_are_those_of_the_evaluations() -> None:
    rows = [
        {"step": 10, "train/loss": 3.0},
        {"step": 10, "val/loss": 2.5},
        {"step": 20, "val/loss": 2},
        {"step": 30, "val/loss": "nan"},
        {"step": 20, "val/loss": 1.5},  # done again
        {"step": 10, "val/code/loss": 1.0},
    ]
    assert losses_at(rows) == {10: 2.5, 20: 1.5}
    assert losses_at([]) == {}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"val/loss": 1.0},
        {"step": None, "val/loss": 1.0},
        {"step": "7", "val/loss": 1.0},
        {"step": 7, "val/loss": True},
        {"step": 7, "val/loss": "inf"},
        {"step": 7, "val/loss": math.nan},
        {"step": 7, "val/loss": [1.0]},
        {"step": math.nan, "val/loss": 1.0},
    ],
)
def test_an_odd_row_is_no_loss(row: dict[str, object]) -> None:
    assert losses_at([row]) == {}


def test_a_loss_that_became_no_number_is_forgotten() -> None:
    assert losses_at([{"step": 7, "val/loss": 1.0}, {"step": 7, "val/loss": "nan"}]) == {}


def test_what_is_not_finite_is_none_of_the_best() -> None:
    assert kept([1, 2, 3], 1, None, (), {1: math.inf, 2: -math.inf}, 2) == {3}
    assert kept([1, 2, 3], 1, None, (), {1: 1.0, 2: 2.0}, -1) == {3}
