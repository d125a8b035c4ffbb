"""Opening a corpus folder: what it answers, and what it refuses in one line."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from x1_pretrain.corpus import shards
from x1_pretrain.corpus.shards import SPLITS, Corpus, open_corpus
from x1_pretrain.errors import UserError


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    return shutil.copytree(corpus, tmp_path / "copied")


def test_it_opens_with_what_the_files_hold(corpus: Path) -> None:
    opened = open_corpus(corpus, name="web")
    raw = np.frombuffer((corpus / "train.bin").read_bytes(), "<u2")
    assert opened.name == "web"
    assert open_corpus(corpus).name == corpus.name
    assert np.array_equal(opened.train, raw)
    assert not opened.train.flags.writeable
    assert opened.domains == ["code", "prose"]
    ends = [span for spans in opened.val_spans.values() for span in spans]
    assert [ends[0][0], ends[-1][1]] == [0, len(opened.val)]


@pytest.fixture(scope="module")
def opened(corpus: Path) -> Corpus:
    return open_corpus(corpus)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_documents_of_a_span_are_those_that_overlap_it(opened: Corpus, data: st.DataObject) -> None:
    split = data.draw(st.sampled_from(SPLITS))
    tokens = len(opened.tokens(split))
    start = data.draw(st.integers(0, tokens - 1))
    end = data.draw(st.integers(start, tokens + 5))
    table = opened.document_table(split)
    stops = [*table["start"][1:].tolist(), tokens]
    expected = [
        row for row, (a, b) in enumerate(zip(table["start"], stops, strict=True)) if a < end and b > start
    ]
    assert opened.documents(split, start, end).tolist() == table[expected if start < end else []].tolist()


def test_each_document_ends_with_the_end_id_and_has_no_other(opened: Corpus) -> None:
    for split in SPLITS:
        tokens = np.asarray(opened.tokens(split))
        starts = opened.document_table(split)["start"].astype(int)
        assert np.flatnonzero(tokens == opened.eot_id).tolist() == [*(starts[1:] - 1), len(tokens) - 1]


def test_the_bytes_of_its_ids_add_up_to_the_manifest(opened: Corpus) -> None:
    assert opened.token_bytes()[opened.train].sum() == opened.manifest.train.bytes


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(tree | changes))

    return edit


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def as_plain_folder(folder: Path) -> None:
    for name in ("manifest.json", "train.idx.npy", "val.idx.npy", "tokenizer.json"):
        (folder / name).unlink()


def as_unfinished(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / ".parts").mkdir(parents=True)


def wrong_index(folder: Path) -> None:
    np.save(folder / "train.idx.npy", np.zeros(3, dtype="<u8"))


REFUSALS = {
    "no folder": (shutil.rmtree, r"no such corpus folder.*--data-dir.*tokenize_data"),
    "plain token files": (as_plain_folder, r"train.bin but no manifest.json.*tokenize_data"),
    "unfinished": (as_unfinished, r"unfinished.*tokenize"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), r"manifest.json and train.bin are missing"),
    "half a manifest": (cut("manifest.json", 200), r"manifest.json: damaged or only half written"),
    "newer": (edit_manifest(schema_version=2), r"schema_version 2, and this version reads 1"),
    "no dtype": (edit_manifest(dtype="int8"), r"dtype: .*uint16"),
    "no train.bin": (remove("train.bin"), r"train.bin: missing"),
    "empty train.bin": (cut("train.bin", 0), r"train.bin: 0 bytes, expected"),
    "cut train.bin": (cut("train.bin", 101), r"train.bin: 101 bytes, expected [0-9,]+ "),
    "cut val.bin": (cut("val.bin", 100), r"val.bin: 100 bytes, expected"),
    "no val.bin": (remove("val.bin"), r"val.bin: missing"),
    "no index": (remove("train.idx.npy"), r"train.idx.npy: missing or damaged"),
    "cut index": (cut("val.idx.npy", 150), r"val.idx.npy: missing or damaged"),
    "another index": (wrong_index, r"train.idx.npy: 3 rows of uint64"),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer.json: missing"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_with_a_folder_is_one_line(copied: Path, case: str) -> None:
    spoil, words = REFUSALS[case]
    spoil(copied)
    with pytest.raises(UserError, match=words) as caught:
        open_corpus(copied)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["manifest.json", "train.bin", "val.bin", "train.idx.npy", "val.idx.npy", "tokenizer.json"]
)
def test_a_file_that_this_user_may_not_read_is_one_line(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = io.open

    def refusing(file: Any, *args: Any, **more: Any) -> Any:  # root may read anything: it needs a stand-in
        if str(file) == str(copied / name):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **more)

    monkeypatch.setattr(io, "open", refusing)
    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(UserError, match=r"can't be read \(Permission denied\)") as caught:
        open_corpus(copied)
    assert str(caught.value).startswith(f"{copied / name}: ")
    assert "\n" not in str(caught.value)


def test_no_train_tokens_is_refused_and_no_validation_tokens_is_not(copied: Path) -> None:
    tree = json.loads((copied / "manifest.json").read_text())
    index = np.load(copied / "val.idx.npy")
    for split, spoils in (("val", False), ("train", True)):
        tree[split] |= {"tokens": 0, "documents": 0}
        (copied / f"{split}.bin").write_bytes(b"")
        np.save(copied / f"{split}.idx.npy", index[:0])
        edit_manifest(**tree)(copied)
        if not spoils:
            assert len(open_corpus(copied).val) == 0
            open_corpus(copied).check_ids(300)
    with pytest.raises(UserError, match=r"train.bin: no tokens to train on"):
        open_corpus(copied)


def test_an_id_outside_the_vocabulary_is_named_with_its_place(copied: Path) -> None:
    open_corpus(copied).check_ids(300)
    ids = np.fromfile(copied / "val.bin", "<u2")
    ids[[77, 90]] = 301, 301
    ids.tofile(copied / "val.bin")
    open_corpus(copied).check_ids(302)
    with pytest.raises(UserError, match=r"val.bin: id 301 at token 77 .* vocabulary of 301 \(ids 0 to 300\)"):
        open_corpus(copied).check_ids(301)


@pytest.mark.parametrize("place", [0, -1])
def test_a_sampled_check_sees_both_ends(copied: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 64)
    monkeypatch.setattr(shards, "FULL_SCAN_BYTES", 640)
    ids = np.fromfile(copied / "train.bin", "<u2")
    ids[place] = 400
    ids.tofile(copied / "train.bin")
    with pytest.raises(UserError, match="id 400"):
        open_corpus(copied).check_ids(300)


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(2, 40))
def test_chunks_cover_all_or_are_spread_over_all(tokens: int, chunk: int, most: int) -> None:
    starts = shards._chunk_starts(tokens, chunk, most)
    whole = list(range(0, tokens, chunk))
    assert len(starts) == min(len(whole), most)
    assert set(starts) <= set(whole)
    assert starts[:1] == whole[:1]
    assert starts[-1:] == whole[-1:]
    assert len(set(starts)) == len(starts)
