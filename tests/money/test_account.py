"""What a ledger adds up to, against sums made by other means."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.money.account import Account, account, person_said
from x1_pretrain.money.clock import stamp
from x1_pretrain.money.ledger import LedgerError, plain

NOON = datetime(2026, 5, 23, 12, tzinfo=UTC)


def row(minutes: float, event: str, **fields: Any) -> dict[str, Any]:
    return plain({"time_utc": stamp(NOON + timedelta(minutes=minutes)), "event": event, **fields})


def at(minutes: float) -> datetime:
    return NOON + timedelta(minutes=minutes)


def intent(minutes: float, tag: str = "a", rate: str = "1.20", provider: str = "runpod") -> dict[str, Any]:
    return row(minutes, "intent", tag=tag, provider=provider, usd_per_hr=Decimal(rate))


def poll(
    minutes: float, usd: str, rate: str = "1.20", tag: str = "a", total: str | None = None
) -> dict[str, Any]:
    return row(minutes, "poll", tag=tag, machine_usd=usd, usd_per_hr=rate, spent_usd=total or usd)


def gone(minutes: float, tag: str = "a") -> dict[str, Any]:
    return row(minutes, "terminate_confirmed", tag=tag, machine_id=f"id-{tag}")


def test_an_empty_ledger_is_nothing() -> None:
    assert account([]) == Account()
    assert account([]).spent_by(NOON) == 0


def test_a_machine_bills_from_its_intent_to_its_confirmed_end() -> None:
    rows = [intent(0), row(1, "launched", tag="a", machine_id="id-a")]
    assert account(rows).spent_by(at(60)) == Decimal("1.20")
    assert [m.machine_id for m in account(rows).open_machines()] == ["id-a"]
    for asked in ("terminate_sent", "terminate_unconfirmed", "lost"):
        assert account([*rows, row(30, asked, tag="a", machine_id="id-a")]).open_machines(), asked
    closed = account([*rows, gone(90)])
    assert closed.open_machines() == []
    assert closed.spent_by(at(10_000)) == Decimal("1.80")


def test_a_launch_without_an_answer_is_open_until_it_is_known_not_to_be() -> None:
    assert [m.tag for m in account([intent(0)]).open_machines()] == ["a"]
    never = account([intent(0), row(5, "launch_failed", tag="a")])
    assert never.open_machines() == []
    assert never.spent_by(at(600)) == 0


def test_a_machine_that_turns_up_after_its_launch_was_held_for_failed_is_open() -> None:
    rows = [intent(0), row(5, "launch_failed", tag="a"), row(60, "launched", tag="a", machine_id="id-a")]
    assert [m.machine_id for m in account(rows).open_machines()] == ["id-a"]
    assert account(rows).spent_by(at(60)) == Decimal("1.20")


def test_between_polls_the_dearest_price_counts() -> None:
    rows = [intent(0), poll(5, "0.10"), poll(10, "0.225", rate="1.50"), poll(15, "0.35", rate="0.10")]
    assert account(rows).spent_by(at(75)) == Decimal("0.35") + Decimal("1.50")


def test_a_poll_that_says_less_lowers_nothing() -> None:
    found = account([intent(0), poll(60, "1.20"), poll(65, "0.05")])
    assert (found.known_usd, found.machines[0].spent_usd) == (Decimal("1.20"), Decimal("1.20"))


def test_two_machines_and_their_own_rows() -> None:
    rows = [intent(0), row(1, "launched", tag="a", machine_id="id-a"), poll(60, "1.20"), gone(65),
            intent(120, "b", "2.40"), row(121, "launched", tag="b", machine_id="id-b"),
            poll(150, "1.20", "2.40", "b", total="2.50")]  # fmt: skip
    found = account(rows)
    assert [m.tag for m in found.open_machines()] == ["b"]
    assert found.spent_by(at(180)) == Decimal("1.20") + Decimal("0.10") + Decimal("1.20") + Decimal("1.20")
    assert found.known_usd == Decimal("2.50")


def test_an_adopted_machine_bills_since_it_was_started() -> None:
    rows = [
        row(60, "adopted", since_utc=stamp(NOON), tag="t", machine_id="i", provider="lambda", usd_per_hr="2")
    ]
    assert account(rows).spent_by(at(90)) == 3


def test_two_ledgers_of_one_machine_are_one_machine() -> None:
    """Its launcher's and its own, whichever comes first: ten hours at $1.20, ended."""
    x, here = {"tag": "x"}, {"machine_id": "this-machine", "provider": "local"}
    own = [
        row(5, "adopted", **x, **here, usd_per_hr="1.20", since_utc=stamp(at(0))),
        poll(300, "6.00", tag="x"),
        poll(595, "11.90", tag="x"),
    ]
    home = [
        intent(0, "x"),
        row(1, "launched", machine_id="pod-1", **x),
        poll(290, "5.80", tag="x"),
        row(600, "terminate_confirmed", machine_id="pod-1", **x),
    ]
    for rows in (own + home, home + own):
        found = account(rows)
        [machine] = found.machines
        assert (machine.provider, machine.machine_id) == ("runpod", "pod-1")
        assert (found.settled_usd(), found.spent_by(at(1800))) == (12, 12)
        assert not found.open_machines()
    alive = account(own + home[:-1])
    assert [m.machine_id for m in alive.open_machines()] == ["pod-1"]
    assert alive.spent_by(at(605)) == Decimal("12.10")


