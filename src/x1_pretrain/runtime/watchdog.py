"""A run that makes no progress says where it stands, saves what it can, and ends with 75 to be relaunched.

    with Watchdog(folder, rank, config.watchdog, on_hang) as watchdog:
        watchdog.enter("data", step)  # at each phase; costs less than a microsecond
        watchdog.beat()  # progress within a long one

A thread looks once a second. It counts only time in which it ran itself: a process that was stopped, a laptop
that slept and a machine that was paused are not hung. When a library blocks with Python's lock held, the
thread can't run either: then the `guardian`, a process, does it. SIGUSR1 has the stacks of a living run
written, and the run goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from x1_pretrain import __version__
from x1_pretrain.config import WatchdogConfig
from x1_pretrain.errors import INTERRUPTED
from x1_pretrain.records.processes import STATES, is_alive, started, state_and_start
from x1_pretrain.runtime import guardian

Phase = Literal["start", "data", "step", "update", "evaluation", "sampling", "checkpoint", "other", "leaving"]

# Phases in which the weights and moments are those of the step counted: they can be saved from outside.
AT_REST: frozenset[str] = frozenset({"data", "step", "evaluation", "sampling", "other"})

SUSPENDED_S = 3.0  # a look that comes later than this is worth a line; a busy machine delays by less


@dataclass(frozen=True)
class Hang:
    """No progress for longer than its phase may take."""

    phase: str
    step: int
    seconds: float
    limit_s: float
    path: Path | None  # the stacks; None: the folder can't be written

    @property
    def at_rest(self) -> bool:
        """Whether a checkpoint can be saved from the watchdog's thread."""
        return self.phase in AT_REST

    def line(self) -> str:
        where = f"; stacks: {self.path}" if self.path else ""
        return (
            f"hang: no progress for {self.seconds:.0f} s in phase {self.phase} at step {self.step} (limit "
            f"{self.limit_s:.0f} s){where}"
        )


def suspended_line(seconds: float) -> str:
    return (
        f"this process did not run for {seconds:.0f} s (stopped, or the machine slept or was paused): going "
        "on, the time is not counted as a hang"
    )


def limit_s(phase: str, limits: WatchdogConfig, warm: bool) -> float:
    """How long `phase` may go on without progress. Until the first update anything may have to compile."""
    usual = {
        "start": limits.first_step_s,
        "data": limits.data_s,
        "evaluation": limits.evaluation_s,
        "sampling": limits.evaluation_s,
        "checkpoint": limits.checkpoint_s,
        "leaving": limits.checkpoint_s,
    }.get(phase, limits.step_s)
    return usual if warm else max(usual, limits.first_step_s)


def counted_s(between_s: float, tick_s: float) -> tuple[float, float]:
    """Of the time between two looks: what counts as waiting, and how long this process did not run."""
    late_s = between_s - tick_s
    return min(between_s, 2 * tick_s), late_s if late_s > SUSPENDED_S else 0.0


