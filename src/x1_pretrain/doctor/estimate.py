"""What this config will take on this machine, from what was measured: tokens a second, hours, dollars.

Counted: the steps, the gradients' sum over the GPUs, evaluations, checkpoints. Not counted, and said so:
starting and compiling, samples, waiting for data, and whatever clocks do in hour ten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from x1_pretrain.config import RunConfig
from x1_pretrain.records.console import duration

ENOUGH = 10  # samples for percentiles
MANY_HOURS, MANY_DOLLARS = 1_000.0, 10_000.0  # from which they are rounded
GRADIENT_BYTES = 4  # fp32


@dataclass(frozen=True)
class Pace:
    """Seconds of a step: the median of the measured micro-batches, their 10th and their 90th percentile."""

    step_s: float
    low_s: float
    high_s: float
    samples: int
    sum_s: float  # of that, the gradients' sum over the GPUs

    def tokens_per_sec(self, batch_tokens: int) -> tuple[float, float, float]:
        """Median, lowest, highest."""
        return batch_tokens / self.step_s, batch_tokens / self.high_s, batch_tokens / self.low_s


def pace(
    micro_s: Sequence[float],
    sequences: int,
    update_s: float,
    rank_blocks: int,
    parameters: int,
    gpus: int,
    bus_bytes_per_sec: float | None,
) -> Pace:
    """A rank computes `rank_blocks` sequences a step, `sequences` at a time as measured."""
    passes = rank_blocks / sequences
    summing = 0.0
    if gpus > 1 and bus_bytes_per_sec:
        summing = 2 * (gpus - 1) / gpus * GRADIENT_BYTES * parameters / bus_bytes_per_sec
    steps = [passes * seconds + update_s + summing for seconds in (*spread(micro_s), median(micro_s))]
    return Pace(steps[2], steps[0], steps[1], len(micro_s), summing)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile; of fewer than ten values the least and the most."""
    if len(values) < ENOUGH:
        return min(values), max(values)
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def evaluations(config: RunConfig) -> int:
    """At step 0, at every multiple, and at the end."""
    steps, every = config.training.total_steps, config.evaluation.every
    return len({0, *range(every, steps + 1, every), steps})


def checkpoints(config: RunConfig) -> int:
    steps, settings = config.training.total_steps, config.checkpoint
    return len({0, *range(settings.every, steps + 1, settings.every), *settings.at, steps})


def kept_checkpoints(config: RunConfig) -> int:
    """On the disk at the fullest moment: those that stay for good, the last ones, the one being written."""
    steps, settings = config.training.total_steps, config.checkpoint
    forever = set(settings.at)
    if settings.keep_every:
        forever |= {s for s in range(0, steps + 1, settings.every) if s % settings.keep_every == 0}
    return min(checkpoints(config), len(forever) + settings.keep_last + 1)


@dataclass(frozen=True)
class Price:
    usd_per_hr: float  # of the whole machine
    source: str


@dataclass(frozen=True)
class Estimate:
    tokens_per_sec: tuple[float, float, float]  # median, lowest, highest
    hours: tuple[float, float, float]  # median, fewest, most
    parts_s: Mapping[str, float | None]  # None: not counted
    samples: int
    price: Price | None

    @property
    def usd(self) -> tuple[float, float, float] | None:
        if self.price is None:
            return None
        first, low, high = (hours * self.price.usd_per_hr for hours in self.hours)
        return first, low, high

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_sec": self.tokens_per_sec[0],
            "tokens_per_sec_spread": list(self.tokens_per_sec[1:]),
            "hours": self.hours[0],
            "hours_spread": list(self.hours[1:]),
            "usd": self.usd[0] if self.usd else None,
            "usd_spread": list(self.usd[1:]) if self.usd else None,
            "usd_per_hr": self.price.usd_per_hr if self.price else None,
            "price_source": self.price.source if self.price else None,
            "measured_micro_batches": self.samples,
            "seconds": dict(self.parts_s),
        }


def estimate(
    config: RunConfig,
    measured: Pace,
    evaluation_s: float | None,
    checkpoint_s: float,
    price: Price | None,
) -> Estimate:
    """`evaluation_s`, `checkpoint_s`: of one. No `evaluation_s`: evaluations are not counted."""
    steps = config.training.total_steps
    evaluating = None if evaluation_s is None else evaluations(config) * evaluation_s
    others = (evaluating or 0.0) + checkpoints(config) * checkpoint_s
    hours = [
        (steps * seconds + others) / 3600 for seconds in (measured.step_s, measured.low_s, measured.high_s)
    ]
    parts: dict[str, float | None] = {
        "training": steps * measured.step_s,
        "evaluation": evaluating,
        "checkpoints": checkpoints(config) * checkpoint_s,
    }
    rates = measured.tokens_per_sec(config.training.batch_tokens)
    return Estimate(rates, (hours[0], hours[1], hours[2]), parts, measured.samples, price)


def sentences(found: Estimate, config: RunConfig, ranks: int, how: str, gpu: bool = True) -> str:
    """The last lines of the page. `gpu`: it was measured on one."""
    rate, low, high = found.tokens_per_sec
    total = config.training.total_steps * config.training.batch_tokens
    parts = ", ".join(_part(name, seconds) for name, seconds in found.parts_s.items())
    lines = [
        f"{config.name}: about {rate:,.0f} tokens/s [{low:,.0f}, {high:,.0f}] on {how}",
        f"  {total:,} tokens take {_span(found.hours, _hours)}: {parts}",
    ]
    if found.usd and found.price:
        price = f"{found.price.usd_per_hr:,.2f} $/h ({found.price.source})"
        lines.append(f"  {_span(found.usd, dollars)} at {price}")
        if not gpu:
            lines.append(
                "  The speed is this CPU's. If that price is of a machine with a GPU, these dollars are of "
                "neither."
            )
    else:
        lines.append("  dollars: no price is known; give --usd-per-hr")
    scaled = f" One rank of {ranks} was measured, alone." if ranks > 1 else ""
    ends = "their 10th and 90th percentile" if found.samples >= ENOUGH else "the fastest and the slowest"
    lines.append(
        f"  By the median of {found.samples} measured micro-batches; in brackets, by {ends}.{scaled}\n"
        "  Not in it: starting, compiling, samples, waiting for data, clocks that change later."
    )
    return "\n".join(lines)


def _span(values: tuple[float, float, float], shown: Callable[[float], str]) -> str:
    """The point [low, high]."""
    return f"{shown(values[0])} [{shown(values[1])}, {shown(values[2])}]"


def _hours(hours: float) -> str:
    if hours >= MANY_HOURS:  # no measurement of seconds is good to the minute there
        return f"about {_rounded(hours):,.0f} h"
    return f"{hours:,.2f} h" if hours >= 1 / 60 else f"{hours * 3600:,.1f} s"


def _rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def _part(name: str, seconds: float | None) -> str:
    if seconds is None:
        return f"{name}: not counted, the data did not open"
    long = seconds >= 3600 * MANY_HOURS
    return f"{name} {_hours(seconds / 3600) if long else duration(seconds)}"


def dollars(usd: float) -> str:
    if usd >= MANY_DOLLARS:
        return f"${_rounded(usd):,.0f}"
    return f"${usd:,.2f}" if usd >= 0.01 else f"${usd:.2g}"
