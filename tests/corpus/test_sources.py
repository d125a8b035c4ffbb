"""Finding raw files and reading them: every kind, and every way in which one can be bad."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.corpus import sources, units
from x1_pretrain.corpus.sources import (
    BadSource,
    find_sources,
    is_validation,
    read_documents,
    row_group_rows,
    to_utf8,
)
from x1_pretrain.corpus.units import plan_units
from x1_pretrain.errors import UserError

TEXTS = ["first", "", "zweites äöü", "三つ目\nwith a line end", "<|endoftext|>", " "]


def lines(texts: list[Any], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def write(file: Path, data: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def parquet(file: Path, texts: Any, group: int = 1000, field: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(texts)), field: texts}), file, row_group_size=group)
    return file


def read(folder: Path, field: str = "text") -> list[tuple[int, str]]:
    found = find_sources(folder)
    return [document for source in found.sources for document in read_documents(source, field)]


def test_files_are_found_by_domain_then_path_and_hidden_ones_are_not(tmp_path: Path) -> None:
    names = ["b/z.txt", "a/sub/y.md", "a/x.jsonl.gz", "top.py", "zz/last.parquet", "a.b/c.TXT"]
    hidden = [".git/config.txt", "a/__pycache__/x.py", "a/.hidden.txt", "a/.cache/x.parquet"]
    unknown = ["a/picture.png", "notes", "b/data.json"]
    for name in names + hidden + unknown:
        write(tmp_path / name, b"x")
    found = find_sources(tmp_path)
    assert [(s.domain, s.relative) for s in found.sources] == [
        ("a", "a/sub/y.md"),
        ("a", "a/x.jsonl.gz"),
        ("a.b", "a.b/c.TXT"),
        ("b", "b/z.txt"),
        ("text", "top.py"),
        ("zz", "zz/last.parquet"),
    ]
    assert found.ignored == sorted(unknown)


def test_the_output_folder_is_not_read_and_links_in_a_circle_end(tmp_path: Path) -> None:
    write(tmp_path / "a/x.txt", b"x")
    write(tmp_path / "out/y.txt", b"y")
    (tmp_path / "a/round").symlink_to(tmp_path, target_is_directory=True)
    found = find_sources(tmp_path, leave_out=tmp_path / "out")
    assert [s.relative for s in found.sources] == ["a/x.txt"]


def test_an_input_folder_that_cannot_be_listed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Any = ".") -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"^--input-dir {tmp_path}: can't be listed \(Permission denied\)"):
        find_sources(tmp_path)


@pytest.mark.parametrize(("make", "words"), [(False, "no such folder"), (True, "is a file")])
def test_no_folder_is_one_line(tmp_path: Path, make: bool, words: str) -> None:
    if make:
        write(tmp_path / "in", b"")
    with pytest.raises(UserError, match=rf"--input-dir .*{words}"):
        find_sources(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.jsonl", bytes),
        ("x.ndjson", lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n")),
        ("x.jsonl.gz", gzip.compress),
        ("x.JSONL.GZ", lambda raw: gzip.compress(raw[:50]) + gzip.compress(raw[50:])),
        ("x.jsonl.zst", zstandard.compress),
        ("y.jsonl.zst", lambda raw: zstandard.compress(raw[:50]) + zstandard.compress(raw[50:])),
    ],
)
def test_json_lines_are_read_whole(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    write(tmp_path / name, pack(lines(TEXTS)))
    assert read(tmp_path) == list(enumerate(TEXTS))


def test_rows_of_json_lines_count_blank_lines_and_null_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", b'{"text": "a"}\n\n  \n{"text": null}\n{"text": "b"}')
    assert read(tmp_path) == [(0, "a"), (3, ""), (4, "b")]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.chunked_array([TEXTS[:2], TEXTS[2:]]),
    ],
    ids=["string", "large", "dictionary", "chunked"],
)
def test_parquet_is_read_whole(tmp_path: Path, column: Any) -> None:
    parquet(tmp_path / "x.parquet", column, group=4)
    assert read(tmp_path) == list(enumerate(TEXTS))


def test_a_parquet_null_is_empty_and_the_field_has_a_name(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", ["a", None], field="content")
    assert read(tmp_path, "content") == [(0, "a"), (1, "")]


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    write(tmp_path / "x.md", "\ufefféa\r\n\n<|endoftext|>".encode())
    assert read(tmp_path) == [(0, "éa\r\n\n<|endoftext|>")]


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


# The same in every run: what a reader says of a flipped byte depends on where it falls.
MANY = lines([random.Random(i).randbytes(20).hex() for i in range(20_000)])
BAD = {
    "cut.jsonl.gz": (gzip.compress(MANY, mtime=0)[:-9000], "Truncated"),
    "cut.jsonl.zst": (zstandard.compress(MANY)[:-9000], "Truncated"),
    "tail.jsonl.gz": (gzip.compress(MANY, mtime=0)[:-4], "Truncated"),
    "flipped.jsonl.gz": (damaged(gzip.compress(MANY, mtime=0)), "inflate failed|not JSON"),
    "junk.jsonl.zst": (zstandard.compress(MANY) + b"junk", "ZSTD"),
    "not.jsonl.zst": (b"hello", "ZSTD"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2: not JSON"),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', "line 2: expected an object, found list"),
    "field.jsonl": (lines(["a"], "content"), "line 1: no field 'text' .*content.*--text-field"),
    "number.jsonl": (lines(["a", 7]), "line 2: field 'text' holds int"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: not UTF-8"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not JSON"),
    "latin.txt": (b"caf\xe9", "not UTF-8 .byte 3"),
    "utf16.txt": ("text".encode("utf-16"), "not UTF-8"),
    "empty.parquet": (b"", "0 bytes"),
    "not.parquet": (b"PAR1" + b"x" * 100, "magic|footer|Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_says_why(tmp_path: Path, name: str) -> None:
    data, words = BAD[name]
    write(tmp_path / name, data)
    with pytest.raises(BadSource, match=words) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cut_parquet_a_missing_column_and_a_wrong_type_say_why(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "x.parquet", ["a" * 1000, "b"]).read_bytes()
    write(tmp_path / "cut/x.parquet", whole[: len(whole) // 2])
    parquet(tmp_path / "column/x.parquet", ["a"], field="content")
    parquet(tmp_path / "type/x.parquet", [b"a"])
    with pytest.raises(BadSource, match=r"magic|footer"):
        read(tmp_path / "cut")
    with pytest.raises(BadSource, match=r"no column 'text' \(it has id, content\); .*--text-field"):
        read(tmp_path / "column")
    with pytest.raises(BadSource, match="holds binary, expected strings"):
        read(tmp_path / "type")


def test_a_page_damaged_in_a_parquet_file_says_why(tmp_path: Path) -> None:
    texts = [os.urandom(50).hex() for _ in range(2000)]
    data = parquet(tmp_path / "x.parquet", texts).read_bytes()
    write(tmp_path / "x.parquet", data[:20_000] + os.urandom(2000) + data[22_000:])
    with pytest.raises(BadSource):
        read(tmp_path)


def test_a_link_to_nothing_and_a_folder_of_no_access_say_why(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(BadSource, match="No such file"):
        read(tmp_path)


def test_a_document_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DOCUMENT_LIMIT_BYTES", 1000)
    write(tmp_path / "x.txt", b"x" * 1001)
    with pytest.raises(BadSource, match=r"one document of .*jsonl"):
        read(tmp_path)
    write(tmp_path / "j/x.jsonl", lines(["a", "b" * 1000]))
    with pytest.raises(BadSource, match="line 2: longer than"):
        read(tmp_path / "j")


@given(st.lists(st.text(st.characters(), max_size=30), min_size=1), st.integers(1, 7))
def test_row_groups_read_apart_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], group: int
) -> None:
    texts = [to_utf8(text)[0] for text in texts]
    folder = tmp_path_factory.mktemp("groups")
    parquet(folder / "x.parquet", texts, group)
    source = find_sources(folder).sources[0]
    first, documents = 0, []
    for i, (rows, _) in enumerate(row_group_rows(source, "text")):
        documents += read_documents(source, "text", range(i, i + 1), first)
        first += rows
    assert documents == list(enumerate(texts))


def test_a_plan_covers_every_row_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 3000)
    monkeypatch.setattr(units, "LARGEST_UNIT_BYTES", 3000)
    for i in range(5):
        write(tmp_path / f"a/{i}.txt", b"x" * 900)
        parquet(tmp_path / f"b/{i}.parquet", [os.urandom(100).hex() for _ in range(i * 20 + 1)], group=3)
    found = find_sources(tmp_path).sources
    plan = plan_units(found, "text")
    assert len(plan) > 10
    covered = [
        (piece.source.relative, row)
        for unit in plan
        for piece in unit.pieces
        for row, _ in read_documents(
            piece.source, "text", range(*piece.row_groups) if piece.row_groups else None, piece.first_row
        )
    ]
    assert covered == [
        (source.relative, row) for source in found for row, _ in read_documents(source, "text")
    ]
    opened = [p.source.relative for unit in plan for p in unit.pieces if p.opens_file]
    assert opened == [source.relative for source in found]


@given(st.text(st.characters(blacklist_categories=()), max_size=20))
def test_half_a_surrogate_pair_is_repaired_and_nothing_else_changes(text: str) -> None:
    mended, utf8, repaired = to_utf8(text)
    assert utf8.decode() == mended
    assert repaired == any(0xD800 <= ord(c) < 0xE000 for c in text)
    if not repaired:
        assert mended == text


@given(st.binary(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_validation_only_grows_with_its_share(content: bytes, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not is_validation(content, 0)
    assert is_validation(content, low) <= is_validation(content, high)


def test_validation_has_the_asked_share() -> None:
    chosen = sum(is_validation(str(i).encode(), 0.1) for i in range(20_000))
    assert abs(chosen - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
