from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from x1_pretrain.stores.clock import KEPT_S, StoreClock
from x1_pretrain.stores.store import DeniedError, UnreachableError

THEN = datetime(2026, 11, 21, 12, tzinfo=UTC)


class Elsewhere:
    """A store whose clock is an hour behind, and a network that takes `way_s` in each direction."""

    def __init__(self, way_s: float = 0.0) -> None:
        self.here_s, self.way_s, self.asked, self.error = 1000.0, way_s, 0, None

    def probe(self) -> datetime:
        self.asked += 1
        self.here_s += self.way_s
        if self.error:
            raise self.error
        told = self.now()
        self.here_s += self.way_s
        return told

    def now(self) -> datetime:
        return THEN + timedelta(seconds=self.here_s)

    def clock(self) -> StoreClock:
        return StoreClock(self.probe, lambda: self.here_s)


def test_it_is_asked_once_a_minute_and_goes_on_between() -> None:
    store = Elsewhere(way_s=0.5)
    clock = store.clock()
    for _ in range(30):
        assert clock.now() == store.now()
        store.here_s += KEPT_S / 10
    assert store.asked in (3, 4)


def test_a_clock_that_is_set_is_noticed_within_a_minute() -> None:
    store = Elsewhere()
    clock = store.clock()
    clock.now()
    store.now = lambda: THEN + timedelta(days=1, seconds=store.here_s)  # type: ignore[method-assign]
    store.here_s += KEPT_S + 1
    assert clock.now() == store.now()


def test_where_nothing_may_be_written_there_is_no_clock() -> None:
    store = Elsewhere()
    store.error = DeniedError("no")
    assert store.clock().now() is None


def test_a_store_that_is_away_is_no_store_without_a_clock() -> None:
    store = Elsewhere()
    clock = store.clock()
    clock.now()
    store.here_s += KEPT_S + 1
    store.error = UnreachableError("away")
    with pytest.raises(UnreachableError):
        clock.now()
