"""How a run stands, from its files: right at every length, at no cost that grows, whatever is broken."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.records.builder import RUN_ID, build_run, event, write_lines

from x1_pretrain.records import newest as module
from x1_pretrain.records.lock import Holder, lock_folder
from x1_pretrain.records.newest import Newest
from x1_pretrain.records.processes import boot_id
from x1_pretrain.records.summary import Summary, newest_whole

NOW = 2_000_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "runs" / "tiny")


def look(folder: Path) -> dict[str, Any]:
    return Summary(folder).look(NOW)


# ------------------------------------------------------------------------------------------------------------
# The newest rows


KINDS = {"any": ['"step"'], "evaluation": ['"val/loss"']}
row = st.fixed_dictionaries(
    {"step": st.integers(0, 99)}, optional={"val/loss": st.floats(0, 9), "text": st.text(max_size=300)}
)
# append rows, append a torn row, cut rows off the end (and write others)
change = st.one_of(
    st.tuples(st.just("append"), st.lists(row, max_size=6)),
    st.tuples(st.just("torn"), st.lists(row, min_size=1, max_size=1)),
    st.tuples(st.just("cut"), st.lists(row, min_size=1, max_size=3)),
)


def expected(data: bytes) -> dict[str, dict[str, Any]]:
    """Read from the start, row by row."""
    found: dict[str, dict[str, Any]] = {}
    for line in data.split(b"\n")[:-1]:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found["any"] = one
        if "val/loss" in one:
            found["evaluation"] = one
    return found


@settings(max_examples=25)
@given(changes=st.lists(change, max_size=8), block=st.sampled_from([7, 64, 1 << 18]))
def test_the_newest_rows_are_those_of_a_reading_from_the_start(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Any], block: int
) -> None:
    file = tmp_path_factory.mktemp("newest") / "metrics.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("x1_pretrain.records.newest.BLOCK_BYTES", block)
        newest = Newest(file, KINDS)
        serial = 0
        for what, rows in changes:
            data = file.read_bytes() if file.exists() else b""
            if what == "cut":
                data = b"".join(line + b"\n" for line in data.split(b"\n")[:-1][:-2])
            whole = data[: data.rfind(b"\n") + 1]  # as our writer does: over a torn end
            for one in rows:
                serial += 1  # as times do: no two rows are the same
                whole += json.dumps(one | {"serial": serial}).encode() + b"\n"
            file.write_bytes(whole[:-3] if what == "torn" else whole)
            assert newest.look() == expected(file.read_bytes())


def test_rows_that_are_cut_off_during_a_look_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind, in the trainer, while the mirror's process looks."""
    file = tmp_path / "metrics.jsonl"
    write_lines(file, [{"step": step, "pad": "x" * 100} for step in range(50)])
    newest, complete = Newest(file, KINDS), module._complete
    assert newest.look()["any"]["step"] == 49

    def cut(stream: Any, start: int) -> int:
        os.truncate(file, 1000)
        return complete(stream, start)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_complete", cut)
        newest.look()
    assert newest.look() == expected(file.read_bytes())


def test_a_damaged_row_is_passed_over(tmp_path: Path) -> None:
    good = b'{"step": 1, "val/loss": 2.0}\n'
    (tmp_path / "m.jsonl").write_bytes(good + b'{"step": 2, "val/loss": \x00\n["step", "val/loss"]\n')
    assert Newest(tmp_path / "m.jsonl", KINDS).look() == expected(good)


def test_a_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "pad": "x" * 200} | ({"val/loss": 1.0} if s == 5 else {}) for s in range(20_000)]
    write_lines(file, rows)
    newest, read = Newest(file, KINDS), 0
    plain = module._between

    def counted(stream: Any, begin: int, end: int) -> bytes:
        nonlocal read
        read += end - begin
        return plain(stream, begin, end)

    monkeypatch.setattr(module, "_between", counted)
    newest.look()
    assert read < 1.3 * file.stat().st_size  # the evaluation is at the very start: once, from end to end
    read = 0
    with file.open("a") as stream:
        stream.write(json.dumps({"step": 20_000}) + "\n")
    assert newest.look()["any"]["step"] == 20_000
    assert newest.look()["evaluation"]["step"] == 5
    assert read < 4_000


