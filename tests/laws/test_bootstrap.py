"""The bootstrap draws runs, covers the truth, and the largest budget left out is what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.laws.designs import TRUTH, cloud, isoflops
from x1_pretrain.laws import bootstrap, forms, solver
from x1_pretrain.laws.forms import Law
from x1_pretrain.laws.points import points


def test_points_of_one_run_are_drawn_together() -> None:
    p = replace(cloud(12), cluster=np.repeat([7, 3, 9], [3, 4, 5]))  # any numbers will do
    weights = bootstrap.cluster_weights(p, 500, seed=1)
    assert weights.shape == (500, 12)
    for rows in (slice(0, 3), slice(3, 7), slice(7, 12)):
        assert (weights[:, rows] == weights[:, rows][:, :1]).all()
    drawn = weights[:, [0, 3, 7]]
    assert (drawn.sum(axis=1) == 3).all()  # as many runs as there are
    assert drawn.mean(axis=0) == pytest.approx(np.ones(3), abs=0.15)
    assert drawn.std(axis=0) == pytest.approx(np.full(3, (2 / 3) ** 0.5), abs=0.1)


def test_a_seed_repeats_a_bootstrap_and_another_does_not() -> None:
    p = cloud(30)
    best = solver.estimate(p)
    one, again, other = (bootstrap.bootstrap(p, best, 50, seed) for seed in (4, 4, 5))
    assert (one == again).all()
    assert not (one == other).all()
    assert one.shape == (50, 5)


def test_runs_that_share_their_error_give_wider_intervals_than_points_drawn_one_by_one() -> None:
    """Thirty runs of eight points, each run off by 0.5 %: 240 points are worth about 30."""
    random = np.random.default_rng(0)
    run = np.repeat(np.arange(30), 8)
    n = 1e7 * np.exp(random.uniform(0, 5, 30))[run]
    d = 1e9 * np.exp(random.uniform(0, 5, 240))
    scatter = np.exp(0.005 * random.standard_normal(30)[run] + 1e-3 * random.standard_normal(240))
    losses = forms.loss(TRUTH, n, d) * scatter
    together, alone = points(n, d, losses, cluster=run), points(n, d, losses)
    best = solver.estimate(together)
    wide, narrow = (bootstrap.bootstrap(p, best, 400)[:, 2].std() for p in (together, alone))
    assert wide > 1.5 * narrow


def test_intervals_of_fifteen_points_hold_the_truth() -> None:
    """95 % of 25 data sets are 24; fewer than 19 would be chance once in a thousand times or less."""
    held = 0
    truth = float(np.log(forms.tokens_for(TRUTH, 1e9)))
    for seed in range(25):
        p = isoflops([1e17, 1e18, 1e19], seed=seed)
        draws = bootstrap.bootstrap(p, solver.estimate(p, starts=8), 100, seed)
        low, high = np.quantile(np.log(forms.tokens_for(Law.of(draws), 1e9)), [0.025, 0.975])
        held += low <= truth <= high
    assert held >= 19


def test_of_many_points_it_is_the_classical_standard_error() -> None:
    p = cloud(240, noise=0.005)
    best = solver.estimate(p, estimator="least-squares")
    j = solver.jacobian(p, best)
    classical = 0.005 * np.sqrt(np.diag(np.linalg.inv(j.T @ j)))[3:]  # of alpha and beta
    drawn = bootstrap.bootstrap(p, best, 1000)
    assert drawn[:, [2, 4]].std(axis=0) == pytest.approx(classical, rel=0.2)


def test_the_largest_budget_left_out() -> None:
    p = isoflops([1e17, 1e18, 1e19], noise=0.003)
    held = bootstrap.leave_largest_out(p)
    assert held is not None
    assert (held.points, held.flops_fitted_to, held.flops_left_out) == (
        5,
        pytest.approx(1e18),
        pytest.approx(1e19),
    )
    assert held.law == solver.estimate(p.only(p.flops < 5e18)).law
    top = p.only(p.flops > 5e18)
    error = np.log(forms.loss(held.law, top.n, top.d)) - np.log(top.loss)
    assert held.bias == pytest.approx(error.mean())
    assert held.rms**2 == pytest.approx(error.var() + error.mean() ** 2)


def test_a_largest_budget_that_is_off_shows_as_a_bias() -> None:
    p = isoflops([1e17, 1e18, 1e19], noise=1e-4)
    shifted = replace(p, loss=np.where(p.flops > 5e18, p.loss * np.exp(0.03), p.loss))
    held = bootstrap.leave_largest_out(shifted)
    assert held is not None
    assert held.bias == pytest.approx(-0.03, abs=0.003)  # predicted less than measured


@pytest.mark.parametrize(
    "p",
    [
        isoflops([1e18], 9),  # one budget
        isoflops([1e18, 1e19]),  # one would remain
        isoflops([1e17, 1e18, 1e19], sizes=2),  # four points would
        points([1e7], [1e9], [3.0]),
        points([], [], []),
    ],
)
def test_nothing_is_left_out_where_too_little_would_remain(p: object) -> None:
    assert bootstrap.leave_largest_out(p) is None  # type: ignore[arg-type]
