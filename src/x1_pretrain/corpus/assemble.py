"""Finished parts, joined in order into a corpus folder. The manifest comes last and makes it a corpus.

All is written among the parts and moved into the folder at the end, so a run that is killed leaves nothing
there that is only half written.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

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
    part_stem,
    read_facts,
    sync_folder,
    write_whole,
)
from x1_pretrain.errors import UserError

COPY_BYTES = 8 << 20
MOST_DOMAINS = 65_536


@dataclass
class _File:
    """A source and what its pieces came to."""

    number: int
    source: Source
    pieces: list[PieceFacts] = field(default_factory=list)

    @property
    def skipped(self) -> str | None:
        # A file is taken whole or not at all, however many pieces it was cut into.
        return next((piece.skipped for piece in self.pieces if piece.skipped), None)

    @property
    def sha256(self) -> str | None:
        return next((piece.sha256 for piece in self.pieces if piece.sha256), None)

    def total(self, split: Split) -> SplitCount:
        return add([piece.count(split) for piece in self.pieces if not self.skipped])

    @property
    def documents(self) -> int:
        return sum(self.total(split).documents for split in SPLITS)


class _Segment(NamedTuple):
    """A run of one part that goes into the corpus."""

    stem: Path  # of the part's files
    file: _File
    first_token: int  # in the part
    first_document: int  # in the part
    size: SplitCount


def add(counts: Sequence[SplitCount]) -> SplitCount:
    """The sum of counts."""
    return SplitCount(
        sum(c.tokens for c in counts), sum(c.documents for c in counts), sum(c.bytes for c in counts)
    )


def assemble(
    folder: Path, units: Sequence[Unit], job: Job, found: Found, tokenizer: Tokenizer, options: OptionFacts
) -> Manifest:
    """Join the parts of `units` into `folder` and return the manifest written there."""
    parts = [(unit, _facts(unit, job)) for unit in units]
    files = _by_file(found.sources, parts)
    domains = sorted({file.source.domain for file in files.values() if file.documents})
    _check_domains(domains, found, job)
    digests = {split: _join(_segments(split, parts, files, job), split, job, domains) for split in SPLITS}
    manifest = _manifest(job, found, list(files.values()), domains, digests, tokenizer, options)
    write_whole(job.parts / "manifest.json", (manifest.model_dump_json(indent=2) + "\n").encode())
    files_in_order = [f"{split}{ending}" for split in SPLITS for ending in (".bin", ".idx.npy")]
    for name in [*files_in_order, "tokenizer.json", "manifest.json"]:
        (job.parts / name).replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(job.parts)
    return manifest


def _facts(unit: Unit, job: Job) -> list[PieceFacts]:
    facts = read_facts(unit, job)
    if facts is None:
        first = unit.pieces[0].source.relative
        raise UserError(f"{job.parts}: the part of {first} is gone or damaged; run the same command again")
    return facts


def _check_domains(domains: Sequence[str], found: Found, job: Job) -> None:
    if not domains:
        raise UserError(
            f"--input-dir: {len(found.sources)} files were read and none holds text to keep; "
            f"expected documents in the field or column '{job.text_field}' (--text-field)"
        )
    if len(domains) > MOST_DOMAINS:
        raise UserError(
            f"--input-dir: {len(domains):,} folders at its top, each a domain; at most {MOST_DOMAINS:,}: "
            "put them into fewer folders"
        )


def _by_file(
    sources: Sequence[Source], parts: Sequence[tuple[Unit, Sequence[PieceFacts]]]
) -> dict[str, _File]:
    files = {source.relative: _File(number, source) for number, source in enumerate(sources)}
    for _, facts in parts:
        for fact in facts:
            files[fact.file].pieces.append(fact)
    return files


def _segments(
    split: Split, parts: Sequence[tuple[Unit, Sequence[PieceFacts]]], files: dict[str, _File], job: Job
) -> list[_Segment]:
    """What goes into one split, in the order of the corpus."""
    segments: list[_Segment] = []
    for unit, facts in parts:
        stem, token, document = part_stem(unit, job), 0, 0
        for fact in facts:
            count = fact.count(split)
            if count.documents and not files[fact.file].skipped:
                segments.append(_Segment(stem, files[fact.file], token, document, count))
            token += count.tokens
            document += count.documents
    return segments


def _join(segments: Sequence[_Segment], split: Split, job: Job, domains: Sequence[str]) -> str:
    """Write a split's token file and index; returns the hash of the token file."""
    digest = hashlib.sha256()
    with (
        (job.parts / f"{split}.bin").open("wb") as tokens_out,
        (job.parts / f"{split}.idx.npy").open("wb") as index_out,
    ):
        _write_header(index_out, sum(s.size.documents for s in segments))
        first_token, numbers = 0, {domain: number for number, domain in enumerate(domains)}
        for segment in segments:
            for block in _token_blocks(segment, split, job):
                tokens_out.write(block)
                digest.update(block)
            index_out.write(_index(segment, split, numbers, first_token).tobytes())
            first_token += segment.size.tokens
        for out in (tokens_out, index_out):
            out.flush()
            os.fsync(out.fileno())
    return digest.hexdigest()


