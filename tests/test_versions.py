"""Files of every version so far are read by every reader; those of a later one are refused with a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.end_to_end.in_process import train_here
from x1_pretrain import export_run
from x1_pretrain.command import run as run_app
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror import pull_command
from x1_pretrain.mirror.head import SCHEMA_VERSION as HEAD_VERSION
from x1_pretrain.mirror.heads import look
from x1_pretrain.money import budget_file, latch
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import LedgerError, read_rows
from x1_pretrain.records import trash
from x1_pretrain.records.checkpoint_files import verify_folder
from x1_pretrain.records.following import Seen, open_followed
from x1_pretrain.records.formats import FORMATS, VERSIONS, check_folder
from x1_pretrain.records.run_folder import open_run, read_json
from x1_pretrain.records.summary import Summary
from x1_pretrain.report import command as report_command
from x1_pretrain.review.command import FAILED, verify
from x1_pretrain.runs import command as runs_command
from x1_pretrain.stores.folder_store import FolderStore

KEPT = Path(__file__).parent / "versions"
FOLDERS = sorted(KEPT.glob("v*"), key=lambda folder: int(folder.name[1:]))
# Files whose form is another's (Hugging Face's), or part of a head that says its version
OTHERS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chunks.json"}
LAST = 12  # step of the kept runs


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, to work in; the paths of the run are relative."""
    shutil.copytree(request.param, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    return tmp_path / "kept"


def test_there_is_a_folder_of_every_version() -> None:
    newest = max([*VERSIONS.values(), HEAD_VERSION])
    assert [folder.name for folder in FOLDERS] == [f"v{n}" for n in range(1, newest + 1)]
    for folder in FOLDERS:
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 300_000


# ------------------------------------------------------------------------------------------------------------
# Every reader


def test_the_records_are_read(version: Path) -> None:
    run = open_run(Path("run"))
    assert run.name == "kept"
    assert [row["step"] for row in run.rows() if "train/loss" in row] == list(range(1, LAST + 1))
    assert [one["event"] for one in run.events()][:1] == ["start"]
    assert {one["step"] for one in run.samples()} == {0, 6, 12}
    said = Summary(Path("run")).look()
    assert (said["state"], said["step"], said["newest_good"]) == ("finished", LAST, LAST)
    seen = Seen(open_followed("run"))
    seen.look(0.0)
    assert (seen.trouble, seen.step, seen.state(0.0).kind) == ("", LAST, "finished")


def test_it_passes_verify(version: Path) -> None:
    checks = verify(open_run(Path("run")))
    assert [(check.name, check.evidence) for check in checks if check.result == FAILED] == []


@pytest.mark.slow
def test_it_has_a_report_and_an_export(version: Path) -> None:
    assert run_app(report_command.app, ["run"], prog="x1 report") == 0
    assert "kept" in Path("run/report.html").read_text()
    assert run_app(export_run.app, ["run", "--output", "export"], prog="x1 export") == 0
    assert read_json(Path("export/manifest.json"))["final"]["step"] == LAST


@pytest.mark.slow
def test_it_is_resumed(version: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From its checkpoint of step 8, in the steps that it had: the losses are those on record."""
    before = {row["step"]: row["train/loss"] for row in open_run(Path("run")).rows() if "train/loss" in row}
    final = load_file("run/checkpoints/step-000000012/model.safetensors")
    shutil.rmtree("run/checkpoints/step-000000012")
    said = train_here(capfd, "--config", "run/config.yaml")
    assert said.code == 0, said.err
    run = open_run(Path("run"))
    assert [one["step"] for one in run.events() if one["event"] == "resume"] == [8]
    after = {row["step"]: row["train/loss"] for row in run.rows() if "train/loss" in row}
    assert after == pytest.approx(before, rel=1e-4)  # bit for bit only with the torch that made it
    again = load_file("run/checkpoints/step-000000012/model.safetensors")
    assert all(np.allclose(final[name], again[name], atol=1e-4) for name in final)
    assert [check.name for check in verify(run) if check.result == FAILED] == []


def test_its_mirror_is_listed_and_fetched(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(runs_command.app, ["mirror", "--json"], prog="x1 runs") == 0
    (one,) = json.loads(capsys.readouterr().out)["runs"]
    assert (one["name"], one["step"], one["good_mirror"], one["status"]) == ("kept", LAST, LAST, "finished")
    assert run_app(pull_command.app, ["mirror/kept", "--output", "fetched"], prog="x1 pull") == 0
    assert verify_folder(Path("fetched/checkpoints/step-000000012")) is None
    assert open_run(Path("fetched")).rows() == open_run(Path("run")).rows()


def test_its_money_is_counted(version: Path) -> None:
    assert account(read_rows(Path("money/ledger.jsonl"))).settled_usd() == Decimal("24.91")
    stop = latch.read(Path("money"))
    assert stop is not None
    assert (stop.reason, stop.by, stop.exit_code) == ("above the ceiling", "guard", 77)
    told = budget_file.parse(Path("money/budget.json").read_bytes(), Clock().now())
    assert told.spent_usd == Decimal("24.91")
    assert read_json(Path("money/termination.json"))["confirmed"][0]["machine_id"] == "i-1"


# ------------------------------------------------------------------------------------------------------------
# Every file says its version, and a newer one is refused


def test_every_file_says_its_version() -> None:
    newest = FOLDERS[-1]
    for file in newest.rglob("*.json"):
        if file.name not in OTHERS and "files" not in file.parts:
            assert isinstance(json.loads(file.read_text()).get("schema_version"), int), file
    for file in (newest / "run").glob("*.jsonl"):
        assert file.name in FORMATS, file
    assert read_rows(newest / "money/ledger.jsonl")[0]["schema_version"] == FORMATS["ledger.jsonl"]


def bumped(file: Path) -> None:
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"schema_version": 99}))


READERS: list[tuple[str, Callable[[], Any]]] = [
    ("run/manifest.json", lambda: open_run(Path("run"))),
    ("run/manifest.json", lambda: check_folder(Path("run"))),
    ("money/termination.json", lambda: read_json(Path("money/termination.json"))),
    ("money/budget.json", lambda: read_json(Path("money/budget.json"))),
    ("mirror/kept/head.json", lambda: look(FolderStore("mirror"), "kept")),
]


@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_newer_file_is_refused(version: Path, name: str, read: Callable[[], Any]) -> None:
    bumped(Path(name))
    with pytest.raises(RefusedError) as caught:
        read()
    assert caught.value.exit_code == 78
    assert str(caught.value) == f"{name}: schema version 99, this x1 reads up to 1; update x1"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_newer_rows_are_refused_by_the_manifest(version: Path, name: str) -> None:
    file = Path("run/manifest.json")
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"formats": {**FORMATS, name: 2, "unheard-of.jsonl": 1}}))
    for read in (lambda: open_run(Path("run")), lambda: check_folder(Path("run"))):
        with pytest.raises(RefusedError, match=f"^run/{name}: schema version 2, this x1 reads up to 1"):
            read()
    file.write_text(json.dumps(tree | {"formats": {**FORMATS, "unheard-of.jsonl": 1}}))
    open_run(Path("run"))


def test_newer_ledger_rows_are_refused(version: Path) -> None:
    with Path("money/ledger.jsonl").open("a") as file:
        file.write(json.dumps({"seq": 9, "event": "poll", "schema_version": 2}) + "\n")
    with pytest.raises(LedgerError, match=r"ledger.jsonl, line 5: schema version 2, this x1 reads up to 1"):
        read_rows(Path("money/ledger.jsonl"))


def test_a_newer_stop_is_still_a_stop(version: Path) -> None:
    bumped(Path("money/STOP.json"))
    stop = latch.read(Path("money"))
    assert stop is not None
    assert "update x1" in stop.reason


def test_a_newer_checkpoint_is_passed_over(version: Path) -> None:
    bumped(Path("run/checkpoints/step-000000012/manifest.json"))
    said = verify_folder(Path("run/checkpoints/step-000000012"))
    assert said is not None
    assert "newer" in said
    assert Summary(Path("run")).look()["newest_good"] == 8


def test_a_newer_note_in_the_trash_is_left_alone(version: Path) -> None:
    entry = trash.throw_away(Path("run"), None, "kept", "kept-1", Clock().now())
    bumped(entry.folder / trash.NOTE)
    assert trash.entries(Path()) == []
    assert trash.find(Path(), "kept") == []


@pytest.mark.parametrize("version_said", ["2", True, None, 1.5, [2]])
def test_what_is_no_number_is_not_judged(tmp_path: Path, version_said: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"schema_version": version_said}))
    assert read_json(tmp_path / "x.json") == {"schema_version": version_said}


def test_a_damaged_manifest_is_another_readers_to_name(tmp_path: Path) -> None:
    for content in ("", "[]", "{", '{"formats": 3}', '{"formats": {"metrics.jsonl": "x"}}'):
        (tmp_path / "manifest.json").write_text(content)
        check_folder(tmp_path)
    check_folder(tmp_path / "none")
    with pytest.raises(UserError):
        open_run(tmp_path)
