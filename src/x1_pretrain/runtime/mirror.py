"""The trainer's side of its mirror: a process of its own, asked for little and listened to.

Nothing here waits for a store, but the start (what the mirror has must be here before the first step) and the
end (what it lacks should be there after the last). A mirror that dies is started again; only one that says
that another writer has the run ends training.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import FAULT, INTERRUPTED, REFUSED, UserError
from x1_pretrain.mirror.identity import run_id_of
from x1_pretrain.mirror.job import Job, Opened, Status, of_config
from x1_pretrain.numbers import size
from x1_pretrain.runtime.signals import Signals

LISTEN_S = 0.2  # between two looks for a signal, while the mirror opens
LATE_S = 5.0  # after the time that a drain was given, and for the last words of one that ended
AGAIN_S = 30.0  # between two starts of a mirror that dies
PROGRESS_S = 5.0  # between two lines of progress
UNATTENDED = "X1_UNATTENDED"  # set by `x1 supervise` for its trainer
LOG = "mirror.log"  # what its process writes beside its happenings: faults


class MirrorRefusedError(UserError):
    """With the exit code that the mirror gave."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:  # it goes from the first rank to the others
        return type(self), (str(self), self.exit_code)


def job_for(config: RunConfig, must_exist: bool, fresh: bool) -> Job:
    """What the mirror has to know of the run."""
    settings = config.mirror
    assert settings.uri is not None
    return of_config(
        config,
        config.folder.absolute(),
        config.checkpoint_folder.absolute(),
        settings.uri,
        endpoint=settings.endpoint,
        every_s=settings.every_s,
        data=settings.data,
        max_mb_per_s=settings.max_mb_per_s,
        must_exist=must_exist,
        fresh=fresh,
        unattended=UNATTENDED in os.environ,
        run_id=run_id_of(config.folder),
    )


