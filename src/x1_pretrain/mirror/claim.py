"""How a session becomes the writer of a mirrored run: at once where nobody is, never over one who lives.

No two machines' clocks are ever compared. How long a holder has been silent is either the store's own clock
against the time the store gave its head, or how long this process has watched that head stay the same.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror import lease_words
from x1_pretrain.mirror.head import Epoch, Head, Writer, encode
from x1_pretrain.mirror.heads import decoded, read, silence_s, write
from x1_pretrain.stores.store import ChangedError, Meta, Store, UnreachableError

UNSAID = (
    1 << 53
) - 1  # from_step of a writer that has not said yet where it went on: it branched off nothing
PATIENCE_S = 60.0  # a claim outlasts a store that is away for so long
TRIES = 10  # of a claim, each after somebody else was faster
LIVES = 2  # times its stale_s (3 min): by then a machine that was told to be lost is off, or is not lost

Wanted = Literal["any", "there", "absent"]


class HeldError(RefusedError):
    """Another session trains this run, and lives."""


@dataclass(frozen=True)
class Me:
    """Who claims. `folder` tells run folders apart: see `folder_mark`."""

    name: str
    folder: str
    host: str
    pid: int
    stale_s: float = 90.0
    unattended: bool = False  # nobody would start it again: a holder that may yet die is watched on

    def patience_s(self, holder: Writer) -> float:
        """For so long a holder has to give signs of life until it is one that lives."""
        return LIVES * holder.stale_s if self.unattended else 0.0


def folder_mark(kept_id: str, host: str, inode: int) -> str:
    """Of a run folder: another one for a copy of it and on another machine, where the lock of the run folder
    says nothing about who else trains."""
    return hashlib.sha256(f"{kept_id}/{host}/{inode}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Decision:
    do: Literal["claim", "wait", "held"]
    wait_s: float = 0.0  # as long as nothing changes


def decide(head: Head | None, silent_s: float, lived_s: float | None, me: Me) -> Decision:
    """What to do about the head as it is. `silent_s`: it has certainly been unchanged for so long; `lived_s`:
    for so long after we first saw its writer that one certainly lived; None if nobody wrote since then."""
    if head is None or head.writer.state != "writing":
        return Decision("claim")
    holder = head.writer
    if holder.folder == me.folder:  # its flock is ours: that session is over
        return Decision("claim")
    if silent_s > holder.stale_s:  # its word, not ours: it beats as often as it promised
        return Decision("claim")
    if lived_s is not None and lived_s >= me.patience_s(holder):
        return Decision("held")
    return Decision("wait", holder.stale_s - silent_s)


def claimed(head: Head | None, me: Me, token: str, now_utc: str) -> Head:
    """The head with `me` as its next writer. Of a run in the trash only the count of epochs is kept."""
    epoch = head.writer.epoch + 1 if head else 1
    if head is None or head.trashed:
        head = Head(me.name, Writer(0, "", "", "", 0, ""))
    writer = Writer(epoch, token, me.folder, me.host, me.pid, now_utc, 0, now_utc, me.stale_s)
    row = Epoch(epoch, token, me.host, now_utc, UNSAID)
    return replace(head, writer=writer, epochs=[*head.epochs, row])


def poll_s(stale_s: float) -> float:
    """Between two looks at a silent holder."""
    return min(5.0, max(0.05, stale_s / 10))


@dataclass(frozen=True)
class Won:
    """A claim that is in the store."""

    data: bytes
    etag: str
    over: Head | None
    down_s: float | None  # the writer before had been silent for so long, by the store's clock


@dataclass
class Watch:
    """The head as it was at the last look, and how long it has been so."""

    store: Store
    name: str
    steady: Callable[[], float]
    head: Head | None = None
    meta: Meta | None = None
    data: bytes = b""
    looks: int = 0
    lived_s: float | None = None  # its writer, at least; None: nobody wrote since the first look
    silent_s: float = 0.0  # at least
    down_s: float | None = None  # by the store's clock
    _since: float = 0.0
    _met: float = 0.0  # its writer
    _asked: float = 0.0  # the last look

    @property
    def etag(self) -> str | None:
        return self.meta.etag if self.meta else None

    def look(self) -> None:
        asked, before, known = self.steady(), self.head, self.etag
        self.data, self.meta = read(self.store, self.name) or (b"", None)
        self.head = decoded(self.store, self.name, self.data) if self.meta else None
        if not self.looks or self.etag != known:
            self._since = self.steady()  # it has been so since this answer at the latest
            if before is None or self.head is None or before.writer.token != self.head.writer.token:
                self._met = self._since
            if self.looks:  # written after the last look was asked for, at the earliest
                self.lived_s = max(0.0, self._asked - self._met)
            self.looks += 1
        self._asked = asked
        self.down_s = silence_s(self.store, self.meta) if self.meta else None
        self.silent_s = max(self.down_s or 0.0, asked - self._since)


@dataclass
class Claim:
    """The way from a first look to the lease, or to a refusal."""

    store: Store
    me: Me
    sleep: Callable[[float], None]
    steady: Callable[[], float]
    now_utc: Callable[[], str]
    say: Callable[[str], None]
    wanted: Wanted = "any"
    _sent: dict[str, Won] = field(default_factory=dict)  # by hash, without etag: any may be in the store
    _told: bool = False
    _away_since: float | None = None
    _tries: int = 0

    def win(self) -> Won:
        watch = Watch(self.store, self.me.name, self.steady)
        while True:
            try:
                won = self._step(watch)
            except UnreachableError:
                if not watch.looks or self._away_for_s() > PATIENCE_S:
                    raise
                self.sleep(poll_s(self.me.stale_s))
                continue
            if won:
                return won

    def _step(self, watch: Watch) -> Won | None:
        """One look, and what follows from it; None: look again."""
        watch.look()
        sent = self._sent.get(hash_of(watch.data))
        if watch.meta and sent:  # it did go through
            return replace(sent, etag=watch.meta.etag)
        check_wanted(self.store, self.me.name, watch.head, self.wanted)
        decision = decide(watch.head, watch.silent_s, watch.lived_s, self.me)
        if decision.do == "claim":
            return self._try(watch)
        assert watch.head is not None
        if decision.do == "held":
            raise HeldError(lease_words.held(self.store, watch.head, watch.down_s))
        self._wait(watch.head, watch.silent_s, decision.wait_s)
        return None

    def _try(self, watch: Watch) -> Won | None:
        token = secrets.token_hex(4)  # another one each time: an earlier try may have been in the store
        data = encode(claimed(watch.head, self.me, token, self.now_utc()))
        sent = self._sent[hash_of(data)] = Won(data, "", watch.head, watch.down_s)
        try:
            return replace(sent, etag=write(self.store, self.me.name, data, watch.etag))
        except ChangedError as error:  # by another one, or by ourselves: the next look tells
            self._tries += 1
            if self._tries == TRIES:
                raise RefusedError(
                    f"{self.me.name}: its mirror could not be claimed in {TRIES} tries ({error}); start again"
                ) from None
            self.sleep(poll_s(self.me.stale_s) * (self._tries - 1) / TRIES)
            return None

    def _wait(self, head: Head, silent_s: float, wait_s: float) -> None:
        self._away_since = None
        if not self._told:
            patience_s = self.me.patience_s(head.writer)
            self.say(lease_words.waiting(head, silent_s, wait_s, patience_s))
            self._told = True
        self.sleep(min(poll_s(head.writer.stale_s), wait_s + 0.01))

    def _away_for_s(self) -> float:
        """How long the store has been away, after it was there."""
        now = self.steady()
        self._away_since = now if self._away_since is None else self._away_since
        return now - self._away_since


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_wanted(store: Store, name: str, head: Head | None, wanted: Wanted) -> None:
    there = head is not None and not head.trashed
    if wanted == "there" and not there:
        raise RefusedError(lease_words.not_there(store, name, trashed=head is not None))
    if wanted == "absent" and there:
        raise RefusedError(lease_words.there_already(store, name))


def say_or_refuse(store: Store, name: str, without_lease: bool, say: Callable[[str], None]) -> None:
    """A store that can't keep two writers apart."""
    if not without_lease:
        raise RefusedError(lease_words.no_lease(store, name))
    say(lease_words.at_own_risk(store, name))
