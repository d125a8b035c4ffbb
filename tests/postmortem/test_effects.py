"""What a spike did, against numbers known beforehand; and the verdict on it, as a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.postmortem import spiky
from tests.records import builder
from x1_pretrain.config import OptimizerConfig, RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.money.clock import Clock
from x1_pretrain.postmortem.effects import Lasting, clipping, lasting, memory, norms, price
from x1_pretrain.postmortem.episodes import episodes
from x1_pretrain.postmortem.findings import last_resume
from x1_pretrain.postmortem.verdict import Evidence, judge
from x1_pretrain.records.run_folder import open_run


def rows_of(steps: range, loss: Any, seed: int = 0, noise: float = 0.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"step": s, "loss": float(loss(s)) + noise * rng.normal(), "grad_norm": 1.0} for s in steps]


# -----------------------------------------------------------------------------------------------------------
# The trend


def test_damage_on_an_exact_trend_is_found_exactly() -> None:
    def trend(step: int) -> float:
        return 5.0 - 0.3 * math.log(step)

    found = lasting(rows_of(range(100, 200), trend), rows_of(range(220, 260), lambda s: trend(s) + 0.07))
    assert found is not None
    assert found.difference == pytest.approx(0.07)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert found.clear
    assert (found.before, found.first, found.last) == (100, 220, 259)


def test_the_error_covers_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(400):
        before = rows_of(range(100, 228), lambda s: 4 - 0.2 * math.log(s), seed, 0.05)
        after = rows_of(range(240, 300), lambda s: 4 - 0.2 * math.log(s) + 0.03, seed + 10_000, 0.05)
        found = lasting(before, after)
        assert found is not None
        inside += abs(found.difference - 0.03) <= found.error
    assert inside / 400 >= 0.94


def test_a_bend_in_the_trend_is_no_damage() -> None:
    """A loss that flattens lies above any straight line through its past."""

    def flattening(step: int) -> float:
        return 1.8 + 40 / step

    before = rows_of(range(73, 201), flattening, 1, 0.03)
    for length in (11, 30, 64):
        found = lasting(before, rows_of(range(206, 206 + length), flattening, 2, 0.03))
        assert found is not None
        assert not found.clear
    damaged = lasting(before, rows_of(range(206, 270), lambda s: flattening(s) + 0.5, 3, 0.03))
    assert damaged is not None
    assert damaged.clear


@pytest.mark.parametrize(
    ("difference", "error", "reading"),
    [
        (0.386, 0.306, "blind"),  # the twin run without the injection lay 0.009 above
        (0.0, 0.511, "blind"),
        (0.01, 0.02, "nothing"),
        (-0.5, 0.02, "nothing"),
        (0.03, 0.02, "above"),
        (0.05, 0.02, "may have"),
        (0.5, 0.2, "may have"),
    ],
)
def test_no_more_is_read_from_a_difference_than_its_error_allows(
    difference: float, error: float, reading: str
) -> None:
    assert Lasting(difference, error, 3.0, 3.0 + difference, 100, 1, 64, 64).reading == reading


def test_too_few_steps_give_no_trend() -> None:
    few, many = rows_of(range(1, 9), lambda s: 3.0), rows_of(range(1, 40), lambda s: 3.0)
    assert lasting(few, many) is None
    assert lasting(many, few[:5]) is None


# -----------------------------------------------------------------------------------------------------------
# Clipping and Adam's memory


def test_the_hardest_cut() -> None:
    rows = [
        {"step": 1, "grad_norm": 0.5, "clip": 0.8, "verdict": "go"},
        {"step": 2, "grad_norm": 8.0, "clip": 0.8, "verdict": "go"},
        {"step": 3, "grad_norm": 4.0, "clip": 0.2, "verdict": "go"},
        {"step": 4, "grad_norm": 99.0, "clip": 0.8, "verdict": "skip"},
        {"step": 5, "grad_norm": math.nan, "clip": 0.8, "verdict": "go"},
    ]
    found = clipping(rows)
    assert found is not None
    assert (found.steps, found.cut, found.factor, found.step, found.norm, found.limit) == (
        3,
        2,
        20,
        3,
        4.0,
        0.2,
    )
    assert clipping([{"step": 1, "grad_norm": 3.0}]) is None


def test_one_large_gradient_in_adams_memory() -> None:
    """In closed form: v = 1 + (1 - beta2) (k^2 - 1), then what is above 1 shrinks by beta2 a step."""
    optimizer = OptimizerConfig(beta2=0.9)
    rows = [{"step": 10, "grad_norm": 6.0, "clip": 4.0}]  # cut to 4, twice the usual 2
    found = memory(rows, 2.0, optimizer)
    assert found is not None
    assert found.steps == pytest.approx(10)
    assert found.peak == pytest.approx(1 + 0.1 * (4 - 1))
    assert found.update == pytest.approx(1 / math.sqrt(1.3))
    left = 0.3
    waited = 0
    while left > 0.1:
        left, waited = left * 0.9, waited + 1
    assert (found.peak_step, found.calm_step) == (10, 10 + waited)


def test_the_memory_follows_the_rows_as_adam_does() -> None:
    """Against AdamW's own recursion, also over updates that were left out."""
    rng = np.random.default_rng(3)
    rows = [
        {"step": s, "grad_norm": float(g), "clip": 5.0, "verdict": "skip" if s == 23 else "go"}
        for s, g in zip(range(20, 60), np.exp(rng.normal(0.5, 1, 40)), strict=True)
    ]
    v = highest = 1.0
    for row in rows:
        if row["verdict"] == "go":
            v += (1 - 0.95) * (min(row["grad_norm"], 5.0) ** 2 - v)
        highest = max(highest, v)
    found = memory(rows, 1.0, OptimizerConfig())
    assert found is not None
    assert found.peak == pytest.approx(highest)


