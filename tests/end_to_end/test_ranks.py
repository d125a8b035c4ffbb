"""`x1 train --ranks 2`: one command, two processes, one run; and what happens when one of them is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config
from tests.end_to_end.in_process import train_here
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights

SUPERVISE = """
import sys
from x1_pretrain.command import run
from x1_pretrain.money.supervise import app
sys.exit(run(app, sys.argv[1:]))
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml")


@pytest.fixture
def long(tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "long.yaml",
        training={"total_steps": 400},
        checkpoint={"every": 50},
        evaluation={"every": 400, "tokens": 512, "prompts": []},
    )


def ranks_of(parent: int) -> list[int]:
    """Process ids, in the order of the ranks."""
    found = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        for word in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                found[int(word[5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


def test_two_ranks_stop_on_request_and_one_goes_on(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", alone).code == 0
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
    training = Training(*command, "--ranks", "2", "--set", "log.every=1")
    wait_until(lambda: last_step(run) >= 3, training.process)
    training.send(signal.SIGTERM)
    code, output = training.end()
    assert code in (75, 0), output  # 0: it was quicker than the request
    assert output.count("SIGTERM: saving a checkpoint") == (code == 75)
    assert "2 rank(s) x" in output
    assert train_here(capfd, *command).code == 0
    ours, whole = curve(run), curve(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in whole]
    assert [row.get("train/loss") for row in ours] == pytest.approx(
        [row.get("train/loss") for row in whole], abs=5e-5
    )


def test_what_the_ranks_can_not_share_is_said_once_before_any_starts(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    command = ("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run", "--ranks", "3")
    outcome = train_here(capfd, *command)
    assert outcome.code == 2
    assert "256 is 8 blocks of 32, which 3 ranks can't share evenly" in outcome.one_line
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_all_ranks_is_one_line(tmp_path: Path, config: Path) -> None:
    code, output = Training("--config", config, "--data-dir", tmp_path / "none", "--ranks", "2").end()
    assert code == 2
    assert output.count("\n") == 1, output
    assert output.startswith("x1: ")


@pytest.mark.slow
def test_a_supervised_run_outlives_a_killed_rank(tmp_path: Path, long: Path, corpus: Path) -> None:
    """Once a rank, once the parent of both: the run is the one that nothing happened to."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = ["--config", long, "--data-dir", corpus, "--ranks", "2"]
    code, output = Training(*command, "--run-dir", whole).end(240)
    assert code == 0, output
    script = tmp_path / "supervise.py"
    script.write_text(SUPERVISE)
    wanted = ["--provider", "local", "--rate-usd-per-hr", "0.1", "--every-s", "1", "--pause-s", "0"]
    supervisor = Training(*wanted, "--", *command, "--run-dir", run, "--budget-cap-usd", "5", script=script)
    for kill, step in enumerate((60, 160)):
        wait_until(lambda step=step: last_step(run) >= step, supervisor.process, 120)  # type: ignore[misc]
        (trainer,) = (
            int(child)
            for child in children(supervisor.process.pid)
            if "x1_pretrain.train" in Path(f"/proc/{child}/cmdline").read_text().split("\0")
        )
        os.kill(ranks_of(trainer)[1] if kill == 0 else trainer, signal.SIGKILL)
    code, output = supervisor.end(240)
    assert code == 0, output
    assert output.count("killed by SIGKILL): relaunch") == 2
    assert [unguarded(row) for row in curve(run)] == curve(whole)
    assert weights(run) == weights(whole)
    assert rows(run / "blocks.jsonl") == rows(whole / "blocks.jsonl")
    ended = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [row["exit_code"] for row in ended if row["event"] == "session_end"] == [-9, -9, 0]


def unguarded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("budget/")}


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
