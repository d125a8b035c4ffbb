"""Sessions that write one run, stopped before whatever they ask of the store or the clock.

Each is a thread, but only one of them moves at a time: the test says which, and what goes wrong with the one
operation it then does. A session that is not moved is one that was paused; one that is dropped was killed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

from tests.stores.model_store import Clock, Fault, Kind, ModelStore
from x1_pretrain.mirror.claim import HeldError, Me
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.stores.store import UnreachableError

BEAT_S = 15.0


class Killed(BaseException):
    """Unwinds the thread of a session that was killed."""


def notes(head: Head) -> list[str]:
    return list(head.status.get("notes", []))


@dataclass
class Session:
    """Claims the run, adds a note to its head every 15 s until it is told to leave, loses or is refused."""

    store: ModelStore
    clock: Clock
    me: Me
    skew_s: float  # of its own clock
    name: str
    careful: bool = True  # settles before it makes a new head; else it leaves that to `publish`
    leaving: bool = False
    end: str = ""  # held, lost, released, away, killed; else it goes on
    fault: BaseException | None = None  # an error that no session should see
    lease: Lease | None = None
    confirmed: list[str] = field(default_factory=list)  # notes that are published, it was told
    began_t: float = 0.0
    waits_until: float = 0.0
    about_to: str = ""
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _kill: bool = False
    _thread: threading.Thread | None = None

    # --- called by the test

    def start(self) -> None:
        self.began_t = self.waits_until = self.clock.t
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def move(self, fault: Kind | None = None) -> None:
        """One operation, and on to the next. Time passes until it has slept enough."""
        assert not self.end
        self.clock.t = max(self.clock.t, self.waits_until)
        self.store.faults = [Fault(fault)] if fault and self.about_to != "sleep" else []
        self._go.release()
        self._stopped.acquire()
        self.store.faults = []
        if self.fault:
            raise self.fault

    def kill(self) -> None:
        if not self.end:
            self._kill = True
            self._go.release()
            self._stopped.acquire()
        assert self._thread is not None
        self._thread.join(5)

    def stop_before(self, op: str) -> None:
        """Called in the session's own thread, by the store and by its sleep."""
        self.about_to = op
        self._stopped.release()
        self._go.acquire()
        if self._kill:
            raise Killed

    # --- the session

    def _main(self) -> None:
        try:
            self.stop_before("start")
            self.end = self._train()
        except Killed:
            self.end = "killed"
        except BaseException as error:
            self.end, self.fault = "fault", error
        finally:
            self._stopped.release()

    def _train(self) -> str:
        try:
            self.lease = Lease.claim(
                self.store, self.me, sleep=self._sleep, steady=self._steady, now_utc=self._utc, say=_hush
            )
            self.lease.resumed_from(0)
            number = 0
            while True:
                number += 1
                if self._look(f"{self.name}.{number}"):
                    return "released"
                self._sleep(BEAT_S)
        except HeldError:
            return "held"
        except LostError:
            return "lost"
        except UnreachableError:
            return "away"

    def _look(self, note: str) -> bool:
        """Publish a note, or give the run back; True when that is done."""
        assert self.lease is not None
        try:
            if self.careful:
                self.lease.settle()
            if self.leaving:
                self.lease.release("left")
                return True
            head = self.lease.head
            self.lease.publish(replace(head, status={"notes": [*notes(head), note]}))
            self.confirmed.append(note)
        except UnreachableError:
            pass
        return False

    def _sleep(self, s: float) -> None:
        self.waits_until = self.clock.t + s
        self.stop_before("sleep")

    def _steady(self) -> float:
        return self.clock.t + 7.0 * self.skew_s

    def _utc(self) -> str:
        return (self.clock.now() + timedelta(seconds=self.skew_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _hush(text: str) -> None: ...


@dataclass
class Troupe:
    """All sessions of one run, and the store between them."""

    clock: Clock = field(default_factory=Clock)
    tells_time: bool = True
    skew_s: float = 0.0
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = ModelStore(
            self.clock, tells_time=self.tells_time, skew_s=self.skew_s, before=self._before
        )

    def _before(self, op: str, key: str) -> None:
        by_name = {one.name: one for one in self.sessions}
        if session := by_name.get(threading.current_thread().name):
            session.stop_before(op)

    def start(
        self, folder: str, stale_s: float, skew_s: float, careful: bool = True, unattended: bool = False
    ) -> Session:
        name = f"s{len(self.sessions)}"
        me = Me("run", folder, f"host-of-{name}", len(self.sessions), stale_s, unattended)
        session = Session(self.store, self.clock, me, skew_s, name, careful)
        self.sessions.append(session)
        session.start()
        return session

    def living(self) -> list[Session]:
        return [one for one in self.sessions if not one.end]

    def pass_time(self, s: float, frozen: Callable[[Session], bool] = lambda one: False) -> None:
        """Everybody who is not frozen goes on as they are due."""
        until, moves = self.clock.t + s, 0
        while ready := [one for one in self.living() if not frozen(one) and one.waits_until <= until]:
            min(ready, key=lambda one: one.waits_until).move()
            moves += 1
            assert moves < 1000 + 20 * s, "somebody asks the store without ever waiting"
        self.clock.t = max(self.clock.t, until)

    def end(self) -> None:
        for one in self.sessions:
            one.kill()
