"""Reading a run folder."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.records import builder

from x1_pretrain.errors import UserError
from x1_pretrain.records import run_folder as rf


def test_a_run_opens_with_its_config_manifest_rows_and_checkpoints(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    run = rf.open_run(folder)
    assert (run.name, run.total_steps) == ("tiny", 42)
    assert run.manifest["run_id"] == builder.RUN_ID
    assert run.checkpoints == folder / "checkpoints"
    assert rf.last_step(run.rows()) == 42
    assert run.mlflow() is None
    assert run.samples() == []


def test_series_are_steps_and_values_in_order(tmp_path: Path) -> None:
    run = rf.open_run(builder.build_run(tmp_path / "tiny"))
    steps, losses = rf.series(run.rows(), "train/loss")
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40, 42]
    assert losses == [2 + 3 / step for step in steps]
    assert rf.series(run.rows(), "val/loss")[0] == [20, 40, 42]
    assert rf.series(run.rows(), "no/such") == ([], [])


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    assert rf.read_jsonl(file) == rf.Lines([{"step": 1}, {"step": 2}], [], True)


def test_damage_inside_is_counted_by_line_not_hidden(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st\n\xff\xfe\n[1]\n\n{"step": 2}\n')
    lines = rf.read_jsonl(file)
    assert [row["step"] for row in lines.rows] == [1, 2]
    assert (lines.damaged, lines.torn) == ([2, 3, 4], False)


def test_nan_and_infinity_come_back_as_numbers(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    builder.write_lines(folder / "metrics.jsonl", [{"step": 1, "train/loss": "nan", "grad_norm": "-inf"}])
    rows = rf.open_run(folder).rows()
    assert math.isnan(rf.series(rows, "train/loss")[1][0])
    assert rf.series(rows, "grad_norm")[1] == [-math.inf]


def test_true_is_not_a_number() -> None:
    assert rf.series([{"step": 1, "x": True}, {"step": 2, "x": 1}], "x") == ([2], [1.0])


def test_a_name_means_a_folder_under_runs(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "runs" / "tiny")
    assert rf.find_run("tiny", tmp_path / "runs") == folder
    assert rf.find_run(str(folder), tmp_path / "elsewhere") == folder


def test_a_run_that_is_thrown_away_while_they_are_listed_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, goes = (builder.build_run(tmp_path / name) for name in ("stays", "goes"))
    is_run = rf.is_run

    def then_thrown_away(folder: Path) -> bool:
        found = is_run(folder)
        if folder == goes:
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(rf, "is_run", then_thrown_away)
    assert rf.list_runs(tmp_path) == [stays, goes]  # the newest first


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("tinny", "there is no such folder"),
        ("empty", "no config.yaml and no manifest.json in it"),
        ("half", "no manifest.json in it"),
        ("file", "this is a file"),
    ],
)
def test_what_is_not_a_run_is_said_in_one_line_with_runs_near_it(
    tmp_path: Path, asked: str, said: str
) -> None:
    runs = tmp_path / "runs"
    builder.build_run(runs / "tiny")
    (runs / "empty").mkdir()
    (runs / "half").mkdir()
    (runs / "half" / "config.yaml").write_text("x: 1")
    (runs / "file").write_text("")
    with pytest.raises(UserError) as caught:
        rf.find_run(asked, runs)
    message = str(caught.value)
    assert said in message
    assert message.endswith(f"run folders near it: {runs / 'tiny'}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"kind": "export"}', "expected kind 'run'"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        rf.open_run(folder)
    assert "manifest.json" in str(caught.value)


def test_checkpoints_elsewhere_are_found_by_link_or_by_config(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny", checkpoint__dir=str(tmp_path / "big-disk"))
    (folder / "checkpoints").rename(tmp_path / "big-disk")
    assert rf.open_run(folder).checkpoints == tmp_path / "big-disk"
    (folder / "checkpoints").symlink_to(tmp_path / "big-disk")
    assert rf.open_run(folder).checkpoints == folder / "checkpoints"


def test_resumes_come_from_events_else_from_session_numbers(tmp_path: Path) -> None:
    run = rf.open_run(builder.build_run(tmp_path / "tiny"))
    assert rf.resume_steps(run.rows(), run.events()) == [20]
    assert rf.resume_steps(run.rows(), []) == [20]
    assert rf.resume_steps(run.rows()[:3], []) == []


def test_a_second_start_forgets_the_sessions_before_it() -> None:
    started_twice = [
        builder.event("start", 0, 1),
        builder.event("resume", 5, 2),
        builder.event("start", 0, 3),
    ]
    assert [one["session"] for one in rf.openings(started_twice)] == [3]


def test_sessions_say_their_steps(tmp_path: Path) -> None:
    run = rf.open_run(builder.build_run(tmp_path / "tiny"))
    spans = [(s["session"], s["first_row_step"], s["last_row_step"]) for s in rf.sessions(run.rows())]
    assert spans == [(1, 5, 20), (2, 25, 42)]


def test_reading_needs_neither_torch_nor_matplotlib_nor_mlflow() -> None:
    code = (
        "import sys, json; import x1_pretrain.export_run, x1_pretrain.review.command, "
        "x1_pretrain.records.mlflow_sink; "
        "print(json.dumps([n for n in ('torch', 'matplotlib', 'mlflow') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_config_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny")
    (folder / "config.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        rf.open_run(folder)
