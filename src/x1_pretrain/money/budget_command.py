"""`x1 budget show|continue|stop|correct RUN`: what a run has cost, and a person's word to the guard."""

from __future__ import annotations

import math
import os
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import BUDGET_CHECKPOINTED, FINISHED, UserError
from x1_pretrain.money import latch
from x1_pretrain.money.account import Account, Rented, account
from x1_pretrain.money.clock import Clock, parse_stamp, stamp
from x1_pretrain.money.guard import dollars
from x1_pretrain.money.ledger import NAME, Ledger, Row, find_ledger
from x1_pretrain.money.pace import trains_here
from x1_pretrain.money.picture import amounts
from x1_pretrain.records.run_folder import is_number, read_jsonl

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="What a run has cost, and a person's word to its guard.",
)
RunArgument = Annotated[Path, typer.Argument(help="the run: its folder, or its name under runs/")]
SHOWN = (
    "gate",
    "intent",
    "launched",
    "active",
    "lost",
    "moved",
    "stop",
    "raised",
    "answer",
    "correction",
    "relaunch",
    "back",
    "sidecar",
    "terminate_confirmed",
    "terminate_unconfirmed",
    "launch_failed",
    "repaired",
)


def opened(run: Path) -> tuple[Path, Ledger, list[Row]]:
    """The run's folder, and what is written in its ledger."""
    folder = find_ledger(run, "a run without a ceiling has none; or is this not its folder?")
    ledger = Ledger(folder / NAME, Clock.from_environment())
    return folder, ledger, ledger.rows()


@app.command()
def show(
    run: RunArgument,
    picture: Annotated[
        Path | None, typer.Option(help="where the picture goes [RUN/budget.png]", show_default=False)
    ] = None,
) -> int:
    """The table of what happened to its money, and a picture."""
    folder, ledger, rows = opened(run)
    known, now = account(rows), ledger.clock.now()
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width to fit
    for table in (_machines(known, now), _events(rows)):
        if table.row_count:
            console.print(table)
            print()
    for line in summary(folder, rows, known, ledger.clock):
        print(line)
    _draw(folder, rows, known, picture or folder / "budget.png")
    return FINISHED


def _draw(folder: Path, rows: list[Row], known: Account, file: Path) -> None:
    from x1_pretrain.money.picture import draw

    try:
        drawn = draw(folder.resolve().name, rows, known.ceiling_usd, file)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {file}: can't be written ({error}); name a .png, .svg or .pdf") from None
    print(f"picture: {file}" if drawn else "no picture: nobody has said yet what it costs")


def cost(machine: Rented, now: datetime) -> Decimal:
    """Until its end, or until now where it still bills; this computer's own up to its last poll."""
    return machine.spent_by(now) if machine.open or machine.ended else machine.spent_usd


def _machines(known: Account, now: datetime) -> Table:
    table = Table("machine", "provider", "since", "until", "$/h", "cost", box=None, pad_edge=False)
    for m in known.machines:
        until = stamp(m.ended) if m.ended else ("still open" if m.open else "-")
        name, rate, usd = m.machine_id or m.tag, f"{m.usd_per_hr:.2f}", dollars(cost(m, now))
        table.add_row(name, m.provider, stamp(m.since), until, rate, usd)
    return table


def _events(rows: list[Row]) -> Table:
    table = Table("when", "what", "", box=None, pad_edge=False)
    for row in rows:
        if row["event"] in SHOWN:
            table.add_row(row["time_utc"], row["event"], row.get("message", ""))
        elif row["event"] == "alert_due":
            table.add_row(row["time_utc"], "alert", f"{row.get('title', '')} ({_delivery(row, rows)})")
    return table


def _delivery(due: Row, rows: list[Row]) -> str:
    tries = [r for r in rows if r["event"] == "alert" and r.get("due") == due.get("due")]
    ways = {str(r.get("channel")): str(r.get("result")) for r in tries}
    return ", ".join(f"{channel}: {result}" for channel, result in ways.items()) or "not delivered yet"


def summary(run: Path, rows: list[Row], known: Account, clock: Clock) -> list[str]:
    """Dollars, dollars per billion tokens, dollars per hundredth of a nat."""
    now = clock.now()
    spent = max(known.known_usd, sum((cost(m, now) for m in known.machines), known.beside_usd))
    of = f" of {dollars(known.ceiling_usd)}" if known.ceiling_usd is not None else ""
    live = known.open_machines() or all(m.provider == "local" for m in known.machines)
    projected = next((r["projected_usd"] for r in reversed(rows) if r.get("projected_usd")), None)
    more = (
        f", projected {dollars(Decimal(projected))}"
        if projected and Decimal(projected) > spent and live
        else ""
    )
    lines = [f"spent {dollars(spent)}{of}{more}"]
    metrics = read_jsonl(run / "metrics.jsonl").rows
    tokens = max((r["tokens"] for r in metrics if is_number(r.get("tokens"))), default=0)
    if tokens:
        lines.append(f"{dollars(spent / tokens * 10**9)} per billion tokens ({tokens:,} trained)")
    if (price := per_hundredth_nat(metrics, rows, clock)) is not None:
        lines.append(f"{price} for the last 0.01 nat of validation loss, between its last two evaluations")
    down = [r["down_s"] for r in rows if r["event"] == "back"]
    if down:
        times = "1 relaunch" if len(down) == 1 else f"{len(down)} relaunches"
        lines.append(f"{times}, {sum(down) / 60:.1f} min not training ({max(down):.0f} s at most)")
    moves = [r for r in rows if r["event"] == "moved" and r.get("from")]
    if moves:
        lost_usd = sum((Decimal(str(r["downtime_usd"])) for r in moves if r.get("downtime_usd")), Decimal(0))
        times = "1 move" if len(moves) == 1 else f"{len(moves)} moves"
        lines.append(f"{times} to another machine, {dollars(lost_usd)} paid while nothing was learned")
    if known.stored:
        lines.append(f"{sum(known.stored.values(), Decimal(0)):.4f} dollars of it for the mirror's store")
    if stop := latch.read(run):
        lines.append(f"{latch.NAME}: {stop.reason}")
    return lines


