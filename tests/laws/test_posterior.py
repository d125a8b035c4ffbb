"""The posterior: against brute force, against published sums, and whether its intervals cover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms, posterior
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.points import Points, points
from x1_pretrain.laws.posterior import PRIORS, SHARED, Target, prior_dominated, prior_for, sample, walk
from x1_pretrain.laws.results import Posterior, Prior

LAB = points([5e6, 25e6, 1e8], [4.5e9, 9e8, 2.25e8], [4.66, 4.40, 4.48])
HOFFMANN = forms.PUBLISHED[2].law
PUBLISHED = PRIORS["published"]
LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


@pytest.fixture(scope="module")
def lab() -> Posterior:
    return sample(LAB, PUBLISHED)


def isoflop(budgets: list[float], noise: float, law: Law = HOFFMANN, seed: int = 0) -> Points:
    """Five sizes about the optimum of each budget, measured with noise."""
    flops = np.repeat(budgets, 5)
    n = np.concatenate([forms.optimum(law, c)[0] * np.geomspace(0.25, 4, 5) for c in budgets])
    error = noise * np.random.default_rng(seed).standard_normal(len(n))
    return points(n, flops / 6 / n, forms.loss(law, n, flops / 6 / n) * np.exp(error))


def trunks(losses: F64 | float = 4.0) -> Points:
    """Three sizes with four cooldowns each."""
    n = np.repeat([5e6, 25e6, 1e8], 4)
    return points(
        n, n * np.tile([5.0, 10.0, 20.0, 40.0], 3), np.broadcast_to(losses, 12), np.repeat([0, 1, 2], 4)
    )


def covariance(design: Points) -> F64:
    """The errors' correlation, entry by entry."""
    size = len(design)
    return np.array(
        [
            [1.0 if i == j else SHARED * (design.cluster[i] == design.cluster[j]) for j in range(size)]
            for i in range(size)
        ]
    )


def log_tokens(draws: F64) -> F64:
    return np.log(forms.tokens_for(Law.of(draws), 1e9))


def by_brute_force(design: Points, prior: Prior, size: int) -> tuple[F64, F64]:
    """Draws of the prior with their weights: its own arithmetic, from the definitions."""
    rng = np.random.default_rng(5)
    e, term_n, term_d, alpha, beta = (
        np.exp(rng.normal(np.log(c), s, size)) for c, s in zip(prior.centre, prior.spread, strict=True)
    )
    sigma = np.exp(rng.normal(np.log(prior.noise[0]), prior.noise[1], size))
    error = np.log(
        e[:, None]
        + term_n[:, None] * (prior.n0 / design.n) ** alpha[:, None]
        + term_d[:, None] * (prior.d0 / design.d) ** beta[:, None]
    ) - np.log(design.loss)
    # errors / sigma are normal with one covariance: only the volume of the scaling is left to add
    density = multivariate_normal(cov=covariance(design)).logpdf(error / sigma[:, None])
    logs = density - len(design) * np.log(sigma)
    weights = np.exp(logs - logs.max())
    law = Law(e, term_n * prior.n0**alpha, alpha, term_d * prior.d0**beta, beta)
    return np.column_stack([law.rows(), sigma]), weights / weights.sum()


def quantiles(values: F64, weights: F64) -> F64:
    order = np.argsort(values)
    return np.interp(LEVELS, np.cumsum(weights[order]), values[order])


@pytest.mark.parametrize("clustered", [False, True])
def test_the_sampler_agrees_with_weighted_draws_of_the_prior(clustered: bool) -> None:
    # noise large enough that hundreds of thousands of draws hold thousands that matter
    prior = replace(PUBLISHED, noise=(0.06, 0.3))
    rng = np.random.default_rng(2)
    loss = forms.loss(HOFFMANN, trunks().n, trunks().d) * np.exp(0.06 * rng.standard_normal(12))
    design = trunks(loss) if clustered else replace(trunks(loss), cluster=np.arange(12))
    rows, weights = by_brute_force(design, prior, 400_000)
    assert 1 / (weights**2).sum() > 3000
    found = sample(design, prior)
    ours = np.column_stack([found.draws, found.noise, forms.tokens_for(Law.of(found.draws), 1e9)])
    theirs = np.column_stack([rows, forms.tokens_for(Law.of(rows[:, :5]), 1e9)])
    for mine, brute in zip(np.log(ours).T, np.log(theirs).T, strict=True):
        mean = (weights * brute).sum()
        sd = (weights * (brute - mean) ** 2).sum() ** 0.5
        assert np.quantile(mine, LEVELS) == pytest.approx(quantiles(brute, weights), abs=0.12 * sd)


