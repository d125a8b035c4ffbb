"""The export: complete, equal to the run, replaced whole, never over something else."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from tests.records import builder

from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.export_run import from_folder
from x1_pretrain.records import export_folder
from x1_pretrain.records.export_folder import Material, export
from x1_pretrain.records.run_folder import open_run

FILES = {
    "manifest.json",
    "metrics.csv",
    "loss-curve.png",
    "gradnorm-curve.png",
    "throughput.png",
    "final.safetensors",
    "final-optimizer.safetensors",
    "config.yaml",
    "mlflow-run-uri.txt",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return builder.build_run(tmp_path / "tiny")


def material(folder: Path) -> Material:
    return from_folder(open_run(folder))


def manifest(output: Path) -> dict[str, object]:
    return json.loads((output / "manifest.json").read_text())


def test_a_finished_run_exports_every_file_with_its_hash(folder: Path, tmp_path: Path) -> None:
    found = material(folder)
    assert set(export(found, tmp_path / "a" / "out")) == FILES
    assert found.missing == []
    told = manifest(tmp_path / "a" / "out")
    hashes = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (tmp_path / "a" / "out").iterdir()
        if file.name != "manifest.json"
    }
    assert {name: identity["sha256"] for name, identity in told["files"].items()} == hashes
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["out"]  # nothing temporary is left


def test_the_story_of_a_run_goes_along(tmp_path: Path) -> None:
    """The post-mortem with its pictures, and the report; not the store's password."""
    address = "http://me:secret@host:5000"
    folder = builder.build_run(tmp_path / "tiny", mlflow={"uri": address})
    story = {
        "spike-postmortem.md": f"# ![](spike-postmortem.png) kept at {address}",
        "spike-postmortem-data.csv": "a,b",
        "spike-postmortem.png": "picture",
        "spike-postmortem-30.png": "another",
        "report.html": f'<svg fill="#fff">{address}</svg>',
    }
    for name, text in story.items():
        (folder / name).write_text(text)
    for name in ("hang-1.txt", "postmortem.log", "postmortem-step-9.md"):
        (folder / name).write_text("not shown")
    output = tmp_path / "out"
    assert set(export(material(folder), output)) == FILES | set(story)
    assert set(manifest(output)["files"]) == (FILES | set(story)) - {"manifest.json"}
    for name, text in story.items():
        assert (output / name).read_text() == text.replace("me:secret@", "")


