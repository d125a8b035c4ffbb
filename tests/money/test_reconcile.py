"""`x1 reconcile`: what a provider lists against what the ledgers know, and an end to what nobody knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.money.fakes import Rental, renting

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FAULT, FINISHED, USAGE
from x1_pretrain.money import reconcile
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.teardown import Ending


@pytest.fixture(params=["runpod", "lambda"])
def rental(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rental]:
    with renting(tmp_path / "runs" / "one", monkeypatch, request.param) as rental:
        monkeypatch.setattr(Clock, "from_environment", lambda: rental.clock)
        other = {"runpod": "LAMBDA_API_KEY", "lambda": "RUNPOD_API_KEY"}[request.param]
        monkeypatch.delenv(other)
        monkeypatch.delenv("X1_FAKE_URL")
        yield rental


def command(rental: Rental, *words: str) -> int:
    return run_app(reconcile.app, [str(rental.folder.parent), *words], prog="x1 reconcile")


def line(printed: str, name: str | None) -> str:
    return next(text for text in printed.splitlines() if str(name) in text)


def forget(rental: Rental, *events: str) -> None:
    """The ledger as it would be, had these rows never been written."""
    rows = [row for row in rental.ledger.rows() if row["event"] not in events]
    rental.ledger.file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nothing_at_all(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(rental) == FINISHED
    assert f"nothing is listed at {rental.provider.label}" in capsys.readouterr().out


def test_a_machine_that_runs_and_is_known_stays(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    assert command(rental, "--end") == FINISHED
    assert "running, and known" in line(capsys.readouterr().out, machine.machine_id)
    assert rental.truth(machine.machine_id).alive


def test_an_orphan_is_named_and_ended(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    forget(rental, "intent", "launched")
    assert command(rental) == FAULT
    printed = capsys.readouterr().out
    assert "ORPHAN" in line(printed, machine.machine_id)
    assert "`x1 reconcile --end` ends it" in printed
    assert rental.truth(machine.machine_id).alive
    assert command(rental, "--end") == FINISHED
    assert not rental.truth(machine.machine_id).alive
    own = rental.folder.parent / f"orphan-{machine.machine_id}"
    assert json.loads((own / "termination.json").read_text())["confirmed"]
    assert command(rental) == FINISHED


def test_an_orphan_that_did_not_end_is_tried_again(
    rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = rental.launch()
    forget(rental, "intent", "launched")
    rental.fake.fault("stuck_terminating")
    assert command(rental, "--end") == FAULT
    rental.fake.world.clear_faults()
    assert command(rental, "--end") == FINISHED
    assert not rental.truth(machine.machine_id).alive


def test_a_machine_that_is_not_ours_is_shown_and_left(
    rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = rental.launch("somebody-else")
    forget(rental, "intent", "launched")
    assert command(rental, "--end") == FINISHED
    assert "not launched by X1" in line(capsys.readouterr().out, machine.machine_id)
    assert rental.truth(machine.machine_id).alive


def test_one_that_the_ledger_says_is_gone(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    rental.ledger.append("terminate_confirmed", tag=machine.tag, machine_id=machine.machine_id)
    assert command(rental) == FAULT
    assert "STILL THERE" in line(capsys.readouterr().out, machine.machine_id)
    assert command(rental, "--end") == FINISHED
    assert not rental.truth(machine.machine_id).alive


def test_one_that_is_open_and_not_listed(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    rental.fake.world.end_all()
    rental.clock.sleep(300)
    assert command(rental) == FAULT
    assert "not listed: to be confirmed" in line(capsys.readouterr().out, machine.machine_id)
    assert command(rental, "--end") == FINISHED
    assert not account(rental.ledger.rows()).open_machines()
    assert command(rental) == FINISHED


def test_a_launch_that_was_cut_off(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    forget(rental, "launched")
    assert command(rental) == FAULT
    assert "the launch was cut off" in line(capsys.readouterr().out, machine.machine_id)
    assert command(rental, "--end") == FINISHED
    assert not rental.truth(machine.machine_id).alive


def test_a_twin_under_a_known_tag_is_an_orphan(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    first = rental.truth(machine.machine_id)
    twin = rental.fake.world.launch(
        first.api, first.name, first.sku, gpu_count=1, usd_per_hr=first.usd_per_hr, place=first.place,
        asked=first.asked,
    )  # fmt: skip
    assert command(rental, "--end") == FINISHED
    assert "ORPHAN" in line(capsys.readouterr().out, twin.id)
    assert not rental.truth(twin.id).alive
    assert rental.truth(machine.machine_id).alive


def test_a_provider_that_does_not_answer(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    rental.launch()
    rental.fake.fault("500", times=1000)
    assert command(rental) == FAULT
    assert "no usable answer" in capsys.readouterr().out


def test_a_missing_key_spares_nobody_else(
    rental: Rental, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = rental.launch()
    other = Ledger(rental.folder.parent / "two" / "ledger.jsonl", rental.clock)
    other.append("adopted", tag="x1-two", provider="fake", machine_id="pod-9", usd_per_hr=Decimal(1))
    assert command(rental) == FAULT
    printed = capsys.readouterr().out
    assert "X1_FAKE_URL is not set" in printed
    assert "running, and known" in line(printed, machine.machine_id)


def test_a_damaged_ledger_ends_nothing(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    rental.ledger.file.write_text("damaged\n")
    assert command(rental, "--end") == FAULT
    printed = capsys.readouterr().out
    assert "line 1: not a ledger row" in printed
    assert "nothing is ended" in printed
    assert rental.truth(machine.machine_id).alive


@pytest.mark.parametrize(("answer", "ended"), [("y", True), ("", False), (EOFError, False)])
def test_a_person_is_asked(rental: Rental, monkeypatch: pytest.MonkeyPatch, answer: Any, ended: bool) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    def said(_: str) -> str:
        if answer is EOFError:
            raise EOFError
        return str(answer)

    machine = rental.launch()
    forget(rental, "intent", "launched")
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", said)
    assert command(rental) == (FINISHED if ended else FAULT)
    assert rental.truth(machine.machine_id).alive != ended


def test_an_ended_machine_is_no_finding(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    rental.clock.sleep(300)
    assert Ending(rental.provider, machine, rental.ledger, rental.clock, lambda _: None).run()
    assert command(rental) == FINISHED
    assert "nothing is listed" in capsys.readouterr().out


def test_slips_are_one_line(
    rental: Rental, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_app(reconcile.app, [str(tmp_path / "rums")], prog="x1 reconcile") == USAGE
    assert "no such folder" in capsys.readouterr().err
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    assert command(rental) == USAGE
    assert "no provider to ask: set LAMBDA_API_KEY or RUNPOD_API_KEY" in capsys.readouterr().err
