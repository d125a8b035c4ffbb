"""The work of tokenizing, cut into units; each becomes a part: token files, an index and its facts.

A part is written under temporary names and its facts last, so a part with facts is whole. Its name is a hash
of all that decides its bytes: a rerun finds what is done, and a changed file or option finds nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np

from x1_pretrain.corpus.shards import DOCUMENT, SPLITS, Split
from x1_pretrain.corpus.sources import (
    BadSource,
    Source,
    file_sha256,
    is_validation,
    read_documents,
    row_group_rows,
    to_utf8,
)
from x1_pretrain.corpus.tokenizer import Tokenizer

PART_VERSION = 1
Ending = Literal["bin", "idx"]
ENDINGS: tuple[Ending, Ending] = ("bin", "idx")
BATCH_BYTES = 1 << 20  # of text, tokenized and written at a time
SMALLEST_UNIT_BYTES = 4 << 20
LARGEST_UNIT_BYTES = 64 << 20
UNITS_WANTED = 64
# Bytes of text a byte of file usually holds; only the balance of work and the estimate of space rest on it.
TEXT_RATIO = {".parquet": 3.0, ".gz": 3.0, ".zst": 3.5}


class Piece(NamedTuple):
    """A file, or some row groups of a parquet file."""

    source: Source
    row_groups: tuple[int, int] | None = None  # none: the whole file
    first_row: int = 0

    @property
    def opens_file(self) -> bool:
        return self.row_groups is None or self.row_groups[0] == 0


class Unit(NamedTuple):
    """What one worker does at a time."""

    pieces: tuple[Piece, ...]
    text_bytes: int  # estimated


@dataclass(frozen=True)
class Job:
    """What all units share."""

    parts: Path
    tokenizer_file: Path
    tokenizer_sha256: str
    engine: str  # the same bytes whichever it is; so it is no part of a part's name
    dtype: str
    text_field: str
    val_fraction: float
    skip_bad: bool


@dataclass
class SplitCount:
    tokens: int = 0
    documents: int = 0
    bytes: int = 0


@dataclass
class PieceFacts:
    """What became of a piece."""

    file: str
    sha256: str | None = None  # of the whole file; only the piece that opens a file computes it
    skipped: str | None = None
    empty: int = 0
    repaired: int = 0
    train: SplitCount = field(default_factory=SplitCount)
    val: SplitCount = field(default_factory=SplitCount)

    def count(self, split: Split) -> SplitCount:
        return self.train if split == "train" else self.val


def text_bytes(source: Source) -> int:
    """An estimate of the text a file holds."""
    return int(source.size_bytes * TEXT_RATIO.get(Path(source.relative.lower()).suffix, 1.0))


def plan_units(sources: Sequence[Source], text_field: str) -> list[Unit]:
    """Units in the order of the corpus. A plan depends on the files alone, not on the number of workers."""
    wanted = sum(map(text_bytes, sources)) // UNITS_WANTED
    limit = min(LARGEST_UNIT_BYTES, max(SMALLEST_UNIT_BYTES, wanted))
    units: list[Unit] = []
    group: list[Piece] = []
    held = 0
    for source in sources:
        for piece, size in _pieces(source, text_field, limit):
            if group and held + size > limit:
                units.append(Unit(tuple(group), held))
                group, held = [], 0
            group.append(piece)
            held += size
    return [*units, Unit(tuple(group), held)] if group else units


def _pieces(source: Source, text_field: str, limit: int) -> Iterator[tuple[Piece, int]]:
    if source.kind != "parquet" or text_bytes(source) <= limit:
        yield Piece(source), text_bytes(source)
        return
    try:
        groups = row_group_rows(source, text_field)
    except BadSource:  # the worker that reads it will say why
        groups = []
    if len(groups) < 2:
        yield Piece(source), text_bytes(source)
        return
    first, row, rows, size = 0, 0, 0, 0
    for i, (group_rows, group_bytes) in enumerate(groups):
        if size and size + group_bytes > limit:
            yield Piece(source, (first, i), row), size
            first, row, rows, size = i, row + rows, 0, 0
        rows += group_rows
        size += group_bytes
    yield Piece(source, (first, len(groups)), row), size


def part_key(unit: Unit, job: Job) -> str:
    """The name of the part that `unit` becomes: a hash of all that decides its bytes."""
    pieces = [
        [p.source.relative, p.source.size_bytes, p.source.mtime_ns, p.row_groups, p.first_row]
        for p in unit.pieces
    ]
    facts = [PART_VERSION, job.tokenizer_sha256, job.dtype, job.text_field, job.val_fraction, pieces]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def read_facts(unit: Unit, job: Job) -> list[PieceFacts] | None:
    """The facts of a finished part; none when it isn't there, or isn't good enough for this job."""
    stem = part_stem(unit, job)
    try:
        rows: list[dict[str, Any]] = json.loads(stem.with_name(f"{stem.name}.json").read_bytes())
    except FileNotFoundError:
        return None
    facts = [
        PieceFacts(**{**row, "train": SplitCount(**row["train"]), "val": SplitCount(**row["val"])})
        for row in rows
    ]
    if any(f.skipped for f in facts) and not job.skip_bad:
        return None
    return facts if all(_is_whole(stem, job, split, facts) for split in SPLITS) else None


def part_stem(unit: Unit, job: Job) -> Path:
    """What the names of a part's files begin with. It costs a hash over all pieces: ask once."""
    return job.parts / part_key(unit, job)


