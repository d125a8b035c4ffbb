"""Measured points (N, D, loss), as the fit takes them. `reading.py` makes them from a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from x1_pretrain.laws.forms import F64, Counts

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Points:
    """One entry a measured loss. Points of one training run (a trunk and its cooldowns) share a cluster."""

    n: F64
    d: F64
    loss: F64  # nats per token
    flops: F64  # true training FLOPs where the file has them, else 6ND
    cluster: I64  # 0, 1, ...: what the bootstrap draws
    usd: F64  # NaN where unknown
    names: tuple[str, ...]
    counts: Counts  # what n counts
    flops_basis: str  # "as measured" or "6ND"
    origin: str  # the file
    sha256: str  # of its content
    notes: tuple[str, ...] = ()  # what the reader should know: warnings, assumptions

    def __len__(self) -> int:
        return len(self.n)

    @property
    def clusters(self) -> int:
        return len(np.unique(self.cluster))

    def only(self, kept: npt.NDArray[np.bool_]) -> Points:
        """Some of the points; clusters numbered anew."""
        _, cluster = np.unique(self.cluster[kept], return_inverse=True)
        names = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
        return replace(
            self,
            n=self.n[kept],
            d=self.d[kept],
            loss=self.loss[kept],
            flops=self.flops[kept],
            cluster=cluster.astype(np.int64),
            usd=self.usd[kept],
            names=names,
        )


def points(n: Any, d: Any, loss: Any, cluster: Any = None, flops: Any = None) -> Points:
    """From plain sequences, for tests, simulations and benchmarks; a cluster each unless given."""
    size, depth, nats = (np.asarray(v, dtype=float) for v in (n, d, loss))
    own = np.arange(len(size)) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
    work = 6.0 * size * depth if flops is None else np.asarray(flops, dtype=float)
    unknown = np.full(len(size), np.nan)
    names = tuple(f"point {i + 1}" for i in range(len(size)))
    return Points(
        size, depth, nats, work, own.astype(np.int64), unknown, names, "as given", "6ND", "memory", "0" * 64
    )


BUDGET_GAP = 0.25  # in ln C: runs meant for one budget are closer than this, budgets are further apart


def budgets(flops: F64) -> I64:
    """For each point the number of its budget, 0 for the smallest: single linkage on ln C."""
    order = np.argsort(flops, kind="stable")
    logs = np.log(flops[order])
    found = np.empty(len(flops), dtype=np.int64)
    found[order] = np.concatenate([[0], np.cumsum(np.diff(logs) > BUDGET_GAP)]) if len(flops) else []
    return found


def largest_budget(flops: F64) -> npt.NDArray[np.bool_]:
    """The points to leave out when asking how well the rest predicts them: the largest budget, or the fifth
    of the points with the most FLOPs where that is nearly nothing or nearly all."""
    number = budgets(flops)
    top = np.asarray(number == number.max())
    return top if 0.1 <= top.mean() <= 0.5 else np.asarray(flops >= np.quantile(flops, 0.8))
