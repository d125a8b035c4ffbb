"""Finished parts, joined in order into a corpus folder. The manifest comes last and makes it a corpus."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from x1_pretrain import __version__
from x1_pretrain.corpus.shards import (
    DOCUMENT,
    SCHEMA_VERSION,
    SPLITS,
    DomainFacts,
    DroppedFacts,
    Manifest,
    OptionFacts,
    SourceFacts,
    Split,
    SplitFacts,
    TokenizerFacts,
)
from x1_pretrain.corpus.sources import Found, Source
from x1_pretrain.corpus.tokenizer import Tokenizer
from x1_pretrain.corpus.units import (
    Job,
    PieceFacts,
    SplitCount,
    Unit,
    part_file,
    partial_name,
    read_facts,
    write_whole,
)
from x1_pretrain.errors import UserError

COPY_BYTES = 8 << 20


@dataclass
class _File:
    """A source and what its pieces came to."""

    source: Source
    pieces: list[PieceFacts] = field(default_factory=list)

    @property
    def skipped(self) -> str | None:
        # A file is taken whole or not at all, however many pieces it was cut into.
        return next((piece.skipped for piece in self.pieces if piece.skipped), None)

    def total(self, split: Split) -> SplitCount:
        counts = [piece.count(split) for piece in self.pieces if not self.skipped]
        return SplitCount(
            sum(c.tokens for c in counts), sum(c.documents for c in counts), sum(c.bytes for c in counts)
        )

    @property
    def documents(self) -> int:
        return sum(self.total(split).documents for split in SPLITS)


@dataclass
class _Joined:
    """What joining one split came to."""

    facts: SplitFacts
    spans: dict[str, list[list[int]]]  # domain -> [start, end) runs of its tokens


def assemble(
    folder: Path, units: Sequence[Unit], job: Job, found: Found, tokenizer: Tokenizer, options: OptionFacts
) -> Manifest:
    """Join the parts of `units` into `folder` and return the manifest written there."""
    parts = [(unit, _facts(unit, job)) for unit in units]
    files = _by_file(found.sources, parts)
    domains = sorted({file.source.domain for file in files if file.documents})
    if not domains:
        raise UserError(f"no text: {len(found.sources)} files were read, none holds a document that is kept")
    if len(domains) > np.iinfo(DOCUMENT["domain"].type).max:
        raise UserError(f"{len(domains):,} folders under --input-dir, each a domain; 65,535 is the most")
    joined = {split: _join(split, job, parts, files, domains) for split in SPLITS}
    manifest = _manifest(job, found, files, domains, joined, tokenizer, options)
    for split in SPLITS:
        for name in (f"{split}.bin", f"{split}.idx.npy"):
            partial_name(job.parts / name).replace(folder / name)
    write_whole(folder / "tokenizer.json", tokenizer.json_text.encode())
    write_whole(folder / "manifest.json", (manifest.model_dump_json(indent=2) + "\n").encode())
    shutil.rmtree(job.parts)
    return manifest


def _facts(unit: Unit, job: Job) -> list[PieceFacts]:
    facts = read_facts(unit, job)
    if facts is None:
        first = unit.pieces[0].source.relative
        raise UserError(f"{job.parts}: the part of {first} is gone or damaged; run the same command again")
    return facts


def _by_file(
    sources: Sequence[Source], parts: Sequence[tuple[Unit, Sequence[PieceFacts]]]
) -> list[_File]:
    files = {source.relative: _File(source) for source in sources}
    for unit, facts in parts:
        for piece, fact in zip(unit.pieces, facts, strict=True):
            files[piece.source.relative].pieces.append(fact)
    return list(files.values())


def _join(
    split: Split,
    job: Job,
    parts: Sequence[tuple[Unit, Sequence[PieceFacts]]],
    files: Sequence[_File],
    domains: Sequence[str],
) -> _Joined:
    numbers = {file.source.relative: i for i, file in enumerate(files)}
    totals = [file.total(split) for file in files]
    tokens, documents = sum(t.tokens for t in totals), sum(t.documents for t in totals)
    digest = hashlib.sha256()
    spans: dict[str, list[list[int]]] = {domain: [] for domain in domains}
    position = 0
    with (
        partial_name(job.parts / f"{split}.bin").open("wb") as out,
        partial_name(job.parts / f"{split}.idx.npy").open("wb") as index_out,
    ):
        _write_header(index_out, documents)
        for unit, facts in parts:
            with (
                part_file(unit, job, split, "bin").open("rb") as bin_in,
                part_file(unit, job, split, "idx").open("rb") as idx_in,
            ):
                start = 0  # of the piece in its part
                for fact in facts:
                    count, number = fact.count(split), numbers[fact.file]
                    index = np.frombuffer(idx_in.read(count.documents * DOCUMENT.itemsize), DOCUMENT).copy()
                    size = count.tokens * np.dtype(job.dtype).itemsize
                    start += count.tokens
                    if files[number].skipped:
                        bin_in.seek(size, 1)
                        continue
                    for block in _blocks(bin_in, size):
                        out.write(block)
                        digest.update(block)
                    domain = files[number].source.domain
                    index["start"] += np.uint64(position - (start - count.tokens)) if position else 0
                    position += count.tokens
    return _Joined(SplitFacts(tokens=tokens, documents=documents, bytes=0, sha256=digest.hexdigest()), spans)
