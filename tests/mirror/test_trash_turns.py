"""`x1 runs gc` and `x1 runs restore` of the same entry, in any order of requests: what came back is whole."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from typing import TypeVar

import pytest

from tests.mirror.mirrored import mirror_run, writer
from tests.stores.model_store import Clock, ModelStore
from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror import trash
from x1_pretrain.mirror.heads import look
from x1_pretrain.stores.store import Meta, NotThereError

T = TypeVar("T")
NOW = datetime(2026, 11, 21, 13, 0, tzinfo=UTC)
WEEK_S = 7 * 86_400.0


class Staging(ModelStore):
    """As the Hub: what is put and deleted waits for the next conditional write, listing or `close`."""

    def put(self, key: str, data: bytes) -> Meta:
        self.waiting()[key] = data
        return Meta(key, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest(), self.clock.now())

    def delete(self, keys: object) -> None:
        self.waiting().update(dict.fromkeys(keys))  # type: ignore[call-overload]

    def close(self) -> None:
        self._do("close", "", lambda: None)

    def waiting(self) -> dict[str, bytes | None]:
        return self.__dict__.setdefault("_staged", {})

    def _do(self, op: str, key: str, act: Callable[[], T]) -> T:
        return super()._do(op, key, lambda: self._committing(op, act))

    def _committing(self, op: str, act: Callable[[], T]) -> T:
        result = act() if op in ("create", "swap") else None
        if op not in ("get", "stat", "now"):
            for key, data in self.waiting().items():
                self._drop(key) if data is None else self._write(key, data)
            self.waiting().clear()
        return act() if result is None else result

    def _at(self, key: str) -> tuple[bytes, Meta]:
        if self.waiting().get(key, b"") is None:
            raise NotThereError(key)
        return super()._at(key)


class Actor:
    """Does something to a store of its own, in a thread of its own; `go` lets it do so many operations."""

    def __init__(self, store: ModelStore, act: Callable[[ModelStore], object]) -> None:
        self.refused, self.over = "", False
        self._may, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        store.before = lambda op, key: self._wait()
        threading.Thread(target=self._run, args=(store, act), daemon=True).start()
        self._waits.acquire()

    def _wait(self) -> None:
        self._waits.release()
        self._may.acquire()

    def _run(self, store: ModelStore, act: Callable[[ModelStore], object]) -> None:
        try:
            act(store)
            store.close()
        except RefusedError as error:
            self.refused = str(error)
        finally:
            self.over = True
            self._waits.release()

    def go(self, operations: int = 1_000_000) -> int:
        for done in range(operations):
            if self.over:
                return done
            self._may.release()
            self._waits.acquire()
        return operations


def throw(store: ModelStore, now: datetime = NOW) -> str:
    found = look(store, "tiny")
    assert found is not None
    return trash.throw_away(store, found[0], found[1].etag, now, "desk")


class World:
    """A run in the trash that is to go. `since`: its head is as it was left, or was removed by hand, or is
    that of a later run of the name, live or in the trash."""

    def __init__(self, kind: type[ModelStore], since: str) -> None:
        clock = Clock()
        self.store = ModelStore(clock)
        self.head = mirror_run(self.store, steps=())
        self.objects = {key for key in self.store.objects if key.startswith("tiny/e")}
        throw(self.store)
        clock.sleep(WEEK_S + 1)
        if since == "removed":
            self.store.delete(["tiny/head.json"])
        elif since in ("later", "live"):
            mirror_run(self.store, run_id="tiny-2", steps=(), who=writer(epoch=2, token="bbbb2222"))
            if since == "later":
                throw(self.store, NOW + timedelta(days=6))
        (self.entry,) = trash.find(self.store, "tiny-1")
        found, trouble = trash.doomed(self.store, clock.now(), WEEK_S)
        (doomed,) = [one for one in found if one.what == self.entry.entry]
        assert trouble == []
        self.others = set(self.store.objects) - self.objects
        self.gc = Actor(kind(clock, objects=self.store.objects), lambda store: trash.delete(store, doomed))
        self.restore = Actor(kind(clock, objects=self.store.objects), self.restores)

    def restores(self, store: ModelStore) -> None:
        trash.put_back(store, self.entry, "desk")

    def check(self) -> bool:
        """Whether the run came back: then all of it is there, else nothing of it. What others have stays."""
        assert self.gc.over
        assert self.restore.over
        there = set(self.store.objects)
        head = look(self.store, "tiny")
        back = bool(head and head[0].run_id == "tiny-1" and not head[0].trashed)
        assert back == (not self.restore.refused)
        assert there & self.objects == (self.objects if back else set())
        assert there - self.objects == self.others - {self.entry.key} | {"tiny/head.json"}
        return back


class Live(World):
    """There is a run of the name until then."""

    def restores(self, store: ModelStore) -> None:
        self.others.add(throw(store, NOW + timedelta(days=8)))
        super().restores(store)


class Again(World):
    """Restored, and thrown away once more: then it is in the trash whole."""

    def restores(self, store: ModelStore) -> None:
        super().restores(store)
        throw(store, NOW + timedelta(days=8))

    def check(self) -> bool:
        assert self.gc.over
        assert self.restore.over
        back = not self.restore.refused
        assert ("tiny-1" in {one.head.run_id for one in trash.find(self.store, "tiny")}) == back
        assert set(self.store.objects) & self.objects == (self.objects if back else set())
        return back


def all_turns(world: Callable[[], World]) -> set[bool]:
    """How it ends: each does so many operations, the one, the other, then the one its rest, and the other."""
    most = range(world().gc.go() + 1), range(world().restore.go() + 1)
    ends = set()
    for done, (of_gc, of_restore) in product((1, -1), product(*most)):
        w = world()
        for actor, count in [(w.gc, of_gc), (w.restore, of_restore)][::done]:
            actor.go(count)
        for actor in (w.gc, w.restore)[::done]:
            actor.go()
        ends.add(w.check())
    return ends


@pytest.mark.parametrize("kind", [ModelStore, Staging])
@pytest.mark.parametrize("since", ["left", "removed", "later"])
def test_restored_while_gc_deletes_it(kind: type[ModelStore], since: str) -> None:
    assert all_turns(partial(World, kind, since)) == {True, False}


@pytest.mark.parametrize("kind", [ModelStore, Staging])
def test_restored_in_place_of_another_while_gc_deletes_it(kind: type[ModelStore]) -> None:
    assert all_turns(partial(Live, kind, "live")) == {True, False}


@pytest.mark.parametrize("kind", [ModelStore, Staging])
@pytest.mark.parametrize("since", ["left", "later"])
def test_restored_and_thrown_away_again_while_gc_deletes_it(kind: type[ModelStore], since: str) -> None:
    assert all_turns(partial(Again, kind, since)) == {True, False}
