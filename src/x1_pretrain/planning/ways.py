"""The classic ways to say how long a run is, side by side: steps, FLOPs, tokens per parameter. Pure.

"4e19 FLOPs" and "20 tokens per parameter" mean different runs by what is counted; here every row has all
counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from x1_pretrain.model.flops import parameter_counts
from x1_pretrain.numbers import flop, human
from x1_pretrain.planning.planner import Plan

RATIO = 20.0  # Hoffmann et al. 2022
SHARES_OF_PEAK = (1.0, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class Way:
    name: str
    tokens: float
    steps: float
    six_nd: float  # N in matrices
    six_nd_total: float  # N with all parameters
    flops: float  # the true ones
    per_matrix: float  # D/N, N in matrices
    per_parameter: float  # D/N, N with all
    hours: float
    usd: float


def ways(made: Plan, steps: int | None, flops: float | None, ratio: float | None) -> tuple[Way, ...]:
    """The plan itself, and what else was named, all for the plan's model and batch."""
    n, total, batch = made.counts.matrices, made.counts.total, made.recipe.batch_tokens
    rows = [(f"this plan ({made.binding})", float(made.tokens))]
    if steps and made.binding != "--steps":
        rows.append((f"{steps:,} steps", float(steps * batch)))
    if flops and made.binding != "--flops":
        rows.append((f"{flop(flops)} true FLOPs", flops / made.cost.causal))
    if flops:
        rows.append((f"{flop(flops)} = 6ND", flops / (6.0 * n)))
        rows.append((f"{flop(flops)} = 6ND, all", flops / (6.0 * total)))
    factor, asked = ratio or RATIO, made.ask.asked_n
    if asked is not None and abs(n / asked - 1) > 0.005:
        rows.append((f"{factor:g} x {human(asked)} asked", factor * asked))
    rows += [(f"{factor:g}:1", factor * n), (f"{factor:g}:1, all", factor * total)]
    return tuple(way(made, name, tokens) for name, tokens in rows)


def way(made: Plan, name: str, tokens: float) -> Way:
    n, total = made.counts.matrices, made.counts.total
    quote = made.quote_for(round(tokens))
    return Way(
        name,
        tokens,
        tokens / made.recipe.batch_tokens,
        6.0 * n * tokens,
        6.0 * total * tokens,
        made.cost.causal * tokens,
        tokens / n,
        tokens / total,
        float(quote.work.hours or 0),
        float(quote.total_usd),
    )


@dataclass(frozen=True)
class Napkin:
    """C = 6ND = throughput x time, as one does it by hand, with N as it was asked for."""

    n: float
    tokens: float
    flops: float
    days: tuple[tuple[float, float], ...]  # share of the peak, days
    ratio: float
    balanced_flops: float  # 20:1
    balanced_days: float  # at half of the peak


def napkin(made: Plan) -> Napkin | None:
    """None where the GPU's peak is not known."""
    machine = made.ask.machine
    if machine.peak_flops_per_sec is None:
        return None
    n = made.ask.asked_n or float(parameter_counts(made.model).matrices)
    tokens = made.ask.tokens_wanted or float(made.tokens)
    peak = machine.peak_flops_per_sec * machine.gpus
    flops, balanced = 6.0 * n * tokens, 6.0 * n * RATIO * n
    days = tuple((share, flops / (share * peak) / 86400) for share in SHARES_OF_PEAK)
    return Napkin(n, tokens, flops, days, tokens / n, balanced, balanced / (0.5 * peak) / 86400)
