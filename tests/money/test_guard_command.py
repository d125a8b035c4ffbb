"""`x1 guard`: whatever runs on the machine, and whatever its provider says, it ends below the ceiling."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config
from tests.money.fakes import Rental, Turns, pulled_home, renting, waiting

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FAULT, FINISHED, INTERRUPTED, USAGE
from x1_pretrain.money import guard_command, pace, teardown
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.fake.server import FakeProvider
from x1_pretrain.money.standing import Mirror, Standing
from x1_pretrain.money.teardown import Ending
from x1_pretrain.stores.folder_store import FolderStore


@pytest.fixture
def rental(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rental]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with renting(tmp_path / "run", monkeypatch, gpu="A100 80GB", price_usd_per_hr="1.19") as rental:
        monkeypatch.setattr(Clock, "from_environment", lambda: rental.clock)
        waiting(monkeypatch, Turns(rental.clock, 36_000))
        yield rental
    for number, handler in before.items():
        signal.signal(number, handler)


def rented(rental: Rental, ceiling: str = "3") -> str:
    rental.ledger.append("gate", verdict="passed", ceiling_usd=Decimal(ceiling), hours=Decimal(2))
    machine = rental.launch()
    rental.clock.sleep(60)
    assert machine.machine_id is not None
    return machine.machine_id


def command(*words: str) -> int:
    return run_app(guard_command.app, list(words), prog="x1 guard")


@pytest.mark.parametrize("every_s", ["60", "300", "1800"])
def test_the_machine_ends_below_the_ceiling(
    rental: Rental, capsys: pytest.CaptureFixture[str], every_s: str
) -> None:
    rented(rental)
    assert command(str(rental.folder), "--every-s", every_s) == FINISHED
    assert not rental.fake.world.alive()
    assert Decimal("2.5") < rental.bill_usd() <= 3
    printed = capsys.readouterr().out
    assert "of $3.00" in printed
    assert "projected" in printed
    assert "termination.json" in printed
    assert json.loads((rental.folder / "guard.json").read_text())["spent_usd"] <= 3


def test_a_closed_terminal_leaves_the_machine_guarded(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and SIGTERM end the guard; a lost line is nobody's word."""
    rented(rental)
    turn, turns = guard_command.OuterGuard._turn, list[int]()

    def hung_up(guard: guard_command.OuterGuard) -> None:
        turns.append(1)
        if len(turns) == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        turn(guard)

    monkeypatch.setattr(guard_command.OuterGuard, "_turn", hung_up)
    with a_hang_up_interrupts():
        assert command(str(rental.folder), "--every-s", "60") == FINISHED
    assert len(turns) > 2
    assert not rental.fake.world.alive()
    assert "the terminal is gone, the guard goes on" in (rental.folder / "guard.log").read_text()


@contextmanager
def a_hang_up_interrupts() -> Iterator[None]:
    """As `x1 launch` leaves it to the guard."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
        assert signal.getsignal(signal.SIGHUP) is interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_its_terminal_the_guard_speaks_to_a_file(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from x1_pretrain.money.guard_command import hung_up\n"
        "terminals = [number for number in (1, 2) if os.isatty(number)]\n"
        "print('ready', flush=True); sys.stdin.read()\n"
        "hung_up(Path(sys.argv[1]), terminals); print('$1.20 of $3.00', flush=True)"
    )
    ours, theirs = os.openpty()
    words = [sys.executable, "-c", code, str(tmp_path / "guard.log")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE) as child:
        os.close(theirs)
        heard = b""
        while not heard.endswith(b"ready\r\n"):
            heard += os.read(ours, 100)
        os.close(ours)  # whoever prints there now fails
        _, said = child.communicate(b"", timeout=120)
    assert child.returncode == 0, said
    told = (tmp_path / "guard.log").read_text().splitlines()
    assert told[0].endswith(f"the terminal is gone, the guard goes on; `kill {child.pid}` ends it")
    assert told[1] == "$1.20 of $3.00"


def test_what_the_run_cost_elsewhere_counts(rental: Rental) -> None:
    """Its ledger came from a mirror to the gate; this folder never saw those machines."""
    row = {"verdict": "passed", "ceiling_usd": Decimal(9), "hours": Decimal(2), "before_usd": Decimal(5)}
    rental.ledger.append("gate", **row)
    rental.launch()
    assert command(str(rental.folder)) == FINISHED
    assert Decimal("3.5") < rental.bill_usd() <= 4


def test_a_correction_since_the_launch_is_the_last_word() -> None:
    gate = {"event": "gate", "verdict": "passed", "before_usd": "5"}
    intent, corrected = {"event": "intent", "tag": "a"}, {"event": "correction"}
    later = {"event": "gate", "verdict": "passed", "before_usd": "8"}
    before = guard_command.spent_before
    assert before([gate, intent], "a") == before([corrected, gate, intent, later], "a") == 5
    assert before([gate, {**gate, "verdict": "refused", "before_usd": "7"}, intent], "a") == 5
    assert before([gate, intent, corrected], "a") == before([gate], "a") == before([], "a") == 0


def test_what_the_machine_s_own_ledger_counts_beside_it(rental: Rental, tmp_path: Path) -> None:
    """The store of the mirror is on the machine's ledger alone: here $1 more than was counted so far."""
    rented(rental)

    class Told(Mirror):
        def look(self) -> Standing:
            spent = rental.bill_usd() + 1
            return Standing(1, 1, True, "gpu-1", "running", step=9, good_step=9, spent_usd=spent)

    mirror = Told(FolderStore(str(tmp_path / "mirror")), "run")
    code, lost = guard_command.watched(rental.folder, rental.clock, Decimal(3), 300.0, 900.0, mirror)
    assert (code, lost) == (FINISHED, False)
    assert Decimal("1.5") < rental.bill_usd() <= 2


