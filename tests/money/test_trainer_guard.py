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
from x1_pretrain.money import trainer_guard
from x1_pretrain.money.budget_file import Address
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import Action, Limits, Reading
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


def test_a_guard_that_fails_gives_a_hard_stop_no_more_time(
    tmp_path: Path, clock: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that fails at every look."""
    ended = threading.Event()
    monkeypatch.setattr(trainer_guard, "_end_this_process", ended.set)
    monkeypatch.setattr(trainer_guard, "LEAVE_NOW_S", 0.2)
    say(tmp_path / "budget.json", clock, "10")
    found = made(tmp_path, clock)
    found.first(None)
    found._leave(Action.STOP_NOW, "above the ceiling")
    found.fail("its ledger is damaged")
    assert ended.wait(20)
    found.close(0)


def test_what_is_decided_while_it_closes_ends_no_process_later(
    tmp_path: Path, clock: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run still sends the rest to its mirror then."""
    deciding, asked = threading.Event(), list[int]()
    monkeypatch.setattr(trainer_guard, "_end_this_process", lambda: None)
    say(tmp_path / "budget.json", clock, "10")
    found = made(tmp_path, clock)
    found.ask_to_leave = lambda why, code: asked.append(code)
    found.first(None)

    def poll() -> Reading:
        deciding.set()
        assert found._stop.wait(20)  # until it is being closed
        return Reading(Decimal(40), Decimal("1.20"), None, clock.steady_s())

    monkeypatch.setattr(found.file, "poll", poll)
    found.start()
    assert deciding.wait(20)
    found.close(0)
    assert found._thread is not None
    found._thread.join(20)
    assert asked == [77]
    assert found._timer is None


def test_one_state_of_the_file_has_one_time_whoever_reads_it(
    tmp_path: Path, clock: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop reads before a checkpoint what the guard's thread is just taking in, and the wall clock jumps
    in between."""
    say(tmp_path / "budget.json", clock, "10", age_s=60)
    file = made(tmp_path, clock).file
    found, readings = file._fetch(), list[Reading | None]()
    first = threading.Thread(target=lambda: readings.append(file._take(found)))
    taking, taken, steady_s = threading.Event(), threading.Event(), Hands.steady_s

    def paused(self: Hands) -> float:
        if threading.current_thread() is first:
            taking.set()
            taken.wait(0.3)  # the other is through, or waits for this one
        return steady_s(self)

    monkeypatch.setattr(Hands, "steady_s", paused)
    first.start()
    assert taking.wait(20)
    clock.jump(3600)
    readings.append(file._take(found))
    taken.set()
    first.join(20)
    assert [r.at_s for r in readings if r] == [940, 940]
