"""Raw text files, found and read as a stream of documents.

Parquet and JSON lines hold many documents a file; a plain text file is one. Reading never holds more than a
few megabytes beyond the largest document. A file that can't be read to its end raises `BadSource` with the
reason.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from x1_pretrain.errors import UserError

Kind = Literal["parquet", "jsonl", "plain"]

PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".adoc", ".html", ".xml")
CODE = (
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cxx",
    ".hpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".kt",
    ".scala",
)
CODE_TOO = (
    ".js",
    ".jsx",
    ".ts",
    ".tsx",
    ".rb",
    ".php",
    ".pl",
    ".lua",
    ".r",
    ".jl",
    ".hs",
    ".ml",
    ".swift",
    ".cs",
)
SETTINGS = (".sql", ".sh", ".bash", ".css", ".toml", ".yaml", ".yml", ".ini", ".cfg")
PLAIN_ENDINGS = frozenset(PROSE + CODE + CODE_TOO + SETTINGS)
LINE_ENDINGS = {".jsonl": None, ".ndjson": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
ROOT_DOMAIN = "text"  # of files directly in the input folder
DOCUMENT_LIMIT_BYTES = 64 << 20  # tokenizing needs several times a document's size at once
PARQUET_BATCH_BYTES = 4 << 20


class BadSource(Exception):
    """A file that can't be read to its end. `str(error)` is the reason, with the line or row."""


def bad_source_line(reason: str) -> str:
    """What the user reads about a bad file."""
    return f"{reason}; mend or remove it, or leave it out with --skip-bad"


@dataclass(frozen=True)
class Source:
    """A file of documents, or a folder that can't be listed, which stands for the files in it."""

    path: str
    relative: str  # to the input folder, with forward slashes
    domain: str
    kind: Kind
    size_bytes: int
    mtime_ns: int
    unlisted: str | None = None  # of a folder: why it can't be listed


@dataclass(frozen=True)
class Found:
    """What an input folder holds: files to read, and files of unknown endings."""

    sources: list[Source]
    ignored: list[str]


def find_sources(folder: Path, leave_out: Path | None = None) -> Found:
    """The files under `folder`, by domain and then path; hidden files and `leave_out` are passed over."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--input-dir {folder}: {what}; expected a folder of .parquet, .jsonl or text files")
    sources: list[Source] = []
    ignored: list[str] = []
    closed: list[OSError] = []
    for file in _walk(folder, leave_out.resolve() if leave_out else None, closed):
        kind = kind_of(file.name)
        if kind is None:
            ignored.append(file.relative_to(folder).as_posix())
        else:
            sources.append(_describe(folder, file, kind))
    sources += [_unlisted(folder, error) for error in closed]
    sources.sort(key=lambda s: (s.domain, s.relative.split("/")))
    return Found(sources, sorted(ignored))


def kind_of(name: str) -> Kind | None:
    """How a file of this name is read; none if it isn't."""
    lower = name.lower()
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(tuple(LINE_ENDINGS)):
        return "jsonl"
    return "plain" if Path(lower).suffix in PLAIN_ENDINGS else None


