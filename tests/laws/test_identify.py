"""Points that can tell five numbers pass; those that can't are refused, with the reason that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.laws.designs import TRUTH, chinchilla, cloud, isoflops, measured
from x1_pretrain.laws import bootstrap, solver
from x1_pretrain.laws.forms import Law
from x1_pretrain.laws.identify import EXPONENTS, judge, judge_draws
from x1_pretrain.laws.points import Points, points
from x1_pretrain.laws.results import Form, Verdict

LAB = points([5e6, 25e6, 100e6], [4.5e9, 900e6, 225e6], [4.66, 4.40, 4.48])
SIZES = np.geomspace(1e7, 1e9, 12)


def verdict(p: Points) -> Verdict:
    return judge(p, solver.estimate(p))


def says(found: Verdict, *parts: str) -> bool:
    return any(all(part in reason for part in parts) for reason in found.reasons)


def test_the_published_points_are_enough(shared: Path) -> None:
    p = chinchilla(shared)
    best = solver.estimate(p)
    found = judge(p, best)
    assert found.identified
    assert found.reasons == ()
    assert (found.points, found.clusters, found.rank) == (240, 240, 5)
    assert judge_draws(bootstrap.bootstrap(p, best, 200)) == ()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budgets", [[1.35e17, 1.35e18], [1e17, 1e18, 1e19]])
def test_two_budgets_of_five_sizes_are_enough(budgets: list[float], seed: int) -> None:
    p = isoflops(budgets, seed=seed)
    best = solver.estimate(p)
    found = judge(p, best)
    assert found.identified, found.reasons
    assert (found.budgets, found.points) == (len(budgets), 5 * len(budgets))
    assert judge_draws(bootstrap.bootstrap(p, best, 400)) == ()


def test_tiny_models_are_judged_alike() -> None:
    random = np.random.default_rng(0)
    n, d = np.exp(random.uniform(np.log([1e4, 1e5]), np.log([1e6, 1e8]), (30, 2))).T
    assert verdict(measured(n, d, Law(0.9, 30.0, 0.3, 60.0, 0.28), noise=0.01)).identified


def test_the_residual_sd_counts_degrees_of_freedom() -> None:
    """Ten points less five numbers; without counting them the sd would come out at 71 %."""
    sds = []
    for seed in range(30):
        p = isoflops([1e17, 1e18], noise=0.005, seed=seed)
        sds.append(judge(p, solver.estimate(p, estimator="least-squares", starts=8)).residual_sd)
    assert np.mean(np.square(sds)) ** 0.5 == pytest.approx(0.005, rel=0.15)
    assert np.isnan(verdict(LAB).residual_sd)


def test_three_points_of_a_lab() -> None:
    found = verdict(LAB)
    assert not found.identified
    assert found.reasons[0] == "3 points for 5 numbers: infinitely many laws pass through them"
    assert says(found, "3 independent runs")
    assert says(found, "one budget only (1.35e+17 to 1.35e+17 FLOPs)")
    assert found.rank == 3
    assert found.condition > 1e12


def test_five_points_on_one_budget() -> None:
    found = verdict(isoflops([1.35e17], noise=0.001))
    assert not found.identified
    assert says(found, "5 points for 5 numbers", "none is left over")
    assert says(found, "one budget only")


def test_nine_points_on_one_budget() -> None:
    found = verdict(isoflops([1.35e17], sizes=9))
    assert not found.identified
    assert says(found, "one budget only")
    assert not says(found, "points for 5 numbers")


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.005])
def test_tokens_in_proportion_to_size(noise: float) -> None:
    found = verdict(measured(SIZES, 20 * SIZES, noise=noise))
    assert not found.identified
    assert says(found, "N and D move together")


@pytest.mark.parametrize(
    ("swapped", "what"), [(False, "one size (1e+07)"), (True, "one number of tokens (1e+09)")]
)
def test_one_size_or_one_number_of_tokens(swapped: bool, what: str) -> None:
    one, many = np.full(12, 1e9 if swapped else 1e7), 50 * SIZES
    found = verdict(measured(many, one, noise=0.005) if swapped else measured(one, many, noise=0.005))
    assert not found.identified
    assert says(found, what)
    assert found.rank < 5


def test_a_small_cloud_is_too_ill_conditioned() -> None:
    random = np.random.default_rng(1)
    n, d = 1e8 * np.exp(random.uniform(0, 0.7, 30)), 2e9 * np.exp(random.uniform(0, 0.7, 30))
    found = verdict(measured(n, d))
    assert not found.identified
    assert found.rank == 5
    assert says(found, "condition number", "above 500")


def test_the_condition_number_does_not_depend_on_units() -> None:
    p = isoflops([1e17, 1e18])
    other = replace(p, n=p.n / 1e6, d=p.d / 1e9)
    assert verdict(other).condition == pytest.approx(verdict(p).condition, rel=1e-3)


@pytest.mark.parametrize(("runs", "enough"), [(6, False), (7, False), (8, True), (15, True)])
def test_too_few_runs_however_many_points(runs: int, enough: bool) -> None:
    p = isoflops([1e17, 1e18, 1e19], noise=0.004)
    found = verdict(replace(p, cluster=np.arange(15) % runs))
    assert found.identified is enough
    assert says(found, f"{runs} independent runs", "8 or more") is not enough


def test_computed_losses_are_no_measurement() -> None:
    exact = isoflops([1e17, 1e18, 1e19], noise=0.0)
    best = solver.estimate(exact)
    found = judge(exact, best)
    assert not found.identified
    assert says(found, "passes through every point")
    (reason,) = judge_draws(bootstrap.bootstrap(exact, best, 100))
    assert "without width" in reason
    # printed to four digits they still are
    assert judge(isoflops([1e17, 1e18, 1e19], noise=1e-4), best).residual_sd > 1e-6


def test_an_optimum_without_e() -> None:
    """Losses on a straight line in the logarithms: nothing shows where they would level off."""
    n, d = np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e8, 1e10, 4))
    found = verdict(points(n.ravel(), d.ravel(), 300 * n.ravel() ** -0.15 * d.ravel() ** -0.1))
    assert not found.identified
    assert says(found, "nats at the optimum", "levelling off")


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_an_exponent_at_the_edge(name: str) -> None:
    random = np.random.default_rng(0)
    n, d = 1e7 * np.exp(random.uniform(0, 4, 20)), 1e9 * np.exp(random.uniform(0, 4, 20))
    steep = {"alpha": {"alpha": 4.0, "A": 0.5 * 2e7**4.0}, "beta": {"beta": 4.0, "B": 0.5 * 2e9**4.0}}[name]
    found = verdict(measured(n, d, TRUTH._replace(**steep), noise=0.002))
    assert says(found, f"{name} = ", "outside 0.02 to 3")


def test_a_fixed_exponent_needs_fewer_points() -> None:
    p = replace(isoflops([1e17, 1e18], sizes=4), cluster=np.arange(8))
    form = Form("fixed", alpha=0.34, beta=0.28)
    found = judge(p, solver.estimate(p, form))
    assert found.identified
    assert found.rank == 3
    one = isoflops([1e17], sizes=4)
    assert not any("4 points for 3" in reason for reason in judge(one, solver.estimate(one, form)).reasons)
    assert any("4 points for 5" in reason for reason in verdict(one).reasons)


# ------------------------------------------------------------------------------------------------------------
# Replicates


def draws(count: int = 1000) -> np.ndarray:
    scatter = np.random.default_rng(0).standard_normal((count, 5))
    return TRUTH.rows() * np.exp([0.02, 0.2, 0.05, 0.2, 0.05] * scatter)


def test_ordinary_replicates_are_fine() -> None:
    assert judge_draws(draws()) == ()
    assert judge_draws(np.empty((0, 5))) == ()


@pytest.mark.parametrize("column", [2, 4])
@pytest.mark.parametrize("value", [EXPONENTS[0] / 2, EXPONENTS[1] * 1.5, np.nan])
def test_runaway_replicates(column: int, value: float) -> None:
    some = draws()
    some[:20, column] = value
    assert judge_draws(some) == ()  # 2 % can't reach an end of a 95 % interval
    some[:40, column] = value
    (reason,) = judge_draws(some)
    assert reason.startswith("40 of 1,000 bootstrap replicates ran away")


def test_replicates_without_e() -> None:
    some = draws()
    some[:300, 0] = 1e-6
    (reason,) = judge_draws(some)
    assert reason.startswith("300 of 1,000 bootstrap replicates have E = 0")


def test_replicates_of_no_width() -> None:
    (reason,) = judge_draws(np.tile(TRUTH.rows(), (500, 1)) * (1 + 1e-9 * draws(500)))
    assert reason.startswith("all 500 bootstrap replicates give one law")


def test_the_replicates_of_pure_noise_run_away() -> None:
    random = np.random.default_rng(3)
    p = points(SIZES, 1e9 * np.exp(random.uniform(0, 3, 12)), np.exp(random.standard_normal(12)))
    reasons = judge_draws(bootstrap.bootstrap(p, solver.estimate(p), 200))
    assert any("ran away" in reason for reason in reasons)


def test_a_good_cloud_is_enough() -> None:
    assert verdict(cloud(30)).identified


def test_one_budget_with_a_little_jitter_is_one_budget() -> None:
    rng = np.random.default_rng(0)
    flops, n = 1e18 * np.exp(rng.uniform(-0.3, 0.3, 16)), np.geomspace(2e7, 5e8, 16)
    nats = 1.8 + 480.0 * n**-0.35 + 2000.0 * (flops / 6 / n) ** -0.37
    jittered = points(n, flops / 6 / n, nats * np.exp(rng.normal(0, 0.003, 16)))
    assert any("one budget only" in why for why in judge(jittered, solver.estimate(jittered)).reasons)


def test_a_second_budget_needs_more_than_one_run() -> None:
    rng = np.random.default_rng(0)
    n = np.append(np.geomspace(2e7, 5e8, 12), 1e9)
    d = np.append(1e18 / 6 / n[:12], 1e10)
    nats = (1.8 + 480.0 * n**-0.35 + 2000.0 * d**-0.37) * np.exp(rng.normal(0, 0.003, 13))
    reasons = judge(points(n, d, nats), solver.estimate(points(n, d, nats))).reasons
    assert any("all runs but one" in why for why in reasons)
