"""A branch: another run's past, a decay of its own. It follows from the config, not from the history."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config, write_corpus
from tests.end_to_end.in_process import Outcome, train_here
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights

from x1_pretrain.config_reading import load_config
from x1_pretrain.corpus.mixture import open_corpora
from x1_pretrain.records.checkpoint_files import list_checkpoints
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.review.command import PASSED, verify
from x1_pretrain.review.rows import blocks_in_order
from x1_pretrain.runtime.branch import read_parent
from x1_pretrain.runtime.checkpoint import read_state
from x1_pretrain.runtime.session import resolve

Capture = pytest.CaptureFixture[str]
WSD = {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 5, "schedule": "wsd"}
BRANCH = ("--total-steps", "20", "--set", "optimizer.decay_steps=8")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    training = {"total_steps": 40, "batch_tokens": 256, "micro_batch": 4, "precision": "fp32"}
    return write_config(
        file,
        training={**training, "deterministic": True},
        optimizer=WSD,
        checkpoint={"every": 100, "keep_last": 2, "at": [3, 12, 30]},
        evaluation={"every": 100, "tokens": 512, "prompts": ["the cat"], "sample_tokens": 8},
    )


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, config: Path, corpus: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trunk"
    code, output = Training("--config", config, "--data-dir", corpus, "--run-dir", run).end()
    assert code == 0, output
    return run


@pytest.fixture
def branch(config: Path, corpus: Path, trunk: Path, capfd: Capture) -> Any:
    def made(run: Path, *more: str | Path, step: int = 12) -> Outcome:
        source = trunk / "checkpoints" / f"step-{step:09d}"
        command = ("--config", config, "--data-dir", corpus, "--set", "checkpoint.at=[]", "--run-dir", run)
        return train_here(capfd, *command, "--branch-from", source, *BRANCH, *more)

    return made


def ending(run: Path) -> list[dict[str, Any]]:
    return [row for row in curve(run) if row["step"] > 12]


def test_checkpoints_that_were_asked_for_stay(trunk: Path) -> None:
    kept = [int(p.name[-3:]) for p in list_checkpoints(trunk / "checkpoints")]
    assert kept == [40, 30, 12, 3]  # keep_last alone would have left 40 and 30


def test_a_branch_ends_as_a_run_of_its_own_would(
    tmp_path: Path, config: Path, corpus: Path, branch: Any, capfd: Capture
) -> None:
    assert branch(tmp_path / "branch").code == 0
    direct = train_here(
        capfd,
        *("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "direct", *BRANCH),
        *("--set", "checkpoint.at=[]"),
    )
    assert direct.code == 0
    assert ending(tmp_path / "branch") == ending(tmp_path / "direct")  # every loss and rate, bit for bit
    assert weights(tmp_path / "branch") == weights(tmp_path / "direct")
    drawn = [
        tuple(d)
        for run, part in (("direct", slice(0, 12)), ("branch", slice(None)))
        for row in rows(tmp_path / run / "blocks.jsonl")[part]
        for d in row["blocks"]
    ]
    assert len(drawn) == len(set(drawn)) == 20 * 8  # no token twice
    assert blocks_in_order(open_run(tmp_path / "branch")).result == PASSED


def test_a_branch_is_a_run_of_its_own_that_says_where_it_is_from(
    tmp_path: Path, trunk: Path, branch: Any
) -> None:
    run = tmp_path / "branch"
    outcome = branch(run, "--set", "log.blocks=false")
    source = (trunk / "checkpoints" / "step-000000012").resolve()
    mother = json.loads((trunk / "manifest.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    first = {"run_id": mother["run_id"], "step": 12, "checkpoint": str(source), "trunk": mother["run_id"]}
    assert manifest["parent"] == first
    assert (mother["parent"], manifest["run_id"] != mother["run_id"]) == (None, True)
    events = rows(run / "events.jsonl")
    assert [(e["event"], e["step"]) for e in events[:2]] == [("branch", 12), ("start", 12)]
    assert f"branches from {source}, step 12 of run {mother['run_id']}" in outcome.out
    assert rows(run / "metrics.jsonl")[-1]["tokens"] == 20 * 256  # the trunk's among them
    assert [c for c in verify(open_run(run)) if c.result == "failed"] == []


def test_the_same_command_resumes_a_branch_from_its_own_checkpoints(
    tmp_path: Path, branch: Any, trunk: Path
) -> None:
    run = tmp_path / "branch"
    assert branch(run, "--ckpt-every", "4").code == 0
    before = (weights(run), curve(run), json.loads((run / "manifest.json").read_text())["parent"])
    shutil.rmtree(run / "checkpoints" / "step-000000020")
    outcome = branch(run, "--ckpt-every", "4")
    assert outcome.code == 0, outcome.err
    assert "goes on from" in outcome.out
    assert before == (weights(run), curve(run), json.loads((run / "manifest.json").read_text())["parent"])
    assert [e["event"] for e in rows(run / "events.jsonl")].count("branch") == 1


def test_a_run_that_has_begun_takes_no_other_past(tmp_path: Path, branch: Any, trunk: Path) -> None:
    run = tmp_path / "branch"
    assert branch(run).code == 0
    outcome = branch(run, step=30)
    assert outcome.code == 78
    assert "branched from" in outcome.one_line
    assert "step-000000012" in outcome.one_line


def test_the_seconds_until_the_branch_are_the_parents(config: Path, corpus: Path, trunk: Path) -> None:
    loaded = load_config(config, {"data.dir": str(corpus)})
    corpora = open_corpora(loaded)
    source = trunk / "checkpoints" / "step-000000012"
    assert read_state(source).elapsed_s > 0
    begun = read_parent(resolve(loaded, corpora), corpora, source)
    assert (begun.elapsed_s, begun.step, begun.tokens) == (0, 12, 12 * 256)


@pytest.mark.slow
def test_a_branch_that_was_killed_goes_on_as_itself(
    tmp_path: Path, config: Path, corpus: Path, trunk: Path, capfd: Capture
) -> None:
    command = ("--config", config, "--data-dir", corpus, "--set", "checkpoint.at=[]", "--total-steps", "400")
    source = trunk / "checkpoints" / "step-000000012"
    run, direct = tmp_path / "branch", tmp_path / "direct"
    first = Training(*command, "--run-dir", run, "--branch-from", source)
    wait_until(lambda: last_step(run) >= 30, first.process)
    first.kill()
    outcome = train_here(capfd, *command, "--run-dir", run, "--branch-from", source)
    assert (outcome.code, "goes on from" in outcome.out) == (0, True), outcome.err
    assert train_here(capfd, *command, "--run-dir", direct).code == 0
    assert (ending(run), weights(run)) == (ending(direct), weights(direct))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--set", "optimizer.decay_steps=9"], "the learning rate of update 12 of the 12 before it"),
        (["--set", "optimizer.lr=2e-3"], "the learning rate of update 1 of the 12 before it"),
        (
            ["--set", "optimizer.schedule=cosine", "--set", "optimizer.decay_steps=null"],
            "the learning rate of update 6 of the 12 before it",
        ),
        (["--set", "seed=8"], "seed: 7 -> 8"),
        (["--set", "model.layers=3"], "model.layers: 2 -> 3"),
        (["--set", "training.batch_tokens=512"], "training.batch_tokens: 256 -> 512"),
        (["--total-steps", "12", "--set", "optimizer.decay_steps=0"], "it is of step 12, and"),
    ],
)
def test_another_past_is_refused_by_name(change: list[str], named: str, tmp_path: Path, branch: Any) -> None:
    outcome = branch(tmp_path / "branch", *change)
    assert (outcome.code, named in outcome.one_line) == (78, True), outcome.err
    assert not (tmp_path / "branch" / "events.jsonl").exists()


def test_other_data_are_refused(tmp_path: Path, branch: Any) -> None:
    outcome = branch(tmp_path / "branch", "--data-dir", write_corpus(tmp_path / "other", seed=5))
    assert (outcome.code, "content of the corpora" in outcome.one_line) == (78, True)


def test_what_is_no_checkpoint_is_named(
    tmp_path: Path, config: Path, corpus: Path, trunk: Path, capfd: Capture
) -> None:
    damaged = tmp_path / "step-000000012"
    shutil.copytree(trunk / "checkpoints" / "step-000000012", damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    command = ("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run", *BRANCH)
    for given, named in (
        (damaged, "model.safetensors has 0 bytes"),
        (trunk, "step"),
        (tmp_path / "no", "no such"),
    ):
        outcome = train_here(capfd, *command, "--branch-from", given, "--set", "checkpoint.at=[]")
        assert (outcome.code, named in outcome.one_line) == (2, True), outcome.err
        assert f"--branch-from {given}" in outcome.one_line
