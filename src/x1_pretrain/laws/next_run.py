"""Which run, made next, would narrow the interval of D_opt most: per dollar, within reach, and at a stretch.

No refit: each draw of the law says D_opt and also what the new run would measure; where the two go together,
measuring the one tells the other. If both were jointly normal (in logarithms) the variance left would be

    var(q) - cov(q, y)^2 / (var(y) + s^2)      q = ln D_opt(target), y = ln L(N, D), s = scatter of a run
"""

from __future__ import annotations

import numpy as np

from x1_pretrain.laws import forms
from x1_pretrain.laws.fitted import KEPT_DRAWS, Z95, Fitted
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.results import NextRun

BEYOND = 4.0  # how far above the sizes, tokens and FLOPs of the data a candidate may lie
BELOW = 2.0  # how far below: cheap, but there the law is the first to fail
STEP = 2**0.5  # between neighbours of the grid
LEAST_SCATTER = 0.002  # of ln L: no run repeats better than its seed (0.0005-0.026 nats were seen)
TRIM = 0.005  # draws past this quantile are pulled in to it: one runaway would decide a variance
WORTHWHILE = 1 / 3  # of the most that any candidate narrows; less is cheap, and tells little
APART = 2.5  # two proposals differ by more than this in size or in tokens


def next_runs(
    fitted: Fitted, target_n: float, usd_per_flop: float | None = None, limit: int = 3
) -> tuple[NextRun, ...]:
    """The run that narrows D_opt(target_n) most per FLOP, the one that does most within the largest budget so
    far, the one that does most up to 4 times that; best per FLOP first, near twins left out.

    A run costs 6ND FLOPs; `usd_per_flop` is the price of one of those. Where they are ranked, none costs less
    than the smallest run so far: it has to be set up, evaluated and waited for too.
    """
    draws = fitted.draws[:: max(1, len(fitted.draws) // KEPT_DRAWS)]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        tokens = np.log(np.asarray(forms.tokens_for(Law.of(draws), target_n), dtype=float))
    usable = np.isfinite(tokens)
    if usable.sum() < 2 or not _pulled_in(tokens[usable]).var() > 0:
        return ()
    n, d = _grid(fitted)
    seen = np.log(forms.loss(Law.of(draws[usable]).spread(), n, d))
    before, after = _widths(tokens[usable], seen, float(np.fmax(fitted.scatter, LEAST_SCATTER)))
    found = [
        _run(n[i], d[i], usd_per_flop, before, after[i])
        for i in _ranked(6.0 * n * d, before - after, fitted.flops_range)
    ]
    return tuple(_apart(found)[:limit])


def _grid(fitted: Fitted) -> tuple[F64, F64]:
    """Sizes and tokens, of two digits so that they can be typed, within reach.

    Not below a token a parameter, where laws were hardly ever measured, unless the largest model had less.
    """
    n, d = (v.ravel() for v in np.meshgrid(_around(fitted.n_range), _around(fitted.d_range)))
    fewest = min(1.0, fitted.d_range[1] / fitted.n_range[1])
    kept = (6.0 * n * d <= BEYOND * fitted.flops_range[1]) & (d >= fewest * n)
    return n[kept], d[kept]


def _around(ends: tuple[float, float]) -> F64:
    low, high = np.log(ends[0] / BELOW), np.log(ends[1] * BEYOND)
    values = np.exp(np.linspace(low, high, 1 + round((high - low) / np.log(STEP))))
    return np.unique([float(f"{value:.1e}") for value in values])


def _widths(tokens: F64, seen: F64, scatter: float) -> tuple[float, F64]:
    """Of the interval of ln D_opt, from middle to end: now, and after each candidate (a column of seen)."""
    q = _pulled_in(tokens)
    y = _pulled_in(seen)
    q, y = q - q.mean(), y - y.mean(axis=0)
    together = q @ y / len(q)
    left = q.var() - together**2 / (y.var(axis=0) + scatter**2)
    return float(Z95 * q.std()), np.asarray(Z95 * np.sqrt(np.maximum(left, 0.0)))


def _pulled_in(values: F64) -> F64:
    return np.clip(values, *np.quantile(values, [TRIM, 1.0 - TRIM], axis=0))


def _ranked(flops: F64, narrowing: F64, made: tuple[float, float]) -> list[int]:
    """The three that stand out among those that are worth a run, best per FLOP first."""
    most = narrowing.max(initial=0.0)
    rate = np.where(narrowing >= WORTHWHILE * most, narrowing, 0.0) / np.maximum(flops, made[0])
    if not rate.any():
        return []
    within = np.where(flops <= made[1], narrowing, -1.0)
    special = [int(rate.argmax()), int(within.argmax()), int(narrowing.argmax())]
    return sorted((i for i in special if rate[i] > 0), key=lambda i: -float(rate[i]))


def _apart(runs: list[NextRun]) -> list[NextRun]:
    """Without those that are nearly the same as one before."""
    kept: list[NextRun] = []
    for run in runs:
        if all(max(run.n / k.n, k.n / run.n, run.d / k.d, k.d / run.d) > APART for k in kept):
            kept.append(run)
    return kept


def _run(n: float, d: float, usd_per_flop: float | None, before: float, after: float) -> NextRun:
    flops = float(6.0 * n * d)
    usd = None if usd_per_flop is None else flops * usd_per_flop
    return NextRun(float(n), float(d), usd, flops, float(np.exp(before)), float(np.exp(after)))
