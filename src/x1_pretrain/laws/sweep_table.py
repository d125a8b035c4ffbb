"""A planned sweep, told: each run with its price, the totals, whether the optimum is among the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from x1_pretrain.laws import sweep
from x1_pretrain.laws.sweep import Count, Pace, PlannedRun
from x1_pretrain.model import gpus
from x1_pretrain.money import prices
from x1_pretrain.money.gate import ASSUMED_MFU
from x1_pretrain.numbers import compact, flop, human

MANY_EPOCHS = 4.0  # beyond, a repeated token is worth clearly less than a fresh one (arXiv 2305.16264)

HEAD = ("run", "N", "N total", "D", "D/N", "steps", "batch", "lr", "FLOPs", "6ND", "hours", "USD")


def table(runs: Sequence[PlannedRun], pace: Pace, usd_per_hr: Decimal | None) -> list[str]:
    """A line for each run. Hours and dollars are of its own training, a branch's without its trunk's."""
    rows = [HEAD]
    for run in runs:
        hours, usd = price(pace.seconds(run), usd_per_hr)
        size = (run.name, compact(run.matrices), compact(run.total), compact(run.tokens))
        ratio = human(run.tokens / run.matrices)
        rate = (f"{run.steps:,}", f"{run.batch_tokens:,}", f"{run.lr:.1e}")
        rows.append((*size, ratio, *rate, flop(run.flops), flop(run.six_nd), hours, usd))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return ["  ".join(_padded(row, widths)).rstrip() for row in rows]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        row[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
    ]


def price(seconds: float | None, usd_per_hr: Decimal | None) -> tuple[str, str]:
    """Hours and dollars as shown; blank where unknown."""
    if seconds is None:
        return "", ""
    usd = None if usd_per_hr is None else usd_per_hr * Decimal(repr(seconds)) / 3600
    return f"{seconds / 3600:.2f}", "" if usd is None else f"{usd:.2f}"


def told(
    runs: Sequence[PlannedRun], pace: Pace, usd_per_hr: Decimal | None, price_from: str, count: Count
) -> list[str]:
    """What follows the table: totals, whether it is one budget, whether the optimum is among the sizes."""
    trunks = [run for run in runs if run.is_trunk]
    seconds = [pace.seconds(run) for run in runs]
    whole = None if None in seconds else sum(second or 0.0 for second in seconds)
    hours, usd = price(whole, usd_per_hr)
    work, alone = sum(run.own_flops for run in runs), sum(run.flops for run in trunks)
    said = [
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {flop(work)} FLOPs in all"
        + (f", {work / alone - 1:+.0%} for the cooldowns" if len(runs) > len(trunks) else "")
        + (f", {hours} hours" if hours else "")
        + (f", ${usd}" if usd else "")
        + f"; {sweep.disk_bytes(runs) / 1e9:,.1f} GB of checkpoints",
        f"  hours: {pace.basis}; evaluation and start-up come on top",
        *([f"  dollars: at ${usd_per_hr}/h, {price_from}"] if usd_per_hr is not None else []),
        (
            "  N: parameters in matrices; FLOPs: all the work of training, output matrix and attention "
            "included"
        ),
    ]
    if short := [run.name for run in runs if run.steps < sweep.MIN_STEPS]:
        few = f"fewer than {sweep.MIN_STEPS} steps, where a loss is about the optimizer"
        said.append(f"  {few}: {', '.join(short)}; fewer --batch-tokens or a smaller --span")
    for budget in dict.fromkeys(run.budget for run in runs):
        mine = [run for run in trunks if run.budget == budget]
        said += budget_lines(mine, count)
    return said


def budget_lines(trunks: Sequence[PlannedRun], count: Count) -> list[str]:
    said = [
        f"{flop(trunks[0].budget)} FLOPs, as {'6ND with N in matrices' if count == '6n' else 'all the work'}:"
    ]
    if (factor := sweep.apart(trunks)) > sweep.ALIKE:
        said.append(
            f"  not one budget: by all the work they are up to {factor:.2f} x apart ("
            + ", ".join(f"{run.name} {flop(run.flops)}" for run in trunks)
            + "); --count true puts them on one"
        )
    for counts in ("total", "matrices"):
        found = sweep.bracket(trunks, counts, count)
        model = trunks[0].model
        what = "all parameters, as the laws count" if counts == "total" else "parameters in matrices"
        spread = f"{compact(found.optimum)} (published laws: {compact(found.low)} to {compact(found.high)})"
        add = sweep.size_to_add(found, model.vocab, model.context)
        verdict = "in between" if add is None else f"not in between: add --sizes {sweep.label(add)}"
        if add in [float(run.matrices) for run in trunks]:
            verdict = "not in between, and no shape lies beyond: another budget would help"
        sizes = f"{compact(found.smallest)} to {compact(found.largest)}"
        said.append(f"  {what}: sizes {sizes}, expected optimum {spread}: {verdict}")
    return said


def pace_of(gpu: str | None, mfu: float | None, flops_per_sec: float | None) -> Pace:
    """Measured, else a share of a GPU's peak, else unknown."""
    if flops_per_sec is not None:
        return Pace(
            f"at {flop(flops_per_sec)} FLOP/s, measured (--flops-per-sec)", flops_per_sec=flops_per_sec
        )
    if gpu is None:
        return Pace("unknown; --gpu or a measured --flops-per-sec would say")
    known = gpus.kind(gpu)
    if known.peak_flops_per_sec is None:
        return Pace(f"unknown: no peak is known for {known.label}; a measured --flops-per-sec would say")
    share = ASSUMED_MFU if mfu is None else mfu
    how = "assumed" if mfu is None else "as given"
    peak = f"{known.label}'s {flop(known.peak_flops_per_sec)} FLOP/s"
    return Pace(
        f"at an MFU of {share:.2f} ({how}, PaLM convention) of {peak}",
        palm_flops_per_sec=share * known.peak_flops_per_sec,
    )


def hourly(gpu: str | None, usd_per_hr: float | None) -> tuple[Decimal | None, str]:
    if usd_per_hr is not None:
        return Decimal(str(usd_per_hr)), "as given"
    listed = prices.list_price(gpus.kind(gpu).name) if gpu else None
    if listed is None:
        return None, ""
    return listed.usd_per_hr, f"{listed.provider}'s list price of {listed.date}"


@dataclass(frozen=True)
class Held:
    """What is known of the data before anything is trained."""

    vocab_size: int
    fingerprints: tuple[str, ...]  # none where the data are not here
    train_tokens: int
    drawn_most: float  # epochs for each token of a run, of the corpus that is repeated most
    val_tokens: int  # of the largest domain: with this limit all of them are evaluated


def data_lines(
    planned: Sequence[PlannedRun], found: Held | None, val_tokens: int, vocab_size: int
) -> list[str]:
    """What the runs read, and what they are measured on."""
    if found is None:
        return [f"  the corpus is not here: a vocabulary of {vocab_size:,} is assumed"]
    longest = max(planned, key=lambda run: run.tokens)
    epochs = longest.tokens * found.drawn_most
    repeats = f"; beyond {MANY_EPOCHS:g} a repeated token teaches less" if epochs > MANY_EPOCHS else ""
    part = "the whole held-out part" if val_tokens >= found.val_tokens else "the same held-out tokens"
    return [
        (
            f"  data: {human(found.train_tokens)} tokens to train on, at most {epochs:.2f} epochs "
            f"({longest.name}){repeats}"
        ),
        (
            f"  every run is measured on {part}, at most {human(val_tokens)} tokens of each domain; "
            "none trains on it"
        ),
    ]
