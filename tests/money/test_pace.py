"""How fast a run goes by its own rows, whatever state those are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from x1_pretrain.money.pace import left_s, tokens_per_sec

BATCH, STEPS = 8192, 1000


def session(number: int, first: int, count: int, rate: float, began_s: float = 0.0) -> list[dict[str, Any]]:
    """`count` rows, ten steps apart, at `rate` tokens a second."""
    steps = range(first, first + 10 * count, 10)
    return [
        {"step": s, "tokens": s * BATCH, "session": number, "train/loss": 3.0,
         "elapsed_s": began_s + (s - first) * BATCH / rate}
        for s in steps
    ]  # fmt: skip


def test_tokens_over_seconds_from_the_first_row_to_the_last() -> None:
    assert tokens_per_sec(session(1, 10, 5, 50_000.0)) == pytest.approx(50_000)


def test_pauses_to_evaluate_and_save_are_part_of_the_pace() -> None:
    rows = session(1, 10, 5, 50_000.0)
    for row in rows[2:]:
        row["elapsed_s"] += 10.0
    evaluation = {"step": 30, "tokens": 30 * BATCH, "session": 1, "val/loss": 3.0, "elapsed_s": 1e6}
    seconds = 40 * BATCH / 50_000 + 10
    assert tokens_per_sec([*rows[:2], evaluation, *rows[2:]]) == pytest.approx(40 * BATCH / seconds)


def test_the_newest_session_that_is_long_enough_counts() -> None:
    old, new = session(1, 10, 9, 10_000.0), session(2, 60, 9, 50_000.0, began_s=500.0)
    assert tokens_per_sec(old + new) == pytest.approx(50_000)
    assert tokens_per_sec(old + new[:2]) == pytest.approx(10_000)
    assert tokens_per_sec(old[:2] + new[:2]) is None
    assert tokens_per_sec([]) is None


@pytest.mark.parametrize("value", [None, "nan", float("nan"), float("inf"), "5", True, [], 10**400])
@pytest.mark.parametrize("key", ["elapsed_s", "tokens"])
def test_a_damaged_row_is_left_out(key: str, value: object) -> None:
    rows = session(1, 10, 6, 50_000.0)
    rows[-1] = rows[-1] | {key: value}
    rows[0] = rows[0] | {key: value}
    assert tokens_per_sec(rows) == pytest.approx(50_000)
    del rows[0][key]
    assert tokens_per_sec(rows) == pytest.approx(50_000)


def test_time_or_tokens_that_go_back_are_no_pace() -> None:
    rows = session(1, 10, 5, 50_000.0)
    assert tokens_per_sec(rows[::-1]) is None
    assert tokens_per_sec([row | {"elapsed_s": 5.0} for row in rows]) is None
    assert tokens_per_sec([row | {"tokens": 5} for row in rows]) is None
    older = session(1, 10, 5, 20_000.0)
    assert tokens_per_sec(older + [row | {"session": 2, "elapsed_s": 5.0} for row in rows]) == pytest.approx(
        20_000
    )


# ------------------------------------------------------------------------------------------------------------
# What is left


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = {
        "name": "x",
        "model": {"layers": 1, "heads": 1, "kv_heads": 1, "d_model": 16, "d_ff": 16},
        "training": {"total_steps": STEPS, "batch_tokens": BATCH},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def wrote(run: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_what_is_left_at_the_pace_so_far(run: Path) -> None:
    wrote(run, session(1, 10, 10, 40_960.0), tail='{"step": 110, "tok')
    left = (STEPS - 100) * BATCH / 40_960
    assert left_s(run) == pytest.approx(left)
    assert left_s(run, 60.0) == pytest.approx(60 * left)


def test_a_resume_from_an_earlier_checkpoint_has_more_left(run: Path) -> None:
    again = session(2, 51, 4, 40_960.0)
    wrote(run, session(1, 10, 10, 40_960.0) + again)
    assert left_s(run) == pytest.approx((STEPS - again[-1]["step"]) * BATCH / 40_960)


def test_damaged_lines_do_no_harm_and_nothing_is_left_after_the_end(run: Path) -> None:
    rows = session(1, STEPS - 40, 5, 40_960.0)
    wrote(run, [*rows, {"step": STEPS, "tokens": "nan"}, {"step": STEPS, "tokens": None}], tail="garbage\n")
    assert left_s(run) == 0.0


def test_nothing_is_said_without_a_config_or_a_pace(run: Path, tmp_path: Path) -> None:
    assert left_s(run) is None
    wrote(run, session(1, 10, 2, 40_960.0))
    assert left_s(run) is None
    wrote(run, session(1, 10, 5, 40_960.0))
    assert left_s(run) is not None
    for content in ("", "name: [", "name: x\nmodel: 3"):
        (run / "config.yaml").write_text(content)
        assert left_s(run) is None
    (run / "config.yaml").unlink()
    assert left_s(run) is None
