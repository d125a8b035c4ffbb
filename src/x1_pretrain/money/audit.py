"""Whether a run kept its ceiling and left no machine behind, from its files alone."""

from __future__ import annotations

from pathlib import Path

from x1_pretrain.money.account import account
from x1_pretrain.money.guard import dollars
from x1_pretrain.money.ledger import NAME, read_rows

PROOF = "termination.json"  # the reads that did not find its machines any more
FILES = (NAME, "budget.json", PROOF)  # what an export shows of a run's money


def audit(folder: Path) -> tuple[list[str], str] | None:
    """What is wrong, and what was seen; None for a run without a ceiling."""
    if not (folder / NAME).exists():
        return None
    known = account(read_rows(folder / NAME))
    problems = [
        f"machine {m.machine_id or m.tag} at {m.provider} was not seen to end" for m in known.open_machines()
    ]
    spent = known.settled_usd()
    if known.ceiling_usd is not None and spent > known.ceiling_usd:
        problems.append(f"{dollars(spent)} spent, above the ceiling of {dollars(known.ceiling_usd)}")
    of = f" of {dollars(known.ceiling_usd)}" if known.ceiling_usd is not None else ""
    rented = [m for m in known.machines if m.provider != "local"]
    gone = f"; {len(rented)} rented machines, all seen to end" if rented else ""
    return problems, f"{dollars(spent)}{of} spent{gone}"