def test_norms_on_both_sides() -> None:
    metrics = [{"step": s, "param_norm": s / 10, "optimizer/v_norm": 1.0} for s in (10, 20, 30, 40)]
    metrics[1] |= {"optimizer/v_norm": 9.0, "grad_norm": 1.0, "param_norm/layer.0": 5.0}
    steps = [{"step": s, "grad_norm": float(s)} for s in range(1, 41)]
    found = {norm.name: norm for norm in norms(metrics, steps, 15, 29)}
    assert set(found) == {"grad_norm", "param_norm", "optimizer/v_norm"}
    assert found["grad_norm"].before == (14, 14.0)
    assert found["grad_norm"].during == (29, 29.0)
    assert found["grad_norm"].after == (30, 30.0)
    assert found["optimizer/v_norm"].during == (20, 9.0)
    assert found["param_norm"].after == (30, 3.0)


# -----------------------------------------------------------------------------------------------------------
# The price


def priced(folder: Path, ledger: list[dict[str, Any]]) -> Any:
    spiky.natural(folder)
    builder.write_lines(folder / "ledger.jsonl", ledger)
    run = open_run(folder)
    return price(run, episodes(run)[0].time_utc, run.rows(), Clock())


def machine(tag: str, rate: str, since: str) -> dict[str, Any]:
    row = {"seq": 1, "time_utc": since, "event": "intent", "tag": tag, "provider": "p", "usd_per_hr": rate}
    return row | {"machine_id": tag}


def test_the_rate_of_the_machines_that_were_there(tmp_path: Path) -> None:
    ended = {"seq": 3, "time_utc": "2026-11-21T10:01:00Z", "event": "terminate_confirmed", "tag": "old"}
    ledger = [
        machine("old", "9.00", "2026-11-21T09:00:00Z"),
        machine("new", "1.80", "2026-11-21T10:00:30Z"),
        ended,
    ]
    found = priced(tmp_path / "run", ledger)
    assert found.usd_per_hr == pytest.approx(1.80)
    assert found.usd(600.0, Clock()) == pytest.approx(0.30)


def test_without_machines_the_agreed_rate(tmp_path: Path) -> None:
    row = {"seq": 1, "time_utc": "2026-11-21T09:00:00Z", "event": "gate", "verdict": "passed"}
    found = priced(tmp_path / "run", [row | {"ceiling_usd": "35", "usd_per_hr": "1.19"}])
    assert found.usd_per_hr == pytest.approx(1.19)


