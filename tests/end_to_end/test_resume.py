"""Resuming: from the newest checkpoint that verifies, never silently from zero, never as another run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config, write_corpus
from tests.end_to_end.in_process import train_here
from tests.end_to_end.processes import Training, curve, rows, weights

from x1_pretrain.records.behind import copied
from x1_pretrain.records.checkpoint_files import list_checkpoints, newest_good, verify_folder
from x1_pretrain.records.mirror_state import PULLED, MirrorState, read_state, write_state

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="module")
def finished(undisturbed: Path) -> Path:
    """A run of 30 steps with checkpoints at 20 and 30."""
    return undisturbed


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, symlinks=True)
    return copy


def truncated(newest: Path) -> str:
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors has"


def one_byte_flipped(newest: Path) -> str:
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "optimizer.safetensors does not match its hash"


def a_file_missing(newest: Path) -> str:
    (newest / "state.json").unlink()
    return "state.json is missing"


def no_manifest(newest: Path) -> str:
    (newest / "manifest.json").unlink()
    return "manifest.json is missing"


def half_a_manifest(newest: Path) -> str:
    file = newest / "manifest.json"
    file.write_text(file.read_text()[:50])
    return "manifest.json can't be read"


def an_empty_folder(newest: Path) -> str:
    shutil.rmtree(newest)
    newest.mkdir()
    return "manifest.json is missing"


def another_step_under_its_name(newest: Path) -> str:
    older = newest.with_name("step-000000020")
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    return "its manifest is of step 20"


DAMAGES = [
    truncated,
    one_byte_flipped,
    a_file_missing,
    no_manifest,
    half_a_manifest,
    an_empty_folder,
    another_step_under_its_name,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    damage: Callable[[Path], str], run: Path, finished: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    reason = damage(run / "checkpoints" / "step-000000030")
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 0, outcome.err
    assert f"step-000000030: {reason}" in outcome.out
    assert "goes on from" in outcome.out
    assert curve(run) == curve(finished)
    assert weights(run) == weights(finished)
    assert (run / "checkpoints" / "bad-step-000000030").is_dir()  # kept for whoever wants to know why
    skipped = [r for r in rows(run / "events.jsonl") if r["event"] == "skipped_checkpoint"]
    assert reason in skipped[0]["message"]


def test_a_half_written_temporary_is_no_checkpoint(
    run: Path, finished: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    newest = run / "checkpoints" / "step-000000030"
    newest.rename(newest.with_name(".writing-step-000000030"))
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 0, outcome.err
    assert "step-000000020" in outcome.out
    assert not list((run / "checkpoints").glob(".writing*"))
    assert weights(run) == weights(finished)


def test_all_checkpoints_bad_is_refused_with_the_list(
    run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    for checkpoint in list_checkpoints(run / "checkpoints"):
        one_byte_flipped(checkpoint)
    before = (run / "metrics.jsonl").read_bytes()
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 78
    for name in ("step-000000030", "step-000000020"):
        assert f"{name}: optimizer.safetensors does not match its hash" in outcome.one_line
    assert (run / "metrics.jsonl").read_bytes() == before


def test_checkpoints_that_vanished_are_not_a_new_run(
    run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    shutil.rmtree(run / "checkpoints")
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 78
    assert "saved a checkpoint at step 30" in outcome.one_line


def test_a_finished_run_stays_finished(run: Path, config: Path, corpus: Path, capfd: Capture) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    outcome = train_here(
        capfd, "--config", config, "--data-dir", corpus, "--run-dir", run, "--resume-from-latest"
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "finished before, at step 30" in outcome.out
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_pulled_folder_is_a_copy_until_somebody_trains_in_it(
    mirrored: bool, run: Path, config: Path, corpus: Path, tmp_path: Path, capfd: Capture
) -> None:
    """Its id and its epoch stay: a mirrored session goes on from them."""
    place = str(tmp_path / "mirror")
    write_state(run, MirrorState(place, f"{place}/tiny", "tiny", "folder", 1, "aaaa1111", "released", PULLED))
    words: list[str | Path] = ["--config", config, "--data-dir", corpus, "--run-dir", run]
    assert "finished before" in train_here(capfd, *words).out
    assert copied(run) is not None
    shutil.rmtree(run / "checkpoints" / "step-000000030")
    outcome = train_here(capfd, *words, *(["--mirror", place] if mirrored else []))
    assert outcome.code == 0, outcome.err
    assert copied(run) is None
    state = read_state(run)
    assert state is not None
    assert (state.folder, state.epoch) == ("folder", 1)
    assert (state.why == "finished", "trained on here" in state.why) == (mirrored, not mirrored)


def test_fresh_does_not_run_over_an_old_run(run: Path, config: Path, corpus: Path, capfd: Capture) -> None:
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run, "--fresh")
    assert outcome.code == 2
    assert "--fresh" in outcome.one_line


def test_harmless_fields_may_change(
    run: Path, config: Path, corpus: Path, finished: Path, capfd: Capture
) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000000030")
    outcome = train_here(
        capfd,
        *(
            "--config",
            config,
            "--data-dir",
            corpus,
            "--run-dir",
            run,
            "--log-every",
            "5",
            "--ckpt-every",
            "3",
        ),
        *("--set", "training.micro_batch=8", "--set", "verify.loss_band=[1.0, 2.0]"),
    )
    assert outcome.code == 0, outcome.err
    logged = [r["step"] for r in rows(run / "metrics.jsonl") if "train/loss" in r]
    assert logged == [*range(1, 21), 25, 30]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--total-steps", "60"], "training.total_steps: 30 -> 60"),
        (["--set", "optimizer.lr=1e-3"], "optimizer.lr: 0.003 -> 0.001"),
        (["--set", "model.layers=3"], "model.layers: 2 -> 3"),
        (["--set", "seed=8"], "seed: 7 -> 8"),
        (["--set", "training.batch_tokens=512"], "training.batch_tokens: 256 -> 512"),
    ],
)
def test_fields_that_change_a_step_are_refused_by_name(
    change: list[str], named: str, run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run, *change)
    assert outcome.code == 78
    assert named in outcome.one_line


def test_other_data_under_the_same_path_is_another_run(
    tmp_path: Path, run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    other = write_corpus(tmp_path / "other", seed=5)
    outcome = train_here(capfd, "--config", config, "--data-dir", other, "--run-dir", run)
    assert outcome.code == 78
    assert "content of the corpora" in outcome.one_line
    # the same data elsewhere are the same data
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    assert train_here(capfd, "--config", config, "--data-dir", moved, "--run-dir", run).code == 0


def test_two_runs_never_share_a_checkpoint_folder(
    tmp_path: Path, run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    outcome = train_here(
        capfd,
        *("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "B", "--set", "seed=9"),
        *("--ckpt-dir", run / "checkpoints"),
    )
    assert outcome.code == 78
    assert "seed: 7 -> 9" in outcome.one_line


def test_checkpoints_elsewhere_outlive_the_run_folder(
    tmp_path: Path, config: Path, corpus: Path, finished: Path, capfd: Capture
) -> None:
    elsewhere, run = tmp_path / "checkpoints", tmp_path / "run"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run, "--ckpt-dir", elsewhere)
    assert train_here(capfd, *command).code == 0
    assert (run / "checkpoints").is_symlink()
    assert verify_folder(elsewhere / "step-000000030") is None
    shutil.rmtree(run)
    shutil.rmtree(elsewhere / "step-000000030")
    outcome = train_here(capfd, *command)
    assert outcome.code == 0, outcome.err
    assert weights(run) == weights(finished)
    assert [r["step"] for r in curve(run) if "train/loss" in r] == list(range(21, 31))


def test_a_run_is_refused_while_another_process_trains_it(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    run = tmp_path / "run"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run, "--total-steps", "20000")
    first = Training(*command)
    try:
        first.wait_for_line("step     5/")
        outcome = train_here(capfd, *command)
    finally:
        first.kill()
    assert outcome.code == 78
    assert f"process {first.process.pid} on " in outcome.one_line


# ------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: the tiny model's checkpoint takes a third of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs rights that this user does not have")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def no_safety_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the write itself meet the end of the disk, as when another program fills it meanwhile."""
    monkeypatch.setattr("x1_pretrain.records.checkpoint_files._require_space", lambda folder, needed: None)
    monkeypatch.setattr("x1_pretrain.records.checkpoint_files.SAFETY_BYTES", 0)


