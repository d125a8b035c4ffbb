"""The lease in its holder's hands, case by case. Every interleaving of several: test_lease_machine.py."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from tests.mirror.lease_world import KEY, A, B, World, noted
from tests.stores.model_store import Fault
from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.claim import UNSAID
from x1_pretrain.mirror.head import Head, Published, Writer, encode
from x1_pretrain.mirror.heads import look, silence_s
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.lease import LostError
from x1_pretrain.stores.store import DeniedError, NotThereError, UnreachableError


@pytest.fixture
def world() -> World:
    return World()


def test_every_write_is_another_beat(world):
    lease = world.claim()
    for beat in range(1, 4):
        world.clock.t += 15.0
        head = lease.publish(lease.head)
        assert head == lease.head == world.head()
        assert head.writer.beat == beat
        assert head.writer.beat_utc == world.clock.utc()
    found = look(world.store, "run")
    assert found is not None
    world.clock.t += 4.0
    assert silence_s(world.store, found[1]) == 4.0


def test_lease_keeps_name_writer_and_epochs(world):
    lease = world.claim()
    foreign = Head("other", Writer(9, "x", "x", "x", 1, "x"), status={"step": 1})
    head = lease.publish(foreign)
    assert (head.name, head.writer.epoch, head.status) == ("run", 1, {"step": 1})
    assert head.epochs == lease.head.epochs
    assert world.store.versions(KEY)[-1].data == encode(head)


def test_resumed_from_is_published_with_the_next_head(world):
    lease = world.claim()
    assert lease.head.epochs[-1].from_step == UNSAID
    derived = noted(lease.head, "made before")
    lease.resumed_from(1200)
    assert lease.publish(derived).epochs[-1].from_step == 1200
    assert world.head().epochs[-1].from_step == 1200


def test_resumed_from_survives_a_write_in_doubt(world):
    lease = world.claim()
    world.store.faults = [Fault("after", "swap")]
    with pytest.raises(UnreachableError):
        lease.renew()
    lease.resumed_from(7)
    lease.settle()
    assert lease.head.epochs[-1].from_step == 7
    lease.renew()
    assert world.head().epochs[-1].from_step == 7


def test_session_that_never_said_where_it_went_on_gave_nothing_up(world):
    first = world.claim()
    first.resumed_from(0)
    first.release("finished")
    second = world.claim(B)
    assert not second.head.of_losing_branch(1, 500)
    second.resumed_from(400)
    assert second.publish(second.head).of_losing_branch(1, 500)
    assert not second.head.of_losing_branch(1, 400)


def test_checkpoint_is_not_published_before_it_is_said_where_it_went_on(world):
    lease = world.claim()
    step = Published(10, 1, "p", 1, "", "", "")
    with pytest.raises(AssertionError, match="resumed_from"):
        lease.publish(replace(lease.head, checkpoints=[step]))
    lease.resumed_from(0)
    lease.publish(replace(lease.head, checkpoints=[step]))


def test_lost_to_another_one(world):
    lease = world.claim()
    world.clock.t += 100.0
    world.claim(B)
    for _ in range(2):
        with pytest.raises(LostError) as lost:
            lease.publish(lease.head)
        assert str(lost.value) == (
            "run: machine-b (process 22, epoch 2) has taken over this run since 2026-11-21T12:01:40Z; "
            "this copy stops and publishes nothing more"
        )
        assert lost.value.exit_code == 78
    with pytest.raises(LostError):
        lease.release("finished")
    assert world.head().writer.epoch == 2


def test_lost_to_one_who_has_left_again(world):
    lease = world.claim()
    world.clock.t += 100.0
    world.claim(B).release("finished")
    with pytest.raises(LostError, match="had taken over this run, and has given it back"):
        lease.renew()


def test_lost_to_the_trash_or_to_a_broom(world):
    lease = world.claim()
    head = world.head()
    trashed = replace(head, writer=replace(head.writer, state="trashed"), trashed_utc="2026-11-21T12:00:07Z")
    world.store.put(KEY, encode(trashed))
    with pytest.raises(LostError, match="was moved to the trash since 2026-11-21T12:00:07Z"):
        lease.renew()
    world.store.delete([KEY])
    wears_out(world, lease, "its mirror model://runs/run was removed")
    second = world.claim()
    world.store.put(KEY, b"x")
    wears_out(world, second, "can't be read any more")
    assert world.store.content() == {KEY: b"x"}


def wears_out(world, lease, match):
    """Not believed at once, and not after many reads in a moment."""
    for _ in range(30):
        with pytest.raises(UnreachableError):
            lease.renew()
    world.clock.t += 301.0
    with pytest.raises(LostError, match=match):
        lease.renew()


@pytest.mark.parametrize("wrong", ["not there", "damaged"])
def test_a_store_that_denies_the_head_for_a_moment_does_not_end_training(world, wrong):
    lease = world.claim()
    world.store.faults = [Fault("fail", "swap")]
    with pytest.raises(UnreachableError):
        lease.renew()
    real, wrongly = world.store.get, iter(range(3))

    def get(key):
        data, meta = real(key)
        if next(wrongly, None) is None:
            return data, meta
        if wrong == "not there":
            raise NotThereError(key)
        return b"<html>", meta

    world.store.get = get
    with pytest.raises(UnreachableError, match=wrong):
        lease.renew()
    for _ in range(3):
        try:
            lease.renew()
            break
        except UnreachableError:
            world.clock.t += 400.0
    assert lease.renew() == world.head()


def test_lost_to_a_copy_of_itself(world):
    lease = world.claim()
    copy = replace(lease, _sent=set(lease._sent))
    copy.renew()
    copy.renew()
    with pytest.raises(LostError, match="another process writes as this very session"):
        lease.renew()
    copy.renew()


def test_copy_of_itself_at_the_very_same_beat(world):
    """Two equal writes: the second one can't tell, and needs not; the third parts them."""
    lease = world.claim()
    copy = replace(lease, _sent=set(lease._sent))
    copy.publish(noted(copy.head, "copy"))
    with pytest.raises(LostError):
        lease.publish(noted(lease.head, "original"))


