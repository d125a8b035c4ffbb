"""All of one fit: the estimate and its rivals, the gate, the intervals it may give, what to run next."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from x1_pretrain.config import DECAY_SHARE
from x1_pretrain.laws import forms
from x1_pretrain.laws.bootstrap import bootstrap, leave_largest_out
from x1_pretrain.laws.fitted import KEPT_DRAWS, Band, Fitted
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.identify import judge, judge_draws
from x1_pretrain.laws.next_run import next_runs
from x1_pretrain.laws.parabola import parabolas
from x1_pretrain.laws.points import Points
from x1_pretrain.laws.posterior import prior_dominated, prior_for, sample
from x1_pretrain.laws.results import (
    HOFFMANN,
    TIED,
    Estimate,
    Form,
    HeldOut,
    Posterior,
    Prior,
    Report,
    Verdict,
)
from x1_pretrain.laws.solver import estimate

NONE = np.empty((0, 5))
# Exponents of published laws, for the table that shows how much the answer leans on the form.
FIXED = (
    Form("alpha=0.3473, beta=0.3672", alpha=0.347310, beta=0.367172),
    Form("alpha=0.3392, beta=0.2849", alpha=0.33917084, beta=0.2849083),
)


def report(
    points: Points, replicates: int, seed: int, target_n: float, prior: Prior | None, bayesian: bool
) -> Report:
    """Fit `points`. With `prior` given that one is used where a prior is needed; `bayesian`: give the
    posterior also where the points would do without."""
    begun = time.perf_counter()
    best = estimate(points)
    verdict = judge(points, best)
    draws = bootstrap(points, best, replicates, seed) if verdict.identified else NONE
    if len(draws) and (trouble := judge_draws(draws)):
        verdict, draws = replace(verdict, identified=False, reasons=verdict.reasons + trouble), NONE
    believed = (
        sample(points, prior or prior_for(points), seed, target_n) if bayesian or not len(draws) else None
    )
    held_out = leave_largest_out(points) if len(draws) and believed is None else None
    fitted = (
        _by_posterior(points, verdict, believed)
        if believed is not None
        else _by_bootstrap(points, best, verdict, held_out, draws)
    )
    return Report(
        points=points,
        best=best,
        others=rivals(points),
        verdict=verdict,
        fitted=fitted,
        parameters=_parameters(fitted),
        held_out=held_out,
        posterior=believed,
        parabolas=parabolas(points),
        next_runs=next_runs(fitted, target_n, usd_per_flop(points)),
        target_n=target_n,
        replicates=len(draws),
        seconds=time.perf_counter() - begun,
    )


def rivals(points: Points) -> tuple[Estimate, ...]:
    """Other estimators and other forms: how much the answer depends on the choice."""
    enough = len(points) > HOFFMANN.free
    others = (
        [estimate(points, HOFFMANN, "lad"), estimate(points, HOFFMANN, "least-squares")] if enough else []
    )
    return (*others, *(estimate(points, form) for form in (TIED, *FIXED) if len(points) >= form.free))


def usd_per_flop(points: Points) -> float | None:
    """What a FLOP of 6ND cost in these runs, where the file says so."""
    known = np.isfinite(points.usd) & (points.usd > 0)
    work = 6 * points.n * points.d
    for cluster in np.unique(points.cluster):  # branches paid for their own decay only, the trunk for all
        member = np.flatnonzero(points.cluster == cluster)
        work[np.delete(member, np.argmax(work[member]))] *= DECAY_SHARE
    return float(points.usd[known].sum() / work[known].sum()) if known.any() else None


def _by_bootstrap(
    points: Points, best: Estimate, verdict: Verdict, held_out: HeldOut | None, draws: F64
) -> Fitted:
    return Fitted(
        law=best.law,
        method="bootstrap",
        draws=thinned(draws),
        prior_draws=NONE,
        counts=points.counts,
        scatter=verdict.residual_sd,
        without_largest=held_out.law if held_out else None,
        n_range=_range(points.n),
        d_range=_range(points.d),
        flops_range=_range(6 * points.n * points.d),
        prior_dominated=False,
        reasons=(),
        origin=points.origin,
    )


def _by_posterior(points: Points, verdict: Verdict, believed: Posterior) -> Fitted:
    return Fitted(
        law=centre(believed.draws, points),
        method="posterior",
        draws=thinned(believed.draws),
        prior_draws=thinned(believed.prior_draws),
        counts=points.counts,
        scatter=float(np.sqrt(np.mean(believed.noise**2))),
        without_largest=None,
        n_range=_range(points.n),
        d_range=_range(points.d),
        flops_range=_range(6 * points.n * points.d),
        prior_dominated=prior_dominated(believed),
        reasons=verdict.reasons,
        origin=points.origin,
    )


def centre(draws: F64, points: Points) -> Law:
    """One law for many: the draw whose losses at the points and whose D_opt at their sizes lie nearest the
    middle. Medians taken number by number are of no draw, and miss the points."""
    law = Law.of(draws).spread()
    told = np.log(np.hstack([forms.loss(law, points.n, points.d), forms.tokens_for(law, points.n)]))
    middle = np.median(told, axis=0)
    width = np.maximum(np.std(told, axis=0), 1e-12)
    nearest = np.argmin((((told - middle) / width) ** 2).sum(axis=1))
    return Law(*map(float, draws[nearest]))


def _range(values: F64) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _parameters(fitted: Fitted) -> tuple[Band, Band, Band, Band, Band]:
    """E, A, alpha, B, beta with their intervals."""
    low, high = np.nanquantile(fitted.draws, [0.025, 0.975], axis=0)
    point: list[Any] = list(fitted.law)
    e, a, alpha, b, beta = (
        Band(float(p), float(x), float(y)) for p, x, y in zip(point, low, high, strict=True)
    )
    return e, a, alpha, b, beta


def thinned(draws: F64) -> F64:
    """Evenly chosen draws, as many as a file keeps."""
    chosen = np.linspace(0, len(draws) - 1, min(KEPT_DRAWS, len(draws))).astype(int)
    return np.asarray(draws[chosen])


def predicted(fitted: Fitted, n: float) -> dict[str, Band]:
    """D_opt(N), and the loss there."""
    best = fitted.tokens_for(n)
    return {
        "D_opt": best,
        "D_per_N": Band(*(value / n for value in best)),
        "loss": fitted.loss(n, best.point),
    }
