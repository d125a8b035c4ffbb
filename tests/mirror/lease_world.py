"""A store in memory with its clock, two who want to write a run, and what they were told."""

from __future__ import annotations

from dataclasses import replace

from tests.stores.model_store import Clock, ModelStore
from x1_pretrain.mirror.claim import Me
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.heads import head_key, look
from x1_pretrain.mirror.lease import Lease

KEY = head_key("run")
A = Me("run", "folder-a", "machine-a", 11)
B = Me("run", "folder-b", "machine-b", 22)


class World:
    """A store, its clock, and what was said."""

    def __init__(self, **settings):
        self.clock, self.said = Clock(), []
        self.store = ModelStore(self.clock, **settings)

    def claim(self, me: Me = A, sleep=None, **how) -> Lease:
        clock = self.clock
        return Lease.claim(
            self.store,
            me,
            sleep=sleep or clock.sleep,
            steady=clock.steady,
            now_utc=clock.utc,
            say=self.said.append,
            **how,
        )

    def head(self) -> Head:
        found = look(self.store, "run")
        assert found is not None
        return found[0]


def noted(head: Head, note: str) -> Head:
    return replace(head, status={"notes": [*head.status.get("notes", []), note]})