def _write_header(out: BinaryIO, documents: int) -> None:
    descr = np.lib.format.dtype_to_descr(DOCUMENT)
    header = {"descr": descr, "fortran_order": False, "shape": (documents,)}
    np.lib.format.write_array_header_1_0(out, header)


def _token_blocks(segment: _Segment, split: Split, job: Job) -> Iterator[bytes]:
    token_bytes = np.dtype(job.dtype).itemsize
    with part_file(segment.stem, split, "bin").open("rb") as file:
        file.seek(segment.first_token * token_bytes)
        left = segment.size.tokens * token_bytes
        while left:
            block = file.read(min(left, COPY_BYTES))
            if not block:
                raise UserError(f"{file.name}: cut short; remove {job.parts} and run the same command again")
            left -= len(block)
            yield block


def _index(segment: _Segment, split: Split, numbers: dict[str, int], first_token: int) -> np.ndarray:
    """The segment's rows of the index, as they stand in the corpus, (documents,)."""
    rows = np.fromfile(
        part_file(segment.stem, split, "idx"),
        dtype=DOCUMENT,
        count=segment.size.documents,
        offset=segment.first_document * DOCUMENT.itemsize,
    )
    rows["start"] = rows["start"] - np.uint64(segment.first_token) + np.uint64(first_token)
    rows["file"] = segment.file.number
    rows["domain"] = numbers[segment.file.source.domain]
    return rows


# The manifest


def _manifest(
    job: Job,
    found: Found,
    files: Sequence[_File],
    domains: Sequence[str],
    digests: dict[Split, str],
    tokenizer: Tokenizer,
    options: OptionFacts,
) -> Manifest:
    content = digests["train"] + digests["val"] + tokenizer.sha256
    kept = [piece for file in files if not file.skipped for piece in file.pieces]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        kind="corpus",
        created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        x1_version=__version__,
        tokenizer=TokenizerFacts(
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            sha256=tokenizer.sha256,
        ),
        dtype="uint16" if job.dtype == "uint16" else "uint32",
        val_fraction=job.val_fraction,
        domains=list(domains),
        train=_split_facts(files, "train", digests),
        val=_split_facts(files, "val", digests),
        domain_counts={domain: _domain_facts(files, domain) for domain in domains},
        val_spans=_val_spans(files, domains),
        sources=[_source_facts(file) for file in files],
        dropped=DroppedFacts(
            empty_documents=sum(piece.empty for piece in kept),
            repaired_documents=sum(piece.repaired for piece in kept),
            ignored_files=found.ignored,
        ),
        options=options,
        versions=_versions(tokenizer),
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
    )


def _split_facts(files: Sequence[_File], split: Split, digests: dict[Split, str]) -> SplitFacts:
    total = add([file.total(split) for file in files])
    return SplitFacts(
        tokens=total.tokens, documents=total.documents, bytes=total.bytes, sha256=digests[split]
    )


def _domain_facts(files: Sequence[_File], domain: str) -> DomainFacts:
    mine = [file for file in files if file.source.domain == domain]
    train, val = (add([file.total(split) for file in mine]) for split in SPLITS)
    return DomainFacts(
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        documents=train.documents + val.documents,
        bytes=train.bytes + val.bytes,
    )


def _val_spans(files: Sequence[_File], domains: Sequence[str]) -> dict[str, list[list[int]]]:
    """Domain -> its one run of val.bin, since files are ordered by domain; none if it has no tokens there."""
    spans: dict[str, list[list[int]]] = {domain: [] for domain in domains}
    start = 0
    for domain in domains:
        tokens = sum(file.total("val").tokens for file in files if file.source.domain == domain)
        if tokens:
            spans[domain].append([start, start + tokens])
        start += tokens
    return spans


def _source_facts(file: _File) -> SourceFacts:
    return SourceFacts(
        path=file.source.relative,
        domain=file.source.domain,
        bytes=file.source.size_bytes,
        sha256=file.sha256,
        documents=file.documents,
        skipped=file.skipped,
    )


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    libraries = ("numpy", "pyarrow", "tokenizers", "tiktoken")
    return {
        "python": platform.python_version(),
        "engine": tokenizer.engine.name,
        **{library: version(library) for library in libraries},
    }
