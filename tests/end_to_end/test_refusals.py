"""Wrong input: one line that names the thing, before any compute is spent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.corpora import write_config
from tests.end_to_end.in_process import train_here

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml")


@pytest.fixture
def data(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the corpus to spoil."""
    copy = tmp_path / "data"
    shutil.copytree(corpus, copy)
    return copy


def missing_folder(data: Path) -> str:
    shutil.rmtree(data)
    return "--data-dir"


def missing_tokens(data: Path) -> str:
    (data / "train.bin").unlink()
    return "train.bin"


def empty_tokens(data: Path) -> str:
    (data / "train.bin").write_bytes(b"")
    return "train.bin"


def truncated_tokens(data: Path) -> str:
    file = data / "train.bin"
    file.write_bytes(file.read_bytes()[:-7])
    return "train.bin"


def id_outside_the_vocabulary(data: Path) -> str:
    tokens = np.fromfile(data / "train.bin", "<u2")
    tokens[1234] = 9999
    tokens.tofile(data / "train.bin")
    return "9999"


def wrong_dtype(data: Path) -> str:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["dtype"] = "float32"
    (data / "manifest.json").write_text(json.dumps(manifest))
    return "dtype"


def no_manifest(data: Path) -> str:
    (data / "manifest.json").unlink()
    return "manifest.json"


def half_a_manifest(data: Path) -> str:
    file = data / "manifest.json"
    file.write_text(file.read_text()[:100])
    return "manifest.json"


DATA_FAULTS = [
    missing_folder,
    missing_tokens,
    empty_tokens,
    truncated_tokens,
    id_outside_the_vocabulary,
    wrong_dtype,
    no_manifest,
    half_a_manifest,
]


@pytest.mark.parametrize("spoil", DATA_FAULTS)
def test_bad_data(
    spoil: Callable[[Path], str], data: Path, tmp_path: Path, config: Path, capfd: Capture
) -> None:
    named = spoil(data)
    run = tmp_path / "run"
    outcome = train_here(capfd, "--config", config, "--data-dir", data, "--run-dir", run)
    assert outcome.code in (2, 78)
    assert named in outcome.one_line
    assert not run.exists()  # nothing was begun


CONFIG_FAULTS = [
    (["--set", "model.d_modle=64"], "model.d_modle: unknown key, did you mean 'd_model'?"),
    (["--set", "trainig.total_steps=5"], "did you mean 'training'?"),
    (["--total-steps", "-3"], "training.total_steps: expected greater than 0, found -3"),
    (["--set", "optimizer.lr=fast"], "optimizer.lr: expected a valid number, found 'fast'"),
    (["--set", "model.heads=5"], "d_model 32 is not a multiple of heads 5"),
    (
        ["--set", "training.batch_tokens=100"],
        "training.batch_tokens 100 is not a multiple of model.context 32",
    ),
    (["--set", "training.micro_batch=3"], "training.micro_batch 3 does not divide the 8 blocks"),
    (["--set", "training.micro_batch=many"], "training.micro_batch: expected"),
    (["--set", "model.vocab_size=100"], "model.vocab_size is 100"),
    (["--set", "model.context=65536", "--set", "training.batch_tokens=65536"], "less than one block"),
    (["--set", "nonsense"], "expected section.field=value"),
    (["--set", "model.layers=[1"], "not valid YAML"),
    (["--total-steps", "3", "--set", "optimizer.warmup_steps=9"], "optimizer.warmup_steps 9 is more than"),
    (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
    (["--total-steps", "many"], "--total-steps"),
    (["--colour", "red"], "--colour"),
]


@pytest.mark.parametrize(("change", "named"), CONFIG_FAULTS)
def test_bad_config(
    change: list[str], named: str, corpus: Path, tmp_path: Path, config: Path, capfd: Capture
) -> None:
    outcome = train_here(
        capfd, "--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run", *change
    )
    assert outcome.code == 2, outcome
    assert named in outcome.one_line


def test_a_config_that_is_not_there(tmp_path: Path, capfd: Capture) -> None:
    outcome = train_here(capfd, "--config", tmp_path / "none.yaml")
    assert outcome.code == 2
    assert "none.yaml" in outcome.one_line


def test_a_config_that_is_not_yaml(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "bad.yaml").write_text("name: a\nname: b\n")
    outcome = train_here(capfd, "--config", tmp_path / "bad.yaml")
    assert outcome.code == 2
    assert "bad.yaml:2" in outcome.one_line
    assert "given twice" in outcome.one_line


def test_a_run_folder_that_cannot_be_written(
    corpus: Path, tmp_path: Path, config: Path, capfd: Capture
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = train_here(
        capfd, "--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "file" / "run"
    )
    assert outcome.code == 2
    assert "--run-dir" in outcome.one_line


def x1(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "x1_pretrain.cli", *args], capture_output=True, text=True)


def test_an_unknown_verb_gets_a_suggestion() -> None:
    done = x1("trian")
    assert done.returncode == 2
    assert "did you mean `x1 train`?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_names_the_verbs() -> None:
    done = x1("--help")
    assert done.returncode == 0
    for verb in ("tokenize", "train", "export", "verify", "demo"):
        assert f"\n  {verb} " in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, x1_pretrain.cli as c; c.usage(); "
        "print([m for m in ('torch', 'numpy', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
