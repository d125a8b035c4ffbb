"""What goes wrong in a run is said in one line, ends as promised, and loses nothing: the relaunched run is,
bit for bit, the one that nothing happened to."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.corpora import write_config
from tests.end_to_end.in_process import train_here
from tests.end_to_end.processes import (
    Training,
    curve,
    last_step,
    rows,
    wait_until,
    weights,
)

from x1_pretrain.records.checkpoint_files import newest_good, step_of

SCRIPT = Path(__file__).with_name("faulty.py")
STEPS, FAULT_AT = 40, 12
Capture = pytest.CaptureFixture[str]

# What a phase may take; short where it hangs, long enough for a busy machine elsewhere.
PATIENCE = dict.fromkeys(("step_s", "data_s", "evaluation_s", "checkpoint_s", "save_s"), 60)
SHORT = {
    "held": "data_s",
    "data-hangs": "data_s",
    "step-hangs": "step_s",
    "library-hangs": "step_s",
    "evaluation-hangs": "evaluation_s",
    "checkpoint-hangs": "checkpoint_s",
}


def patience(fault: str) -> list[str]:
    limits = {"first_step_s": 300} | PATIENCE | ({SHORT[fault]: 3} if fault in SHORT else {})
    return [f"--set=watchdog.{name}={seconds}" for name, seconds in limits.items()]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "tiny.yaml",
        training={"total_steps": STEPS, "micro_batch": 4},
        checkpoint={"every": 10},
        evaluation={"every": 15, "tokens": 512, "prompts": ["the cat"], "sample_tokens": 6},
    )


@pytest.fixture
def data(tmp_path: Path, corpus: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(corpus, tmp_path / corpus.name))


class Case:
    """A run to break, and to relaunch."""

    def __init__(self, run: Path, config: Path, data: Path, capfd: Capture) -> None:
        self.run, self.capfd = run, capfd
        self.command = ("--config", config, "--data-dir", data, "--run-dir", run)

    def start(self, fault: str, *more: str) -> Training:
        return Training(fault, *self.command, *patience(fault), *more, script=SCRIPT)

    def broken(self, fault: str, *more: str) -> tuple[int, str]:
        return self.start(fault, *more).end()

    def hold(self) -> Training:
        """A run that stands before update FAULT_AT + 1 until `go`, and is slow from then on."""
        training = self.start("held")
        training.wait_for_line("FAULT")
        return training

    def go(self) -> None:
        (self.run.parent / "go").touch()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [r for r in rows(self.run / "events.jsonl") if r["event"] == name]

    def saved(self) -> int:
        good, skipped = newest_good(self.run / "checkpoints")
        assert good is not None
        assert not skipped
        return step_of(good)

    def assert_relaunched_is(self, undisturbed: Path) -> None:
        """The same command, without the fault, in this process: quicker."""
        done = train_here(self.capfd, *self.command)
        assert done.code == 0, done.out + done.err
        assert_same(self.run, undisturbed)

    def stacks(self, rank: int = 0) -> str:
        (file,) = self.run.glob(f"hang-rank{rank}-*.txt")
        return file.read_text()


def assert_same(run: Path, undisturbed: Path) -> None:
    assert curve(run) == curve(undisturbed)
    assert rows(run / "blocks.jsonl") == rows(undisturbed / "blocks.jsonl")
    steps = [(r["step"], r["loss"], r["grad_norm"]) for r in rows(run / "steps.jsonl")]
    assert steps == [(r["step"], r["loss"], r["grad_norm"]) for r in rows(undisturbed / "steps.jsonl")]
    assert weights(run) == weights(undisturbed)


@pytest.fixture
def case(tmp_path: Path, config: Path, data: Path, capfd: Capture) -> Case:
    return Case(tmp_path / "run", config, data, capfd)


def one_line(output: str, start: str) -> str:
    """The only line that begins so; and no traceback anywhere."""
    assert "Traceback" not in output, output
    found = [line for line in output.splitlines() if line.startswith(start)]
    assert len(found) == 1, output
    return found[0]


def all_saved_numbers_are_finite(run: Path) -> bool:
    good = list(run.glob("checkpoints/step-*/*.safetensors"))
    assert good
    return all(bool(np.isfinite(t).all()) for f in good for t in load_file(f).values())


# ------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.slow
def test_a_token_beyond_the_vocabulary_from_the_beginning(case: Case, data: Path, undisturbed: Path) -> None:
    with spoilt(data / "train.bin"):
        code, output = case.broken("slow")
    assert code == 2, output
    assert "65535" in one_line(output, "x1: ")
    case.assert_relaunched_is(undisturbed)


def test_a_token_beyond_the_vocabulary_written_while_the_run_reads(
    case: Case, data: Path, undisturbed: Path
) -> None:
    training = case.hold()
    with spoilt(data / "train.bin"):
        case.go()
        code, output = training.end()
    assert code == 2, output
    line = one_line(output, "x1: ")
    assert re.search(r"train\.bin: token id 65535 at token \d+ is not in the vocabulary of \d+", line), line
    assert "relaunch" in line
    assert case.saved() == 10
    assert all_saved_numbers_are_finite(case.run)
    case.assert_relaunched_is(undisturbed)


@contextlib.contextmanager
def spoilt(file: Path) -> Iterator[None]:
    """All tokens but the first few are ids that no tokenizer gave; restored afterwards."""
    before = file.read_bytes()
    with file.open("r+b") as stream:
        stream.seek(20)
        stream.write(b"\xff" * (len(before) - 20))
    yield
    file.write_bytes(before)


@pytest.mark.parametrize("fault", ["reader-dies", pytest.param("reader-ends", marks=pytest.mark.slow)])
def test_the_reading_thread_dies(fault: str, case: Case, undisturbed: Path) -> None:
    code, output = case.broken(fault)
    assert code == 1, output
    (event,) = case.events("fault")
    said = "Input/output error" if fault == "reader-dies" else "the reading thread ended early"
    assert said in event["message"]
    assert case.saved() == (10 if fault == "reader-dies" else 0)
    case.assert_relaunched_is(undisturbed)


# ------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def test_a_weight_that_is_not_a_number(case: Case, undisturbed: Path) -> None:
    code, output = case.broken("weight")
    assert code == 1, output
    assert "3 steps in a row were not finite" in one_line(output, "x1: ")
    assert "weights that are not finite: model.layers.1.mlp.up_proj.weight: 1 of 2,048 values" in output
    assert "the output of model.layers.1.mlp.up_proj" in output
    assert "relaunch to resume" in output
    assert len(case.events("not_finite")) == 3
    assert case.saved() == 10
    assert all_saved_numbers_are_finite(case.run)
    case.assert_relaunched_is(undisturbed)


@pytest.mark.slow
def test_gradients_that_are_not_numbers(case: Case) -> None:
    code, output = case.broken("gradient")
    assert code == 1, output
    assert "3 steps in a row were not finite" in one_line(output, "x1: ")
    assert "finite when computed again" in output  # the fault is not in the batch
    assert case.saved() == FAULT_AT + 2  # weights of before, data of the two that were left out are behind
    assert all_saved_numbers_are_finite(case.run)
    done = train_here(case.capfd, *case.command)
    assert done.code == 0, done.err
    assert [r["step"] for r in rows(case.run / "steps.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_one_gradient_that_is_not_a_number_costs_one_update(case: Case, undisturbed: Path) -> None:
    code, output = case.broken("gradient-once")
    assert code == 0, output
    (event,) = case.events("not_finite")
    assert f"step {FAULT_AT + 1}: " in event["message"]
    assert "this update was not made" in event["message"]
    mine, whole = rows(case.run / "steps.jsonl"), rows(undisturbed / "steps.jsonl")
    losses = lambda found: [r["loss"] for r in found]  # noqa: E731
    assert losses(mine)[: FAULT_AT + 1] == losses(whole)[: FAULT_AT + 1]
    assert mine[FAULT_AT]["grad_norm"] == "nan"
    assert all(math.isfinite(float(loss)) for loss in losses(mine))
    assert [r["step"] for r in mine] == list(range(1, STEPS + 1))
    assert all_saved_numbers_are_finite(case.run)


# ------------------------------------------------------------------------------------------------------------
# Hangs

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("fault", "phase", "saved"),
    [
        ("data-hangs", "data", FAULT_AT),
        pytest.param("step-hangs", "step", FAULT_AT, marks=slow),
        pytest.param("evaluation-hangs", "evaluation", 15, marks=slow),
        pytest.param("checkpoint-hangs", "checkpoint", 0, marks=slow),
    ],
)
def test_a_hang_is_written_down_saved_and_left(
    fault: str, phase: str, saved: int, case: Case, undisturbed: Path
) -> None:
    code, output = case.broken(fault)
    assert code == 75, output
    assert "stuck_for_ever" in case.stacks()
    (event,) = case.events("hang")
    assert event["phase"] == phase
    assert event["seconds"] >= 3
    assert Path(event["path"]).read_text() == case.stacks()
    assert f"in phase {phase} at step {event['step']}" in event["message"]
    if fault != "evaluation-hangs":  # which evaluation is the ninth window in is its own affair
        assert case.saved() == saved
    else:
        assert case.saved() == event["step"]
    case.assert_relaunched_is(undisturbed)


@pytest.mark.slow
def test_a_library_that_hangs_with_pythons_lock_is_killed(case: Case, undisturbed: Path) -> None:
    code, output = case.broken("library-hangs")
    assert code == -signal.SIGKILL, output
    assert "stuck_with_pythons_lock" in case.stacks()
    assert "x1: hang: " in output
    assert case.saved() == 10
    case.assert_relaunched_is(undisturbed)


def test_a_process_that_is_stopped_for_longer_than_its_limit_goes_on(case: Case, undisturbed: Path) -> None:
    training = case.hold()
    training.send(signal.SIGSTOP)
    begun = time.monotonic()
    time.sleep(5)
    training.send(signal.SIGCONT)
    time.sleep(1.5)  # the watchdog looks once a second
    case.go()
    code, output = training.end()
    assert code == 0, output
    event = case.events("suspended")[0]
    assert 3 < event["seconds"] < time.monotonic() - begun
    assert "this process did not run for" in output
    assert not list(case.run.glob("hang-*"))
    assert_same(case.run, undisturbed)


@pytest.mark.slow
def test_a_rank_that_stalls(case: Case, tmp_path: Path, config: Path, data: Path) -> None:
    whole = tmp_path / "whole"
    ranks = ("--ranks", "2")
    Training("--config", config, "--data-dir", data, "--run-dir", whole, *ranks).end()
    launched = Training("slow", *case.command, *patience("step-hangs"), *ranks, script=SCRIPT)
    wait_until(lambda: last_step(case.run) >= FAULT_AT, launched.process)
    pids = {rank: pid_of(launched.process.pid, rank) for rank in (0, 1)}
    os.kill(pids[1], signal.SIGSTOP)
    code, output = launched.end()
    assert code == 75, output
    assert "rank 1 did not follow within 30 s: killed" in output
    assert "all_reduce" in case.stacks()
    assert f"process {pids[1]}: stopped" in case.stacks()
    (event,) = case.events("hang")
    assert case.saved() == event["step"] >= FAULT_AT
    assert Training(*case.command, *ranks).end()[0] == 0
    assert_same(case.run, whole)


def pid_of(launcher: int, rank: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


# ------------------------------------------------------------------------------------------------------------
# The process, the folder, the disk, the clock


@pytest.mark.slow
def test_an_exception_is_kept_with_its_traceback_and_the_last_rows(case: Case, undisturbed: Path) -> None:
    code, output = case.broken("exception")
    assert code == 1, output
    (event,) = case.events("fault")
    assert event["type"] == "RuntimeError"
    assert "a cosmic ray" in event["message"]
    assert "train_step" in event["traceback"]
    assert [r["step"] for r in event["last_rows"]][-FAULT_AT:] == list(range(1, FAULT_AT + 1))
    case.assert_relaunched_is(undisturbed)


def test_a_second_trainer_is_refused_and_a_killed_one_holds_nothing(case: Case, undisturbed: Path) -> None:
    first = case.hold()
    second = train_here(case.capfd, *case.command)
    assert second.code == 78
    assert f"process {first.process.pid} on" in second.one_line
    assert f"`kill {first.process.pid}` saves and ends it, or use another --run-dir" in second.one_line
    first.kill()
    case.assert_relaunched_is(undisturbed)
    notes = {event["message"] for event in case.events("lock")}
    assert any(f"the lock of process {first.process.pid} on" in note for note in notes)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_and_has_room_again(
    small_disk: Path, config: Path, data: Path, capfd: Capture, undisturbed: Path
) -> None:
    case = Case(small_disk / "run", config, data, capfd)
    training = case.hold()
    filler = fill(small_disk)
    case.go()
    said = training.wait_for_line("not saved:")
    assert "No space left" in said
    filler.unlink()
    code, output = training.end()
    assert code == 0, output
    assert_same(case.run, undisturbed)


@pytest.mark.slow
def test_a_disk_that_stays_full_loses_no_checkpoint_and_is_not_relaunched_for_ever(
    small_disk: Path, config: Path, data: Path, capfd: Capture, undisturbed: Path
) -> None:
    case = Case(small_disk / "run", config, data, capfd)
    training = case.hold()
    filler = fill(small_disk)
    case.go()
    code, output = training.end()
    assert code == 75, output
    assert "checkpoint at step 40 not saved" in output
    assert "the last good one is step-000000010" in output
    assert case.saved() == 10
    again = train_here(capfd, *case.command)
    assert again.code == 78
    assert "no room for a checkpoint" in again.one_line
    filler.unlink()
    case.assert_relaunched_is(undisturbed)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"\0" * 4096)
    return filler


@pytest.mark.slow
def test_a_clock_that_is_set_back(case: Case, undisturbed: Path) -> None:
    code, output = case.broken("clock")
    assert code == 0, output
    assert_same(case.run, undisturbed)
    found = rows(case.run / "metrics.jsonl")
    assert found[-1]["time_utc"] < found[0]["time_utc"]  # the fault was there
    elapsed = [r["elapsed_s"] for r in found]
    assert elapsed == sorted(elapsed)
    assert max(elapsed) < 600
    assert all(r.get("tokens_per_sec", 1) > 0 for r in found)
    assert all(r["step_s"] >= 0 and r["wait_s"] >= 0 for r in rows(case.run / "steps.jsonl"))
    assert not case.events("hang")
    assert not case.events("suspended")