FAULTS: list[dict[str, Any]] = [
    {"kind": "500", "for_s": 4000},
    {"kind": "malformed", "times": 100},
    {"kind": "cost_zero", "for_s": 36_000},
    {"kind": "price_jump", "factor": "1.25", "after_s": 3000},
    {"kind": "terminate_ignored", "times": 2},
    {"kind": "stuck_terminating", "for_s": 200},
    {"kind": "clock_skew", "skew_s": 86_400},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: str(f["kind"]))
def test_no_fault_keeps_it_above(rental: Rental, fault: dict[str, Any]) -> None:
    rented(rental)
    rental.fake.fault(**fault)
    assert command(str(rental.folder)) == FINISHED
    assert not rental.fake.world.alive()
    assert rental.bill_usd() <= 3


def test_an_end_that_can_t_be_confirmed_is_told_and_tried_again(rental: Rental) -> None:
    machine_id = rented(rental)
    rental.fake.fault("stuck_terminating", for_s=2000)
    assert command(str(rental.folder)) == FINISHED
    assert not rental.truth(machine_id).alive
    assert rental.rows("terminate_unconfirmed")
    assert any(row["key"].startswith("unconfirmed") for row in rental.rows("alert_due"))


def test_a_machine_that_stopped_working_is_ended_after_a_while(rental: Rental) -> None:
    machine_id = rented(rental)
    rental.fake.fault("exited")
    begun = rental.clock.steady_s()
    assert command(str(rental.folder), "--linger", "30m") == FINISHED
    assert 1800 <= rental.clock.steady_s() - begun < 2700
    assert not rental.truth(machine_id).alive


def test_a_machine_that_works_again_is_left_alone(rental: Rental) -> None:
    rented(rental, "30")
    rental.fake.fault("unhealthy")
    sidecars = []
    over = guard_command.OuterGuard._over

    def noted(self: guard_command.OuterGuard) -> bool:
        sidecars.append(self.sidecar.lost)
        if len(sidecars) == 3:
            rental.fake.world.clear_faults()
            rental.fake.world.start(rental.fake.world.alive()[0])
        return over(self)

    guard_command.OuterGuard._over = noted  # type: ignore[method-assign]
    try:
        assert command(str(rental.folder), "--linger", "30m") == INTERRUPTED
    finally:
        guard_command.OuterGuard._over = over  # type: ignore[method-assign]
    assert sidecars[:3] == [True] * 3
    assert not any(sidecars[4:])
    assert rental.fake.world.alive()


def test_a_machine_that_is_gone_is_confirmed_without_waiting(rental: Rental) -> None:
    machine_id = rented(rental, "30")
    rental.fake.world.end_all()
    begun = rental.clock.steady_s()
    assert command(str(rental.folder)) == FINISHED
    assert rental.clock.steady_s() - begun < 900
    assert rental.rows("terminate_confirmed")[0]["machine_id"] == machine_id


