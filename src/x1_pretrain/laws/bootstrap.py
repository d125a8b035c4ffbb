"""How far the fit moves with other runs: the bootstrap over runs, and the largest budget left out."""

from __future__ import annotations

import numpy as np

from x1_pretrain.laws import forms, solver
from x1_pretrain.laws.forms import F64
from x1_pretrain.laws.points import Points, budgets, largest_budget
from x1_pretrain.laws.results import HOFFMANN, Estimate, HeldOut


def cluster_weights(points: Points, replicates: int, seed: int) -> F64:
    """How often each point counts in each replicate, (R, n): as often as its run was drawn.

    Points of one run (cooldowns of one trunk) go together: their errors are alike, and drawing them one by
    one would take 500 points of 50 runs for 500 independent ones.
    """
    numbers, cluster = np.unique(points.cluster, return_inverse=True)
    many = len(numbers)
    drawn = np.random.default_rng(seed).multinomial(many, np.full(many, 1.0 / many), size=replicates)
    return drawn[:, cluster].astype(float)


def bootstrap(points: Points, best: Estimate, replicates: int = 4000, seed: int = 0) -> F64:
    """The law of each replicate, (R, 5)."""
    return solver.replicates(points, best, cluster_weights(points, replicates, seed))[0]


def leave_largest_out(points: Points) -> HeldOut | None:
    """The law without the largest budget, and how well it predicts that budget. None where what remains
    could not be told from other laws anyway: too few points, or a single budget."""
    if not len(points):
        return None
    top = largest_budget(points.flops)
    rest, left_out = points.only(~top), points.only(top)
    if len(rest) <= HOFFMANN.free or len(np.unique(budgets(rest.flops))) < 2:
        return None
    law = solver.estimate(rest).law
    error = np.log(forms.loss(law, left_out.n, left_out.d) / left_out.loss)
    return HeldOut(
        law=law,
        points=len(left_out),
        flops_fitted_to=float(rest.flops.max()),
        flops_left_out=float(left_out.flops.max()),
        bias=float(error.mean()),
        rms=float(np.sqrt(np.mean(error**2))),
    )
