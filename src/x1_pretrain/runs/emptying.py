"""Out of the trash: back to where a run was, or for good. What `x1 runs restore` and `x1 runs gc` do."""

from __future__ import annotations

import os
import time
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from x1_pretrain.config import MirrorConfig
from x1_pretrain.mirror import old_corpora
from x1_pretrain.mirror import trash as mirror_trash
from x1_pretrain.money import storage
from x1_pretrain.money.guard import dollars
from x1_pretrain.money.standing import endpoint_of
from x1_pretrain.numbers import size
from x1_pretrain.records import runs, runs_table, trash
from x1_pretrain.runs.listing import Place
from x1_pretrain.runs.listing import places as mirrors_of
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.store import Store

CENT = Decimal("0.01")

# -----------------------------------------------------------------------------------------------------------
# Back


def restore_there(store: Store, name: str, run_id: str | None) -> list[str]:
    """The newest of that name, and of that run where it is known."""
    found = [one for one in mirror_trash.find(store, name) if run_id in (None, one.head.run_id)]
    if not found:
        return []
    with closing(store):  # some stores send the last of it only then
        mirror_trash.put_back(store, found[0], os.uname().nodename)
    older = [f"an older one of this name stays in the trash there: {one.entry}" for one in found[1:]]
    return [f"{store.label}/{found[0].name} is back", *older]


# -----------------------------------------------------------------------------------------------------------
# For good


def mirrors(
    where: str, mirror: str | None, endpoint: str | None, local: bool
) -> tuple[list[Place], list[str]]:
    if mirror:
        return [Place(parse(mirror), endpoint)], []
    here = runs.local_runs(Path(where), time.time()) if Path(where).is_dir() and not local else []
    return mirrors_of(here)


def gc_here(folder: Path, age_s: float, yes: bool) -> int:
    freed, now = 0, datetime.now(UTC)
    for half in trash.half_deleted(folder):
        found = sum(map(runs.bytes_below, trash.what_is_left(half)))
        print(f"{half}  {size(found)}  half deleted")
        freed += found
        if yes:
            trash.finish_deleting(half)
    for entry in trash.entries(folder):
        if not trash.expired(entry, now, age_s):
            continue
        one = runs.look(entry.folder, time.time())
        places = [entry.folder, *([Path(entry.checkpoints.now)] if entry.checkpoints else [])]
        found = sum(map(runs.bytes_below, places))
        made = f", made for {spent}" if (spent := runs_table.made(one)) else ""
        print(
            f"{entry.folder}  {size(found)}  step {runs_table.steps(one)}{made}, in the trash since "
            f"{entry.trashed:%Y-%m-%d}"
        )
        freed += found
        if yes:
            trash.delete(entry)
    return freed


def gc_there(place: Place, store: Store, age_s: float, yes: bool, trouble: list[str]) -> int:
    if not store.names():
        return 0
    now = store.now()
    if now is None:
        trouble.append(f"{store.label}: does not say what time it is there, so nothing in it is too old")
        return 0
    freed = 0
    found, wrong = mirror_trash.doomed(store, now, age_s)
    trouble += wrong
    for one in found:
        print(f"{store.label}/{one.name}  {size(one.bytes)}  {one.what} ({len(one.keys)} objects)")
        freed += one.bytes
        if yes:
            mirror_trash.delete(store, one)
    freed += corpora_gc(place, store, now, age_s, yes, trouble, {o.entry.key for o in found if o.entry})
    store.close()
    return freed


def corpora_gc(
    place: Place, store: Store, now: datetime, age_s: float, yes: bool, trouble: list[str], going: set[str]
) -> int:
    """Those that no run names once the entries `going` are gone."""
    old, wrong = old_corpora.old_corpora(store, now, age_s, going)
    for one in old:
        print(f"{store.label}/{one.place}  {size(one.bytes)}  corpus that no run names{_a_month(place, one)}")
    if yes and old:
        old, left = old_corpora.delete(store, old)
        wrong += left
    trouble += [line for line in wrong if line not in trouble]
    return sum(one.bytes for one in old)


def _a_month(place: Place, one: old_corpora.OldCorpus) -> str:
    """What its store bills; nothing where none does."""
    uri = str(place.address)
    bills = storage.rates(uri, endpoint_of(MirrorConfig(uri=uri, endpoint=place.endpoint)))
    usd = bills.kept_usd(one.bytes / storage.GIB, storage.MONTH_H)
    if not usd:
        return "" if bills.known else ", of no known price"
    history = "; billed until its history is squashed" if storage.keeps_all(uri) else ""
    return f", {dollars(usd) if usd >= CENT else f'under {dollars(CENT)}'} a month{history}"
