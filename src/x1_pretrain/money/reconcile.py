"""`x1 reconcile`: what the providers list against what the ledgers know; orphans can be ended from here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import NAME, Ledger, LedgerError, read_rows
from x1_pretrain.money.providers.base import Machine, Provider, Status
from x1_pretrain.money.providers.opened import FAKE_VARIABLE, open_provider
from x1_pretrain.money.teardown import Ending, disks_line, said_yes, write_proof

KEYS = {"lambda": "LAMBDA_API_KEY", "runpod": "RUNPOD_API_KEY", "fake": FAKE_VARIABLE}
ORPHAN = "orphan-"  # begins the name of the folder that keeps an orphan's proof
OURS = "x1-"  # every machine that X1 launched carries such a tag


@dataclass(frozen=True)
class Finding:
    """One machine, from both sides."""

    provider: Provider
    machine_id: str
    tag: str
    said: str  # the provider's word
    usd_per_hr: Decimal | None
    run: Path | None
    verdict: str
    trouble: bool
    rented: Rented | None = None


def known_runs(runs: Path) -> tuple[list[tuple[Path, Rented]], list[str]]:
    """Every machine in every ledger under `runs`, and what is wrong with the ledgers that can't be read."""
    found: list[tuple[Path, Rented]] = []
    damaged = []
    for file in sorted(runs.glob(f"*/{NAME}")):
        try:
            found += [(file.parent, m) for m in account(read_rows(file)).machines]
        except LedgerError as error:
            damaged.append(str(error))
    return found, damaged


def findings(provider: Provider, known: list[tuple[Path, Rented]]) -> list[Finding]:
    """The provider's list and the ledgers, matched by id or tag."""
    own = [(run, m) for run, m in known if m.provider == provider.name]
    listed = [m for m in provider.machines() if m.status is not Status.GONE]
    rows = [_listed(provider, machine, own) for machine in listed]
    matched = [row.rented for row in rows if row.rented is not None]
    for run, rented in own:
        if rented.open and not any(rented is one for one in matched):
            name = rented.machine_id or "no id"
            rows.append(
                Finding(provider, name, rented.tag, "not listed", None, run,
                        "open in the ledger, not listed: to be confirmed", True, rented)
            )  # fmt: skip
    return rows


def _listed(provider: Provider, machine: Machine, own: list[tuple[Path, Rented]]) -> Finding:
    run, rented = _known(machine, own)
    verdict, trouble = _verdict(machine, run, rented)
    return Finding(
        provider, machine.id, machine.tag, machine.said, machine.usd_per_hr, run, verdict, trouble, rented
    )


def _known(machine: Machine, own: list[tuple[Path, Rented]]) -> tuple[Path, Rented] | tuple[None, None]:
    """By its id; by its tag only where the ledger has no id: one launch may have made two."""
    for run, rented in own:
        if rented.machine_id == machine.id or (rented.machine_id is None and rented.tag == machine.tag):
            return run, rented
    return None, None


def _verdict(machine: Machine, run: Path | None, rented: Rented | None) -> tuple[str, bool]:
    """In words, and whether it is to be ended."""
    if rented is None or run is None:
        ours = machine.tag.startswith(OURS)
        return ("ORPHAN: launched by X1, in no ledger here" if ours else "not launched by X1"), ours
    if not rented.open:
        return "STILL THERE though the ledger says it is gone", True
    if rented.machine_id is None:
        return "LAUNCHED, but the launch was cut off: nobody watches it", True
    if run.name.startswith(ORPHAN):
        return "ORPHAN that was not seen to end", True
    return "running, and known", False


def end(finding: Finding, runs: Path, clock: Clock) -> bool:
    """End one, with its proof in its run's folder, or in a folder of its own where no run knows it."""
    folder = finding.run or runs / f"{ORPHAN}{finding.machine_id}"
    ledger = Ledger(folder / NAME, clock)
    rented = finding.rented
    if rented is None:
        rate = finding.usd_per_hr or Decimal(0)
        row = {"tag": finding.tag, "provider": finding.provider.name, "machine_id": finding.machine_id}
        ledger.append("adopted", "an orphan that reconcile found", usd_per_hr=rate, **row)
        rented = account(ledger.rows()).machines[-1]
    gone = Ending(finding.provider, rented, ledger, clock, print).run()
    write_proof(folder, ledger)
    return gone


def main(
    runs: Annotated[Path, typer.Argument(help="the folder of runs")] = Path("runs"),
    end_them: Annotated[bool, typer.Option("--end", help="end what is in trouble, without asking")] = False,
) -> int:
    """What the providers list against what the ledgers know; offers to end orphans."""
    clock = Clock.from_environment()
    if not runs.is_dir():
        raise UserError(
            f"{runs}: no such folder; name the one that your runs are in, or every machine is an orphan"
        )
    known, damaged = known_runs(runs)
    for said in damaged:
        print(said)
    found, answered = _asked(known, clock)
    if damaged:
        print("nothing is ended while a ledger can't be read: its machines would pass for orphans")
        return FAULT
    left = [f for f in found if f.trouble and not (_agreed(f, end_them) and end(f, runs, clock))]
    return FAULT if left or not answered else FINISHED


def _asked(known: list[tuple[Path, Rented]], clock: Clock) -> tuple[list[Finding], bool]:
    """What all providers say, shown; whether each of them answered."""
    open_at = {m.provider for _, m in known if m.open}
    names = [n for n, key in KEYS.items() if os.environ.get(key) or n in open_at]
    if not names:
        keys = " or ".join(key for key in KEYS.values() if key != FAKE_VARIABLE)
        raise UserError(f"no provider to ask: set {keys}")
    found: list[Finding] = []
    answered = []
    for name in names:
        try:
            provider = open_provider(name, clock)
            found += findings(provider, known)
        except UserError as error:
            print(f"{name}: {error}")
            continue
        answered.append(provider.label)
        if line := disks_line(provider):
            print(line)
    _show(found, answered)
    return found, len(answered) == len(names)


def _show(found: list[Finding], names: list[str]) -> None:
    if not found:
        if names:
            print(f"nothing is listed at {' or '.join(names)}, and no ledger has an open machine there")
        return
    rows = [["provider", "machine", "tag", "it says", "$/h", "run", "verdict"]]
    for f in found:
        rate = "-" if f.usd_per_hr is None else f"{f.usd_per_hr:.2f}"
        rows.append([f.provider.label, f.machine_id, f.tag, f.said, rate, str(f.run or "-"), f.verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # whole, on a narrow screen too: an id that is cut short ends nothing
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _agreed(finding: Finding, end_them: bool) -> bool:
    if end_them:
        return True
    if not sys.stdin.isatty():
        print(f"{finding.machine_id}: {finding.verdict}; `x1 reconcile --end` ends it")
        return False
    return said_yes(f"{finding.machine_id}: {finding.verdict}. End it? [y/N] ")


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 reconcile"))
