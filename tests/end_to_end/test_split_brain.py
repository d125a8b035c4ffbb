"""Two real trainers on one run: one is stopped, cut off or hidden behind a wrong clock, the other comes.

Exactly one goes on. The other says who has the run, exits with 78 and publishes nothing more; what it had
learned under its own epoch is kept apart.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.corpora import write_config
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights
from tests.mirror.run_folders import Driven, RunFolder
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket

from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.heads import look
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store, StoreError

STEPS = 240
EVERY = 20  # steps between checkpoints
STALE_S = 3.0
WITHOUT_END = 50_000  # steps: of those who go on meanwhile


def written(folder: Path, steps: int) -> Path:
    return write_config(
        folder / "tiny.yaml",
        training={"total_steps": steps, "batch_tokens": 512, "micro_batch": 4},
        checkpoint={"every": EVERY},
        mirror={"every_s": 0.2, "stale_s": STALE_S},
    )


class Trainer:
    """A trainer with its mirror's process; both are one machine."""

    def __init__(self, run: Path, config: Path, corpus: Path, mirror: str, **env: str) -> None:
        self.run = run
        words = ["--config", config, "--data-dir", corpus, "--run-dir", run, "--mirror", mirror]
        self.training = Training(*words, env=env)

    def all_of_it(self) -> list[psutil.Process]:
        trainer = psutil.Process(self.training.process.pid)
        return [trainer, *trainer.children(recursive=True)]

    def mirror(self) -> list[psutil.Process]:
        return [one for one in self.all_of_it() if "x1_pretrain.mirror.worker" in one.cmdline()]

    def trains(self, beyond: int) -> None:
        wait_until(lambda: last_step(self.run) >= beyond, self.training.process)

    def end(self) -> tuple[int, str]:
        return self.training.end()

    def kill(self) -> None:
        """All of it at once, if it is still there, also what was stopped or outlives its trainer."""
        if self.training.process.poll() is None:
            for one in self.all_of_it():  # its guardian too: stopped, it would hold the pipe open
                one.kill()
        for one in psutil.process_iter(["cmdline"]):
            if {"x1_pretrain.mirror.worker", str(self.run)} <= set(one.info["cmdline"] or []):
                one.kill()
        if self.training.process.poll() is None:
            self.training.kill()


def suspend(mirror: str, processes: list[psutil.Process]) -> None:
    """All of them, none while it holds the store's lock: nobody gets past a stopped holder of it."""
    with FolderStore(mirror)._locked("tiny/head.json"):
        for one in processes:
            one.suspend()
        while any(one.status() != psutil.STATUS_STOPPED for one in processes):
            time.sleep(0.001)


Start = Callable[..., Trainer]


@pytest.fixture
def trainer(corpus: Path) -> Iterator[Start]:
    """Starts trainers; none is left."""
    started: list[Trainer] = []

    def start(run: Path, config: Path, mirror: str, **env: str) -> Trainer:
        started.append(Trainer(run, config, corpus, mirror, **env))
        return started[-1]

    yield start
    for one in started:
        one.kill()


class Watcher:
    """Looks at the head all the time: which writers it saw, in their order."""

    def __init__(self, store: Store) -> None:
        self.store, self.writers = store, list[tuple[int, str]]()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def head(self) -> Head | None:
        try:
            found = look(self.store, "tiny")
        except StoreError:
            return None
        return found[0] if found else None

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            head = self.head()
            if head is None:
                continue
            writer = (head.writer.epoch, head.writer.token)
            if self.writers[-1:] != [writer]:
                self.writers.append(writer)

    def stop(self) -> list[int]:
        """The epochs it saw; each once, or two of them were interleaved."""
        self._end.set()
        self._thread.join(10)
        return [epoch for epoch, _ in self.writers]


@contextmanager
def watched(mirror: str, endpoint: str | None = None) -> Iterator[Watcher]:
    watcher = Watcher(open_store(parse(mirror), endpoint))
    try:
        yield watcher
    finally:
        watcher.stop()


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "events.jsonl") if row["event"] == name]


