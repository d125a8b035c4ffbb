"""`x1 watch`: what it knows follows the files, what it shows fits, and it leaves when it should."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.records import builder

from x1_pretrain import cli
from x1_pretrain.command import run as run_app
from x1_pretrain.records import following, live
from x1_pretrain.records.following import CURVE_POINTS, Curve, Seen, open_followed
from x1_pretrain.records.frame import clean, event_line, frame, sparkline, status_line
from x1_pretrain.records.lock import Holder
from x1_pretrain.records.mirror_state import PULLED, PULLED_HOME, MirrorState, go_on_without, write_state
from x1_pretrain.records.run_folder import ENDINGS, open_run
from x1_pretrain.records.summary import Summary
from x1_pretrain.records.tail import Tail
from x1_pretrain.report.material import gather
from x1_pretrain.report.state import state as report_state

NOW = datetime(2026, 11, 21, 10, 16, tzinfo=UTC).timestamp()  # 18 s after the builder's last record


def append(file: Path, *rows: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run at step 30 of 42, with its flight recorder."""
    folder = builder.build_run(tmp_path / "tiny", steps=30)
    steps = [
        {"step": s, "time_utc": f"2026-11-21T10:15:{s:02d}.000Z", "session": 1 if s <= 20 else 2}
        | {"loss": builder.train_loss(s), "grad_norm": 0.5, "clip": 1.0}
        for s in range(1, 31)
    ]
    builder.write_lines(folder / "steps.jsonl", steps)
    return folder


def held_by(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """The lock as a trainer with that process id would hold it."""
    from x1_pretrain.records.processes import boot_id, started

    holder = Holder(process.pid, os.uname().nodename, "-", boot_id(), started(process.pid), "ab12cd34")
    (folder / "lock").write_text(holder.line())


@pytest.fixture
def trainer(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for it."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        held_by(folder, process)
        yield process
        process.kill()


def looked(folder: Path, now_s: float = NOW) -> Seen:
    seen = Seen(open_run(folder))
    seen.look(now_s)
    assert not seen.trouble
    return seen


def text_of(seen: Seen, width: int = 100, now_s: float = NOW) -> str:
    return "\n".join(line.plain for line in frame(seen, seen.state(now_s), now_s, width))


# -----------------------------------------------------------------------------------------------------------
# Following


def test_a_file_cut_back_and_grown_past_its_place_is_read_again(tmp_path: Path) -> None:
    """A rewind within one process: no look falls into the moment when the file was short."""
    file = tmp_path / "steps.jsonl"
    append(file, {"step": 1}, {"step": 2})
    tail = Tail(file)
    assert [row["step"] for row in tail.read()] == [1, 2]
    assert not tail.again
    append(file, {"step": 3})
    assert [row["step"] for row in tail.read()] == [3]
    file.write_text("")
    append(file, {"step": 1}, {"step": 2, "again": 1}, {"step": 3}, {"step": 4})
    assert [row["step"] for row in tail.read()] == [1, 2, 3, 4]
    assert tail.again
    assert tail.read() == []
    assert not tail.again


def test_a_look_costs_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = looked(folder)
    row = {"step": 31, "session": 2, "time_utc": "2026-11-21T10:15:31.000Z", "loss": 1.5, "grad_norm": 0.5}
    append(folder / "steps.jsonl", row)
    parsed: list[bytes] = []
    monkeypatch.setattr("x1_pretrain.records.tail.parse_row", lambda line: parsed.append(line) or row)
    seen.look(NOW + 1)
    assert len(parsed) == 1
    assert seen.step == 31


def test_a_rewind_is_forgotten(folder: Path) -> None:
    seen = looked(folder)
    rows = builder.read_lines(folder / "steps.jsonl")
    builder.write_lines(folder / "steps.jsonl", rows[:25])
    seen.look(NOW + 1)
    assert seen.step == 25
    assert len(seen.steps.loss.means) == 25


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5 * CURVE_POINTS))
def test_a_curve_of_any_length_is_short_and_keeps_the_mean(values: list[float]) -> None:
    curve = Curve()
    for value in values:
        curve.add(value)
    assert len(curve.means) < CURVE_POINTS
    covered = values[: len(curve.means) * curve.each]
    assert len(values) - len(covered) < curve.each
    if covered:
        assert sum(curve.means) * curve.each == pytest.approx(sum(covered), abs=1e-6)


