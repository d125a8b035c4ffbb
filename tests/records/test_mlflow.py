"""The copy in MLflow: complete, never double, never in the way of training. With a real store in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records import builder

from x1_pretrain import export_run
from x1_pretrain.command import run as run_app
from x1_pretrain.records import mlflow_sink, mlflow_store
from x1_pretrain.records.mlflow_sink import MlflowSink, rebuild
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.records.tail import Tail

# -----------------------------------------------------------------------------------------------------------
# Without MLflow


@pytest.mark.parametrize(
    ("uri", "store"),
    [
        ("file:///workspace/mlruns", "sqlite:////workspace/mlruns/mlflow.db"),
        ("file:///workspace/mlruns/", "sqlite:////workspace/mlruns/mlflow.db"),
        ("file:///a%20b", "sqlite:////a b/mlflow.db"),
        ("/workspace/mlruns", "sqlite:////workspace/mlruns/mlflow.db"),
        ("sqlite:////x/y.db", "sqlite:////x/y.db"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
    ],
)
def test_a_folder_of_files_becomes_a_database_in_it(uri: str, store: str) -> None:
    assert mlflow_store.database_uri(uri) == store


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("mlruns", "./mlruns", "file:mlruns"):
        assert mlflow_store.database_uri(uri) == f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}"


@pytest.mark.parametrize(
    ("store", "address"),
    [
        ("sqlite:////x/mlflow.db", "sqlite:////x/mlflow.db#/experiments/1/runs/r"),
        ("http://host:5000/", "http://host:5000/#/experiments/1/runs/r"),
        ("https://me:pw@host", "https://host/#/experiments/1/runs/r"),
    ],
)
def test_the_address_of_a_run_names_store_experiment_and_run(store: str, address: str) -> None:
    assert mlflow_store.run_uri(store, "1", "r") == address


def test_names_mlflow_refuses_are_changed_and_others_kept() -> None:
    assert mlflow_store.safe_name("val/C++ & co/loss") == "val/C__ _ co/loss"
    assert mlflow_store.safe_name("memory/allocated_gib") == "memory/allocated_gib"


def test_the_tail_gives_each_complete_row_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    assert tail.read() == []
    file.write_bytes(b'{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    assert tail.read() == []
    file.write_bytes(b'{"step": 1}\n{"step": 2, "x": "nan"}\n')
    (row,) = tail.read()
    assert row["x"] != row["x"]
    file.write_bytes(b'{"step": 1}\n')  # rewound by a resume
    assert tail.read() == [{"step": 1}]


class FakeClient:
    """Takes batches; remembers points."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int]] = []

    def log_batch(self, _: str, metrics: list[Any]) -> None:
        assert len(metrics) <= 1000
        self.points += [(point.key, point.step) for point in metrics]


def test_only_what_the_store_lacks_is_sent() -> None:
    pytest.importorskip("mlflow")
    client = FakeClient()
    stored = mlflow_store.StoredRun(client, "s", "x1", "1", "r", {"train/loss": 10, "tokens": 20})
    rows = [{"step": s, "tokens": s, "train/loss": 1.0} for s in (5, 10, 15, 20, 25)]
    assert stored.send(rows) == 4
    assert client.points == [("train/loss", 15), ("train/loss", 20), ("tokens", 25), ("train/loss", 25)]
    assert stored.send(rows) == 0


def test_without_mlflow_installed_training_is_told_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "is_installed", lambda: False)
    sink = MlflowSink(builder.build_run(tmp_path / "tiny"), "file:///x", "x1", poll_s=0.01)
    sink.close("FINISHED")
    (line,) = sink.news()
    assert "pip install" in line
    assert not (tmp_path / "tiny" / "mlflow.json").exists()


