"""The fake provider's truth: machines that live and die, and a meter that charges them. No sockets.

    BOOTING --boot_s--> RUNNING --terminate--> ENDING --term_s--> GONE
                           |
                           +--> UNHEALTHY, PREEMPTED, EXITED --terminate--> ENDING

Nothing happens between two looks: `advance` walks from event to event (a boot that is over, a fault that is
due, a balance that reaches 0) up to the clock's now, and charges each stretch at the prices that held in it.
So the bill is exact to the microsecond however seldom anyone looks.

What bills: at RunPod a machine from its creation, at Lambda from when it runs; both until they are really
gone. A RunPod disk comes on top, and a stopped pod bills its volume at twice the price. At balance 0 all
machines end. A Lambda machine that was preempted bills nothing; one that is unhealthy does.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from typing import Any, Protocol

from x1_pretrain.money.providers.fake.faults import EVENTS, Fault

HOUR_S = 3600
BILLING_EVERY_S = 300  # billing records and the stated balance follow the meter at this pace
DISK_USD_PER_GB_HR = Decimal("0.10") / 720  # a container's disk, and a volume beside it, while they run
STOPPED_USD_PER_GB_HR = Decimal("0.20") / 720  # a volume whose pod is stopped
MICROSECOND = Decimal("0.000001")


class Time(Protocol):
    """The part of a clock that the world looks at."""

    def now(self) -> datetime: ...
    def steady_s(self) -> float: ...


class State(StrEnum):
    BOOTING = "booting"
    RUNNING = "running"
    UNHEALTHY = "unhealthy"
    EXITED = "exited"
    PREEMPTED = "preempted"
    ENDING = "ending"
    GONE = "gone"


@dataclass
class Amounts:
    """Dollars times seconds, divided by the hour only when read: sums stay exact."""

    gpu: Decimal = Decimal(0)
    disk: Decimal = Decimal(0)

    @property
    def gpu_usd(self) -> Decimal:
        return self.gpu / HOUR_S

    @property
    def disk_usd(self) -> Decimal:
        return self.disk / HOUR_S


@dataclass
class Machine:
    """One rented machine: how it is, until when, and what it has cost."""

    id: str
    api: str  # "lambda" or "runpod"
    name: str
    sku: str
    gpu_count: int
    usd_per_hr: Decimal  # the true price of the whole machine, without disk
    created_s: Decimal
    place: str  # a Lambda region, a RunPod cloud
    disk_gb: int = 0
    volume_gb: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)  # the launch request, secrets and all
    state: State = State.BOOTING
    due_s: Decimal | None = None  # when this state is over by itself
    running_s: Decimal | None = None
    gone_s: Decimal | None = None
    boots: int = 1
    hours: dict[int, Amounts] = field(default_factory=dict)  # the meter, by hour of the epoch
    told: dict[int, Amounts] = field(default_factory=dict)  # the same as billing tells it, some minutes old

    @property
    def names(self) -> tuple[str, str]:
        return (self.id, self.name)

    @property
    def alive(self) -> bool:
        return self.state is not State.GONE

    def rates(self) -> tuple[Decimal, Decimal]:
        """True dollars an hour, now: the machine, and its disks."""
        nothing = Decimal(0)
        if self.state is State.GONE:
            return nothing, nothing
        if self.api == "lambda":  # its disk is in the price
            free = self.running_s is None or self.state is State.PREEMPTED
            return (nothing if free else self.usd_per_hr), nothing
        if self.state in (State.EXITED, State.PREEMPTED):
            return nothing, self.volume_gb * STOPPED_USD_PER_GB_HR
        return self.usd_per_hr, (self.disk_gb + self.volume_gb) * DISK_USD_PER_GB_HR

    def bill_usd(self) -> Decimal:
        return _total_usd(self.hours)

    def told_usd(self) -> Decimal:
        return _total_usd(self.told)

    def become(self, state: State, due_s: Decimal | None = None) -> None:
        self.state, self.due_s = state, due_s


def _total_usd(hours: Mapping[int, Amounts]) -> Decimal:
    return sum((each.gpu + each.disk for each in hours.values()), Decimal(0)) / HOUR_S


class World:
    """All that is true at the fake provider. Methods take the lock; hold it yourself around several."""

    def __init__(
        self,
        clock: Time,
        *,
        boot_s: float = 30,
        term_s: float = 15,
        balance_usd: Decimal | str = "100",
    ) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.boot_s, self.term_s = Decimal(str(boot_s)), Decimal(str(term_s))
        self.loaded_usd = Decimal(balance_usd)
        self.machines: dict[str, Machine] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.market = Decimal(1)  # all prices of the catalogue are multiplied by it
        self.at_s = Decimal(0)  # how far this world has been played, in virtual seconds since it began
        self._began_steady_s = clock.steady_s()
        self._epoch_s = Decimal(str(clock.now().timestamp())).quantize(MICROSECOND)
        self._ordinal = 0

    # --- time -------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Play the world up to the clock's now."""
        with self.lock:
            elapsed = Decimal(repr(self.clock.steady_s() - self._began_steady_s)).quantize(MICROSECOND)
            self._settle()
            while self.at_s < elapsed:
                until = min([elapsed, *(moment for moment in self._coming() if moment > self.at_s)])
                self._charge(until - self.at_s)
                self.at_s = until
                self._settle()

    def moment(self, at_s: Decimal) -> datetime:
        """The true wall clock at a moment of this world."""
        return datetime.fromtimestamp(0, UTC) + timedelta(
            microseconds=int((self._epoch_s + at_s) * 1_000_000)
        )

    def stated(self, at_s: Decimal) -> datetime:
        """The same moment as this provider's own clock tells it."""
        wrong = self.lie("clock_skew", fire=True)
        skew = wrong.skew_s if wrong else 0
        return self.moment(at_s + skew)

    def _coming(self) -> Iterator[Decimal]:
        """Moments at which something may change, past ones among them."""
        yield self._next_mark()
        yield from (m.due_s for m in self.machines.values() if m.due_s is not None)
        yield from (due for _, _, due in self._events())
        rate = self._usd_per_s()
        if rate:
            left_s = self.balance_usd() / rate
            yield self.at_s + left_s.quantize(MICROSECOND, ROUND_CEILING)

    def _next_mark(self) -> Decimal:
        """The next full five minutes of the hour: billing is told then, and hours begin there."""
        passed = (self._epoch_s + self.at_s) // BILLING_EVERY_S
        return (passed + 1) * BILLING_EVERY_S - self._epoch_s

    def _settle(self) -> None:
        """All that is due at this moment."""
        for machine in self.machines.values():
            if machine.due_s is not None and machine.due_s <= self.at_s:
                self._arrive(machine)
        for fault, whose, due in list(self._events()):
            if due <= self.at_s and not fault.spent():
                self._happen(fault, whose)
        if (self._epoch_s + self.at_s) % BILLING_EVERY_S == 0:
            for machine in self.machines.values():
                machine.told = deepcopy(machine.hours)
        if self.balance_usd() <= 0:
            self.end_all()

    def _arrive(self, machine: Machine) -> None:
        if machine.state is State.BOOTING:
            machine.become(State.RUNNING)
            machine.running_s = self.at_s
        elif machine.state is State.ENDING:
            machine.become(State.GONE)
            machine.gone_s = self.at_s

    # --- money ------------------------------------------------------------------------------------

    def _charge(self, seconds: Decimal) -> None:
        hour = int((self._epoch_s + self.at_s) // HOUR_S)
        for machine in self.machines.values():
            gpu, disk = machine.rates()
            if gpu or disk:
                amounts = machine.hours.setdefault(hour, Amounts())
                amounts.gpu += gpu * seconds
                amounts.disk += disk * seconds

    def usd_per_hr(self) -> Decimal:
        """What all machines together truly cost now."""
        return sum((sum(m.rates(), Decimal(0)) for m in self.machines.values()), Decimal(0))

    def _usd_per_s(self) -> Decimal:
        return self.usd_per_hr() / HOUR_S

    def bill_usd(self, machine_id: str | None = None) -> Decimal:
        """The true bill up to where the world was played: of one machine, or all."""
        with self.lock:
            chosen = [self.machines[machine_id]] if machine_id else list(self.machines.values())
            return sum((m.bill_usd() for m in chosen), Decimal(0))

    def balance_usd(self) -> Decimal:
        """What is truly left of the prepaid money."""
        return self.loaded_usd - self.bill_usd()

    def told_balance_usd(self) -> Decimal:
        """What the account says is left: as of the last billing run."""
        with self.lock:
            return self.loaded_usd - sum((m.told_usd() for m in self.machines.values()), Decimal(0))

    # --- machines ---------------------------------------------------------------------------------

    def launch(self, api: str, name: str, sku: str, **details: Any) -> Machine:
        """A new machine, booting. `details` are Machine's own fields."""
        with self.lock:
            self._ordinal += 1
            prefix = "pod" if api == "runpod" else "inst"
            machine = Machine(
                id=f"{prefix}-{self._ordinal:04d}-{secrets.token_hex(3)}",  # no other server ever gives it
                api=api,
                name=name,
                sku=sku,
                created_s=self.at_s,
                due_s=self.at_s + self.boot_s,
                **details,
            )
            self.machines[machine.id] = machine
            self._settle()
            return machine

    def listed(self, api: str) -> list[Machine]:
        """What a list shows: not the gone, nor those that a fault still hides."""
        with self.lock:
            return [m for m in self.machines.values() if m.api == api and m.alive and not self._hidden(m)]

    def find(self, api: str, machine_id: str) -> Machine | None:
        return next((m for m in self.listed(api) if m.id == machine_id), None)

    def alive(self) -> list[Machine]:
        with self.lock:
            return [m for m in self.machines.values() if m.alive]

    def terminate(self, machine: Machine) -> None:
        """Begin its end, or whatever a fault makes of that. Asked again, nothing changes."""
        with self.lock:
            if machine.state in (State.ENDING, State.GONE) or self.lie(
                "terminate_ignored", machine, fire=True
            ):
                return
            stuck = self.lie("stuck_terminating", machine, fire=True)
            lasts = self.term_s if stuck is None else stuck.for_s
            machine.become(State.ENDING, None if lasts is None else self.at_s + max(lasts, self.term_s))
            self._settle()

    def end_all(self) -> None:
        """No more money, or no more provider: everything is gone at once."""
        with self.lock:
            for machine in self.alive():
                machine.become(State.GONE)
                machine.gone_s = self.at_s

    def exited(self, machine_id: str, boots: int) -> None:
        """The container of a pod has ended by itself."""
        with self.lock:
            machine = self.machines[machine_id]
            if machine.boots == boots and machine.state is State.RUNNING:
                machine.become(State.EXITED)

    def stop(self, machine: Machine) -> None:
        with self.lock:
            machine.become(State.EXITED)

    def start(self, machine: Machine) -> None:
        """Boot it, again: its script runs from the beginning."""
        with self.lock:
            machine.boots += 1
            machine.become(State.BOOTING, self.at_s + self.boot_s)
            self._settle()

    # --- faults -----------------------------------------------------------------------------------

    def add(self, fault: Fault) -> None:
        """Script a fault, from now on."""
        with self.lock:
            self.advance()
            fault.given_s = self.at_s
            self.faults.append(fault)
            self._settle()

    def clear_faults(self) -> None:
        """All is well again; what was stuck in terminating ends after the usual time."""
        with self.lock:
            self.faults.clear()
            for machine in self.machines.values():
                if machine.state is State.ENDING and machine.due_s is None:
                    machine.due_s = self.at_s + self.term_s

    def lie(self, kind: str, machine: Machine | None = None, *, fire: bool = False) -> Fault | None:
        """The fault of this kind that holds now, for a machine."""
        for fault in self.faults:
            of_it = machine is None or (fault.api in ("any", machine.api) and fault.concerns(machine.names))
            if fault.kind == kind and of_it and fault.active(self.at_s):
                return fault.fire() if fire else fault
        return None

    def _hidden(self, machine: Machine) -> bool:
        fault = self.lie("not_listed_yet", machine)
        if fault is None or fault.for_s is None or machine.created_s < fault.given_s + fault.after_s:
            return False
        hidden = self.at_s < machine.created_s + fault.for_s
        if hidden and machine.id not in fault.hit:
            fault.hit.add(machine.id)
        return hidden

    def _events(self) -> Iterator[tuple[Fault, Machine | None, Decimal]]:
        """What is scripted to happen, to whom and when."""
        for fault in self.faults:
            if fault.kind not in EVENTS or fault.spent():
                continue
            if fault.kind == "price_jump" and fault.machine is None:
                yield fault, None, fault.given_s + fault.after_s
                continue
            for machine in self.machines.values():
                mine = fault.api in ("any", machine.api) and fault.concerns(machine.names)
                if mine and machine.state is State.RUNNING and machine.id not in fault.hit:
                    yield fault, machine, max(fault.given_s, machine.running_s or 0) + fault.after_s

    def _happen(self, fault: Fault, machine: Machine | None) -> None:
        fault.fire()
        if machine is not None:
            fault.hit.add(machine.id)
        if fault.kind == "price_jump":
            self.market *= fault.factor if machine is None else 1
            for each in [machine] if machine else self.alive():
                each.usd_per_hr *= fault.factor
        elif machine is not None:
            machine.become(State(fault.kind))
