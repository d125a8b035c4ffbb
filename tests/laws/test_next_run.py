"""What a run would tell before it is made: against the closed form, and against making it many times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from x1_pretrain.laws import fitted, forms, posterior
from x1_pretrain.laws.fitted import Fitted
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.next_run import LEAST_SCATTER, next_runs
from x1_pretrain.laws.points import Points, points
from x1_pretrain.laws.posterior import PRIORS, Target, sample, walk
from x1_pretrain.laws.results import NextRun

LAW = Law(1.8, 480.0, 0.35, 2100.0, 0.37)
HOFFMANN = forms.PUBLISHED[2].law


def fit(draws: F64, of: Points | None = None, **changes: Any) -> Fitted:
    ranges = (
        [(float(v.min()), float(v.max())) for v in (of.n, of.d, of.flops)]
        if of
        else [(1e7, 1e8), (1e8, 1e9), (1e16, 1e17)]
    )
    made = Fitted(
        LAW, "posterior", draws, np.empty((0, 5)), "total", 0.004, None, *ranges, False, (), "memory"
    )
    return replace(made, **changes)


def scattered(size: int = 1000, e_sd: float = 0.01, b_sd: float = 0.01) -> F64:
    rng = np.random.default_rng(0)
    draws = np.tile(np.array(LAW, dtype=float), (size, 1))
    draws[:, 0] *= np.exp(e_sd * rng.standard_normal(size))
    draws[:, 3] *= np.exp(b_sd * rng.standard_normal(size))
    return draws


def three_trunks() -> Points:
    n = np.repeat([5e6, 25e6, 1e8], 4)
    d = n * np.tile([5.0, 10.0, 20.0, 40.0], 3)
    noise = np.exp(0.004 * np.random.default_rng(1).standard_normal(12))
    return points(n, d, forms.loss(HOFFMANN, n, d) * noise, np.repeat([0, 1, 2], 4))


@pytest.fixture(scope="module")
def trunks() -> tuple[Points, posterior.Posterior]:
    return three_trunks(), sample(three_trunks(), PRIORS["published"])


def test_widths_are_those_of_the_normal_model() -> None:
    """Only E and B are unknown, and by little: then all is linear and the answer is a formula."""
    e_sd, b_sd, scatter = 0.004, 0.01, 0.005
    runs = next_runs(fit(scattered(20_000, e_sd, b_sd), scatter=scatter), 1e9)
    assert runs
    for run in runs:
        loss = forms.loss(LAW, run.n, run.d)
        by_b = LAW.B * run.d**-LAW.beta / loss  # d ln L / d ln B
        by_e = LAW.E / loss
        noise = (by_e * e_sd) ** 2 + scatter**2
        after = 1 / (1 / b_sd**2 + by_b**2 / noise)  # variance of ln B
        assert np.log(run.width_before) == pytest.approx(1.96 * b_sd / LAW.beta, rel=0.04)
        # a few percent: 1,000 draws
        assert np.log(run.width_after) == pytest.approx(1.96 * after**0.5 / LAW.beta, rel=0.04)


def test_a_run_made_many_times_narrows_as_was_said(trunks: tuple[Points, posterior.Posterior]) -> None:
    """The proposed run is made 80 times, each under another law of the posterior, and all is fitted anew."""
    design, before = trunks
    scatter = float(np.median(before.noise))
    runs = next_runs(fit(before.draws, design, scatter=scatter), 1e9)
    run = max(runs, key=lambda r: r.width_before / r.width_after)
    assert run.width_after < 0.85 * run.width_before
    rng = np.random.default_rng(4)
    chosen = before.draws[rng.choice(len(before.draws), 80)]
    measured = forms.loss(Law.of(chosen), run.n, run.d) * np.exp(scatter * rng.standard_normal(80))
    left = _refitted(design, run, measured, rng)
    assert 1.96 * left.mean() ** 0.5 == pytest.approx(np.log(run.width_after), rel=0.08)


def _refitted(design: Points, run: NextRun, measured: F64, rng: np.random.Generator) -> F64:
    """The variance of ln D_opt(1B) with the new point, for each value that it may have."""
    more = points([*design.n, run.n], [*design.d, run.d], [*design.loss, 1.0], [*design.cluster, 3])
    losses = np.column_stack([np.tile(design.loss, (len(measured), 1)), measured])
    target = replace(Target.of(more, PRIORS["published"]), log_loss=np.log(losses)[:, None, :])
    crowd = posterior.prior_thetas(PRIORS["published"], len(measured) * 200, rng).reshape(-1, 200, 6)
    theta = np.moveaxis(walk(target, crowd, rng, steps=800), 1, 0).reshape(len(measured), -1, 6)
    laws = posterior.laws_of(PRIORS["published"], theta)
    return np.asarray(np.log(forms.tokens_for(laws, 1e9)).var(axis=1))


def test_the_choice_is_within_reach(trunks: tuple[Points, posterior.Posterior]) -> None:
    design, found = trunks
    runs = next_runs(fit(found.draws, design), 1e9)
    assert 1 <= len(runs) <= 3
    for run in runs:
        assert run.flops == pytest.approx(6 * run.n * run.d)
        assert run.flops <= 4 * design.flops.max()
        assert design.n.min() / 2.1 <= run.n <= design.n.max() * 4.1  # rounded to two digits
        assert design.d.min() / 2.1 <= run.d <= design.d.max() * 4.1
        assert run.d >= run.n
        assert run.width_after < run.width_before
        assert run.n == float(f"{run.n:.1e}")


def test_best_per_flop_comes_first(trunks: tuple[Points, posterior.Posterior]) -> None:
    design, found = trunks
    runs = next_runs(fit(found.draws, design), 1e9)
    gained = [np.log(r.width_before / r.width_after) for r in runs]
    rates = [g / max(r.flops, design.flops.min()) for g, r in zip(gained, runs, strict=True)]
    assert len(runs) > 1
    assert rates == sorted(rates, reverse=True)
    assert min(gained) >= max(gained) / 3
    assert next_runs(fit(found.draws, design), 1e9, limit=1) == runs[:1]


def test_dollars_are_flops_times_their_price(trunks: tuple[Points, posterior.Posterior]) -> None:
    design, found = trunks
    priced = next_runs(fit(found.draws, design), 1e9, usd_per_flop=1e-18)
    assert all(run.usd == pytest.approx(run.flops * 1e-18) for run in priced)
    assert all(run.usd is None for run in next_runs(fit(found.draws, design), 1e9))


def test_where_only_the_data_term_is_unknown_few_tokens_tell_it() -> None:
    """B/D^beta is largest at the left edge of the grid, and E and the model's term are known."""
    runs = next_runs(fit(scattered(e_sd=0.0, b_sd=0.05)), 1e9)
    assert runs[0].d < 1e8
    assert all(run.d >= run.n for run in runs)  # fewer still would tell more, but no run was so short


