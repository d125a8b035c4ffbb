"""Beside the trainer: asks the provider every few minutes, counts, and keeps `budget.json`.

It is the same on the rented machine (`x1 supervise` starts it) and off it (`x1 guard`, on a laptop or a cron
job). The provider's word is checked against our own meter; when it can't be reached, counting goes on. With
`may_terminate` it also ends the machine before the ceiling is passed, whatever became of the trainer.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal

from x1_pretrain.errors import UserError
from x1_pretrain.money import budget_file, latch
from x1_pretrain.money.account import Account, Rented, account
from x1_pretrain.money.budget_file import BudgetFile
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import TEARDOWN_S, ZERO, cost, dollars, minutes
from x1_pretrain.money.ledger import Ledger, Row
from x1_pretrain.money.meter import Meter
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.providers.base import Machine, Provider, ProviderError, Status, UnreachableError

SOONEST_S = 15.0  # between two polls
QUIET_POLLS = 3  # after so many failed polls a person hears of it
TROUBLE_AGAIN_S = 3600.0
GONE = (Status.TERMINATING, Status.GONE)


class Request:
    """To stop, from a signal's handler: it may come at any line of `wait`, where an Event would wait for its
    own thread."""

    def __init__(self) -> None:
        self._made: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        self._made.put(None)

    def is_set(self) -> bool:
        return not self._made.empty()

    def wait(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._made.put(self._made.get(timeout=seconds))


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
    before_usd: Decimal = ZERO  # spent before this machine, where this ledger may not know it
    ahead_usd: Decimal = ZERO  # what the machine's own ledger counts beside it: its mirror's store
    planned_s: float | None = None  # by the gate, until the run's own pace is known
    may_terminate: bool = False
    terminate: Callable[[str], None] = lambda _: None
    failures: int = 0
    seq: int = 0
    lost: bool = False
    absent: int = 0  # polls in a row in which the provider said that it is gone
    spent_usd: Decimal = ZERO
    meter: Meter = field(init=False)
    others: dict[str, Meter] = field(default_factory=dict)  # the run's other machines, by tag
    known: Account = field(default_factory=Account)  # the ledger as it was last read
    trouble: str = ""  # with our own files

    def __post_init__(self) -> None:
        self.meter = Meter.resumed(self.machine, self.ledger.rows(), self.clock)
        self.seq = last_seq(self.output)
        self.began_s = self.clock.steady_s()
        self.age_s = max(0.0, (self.clock.now() - self.machine.since).total_seconds())  # by then

    def run(self, stop: Request) -> None:
        """Poll, sleep, until told to stop or the machine is gone; a poll that fails is never the end."""
        while not stop.is_set() and self.machine.ended is None:
            try:
                self.poll()
            except (OSError, UserError) as error:
                self._alert("sidecar", "the sidecar has trouble", str(error))
            stop.wait(self.clock.real_s(self.next_poll_s()))

    def next_poll_s(self) -> float:
        """Sooner than usual where the machine must go before: after half of the time that is left, since its
        price may rise meanwhile."""
        if not self.may_terminate or not self.meter.usd_per_hr:
            return self.poll_s
        room_usd = self.ceiling_usd - self.spent_usd - cost(self.meter.usd_per_hr, TEARDOWN_S)
        half_s = float(room_usd / self.meter.usd_per_hr) * 3600 / 2
        return min(self.poll_s, max(SOONEST_S, half_s))

    def poll(self) -> BudgetFile:
        """Ask, count, write; then end what must end, also when nothing could be written."""
        source = self._ask()
        self.read_ledger()
        rate = ZERO if self.machine.ended else self.meter.usd_per_hr
        self.spent_usd = spent = max(self._before() + self.meter.usd + self.ahead_usd, self.known.known_usd)
        left_s = self._left_s()
        projected = spent + cost(rate, left_s + TEARDOWN_S) if left_s is not None else None
        said = BudgetFile(
            spent_usd=spent,
            rate_usd_per_hr=rate,
            hours_elapsed=Decimal(str(self.elapsed_s() / 3600)),
            projected_total_usd=projected,
            last_update=self.clock.now(),
            run_id=self.run_id,
            provider=self.provider.name,
            instance_id=self.machine.machine_id,
            source=source,
            ceiling_usd=self.ceiling_usd,
        )
        said = self._keep(said)
        ends = self.may_terminate and self.machine.ended is None
        if ends and spent + cost(rate, TEARDOWN_S) > self.ceiling_usd:
            self._end(spent)
        return said

    def read_ledger(self) -> None:
        """What others wrote: machines, corrections, this machine's confirmed end."""
        try:
            rows = self.ledger.rows()
            self.known = account(rows)
        except UserError as error:
            self._troubled(str(error))
            return
        if self.known.raised and self.known.ceiling_usd is not None:
            self.ceiling_usd = self.known.ceiling_usd  # a person's word is above the command's
        mine = next((m for m in reversed(self.known.machines) if m.tag == self.machine.tag), None)
        if mine is not None and mine.ended is not None:
            self.machine.ended = mine.ended
        for machine in self.known.machines:
            if machine.open and machine.tag not in (self.machine.tag, *self.others):
                self.others[machine.tag] = Meter.resumed(machine, rows, self.clock)

    def _before(self) -> Decimal:
        """Earlier machines of the run cost what they cost, and on, until they are seen to be gone. Those that
        are open are counted by the steady clock, as this one is."""
        now_s, sum_usd = self.clock.steady_s(), self.known.beside_usd
        for machine in self.known.machines:
            meter = self.others.get(machine.tag)
            if machine.tag == self.machine.tag:
                continue
            if machine.open and meter is not None:
                meter.count(machine.usd_per_hr, now_s)
                sum_usd += meter.usd
            else:
                sum_usd += max(machine.spent_by(self.clock.now()), meter.usd if meter else ZERO)
        return max(sum_usd, self.before_usd)

    def elapsed_s(self) -> float:
        return self.age_s + self.clock.steady_s() - self.began_s

    def _ask(self) -> Literal["billed", "metered", "estimated"]:
        """The provider's price and bill into the meter; how good the number is."""
        if self.machine.ended is not None:
            return "metered"  # nothing is added any more
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
        """By its id; while that is not known, by the tag that it was launched under."""
        if self.machine.machine_id is not None:
            return self.provider.machine(self.machine.machine_id)
        found = next((m for m in self.provider.machines() if m.tag == self.machine.tag), None)
        if found is None:
            raise UnreachableError(f"{self.provider.label} lists no machine {self.machine.tag} (yet)")
        self.machine.machine_id = found.id
        return found

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
        self.absent = self.absent + 1 if found is None or found.status in GONE else 0
        if found is not None and found.status not in (Status.LOST, Status.TERMINATING, Status.GONE):
            self.lost = False
            return
        if self.lost or self.machine.ended:
            return
        self.lost = True
        word, ended = found.said if found else "not found", self._run_ended()
        title = "its run is over, the machine is still there" if ended else "the machine is lost"
        body = (
            f"{self.provider.label} says of machine {self.machine.machine_id}: {word}. {ended}It may still "
            f"bill: it counts until its end is confirmed (`x1 teardown {self.folder}` ends it now)."
        )
        try:
            self.ledger.append("lost", body, tag=self.machine.tag, machine_id=self.machine.machine_id)
        except UserError as error:
            self._troubled(str(error))
        self._alert(f"lost-{self.machine.tag}", title, body)

    def _run_ended(self) -> str:
        """What the supervisor wrote, where its ledger is this one: an expected end is no loss."""
        ends = {
            0: "The run is finished. ",
            76: "The budget stopped the run. ",
            77: "The budget stopped the run. ",
        }
        try:
            rows = self.ledger.rows()
        except UserError:
            return ""
        last = next((r for r in reversed(rows) if r["event"] in ("launched", "session_end")), {})
        return ends.get(last.get("exit_code", -1), "")

    def _alert(self, key: str, title: str, body: str, again_after_s: float | None = None) -> None:
        self.notifier.alert(key, f"X1 {self.run_id or self.folder.name}: {title}", body, again_after_s)

    def _troubled(self, said: str) -> None:
        """Our own files fail: counting goes on in memory, and a person hears of it."""
        if said != self.trouble:
            print(f"sidecar: {said}; counting on in memory", flush=True)
        self.trouble = said
        self._alert("files", "its files can't be kept", f"{said}. Counting on in memory.", TROUBLE_AGAIN_S)

    def _left_s(self) -> float | None:
        if (left_s := self.left_s()) is not None:
            return left_s
        if self.planned_s is None:
            return None
        return max(0.0, self.planned_s - self.elapsed_s())

    def _keep(self, said: BudgetFile) -> BudgetFile:
        """Into the ledger first: the file is only its newest line, and carries its number."""
        kept, number = True, self.seq + 1
        try:
            number = max(number, self.ledger.append("poll", **self._row(said))["seq"])
        except UserError as error:
            kept = False
            self._troubled(str(error))
        self.seq = number
        said = replace(said, seq=number)
        try:
            budget_file.write(self.output, said)
        except OSError as error:
            kept = False
            self._troubled(f"{self.output}: can't be written ({error.strerror})")
        if kept and self.trouble:
            print("sidecar: its files are kept again", flush=True)
            self.trouble = ""
        return said

    def _row(self, said: BudgetFile) -> Row:
        return {
            "tag": self.machine.tag,
            "machine_id": self.machine.machine_id,
            "spent_usd": round(said.spent_usd, 6),
            "machine_usd": round(self.meter.usd, 6),
            "usd_per_hr": round(self.meter.usd_per_hr, 6),
            "projected_usd": None if said.projected_total_usd is None else round(said.projected_total_usd, 6),
            "source": said.source,
            **self.meter.fields(self.clock),
        }

    def _end(self, spent: Decimal) -> None:
        """The machine goes before the ceiling is passed. Its trainer had its chance to save."""
        reason = (
            f"{dollars(spent)} spent and {minutes(TEARDOWN_S)} to end the machine would pass the ceiling of "
            f"{dollars(self.ceiling_usd)}: ending it now"
        )
        when = stamp(self.clock.now())
        stop = latch.Stop(reason, "sidecar", 77, when, f"{spent:.2f}", f"{self.ceiling_usd:.2f}")
        try:
            latch.write(self.folder, stop)
        except OSError as error:
            self._troubled(f"{self.folder / latch.NAME}: can't be written ({error.strerror})")
        self._alert("end", "ending the machine at the ceiling", reason)
        self.terminate(reason)


def last_seq(file: Path) -> int:
    """The number of the newest state of the file, which the next one must pass; 0 where there is none."""
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return 0
    seq = tree.get("seq") if isinstance(tree, dict) else None
    return seq if isinstance(seq, int) else 0
