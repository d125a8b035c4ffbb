"""A plan on the screen: tables that fold at 80 columns, and plain text where nobody looks."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table

from x1_pretrain.learning.recipe import Derived
from x1_pretrain.money import gate
from x1_pretrain.numbers import flop, human
from x1_pretrain.planning import cluster, derived
from x1_pretrain.planning.config_file import summary
from x1_pretrain.planning.critique import Finding, Judged
from x1_pretrain.planning.planner import Plan
from x1_pretrain.planning.ways import RATIO, napkin, ways

PIPED_COLUMNS = 110
NOTHING_WRONG = "Nothing wrong with it that x1 plan can see."


def console() -> Console:
    """As wide as the terminal; a pipe has no width of its own."""
    free = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if free else PIPED_COLUMNS, highlight=False, markup=False, emoji=False)


def _say(out: Console, text: str) -> None:
    """Prose: folded for a reader, one line each in a pipe."""
    out.print(text, soft_wrap=not (sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()))


def show(
    made: Plan, steps: int | None, flops: float | None, ratio: float | None, notes: list[str], explain: bool
) -> None:
    out = console()
    _say(out, gate.sentence(made.quote) if made.ask.dollars is not None else _without_ceiling(made))
    out.print()
    _numbers(out, made, explain)
    out.print(_ways_table(made, steps, flops, ratio))
    _napkin(out, made)
    if made.serving:
        _served(out, made)
    out.print()
    out.print(_cluster_table(made))
    _say(out, _cluster_words(made))
    _notes(out, notes)


def _without_ceiling(made: Plan) -> str:
    return f"{gate.sentence(made.quote)} (No --dollars: the ceiling is the total, up to the next dollar.)"


def _lines_table(lines: list[Derived]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, ratio in (("what", 3), ("value", 5), ("formula", 6), ("source", 6)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for line in lines:
        table.add_row(line.name, line.shown, line.formula, line.source)
    return table


def _explained(out: Console, lines: list[Derived]) -> None:
    for line in lines:
        out.print(f"{line.name}: {line.shown}", style="bold")
        out.print(f"    {line.formula}")
        for numbers in line.numbers.splitlines():
            out.print(f"    = {numbers}")
        out.print(f"    source: {line.source}")


def _ways_table(made: Plan, steps: int | None, flops: float | None, ratio: float | None) -> Table:
    table = Table(
        title=f"How long? {human(made.counts.matrices)} in matrices ({human(made.counts.total)} in all), "
        f"{made.recipe.batch_tokens:,} tokens a step; FLOPs by 6ND, and true",
        box=None,
        padding=(0, 1, 0, 0),  # ten columns in eighty
        title_justify="left",
        title_style="bold",
        header_style="bold",
    )
    table.add_column("by", overflow="fold", min_width=12)
    for name in ("steps", "tokens", "6ND", "6ND all", "true", "D/N", "all", "hours", "dollars"):
        table.add_column(name, justify="right", no_wrap=True)
    for way in ways(made, steps, flops, ratio):
        table.add_row(
            way.name,
            f"{way.steps:,.0f}",
            human(way.tokens),
            flop(way.six_nd),
            flop(way.six_nd_total),
            flop(way.flops),
            f"{way.per_matrix:.3g}",
            f"{way.per_parameter:.3g}",
            f"{way.hours:,.1f}",
            f"{way.usd:,.2f}" if way.usd < 10_000 else f"{way.usd:,.0f}",
        )
    return table


def _napkin(out: Console, made: Plan) -> None:
    by_hand = napkin(made)
    if by_hand is None:
        return
    peak, *others = by_hand.days
    shares = "/".join(f"{share * 100:.0f}" for share, _ in others)
    unit, name = (1.0, "days") if peak[1] >= 1 else (24.0, "h")
    days = " / ".join(f"{value * unit:.2f}" for _, value in others)
    many = f"{made.ask.machine.gpus:,} GPU{'s' * (made.ask.machine.gpus != 1)}"
    out.print()
    _say(
        out,
        f"On a napkin: C = 6ND = 6 x {human(by_hand.n)} x {human(by_hand.tokens)} = {flop(by_hand.flops)} "
        f"FLOPs (attention and vocabulary left out); {peak[1] * unit:.2f} {name} at the peak of {many}, "
        f"{days} {name} at {shares} % of it. D/N = {by_hand.ratio:.1f}; {RATIO:g}:1 would be "
        f"{flop(by_hand.balanced_flops)} FLOPs, {by_hand.balanced_days * unit:.1f} {name} at 50 %.",
    )


def _served(out: Console, made: Plan) -> None:
    serving = made.serving
    assert serving is not None
    from x1_pretrain.model.flops import parameter_counts

    other = parameter_counts(serving.instead_of)
    out.print()
    _say(
        out,
        f"For {human(serving.tokens)} tokens served: {flop(serving.extra_flops)} FLOPs more of training "
        f"than the compute-optimal {human(other.matrices)} x {human(serving.instead_tokens)} tokens of the "
        f"same loss, {flop(serving.saved_flops)} fewer of serving (2N a token; Sardana et al. 2024, arXiv "
        "2401.00448). Laws fitted near 20 tokens per parameter promise too much far above it.",
    )


def _cluster_table(made: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPUs", "hours", "dollars", "tokens/GPU/step", "arithmetic", "exchange", "efficiency"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("data parallel alone?", overflow="fold")
    own = made.ask.machine.gpus
    for gpus in sorted({own, *cluster.WIDTHS}):
        width = made.shared.width(gpus)
        unknown = width.exchange_s is None or width.efficiency is None
        table.add_row(
            f"{gpus:,}",
            f"{width.hours:,.1f}",
            f"{width.usd:,.0f}",
            f"{width.tokens_per_gpu:,.0f}",
            f"{width.compute_s:.3g} s",
            "unknown" if unknown else f"{width.exchange_s:.3g} s",
            "unknown" if unknown else f"{width.efficiency:.0%}",
            f"no: {width.stops}" if width.stops else "yes",
        )
    return table


def _cluster_words(made: Plan) -> str:
    widest = made.shared.widest()
    link = made.ask.machine.link_gb_per_sec
    until = f"up to {widest:,} GPUs" if widest else "on no number of GPUs"
    inside = "unknown" if link is None else f"{link:g} GB/s"
    return (
        f"Data parallelism alone makes sense {until}. Efficiency is assumed: arithmetic / (arithmetic + "
        f"exchange), without overlap, as the loop does it; exchange = 2 (W-1)/W x 4 bytes x N over {inside} "
        f"inside a node of {cluster.NODE_GPUS}, {cluster.BETWEEN_NODES_GB_PER_SEC:g} GB/s a GPU between "
        "nodes (assumed)."
    )


def _notes(out: Console, notes: list[str]) -> None:
    if notes:
        out.print()
    for note in notes:
        _say(out, f"note: {note}")


# ------------------------------------------------------------------------------------------------------------
# An existing plan


def show_judged(judged: Judged, notes: list[str], explain: bool) -> None:
    out = console()
    made = judged.priced
    out.print(f"{judged.config.name}: {summary(made)}", style="bold")
    out.print(made.product)
    _say(out, gate.sentence(made.quote) if made.ask.dollars is not None else _without_ceiling(made))
    out.print()
    count = len(judged.findings)
    said = f"{count} finding{'s' * (count != 1)}, the dearest first (what they cost overlaps):"
    _say(out, said if count else NOTHING_WRONG)
    for one in judged.findings:
        _say(out, _finding(one))
    if (instead := judged.instead) and instead.expected.point < made.expected.point:
        out.print()
        _say(
            out,
            f"The same {made.hours:,.1f} h at the optimum: {summary(instead)}, loss {_loss(instead)} "
            f"instead of {_loss(made)} ({made.ask.belief.name}, N = {made.ask.belief.counts}).",
        )
    out.print()
    _numbers(out, made, explain)
    out.print(_ways_table(made, None, None, None))
    out.print()
    out.print(_cluster_table(made))
    _say(out, _cluster_words(made))
    _notes(out, notes)


def _numbers(out: Console, made: Plan, explain: bool) -> None:
    if explain:
        _explained(out, derived.lines(made))
    else:
        out.print(_lines_table(derived.lines(made)))
    out.print()


def _finding(one: Finding) -> str:
    cost = "" if one.usd is None else f" (costs ${one.usd:,.2f})"
    return f"- {one.title}{cost}: {one.said}. {one.do[0].upper()}{one.do[1:]}. [{one.source}]"


def _loss(made: Plan) -> str:
    return f"{made.expected.point:.2f}"
