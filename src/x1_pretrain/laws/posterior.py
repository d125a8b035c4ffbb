"""The Bayesian answer, for points that can't tell the five numbers: a written prior, and what they add to it.

Known beforehand are the loss *terms* at a reference point (E, A/n0^alpha, B/d0^beta) and the exponents, each
within a factor; A and B by themselves are not, they follow the exponents over orders of magnitude. So the
parameters are the logarithms of those five and of the scatter, with independent normal priors.

    ln L_i ~ Normal(ln law(N_i, D_i), sigma); points of one trunk share a part of their error (`SHARED`)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.points import Points
from x1_pretrain.laws.results import Posterior, Prior

REFERENCE_N = 1e9  # a posterior is judged by D_opt of a model of this size, unless another is asked for

# Correlation of the errors of two points of one trunk. They share the initialization, the order of data and
# the model size, so also the misfit of the law at that size, which outweighs the noise of a rerun; but each
# has a decay of its own. Points along one trajectory without decays were seen at about 0.9, separate runs are
# at 0: the middle.
SHARED = 0.5

_LAWS = "geometric mean of Hoffmann (unrounded), Besiroglu and Muennighoff C4"
_NOISE = (0.006, 0.6)  # reruns scatter by 0.02-0.7 % of L, the law misses by 0.3-0.8 % of ln L in good sets
PRIORS = {
    prior.name: prior
    for prior in (
        Prior(
            "published",
            n0=1e8,
            d0=2e9,
            centre=(1.792, 0.7877, 0.8381, 0.3466, 0.3326),
            spread=(0.30, 0.40, 0.40, 0.17, 0.21),
            noise=_NOISE,
            source=f"centre: {_LAWS}; spread: about how far published fits differ from each other",
        ),
        Prior(
            "tight",
            n0=1e8,
            d0=2e9,
            centre=(1.792, 0.7877, 0.8381, 0.3466, 0.3326),
            spread=(0.15, 0.30, 0.30, 0.09, 0.12),
            noise=_NOISE,
            source=f"centre: {_LAWS}; spread: for data and a recipe much like theirs",
        ),
    )
}
NAMES = (*PRIORS, "wide")

SMALLEST_N = 2e6  # the published laws were fitted on models of tens of millions of parameters and more
PLAUSIBLE = 3.0  # standard deviations between the level of the data and what the published prior expects

WALKERS = 800
CROWD = 4  # draws of the prior a walker, to begin with
RISE = 400  # steps over which the points gain their weight
STAGE = 10  # steps between two raises
SETTLE = 200  # steps after that which are not kept
STEPS = 2000
THIN = 5  # of which each fifth is kept
KEPT = 8000  # draws handed on


# ------------------------------------------------------------------------------------------------------------
# The prior


def prior_for(points: Points, name: str | None = None) -> Prior:
    """The prior of this name; without one "published" for points like published ones, "wide" for others."""
    if name in PRIORS:
        return PRIORS[name]
    if name == "wide":
        return wide(points, "asked for")
    if name is not None:
        raise UserError(f"prior {name!r}: there is no such prior; choose {', '.join(NAMES)}")
    published = PRIORS["published"]
    unlike = _unlike(points, published)
    if unlike:
        return wide(points, unlike)
    counts = "; they count all parameters, the points only matrices" if points.counts == "matrices" else ""
    source = f"{published.source}; sizes and losses of the points are like theirs{counts}"
    return replace(published, source=source)


def _unlike(points: Points, prior: Prior) -> str:
    """Why the published laws say nothing about these points; "" where they do."""
    size = float(np.exp(np.log(points.n).mean()))
    if size < SMALLEST_N:
        return f"published laws cover no models as small as these (geometric mean {size:.3g} parameters)"
    laws = prior_thetas(prior, 2000, np.random.default_rng(0))
    expected = np.log(forms.loss(laws_of(prior, laws).spread(), points.n, points.d)).mean(axis=-1)
    level = float(np.log(points.loss).mean())
    if abs(level - expected.mean()) > PLAUSIBLE * expected.std():
        return (
            f"a loss of {np.exp(level):.3g} is far from the {np.exp(expected.mean()):.3g} that published "
            "laws expect there (another tokenizer, other text?)"
        )
    return ""


def wide(points: Points, why: str) -> Prior:
    """For points that published laws say nothing about."""
    level = float(np.exp(np.log(points.loss).mean()))
    return Prior(
        "wide",
        n0=float(np.exp(np.log(points.n).mean())),
        d0=float(np.exp(np.log(points.d).mean())),
        centre=(0.5 * level, 0.25 * level, 0.25 * level, 0.35, 0.35),
        spread=(0.7, 0.7, 0.7, 0.5, 0.5),
        noise=(0.01, 0.8),
        source=(
            f"wide: {why}. Centred by the data themselves: at their geometric centre E is half of the mean "
            f"loss ({level:.3g}) and each term a quarter, each within a factor of 4. So it looks at the "
            "level of the data once before the fit does"
        ),
    )


def prior_thetas(prior: Prior, size: int, rng: np.random.Generator) -> F64:
    mean, sd = _moments(prior)
    return mean + sd * rng.standard_normal((size, 6))


def _moments(prior: Prior) -> tuple[F64, F64]:
    """Mean and sd of theta = ln (E, A/n0^alpha, B/d0^beta, alpha, beta, sigma)."""
    mean = np.log(np.array([*prior.centre, prior.noise[0]]))
    return mean, np.array([*prior.spread, prior.noise[1]])


def laws_of(prior: Prior, theta: F64) -> Law:
    e, term_n, term_d, alpha, beta = np.exp(np.moveaxis(theta[..., :5], -1, 0))
    return Law(e, term_n * prior.n0**alpha, alpha, term_d * prior.d0**beta, beta)


# ------------------------------------------------------------------------------------------------------------
# The density


@dataclass(frozen=True)
class Target:
    """The logarithm of the posterior density, up to a constant."""

    mean: F64
    sd: F64
    size: F64  # ln N/n0
    depth: F64  # ln D/d0
    log_loss: F64  # (n,), or (S, 1, n) for S data sets of one design
    whiten: F64  # (n, n): makes the errors independent, with sd sigma each

    @classmethod
    def of(cls, points: Points, prior: Prior) -> Target:
        size, depth = np.log(points.n / prior.n0), np.log(points.d / prior.d0)
        return cls(*_moments(prior), size, depth, np.log(points.loss), whitening(points))

    def __call__(self, theta: F64, weight: float = 1.0) -> F64:
        """At (..., 6), with the likelihood raised to `weight`."""
        z = (theta - self.mean) / self.sd
        e, term_n, term_d, alpha, beta, sigma = np.moveaxis(theta[..., None], -2, 0)
        with np.errstate(over="ignore", invalid="ignore"):  # far out a term is infinite, and so rejected
            law = np.exp(term_n - np.exp(alpha) * self.size) + np.exp(term_d - np.exp(beta) * self.depth)
            errors = (np.log(law + np.exp(e)) - self.log_loss) @ self.whiten
            squares = np.einsum("...i,...i->...", errors, errors) * np.exp(-2.0 * sigma[..., 0])
            likelihood = -len(self.size) * sigma[..., 0] - 0.5 * squares
            density = weight * likelihood - 0.5 * np.einsum("...i,...i->...", z, z)
        return np.asarray(np.where(np.isnan(density), -np.inf, density))


def whitening(points: Points) -> F64:
    """The inverse square root of the errors' correlation: 1 with oneself, SHARED within a cluster, else 0.

    In closed form: within a cluster of m the mean of the errors has the eigenvalue 1 + (m - 1) SHARED, what
    deviates from the mean 1 - SHARED. Of a cluster of one nothing deviates.
    """
    same = (points.cluster[:, None] == points.cluster).astype(float)
    members = same.sum(axis=1, keepdims=True)
    mean = same / members
    within = (np.eye(len(points)) - mean) / (1 - SHARED) ** 0.5
    return np.asarray(within + mean / (1 + (members - 1) * SHARED) ** 0.5)


# ------------------------------------------------------------------------------------------------------------
# The sampler


def sample(points: Points, prior: Prior, seed: int = 0, target_n: float = REFERENCE_N) -> Posterior:
    """Draws of the law before and after the points. The same seed gives the same draws."""
    rng = np.random.default_rng(seed)
    chain = walk(Target.of(points, prior), prior_thetas(prior, CROWD * WALKERS, rng), rng)
    # all walkers at a few distant times: they have moved on in between
    theta = chain[:: len(chain) * WALKERS // KEPT].reshape(-1, 6)
    laws, before = laws_of(prior, theta), laws_of(prior, prior_thetas(prior, KEPT, rng))
    return Posterior(
        prior=prior,
        draws=laws.rows(),
        prior_draws=before.rows(),
        noise=np.exp(theta[:, 5]),
        effective=1.0 / (1.0 / len(theta) + 1.0 / effective(chain)),
        target_n=target_n,
        shrinkage=1.0 - float(_log_tokens(laws, target_n).var() / _log_tokens(before, target_n).var()),
    )


def walk(target: Target, crowd: F64, rng: np.random.Generator, steps: int = STEPS) -> F64:
    """The chain (steps / THIN, ..., W, 6) of W walkers, out of a crowd (..., CROWD x W, 6) of the prior.

    The points gain their weight slowly, and walkers that fall behind are replaced by copies of those that
    fit, so that none is left in a far corner. Then the ensemble wanders at full weight.
    """
    size = crowd.shape[-2] // CROWD
    theta, before = crowd, 0.0
    for weight in np.geomspace(1e-6, 1.0, RISE // STAGE):
        gain = (target(theta) - target(theta, 0.0)) * (weight - before)
        theta, before = _resample(theta, gain, size, rng), float(weight)
        density = target(theta, before)
        for _ in range(STAGE):
            _step(target, theta, density, before, rng)
    kept = []
    for step in range(SETTLE + steps):
        _step(target, theta, density, 1.0, rng)
        if step >= SETTLE and step % THIN == 0:
            kept.append(theta.copy())
    return np.stack(kept)


def _step(target: Target, theta: F64, density: F64, weight: float, rng: np.random.Generator) -> None:
    """One move of each walker, in place: along the difference of two walkers of the other half.

    Such differences have the shape of the posterior, however it is stretched or tilted (differential
    evolution, ter Braak 2006). Their length varies, because the posterior is a curved sheet, no ellipsoid.
    """
    half = theta.shape[-2] // 2
    for own, others in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        now, other = theta[..., own, :], theta[..., others, :]
        first = rng.integers(half, size=now.shape[:-1])
        second = (first + rng.integers(1, half, size=first.shape)) % half
        length = 2.38 / (2 * 6) ** 0.5 * np.exp(0.5 * rng.standard_normal(first.shape))
        proposed = now + length[..., None] * (_pick(other, first) - _pick(other, second))
        there = target(proposed, weight)
        accepted = np.log(rng.random(first.shape)) < there - density[..., own]
        theta[..., own, :] = np.where(accepted[..., None], proposed, now)
        density[..., own] = np.where(accepted, there, density[..., own])


def _resample(theta: F64, gain: F64, size: int, rng: np.random.Generator) -> F64:
    """`size` walkers, each as often as exp(gain) says: equal steps from one uniform number, then shuffled."""
    shares = np.exp(gain - gain.max(axis=-1, keepdims=True))
    ends = np.cumsum(shares, axis=-1).reshape(-1, shares.shape[-1])
    marks = (np.arange(size) + rng.random((len(ends), 1))) / size * ends[:, -1:]
    found = [np.searchsorted(row, at).clip(max=len(row) - 1) for row, at in zip(ends, marks, strict=True)]
    chosen = rng.permuted(np.array(found), axis=-1)
    return _pick(theta, chosen.reshape(*theta.shape[:-2], size))


def _pick(theta: F64, walkers: npt.NDArray[np.int64]) -> F64:
    return np.take_along_axis(theta, walkers[..., None], axis=-2)


def effective(chain: F64) -> float:
    """How many independent draws a chain (steps, W, 6) is worth, of the parameter that moves slowest.

    Its length over the integrated autocorrelation time, summed up to the lag of five such times (Sokal).
    """
    steps, walkers, _ = chain.shape
    around = chain - chain.mean(axis=(0, 1))
    spectrum = np.abs(np.fft.rfft(around, 2 * steps, axis=0)) ** 2
    correlation = np.fft.irfft(spectrum.mean(axis=1), axis=0)[:steps]
    times = 2.0 * np.cumsum(correlation / correlation[0], axis=0) - 1.0
    beyond = np.arange(steps)[:, None] >= 5.0 * times
    window = np.where(beyond.any(axis=0), beyond.argmax(axis=0), steps - 1)
    slowest = float(np.take_along_axis(times, window[None], axis=0).max())
    return float(steps * walkers / max(slowest, 1.0))


# ------------------------------------------------------------------------------------------------------------
# What the points added

# Three points of one budget leave a quarter of the prior's variance of ln D_opt(1B), and so do five; two
# budgets a factor of two apart leave a tenth, five sizes on each of three budgets 1-2 %. Below 0.9 the
# interval is still more than a third as wide as the one that was believed before any run.
LEAST_SHRINKAGE = 0.9


def prior_dominated(posterior: Posterior) -> bool:
    """Whether the answer is still rather the prior's than the points'."""
    return not posterior.shrinkage >= LEAST_SHRINKAGE


def _log_tokens(laws: Law, n: float) -> F64:
    return np.asarray(np.log(forms.tokens_for(laws, n)))
