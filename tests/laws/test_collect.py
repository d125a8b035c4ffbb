"""runs.csv from run folders: every number of a row from the records, and only runs that are points."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.records.builder import RUN_ID, build_run, read_lines, train_loss, write_lines
from x1_pretrain.laws import collect
from x1_pretrain.laws.reading import read_points
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger

WSD = {"warmup_steps": 2, "schedule": "wsd"}


def row(run: Path, **more: Any) -> dict[str, Any]:
    (found,) = collect.collect([run], **more).rows
    return found


def test_a_row_is_the_run(tmp_path: Path) -> None:
    found = row(build_run(tmp_path / "a"))
    # by hand: 2 layers of 2 x 8 x 2 x (4 + 2) + 3 x 8 x 12 = 480 in matrices; embedding 11 x 8; 5 norms of 8
    assert (found["N"], found["N_total"]) == (960, 960 + 88 + 40)
    assert (found["D"], found["steps"], found["batch_tokens"], found["context"]) == (42 * 64, 42, 64, 16)
    per_token = (
        6 * (960 + 88) + 6 * 2 * 4 * 2 * 17
    )  # matrices and output; attention over (16 + 1) / 2 positions
    assert float(found["flops"]) == pytest.approx(42 * 64 * per_token, rel=1e-6)
    assert found["val_loss"] == train_loss(42) + 0.05
    assert (found["run_id"], found["trunk"]) == (RUN_ID, RUN_ID)
    assert (found["schedule"], found["decayed"], found["seed"], found["lr"]) == ("cosine", "yes", 42, 3e-4)
    assert (found["val_tokens"], found["data"], found["usd_spent"]) == (100, "f" * 12, "")
    assert found["run_dir"] == tmp_path / "a"
    assert found["checkpoint"] == tmp_path / "a" / "checkpoints" / "step-000000042"
    assert tuple(found) == collect.COLUMNS


def test_the_order_of_the_columns_is_the_published_one() -> None:
    assert collect.COLUMNS[:5] == ("run_id", "N", "D", "val_loss", "usd_spent")


def test_a_branch_belongs_to_its_trunk(tmp_path: Path) -> None:
    run = build_run(tmp_path / "a", optimizer=WSD)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["parent"] = {"run_id": "mother", "step": 9, "checkpoint": "x", "trunk": "grandmother"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert (row(run)["trunk"], row(run)["schedule"], row(run)["decayed"]) == ("grandmother", "wsd", "yes")


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({**WSD, "decay_steps": 0}, ("constant", "no")),
        ({"lr": 3e-4, "min_lr": 3e-4, "warmup_steps": 2}, ("constant", "no")),
        ({**WSD, "decay_steps": 1}, ("wsd", "yes")),
        ({"warmup_steps": 42}, ("cosine", "no")),  # warm-up all the way
    ],
)
def test_what_never_came_down_is_not_decayed(
    tmp_path: Path, optimizer: dict[str, Any], expected: tuple[str, str]
) -> None:
    found = row(build_run(tmp_path / "a", optimizer=optimizer))
    assert (found["schedule"], found["decayed"]) == expected


def test_an_unfinished_run_is_named_and_left_out_unless_asked_for(tmp_path: Path) -> None:
    half = build_run(tmp_path / "half", steps=30)
    silent = build_run(tmp_path / "silent")  # at the end, but it never said so
    write_lines(
        silent / "events.jsonl", [e for e in read_lines(silent / "events.jsonl") if e["event"] != "finish"]
    )
    empty = build_run(tmp_path / "empty", steps=10)
    runs = [half, silent, empty, tmp_path / "absent", build_run(tmp_path / "whole", run_id="whole-1")]
    found = collect.collect(runs)
    assert [r["run_id"] for r in found.rows] == ["whole-1"]
    assert found.left_out == [
        f"{half}: unfinished, evaluated at step 20 of 42",
        f"{silent}: unfinished, evaluated at step 42 of 42",
        f"{empty}: no validation loss on record",
        f"{tmp_path / 'absent'}: not begun",
    ]
    asked = collect.collect(runs, unfinished=True).rows
    assert [(r["D"], r["decayed"], r["val_loss"]) for r in asked[:1]] == [
        (20 * 64, "no", train_loss(20) + 0.05)
    ]


def test_a_folder_named_twice_is_one_run(tmp_path: Path) -> None:
    run = build_run(tmp_path / "a")
    assert len(collect.collect([run, tmp_path / "." / "a"]).rows) == 1


def test_dollars_are_hours_at_the_price_given(tmp_path: Path) -> None:
    run = build_run(tmp_path / "a")
    assert row(run, usd_per_hr=Decimal("1200"))["usd_spent"] == "1.4000"  # 4.2 s


def test_dollars_of_a_watched_run_are_what_it_added_to_the_bill(tmp_path: Path) -> None:
    run = build_run(tmp_path / "a")
    ledger = Ledger(run / "ledger.jsonl", Clock.from_environment())
    ledger.append("ceiling", "the ceiling is $35", ceiling_usd=Decimal(35))
    for usd in ("3.10", "3.25", "3.40"):
        ledger.append("reading", spent_usd=Decimal(usd))
    assert row(run, usd_per_hr=Decimal(99))["usd_spent"] == "0.3000"  # others had spent 3.10 before
    lines = read_lines(run / "metrics.jsonl")
    lines[-1]["budget/spent_usd"] = 3.45  # newer than the last reading
    write_lines(run / "metrics.jsonl", lines)
    assert row(run)["usd_spent"] == "0.3500"


def test_a_ledger_without_a_reading_knows_no_dollars(tmp_path: Path) -> None:
    run = build_run(tmp_path / "a")
    Ledger(run / "ledger.jsonl", Clock.from_environment()).append("ceiling", ceiling_usd=Decimal(35))
    assert row(run, usd_per_hr=Decimal(99))["usd_spent"] == ""


def test_validation_tokens_are_limited_for_each_domain(tmp_path: Path) -> None:
    assert row(build_run(tmp_path / "a", evaluation={"every": 20, "tokens": 30}))["val_tokens"] == 30


def test_the_table_reads_back_as_points(tmp_path: Path) -> None:
    wide = {"model__d_model": 64, "training__batch_tokens": 6400}  # too small a model looks like a slip
    rows = collect.collect([build_run(tmp_path / n, run_id=n, **wide) for n in ("a", "b")]).rows
    rows[1] |= {"trunk": "a", "val_loss": 2.5}
    collect.write_table(tmp_path / "out" / "runs.csv", rows)
    with (tmp_path / "out" / "runs.csv").open() as file:
        assert [r["run_id"] for r in csv.DictReader(file)] == ["a", "b"]
    points = read_points(tmp_path / "out" / "runs.csv")
    assert (len(points), points.clusters) == (2, 1)
    assert list(points.n) == [rows[0]["N"], rows[1]["N"]]
    assert points.flops_basis == "as measured"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["runs.csv"]
