"""A whole sweep on a CPU: killed in the middle, carried on, and its points those of runs trained alone."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.corpora import write_corpus
from tests.end_to_end.in_process import train_here
from tests.end_to_end.processes import REPOSITORY, last_step, rows, wait_until, weights

from x1_pretrain.laws.reading import read_points
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.review.command import verify

SWEEP = (
    *(
        "--flops",
        "3e10",
        "--sizes",
        "100k,200k",
        "--cooldowns",
        "2",
        "--batch-tokens",
        "128",
        "--context",
        "32",
    ),
    *("--device", "cpu", "--set", "training.precision=fp32", "--set", "training.deterministic=true"),
    *("--set", "training.micro_batch=4", "--set", "checkpoint.every=40", "--set", "log.every=1"),
)


def begin(corpus: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "x1_pretrain.laws.isoflop", "--data-dir", str(corpus)]
    return subprocess.Popen(
        [*command, "--output", str(output), *SWEEP],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_is_carried_on_to_the_same_points(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, output = write_corpus(tmp_path / "data", documents=2000), tmp_path / "law"
    process = begin(corpus, output)
    wait_until(lambda: any(last_step(run) >= 60 for run in output.glob("runs/98.3k-3e10")), process)
    process.send_signal(signal.SIGKILL)  # the kernel tells its run to end
    process.communicate()
    assert not (output / "runs.csv").exists()
    again = begin(corpus, output)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert "goes on from" in said
    third = begin(corpus, output)
    said, _ = third.communicate(timeout=300)
    assert (third.returncode, said.count("finished before")) == (0, 4), said

    with (output / "runs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["decayed"] for row in table] == ["yes"] * 4
    assert len({row["run_id"] for row in table}) == 4
    assert [row["trunk"] for row in table] == [table[i]["run_id"] for i in (0, 0, 2, 2)]
    assert len({row["val_tokens"] for row in table}) == len({row["data"] for row in table}) == 1
    points = read_points(output / "runs.csv")
    assert (len(points), points.clusters) == (4, 2)
    for row in table:
        run = open_run(Path(row["run_dir"]))
        assert int(row["D"]) == run.total_steps * 128
        assert [check for check in verify(run) if check.result == "failed"] == []

    for row in (table[1], table[0]):  # a branch, and the trunk that was killed
        name = Path(row["run_dir"]).name
        alone = tmp_path / f"alone-{name}"
        config = output / "configs" / f"{name}.yaml"
        assert train_here(capfd, "--config", config, "--run-dir", alone, "--device", "cpu").code == 0
        assert repr(rows(alone / "metrics.jsonl")[-1]["val/loss"]) == row["val_loss"]
        assert weights(alone) == weights(output / "runs" / name)


def test_sigterm_ends_a_sweep_with_its_run_saved(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "law"
    process = begin(corpus, output)
    wait_until(lambda: any(last_step(run) >= 20 for run in output.glob("runs/98.3k-3e10")), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert (
        "x1: run 1 of 4, 98.3k-3e10, was interrupted and saved; the same command goes on from there" in said
    )
    step = last_step(output / "runs" / "98.3k-3e10")
    assert (output / "runs" / "98.3k-3e10" / "checkpoints" / f"step-{step:09d}").is_dir()
