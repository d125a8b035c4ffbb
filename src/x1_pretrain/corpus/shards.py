"""A corpus folder, opened for reading: token files as memory maps, the index of documents, the manifest.

    train.bin, val.bin            flat little-endian uint16 (uint32 above 65,536 ids)
    train.idx.npy, val.idx.npy    one row a document: start (token), file, row in that file, domain
    tokenizer.json                the tokenizer, in Hugging Face's format
    manifest.json                 what it was made from and what it must hold; written last

Each document is closed by its end id. Everything wrong with a folder is refused here, in one line, before a
run starts.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from x1_pretrain.corpus.tokenizer import Tokenizer, load_tokenizer
from x1_pretrain.errors import UserError

SCHEMA_VERSION = 1
DOCUMENT = np.dtype([("start", "<u8"), ("file", "<u4"), ("row", "<u4"), ("domain", "<u2")])
TOKENIZE = "python -m x1_pretrain.tokenize_data --input-dir TEXT --output-dir"
FULL_SCAN_BYTES = 2 << 30  # up to here every id is checked; above, evenly spaced chunks of as much in all
CHUNK_BYTES = 8 << 20

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")


class _Part(BaseModel):
    """A piece of the manifest. Unknown keys are let through: a later version may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TokenizerFacts(_Part):
    name: str
    vocab_size: int
    eot_id: int
    sha256: str


class SplitFacts(_Part):
    tokens: int
    documents: int
    bytes: int  # of text, before tokenizing
    sha256: str  # of the .bin file


class DomainFacts(_Part):
    train_tokens: int
    val_tokens: int
    documents: int
    bytes: int


class SourceFacts(_Part):
    path: str  # relative to the input folder
    domain: str
    bytes: int  # of the file
    sha256: str | None  # none: it could not even be read
    documents: int
    skipped: str | None  # why the file was left out


class DroppedFacts(_Part):
    empty_documents: int
    repaired_documents: int = 0  # held half a surrogate pair, which no UTF-8 can hold; kept with U+FFFD there
    ignored_files: list[str]


class OptionFacts(_Part):
    """What was asked for."""

    tokenizer: str
    text_field: str
    skip_bad: bool


class Manifest(_Part):
    """What a corpus was made from and what it must hold."""

    schema_version: int
    kind: str
    created_utc: str
    x1_version: str
    tokenizer: TokenizerFacts
    dtype: Literal["uint16", "uint32"]
    val_fraction: float
    domains: list[str]
    train: SplitFacts
    val: SplitFacts
    domain_counts: dict[str, DomainFacts]
    val_spans: dict[str, list[list[int]]]  # domain -> [start, end) token spans of val.bin
    sources: list[SourceFacts]
    dropped: DroppedFacts
    versions: dict[str, str]
    options: OptionFacts
    fingerprint: str  # of the content: the token files and the tokenizer


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. The arrays are read-only memory maps."""

    name: str
    path: Path
    manifest: Manifest
    train: npt.NDArray[Any]  # (tokens,) uint16 or uint32
    val: npt.NDArray[Any]  # (tokens,)
    train_docs: npt.NDArray[Any]  # (documents,) of DOCUMENT
    val_docs: npt.NDArray[Any]  # (documents,) of DOCUMENT

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def eot_id(self) -> int:
        return self.manifest.tokenizer.eot_id

    @property
    def domains(self) -> list[str]:
        return self.manifest.domains

    @property
    def val_spans(self) -> dict[str, list[tuple[int, int]]]:
        """Domain -> [start, end) token spans of `val`."""
        return {domain: [(a, b) for a, b in spans] for domain, spans in self.manifest.val_spans.items()}

    def tokens(self, split: Split) -> npt.NDArray[Any]:
        return self.train if split == "train" else self.val

    def document_table(self, split: Split) -> npt.NDArray[Any]:
        return self.train_docs if split == "train" else self.val_docs

    def documents(self, split: Split, start: int, end: int) -> npt.NDArray[Any]:
        """The rows of the documents that overlap tokens [start, end)."""
        table = self.document_table(split)
        # bisect reads a few rows; searchsorted would first copy the whole column, which is not contiguous.
        starts = cast(Sequence[int], np.asarray(table["start"]))  # (documents,)
        first = max(0, bisect_right(starts, start) - 1)
        last = max(first, bisect_left(starts, min(end, len(self.tokens(split)))))
        return table[first:last] if start < end else table[:0]

    def source_path(self, file: int) -> str:
        """The path of a document's `file`, relative to the input folder."""
        return self.manifest.sources[file].path

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path, name=self.manifest.tokenizer.name)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """How many bytes of text each id stands for, (V,)."""
        return self.tokenizer().token_bytes()

    def check_ids(self, vocab_size: int) -> None:
        """Refuse a corpus with an id that a model of `vocab_size` does not have.

        All ids up to 2 GiB; evenly spaced chunks of a larger corpus, its first and last among them.
        """
        for split in SPLITS:
            _check_ids(self.path / f"{split}.bin", self.tokens(split), vocab_size)