def part_file(stem: Path, split: Split, ending: Ending) -> Path:
    return stem.with_name(f"{stem.name}.{split}.{ending}")


def _is_whole(stem: Path, job: Job, split: Split, facts: list[PieceFacts]) -> bool:
    """Whether both files of a split are as long as the facts say."""
    token_bytes = np.dtype(job.dtype).itemsize * sum(f.count(split).tokens for f in facts)
    index_bytes = DOCUMENT.itemsize * sum(f.count(split).documents for f in facts)
    tokens, index = part_file(stem, split, "bin"), part_file(stem, split, "idx")
    return (
        tokens.is_file()
        and index.is_file()
        and tokens.stat().st_size == token_bytes
        and index.stat().st_size == index_bytes
    )


def write_part(unit: Unit, job: Job, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Write the part of `unit`, yielding (text bytes, tokens) as they are done.

    A file that can't be read raises `BadSource` with its name, or under `skip_bad` leaves nothing behind.
    """
    stem = part_stem(unit, job)
    facts: list[PieceFacts] = []
    with _Writer(stem, job, tokenizer) as writer:
        for ordinal, piece in enumerate(unit.pieces):
            mark = writer.mark()
            found = PieceFacts(piece.source.relative)
            try:
                yield from _write_piece(piece, ordinal, found, writer, job.text_field)
            except BadSource as error:
                if not job.skip_bad:
                    raise BadSource(f"{piece.source.relative}: {error}") from error
                writer.roll_back(mark)
                found = PieceFacts(piece.source.relative, skipped=str(error))
            found.sha256 = file_sha256(piece.source.path) if piece.opens_file else None
            facts.append(found)
        writer.finish()
    write_whole(stem.with_name(f"{stem.name}.json"), json.dumps([asdict(f) for f in facts]).encode())


def _write_piece(
    piece: Piece, ordinal: int, facts: PieceFacts, writer: _Writer, text_field: str
) -> Iterator[tuple[int, int]]:
    rows: list[int] = []
    texts: list[str] = []
    held = 0
    groups = range(*piece.row_groups) if piece.row_groups else None
    for row, text in read_documents(piece.source, text_field, groups, piece.first_row):
        if not text:
            facts.empty += 1
            continue
        rows.append(row)
        texts.append(text)
        held += len(text)
        if held >= BATCH_BYTES:
            yield writer.append(ordinal, rows, texts, facts)
            rows, texts, held = [], [], 0
    if texts:
        yield writer.append(ordinal, rows, texts, facts)


class _Writer:
    """The four files of a part, open for writing."""

    def __init__(self, stem: Path, job: Job, tokenizer: Tokenizer) -> None:
        self._job, self._tokenizer = job, tokenizer
        self._paths = {(s, e): part_file(stem, s, e) for s in SPLITS for e in ENDINGS}
        self._files: dict[tuple[Split, Ending], BinaryIO] = {
            which: partial_name(path).open("wb") for which, path in self._paths.items()
        }
        self._tokens = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def append(self, ordinal: int, rows: list[int], texts: list[str], facts: PieceFacts) -> tuple[int, int]:
        """Tokenize and write a batch of documents; returns its (text bytes, tokens)."""
        sides: dict[Split, list[int]] = {split: [] for split in SPLITS}
        sizes: list[int] = []
        for i, text in enumerate(texts):
            texts[i], utf8, repaired = to_utf8(text)
            facts.repaired += repaired
            sizes.append(len(utf8))
            sides["val" if is_validation(utf8, self._job.val_fraction) else "train"].append(i)
        ids = self._tokenizer.encode_batch(texts)
        for split, chosen in sides.items():
            count = facts.count(split)
            count.tokens += self._write(split, ordinal, [rows[i] for i in chosen], [ids[i] for i in chosen])
            count.documents += len(chosen)
            count.bytes += sum(sizes[i] for i in chosen)
        return sum(sizes), sum(map(len, ids)) + len(ids)

    def _write(self, split: Split, ordinal: int, rows: list[int], ids: list[Any]) -> int:
        if not ids:
            return 0
        end = np.array([self._tokenizer.eot_id], dtype=np.uint32)
        closed = np.concatenate([part for document in ids for part in (document, end)])  # (tokens,)
        lengths = np.array([len(document) + 1 for document in ids])  # (documents,)
        index = np.zeros(len(ids), dtype=DOCUMENT)
        index["start"] = self._tokens[split] + np.cumsum(lengths) - lengths
        index["file"] = ordinal
        index["row"] = rows
        self._files[split, "bin"].write(closed.astype(f"<{np.dtype(self._job.dtype).str[1:]}").tobytes())
        self._files[split, "idx"].write(index.tobytes())
        self._tokens[split] += len(closed)
        return len(closed)

    def mark(self) -> dict[tuple[Split, Ending], int]:
        """Where the files stand."""
        return {which: file.tell() for which, file in self._files.items()}

    def roll_back(self, mark: dict[tuple[Split, Ending], int]) -> None:
        """Forget all that was written after `mark`."""
        for (split, ending), file in self._files.items():
            file.seek(mark[split, ending])
            file.truncate()
            if ending == "bin":
                self._tokens[split] = mark[split, ending] // np.dtype(self._job.dtype).itemsize

    def finish(self) -> None:
        """Make the files durable under their names."""
        for which, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            partial_name(self._paths[which]).replace(self._paths[which])
        sync_folder(self._job.parts)


def partial_name(path: Path) -> Path:
    """The name of a file that is not whole yet; each process has its own."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    partial = partial_name(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
