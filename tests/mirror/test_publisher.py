"""Publishing against a store in memory: what every head that was ever published names, exists and fits."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.mirror.run_folders import RUN_ID, RunFolder, check_checkpoint, content, record
from tests.stores.model_store import Clock, Fault, ModelStore
from x1_pretrain.learning.stability import Episode, State
from x1_pretrain.mirror import local, outbox, publisher
from x1_pretrain.mirror.claim import Me
from x1_pretrain.mirror.head import Head, decode, encode
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.mirror.looks import Looks
from x1_pretrain.mirror.outage import Outage
from x1_pretrain.mirror.publisher import Identity, Publisher, size
from x1_pretrain.records.checkpoint_files import folder_name, list_checkpoints, step_of
from x1_pretrain.records.metrics import rewind
from x1_pretrain.stores.store import DeniedError, StoreError, UnreachableError


def lease_on(store: ModelStore, clock: Clock, folder: str = "f") -> Lease:
    return Lease.claim(
        store,
        Me("tiny", folder, "host", 1),
        sleep=clock.sleep,
        steady=clock.steady,
        now_utc=clock.utc,
        say=lambda _: None,
    )


class Session:
    """A run folder, its mirror and the publisher between them."""

    def __init__(
        self,
        run: RunFolder,
        store: ModelStore,
        from_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        **job: Any,
    ) -> None:
        self.run, self.store, self.clock = run, store, Clock()
        self.lease = lease_on(store, self.clock)
        self.lease.resumed_from(from_step)
        identity = Identity(RUN_ID, from_step, ["f"], {"a": 1})
        self.publisher = Publisher(run.job("model://runs", **job), store, self.lease, identity, clock=clock)

    def settle(self, looks: int = 6) -> Head:
        """Look until there is nothing left to do."""
        for _ in range(looks):
            self.publisher.look()
            self.publisher.wait(20)
        return self.head

    @property
    def head(self) -> Head:
        found = look(self.store, "tiny")
        assert found is not None
        return found[0]

    def steps(self) -> list[int]:
        return [one.step for one in self.head.checkpoints]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "tiny")


@pytest.fixture
def store() -> ModelStore:
    return ModelStore(Clock())


def in_the_store(store: ModelStore, word: str) -> list[str]:
    return [key for key in store.objects if word in key]


def test_a_run_folder_is_published_whole(run: RunFolder, store: ModelStore) -> None:
    for step in range(1, 21):
        run.step(step, **({"val/loss": 2.5} if step == 20 else {}))
    run.save(10)
    run.save(20)
    (run.folder / "STOP.json").write_text("{}")
    head = Session(run, store).settle()
    for name in ("metrics.jsonl", "steps.jsonl", "events.jsonl"):
        assert record(store, head, name) == (run.folder / name).read_bytes()
    for step in (10, 20):
        files = check_checkpoint(store, head, step)
        assert (
            files["model.safetensors"]
            == (run.checkpoints / folder_name(step) / "model.safetensors").read_bytes()
        )
    assert {"config.yaml", "manifest.json", "STOP.json"} <= head.files.keys()
    assert [(one.step, one.val_loss) for one in head.checkpoints] == [(10, None), (20, 2.5)]
    assert (head.run_id, head.fingerprints, head.step_fields) == (RUN_ID, ["f"], {"a": 1})
    assert head.status["step"] == 20


def test_a_checkpoint_is_named_by_no_head_before_all_of_it_is_there(
    run: RunFolder, store: ModelStore
) -> None:
    run.save(10)
    store.faults.append(Fault("fail", on="put_stream", key="optimizer", times=2))
    session = Session(run, store)
    session.publisher.look()
    for _ in range(2):
        session.publisher.wait(20)
        assert session.steps() == []
        with pytest.raises(StoreError):
            session.publisher.look()
    session.settle()
    check_checkpoint(store, session.head, 10)
    sent = [key for op, key in store.operations if op == "put_stream" and "model.safetensors" in key]
    assert len(sent) == 1  # what was sent before the failure is not sent again


def test_files_that_an_earlier_checkpoint_has_are_copied(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    session = Session(run, store)
    session.settle()
    run.save(20)
    head = session.settle()
    check_checkpoint(store, head, 20)
    copied = [key for op, key in store.operations if op == "copy"]
    assert [key.rpartition("/")[2] for key in copied] == ["tokenizer.json"]
    sent = [key for op, key in store.operations if op == "put_stream" and "step-000000020" in key]
    assert not any("tokenizer" in key for key in sent)


def test_what_a_store_does_not_copy_is_sent(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    session = Session(run, store)
    session.settle()
    run.save(20)
    store.faults.append(Fault("denied", on="copy", times=10**6))
    check_checkpoint(store, session.settle(), 20)


def test_a_checkpoint_that_could_not_come_back_is_not_sent(run: RunFolder, store: ModelStore) -> None:
    folder = run.save(10)
    manifest = folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    shutil.copy(folder / "tokenizer.json", folder / ".hidden")
    tree["files"][".hidden"] = tree["files"]["tokenizer.json"]
    manifest.write_text(json.dumps(tree))
    assert Session(run, store).settle().checkpoints == []


def test_retention_drops_from_the_head_first_and_deletes_after(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store, keep_last=2, keep_every=20)
    for step in (10, 20, 30, 40, 50):
        run.save(step)
        session.settle()
        for old in list_checkpoints(run.checkpoints)[2:]:
            run.remove(step_of(old))
    session.settle(2)
    assert session.steps() == [20, 40, 50]
    assert not in_the_store(store, "step-000000010")
    deleted = [
        (n, key) for n, (op, key) in enumerate(store.operations) if op == "delete" and "step-000000010" in key
    ]
    swaps = [n for n, (op, _) in enumerate(store.operations) if op == "swap"]
    heads = [decode(one.data, "") for one in store.versions("tiny/head.json") if one.data]
    without = next(n for n, head in enumerate(heads) if head.published(30) and not head.published(10))
    assert deleted
    assert deleted[0][0] > swaps[without - 1]


def test_best_checkpoints_stay(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store, keep_last=2, keep_best=1)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 4.0)):
        run.step(step, **{"val/loss": loss})
        run.save(step)
        session.settle()
        for old in list_checkpoints(run.checkpoints)[2:]:
            run.remove(step_of(old))
    session.settle(2)
    assert session.steps() == [20, 40, 50]


def test_what_is_still_here_stays_there(run: RunFolder, store: ModelStore) -> None:
    """A rewind goes back to one that is here: a machine that is lost right after it must not lose the run."""
    session = Session(run, store, keep_last=2)
    for step in (800, 900, 1000):
        run.save(step)
        session.settle()
    run.rewind(800)
    session.publisher.look()
    assert session.steps() == [800]
    check_checkpoint(store, session.head, 800)


def spiking(onset: int) -> dict[str, Any]:
    state = State(episode=Episode(onset, 3.0, 1.0, 9.0, onset, 5.0, onset, last_flagged=onset))
    return {"stability": state.to_json()}


@pytest.mark.parametrize("policy", ["rewind", "clip"])
def test_what_a_rewind_would_need_is_kept(run: RunFolder, store: ModelStore, policy: str) -> None:
    """On a new machine, where it is not here; until the newest that is mirrored is from after the spike."""
    job = {"keep_last": 1, "step_fields": {"stability.policy": policy}}
    old = Session(run, store, **job)
    old.publisher.identity.step_fields = job["step_fields"]
    run.save(20)
    old.settle()
    run.save(30, **spiking(25))
    old.settle()
    assert old.steps() == [20, 30]  # both are here
    run.remove(20)
    new = Session(run, store, 30, **job)
    new.publisher.identity.step_fields = job["step_fields"]
    new.settle()
    run.save(40, **spiking(25))
    run.remove(30)
    new.settle()
    assert new.steps() == ([20, 40] if policy == "rewind" else [40])
    run.save(50, stability=State().to_json())
    run.remove(40)
    new.settle()
    assert new.steps() == [50]


def test_what_a_rewind_would_need_is_sent_first(run: RunFolder, store: ModelStore) -> None:
    """The line is slow: as a spike lasts, the mirror may have nothing from before it."""
    session = Session(run, store, keep_last=1)
    session.publisher.identity.step_fields = {"stability.policy": "rewind"}
    for step in (10, 20):
        run.save(step)
    for step in (30, 40):
        run.save(step, **spiking(25))
    session.publisher.look()
    session.publisher.wait(20)
    session.publisher.look()
    assert session.steps() == [20]
    session.settle()
    assert session.steps() == [20, 40]
    run.rewind(20)
    session.settle()
    run.save(30)
    run.remove(20)
    session.settle()
    assert session.steps() == [30]  # the spike of the steps that were given up needs nothing any more


def test_a_swap_that_fails_loses_nothing_that_was_sent(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    session = Session(run, store)
    session.publisher.look()
    session.publisher.wait(20)
    store.faults.append(Fault("fail", on="swap", times=2))
    for _ in range(2):
        with pytest.raises(StoreError):
            session.publisher.look()
        if run.checkpoints.joinpath(folder_name(10)).exists():
            run.remove(10)
    session.publisher.look()
    check_checkpoint(store, session.head, 10)
    assert len([op for op, _ in store.operations if op == "put_stream"]) == 4


def test_what_is_ready_waits_for_the_rows_before_it(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    session = Session(run, store)
    session.publisher.look()
    session.publisher.wait(20)
    run.save(20)
    run.remove(10)
    advance, session.publisher._advance = session.publisher._advance, lambda sizes: False  # type: ignore[method-assign]
    session.publisher.look()
    session.publisher._advance = advance  # type: ignore[method-assign]
    session.publisher.look()
    assert session.steps() == [10]


def test_a_store_that_lets_go_of_nothing_is_sent_to_all_the_same(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store, keep_last=1)
    store.faults.append(Fault("denied", on="delete", times=10**9))
    for step in (10, 20, 30):
        run.step(step)
        run.save(step)
        run.remove(step - 10) if step > 10 else None
        session.settle(3)
    assert session.steps() == [30]
    assert ["can't be removed" in line for line in session.publisher.take_news()] == [True]
    store.faults.clear()
    session.settle(1)
    assert not in_the_store(store, "step-000000010")


def test_a_checkpoint_without_one_of_its_files_is_said_and_no_other_waits(
    run: RunFolder, store: ModelStore
) -> None:
    run.save(10)
    (run.save(20) / "tokenizer.json").unlink()
    session = Session(run, store)
    session.settle()
    assert session.steps() == [10]
    (news,) = session.publisher.take_news()
    assert "tokenizer.json is missing" in news


def test_a_disk_that_stumbles_is_tried_again(
    run: RunFolder, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(10)
    session, real, failures = Session(run, store), os.fstat, iter([True])

    def fstat(fd: int) -> os.stat_result:
        if threading.current_thread().name.startswith("x1-send") and next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd)

    monkeypatch.setattr(outbox.os, "fstat", fstat)
    session.publisher.look()
    session.publisher.wait(20)
    with pytest.raises(UnreachableError, match="Input/output error"):
        session.publisher.look()
    session.settle()
    assert session.steps() == [10]
    assert session.publisher.bad() == []


def test_what_a_resume_passed_over_stays_in_the_store(run: RunFolder, store: ModelStore) -> None:
    """One answer of 404 on the newest checkpoint, and the run goes on from the one before."""
    for step in (10, 20):
        run.step(step)
        run.save(step)
        run.event("checkpoint", step)
    before = Session(run, store).settle()
    run.remove(20)
    run.event("resume", 10)
    session = Session(run, store, from_step=10)
    store.faults.append(Fault("fail", on="swap"))
    with suppress(StoreError):
        session.publisher.look()
    session.settle()
    session.publisher.clean_up()
    assert session.steps() == [10]
    check_checkpoint(store, before, 20)
    assert ["step 20 was passed over" in line for line in session.publisher.take_news()] == [True]
    third = Session(run, store, from_step=10)
    third.settle()
    third.publisher.clean_up()
    check_checkpoint(store, before, 20)


def test_a_look_that_works_is_not_all_well_while_checkpoints_are_refused(
    run: RunFolder, store: ModelStore
) -> None:
    run.save(10)
    session, clock, gate = Session(run, store), Clock(), threading.Semaphore(0)

    def refuses(op: str, key: str) -> None:
        if op == "put_stream" and "model" in key:
            gate.acquire(timeout=10)
            raise DeniedError("no room on that disk")

    store.before = refuses
    looks, told = Looks(session.publisher, Outage(1000.0), 15.0, clock.steady), []
    for number in range(12):
        clock.t += 15
        if number % 3 == 2:
            gate.release()
            session.publisher.wait(20)
        told.append(looks.look())
    assert [one.told is not None for one in told].count(True) == 1
    assert "no room" in told[-2].status.trouble
    assert looks.troubled_s() >= 120  # whatever else arrives
    store.before = lambda op, key: None
    gate.release()
    session.publisher.wait(20)
    over = [looks.look() for _ in range(4) if session.publisher.wait(20) is None]
    assert any(one.told and "again" in one.told for one in over)
    assert looks.troubled_s() == 0


def test_a_slow_line_on_which_something_arrives_is_no_trouble(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    session, clock = Session(run, store), Clock()
    looks = Looks(session.publisher, Outage(1000.0), 15.0, clock.steady)
    store.faults.append(Fault("fail", on="put_stream", key="model"))
    store.faults.append(Fault("fail", on="put", key="step-000000010/manifest"))
    looks.look()
    session.publisher.wait(20)
    assert looks.look().failed
    clock.t += 1000  # the next try has been under way for long
    assert looks.troubled_s() == 0
    session.publisher.wait(20)
    assert looks.look().failed
    assert looks.troubled_s() == 0  # the model did arrive


def test_there_is_a_pause_after_a_look_that_failed(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store)
    looks = Looks(session.publisher, Outage(30.0, lambda: 1.0), 15.0)
    session.publisher._advance = lambda sizes: False  # type: ignore[method-assign]
    assert looks.look().wait_s == 0.0
    session.publisher._advance = lambda sizes: True  # type: ignore[method-assign]
    assert looks.look().wait_s == 15.0
    session.publisher._advance = lambda sizes: False  # type: ignore[method-assign]
    store.faults.append(Fault("fail", times=10**6))
    assert looks.look().wait_s == 1.0


def test_the_mirror_keeps_its_last_ones_until_newer_ones_are_there(run: RunFolder, store: ModelStore) -> None:
    """A slow store: the disk has dropped what the mirror still holds."""
    session = Session(run, store, keep_last=2)
    run.save(10)
    session.settle()
    for step in (20, 30, 40):
        run.save(step)
    run.remove(10)
    session.publisher.look()  # begins to send 40
    assert session.steps() == [10]
    session.settle()
    assert session.steps() == [30, 40]


def test_a_rewind_drops_what_was_gone_back_over(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store, keep_last=5)
    for step in range(1, 31):
        run.step(step)
        if step % 10 == 0:
            run.save(step)
    session.settle()
    assert session.steps() == [10, 20, 30]
    run.rewind(10)
    session.publisher.look()
    head = session.head
    assert [one.step for one in head.checkpoints] == [10]
    assert record(store, head, "steps.jsonl") == (run.folder / "steps.jsonl").read_bytes()
    assert record(store, head, "steps.superseded.jsonl").count(b"\n") == 20
    for step in range(11, 21):
        run.step(step)
    run.save(20, seed=1)
    head = session.settle()
    assert (
        check_checkpoint(store, head, 20)["model.safetensors"]
        == (run.checkpoints / folder_name(20) / "model.safetensors").read_bytes()
    )
    assert [one.step for one in head.checkpoints] == [10, 20]


def test_a_rewind_in_the_middle_of_a_look(run: RunFolder, store: ModelStore) -> None:
    """After the sizes were taken and the events were sent, before the rows are read."""
    session = Session(run, store, keep_last=5)
    for step in range(1, 31):
        run.step(step, branch=0)
        if step % 10 == 0:
            run.save(step)
    session.settle()
    run.event("spike", 30)
    run.step(31, branch=0)

    def goes_back(op: str, key: str) -> None:
        if op == "put" and "events.jsonl" in key:
            store.before = lambda op, key: None
            run.rewind(10)
            for step in range(11, 14):
                run.step(step, branch=1)

    store.before = goes_back
    session.publisher.look()
    head = session.head
    rows = [json.loads(row) for row in record(store, head, "steps.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    branches = [row["branch"] for row in rows]
    if 1 in branches:  # the rows are cut: so must the checkpoints be
        assert [one.step for one in head.checkpoints] == [10]
        assert branches == [0] * 10 + [1] * 3
    else:
        assert [one.step for one in head.checkpoints] == [10, 20, 30]


def test_a_checkpoint_that_is_on_its_way_is_not_published_after_a_rewind(
    run: RunFolder, store: ModelStore
) -> None:
    go_on = threading.Event()
    store.before = lambda op, key: (op == "put_stream" and go_on.wait(20), None)[1]
    session = Session(run, store)
    for step in range(1, 31):
        run.step(step)
    run.save(10)
    run.save(30)
    session.publisher.look()  # begins to send 30
    run.rewind(10)
    session.publisher.look()
    go_on.set()
    head = session.settle()
    assert all(not decode(one.data, "").published(30) for one in store.versions("tiny/head.json") if one.data)
    assert [one.step for one in head.checkpoints] == [10]
    assert not in_the_store(store, "step-000000030")


def test_a_local_checkpoint_deleted_by_mistake_stays_in_the_mirror(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store)
    run.save(10)
    run.save(20)
    session.settle()
    shutil.rmtree(run.checkpoints / folder_name(20))
    session.settle(2)
    shutil.rmtree(run.checkpoints)
    session.settle(2)
    shutil.rmtree(run.folder)
    head = session.settle(2)
    assert [one.step for one in head.checkpoints] == [10, 20]
    assert head.records["events.jsonl"]
    assert {"config.yaml", "manifest.json"} <= head.files.keys()


def test_a_resume_from_an_earlier_step_gives_up_what_came_after(run: RunFolder, store: ModelStore) -> None:
    for step in range(1, 31):
        run.step(step)
    run.save(10)
    run.save(20)
    Session(run, store).settle()
    run.remove(20)
    before = (run.folder / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (run.folder / "steps.jsonl").write_bytes(b"".join(before[:10]))
    run.event("resume", 10)
    head = Session(run, store, from_step=10).settle()
    assert [one.step for one in head.checkpoints] == [10]
    assert record(store, head, "steps.jsonl") == b"".join(before[:10])
    assert head.epochs[-1].from_step == 10


def test_a_damaged_checkpoint_is_not_published_and_said_once(run: RunFolder, store: ModelStore) -> None:
    path = run.save(10)
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    session = Session(run, store)
    session.settle()
    assert session.steps() == []
    news = session.publisher.take_news()
    assert len(news) == 1
    assert "model.safetensors does not match its hash" in news[0]
    assert "step-000000010" in news[0]
    run.save(20)
    session.settle()
    assert session.steps() == [20]


def test_a_checkpoint_that_is_pruned_while_it_is_sent_is_sent_all_the_same(
    run: RunFolder, store: ModelStore
) -> None:
    run.save(10)

    def prune(op: str, key: str) -> None:
        if op == "put_stream" and "optimizer" in key and (run.checkpoints / folder_name(10)).exists():
            run.save(20)
            run.remove(10)

    store.before = prune
    session = Session(run, store)
    session.publisher.look()
    session.publisher.wait(20)
    session.publisher.look()
    assert session.steps() == [10]
    session.settle()
    assert session.steps() == [10, 20]
    check_checkpoint(store, session.head, 10)


def test_a_checkpoint_of_another_run_is_left_alone(run: RunFolder, store: ModelStore) -> None:
    run.save(10, run_id="another-run")
    session = Session(run, store)
    session.settle()
    assert session.steps() == []
    assert session.publisher.left() == []


@pytest.mark.parametrize("ahead_s", [-86400, 0, 86400])
def test_lag_is_not_moved_by_a_clock_that_is_set(run: RunFolder, store: ModelStore, ahead_s: int) -> None:
    """The disk's times are of the clock before or after; that of the process goes on."""
    clock = Clock()
    session = Session(run, store, clock=clock.steady)
    session.settle()
    store.faults.append(Fault("fail", times=10**6))
    run.save(1800)
    written = time.time() + ahead_s
    os.utime(run.checkpoints / folder_name(1800) / "manifest.json", (written, written))
    for lag_s in (0.0, 7.0, 14.0):
        with pytest.raises(StoreError):
            session.publisher.look()
        assert session.publisher.status().lag_s == lag_s
        clock.t += 7.0
    store.faults.clear()
    assert Session(run, store).publisher.clock is time.monotonic


