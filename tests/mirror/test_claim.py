"""How a session becomes the writer of a run, and when it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mirror.lease_world import KEY, A, B, World, noted
from tests.stores.model_store import Fault
from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.claim import LIVES, HeldError, claimed, decide, folder_mark
from x1_pretrain.mirror.head import Head, Writer, decode, encode
from x1_pretrain.mirror.lease import LostError
from x1_pretrain.stores.store import ChangedError, DeniedError, UnreachableError

UNATTENDED = replace(B, unattended=True)


@pytest.fixture
def world() -> World:
    return World()


def test_first_claim_makes_the_run(world):
    lease = world.claim()
    head = world.head()
    assert head == lease.head
    assert lease.before is None
    assert lease.down_s is None
    assert (head.writer.epoch, head.writer.host, head.writer.pid, head.writer.state) == (
        1,
        "machine-a",
        11,
        "writing",
    )
    assert [(one.epoch, one.token) for one in head.epochs] == [(1, head.writer.token)]
    assert len(head.writer.token) == 8
    int(head.writer.token, 16)
    assert lease.space == f"run/e0001-{head.writer.token}"
    assert world.said == []


def test_released_run_is_claimed_at_once_and_keeps_what_it_has(world):
    first = world.claim()
    first.publish(noted(first.head, "one"))
    first.release("finished")
    assert (world.head().writer.state, world.head().writer.why) == ("released", "finished")
    at = world.clock.t
    second = world.claim(B)
    assert world.clock.t == at
    assert (second.epoch, second.head.status) == (2, {"notes": ["one"]})
    assert second.head.writer.why == ""
    assert second.before == replace(first.head)
    assert [one.epoch for one in second.head.epochs] == [1, 2]


def test_run_in_the_trash_is_begun_anew_with_the_next_epoch(world):
    first = world.claim()
    first.publish(noted(first.head, "old"))
    head = world.head()
    trashed = replace(head, writer=replace(head.writer, state="trashed"), trashed_utc="2026-11-21T12:00:00Z")
    world.store.put(KEY, encode(trashed))
    second = world.claim(B)
    assert second.head == Head("run", second.head.writer, epochs=second.head.epochs)
    assert [one.epoch for one in second.head.epochs] == [2]
    with pytest.raises(LostError, match=r"run: machine-b \(process 22, epoch 2\) has taken over"):
        first.renew()


def test_same_folder_need_not_wait(world):
    world.claim()
    assert world.claim(replace(A, pid=12)).epoch == 2
    assert world.clock.t == 0


def test_folder_mark_is_of_one_folder_on_one_machine():
    marks = {folder_mark(*at) for at in [("a", "m", 1), ("b", "m", 1), ("a", "n", 1), ("a", "m", 2)]}
    assert len(marks) == 4
    assert folder_mark("a", "m", 1) == folder_mark("a", "m", 1)


def test_long_silent_holder_is_replaced_at_once_by_the_clock_of_the_store(world):
    world.claim()
    world.clock.t += 90.5
    lease = world.claim(B)
    assert world.clock.t == 90.5
    assert lease.down_s == pytest.approx(90.5)


def test_it_is_the_holders_own_time_that_counts(world):
    world.claim(replace(A, stale_s=600.0))
    world.clock.t += 500.0
    world.claim(replace(B, stale_s=5.0))
    assert 600 < world.clock.t < 610


def test_dead_holder_is_waited_for_and_said_once(world):
    world.claim()
    world.clock.t += 30.0
    lease = world.claim(B)
    assert 90 < world.clock.t < 91
    assert lease.epoch == 2
    assert len(world.said) == 1
    assert "machine-a (process 11, epoch 1)" in world.said[0]
    assert "30 s" in world.said[0]
    assert "60 s" in world.said[0]


def test_store_that_does_not_tell_the_time_is_watched_for_the_whole_time():
    world = World(tells_time=False)
    world.claim()
    world.clock.t += 1000.0
    lease = world.claim(B)
    assert 1090 < world.clock.t < 1096
    assert lease.down_s is None


def test_it_is_watched_from_the_answer_not_from_the_question():
    """The first look is answered after 80 s, in which the holder may have given its last sign of life."""
    world = World(tells_time=False)
    world.claim()
    gets = []

    def before(op: str, key: str) -> None:
        if op == "get":
            gets.append(key)
            world.clock.t += 80.0 if len(gets) == 1 else 0.0

    world.store.before = before
    world.claim(B)
    assert 170 < world.clock.t < 176


def test_store_whose_times_lie_in_the_future_is_watched_for_the_whole_time(world):
    world.store.skew_s = 3600.0
    world.claim()
    world.store.skew_s = 0.0
    world.claim(B)
    assert 90 < world.clock.t < 91


@pytest.mark.parametrize("tells_time", [True, False])
def test_living_holder_is_left_alone(tells_time):
    world = World(tells_time=tells_time)
    holder = world.claim()

    def sleep(s: float) -> None:
        world.clock.t += s
        if world.clock.t > 20:
            holder.renew()

    world.clock.t = 11.0
    with pytest.raises(HeldError) as refused:
        world.claim(B, sleep)
    text = str(refused.value)
    assert refused.value.exit_code == 78
    assert "run: is being trained on machine-a (process 11, epoch 1, last sign of life " in text
    assert ("0 s ago by the clock of model://runs" in text) == tells_time
    assert "another name" in text
    assert "\n" not in text
    holder.renew()


class Beating:
    """A holder with so many signs of life left, and a newcomer whose sleep it shares."""

    def __init__(self, world: World, beats: int, every_s: float) -> None:
        self.world, self.lease, self.beats, self.every_s = world, world.claim(), beats, every_s
        self.last = world.clock.t

    def sleep(self, s: float) -> None:
        clock = self.world.clock
        until = clock.t + s
        while self.beats and self.last + self.every_s <= until:
            clock.t = self.last = self.last + self.every_s
            self.beats -= 1
            self.lease.renew()
        clock.t = until


@given(
    beats=st.integers(0, 8),
    every_s=st.integers(1, 22),
    late_s=st.integers(0, 89),
    tells_time=st.booleans(),
)
def test_holder_that_dies_at_any_beat_is_taken_over_by_one_whom_nobody_would_start_again(
    beats, every_s, late_s, tells_time
):
    world = World(tells_time=tells_time)
    holder = Beating(world, 0, every_s)
    world.clock.t = holder.last = late_s
    holder.lease.renew()
    holder.beats, died = beats, holder.last + beats * every_s
    lease = world.claim(UNATTENDED, holder.sleep)
    assert (lease.epoch, holder.beats) == (2, 0)
    assert died + 90.0 < world.clock.t < died + 90.0 + 6.0
    with pytest.raises(LostError):
        holder.lease.renew()
    assert len(world.said) == 1
    assert "silent for 90 s" in world.said[0]
    assert "lives on for 180 s" in world.said[0]


@given(every_s=st.integers(1, 85), tells_time=st.booleans())
def test_holder_that_lives_on_is_never_taken_over(every_s, tells_time):
    world = World(tells_time=tells_time)
    holder = Beating(world, 10**6, every_s)
    with pytest.raises(HeldError, match="machine-a"):
        world.claim(UNATTENDED, holder.sleep)
    assert 180.0 <= world.clock.t <= 180.0 + every_s + 11.0
    holder.lease.renew()
    assert len(world.said) == 1


def test_each_next_holder_is_watched_anew_by_one_whom_nobody_would_start_again(world):
    """Another newcomer is faster, and dies at once."""
    first = Beating(world, 7, 22.5)

    def sleep(s: float) -> None:
        first.sleep(s)
        if world.clock.t > first.last + 90 and world.head().writer.epoch == 1:
            world.claim(replace(B, folder="c", host="machine-c"))

    assert world.claim(UNATTENDED, sleep).epoch == 3
    assert [one.host for one in world.head().epochs] == ["machine-a", "machine-c", "machine-b"]
    assert world.clock.t > 157.5 + 90 + 90


def test_beat_that_may_be_old_proves_nothing():
    """It was given before the newcomer was paused for long, and the store does not tell when."""
    world = World(tells_time=False)
    holder = Beating(world, 1, 4.0)

    def sleep(s: float) -> None:
        holder.sleep(s)
        if world.clock.t < 10:
            world.clock.t = 500.0

    assert world.claim(UNATTENDED, sleep).epoch == 2
    assert 590 < world.clock.t < 600


def test_holder_that_gives_the_run_back_meanwhile_is_followed_at_once(world):
    holder = world.claim()

    def sleep(s: float) -> None:
        world.clock.t += s
        if world.clock.t > 9 and not holder.released:
            holder.release("stopped by SIGTERM")

    assert world.claim(B, sleep).epoch == 2
    assert world.clock.t < 20


def test_two_who_wait_for_the_same_one(world):
    world.claim()
    second = []

    def sleep(s: float) -> None:
        world.clock.t += s
        if world.clock.t > 90 and not second:
            second.append(world.claim(replace(B, folder="c", host="machine-c")))

    with pytest.raises(HeldError, match="machine-c"):
        world.claim(B, sleep)
    second[0].renew()


def test_claimant_that_slept_through_another_ones_whole_life_takes_over(world):
    world.claim()

    def sleep(s: float) -> None:
        if world.clock.t == 0:
            world.clock.t = 100.0
            world.claim(replace(B, folder="c", host="machine-c"))  # and died
        world.clock.t = max(world.clock.t + s, 300.0)

    assert world.claim(B, sleep).epoch == 3


@pytest.mark.parametrize("kind", ["fail", "after", "late", "twice"])
@pytest.mark.parametrize("op", ["get", "create", "swap", "now"])
def test_fault_during_a_claim(world, kind, op):
    if op != "create":
        world.claim(A)
    world.clock.t = 80.0
    faults = [Fault(kind, op)]
    if op in ("get", "now"):

        def sleep(s: float) -> None:
            world.clock.t += s
            world.store.faults, faults[:] = world.store.faults + faults, []

    else:
        sleep, world.store.faults = None, list(faults)
    lease = world.claim(B, sleep)
    assert world.store.faults == []
    assert world.head() == lease.head
    for _ in list(world.store.late):
        world.store.deliver()
    lease.publish(noted(lease.head, "one"))
    assert world.head().status == {"notes": ["one"]}
    assert lease.epoch == (1 if op == "create" else 2)


def test_late_claim_that_arrives_after_the_second_try(world):
    """The first try arrives once the second one is under way, which then finds another version: its own."""
    world.store.faults = [Fault("late", "create")]
    creates = []

    def before(op: str, key: str) -> None:
        if op == "create":
            creates.append(key)
            if len(creates) == 2:
                world.store.deliver()

    world.store.before = before
    lease = world.claim()
    assert len(creates) == 2
    lease.renew()
    assert len({one.data for one in world.store.versions(KEY)}) == 2


def test_claim_that_went_through_and_was_taken_over_unnoticed(world):
    """The second try is another claim, with a token of its own."""
    world.store.faults = [Fault("after", "create")]

    def sleep(s: float) -> None:
        world.clock.t += 100.0
        if len(world.store.history) == 1:
            world.claim(B).release("finished")

    lease = world.claim(A, sleep)
    epochs = world.head().epochs
    assert [one.epoch for one in epochs] == [1, 2, 3]
    assert len({one.token for one in epochs}) == 3
    assert [one.host for one in epochs] == ["machine-a", "machine-b", "machine-a"]
    lease.renew()


def test_store_that_stays_away_ends_the_claim(world):
    world.claim()

    def sleep(s: float) -> None:
        world.clock.t += s
        world.store.faults = [Fault("fail", "get", times=10**6)]

    with pytest.raises(UnreachableError):
        world.claim(B, sleep)
    assert 55 < world.clock.t < 75


@pytest.mark.parametrize(("kind", "error"), [("fail", UnreachableError), ("denied", DeniedError)])
def test_store_that_is_away_at_first_is_not_waited_for(world, kind, error):
    world.store.faults = [Fault(kind, "get")]
    with pytest.raises(error):
        world.claim()
    assert world.clock.t == 0


def test_store_whose_writes_always_fail_ends_the_claim(world):
    world.store.faults = [Fault("fail", "create", times=10**6)]
    with pytest.raises(UnreachableError):
        world.claim()
    assert world.clock.t < 100


def test_store_that_always_finds_another_version_ends_the_claim(world, monkeypatch):
    def swap(key, data, etag):
        raise ChangedError("no")

    world.claim().release("finished")
    monkeypatch.setattr(world.store, "swap", swap)
    with pytest.raises(RefusedError, match="could not be claimed"):
        world.claim(B)


def test_wanted(world):
    with pytest.raises(
        RefusedError, match=r"model://runs/run: the run to resume from is not there; .*x1 runs"
    ):
        world.claim(wanted="there")
    assert world.store.objects == {}
    world.claim(wanted="absent").release("finished")
    with pytest.raises(RefusedError, match="--fresh"):
        world.claim(wanted="absent")
    assert world.claim(wanted="there").epoch == 2
    head = world.head()
    world.store.put(KEY, encode(replace(head, writer=replace(head.writer, state="trashed"))))
    with pytest.raises(RefusedError, match=r"in the trash; `x1 runs restore`"):
        world.claim(wanted="there")
    assert world.claim(wanted="absent").epoch == 3


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"schema_version":1,"kind":"mirror"}', b"\xff\x00"])
def test_damaged_head_is_refused_and_left_alone(world, data):
    world.store.put(KEY, data)
    with pytest.raises(RefusedError, match=r"model://runs/run/head.json: not the head of a mirrored run"):
        world.claim()
    assert world.store.content() == {KEY: data}


def test_newer_head_is_refused(world, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("x1_pretrain.mirror.head.SCHEMA_VERSION", 2)
        world.claim()
    with pytest.raises(RefusedError, match="update x1"):
        world.claim(B)


# --- decisions

WRITERS = st.builds(
    Writer,
    epoch=st.integers(1, 9),
    token=st.just("00000000"),
    folder=st.sampled_from(["folder-a", "folder-b"]),
    host=st.just("h"),
    pid=st.just(1),
    since_utc=st.just(""),
    stale_s=st.sampled_from([1.0, 90.0]),
    state=st.sampled_from(["writing", "released", "trashed"]),
)


@given(
    st.none() | st.builds(Head, st.just("run"), WRITERS),
    st.floats(0, 200),
    st.none() | st.floats(0, 500),
    st.booleans(),
)
def test_decision(head, silent_s, lived_s, unattended):
    decision = decide(head, silent_s, lived_s, replace(A, unattended=unattended))
    free = head is None or head.writer.state != "writing" or head.writer.folder == "folder-a"
    if free or silent_s > head.writer.stale_s:
        assert decision.do == "claim"
    else:
        lives = lived_s is not None and (not unattended or lived_s >= LIVES * head.writer.stale_s)
        assert decision.do == ("held" if lives else "wait")
        assert decision.wait_s == (0 if lives else head.writer.stale_s - silent_s)


@given(
    st.none() | st.builds(Head, st.just("run"), WRITERS, status=st.just({"a": 1}), trashed_utc=st.just("t"))
)
def test_claim_is_one_epoch_more(head):
    after = claimed(head, A, "12345678", "now")
    assert after.writer.epoch == (head.writer.epoch + 1 if head else 1)
    assert (after.epochs[-1].epoch, after.epochs[-1].token) == (after.writer.epoch, "12345678")
    assert after.writer.state == "writing"
    kept = head is not None and head.writer.state != "trashed"
    assert after.status == ({"a": 1} if kept else {})
    assert decode(encode(after), "") == after