class Watchdog:
    """`on_hang` tells and saves; it runs in a thread of its own, for at most `limits.save_s`, then the
    process ends."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        limits: WatchdogConfig,
        on_hang: Callable[[Hang], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = 1.0,
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        self.on_hang = on_hang
        self._folder, self._rank, self._limits = folder, rank, limits
        self._clock, self._tick_s, self._exit = clock, tick_s, exit_process
        self._mark: tuple[str, int] = ("start", 0)  # a new object at each progress
        self._seen, self._idle_s, self._last = self._mark, 0.0, clock()
        self._warm = False
        self._hung = False
        self._away: deque[float] = deque()
        self._peers: dict[int, str] = {}
        self._spool = -1  # where SIGUSR1 puts the stacks
        self._spooled = 0
        self._guardian: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # --- the loop's side

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """The loop goes on to `phase`. No step: the one before."""
        self._mark = (phase, self._mark[1] if step is None else step)
        if phase == "update" and not self._warm:
            self._warm = True
            self._tell_guardian(self._limits.step_s, self._mark)  # it still has the limit of the first step
        if self._hung:
            self._park()

    def beat(self) -> None:
        """Progress within the phase."""
        phase, step = self._mark
        self._mark = (phase, step)
        if self._hung:
            self._park()

    def news(self) -> list[float]:
        """Seconds of each suspension since the last call."""
        found = []
        while self._away:
            found.append(self._away.popleft())
        return found

    def set_peers(self, pids: Sequence[int]) -> None:
        """The other ranks on this host, the lowest first. Kept with the time each was started: an id may
        belong to a stranger later."""
        self._peers = {pid: started(pid) for pid in pids if pid != os.getpid()}

    def _park(self) -> None:
        """A loop that comes back after it was given up may not touch the weights that are being saved."""
        while self._hung:
            time.sleep(0.02)

    # --- its own side

    def start(self) -> Self:
        """Nothing runs before, and nothing at all where it is switched off."""
        if not self._limits.enabled:
            return self
        self._spool = _spool()
        if hasattr(faulthandler, "register"):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # from `close` on: another rank may still ask
            faulthandler.register(signal.SIGUSR1, file=self._spool, all_threads=True)
        self._guardian = self._guarded()
        self._tell_guardian(limit_s(self._mark[0], self._limits, self._warm), self._mark)
        self._last = self._clock()
        self._thread = threading.Thread(target=self._watch, name="x1-watchdog", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """The run is over. Not for the thread itself."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout=10)
        if self._hung:  # it saves what can be saved, and ends this process
            self._thread.join()
        faulthandler.unregister(signal.SIGUSR1)
        if self._guardian is not None and self._guardian.stdin is not None:
            with contextlib.suppress(OSError):
                self._guardian.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guardian.wait(timeout=5)
        if not self._thread.is_alive():
            os.close(self._spool)
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._stop.wait(self._tick_s):
            self.look()

    def look(self) -> None:
        """One look; the thread does it at every tick."""
        now = self._clock()
        counted, away = counted_s(now - self._last, self._tick_s)
        self._last = now
        if away:
            self._away.append(away)
        mark = self._mark
        self._idle_s = self._idle_s + counted if mark is self._seen else 0.0
        self._seen = mark
        limit = limit_s(mark[0], self._limits, self._warm)
        self._tell_guardian(limit - self._idle_s, mark)
        self._publish_asked(mark)
        if self._idle_s > limit and self._condemn(mark):
            self._end(mark, limit)

    def _condemn(self, mark: tuple[str, int]) -> bool:
        """From here on the loop parks at its next mark; False if it has just moved on."""
        self._hung = True
        self._hung = self._mark is mark  # either this sees the loop's mark, or the loop sees `_hung`
        return self._hung

    def _end(self, mark: tuple[str, int], limit: float) -> None:
        hang = Hang(mark[0], mark[1], self._idle_s, limit, None)
        first_s = 0.0 if self._rank == 0 else self._limits.step_s + self._limits.save_s
        self._tell_guardian(self._limits.save_s + first_s, mark)
        hang = Hang(mark[0], mark[1], self._idle_s, limit, self._write(hang.line()))
        _say(f"\nx1: {hang.line()}\n")
        self._ask_peers()
        done = threading.Thread(target=self._tell, args=(hang,), name="x1-hang", daemon=True)
        done.start()
        done.join(timeout=self._limits.save_s)
        if done.is_alive():
            _say(f"x1: what was to be saved was not done within {self._limits.save_s:.0f} s; leaving\n")
        self._wait_for_first_rank()
        _say("x1: leaving with 75; relaunch the same command to go on\n")
        self._exit(INTERRUPTED)

    def _tell(self, hang: Hang) -> None:
        try:
            self.on_hang(hang)
        except Exception as error:  # nothing may keep this process from ending
            _say(f"x1: after the hang: {type(error).__name__}: {error}\n")

    def _wait_for_first_rank(self) -> None:
        """Launchers end all ranks soon after the first that leaves: the one that saves leaves first. It may
        be in a step, whose limit is longer."""
        if self._rank == 0:
            return
        first = next(iter(self._peers.items()), None)
        here_s = self._limits.step_s if first else 0.0  # on another host nothing tells that it is gone
        deadline = time.monotonic() + here_s + self._limits.save_s
        while time.monotonic() < deadline and (first is None or is_alive(*first)):
            time.sleep(0.05)

    # --- stacks

    def _write(self, why: str, stacks: str | None = None) -> Path | None:
        """The file; onto the screen when the folder can't be written."""
        path = self._folder / f"hang-rank{self._rank}-{_stamp()}.txt"
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{why}\n{_header(self._rank)}{_threads()}{self._peer_states()}\n{stacks or ''}")
                file.flush()
                if stacks is None:
                    faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            _say(f"\nx1: {path} can't be written ({error.strerror}); the stacks are:\n{stacks or ''}")
            if stacks is None:
                faulthandler.dump_traceback(file=2, all_threads=True)
            return None
        return path

    def _publish_asked(self, mark: tuple[str, int]) -> None:
        """Stacks that a signal had written since the last look."""
        if self._spool < 0 or (size := os.fstat(self._spool).st_size) == self._spooled:
            return
        text = os.pread(self._spool, size - self._spooled, self._spooled).decode(errors="replace")
        self._spooled = size
        where = f"in phase {mark[0]} at step {mark[1]}, no progress for {self._idle_s:.0f} s"
        why = f"asked for by SIGUSR1: {where}"
        if path := self._write(why, text):
            _say(f"\nx1: stacks on SIGUSR1: {path}; going on\n")

    def _ask_peers(self) -> None:
        for pid, start in self._peers.items():
            if start != "-" and is_alive(pid, start):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGUSR1)

    def _peer_states(self) -> str:
        return "".join(f"rank on this host, process {pid}: {_state(pid)}\n" for pid in self._peers)

    # --- the guardian

    def _guarded(self) -> subprocess.Popen[bytes] | None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, str(self._spool)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._spool,),
                start_new_session=True,  # Ctrl-C and Ctrl-Z in the terminal are not for it
            )
        except OSError as error:
            _say(f"x1: no second watchdog ({error.strerror}): a hang inside a library may go unnoticed\n")
            return None
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        path = str(self._folder / f"hang-rank{self._rank}")
        self._send(process, {"path": path, "header": _header(self._rank)})
        return process

    def _tell_guardian(self, left_s: float, mark: tuple[str, int]) -> None:
        """How long it may hear nothing: what is left of the limit, and time for this thread to act first."""
        if self._guardian is not None:
            left_s += max(2.0, 2 * self._tick_s, left_s / 10)
            self._send(self._guardian, {"left_s": left_s, "phase": mark[0], "step": mark[1]})

    def _send(self, process: subprocess.Popen[bytes], row: dict[str, object]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, or does not read: the next tick tells it anew
            os.write(process.stdin.fileno(), json.dumps(row).encode() + b"\n")


def _spool() -> int:
    """A file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("x1-stacks", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _header(rank: int) -> str:
    torch = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    return (
        f"rank {rank}, process {os.getpid()} on {os.uname().nodename}, "
        f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n"
        f"x1-pretrain {__version__}, torch {torch}, Python {platform.python_version()}, "
        f"{platform.platform()}\n"
    )


def _threads() -> str:
    """Faulthandler gives numbers only."""
    named = ", ".join(f"0x{t.ident or 0:016x} {t.name}" for t in threading.enumerate())
    return f"threads: {named}\n"


def _state(pid: int) -> str:
    found = state_and_start(pid)
    return STATES.get(found[0], f"running or waiting ({found[0]})") if found else "not there"


def _stamp() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"


def _say(text: str) -> None:
    """Straight to stderr: the main thread may hold the lock of the stream."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