def test_an_evaluation_near_the_end_spares_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "m.jsonl", [{"step": s, "val/loss": 1.0, "pad": "x" * 300} for s in range(20_000)])
    read, plain = [], module._between
    monkeypatch.setattr(module, "_between", lambda s, a, b: read.append(b - a) or plain(s, a, b))
    assert Newest(tmp_path / "m.jsonl", KINDS).look()["any"]["step"] == 19_999
    assert sum(read) < 2 * (256 << 10) + 2_000 < (tmp_path / "m.jsonl").stat().st_size / 10


# ------------------------------------------------------------------------------------------------------------
# A summary


def test_a_finished_run(run: Path) -> None:
    said = look(run)
    assert (said["name"], said["run_id"], said["stage"], said["parent"]) == ("tiny", RUN_ID, "pretrain", None)
    assert (said["step"], said["total_steps"], said["tokens"]) == (42, 42, 42 * 64)
    assert (said["val_loss"], said["val_step"]) == (pytest.approx(2.0 + 3 / 42 + 0.05), 42)
    assert (said["state"], said["why"], said["trouble"]) == ("finished", "", "")
    assert said["elapsed_s"] == pytest.approx(4.2)
    assert said["spent_usd"] is None
    assert said["newest_good"] == 42
    listed = json.loads((run / "checkpoints/step-000000042/manifest.json").read_text())["files"]
    assert said["checkpoint_bytes"] == sum(one["bytes"] for one in listed.values())
    assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_a_checkpoint_that_lacks_a_byte_is_not_the_newest_good(run: Path) -> None:
    weights = run / "checkpoints/step-000000042/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert look(run)["newest_good"] == 20
    (run / "checkpoints/step-000000020/manifest.json").write_text("{")
    assert look(run)["newest_good"] == 0
    shutil.rmtree(run / "checkpoints")
    assert (look(run)["newest_good"], look(run)["checkpoint_bytes"]) == (None, 0)


@pytest.mark.parametrize(
    ("events", "state", "why"),
    [
        ([event("start", 0, 1)], "died", "without a word"),
        ([event("start", 0, 1), event("signal", 9, 1) | {"signal": "SIGTERM"}], "interrupted", "SIGTERM"),
        ([event("start", 0, 1), event("fault", 9, 1) | {"message": "no room"}], "ended", "no room"),
        ([event("start", 0, 1), event("budget_stopped", 9, 1)], "stopped", ""),
        (
            [event("signal", 9, 1), event("resume", 9, 2), event("checkpoint", 10, 2)],
            "died",
            "without a word",
        ),
        ([event("finish", 30, 1), event("resume", 30, 2), event("hang", 31, 2)], "ended", "hang"),
        ([], "waiting", "no records"),
    ],
)
def test_what_the_last_session_said(
    tmp_path: Path, events: list[dict[str, Any]], state: str, why: str
) -> None:
    run = build_run(tmp_path / "tiny", steps=30)
    write_lines(run / "events.jsonl", events)
    (run / "lock").write_text("")  # let go of, or of a dead process
    said = look(run)
    assert said["state"] == state
    assert why in said["why"]