def test_a_store_that_is_away_is_one_line_and_nothing_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, sinks = list[bool](), list[MlflowSink]()

    def away(_: str) -> Any:
        tries.append(any(sink._given_up for sink in sinks))
        raise ConnectionError("nobody at http://me:pw@host\nsecond line")

    monkeypatch.setattr(mlflow_store, "connect", away)
    sink = MlflowSink(builder.build_run(tmp_path / "tiny"), "http://me:pw@host", "x1", poll_s=0.01)
    sinks.append(sink)
    wait_for(lambda: len(tries) >= 3)
    begun = time.monotonic()
    sink.close("FINISHED", timeout_s=0.3)
    assert time.monotonic() - begun < 10
    first, last = sink.news()
    assert (
        first == "MLflow at http://host: ConnectionError: nobody at http://host; "
        "training goes on, tried again later"
    )
    assert "python -m x1_pretrain.records.mlflow_sink" in last
    assert "pw" not in first + last
    assert sink._pause_s >= 0.2  # tried less and less often
    sink._thread.join(60)
    assert not any(tries)  # what was given up is not begun again: it was said that rows are missing


def test_no_line_is_lost_or_told_twice_while_the_thread_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "is_installed", lambda: False)
    sink = MlflowSink(builder.build_run(tmp_path / "tiny"), "file:///x", "x1", poll_s=0.01)
    sink.close("FINISHED")
    sink.news()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        speaker = threading.Thread(target=lambda: [sink._say(str(n)) for n in range(5000)])
        speaker.start()
        told: list[str] = []
        while speaker.is_alive():
            told += sink.news()
        told += sink.news()
    finally:
        sys.setswitchinterval(before)
    assert told == [str(n) for n in range(5000)]


def test_an_export_that_cannot_read_the_store_does_not_tell_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for words in ("no http://me:pw@host here", ""):
        error = ConnectionError(words)
        monkeypatch.setattr(mlflow_store, "is_installed", lambda: True)
        monkeypatch.setattr(mlflow_store, "connect", lambda _, error=error: raised(error))
        found, why_not = export_run._in_store("http://me:pw@host", None, None)
        assert found == []
        assert "ConnectionError" in why_not
        assert "pw" not in why_not


def raised(error: Exception) -> None:
    raise error


def test_a_manifest_of_an_older_run_goes_to_the_store_without_its_password(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    told = json.loads((folder / "manifest.json").read_text()) | {"argv": ["--mlflow-uri", "http://me:pw@h"]}
    (folder / "manifest.json").write_text(json.dumps(told))
    kept: dict[str, str] = {}

    class Client:
        def log_text(self, _: str, text: str, name: str) -> None:
            kept[name] = text

    stored = mlflow_store.StoredRun(Client(), "s", "x1", "1", "r", {})
    mlflow_store.keep_files(stored, open_run(folder))
    assert json.loads(kept["manifest.json"])["argv"] == ["--mlflow-uri", "http://h"]


def wait_for(ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# -----------------------------------------------------------------------------------------------------------
# With a store


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that MLflow has laid out, which takes it seconds."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("laid-out")
    mlflow_store.connect(f"file://{folder}").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_database, tmp_path / "mlruns" / "mlflow.db")
    return f"file://{tmp_path / 'mlruns'}"


def points_of(uri: str, folder: Path) -> Counter[tuple[str, int]]:
    """Every point the store has of the run, counted."""
    client = mlflow_store.connect(uri)
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    return Counter(
        (key, point.step)
        for key in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, key)
    )


def expected(folder: Path) -> set[tuple[str, int]]:
    return {
        (name, row["step"])
        for row in builder.read_lines(folder / "metrics.jsonl")
        for name in row
        if name not in ("step", "time_utc")
    }


