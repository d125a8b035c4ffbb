"""The seam: what the loop feeds in comes out as the right events."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.test_memory import small
from x1_pretrain.config import TelemetryConfig
from x1_pretrain.runtime import health
from x1_pretrain.runtime.host import HostWatch
from x1_pretrain.runtime.memory import LeakDetector
from x1_pretrain.runtime.pace import Facts, PaceKeeper
from x1_pretrain.runtime.run import Health


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """As much of a run as is looked at: 1,000 of 10,000 steps done, $7 of $10 spent, on a CPU."""
    told: list[tuple[str, str, dict[str, Any]]] = []
    alerts: list[tuple[str, ...]] = []
    return SimpleNamespace(
        config=SimpleNamespace(
            telemetry=TelemetryConfig(host_every_s=0.05),
            training=SimpleNamespace(batch_tokens=1000),
            log=SimpleNamespace(every=10),
            model=small(),
            folder=tmp_path,
            checkpoint_folder=tmp_path / "checkpoints",
        ),
        world=SimpleNamespace(device=torch.device("cpu")),
        machine=SimpleNamespace(
            micro_batch=8,
            precision="fp32",
            compile_mode="off",
            attention="attention: sdpa (asked for)",
            said=["precision: fp32", "compile: off (on a CPU only when asked for)"],
            peak_flops_per_sec=None,
        ),
        flops=SimpleNamespace(palm=1e6),
        guard=SimpleNamespace(
            limits=SimpleNamespace(gate_usd_per_hr=Decimal("2"), ceiling_usd=Decimal("10")),
            spent_usd=Decimal("7"),
            notifier=SimpleNamespace(alert=lambda *said: alerts.append(said)),
        ),
        total_steps=10_000,
        step=1000,
        told=told,
        alerts=alerts,
        clock=SimpleNamespace(steps=5),
        watchdog=SimpleNamespace(news=list),
        event=lambda name, message, **fields: told.append((name, message, fields)),
    )


@pytest.fixture
def watched(run: SimpleNamespace, tmp_path: Path) -> Iterator[SimpleNamespace]:
    host = HostWatch(run.config.telemetry, tmp_path, tmp_path / "checkpoints")
    facts = Facts(basis="assumed", source="an assumed MFU of 0.35", on_gpu=False)
    run.health = Health(host, PaceKeeper(1000.0), facts, LeakDetector(0.1, "this process's memory"))
    host.start()
    yield run
    host.close()


def names(run: SimpleNamespace) -> list[str]:
    return [name for name, _, _ in run.told if name != "host"]  # a busy machine may have something to say


def test_a_slow_run_is_an_event_with_its_bill(watched: SimpleNamespace) -> None:
    """9,000,000 tokens at 500 a second: 5 h, $10, with $3 left below the ceiling."""
    for n in range(20):
        health.look(watched, {"tokens_per_sec": 500.0, "elapsed_s": 20.0 * n})
    assert names(watched) == ["slow"]
    _, message, fields = next(one for one in watched.told if one[0] == "slow")
    assert "5.0 h more instead of 2.5 h, $10.00 instead of $5.00" in message
    assert "$3.00 are left" in message
    assert fields["planned"] == 1000.0
    assert [said[1] for said in watched.alerts] == [f"X1 {watched.config.folder.name}: slower than planned"]


def test_a_leak_is_an_event(watched: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    now, level = [0.0], [1.0]
    monkeypatch.setattr(health.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(health.memory, "own_gib", lambda: level[0])
    for _ in range(4000):
        now[0] += 1.0
        level[0] += 0.0002
        health.saw(watched, "step")
        if now[0] % 10 == 0:
            health.look(watched, {})
    assert names(watched)[0] == "leak"
    assert (
        "this process's memory grows in the phase step"
        in watched.told[[n[0] for n in watched.told].index("leak")][1]
    )


def test_the_peak_is_compared_once_and_not_with_the_first_step_in_it(watched: SimpleNamespace) -> None:
    for steps, peak in ((9, 99.0), (10, 1.0), (10, 2.0)):  # of the row's ten, those that compiled nothing
        watched.clock.steps = steps
        health.look(watched, {"memory/peak_gib": peak})
    assert names(watched) == ["memory"]
    fields = next(fields for name, _, fields in watched.told if name == "memory")
    assert fields["measured_gib"] == 1.0
    assert fields["predicted_gib"] > 0


def test_a_rank_that_does_not_watch_says_nothing(run: SimpleNamespace) -> None:
    run.health = None
    health.saw(run, "step")
    health.look(run, {"tokens_per_sec": 1.0})
    assert run.told == []
