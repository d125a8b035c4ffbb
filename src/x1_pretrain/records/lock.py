"""A run folder has one writer at a time: a lock with the holder's name, that no dead process keeps.

On a disk that can lock, the kernel lets go of the lock when its process ends, however it ends. On one that
can't (some network disks), and towards other machines that share the disk, a heartbeat stands in for it: the
holder renews the file's time, and a lock whose time stands still belongs to no one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from x1_pretrain.errors import RefusedError
from x1_pretrain.records.processes import boot_id, is_alive, started

BEAT_S = 10.0  # between two renewals of the file's time
STALE_S = 60.0  # a holder on another machine that has not renewed it for so long is gone
SETTLE_S = 0.5  # without a kernel's lock: time for a rival to write its name
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LINE = re.compile(
    r"process (?P<pid>\d+) on (?P<host>\S+) since (?P<since>\S+) \(boot (?P<boot>\S+), start (?P<start>\S+)\)"
    r" (?P<token>\S+)"
)


@dataclass(frozen=True)
class Holder:
    """Who a lock file says holds it."""

    pid: int
    host: str
    since: str
    boot: str
    start: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        pid = os.getpid()
        since = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        return cls(pid, os.uname().nodename, since, boot_id(), started(pid), secrets.token_hex(4))

    @classmethod
    def read(cls, text: str) -> Holder | None:
        found = LINE.match(text)
        return cls(**{**found.groupdict(), "pid": int(found["pid"])}) if found else None  # type: ignore[arg-type]

    def line(self) -> str:
        return (
            f"process {self.pid} on {self.host} since {self.since} (boot {self.boot}, start {self.start}) "
            f"{self.token}\n"
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since},"

    @property
    def on_this_boot(self) -> bool:
        """Whether its process id means something here."""
        return self.host == os.uname().nodename and self.boot == boot_id()

    def runs_here(self) -> bool:
        return self.on_this_boot and is_alive(self.pid, self.start)


class FolderLock:
    """A held lock. `note` says whose it was, when it was taken over."""

    def __init__(self, file: IO[str], mine: Holder, note: str | None) -> None:
        self.note = note
        self._file, self._mine = file, mine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="x1-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                os.utime(self._file.fileno())
            except OSError:
                continue  # a full or absent disk: the next beat tries again

    def close(self) -> None:
        """Let go, and leave no name: what a name is found of later ended otherwise."""
        self._stop.set()
        self._thread.join(timeout=5)
        if self._file.closed:
            return
        try:
            self._file.seek(0)
            if self._mine.token in self._file.read():
                self._file.truncate(0)
        except OSError:
            pass  # the folder is gone or full: a name is left behind, and found to be dead
        self._file.close()


def lock_folder(
    folder: Path,
    flock: Callable[[IO[str], int], None] = fcntl.flock,
    say: Callable[[str], None] = print,
) -> FolderLock:
    """Hold the run folder until this process ends, however it ends. RefusedError if another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+", encoding="utf-8", errors="replace")
    try:
        with_kernel = _flocked(folder, file, flock)
        if with_kernel:
            _refuse_moved(folder, file)
        before = _holder(file)
        note = _judge(folder, file, before, with_kernel, say)
        mine = Holder.here()
        file.seek(0)
        file.truncate()
        file.write(mine.line())
        file.flush()
        if not with_kernel:
            _settle(folder, file, mine)
        return FolderLock(file, mine, note)
    except BaseException:
        file.close()
        raise


def _flocked(folder: Path, file: IO[str], flock: Callable[[IO[str], int], None]) -> bool:
    """Whether the kernel keeps the lock; False where the disk can't."""
    try:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(_held(folder, _holder(file))) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _refuse_moved(folder: Path, file: IO[str]) -> None:
    """Between the opening and the lock somebody may have moved the folder into the trash."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat())
    except FileNotFoundError:
        same = False
    if not same:
        raise RefusedError(f"{folder}: was moved away in this moment; look where it is, then try again")


def _holder(file: IO[str]) -> Holder | None:
    file.seek(0)
    return Holder.read(file.read(4096))


def _judge(
    folder: Path, file: IO[str], holder: Holder | None, with_kernel: bool, say: Callable[[str], None]
) -> str | None:
    """A name in a lock that the kernel gave us, or could not give: dead, which is said, or a refusal."""
    if holder is None:
        return None
    if holder.on_this_boot or (with_kernel and holder.boot == boot_id() != "-"):  # also in another container
        if not with_kernel and holder.runs_here():
            raise RefusedError(_held(folder, holder))
    elif beats(folder, file, holder, say):
        raise RefusedError(_held(folder, holder))
    return f"the lock of {holder} was left behind: that process is gone; taken over"


def beats(
    folder: Path,
    file: IO[str],
    holder: Holder,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether a holder on another machine, or of an earlier boot, renews its lock's time. Waits until it
    does, or until the time is STALE_S old by the clock of the disk."""
    seen = os.fstat(file.fileno()).st_mtime
    left = STALE_S - (_disk_now(folder) - seen)
    if left > 0:
        say(f"{folder}: is locked by {holder} waiting up to {min(left, STALE_S):.0f} s for a sign of life")
    left = min(left, STALE_S)
    while left > 0:
        sleep(min(1.0, left))
        left -= 1.0
        with (folder / "lock").open() as fresh:  # network disks look anew at an open, not at a stat
            if os.fstat(fresh.fileno()).st_mtime != seen:
                return True
    return False


def _disk_now(folder: Path) -> float:
    """The disk's clock: on a network disk it is not this machine's."""
    probe = folder / f".lock-probe-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _settle(folder: Path, file: IO[str], mine: Holder) -> None:
    """Two that wrote at the same time: the name that stays is the holder's."""
    os.fsync(file.fileno())
    time.sleep(SETTLE_S)
    with (folder / "lock").open(encoding="utf-8", errors="replace") as again:
        found = Holder.read(again.read(4096))
    if found != mine:
        raise RefusedError(_held(folder, found))


def _held(folder: Path, holder: Holder | None) -> str:
    """The refusal: who, since when, and what to do."""
    if holder is None:
        return f"{folder}: another process is training here; end it first, or use another --run-dir"
    if holder.on_this_boot and not holder.runs_here():
        return (
            f"{folder}: is locked, though {holder} is gone: something it started still runs (`fuser -v "
            f"{folder / 'lock'}` shows it); end that, or use another --run-dir"
        )
    how = f"`kill {holder.pid}` saves and ends it" if holder.on_this_boot else f"end it on {holder.host}"
    return f"{folder}: {holder} is training here; {how}, or use another --run-dir"