def test_what_the_three_points_of_the_lab_say(lab: Posterior) -> None:
    before, after = (
        np.exp(np.quantile(log_tokens(d), [0.05, 0.5, 0.95])) / 1e9 for d in (lab.prior_draws, lab.draws)
    )
    # by another sampler, elsewhere: 24 [1.2, 425] before, 28 [8, 168] after, 73 % of the variance gone
    assert before == pytest.approx([1.2, 24, 425], rel=0.15)
    assert after == pytest.approx([8, 28, 168], rel=0.15)
    assert lab.shrinkage == pytest.approx(0.73, abs=0.05)
    assert lab.effective > 2000


def test_a_tighter_prior_gives_a_tighter_answer() -> None:
    after = np.exp(np.quantile(log_tokens(sample(LAB, PRIORS["tight"]).draws), [0.05, 0.5, 0.95])) / 1e9
    assert after == pytest.approx([14, 32, 91], rel=0.12)


def test_each_draw_fits_the_points() -> None:
    """None is left behind where the prior had put it, and many exact points are not too narrow a target."""
    design = isoflop([1e17, 3e17, 1e18, 3e18, 1e19, 3e19], noise=0.001)
    found = sample(design, PUBLISHED)
    errors = np.log(forms.loss(Law.of(found.draws).spread(), design.n, design.d) / design.loss)
    assert (errors**2).mean(axis=1).max() ** 0.5 < 0.005
    assert found.noise.max() < 0.005
    assert found.effective > 1000


def test_the_same_seed_gives_the_same_draws(lab: Posterior) -> None:
    again, other = (sample(LAB, PUBLISHED, seed) for seed in (0, 1))
    assert np.array_equal(lab.draws, again.draws)
    assert np.array_equal(lab.noise, again.noise)
    assert np.array_equal(lab.prior_draws, again.prior_draws)
    assert not np.array_equal(lab.draws, other.draws)


def test_effective_draws_are_what_the_spread_of_means_says() -> None:
    """48 ensembles on the same points: their means scatter as those of so many independent draws would."""
    rng = np.random.default_rng(3)
    crowd = posterior.prior_thetas(PUBLISHED, 48 * 4 * 40, rng).reshape(48, 160, 6)
    chains = walk(Target.of(isoflop([1e17, 1e18], 0.005), PUBLISHED), crowd, rng, steps=1500)
    claimed = np.median([posterior.effective(chains[:, i]) for i in range(48)])
    seen = chains.var(axis=(0, 1, 2)) / chains.mean(axis=(0, 2)).var(axis=0, ddof=1)
    assert 0.5 < claimed / seen.min() < 2.0


def test_draws_are_not_copies_of_each_other(lab: Posterior) -> None:
    assert len(np.unique(lab.draws, axis=0)) > 0.98 * len(lab.draws) == 0.98 * len(lab.noise)


@pytest.mark.slow
def test_draws_are_worth_what_they_claim() -> None:
    found = [sample(LAB, PUBLISHED, seed) for seed in range(40)]
    logs = np.array([np.log(np.column_stack([f.draws[:, [0, 2, 4]], f.noise])) for f in found])
    worth = logs.var(axis=(0, 1)) / logs.mean(axis=1).var(axis=0, ddof=1)
    claimed = np.median([f.effective for f in found])
    assert claimed < 1.6 * worth.min()  # forty means tell their variance to 23 %
    assert claimed > 0.3 * worth.min()


def test_whitening_is_the_inverse_square_root_of_the_correlation() -> None:
    design = points(np.ones(6), np.ones(6), np.ones(6), cluster=[0, 1, 0, 2, 0, 2])
    ours = posterior.whitening(design)
    assert ours @ covariance(design) @ ours == pytest.approx(np.eye(6), abs=1e-12)
    assert posterior.whitening(LAB) == pytest.approx(np.eye(3), abs=1e-12)


@pytest.mark.parametrize(
    ("design", "dominated"),
    [
        (LAB, True),
        (isoflop([1.35e17], 0.004), True),
        (isoflop([1.35e17, 6e17, 2.7e18], 0.004), False),
    ],
    ids=["lab", "one budget", "three budgets"],
)
def test_prior_dominated(design: Points, dominated: bool) -> None:
    assert prior_dominated(sample(design, PUBLISHED)) is dominated


def test_a_variance_that_is_not_a_number_counts_as_dominated(lab: Posterior) -> None:
    assert prior_dominated(replace(lab, shrinkage=float("nan")))


# ------------------------------------------------------------------------------------------------------------
# Which prior


def test_points_like_published_ones_get_the_published_prior() -> None:
    chosen = prior_for(LAB)
    assert chosen.name == "published"
    assert chosen.centre == PUBLISHED.centre
    assert "matrices" not in chosen.source
    assert "only matrices" in prior_for(replace(LAB, counts="matrices")).source


