"""What a fitted law says of a size: tokens, loss, what being off costs, how far it is from the data. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from x1_pretrain.laws import forms
from x1_pretrain.laws.fitted import Band, Fitted
from x1_pretrain.laws.forms import F64, Law, Published
from x1_pretrain.laws.points import Points, budgets

SAME_BUDGET = np.log(2.0)  # in ln C: a "budget" wider than this is several that run into each other
OFF = (2.0, 4.0, 10.0)  # tokens per parameter wrong by so much


@dataclass(frozen=True)
class Regret:
    """Tokens per parameter off by `factor` on the same budget, towards the worse side."""

    factor: float
    nats: Band
    wasted: Band  # share of the compute


@dataclass(frozen=True)
class Beside:
    """What another law says of the same size."""

    published: Published
    tokens: float
    loss: float  # at the D that the fit here takes for the best
    same_count: bool  # whether its N and ours count the same
    inside: bool | None  # its tokens lie in the fit's interval; None without one


@dataclass(frozen=True)
class Prediction:
    n: float
    tokens: Band  # D_opt(N)
    per_parameter: Band
    loss: Band  # of one run at (N, D_opt)
    flops: float  # 6 N D_opt
    prior_tokens: Band | None  # what the prior alone said of D_opt
    regrets: tuple[Regret, ...]
    beside: tuple[Beside, ...]
    beyond: Beyond


@dataclass(frozen=True)
class Beyond:
    """How far outside the fitted N, D and 6ND the question lies: times the largest, or the smallest over it;
    at most 1 inside. NaN for a law without data."""

    n: float
    d: float
    flops: float
    below: frozenset[str] = frozenset()  # of "N", "D", "FLOPs": those that lie below the smallest

    @property
    def furthest(self) -> float:
        return float(np.nanmax([self.n, self.d, self.flops, 0.0]))

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.flops))


def predict(fitted: Fitted, n: float) -> Prediction:
    """All that follows for n parameters."""
    tokens = fitted.tokens_for(n)
    flops = 6.0 * n * tokens.point
    return Prediction(
        n=n,
        tokens=tokens,
        per_parameter=Band(*(end / n for end in tokens)),
        loss=fitted.loss(n, tokens.point),
        flops=flops,
        prior_tokens=prior_tokens(fitted, n),
        regrets=tuple(regret(fitted, flops, factor) for factor in OFF),
        beside=tuple(_beside(law, fitted, n, tokens) for law in forms.PUBLISHED),
        beyond=beyond(fitted, n, tokens.point),
    )


def prior_tokens(fitted: Fitted, n: float) -> Band | None:
    """D_opt(N) before any point was seen: median and the middle 95 %."""
    if not len(fitted.prior_draws):
        return None
    low, middle, high = _quantiles(np.asarray(forms.tokens_for(Law.of(fitted.prior_draws), n)))
    return Band(middle, low, high)


def regret(fitted: Fitted, flops: float, factor: float) -> Regret:
    """With the interval of the draws."""
    point = [float(value) for value in forms.regret(fitted.law, flops, factor)]
    if not len(fitted.draws):
        return Regret(factor, *(Band(value, np.nan, np.nan) for value in point))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ends = [_quantiles(np.asarray(drawn)) for drawn in forms.regret(Law.of(fitted.draws), flops, factor)]
    if fitted.method == "posterior":
        point = [middle for _, middle, _ in ends]
    return Regret(factor, *(Band(p, low, high) for p, (low, _, high) in zip(point, ends, strict=True)))


def beyond(fitted: Fitted, n: float, d: float) -> Beyond:
    ranges = {"N": (n, fitted.n_range), "D": (d, fitted.d_range), "FLOPs": (6 * n * d, fitted.flops_range)}
    below = frozenset(what for what, (value, (low, _)) in ranges.items() if value < low)
    n_far, d_far, work_far = (
        low / value if value < low else value / high for value, (low, high) in ranges.values()
    )
    return Beyond(n_far, d_far, work_far, below)


def best_for(fitted: Fitted, flops: float) -> tuple[Band, Band, Band]:
    """The best N and D on a budget of C = 6ND, and the loss of one run there."""
    n = fitted.band(lambda law: forms.optimum(law, flops)[0])
    d = fitted.band(lambda law: forms.optimum(law, flops)[1])
    return n, d, fitted.band(lambda law: forms.loss(law, *forms.optimum(law, flops)), fitted.scatter)


def separate(points: Points) -> bool:
    """Whether the runs lie on budgets, rather than all along the scale of FLOPs."""
    number = budgets(points.flops)
    spans = [np.ptp(np.log(points.flops[number == one])) for one in np.unique(number)]
    return bool(max(spans) < SAME_BUDGET and len(spans) <= max(1, len(points) / 2))


def _beside(other: Published, fitted: Fitted, n: float, tokens: Band) -> Beside:
    theirs = float(forms.tokens_for(other.law, n))
    return Beside(
        published=other,
        tokens=theirs,
        loss=float(forms.loss(other.law, n, tokens.point)),
        same_count=fitted.counts == other.counts,
        inside=tokens.low <= theirs <= tokens.high if tokens.has_interval else None,
    )


def _quantiles(values: F64) -> tuple[float, float, float]:
    low, middle, high = np.nanquantile(values, [0.025, 0.5, 0.975])
    return float(low), float(middle), float(high)