def test_a_teardown_from_elsewhere_ends_the_guard(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rented(rental, "30")
    turns = Turns(rental.clock)
    wait = turns.wait

    def torn_down(timeout: float | None = None) -> bool:
        if len(turns.waits) == 3:
            Ending(rental.provider, rental.machines()[0], rental.ledger, rental.clock, lambda _: None).run()
        return wait(timeout)

    monkeypatch.setattr(turns, "wait", torn_down)
    waiting(monkeypatch, turns)
    assert command(str(rental.folder)) == FINISHED
    assert len(turns.waits) == 4
    assert command(str(rental.folder)) == FINISHED
    assert "no machine is open" in capsys.readouterr().out


def test_a_damaged_ledger_does_not_save_the_machine(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_id = rented(rental)
    turns = Turns(rental.clock, 36_000)
    wait = turns.wait

    def damage(timeout: float | None = None) -> bool:
        if len(turns.waits) == 2:
            rental.ledger.file.write_bytes(b"damaged\n" + rental.ledger.file.read_bytes())
        return wait(timeout)

    monkeypatch.setattr(turns, "wait", damage)
    waiting(monkeypatch, turns)
    assert command(str(rental.folder)) == FINISHED
    assert not rental.truth(machine_id).alive
    assert rental.bill_usd() <= 3
    assert "line 1: not a ledger row" in capsys.readouterr().out


def test_tax_and_disk_of_the_launch_are_counted(rental: Rental) -> None:
    rental.ledger.append("gate", verdict="passed", ceiling_usd=Decimal(3), hours=Decimal(2))
    rental.launch(disk_gib=200)
    rows = rental.ledger.rows()
    intent = next(row for row in rows if row["event"] == "intent")
    intent |= {"tax": "0.10", "storage_usd_per_hr": "0.027778"}
    rental.ledger.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(str(rental.folder)) == FINISHED
    spent = Decimal(str(json.loads((rental.folder / "guard.json").read_text())["spent_usd"]))
    assert Decimal(3) >= spent
    assert Decimal("2.7") <= rental.bill_usd() * Decimal("1.1") <= 3


@pytest.mark.parametrize(
    ("prepare", "said"),
    [("nothing", "no ledger.jsonl in it"), ("empty", "no ceiling on record")],
)
def test_a_slip_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: str, said: str
) -> None:
    if prepare == "empty":
        (tmp_path / "ledger.jsonl").touch()
    assert command(str(tmp_path)) == USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_sigterm_leaves_the_machine_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process."""
    monkeypatch.setenv("X1_CLOCK", f"60@{time.time():.0f}")
    monkeypatch.delenv("X1_ALERTS", raising=False)
    real = tmp_path / "real"
    with FakeProvider(Clock.from_environment()) as fake:
        monkeypatch.setenv("X1_FAKE_URL", fake.url)
        made = fake.world.launch(
            "runpod", "x1-run-1", "NVIDIA A100 80GB PCIe", gpu_count=1, usd_per_hr=Decimal("1.19"),
            place="SECURE", disk_gb=1,
        )  # fmt: skip
        ledger = guard_command.Ledger(real / "ledger.jsonl", Clock.from_environment())
        ledger.append("gate", verdict="passed", ceiling_usd=Decimal(30))
        ledger.append("adopted", tag="x1-run-1", provider="fake", machine_id=made.id, usd_per_hr=Decimal(2))
        process = subprocess.Popen(
            [sys.executable, "-m", "x1_pretrain.money.guard_command", str(real)],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 60
        while not (real / "guard.json").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        process.terminate()
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED
        assert "the machine goes on and is billed" in printed
        assert f"x1 teardown {real}" in printed
        assert made.alive


def test_pulled_rows_say_nothing_of_the_time_that_is_left(
    rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stand still, and by them the run would be as far from its end until the ceiling."""
    rented(rental)
    row = {"session": 1, "train/loss": 3.0}
    rows = [row | {"step": n, "tokens": n, "elapsed_s": 3600 * n} for n in range(1, 6)]
    pulled_home(rental.folder, *rows)
    write_config(rental.folder / "config.yaml")
    assert pace.left_s(rental.folder) is not None
    assert command(str(rental.folder)) == FINISHED
    assert rental.bill_usd() <= 3
    said = capsys.readouterr().out
    assert max(map(float, re.findall(r"\$([0-9.,]+) projected", said.replace(",", ""))), default=0) < 10


def test_what_teardown_could_not_confirm_is_a_fault(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    rented(rental, "30")
    rental.fake.fault("exited")
    rental.fake.fault("terminate_ignored", times=100_000)
    assert command(str(rental.folder), "--linger", "5m") == FAULT
    assert teardown.PROOF not in [f.name for f in rental.folder.iterdir()]


@pytest.mark.parametrize("pulled", [False, True])
def test_a_dearer_hour_and_a_late_end_are_a_persons_question(rental: Rental, pulled: bool) -> None:
    """From here nobody can save a checkpoint there: the guard asks, once each, and goes on. Rows that
    were pulled into this folder bring no trainer with them."""
    rented(rental, "8")
    if pulled:
        pulled_home(rental.folder, {"step": 1, "tokens": 100})
    rental.fake.fault("price_jump", factor="1.3", after_s=1800)
    assert command(str(rental.folder)) == FINISHED  # at the ceiling
    keys = [row["key"] for row in rental.rows("alert_due")]
    assert sum(key.startswith("guard-drift") for key in keys) == 1
    assert keys.count("guard-late") == 1
    assert rental.bill_usd() <= 8