def test_no_text_that_goes_along_holds_a_password(folder: Path, tmp_path: Path) -> None:
    """Whatever wrote it: the ledger tells alerts, budget.json and the pages may quote addresses."""
    hook, signed = (
        "https://hooks.slack.com/services/T0/B0/hunter2",
        "http://me:hunter2@host/b.json?sig=hunter2",
    )
    row = {
        "seq": 1,
        "time_utc": "2026-11-21T10:15:00Z",
        "event": "budget_stale",
        "message": f"{signed} is no reading",
    }
    builder.write_lines(folder / "ledger.jsonl", [row, row | {"seq": 2, "message": f'told "{hook}"'}])
    (folder / "budget.json").write_text(json.dumps({"spent_usd": 1.5, "from": signed}))
    (folder / "spike-postmortem.md").write_text(f"read `{signed}`")
    (folder / "spike-postmortem-data.csv").write_bytes(b"caf\xe9, " + signed.encode())
    (folder / "report.html").write_text(f"<p>&#x27;{signed}&#x27;</p>")
    export(material(folder), tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"hunter2" not in file.read_bytes(), file.name
    assert (
        builder.read_lines(tmp_path / "out" / "ledger.jsonl")[1]["message"]
        == 'told "https://hooks.slack.com"'
    )
    assert json.loads((tmp_path / "out" / "budget.json").read_text()) == {
        "spent_usd": 1.5,
        "from": "http://host/b.json",
    }
    assert (tmp_path / "out" / "spike-postmortem-data.csv").read_bytes() == b"caf\xe9, http://host/b.json"
    assert (tmp_path / "out" / "report.html").read_text() == "<p>&#x27;http://host/b.json&#x27;</p>"


def test_the_final_weights_are_the_last_checkpoint_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    export(material(folder), tmp_path / "out")
    last = folder / "checkpoints" / "step-000000042"
    assert (tmp_path / "out" / "final.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    optimizer = (tmp_path / "out" / "final-optimizer.safetensors").read_bytes()
    assert optimizer == (last / "optimizer.safetensors").read_bytes()
    assert manifest(tmp_path / "out")["checkpoint"]["name"] == "step-000000042"


def test_the_manifest_says_how_the_run_ended(folder: Path, tmp_path: Path) -> None:
    export(material(folder), tmp_path / "out")
    told = manifest(tmp_path / "out")
    assert told["final"]["step"] == 42
    assert told["final"]["tokens"] == 42 * 64
    assert told["final"]["elapsed_s"] == 4.2
    assert told["final"]["losses"] == {
        "train/loss": pytest.approx(2 + 3 / 42),
        "val/loss": pytest.approx(2.05 + 3 / 42),
        "val/corpus/loss": pytest.approx(2.05 + 3 / 42),
    }
    assert (told["status"], told["seed"], told["run_id"]) == ("finished", 42, builder.RUN_ID)
    assert told["resumed_from_steps"] == [20]
    assert len(told["sessions"]) == 2
    assert told["spent_usd"] is None
    assert {"versions", "hardware", "config_hash", "data"} <= told.keys()


def test_spending_is_the_last_row_that_says_it(folder: Path, tmp_path: Path) -> None:
    rows = builder.read_lines(folder / "metrics.jsonl")
    rows[3]["budget/spent_usd"], rows[-1]["budget/spent_usd"] = 1.0, 2.5
    builder.write_lines(folder / "metrics.jsonl", rows)
    export(material(folder), tmp_path / "out")
    assert manifest(tmp_path / "out")["spent_usd"] == 2.5


def test_metrics_csv_holds_every_point_once_and_exactly(folder: Path, tmp_path: Path) -> None:
    export(material(folder), tmp_path / "out")
    with (tmp_path / "out" / "metrics.csv").open(newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header == ["step", "name", "value"]
    found = [(int(step), name, float(value)) for step, name, value in lines]
    expected = {
        (row["step"], name, value)
        for row in builder.rows(42)
        for name, value in row.items()
        if name not in ("step", "time_utc")
    }
    assert set(found) == expected  # floats survive to the last digit
    assert len(found) == len({(step, name) for step, name, _ in found})


def test_without_mlflow_one_line_says_so(folder: Path, tmp_path: Path) -> None:
    export(material(folder), tmp_path / "out")
    text = (tmp_path / "out" / "mlflow-run-uri.txt").read_text()
    assert text.startswith("MLflow was off")
    assert text.count("\n") == 1


def test_with_mlflow_the_line_identifies_the_run_without_a_password(tmp_path: Path) -> None:
    uri = "http://me:secret@host:5000"
    folder = builder.build_run(tmp_path / "tiny", mlflow__uri=uri)
    pointer = {"uri": uri, "experiment": "x1", "experiment_id": "3", "run_id": "abc"}
    (folder / "mlflow.json").write_text(json.dumps(pointer))
    told = json.loads((folder / "manifest.json").read_text())
    told["argv"] = ["train", "--mlflow-uri", uri]
    (folder / "manifest.json").write_text(json.dumps(told))
    export(material(folder), tmp_path / "out")
    line = (tmp_path / "out" / "mlflow-run-uri.txt").read_text()
    assert line == "http://host:5000/#/experiments/3/runs/abc\n"
    for file in (tmp_path / "out").iterdir():
        assert b"secret" not in file.read_bytes(), file.name


def test_an_unfinished_run_is_exported_and_labelled(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny", steps=30)
    found = material(folder)
    export(found, tmp_path / "out")
    assert found.label == "tiny (unfinished: step 30 of 42)"
    assert manifest(tmp_path / "out")["status"] == "unfinished"
    assert found.missing == []


def test_a_damaged_final_checkpoint_is_skipped_and_said(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoints" / "step-000000042" / "model.safetensors").write_bytes(b"x")
    found = material(folder)
    export(found, tmp_path / "out")
    assert found.checkpoint is not None
    assert found.checkpoint.name == "step-000000020"
    assert "step-000000042: model.safetensors has 1 bytes" in found.missing[0]
    assert found.missing[1] == "weights of step 42: the newest good checkpoint is step-000000020"
    assert manifest(tmp_path / "out")["not_exported"] == found.missing


def test_without_any_checkpoint_the_rest_is_exported(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    found = material(folder)
    assert set(export(found, tmp_path / "out")) == FILES - {
        "final.safetensors",
        "final-optimizer.safetensors",
    }
    assert "no good checkpoint" in found.missing[0]


def test_exporting_again_replaces_ours_and_keeps_what_others_put_there(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(material(folder), output)
    (output / "spike-postmortem.md").write_text("it was the data")
    (output / "proof").mkdir()
    (output / "proof" / "terminated.png").write_bytes(b"png")
    (output / "metrics.csv").write_text("stale")
    (output / "final.safetensors").unlink()
    export(material(folder), output)
    assert {entry.name for entry in output.iterdir()} == FILES | {"spike-postmortem.md", "proof"}
    assert (output / "spike-postmortem.md").read_text() == "it was the data"
    assert (output / "proof" / "terminated.png").read_bytes() == b"png"
    assert (output / "metrics.csv").read_text() != "stale"
    assert "spike-postmortem.md" not in manifest(output)["files"]


def test_a_file_of_ours_that_is_no_longer_exported_goes(folder: Path, tmp_path: Path) -> None:
    export(material(folder), tmp_path / "out")
    shutil.rmtree(folder / "checkpoints")
    export(material(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "final.safetensors").exists()


@pytest.mark.parametrize("content", [None, '{"kind": "run"}'])
def test_a_folder_with_something_else_in_it_is_refused_untouched(
    folder: Path, tmp_path: Path, content: str | None
) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("precious")
    if content:
        (output / "manifest.json").write_text(content)
    with pytest.raises(RefusedError, match="not empty and not an export"):
        export(material(folder), output)
    assert (output / "chapter1.tex").read_text() == "precious"


def test_a_folder_with_only_a_gitkeep_is_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitkeep").write_text("")
    assert set(export(material(folder), tmp_path / "out")) == FILES | {".gitkeep"}


def test_the_export_of_another_run_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    export(material(folder), tmp_path / "out")
    other = builder.build_run(tmp_path / "other", run_id="other-1")
    with pytest.raises(RefusedError, match=f"holds the export of run {builder.RUN_ID}, this one is other-1"):
        export(material(other), tmp_path / "out")


def test_a_file_in_the_way_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        export(material(folder), tmp_path / "out")


def test_a_write_that_fails_leaves_the_earlier_export_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(material(folder), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere/final.safetensors")

    monkeypatch.setattr(export_folder.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(material(folder), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_a_copy_that_differs_from_its_source_is_not_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_folder.shutil, "copyfile", lambda _, target: Path(target).write_bytes(b"rot"))
    with pytest.raises(UserError, match="differs from"):
        export(material(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pointer_to_no_run_is_one_line_in_the_export(folder: Path, tmp_path: Path) -> None:
    (folder / "mlflow.json").write_text("{}")
    export(material(folder), tmp_path / "out")
    assert "names no MLflow run" in (tmp_path / "out" / "mlflow-run-uri.txt").read_text()


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError])
def test_an_export_ended_between_its_two_renames_loses_no_file_of_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException], remade: bool
) -> None:
    output, rename = tmp_path / "out", Path.rename
    export(material(folder), output)
    (output / "post-mortem.md").write_text("it was the data")

    def stopped(self: Path, target: Path) -> Path:
        if self.name == ".out.exporting":
            raise ending
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises((ending, UserError)):
        export(material(folder), output)
    monkeypatch.undo()
    if remade:
        output.mkdir(exist_ok=True)
    export(material(folder), output)
    assert (output / "post-mortem.md").read_text() == "it was the data"
    assert not list(tmp_path.glob(".out*"))