def test_no_lock_and_long_silent(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", steps=30)
    assert look(run)["state"] == "silent"
    then = 1_795_256_100.0  # of the builder's rows
    assert Summary(run).look(then + 60)["state"] == "running"


def test_a_held_lock_is_a_running_run(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", steps=30)
    lock = lock_folder(run)
    try:
        said = look(run)
        assert (said["state"], said["host"]) == ("running", os.uname().nodename)
        write_lines(run / "events.jsonl", [event("start", 0, 1), event("signal", 30, 1)])
        assert look(run)["why"] == "it is being opened"  # that signal is of a session before
    finally:
        lock.close()
    assert look(run)["state"] == "interrupted"


def test_a_session_that_said_its_last_word_is_over_before_its_process_is(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", steps=30)
    pid, now = os.getpid(), Holder.here()
    holder = Holder(pid, now.host, "2026-11-21T10:15:00Z", boot_id(), now.start, "ab12cd34")
    (run / "lock").write_text(holder.line())
    write_lines(run / "events.jsonl", [event("start", 0, 1), event("signal", 30, 1) | {"signal": "SIGINT"}])
    assert (look(run)["state"], look(run)["why"]) == ("interrupted", "SIGINT")


def test_a_latch_is_said(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", steps=30)
    (run / "STOP.json").write_text(
        json.dumps({"reason": "above the ceiling", "by": "guard", "exit_code": 77})
    )
    (run / "lock").write_text("")
    assert (look(run)["state"], look(run)["why"]) == ("stopped", "by the guard: above the ceiling")


def test_money_is_the_most_that_anyone_knows(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [rows[0] | {"budget/spent_usd": 0.25}, *rows[1:]])
    assert look(run)["spent_usd"] == "0.25"
    when = "2026-11-21T10:00:00Z"
    tag = {"tag": "x1-a", "provider": "fake", "time_utc": when}
    ledger = [
        {"seq": 1, "event": "intent", "usd_per_hr": "1.19", **tag},
        {"seq": 2, "event": "poll", "machine_usd": "24.803", "usd_per_hr": "1.19", **tag},
    ]
    write_lines(run / "ledger.jsonl", ledger)
    assert look(run)["spent_usd"] == "24.803"


def test_one_object_follows_a_run(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", steps=20)
    summary = Summary(run)
    assert (summary.look(NOW)["step"], summary.look(NOW)["val_step"]) == (20, 20)
    shutil.rmtree(run)
    assert summary.look(NOW)["step"] == 0
    build_run(run, steps=42)
    said = summary.look(NOW)
    assert (said["step"], said["newest_good"], said["state"]) == (42, 42, "finished")


@pytest.mark.parametrize(
    "name", ["config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "ledger.jsonl"]
)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[]\n",
        b'{"step": null}\n',
        b'{"step": "x", "event": "start"}\n',
        b"[" * 9999,
    ],
)
def test_a_broken_file_is_never_an_error(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    said = look(run)
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["newest_good"] == 42 or name == "config.yaml"


@pytest.mark.parametrize("step", ['"nan"', '"inf"', "true", "1e400", "[3]"])
def test_odd_numbers_are_none(run: Path, step: str) -> None:
    (run / "metrics.jsonl").write_text(f'{{"step": {step}, "val/loss": {step}, "tokens": {step}}}\n')
    said = look(run)
    assert said["step"] == 0
    json.dumps(said, allow_nan=False)


def test_nothing_there(tmp_path: Path) -> None:
    said = look(tmp_path / "no" / "such")
    assert (said["step"], said["state"], said["newest_good"], said["trouble"]) == (0, "waiting", None, "")


def test_an_unreadable_folder_is_said(run: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (run / "metrics.jsonl").chmod(0)
    assert "metrics.jsonl" in look(run)["trouble"]


def test_a_look_at_a_long_run_is_cheap(run: Path) -> None:
    rows = [{"step": s, "tokens": s, "train/loss": 2.0, "pad": "x" * 400} for s in range(40_000)]
    rows[30_000]["val/loss"] = 1.0
    write_lines(run / "metrics.jsonl", rows)
    summary = Summary(run)
    summary.look(NOW)
    begun = time.process_time()
    for _ in range(20):
        summary.look(NOW)
    assert (time.process_time() - begun) / 20 < 0.01  # 0.2 ms measured


def test_newest_whole_of_no_folder(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") == (None, 0)
