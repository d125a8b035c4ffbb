"""What one machine has cost so far: its price times the time it was there, never less than was billed.

Time comes from the steady clock while this computer stays up, so that a wall clock that jumps changes
nothing; between two polls the dearer of the two prices counts. So it does for a time in which the provider
stated no price, once it does again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from x1_pretrain.money.account import Rented
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import ZERO, cost
from x1_pretrain.money.ledger import Row

RESTART_S = 600.0  # a machine of one's own: a sidecar that was away no longer than this was restarted


@dataclass
class Meter:
    """`Meter.resumed(...)`, then `count(price)` at every poll."""

    usd: Decimal
    usd_per_hr: Decimal
    at_s: float
    _said: tuple[Decimal, Decimal, float] = field(init=False)  # the same, when a price was last stated

    def __post_init__(self) -> None:
        self._said = self.usd, self.usd_per_hr, self.at_s

    @classmethod
    def resumed(cls, machine: Rented, rows: list[Row], clock: Clock) -> Meter:
        """Where an earlier sidecar left off; the time since then counts."""
        last = next((r for r in reversed(rows) if _is_poll_of(r, machine)), None)
        now_s, now = clock.steady_s(), clock.now()
        if last is not None and last.get("boot") == clock.boot and last["steady_s"] <= now_s:
            gap_s = now_s - float(last["steady_s"])
        else:
            gap_s = _wall_gap_s(machine, now)
        if not machine.bills_idle:
            gap_s = min(gap_s, RESTART_S)
        meter = cls(machine.spent_usd, machine.usd_per_hr, now_s - gap_s)
        meter.count(machine.usd_per_hr, now_s)
        return meter

    def count(self, usd_per_hr: Decimal, now_s: float, *, said: bool = True) -> None:
        """Up to now, at the dearer of the price then and now; `said`: by the provider, just now."""
        self.usd += cost(max(self.usd_per_hr, usd_per_hr), now_s - self.at_s)
        self.usd_per_hr, self.at_s = usd_per_hr, max(self.at_s, now_s)
        if said:
            usd, before, since_s = self._said
            self.usd = max(self.usd, usd + cost(max(before, usd_per_hr), self.at_s - since_s))
            self._said = self.usd, self.usd_per_hr, self.at_s

    def at_least(self, billed_usd: Decimal | None) -> bool:
        """Take over what the provider billed, where it is more; whether it was."""
        if billed_usd is None or billed_usd <= self.usd:
            return False
        self.usd = billed_usd
        return True

    def fields(self, clock: Clock) -> dict[str, Any]:
        """What the next sidecar needs in order to go on."""
        return {"steady_s": round(self.at_s, 3), "boot": clock.boot}


def _is_poll_of(row: Row, machine: Rented) -> bool:
    return row["event"] == "poll" and row.get("tag") == machine.tag and "steady_s" in row


def _wall_gap_s(machine: Rented, now: datetime) -> float:
    """By the wall clock, the only one that two computers share; never negative."""
    return max(0.0, (now - (machine.polled or machine.since)).total_seconds())


def hourly_storage_usd(usd_per_gib_month: Decimal, gib: int) -> Decimal:
    """A month is billed as 720 hours."""
    return usd_per_gib_month * gib / 720 if gib else ZERO
