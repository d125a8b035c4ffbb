"""Reading from a store that may be away for a while: tried again, less and less often, until too long."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from itertools import accumulate
from typing import TypeVar

from x1_pretrain.errors import INTERRUPTED, UserError
from x1_pretrain.mirror.head import Object
from x1_pretrain.stores.store import NotThereError, Store, UnreachableError

T = TypeVar("T")

PATIENCE_S = 300.0  # without a byte for so long: the store is away
LONGEST_WAIT_S = 15.0
LANES = 8  # reads at the same time
AT_ONCE_BYTES = 384 << 10  # of an object that is read whole, in LANES at 0.2 MB/s
TELL_S = 1.0  # between two words on how far it is
AGAIN_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # before what is not there, or damaged, is asked for again


class UnusableError(Exception):
    """What the mirror says it has is not there, or is not what was sent. A gateway says so now and then of
    what is whole: only after it said so for a while it is so."""


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
        again_s: Sequence[float] | None = None,
    ) -> None:
        self.stop = stop or threading.Event()
        self._limit_s, self._clock = limit_s, clock
        usual = [pause for pause, total in zip(AGAIN_S, accumulate(AGAIN_S), strict=True) if total <= limit_s]
        self._again_s = usual if again_s is None else again_s
        self._alive = clock()
        self.trouble = ""  # why nothing comes now

    def came(self) -> None:
        self._alive, self.trouble = self._clock(), ""

    def said(self, text: str) -> str:
        """With what is waited for, if anything is."""
        return f"{text}; waiting: {self.trouble}" if self.trouble else text

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

    def insist(self, attempt: Callable[[], T], hurry: bool = False) -> T:
        """What `attempt` gives, tried again for about a minute while it finds UnusableError; in a `hurry`
        once more."""
        for pause_s in self._again_s[: 1 if hurry else None]:
            try:
                return attempt()
            except UnusableError as error:
                self._pause(pause_s, f"{error}; asking again")
        return attempt()

    def _pause(self, seconds: float, why: str) -> None:
        """The others may read meanwhile, and nobody else says then what is waited for."""
        while seconds > 0:
            self._alive, self.trouble = self._clock(), why  # it answers
            if self.stop.wait(min(seconds, TELL_S)):
                raise StoppedError
            seconds -= TELL_S


def get_verified(
    store: Store, key: str, sha256: str, patience: Patience, hurry: bool = False, size: int = 0
) -> bytes:
    """An object that must have this hash; a large one, of this `size`, in several reads."""

    def attempt() -> bytes:
        try:
            if size <= AT_ONCE_BYTES or patience.ask(lambda: store.stat(key)).bytes != size:
                data, _ = patience.ask(lambda: store.get(key))
            else:
                ends = [(at, min(size, at + AT_ONCE_BYTES)) for at in range(0, size, AT_ONCE_BYTES)]
                data = b"".join(patience.ask(partial(store.read, key, *one)) for one in ends)
        except NotThereError:
            raise UnusableError(f"{key} is not in the mirror any more") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UnusableError(f"{key} does not match its hash")
        return data

    return patience.insist(attempt, hurry)


def told(call: Callable[[], T], patience: Patience, what: str, say: Callable[[str], None]) -> T:
    """What `call` gives, with a word each second on what it waits for."""
    return in_lanes([call], patience.stop, lambda: say(patience.said(f"fetching the {what}")))[0]


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


def get_object(store: Store, run: str, item: Object, patience: Patience, hurry: bool = False) -> bytes:
    return get_verified(store, f"{run}/{item.path}", item.sha256, patience, hurry, item.bytes)