def test_a_machine_that_comes_back_after_its_end_is_billed_anew() -> None:
    again = row(120, "adopted", tag="a", provider="runpod", machine_id="id-a", usd_per_hr="1.20")
    rows = [intent(0), row(1, "launched", tag="a", machine_id="id-a"), gone(60), again]
    assert account(rows).spent_by(at(180)) == Decimal("2.40")
    two = {"tag": "this-machine", "machine_id": "this-machine", "provider": "local", "usd_per_hr": "1.20"}
    assert len(account([row(0, "adopted", **two), row(9, "adopted", **two)]).machines) == 2


def test_this_computer_is_never_an_open_machine() -> None:
    assert account([intent(0, provider="local")]).open_machines() == []


def test_a_correction_goes_both_ways_and_the_machines_count_on_from_it() -> None:
    for amount in ("0.70", "9.00"):
        counted = account([intent(0), poll(60, "1.20")]).spent_by(at(60))
        fixed = row(
            60, "correction", spent_usd=amount, before_usd="1.20", adjusted_usd=Decimal(amount) - counted
        )
        found = account([intent(0), poll(60, "1.20"), fixed])
        assert found.known_usd == found.spent_by(at(60)) == Decimal(amount)
        assert found.spent_by(at(120)) == Decimal(amount) + Decimal("1.20")


def test_a_trainer_that_counts_as_before_does_not_undo_a_correction() -> None:
    rows = [intent(0), row(1, "gate", verdict="passed", ceiling_usd="35"), row(5, "reading", spent_usd="30"),
            row(6, "correction", spent_usd="3", before_usd="30", adjusted_usd="0"),
            row(7, "reading", spent_usd="30.1"), row(8, "stop", spent_usd="30.2")]  # fmt: skip
    assert account(rows).known_usd == 3
    started = [row(9, "gate", verdict="passed", ceiling_usd="35"), row(10, "reading", spent_usd="3.1")]
    assert account(rows + started).known_usd == Decimal("3.1")
    assert account([*rows, poll(9, "4", total="4")]).known_usd == 4


def test_the_ceiling_is_the_last_said_until_a_person_raises_it() -> None:
    def ceiling(*rows: dict[str, Any]) -> Decimal | None:
        return account(rows).ceiling_usd

    passed = row(0, "gate", verdict="passed", ceiling_usd="35")
    refused = row(0, "gate", verdict="refused", ceiling_usd="20")
    raised = row(0, "raised", ceiling_usd="50", before_usd="35")
    said = row(0, "ceiling", ceiling_usd="30")
    assert ceiling() is None
    assert ceiling(passed) == ceiling(passed, refused) == 35
    assert ceiling(passed, said) == 30
    assert ceiling(passed, raised) == ceiling(passed, raised, passed) == 50
    assert ceiling(passed, raised, said) == 30  # lowered again, by a command below what was raised


@pytest.mark.parametrize(
    "bad",
    [{"usd_per_hr": "x"}, {"usd_per_hr": None}, {"tag": None, "drop": "tag"}, {"time_utc": "later"},
     {"spent_usd": "NaN"}, {"spent_usd": None}],
)  # fmt: skip
def test_a_row_that_can_not_be_added_is_named(bad: dict[str, Any]) -> None:
    damaged = intent(0) | {"seq": 7} | bad
    damaged.pop(str(bad.get("drop")), None)
    with pytest.raises(LedgerError, match=r"ledger row 7 \(intent\)") as caught:
        account([intent(0), damaged])
    assert "\n" not in str(caught.value)


