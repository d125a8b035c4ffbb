"""The law: L(N, D) = E + A / N^alpha + B / D^beta, and what follows from it. Pure arithmetic.

L is in nats per token. Everything broadcasts: the fields of a `Law` may be numbers or arrays (one entry a
bootstrap replicate), and so may N and D. What N counts (matrices only, or embeddings too) belongs to the
data a law was fitted on; a law is used with the count it was made with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Counts = Literal["matrices", "total", "as given"]  # what N counts

FIELDS = ("E", "A", "alpha", "B", "beta")

# How the value of a repeated token decays with epochs, and of an excess parameter (Muennighoff et al. 2023,
# arXiv 2305.16264).
REPEAT_TOKENS = 15.39
REPEAT_PARAMETERS = 5.31


class Law(NamedTuple):
    E: Any  # nats: what no model and no data can remove
    A: Any
    alpha: Any
    B: Any
    beta: Any

    @classmethod
    def of(cls, rows: F64) -> Law:
        """From an array whose last axis is E, A, alpha, B, beta."""
        return cls(*np.moveaxis(np.asarray(rows, dtype=float), -1, 0))

    def rows(self) -> F64:
        """The array that `of` takes."""
        return np.stack(np.broadcast_arrays(*map(np.asarray, self)), axis=-1).astype(float)

    def spread(self) -> Law:
        """With an axis behind: one law a row, against N and D of one column each."""
        return Law(*(np.asarray(field)[..., None] for field in self))


def loss(law: Law, n: Any, d: Any) -> Any:
    """Nats per token of n parameters after d tokens."""
    return law.E + law.A * np.power(n, -1.0 * law.alpha) + law.B * np.power(d, -1.0 * law.beta)


def tokens_for(law: Law, n: Any) -> Any:
    """D_opt(N): the tokens with which n parameters are the best use of C = 6ND."""
    return np.power(law.beta * law.B * np.power(n, law.alpha) / (law.alpha * law.A), 1.0 / law.beta)


def optimum(law: Law, flops: Any) -> tuple[Any, Any]:
    """The best (N, D) on a budget of C = 6ND."""
    total = law.alpha + law.beta
    scale = np.power(law.alpha * law.A / (law.beta * law.B), 1.0 / total)
    n = scale * np.power(np.asarray(flops) / 6.0, law.beta / total)
    return n, flops / (6.0 * n)


def flops_to_reach(law: Law, target: Any) -> Any:
    """The least C = 6ND with which this loss is reached; infinite at or below E."""
    # at the optimum alpha A N^-alpha = beta B D^-beta, so the whole reducible loss follows from N
    above = np.asarray(target - law.E, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.power(law.A * (1.0 + law.alpha / law.beta) / above, 1.0 / law.alpha)
        found = 6.0 * n * tokens_for(law, n)
    return np.where(above > 0, found, np.inf)


def regret(law: Law, flops: float, factor: float) -> tuple[Any, Any]:
    """Tokens per parameter off by `factor` on a fixed budget: nats lost, and the share of the compute wasted.

    The worse of too many and too few tokens.
    """
    n, d = optimum(law, flops)
    best = loss(law, n, d)
    sides = [loss(law, n / f**0.5, d * f**0.5) for f in (factor, 1.0 / factor)]
    worse = np.maximum(*sides)
    return worse - best, 1.0 - flops_to_reach(law, worse) / flops


def effective_tokens(unique: float, tokens: float) -> float:
    """What `tokens` drawn from `unique` ones are worth in fresh tokens: repeats fade."""
    if tokens <= unique:
        return tokens
    repeats = tokens / unique - 1.0
    return unique * (1.0 + REPEAT_TOKENS * (1.0 - float(np.exp(-repeats / REPEAT_TOKENS))))


# ------------------------------------------------------------------------------------------------------------
# Laws that others published


@dataclass(frozen=True)
class Published:
    name: str
    law: Law
    counts: Counts
    source: str


# Fitted anew by `x1_pretrain.fit_scaling_law` on the 240 points that Besiroglu et al. read off a figure of
# Hoffmann et al.; see docs/scaling-laws.md for how it differs from the constants they print.
REFIT = Published(
    "Hoffmann refit",
    Law(1.817218, 477.826, 0.347310, 2143.417, 0.367172),
    "total",
    "Huber(1e-3) on log L over the 240 points of Besiroglu et al. 2024 (arXiv 2404.10102)",
)
PUBLISHED = (
    REFIT,
    Published(
        "Besiroglu",
        Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658),
        "total",
        "arXiv 2404.10102: their loss scale collapsed, so this is the least-absolute-deviation limit",
    ),
    Published(
        "Hoffmann",
        Law(1.69337368, 406.401018, 0.33917084, 410.722827, 0.2849083),
        "total",
        "arXiv 2203.15556, the digits in the source of the paper",
    ),
    Published(
        "Muennighoff C4",
        Law(1.87, 521.0, 0.353, 1488.0, 0.353),
        "total",
        "arXiv 2305.16264, alpha = beta",
    ),
    Published(
        "Hoffmann rounded",
        Law(1.69, 406.4, 0.34, 410.7, 0.28),
        "total",
        "arXiv 2203.15556, as printed: the rounding alone moves D_opt(1B) from 29 B to 44 B",
    ),
)
