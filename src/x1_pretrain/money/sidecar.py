"""Beside the trainer: asks the provider every few minutes, counts, and keeps `budget.json`.

It is the same on the rented machine (`x1 supervise` starts it) and off it (`x1 watch`, on a laptop or a cron
job). The provider's word is checked against our own meter; when it can't be reached, counting goes on. With
`may_terminate` it also ends the machine before the ceiling is passed, whatever became of the trainer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal

from x1_pretrain.money import budget_file, latch
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.budget_file import BudgetFile
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import ZERO, cost, dollars, minutes
from x1_pretrain.money.ledger import Ledger, Row
from x1_pretrain.money.meter import Meter
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.providers.base import Machine, Provider, ProviderError, Status

TEARDOWN_S = 300.0  # what ending a machine and seeing it gone takes
QUIET_POLLS = 3  # after so many failed polls a person hears of it


@dataclass
class Sidecar:
    """One machine of one run. `run()` until told to stop; `poll()` is one turn."""

    folder: Path
    output: Path
    provider: Provider
    machine: Rented
    ceiling_usd: Decimal
    ledger: Ledger
    clock: Clock
    notifier: Notifier
    left_s: Callable[[], float | None]  # what the run still needs
    run_id: str | None = None
    poll_s: float = 300.0
    storage_usd_per_hr: Decimal = ZERO
    tax: Decimal = ZERO  # on top of prices: 0.10 is ten percent; the meter counts it in
    planned_s: float | None = None  # by the gate, until the run's own pace is known
    may_terminate: bool = False
    terminate: Callable[[str], None] = lambda _: None
    failures: int = 0
    seq: int = 0
    lost: bool = False
    spent_usd: Decimal = ZERO
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter.resumed(self.machine, self.ledger.rows(), self.clock)

    def run(self, stop: threading.Event) -> None:
        """Poll, sleep, until told to stop; a poll that fails is counted, never the end."""
        while not stop.is_set():
            try:
                self.poll()
            except (OSError, ProviderError) as error:
                self._alert("sidecar", "the sidecar has trouble", str(error))
            stop.wait(self.clock.real_s(self.next_poll_s()))

    def next_poll_s(self) -> float:
        """Sooner than usual where the machine must go before: then, not five minutes later."""
        room = self.ceiling_usd - self.spent_usd - cost(self.meter.usd_per_hr, TEARDOWN_S)
        if not self.may_terminate or not self.meter.usd_per_hr:
            return self.poll_s
        return min(self.poll_s, max(1.0, float(room / self.meter.usd_per_hr) * 3600))

    def poll(self) -> BudgetFile:
        """Ask, count, write; then end what must end. Earlier machines of the run cost what they cost, and on,
        until they are seen to be gone."""
        source = self._ask()
        now = self.clock.now()
        known = account(self.ledger.rows())
        others = [m for m in known.machines if m.tag != self.machine.tag]
        before = sum((m.spent_by(now) for m in others), known.adjusted_usd)
        spent = max(before + self.meter.usd, known.known_usd)
        self.spent_usd, rate = spent, self.meter.usd_per_hr
        left_s = self._left_s()
        projected = spent + cost(rate, left_s + TEARDOWN_S) if left_s is not None else None
        self.seq += 1
        said = BudgetFile(
            spent_usd=spent,
            rate_usd_per_hr=rate,
            hours_elapsed=Decimal(str((now - self.machine.since).total_seconds() / 3600)),
            projected_total_usd=projected,
            last_update=now,
            run_id=self.run_id,
            provider=self.provider.name,
            instance_id=self.machine.machine_id,
            source=source,
            ceiling_usd=self.ceiling_usd,
            seq=self.seq,
        )
        self._keep(said)
        if self.may_terminate and spent + cost(rate, TEARDOWN_S) > self.ceiling_usd:
            self._end(spent)
        return said

    def _ask(self) -> Literal["billed", "metered", "estimated"]:
        """The provider's price and bill into the meter; how good the number is."""
        floor = self.machine.usd_per_hr
        try:
            found = self._machine()
            billed = self._billed()
        except ProviderError as error:
            self._trouble(error)
            self.meter.count(max(self.meter.usd_per_hr, floor), self.clock.steady_s(), said=False)
            return "estimated"
        self.failures = 0
        self._notice(found)
        price = found.usd_per_hr if found else None
        all_in = (price + self.storage_usd_per_hr) * (1 + self.tax) if price else ZERO
        counted = all_in or max(self.meter.usd_per_hr, floor)  # no price is no news
        self.meter.count(counted, self.clock.steady_s(), said=bool(all_in))
        return "billed" if self.meter.at_least(billed) else "metered"

    def _machine(self) -> Machine | None:
        return self.provider.machine(self.machine.machine_id) if self.machine.machine_id else None

    def _billed(self) -> Decimal | None:
        if self.machine.machine_id is None:
            return None
        billed = self.provider.billed_usd(self.machine.machine_id, self.machine.since)
        return billed * (1 + self.tax) if billed is not None else None

    def _trouble(self, error: ProviderError) -> None:
        self.failures += 1
        if self.failures == QUIET_POLLS:
            body = (
                f"{error}. {self.failures} polls in a row failed; counting on at "
                f"{dollars(self.meter.usd_per_hr)}/h. Look at the provider's own page."
            )
            self._alert("provider", f"{self.provider.label} does not answer", body)

    def _notice(self, found: Machine | None) -> None:
        """Say once that a machine is no longer well."""
        if found is not None and found.status not in (Status.LOST, Status.TERMINATING, Status.GONE):
            self.lost = False
            return
        if self.lost:
            return
        self.lost = True
        word = found.said if found else "not found"
        body = (
            f"{self.provider.label} says of machine {self.machine.machine_id}: {word}. It may still bill: it "
            "counts until its end is confirmed (`x1 teardown RUN`)."
        )
        self.ledger.append("lost", body, tag=self.machine.tag, machine_id=self.machine.machine_id)
        self._alert(f"lost-{self.machine.tag}", "the machine is lost", body)

    def _alert(self, key: str, title: str, body: str) -> None:
        self.notifier.alert(key, f"X1 {self.run_id or self.folder.name}: {title}", body)

    def _left_s(self) -> float | None:
        if (left_s := self.left_s()) is not None:
            return left_s
        if self.planned_s is None:
            return None
        return max(0.0, self.planned_s - (self.clock.now() - self.machine.since).total_seconds())

    def _keep(self, said: BudgetFile) -> None:
        """Into the ledger first: the file is only its newest line."""
        row: Row = {
            "tag": self.machine.tag,
            "machine_id": self.machine.machine_id,
            "spent_usd": round(said.spent_usd, 6),
            "machine_usd": round(self.meter.usd, 6),
            "usd_per_hr": round(self.meter.usd_per_hr, 6),
            "projected_usd": None if said.projected_total_usd is None else round(said.projected_total_usd, 6),
            "source": said.source,
            **self.meter.fields(self.clock),
        }
        self.ledger.append("poll", **row)
        budget_file.write(self.output, said)

    def _end(self, spent: Decimal) -> None:
        """The machine goes before the ceiling is passed. Its trainer had its chance to save."""
        reason = (
            f"{dollars(spent)} spent and {minutes(TEARDOWN_S)} to end the machine would pass the ceiling of "
            f"{dollars(self.ceiling_usd)}: ending it now"
        )
        when = stamp(self.clock.now())
        latch.write(
            self.folder, latch.Stop(reason, "sidecar", 77, when, f"{spent:.2f}", f"{self.ceiling_usd:.2f}")
        )
        self._alert("end", "ending the machine at the ceiling", reason)
        self.terminate(reason)
