"""The trash of a mirror: `trash/<run>-<time>.json` holds the head that a run had; its objects stay in place.

To throw a run away is one swap of its head, so no writer can publish over it, and a live one is never thrown
away by mistake: its next sign of life would change the version that the swap names. A new run may take the
name at once; it writes under epochs of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.head import TRASH, Head, Writer, decode, encode
from x1_pretrain.mirror.heads import head_key, look, run_names, silence_s, write
from x1_pretrain.mirror.leftovers import leftovers, paths
from x1_pretrain.money.clock import stamp
from x1_pretrain.records.trash import stamped
from x1_pretrain.stores.store import ChangedError, Meta, NotThereError, Store, there

GOING = ".going"  # an entry that is being deleted: it can't come back any more
LOST = "lost"  # rows of writers that had lost their place


@dataclass(frozen=True)
class Thrown:
    """One run in a mirror's trash."""

    key: str  # of its entry
    head: Head
    meta: Meta

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def entry(self) -> str:
        """x1-50m-20261121T130000Z"""
        return self.key.removeprefix(f"{TRASH}/").removesuffix(".json").removesuffix(f".json{GOING}")

    @property
    def going(self) -> bool:
        return self.key.endswith(GOING)


# -----------------------------------------------------------------------------------------------------------
# In


def refuse_alive(store: Store, head: Head, meta: Meta) -> None:
    """RefusedError if a trainer may be publishing the run now."""
    if head.writer.state != "writing":
        return
    silence = silence_s(store, meta)
    if silence is None or silence <= head.writer.stale_s:
        seen = "a moment ago" if silence is None else f"{max(0.0, silence):.0f} s ago"
        writer = head.writer
        raise RefusedError(
            f"{store.label}/{head.name}: is being trained on {writer.host} (process {writer.pid}), last sign "
            f"of life {seen}; end that first"
        )


def throw_away(store: Store, head: Head, etag: str, now: datetime, by: str) -> str:
    """Move a mirrored run to the trash; the key of its entry. RefusedError if it changed since it was read.

    The entry is written first: a kill in between leaves a run that is there, and an entry that says no more
    than its head does, which the next `gc` removes."""
    writer = replace(
        head.writer,
        beat=head.writer.beat + 1,
        state="trashed",
        why=f"moved to the trash on {by}",
    )
    gone = replace(head, writer=writer, trashed_utc=stamp(now))
    data = encode(gone)
    key = _put_entry(store, stamped(head.name, now), encode(replace(gone, writer=head.writer)))
    try:
        store.swap(head_key(head.name), data, etag)
    except ChangedError:
        if not _is_there(store, head.name, data):  # else it was ours, and only the answer was lost
            store.delete([key])
            raise RefusedError(
                f"{store.label}/{head.name}: was written while it was to be moved to the trash; look "
                "again with `x1 runs`"
            ) from None
    return key


def _put_entry(store: Store, called: str, data: bytes) -> str:
    number, key = 1, f"{TRASH}/{called}.json"
    while not _made(store, key, data):
        number += 1
        key = f"{TRASH}/{called}-{number}.json"
    return key


def _made(store: Store, key: str, data: bytes) -> bool:
    """False where it is there, also of one who was faster."""
    if store.conditional:
        try:
            store.create(key, data)
        except ChangedError:
            return False
        return True
    if there(store, key):
        return False
    store.put(key, data)
    return True


def _is_there(store: Store, name: str, data: bytes) -> bool:
    try:
        return store.get(head_key(name))[0] == data
    except NotThereError:
        return False


# -----------------------------------------------------------------------------------------------------------
# There


def thrown(store: Store) -> tuple[list[Thrown], list[str]]:
    """What is in the trash, the newest first, with what a killed `gc` left half deleted; and a line for each
    entry that can't be read, which nothing here touches."""
    found, trouble = [], []
    for name in store.names(TRASH):
        if not name.endswith((".json", f".json{GOING}")):
            continue
        key = f"{TRASH}/{name}"
        try:
            data, meta = store.get(key)
            found.append(Thrown(key, decode(data, f"{store.label}/{key}"), meta))
        except NotThereError:
            continue  # restored, or gone, in this moment
        except RefusedError as error:
            trouble.append(str(error))
    return sorted(found, key=lambda one: (one.meta.modified, one.key), reverse=True), trouble