def test_lag_grows_while_the_store_is_away_and_names_what_is_left(run: RunFolder, store: ModelStore) -> None:
    now = itertools.count(1000)
    session = Session(run, store, clock=lambda: float(next(now)))
    session.settle()
    assert session.publisher.status().lag_s == 0
    assert session.publisher.status().lag_bytes == 0
    store.faults.append(Fault("fail", times=10**6))
    for step in range(14):
        run.step(step)
    run.save(1800, size=2_000_000)
    lags = []
    for _ in range(3):
        with pytest.raises(StoreError):
            session.publisher.look()
        lags.append(session.publisher.status().lag_s)
    assert lags == sorted(lags)
    assert lags[0] < lags[2]
    held = sum(file.stat().st_size for file in (run.checkpoints / folder_name(1800)).iterdir())
    rows = (run.folder / "steps.jsonl").stat().st_size + (run.folder / "metrics.jsonl").stat().st_size
    assert session.publisher.status().lag_bytes == held + rows
    assert session.publisher.left() == [
        f"checkpoint of step 1800 ({size(held)})",
        "14 rows of metrics.jsonl",
        "14 rows of steps.jsonl",
    ]
    store.faults.clear()
    session.settle()
    assert session.publisher.left() == []
    assert session.publisher.status().lag_bytes == 0


