"""How fast the checkpoint folder really takes and gives bytes, and how much room it has. No torch.

The write counts only once it is on the disk (fsync). The read goes around the page cache: O_DIRECT where the
file system has it, else the cache is asked to drop the file first. The bytes are random: some disks compress.
"""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

CHUNK = 8 << 20
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
    """Write for a third of the time, read for a third; the file is removed."""
    place = existing(folder)
    free = shutil.disk_usage(place).free
    facts = Disk(str(place), free, file_system(place))
    most = min(MOST_BYTES, free // SHARE_OF_FREE) // CHUNK * CHUNK
    if most < CHUNK:
        return facts
    file = place / f".x1-doctor-{os.getpid()}"
    try:
        written, write_s = _write(file, most, limit_s / 3, clock)
        read, read_s, how = _read(file, limit_s / 3, clock)
    except OSError as error:
        return Disk(str(place), free, facts.file_system, trouble=f"{error.strerror or error}")
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    rates = written / max(write_s, 1e-9), read / max(read_s, 1e-9)
    return Disk(str(place), free, facts.file_system, *rates, written, how)


def _write(file: Path, most: int, limit_s: float, clock: Clock) -> tuple[int, float]:
    """Bytes and seconds. Each round is followed by an fsync, so that the limit is one of real work."""
    noise = os.urandom(CHUNK)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    written, begun = 0, clock()
    try:
        while written < most and clock() - begun < limit_s:
            for _ in range(min(8, (most - written) // CHUNK)):
                _write_all(descriptor, noise)
                written += CHUNK
            os.fsync(descriptor)
        return written, clock() - begun
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(file: Path, limit_s: float, clock: Clock) -> tuple[int, float, str]:
    """Bytes, seconds, and how the cache was avoided."""
    with suppress(OSError):  # tmpfs and some network mounts have no O_DIRECT
        return (*_read_chunks(file, getattr(os, "O_DIRECT", 0), limit_s, clock), "O_DIRECT")
    descriptor = os.open(file, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return (*_read_chunks(file, 0, limit_s, clock), "cache asked to drop it")


def _read_chunks(file: Path, flags: int, limit_s: float, clock: Clock) -> tuple[int, float]:
    descriptor = os.open(file, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, CHUNK) as buffer:  # aligned to a page, as O_DIRECT wants it
            total, begun = 0, clock()
            while (got := os.readv(descriptor, [buffer])) > 0:
                total += got
                if clock() - begun > limit_s:
                    break
            return total, clock() - begun
    finally:
        os.close(descriptor)


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
