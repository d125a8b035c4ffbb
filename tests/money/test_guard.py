"""The guard's decision: each branch of the contract as a table, and spending that never passes its bound.

The simulator below knows nothing of the guard: a price that changes as it likes, what was truly spent, a
watcher that tells the truth late, twice, in the wrong order, in part or not at all, and a trainer that
decides every so many seconds. What can be promised, with C the ceiling, D the seconds between two decisions,
R the dearest true price, A the greatest age at which the guard let the run go on (never above `stale_s`) and
T what saving and ending the machine take (`save_s + end_s`), of amounts that were honestly read:

    spent at the stop <= C + R*D + (R - gate)*A - gate*T        (R - gate: where positive)

So a price that never passes the gate's can't pass the ceiling, not even once the machine is gone, but for the
one interval D, however long the watcher has been dead; and a fresh reading at each decision leaves one poll's
worth. Where the amount itself is stuck or too low, its rate has to be true: then the same holds for a
constant price, and each change of price costs at most its size times the longest gap between two readings.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x1_pretrain.errors import BUDGET_CHECKPOINTED, BUDGET_STOPPED
from x1_pretrain.money.guard import EXIT_CODES, Action, Decision, Limits, Memory, Reading, decide, minutes

MINUTE = 60.0
LIMITS = Limits(ceiling_usd=Decimal(35), gate_usd_per_hr=Decimal("1.20"), warn_usd=Decimal(30))
ROOM_S = int(LIMITS.save_s + LIMITS.end_s)
HARDNESS = {Action.GO: 0, Action.SAVE_AND_STOP: 1, Action.STOP_NOW: 2}
Answer = Literal["stop", "continue"] | None


@dataclass(frozen=True)
class Turn:
    """One decision: when, and what is new by then."""

    minute: float
    reading: Reading | None = None
    answer: Answer = None
    left_hours: float | None = None
    problem: str | None = None


def said(
    spent: str, minute: float, *, rate: str | None = "1.20", projected: str | None = None, seq: int = 0
) -> Reading:
    dollars_per_hr = None if rate is None else Decimal(rate)
    total = None if projected is None else Decimal(projected)
    return Reading(Decimal(spent), dollars_per_hr, total, minute * MINUTE, seq)


def at(minute: float, spent: str, **more: Any) -> Turn:
    """A decision with a reading that is true at that moment."""
    return Turn(minute, said(spent, minute, **more))


def play(turns: Iterable[Turn], limits: Limits = LIMITS) -> list[Decision]:
    memory, made = Memory(since_s=0.0), []
    for turn in turns:
        left_s = None if turn.left_hours is None else turn.left_hours * 3600
        now_s = turn.minute * MINUTE
        decision = decide(
            turn.reading, limits, now_s, memory, left_s=left_s, answer=turn.answer, problem=turn.problem
        )
        made.append(decision)
        memory = decision.memory
    return made


def keys(decision: Decision) -> list[str]:
    return [notice.key for notice in decision.notices]


# ------------------------------------------------------------------------------------------------------------
# The contract, branch by branch

TABLE: dict[str, tuple[list[Turn], Action, list[str]]] = {
    "far below everything": ([at(0, "10")], Action.GO, []),
    "exactly at the notice": ([at(0, "30")], Action.GO, []),
    "a cent above the notice goes on": ([at(0, "30.01")], Action.GO, ["warn"]),
    "exactly at the ceiling there is no room to save": (
        [at(0, "35")],
        Action.SAVE_AND_STOP,
        ["warn", "stop-76"],
    ),
    "a cent above the ceiling, at once": ([at(0, "35.01")], Action.STOP_NOW, ["warn", "stop-77"]),
    "above the ceiling beats a person's continue": (
        [Turn(0, said("35.01", 0), answer="continue")],
        Action.STOP_NOW,
        ["warn", "stop-77"],
    ),
    "above the ceiling beats a person's stop": (
        [Turn(0, said("35.01", 0), answer="stop")],
        Action.STOP_NOW,
        ["warn", "stop-77"],
    ),
    "room to save and end the machine is kept: $1.20/h is 12 cents in 6 min": (
        [at(0, "34.881")],
        Action.SAVE_AND_STOP,
        ["warn", "stop-76"],
    ),
    "just enough room": ([at(0, "34.879")], Action.GO, ["warn"]),
    "a projection while warming up": (
        [at(0, "1", projected="36"), at(5, "1.1", projected="36")],
        Action.GO,
        [],
    ),
    "a first projection after warm-up": ([at(10, "1", projected="36")], Action.GO, ["projection"]),
    "a second one in a row": (
        [at(10, "1", projected="36"), at(15, "1.1", projected="35.5")],
        Action.SAVE_AND_STOP,
        ["stop-76"],
    ),
    "a breach, a good one, a breach": (
        [at(10, "1", projected="36"), at(15, "1.1", projected="34"), at(20, "1.2", projected="36")],
        Action.GO,
        ["projection"],
    ),
    "the breach before warm-up does not count": (
        [at(9, "1", projected="36"), at(14, "1.1", projected="36")],
        Action.GO,
        ["projection"],
    ),
    "a projection exactly at the ceiling": (
        [at(10, "1", projected="35"), at(15, "1.1", projected="35")],
        Action.GO,
        [],
    ),
    "silence between two breaches is not a good reading": (
        [at(10, "1", projected="36"), Turn(12), Turn(14), at(15, "1.1", projected="36")],
        Action.SAVE_AND_STOP,
        ["stop-76"],
    ),
    "our own pace projects too: $1 and 29 h at $1.20": (
        [
            Turn(10, said("1", 10), left_hours=29),
            Turn(15, said("1.1", 15), left_hours=29),
        ],
        Action.SAVE_AND_STOP,
        ["stop-76"],
    ),
    "our own pace within the ceiling": (
        [Turn(10, said("1", 10), left_hours=28), Turn(15, said("1.1", 15), left_hours=28)],
        Action.GO,
        [],
    ),
    "the dearer of two projections counts": (
        [
            Turn(10, said("1", 10, projected="20"), left_hours=29),
            Turn(15, said("1.1", 15, projected="20"), left_hours=29),
        ],
        Action.SAVE_AND_STOP,
        ["stop-76"],
    ),
    "1.2 times the agreed rate": ([at(0, "1", rate="1.44")], Action.GO, []),
    "more than that is a question": ([at(0, "1", rate="1.50")], Action.GO, ["drift-$1.50"]),
    "an unanswered question waits 30 min": (
        [at(0, "1", rate="1.50"), at(30, "1.75", rate="1.50")],
        Action.GO,
        ["drift-$1.50"],
    ),
    "and then stops": (
        [at(0, "1", rate="1.50"), at(29, "1.725", rate="1.50"), Turn(30.1)],
        Action.SAVE_AND_STOP,
        ["drift-$1.50", "stop-76"],
    ),
    "a rate that came back down asks nothing": (
        [at(0, "1", rate="1.50"), at(29, "1.6", rate="1.20"), at(31, "1.7", rate="1.50")],
        Action.GO,
        ["drift-$1.50"],
    ),
    "a person says continue": (
        [at(0, "1", rate="1.50"), Turn(10, said("1.25", 10, rate="1.50"), answer="continue"), Turn(20)],
        Action.GO,
        [],
    ),
    "continue is for that rate: a dearer one asks again": (
        [at(0, "1", rate="1.50"), Turn(1, answer="continue"), at(10, "1.3", rate="1.81")],
        Action.GO,
        ["drift-$1.81"],
    ),
    "a person says stop": (
        [at(0, "1"), Turn(1, said("1.02", 1), answer="stop")],
        Action.SAVE_AND_STOP,
        ["stop-76"],
    ),
    "what the last hour cost is a rate, whatever it states": (
        [at(0, "1"), at(30, "1.9"), at(60, "2.8")],
        Action.GO,
        ["drift-$1.80"],
    ),
    "11 minutes old": ([at(0, "1"), Turn(11)], Action.GO, []),
    "more than 11 minutes old": ([at(0, "1"), Turn(11.1)], Action.GO, ["quiet"]),
    "30 minutes old": ([at(0, "1"), Turn(30)], Action.GO, ["quiet"]),
    "more than 30 minutes old": ([at(0, "1"), Turn(30.1)], Action.SAVE_AND_STOP, ["quiet", "stop-76"]),
    "a reading that was old when it came": (
        [Turn(40, said("1", 9))],
        Action.SAVE_AND_STOP,
        ["quiet", "stop-76"],
    ),
    "the same old reading again does not make it younger": (
        [at(0, "1"), Turn(20, said("1", 0)), Turn(31, said("1", 0))],
        Action.SAVE_AND_STOP,
        ["quiet", "stop-76"],
    ),
    "counting on reaches the ceiling before the silence is long": (
        [at(0, "34.80"), Turn(4.1)],
        Action.SAVE_AND_STOP,
        ["warn", "stop-76"],
    ),
    "and just before": ([at(0, "34.80"), Turn(3.9)], Action.GO, ["warn"]),
    "no reading at all for more than 30 minutes": (
        [Turn(1), Turn(31)],
        Action.SAVE_AND_STOP,
        ["quiet", "stop-76"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_contract(name: str) -> None:
    turns, action, expected = TABLE[name]
    *before, last = play(turns)
    assert (last.action, keys(last)) == (action, expected)
    assert [d.action for d in before] == [Action.GO] * len(before)


def test_exit_codes() -> None:
    assert EXIT_CODES == {Action.SAVE_AND_STOP: BUDGET_CHECKPOINTED, Action.STOP_NOW: BUDGET_STOPPED}
    assert (BUDGET_CHECKPOINTED, BUDGET_STOPPED) == (76, 77)


def test_continue_as_the_default_never_stops_for_the_rate_but_keeps_the_ceiling() -> None:
    limits = replace(LIMITS, no_answer="continue")
    hours = [at(60 * h, f"{3 * h}", rate="3.00") for h in range(13)]
    made = play(hours, limits)
    first = next(i for i, d in enumerate(made) if d.action is not Action.GO)
    assert first == 12  # $36 of $35: eleven hours at 2.5 times the rate before it
    assert all("drift-$3.00" in keys(d) for d in made)


@pytest.mark.parametrize("rate", [None, "0"])
def test_a_rate_of_nothing_counts_at_the_gate_price(rate: str | None) -> None:
    read, later = play([at(0, "10", rate=rate), Turn(10)])
    assert read.spent_usd == 10
    assert later.spent_usd == Decimal("10.20")


@pytest.mark.parametrize(("rate", "counted"), [("0.30", "10.20"), ("1.20", "10.20"), ("2.40", "10.40")])
def test_between_readings_the_dearer_of_its_rate_and_the_gates_counts(rate: str, counted: str) -> None:
    assert play([at(0, "10", rate=rate), Turn(10)])[-1].spent_usd == Decimal(counted)


def test_the_last_hour_counts_on_when_it_was_dearer_than_the_stated_rate() -> None:
    made = play([at(0, "10"), at(60, "14"), Turn(75)])
    assert made[-1].spent_usd == 15  # $4 an hour


def test_a_lower_reading_never_lowers_it() -> None:
    made = play([at(0, "20"), at(10, "3"), at(20, "0"), at(30, "20.1")])
    known = [d.memory.spent_usd for d in made]
    assert known == [Decimal(x) for x in ("20", "20.2", "20.4", "20.6")]


def test_a_stuck_amount_that_contradicts_its_own_rate_is_not_believed() -> None:
    limits = replace(LIMITS, ceiling_usd=Decimal(22))
    made = play((at(5 * n, "20") for n in range(60)), limits)
    first = next(i for i, d in enumerate(made) if d.action is not Action.GO)
    assert first == 19  # $2 at $1.20/h are 100 minutes, 6 of them to save and end the machine
    assert made[first].action is Action.SAVE_AND_STOP


def test_a_stuck_amount_without_a_rate_counts_at_the_gate_price() -> None:
    made = play(at(5 * n, "20", rate=None) for n in range(13))
    assert made[-1].memory.spent_usd == Decimal("21.20")


def test_an_amount_that_grows_at_its_own_low_rate_is_believed() -> None:
    made = play([at(0, "10", rate="0.60"), at(10, "10.1", rate="0.60"), at(20, "10.2", rate="0.60")])
    assert made[-1].spent_usd == Decimal("10.2")


def test_an_honest_amount_after_the_price_fell_is_believed() -> None:
    made = play([at(0, "10", rate="1.20"), at(60, "10.6", rate="0.60")])
    assert made[-1].spent_usd == Decimal("10.6")


def test_an_older_reading_that_comes_late_changes_nothing() -> None:
    newest = at(20, "10", rate="2.40", projected="34")
    late = Turn(21, said("9.8", 10, rate="1.20", projected="20"))
    (_, with_it), (_, without) = play([newest, late]), play([newest, Turn(21)])
    assert with_it.spent_usd == without.spent_usd == Decimal("10.04")
    assert with_it.projected_usd == without.projected_usd == 34


def test_one_reading_seen_twice_is_one_breach() -> None:
    """The trainer reads the same file again before each checkpoint."""
    breach = said("1", 12, projected="36", seq=7)
    once, again, new = play(
        [Turn(12, breach), Turn(13, breach), Turn(17, said("1.1", 17, projected="36", seq=8))]
    )
    assert (once.action, again.action, new.action) == (Action.GO, Action.GO, Action.SAVE_AND_STOP)


@pytest.mark.parametrize("ahead_min", [1, 60, 10**9])
def test_a_reading_from_the_future_does_not_hide_the_silence_after_it(ahead_min: float) -> None:
    made = play([at(0, "1"), Turn(5, said("1.1", 5 + ahead_min)), Turn(37)])
    assert made[-1].action is Action.SAVE_AND_STOP
    assert made[-1].age_s >= 31 * MINUTE


@pytest.mark.parametrize("name", TABLE)
def test_what_a_person_reads_fits_what_happens(name: str) -> None:
    for decision in play(TABLE[name][0]):
        assert all(n.title and n.body for n in decision.notices)
        assert len(set(keys(decision))) == len(decision.notices)
        if decision.action is not Action.GO:
            assert not [n.body for n in decision.notices if "goes on" in n.body or "If the next" in n.body]
            assert decision.reason


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (30, "30 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_a_short_time_is_told_in_seconds(seconds: float, said: str) -> None:
    assert minutes(seconds) == said


def test_the_notice_of_silence_says_why() -> None:
    decision = play([at(0, "1"), Turn(12, problem="half a file")])[-1]
    assert "half a file" in decision.notices[0].body


# ------------------------------------------------------------------------------------------------------------
# The simulator


@dataclass(frozen=True)
class Price:
    """Dollars an hour over time: pieces of whole seconds; the last one goes on for ever."""

    pieces: tuple[tuple[int, Decimal], ...]

    def at(self, second: float) -> Decimal:
        for length, usd_per_hr in self.pieces[:-1]:
            if second < length:
                return usd_per_hr
            second -= length
        return self.pieces[-1][1]

    def spent(self, until: float) -> Decimal:
        """The integral from 0, exactly."""
        total, left = Decimal(0), Decimal(until)
        for index, (length, usd_per_hr) in enumerate(self.pieces):
            part = left if index == len(self.pieces) - 1 else min(left, Decimal(length))
            total += usd_per_hr * part
            left -= part
        return total / 3600

    def dearest(self, until: float) -> Decimal:
        begins = [sum(length for length, _ in self.pieces[:i]) for i in range(len(self.pieces))]
        return max(usd for begin, (_, usd) in zip(begins, self.pieces, strict=True) if begin <= until)

    def variation(self) -> Decimal:
        rates = [usd for _, usd in self.pieces]
        return sum((abs(b - a) for a, b in itertools.pairwise(rates)), Decimal(0))


@dataclass(frozen=True)
class Arrival:
    """At second `at` the trainer gets a reading that was true `delay` seconds before."""

    at: int
    delay: int = 0
    rate: Literal["true", "none", "zero", "half"] = "true"
    low: int = 0  # percent by which `spent` is too low
    skew: int = 0  # seconds by which its time is ahead
    projected: str | None = None


def honest(price: Price, arrival: Arrival, seq: int) -> Reading:
    true_at = max(0, arrival.at - arrival.delay)
    rate = {"true": price.at(true_at), "none": None, "zero": Decimal(0), "half": price.at(true_at) / 2}
    spent = price.spent(true_at) * (100 - arrival.low) / 100
    projected = None if arrival.projected is None else Decimal(arrival.projected)
    return Reading(spent, rate[arrival.rate], projected, float(true_at + arrival.skew), seq)


@dataclass(frozen=True)
class Run:
    """How one simulated run ended."""

    stopped_s: int
    last: Decision
    decisions: list[Decision]

    @property
    def greatest_age_s(self) -> Decimal:
        return Decimal(max((d.age_s for d in self.decisions[:-1]), default=0.0))


def simulate(
    price: Price,
    limits: Limits,
    arrivals: Sequence[Arrival],
    every_s: int,
    answers: frozenset[int] = frozenset(),
) -> Run:
    """Until the guard stops it. `answers`: the decisions, by number, at which a person says continue."""
    memory, made, waiting = Memory(since_s=0.0), [], sorted(arrivals, key=lambda a: a.at)
    told: list[Reading] = [honest(price, Arrival(0), 0)]  # a start without a reading is refused
    for number in range(20_000):
        now = number * every_s
        while waiting and waiting[0].at <= now:
            told.append(honest(price, waiting.pop(0), len(made)))
        answer: Answer = "continue" if number in answers else None
        for reading in told or [None]:
            decision = decide(reading, limits, float(now), memory, answer=answer)
            memory = decision.memory
            made.append(decision)
            if decision.action is not Action.GO:
                return Run(now, decision, made)
        told = []
    raise AssertionError("it was never stopped")


def bound_usd(price: Price, limits: Limits, every_s: int, run: Run, skew_s: int = 0) -> Decimal:
    """The promise of the first lines of this file."""
    dearest, gate = price.dearest(run.stopped_s), limits.gate_usd_per_hr
    aged = max(Decimal(0), dearest - gate) * run.greatest_age_s
    over = dearest * (every_s + skew_s) + aged - gate * Decimal(limits.save_s + limits.end_s)
    return limits.ceiling_usd + over / 3600


CENTS = Decimal("0.01")
EPSILON = Decimal("1e-12")
EVERY_S = st.sampled_from([1, 7, 60, 300, 1800])


@st.composite
def settings_of_a_run(draw: st.DrawFn, price_upto: int = 900) -> tuple[Price, Limits, int]:
    """A price history, limits such that the run ends within 150 intervals or so, and the interval."""
    every_s = draw(EVERY_S)
    gate = draw(st.integers(10, 500)) * CENTS
    ceiling = gate * every_s * draw(st.integers(3, 150)) / 3600 + gate * ROOM_S / 3600
    lengths = st.integers(1, 60 * every_s)
    piece = st.tuples(lengths, st.integers(0, price_upto).map(lambda cents: cents * CENTS))
    price = Price(tuple(draw(st.lists(piece, min_size=1, max_size=6))))
    no_answer: Literal["stop", "continue"] = draw(st.sampled_from(["stop", "continue", "continue"]))
    limits = Limits(ceiling, gate, warn_usd=ceiling * 6 / 7, no_answer=no_answer)
    return price, limits, every_s


def arrivals_for(every_s: int, **kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Arrival]]:
    """Any times, any delays: so also repeated, out of order, with long gaps, or none at all."""
    at_s = st.integers(0, 150 * every_s)
    delay = st.integers(0, 5 * every_s)
    return st.lists(st.builds(Arrival, at_s, delay, **kinds), max_size=40)


STOPPED_FOR_SPENDING = "above the ceiling"


@settings(max_examples=250)
@given(data=st.data(), drawn=settings_of_a_run())
def test_honest_amounts_keep_the_bound_whatever_the_price_does(
    data: st.DataObject, drawn: tuple[Price, Limits, int]
) -> None:
    price, limits, every_s = drawn
    rates = st.sampled_from(["true", "none", "zero", "half"])
    skews = st.integers(-60, 60)
    arrivals = data.draw(arrivals_for(every_s, rate=rates, skew=skews))
    answers = data.draw(st.frozensets(st.integers(0, 150), max_size=3))
    run = simulate(price, limits, arrivals, every_s, answers)
    ahead_s = max([0, *(a.skew for a in arrivals)])
    assert price.spent(run.stopped_s) <= bound_usd(price, limits, every_s, run, ahead_s) + EPSILON
    assert run.greatest_age_s <= Decimal(limits.stale_s)


@settings(max_examples=150)
@given(data=st.data(), drawn=settings_of_a_run(), every_s=st.sampled_from([1, 7, 60]))
def test_a_price_below_the_gates_never_passes_the_ceiling(
    data: st.DataObject, drawn: tuple[Price, Limits, int], every_s: int
) -> None:
    """Decisions a minute apart or less, any outage, delay or stated rate: saving and ending included."""
    price, limits, _ = drawn
    gate = limits.gate_usd_per_hr
    price = Price(tuple((length, min(usd, gate)) for length, usd in price.pieces))
    limits = replace(limits, ceiling_usd=gate * (every_s * 150 + ROOM_S) / 3600)
    rates = st.sampled_from(["true", "none", "zero", "half"])
    run = simulate(price, limits, data.draw(arrivals_for(every_s, rate=rates)), every_s)
    assert price.spent(run.stopped_s + ROOM_S - every_s) <= limits.ceiling_usd


@settings(max_examples=150)
@given(data=st.data(), drawn=settings_of_a_run())
def test_an_amount_that_lies_low_under_a_constant_price_keeps_the_bound(
    data: st.DataObject, drawn: tuple[Price, Limits, int]
) -> None:
    """Stuck, halved, back at nothing: what it states as its rate is held against it."""
    price, limits, every_s = drawn
    price = Price(price.pieces[-1:])
    rates = ["true"] if price.pieces[0][1] > limits.gate_usd_per_hr else ["true", "none", "zero"]
    kinds = {"low": st.sampled_from([0, 1, 50, 100]), "rate": st.sampled_from(rates)}
    run = simulate(price, limits, data.draw(arrivals_for(every_s, **kinds)), every_s)
    assert price.spent(run.stopped_s) <= bound_usd(price, limits, every_s, run) + EPSILON


@settings(max_examples=150)
@given(data=st.data(), drawn=settings_of_a_run(), gap=st.integers(1, 6), low=st.sampled_from([1, 50, 100]))
def test_an_amount_that_lies_low_costs_each_change_of_price_at_most_one_gap(
    data: st.DataObject, drawn: tuple[Price, Limits, int], gap: int, low: int
) -> None:
    price, limits, every_s = drawn
    gap_s = gap * every_s
    arrivals = [Arrival(second, low=low) for second in range(0, 400 * every_s, gap_s)]
    run = simulate(price, limits, arrivals, every_s)
    more = price.variation() * gap_s / 3600
    assert price.spent(run.stopped_s) <= bound_usd(price, limits, every_s, run) + more + EPSILON


@settings(max_examples=60)
@given(data=st.data(), drawn=settings_of_a_run(), last=st.integers(0, 40))
def test_a_dead_watcher_ends_the_run_within_its_time(
    data: st.DataObject, drawn: tuple[Price, Limits, int], last: int
) -> None:
    price, limits, every_s = drawn
    limits = replace(limits, ceiling_usd=Decimal(10**6))
    arrivals = [Arrival(second * every_s) for second in range(last + 1)]
    run = simulate(price, replace(limits, no_answer="continue"), arrivals, every_s)
    assert limits.stale_s < run.stopped_s - last * every_s <= limits.stale_s + every_s


@settings(max_examples=60)
@given(data=st.data(), pieces=st.lists(st.tuples(st.integers(60, 7200), st.integers(1, 120)), min_size=1))
def test_an_honest_run_within_its_price_is_left_alone(
    data: st.DataObject, pieces: list[tuple[int, int]]
) -> None:
    """Ten hours, readings every 5 min and up to 5 min late: not one notice, let alone a stop."""
    price = Price(tuple((length, cents * CENTS) for length, cents in pieces))
    limits = replace(LIMITS, ceiling_usd=Decimal("12.3"), warn_usd=Decimal("12.1"))
    delays = data.draw(st.lists(st.integers(0, 300), min_size=120, max_size=120))
    memory = Memory(since_s=0.0)
    for minute in range(600):
        now = minute * 60
        due = minute % 5 == 0
        late = Arrival(now, delays[minute // 5], "none" if delays[minute // 5] % 7 == 0 else "true")
        decision = decide(honest(price, late, minute) if due else None, limits, float(now), memory)
        memory = decision.memory
        assert (decision.action, decision.notices) == (Action.GO, ())


# ------------------------------------------------------------------------------------------------------------
# Pure, and never softer for more

AMOUNT = st.integers(0, 4500).map(lambda cents: cents * CENTS)
RATE = st.one_of(st.none(), st.integers(0, 400).map(lambda cents: cents * CENTS))
READING = st.builds(
    Reading, AMOUNT, RATE, st.one_of(st.none(), AMOUNT), st.floats(0, 7200), st.integers(0, 9)
)
STEP = st.tuples(
    st.one_of(st.none(), READING), st.integers(0, 1500), st.sampled_from([None, None, "continue"])
)
HISTORY = st.lists(STEP, max_size=12)


def remembered(history: Sequence[tuple[Reading | None, int, Answer]]) -> tuple[Memory, float]:
    """The memory after some steps, and the time."""
    memory, now_s = Memory(since_s=0.0), 0.0
    for reading, seconds, answer in history:
        now_s += seconds
        shown = None if reading is None else replace(reading, at_s=min(reading.at_s, now_s))
        memory = decide(shown, LIMITS, now_s, memory, answer=answer).memory
    return memory, now_s


@given(history=HISTORY, reading=st.one_of(st.none(), READING), left=st.one_of(st.none(), st.floats(0, 1e6)))
def test_the_same_question_has_the_same_answer(
    history: list[tuple[Reading | None, int, Answer]], reading: Reading | None, left: float | None
) -> None:
    memory, now_s = remembered(history)
    before = copy.deepcopy((reading, LIMITS, memory))
    first = decide(reading, LIMITS, now_s, memory, left_s=left)
    decide(reading, LIMITS, now_s + 99, memory, left_s=left, answer="stop")
    assert decide(reading, LIMITS, now_s, memory, left_s=left) == first
    assert (reading, LIMITS, memory) == before


@given(history=HISTORY)
def test_what_is_known_only_grows(history: list[tuple[Reading | None, int, Answer]]) -> None:
    for cut in range(len(history)):
        (before, _), (after, _) = remembered(history[:cut]), remembered(history[: cut + 1])
        assert after.spent_usd >= before.spent_usd
        assert (after.at_s or 0.0) >= (before.at_s or 0.0)
        assert after.accepted_usd_per_hr >= before.accepted_usd_per_hr


@given(
    history=HISTORY, reading=READING, more=st.integers(0, 2000), left=st.one_of(st.none(), st.floats(0, 1e5))
)
def test_more_spent_is_never_softer(
    history: list[tuple[Reading | None, int, Answer]], reading: Reading, more: int, left: float | None
) -> None:
    memory, now_s = remembered(history)
    reading = replace(reading, at_s=min(reading.at_s, now_s))
    dearer = replace(reading, spent_usd=reading.spent_usd + more * CENTS)
    less = decide(reading, LIMITS, now_s, memory, left_s=left)
    much = decide(dearer, LIMITS, now_s, memory, left_s=left)
    assert HARDNESS[much.action] >= HARDNESS[less.action]
    assert much.spent_usd >= less.spent_usd


@given(history=HISTORY, reading=st.one_of(st.none(), READING), later=st.floats(0, 4000))
def test_more_age_is_never_softer(
    history: list[tuple[Reading | None, int, Answer]], reading: Reading | None, later: float
) -> None:
    """The same reading, looked at later."""
    memory, now_s = remembered(history)
    if reading is not None:
        reading = replace(reading, at_s=min(reading.at_s, now_s))
    young = decide(reading, LIMITS, now_s, memory)
    old = decide(reading, LIMITS, now_s + later, memory)
    assert HARDNESS[old.action] >= HARDNESS[young.action]
    assert old.spent_usd >= young.spent_usd
    assert old.age_s >= young.age_s


@given(history=HISTORY, more=st.lists(st.integers(0, 200), min_size=12, max_size=12))
def test_a_dearer_history_never_stops_later(
    history: list[tuple[Reading | None, int, Answer]], more: list[int]
) -> None:
    """The same run, with ever more spent at each reading: at no step is the decision softer."""
    extra = Decimal(0)
    cheap, dear, now_s = Memory(since_s=0.0), Memory(since_s=0.0), 0.0
    for (reading, seconds, _), cents in zip(history, more, strict=False):
        now_s, extra = now_s + seconds, extra + cents * CENTS
        low = None if reading is None else replace(reading, at_s=min(reading.at_s, now_s))
        high = None if low is None else replace(low, spent_usd=low.spent_usd + extra)
        less, much = decide(low, LIMITS, now_s, cheap), decide(high, LIMITS, now_s, dear)
        assert HARDNESS[much.action] >= HARDNESS[less.action]
        cheap, dear = less.memory, much.memory


LIMIT_CHANGES: dict[str, Callable[[Limits], Limits]] = {
    "a lower ceiling": lambda limits: replace(limits, ceiling_usd=limits.ceiling_usd - 5),
    "a longer save": lambda limits: replace(limits, save_s=limits.save_s + 240),
    "a shorter patience": lambda limits: replace(limits, stale_s=limits.stale_s / 2),
}


@pytest.mark.parametrize("name", LIMIT_CHANGES)
@given(history=HISTORY, reading=st.one_of(st.none(), READING))
def test_stricter_limits_are_never_softer(
    name: str, history: list[tuple[Reading | None, int, Answer]], reading: Reading | None
) -> None:
    memory, now_s = remembered(history)
    strict = LIMIT_CHANGES[name](LIMITS)
    lax, tight = (decide(reading, limits, now_s, memory) for limits in (LIMITS, strict))
    assert HARDNESS[tight.action] >= HARDNESS[lax.action]


def test_everything_handed_around_is_frozen() -> None:
    for one in (LIMITS, Memory(0.0), said("1", 0), play([at(0, "1")])[0]):
        with pytest.raises(AttributeError):
            setattr(one, fields(one)[0].name, None)
