"""`python -m x1_pretrain.export_run` as a user runs it, and `x1 export`, `x1 verify`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.records import builder

from x1_pretrain.records.mlflow_sink import rebuild

FILES = {
    *("manifest.json", "metrics.csv", "loss-curve.png", "gradnorm-curve.png", "throughput.png"),
    *("final.safetensors", "final-optimizer.safetensors", "config.yaml", "mlflow-run-uri.txt"),
}


def x1(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, both copied to one MLflow store, `later` after `earlier`."""
    pytest.importorskip("mlflow")
    place = tmp_path_factory.mktemp("workplace")
    for name in ("earlier", "later"):
        uri = f"file://{place / 'mlruns'}"
        folder = builder.build_run(
            place / "runs" / name, run_id=f"{name}-1", mlflow__uri=uri, run_dir=f"runs/{name}"
        )
        rebuild(folder, uri)
    return place


def test_the_published_command_exports_the_newest_run_of_the_store(workplace: Path) -> None:
    uri, output = f"file://{workplace / 'mlruns'}", "experiments/X1-pretraining/run-cloud/"
    done = x1("x1_pretrain.export_run", "--mlflow-uri", uri, "--output", output, cwd=workplace)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run later (later-1), the newest X1 run" in done.stdout
    assert "earlier (earlier-1)" in done.stdout
    folder = workplace / output
    assert names(folder) == FILES
    pointer = json.loads((workplace / "runs" / "later" / "mlflow.json").read_text())
    line = (folder / "mlflow-run-uri.txt").read_text()
    assert line.startswith(f"sqlite:///{workplace / 'mlruns' / 'mlflow.db'}#/")
    assert pointer["run_id"] in line
    checked = x1("x1_pretrain.cli", "verify", "later", "--export", str(folder), cwd=workplace)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_another_run_of_the_store_is_picked_by_name(workplace: Path, tmp_path: Path) -> None:
    uri = f"file://{workplace / 'mlruns'}"
    words = ("--mlflow-uri", uri, "--run", "earlier", "--output", str(tmp_path / "out"))
    assert x1("x1_pretrain.export_run", *words, cwd=workplace).returncode == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["run_id"] == "earlier-1"


def test_when_the_run_folder_is_gone_mlflow_has_all_but_the_weights(workplace: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(workplace / "mlruns", place / "mlruns")
    whole = x1("x1_pretrain.export_run", str(workplace / "runs" / "later"), "--output", "whole", cwd=place)
    assert whole.returncode == 0
    aside = (workplace / "runs").rename(workplace / "moved")
    try:
        words = ("--mlflow-uri", f"file://{place / 'mlruns'}", "--output", "out")
        done = x1("x1_pretrain.export_run", *words, cwd=place)
    finally:
        aside.rename(workplace / "runs")
    assert done.returncode == 1
    assert "not exported: final.safetensors and final-optimizer.safetensors: the run folder" in done.stdout
    assert names(place / "out") == FILES - {"final.safetensors", "final-optimizer.safetensors"}
    points = [set((place / kind / "metrics.csv").read_text().split()) for kind in ("whole", "out")]
    assert points[0] == points[1]  # MLflow gave back every point to the last digit
    told = json.loads((place / "out" / "manifest.json").read_text())
    assert (told["status"], told["seed"], told["final"]["step"]) == ("finished", 42, 42)
    assert told["resumed_from_steps"] == [20]


def test_without_a_store_the_run_folder_that_names_it_is_exported(tmp_path: Path) -> None:
    uri = f"file://{tmp_path / 'mlruns'}"
    builder.build_run(tmp_path / "runs" / "tiny", mlflow__uri=uri)
    builder.build_run(tmp_path / "runs" / "other")
    done = x1("x1_pretrain.export_run", "--mlflow-uri", uri, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert "there is no MLflow store" in done.stdout
    assert "exporting from runs/tiny" in done.stdout
    assert not (tmp_path / "mlruns").exists()  # asking for a store does not make one
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["name"] == "tiny"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--output", "out"), 2, "no run given: pass RUN (under runs/: tiny) or --mlflow-uri URI"),
        (("tiny",), 2, "output"),
        (("nothing", "--output", "out"), 2, "run folders near it: runs/tiny"),
        (("tiny", "--run", "x", "--output", "out"), 2, "both name a run"),
        (("--mlflow-uri", "file:///nowhere/at/all", "--output", "out"), 2, "`x1 export RUN --output DIR`"),
        (("tiny", "--output", "runs"), 78, "not empty and not an export"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    builder.build_run(tmp_path / "runs" / "tiny")
    done = x1("x1_pretrain.cli", "export", *words, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_by_name_is_exported_and_verified(tmp_path: Path) -> None:
    builder.build_run(tmp_path / "runs" / "tiny", steps=30)
    done = x1("x1_pretrain.cli", "export", "tiny", "--output", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny (unfinished: step 30 of 42), weights of step-000000030" in done.stdout
    checked = x1("x1_pretrain.review.command", "tiny", "--export", "out", "--json", cwd=tmp_path)
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["good"] is True
