"""How fast the checkpoint folder really takes and gives bytes, and how much room it has. No torch.

The write counts only once it is on the disk (fsync). The read goes around the page cache: O_DIRECT where the
file system has it, else the cache is asked to drop the file first. The bytes are random: some disks compress.
"""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

CHUNK = 8 << 20
PREFIX = ".x1-doctor-"  # and the number of the process
MOST_BYTES = 512 << 20
SHARE_OF_FREE = 10  # never more than a tenth of what is free
NETWORK = ("nfs", "cifs", "smb", "sshfs", "9p", "ceph", "gluster", "lustre", "gpfs", "beegfs", "s3", "gcs")

Clock = Callable[[], float]


@dataclass(frozen=True)
class Disk:
    """What was measured; rates None where the file system is too full to try."""

    folder: str  # the one tried: the wanted one, or the nearest that exists above it
    free_bytes: int
    file_system: str  # its type; empty: not known
    write_bytes_per_sec: float | None = None
    read_bytes_per_sec: float | None = None
    tried_bytes: int = 0
    uncached: str = ""  # how the read went around the page cache
    trouble: str | None = None


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: nothing is made by looking."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def look(folder: Path, limit_s: float, clock: Clock = time.perf_counter) -> Disk:
    """Write for a third of the time, read for a third; the file has no name by then."""
    place = existing(folder)
    free = shutil.disk_usage(place).free
    facts = Disk(str(place), free, file_system(place))
    most = min(MOST_BYTES, free // SHARE_OF_FREE) // CHUNK * CHUNK
    if most < CHUNK:
        return facts
    remove_old(place)
    try:
        with _nameless(place / f"{PREFIX}{os.getpid()}") as (writer, readers):
            written, write_s = _write(writer, most, limit_s / 3, clock)
            read, read_s, how = _read(readers, limit_s / 3, clock)
    except OSError as error:
        return Disk(str(place), free, facts.file_system, trouble=f"{error.strerror or error}")
    rates = written / max(write_s, 1e-9), read / max(read_s, 1e-9)
    return Disk(str(place), free, facts.file_system, *rates, written, how)


def remove_old(folder: Path) -> None:
    """What a doctor that was killed left, where its process is gone."""
    for file in folder.glob(f"{PREFIX}*"):
        pid = file.name.removeprefix(PREFIX)
        if pid.isdecimal() and len(pid) < 10 and file.is_file() and not psutil.pid_exists(int(pid)):
            with suppress(OSError):
                file.unlink()


@contextmanager
def _nameless(file: Path) -> Iterator[tuple[int, tuple[int | None, int]]]:
    """Descriptors to write and to read `file`: around the page cache (None: not to be had) and through it.
    The name goes at once: however the doctor ends, the room comes back."""
    with ExitStack() as stack:

        def opened(flags: int) -> int:
            descriptor = os.open(file, flags, 0o600)
            stack.callback(os.close, descriptor)
            return descriptor

        file.unlink(missing_ok=True)  # of an earlier process with this number
        try:
            writer, direct = opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL), None
            with suppress(OSError):  # tmpfs and some network mounts have no O_DIRECT
                direct = opened(os.O_RDONLY | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
            reader = opened(os.O_RDONLY)
        finally:
            with suppress(OSError):  # a mount that keeps the name of an open file: once more below
                file.unlink(missing_ok=True)
        try:
            yield writer, (direct, reader)
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _write(descriptor: int, most: int, limit_s: float, clock: Clock) -> tuple[int, float]:
    """Bytes and seconds. Each round is followed by an fsync, so that the limit is one of real work."""
    noise = os.urandom(CHUNK)
    written, begun = 0, clock()
    while written < most and clock() - begun < limit_s:
        for _ in range(min(8, (most - written) // CHUNK)):
            _write_all(descriptor, noise)
            written += CHUNK
        os.fsync(descriptor)
    return written, clock() - begun


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(readers: tuple[int | None, int], limit_s: float, clock: Clock) -> tuple[int, float, str]:
    """Bytes, seconds, and how the cache was avoided."""
    direct, reader = readers
    if direct is not None:
        with suppress(OSError):  # some file systems open so, and then can't read
            return (*_read_chunks(direct, limit_s, clock), "O_DIRECT")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
    return (*_read_chunks(reader, limit_s, clock), "cache asked to drop it")


def _read_chunks(descriptor: int, limit_s: float, clock: Clock) -> tuple[int, float]:
    with mmap.mmap(-1, CHUNK) as buffer:  # aligned to a page, as O_DIRECT wants it
        total, begun = 0, clock()
        while (got := os.readv(descriptor, [buffer])) > 0:
            total += got
            if clock() - begun > limit_s:
                break
        return total, clock() - begun


def file_system(folder: Path) -> str:
    """The type of the mount that holds `folder`."""
    holding = [
        part
        for part in psutil.disk_partitions(all=True)
        if folder == Path(part.mountpoint) or Path(part.mountpoint) in folder.parents
    ]
    return str(max(holding, key=lambda part: len(part.mountpoint)).fstype) if holding else ""


def is_network(file_system: str) -> bool:
    return any(name in file_system.lower() for name in NETWORK)