def test_time_left_is_by_the_pace_of_this_session(folder: Path) -> None:
    """Rows of steps 25 and 30 are 5 s apart: a step a second, and 12 are left; 4 s have gone since."""
    at = datetime(2026, 11, 21, 10, 15, 34, tzinfo=UTC).timestamp()
    assert looked(folder).eta_s(at) == pytest.approx(8.0)


# -----------------------------------------------------------------------------------------------------------
# How it stands


def test_a_run_is_what_its_lock_and_its_last_words_say(
    folder: Path, trainer: subprocess.Popen[bytes]
) -> None:
    assert looked(folder).state(NOW).kind == "running"
    assert looked(folder).state(NOW + 1e6).kind == "running"  # compiling may take long: the process lives
    trainer.kill()
    trainer.wait()
    state = looked(folder).state(NOW)
    assert (state.kind, state.over) == ("died", False)  # it may be relaunched in a moment
    assert looked(folder).state(NOW + 120).over
    append(folder / "events.jsonl", builder.event("signal", 30, 2) | {"message": "SIGTERM: saved"})
    (folder / "lock").write_text("")
    state = looked(folder).state(NOW + 120)
    assert (state.kind, state.over) == ("ended", True)
    assert "interrupted: SIGTERM: saved" in state.why
    (folder / "STOP.json").write_text('{"reason": "over the ceiling", "by": "guard", "exit_code": 76}')
    state = looked(folder).state(NOW)
    assert (state.kind, state.why) == ("stopped", "by the guard: over the ceiling")


@pytest.mark.parametrize(("event", "said"), ENDINGS.items())
def test_every_ending_is_known_to_both_who_tell_of_it(folder: Path, event: str, said: str) -> None:
    """The budget's too, where no latch is left: `x1 watch` and the report share one list."""
    append(folder / "events.jsonl", builder.event(event, 30, 2) | {"message": "why"})
    (folder / "lock").write_text("")
    state = looked(folder).state(NOW + 120)
    assert (state.kind, state.why, state.over) == ("ended", f"{said}: why", True)
    page = report_state(gather(open_run(folder), datetime.fromtimestamp(NOW, UTC)))
    assert page.words == f"{said}: why"


def test_a_run_on_another_machine_lives_by_its_heartbeat(folder: Path) -> None:
    (folder / "lock").write_text(Holder(7, "elsewhere", "-", "another-boot", "1", "ab12cd34").line())
    os.utime(folder / "lock", (NOW - 30, NOW - 30))
    assert looked(folder).state(NOW).kind == "running"
    assert looked(folder).state(NOW + 600).kind == "died"


def test_without_a_lock_that_tells_silence_tells(folder: Path) -> None:
    assert looked(folder).state(NOW).kind == "running"
    state = looked(folder).state(NOW + 1000)
    assert (state.kind, state.over) == ("silent", True)
    (folder / "lock").write_text("process 7 on host\n")  # as older versions wrote it
    assert looked(folder).state(NOW + 1000).kind == "silent"


def test_a_finished_run_is_over(tmp_path: Path) -> None:
    state = looked(builder.build_run(tmp_path / "done")).state(NOW)
    assert (state.kind, state.over) == ("finished", True)


def test_a_run_that_only_begins_has_no_manifest_yet(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for name in ("metrics", "events", "steps"):
        (folder / f"{name}.jsonl").unlink()
    seen = Seen(open_followed(str(folder)))
    seen.look(NOW)
    assert seen.state(NOW).kind == "waiting"
    assert "waiting" in text_of(seen)


# -----------------------------------------------------------------------------------------------------------
# What it shows


def mirror(folder: Path, silent_s: float = 0.0, **changes: Any) -> None:
    """The last word of a mirror's process, `silent_s` before NOW."""
    told = {"uri": "s3://b/runs", "label": "s3://b/runs/tiny", "name": "tiny", "folder": "ab12", "epoch": 3}
    write_state(folder, MirrorState(**(told | {"mirrored": [0, 20]} | changes)))
    tree = json.loads((folder / "mirror.json").read_text())
    at = datetime.fromtimestamp(NOW - silent_s, UTC).isoformat().replace("+00:00", "Z")
    (folder / "mirror.json").write_text(json.dumps(tree | {"updated_utc": at}))


def mirror_lines(folder: Path) -> str:
    lines = text_of(looked(folder), 120).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("mirror "))
    return "\n".join(lines[first : first + 3])


