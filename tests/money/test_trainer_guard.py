"""What the trainer's guard knows at its start and how old it takes a reading to be: with clocks that jump."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from x1_pretrain.errors import RefusedError
from x1_pretrain.money.budget_file import Address
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import Limits
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.trainer_guard import TrainerGuard
from x1_pretrain.money.watched_file import WatchedFile

NOON = datetime(2026, 5, 23, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Hands(Clock):
    """Moved by hand: `pass_` lets time go by, `jump` sets the wall clock alone."""

    hands: Any = None

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.hands["wall"])

    def steady_s(self) -> float:
        return float(self.hands["steady"])

    def pass_(self, seconds: float) -> None:
        self.hands["wall"] += seconds
        self.hands["steady"] += seconds

    def jump(self, seconds: float) -> None:
        self.hands["wall"] += seconds


@pytest.fixture
def clock() -> Hands:
    return Hands(hands={"wall": 0.0, "steady": 1000.0})


def say(file: Path, clock: Hands, spent: str, rate: str = "1.20", age_s: float = 0) -> None:
    when = stamp(clock.now() - timedelta(seconds=age_s))
    tree = {"spent_usd": float(spent), "rate_usd_per_hr": float(rate), "last_update_utc": when}
    file.write_text(json.dumps(tree))


def made(folder: Path, clock: Hands) -> TrainerGuard:
    ledger = Ledger(folder / "ledger.jsonl", clock)
    limits = Limits(Decimal(35), Decimal(0), Decimal(30))
    file = WatchedFile(Address(str(folder / "budget.json")), clock, 1800, 660)
    notifier = Notifier([], ledger, clock, run="r", say=lambda _: None)
    return TrainerGuard("r", folder, file, limits, ledger, clock, notifier, lambda *_: None)


@pytest.mark.parametrize("jump_s", [86_400, -86_400])
def test_a_reading_gets_no_older_by_a_clock_that_jumps(tmp_path: Path, clock: Hands, jump_s: float) -> None:
    say(tmp_path / "budget.json", clock, "10", age_s=120)
    found = made(tmp_path, clock)
    assert found.first(None).age_s == 120
    clock.jump(jump_s)
    clock.pass_(60)
    reading = found.file.read_now()
    if jump_s < 0:  # the file's time is in the future now: no reading, and the old one only ages
        assert reading is None
        assert "in the future" in str(found.file.problem)
    else:
        assert reading is not None
        assert clock.steady_s() - reading.at_s == 180
    decision = found.look()
    assert decision is not None
    assert decision.age_s == 180


def test_a_relaunch_counts_the_time_that_nobody_counted(tmp_path: Path, clock: Hands) -> None:
    """The amount stands still though its time goes on: held against its rate since it was last known."""
    file = tmp_path / "budget.json"
    say(file, clock, "10")
    made(tmp_path, clock).first(None)
    clock.pass_(1800)
    say(file, clock, "10")
    assert made(tmp_path, clock).first(Decimal("1.20")).spent_usd == Decimal("10.60")


def test_an_amount_that_moves_has_a_writer_that_counts(tmp_path: Path, clock: Hands) -> None:
    """A machine that was away costs nothing meanwhile, and its honest watcher says so."""
    file = tmp_path / "budget.json"
    say(file, clock, "10")
    made(tmp_path, clock).first(None)
    clock.pass_(1800)
    say(file, clock, "10.10")
    assert made(tmp_path, clock).first(Decimal("1.20")).spent_usd == Decimal("10.10")


def test_between_two_machines_nothing_is_counted(tmp_path: Path, clock: Hands) -> None:
    file = tmp_path / "budget.json"
    say(file, clock, "10")
    first = made(tmp_path, clock)
    first.first(None)
    first.ledger.append("terminate_confirmed", tag="x", machine_id="x")
    clock.pass_(1800)
    say(file, clock, "10")
    assert made(tmp_path, clock).first(Decimal("1.20")).spent_usd == Decimal("10")


def test_at_most_an_hour_is_made_up_for(tmp_path: Path, clock: Hands) -> None:
    file = tmp_path / "budget.json"
    say(file, clock, "10")
    made(tmp_path, clock).first(None)
    clock.pass_(5 * 86_400)
    say(file, clock, "10")
    assert made(tmp_path, clock).first(Decimal("1.20")).spent_usd == Decimal("11.20")


def test_the_agreed_rate_is_the_least_that_counts_and_the_first_to_be_compared(
    tmp_path: Path, clock: Hands
) -> None:
    file = tmp_path / "budget.json"
    say(file, clock, "10", rate="1.50")
    found = made(tmp_path, clock)
    assert any(n.key.startswith("drift") for n in found.first(Decimal("1.20")).notices)  # 1.25 of it
    assert found.limits.gate_usd_per_hr == Decimal("1.20")
    assert not made(tmp_path, clock).first(None).notices  # nothing was agreed: this is the price


def test_an_old_file_starts_nothing(tmp_path: Path, clock: Hands) -> None:
    say(tmp_path / "budget.json", clock, "10", age_s=1801)
    with pytest.raises(RefusedError, match="is the sidecar alive"):
        made(tmp_path, clock).first(None)


def test_a_guard_that_hangs_is_noticed_by_the_loop(tmp_path: Path, clock: Hands) -> None:
    asked: list[int] = []
    say(tmp_path / "budget.json", clock, "10")
    found = made(tmp_path, clock)
    found.ask_to_leave = lambda why, code: asked.append(code)
    found.first(None)
    assert found.alive()
    found._thread = threading.Thread(target=lambda: None)  # one that never ticks
    found._thread.start()
    clock.pass_(1801)
    assert not found.alive()
    assert set(asked) == {76}
    assert "has not answered" in json.loads((tmp_path / "STOP.json").read_text())["reason"]
    found.close(0)
