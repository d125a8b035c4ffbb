"""The trash of a folder of runs: `<folder>/.trash/<name>-<time>`, where a run lies as it was.

A run goes there and comes back by rename, so at once and without a copy. Checkpoints that lie elsewhere go
into the trash beside them, on their own disk. `trashed.json` in the run's folder says where everything was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from x1_pretrain.errors import FAULT, RefusedError, UserError
from x1_pretrain.money.clock import parse_stamp, stamp
from x1_pretrain.records.formats import VERSIONS
from x1_pretrain.records.run_folder import read_json

FOLDER = ".trash"
NOTE = "trashed.json"
REMOVING = ".removing-"
KEPT = timedelta(days=7)


class TrashError(UserError):
    """The disk did not do it."""

    exit_code = FAULT


@dataclass(frozen=True)
class Moved:
    """A folder and where it lies in the trash."""

    was: str
    now: str


@dataclass(frozen=True)
class Entry:
    """One run in the trash."""

    folder: Path  # where it lies
    name: str
    run_id: str | None
    was: str  # where it lay
    trashed: datetime
    checkpoints: Moved | None = None  # those that lay elsewhere

    @property
    def until_utc(self) -> str:
        return stamp(self.trashed + KEPT)


def stamped(name: str, now: datetime) -> str:
    """x1-50m-20261121T130000Z"""
    return f"{name}-{now.astimezone(UTC):%Y%m%dT%H%M%SZ}"


# -----------------------------------------------------------------------------------------------------------
# In


def place(folder: Path, name: str) -> Path:
    """Where a folder would lie in the trash beside it."""
    return folder.absolute().parent / FOLDER / name


def refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise RefusedError(f"{folder}: is a link to {folder.resolve()}; name that folder itself")


def throw_away(folder: Path, checkpoints: Path | None, name: str, run_id: str | None, now: datetime) -> Entry:
    """Move a run folder, and its checkpoints where they lie elsewhere, to the trash; whole or not at all.

    Whoever calls holds the locks of both."""
    refuse_link(folder)
    called = _free(folder, checkpoints, stamped(folder.absolute().name, now))
    there = place(checkpoints, f"{called}.checkpoints") if checkpoints else None
    moved = Moved(str(checkpoints.absolute()), str(there)) if checkpoints else None
    entry = Entry(place(folder, called), name, run_id, str(folder.absolute()), now, moved)
    _write_note(folder, entry)
    try:
        _rename(folder, entry.folder)
    except TrashError:
        (folder / NOTE).unlink(missing_ok=True)
        raise
    if moved:
        try:
            _rename(Path(moved.was), Path(moved.now))
        except TrashError:
            put_back(entry)
            raise
    return entry


def _free(folder: Path, checkpoints: Path | None, called: str) -> str:
    """A name that neither trash has: two of one second."""
    number, name = 1, called
    while os.path.lexists(place(folder, name)) or (
        checkpoints and os.path.lexists(place(checkpoints, f"{name}.checkpoints"))
    ):
        number += 1
        name = f"{called}-{number}"
    return name


def _write_note(folder: Path, entry: Entry) -> None:
    """Before anything moves: where it must go back to."""
    tree = {"schema_version": VERSIONS["trashed"], "kind": "trashed"}
    tree |= {
        "name": entry.name,
        "run_id": entry.run_id,
        "was": entry.was,
        "trashed_utc": stamp(entry.trashed),
    }
    tree |= {"checkpoints": asdict(entry.checkpoints) if entry.checkpoints else None}
    new = folder / f".{NOTE}.new"
    try:
        with new.open("w", encoding="utf-8") as out:
            out.write(json.dumps(tree, indent=1) + "\n")
            out.flush()
            os.fsync(out.fileno())
        new.replace(folder / NOTE)
    except OSError as error:
        raise TrashError(f"{folder}: can't be written ({error.strerror}); nothing was moved") from None


def _rename(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EBUSY):
            why = "it is a disk of its own, and can't be moved by renaming; remove it by hand"
        else:
            why = error.strerror or str(error)
        raise TrashError(f"{source}: can't be moved to {target} ({why})") from None


# -----------------------------------------------------------------------------------------------------------
# There


def entries(runs: Path) -> list[Entry]:
    """What lies in the trash of a folder of runs, the newest first. Only what was put there by us."""
    trash = runs / FOLDER
    if not trash.is_dir():
        return []
    found = [read_entry(one) for one in sorted(trash.iterdir()) if not one.name.startswith(".")]
    known = (one for one in found if one is not None)
    return sorted(known, key=lambda one: (one.trashed, one.folder.name), reverse=True)


def read_entry(folder: Path) -> Entry | None:
    """None where its note is missing or damaged: then nothing here touches it."""
    if not (folder / NOTE).is_file():
        return None
    try:
        tree = read_json(folder / NOTE)
        lay = tree.get("checkpoints")
        moved = Moved(str(lay["was"]), str(lay["now"])) if lay else None
        trashed = parse_stamp(tree["trashed_utc"])
        return Entry(folder, str(tree["name"]), tree.get("run_id"), str(tree["was"]), trashed, moved)
    except (UserError, LookupError, TypeError, ValueError):
        return None


def find(runs: Path, text: str) -> list[Entry]:
    """The entries that `text` means, the newest first: a run's name, an entry's, or its path."""
    given = Path(text)
    if given.parent.name == FOLDER and (entry := read_entry(given)):
        return [entry]
    here = entries(runs)
    return [one for one in here if text in (one.folder.name, one.name, Path(one.was).name, one.run_id)]


# -----------------------------------------------------------------------------------------------------------
# Out


def put_back(entry: Entry) -> Path:
    """The run as it was, where it was; or beside its trash, where that has moved."""
    target = Path(entry.was)
    if not target.parent.is_dir():
        target = entry.folder.parent.parent / target.name
    lay = entry.checkpoints if entry.checkpoints and Path(entry.checkpoints.now).exists() else None
    for taken in (target, *([Path(lay.was)] if lay else [])):
        if os.path.lexists(taken):
            raise RefusedError(f"{taken}: is there already; move that away, then restore {entry.folder.name}")
    if lay:
        _rename(Path(lay.now), Path(lay.was))
    _rename(entry.folder, target)
    (target / NOTE).unlink(missing_ok=True)
    return target


def expired(entry: Entry, now: datetime, older_than_s: float) -> bool:
    return (now - entry.trashed).total_seconds() > older_than_s


def delete(entry: Entry) -> None:
    """For good. Renamed first: half a run never looks like one that can come back."""
    doomed = entry.folder.with_name(f"{REMOVING}{entry.folder.name}")
    _rename(entry.folder, doomed)
    finish_deleting(doomed)


def half_deleted(runs: Path) -> list[Path]:
    """What a kill in the middle of `delete` left."""
    trash = runs / FOLDER
    return sorted(trash.glob(f"{REMOVING}*")) if trash.is_dir() else []


def what_is_left(doomed: Path) -> list[Path]:
    """The folders of a run that is half deleted: its checkpoints that lay elsewhere first, while its own
    folder still says where they are."""
    entry = read_entry(doomed)
    if entry is None or entry.checkpoints is None or Path(entry.checkpoints.now).parent.name != FOLDER:
        return [doomed]
    return [Path(entry.checkpoints.now), doomed]


def finish_deleting(doomed: Path) -> None:
    for one in what_is_left(doomed):
        if one.is_dir():
            _remove(one)


def _remove(doomed: Path) -> None:
    problems: list[str] = []

    def note(_: Callable[..., object], path: str, error: BaseException) -> None:
        problems.append(f"{path} ({getattr(error, 'strerror', None) or error})")

    shutil.rmtree(doomed, onerror=lambda f, p, info: note(f, p, info[1]))
    if problems:
        raise TrashError(f"{problems[0]}: can't be deleted; what is left of it lies in {doomed}")
