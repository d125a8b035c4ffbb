"""What a ledger adds up to: machines and whether they may still bill, dollars spent, the ceiling in force."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal

from x1_pretrain.money.clock import parse_stamp
from x1_pretrain.money.guard import ZERO, cost
from x1_pretrain.money.ledger import LedgerError, Row, usd


@dataclass
class Rented:
    """One machine of a run, from the intent to launch it to the proof of its end."""

    tag: str
    provider: str
    usd_per_hr: Decimal  # the dearest it was seen at
    since: datetime
    machine_id: str | None = None
    spent_usd: Decimal = ZERO  # at its last poll ...
    polled: datetime | None = None  # ... here
    ended: datetime | None = None  # confirmed gone, or surely never made
    bills_idle: bool = True  # False: a machine of one's own, which costs only while it works

    @property
    def open(self) -> bool:
        """It may still bill somebody."""
        return self.ended is None and self.provider != "local"

    def spent_by(self, now: datetime) -> Decimal:
        """Up to `now`, or to its end; between polls at its rate."""
        if not self.bills_idle:
            return self.spent_usd
        end = min(now, self.ended) if self.ended else now
        return self.spent_usd + cost(self.usd_per_hr, (end - (self.polled or self.since)).total_seconds())


@dataclass
class Account:
    """All of one run's ledger."""

    machines: list[Rented] = field(default_factory=list)
    known_usd: Decimal = ZERO  # the most that any row says was spent, since the last correction
    adjusted_usd: Decimal = ZERO  # what a person's correction adds to the machines' sum
    stored: dict[str, Decimal] = field(default_factory=dict)  # for the mirror, by session: its last word
    ceiling_usd: Decimal | None = None
    raised: bool = False  # by a person, above what the command says ...
    before_usd: Decimal = ZERO  # ... which was this
    corrected: bool = False  # and no trainer has started since: the one that runs still counts as before

    def in_force(self, cap_usd: Decimal) -> Decimal:
        """The ceiling under a command's cap: a person's raise is above it, until a lower cap is given."""
        if self.raised and self.ceiling_usd is not None and cap_usd >= self.before_usd:
            return self.ceiling_usd
        return cap_usd

    def settled_usd(self) -> Decimal:
        """Of machines that are gone all, of others up to their last poll; never less than any row says."""
        sums = (m.spent_by(m.ended) if m.ended else m.spent_usd for m in self.machines)
        return max(self.known_usd, sum(sums, self.beside_usd))

    @property
    def beside_usd(self) -> Decimal:
        """What is spent on no machine: the store that keeps the mirror, a person's correction."""
        return sum(self.stored.values(), self.adjusted_usd)

    def open_machines(self) -> list[Rented]:
        return [m for m in self.machines if m.open]

    def spent_by(self, now: datetime) -> Decimal:
        return sum((m.spent_by(now) for m in self.machines), self.beside_usd)


def account(rows: Iterable[Row]) -> Account:
    """Fold the rows of a ledger, in order."""
    found = Account()
    for row in rows:
        try:
            _take(found, row)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise LedgerError(
                f"ledger row {row.get('seq', '?')} ({row['event']}): a field is missing or damaged "
                f"({error!r}), and sums without it would be wrong. Put it right from a copy, or remove the "
                "row, and run `x1 reconcile`"
            ) from None
    return found


def _take(found: Account, row: Row) -> None:
    event = row["event"]
    found.corrected = found.corrected and event != "gate"  # a start writes one, and counts from what it finds
    outdated = found.corrected and event in ("reading", "stop")
    if "spent_usd" in row and not outdated:
        found.known_usd = max(found.known_usd, usd(row, "spent_usd"))
    if event in ("intent", "adopted"):
        _take_up(found, _rented(row))
    elif event == "correction":
        found.known_usd, found.adjusted_usd = usd(row, "spent_usd"), usd(row, "adjusted_usd")
        found.corrected = True
    elif event == "storage":
        session, said = str(row["session"]), usd(row, "storage_usd")
        found.stored[session] = max(found.stored.get(session, ZERO), said)
    elif event == "ceiling":
        found.ceiling_usd, found.raised = usd(row, "ceiling_usd"), False
    elif event == "gate" and row.get("verdict") == "passed":
        found.ceiling_usd = found.ceiling_usd if found.raised else usd(row, "ceiling_usd")
    elif event == "raised":
        found.ceiling_usd, found.raised = usd(row, "ceiling_usd"), True
        found.before_usd = usd(row, "before_usd")
    elif machine := _machine(found, row):
        _update(machine, row)


