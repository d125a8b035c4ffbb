"""The mirror's process, started and spoken to as a trainer does it, against a folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mirror.run_folders import RUN_ID, Driven, RunFolder, check_checkpoint, record
from tests.stores.model_store import Clock, Fault, ModelStore
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket
from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror import worker as worker_module
from x1_pretrain.mirror.claim import HeldError, Me
from x1_pretrain.mirror.head import Head, encode
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.job import Status
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.mirror.looks import Looks, claim_for
from x1_pretrain.mirror.preflight import AbsentError
from x1_pretrain.mirror.publisher import Identity, Publisher
from x1_pretrain.mirror.talk import GONE, Orders, Voice
from x1_pretrain.mirror.worker import Worker
from x1_pretrain.records.mirror_state import MirrorState, read_state, write_state
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "tiny")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def seen(mirror: Path) -> tuple[Store, Head]:
    store = open_store(parse(str(mirror)), None)
    found = look(store, "tiny")
    assert found is not None
    return store, found[0]


def test_a_session_from_open_to_drain(run: RunFolder, mirror: Path) -> None:
    run.save(0)
    driven = Driven(run.job(mirror))
    opened = driven.open()
    assert (opened["epoch"], opened["found"], opened["moved_from"]) == (1, False, None)
    driven.publish()
    for step in range(1, 11):
        run.step(step)
    run.save(10)
    status = driven.until("status", mirrored=[0, 10])
    assert status["trouble"] == ""
    run.step(11)
    assert driven.drain(why="finished") == []
    store, head = seen(mirror)
    assert (head.writer.state, head.writer.why) == ("released", "finished")
    assert head.run_id == RUN_ID
    check_checkpoint(store, head, 10)
    assert record(store, head, "steps.jsonl") == (run.folder / "steps.jsonl").read_bytes()
    state = read_state(run.folder)
    assert state is not None
    assert (state.state, state.why, state.epoch, state.mirrored) == ("released", "finished", 1, [0, 10])


@pytest.mark.slow
def test_it_holds_the_run_while_the_trainer_gets_ready(run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror, stale_s=3.0))
    driven.open()
    for beat in range(1, 4):
        end = time.monotonic() + 60
        while seen(mirror)[1].writer.beat < beat:
            assert time.monotonic() < end
            time.sleep(0.05)
    driven.drain()


def test_a_trainer_that_is_killed_leaves_all_of_it_in_the_mirror(run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror, every_s=60.0))
    driven.open()
    driven.publish()
    driven.until("status")
    run.step(1)
    run.save(1)
    assert driven.process.stdin is not None
    driven.process.stdin.close()
    driven.until("drained")
    assert driven.process.wait(10) == 0
    store, head = seen(mirror)
    assert (head.writer.state, head.writer.why) == ("released", "the trainer ended without a word")
    assert record(store, head, "steps.jsonl").count(b"\n") == 1
    check_checkpoint(store, head, 1)


def test_what_the_mirror_holds_is_said_before_training(run: RunFolder, mirror: Path) -> None:
    """The store bills for it from the first second."""
    run.save(10)
    first = Driven(run.job(mirror))
    first.open()
    assert first.happenings[0] == {**asdict(Status()), "is": "status"}
    first.publish()
    held = first.until("status", mirrored=[10])["held_bytes"]
    assert held > 60_000
    first.drain()
    second = Driven(run.job(mirror, step_fields={"a": 1}))
    second.open()
    assert second.happenings[0]["held_bytes"] >= held
    second.drain()


@pytest.mark.slow
def test_it_does_not_heed_the_signals_that_end_a_trainer(run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror))
    driven.open()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        driven.process.send_signal(number)
    time.sleep(0.3)
    driven.publish()
    assert driven.drain() == []
    assert os.getsid(os.getpid()) != driven.process.pid


@pytest.mark.slow
def test_a_mirror_that_dies_goes_on_with_the_same_run(run: RunFolder, mirror: Path) -> None:
    run.step(1)
    run.save(1)
    first = Driven(run.job(mirror))
    first.open()
    first.publish()
    first.until("status", mirrored=[1])
    first.kill()
    run.step(2)
    run.save(2)
    again = Driven(run.job(mirror, goes_on=True))
    opened = again.open()
    assert (opened["epoch"], opened["notes"], opened["restored_step"]) == (2, [], None)
    again.publish(from_step=0)  # as at its first start: what was published since stays
    assert again.drain() == []
    store, head = seen(mirror)
    assert [one.step for one in head.checkpoints] == [1, 2]
    assert head.published(1).epoch == 1  # type: ignore[union-attr]  # not sent again
    assert record(store, head, "steps.jsonl") == (run.folder / "steps.jsonl").read_bytes()


@pytest.mark.slow
def test_a_mirror_that_dies_does_not_take_the_run_back_from_another(run: RunFolder, mirror: Path) -> None:
    first = Driven(run.job(mirror))
    first.open()
    first.publish()
    first.until("status")
    first.kill()
    other = take_over(mirror)
    other.resumed_from(0)
    other.release("finished elsewhere")
    again = Driven(run.job(mirror, goes_on=True))
    refused = again.until("refused")
    assert (refused["exit_code"], refused["held"]) == (78, True)
    assert "elsewhere" in refused["message"]
    assert again.process.wait(10) == 78


# --- without a process of its own: what a worker makes of what it finds -------------------------------------


def worker(run: RunFolder, mirror: Path, orders: list[bytes] | None = None, **job: Any) -> Worker:
    return Worker(run.job(mirror, **job), Voice(io.StringIO()), Orders(iter(orders or [])))


def said(one: Worker) -> list[dict[str, Any]]:
    return [json.loads(line) for line in one.voice._stream.getvalue().splitlines()]  # type: ignore[attr-defined]


def claimed(one: Worker, store: Store) -> Lease:
    one.know_the_folder()
    one.keep_id()
    return one.claim(store)


def test_a_worker_killed_after_its_claim_is_no_other_session(run: RunFolder, mirror: Path) -> None:
    store = FolderStore(mirror)
    first = worker(run, mirror, stale_s=0.2)
    lease = claimed(first, store)
    first.save_state(epoch=lease.epoch, token=lease.head.writer.token)
    killed = claimed(worker(run, mirror, goes_on=True, stale_s=0.2), store)  # it never wrote mirror.json
    assert killed.epoch == 2
    assert claimed(worker(run, mirror, goes_on=True, stale_s=0.2), store).epoch == 3
    (run.folder / "mirror.json").unlink()
    claimed(worker(run, mirror, goes_on=True, stale_s=0.2), store).release("")
    elsewhere = take_over(mirror)
    elsewhere.resumed_from(0)
    elsewhere.release("finished")
    first.save_state()  # epoch 1 is what the folder knows again
    with pytest.raises(HeldError, match="elsewhere"):
        claimed(worker(run, mirror, goes_on=True, stale_s=0.2), store)


def test_a_claim_over_another_that_trained_is_not_ours_the_second_time(run: RunFolder, mirror: Path) -> None:
    store, first = FolderStore(mirror), worker(run, mirror)
    lease = claimed(first, store)
    first.save_state(epoch=lease.epoch, token=lease.head.writer.token)
    elsewhere = take_over(mirror)
    elsewhere.resumed_from(0)
    elsewhere.release("finished")
    again = worker(run, mirror)
    claimed(again, store).release("killed before it said so")  # as a worker that had no time to look
    with pytest.raises(HeldError):
        claimed(worker(run, mirror, goes_on=True), store)


def test_an_old_worker_does_not_write_over_the_state_of_the_next(run: RunFolder, mirror: Path) -> None:
    store, old = FolderStore(mirror), worker(run, mirror)
    lease = claimed(old, store)
    old.save_state(epoch=lease.epoch, token=lease.head.writer.token)
    new = worker(run, mirror)
    lease = claimed(new, store)
    new.save_state(epoch=lease.epoch, token=lease.head.writer.token)
    old.save_state(state="lost", why="another one")
    state = read_state(run.folder)
    assert state is not None
    assert (state.epoch, state.state) == (2, "writing")
    new.save_state(lag_s=7.0)
    assert read_state(run.folder).lag_s == 7.0  # type: ignore[union-attr]


def test_two_processes_that_keep_the_state_at_once_do_not_meet(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror of a killed trainer does its last things while the next one has begun."""
    old, new = MirrorState("u", "l", "tiny", "f" * 16, 1, "a" * 8), MirrorState("u", "l", "tiny", "f" * 16, 2)
    replace_file = Path.replace

    def late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        monkeypatch.setattr(os, "getpid", lambda: 4242)
        write_state(run.folder, new)
        written = read_state(run.folder)
        assert written is not None
        assert written.epoch == 2
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", late)
    write_state(run.folder, old)
    written = read_state(run.folder)
    assert written is not None
    assert written.epoch == 1


