"""Out of the trash: back to where a run was, or for good. What `x1 runs restore` and `x1 runs gc` do."""

from __future__ import annotations

import os
import re
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from x1_pretrain.errors import UserError
from x1_pretrain.mirror import trash as mirror_trash
from x1_pretrain.mirror.address import parse, run_address
from x1_pretrain.mirror.listing import Place, is_address, mirror_of
from x1_pretrain.mirror.listing import places as mirrors_of
from x1_pretrain.mirror.removal import find_folder
from x1_pretrain.mirror.store import Store
from x1_pretrain.numbers import size
from x1_pretrain.records import runs, runs_table, trash
from x1_pretrain.records.runs import Listed

# -----------------------------------------------------------------------------------------------------------
# Back


def place_of(
    run: str, entries: list[trash.Entry], mirror: str | None, endpoint: str | None, runs_folder: Path
) -> tuple[Place | None, str]:
    """The mirror to look in, and what to look for there."""
    if is_address(run):
        address, name = run_address(run)
        return Place(address, endpoint), name
    if mirror:
        return Place(parse(mirror), endpoint), entries[0].name if entries else run
    folder = entries[0].folder if entries else find_folder(run, runs_folder)
    found = mirror_of(folder, runs.look(folder, time.time()).config) if folder else None
    return (replace(found[0], endpoint=endpoint or found[0].endpoint), found[1]) if found else (None, run)


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


def age(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dhms])", text.strip())
    if not found:
        raise UserError(f"--older-than {text}: expected a time such as 7d, 12h, 30m or 0s")
    return float(found[1]) * {"d": 86_400, "h": 3_600, "m": 60, "s": 1}[found[2]]


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
        print(f"{entry.folder}  {size(found)}  {_made(one)}, in the trash since {entry.trashed:%Y-%m-%d}")
        freed += found
        if yes:
            trash.delete(entry)
    return freed


def gc_there(store: Store, age_s: float, yes: bool, trouble: list[str]) -> int:
    now = store.now() if store.names() else None
    if now is None:
        return 0
    freed = 0
    found, wrong = mirror_trash.doomed(store, now, age_s)
    trouble += wrong
    for one in found:
        print(f"{store.label}/{one.name}  {size(one.bytes)}  {one.what} ({len(one.keys)} objects)")
        freed += one.bytes
        if yes:
            mirror_trash.delete(store, one)
    store.close()
    return freed


def _made(one: Listed) -> str:
    spent = [text for text in (runs_table.cost(one.spent_usd), runs_table.hours(one.elapsed_s)) if text]
    return f"step {runs_table.steps(one)}" + (f", made for {' and '.join(spent)}" if spent else "")
