"""Machines that are gone, told to the next one: what its ledger adds up to is what the launcher knows."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from tests.money.fakes import START, Steps

from x1_pretrain.errors import UserError
from x1_pretrain.money import ended
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import stamp
from x1_pretrain.money.ended import Ended
from x1_pretrain.money.ledger import Ledger


def later(hours: float) -> str:
    return stamp(START + timedelta(hours=hours))


@pytest.fixture
def home(tmp_path: Path) -> Ledger:
    """Two machines: one that cost $2.40 in two hours at a price that rose, one that still runs."""
    ledger = Ledger(tmp_path / "home" / "ledger.jsonl", Steps())
    ledger.append("intent", tag="x1-a", provider="runpod", usd_per_hr=Decimal("1.00"))
    ledger.append("launched", tag="x1-a", machine_id="pod-1")
    ledger.append(
        "poll", tag="x1-a", machine_usd=Decimal("2.40"), usd_per_hr=Decimal("1.40"), spent_usd="2.40"
    )
    ledger.append("terminate_confirmed", tag="x1-a", machine_id="pod-1", ended_utc=later(0))
    ledger.append("intent", tag="x1-never", provider="runpod", usd_per_hr=Decimal("1.00"))
    ledger.append("launch_failed", tag="x1-never")
    ledger.append("intent", tag="x1-b", provider="lambda", usd_per_hr=Decimal("1.00"))
    ledger.append("launched", tag="x1-b", machine_id="inst-1")
    return ledger


@pytest.fixture
def there(tmp_path: Path) -> Ledger:
    """What the mirror had of the first machine: an hour of it, at the stated price."""
    ledger = Ledger(tmp_path / "there" / "ledger.jsonl", Steps())
    ledger.append("adopted", tag="x1-a", provider="local", usd_per_hr=Decimal("1.00"), since_utc=later(-2))
    ledger.append(
        "poll", tag="x1-a", machine_usd=Decimal("1.00"), usd_per_hr=Decimal("1.00"), spent_usd="1.00"
    )
    return ledger


def test_only_those_that_were_seen_to_end(home: Ledger) -> None:
    assert ended.of(account(home.rows())) == (Ended("x1-a", START, Decimal("2.40")),)


def test_it_survives_the_command_line(home: Ledger) -> None:
    [one] = ended.of(account(home.rows()))
    assert str(one) == "x1-a=2026-05-23T12:00:00Z=2.400000"
    assert ended.read(str(one)) == one


def test_a_dead_machine_counts_no_more(home: Ledger, there: Ledger) -> None:
    """Without its end it would count on for ever; with it, it cost what the launcher says."""
    tomorrow = START + timedelta(days=1)
    assert account(there.rows()).spent_by(tomorrow) == Decimal("25.00")
    ended.write(ended.of(account(home.rows())), there)
    known = account(there.rows())
    assert known.spent_by(tomorrow) == known.settled_usd() == Decimal("2.40")


def test_told_again_it_is_written_once(home: Ledger, there: Ledger) -> None:
    """A reboot repeats the script."""
    gone = ended.of(account(home.rows()))
    ended.write(gone, there)
    before = there.rows()
    ended.write(gone, there)
    assert there.rows() == before


def test_one_that_the_mirror_never_heard_of_is_counted_all_the_same(home: Ledger, tmp_path: Path) -> None:
    empty = Ledger(tmp_path / "empty" / "ledger.jsonl", Steps())
    ended.write(ended.of(account(home.rows())), empty)
    known = account(empty.rows())
    assert known.spent_by(START + timedelta(days=9)) == Decimal("2.40")
    assert not known.open_machines()


def test_machines_at_a_stated_rate_share_an_id_and_are_told_apart(there: Ledger) -> None:
    """Rows of one, written after another was taken up, as where two copies were brought together."""
    for tag, spent in (("x1-b", "0.10"), ("x1-a", "1.50"), ("x1-b", "0.20")):
        if spent == "0.10":
            row = {"provider": "local", "machine_id": "this-machine", "usd_per_hr": Decimal(1)}
            there.append("adopted", tag=tag, since_utc=later(0), **row)
        there.append(
            "poll", tag=tag, machine_id="this-machine", machine_usd=spent, usd_per_hr="1.00", spent_usd="0"
        )
    spent = {m.tag: m.spent_usd for m in account(there.rows()).machines}
    assert spent == {"x1-a": Decimal("1.50"), "x1-b": Decimal("0.20")}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x1-a",
        "x1-a=2026-05-23T12:00:00Z",
        "x1-a=noon=1",
        "=2026-05-23T12:00:00Z=1",
        "x1-a=2026-05-23T12:00:00Z=nan",
        "x1-a=2026-05-23T12:00:00Z=-1",
        "x1-a=2026-05-23T12:00:00Z=1=2",
    ],
)
def test_a_slip_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="expected TAG=TIME=USD"):
        ended.read(text)
