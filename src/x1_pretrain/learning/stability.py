"""What to do with a step whose loss or gradient is not a finite number: never let it reach the weights."""

from __future__ import annotations

import math
from typing import Literal

STREAK_LIMIT = 3

Verdict = Literal["go", "skip", "stop"]


def judge(loss: float, grad_norm: float, streak: int) -> Verdict:
    """`streak` is the number of steps just before this one that were not finite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return "go"
    return "stop" if streak + 1 >= STREAK_LIMIT else "skip"
