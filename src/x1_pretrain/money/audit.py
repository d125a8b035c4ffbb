"""Whether a run kept its ceiling and left no machine behind, from its files alone."""

from __future__ import annotations

from pathlib import Path

from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import stamp
from x1_pretrain.money.guard import dollars
from x1_pretrain.money.ledger import NAME, read_rows

PROOF = "termination.json"  # the reads that did not find its machines any more
FILES = (NAME, "budget.json", PROOF)  # what an export shows of a run's money

Finding = tuple[list[str], str]  # what is wrong, and what was seen


def audit(folder: Path) -> Finding | None:
    """What was spent against the ceiling; None for a run without one."""
    if not (folder / NAME).exists():
        return None
    known = account(read_rows(folder / NAME))
    spent, problems = known.settled_usd(), []
    if known.ceiling_usd is not None and spent > known.ceiling_usd:
        problems.append(f"{dollars(spent)} spent, above the ceiling of {dollars(known.ceiling_usd)}")
    of = f" of {dollars(known.ceiling_usd)}" if known.ceiling_usd is not None else ""
    return problems, f"{dollars(spent)}{of} spent"


def gone(folder: Path) -> Finding | None:
    """Whether every rented machine was seen to end; None where none was rented."""
    rented = [m for m in account(read_rows(folder / NAME)).machines if m.provider != "local"]
    made = [m for m in rented if m.machine_id is not None or m.open]
    if not made:
        return None
    problems = [
        f"machine {_name(m)} at {m.provider} was not seen to end: `x1 teardown {folder}` ends it"
        for m in made
        if m.open
    ]
    ends = ", ".join(f"{_name(m)} at {m.provider} on {stamp(m.ended)}" for m in made if m.ended)
    proof = f"; proof in {PROOF}" if (folder / PROOF).is_file() else ", by the ledger"
    return problems, f"seen to end: {ends}{proof}"


def _name(machine: Rented) -> str:
    return machine.machine_id or machine.tag