def test_a_run_below_the_smallest_so_far_is_no_cheaper() -> None:
    unknown_b = scattered(e_sd=0.0, b_sd=0.05)
    tiny = next_runs(fit(unknown_b, flops_range=(1e15, 1e18)), 1e9)[0]
    usual = next_runs(fit(unknown_b, flops_range=(1e17, 1e18)), 1e9)[0]
    assert tiny.flops < 3e15
    assert usual.flops > 1e16
    assert usual.width_after < tiny.width_after


def test_no_run_of_more_than_four_times_the_largest_budget() -> None:
    """How steeply the loss falls with tokens is unknown; known is the term at 1e8: a long run tells most."""
    draws = scattered(e_sd=0.0, b_sd=0.0)
    draws[:, 4] *= np.exp(0.05 * np.random.default_rng(0).standard_normal(len(draws)))
    draws[:, 3] *= 1e8 ** (draws[:, 4] - LAW.beta)
    free = next_runs(fit(draws), 1e9)
    bound = next_runs(fit(draws, flops_range=(1e15, 2e15)), 1e9)
    assert max(run.flops for run in free) > 2e16
    assert 2e15 < max(run.flops for run in bound) <= 8e15


def test_runaways_do_not_decide() -> None:
    calm = scattered()
    wild = calm.copy()
    wild[::500, 4] = 0.04  # an exponent that hardly exists: D_opt beyond 1e80
    wild[1::500, 3:] = 1e6, 0.001  # and infinite
    before, after = (next_runs(fit(draws), 1e9)[0] for draws in (calm, wild))
    assert np.log(after.width_before) == pytest.approx(np.log(before.width_before), rel=0.1)
    assert np.log(after.width_after) == pytest.approx(np.log(before.width_after), rel=0.1)


def test_no_run_repeats_without_scatter() -> None:
    draws = scattered()
    assert next_runs(fit(draws, scatter=0.0), 1e9) == next_runs(fit(draws, scatter=LEAST_SCATTER), 1e9)
    assert next_runs(fit(draws, scatter=float("nan")), 1e9) == next_runs(
        fit(draws, scatter=LEAST_SCATTER), 1e9
    )


def test_where_all_runs_were_shorter_than_a_token_a_parameter() -> None:
    runs = next_runs(fit(scattered(), n_range=(1e8, 1e9), d_range=(1e7, 1e8), flops_range=(1e16, 1e17)), 1e9)
    assert runs
    assert all(run.d >= run.n / 10 for run in runs)


def test_nothing_to_say() -> None:
    assert next_runs(fitted.published(forms.REFIT), 1e9) == ()
    assert next_runs(fit(np.tile(np.array(LAW, dtype=float), (50, 1))), 1e9) == ()
    assert next_runs(fit(scattered(1)), 1e9) == ()
    assert next_runs(fit(scattered(), flops_range=(1.0, 2.0)), 1e9) == ()  # no candidate is that small