def takes_over(second: Trainer) -> None:
    """It has the run, and trains."""
    wait_until(lambda: bool(events(second.run, "moved")), second.training.process)
    second.trains(events(second.run, "resume")[-1]["step"] + EVERY + 1)


def assert_gave_way(first: Trainer, watcher: Watcher) -> None:
    code, said = first.end()
    assert code == 78, said
    assert f"tiny: {os.uname().nodename} (process " in said
    assert ", epoch 2) has taken over this run since 2" in said
    assert "this copy stops and publishes nothing more" in said
    assert "Traceback" not in said
    assert [row["message"] in said for row in events(first.run, "lease_lost")] == [True]
    head = watcher.head()
    assert head is not None
    assert head.writer.epoch == 2


def assert_one_line_of_steps(run: Path, watcher: Watcher) -> None:
    """What the second one has, with all that the first had published before, has no step twice and no gap."""
    steps = [row["step"] for row in rows(run / "steps.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    assert watcher.stop() == [1, 2]


def test_a_mirror_that_was_stopped_is_replaced_and_gives_way(tmp_path: Path) -> None:
    """Without trainers: the two mirrors' processes alone."""
    mirror = str(tmp_path / "mirror")
    folders = [RunFolder(tmp_path / "a" / "tiny"), RunFolder(tmp_path / "b" / "tiny")]
    folders[0].step(1)
    with watched(mirror) as watcher:
        first = Driven(folders[0].job(mirror, stale_s=1.0, step_fields={"a": 1}))
        try:
            one_gives_way(first, folders, mirror, watcher)
        finally:
            first.kill()


def one_gives_way(first: Driven, folders: list[RunFolder], mirror: str, watcher: Watcher) -> None:
    first.open()
    first.publish()
    first.until("status", lag_bytes=0)
    first.process.send_signal(signal.SIGSTOP)
    second = Driven(folders[1].job(mirror, stale_s=1.0, step_fields={"a": 1}))
    assert second.open()["epoch"] == 2
    second.publish(1)
    second.until("status", lag_bytes=0)
    folders[0].step(2)  # its trainer was not stopped
    first.process.send_signal(signal.SIGCONT)
    said = first.until("lost")["message"]
    assert f"(process {os.getpid()}, epoch 2) has taken over this run" in said  # whose mirror it is
    first.tell(do="drain", within_s=5.0, why="another writer has the run")
    assert first.process.wait(120) == 78
    assert second.drain() == []
    assert watcher.stop() == [1, 2]
    head = watcher.head()
    assert head is not None
    assert (head.writer.epoch, head.writer.state) == (2, "released")
    names = [meta.key for meta in watcher.store.below("tiny/lost")]
    assert any(name.endswith("steps.jsonl") for name in names), names


@pytest.mark.slow
def test_a_machine_that_was_stopped_comes_back_and_gives_way(
    tmp_path: Path, corpus: Path, trainer: Start
) -> None:
    """The run that is left is, bit for bit, the one that nothing happened to."""
    config, mirror = written(tmp_path, STEPS), str(tmp_path / "mirror")
    whole = tmp_path / "whole"
    code, output = Training("--config", config, "--data-dir", corpus, "--run-dir", whole).end()
    assert code == 0, output
    with watched(mirror) as watcher:
        first = trainer(tmp_path / "a" / "run", config, mirror)
        first.trains(2 * EVERY + 5)
        processes = first.all_of_it()
        suspend(mirror, processes)
        second = trainer(tmp_path / "b" / "run", config, mirror)
        code, output = second.end()
        assert code == 0, output
        for one in processes:
            one.resume()
        code, said = first.end()
        assert code == 78, said
        assert "had taken over this run, and has given it back" in said
        assert watcher.stop() == [1, 2]
        head = watcher.head()
    branch = [row["step"] for row in rows(first.run / "steps.jsonl")]
    assert branch[-1] < STEPS
    again = trainer(first.run, config, mirror)
    code, said = again.end()
    assert code == 0, said
    assert curve(first.run) == curve(whole)
    kept_apart = [row["step"] for row in rows(first.run / "steps.lost-e0001.jsonl")]
    assert kept_apart == branch[len(branch) - len(kept_apart) :]
    assert kept_apart
    assert curve(second.run) == curve(whole)
    assert weights(second.run) == weights(whole)
    assert head is not None
    assert (head.writer.epoch, head.writer.state, head.checkpoints[-1].step) == (2, "released", STEPS)


@pytest.mark.slow
def test_a_mirror_that_was_stopped_ends_its_trainer(tmp_path: Path, trainer: Start) -> None:
    """The trainer goes on learning meanwhile; what it learned is kept apart."""
    config, mirror = written(tmp_path, WITHOUT_END), str(tmp_path / "mirror")
    with watched(mirror) as watcher:
        first = trainer(tmp_path / "a" / "run", config, mirror)
        try:
            first.trains(2 * EVERY + 5)
            (process,) = first.mirror()
            suspend(mirror, [process])
            second = trainer(tmp_path / "b" / "run", config, mirror)
            takes_over(second)
            process.resume()
            assert_gave_way(first, watcher)
        finally:
            first.kill()
        again = trainer(tmp_path / "a" / "run", config, mirror)
        code, said = again.end()
        assert code == 78, said
        assert "is being trained on" in said
        second.training.send(signal.SIGTERM)
        code, said = second.end()
        assert code == 75, said
        assert_one_line_of_steps(second.run, watcher)


@pytest.mark.slow
def test_a_machine_whose_network_was_cut_gives_way(tmp_path: Path, trainer: Start, s3: Bucket) -> None:
    config, mirror = written(tmp_path, WITHOUT_END), f"s3://{s3.bucket}/runs"
    with FaultyProxy(s3.url) as cable, watched(mirror, s3.url) as watcher:
        first = trainer(tmp_path / "a" / "run", config, mirror, AWS_ENDPOINT_URL=cable.url)
        try:
            first.trains(2 * EVERY + 5)
            cable.add("down")
            second = trainer(tmp_path / "b" / "run", config, mirror)
            takes_over(second)
            assert first.training.process.poll() is None  # a store that is away does not end training
            cable.clear()
            assert_gave_way(first, watcher)
        finally:
            first.kill()
        second.training.send(signal.SIGTERM)
        code, said = second.end()
        assert code == 75, said
        assert_one_line_of_steps(second.run, watcher)


@pytest.mark.slow
@pytest.mark.parametrize("by_s", [86400.0, -86400.0])
def test_a_wrong_clock_neither_ends_a_living_writer_nor_hides_a_dead_one(
    tmp_path: Path, trainer: Start, s3: Bucket, by_s: float
) -> None:
    """The newcomer is told another time by everything it hears of the store."""
    config, mirror = written(tmp_path, WITHOUT_END), f"s3://{s3.bucket}/runs"
    with FaultyProxy(s3.url) as line, watched(mirror, s3.url) as watcher:
        line.add("skew", by_s=by_s, everything=True)
        first = trainer(tmp_path / "a" / "run", config, mirror)
        try:
            first.trains(2 * EVERY + 5)
            refused = trainer(tmp_path / "b" / "run", config, mirror, AWS_ENDPOINT_URL=line.url)
            code, said = refused.end()
            assert code == 78, said
            assert f"tiny: is being trained on {os.uname().nodename} (process " in said
            assert "Traceback" not in said
            assert first.training.process.poll() is None
        finally:
            first.kill()
        second = trainer(tmp_path / "c" / "run", config, mirror, AWS_ENDPOINT_URL=line.url)
        takes_over(second)
        second.training.send(signal.SIGTERM)
        code, said = second.end()
        assert code == 75, said
        assert_one_line_of_steps(second.run, watcher)