def test_a_growing_run_is_followed_resumed_and_closed_with_every_point_once(
    tmp_path: Path, store: str
) -> None:
    folder = builder.build_run(tmp_path / "tiny", mlflow__uri=store)
    rows = builder.rows(42)
    builder.write_lines(folder / "metrics.jsonl", rows[:5])
    sink = MlflowSink(folder, store, "exp", poll_s=0.05)
    wait_for((folder / "mlflow.json").exists)
    builder.write_lines(folder / "metrics.jsonl", rows[:8])
    sink.close("KILLED", timeout_s=60)
    (line,) = sink.news()
    assert f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}" in line
    pointer = json.loads((folder / "mlflow.json").read_text())
    assert points_of(store, folder) == Counter(expected(folder))

    builder.write_lines(folder / "metrics.jsonl", rows)  # the next session
    sink = MlflowSink(folder, store, "exp", poll_s=0.05)
    sink.close("FINISHED", timeout_s=60)
    assert sink.news() == []
    assert json.loads((folder / "mlflow.json").read_text()) == pointer
    assert points_of(store, folder) == Counter(expected(folder))

    client = mlflow_store.connect(store)
    run = client.get_run(pointer["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.total_steps"] == "42"
    assert run.data.params["training.precision"] == "auto"
    assert run.data.tags["x1.run_id"] == builder.RUN_ID
    assert run.data.tags["x1.run_dir"] == str(folder)
    assert run.data.tags["x1.name"] == "tiny"
    (one,) = [p for p in client.get_metric_history(pointer["run_id"], "train/loss") if p.step == 20]
    assert one.value == rows[3]["train/loss"]
    assert one.timestamp == 1795256120000  # 2026-11-21T10:15:20Z


def test_a_lost_pointer_is_found_again_and_an_empty_store_is_filled(tmp_path: Path, store: str) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    sent = rebuild(folder, store)
    assert sent == len(expected(folder))
    (folder / "mlflow.json").unlink()
    assert rebuild(folder, store) == 0  # found again by its id
    assert points_of(store, folder) == Counter(expected(folder))
    other = f"file://{tmp_path / 'other'}"  # not there yet: MLflow lays it out
    assert rebuild(folder, other) == sent
    assert points_of(other, folder) == Counter(expected(folder))


def test_the_rebuild_command_says_what_it_sent(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    assert run_app(mlflow_sink.app, [str(folder)]) == 2
    assert "pass --uri" in capsys.readouterr().err
    assert run_app(mlflow_sink.app, [str(folder), "--uri", store]) == 0
    assert capsys.readouterr().out.startswith(f"{len(expected(folder))} points sent to sqlite:///")


def test_a_broken_database_is_one_line_not_a_traceback(
    tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(b"this is not a database" * 100)
    sink = MlflowSink(builder.build_run(tmp_path / "tiny"), store, "x1", poll_s=0.05)
    said: list[str] = []
    wait_for(lambda: bool(said.extend(sink.news()) or len(said) >= 2))
    assert "training goes on" in said[1]
    assert "\n" not in said[1]
    sink.close("FINISHED", timeout_s=0.1)
    assert capfd.readouterr() == ("", "")


def test_a_domain_mlflow_could_not_name_still_arrives(tmp_path: Path, store: str) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    builder.write_lines(folder / "metrics.jsonl", [builder.place(5) | {"val/C++/loss": 3.0, "note": "text"}])
    rebuild(folder, store)
    assert ("val/C__/loss", 5) in points_of(store, folder)


WRITER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.records import builder
from x1_pretrain.records.mlflow_sink import MlflowSink
folder, uri = Path(sys.argv[1]), sys.argv[2]
sink = MlflowSink(folder, uri, "x1", poll_s=0.001)
with (folder / "metrics.jsonl").open("a", buffering=1) as stream:
    for step in range(1, 100000):
        row = builder.place(step) | {"time_utc": "2026-11-21T10:15:00.000Z", "train/loss": 1.0}
        stream.write(json.dumps(row) + "\\n")
        time.sleep(0.001)
"""


def test_killed_in_the_middle_of_sending_no_point_is_double_and_none_is_lost(
    tmp_path: Path, store: str
) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    (folder / "metrics.jsonl").unlink()
    command = [sys.executable, "-c", WRITER, str(folder), store, str(Path(__file__).resolve().parents[2])]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: (folder / "mlflow.json").exists())
        wait_for(lambda: bool(points_of(store, folder)))  # in the middle of many small batches
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    had = points_of(store, folder)
    assert had
    with (folder / "metrics.jsonl").open("rb+") as stream:  # as a resuming writer does with a torn last row
        stream.truncate(stream.read().rfind(b"\n") + 1)
    sink = MlflowSink(folder, store, "x1", poll_s=0.05)
    sink.close("FINISHED", timeout_s=60)
    assert points_of(store, folder) == Counter(expected(folder))
    assert len(expected(folder)) >= len(had)
