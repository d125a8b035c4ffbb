"""The gradient noise scale: from which batch on more tokens a step stop paying.

A step's gradient is the true one plus noise, and the noise's variance falls as one over the tokens of the
batch. The norms of the mean gradient over few tokens and over many tell the two apart (McCandlish et al.
2018, arXiv 1812.06162):

    E|g_b|^2 = |G|^2 + S / b         g_b: mean gradient over b tokens; G: the true gradient
    B_simple = S / |G|^2             S: the noise's variance for one token, summed over all weights

At a batch of B_simple tokens noise and signal are of one size. One step's |G|^2 and S are unbiased, but so
noisy that only the ratio of their averages means something. Pure; no torch.

The loop's gradient after its first micro-batch is the sum over that micro-batch's tokens divided by the
tokens of the whole step: `mean_square` makes the squared norm of the mean gradient out of its squared norm.
Of several ranks, each with a first micro-batch of its own, take the mean of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

MEMORY_UPDATES = 100  # of the averages: a step so many updates ago counts 1/e of the latest
LEAST_UPDATES = 20  # before that there is nothing to say
RESOLVED = 3.0  # |G|^2 must be this many standard errors above zero: below, the ratio could be anything


def mean_square(square: float, step_tokens: float, small_tokens: float) -> float:
    """|mean gradient over the small batch|^2, from |its summed gradient / step_tokens|^2."""
    return square * (step_tokens / small_tokens) ** 2


@dataclass
class NoiseScale:
    """Exponential averages of what the estimate needs; `updates` is how many it was measured over."""

    updates: int = 0
    weight: float = 0.0  # of all updates together, towards 1: divides out the averages' start at zero
    weight_sq: float = 0.0  # the sum of the squares of their weights
    signal: float = 0.0  # |G|^2
    noise: float = 0.0  # S, times tokens
    signal_sq: float = 0.0
    noise_sq: float = 0.0
    product: float = 0.0

    def update(self, small_sq: float, big_sq: float, small_tokens: float, big_tokens: float) -> None:
        """Learn from one step: squared norms of the mean gradients over its first tokens and over all of
        them. What tells nothing is left out: numbers that are not finite, batches of one size."""
        if not (math.isfinite(small_sq) and math.isfinite(big_sq) and 0 < small_tokens < big_tokens):
            return
        signal = (big_tokens * big_sq - small_tokens * small_sq) / (big_tokens - small_tokens)
        noise = (small_sq - big_sq) / (1 / small_tokens - 1 / big_tokens)
        part = 1 / MEMORY_UPDATES
        self.updates += 1
        self.weight += part * (1 - self.weight)
        self.weight_sq = (1 - part) ** 2 * self.weight_sq + part**2
        self.signal += part * (signal - self.signal)
        self.noise += part * (noise - self.noise)
        self.signal_sq += part * (signal**2 - self.signal_sq)
        self.noise_sq += part * (noise**2 - self.noise_sq)
        self.product += part * (signal * noise - self.product)

    def tokens(self) -> float | None:
        """B_simple, in tokens. None until enough was seen, and where |G|^2 is lost in its noise."""
        if self.updates < LEAST_UPDATES or self.noise <= 0:
            return None
        spread = self.signal_sq / self.weight - (self.signal / self.weight) ** 2
        if self.signal / self.weight <= RESOLVED * self._error_of_mean(spread):
            return None
        return self.noise / self.signal

    def error(self) -> float | None:
        """The standard error of `tokens`, to first order (of a ratio of means); None where that is None."""
        ratio = self.tokens()
        if ratio is None:
            return None
        spread = self.noise_sq - 2 * ratio * self.product + ratio**2 * self.signal_sq
        return self._error_of_mean(spread / self.weight) / (self.signal / self.weight)

    def _error_of_mean(self, variance: float) -> float:
        """The standard error of an average of independent updates with this variance about it."""
        share = self.weight_sq / self.weight**2  # 1 / the number of updates that count
        return math.sqrt(max(0.0, variance) * share / (1 - share))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """What is missing starts anew: {} is the state before the first step."""
        return cls(**{f.name: tree[f.name] for f in fields(cls) if f.name in tree})


@dataclass
class NoiseScales:
    """The estimate for all weights together, and for each group of them if wanted."""

    by_group: bool = False
    total: NoiseScale = field(default_factory=NoiseScale)
    groups: dict[str, NoiseScale] = field(default_factory=dict)

    def update(
        self, small: Mapping[str, float], big: Mapping[str, float], small_tokens: float, big_tokens: float
    ) -> None:
        """As `NoiseScale.update`, from squared norms by group: their sum is that of all weights."""
        self.total.update(sum(small.values()), sum(big.values()), small_tokens, big_tokens)
        for name in small if self.by_group else ():
            scale = self.groups.setdefault(name, NoiseScale())
            scale.update(small[name], big[name], small_tokens, big_tokens)

    def row(self) -> dict[str, float]:
        """What can be told, by metric name."""
        scales = {"noise_scale": self.total} | {f"noise_scale/{n}": s for n, s in self.groups.items()}
        row = {name: tokens for name, s in scales.items() if (tokens := s.tokens()) is not None}
        error = self.total.error()
        return row if error is None else {**row, "noise_scale_error": error}

    def to_json(self) -> dict[str, Any]:
        return {"total": self.total.to_json(), "groups": {n: s.to_json() for n, s in self.groups.items()}}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], by_group: bool) -> Self:
        groups = tree.get("groups", {}) if by_group else {}
        total = NoiseScale.from_json(tree.get("total", {}))
        return cls(by_group, total, {name: NoiseScale.from_json(s) for name, s in groups.items()})
