"""`x1 push`: a run that nobody trains goes to a mirror, and no run is written over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mirror.run_folders import RunFolder, check_checkpoint, record
from tests.mirror.test_publisher import lease_on
from tests.stores.model_store import Clock, Fault, ModelStore
from x1_pretrain.command import run as run_app
from x1_pretrain.mirror import outage, push_command
from x1_pretrain.mirror.heads import look
from x1_pretrain.records.lock import lock_folder
from x1_pretrain.records.mirror_state import read_state
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.opened import open_store


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "runs" / "tiny")
    for step in range(1, 11):
        made.step(step)
    made.save(10)
    return made


def push(run: RunFolder, mirror: Path, *more: str) -> int:
    return run_app(push_command.app, [str(run.folder), str(mirror), *more], "x1 push")


def test_all_of_it_is_sent_and_a_second_push_sends_next_to_nothing(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = tmp_path / "mirror"
    assert push(run, mirror) == 0
    assert "all of it is in" in capsys.readouterr().err
    store = open_store(parse(str(mirror)), None)
    found = look(store, "tiny")
    assert found is not None
    head = found[0]
    check_checkpoint(store, head, 10)
    assert record(store, head, "steps.jsonl") == (run.folder / "steps.jsonl").read_bytes()
    assert (head.writer.state, head.epochs[-1].from_step) == ("released", 10)
    state = read_state(run.folder)
    assert state is not None
    assert (state.state, state.mirrored) == ("released", [10])
    assert push(run, mirror) == 0
    again = look(store, "tiny")
    assert again is not None
    assert again[0].checkpoints == head.checkpoints
    assert "0 bytes sent" in capsys.readouterr().err


def test_a_run_that_is_trained_here_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = lock_folder(run.folder)
    try:
        assert push(run, tmp_path / "mirror") == 78
    finally:
        lock.close()
    assert "training here" in capsys.readouterr().err
    assert not (tmp_path / "mirror").exists()


def test_a_mirror_that_is_further_on_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = tmp_path / "mirror"
    ahead = RunFolder(tmp_path / "elsewhere" / "tiny")
    for step in range(1, 21):
        ahead.step(step)
    ahead.save(20)
    assert push(ahead, mirror) == 0
    capsys.readouterr()
    assert push(run, mirror) == 78
    said = capsys.readouterr().err
    assert "step 20 there, step 10 here" in said
    assert said.count("\n") == 1


def test_rows_that_were_cut_out_here_come_back_and_stay_there(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror, metrics, ledger = tmp_path / "mirror", run.folder / "metrics.jsonl", run.folder / "ledger.jsonl"
    ledger.write_text("".join(f'{{"seq": {n}, "event": "reading", "usd": "{n}"}}\n' for n in (1, 2, 3)))
    assert push(run, mirror) == 0
    whole, paid = metrics.read_bytes(), ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:3] + lines[6:]))
    ledger.write_bytes(paid.splitlines(keepends=True)[0])
    capsys.readouterr()
    assert push(run, mirror) == 0
    said = capsys.readouterr().err
    assert "metrics.jsonl: 3 rows that were missing here, from the mirror" in said
    assert "ledger.jsonl: 2 rows from the mirror" in said
    assert (metrics.read_bytes(), ledger.read_bytes()) == (whole, paid)
    store = open_store(parse(str(mirror)), None)
    found = look(store, "tiny")
    assert found is not None
    assert record(store, found[0], "metrics.jsonl") == whole
    assert set(found[0].records) == {"events.jsonl", "ledger.jsonl", "metrics.jsonl", "steps.jsonl"}


def test_another_run_of_the_name_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = tmp_path / "mirror"
    assert push(run, mirror) == 0
    other = RunFolder(tmp_path / "other" / "tiny")
    manifest = other.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("abcdef", "fedcba"))
    capsys.readouterr()
    assert push(other, mirror) == 78
    assert "another name" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["s3:/typo", "{mirror}/tiny", "ftp://somewhere/runs"])
def test_a_uri_that_can_not_be_is_bad_usage(
    run: RunFolder, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, Path(uri.format(mirror=tmp_path / "mirror")) if "{" in uri else uri) == 2  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_mirror_that_can_not_be_written_is_refused(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir(mode=0o500)
    assert push(run, tmp_path / "mirror") == 78


def test_what_could_not_be_sent_is_named_and_the_exit_code_is_1(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = run.checkpoints / "step-000000010" / "model.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    opened, lines = open_run(run.folder), []
    job = push_command.job_of(opened, "model://runs", None, False, None)
    assert push_command.send(opened, job, ModelStore(Clock()), lines.append) == 1
    assert "not in the mirror: checkpoint of step 10: damaged here" in lines


def test_a_store_that_stays_away_ends_it_with_what_is_left(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_command, "PATIENCE_S", 0.05)
    monkeypatch.setattr(outage, "FIRST_S", 0.05)
    store = ModelStore(Clock())
    store.faults.append(Fault("fail", on="put_stream", times=10**6))
    opened, lines = open_run(run.folder), []
    job = push_command.job_of(opened, "model://runs", None, False, None)
    assert push_command.send(opened, job, store, lines.append) == 1
    assert any(line.startswith("not in the mirror: checkpoint of step 10 (") for line in lines)
    found = look(store, "tiny")
    assert found is not None
    assert found[0].writer.state == "released"


def test_a_push_that_can_not_begin_gives_the_run_back(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(push_command, "write_state", full)
    store, opened = ModelStore(Clock()), open_run(run.folder)
    job = push_command.job_of(opened, "model://runs", None, False, None)
    with pytest.raises(OSError, match="No space left"):
        push_command.send(opened, job, store, print)
    found = look(store, "tiny")
    assert found is not None
    assert found[0].writer.state == "released"
    assert found[0].checkpoints == []


def test_the_store_is_closed_at_the_end(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    store, closed = ModelStore(Clock()), []
    monkeypatch.setattr(store, "close", lambda: closed.append(1))
    monkeypatch.setattr(push_command, "open_store", lambda *_: store)
    assert push(run, run.folder.parent / "mirror") == 0
    assert closed == [1]


@pytest.mark.slow
def test_a_run_that_lives_elsewhere_is_not_pushed_over(run: RunFolder) -> None:
    store, clock = ModelStore(Clock()), Clock()
    lease_on(store, clock, folder="another folder")
    opened = open_run(run.folder)
    job = push_command.job_of(opened, "model://runs", None, False, None)
    beat = iter(range(100))

    def lives(op: str, key: str) -> None:
        if op == "get" and next(beat) > 1:
            data = store.objects["tiny/head.json"][0]
            store._write("tiny/head.json", data + b" ")

    store.before = lives
    with pytest.raises(push_command.RefusedError, match="is being trained on host"):
        push_command.send(opened, job, store, print)