def test_without_a_ledger_what_the_metrics_say_or_nothing(tmp_path: Path) -> None:
    assert priced(tmp_path / "none", []) is None
    folder = spiky.natural(tmp_path / "run")
    rows = [row | {"budget/spent_usd": row["elapsed_s"] * 2 / 3600} for row in spiky.metric_rows(300)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = open_run(folder)
    found = price(run, None, run.rows(), Clock())
    assert found is not None
    assert found.usd_per_hr == pytest.approx(2.0)


# -----------------------------------------------------------------------------------------------------------
# The verdict


def config(**sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"layers": 1, "d_model": 8, "heads": 2, "kv_heads": 2, "d_ff": 8, "context": 16},
        "training": {"total_steps": 400, "batch_tokens": 64},
        "optimizer": {"warmup_steps": 100},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return parse_config(tree, "test")


BASE = {"onset": 500, "warmup_steps": 100, "steps_to_recover": 30}
PLAIN = ["stability.policy", "model.qk_norm", "training.z_loss"]


@pytest.mark.parametrize(
    ("evidence", "cause", "fields"),
    [
        ({"injected": True}, "injected", []),
        ({"injected": True, "lasting": 0.1}, "injected", ["optimizer.clip", "optimizer.lr"]),
        ({"injected": True, "lasting": 0.1, "untouched": True}, "injected", []),
        ({"injected": True, "state": "rewound", "steps_to_recover": None}, "injected", []),
        ({"injected": True, "not_finite": 2, "patterns": ("x",)}, "injected", []),
        ({"not_finite": 1}, "not finite", ["training.precision", "model.qk_norm", "training.z_loss"]),
        (
            {"not_finite": 1, "precision": "fp32"},
            "not finite",
            ["optimizer.lr", "model.qk_norm", "training.z_loss"],
        ),
        ({"patterns": ("odd text",)}, "data", ["data", "stability.policy"]),
        ({"onset": 80}, "warm-up", ["optimizer.warmup_steps", "optimizer.lr"]),
        ({"onset": 120}, "warm-up", ["optimizer.warmup_steps", "optimizer.lr"]),
        ({"onset": 80, "patterns": ("odd",)}, "data", ["data", "stability.policy"]),
        ({"steps_since_resume": 3}, "resume", ["x1 verify"]),
        ({"steps_since_resume": 30}, "optimizer", PLAIN),
        ({"steps_to_recover": 1}, "one batch", ["stability.policy"]),
        ({"steps_to_recover": 2, "data_seen": False}, "one batch", ["data", "stability.policy"]),
        ({"logit_max": 80.0}, "attention", ["model.qk_norm", "training.z_loss", "stability.policy"]),
        (
            {"logit_max": 25.0, "logit_growth": 3.0},
            "attention",
            ["model.qk_norm", "training.z_loss", "stability.policy"],
        ),
        ({"logit_max": 12.0, "logit_growth": 2.4}, "optimizer", PLAIN),  # a model that learns to attend
        ({"logit_max": 30.0, "logit_growth": 1.1}, "optimizer", PLAIN),
        ({"steps_since_resume": -10}, "optimizer", PLAIN),
        ({"steps_since_resume": 5}, "resume", ["x1 verify"]),
        ({}, "optimizer", PLAIN),
        ({"spikes": 4}, "optimizer", ["optimizer.lr", *PLAIN]),
        ({"lasting": 0.2}, "optimizer", ["optimizer.lr", *PLAIN]),
        (
            {"state": "not recovered", "steps_to_recover": None},
            "optimizer",
            ["stability.policy", "optimizer.lr", "model.qk_norm", "training.z_loss"],
        ),
        ({"state": "open", "steps_to_recover": None}, "optimizer", ["x1 postmortem", "optimizer.lr", *PLAIN]),
        ({"state": "rewound", "steps_to_recover": None}, "optimizer", ["optimizer.lr", *PLAIN]),
    ],
)
def test_the_verdict_follows_from_the_evidence(
    evidence: dict[str, Any], cause: str, fields: list[str]
) -> None:
    found = judge(Evidence(**(BASE | evidence)), config())
    assert found.cause == cause
    assert [one.field for one in found.advice] == fields


@pytest.mark.parametrize(
    ("events", "last"),
    [
        ([("start", 0)], None),
        ([("start", 0), ("resume", 100)], 100),
        ([("start", 0), ("resume", 100), ("resume", 198)], 198),
        ([("start", 0), ("resume", 100), ("resume", 210)], 100),  # beyond the onset
        ([("start", 0), ("resume", 150), ("resume", 90)], 90),  # a bad checkpoint: earlier than before
        ([("start", 0), ("resume", 198), ("rewind", 180)], None),  # that past was given up
        ([("start", 0), ("resume", 100), ("rewind", 180)], 100),
        ([("start", 0), ("resume", 100), ("rewind", None)], 100),  # it found no checkpoint
        ([("start", 0), ("resume", 100), ("start", 0)], None),
    ],
)
def test_the_last_resume_before_an_onset(events: list[tuple[str, int | None]], last: int | None) -> None:
    rows = [spiky.event(name, step if name != "rewind" else 220, to_step=step) for name, step in events]
    assert last_resume(rows, 201) == last


def test_advice_is_only_what_the_config_has_not_done() -> None:
    careful = config(
        model={"qk_norm": True},
        training={"z_loss": 1e-5},
        stability={"policy": "rewind"},
        optimizer={"beta2": 0.999},
    )
    fields = [one.field for one in judge(Evidence(**BASE), careful).advice]
    assert fields == ["optimizer.beta2"]
    stuck = judge(Evidence(**(BASE | {"state": "not recovered"})), careful)
    assert stuck.advice[0].field == "stability.max_rewinds"


def test_every_field_named_exists() -> None:
    def exists(path: str) -> bool:
        place: Any = config()
        for part in path.split("."):
            place = getattr(place, part, None)
        return place is not None

    everything = [{"lasting": 1.0, "spikes": 3}, {"not_finite": 1}, {"onset": 50}, {"patterns": ("x",)}]
    for evidence in everything:
        for one in judge(Evidence(**(BASE | evidence)), config()).advice:
            assert exists(one.field), one.field
