"""Sending files: read once, hashed as they are read, no faster than allowed, ended at a word."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from x1_pretrain.mirror.head import CHUNK_BYTES
from x1_pretrain.mirror.patience import StoppedError
from x1_pretrain.stores.store import Meta, Store, StoreError, UnreachableError

PIECE_BYTES = 1 << 20  # in memory at a time, for each file that is sent


class OtherContentError(Exception):
    """A local file is not what its manifest says."""


class Rate:
    """A token bucket over bytes, for several threads. Small things never wait, but are counted."""

    def __init__(
        self,
        bytes_per_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.sent_bytes = 0
        self._limit, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._free_at = clock()  # when what was taken so far has been paid for
        self._lock = threading.Lock()

    def count(self, size: int) -> float:
        """Take `size` bytes without waiting; how long one should wait for them."""
        with self._lock:
            self.sent_bytes += size
            if not self._limit:
                return 0.0
            now = self._clock()
            self._free_at = max(self._free_at, now) + size / self._limit
            return self._free_at - now

    def take(self, size: int, stop: Callable[[], bool]) -> None:
        """Wait until `size` bytes may be sent."""
        left = self.count(size)
        until = self._clock() + left
        while (left := until - self._clock()) > 0:
            if stop():
                raise StoppedError
            self._sleep(min(left, 0.5))


@dataclass(frozen=True)
class Content:
    """What was read of a file."""

    bytes: int
    sha256: str
    chunks: list[str]  # sha256 of each CHUNK_BYTES


class Sender:
    """One thread that sends large files, as those who wait for them see it."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.busy = False
        self.error: StoreError | None = None  # of the last try
        self.failing = False  # nothing has arrived whole since the last error
        self.arrived = 0  # files
        self._on_change = on_change
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def _start(self, work: Callable[[], bool], name: str) -> None:
        """`work` says whether something is there now; whoever is woken by that finds nobody busy."""
        self.error, self.busy = None, True
        thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # of this machine's limits: tried again
            self.error, self.failing, self.busy = UnreachableError(f"nothing is sent: {error}"), True, False
        else:
            self._thread = thread

    def _run(self, work: Callable[[], bool]) -> None:
        arrived = False
        try:
            arrived = work()
        finally:
            self.busy = False
        if arrived:
            self._on_change()

    def stop(self) -> None:
        self._stop.set()

    def wait(self, within_s: float) -> None:
        if self._thread:
            self._thread.join(max(0.0, within_s))


class Hashed:
    """The bytes of an open file in pieces, hashed on the way: the whole, and each chunk."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._read = file, size, 0
        self._whole, self._chunk = hashlib.sha256(), hashlib.sha256()
        self._chunks: list[str] = []

    def pieces(self) -> Iterator[bytes]:
        """No piece crosses the end of a chunk. A file that became shorter is other content."""
        self._file.seek(0)
        while self._read < self._size:
            piece = self._file.read(min(PIECE_BYTES, self._size - self._read))
            if not piece:
                raise OtherContentError(f"has {self._read} bytes, not {self._size}")
            self._whole.update(piece)
            self._chunk.update(piece)
            self._read += len(piece)
            if self._read % CHUNK_BYTES == 0:
                self._end_chunk()
            yield piece
        if self._read % CHUNK_BYTES:
            self._end_chunk()

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk = hashlib.sha256()

    def content(self) -> Content:
        """Of what `pieces` gave; call it after the last one."""
        return Content(self._read, self._whole.hexdigest(), self._chunks)


def hash_file(file: BinaryIO, stop: Callable[[], bool]) -> Content:
    hashed = Hashed(file, os.fstat(file.fileno()).st_size)
    for _ in hashed.pieces():
        if stop():
            raise StoppedError
    return hashed.content()


def send_file(store: Store, key: str, file: BinaryIO, rate: Rate, stop: Callable[[], bool]) -> Content:
    """Send an open file, whole. UnreachableError if the store then has another size."""
    size = os.fstat(file.fileno()).st_size
    hashed, ended = Hashed(file, size), []

    def paced() -> Iterator[bytes]:
        try:
            for piece in hashed.pieces():
                if stop():
                    raise StoppedError
                rate.take(len(piece), stop)
                yield piece
        except (StoppedError, OtherContentError, OSError) as error:
            ended.append(error)
            raise

    try:
        sent = store.put_stream(key, paced(), size)
    except Exception:
        if ended:  # ours, whatever the store made of it
            raise ended[0] from None
        raise
    check_size(store, sent, size)
    return hashed.content()


def check_size(store: Store, sent: Meta, size: int) -> None:
    if sent.bytes != size:
        raise UnreachableError(f"{store.label}/{sent.key}: has {sent.bytes} bytes after {size} were sent")