def test_an_empty_mount_point_is_no_new_mirror(run: RunFolder, mirror: Path) -> None:
    mirrored = MirrorState(str(mirror), str(mirror / "tiny"), "tiny", "f", 3, "t", mirrored=[10, 20])
    write_state(run.folder, mirrored)
    mirror.mkdir()
    one = worker(run, mirror)
    assert one.run() == 78
    assert "step 20 was mirrored to it; is the disk mounted?" in said(one)[-1]["message"]
    assert list(mirror.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "code", "word"), [('{"schema_version": 2, "kind": "mirror-state"}', 78, "update x1")]
)
def test_a_state_of_a_newer_x1_is_one_line(
    run: RunFolder, mirror: Path, state: str, code: int, word: str
) -> None:
    (run.folder / "mirror.json").write_text(state)
    one = worker(run, mirror)
    assert one.run() == code
    assert word in said(one)[-1]["message"]


def test_a_folder_that_can_keep_no_id_is_refused_before_anything_is_claimed(
    run: RunFolder, mirror: Path
) -> None:
    (run.folder / f".mirror.json.{os.getpid()}.new").mkdir()
    one = worker(run, mirror)
    assert one.run() == 78
    assert "can't be written" in said(one)[-1]["message"]
    assert look(FolderStore(mirror), "tiny") is None


