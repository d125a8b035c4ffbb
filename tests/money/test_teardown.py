"""Ending a machine, and seeing that it is gone: "confirmed" is only said of a machine that truly is, whatever
the provider says."""

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
from x1_pretrain.money import teardown
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.base import Disk
from x1_pretrain.money.teardown import Ending, end_all


@pytest.fixture(params=["runpod", "lambda"])
def rental(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rental]:
    with renting(tmp_path / "run", monkeypatch, request.param) as rental:
        monkeypatch.setattr(Clock, "from_environment", lambda: rental.clock)
        yield rental


@pytest.fixture
def said() -> list[str]:
    return []


def ending(rental: Rental, machine: Rented, said: list[str]) -> Ending:
    return Ending(rental.provider, machine, rental.ledger, rental.clock, said.append)


def command(*words: str) -> int:
    return run_app(teardown.app, list(words), prog="x1 teardown")


def test_gone_is_said_after_two_reads_ten_seconds_apart(rental: Rental, said: list[str]) -> None:
    machine = rental.launch()
    rental.clock.sleep(300)
    assert ending(rental, machine, said).run()
    truth = rental.truth(machine.machine_id)
    assert not truth.alive
    first, second = rental.rows("terminate_confirmed")[0]["reads"]
    assert first < second
    assert len(rental.rows("terminate_sent")) == 1
    assert not rental.machines()[0].open


def test_the_proof_is_never_half_written(rental: Rental) -> None:
    """The guard and a sidecar write it, the mirror's process reads it."""
    rental.ledger.append("terminate_confirmed", tag="x", machine_id="x")
    teardown.write_proof(rental.folder, rental.ledger)
    with (rental.folder / teardown.PROOF).open() as reading:
        rental.ledger.append("terminate_confirmed", tag="y", machine_id="y")
        teardown.write_proof(rental.folder, rental.ledger)
        assert len(json.load(reading)["confirmed"]) == 1
    assert len(json.loads((rental.folder / teardown.PROOF).read_text())["confirmed"]) == 2


FAULTS: list[dict[str, Any]] = [
    {"kind": "stuck_terminating", "for_s": 500},
    {"kind": "terminate_ignored", "times": 3},
    {"kind": "500", "times": 60},
    {"kind": "429", "times": 60, "retry_after_s": 2},
    {"kind": "malformed", "times": 30},
    {"kind": "html", "times": 30},
    {"kind": "401", "times": 4},
    {"kind": "500", "on": "list", "for_s": 300},
    {"kind": "500", "on": "get", "for_s": 300},
    {"kind": "500", "on": "terminate", "for_s": 300},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_what_is_confirmed_is_gone(rental: Rental, said: list[str], fault: dict[str, Any]) -> None:
    machine = rental.launch()
    rental.clock.sleep(300)
    rental.fake.fault(**fault)
    assert ending(rental, machine, said).run()
    assert not rental.truth(machine.machine_id).alive
    assert not account(rental.ledger.rows()).open_machines()


@pytest.mark.parametrize("wall_s", [0, -86_400])
def test_a_404_right_after_the_launch_is_not_its_end(rental: Rental, said: list[str], wall_s: float) -> None:
    rental.fake.fault("not_listed_yet", for_s=60)
    machine = rental.launch()
    rental.clock.set_wall(wall_s)
    assert ending(rental, machine, said).run()
    assert not rental.truth(machine.machine_id).alive


class Blind:
    """A provider whose single read knows nothing: a key without access, or get and list that disagree."""

    def __init__(self, honest: Any) -> None:
        self._honest = honest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)

    def machine(self, machine_id: str) -> None:
        return None


def test_a_404_that_the_list_contradicts_is_not_gone(rental: Rental, said: list[str]) -> None:
    machine = rental.launch()
    rental.clock.sleep(300)
    rental.fake.fault("terminate_ignored", for_s=100_000)
    blind: Any = Blind(rental.provider)
    assert not Ending(blind, machine, rental.ledger, rental.clock, said.append).run()
    assert rental.truth(machine.machine_id).alive


