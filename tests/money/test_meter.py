"""The meter: closed forms over restarts, boots, clocks that jump, prices that change, bills that say more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.money.account import account
from x1_pretrain.money.clock import stamp
from x1_pretrain.money.ledger import plain
from x1_pretrain.money.meter import Meter, hourly_storage_usd

NOON = datetime(2026, 5, 23, 12, tzinfo=UTC)
RATE = Decimal("1.20")


@dataclass
class Hands:
    """A clock that is set by hand: the steady seconds, and how wrong the wall is."""

    s: float = 1000.0
    wall_wrong_s: float = 0.0
    boot: str = "first"
    began_s: float = 1000.0

    def steady_s(self) -> float:
        return self.s

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.s - self.began_s + self.wall_wrong_s)

    def rebooted(self, away_s: float) -> None:
        self.began_s = self.began_s - self.s - away_s + 5
        self.s, self.boot = 5.0, self.boot + "'"


@dataclass
class Watched:
    """A ledger of one machine and its meter, as a sidecar keeps them."""

    clock: Any
    rows: list[dict[str, Any]]
    meter: Meter

    @classmethod
    def begun(cls, clock: Any, rows: list[dict[str, Any]] | None = None) -> Watched:
        first = plain({"event": "intent", "tag": "a", "provider": "runpod", "usd_per_hr": RATE})
        rows = rows or [first | {"time_utc": stamp(clock.now())}]
        return cls(clock, rows, Meter.resumed(account(rows).machines[-1], rows, clock))

    def poll(self, rate: Decimal = RATE, billed: Decimal | None = None) -> Decimal:
        self.meter.count(rate, self.clock.steady_s())
        self.meter.at_least(billed)
        said = {"machine_usd": round(self.meter.usd, 6), "usd_per_hr": rate, "spent_usd": self.meter.usd}
        self.rows.append(plain({"event": "poll", "tag": "a", "time_utc": stamp(self.clock.now()), **said}
                               | self.meter.fields(self.clock)))  # fmt: skip
        return self.meter.usd

    def restarted(self) -> Watched:
        return Watched.begun(self.clock, self.rows)


@pytest.fixture
def clock() -> Hands:
    return Hands()


def near(amount: Decimal, expected: str) -> bool:
    return abs(amount - Decimal(expected)) < Decimal("0.00001")


def test_an_hour_costs_its_price(clock: Hands) -> None:
    watched = Watched.begun(clock)
    for _ in range(12):
        clock.s += 300
        watched.poll()
    assert near(watched.meter.usd, "1.20")


def test_the_time_before_the_first_poll_counts(clock: Hands) -> None:
    watched = Watched.begun(clock)
    clock.s += 1800
    assert near(watched.restarted().meter.usd, "0.60")


def test_the_time_while_no_sidecar_lived_counts_at_the_dearest_price(clock: Hands) -> None:
    watched = Watched.begun(clock)
    clock.s += 3600
    watched.poll(Decimal("2.40"))
    clock.s += 1800
    watched.poll(Decimal("1.20"))
    clock.s += 3600
    assert near(watched.meter.usd, "3.60")
    assert near(watched.restarted().meter.usd, "6.00")


@pytest.mark.parametrize("wrong_s", [-86_400, -400, 400, 86_400])
def test_a_wall_clock_that_jumps_changes_nothing_on_the_same_boot(clock: Hands, wrong_s: float) -> None:
    watched = Watched.begun(clock)
    clock.s += 1800
    watched.poll()
    clock.wall_wrong_s = wrong_s
    clock.s += 1800
    assert near(watched.poll(), "1.20")
    clock.wall_wrong_s = 0
    clock.s += 1800
    assert near(watched.restarted().poll(), "1.80")


def test_over_a_reboot_the_wall_clock_counts(clock: Hands) -> None:
    watched = Watched.begun(clock)
    clock.s += 3600
    watched.poll()
    clock.rebooted(away_s=1800)
    again = watched.restarted()
    assert near(again.meter.usd, "1.80")
    clock.s += 1800
    assert near(again.poll(), "2.40")
    assert near(again.restarted().meter.usd, "2.40")


def test_a_wall_clock_set_back_over_a_reboot_lowers_nothing(clock: Hands) -> None:
    watched = Watched.begun(clock)
    clock.s += 3600
    watched.poll()
    clock.rebooted(away_s=-7200)
    again = watched.restarted()
    assert near(again.meter.usd, "1.20")
    clock.s += 3600
    assert near(again.poll(), "2.40")


def test_a_boot_of_the_same_name_that_is_younger_is_another(clock: Hands) -> None:
    """Where a system names no boot, a steady clock that went back tells."""
    watched = Watched.begun(clock)
    clock.s += 3600
    watched.poll()
    clock.rebooted(away_s=1800)
    clock.boot = "first"
    assert near(watched.restarted().meter.usd, "1.80")


def test_a_price_that_changed_between_two_polls_counts_dearer(clock: Hands) -> None:
    watched = Watched.begun(clock)
    clock.s += 3600
    assert near(watched.poll(Decimal("1.50")), "1.50")
    clock.s += 3600
    assert near(watched.poll(Decimal("1.00")), "3.00")
    clock.s += 3600
    assert near(watched.poll(Decimal("1.00")), "4.00")


def test_a_silent_hour_counts_at_the_dearest_price_around_it(clock: Hands) -> None:
    meter = Watched.begun(clock).meter
    meter.count(Decimal("2.40"), 1000.0)
    meter.count(RATE, 4600.0, said=False)
    assert near(meter.usd, "2.40")
    meter.count(RATE, 8200.0, said=False)
    assert near(meter.usd, "3.60")
    meter.count(Decimal("3.00"), 11_800.0)
    assert near(meter.usd, "9.00")


def test_what_was_billed_counts_where_it_is_more(clock: Hands) -> None:
    watched = Watched.begun(clock)
    clock.s += 3600
    assert near(watched.poll(billed=Decimal("0.90")), "1.20")
    assert near(watched.poll(billed=Decimal("1.45")), "1.45")
    assert not watched.meter.at_least(Decimal("1.45"))
    assert not watched.meter.at_least(None)
    clock.s += 3600
    assert near(watched.restarted().poll(), "2.65")


def test_a_steady_clock_that_stands_or_goes_back_costs_nothing_twice(clock: Hands) -> None:
    watched = Watched.begun(clock)
    for s in (1000.0, 4600.0, 4000.0, 4600.0, 8200.0):
        clock.s = s
        watched.poll()
    assert near(watched.meter.usd, "2.40")


def test_a_disk_by_the_month() -> None:
    assert hourly_storage_usd(Decimal("0.10"), 200) * 720 == 20
    assert hourly_storage_usd(Decimal("0.10"), 0) == 0


steps = st.lists(
    st.tuples(st.integers(0, 7200), st.sampled_from(["poll", "restart", "reboot"]), st.integers(0, 300),
              st.none() | st.integers(0, 3000), st.integers(-10_000, 10_000)),
    max_size=12,
)  # fmt: skip


@given(steps)
def test_it_never_falls_and_never_counts_less_than_the_cheapest_price_of_all_the_time(script: Any) -> None:
    clock, cheapest, total_s = Hands(), RATE, 0
    watched = Watched.begun(clock)
    for seconds, what, price, billed, jump in script:
        before = watched.meter.usd
        clock.s += seconds
        total_s += seconds
        if what == "reboot":  # the wall clock is right: it is the only one left
            clock.wall_wrong_s = 0
            watched.poll()
            clock.rebooted(away_s=60)
            total_s += 60
        elif what == "poll":
            rate = Decimal(price) / 100
            watched.poll(rate, None if billed is None else Decimal(billed) / 100)
            cheapest = min(cheapest, rate)
            clock.wall_wrong_s = jump
        if what != "poll":
            watched = watched.restarted()
        assert watched.meter.usd >= before - Decimal("0.000001")
    clock.s += 60
    watched.meter.count(RATE, clock.s)
    assert watched.meter.usd >= cheapest * (total_s + 59) / 3600 - Decimal("0.01")
