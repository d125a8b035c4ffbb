"""`x1 reconcile`: what the providers list against what the ledgers know; orphans can be ended from here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import NAME, Ledger
from x1_pretrain.money.providers.base import Machine, Provider, ProviderError, Status
from x1_pretrain.money.providers.opened import FAKE_VARIABLE, open_provider
from x1_pretrain.money.teardown import Ending, disks_line, write_proof

KEYS = {"lambda": "LAMBDA_API_KEY", "runpod": "RUNPOD_API_KEY", "fake": FAKE_VARIABLE}
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


def known_runs(runs: Path, clock: Clock) -> list[tuple[Path, Rented]]:
    """Every machine in every ledger under `runs`."""
    found = []
    for file in sorted(runs.glob(f"*/{NAME}")):
        found += [(file.parent, m) for m in account(Ledger(file, clock).rows()).machines]
    return found


def findings(provider: Provider, known: list[tuple[Path, Rented]]) -> list[Finding]:
    """The provider's list and the ledgers, matched by id or tag."""
    own = [(run, m) for run, m in known if m.provider == provider.name]
    listed = [m for m in provider.machines() if m.status is not Status.GONE]
    rows = [_listed(provider, machine, own) for machine in listed]
    there = {m.id for m in listed} | {m.tag for m in listed}
    for run, rented in own:
        if rented.open and rented.machine_id not in there and rented.tag not in there:
            name = rented.machine_id or "no id"
            rows.append(
                Finding(provider, name, rented.tag, "not listed", None, run,
                        "open in the ledger, not listed: to be confirmed", True, rented)
            )  # fmt: skip
    return rows


def _listed(provider: Provider, machine: Machine, own: list[tuple[Path, Rented]]) -> Finding:
    run, rented = next(
        ((r, m) for r, m in own if m.machine_id == machine.id or m.tag == machine.tag), (None, None)
    )
    if rented is None:
        ours = machine.tag.startswith(OURS)
        verdict = "ORPHAN: launched by X1, in no ledger here" if ours else "not launched by X1"
        trouble = ours
    elif rented.open:
        verdict, trouble = "running, and known", False
    else:
        verdict, trouble = "STILL THERE though the ledger says it is gone", True
    return Finding(
        provider, machine.id, machine.tag, machine.said, machine.usd_per_hr, run, verdict, trouble, rented
    )


def end(finding: Finding, runs: Path, clock: Clock) -> bool:
    """End one, with its proof in its run's folder, or in a folder of its own where no run knows it."""
    folder = finding.run or runs / f"orphan-{finding.machine_id}"
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
    known = known_runs(runs, clock)
    names = [
        n
        for n, key in KEYS.items()
        if os.environ.get(key) or any(m.provider == n for _, m in known if m.open)
    ]
    if not names:
        raise UserError(
            f"no provider to ask: set {' or '.join(k for k in KEYS.values() if k != FAKE_VARIABLE)}"
        )
    found: list[Finding] = []
    unanswered = False
    for name in names:
        provider = open_provider(name, clock)
        try:
            found += findings(provider, known)
        except ProviderError as error:
            print(f"{provider.label}: {error}")
            unanswered = True
            continue
        if line := disks_line(provider):
            print(line)
    _show(found, names)
    left = [f for f in found if f.trouble and not (_agreed(f, end_them) and end(f, runs, clock))]
    return FAULT if left or unanswered else FINISHED


def _show(found: list[Finding], names: list[str]) -> None:
    if not found:
        print(f"nothing is listed at {', '.join(names)}, and no ledger has an open machine")
        return
    table = Table("provider", "machine", "tag", "it says", "$/h", "run", "verdict", box=None, pad_edge=False)
    for f in found:
        rate = "-" if f.usd_per_hr is None else f"{f.usd_per_hr:.2f}"
        table.add_row(f.provider.label, f.machine_id, f.tag, f.said, rate, str(f.run or "-"), f.verdict)
    Console(highlight=False, soft_wrap=True).print(table)


def _agreed(finding: Finding, end_them: bool) -> bool:
    if end_them:
        return True
    if not sys.stdin.isatty():
        print(f"{finding.machine_id}: {finding.verdict}; `x1 reconcile --end` ends it")
        return False
    return input(f"{finding.machine_id}: {finding.verdict}. End it? [y/N] ").strip().lower() in ("y", "yes")


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 reconcile"))
