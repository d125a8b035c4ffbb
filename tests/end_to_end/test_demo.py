"""The demo, whole, with seconds of training instead of minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from x1_pretrain.records.metrics import read_rows


def demo(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "x1_pretrain.cli", "demo", "--output", str(output), "--minutes", "0.1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)


def test_the_whole_way(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo")
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
    points = (tmp_path / "demo" / "law" / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert len(points) == 1 + 9  # three sizes, three lengths
    told, came = re.search(r"Predicted ([\d.]+) \[.*\], measured ([\d.]+): ", done.stdout).groups()  # type: ignore[union-attr]
    measured = (tmp_path / "demo" / "law" / "next" / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert float(came) == round(float(measured[1].split(",")[3]), 3)
    assert 3 < float(told) < 7
    newest = max((run / "checkpoints").glob("step-*"))
    tokenizer = AutoTokenizer.from_pretrained(newest)
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained(newest)(ids).logits.shape[-1] == 4096
    # a second demo does not run over the first
    again = demo(tmp_path / "demo")
    assert again.returncode == 2
    assert "from an earlier demo" in again.stderr
    assert again.stderr.count("\n") == 1