def per_hundredth_nat(metrics: list[dict[str, Any]], rows: list[Row], clock: Clock) -> str | None:
    """Dollars between the last two evaluations, over the loss they are apart. Metrics carry real time."""
    evaluated = [r for r in metrics if is_number(r.get("val/loss")) and "time_utc" in r]
    if len(evaluated) < 2:
        return None
    one, other = evaluated[-2:]
    gained = one["val/loss"] - other["val/loss"]
    begun, ended = (spent_at(rows, clock.told(r["time_utc"])) for r in (one, other))
    if begun is None or ended is None:
        return None
    if gained <= 0:
        return f"nothing gained for {dollars(ended - begun)}: no price"
    return f"${(ended - begun) / Decimal(str(gained)) / 100:.4f}"


def spent_at(rows: list[Row], time_utc: str) -> Decimal | None:
    """By the ledger at that time, between two polls in proportion."""
    said, at = amounts(rows), parse_stamp(time_utc)
    before = [p for p in said if p[0] <= at]
    after = [p for p in said if p[0] > at]
    if not before:
        return after[0][1] if after else None
    if not after:
        return before[-1][1]
    (first, begun), (last, ended) = before[-1], after[0]
    return begun + Decimal(repr((at - first) / (last - first))) * (ended - begun)


# ------------------------------------------------------------------------------------------------------------
# A person's word


def _who() -> str:
    return os.environ.get("USER") or "a person"


def refuse_elsewhere(folder: Path, rows: list[Row]) -> None:
    """A trainer on a rented machine reads the ledger there, not that of the computer at home."""
    rented = [m for m in account(rows).open_machines() if m.provider in ("lambda", "runpod")]
    if rented and not trains_here(folder):
        raise UserError(
            f"{folder}: its trainer runs on {rented[-1].machine_id} and reads the ledger there: say it on "
            f"that machine, in its own run folder. From here, `x1 teardown {folder}` ends the machine at once"
        )


@app.command("continue")
def go_on(run: RunArgument) -> int:
    """Agree to what it costs an hour now; the ceiling still holds."""
    folder, ledger, rows = opened(run)
    refuse_elsewhere(folder, rows)
    if stop := latch.read(folder):
        raise UserError(
            f"{folder}: it was stopped already ({stop.reason}); start it again with --raise-ceiling-to USD"
        )
    ledger.append("answer", f"{_who()} agreed to go on", answer="continue")
    print(f"{folder}: noted; the guard of a running trainer reads this within a second")
    return FINISHED


@app.command()
def stop(run: RunArgument) -> int:
    """Save a checkpoint and stop; the run resumes only with --raise-ceiling-to."""
    folder, ledger, rows = opened(run)
    refuse_elsewhere(folder, rows)
    if earlier := latch.read(folder):
        print(f"{folder}: it was stopped already ({earlier.reason})")
        return FINISHED
    known, said = account(rows), f"{_who()} decided to stop"
    ceiling = None if known.ceiling_usd is None else f"{known.ceiling_usd:.2f}"
    now, spent = stamp(ledger.clock.now()), f"{known.known_usd:.2f}"
    # the latch first: it also holds where no trainer runs just now that could read the answer
    latch.write(folder, latch.Stop(said, "person", BUDGET_CHECKPOINTED, now, spent, ceiling))
    ledger.append("answer", said, answer="stop")
    print(f"{folder}: stopped; a running trainer saves and leaves with exit code 76, none starts again")
    return FINISHED


@app.command()
def correct(
    run: RunArgument,
    spent_usd: Annotated[float, typer.Option(min=0, help="what was really spent")],
    why: Annotated[str, typer.Option(help="how you know: the provider's bill")],
) -> int:
    """Put a wrong amount right; the guard otherwise never believes a lower one."""
    if not math.isfinite(spent_usd):
        raise UserError(f"--spent-usd {spent_usd}: expected dollars, such as 14.20")
    folder, ledger, rows = opened(run)
    known, amount = account(rows), Decimal(str(spent_usd))
    before, counted = known.known_usd, known.spent_by(ledger.clock.now()) - known.adjusted_usd
    ledger.append(
        "correction", f"{_who()}: {why}", spent_usd=amount, before_usd=before, adjusted_usd=amount - counted
    )
    print(f"{folder}: {dollars(before)} -> {dollars(amount)}; the trainer counts so from its next start on")
    return FINISHED


if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 budget"))
