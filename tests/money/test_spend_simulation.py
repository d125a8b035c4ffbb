"""The simulation behind the table in docs/budget.md: its guard is the real one, its arithmetic is right."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from math import exp, isnan
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from x1_pretrain.money.guard import Action, Limits, Memory, Reading, decide

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/spend.py"
CODES = {Action.GO: 0, Action.SAVE_AND_STOP: 1, Action.STOP_NOW: 2}
RUNS, TURNS = 40, 14


@pytest.fixture(scope="module")
def spend() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("spend_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["spend_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["spend_benchmark"]


def exact(value: float) -> Decimal | None:
    return None if isnan(value) else Decimal(repr(float(value)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("no_answer", ["stop", "continue"])
def test_the_guard_for_many_runs_is_the_guard(
    spend: ModuleType, seed: int, no_answer: Literal["stop", "continue"]
) -> None:
    """Random histories, run by run and decision by decision: late, repeated, future, lower, silent."""
    random = np.random.default_rng(seed)
    limits = Limits(Decimal(9), Decimal("1.3"), Decimal(8), no_answer=no_answer)
    guards, memories = spend.Guards(limits, RUNS), [Memory(since_s=0.0) for _ in range(RUNS)]
    now_s, seen = 0.0, set()
    said = spend.Readings(*(np.full(RUNS, np.nan) for _ in range(4)))
    for turn in range(TURNS):
        now_s += float(random.exponential(900))
        shown = random.random(RUNS) < (0.8 if turn else 1.0)
        repeated = (random.random(RUNS) < 0.2) & (turn > 0)
        dear, silent = random.random(RUNS) < 0.3, random.random(RUNS) < 0.2
        new = spend.Readings(
            spent_usd=now_s / 3600 * random.uniform(0.2, 3.5, RUNS),
            usd_per_hr=np.where(silent, random.choice([0, np.nan]), random.uniform(0.5, 1.5, RUNS) + dear),
            projected_usd=np.where(random.random(RUNS) < 0.5, np.nan, random.uniform(7, 10, RUNS)),
            at_s=now_s + random.uniform(-2500, 100, RUNS),
        )
        for name in ("spent_usd", "usd_per_hr", "projected_usd", "at_s"):
            setattr(said, name, np.where(repeated, getattr(said, name), getattr(new, name)))
        left_s = np.where(random.random(RUNS) < 0.5, np.nan, random.uniform(0, 20_000, RUNS))
        actions = guards.decide(now_s, shown, said, left_s)
        for run in range(RUNS):
            columns = (said.spent_usd, said.usd_per_hr, said.projected_usd)
            spent, rate, projected = (exact(column[run]) for column in columns)
            assert spent is not None
            reading = Reading(spent, rate, projected, float(said.at_s[run])) if shown[run] else None
            left = None if isnan(left_s[run]) else float(left_s[run])
            decision = decide(reading, limits, now_s, memories[run], left_s=left)
            memories[run] = decision.memory
            assert actions[run] == CODES[decision.action], (turn, run, decision.reason)
            assert guards.now_usd[run] == pytest.approx(float(decision.spent_usd))
            assert guards.age_s[run] == pytest.approx(decision.age_s)
            assert guards.breaches[run] == decision.memory.breaches
            seen.add((int(actions[run]), " ".join(decision.reason.split()[-3:])))
    assert {action for action, _ in seen} == {0, 1, 2}


@pytest.mark.parametrize(("factor", "save_s", "mtbf_s"), [(0.5, 60, 14400), (1, 5, 86400), (3, 60, 14400)])
def test_lost_time_is_what_renewal_theory_says(
    spend: ModuleType, factor: float, save_s: float, mtbf_s: float
) -> None:
    """Of an interval that starts anew at each loss, mtbf * (exp(length / mtbf) - 1) pass on average."""
    interval_s = factor * spend.young_s(save_s, mtbf_s)
    expected = mtbf_s * (exp((interval_s + save_s) / mtbf_s) - 1) / interval_s - 1
    lost = spend.lost_share(interval_s, save_s, mtbf_s, 3000, np.random.default_rng(1))
    assert lost.mean() == pytest.approx(expected, abs=5 * lost.std() / 3000**0.5)
    assert lost.std() / 3000**0.5 < expected / 20


def test_nothing_lost_is_the_time_to_save(spend: ModuleType) -> None:
    lost = spend.lost_share(1000.0, 50.0, 1e15, 3, np.random.default_rng(1))
    assert lost == pytest.approx(0.05)


@pytest.fixture(scope="module")
def tables() -> list[list[str]]:
    """The cells of all rows of a quick run."""
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.match(r"20\d\d-\d\d-\d\d; .* cores; Python 3", done.stdout)
    return [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]


def dollars(cell: str) -> float:
    return 0.0 if cell == "none" else float(cell.removeprefix("$"))


def test_a_constant_price_stays_within_one_step_of_the_ceiling(tables: list[list[str]]) -> None:
    rows = {row[1]: row for row in tables if row[0] == "constant" and len(row) == 9}
    step_usd = 1.19 / 60
    assert set(rows) == {
        "every 5 min", "every 30 min", "dies", "its amount sticks", "all sticks but its time"
    }  # fmt: skip
    for watcher in ("every 5 min", "every 30 min", "dies"):
        assert dollars(rows[watcher][4]) <= 35 + step_usd
    assert dollars(rows["every 5 min"][2]) > 34.5  # and it is not stopped long before either


def test_a_dead_watcher_is_never_dearer(tables: list[list[str]]) -> None:
    most = [dollars(row[4]) for row in tables if row[1] == "dies" and len(row) == 9]
    assert len(most) == 3
    assert max(most) <= 35.05


def test_the_cheapest_cadence_is_where_the_formula_says(tables: list[list[str]]) -> None:
    rows = [row for row in tables if row[0] in ("5 s", "60 s")]
    assert len(rows) == 4
    for row in rows:
        quarter, half, one, double, fourfold = (dollars(cell) for cell in row[3:8])
        assert one < half < quarter
        assert one < double < fourfold
        assert 0.6 < float(row[8].removesuffix(" x")) < 1.6