def on_model(monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    store = ModelStore(Clock())
    monkeypatch.setattr(worker_module, "open_store", lambda *_: store)
    return store


def test_a_store_away_at_the_claim_is_worth_a_relaunch(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_model(monkeypatch).faults.append(Fault("fail", on="get", key="head.json"))
    one = worker(run, mirror)
    assert one.run() == 75
    assert said(one)[-1]["exit_code"] == 75


@pytest.mark.parametrize("fields", [{"must_exist": True}, {"goes_on": True}, {}], ids=str)
def test_where_there_is_a_run_a_store_that_is_away_is_waited_for(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    def away(*_: object) -> None:
        raise AbsentError("no answer")

    monkeypatch.setattr(worker_module, "preflight", away)
    monkeypatch.setattr(worker_module, "AWAY_S", 0.05)
    monkeypatch.setattr(worker_module, "AWAY_AGAIN_S", 0.01)
    on_model(monkeypatch)
    one = worker(run, mirror, **fields)
    assert one.run() == (75 if fields else 78)
    assert worker_module.AWAY_S < 1


@pytest.mark.parametrize(
    ("fields", "times", "passes"),
    [
        ({}, 1, False),
        ({"unattended": True}, 2, True),
        ({"goes_on": True}, 2, True),
        ({"unattended": True}, 3, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["preflight", "look"])
def test_a_bad_moment_of_a_store_ends_no_run(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any], times: int, passes: bool, when: str,
) -> None:  # fmt: skip
    """A 403, a flipped byte: at a first start it is said at once, a relaunch asks again."""
    answers = iter([RefusedError("403")] * times)

    def tried(*_: object) -> None:
        for error in answers:
            raise error

    monkeypatch.setattr(worker_module, "preflight", lambda *_: None)
    monkeypatch.setattr(worker_module, when, tried)
    monkeypatch.setattr(worker_module, "AWAY_AGAIN_S", 0.01)
    one = worker(run, mirror, run_id="", **fields)
    one.know_the_folder()
    if passes:
        one.check(ModelStore(Clock()))
    else:
        with pytest.raises(RefusedError, match="403"):
            one.check(ModelStore(Clock()))
    if when == "look" and "goes_on" in fields:
        times = 0  # its run is there: nobody looks for what is left of another
    asked_again = [line["text"] for line in said(one) if line["is"] == "progress"]
    assert len(asked_again) == (times if passes else times - 1)


@pytest.mark.parametrize("fields", [{}, {"must_exist": True}], ids=str)
def test_a_run_whose_head_was_removed_is_not_begun_anew_over_what_is_left_of_it(
    run: RunFolder, mirror: Path, fields: dict[str, Any]
) -> None:
    lone = "tiny/e0002-0a1b2c3d/files/config.yaml"
    FolderStore(mirror).put(lone, b"name: tiny")
    one = worker(run, mirror, run_id="", **fields)
    assert one.run() == 78
    assert "has a run's objects, and its head.json was removed; bring that back" in said(one)[-1]["message"]
    assert (mirror / lone).exists()
    its_own = worker(run, mirror, run_id=RUN_ID)  # the folder that has the run mirrors it anew
    its_own.refuse_without_head(FolderStore(mirror))


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_mirror_that_was_started_again_does_not_know_what_is_left(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """The run ends while the store is away: nothing here says that what came before is mirrored."""

    def away(*_: object) -> None:
        raise AbsentError("no answer")

    monkeypatch.setattr(worker_module, "preflight", away)
    on_model(monkeypatch)
    one = worker(run, mirror, must_exist=True, goes_on=goes_on)
    one.orders._leaving = DRAIN
    assert one.run() == 0
    assert [line for line in said(one) if line["is"] == "drained"] == [{"is": "drained", "left": []}] * (
        not goes_on
    )


@pytest.mark.parametrize("goes_on", [False, True])
def test_only_a_newcomer_whom_nobody_would_start_again_is_patient(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """In the middle of training, somebody else's sign of life ends it."""
    met: list[Me] = []
    monkeypatch.setattr(Lease, "claim", lambda store, me, **how: met.append(me))
    for unattended in (False, True):
        job = run.job(mirror, unattended=unattended, goes_on=goes_on)
        claim_for(job, FolderStore(mirror), "id", say=print)
    assert [me.unattended for me in met] == [False, not goes_on]


DRAIN = {"do": "drain", "within_s": 20.0, "why": "finished"}


def draining(run: RunFolder, mirror: Path, store: ModelStore) -> tuple[Worker, Keeper, Looks]:
    one = worker(run, mirror)
    keeper = Keeper(claimed(one, store))  # type: ignore[arg-type]
    keeper.resumed_from(0)
    publisher = Publisher(one.job, store, keeper, Identity(RUN_ID))
    return one, keeper, Looks(publisher, one.outage, 15.0)


def test_a_lease_lost_at_the_very_end_is_told_as_lost(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ModelStore(Clock())
    one, keeper, looks = draining(run, mirror, store)
    monkeypatch.setattr(one, "send_the_rest", lambda *_: steal(store) or [])
    with pytest.raises(LostError) as lost:
        one.drain(looks, keeper, DRAIN)
    begun = time.monotonic()
    assert one.lost(keeper, lost.value, looks.publisher) == 78  # and waits for no order that was taken
    assert time.monotonic() - begun < worker_module.LOST_S / 2
    assert [line["is"] for line in said(one)] == ["lost", "event", "drained"]


def steal(store: ModelStore) -> None:
    head = look(store, "tiny")
    assert head is not None
    other = replace(head[0], writer=replace(head[0].writer, epoch=9, token="other"))
    store._write("tiny/head.json", encode(other))


def test_a_store_that_dies_during_the_drain_is_not_paid_for(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "TROUBLE_S", 0.05)
    store = ModelStore(Clock())
    one, keeper, looks = draining(run, mirror, store)
    run.step(1)
    store.faults.append(Fault("fail", times=10**9))
    begun = time.monotonic()
    assert one.drain(looks, keeper, DRAIN) == 0
    assert time.monotonic() - begun < 15  # of 20 s that it had
    assert "1 row of steps.jsonl" in said(one)[-1]["left"]


def test_giving_back_to_a_store_that_was_given_up_takes_no_longer(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts and never answers: each call there has a minute of its own."""
    monkeypatch.setattr(worker_module, "TROUBLE_S", 0.05)
    monkeypatch.setattr(worker_module, "GIVEN_UP_S", 0.05)
    over = threading.Event()
    monkeypatch.setattr(worker_module.os, "_exit", lambda code: over.set())
    store = ModelStore(Clock())
    one, keeper, looks = draining(run, mirror, store)
    run.step(1)
    store.faults.append(Fault("fail", times=10**9))
    waited: list[bool] = []
    monkeypatch.setattr(keeper, "release", lambda why: waited.append(over.wait(20)))
    one.drain(looks, keeper, DRAIN)
    assert waited == [True]
    assert "1 row of steps.jsonl" in next(line for line in said(one) if line["is"] == "drained")["left"]


def test_a_process_whose_time_is_over_ends_whatever_it_finds(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, looks = draining(run, mirror, ModelStore(Clock()))
    codes: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", codes.append)
    one.leave_at_once(looks.publisher)
    monkeypatch.setattr(looks.publisher, "left", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.leave_at_once(looks.publisher)
    assert codes == [0, 0]


def test_a_run_that_can_not_be_given_back_is_left_without_a_traceback(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ModelStore(Clock())
    one, keeper, _ = draining(run, mirror, store)
    store.faults.append(Fault("fail", times=10**9))
    monkeypatch.setattr(one, "restore", lambda *_: None)
    one.orders._queue.put(GONE)
    assert one.serve(store, keeper) == 0
    assert said(one)[-1] == {"is": "drained", "left": []}
    store.faults.clear()
    steal(store)
    one.give_back(keeper, "lost as well")


def take_over(mirror: Path) -> Any:
    from x1_pretrain.mirror.claim import Me

    store, head = seen(mirror)
    return Lease.claim(
        store,
        Me("tiny", head.writer.folder, "elsewhere", 1),  # the folder's mark: it need not wait
        sleep=time.sleep,
        steady=time.monotonic,
        now_utc=lambda: "2026-11-21T00:00:00Z",
        say=print,
    )


def test_a_lost_run_ends_with_78_and_its_rows_kept_apart(run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror))
    driven.open()
    driven.publish()
    run.step(1)
    driven.until("status")
    other = take_over(mirror)
    for step in (2, 3):
        run.step(step)
    lost = driven.until("lost")
    assert "elsewhere (process 1, epoch 2)" in lost["message"]
    driven.tell(do="drain", within_s=5.0, why="lost")
    driven.until("drained")
    assert driven.process.wait(10) == 78
    assert seen(mirror)[1] == other.head
    aside = next((mirror / "tiny" / "lost").glob("e0001-*/steps.jsonl"))
    steps = [json.loads(row)["step"] for row in aside.read_text().splitlines()]
    assert steps[-2:] == [2, 3]
    state = read_state(run.folder)
    assert state is not None
    assert state.state == "lost"


@pytest.mark.slow
def test_a_run_that_lives_elsewhere_is_refused(tmp_path: Path, run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror, stale_s=3.0))
    driven.open()
    other = RunFolder(tmp_path / "elsewhere" / "tiny")
    refused = Driven(other.job(mirror, stale_s=3.0))
    said = refused.until("refused")
    assert (said["exit_code"], said["held"]) == (78, True)
    assert refused.process.wait(10) == 78
    driven.drain()


@pytest.mark.parametrize(
    ("uri", "code"), [("s3//typo/x", 2), ("/proc/nowhere/mirror", 78), ("ftp://a/b", 2)], ids=str
)
def test_a_mirror_that_can_not_be_is_refused_in_one_line(run: RunFolder, uri: str, code: int) -> None:
    driven = Driven(run.job(uri))
    refused = driven.until("refused")
    assert refused["exit_code"] == code, refused
    assert "\n" not in refused["message"]
    assert driven.process.wait(10) == code


@pytest.mark.slow
def test_trouble_is_told_once_and_once_when_it_is_over(run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror, stale_s=3.0))
    driven.open()
    driven.publish()
    driven.until("status")
    away = mirror.with_name("away")
    mirror.rename(away)
    mirror.write_text("not a folder")
    run.step(1)
    began = driven.until("event")
    assert began["fields"] == {"alert": True}
    assert "can't be mirrored now" in began["message"]
    assert driven.until("status")["trouble"]
    assert driven.until("status", within_s=30)["lag_s"] > 0
    mirror.unlink()
    away.rename(mirror)
    over = driven.until("event", within_s=60)
    assert over["fields"] == {"over": True}
    assert driven.drain() == []
    store, head = seen(mirror)
    assert record(store, head, "steps.jsonl").count(b"\n") == 1


@pytest.mark.slow
def test_a_drain_that_has_no_time_says_exactly_what_is_left(run: RunFolder, mirror: Path) -> None:
    driven = Driven(run.job(mirror, max_mb_per_s=0.1))
    driven.open()
    driven.publish()
    run.step(1)
    path = run.save(1800, size=1_000_000)
    size = sum(file.stat().st_size for file in path.iterdir())
    begun = time.monotonic()
    left = driven.drain(within_s=2.0, why="stopped by SIGTERM")
    assert time.monotonic() - begun < 20  # of 30 s that it would take
    assert left == [f"checkpoint of step 1800 ({size / 1e6:.3g} MB)"]
    _, head = seen(mirror)
    assert (head.writer.state, head.writer.why) == ("released", "stopped by SIGTERM")


def test_it_imports_no_torch_and_little_else(tmp_path: Path) -> None:
    code = (
        "import sys, x1_pretrain.mirror.worker\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'pyarrow', 'transformers', 'mlflow', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_an_idle_mirror_is_light(run: RunFolder, mirror: Path) -> None:
    """Generous bounds: the measured numbers are in docs/mirror.md."""
    run.step(1)
    driven = Driven(run.job(mirror, every_s=0.2))
    driven.open()
    driven.publish()
    driven.until("status")
    process = psutil.Process(driven.process.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(2.0)
    looks = 10
    each_s = (sum(process.cpu_times()[:2]) - before) / looks
    assert each_s < 0.05
    assert process.memory_info().rss < 200e6
    driven.drain()


@pytest.mark.slow
def test_a_session_on_s3_with_a_server_that_fails_now_and_then(
    run: RunFolder, s3: Bucket, proxy: FaultyProxy
) -> None:
    driven = Driven(run.job(f"s3://{s3.bucket}/runs"))
    driven.open()
    driven.publish()
    for kind in ("500", "503", "cut_upload"):
        proxy.add(kind, on="PUT", times=2)
    for step in range(1, 11):
        run.step(step)
    path = run.save(10, size=6_000_000)
    driven.until("status", within_s=60, mirrored=[10])
    assert driven.drain() == []
    store = open_store(parse(f"s3://{s3.bucket}/runs"), s3.url)
    found = look(store, "tiny")
    assert found is not None
    files = check_checkpoint(store, found[0], 10)
    assert files["model.safetensors"] == (path / "model.safetensors").read_bytes()
    assert record(store, found[0], "steps.jsonl") == (run.folder / "steps.jsonl").read_bytes()


def test_after_a_refusal_nothing_is_waited_for(
    run: RunFolder, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that the preflight gave up on may hold the store for long."""
    store = on_model(monkeypatch)
    closed: list[bool] = []
    monkeypatch.setattr(store, "close", lambda: closed.append(True))
    store.faults.append(Fault("fail", times=10**9))
    assert worker(run, mirror).run() == 78
    assert closed == []