def test_a_signal_at_the_very_end_loses_neither_evaluation_nor_finish(
    run: Path, finished: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    """As when the run is stopped after its last update and before its last evaluation."""
    metrics, events = run / "metrics.jsonl", run / "events.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    events.write_text(
        "".join(line for line in events.read_text().splitlines(keepends=True) if "finish" not in line)
    )
    assert curve(run) == curve(finished)[:-1]
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 0, outcome.err
    assert curve(run) == curve(finished)
    assert [r["event"] for r in rows(events)][-1] == "finish"


def test_a_damaged_line_in_the_records_does_not_stop_a_resume(
    run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[5] = b"\0" * 40 + b"\n"
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    shutil.rmtree(run / "checkpoints" / "step-000000030")
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 0, outcome.err


def test_a_refused_start_touches_nothing_of_the_other_run(
    tmp_path: Path, run: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    in_flight = run / "checkpoints" / ".writing-step-000000040"
    in_flight.mkdir()
    command = ("--config", config, "--data-dir", corpus, "--ckpt-dir", run / "checkpoints")
    outcome = train_here(capfd, *command, "--run-dir", tmp_path / "B", "--set", "seed=9")
    assert outcome.code == 78
    assert in_flight.is_dir()


def test_two_runs_cannot_train_into_one_checkpoint_folder_at_a_time(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    command = (
        "--config",
        config,
        "--data-dir",
        corpus,
        "--ckpt-dir",
        tmp_path / "shared",
        "--total-steps",
        "20000",
    )
    first = Training(*command, "--run-dir", tmp_path / "A")
    try:
        first.wait_for_line("step     5/")
        outcome = train_here(capfd, *command, "--run-dir", tmp_path / "B")
    finally:
        first.kill()
    assert outcome.code == 78
    assert f"process {first.process.pid} on " in outcome.one_line


def mixture(a: Path, b: Path, weight: float = 0.7) -> list[str]:
    tree = {"a": {"dir": str(a), "weight": weight}, "b": {"dir": str(b), "weight": 0.3}}
    return ["--set", f"data.corpora={json.dumps(tree)}"]


def test_a_mixture_resumes_only_as_itself(tmp_path: Path, config: Path, corpus: Path, capfd: Capture) -> None:
    other, run = write_corpus(tmp_path / "other", seed=5), tmp_path / "run"
    command = ("--config", config, "--run-dir", run)
    assert train_here(capfd, *command, *mixture(corpus, other)).code == 0
    first = rows(run / "metrics.jsonl")[1]
    assert first["mixture/a"] + first["mixture/b"] == 1
    shutil.rmtree(run / "checkpoints" / "step-000000030")
    swapped = train_here(capfd, *command, *mixture(other, corpus))  # the folders swapped: so are the weights
    assert (swapped.code, "content of the corpora" in swapped.one_line) == (78, True)
    reweighted = train_here(capfd, *command, *mixture(corpus, other, 0.5))
    assert "data.corpora.a.weight: 0.7 -> 0.5" in reweighted.one_line
    assert train_here(capfd, *command, *mixture(corpus, other)).code == 0
    drawn = [tuple(d) for r in rows(run / "blocks.jsonl") for d in r["blocks"]]
    assert len(drawn) == len(set(drawn)) == 30 * 8
    assert abs(sum(d[0] == 0 for d in drawn) - 0.7 * 240) < 1


def test_one_corpus_under_two_names_is_refused(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    command = ("--config", config, "--run-dir", tmp_path / "run")
    twin = train_here(capfd, *command, *mixture(corpus, corpus))
    assert (twin.code, "hold the same data" in twin.one_line) == (2, True)
    both = train_here(capfd, *command, *mixture(corpus, corpus), "--data-dir", corpus)
    assert (both.code, "several corpora" in both.one_line) == (2, True)


def test_a_save_that_fails_for_another_reason_removes_nothing(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only want of space makes older checkpoints go; weights that went bad make them precious."""
    from x1_pretrain.records.checkpoint_files import CheckpointFailedError
    from x1_pretrain.runtime import checkpoint

    good = checkpoint.save

    def not_finite(folder: Path, state: checkpoint.RunState, *rest: Any) -> Path:
        if state.step == 30:
            raise CheckpointFailedError("a weight holds values that are not finite")
        return good(folder, state, *rest)

    monkeypatch.setattr(checkpoint, "save", not_finite)
    run = tmp_path / "run"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run, "--set", "checkpoint.keep_last=4")
    outcome = train_here(capfd, *command)
    assert outcome.code == 75
    assert "the last good one is step-000000020" in outcome.out
    assert [p.name[-2:] for p in list_checkpoints(run / "checkpoints")] == ["20", "10", "00"]


def test_a_stop_after_a_streak_keeps_what_was_learned(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from x1_pretrain import train

    forward = train.forward
    monkeypatch.setattr(
        train, "forward", lambda r, t: forward(r, t) * (float("nan") if r.step >= 15 else 1.0)
    )
    run = tmp_path / "run"
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 1
    good, _ = newest_good(run / "checkpoints")
    assert good is not None
    assert good.name == "step-000000017"  # 15 updates, and two steps whose update was not made


@pytest.mark.usefixtures("no_safety_margin")
def test_a_full_disk_costs_no_checkpoint_that_was_there(
    small_disk: Path, tmp_path: Path, config: Path, corpus: Path, finished: Path, capfd: Capture
) -> None:
    run, where = tmp_path / "run", small_disk / "checkpoints"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run, "--ckpt-dir", where)
    where.mkdir()
    filler = small_disk / "someone-elses-file"
    # room for one checkpoint and a half: the one of step 0 fits, no second one does
    filler.write_bytes(b"x" * (1024 * 1024 - int(1.5 * checkpoint_bytes(finished))))
    outcome = train_here(capfd, *command)
    assert outcome.code == 75, outcome.out
    assert "checkpoint at step 10 not saved: No space left on device" in outcome.out
    assert "the last good one is step-000000000" in outcome.out
    good, skipped = newest_good(where)
    assert good is not None
    assert (good.name, skipped) == ("step-000000000", [])
    assert not list(where.glob(".writing*"))
    outcome = train_here(capfd, *command)  # still full: refused before anything is computed again
    assert outcome.code == 78
    assert "no room for a checkpoint" in outcome.one_line
    filler.unlink()
    outcome = train_here(capfd, *command)  # room again: the same command goes on
    assert outcome.code == 0, outcome.err
    assert weights(run) == weights(finished)
    assert curve(run) == curve(finished)


@pytest.mark.usefixtures("no_safety_margin")
def test_older_checkpoints_make_room_for_a_new_one(
    small_disk: Path, tmp_path: Path, config: Path, corpus: Path, finished: Path, capfd: Capture
) -> None:
    where = small_disk / "checkpoints"
    where.mkdir()
    (small_disk / "filler").write_bytes(b"x" * (1024 * 1024 - int(2.5 * checkpoint_bytes(finished))))
    outcome = train_here(
        capfd,
        *("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run", "--ckpt-dir", where),
    )
    assert outcome.code == 0, outcome.out
    assert "older checkpoints to make room" in outcome.out
    assert newest_good(where)[0] == where / "step-000000030"


def test_no_room_for_even_one_checkpoint_is_refused_before_compute(
    small_disk: Path, tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    outcome = train_here(
        capfd,
        *("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run"),
        *("--ckpt-dir", small_disk / "checkpoints"),
    )
    assert outcome.code == 78
    assert "can't be saved" in outcome.err
    assert not rows(tmp_path / "run" / "metrics.jsonl")


def test_a_full_disk_under_the_records_loses_no_row(
    small_disk: Path, tmp_path: Path, config: Path, corpus: Path, finished: Path, capfd: Capture
) -> None:
    run = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (1024 * 1024 - 24 * 1024))
    # a few rows fit, then the disk is full; the checkpoints are elsewhere and go on
    outcome = train_here(
        capfd,
        *("--config", config, "--data-dir", corpus, "--run-dir", run, "--ckpt-dir", tmp_path / "checkpoints"),
    )
    assert outcome.code == 1
    assert "rows wait in memory" in outcome.out
    assert "rows of the records could not be written" in outcome.err
    whole = curve(finished)
    kept = curve(run)
    assert 0 < len(kept) < len(whole)
    assert kept == whole[: len(kept)]
    assert (run / "metrics.jsonl").read_bytes().endswith(b"\n")


def checkpoint_bytes(run: Path) -> int:
    newest = run / "checkpoints" / "step-000000030"
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in newest.iterdir())


def test_old_checkpoints_go_only_beyond_what_is_kept(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    run = tmp_path / "run"
    outcome = train_here(
        capfd,
        *("--config", config, "--data-dir", corpus, "--run-dir", run, "--ckpt-every", "4"),
        *("--set", "checkpoint.keep_last=3", "--set", "checkpoint.keep_every=12"),
    )
    assert outcome.code == 0, outcome.err
    kept = [int(p.name[5:]) for p in list_checkpoints(run / "checkpoints")]
    assert kept == [30, 28, 24, 12, 0]
    manifest = json.loads((run / "checkpoints" / "step-000000012" / "manifest.json").read_text())
    assert manifest["step"] == 12