class Mirror:
    """`Mirror.open(...)`, then `publish`, and at the end `drain`."""

    def __init__(self, job: Job, grace_s: float, signals: Signals, say: Callable[[str], None]) -> None:
        self.job, self.grace_s = job, grace_s
        self.opened, self.status = Opened("", 0, False), Status()
        self.sent_bytes = 0  # by all its processes
        self.billed_bytes, self.billed_step = 0, -1  # of these, and of the newest checkpoint then
        self.lost: str | None = None
        self.left: list[str] | None = None  # after a drain
        self._signals, self._say = signals, say
        self._news: deque[tuple[str, str, dict[str, Any]]] = deque()
        self._refused: UserError | None = None
        self._is_open = threading.Event()
        self._order: dict[str, Any] | None = None  # to publish: repeated to a mirror that was started again
        self._heard_s = self._started_s = time.monotonic()
        self._said_s, self._ended_s = -math.inf, math.inf
        self._draining = False
        self._told_dead = False
        self._process, self._reader = self._start("w")

    @classmethod
    def open(cls, job: Job, grace_s: float, signals: Signals, say: Callable[[str], None]) -> Mirror:
        """Once it has the lease, and the run folder holds the newest that is known of the run."""
        try:
            mirror = cls(job, grace_s, signals, say)
        except OSError as error:
            raise MirrorRefusedError(
                f"{job.folder}: the mirror's process can't be started ({error.strerror})", FAULT
            ) from None
        signals.opening = True
        try:
            while not mirror._is_open.wait(LISTEN_S):
                if mirror._ended():
                    mirror._end_unopened(mirror._process)
                if signals.interrupted():
                    raise MirrorRefusedError(
                        f"{signals.requested}: nothing was started; relaunch the same command", INTERRUPTED
                    )
        except BaseException:
            mirror.close("stopped before it began")
            raise
        finally:
            signals.opening = False
        if mirror._refused:
            mirror._process.wait()
            raise mirror._refused
        return mirror

    def _start(self, mode: str) -> tuple[subprocess.Popen[str], threading.Thread]:
        Path(self.job.folder).mkdir(parents=True, exist_ok=True)
        with (Path(self.job.folder) / LOG).open(mode) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "x1_pretrain.mirror.worker", self.job.folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        reader = threading.Thread(target=self._listen, args=(process,), name="x1-mirror", daemon=True)
        reader.start()
        self._tell(process, {"do": "open", **asdict(self.job), "goes_on": self._order is not None})
        return process, reader

    def _tell(self, process: subprocess.Popen[str], order: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        except (OSError, ValueError):
            return  # it is gone: the listener says so

    # --------------------------------------------------------------------------------------------------------
    # Listening

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """In a thread of its own, until the mirror's output ends."""
        assert process.stdout is not None
        for line in _lines(process.stdout):
            try:
                happening = json.loads(line)
            except ValueError:
                continue  # a library's own words
            self._take(happening)
        self._end_unopened(process)

    def _end_unopened(self, process: subprocess.Popen[str]) -> None:
        if not self._is_open.is_set():
            log = Path(self.job.folder) / LOG
            self._refused = MirrorRefusedError(
                f"mirror {self.job.uri}: its process ended with exit code {process.wait()}; see {log}", FAULT
            )
            self._is_open.set()

    def _take(self, happening: dict[str, Any]) -> None:
        kind = happening.pop("is", None)
        if kind == "status":
            before, self.status = self.status.sent_bytes, Status(**_known(Status, happening))
            sent, self._heard_s = self.status.sent_bytes, time.monotonic()
            self.sent_bytes += sent - before if sent >= before else sent  # a new process begins at 0
            self._told_dead = self._told_dead and not self._is_open.is_set()
        elif kind == "event":
            self._news.append((happening["name"], happening["message"], happening.get("fields", {})))
        elif kind == "progress":
            self._progress(happening["text"])
        elif kind == "opened":
            self.opened = Opened(**_known(Opened, happening))
            self._is_open.set()
        elif kind == "refused":
            self._refused = MirrorRefusedError(happening["message"], int(happening.get("exit_code", REFUSED)))
            self._is_open.set()
            if self._order is not None and happening.get("held"):
                self._lose(happening["message"])
        elif kind == "lost":
            self._lose(happening["message"])
        elif kind == "drained":
            self.left = list(happening.get("left", []))

    def _lose(self, message: str) -> None:
        """Another writer has the run."""
        self.lost = message
        self._signals.ask(message, REFUSED)

    def _progress(self, text: str) -> None:
        if time.monotonic() - self._said_s >= PROGRESS_S:
            self._said_s = time.monotonic()
            self._say(f"  {text}")

    def news(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Events since the last call; a mirror that died is started again on the way."""
        self._keep_alive()
        return [self._news.popleft() for _ in range(len(self._news))]

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if not self._ended() or self.lost or self._draining or now - self._started_s < AGAIN_S:
            return
        code, self._started_s, self._ended_s = self._process.returncode, now, math.inf
        said = f"the mirror's process ended (exit code {code}, see {LOG}): started again, until it lives"
        if not self._told_dead:
            self._news.append(("mirror", said, {"exit_code": code, "alert": True}))
        self._told_dead = True
        self._is_open.clear()
        with suppress(OSError):  # no memory, no room for its log: tried again
            self._process, self._reader = self._start("a")
        if self._order is not None:
            self._tell(self._process, self._order)

    def _ended(self) -> bool:
        """And its last word was taken; but a child of it may hold its output for ever."""
        now = time.monotonic()
        self._ended_s = math.inf if self._process.poll() is None else min(self._ended_s, now)
        return now - self._ended_s > LATE_S or (self._ended_s <= now and not self._reader.is_alive())

    def row(self) -> dict[str, float]:
        """How far behind it is, now: a mirror that says nothing is behind by that time too."""
        silent_s = time.monotonic() - self._heard_s
        lag_s = self.status.lag_s + (silent_s if silent_s > 2 * self.job.every_s else 0.0)
        return {"mirror/lag_s": round(lag_s, 1), "mirror/lag_bytes": float(self.status.lag_bytes)}

    # --------------------------------------------------------------------------------------------------------
    # Orders

    def publish(
        self, run_id: str, from_step: int, fingerprints: list[str], step_fields: dict[str, Any]
    ) -> None:
        """From here on what is in the run folder is the run's."""
        self._order = {"do": "publish", "run_id": run_id, "from_step": from_step}
        self._order |= {"fingerprints": fingerprints, "step_fields": step_fields}
        self._tell(self._process, self._order)

    def drain(self, within_s: float, why: str, beat: Callable[[], None] = lambda: None) -> list[str]:
        """Send what is left, let the lease go, end. What is not mirrored after `within_s`, a line each.
        `beat` is called meanwhile."""
        self._draining = True
        if self._process.poll() is None:
            self._tell(self._process, {"do": "drain", "within_s": within_s, "why": why})
        deadline = time.monotonic() + within_s + LATE_S
        while (
            self._reader.is_alive()
            and not self._ended()
            and time.monotonic() < min(deadline, self._asked_end_s())
        ):
            self._reader.join(LISTEN_S)
            beat()
        if self.left is None:
            lag = self.status.lag_bytes
            self.left = [f"it did not answer; by its last word {size(lag)} were not mirrored"]
        return self.left

    @property
    def asked_s(self) -> float | None:
        """When somebody asked to leave, by the monotonic clock."""
        return self._signals.requested_s

    def _asked_end_s(self) -> float:
        """A signal leaves so much time, also one that comes while the last things are sent."""
        return math.inf if self.asked_s is None else self.asked_s + self.grace_s + LATE_S

    def close(self, why: str, within_s: float = 20.0) -> None:
        """Whatever happened. Its process ends by itself when its input does, after one last look."""
        if self._process.poll() is None and not self._draining:
            self.drain(within_s, why)
        if self._process.stdin:
            try:
                self._process.stdin.close()
            except OSError:
                return


def _lines(stream: IO[str]) -> Iterator[str]:
    try:
        yield from stream
    except (OSError, ValueError):
        return


def _known(kind: type, happening: Mapping[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in happening.items() if name in names}
