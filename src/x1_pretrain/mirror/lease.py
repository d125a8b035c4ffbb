"""One writer at a time: the right to publish a mirrored run, and how its holder notices that it is gone.

`head.json` is the lease. A session claims it by putting itself into the head with an epoch of its own
(claim.py); every later write is a compare-and-swap on the version that this session wrote last. So a writer
that was paused, cut off or given up for dead can't publish over its successor, however late it comes.

A swap may have gone through although it did not say so: a time-out, or a retry inside the store that met its
own first try. So what was sent is remembered by its hash, and whoever finds it in the store wrote it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror import lease_words
from x1_pretrain.mirror.claim import (
    UNSAID,
    Claim,
    Me,
    Wanted,
    hash_of,
    say_or_refuse,
)
from x1_pretrain.mirror.head import Head, State, damaged, decode, encode
from x1_pretrain.mirror.heads import read, where, write
from x1_pretrain.stores.store import ChangedError, Store, UnreachableError

TRIES = 5  # of one write, each after the head turned out to be another version of our own
GONE_S, GONE_READS = 300.0, 4  # a head that stays away, or damaged, for so long and so many reads is gone


class LostError(RefusedError):
    """This session was the writer and is so no longer; it publishes nothing more."""


@dataclass
class Lease:
    """The right to publish a run, held by this session. Used by one thread at a time."""

    store: Store
    me: Me
    now_utc: Callable[[], str]
    head: Head  # as it was last known to be published
    etag: str
    before: Head | None  # as it was found; None of a new run
    down_s: float | None  # the writer before had been silent for so long, by the store's clock
    released: bool = False
    steady: Callable[[], float] = time.monotonic
    _sent: set[str] = field(default_factory=set)  # hashes of what may be in the store and is ours
    _beat: int = 0  # of the last thing sent, whether it went through or not: no two are alike
    _doubt: bool = False  # the last write may have gone through
    _leaving: bool = False  # the run may have been given back already
    _missed: list[float] = field(default_factory=list)  # when the head could not be read, in a row

    @classmethod
    def claim(
        cls,
        store: Store,
        me: Me,
        *,
        sleep: Callable[[float], None],
        steady: Callable[[], float],
        now_utc: Callable[[], str],
        say: Callable[[str], None],
        without_lease: bool = False,
        wanted: Wanted = "any",
    ) -> Lease:
        """Become the writer, if need be after watching a silent one for as long as it may be silent.

        HeldError: another writer lives. RefusedError: the store can't keep two writers apart, or the run is
        (not) there. A store that goes away meanwhile is borne for a minute, one that is away at first is not.
        """
        if not store.conditional:
            say_or_refuse(store, me.name, without_lease, say)
        won = Claim(store, me, sleep, steady, now_utc, say, wanted).win()
        head = decode(won.data, where(store, me.name))
        lease = cls(store, me, now_utc, head, won.etag, won.over, won.down_s, steady=steady)
        lease._sent = {hash_of(won.data)}
        return lease

    @property
    def epoch(self) -> int:
        return self.head.writer.epoch

    @property
    def space(self) -> str:
        """Where this session puts its objects."""
        return f"{self.me.name}/{self.head.writer.space}"

    def resumed_from(self, step: int) -> None:
        """Training goes on from this step; published with the next head."""
        *earlier, own = self.head.epochs
        self.head = replace(self.head, epochs=[*earlier, replace(own, from_step=step)])

    def settle(self) -> None:
        """After a write of which it is not known whether it went through: find out. Then `head` is what is in
        the store. Call it before you make a new head from `head`; `publish` does it as well."""
        if not self._doubt:
            return
        data, meta = read(self.store, self.me.name) or (None, None)
        if data is None or meta is None or damaged(data):
            raise self._missing(data)
        self._missed.clear()
        if hash_of(data) not in self._sent:
            raise LostError(lease_words.lost(self.store, self.head, data))
        if meta.etag != self.etag:
            self._own(decode(data, where(self.store, self.me.name)), data, meta.etag)
        self._doubt = False

    def _missing(self, data: bytes | None) -> LostError | UnreachableError:
        """Stores say so now and then of what is there: believed once they say nothing else for long."""
        self._missed.append(self.steady())
        if len(self._missed) >= GONE_READS and self._missed[-1] - self._missed[0] >= GONE_S:
            return LostError(lease_words.lost(self.store, self.head, data))
        why = "is not there" if data is None else "came damaged"
        return UnreachableError(f"{where(self.store, self.me.name)}: {why}; asked again")

    def publish(self, new_head: Head) -> Head:
        """Put `new_head` in place of the last one; what was published, with its writer and beat, is returned.

        Everything of `new_head` counts but name, writer and epochs, which are the lease's. LostError: nothing
        was published, and never will be. Another StoreError: it may have been; the next call finds out.
        """
        assert not self.released, "the lease was given back"
        return self._put(new_head, "writing", "")

    def renew(self) -> Head:
        """A sign of life, and nothing else."""
        return self.publish(self.head)

    def release(self, why: str) -> None:
        """Give the run back: whoever comes next need not wait. May be called again after a StoreError."""
        if self.released:
            return
        try:
            self._put(self.head, "released", why)
        except LostError:
            if not self._leaving:  # else it was given back, and the next one has come already
                raise
        self.released = True

    def _put(self, new_head: Head, state: State, why: str) -> Head:
        for _ in range(TRIES):
            self.settle()
            head = self._next(new_head, state, why)
            data = encode(head)
            self._sent.add(hash_of(data))
            self._doubt = True  # until it is known, also if we are interrupted
            try:
                etag = write(self.store, self.me.name, data, self.etag)
            except ChangedError:
                continue
            except BaseException:
                self._leaving = self._leaving or state == "released"
                raise
            self._own(head, data, etag)
            return head
        raise UnreachableError(f"{where(self.store, self.me.name)}: is another version at every try")

    def _next(self, new_head: Head, state: State, why: str) -> Head:
        *_, own = self.head.epochs
        said = own.from_step != UNSAID or all(one.epoch != own.epoch for one in new_head.checkpoints)
        assert said, "a writer says where it went on (resumed_from) before it publishes a checkpoint"
        self._beat += 1
        writer = replace(self.head.writer, beat=self._beat, beat_utc=self.now_utc(), state=state, why=why)
        return replace(new_head, name=self.head.name, epochs=self.head.epochs, writer=writer)

    def _own(self, head: Head, data: bytes, etag: str) -> None:
        """This is what is in the store: whatever else was sent on top of an older version is void."""
        epochs = self.head.epochs  # they may hold a `resumed_from` that is still to be published
        self.head = replace(head, epochs=epochs)
        self.etag, self._sent, self._doubt = etag, {hash_of(data)}, False
