"""Reading from a store that may be away for a while: tried again, less and less often, until too long."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from x1_pretrain.errors import INTERRUPTED, UserError
from x1_pretrain.mirror.head import Object
from x1_pretrain.mirror.store import NotThereError, Store, UnreachableError

T = TypeVar("T")

PATIENCE_S = 300.0  # without a byte for so long: the store is away
LONGEST_WAIT_S = 15.0
LANES = 8  # reads at the same time
TELL_S = 1.0  # between two words on how far it is
FETCHES = 2  # of a piece that does not match its hash


class UnusableError(Exception):
    """What the mirror says it has is gone, or is not what was sent; trying again will not help."""


class AwayError(UserError):
    """The store does not answer. What was fetched stays: the same command goes on from there."""

    exit_code = INTERRUPTED


class StoppedError(Exception):
    """Another lane failed, or nobody wants it any more."""


class Patience:
    """Shared by all that read at the same time: one byte for one of them is a sign of life for all."""

    def __init__(
        self,
        limit_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        stop: threading.Event | None = None,
    ) -> None:
        self.stop = stop or threading.Event()
        self._limit_s, self._clock = limit_s, clock
        self._alive = clock()
        self.trouble = ""  # why nothing comes now

    def came(self) -> None:
        self._alive, self.trouble = self._clock(), ""

    def wait(self, error: UnreachableError, failures: int) -> None:
        """Before the next try; AwayError once it is too long."""
        silent_s = self._clock() - self._alive
        if silent_s > self._limit_s:
            raise AwayError(
                f"{error}; nothing came for {silent_s:.0f} s; what was fetched is kept: run the same command "
                "again once the store answers"
            ) from None
        self.trouble = str(error)
        pause = min(LONGEST_WAIT_S, 0.1 * 2 ** min(failures, 10))
        if self.stop.wait(pause * random.uniform(0.5, 1.0)):
            raise StoppedError from None

    def ask(self, call: Callable[[], T]) -> T:
        """What `call` asks of the store, sooner or later."""
        failures = 0
        while True:
            try:
                found = call()
            except UnreachableError as error:
                failures += 1
                self.wait(error, failures)
                continue
            self.came()
            return found


def get_verified(store: Store, key: str, sha256: str, patience: Patience) -> bytes:
    """A small object that must have this hash."""
    for _ in range(FETCHES):
        try:
            data, _meta = patience.ask(lambda: store.get(key))
        except NotThereError:
            raise UnusableError(f"{key} is not in the mirror any more") from None
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise UnusableError(f"{key} does not match its hash")


def in_lanes(
    jobs: Sequence[Callable[[], T]], stop: threading.Event, tell: Callable[[], None], lanes: int = LANES
) -> list[T]:
    """What each job gives, in their order. The first failure, or what `tell` raises, ends the others; all
    are over when this returns."""
    first: list[BaseException] = []

    def do(job: Callable[[], T]) -> T:
        try:
            return job()
        except BaseException as error:
            first.append(error)  # before the others hear of it and fail as well
            stop.set()
            raise

    pool = ThreadPoolExecutor(lanes, thread_name_prefix="x1-fetch")
    try:
        futures = [pool.submit(do, job) for job in jobs]
        left = set(futures)
        while left:
            _, left = wait(left, timeout=TELL_S, return_when=FIRST_EXCEPTION)
            if first:
                raise first[0]
            if left:
                tell()
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def get_object(store: Store, run: str, item: Object, patience: Patience) -> bytes:
    return get_verified(store, f"{run}/{item.path}", item.sha256, patience)
