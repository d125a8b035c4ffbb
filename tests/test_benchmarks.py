"""The GPU checks as a user starts them, tiny and on a CPU: all run, and a broken one leaves the others."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers", reason="two checks compare with Transformers")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu.py"


def gpu(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["gpu_benchmark"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[dict[str, Any]]]:
    """The lines of the table and the rows of the JSON of one smoke run."""
    file = tmp_path_factory.mktemp("smoke") / "gpu.json"
    done = gpu("--smoke", "--output", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))[
        "rows"
    ]
    return done.stdout.splitlines(), rows


@pytest.mark.slow
def test_every_check_gives_rows(smoke: tuple[list[str], list[dict[str, Any]]], script: ModuleType) -> None:
    lines, rows = smoke
    assert lines[:2] == ["| check | | value | note |", "|---|---|---|---|"]
    assert len(lines) == len(rows) + 2
    assert {row["check"] for row in rows} == set(script.CHECKS)
    assert not [row for row in rows if str(row["value"]).startswith("failed")]


@pytest.mark.slow
def test_the_real_command_resumes_bit_for_bit(smoke: tuple[list[str], list[dict[str, Any]]]) -> None:
    found = {row["what"]: row for row in smoke[1] if row["check"] == "resume"}
    assert found["losses"]["value"] == "bitwise equal"
    assert found["final weights and optimizer"]["value"] == "bitwise equal"
    steps = int(found["losses"]["note"].split()[0])
    interrupted_at = int(found["SIGTERM to exit 75"]["note"].split()[2])
    assert 5 <= interrupted_at < steps  # it was in the middle: the rest came from the resumed run


@pytest.mark.slow
def test_micro_batch_search_is_compared_with_what_runs(smoke: tuple[list[str], list[dict[str, Any]]]) -> None:
    found = {row["what"]: row["value"] for row in smoke[1] if row["check"] == "micro_batch"}
    assert found["most that runs"] == 40  # where the made-up memory of the smoke run ends
    assert found["largest_fitting"] == found["largest divisor that runs"] == 32  # of 64 blocks


def test_a_difference_is_a_failure(script: ModuleType) -> None:
    assert not script.equality("losses", {1: 2.5, 2: 2.25}, {1: 2.5, 2: 2.25}).failed
    for resumed in ({1: 2.5, 2: 2.2500000001}, {1: 2.5}, {1: 2.5, 2: 2.25, 3: 2.0}):
        assert script.equality("losses", {1: 2.5, 2: 2.25}, resumed).failed


def test_an_exception_is_a_row_after_those_before_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Any) -> Iterator[Any]:
        yield script.Row("device", "first", 1.0)
        raise ValueError("two\nlines")

    monkeypatch.setitem(script.CHECKS, "device", (breaks, 60))
    rows = script.in_process("device", script.Bench(True, tmp_path))
    assert [row.what for row in rows] == ["first", ""]
    assert rows[1].value == "failed: ValueError: two lines"


@pytest.mark.slow
def test_a_check_in_its_own_process_gives_the_same_rows(
    smoke: tuple[list[str], list[dict[str, Any]]], script: ModuleType, tmp_path: Path
) -> None:
    rows = script.apart("device", script.Bench(True, tmp_path), left_s=100)
    expected = [row for row in smoke[1] if row["check"] == "device"]
    assert [(row.what, row.note) for row in rows] == [(row["what"], row["note"]) for row in expected]


def test_a_process_that_dies_or_hangs_is_ended(script: ModuleType) -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(hanging, start_new_session=True)
    begun = time.monotonic()
    assert script.ending(process, limit_s=0.3) == "ended after 0 s"
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - begun < 300
    dying = [sys.executable, "-c", "import os; os.abort()"]
    process = subprocess.Popen(dying, start_new_session=True, stderr=subprocess.DEVNULL)
    assert script.ending(process, limit_s=300) == f"exit code {-signal.SIGABRT}"


def test_largest_finds_the_edge(script: ModuleType) -> None:
    for edge in (0, 1, 2, 3, 7, 8, 40, 63, 64):
        assert script.largest(lambda n, edge=edge: n <= edge, 64) == edge
    assert script.largest(lambda n: True, 64) == 64
    assert script.largest(lambda n: True, 50) == 50


def test_usage(tmp_path: Path) -> None:
    import torch

    done = gpu("--smoke", "--only", "device,nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr.splitlines()[-1]
    if not torch.cuda.is_available():
        done = gpu("--output", tmp_path / "never.json")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert not (tmp_path / "never.json").exists()
