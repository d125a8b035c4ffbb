"""Corpora of a mirror that no run there names any more, live or in the trash: found, and deleted for good.

A session names its corpora in its head before it looks whether they are there; `delete` leaves a sign at a
corpus before it looks once more who names it. So of the two one sees the other: then the corpus stays, or the
session waits and sends it anew.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.corpora import FILES, GOING, GOING_S, MANIFEST, going
from x1_pretrain.mirror.head import DATA, Head
from x1_pretrain.mirror.heads import look, run_names
from x1_pretrain.mirror.leftovers import SPACE
from x1_pretrain.mirror.trash import thrown
from x1_pretrain.money.clock import Clock
from x1_pretrain.stores.store import ChangedError, Store

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
LATE_S = GOING_S / 3  # after its sign nothing is deleted: others take the sign for one that was left behind
THEIRS = "another `x1 runs gc` deletes it, or was killed at it a moment ago"
NAMED = "a run names it by now; it stays"
LATE = "the store took too long; give `x1 runs gc` again later"


@dataclass(frozen=True)
class OldCorpus:
    place: str  # data/<fingerprint>
    names: tuple[str, ...]
    bytes: int

    @property
    def mark(self) -> str:
        return self.place.rpartition("/")[2]


def old_corpora(
    store: Store, now: datetime, older_than_s: float, without: Collection[str] = ()
) -> tuple[list[OldCorpus], list[str]]:
    """Those that nothing was sent to for so long, and a line for what keeps all of them. Entries of the trash
    with the keys `without` count as gone."""
    marks = [name for name in store.names(DATA) if FINGERPRINT.fullmatch(name)]
    old = [one for mark in marks if (one := _old(store, f"{DATA}/{mark}", now, older_than_s))]
    if not old:
        return [], []
    kept, trouble = named(store, without)
    return [one for one in old if one.mark not in kept and not trouble], trouble


def _old(store: Store, place: str, now: datetime, older_than_s: float) -> OldCorpus | None:
    """Only what a session sends: whatever else lies there is somebody's."""
    there = {meta.key.removeprefix(f"{place}/"): meta for meta in store.below(place)}
    ours = [meta for name, meta in there.items() if name in (*FILES, MANIFEST)]
    if not (ours or GOING in there) or any(
        (now - one.modified).total_seconds() <= older_than_s for one in ours
    ):
        return None
    names = tuple(name for name in there if name in (*FILES, MANIFEST))
    return OldCorpus(place, names, sum(meta.bytes for meta in ours))


def named(store: Store, without: Collection[str] = ()) -> tuple[set[str], list[str]]:
    """Fingerprints that a run was made with or mirrored, live or in the trash; and a line for each run that
    may name others. The trash is read first: what is restored meanwhile is in one of the two."""
    entries, trouble = thrown(store)
    gone = [one for one in entries if one.going or one.key in without]
    heads = [one.head for one in entries if one not in gone]
    bare = {(one.name, one.head.trashed_utc) for one in gone}
    for name in run_names(store):
        try:
            found = look(store, name)
        except RefusedError as error:
            trouble.append(str(error))
            continue
        if found and (name, found[0].trashed_utc) not in bare:
            heads.append(found[0])
        elif not found and any(map(SPACE.fullmatch, store.names(name))):
            trouble.append(f"{store.label}/{name}: has a run's objects, and its head.json was removed")
    if trouble:
        trouble.append(f"{store.label}/{DATA}: no corpus goes as long as a run there can't be read")
    return {mark for head in heads for mark in _marks(head)}, trouble


def _marks(head: Head) -> Iterable[str]:
    return [*head.fingerprints, *head.data.values()]


def delete(
    store: Store, old: Sequence[OldCorpus], steady: Callable[[], float] = Clock().steady_s
) -> tuple[list[OldCorpus], list[str]]:
    """Those that are gone for good, and a line for each that is not."""
    begun = steady()
    ours = [one for one in old if _claim(store, one)]
    names, trouble = named(store) if ours else (set(), [])
    goes = [one for one in ours if one.mark not in names and not trouble]
    trouble += [f"{store.label}/{one.place}: {THEIRS}" for one in old if one not in ours]
    trouble += [f"{store.label}/{one.place}: {NAMED}" for one in ours if one.mark in names]
    for keys in (
        [f"{one.place}/{MANIFEST}" for one in goes],  # from now on it is not whole
        [f"{one.place}/{name}" for one in goes for name in one.names],
        [f"{one.place}/{GOING}" for one in ours],
    ):
        if steady() - begun > LATE_S:
            return [], [*trouble, f"{store.label}/{DATA}: {LATE}"]
        store.delete(keys)
        store.close()  # some stores do it only then
    return goes, trouble


def _claim(store: Store, one: OldCorpus) -> bool:
    """Leave a sign that it goes; False where another one's is."""
    key, data = f"{one.place}/{GOING}", f"{os.uname().nodename} {secrets.token_hex(8)}\n".encode()
    try:
        sign = going(store, one.place)
        if sign is None:
            store.create(key, data)
        elif sign[1] > GOING_S:
            store.swap(key, data, sign[0].etag)
        else:
            return False
    except ChangedError:
        return False
    return True