def find(store: Store, text: str) -> list[Thrown]:
    """The entries that `text` means: a run's name or id, or an entry's name."""
    known = [one for one in thrown(store)[0] if not one.going]
    return [one for one in known if text in (one.entry, one.name, one.head.run_id, one.key)]


# -----------------------------------------------------------------------------------------------------------
# Out


def put_back(store: Store, one: Thrown, by: str) -> None:
    """The run is in the mirror again, given back by its writer. RefusedError if another has its name now."""
    found = look(store, one.name)
    if found is not None and not found[0].trashed:
        raise RefusedError(
            f"{store.label}/{one.name}: a run of this name is there again; move that to the trash first "
            f"(`x1 runs rm {store.label}/{one.name}`)"
        )
    _refuse_incomplete(store, one)
    if not there(store, one.key):
        raise RefusedError(
            f"{store.label}/{one.key}: is being deleted, or was restored; look again (`x1 runs`)"
        )
    epoch = max(one.head.writer.epoch, found[0].writer.epoch if found else 0)
    writer = replace(one.head.writer, epoch=epoch, state="released", why=_why(one, by))
    data = encode(replace(one.head, writer=writer, trashed_utc=None))
    try:
        write(store, one.name, data, found and found[1].etag)
    except ChangedError:
        if not _is_there(store, one.name, data):
            raise RefusedError(
                f"{store.label}/{one.name}: was written while it was to be restored; look again (`x1 runs`)"
            ) from None
    store.delete([one.key])


def _why(one: Thrown, by: str) -> str:
    """What it was before stays said: a finished run is finished."""
    return one.head.writer.why or f"restored from the trash on {by}"


def _refuse_incomplete(store: Store, one: Thrown) -> None:
    """Somebody may have deleted objects by hand."""
    for checkpoint in one.head.checkpoints[-1:]:
        if not there(store, f"{one.name}/{checkpoint.path}/manifest.json"):
            raise RefusedError(
                f"{store.label}/{one.key}: its newest checkpoint (step {checkpoint.step}) is no longer in "
                "the mirror; it can't be restored"
            )


# -----------------------------------------------------------------------------------------------------------
# For good


@dataclass(frozen=True)
class Doomed:
    """What `gc` would delete of one run, or of what uploads left behind."""

    name: str
    what: str  # for people: an entry's name, or "left by earlier writers"
    keys: tuple[str, ...]
    bytes: int
    entry: Thrown | None = None


def doomed(store: Store, now: datetime, older_than_s: float) -> tuple[list[Doomed], list[str]]:
    """All that may go: expired runs in the trash, and objects that no head names, of writers that are gone.
    And a line for each run that can't be judged: of such nothing goes.

    Ages are by the store's own clock: `now` is that."""
    entries, trouble = thrown(store)
    heads: dict[str, Head | None] = {}
    for name in dict.fromkeys([*(one.name for one in entries), *run_names(store)]):
        try:
            heads[name] = (look(store, name) or (None,))[0]
        except RefusedError as error:
            trouble.append(str(error))
    goes = [
        one for one in entries if one.name in heads and (one.going or _older(one.meta, now, older_than_s))
    ]
    stays = [one for one in entries if one not in goes]
    found: list[Doomed] = []
    for one in goes:
        taken = {key for other in found for key in other.keys}
        found.append(_of_entry(store, one, heads[one.name], stays, taken))
    for head in heads.values():
        if head and (left := _left_behind(store, head, entries, now, older_than_s)) is not None:
            found.append(left)
    return found, trouble


def clean(store: Store, head: Head) -> list[Meta]:
    """As the writer that `head` names, what those before it sent and never published, or dropped and had no
    time to delete: what went. Nothing goes if an entry of the trash can't be read."""
    entries, trouble = thrown(store)
    gone = [] if trouble else _left_over(store, head, entries, head.writer.epoch)
    store.delete(one.key for one in gone)
    return gone


