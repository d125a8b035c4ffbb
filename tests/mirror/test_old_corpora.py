"""`x1 runs gc` and a run that comes for a corpus, in any order of requests: what a head names is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mirror.mirrored import mirror_run
from tests.mirror.run_folders import RunFolder
from tests.mirror.test_publisher import RUN_ID, corpus_at, lease_on
from tests.stores.model_store import Clock, ModelStore
from x1_pretrain.mirror import corpora, old_corpora
from x1_pretrain.mirror.corpora import FILES, GOING_S, MANIFEST, CorpusSender
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.publisher import Identity, Publisher
from x1_pretrain.mirror.sending import Rate

WEEK_S = 7 * 86_400.0


class World:
    """A mirror with an old corpus that no run names, and a run that begins with that corpus."""

    def __init__(self, root: Path) -> None:
        self.clock = Clock()
        self.store = ModelStore(self.clock)
        self.web = root / "web"
        self.mark = corpus_at(self.web, "a")
        self.place = f"data/{self.mark}"
        for name in (*FILES, MANIFEST):
            self.store.put(f"{self.place}/{name}", (self.web / name).read_bytes())
        mirror_run(self.store, "other")
        self.clock.t = WEEK_S + 1
        self.run = RunFolder(root / "tiny")
        self.publisher: Publisher | None = None

    def begin(self) -> None:
        lease = lease_on(self.store, self.clock)
        lease.resumed_from(0)
        job = self.run.job("model://runs", data=True, corpora={"web": str(self.web)})
        self.publisher = Publisher(job, self.store, lease, Identity(RUN_ID, 0, [self.mark]))
        self.publisher.corpora.pause()

    def sent(self) -> None:
        """To the end, in this thread."""
        if self.publisher is None:
            self.begin()
        assert self.publisher is not None
        for _ in range(3):
            self.publisher.look()
            self.publisher.wait(20)

    def gc(self) -> list[str]:
        found, trouble = old_corpora.old_corpora(self.store, self.clock.now(), WEEK_S)
        return trouble + old_corpora.delete(self.store, found, self.clock.steady)[1]

    def check(self) -> None:
        """What the head names can be fetched."""
        found = look(self.store, "tiny")
        assert found is not None
        assert found[0].data == {"web": self.mark}
        there = {key for key in self.store.objects if key.startswith("data/")}
        assert there == {f"{self.place}/{name}" for name in (*FILES, MANIFEST)}


def in_between(world: World, at: int, act: Callable[[], object]) -> Callable[[], bool]:
    """Do `act` before the store's operation number `at` from now; whether it was done."""
    count, done = 0, False

    def before(op: str, key: str) -> None:
        nonlocal count, done
        count += 1
        if count == at:
            done = True
            world.store.before = lambda op, key: None
            act()

    world.store.before = before
    return lambda: done


def test_a_gc_at_any_moment_of_a_session_that_begins(tmp_path: Path) -> None:
    at, done = 0, True
    while done:
        at += 1
        world = World(tmp_path / str(at))
        was_done = in_between(world, at, world.gc)
        world.sent()
        world.check()
        done = was_done()
    assert at > 10


def test_a_session_that_begins_at_any_moment_of_a_gc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the corpus then, and looks for it: what it finds to be going it sends once that is gone."""
    monkeypatch.setattr(corpora, "AGAIN_S", 0.001)
    at, done, spared, sent_anew = 0, True, 0, 0
    while done:
        at += 1
        world = World(tmp_path / str(at))

        def begins(world: World = world) -> None:
            world.begin()
            assert world.publisher is not None
            world.publisher.look()  # and now its thread is on its way
            world.publisher.wait(0.05)

        was_done = in_between(world, at, begins)
        said = world.gc()
        done = was_done()
        spared += any("a run names it by now" in line for line in said)
        sent_anew += f"{world.place}/train.bin" not in world.store.objects
        world.sent()
        world.check()
    assert spared > 3
    assert sent_anew > 3


def test_a_gc_that_was_killed_holds_nobody_up_for_long(tmp_path: Path) -> None:
    world = World(tmp_path)

    def dies(op: str, key: str) -> None:
        if op == "delete" and key.endswith("train.bin"):
            raise KeyboardInterrupt

    world.store.before = dies
    with pytest.raises(KeyboardInterrupt):
        world.gc()
    world.store.before = lambda op, key: None
    assert f"{world.place}/{MANIFEST}" not in world.store.objects
    assert "another `x1 runs gc` deletes it" in world.gc()[0]
    world.clock.sleep(GOING_S + 1)
    world.sent()
    world.check()
    again = World(tmp_path / "again")
    again.store.put(f"{again.place}/going", b"of one that was killed")
    again.clock.sleep(GOING_S + 1)
    assert again.gc() == []
    assert not [key for key in again.store.objects if key.startswith("data/")]


def test_a_gc_that_slept_deletes_nothing(tmp_path: Path) -> None:
    """Others may have taken its sign for one that was left behind."""
    world = World(tmp_path)
    there = {key for key in world.store.objects if key.startswith("data/")}

    def sleeps(op: str, key: str) -> None:
        if op == "names" and key == "trash":
            world.clock.sleep(GOING_S)

    found, _ = old_corpora.old_corpora(world.store, world.clock.now(), WEEK_S)
    world.store.before = sleeps
    gone, said = old_corpora.delete(world.store, found, world.clock.steady)
    assert (gone, len(said)) == ([], 1)
    assert "took too long" in said[0]
    assert there <= set(world.store.objects)


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_sign_is_watched_where_the_store_does_not_tell_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_over: bool
) -> None:
    """It is one that was left behind once it was the same for long enough; another gc's is another."""
    monkeypatch.setattr(corpora, "AGAIN_S", 0.001)
    world, looks = World(tmp_path), 0
    world.store.tells_time = False
    world.store.put(f"{world.place}/going", b"of one that was killed")
    world.store.delete([f"{world.place}/{MANIFEST}"])

    def waits(op: str, key: str) -> None:
        nonlocal looks
        if (op, key) == ("stat", f"{world.place}/going"):
            looks += 1
            world.clock.sleep(GOING_S / 2)
            if taken_over and looks == 3:
                world.store._write(key, b"of another")

    world.store.before = waits
    sender = CorpusSender(world.store, {"web": str(world.web)}, {}, Rate(None), steady=world.clock.steady)
    sender.go_on()
    sender.wait(10)
    assert (sender.busy, sender.whole) == (False, {"web": world.mark})
    assert looks == (6 if taken_over else 4)
    assert f"{world.place}/going" not in world.store.objects


def test_a_sender_that_is_told_to_end_does_not_wait_for_gc(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.put(f"{world.place}/going", b"")
    sender = CorpusSender(world.store, {"web": str(world.web)}, {}, Rate(None))
    sender.go_on()
    sender.wait(0.05)
    assert sender.busy
    sender.stop()
    sender.wait(10)
    assert (sender.busy, sender.whole, sender.left()) == (False, {}, ["web"])
