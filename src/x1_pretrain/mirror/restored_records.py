"""The record files and small files of a run, from its mirror into its folder.

Whose rows are the run's is decided by the caller. What the other one has beside them is kept apart, in
`<name>.lost-e0003.jsonl`; of the ledger every row stays, whoever wrote it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.choosing import begins_with
from x1_pretrain.mirror.head import Head, Object, is_plain
from x1_pretrain.mirror.merging import (
    common_lines,
    mended,
    merged_ledger,
    rows_only_in,
    whole_lines,
)
from x1_pretrain.mirror.patience import Patience, UnusableError, get_object, in_lanes
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.money.ledger import Ledger, LedgerError
from x1_pretrain.records.run_folder import parse_row
from x1_pretrain.stores.store import Store

LOST = ".lost-"
TAIL_BYTES = 64 << 10  # of a record file, to see where it ends
NEEDED = ("events.jsonl", LEDGER)  # a hole in these would change the data's order, or what was spent
CORPUS = "corpus-"  # manifests of the corpora: kept in the mirror, not among a run's own files


@dataclass
class Source:
    """Where the rows come from."""

    store: Store
    head: Head
    patience: Patience
    say: Callable[[str], None]
    lost: set[str] = field(default_factory=set)  # record files of which rows can't be had any more

    def content(self, name: str, local: bytes) -> tuple[bytes, list[str]]:
        """All lines of a record file as the mirror has them, and what of it can't be had. Pieces that the
        local file has in the same place are not fetched."""
        pieces, at, problems = self.head.records[name], 0, list[str]()
        jobs = []
        for piece in pieces:
            here = local[at : at + piece.bytes]
            jobs.append(partial(self._piece, name, piece, here, problems))
            at += piece.bytes
        return b"".join(self.gathered(name, jobs)), problems

    def gathered(self, what: str, jobs: Sequence[Callable[[], bytes]]) -> list[bytes]:
        return in_lanes(jobs, self.patience.stop, lambda: self.say(self.patience.said(f"restoring {what}")))

    def _piece(self, name: str, piece: Object, here: bytes, problems: list[str]) -> bytes:
        if hashlib.sha256(here).hexdigest() == piece.sha256:
            return here
        try:  # where one is gone for good, the others are not waited for as long
            return get_object(self.store, self.head.name, piece, self.patience, hurry=bool(problems))
        except UnusableError as error:
            if name in NEEDED:
                raise RefusedError(
                    f"{self.store.label}: {error}; without all of {name} the run would not be the same; "
                    "restore that object (from an earlier version in the bucket), or start a new run"
                ) from None
            self.lost.add(name)
            problems.append(f"{name}: rows are missing, {error}")
            return b""


# ------------------------------------------------------------------------------------------------------------
# Whose story


def fill_in(source: Source, folder: Path, epoch: int) -> list[str]:
    """The folder's rows are the run's. What the mirror has and a file here lacks (a power cut took it, or a
    hand), and what was changed here, it gets back; the changed rows are kept apart."""
    notes: list[str] = []
    first = sorted(record_names(source.head), key=lambda name: ".superseded." not in name)
    for name in first:  # by what was moved aside the others are judged
        if name == LEDGER or begins_with(folder / name, source.head.records[name]):
            continue
        local = _local(folder / name)
        mirrored, problems = source.content(name, local)
        if problems:
            notes += [f"{problem}; what is here stays as it is" for problem in problems]
            continue
        whole, apart, back = mended(mirrored, local, _local(superseded(folder / name)))
        if not back:
            continue
        kept = _keep_apart(folder / name, apart, epoch)
        write_whole(folder / name, whole)
        said = f"{name}: {_rows(back)} that {'was' if back == 1 else 'were'} missing here, from the mirror"
        into = _apart(folder / name, epoch).name
        notes.append(said + (f"; {_rows(kept)} of its own in their place, kept in {into}" if kept else ""))
    return notes


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def take_over(source: Source, folder: Path, epoch: int) -> list[str]:
    """The mirror's rows are the run's. What only the folder has is set aside."""
    notes: list[str] = []
    lost = 0
    for name in record_names(source.head):
        if name == LEDGER:
            continue
        local = _local(folder / name)
        mirrored, problems = source.content(name, local)
        notes += problems
        if LOST in name:  # rows that were set aside before: of both
            write_whole(folder / name, mirrored + rows_only_in(local, mirrored))
            continue
        lost += _set_aside(folder / name, local, mirrored, epoch, source)
        if mirrored != local or not (folder / name).exists():
            write_whole(folder / name, mirrored)
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != LEDGER and path.name not in source.head.records and LOST not in path.name:
            lost += _keep_apart(path, _local(path), epoch)
            path.unlink()
    if lost:
        notes.append(f"{lost} rows that the mirror does not have are set aside in *{lost_suffix(epoch)}")
    return notes


def _set_aside(path: Path, local: bytes, mirrored: bytes, epoch: int, source: Source) -> int:
    tail = local[common_lines(local, mirrored) :]
    if not tail:
        return 0
    known = [mirrored]
    if superseded(path).name in source.head.records:
        known.append(source.content(superseded(path).name, _local(superseded(path)))[0])
    return _keep_apart(path, rows_only_in(tail, *known), epoch)


def _keep_apart(path: Path, rows: bytes, epoch: int) -> int:
    """Added to what was set aside before; a kill in between doubles nothing."""
    aside = _apart(path, epoch)
    before = _local(aside)
    if new := rows_only_in(rows, before):
        write_whole(aside, before + new)
    return rows.count(b"\n")


def _apart(path: Path, epoch: int) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl") + lost_suffix(epoch))


def lost_suffix(epoch: int) -> str:
    return f"{LOST}e{epoch:04d}.jsonl"


def superseded(path: Path) -> Path:
    return path.with_name(f"{path.stem}.superseded.jsonl")


def record_names(head: Head) -> list[str]:
    return sorted(name for name in head.records if is_plain(name) and name.endswith(".jsonl"))


def rows_that_lack(source: Source, folder: Path, step: int) -> list[str]:
    """Notes of the rows before a fetched checkpoint that the mirror never got, or lost."""
    notes = []
    for name in ("metrics.jsonl", "steps.jsonl"):
        if name not in source.head.records:
            continue
        last, apart = _where_it_ends(folder / name)
        if last + apart <= step:
            source.lost.add(name)
            notes.append(
                f"{name}: ends at step {last}, and the checkpoint is of step {step}: the mirror has no rows "
                "of the steps between, which are not made again"
            )
    return notes


def _where_it_ends(file: Path) -> tuple[int, int]:
    """The last step in a file, and how far its last rows lie apart: not every step has a row in each."""
    steps = sorted({row["step"] for _, row in _rows_of(_tail(file)) if isinstance(row.get("step"), int)})
    if not steps:
        return 0, 1
    return steps[-1], max((later - one for one, later in pairwise(steps)), default=1)


def _tail(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            return stream.read()
    except FileNotFoundError:
        return b""


# ------------------------------------------------------------------------------------------------------------
# The ledger


def restore_ledger(source: Source, folder: Path) -> int:
    """Every row of both; how many came. In place, under the lock of those who append meanwhile."""
    if LEDGER not in source.head.records:
        return 0
    file = folder / LEDGER
    mirrored, _ = source.content(LEDGER, _local(file))
    with Ledger(file, Clock()).locked():
        local, half = _local(file), file.with_name(f".{LEDGER}.merging")
        try:
            merged = merged_ledger(mirrored, local)
            if half.exists():  # a kill while it was written: all its rows are in there
                merged = merged_ledger(
                    merged_ledger(mirrored, half.read_bytes()), b"".join(line for line, _ in _rows_of(local))
                )
        except ValueError as error:
            raise LedgerError(
                f"{file}: a line of it, or of its copy in {source.store.label}, is not a ledger row "
                f"({error}); put it right from a copy"
            ) from None
        if merged != local:
            write_whole(half, merged)
            _overwrite(file, merged)
        half.unlink(missing_ok=True)
    return max(0, merged.count(b"\n") - local.count(b"\n"))


def _rows_of(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines that are rows, of what may begin or end in the middle of one."""
    lines = data.splitlines(keepends=True)
    return [(line, row) for line in lines if (row := parse_row(line)) is not None]


def _overwrite(file: Path, content: bytes) -> None:
    with file.open("rb+") as stream:
        stream.write(content)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())


# ------------------------------------------------------------------------------------------------------------
# Small files


def restore_files(source: Source, folder: Path, replace: bool = False) -> list[str]:
    """Those that are not there; with `replace` all. Notes of those that can't be had."""
    notes: list[str] = []

    def fetched(name: str, item: Object) -> bytes:
        try:
            data = get_object(source.store, source.head.name, item, source.patience, hurry=bool(notes))
            write_whole(folder / name, data)
        except UnusableError as error:
            notes.append(f"{name}: not restored, {error}")
        return b""

    wanted = [
        partial(fetched, name, item)
        for name, item in sorted(source.head.files.items())
        if is_plain(name) and not name.startswith(CORPUS) and (replace or not (folder / name).exists())
    ]
    source.gathered("small files", wanted)
    return sorted(notes)


def _local(path: Path) -> bytes:
    """The whole lines of a local file; nothing where there is none."""
    try:
        return whole_lines(path.read_bytes())
    except FileNotFoundError:
        return b""


def write_whole(path: Path, data: bytes) -> None:
    """The old content or the new one, never a half; on the disk when this returns."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