@pytest.mark.parametrize("kind", ["fail", "after", "late", "twice"])
def test_write_in_doubt_is_found_out_and_nothing_is_lost_or_twice(world, kind):
    lease = world.claim()
    world.store.faults = [Fault(kind, "swap")]
    try:
        lease.publish(noted(lease.head, "one"))
        told = True
    except UnreachableError:
        told = False
    assert told == (kind == "twice")
    lease.settle()
    went_through = kind in ("after", "twice")
    assert ("notes" in lease.head.status) == went_through
    assert lease.head == world.head()
    second = noted(lease.head, "two")
    for _ in list(world.store.late):
        world.store.deliver()
    lease.publish(second)
    assert world.head().status["notes"] == (["one", "two"] if went_through else ["two"])
    assert world.head() == lease.head


def test_two_writes_in_doubt_arrive_in_either_order(world):
    for order in ([0, 0], [1, 0]):
        lease = world.claim(replace(A, pid=len(world.store.history)))
        for note in "ab":
            world.store.faults = [Fault("late", "swap")]
            with pytest.raises(UnreachableError):
                lease.publish(noted(lease.head, note))
        for which in order:
            world.store.deliver(which)
        assert world.head().status["notes"] == [["a"], ["b"]][order[0]]
        lease.settle()
        assert lease.head == world.head()
        lease.publish(replace(lease.head, status={}))
        assert world.head().status == {}


def test_write_in_doubt_and_taken_over_since(world):
    lease = world.claim()
    world.store.faults = [Fault("late", "swap")]
    with pytest.raises(UnreachableError):
        lease.publish(noted(lease.head, "late"))
    world.clock.t += 100.0
    second = world.claim(B)
    world.store.deliver()
    second.renew()
    with pytest.raises(LostError, match="machine-b"):
        lease.settle()
    assert world.head().status == {}


def test_no_two_writes_are_alike_whether_they_went_through_or_not(world):
    lease = world.claim()
    for kind in ("fail", "after"):
        world.store.faults = [Fault(kind, "swap")]
        with pytest.raises(UnreachableError):
            lease.renew()
    assert lease.renew().writer.beat == 3


def test_older_head_that_somebody_put_back(world):
    lease = world.claim()
    older = world.store.content()[KEY]
    lease.publish(noted(lease.head, "one"))
    world.store.put(KEY, older)
    with pytest.raises(LostError, match=r"an older head\.json was put back"):
        lease.renew()
    assert world.store.content()[KEY] == older


def test_looking_back_may_fail_as_well(world):
    lease = world.claim()
    world.store.faults = [Fault("twice", "swap"), Fault("fail", "get", times=3)]
    for _ in range(3):
        with pytest.raises(UnreachableError):
            lease.publish(noted(lease.head, "one"))
    lease.settle()
    assert lease.head.status == {"notes": ["one"]}
    assert lease.head == world.head()


