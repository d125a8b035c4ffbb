"""Holding a lease while other things go on: a thread that gives a sign of life when nothing else did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.stores.store import StoreError

T = TypeVar("T")

BEATS = 4  # signs of life in the time after which silence means death
AGAIN_S = 2.0  # after one that failed


class Keeper:
    """A lease for several threads, renewed from one of its own until it is lost or given back.

    `lost` says that it is lost, and `on_lost` is called once when that is noticed. While the one for
    whom it is held is `asleep`, there is no sign of life: somebody else may take over.
    """

    def __init__(
        self,
        lease: Lease,
        on_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        asleep: Callable[[], bool] = lambda: False,
    ) -> None:
        self.lost: LostError | None = None
        self.lease, self._on_lost, self._clock, self._asleep = lease, on_lost, clock, asleep
        self._written_at = clock()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="x1-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _keep(self) -> None:
        every_s = self.lease.me.stale_s / BEATS
        wait_s = every_s
        while not self._end.wait(wait_s):
            due_s = self._written_at + every_s - self._clock()
            if due_s > 0:
                wait_s = due_s
                continue
            if self._asleep():
                wait_s = every_s
                continue
            try:
                self._locked(self._beat)
                wait_s = every_s
            except LostError:
                return
            except StoreError:
                wait_s = min(AGAIN_S, every_s)

    def _beat(self) -> None:
        if not self.lease.released:  # while this thread waited for its turn
            self.lease.renew()

    def _locked(self, work: Callable[[], T], beats: bool = True) -> T:
        with self._lock:
            try:
                result = work()
            except LostError as error:
                first, self.lost = self.lost is None, error
                if first:
                    self._on_lost()
                raise
            if beats:
                self._written_at = self._clock()
            return result

    @property
    def head(self) -> Head:
        return self.lease.head

    def check(self) -> None:
        """LostError if it is lost."""
        if self.lost:
            raise self.lost

    def settle(self) -> Head:
        """What is in the store, for sure."""
        self._locked(self.lease.settle, beats=False)
        return self.lease.head

    def resumed_from(self, step: int) -> None:
        with self._lock:
            self.lease.resumed_from(step)

    def publish(self, head: Head) -> Head:
        return self._locked(lambda: self.lease.publish(head))

    def release(self, why: str) -> None:
        self.stop()
        self._locked(lambda: self.lease.release(why))

    def stop(self) -> None:
        """No more signs of life; one that is under way is waited for by the next who needs the lease."""
        self._end.set()
