"""Approach 2 of Hoffmann et al.: on each budget a parabola of ln L in ln N, and its lowest point.

A second opinion and an overlay, never the answer: where alpha and beta differ, or the sizes lie to one side
of the optimum, the true curve is not a parabola and its lowest point is off (arXiv 2603.22339).
"""

from __future__ import annotations

import numpy as np

from x1_pretrain.laws.forms import F64
from x1_pretrain.laws.identify import ONE_BUDGET
from x1_pretrain.laws.points import Points, budgets
from x1_pretrain.laws.results import Parabola

LEAST_SIZES = 3  # a parabola has three numbers


def parabolas(points: Points) -> tuple[Parabola, ...]:
    """One for each budget with at least three sizes, the smallest budget first.

    Points whose FLOPs run into each other over a wide range are not on one budget, and get no parabola.
    """
    if not len(points):
        return ()
    number = budgets(points.flops)
    parts = [points.only(number == budget) for budget in range(int(number.max()) + 1)]
    return tuple(_parabola(part) for part in parts if _is_one_budget(part))


def _is_one_budget(points: Points) -> bool:
    return len(np.unique(points.n)) >= LEAST_SIZES and bool(np.ptp(np.log(points.flops)) < ONE_BUDGET)


def _parabola(points: Points) -> Parabola:
    log_n, log_loss = np.log(points.n), np.log(points.loss)
    centre = float(log_n.mean())  # about the centre, where the columns are nearly at right angles
    square, slope, level = (float(v) for v in _least_squares(log_n - centre, log_loss))
    coefficients = (square, slope - 2 * square * centre, level - slope * centre + square * centre**2)
    flops = float(np.exp(np.log(points.flops).mean()))
    off = -slope / (2 * square) if square > 0 else np.inf  # of the lowest point from the centre
    if abs(off) > 50:  # level or downwards in all but rounding: e^50 sizes away is nowhere
        return Parabola(flops, len(points), np.nan, np.nan, False, coefficients)
    lowest = centre + off
    inside = bool(log_n.min() <= lowest <= log_n.max())
    loss = float(np.exp(level + 0.5 * slope * off))
    return Parabola(flops, len(points), float(np.exp(lowest)), loss, inside, coefficients)


def _least_squares(x: F64, y: F64) -> F64:
    return np.asarray(np.linalg.lstsq(np.stack([x * x, x, np.ones_like(x)], axis=1), y)[0])


def exponent(found: tuple[Parabola, ...]) -> float | None:
    """a in N_opt ~ C^a, from two budgets or more whose lowest point lies between their sizes."""
    usable = [p for p in found if p.inside]
    if len(usable) < 2:
        return None
    log_c, log_n = (np.log([getattr(p, key) for p in usable]) for key in ("flops", "n_opt"))
    log_c -= log_c.mean()
    return float(log_c @ log_n / (log_c @ log_c))
