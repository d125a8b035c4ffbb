"""What the parts of a fit hand to each other, to `fit.json`, to the picture and to the page of prose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from x1_pretrain.laws.fitted import Band, Fitted
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.points import Points

Estimator = Literal["huber", "lad", "least-squares"]


@dataclass(frozen=True)
class Form:
    """Which of the five numbers are free."""

    name: str  # "hoffmann", "alpha=beta", "alpha=0.34, beta=0.28"
    alpha: float | None = None  # fixed at
    beta: float | None = None
    tied: bool = False  # alpha = beta, one number

    @property
    def free(self) -> int:
        return 5 - (self.alpha is not None) - (self.beta is not None) - self.tied


HOFFMANN = Form("hoffmann")
TIED = Form("alpha=beta", tied=True)


@dataclass(frozen=True)
class Estimate:
    """An optimum of one form and one estimator over some points."""

    law: Law
    form: Form
    estimator: Estimator
    objective: float  # summed over the points, on ln L
    starts: int
    agreeing: float  # share of the starts that reached this optimum


@dataclass(frozen=True)
class Verdict:
    """Whether the points can tell the five numbers, and what says so."""

    identified: bool
    reasons: tuple[str, ...]  # why not: full sentences for a person, each with its number
    points: int
    clusters: int
    budgets: int
    rank: int  # of the Jacobian in scaled columns
    condition: float
    residual_sd: float  # of ln L, degrees of freedom counted; NaN where there are none


@dataclass(frozen=True)
class HeldOut:
    """The law fitted without the largest budget, and how well it predicts it."""

    law: Law
    points: int  # left out
    flops_fitted_to: float  # the largest that was fitted
    flops_left_out: float  # the largest that was left out
    bias: float  # mean of predicted - measured ln L
    rms: float  # of the same


@dataclass(frozen=True)
class Parabola:
    """Approach 2 on one budget: ln L against ln N. A second opinion."""

    flops: float
    points: int
    n_opt: float  # NaN where the parabola does not open upwards
    loss_opt: float
    inside: bool  # the lowest point lies between the smallest and the largest size
    coefficients: tuple[float, float, float]  # of (ln N)^2, ln N, 1


@dataclass(frozen=True)
class Prior:
    """What was believed before the points, written down: independent, on a log scale each."""

    name: str
    n0: float  # the reference point ...
    d0: float
    centre: tuple[float, float, float, float, float]  # E, A/n0^alpha, B/d0^beta (nats), alpha, beta
    spread: tuple[float, float, float, float, float]  # sd of the logarithm of each
    noise: tuple[float, float]  # median of the sd of ln L, and the sd of its logarithm
    source: str


@dataclass(frozen=True)
class Posterior:
    """Draws of the law before and after the points."""

    prior: Prior
    draws: F64  # (R, 5)
    prior_draws: F64  # (P, 5)
    noise: F64  # (R,) sd of ln L
    effective: float  # draws that are worth independent ones, of the slowest parameter
    target_n: float  # the size that is asked about
    shrinkage: float  # 1 - posterior variance / prior variance, of ln D_opt(target_n)


@dataclass(frozen=True)
class NextRun:
    """A run that was not made, and what it would tell."""

    n: float
    d: float
    usd: float | None
    flops: float
    width_before: float  # of the 95 % interval of D_opt, as a factor from the middle to an end
    width_after: float


@dataclass(frozen=True)
class Report:
    """All that one fit found."""

    points: Points
    best: Estimate  # Huber on ln L, Hoffmann's form
    others: tuple[Estimate, ...]  # other estimators, other forms: how much the answer depends on the choice
    verdict: Verdict
    fitted: Fitted
    parameters: tuple[Band, Band, Band, Band, Band]  # E, A, alpha, B, beta
    held_out: HeldOut | None
    posterior: Posterior | None
    parabolas: tuple[Parabola, ...]
    next_runs: tuple[NextRun, ...]
    target_n: float  # D_opt is asked for this size
    replicates: int
    seconds: float
