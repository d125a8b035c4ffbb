"""A run outlives its machine: everything of it here is killed and deleted, and it goes on elsewhere from the
mirror alone, bit for bit the run that nothing happened to."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.corpora import write_config
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights

from x1_pretrain.mirror.heads import look
from x1_pretrain.stores.folder_store import FolderStore

STEPS = 240
EVERY = 20  # steps between checkpoints


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "tiny.yaml",
        training={"total_steps": STEPS, "batch_tokens": 512, "micro_batch": 4},
        checkpoint={"every": EVERY},
        evaluation={"every": 40, "tokens": 512, "prompts": ["the cat"], "sample_tokens": 6},
        mirror={"every_s": 0.2, "stale_s": 3.0},
    )


class Machine:
    """A folder that lives and dies with what trains in it."""

    def __init__(self, folder: Path, config: Path, corpus: Path, mirror: str, *more: str) -> None:
        self.folder, self.run = folder, folder / "run"
        words = ["--config", config, "--data-dir", corpus, "--run-dir", self.run, "--mirror", mirror, *more]
        self.training = Training(*words)

    def mirrors(self) -> list[psutil.Process]:
        """Its mirror's processes."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "x1_pretrain.mirror.worker" in words and str(self.run) in words:
                found.append(process)
        return found

    def die(self) -> None:
        """All at once: trainer, mirror, disk."""
        doomed = self.mirrors()
        os.killpg(self.training.process.pid, signal.SIGKILL)
        while doomed:
            for process in doomed:
                process.kill()
            psutil.wait_procs(doomed, timeout=10)
            doomed = self.mirrors()  # one may just have been started
        self.training.process.communicate()
        shutil.rmtree(self.folder, ignore_errors=not self.folder.exists())

    def end(self) -> tuple[int, str]:
        return self.training.end()


def assert_same_run(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)  # every loss, norm and evaluation, each step once
    assert rows(run / "blocks.jsonl") == rows(whole / "blocks.jsonl")  # nothing seen twice, nothing skipped
    said = [(r["step"], r["text"]) for r in rows(run / "samples.jsonl")]
    assert said == [(r["step"], r["text"]) for r in rows(whole / "samples.jsonl")]
    assert weights(run) == weights(whole)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "events.jsonl") if row["event"] == name]


def mirrored(mirror: Path) -> int:
    """The newest checkpoint that is there."""
    found = look(FolderStore(mirror), "tiny") if mirror.exists() else None
    return max((one.step for one in found[0].checkpoints), default=-1) if found else -1


def die_again_and_again(
    tmp_path: Path, config: Path, corpus: Path, mirror: str, kills: int, seed: int
) -> Path:
    """So many machines die at random instants, from the first imports on; the last one finishes."""
    rng = random.Random(seed)
    for kill in range(kills):
        machine = Machine(tmp_path / f"machine-{kill}", config, corpus, mirror)
        if rng.random() < 0.3:  # at any instant of the start
            time.sleep(rng.uniform(0.0, 6.0))
        else:  # while it trains
            steps = rng.randrange(1, 2 * EVERY)
            began = -1

            def trained(run: Path = machine.run, steps: int = steps) -> bool:
                nonlocal began
                now = last_step(run)
                if began < 0 and events(run, "batch"):
                    began = now
                return began >= 0 and now >= min(STEPS - 1, began + steps)

            wait_until(trained, machine.training.process)
        machine.die()
    machine = Machine(tmp_path / "last", config, corpus, mirror)
    code, output = machine.end()
    assert code == 0, output
    return machine.run


def test_a_machine_dies_and_the_run_goes_on(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: Path
) -> None:
    mirror = tmp_path / "mirror"
    first = Machine(tmp_path / "first", config, corpus, str(mirror))
    wait_until(lambda: last_step(first.run) >= 3 * EVERY + 7, first.training.process)
    wait_until(lambda: mirrored(mirror) >= EVERY, first.training.process)
    first.die()
    second = Machine(tmp_path / "second", config, corpus, str(mirror))
    code, output = second.end()
    assert code == 0, output
    assert_same_run(second.run, undisturbed)
    (moved,) = events(second.run, "moved") or [{}]
    assert events(second.run, "resume")[-1]["step"] >= EVERY
    assert "all of it is mirrored" in output
    third = tmp_path / "pulled"
    from x1_pretrain import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["pull", str(mirror / "tiny"), "--output", str(third)])
    assert not ended.value.code
    assert_same_run(third, undisturbed)
    assert moved is not None


@pytest.mark.slow
def test_fifty_machines_die(tmp_path: Path, config: Path, corpus: Path, undisturbed: Path) -> None:
    run = die_again_and_again(tmp_path, config, corpus, str(tmp_path / "mirror"), 50, 20261121)
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_machines_die_over_a_store_that_speaks_s3(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: Path, s3: Any
) -> None:
    run = die_again_and_again(tmp_path, config, corpus, f"s3://{s3.bucket}/runs", 8, 7)
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_more_ranks_go_on_with_what_one_began(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: Path
) -> None:
    """The first rank fetches; the others wait for it, and all read the data in the order it had."""
    mirror = tmp_path / "mirror"
    first = Machine(tmp_path / "first", config, corpus, str(mirror))
    wait_until(lambda: last_step(first.run) >= 2 * EVERY + 3, first.training.process)
    first.training.send(signal.SIGTERM)
    code, output = first.end()
    assert code == 75, output
    assert "all of it is mirrored" in output
    stopped = last_step(first.run)
    shutil.rmtree(first.folder)
    second = tmp_path / "second" / "run"
    words = ["--config", config, "--data-dir", corpus, "--run-dir", second, "--device", "cpu"]
    code, output = Training(*words, "--ranks", "2", "--resume-from", mirror / "tiny").end(240)
    assert code == 0, output
    assert events(second, "resume")[0]["step"] == stopped  # what was saved on SIGTERM came along
    ours, whole = curve(second), curve(undisturbed)
    assert [row["step"] for row in ours] == [row["step"] for row in whole]
    last, expected = ours[-1]["val/loss"], whole[-1]["val/loss"]
    assert last == pytest.approx(expected, abs=1e-3)  # sums are added in another order
