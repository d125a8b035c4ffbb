"""The sidecar against the fake provider's true meter: whatever the provider, the clock or the disk do, what
it says is spent is never less than the truth by more than one poll, and with `may_terminate` the bill stays
below the ceiling."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.money.fakes import GIB_USD_PER_HR, Rental, Turns, renting

from x1_pretrain import budget_guard
from x1_pretrain.command import run as run_app
from x1_pretrain.money import budget_file, latch
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.ledger import Ledger, LedgerError
from x1_pretrain.money.sidecar import Request, Sidecar
from x1_pretrain.money.teardown import Ending

POLL_S = 300.0
HOUR_USD = Decimal("1.19") + GIB_USD_PER_HR


def near(amount: Decimal | None, expected: Decimal) -> bool:
    return amount is not None and abs(amount - expected) < Decimal("0.0001")


@pytest.fixture
def rental(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rental]:
    with renting(tmp_path / "run", monkeypatch, gpu="A100 80GB", price_usd_per_hr="1.19") as rental:
        yield rental


def sidecar(rental: Rental, machine: Rented, **options: Any) -> Sidecar:
    chosen: dict[str, Any] = {
        "folder": rental.folder,
        "output": rental.folder / "budget.json",
        "provider": rental.provider,
        "machine": machine,
        "ceiling_usd": Decimal(35),
        "ledger": rental.ledger,
        "clock": rental.clock,
        "notifier": rental.alerts,
        "left_s": lambda: None,
        "run_id": "run",
        "poll_s": POLL_S,
        "storage_usd_per_hr": GIB_USD_PER_HR,
    }
    return Sidecar(**(chosen | options))


class Reader:
    """The file as a trainer reads it: always valid, its number always higher, its amount never lower."""

    def __init__(self, rental: Rental) -> None:
        self.rental, self.seq, self.spent = rental, 0, Decimal(0)

    def check(self, slack_usd: Decimal = Decimal(0)) -> budget_file.BudgetFile:
        data = (self.rental.folder / "budget.json").read_bytes()
        read = budget_file.parse(data, self.rental.clock.now())
        assert read.seq > self.seq
        assert read.spent_usd >= self.spent
        assert read.spent_usd >= self.rental.bill_usd() - slack_usd - Decimal("0.000002")
        self.seq, self.spent = read.seq, read.spent_usd
        return read


def polls(rental: Rental, one: Sidecar, reader: Reader, count: int, every_s: float = POLL_S) -> None:
    for _ in range(count):
        one.poll()
        reader.check(one_poll(rental))
        rental.clock.sleep(every_s)


def one_poll(rental: Rental, every_s: float = POLL_S) -> Decimal:
    return rental.fake.world.usd_per_hr() * Decimal(every_s) / 3600


def test_an_hour_of_a_quiet_run_is_its_price(rental: Rental) -> None:
    one = sidecar(rental, rental.launch(), planned_s=4 * 3600)
    reader = Reader(rental)
    polls(rental, one, reader, 12)
    said = one.poll()
    assert near(said.spent_usd, HOUR_USD)
    assert near(said.spent_usd, rental.bill_usd())
    assert near(said.hours_elapsed, Decimal(1))
    assert near(said.rate_usd_per_hr, HOUR_USD)
    # three of four planned hours are left, and five minutes to end it
    assert near(said.projected_total_usd, HOUR_USD * (4 + Decimal(1) / 12))
    assert said.source == "metered"


def test_the_projection_follows_the_run_s_own_pace_once_it_is_known(rental: Rental) -> None:
    pace: list[float | None] = [None]
    one = sidecar(rental, rental.launch(), planned_s=36_000, left_s=lambda: pace[0])
    planned = one.poll().projected_total_usd
    pace[0] = 3600.0
    own = one.poll().projected_total_usd
    assert near(planned, HOUR_USD * (10 + Decimal(1) / 12))
    assert near(own, HOUR_USD * (1 + Decimal(1) / 12))


FAULTS: list[dict[str, Any]] = [
    {"kind": "500", "times": 40},
    {"kind": "429", "times": 40, "retry_after_s": 2},
    {"kind": "429", "times": 3, "retry_after_s": 3600},
    {"kind": "malformed", "times": 40},
    {"kind": "html", "times": 40},
    {"kind": "401", "times": 5},
    {"kind": "cost_zero", "for_s": 3600},
    {"kind": "price_jump", "factor": "1.25"},
    {"kind": "price_jump", "factor": "1.25", "after_s": 450},
    {"kind": "exited"},
    {"kind": "unhealthy"},
    {"kind": "preempted"},
    {"kind": "clock_skew", "skew_s": 7200},
    {"kind": "clock_skew", "skew_s": -7200},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_no_fault_makes_it_count_less_than_the_bill(rental: Rental, fault: dict[str, Any]) -> None:
    one, reader = sidecar(rental, rental.launch()), Reader(rental)
    polls(rental, one, reader, 4)
    rental.fake.fault(**fault)
    polls(rental, one, reader, 8)
    rental.fake.world.clear_faults()
    polls(rental, one, reader, 4)
    one.poll()
    reader.check()  # all is well again: what was missed is made up for


def test_a_price_that_rose_while_nobody_answered_counts_from_when_it_may_have(rental: Rental) -> None:
    one = sidecar(rental, rental.launch())
    one.poll()
    rental.fake.fault("price_jump", factor="1.25")
    rental.fake.fault("500", times=10_000)
    for _ in range(6):
        rental.clock.sleep(POLL_S)
        one.poll()
    rental.fake.world.clear_faults()
    rental.clock.sleep(POLL_S)
    assert one.poll().spent_usd >= rental.bill_usd() - Decimal("0.000001")


def test_the_provider_s_own_bill_counts_where_it_is_more(rental: Rental) -> None:
    """A disk that nobody told the sidecar of: it hears of it from the bill, some minutes late."""
    one = sidecar(rental, rental.launch(disk_gib=2000), ceiling_usd=Decimal(100))
    lag_usd = rental.fake.world.usd_per_hr() * 2 * Decimal(POLL_S) / 3600
    sources = set()
    for _ in range(24):
        rental.clock.sleep(POLL_S)
        said = one.poll()
        sources.add(said.source)
        assert said.spent_usd >= rental.bill_usd() - lag_usd
    assert "billed" in sources


def test_tax_and_storage_come_on_top(rental: Rental) -> None:
    storage = Decimal("0.10") * 200 / 720
    machine = rental.launch(usd_per_hr="1.30", disk_gib=200)
    one = sidecar(rental, machine, tax=Decimal("0.10"), storage_usd_per_hr=storage)
    one.poll()
    for _ in range(12):
        rental.clock.sleep(POLL_S)
        one.poll()
    assert abs(one.spent_usd - (Decimal("1.19") + storage) * Decimal("1.1")) < Decimal("0.01")
    assert one.spent_usd >= rental.bill_usd() * Decimal("1.1") - Decimal("0.0001")


@pytest.mark.parametrize("jump_s", [86_400, -86_400])
def test_a_wall_clock_that_jumps_a_day_changes_nothing(rental: Rental, jump_s: float) -> None:
    one = sidecar(rental, rental.launch())
    for _ in range(6):
        one.poll()
        rental.clock.sleep(POLL_S)
    rental.clock.set_wall(jump_s)
    for _ in range(7):
        said = one.poll()
        read = budget_file.parse((rental.folder / "budget.json").read_bytes(), rental.clock.now())
        rental.clock.sleep(POLL_S)
    assert near(said.spent_usd, HOUR_USD)
    assert near(read.hours_elapsed, Decimal(1))


def test_a_sidecar_that_was_killed_leaves_no_gap(rental: Rental) -> None:
    """The next one on the same boot counts by the steady clock, on another boot by the wall clock."""
    reader = Reader(rental)
    machine = rental.launch()
    polls(rental, sidecar(rental, machine), reader, 4)
    rental.clock.sleep(2000)
    rental.clock.set_wall(-3600)
    second = sidecar(rental, rental.machines()[0])
    rental.clock.set_wall(0)
    polls(rental, second, reader, 4)
    rental.clock.rebooted().sleep(2000)
    polls(rental, sidecar(rental, rental.machines()[0]), reader, 4)
    rental.clock.sleep(0)
    assert abs(reader.spent - rental.bill_usd()) < one_poll(rental) + Decimal("0.0001")


def test_numbers_go_up_over_a_restart_and_a_lost_file(rental: Rental) -> None:
    machine, seen = rental.launch(), []
    for kept in ("whole", "half", "lost"):
        one = sidecar(rental, machine)
        seen += [one.poll().seq, one.poll().seq]
        file = rental.folder / "budget.json"
        if kept == "half":
            file.write_bytes(file.read_bytes()[:40])
        if kept == "lost":
            file.unlink()
    assert seen == sorted(set(seen))


def test_numbers_go_up_over_a_restart_while_the_ledger_takes_nothing(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LedgerError("ledger.jsonl: can't be written (No space left on device)")

    machine = rental.launch()
    first = sidecar(rental, machine).poll()
    monkeypatch.setattr(Ledger, "append", refuse)
    assert sidecar(rental, machine).poll().seq > first.seq


def test_an_earlier_machine_that_nobody_saw_end_counts_on(rental: Rental) -> None:
    first = rental.launch("x1-run-1")
    one = sidecar(rental, first)
    for _ in range(6):
        one.poll()
        rental.clock.sleep(POLL_S)
    second = rental.launch("x1-run-2")
    reader = Reader(rental)
    polls(rental, sidecar(rental, second), reader, 3)
    rental.clock.set_wall(-86_400)
    polls(rental, sidecar(rental, rental.machines()[1]), reader, 9)
    assert reader.spent >= rental.bill_usd() - 2 * one_poll(rental)
    rental.clock.set_wall(0)
    assert Ending(rental.provider, rental.machines()[0], rental.ledger, rental.clock, lambda _: None).run()
    before = reader.spent
    last = sidecar(rental, rental.machines()[1])
    rental.clock.sleep(3600)
    said = last.poll()
    assert near(said.rate_usd_per_hr, HOUR_USD)
    assert said.spent_usd - before < Decimal("1.19") * Decimal("1.2")  # one machine's hour, not two


def test_a_lost_machine_is_told_once_and_counts_on(rental: Rental) -> None:
    one = sidecar(rental, rental.launch())
    rental.clock.sleep(60)
    one.poll()
    rental.fake.fault("exited")
    for _ in range(4):
        rental.clock.sleep(POLL_S)
        one.poll()
    assert len(rental.rows("lost")) == 1
    assert [key for key in rental.alerts.told if key.startswith("lost")] == ["lost-x1-run-1"]
    assert near(one.meter.usd_per_hr, HOUR_USD)


def test_three_failed_polls_are_told_once(rental: Rental) -> None:
    one = sidecar(rental, rental.launch())
    rental.fake.fault("500", times=10_000)
    for polled in range(1, 6):
        said = one.poll()
        assert said.source == "estimated"
        assert ("provider" in rental.alerts.told) == (polled >= 3)
    assert "page" in rental.alerts.told["provider"]


def test_its_own_confirmed_end_stops_the_count(rental: Rental) -> None:
    machine = rental.launch()
    one = sidecar(rental, machine)
    rental.clock.sleep(1800)
    one.poll()
    other = rental.machines()[0]
    assert Ending(rental.provider, other, rental.ledger, rental.clock, lambda _: None).run()
    spent = one.poll().spent_usd
    rental.clock.sleep(36_000)
    said = one.poll()
    assert said.spent_usd == spent
    assert said.rate_usd_per_hr == 0
    turns = Turns(rental.clock)
    one.run(turns)
    assert turns.waits == []


# ------------------------------------------------------------------------------------------------------------
# Our own disk


def test_a_full_disk_is_said_and_counting_goes_on(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = sidecar(rental, rental.launch())
    one.poll()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        for _ in range(6):
            rental.clock.sleep(POLL_S)
            one.poll()
    rental.clock.sleep(POLL_S)
    one.poll()
    printed = capsys.readouterr().out
    assert "No space left on device" in printed
    assert "kept again" in printed
    assert "files" in rental.alerts.told
    reader = Reader(rental)
    assert near(reader.check().spent_usd, rental.bill_usd())
    assert near(account(rental.ledger.rows()).known_usd, rental.bill_usd())


def test_a_damaged_ledger_does_not_end_the_counting_nor_the_ending(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = rental.launch()
    ended = []
    one = sidecar(
        rental, machine, ceiling_usd=Decimal(2), may_terminate=True, terminate=lambda why: ended.append(why)
    )
    one.poll()
    rental.ledger.file.write_bytes(b"damaged\n" + rental.ledger.file.read_bytes())
    stop = Turns(rental.clock, 2 * 3600)
    one.run(stop)
    assert ended
    assert one.spent_usd >= Decimal(2) - Decimal("1.19") / 2


def test_a_disk_that_takes_nothing_does_not_keep_the_machine_alive(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = rental.launch()
    one = terminating(rental, machine, Decimal("1.50"), POLL_S)
    one.poll()

    def refuse(*_: object, **__: object) -> None:
        raise LedgerError("ledger.jsonl: can't be written (No space left on device)")

    monkeypatch.setattr(Ledger, "append", refuse)
    monkeypatch.setattr(budget_file, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    monkeypatch.setattr(latch, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    one.run(Turns(rental.clock, 7200))
    assert not rental.truth(machine.machine_id).alive
    assert rental.bill_usd() <= Decimal("1.50")


# ------------------------------------------------------------------------------------------------------------
# Ending it


def terminating(
    rental: Rental, machine: Rented, ceiling_usd: Decimal, poll_s: float, **options: Any
) -> Sidecar:
    def end(_: str) -> None:
        Ending(rental.provider, machine, rental.ledger, rental.clock, lambda _: None).run()

    return sidecar(
        rental, machine, ceiling_usd=ceiling_usd, may_terminate=True, terminate=end, poll_s=poll_s, **options
    )


@pytest.mark.parametrize(
    ("poll_s", "price", "jumps"),
    [
        (60.0, "4.29", True),
        (300.0, "0.50", False),
        (300.0, "1.19", True),
        (300.0, "4.29", True),
        (1800.0, "0.50", True),
        (1800.0, "1.19", False),
        (1800.0, "4.29", False),
        (1800.0, "4.29", True),
    ],
)
def test_the_machine_goes_before_the_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, price: str, poll_s: float, jumps: bool
) -> None:
    ceiling = Decimal(price) * 4 + Decimal("0.37")
    with renting(tmp_path / "run", monkeypatch, gpu="A100 80GB", price_usd_per_hr=price) as rental:
        machine = rental.launch(usd_per_hr=price)
        rng = random.Random(f"{price} {poll_s}")
        if jumps:
            for _ in range(2):
                rental.fake.fault("price_jump", factor="1.25", after_s=rng.uniform(9000, 14_000))
        one = terminating(rental, machine, ceiling, poll_s)
        one.run(Turns(rental.clock, 12 * 3600))
        assert not rental.truth(machine.machine_id).alive
        assert ceiling * Decimal("0.75") < rental.bill_usd() <= ceiling
        assert latch.read(rental.folder) is not None
        assert "end" in rental.alerts.told


def test_a_poll_comes_after_half_of_the_time_that_is_left(rental: Rental) -> None:
    one = terminating(rental, rental.launch(), HOUR_USD, 1800)
    one.poll()
    rental.clock.sleep(2300)
    one.poll()
    assert abs(one.next_poll_s() - (3600 - 300 - 2300) / 2) < 1


def test_a_machine_that_won_t_end_is_asked_until_it_does(rental: Rental) -> None:
    machine = rental.launch()
    rental.fake.fault("terminate_ignored", for_s=9000)
    one = terminating(rental, machine, Decimal("1.50"), POLL_S)
    one.run(Turns(rental.clock, 8 * 3600))
    assert not rental.truth(machine.machine_id).alive
    assert rental.rows("terminate_unconfirmed")
    assert rental.rows("terminate_confirmed")


# ------------------------------------------------------------------------------------------------------------
# The command


def command(*words: str) -> int:
    return run_app(budget_guard.app, list(words), prog="python -m x1_pretrain.budget_guard")


def test_the_command_writes_the_published_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run-dir", str(tmp_path), "--cap-usd", "35", "--rate-usd-per-hr", "0.10", "--once"]
    assert command(*words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "budget.json").read_text())
    first = ["spent_usd", "rate_usd_per_hr", "hours_elapsed", "projected_total_usd", "last_update_utc"]
    assert list(printed)[:5] == first
    assert printed["ceiling_usd"] == 35
    assert command(*words) == 0
    assert json.loads(capsys.readouterr().out)["seq"] > printed["seq"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cap-usd", "nan", "--rate-usd-per-hr", "1"], "--cap-usd nan: expected dollars, more than 0"),
        (["--cap-usd", "0", "--rate-usd-per-hr", "1"], "--cap-usd 0.0: expected dollars, more than 0"),
        (["--cap-usd", "35"], "--rate-usd-per-hr: is needed with --provider local"),
        (["--cap-usd", "35", "--rate-usd-per-hr", "-1"], "--rate-usd-per-hr -1.0: expected dollars"),
        (["--cap-usd", "35", "--rate-usd-per-hr", "1", "--terminate"], "--terminate: nobody can be asked"),
        (["--cap-usd", "35", "--rate-usd-per-hr", "1", "--since", "now"], "--since now: expected a time"),
        (["--cap-usd", "35", "--provider", "lamda"], "no provider is called 'lamda'"),
        (["--cap-usd", "35", "--provider", "runpod"], "RUNPOD_API_KEY is not set"),
        (["--cap-usd", "35", "--provider", "fake"], "--rate-usd-per-hr: is needed"),
        (["--cap-usd", "35", "--provider", "fake", "--rate-usd-per-hr", "1"], "--instance-id: is needed"),
    ],
)
def test_a_slip_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("X1_FAKE_URL", "http://127.0.0.1:9")
    assert command("--run-dir", str(tmp_path), *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_machine_that_is_not_listed_yet_is_found_by_its_tag(rental: Rental) -> None:
    rental.fake.fault("not_listed_yet", for_s=600)
    launched = rental.launch("x1-run-1")
    own = Ledger(rental.folder / "there" / "ledger.jsonl", rental.clock)
    machine = budget_guard.the_machine(
        own, rental.provider, None, "x1-run-1", Decimal("1.19"), None, rental.clock
    )
    assert machine.machine_id is None
    one = sidecar(rental, machine, ledger=own)
    assert one.poll().source == "estimated"
    rental.clock.sleep(700)
    assert one.poll().source == "metered"
    assert machine.machine_id == launched.machine_id
    assert not one.lost
    again = budget_guard.the_machine(own, rental.provider, None, "x1-run-1", None, None, rental.clock)
    assert again.tag == "x1-run-1"
    assert len(account(own.rows()).machines) == 1


def test_a_provider_whose_clock_is_ahead_does_not_start_the_count_in_the_future(rental: Rental) -> None:
    rental.fake.fault("clock_skew", skew_s=7200)
    rental.launch("x1-run-1")
    own = Ledger(rental.folder / "there" / "ledger.jsonl", rental.clock)
    machine = budget_guard.the_machine(
        own, rental.provider, None, "x1-run-1", Decimal("1.19"), None, rental.clock
    )
    assert machine.since == rental.clock.now()


def test_what_the_run_cost_before_counts_where_this_ledger_does_not_know_it(rental: Rental) -> None:
    """A second machine has an empty ledger of its own; one that knows more counts what it knows."""
    machine = rental.launch()
    said = sidecar(rental, machine, before_usd=Decimal(20)).poll()
    assert said.spent_usd >= 20
    rental.clock.sleep(3600)
    later = sidecar(rental, machine, before_usd=Decimal(20)).poll()
    assert near(later.spent_usd - said.spent_usd, HOUR_USD)
    rental.ledger.append("adopted", tag="old", provider="local", machine_id="old", usd_per_hr=Decimal(1))
    poll = {"tag": "old", "machine_usd": Decimal(30), "spent_usd": Decimal(30), "usd_per_hr": Decimal(0)}
    rental.ledger.append("poll", **poll)
    assert sidecar(rental, machine, before_usd=Decimal(20)).poll().spent_usd >= 30 + later.spent_usd - 20


def test_a_raised_ceiling_is_the_sidecars_too(rental: Rental) -> None:
    one = sidecar(rental, rental.launch())
    rental.ledger.append("raised", ceiling_usd=Decimal(77), before_usd=Decimal(5))
    assert one.poll().ceiling_usd == 77


def test_what_the_store_costs_is_counted_beside_the_machine(rental: Rental) -> None:
    """The trainer's rows of the mirror's store; a dead machine's end, as its launcher told it."""
    machine = rental.launch()
    one = sidecar(rental, machine)
    before = one.poll().spent_usd
    rental.ledger.append("storage", session="e0001-1a2b3c4d", storage_usd=Decimal("0.50"))
    assert near(one.poll().spent_usd, before + Decimal("0.50"))
    rental.ledger.append("storage", session="e0001-1a2b3c4d", storage_usd=Decimal("0.75"))
    rental.ledger.append("storage", session="e0002-5e6f7a8b", storage_usd=Decimal("0.25"))
    assert near(one.poll().spent_usd, before + Decimal("1.00"))
    assert near(sidecar(rental, machine).poll().spent_usd, before + Decimal("1.00"))  # nor a restart


def test_a_signal_at_any_line_of_the_wait_is_heard() -> None:
    def too_long(*_: object) -> None:
        raise TimeoutError("it waits for its own thread")

    def asked_at(number: int) -> bool:
        """Whether there is such a line; the request comes just before it."""
        stop, passed = Request(), 0

        def trace(frame: Any, what: str, _: object) -> Any:
            nonlocal passed
            passed += what == "line"
            if passed == number and not stop.is_set():
                sys.settrace(None)
                stop.set()
            return trace

        sys.settrace(trace)
        try:
            stop.wait(0.01)
        finally:
            sys.settrace(None)
        assert stop.is_set() == (passed >= number)
        return stop.is_set()

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        lines = next(number for number in range(1, 1000) if not asked_at(number))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert lines > 1
