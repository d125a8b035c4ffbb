"""SIGTERM and Ctrl-C in each phase: a verified checkpoint, exit 75 in time, the same run afterwards."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tests.corpora import write_config
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights

from x1_pretrain.records.checkpoint_files import newest_good, step_of
from x1_pretrain.runtime.signals import SAME_S

SCRIPT = Path(__file__).with_name("slow_phase.py")
STEPS = 40
PHASES = ["first-step", "step", "evaluation", "data", "checkpoint"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "tiny.yaml",
        training={"total_steps": STEPS, "micro_batch": 4},
        evaluation={"every": 15, "tokens": 512, "prompts": ["the cat"], "sample_tokens": 6},
    )


# the same handler: the second is tried in each phase by the long checks
BOTH = [
    pytest.param(signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGINT, id="CtrlC", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(
    phase: str, number: signal.Signals, tmp_path: Path, config: Path, corpus: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
    training = Training(phase, *command, script=SCRIPT)
    before = training.wait_for_line(f"PHASE {phase}")
    time.sleep(0.05)
    training.send(number)
    code, output = training.end()  # before the end of the longest phase
    assert code == 75, before + output
    good, skipped = newest_good(run / "checkpoints")
    assert good is not None
    assert not skipped
    done = [r["step"] for r in rows(run / "metrics.jsonl") if "train/loss" in r]
    assert step_of(good) == (done[-1] if done else 0)  # every finished step is saved
    assert any(r["event"] == "signal" and r["signal"] == number.name for r in rows(run / "events.jsonl"))
    code, output = Training(*command).end()
    assert code == 0, output
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)


def hanging_compiler(folder: Path) -> Path:
    """A C++ compiler that never returns."""
    compiler = folder / "g++"
    compiler.write_text("#!/bin/sh\nsleep 600\n")
    compiler.chmod(0o755)
    return compiler


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_while_the_compiler_hangs(
    number: signal.Signals, tmp_path: Path, config: Path, corpus: Path
) -> None:
    run = tmp_path / "run"
    env = {"CXX": str(hanging_compiler(tmp_path)), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = (
        "--config",
        config,
        "--data-dir",
        corpus,
        "--run-dir",
        run,
        "--set",
        "training.compile=default",
    )
    training = Training("compile", *command, script=SCRIPT, env=env)
    training.wait_for_line("PHASE compile")
    time.sleep(3)
    training.send(number)
    code, output = training.end()
    assert code == 75, output
    assert newest_good(run / "checkpoints")[0] is not None
    end = time.monotonic() + 60
    while processes_using(tmp_path):
        assert time.monotonic() < end, "the compiler was left behind"
        time.sleep(0.05)


def processes_using(folder: Path) -> list[str]:
    """Command lines of live processes that name `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


def test_a_second_signal_leaves_at_once(tmp_path: Path, config: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    training = Training(
        "endless-checkpoint", "--config", config, "--data-dir", corpus, "--run-dir", run, script=SCRIPT
    )
    training.wait_for_line("PHASE endless-checkpoint")
    training.send(signal.SIGINT)
    training.wait_for_line("once more: leave at once")
    time.sleep(SAME_S + 0.1)
    training.send(signal.SIGINT)
    code, output = training.end()  # does not wait for the checkpoint
    assert code == 75, output
    good, _ = newest_good(run / "checkpoints")
    assert good is not None
    assert step_of(good) == 0
    assert "last checkpoint is safe" in output


def test_a_hang_up_does_not_end_a_run(tmp_path: Path, config: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    training = Training(
        "--config",
        config,
        "--data-dir",
        corpus,
        "--run-dir",
        run,
        "--total-steps",
        "3000",
        "--eval-every",
        "3000",
    )
    training.wait_for_line("step   20/")
    training.send(signal.SIGHUP)
    assert training.process.stdout is not None
    training.process.stdout.close()  # the terminal is gone, too
    wait_until(lambda: last_step(run) > 200, training.process)
    training.process.send_signal(signal.SIGTERM)
    assert training.process.wait(timeout=300) == 75
    good, _ = newest_good(run / "checkpoints")
    assert good is not None
    assert step_of(good) >= 200