def _left_over(store: Store, head: Head, entries: Iterable[Thrown], before_epoch: int) -> list[Meta]:
    """A writer that lost its place may still be sending such objects: no head will ever name them."""
    heads = [head, *(one.head for one in entries if one.name == head.name)]
    return list(leftovers(list(store.below(head.name)), head, heads, before_epoch))


def _older(meta: Meta, now: datetime, older_than_s: float) -> bool:
    return (now - meta.modified).total_seconds() > older_than_s


def spaces(head: Head) -> set[str]:
    """The folders of objects that a head's writers had, or that it names."""
    own = {one.space for one in head.epochs} | {head.writer.space}
    return own | {path.partition("/")[0] for path in paths(head)}


def _of_entry(
    store: Store, one: Thrown, live: Head | None, stays: Iterable[Thrown], taken: Collection[str]
) -> Doomed:
    """The objects of a run in the trash; those that the head of today, or an entry that stays, has are not
    its own: then it was restored, and a kill left the entry."""
    kept = spaces(live) if live and not live.trashed else set()
    kept |= {space for other in stays if other.name == one.name for space in spaces(other.head)}
    found: dict[str, int] = {}
    for space in sorted(spaces(one.head) - kept):
        for place in (f"{one.name}/{space}", f"{one.name}/{LOST}/{space}"):
            found |= {meta.key: meta.bytes for meta in store.below(place) if meta.key not in taken}
    return Doomed(one.name, one.entry, tuple(found), sum(found.values()), one)


def _left_behind(
    store: Store, head: Head, entries: Sequence[Thrown], now: datetime, older_than_s: float
) -> Doomed | None:
    """What earlier writers sent and never published, or what was dropped and not deleted. Nothing of the
    writer of today, nothing that a head or the trash names, and no rows that were set apart."""
    last = head.writer.epoch if head.writer.state == "writing" else head.writer.epoch + 1
    kept = {space for one in entries if one.name == head.name for space in spaces(one.head)}
    found = {
        meta.key: meta.bytes
        for meta in _left_over(store, head, entries, last)
        if meta.key.split("/")[1] not in kept and _older(meta, now, older_than_s)
    }
    if not found:
        return None
    return Doomed(head.name, "left by earlier writers", tuple(found), sum(found.values()))


def delete(store: Store, one: Doomed) -> None:
    """For good. An entry is first renamed: what is half deleted can't be restored. Then the head is written
    anew: who saw the entry before that can't restore it either. Of what was restored until then nothing goes.
    """
    if one.entry is None:
        return store.delete(one.keys)
    going = one.entry.key if one.entry.going else f"{one.entry.key}{GOING}"
    if not one.entry.going:
        if not there(store, one.entry.key):
            return None
        store.put(going, encode(one.entry.head))
        store.delete([one.entry.key])
        store.close()  # some stores do it only then
    _forget(store, one.entry)
    found = look(store, one.name)
    kept = spaces(found[0]) if found and not _is_of(found[0], one.entry) else set()
    store.delete(key for key in one.keys if kept.isdisjoint(key.split("/")[1:3]))
    return store.delete([going])


def _is_of(head: Head, one: Thrown) -> bool:
    """Whether the run is in the trash since then."""
    return head.trashed and head.trashed_utc == one.head.trashed_utc


def _forget(store: Store, one: Thrown) -> None:
    """The head of a run that is gone keeps the count of its epochs, and nothing else; that of a later one in
    the trash stays what it is, as another version. A live one is left alone; so is one that changes now."""
    found = look(store, one.name)
    head = found[0] if found else replace(one.head, writer=replace(one.head.writer, state="trashed"))
    if not head.trashed:
        return
    old = head.writer
    if _is_of(head, one):
        old = Writer(old.epoch, old.token, "", old.host, old.pid, old.since_utc, old.beat, state="trashed")
        head = Head(one.name, old, trashed_utc=one.head.trashed_utc)
    with suppress(ChangedError):
        again = replace(head, writer=replace(old, beat=old.beat + 1))
        write(store, one.name, encode(again), found and found[1].etag)