def test_interrupted_write_is_in_doubt(world):
    lease = world.claim()

    def before(op: str, key: str) -> None:
        if op == "swap":
            raise KeyboardInterrupt

    world.store.before = before
    with pytest.raises(KeyboardInterrupt):
        lease.renew()
    world.store.before = lambda op, key: None
    reads = len(world.store.operations)
    lease.renew()
    assert world.store.operations[reads:] == [("get", KEY), ("swap", KEY)]
    lease.renew()
    assert world.store.operations[reads + 2 :] == [("swap", KEY)]


def test_store_that_says_no_is_not_a_lost_lease(world):
    lease = world.claim()
    world.store.faults = [Fault("denied", "swap")]
    with pytest.raises(DeniedError):
        lease.renew()
    lease.renew()


def test_equal_content_under_another_version_is_still_ours(world):
    """A store whose versions move on without us (a repository that got another commit)."""
    lease = world.claim()
    data, meta = world.store.objects[KEY]
    world.store.objects[KEY] = data, replace(meta, etag="moved on")
    lease.renew()
    assert world.head() == lease.head


# --- giving it back


def test_release_in_doubt_that_went_through_and_was_followed(world):
    lease = world.claim()
    world.store.faults = [Fault("after", "swap")]
    with pytest.raises(UnreachableError):
        lease.release("finished")
    assert not lease.released
    second = world.claim(B)
    assert world.clock.t == 0
    lease.release("finished")
    assert lease.released
    second.renew()
    lease.release("again")
    assert world.head().writer.epoch == 2


@pytest.mark.parametrize("kind", ["fail", "after", "late", "twice"])
def test_release_that_is_tried_again(world, kind):
    lease = world.claim()
    world.store.faults = [Fault(kind, "swap")]
    if kind == "twice":
        lease.release("finished")
    else:
        with pytest.raises(UnreachableError):
            lease.release("finished")
        lease.release("finished")
    for _ in list(world.store.late):
        world.store.deliver()
    assert world.head().writer.state == "released"
    assert world.claim(B).epoch == 2


def test_take_over_that_was_faster_than_the_release(world):
    lease = world.claim()
    world.clock.t += 100.0

    def before(op: str, key: str) -> None:
        if op == "swap":
            world.store.before = lambda op, key: None
            world.claim(B)

    world.store.before = before
    with pytest.raises(LostError, match="machine-b"):
        lease.release("finished")
    assert world.head().writer.state == "writing"


def test_release_that_was_faster_than_the_take_over(world):
    lease = world.claim()
    world.clock.t += 100.0

    def before(op: str, key: str) -> None:
        if op == "swap":
            world.store.before = lambda op, key: None
            lease.release("finished")

    world.store.before = before
    second = world.claim(B)
    assert second.epoch == 2
    assert second.before is not None
    assert second.before.writer.state == "released"


def test_nothing_is_published_after_it_was_given_back(world):
    lease = world.claim()
    lease.release("finished")
    with pytest.raises(AssertionError):
        lease.publish(lease.head)


def test_no_sign_of_life_after_it_was_given_back(world):
    lease = world.claim(replace(A, stale_s=0.04))
    keeper = Keeper(lease, clock=iter(range(6)).__next__, asleep=lambda: lease.release("over"))
    with suppress(StopIteration):  # time ends
        keeper._keep()
    assert world.head().writer.state == "released"


# --- a store that can't keep two writers apart


def test_store_without_conditional_writes_is_refused():
    world = World(conditional=False)
    with pytest.raises(RefusedError, match=r"no conditional writes.*mirror\.without_lease: true"):
        world.claim()
    assert world.store.objects == {}


def test_store_without_conditional_writes_at_your_own_risk():
    world = World(conditional=False)
    lease = world.claim(without_lease=True)
    assert "no conditional writes" in world.said[0]
    lease.publish(noted(lease.head, "one"))
    world.clock.t += 100.0
    second = world.claim(B, without_lease=True)
    second.publish(noted(second.head, "two"))
    with pytest.raises(LostError, match="machine-b"):
        lease.renew()
    assert world.head().status == {"notes": ["one", "two"]}
    for kind in ("after", "fail"):
        world.store.faults = [Fault(kind, "put")]
        with pytest.raises(UnreachableError):
            second.renew()
        second.renew()
    second.release("finished")
    assert world.claim(without_lease=True).epoch == 3


def test_without_lease_changes_nothing_where_there_is_one(world):
    world.claim(without_lease=True)
    assert world.said == []
    assert ("create", KEY) in world.store.operations
