from __future__ import annotations

import math

import pytest

from x1_pretrain.learning.stability import judge


@pytest.mark.parametrize(
    ("loss", "norm", "streak", "verdict"),
    [
        (2.0, 1.0, 0, "go"),
        (2.0, 1.0, 2, "go"),
        (math.nan, 1.0, 0, "skip"),
        (2.0, math.inf, 1, "skip"),
        (-math.inf, math.nan, 2, "stop"),
        (math.nan, 1.0, 7, "stop"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_a_streak_stops(
    loss: float, norm: float, streak: int, verdict: str
) -> None:
    assert judge(loss, norm, streak) == verdict