def _walk(folder: Path, leave_out: Path | None, closed: list[OSError]) -> Iterator[Path]:
    """The files below `folder`; the error of each folder that can't be listed is put into `closed`."""
    seen: set[str] = set()  # links may lead round in a circle
    for here, folders, files in os.walk(folder, onerror=closed.append, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or (leave_out and Path(real) == leave_out):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def _describe(folder: Path, file: Path, kind: Kind) -> Source:
    relative = file.relative_to(folder).as_posix()
    top, below, _ = relative.partition("/")
    try:
        state = file.stat()
        size_bytes, mtime_ns = state.st_size, state.st_mtime_ns
    except OSError:  # a broken link: named as unreadable when its turn comes
        size_bytes, mtime_ns = 0, 0
    return Source(str(file), relative, top if below else ROOT_DOMAIN, kind, size_bytes, mtime_ns)


def _unlisted(folder: Path, error: OSError) -> Source:
    here = Path(error.filename)
    reason = f"can't be listed ({_reason(error)})"
    if here == folder:
        raise UserError(f"--input-dir {folder}: {reason}")
    relative = here.relative_to(folder).as_posix()
    return Source(str(here), relative, relative.partition("/")[0], "plain", 0, 0, unlisted=reason)


def is_validation(utf8: bytes, fraction: float) -> bool:
    """Whether a document belongs to validation: decided by its content alone.

    Equal documents never lie on both sides, and adding files never moves one.
    """
    digest = hashlib.blake2b(utf8, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def to_utf8(text: str) -> tuple[str, bytes, bool]:
    """(text, its UTF-8, whether it had to be repaired): JSON can hold half a surrogate pair, UTF-8 can't."""
    try:
        return text, text.encode(), False
    except UnicodeEncodeError:
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return mended, mended.encode(), True


def file_sha256(path: str) -> str | None:
    """The hash of a file; none if it can't be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


# Every reader yields (row in the file, text); an empty text is yielded too, so that it can be counted.


def read_documents(
    source: Source, field: str, row_groups: range | None = None, first_row: int = 0
) -> Iterator[tuple[int, str]]:
    """The documents of `source`; of a parquet file, those of `row_groups`, whose first row is `first_row`."""
    if source.unlisted:
        raise BadSource(source.unlisted)
    try:
        if source.kind == "parquet":
            yield from _read_parquet(source, field, row_groups, first_row)
        elif source.kind == "jsonl":
            yield from _read_lines(source, field)
        else:
            yield 0, _read_plain(source)
    except (BadSource, MemoryError):
        raise
    except Exception as error:  # the libraries' errors for damaged files have no common class
        raise BadSource(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def row_group_rows(source: Source, field: str) -> list[tuple[int, int]]:
    """(rows, bytes of text before compression) of each row group of a parquet file."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            column = _column(file, field)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            return [(g.num_rows, g.column(column).total_uncompressed_size) for g in groups]
    except Exception as error:
        raise BadSource(_reason(error)) from error


def _column(file: Any, field: str) -> int:
    """The place of the text column among the leaves of the schema."""
    import pyarrow as pa

    schema = file.schema_arrow
    if field not in schema.names:
        raise BadSource(f"no column '{field}' (it has {', '.join(schema.names)}); name it with --text-field")
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadSource(f"column '{field}' holds {kind}, expected strings")
    return next(i for i in range(len(file.schema)) if file.schema.column(i).path == field)


def _read_parquet(
    source: Source, field: str, row_groups: range | None, first_row: int
) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as pq

    row = first_row
    # A buffer makes Arrow stream the pages of a column; without one it loads each row group's column whole.
    with pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
        column = _column(file, field)
        for group in range(file.metadata.num_row_groups) if row_groups is None else row_groups:
            facts = file.metadata.row_group(group)
            row_bytes = facts.column(column).total_uncompressed_size / max(1, facts.num_rows)
            rows = int(min(4096, max(1, PARQUET_BATCH_BYTES / max(1.0, row_bytes))))
            for batch in file.iter_batches(
                batch_size=rows, row_groups=[group], columns=[field], use_threads=False
            ):
                for text in batch.column(0).to_pylist():
                    yield row, text or ""
                    row += 1


def _read_lines(source: Source, field: str) -> Iterator[tuple[int, str]]:
    for row, line in enumerate(_lines(source)):
        if not line.strip():
            continue
        try:
            document = json.loads(line.decode("utf-8-sig" if row == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise BadSource(f"line {row + 1}: not UTF-8 (byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise BadSource(f"line {row + 1}: not JSON ({_reason(error)})") from error
        yield row, _text_of(document, field, row)


def _text_of(document: Any, field: str, row: int) -> str:
    if not isinstance(document, dict):
        raise BadSource(f"line {row + 1}: expected an object, found {type(document).__name__}")
    if field not in document:
        keys = ", ".join(list(document)[:8])
        raise BadSource(f"line {row + 1}: no field '{field}' (it has {keys}); name it with --text-field")
    text = document[field]
    if text is not None and not isinstance(text, str):
        raise BadSource(f"line {row + 1}: field '{field}' holds {type(text).__name__}, expected text")
    return text or ""


def _lines(source: Source) -> Iterator[bytes]:
    import pyarrow as pa

    ending = next(e for e in LINE_ENDINGS if source.relative.lower().endswith(e))
    # Arrow's streams report a file that was cut short; zstandard's reader would end without a word.
    with (
        pa.input_stream(source.path, compression=LINE_ENDINGS[ending]) as stream,
        io.BufferedReader(stream, 1 << 20) as file,
    ):
        row = 0
        while line := file.readline(DOCUMENT_LIMIT_BYTES + 1):
            row += 1
            if len(line) > DOCUMENT_LIMIT_BYTES:
                raise BadSource(f"line {row}: longer than {DOCUMENT_LIMIT_BYTES >> 20} MiB")
            yield line


def _read_plain(source: Source) -> str:
    size = Path(source.path).stat().st_size
    if size > DOCUMENT_LIMIT_BYTES:
        raise BadSource(
            f"one document of {size >> 20} MiB, at most {DOCUMENT_LIMIT_BYTES >> 20} MiB can be read; "
            "put its documents into a .jsonl file, one a line"
        )
    try:
        return Path(source.path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSource(f"not UTF-8 (byte {error.start})") from error