@pytest.mark.parametrize(
    ("design", "why"),
    [
        (points([1e5, 4e5, 1e6], [1e7, 1e7, 1e7], [4.6, 4.1, 3.9]), "as small as these"),
        (replace(LAB, loss=LAB.loss / 4), "far from the"),
        (replace(LAB, loss=LAB.loss * 3), "far from the"),
    ],
    ids=["tiny models", "loss a byte", "loss far above"],
)
def test_other_points_get_a_wide_prior_about_themselves(design: Points, why: str) -> None:
    chosen = prior_for(design)
    assert chosen.name == "wide"
    assert why in chosen.source
    assert "looks at the level of the data" in chosen.source
    assert chosen.n0 == pytest.approx(np.prod(design.n) ** (1 / 3))
    assert sum(chosen.centre[:3]) == pytest.approx(np.prod(design.loss) ** (1 / 3))


def test_a_prior_by_name() -> None:
    assert prior_for(LAB, "tight") == PRIORS["tight"]
    assert prior_for(LAB, "wide").name == "wide"
    with pytest.raises(
        UserError, match=r"^prior 'flat': there is no such prior; choose published, tight, wide$"
    ):
        prior_for(LAB, "flat")


def test_the_centre_is_the_mean_of_three_published_laws() -> None:
    three = [law.law for law in forms.PUBLISHED if law.name in ("Hoffmann", "Besiroglu", "Muennighoff C4")]
    terms = [(f.E, f.A / 1e8**f.alpha, f.B / 2e9**f.beta, f.alpha, f.beta) for f in three]
    assert PUBLISHED.centre == pytest.approx(np.exp(np.log(terms).mean(axis=0)), rel=3e-4)


def test_the_wide_prior_finds_a_law_of_tiny_models() -> None:
    law = Law(1.1, 40.0, 0.30, 900.0, 0.42)  # another tokenizer, other sizes, other exponents
    design = isoflop([1e12, 1e13, 1e14, 1e15], 0.003, law)
    prior = prior_for(design)
    found = sample(design, prior)
    low, high = np.quantile(np.log(forms.tokens_for(Law.of(found.draws), 1e6)), [0.005, 0.995])
    assert prior.name == "wide"
    assert low < np.log(forms.tokens_for(law, 1e6)) < high < low + 1.5


# ------------------------------------------------------------------------------------------------------------
# Calibration: truths from the prior, data from the truths; 90 % intervals hold the truth 85-95 % of the time


def coverage(design: Points, sims: int, walkers: int, steps: int, n: float, d: float) -> tuple[float, float]:
    """Of D_opt(1B), and of the loss of a new run at (n, d). One ensemble a data set, all walked at once."""
    rng = np.random.default_rng(11)
    truth = posterior.prior_thetas(PUBLISHED, sims, rng)
    law, sigma = posterior.laws_of(PUBLISHED, truth), np.exp(truth[:, 5:])
    errors = rng.multivariate_normal(np.zeros(len(design)), covariance(design), sims) * sigma
    measured = np.log(forms.loss(law.spread(), design.n, design.d)) + errors
    target = replace(Target.of(design, PUBLISHED), log_loss=measured[:, None, :])
    crowd = posterior.prior_thetas(PUBLISHED, sims * 4 * walkers, rng).reshape(sims, 4 * walkers, 6)
    theta = np.moveaxis(walk(target, crowd, rng, steps=steps), 1, 0).reshape(sims, -1, 6)
    laws = posterior.laws_of(PUBLISHED, theta)
    tokens = np.log(forms.tokens_for(laws, 1e9))
    loss = np.log(forms.loss(laws, n, d)) + np.exp(theta[..., 5]) * rng.standard_normal(theta.shape[:2])
    fresh = np.log(forms.loss(law, n, d)) + sigma[:, 0] * rng.standard_normal(sims)
    return _share(tokens, np.log(forms.tokens_for(law, 1e9))), _share(loss, fresh)


def _share(draws: F64, truth: F64) -> float:
    low, high = np.quantile(draws, [0.05, 0.95], axis=1)
    return float(((low < truth) & (truth < high)).mean())


@pytest.mark.parametrize("design", [LAB, trunks()], ids=["three points", "three trunks of four"])
def test_intervals_cover(design: Points) -> None:
    for share in coverage(design, sims=400, walkers=32, steps=250, n=3e8, d=6e9):  # error of a share: 1.5 %
        assert 0.85 <= share <= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("design", [LAB, trunks()], ids=["three points", "three trunks of four"])
def test_intervals_cover_at_length(design: Points) -> None:
    for share in coverage(design, sims=1000, walkers=60, steps=1000, n=3e8, d=6e9):  # error: 0.95 %
        assert 0.87 <= share <= 0.93
