"""Record files in pieces, the pace of sending, and outages: each against an independent account of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.stores.model_store import Clock, Fault, ModelStore
from x1_pretrain.mirror import records
from x1_pretrain.mirror.head import CHUNK_BYTES, Object
from x1_pretrain.mirror.outage import Outage
from x1_pretrain.mirror.patience import StoppedError
from x1_pretrain.mirror.records import Records
from x1_pretrain.mirror.sending import Content, Hashed, OtherContentError, Rate, send_file
from x1_pretrain.stores.store import UnreachableError


def content(store: ModelStore, pieces: list[Object]) -> bytes:
    found = b""
    for piece in pieces:
        data = store.objects[f"run/{piece.path}"][0]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (piece.bytes, piece.sha256)
        found += data
    return found


def advance(followed: Records, store: ModelStore) -> None:
    assert followed.advance(followed.sizes(), store, Rate(None))


acts = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30), st.integers(0, 120)),
    st.tuples(st.just("tear"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("cut"), st.integers(0, 100), st.just(0)),
    st.tuples(st.just("again"), st.just(0), st.just(0)),
    st.tuples(st.just("look"), st.just(0), st.just(0)),
)


@settings(max_examples=60)
@given(st.lists(acts, max_size=25))
def test_the_pieces_are_the_complete_lines_whatever_happens_to_the_file(
    todo: list[tuple[str, int, int]],
) -> None:
    """Small pieces, so that many come to be; the file grows, is torn and cut off; sessions end."""
    before = records.PIECE_BYTES, records.BACKLOG_BYTES
    records.PIECE_BYTES, records.BACKLOG_BYTES = 200, 300
    try:
        with tempfile.TemporaryDirectory() as name:
            play(Path(name), todo)
    finally:
        records.PIECE_BYTES, records.BACKLOG_BYTES = before


def play(folder: Path, todo: list[tuple[str, int, int]]) -> None:
    file, store, made = folder / "steps.jsonl", ModelStore(Clock()), 0
    followed = Records(folder, "run", "e0001-a", {})
    file.touch()
    for n, (what, count, size) in enumerate([*todo, ("look", 0, 0)]):
        data = file.read_bytes()
        if what == "append":
            whole = data[: data.rfind(b"\n") + 1]
            rows = [json.dumps({"n": made + k, "x": "y" * size}) for k in range(count)]
            made += count
            file.write_bytes(whole + b"".join(row.encode() + b"\n" for row in rows))
        elif what == "tear":
            file.write_bytes(data + b"{" * count)
        elif what == "cut":
            lines = data.splitlines(keepends=True)
            file.write_bytes(b"".join(lines[: len(lines) * count // 100]))
        elif what == "again":
            followed = Records(folder, "run", f"e{n + 2:04d}-a", followed.pieces())
        else:
            advance(followed, store)
            data = file.read_bytes()
            pieces = followed.pieces().get("steps.jsonl", [])
            assert content(store, pieces) == data[: data.rfind(b"\n") + 1]
            assert all(piece.bytes >= records.PIECE_BYTES for piece in pieces[:-1])
            assert followed.unsent(followed.sizes()) == {}


def test_a_file_that_did_not_change_is_neither_read_nor_sent(tmp_path: Path) -> None:
    store, followed = ModelStore(Clock()), Records(tmp_path, "run", "e0001-a", {})
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    advance(followed, store)
    done = len(store.operations)
    advance(followed, store)
    assert len(store.operations) == done


def test_what_was_sent_before_a_failure_is_not_sent_again(tmp_path: Path) -> None:
    store, followed = ModelStore(Clock()), Records(tmp_path, "run", "e0001-a", {})
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n')
    store.faults.append(Fault("fail", on="put", key="b.jsonl"))
    with pytest.raises(UnreachableError):
        advance(followed, store)
    advance(followed, store)
    assert [op for op, key in store.operations if "a.jsonl" in key] == ["put"]


def test_a_ledger_that_lost_rows_here_keeps_them_there(tmp_path: Path) -> None:
    store, followed = ModelStore(Clock()), Records(tmp_path, "run", "e0001-a", {})
    (tmp_path / "ledger.jsonl").write_text('{"usd": "1"}\n{"usd": "2"}\n')
    advance(followed, store)
    (tmp_path / "ledger.jsonl").write_text('{"usd": "9"}\n')
    advance(followed, store)
    pieces = followed.pieces()
    assert content(store, pieces["ledger.jsonl"]) == b'{"usd": "9"}\n'
    assert content(store, pieces["ledger.lost-e0001-a.jsonl"]) == b'{"usd": "1"}\n{"usd": "2"}\n'


def test_losses_and_rewinds_are_learned_from_rows(tmp_path: Path) -> None:
    store = ModelStore(Clock())
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    metrics.write_text(
        '{"step": 10, "val/loss": 2.5}\n{"step": 20, "val/loss": "nan"}\nnot json "val/loss"\n'
    )
    events.write_text('{"event": "rewind", "step": 20, "to_step": 10}\n{"event": "rewind", "step": 9}\n')
    first = Records(tmp_path, "run", "e0001-a", {})
    advance(first, store)
    assert (first.losses, first.rewinds) == ({10: 2.5}, [10])
    second = Records(tmp_path, "run", "e0002-a", first.pieces())
    advance(second, store)  # known to the mirror: read again, but told before
    assert (second.losses, second.rewinds) == ({10: 2.5}, [])
    metrics.write_text('{"step": 10, "val/loss": 3.5}\n')
    advance(second, store)
    assert second.losses == {10: 3.5}


def test_enough_ends_it_between_two_pieces(tmp_path: Path) -> None:
    store, followed = ModelStore(Clock()), Records(tmp_path, "run", "e0001-a", {})
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n' * 1_000_000)
    asked = iter([False, True])
    assert not followed.advance(followed.sizes(), store, Rate(None), lambda: next(asked))
    assert len(store.operations) == 1
    advance(followed, store)
    assert content(store, followed.pieces()["steps.jsonl"]) == (tmp_path / "steps.jsonl").read_bytes()


def test_what_was_cut_off_is_sent_up_to_where_it_was_whatever_the_time(tmp_path: Path) -> None:
    """Else a head would name a checkpoint without the rows before it."""
    store, followed = ModelStore(Clock()), Records(tmp_path, "run", "e0001-a", {})
    file, row = tmp_path / "steps.jsonl", '{"step": 1}\n'
    file.write_text(row * 900)
    advance(followed, store)
    file.write_text(row * 800 + '{"step": 2}\n')
    again = Records(tmp_path, "run", "e0002-a", followed.pieces())
    assert not again.advance(again.sizes(), store, Rate(None), lambda: True)
    assert content(store, again.pieces()["steps.jsonl"]) == row.encode() * 900
    store.faults.append(Fault("fail", on="put"))
    asked = iter([False])
    with pytest.raises(UnreachableError):
        again.advance(again.sizes(), store, Rate(None), lambda: next(asked, True))
    again.advance(again.sizes(), store, Rate(None), lambda: True)
    assert content(store, again.pieces()["steps.jsonl"]) == file.read_bytes()


def test_a_row_longer_than_a_backlog_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BACKLOG_BYTES", 100)
    store, followed = ModelStore(Clock()), Records(tmp_path, "run", "e0001-a", {})
    rows = b'{"step": 1}\n' + b'{"long": "' + b"y" * 300 + b'"}\n{"step": 3}\n'
    (tmp_path / "steps.jsonl").write_bytes(rows)
    advance(followed, store)
    assert content(store, followed.pieces()["steps.jsonl"]) == rows


# --- sending ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 1 << 20, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES]
)
def test_hashes_of_the_whole_and_of_each_chunk(size: int) -> None:
    data = os.urandom(size)
    hashed = Hashed(io.BytesIO(data), size)
    assert b"".join(hashed.pieces()) == data
    chunks = [data[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)]
    want = [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
    assert hashed.content() == Content(size, hashlib.sha256(data).hexdigest(), want)


def test_a_file_that_became_shorter_is_other_content() -> None:
    with pytest.raises(OtherContentError):
        list(Hashed(io.BytesIO(b"abc"), 4).pieces())


def test_the_rate_is_kept_over_any_time() -> None:
    clock = Clock()
    rate = Rate(1000.0, clock.steady, clock.sleep)
    for _ in range(20):
        rate.take(500, lambda: False)
    assert clock.t == pytest.approx(10.0)
    clock.t += 100  # a pause is no credit
    rate.take(500, lambda: False)
    assert clock.t == pytest.approx(110.5)
    assert rate.count(10**6) > 999  # small things do not wait, but are paid for
    with pytest.raises(StoppedError):
        rate.take(1, lambda: True)


def test_a_store_that_kept_another_size_is_no_success(tmp_path: Path) -> None:
    store, path = ModelStore(Clock()), tmp_path / "weights"
    path.write_bytes(b"abcdef")
    whole = store._write
    store._write = lambda key, data: whole(key, data[:-1])  # type: ignore[method-assign,assignment]
    with path.open("rb") as file, pytest.raises(UnreachableError, match="5 bytes after 6"):
        send_file(store, "run/weights", file, Rate(None), lambda: False)


# --- outages ------------------------------------------------------------------------------------------------


def test_an_outage_is_told_once_at_either_end() -> None:
    outage = Outage(30.0, lambda: 1.0)
    said = [outage.failed(float(n), "503") for n in range(6)]
    assert [n for n, text in enumerate(said) if text] == [2]
    over = outage.worked(65.0)
    assert over == "is mirrored again, after 65 s"
    assert outage.worked(66.0) is None
    assert outage.failed(70.0, "x") is None  # a new one: patience again
    assert outage.failed(101.0, "x") is not None  # after so long


def test_the_waits_double_to_a_minute() -> None:
    outage, waits = Outage(1e9, lambda: 1.0), []
    for n in range(9):
        outage.failed(float(n), "x")
        waits.append(outage.wait_s())
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert Outage(1.0, lambda: 0.0).wait_s() > 0