def test_a_lost_lease_publishes_nothing_and_keeps_the_rows_apart(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store)
    run.step(1)
    session.settle()
    other = lease_on(store, session.clock, folder="f")  # the same folder mark: it need not wait
    run.step(2)
    run.step(3)
    with pytest.raises(LostError):
        session.publisher.look()
    assert look(store, "tiny") == (other.head, store.stat("tiny/head.json"))
    place = session.publisher.save_aside()
    assert place == f"tiny/lost/{session.publisher.space}"
    rows = store.get(f"{place}/steps.jsonl")[0]
    assert [json.loads(row)["step"] for row in rows.splitlines()] == [2, 3]


def test_what_earlier_sessions_left_is_removed_and_only_that(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    first = Session(run, store)
    first.settle()
    space = first.publisher.space
    store.put(f"tiny/{space}/checkpoints/step-000000020/model.safetensors", b"never published")
    store.put(f"tiny/{space}/records/steps.jsonl/000000000000-0000000001-00000000", b"x")
    store.put(f"tiny/lost/{space}/steps.jsonl", b"kept apart")
    store.put("tiny-2/e0001-00000000/files/config.yaml", b"of another run")
    store.put("tiny/e0001-00000000/files/config.yaml", b"of one of this name that has no head any more")
    second = Session(run, store, from_step=10)
    second.settle()
    store.put(f"tiny/{second.publisher.space}/checkpoints/step-000000030/model.safetensors", b"on its way")
    before = set(store.objects)
    second.publisher.clean_up()
    gone = before - set(store.objects)
    assert gone == {
        f"tiny/{space}/checkpoints/step-000000020/model.safetensors",
        f"tiny/{space}/records/steps.jsonl/000000000000-0000000001-00000000",
    }
    assert "removed 2 objects (16 bytes)" in second.publisher.take_news()[0]
    check_checkpoint(store, second.head, 10)


def test_what_a_head_in_the_trash_names_is_not_removed(run: RunFolder, store: ModelStore) -> None:
    run.save(10)
    first = Session(run, store)
    head = first.settle()
    store.put("trash/tiny-20261121T130000Z.json", store.get("tiny/head.json")[0])
    store.put("tiny/head.json", encode(replace(head, writer=replace(head.writer, state="trashed"))))
    second = Session(run, store)
    assert second.head.checkpoints == []  # a fresh head
    second.publisher.clean_up()
    check_checkpoint(store, head, 10)


def test_a_latch_that_was_lifted_is_lifted_in_the_mirror(run: RunFolder, store: ModelStore) -> None:
    session = Session(run, store)
    (run.folder / "STOP.json").write_text('{"reason": "budget"}')
    assert "STOP.json" in session.settle(1).files
    (run.folder / "STOP.json").unlink()
    assert "STOP.json" not in session.settle(1).files
    assert not in_the_store(store, "STOP.json")


def test_the_rate_limit_holds_a_checkpoint_back_and_not_the_records(
    run: RunFolder, store: ModelStore
) -> None:
    run.save(10, size=1_000_000)
    session = Session(run, store, max_mb_per_s=0.5)
    session.publisher.look()
    run.step(1)
    session.publisher.look()
    assert record(store, session.head, "steps.jsonl")
    assert session.publisher.outbox.busy
    session.publisher.stop()
    session.publisher.wait(5)
    assert not session.publisher.outbox.busy
    assert session.steps() == []


def test_who_is_woken_by_a_checkpoint_that_arrived_finds_it_ready(run: RunFolder, store: ModelStore) -> None:
    """Else it would be named by a look that comes `every_s` later."""
    run.save(10)
    found: list[bool] = []
    session = Session(run, store)
    session.publisher = Publisher(
        run.job("model://runs"),
        store,
        session.lease,
        session.publisher.identity,
        on_change=lambda: found.append(session.publisher.outbox.ready() is not None),
    )
    session.publisher.look()
    session.publisher.wait(20)
    assert found == [True]


def test_a_line_that_another_thread_has_to_say_is_not_lost(
    run: RunFolder, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop takes the lines while the clean-up makes one."""
    session, taken = Session(run, store), list[str]()

    class Gone(list[Any]):
        def __len__(self) -> int:
            taken.extend(session.publisher.take_news())
            return 1

    monkeypatch.setattr(publisher, "clean", lambda *_: Gone())
    session.publisher.clean_up()
    taken += session.publisher.take_news()
    assert len(taken) == 1


def test_two_threads_may_look_at_the_checkpoints(
    run: RunFolder, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is said by a timer while the loop may be at it."""
    run.save(10)
    run.save(20)
    now = Clock()
    session = Session(run, store, clock=now.steady)
    before = session.publisher.local.look()
    now.t += 60
    seen: list[dict[int, Any]] = []

    def steps(path: Path) -> int:
        monkeypatch.setattr(local, "step_of", step_of)  # once, in the middle of a look
        seen.append(session.publisher.local.look())
        return step_of(path)

    monkeypatch.setattr(local, "step_of", steps)
    seen.append(session.publisher.local.look())
    assert seen == [before, before]  # first seen a minute ago


def corpus_at(folder: Path, seed: str) -> str:
    folder.mkdir(parents=True)
    files = {"train.bin": f"train {seed}".encode() * 1000, "val.bin": b"val", "tokenizer.json": b"{}"}
    files |= {"train.idx.npy": b"1", "val.idx.npy": b"2"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    content = hashes["train.bin"] + hashes["val.bin"] + hashes["tokenizer.json"]
    manifest = {"fingerprint": hashlib.sha256(content.encode()).hexdigest()}
    manifest |= {split: {"sha256": hashes[f"{split}.bin"]} for split in ("train", "val")}  # type: ignore[misc]
    manifest |= {"tokenizer": {"sha256": hashes["tokenizer.json"]}}  # type: ignore[dict-item]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest["fingerprint"]


def test_corpora_are_sent_last_and_once_for_all_runs(
    tmp_path: Path, run: RunFolder, store: ModelStore
) -> None:
    mark = corpus_at(tmp_path / "web", "a")
    run.save(10)
    session = Session(run, store, data=True, corpora={"web": str(tmp_path / "web")})
    session.settle()
    assert session.head.data == {"web": mark}
    for name in ("manifest.json", "train.bin", "val.bin", "tokenizer.json", "train.idx.npy", "val.idx.npy"):
        assert store.get(f"data/{mark}/{name}")[0] == (tmp_path / "web" / name).read_bytes()
    puts = [key for op, key in store.operations if op in ("put", "put_stream")]
    assert puts.index(f"data/{mark}/manifest.json") > max(
        n for n, k in enumerate(puts) if k.startswith("data") and "manifest" not in k
    )
    assert min(n for n, k in enumerate(puts) if k.startswith("data")) > max(
        n for n, k in enumerate(puts) if "step-000000010" in k
    )
    assert "corpus-web.json" in session.head.files
    other = RunFolder(tmp_path / "runs" / "other", "other")
    before = len(store.operations)
    clock = Clock()
    lease = Lease.claim(
        store, Me("other", "g", "h", 1), sleep=clock.sleep, steady=clock.steady, now_utc=clock.utc, say=print
    )
    lease.resumed_from(0)
    job = other.job("model://runs", data=True, corpora={"web": str(tmp_path / "web")})
    second = Publisher(job, store, lease, Identity(RUN_ID))
    for _ in range(3):
        second.look()
        second.wait(5)
    assert second.lease.head.data == {"web": mark}
    assert not [
        key for op, key in store.operations[before:] if op.startswith("put") and key.startswith("data")
    ]


def test_what_the_mirror_holds_is_what_the_store_bills(
    tmp_path: Path, run: RunFolder, store: ModelStore
) -> None:
    """All objects but the head itself: checkpoints of unlike sizes, rows, small files, and the corpus."""
    corpus_at(tmp_path / "web", "a")
    (tmp_path / "web" / "notes.txt").write_bytes(b"is not sent")
    for step in range(1, 31):
        run.step(step)
        if step % 10 == 0:
            run.save(step, size=1000 * step)
    session = Session(run, store, keep_last=2, data=True, corpora={"web": str(tmp_path / "web")})
    session.settle()
    run.save(40, size=70_000)
    run.remove(10)  # by the policy
    session.settle()
    assert len(session.steps()) == 3
    objects = {key: len(store.get(key)[0]) for key in store.objects if not key.endswith("head.json")}
    assert session.publisher.status().held_bytes == sum(objects.values()) > 300_000


def test_a_corpus_that_is_not_what_it_says_is_not_named(
    tmp_path: Path, run: RunFolder, store: ModelStore
) -> None:
    corpus_at(tmp_path / "web", "a")
    (tmp_path / "web" / "train.bin").write_bytes(b"something else")
    session = Session(run, store, data=True, corpora={"web": str(tmp_path / "web")})
    session.settle()
    assert session.head.data == {}
    assert "does not match its hash" in session.publisher.take_news()[0]
    assert session.publisher.corpora_left() == []
    assert session.publisher.bad()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (612_345_678, "612 MB"), (8e9, "8 GB")],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert size(int(count)) == text


# --- whatever a trainer does, in whatever order, and whatever the store does to it --------------------------


class AnyTrainer(RuleBasedStateMachine):
    """Rows and checkpoints carry the branch that made them. Every head that was ever in the store must name
    objects that were there then, with the right hashes, and tell one story."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="x1-publisher-"))
        self.run = RunFolder(self.root / "tiny")
        self.store = ModelStore(Clock())
        self.store.before = self.meanwhile
        self.waiting: list[Callable[[], None]] = []
        self.now, self.branch, self.checked = 0, 0, 0
        self.open(0)

    def teardown(self) -> None:
        self.session.publisher.stop()
        self.session.publisher.wait(20)
        shutil.rmtree(self.root)

    def open(self, from_step: int) -> None:
        self.store.faults.clear()
        self.session = Session(self.run, self.store, from_step, keep_last=2)

    def meanwhile(self, op: str, key: str) -> None:
        """The trainer does something between two operations of the mirror: one trainer, so one thread."""
        if self.waiting and op != "swap" and threading.current_thread() is threading.main_thread():
            self.waiting.pop()()

    # what a trainer does

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1
            self.run.step(self.now, branch=self.branch)
            self.run.append("blocks.jsonl", step=self.now, branch=self.branch)

    def save(self) -> None:
        self.run.save(self.now, size=300, seed=self.branch)
        for path in list_checkpoints(self.run.checkpoints)[2:]:
            self.run.remove(step_of(path))

    def go_back(self, to: int) -> None:
        there = [step_of(path) for path in list_checkpoints(self.run.checkpoints)]
        if there:
            self.now, self.branch = there[to % len(there)], self.branch + 1
            self.run.rewind(self.now)

    @rule(steps=st.integers(1, 40))
    def trains(self, steps: int) -> None:
        self.train(steps)

    @rule()
    def saves(self) -> None:
        self.save()

    @rule(to=st.integers(0, 3))
    def goes_back(self, to: int) -> None:
        self.go_back(to)

    @rule(
        what=st.lists(st.sampled_from(["train", "save", "back"]), min_size=1, max_size=4),
        to=st.integers(0, 3),
    )
    def does_it_while_the_mirror_looks(self, what: list[str], to: int) -> None:
        acts = {"train": lambda: self.train(3), "save": self.save, "back": lambda: self.go_back(to)}
        self.waiting += [acts[one] for one in what]

    # what a store does

    @precondition(lambda self: not self.store.faults)
    @rule(
        kind=st.sampled_from(["fail", "after", "twice"]),
        times=st.integers(1, 3),
        on=st.sampled_from(["", "swap", "put"]),
    )
    def fails(self, kind: Any, times: int, on: str) -> None:
        self.store.faults.append(Fault(kind, on=on, times=times))

    # what a mirror does

    @rule(wait=st.booleans())
    def looks(self, wait: bool) -> None:
        with suppress(StoreError):
            self.session.publisher.look()
        if wait:
            self.session.publisher.wait(20)

    @rule()
    def dies_and_is_started_again(self) -> None:
        """The trainer too: it resumes from its newest checkpoint."""
        there = [step_of(path) for path in list_checkpoints(self.run.checkpoints)]
        if not there:
            return
        self.waiting.clear()
        self.session.publisher.stop()
        self.session.publisher.wait(20)
        self.now, self.branch = there[0], self.branch + 1
        for name in ("metrics.jsonl", "steps.jsonl", "blocks.jsonl"):
            rewind(self.run.folder / name, self.now)
        self.open(self.now)

    @rule()
    def comes_to_rest(self) -> None:
        self.waiting.clear()
        self.store.faults.clear()
        for _ in range(3):
            try:
                head = self.session.settle(3)
            except StoreError:
                continue
        assert self.session.publisher.left() == []
        for name in ("steps.jsonl", "metrics.jsonl", "blocks.jsonl"):
            if (self.run.folder / name).exists():
                assert record(self.store, head, name) == (self.run.folder / name).read_bytes()
        here = [step_of(path) for path in list_checkpoints(self.run.checkpoints)]
        assert set(here) <= {one.step for one in head.checkpoints}
        assert len(head.checkpoints) <= 2
        named = set(named_keys(head, self.store))
        strays = [key for key in self.store.objects if f"/{self.session.publisher.space}/check" in key]
        assert {key for key in strays if key not in named} == set()

    @invariant()
    def every_head_told_one_story(self) -> None:
        history = list(self.store.history)
        for at in range(self.checked, len(history)):
            one = history[at]
            if one.key == "tiny/head.json" and one.data:
                there = {v.key: v.data for v in history[: at + 1] if v.data is not None}
                check_story(decode(one.data, ""), there)
        self.checked = len(history)


def named_keys(head: Head, store: ModelStore) -> Iterator[str]:
    for one in head.checkpoints:
        yield from (key for key in store.objects if key.startswith(f"tiny/{one.path}/"))


def check_story(head: Head, there: dict[str, bytes]) -> None:
    branches: dict[int, int] = {}
    for name, pieces in head.records.items():
        data = b""
        for piece in pieces:
            found = there[f"tiny/{piece.path}"]
            assert hashlib.sha256(found).hexdigest() == piece.sha256, (name, piece)
            data += found
        assert data.endswith(b"\n")
        if name == "steps.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
            branches = {row["step"]: row["branch"] for row in rows if "branch" in row}
    for one in head.checkpoints:
        manifest = json.loads(there[f"tiny/{one.path}/manifest.json"])
        assert hashlib.sha256(there[f"tiny/{one.path}/manifest.json"]).hexdigest() == one.manifest_sha256
        for name, want in manifest["files"].items():
            found = there[f"tiny/{one.path}/{name}"]
            assert hashlib.sha256(found).hexdigest() == want["sha256"], (one, name)
        if one.step:
            assert one.step in branches, f"checkpoint {one.step} without its rows"
            weights = content(f"model {one.step} {branches[one.step]}", 300)
            assert there[f"tiny/{one.path}/model.safetensors"] == weights, (
                f"checkpoint {one.step} of other rows"
            )


TestAnyTrainer = AnyTrainer.TestCase
TestAnyTrainer.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