def test_how_far_its_mirror_is(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    assert "mirror" not in text_of(looked(folder))
    mirror(folder)
    shown = mirror_lines(folder)
    assert "all of it  checkpoint of step 20  s3://b/runs/tiny  epoch 3" in shown
    mirror(folder, lag_s=72.0, lag_bytes=3 << 20, trouble="s3://b: 503 SlowDown\x1b[2J")
    shown = mirror_lines(folder)
    assert "behind by 1m12s, 3.15 MB" in shown
    assert "s3://b: 503 SlowDown" in shown
    assert "\x1b" not in shown
    seen = looked(folder)
    assert "mirror: behind by 1m12s" in status_line(seen, seen.state(NOW), NOW)
    mirror(folder, mirrored=[], state="lost", why="host b has it")
    assert "no checkpoint yet" in mirror_lines(folder)
    assert "lost: host b has it" in mirror_lines(folder)


def test_a_mirror_that_says_nothing_is_behind(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    mirror(folder, silent_s=59.0)
    assert "all of it" in mirror_lines(folder)
    mirror(folder, silent_s=300.0)
    assert "no word for 5m00s" in mirror_lines(folder)
    mirror(folder, silent_s=300.0, lag_s=10.0, lag_bytes=1 << 20)
    assert "behind by 5m10s, 1.05 MB" in mirror_lines(folder)
    trainer.kill()
    trainer.wait()
    mirror(folder, silent_s=300.0)
    assert "all of it" in mirror_lines(folder)  # it ended: its last word holds


def test_a_copy_says_that_it_is_one_of_when_and_where_the_run_is(folder: Path) -> None:
    (folder / "lock").write_text("")  # as `x1 pull` leaves it
    assert looked(folder).state(NOW).kind == "died"
    mirror(folder, silent_s=3600.0, state="released", why=PULLED)
    seen = looked(folder)
    state = seen.state(NOW)
    assert (state.kind, state.over) == ("copy", True)
    for part in ("of s3://b/runs/tiny as of 2026-11-21 ", "`x1 runs s3://b/runs/tiny`", "`x1 pull s3://b/"):
        assert part in state.why
    assert "this is a copy as of 2026-11-21" in mirror_lines(folder)
    unwrapped = "".join(text_of(seen, 60).split())
    assert state.why.replace(" ", "") in unwrapped  # to its last word, on a narrow screen too
    append(folder / "events.jsonl", builder.event("signal", 30, 2) | {"message": "SIGTERM: saved"})
    assert "then interrupted: SIGTERM: saved; " in looked(folder).state(NOW).why
    (folder / "STOP.json").write_text('{"reason": "over the ceiling", "by": "guard", "exit_code": 76}')
    assert "then stopped by the guard: over the ceiling; " in looked(folder).state(NOW).why
    assert Summary(folder).look(NOW)["state"] == "copy"


def test_a_copy_that_was_trained_on_is_a_run(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    """By its mirror.json alone: files that are copied get their times in any order."""
    mirror(folder, why=PULLED_HOME)
    assert looked(folder).state(NOW).kind == "running"
    trainer.kill()
    trainer.wait()
    later_s = (folder / "mirror.json").stat().st_mtime + 3600
    os.utime(folder / "events.jsonl", (later_s, later_s))
    assert looked(folder).state(NOW).kind == "copy"
    go_on_without(folder)
    assert looked(folder).state(NOW).kind == "died"
    assert "trained on here without it  checkpoint of step 20" in mirror_lines(folder)
    assert looked(builder.build_run(folder.parent / "done")).state(NOW).kind == "finished"


def test_trouble_is_told_to_its_last_word(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    path = f"/a/{'long/' * 30}path"
    mirror(
        folder, trouble=f"{path}: can't be mirrored now (no room on that disk)", state="lost", why=f"{path} b"
    )
    for width in (60, 100, 200):
        shown = "".join(text_of(looked(folder), width).split())
        assert f"{path}:can'tbemirrorednow(noroomonthatdisk)" in shown
        assert f"lost:{path}b" in shown
        assert max(map(len, text_of(looked(folder), width).splitlines())) <= width


def test_a_mirror_file_that_tells_nothing_is_no_mirror(folder: Path) -> None:
    for text in ("", "{", "[]", '{"kind": "mirror-state", "schema_version": 1}'):
        (folder / "mirror.json").write_text(text)
        assert looked(folder).mirror is None
    (folder / "mirror.json").write_text('{"kind": "mirror-state", "schema_version": 99}')
    seen = Seen(open_run(folder))
    seen.look(NOW)
    assert "schema version 99" in seen.trouble  # said on the screen, and it goes on


@pytest.mark.parametrize(
    "odd",
    [
        {"lag_s": "12"},
        {"lag_s": None},
        {"lag_bytes": [1]},
        {"lag_bytes": float("nan")},
        {"mirrored": "20"},
        {"mirrored": [20, "42"]},
        {"mirrored": None},
        {"trouble": 7},
        {"updated_utc": None},
        {"state": {}},
    ],
)
def test_an_odd_word_of_a_mirror_is_said_and_shown_to_nobody(folder: Path, odd: dict[str, Any]) -> None:
    mirror(folder)
    tree = json.loads((folder / "mirror.json").read_text())
    (folder / "mirror.json").write_text(json.dumps(tree | odd))
    seen = Seen(open_run(folder))
    seen.look(NOW)
    assert "mirror.json: holds values that no mirror wrote" in seen.trouble
    assert "holds values that no mirror wrote" in text_of(seen, width=400)
    status_line(seen, seen.state(NOW), NOW)


@pytest.mark.parametrize("at", ["", "yesterday", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00"])
def test_an_odd_time_of_a_mirror_is_no_crash(folder: Path, trainer: subprocess.Popen[bytes], at: str) -> None:
    mirror(folder)
    tree = json.loads((folder / "mirror.json").read_text())
    (folder / "mirror.json").write_text(json.dumps(tree | {"updated_utc": at}))
    assert "mirror  " in mirror_lines(folder)


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200, 400])
@pytest.mark.parametrize("plain", [False, True])
def test_no_line_is_wider_than_the_screen(folder: Path, width: int, plain: bool) -> None:
    long = "a very long word of a message " * 20
    append(folder / "events.jsonl", builder.event("spike", 30, 2) | {"message": long})
    append(folder / "samples.jsonl", {"step": 30, "prompt": "The", "text": "\x1b[2J\nwide 東京 " * 40})
    seen = looked(folder)
    lines = frame(seen, seen.state(NOW), NOW, width, plain)
    assert max(line.cell_len for line in lines) <= max(60, min(200, width))
    assert all("\x1b" not in line.plain and "\n" not in line.plain for line in lines)


def test_the_screen_says_what_the_rows_say(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    row = builder.place(30) | {"train/loss": 2.1, "tokens_per_sec": 412_000.0, "mfu": 0.412}
    row |= {"data/wait_share": 0.031, "noise_scale": 1.5e6, "clipped_share": 0.25, "session": 2}
    row |= {"memory/peak_gib": 61.2, "memory/total_gib": 79.2, "budget/spent_usd": 12.4}
    append(folder / "metrics.jsonl", row)
    shown = text_of(looked(folder), 120)
    for part in ("step 30 of 42 (71.4%)", "412K tokens/s", "MFU 41.2%", "data wait 3.1%", "61.2 of 79.2 GiB",
                 "noise scale 1.5 M tokens", "clipped 25%", "$12.40 spent", "running", "session 2",
                 "loss        2.1000", "all 2.2000", "goodput", "resume"):  # fmt: skip
        assert part in shown, part


def told(name: str, step: int, **fields: Any) -> dict[str, Any]:
    return builder.event(name, step, 2) | {"message": f"a {name} at {step}"} | fields


def test_a_spike_stays_in_sight_however_many_checkpoints_follow(folder: Path) -> None:
    log = folder / "events.jsonl"
    append(log, told("spike", 21, onset=21), told("spike_end", 26, onset=21, recovered=24))
    append(log, *(told("checkpoint", s, seconds=0.25) for s in range(22, 250)))
    shown = text_of(looked(folder))
    assert "spikes      1, last at 21, back at 24" in shown
    assert "checkpoint  last at 249 (0.2 s)" in shown
    assert "a spike at 21" in shown
    assert "a checkpoint at" not in shown
    append(log, told("spike", 28, onset=28))
    assert "spikes      2, last at 28, not back yet" in text_of(looked(folder))
    append(log, told("rewind", 28, from_step=28, to_step=22))
    assert "spikes      2, last at 28, rewound to 22" in text_of(looked(folder))
    append(log, told("resume", 20))  # steps from 21 on are done again; what was rewound stays
    assert "spikes      1, last at 28, rewound to 22" in text_of(looked(folder))
    append(log, told("start", 0))
    assert "spikes      1, last at 28" in text_of(looked(folder))


def test_a_run_without_spikes_says_so(folder: Path) -> None:
    assert "spikes      0" in text_of(looked(folder))


@pytest.mark.parametrize("height", [20, 40, 60])
def test_events_fill_the_free_rows(folder: Path, height: int) -> None:
    append(folder / "events.jsonl", *(told("skip", 30, message=f"skip number {n}") for n in range(90)))
    seen = looked(folder)
    lines = [line.plain for line in frame(seen, seen.state(NOW), NOW, 100, False, height)]
    assert "skip number 89" in "\n".join(lines)
    assert len(lines) == max(height, len(text_of(seen).splitlines()))


def test_the_curve_says_its_scale(folder: Path) -> None:
    steps = builder.read_lines(folder / "steps.jsonl")
    spiked = [row | ({"loss": 77.5} if row["step"] == 12 else {}) for row in steps]
    builder.write_lines(folder / "steps.jsonl", spiked)
    shown = text_of(looked(folder))
    low = min(row["loss"] for row in spiked)
    assert f"lowest {low:.4f}  highest 77.5000  steps 1 to 30" in shown
    rows = [builder.place(step) | {"val/loss": loss} for step, loss in ((20, 2.25), (30, 2.2591))]
    append(folder / "metrics.jsonl", *rows)
    assert "all 2.2591 (+0.0091 since step 20)" in text_of(looked(folder))


def test_the_last_screen_has_the_goodput_of_its_moment(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "done")
    seen = looked(folder)
    seen.goodput = None
    seen.look(NOW + 1)
    assert seen.goodput is None  # not due yet
    seen.recount(NOW + 1)
    assert seen.goodput is not None
    again = Seen(open_run(folder))
    again._goodput_due_s = time.time() + 1e6
    assert live.looked(again).over
    assert again.goodput is not None


def test_before_the_first_step_no_speed_is_told(folder: Path) -> None:
    builder.write_lines(folder / "metrics.jsonl", [builder.place(0) | {"tokens": 0, "val/loss": 5.6}])
    assert "speed" not in text_of(looked(folder))


def test_the_folder_is_named_where_it_has_another_name(folder: Path) -> None:
    assert text_of(looked(folder)).startswith("tiny  ")
    other = folder.rename(folder.parent / "spike")
    assert text_of(looked(other)).startswith("tiny (spike)  ")


def test_what_was_not_measured_is_not_shown(folder: Path) -> None:
    shown = text_of(looked(folder))
    assert "MFU" not in shown
    assert "noise" not in shown
    assert "$" not in shown


def test_an_open_machine_names_what_ends_it(folder: Path) -> None:
    row = {"seq": 1, "event": "intent", "time_utc": "2026-11-21T10:00:00Z", "tag": "x1-a"}
    row |= {"provider": "runpod", "usd_per_hr": "1.19"}
    gone = {"seq": 2, "event": "launched", "time_utc": "2026-11-21T10:00:05Z", "tag": "x1-a"}
    append(folder / "ledger.jsonl", row, gone | {"machine_id": "pod-7"})
    assert f"pod-7 (runpod) bills: `x1 guard {folder}`" in text_of(looked(folder), 200)


def test_the_sparkline_has_the_lowest_at_the_foot_and_the_scale_of_the_rest() -> None:
    bottom = sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, 1)
    assert bottom == ["████▅▄▃▂▁"[1:]] or bottom[0][-1] == "▁"
    top, foot = sparkline([100.0] + [2.0, 1.0] * 5, 11, 2)
    assert foot[0] == top[0] == "█"  # the first fall is cut: it has not the scale
    assert foot[2] == "▁"
    assert foot[1] == top[1] == "█"
    assert sparkline([], 10, 2) == []
    assert len(sparkline([1.0, 2.0], 10, 1)[0]) == 10


def test_lines_for_a_log(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    seen = looked(folder)
    line = status_line(seen, seen.state(NOW), NOW)
    assert line.startswith("running step 30 of 42 (71.4%) loss 2.1000")
    assert "\n" not in line
    odd = {"time_utc": "2026-11-21T10:15:02.5Z", "event": "fault", "message": "a\nb\x1b[31m"}
    assert event_line(odd) == "10:15:02 fault: a b [31m"
    assert clean("a\tb\r\n\x07c") == "a b c"


# -----------------------------------------------------------------------------------------------------------
# The command


def test_once_is_one_screen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(live.app, [str(folder), "--once"]) == 0
    assert "step 30 of 42" in capsys.readouterr().out


def test_lines_end_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = builder.build_run(tmp_path / "done")
    assert run_app(live.app, [str(folder), "--every", "0.1"]) == 0
    assert "finished step 42 of 42" in capsys.readouterr().out


def test_a_run_that_ended_otherwise_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last record is of years ago, and no lock tells."""
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace("2026-11-21", "2020-11-21"))
    assert run_app(live.app, [str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "silent" in error


@pytest.mark.parametrize("flag", ["--linger", "--every-s"])
def test_the_flags_of_what_was_once_called_watch_name_the_guard(
    folder: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(live.app, [str(folder), flag, "5"]) == 2
    assert f"`x1 guard {folder}`" in capsys.readouterr().err


def test_a_folder_of_a_launch_says_where_the_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"seq": 1, "event": "intent", "time_utc": "2026-11-21T10:00:00Z", "tag": "x1-a"}
    append(tmp_path / "ledger.jsonl", row | {"provider": "runpod", "usd_per_hr": "1.19"})
    assert run_app(live.app, [str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"`x1 guard {tmp_path}` is what ends the machine" in error


def test_no_such_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(live.app, ["no-such-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["config.yaml", "ledger.jsonl", "budget.json", "steps.jsonl", "samples.jsonl"]
)
def test_a_damaged_file_is_one_line(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_bytes(b'\x80\x00{"a": \n[1, 2]\n')
    assert run_app(live.app, [str(folder), "--once"]) == (2 if name == "config.yaml" else 0)
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert name == "config.yaml" or "step " in told.out


def test_neither_torch_nor_a_picture_is_loaded() -> None:
    code = "import sys, x1_pretrain.records.live; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_verbs_are_told_apart() -> None:
    assert cli.VERBS["watch"][0] == live.__name__
    assert cli.VERBS["guard"][0] == "x1_pretrain.money.guard_command"


# -----------------------------------------------------------------------------------------------------------
# A real terminal


class Terminal:
    """`x1 watch` in a pseudo-terminal of so many columns."""

    def __init__(self, folder: Path, columns: int = 80, rows: int = 40) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
            environment = os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
            words = [sys.executable, "-m", "x1_pretrain.records.live", str(folder), "--every", "0.2"]
            os.execve(sys.executable, words, {k: v for k, v in environment.items() if k != "COLUMNS"})
        ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.seen = b""

    def until(self, text: str, limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while text.encode() not in self.seen:
            assert time.monotonic() < end, self.seen.decode(errors="replace")[-2000:]
            self.read(0.1)

    def read(self, wait_s: float) -> bool:
        if not select.select([self.descriptor], [], [], wait_s)[0]:
            return True
        try:
            data = os.read(self.descriptor, 1 << 16)
        except OSError:  # the other side is gone
            return False
        self.seen += data
        return bool(data)

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def ended(self) -> int:
        end = time.monotonic() + 60
        while self.read(0.2) and time.monotonic() < end:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("key", ["q", "\x03", "\x1b"])
def test_a_key_leaves_the_screen(folder: Path, trainer: subprocess.Popen[bytes], key: str) -> None:
    terminal = Terminal(folder)
    terminal.until("step 30 of 42")
    terminal.press("x")  # no other key does
    append(folder / "steps.jsonl", {"step": 31, "session": 2, "loss": 1.5, "grad_norm": 0.5})
    terminal.until("step 31 of 42")
    terminal.press(key)
    assert terminal.ended() == 0
    assert b"\x1b[?1049l" in terminal.seen  # back on the screen before
    assert b"Traceback" not in terminal.seen


def test_the_screen_ends_when_the_run_does(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    terminal = Terminal(folder, columns=120)
    terminal.until("step 30 of 42")
    append(folder / "metrics.jsonl", builder.place(42) | {"train/loss": 2.0})
    append(folder / "events.jsonl", builder.event("finish", 42, 2))
    assert terminal.ended() == 0
    assert b"finished" in terminal.seen


def test_an_interrupt_leaves_the_lines_too(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    words = [sys.executable, "-m", "x1_pretrain.records.live", str(folder), "--every", "0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "running step 30" in process.stdout.readline()
        append(folder / "events.jsonl", builder.event("spike", 31, 2) | {"message": "a spike at step 31"})
        while "a spike at step 31" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_listed_states_are_those_that_are_drawn() -> None:
    from typing import get_args

    from x1_pretrain.records.frame import COLORS

    assert set(get_args(following.Kind)) == set(COLORS)