def test_unconfirmed_is_loud_and_a_second_call_confirms(
    rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = rental.launch()
    rental.fake.fault("stuck_terminating")
    assert command(str(rental.folder)) == FAULT
    printed = capsys.readouterr().out
    assert "NOT CONFIRMED" in printed
    assert str(machine.machine_id) in printed
    assert f"x1 teardown {rental.folder}" in printed
    assert rental.machines()[0].open
    assert rental.rows("terminate_unconfirmed")
    assert rental.rows("alert_due")[0]["key"].startswith("unconfirmed")
    assert not (rental.folder / "termination.json").exists()
    rental.fake.world.clear_faults()
    assert command(str(rental.folder)) == FINISHED
    assert "confirmed: no machine" in capsys.readouterr().out
    assert not rental.machines()[0].open


def test_errors_throughout_are_unconfirmed(rental: Rental, said: list[str]) -> None:
    machine = rental.launch()
    rental.fake.fault("500", times=100_000)
    assert not ending(rental, machine, said).run()
    assert rental.machines()[0].open


# ------------------------------------------------------------------------------------------------------------
# A launch whose answer was lost


def lost_answer(rental: Rental) -> Rented:
    machine = rental.launch()
    rows = [row for row in rental.ledger.rows() if row["event"] != "launched"]
    rental.ledger.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    del machine
    return rental.machines()[0]


@pytest.mark.parametrize("hidden_s", [0, 60])
def test_a_machine_whose_id_never_came_is_found_by_its_tag(
    rental: Rental, said: list[str], hidden_s: float
) -> None:
    if hidden_s:
        rental.fake.fault("not_listed_yet", for_s=hidden_s)
    machine = lost_answer(rental)
    assert machine.machine_id is None
    assert ending(rental, machine, said).run()
    assert not rental.fake.world.alive()
    assert rental.rows("launched")[0]["message"] == "found by its tag"


def test_a_launch_that_made_nothing_is_closed(rental: Rental, said: list[str]) -> None:
    rental.ledger.append("intent", tag="x1-run-1", provider=rental.provider.name, usd_per_hr=Decimal("1.19"))
    begun = rental.clock.steady_s()
    assert ending(rental, rental.machines()[0], said).run()
    assert rental.clock.steady_s() - begun >= teardown.LISTED_BY_S
    known = account(rental.ledger.rows())
    assert not known.open_machines()
    assert known.spent_by(rental.clock.now()) == 0


def test_a_launch_that_made_two_machines_ends_both(rental: Rental, said: list[str]) -> None:
    machine = lost_answer(rental)
    twin = next(iter(rental.fake.world.machines.values()))
    rental.fake.world.launch(
        twin.api, twin.name, twin.sku, gpu_count=1, usd_per_hr=twin.usd_per_hr, place=twin.place,
        asked=twin.asked,
    )  # fmt: skip
    assert ending(rental, machine, said).run()
    assert end_all(rental.folder, rental.clock, said.append) == []
    assert not rental.fake.world.alive()
    assert any("one more machine" in line for line in said)


# ------------------------------------------------------------------------------------------------------------
# What is left in the folder


def test_the_proof_and_the_last_budget(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    machine = rental.launch()
    rental.clock.sleep(3600)
    (rental.folder / "budget.json").write_text('{"seq": 41}')
    assert command(str(rental.folder)) == FINISHED
    proof = json.loads((rental.folder / "termination.json").read_text())["confirmed"]
    assert [row["machine_id"] for row in proof] == [machine.machine_id]
    assert len(proof[0]["reads"]) == 2
    last = json.loads((rental.folder / "budget.json").read_text())
    assert last["seq"] == 42
    assert last["rate_usd_per_hr"] == 0
    assert last["spent_usd"] == last["projected_total_usd"]
    assert Decimal(str(last["spent_usd"])) >= Decimal("1.19")
    assert command(str(rental.folder)) == FINISHED
    assert "no machine is open" in capsys.readouterr().out


def test_a_full_disk_does_not_keep_a_machine(
    rental: Rental, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = rental.launch()
    rental.clock.sleep(300)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert ending(rental, machine, said).run()
    assert not rental.truth(machine.machine_id).alive
    assert any("No space left" in line for line in said)


def test_disks_that_go_on_billing_are_named(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk("v1", "corpus", Decimal(200), Decimal("0.4667"))
    monkeypatch.setattr(type(rental.provider), "disks", lambda _: [disk])
    rental.launch()
    assert command(str(rental.folder)) == FINISHED
    assert "corpus (200 GiB) $0.47 a day" in capsys.readouterr().out


def test_a_provider_without_its_key_does_not_spare_the_others(
    rental: Rental, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rental.ledger.append("adopted", tag="a", provider="fake", machine_id="pod-9", usd_per_hr=Decimal(1))
    machine = rental.launch()
    rental.clock.sleep(300)
    monkeypatch.delenv("X1_FAKE_URL")
    left = end_all(rental.folder, rental.clock, said.append)
    assert [m.machine_id for m in left] == ["pod-9"]
    assert not rental.truth(machine.machine_id).alive
    assert any("X1_FAKE_URL is not set" in line for line in said)


def test_a_folder_without_a_ledger_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(tmp_path / "nothing")) == USAGE
    error = capsys.readouterr().err
    assert "no such run folder, and none under runs/; `x1 reconcile`" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "nothing").exists()
