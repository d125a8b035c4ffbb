"""The demo, whole, with seconds of training instead of minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from x1_pretrain.demo_mirror import check
from x1_pretrain.errors import UserError
from x1_pretrain.records.metrics import read_rows
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.review.command import verify


def demo(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "x1_pretrain.cli", "demo", "--output", str(output), "--minutes", "0.1"]
    command += more
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ)


def assert_it_moved(folder: Path, said: str) -> None:
    """The machine died with its folder, and the run went on from the mirror on another one."""
    assert "their losses are the same to the last bit" in said
    assert not (folder / "machine-a").exists()
    run = folder / "machine-b" / "run"
    total = open_run(run).total_steps
    assert [row["step"] for row in read_rows(run / "steps.jsonl")] == list(range(1, total + 1))
    events = list(read_rows(run / "events.jsonl"))
    kinds = [row["event"] for row in events]
    assert kinds.count("start") == kinds.count("resume") == kinds.count("moved") == kinds.count("finish") == 1
    assert 0 < next(row["step"] for row in events if row["event"] == "resume") < total
    assert {one.name: one.result for one in verify(open_run(run))}["nothing left to mirror"] == "passed"


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    said = a_demo_shows_it_all(tmp_path)
    points = (tmp_path / "demo" / "law" / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert len(points) == 1 + 9  # three sizes, three lengths
    told, came = re.search(r"Predicted ([\d.]+) \[.*\], measured ([\d.]+): ", said).groups()  # type: ignore[union-attr]
    measured = (tmp_path / "demo" / "law" / "next" / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert float(came) == round(float(measured[1].split(",")[3]), 3)
    assert 3 < float(told) < 7


def test_the_way_without_the_parts_that_have_tests_of_their_own(tmp_path: Path) -> None:
    a_demo_shows_it_all(tmp_path, "--skip", "rented", "--skip", "law")


def a_demo_shows_it_all(tmp_path: Path, *more: str) -> str:
    done = demo(tmp_path / "demo", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    run, artifacts = tmp_path / "demo" / "run", tmp_path / "demo" / "artifacts"
    events = [row["event"] for row in read_rows(run / "events.jsonl")]
    assert events.count("signal") == 1  # interrupted once, on purpose
    assert events.count("resume") == 1
    for name in ("loss-curve.png", "gradnorm-curve.png", "throughput.png"):
        assert (artifacts / name).read_bytes().startswith(b"\x89PNG")
    evaluations = [row for row in read_rows(run / "metrics.jsonl") if "val/loss" in row]
    assert evaluations[-1]["val/code/loss"] < evaluations[0]["val/code/loss"]
    assert evaluations[-1]["val/prose/loss"] < evaluations[0]["val/prose/loss"]
    assert "0 failed" in done.stdout
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    assert_it_moved(tmp_path / "demo" / "moved", done.stdout)
    newest = max((run / "checkpoints").glob("step-*"))
    tokenizer = AutoTokenizer.from_pretrained(newest)
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained(newest)(ids).logits.shape[-1] == 4096
    # a second demo does not run over the first
    again = demo(tmp_path / "demo")
    assert again.returncode == 2
    assert "from an earlier demo" in again.stderr
    assert again.stderr.count("\n") == 1
    return done.stdout


def records(run: Path, resumed_at: int, steps: list[int], lost: dict[int, float]) -> Path:
    """What a moved run leaves behind."""
    run.mkdir(parents=True)
    rows = {"steps": [{"step": s, "loss": 2.0 / s} for s in steps]}
    rows |= {"steps.superseded": [{"step": s, "loss": loss} for s, loss in lost.items()]}
    rows |= {"events": [{"event": "resume", "step": resumed_at}]}
    for name, many in rows.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("resumed_at", "steps", "lost", "said"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], {5: 0.4}, None),
        (4, [1, 2, 3, 4, 6, 7, 8], {}, "a gap or a double"),
        (4, [1, 2, 3, 4, 4, 5, 6, 7, 8], {}, "a gap or a double"),
        (4, [1, 2, 3, 4, 5, 6, 7], {}, "a gap or a double"),
        (0, [1, 2, 3, 4, 5, 6, 7, 8], {}, "did not go on from a checkpoint"),
        (7, [1, 2, 3, 4, 5, 6, 7, 8], {}, "did not go on from a checkpoint"),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], {5: 0.4000001}, "the loss of step 5 is 0.4, it was 0.4000001"),
    ],
)
def test_the_demo_notices_what_a_move_must_not_do(
    tmp_path: Path, resumed_at: int, steps: list[int], lost: dict[int, float], said: str | None
) -> None:
    run = records(tmp_path / "run", resumed_at, steps, lost)
    if said is None:
        assert "the mirror knew 1" in check(run, 8, died_at=6)
        return
    with pytest.raises(UserError, match=said):
        check(run, 8, died_at=6)
