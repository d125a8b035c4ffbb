"""kill -9 at any instant: the resumed run is, bit for bit, the run that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.corpora import write_config
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights

SLOW_PHASE = Path(__file__).with_name("slow_phase.py")
STEPS = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    return write_config(
        file,
        training={"total_steps": STEPS, "batch_tokens": 512, "micro_batch": 4},
        checkpoint={"every": 20},
        evaluation={"every": 40, "tokens": 512, "prompts": ["the cat"], "sample_tokens": 6},
    )


def assert_same_run(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)  # every loss, norm and evaluation, each step once
    assert rows(run / "blocks.jsonl") == rows(whole / "blocks.jsonl")  # nothing seen twice, nothing skipped
    said = [(r["step"], r["text"]) for r in rows(run / "samples.jsonl")]
    assert said == [(r["step"], r["text"]) for r in rows(whole / "samples.jsonl")]
    assert weights(run) == weights(whole)


def test_the_undisturbed_run_is_what_it_should_be(undisturbed: Path) -> None:
    steps = [r["step"] for r in rows(undisturbed / "metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(1, STEPS + 1))
    drawn = [tuple(d) for r in rows(undisturbed / "blocks.jsonl") for d in r["blocks"]]
    assert len(drawn) == len(set(drawn)) == STEPS * 512 // 32


def test_killed_at_five_random_instants(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: Path
) -> None:
    run, rng = tmp_path / "run", random.Random(20261121)
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
    for kill in range(1, 6):
        target = kill * STEPS // 10 + rng.randrange(-10, 11)  # far from the end
        training = Training(*command)
        wait_until(lambda target=target: last_step(run) >= target, training.process)
        wait_until(lambda: rng.random() < 0.3, training.process)  # and a few more milliseconds
        training.kill()
    code, output = Training(*command, "--resume-from-latest").end()
    assert code == 0, output
    assert_same_run(run, undisturbed)
    sessions = {r["session"] for r in rows(run / "events.jsonl")}
    assert sessions == {1, 2, 3, 4, 5, 6}


def test_killed_in_the_middle_of_writing_checkpoints(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
    for _ in range(3):
        training = Training("endless-checkpoint", *command, script=SLOW_PHASE)
        training.wait_for_line("PHASE endless-checkpoint")
        training.kill()
        assert any((run / "checkpoints").glob(".writing-step-*"))
    code, output = Training(*command).end()
    assert code == 0, output
    assert_same_run(run, undisturbed)
    assert not any((run / "checkpoints").glob(".writing-*"))


def test_a_printed_row_is_in_the_file(tmp_path: Path, config: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    training = Training("--config", config, "--data-dir", corpus, "--run-dir", run)
    printed = training.wait_for_line("step  37/")
    training.kill()
    steps = [r["step"] for r in rows(run / "metrics.jsonl") if "train/loss" in r]
    assert steps[:37] == list(range(1, 38))
    assert printed.count("\nstep") == 37