def test_the_last_answer_after_a_row_counts() -> None:
    rows = [{"event": "answer", "seq": 3, "answer": "stop"}, {"event": "poll", "seq": 4},
            {"event": "answer", "seq": 5, "answer": "continue"}]  # fmt: skip
    assert [person_said(rows, seq) for seq in (0, 3, 4, 5)] == ["continue", "continue", "continue", None]
    assert person_said(rows[:1], 2) == "stop"


# ------------------------------------------------------------------------------------------------------------
# Any history


@dataclass
class Told:
    """One machine of a made-up history, added up by hand."""

    polls: list[tuple[int, Decimal, Decimal]]
    rate: Decimal
    begun: int
    ended: int | None

    def cost(self, now: int) -> Decimal:
        seen = [p for p in self.polls if p[0] <= now]
        spent = max((usd for _, usd, _ in seen), default=Decimal(0))
        dearest = max([self.rate, *(rate for _, _, rate in seen)])
        last = seen[-1][0] if seen else self.begun
        end = min(now, self.ended) if self.ended is not None else now
        return spent + dearest * max(0, end - last) / 60


amounts = st.integers(0, 400).map(lambda c: Decimal(c) / 100)
histories = st.lists(
    st.tuples(amounts, st.lists(st.tuples(st.integers(1, 30), amounts, amounts), max_size=5), st.booleans()),
    max_size=4,
)


@given(histories, st.integers(0, 1000))
def test_the_sum_is_that_of_its_machines_and_what_is_known_never_falls(history: Any, later: int) -> None:
    rows, told, now = [], [], 0
    for number, (rate, polls, ended) in enumerate(history):
        tag, begun, seen = str(number), now, []
        rows.append(intent(now, tag, str(rate)))
        for wait, usd, price in polls:
            now += wait
            seen.append((now, usd, price))
            rows.append(poll(now, str(usd), str(price), tag))
        now += 1
        if ended:
            rows.append(gone(now, tag))
        told.append(Told(seen, rate, begun, now if ended else None))
    found = account(rows)
    for moment in (now, now + later):
        expected = sum((one.cost(moment) for one in told), Decimal(0))
        assert abs(found.spent_by(at(moment)) - expected) < Decimal("1e-9")
    assert found.spent_by(at(now + later)) >= found.spent_by(at(now))
    known = [account(rows[:end]).known_usd for end in range(len(rows) + 1)]
    assert known == sorted(known)
    assert known[-1] == max((usd for one in told for _, usd, _ in one.polls), default=0)


def test_a_machine_of_ones_own_costs_only_while_it_works() -> None:
    row = {
        "event": "adopted",
        "time_utc": "2026-01-01T00:00:00Z",
        "tag": "this-machine",
        "provider": "local",
        "machine_id": "this-machine",
        "usd_per_hr": "0.50",
    }
    poll = {"event": "poll", "time_utc": "2026-01-01T02:00:00Z", "tag": "this-machine", "machine_usd": "1.00"}
    poll |= {"usd_per_hr": "0.50", "spent_usd": "1.00"}
    later = datetime(2026, 1, 11, 2, tzinfo=UTC)
    rented = account([row, poll]).spent_by(later)
    own = account([row | {"bills_idle": False}, poll]).spent_by(later)
    assert (rented, own) == (Decimal("121.00"), Decimal("1.00"))


def test_a_raise_holds_until_a_lower_cap_is_given() -> None:
    raised = account(
        [row(0, "ceiling", ceiling_usd="35"), row(1, "raised", ceiling_usd="50", before_usd="35")]
    )
    assert raised.in_force(Decimal(35)) == raised.in_force(Decimal(60)) == 50
    assert raised.in_force(Decimal(20)) == 20
    assert account([]).in_force(Decimal(35)) == 35


def test_what_is_settled_counts_a_machine_to_its_end_and_its_bill() -> None:
    machine = {"tag": "a", "provider": "runpod", "machine_id": "a"}
    rows = [
        row(0, "intent", usd_per_hr="1", **machine),
        row(60, "poll", machine_usd="1", spent_usd="1", usd_per_hr="1", **machine),
        row(240, "terminate_confirmed", **machine),
    ]
    assert account(rows).settled_usd() == 4  # three hours unseen
    assert account([*rows[:2]]).settled_usd() == 1
    assert account([*rows[:2], rows[2] | {"billed_usd": "9.5"}]).settled_usd() == Decimal("9.5")