def open_corpus(path: Path, name: str | None = None) -> Corpus:
    """Open the corpus folder at `path`, refusing in one line whatever a run could stumble over."""
    manifest = read_manifest(path)
    try:
        arrays = {split: _open_tokens(path, split, manifest) for split in SPLITS}
        tables = {split: _open_documents(path, split, manifest) for split in SPLITS}
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"{path}/tokenizer.json: missing; {_again(path)}")
        (path / "tokenizer.json").open("rb").close()  # only later is it read, but a refusal belongs here
    except OSError as error:
        raise _unreadable(path, error) from None
    return Corpus(
        name or path.resolve().name,
        path,
        manifest,
        arrays["train"],
        arrays["val"],
        tables["train"],
        tables["val"],
    )


def read_manifest(path: Path) -> Manifest:
    """The manifest of the corpus at `path`."""
    if not path.is_dir():
        raise UserError(
            f"{path}: no such corpus folder; pass --data-dir DIR, or make one with `{TOKENIZE} DIR`"
        )
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(f"{path}: not a corpus: {_what_is_there(path)}; {_again(path)}")
    try:
        tree = json.loads(file.read_bytes())
        version = tree["schema_version"]
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged or only half written; {_again(path)}") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema_version {version}, and this version reads {SCHEMA_VERSION}; update x1, "
            f"or {_again(path)}"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {where}: {first['msg']}; {_again(path)}") from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{error.filename or path}: can't be read ({error.strerror or error}); expected a corpus that this "
        "user may read: see the permissions and the disk"
    )


def _again(path: Path) -> str:
    return f"make the corpus again: `{TOKENIZE} {path}`"


def _what_is_there(path: Path) -> str:
    if (path / ".parts").is_dir():
        return "it is unfinished (the same tokenize command goes on where it stopped)"
    if (path / "train.bin").is_file():
        return "it has train.bin but no manifest.json, which says what the ids mean"
    return "manifest.json and train.bin are missing"


def _open_tokens(path: Path, split: Split, manifest: Manifest) -> npt.NDArray[Any]:
    file = path / f"{split}.bin"
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    tokens = getattr(manifest, split).tokens
    if not file.is_file():
        raise UserError(f"{file}: missing; {_again(path)}")
    found, expected = file.stat().st_size, tokens * dtype.itemsize
    if found != expected:
        raise UserError(
            f"{file}: {found:,} bytes, expected {expected:,} ({tokens:,} tokens of {manifest.dtype}): it was "
            f"cut short, changed or half copied; copy it again, or {_again(path)}"
        )
    if tokens == 0 and split == "train":
        raise UserError(f"{file}: no tokens to train on; {_again(path)}")
    # An empty file can't be mapped.
    return np.memmap(file, dtype=dtype, mode="r") if tokens else np.empty(0, dtype=dtype)


def _open_documents(path: Path, split: Split, manifest: Manifest) -> npt.NDArray[Any]:
    file = path / f"{split}.idx.npy"
    documents = getattr(manifest, split).documents
    try:
        table: npt.NDArray[Any] = np.load(file, mmap_mode="r" if documents else None)
    except (FileNotFoundError, ValueError, EOFError):
        raise UserError(f"{file}: missing or damaged; {_again(path)}") from None
    if table.dtype != DOCUMENT or table.shape != (documents,):
        raise UserError(
            f"{file}: {table.size:,} rows of {table.dtype}, expected {documents:,} of {DOCUMENT}; "
            f"{_again(path)}"
        )
    return table


def _check_ids(file: Path, tokens: npt.NDArray[Any], vocab_size: int) -> None:
    if vocab_size > np.iinfo(tokens.dtype).max:
        return
    chunk = CHUNK_BYTES // tokens.itemsize
    for start in _chunk_starts(len(tokens), chunk, FULL_SCAN_BYTES // CHUNK_BYTES):
        part = tokens[start : start + chunk]
        if int(part.max()) >= vocab_size:
            position = start + int(np.argmax(part >= vocab_size))
            raise UserError(
                f"{file}: id {int(tokens[position])} at token {position:,} is outside the vocabulary of "
                f"{vocab_size} (ids 0 to {vocab_size - 1}); the corpus was made with another tokenizer or is "
                "damaged"
            )


def _chunk_starts(tokens: int, chunk: int, most: int) -> list[int]:
    """Where to look: every chunk, or `most` of them evenly spaced with the first and the last."""
    chunks = -(-tokens // chunk)
    if chunks <= most:
        return [i * chunk for i in range(chunks)]
    return [i * (chunks - 1) // (most - 1) * chunk for i in range(most)]
