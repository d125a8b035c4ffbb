"""Files from a store into a folder: many ranges at a time, each verified, written where it belongs.

A part with hashes of its chunks is verified chunk by chunk, also what an earlier fetch left on the disk. Of
one without, what was left is kept where the file has no hole, and whoever asked for it verifies the whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror.head import CHUNK_BYTES
from x1_pretrain.mirror.patience import TELL_S, Patience, StoppedError, UnusableError, in_lanes
from x1_pretrain.numbers import size, span
from x1_pretrain.stores.store import NotThereError, Store, StoreError, UnreachableError

SYNC_BYTES = 64 << 20
SMALLEST_BYTES = 64 << 10  # of a read, after others were cut off
FIRST_BYTES = 1 << 20  # of the first read of a lane: a line may be slow
READ_S = 10.0  # a read should take no longer


@dataclass(frozen=True)
class Part:
    """A file to fetch. `chunks` are the sha256 of each piece of `chunk_bytes`; none: not known."""

    name: str
    key: str
    bytes: int
    chunks: tuple[str, ...] = ()
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        return -(-self.bytes // self.chunk_bytes)

    def span(self, index: int) -> tuple[int, int]:
        return index * self.chunk_bytes, min(self.bytes, (index + 1) * self.chunk_bytes)


@dataclass
class Progress:
    """Bytes that are there, and how fast they come."""

    what: str
    total: int
    begun_s: float
    kept: int = 0  # were here before
    came: int = 0

    def text(self, now_s: float, trouble: str = "") -> str:
        here, seconds = self.kept + self.came, now_s - self.begun_s
        line = f"fetching the {self.what}: {size(here)} of {size(self.total)}"
        if trouble:
            return f"{line}; waiting: {trouble}"
        if not self.came or seconds < TELL_S:
            return line
        rate = self.came / seconds
        return f"{line}, {size(rate)}/s, {span((self.total - here) / rate)} left"


@dataclass
class _File:
    """An open file of a part, and which chunks it still lacks."""

    part: Part
    descriptor: int
    old: bool  # an earlier fetch may have left something in it
    missing: set[int] = field(default_factory=set)


def download(
    store: Store,
    parts: list[Part],
    folder: Path,
    what: str,
    say: Callable[[str], None],
    lanes: int,
    patience: Patience,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Fetch into `folder` what it lacks of the parts; the bytes that were fetched."""
    progress = Progress(what, sum(part.bytes for part in parts), clock())
    job = _Download(store, patience, progress, clock, say)
    job.tell()
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(folder / part.name, part)) for part in parts]
        in_lanes([partial(job.look, file) for file in files if file.old], patience.stop, job.tell, lanes)
        progress.begun_s = clock()
        missing = [(file, index) for file in files for index in sorted(file.missing)]
        in_lanes([partial(job.fetch, *one) for one in missing], patience.stop, job.tell, lanes)
        in_lanes([partial(os.fsync, file.descriptor) for file in files], patience.stop, job.tell, lanes)
    job.tell()
    return progress.came


@contextmanager
def _opened(path: Path, part: Part) -> Iterator[_File]:
    """With its full size from the start. Only a file that was there can hold anything."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        old = os.fstat(descriptor).st_blocks > 0
        os.ftruncate(descriptor, part.bytes)
        yield _File(part, descriptor, old, set(range(part.count)))
    finally:
        os.close(descriptor)


class _Download:
    """The work of the lanes on open files."""

    def __init__(
        self,
        store: Store,
        patience: Patience,
        progress: Progress,
        clock: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._store, self._patience, self._progress = store, patience, progress
        self._clock, self._say, self._lock = clock, say, threading.Lock()
        self._synced = 0  # bytes that had come when a lane last wrote them through
        self._steps = threading.local()  # of each lane: how much it dares to ask for at once

    def tell(self) -> None:
        self._say(self._progress.text(self._clock(), self._patience.trouble))

    def look(self, file: _File) -> None:
        """Which chunks an earlier fetch left here."""
        part = file.part
        for index in range(part.count):
            self._go_on()
            start, end = part.span(index)
            if _holds(file.descriptor, part, index, start, end):
                file.missing.discard(index)
                self._count(kept=end - start)

    def fetch(self, file: _File, index: int) -> None:
        part = file.part
        start, end = part.span(index)
        data = self._patience.insist(partial(self._verified, part, index))
        written = os.pwrite(file.descriptor, data, start)
        if written != end - start:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._count(came=written):
            os.fdatasync(file.descriptor)  # the disk is busy while the others fetch, not afterwards

    def _verified(self, part: Part, index: int) -> bytearray:
        start, end = part.span(index)
        data = self._whole(part, start, end)
        if part.chunks and hashlib.sha256(data).hexdigest() != part.chunks[index]:
            raise UnusableError(f"{part.name} does not match its hash (bytes {start:,} to {end:,})")
        return data

    def _whole(self, part: Part, start: int, end: int) -> bytearray:
        """The bytes, in one read, or in smaller ones where connections do not last for that, or are slow."""
        data = bytearray()
        failures, broken = 0, False
        most = getattr(self._steps, "most", min(part.chunk_bytes, FIRST_BYTES))
        while start + len(data) < end:
            self._go_on()
            here, begun = start + len(data), time.monotonic()
            try:
                data += self._store.read(part.key, here, min(end, here + most))
            except UnreachableError as error:
                failures, most, broken = failures + 1, max(SMALLEST_BYTES, most // 2), True
                self._refuse_another_size(part)
                self._patience.wait(error, failures)
            except NotThereError:
                raise UnusableError(f"{part.name} is not in the mirror any more") from None
            else:
                failures, took_s = 0, time.monotonic() - begun
                self._patience.came()
                fit = int((start + len(data) - here) * READ_S / max(took_s, 1e-6))
                most = max(SMALLEST_BYTES, min(fit, most if broken else part.chunk_bytes))
        self._steps.most = min(part.chunk_bytes, 2 * most) if broken else most
        return data

    def _refuse_another_size(self, part: Part) -> None:
        """What lies there may have become another object: then no patience helps."""
        with suppress(StoreError):
            there = self._store.stat(part.key).bytes
            if there != part.bytes:
                raise UnusableError(f"{part.name} has {there:,} bytes in the mirror, not {part.bytes:,}")

    def _count(self, kept: int = 0, came: int = 0) -> bool:
        """True when so much came since the last time that it should go to the disk."""
        with self._lock:
            self._progress.kept += kept
            self._progress.came += came
            due = self._progress.came - self._synced >= SYNC_BYTES
            if due:
                self._synced = self._progress.came
            return due

    def _go_on(self) -> None:
        if self._patience.stop.is_set():
            raise StoppedError


def _holds(descriptor: int, part: Part, index: int, start: int, end: int) -> bool:
    if part.chunks:
        return hashlib.sha256(os.pread(descriptor, end - start, start)).hexdigest() == part.chunks[index]
    try:
        return os.lseek(descriptor, start, os.SEEK_HOLE) >= end
    except OSError:
        return False  # a disk that can't tell


def held_bytes(folder: Path) -> int:
    """Of the disk, by the files of a folder: what lies there already needs no room."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return sum(512 * path.lstat().st_blocks for path in files)


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """What the disk does not let us do, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RefusedError(
                f"{folder.parent}: the disk became full while fetching; {folder.name} there keeps what came: "
                "free some and run the same command again"
            ) from None
        where = error.filename or folder
        raise UserError(
            f"{where}: can't be written ({error.strerror}); see --run-dir and --ckpt-dir"
        ) from None
