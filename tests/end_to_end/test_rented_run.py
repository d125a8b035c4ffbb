"""Rented runs, rehearsed with real processes: nothing stays alive, the ledger agrees with the meter, every
alert comes once, and the losses are those of a run that nobody disturbed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config
from tests.end_to_end.processes import Training, rows, wait_until
from tests.end_to_end.rehearsal import POLL_S, SPEED, Rehearsal, rehearsal

STEPS = 2400


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(
        folder / "tiny.yaml",
        training={"total_steps": STEPS, "compile": "off", "micro_batch": 8},
        checkpoint={"every": 100},
        evaluation={"every": 1200, "prompts": []},
        log={"every": 10, "blocks": False},
        budget={"read_every_s": 120.0, "warmup_s": 0.0},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config: Path, corpus: Path) -> dict[int, float]:
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = Training("--config", config, "--data-dir", corpus, "--run-dir", run).end()
    assert code == 0, output
    return {r["step"]: r["train/loss"] for r in rows(run / "metrics.jsonl") if "train/loss" in r}


def here(config: Path, folder: Path) -> Path:
    """The config, with this test's run folder."""
    file = folder / "c.yaml"
    file.write_text(config.read_text() + f"run_dir: {folder}/runs/r\n")
    return file


def settled(r: Rehearsal, undisturbed: dict[int, float], *, finished: bool = True) -> None:
    """What must be true after any run."""
    assert r.alive() == 0, r.machine_log()
    assert r.ledger("terminate_confirmed")
    losses = r.losses()
    assert losses.items() <= undisturbed.items()
    if finished:
        assert losses == undisturbed
    true, counted = r.true_usd(), r.counted_usd()
    poll = r.rate_usd_per_hr() * int(POLL_S) / 3600
    assert counted >= true - poll, f"counted {counted}, true {true}"
    told = Counter((one["title"], one["message"]) for one in r.told if not one["title"].endswith(": test"))
    assert not [what for what, times in told.items() if times > 1]


def test_a_run_from_the_sentence_to_the_proof(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    with rehearsal(tmp_path, here(config, tmp_path), corpus) as r:
        code, output = r.end(r.start())
        assert code == 0, output + r.machine_log()
        settled(r, undisturbed)
        lines = output.splitlines()
        assert lines[0].startswith(
            "This will start 1x A100 80GB on the fake provider secure at $1.19/h (live"
        )
        # more than the meter: an exited machine counts at the agreed price until its end is proven, and here
        # two minutes of lingering, a poll and two spaced reads come before
        busy_s = 20 * int(SPEED)  # what a busy machine may need for it
        extra = r.rate_usd_per_hr() * (2 * 60 + 3 * int(POLL_S) + busy_s) / 3600
        assert r.counted_usd() - r.true_usd() <= extra
    assert (r.run / "termination.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_trainer_and_sidecar_killed_at_random(
    seed: int, tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    with rehearsal(tmp_path, here(config, tmp_path), corpus) as r:
        launched = r.start()
        killed = r.harass(launched, seed, ["train", "budget_guard"])
        code, output = r.end(launched)
        assert code == 0, output + r.machine_log()
        assert "train" in killed
        settled(r, undisturbed)
        assert len(r.ledger("relaunch")) == killed.count("train")
        down = [row["down_s"] / SPEED for row in r.ledger("back")]  # real seconds
        assert len(down) == killed.count("train")
        assert max(down) < 120


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_supervisor_and_watch_killed_too(
    seed: int, tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    """Whoever dies, a second launch or a teardown finds the ledger and ends what is left."""
    with rehearsal(tmp_path, here(config, tmp_path), corpus) as r:
        for attempt in range(6):
            launched = r.start(linger="1m")
            if attempt < 2:
                r.harass(launched, seed + attempt, ["train", "budget_guard", "money.supervise"], kills=2)
                launched.kill()
                launched.communicate()
                assert r.x1("teardown", str(r.run))[0] == 0
                continue
            code, output = r.end(launched)
            assert code == 0, output + r.machine_log()
            break
        settled(r, undisturbed)


FAULTS: dict[str, list[dict[str, Any]]] = {
    "429": [{"kind": "429", "on": "any", "times": 3, "after_s": 120}],
    "500": [{"kind": "500", "on": "get", "times": 4, "after_s": 120}],
    "malformed": [
        {"kind": "malformed", "on": "list", "times": 2},
        {"kind": "malformed", "on": "get", "times": 3},
    ],
    "timeout after create": [{"kind": "timeout_after_create", "on": "launch", "hold_s": 1}],
    "not listed yet": [{"kind": "not_listed_yet", "for_s": 60}],
    "stuck terminating": [{"kind": "stuck_terminating", "for_s": 120}],
    "terminate ignored": [{"kind": "terminate_ignored", "times": 1}],
    "cost zero": [{"kind": "cost_zero"}],
    "price jump": [{"kind": "price_jump", "factor": "1.15", "after_s": 120}],
    "clock ahead": [{"kind": "clock_skew", "skew_s": 3600}],
    "clock behind": [{"kind": "clock_skew", "skew_s": -3600}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_of_a_provider(
    name: str, tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    with rehearsal(tmp_path, here(config, tmp_path), corpus, FAULTS[name]) as r:
        code, output = r.end(r.start())
        assert code == 0, output + r.machine_log()
        settled(r, undisturbed)
        assert sum(fault.fired for fault in r.fake.world.faults) > 0 or name in output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["preempted", "unhealthy", "exited"])
def test_a_lost_machine_and_a_second_one(
    kind: str, tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    with rehearsal(tmp_path, here(config, tmp_path), corpus) as r:
        launched = r.start(linger="1m")
        wait_until(lambda: r.step() > 0, launched)
        r.fake.fault(kind, machine="pod-0001-*")
        assert r.end(launched)[0] == 0
        assert r.ledger("lost")
        assert 0 < r.step() < STEPS
        code, output = r.end(r.start(linger="1m"))
        assert code == 0, output + r.machine_log()
        settled(r, undisturbed)
        assert len(r.fake.world.machines) == 2


@pytest.mark.slow
def test_a_dearer_hour_that_nobody_answers_for(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    """+25 %: an alert, five minutes without an answer, saved and stopped; a person raises, and it goes on."""
    file = here(config, tmp_path)
    quick = file.read_text().replace("read_every_s: 120.0", "read_every_s: 60.0\n  answer_s: 120.0")
    file.write_text(quick)
    jump = {"kind": "price_jump", "factor": "1.25", "after_s": 240}
    with rehearsal(tmp_path, file, corpus, [jump]) as r:
        assert r.end(r.start(linger="1m"))[0] == 0
        stop = json.loads((r.run / "STOP.json").read_text())
        assert (stop["exit_code"], "nobody answered" in stop["reason"]) == (76, True)
        assert 0 < r.step() < STEPS
        assert any("instead of" in one["title"] for one in r.told)
        code, output = r.end(r.start("--raise-ceiling-to", "6", linger="1m"))
        assert code == 0, output + r.machine_log()
        settled(r, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["401", "403"])
def test_a_refused_key_launches_nothing(kind: str, tmp_path: Path, config: Path, corpus: Path) -> None:
    with rehearsal(tmp_path, here(config, tmp_path), corpus, [{"kind": kind, "times": 100}]) as r:
        code, output = r.end(r.start())
        assert code == 1
        assert r.fake.world.machines == {}
        assert "Traceback" not in output