def _rented(row: Row) -> Rented:
    since = parse_stamp(row.get("since_utc") or row["time_utc"])
    return Rented(
        row["tag"],
        row["provider"],
        usd(row, "usd_per_hr"),
        since,
        machine_id=row.get("machine_id"),
        bills_idle=row.get("bills_idle") is not False,
    )


def _take_up(found: Account, new: Rented) -> None:
    """One more machine, now the newest. Its launcher and its own sidecar both enter it, under the tag it was
    launched with: where their two ledgers were brought together, it is one machine all the same."""
    known = next((m for m in reversed(found.machines) if _same(m, new)), None)
    if known is None:
        found.machines.append(new)
        return
    if known.provider == "local":  # as a machine without its provider's key enters itself
        known.provider, known.machine_id = new.provider, new.machine_id
    known.machine_id = known.machine_id or new.machine_id
    known.usd_per_hr, known.since = max(known.usd_per_hr, new.usd_per_hr), min(known.since, new.since)
    known.bills_idle = known.bills_idle or new.bills_idle
    found.machines.remove(known)
    found.machines.append(known)


def _same(known: Rented, new: Rented) -> bool:
    """One of one's own has no tag of a launch; one that came back after its end is billed anew."""
    if known.tag != new.tag or known.tag == known.machine_id == new.machine_id:
        return False
    if known.ended is not None and new.since >= known.ended:
        return False
    ids = {m.machine_id for m in (known, new) if m.machine_id is not None and m.provider != "local"}
    return len(ids) <= 1


def _machine(found: Account, row: Row) -> Rented | None:
    """The machine a row speaks of, by the tag it was launched under, else by its id: machines that count at a
    stated rate all go by the same one."""
    newest, machine_id = found.machines[::-1], row.get("machine_id")
    if tagged := next((m for m in newest if m.tag == row.get("tag")), None):
        return tagged
    return next((m for m in newest if machine_id is not None and m.machine_id == machine_id), None)


def _update(machine: Rented, row: Row) -> None:
    event = row["event"]
    if event == "launched":
        machine.machine_id = row["machine_id"]
        if machine.ended is None or parse_stamp(row["time_utc"]) >= machine.ended:
            machine.ended = None  # also one that was held for not made
            machine.polled = machine.polled if machine.spent_usd else None
    elif event in ("launch_failed", "terminate_confirmed"):
        machine.ended = parse_stamp(row.get("ended_utc") or row["time_utc"])
        if row.get("billed_usd") is not None and usd(row, "billed_usd") > machine.spent_by(machine.ended):
            machine.spent_usd, machine.polled = usd(row, "billed_usd"), machine.ended
        if event == "launch_failed":
            machine.spent_usd, machine.polled = ZERO, machine.ended
    elif event == "poll":
        machine.spent_usd = max(machine.spent_usd, usd(row, "machine_usd"))
        told = parse_stamp(row["time_utc"])
        machine.polled = max(machine.polled or told, told)  # of two ledgers, in any order
        machine.usd_per_hr = max(machine.usd_per_hr, usd(row, "usd_per_hr"))


def person_said(rows: Iterable[Row], after_seq: int) -> Literal["stop", "continue"] | None:
    """The last answer that a person gave after a row of the ledger."""
    said: Literal["stop", "continue"] | None = None
    for row in rows:
        if row["event"] == "answer" and row.get("seq", 0) > after_seq:
            said = "stop" if row.get("answer") == "stop" else "continue"
    return said
