"""Machines of a run that are gone, as its launcher tells the next machine: `--ended TAG=UTC=USD`.

The ledger that a new machine takes over from the mirror ends where its machine was lost: it has no row of
that end, and would count it on for ever. Only the launcher saw it go, and knows what it cost until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation

from x1_pretrain.errors import UserError
from x1_pretrain.money.account import Account, account
from x1_pretrain.money.clock import parse_stamp, stamp
from x1_pretrain.money.ledger import Ledger

FLAG = "--ended"


@dataclass(frozen=True)
class Ended:
    """One machine, from the launcher's own ledger."""

    tag: str
    at: datetime
    usd: Decimal  # all of it

    def __str__(self) -> str:
        return f"{self.tag}={stamp(self.at)}={self.usd:f}"


def of(known: Account) -> tuple[Ended, ...]:
    """Every machine that was seen to end."""
    gone = [m for m in known.machines if m.ended is not None and m.machine_id is not None]
    return tuple(Ended(m.tag, m.ended, round(m.spent_by(m.ended), 6)) for m in gone if m.ended)


def read(text: str) -> Ended:
    tag, _, rest = text.partition("=")
    when, _, amount = rest.partition("=")
    try:
        usd = Decimal(amount)
        if not (tag and usd.is_finite() and usd >= 0):
            raise ValueError
        return Ended(tag, parse_stamp(when), usd)
    except (ValueError, InvalidOperation):
        raise UserError(
            f"{FLAG} {text}: expected TAG=TIME=USD, such as x1-50m-1a2b3c4d=2026-05-23T15:42:01Z=3.12"
        ) from None


def write(gone: Iterable[Ended], ledger: Ledger) -> None:
    """Into the ledger, each once. One that it never heard of is entered with all it cost."""
    with ledger.locked():
        for one in gone:
            machine = next((m for m in account(ledger.rows()).machines if m.tag == one.tag), None)
            if machine is not None and machine.ended is not None:
                continue
            if machine is None:
                row = {"provider": "local", "machine_id": None, "usd_per_hr": Decimal(0)}
                said = "a machine that this ledger had not heard of"
                ledger.append("adopted", said, tag=one.tag, since_utc=stamp(one.at), **row)
            ledger.append(
                "terminate_confirmed",
                f"{one.tag} is gone, says its launcher",
                tag=one.tag,
                ended_utc=stamp(one.at),
                billed_usd=one.usd,
            )
