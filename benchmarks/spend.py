"""How far over can it go? Simulated rentals under a $35 ceiling, and what a checkpoint cadence costs.

    python benchmarks/spend.py             all tables, under a minute
    python benchmarks/spend.py --quick     fewer runs, a few seconds

Each run has its own price history, preemptions, provider outages and watcher; the guard is the one of
`x1_pretrain.money.guard`, for all runs at once in NumPy (`tests/money/test_spend_simulation.py` holds the two
against each other). Time goes in steps of a minute, so the simulated trainer decides once a minute, where the
real one does so four times a second: the table is a little worse than life.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# This folder leaves the path before anything else: its `tokenize` would hide the standard library's.
sys.path[:] = [folder for folder in sys.path if not folder.endswith("benchmarks")]

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from x1_pretrain.money.guard import HOUR_S, Limits

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

CEILING_USD, WARN_USD, GATE_USD_PER_HR = 35.0, 30.0, 1.19  # an A100 80GB
STEP_S = 60.0
DAY_S = 24 * HOUR_S
LONGEST_S = 44 * HOUR_S  # at the cheapest price and with every preemption, the ceiling comes before
PLANNED_S = 26.5 * HOUR_S  # $31.54 of $35
CHECKPOINT_S = 1800.0
AWAY_S, BOOT_S = 120.0, 180.0  # a lost machine is not billed; its successor is, before it trains
REREAD_S = 60.0  # how often the trainer looks for news once what it has is old
OUTAGES_PER_DAY, OUTAGE_S = 1.0, 2700.0  # the provider does not answer the watcher; mean length
TEARDOWN_S = 300.0  # what the watcher adds to its projection
GO, SAVE, NOW = 0, 1, 2
PREEMPTIONS_PER_DAY = (0.0, 1.0, 6.0)
PRICES = ("constant", "jumps 25 %", "random walk")
WATCHERS = {
    "every 5 min": "5 min",
    "every 30 min": "30 min",
    "dies": "dead",
    "its amount sticks": "stuck",
    "all sticks but its time": "frozen",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs, a few seconds")
    parser.add_argument("--runs", type=int, help="simulated runs in each row (1200, quick 90)")
    parser.add_argument("--seed", type=int, default=35)
    args = parser.parse_args()
    runs = args.runs or (90 if args.quick else 1200)
    began_s = time.perf_counter()
    print(hardware())
    for line in (
        *ceiling_table(runs, np.random.default_rng(args.seed)),
        *plan_table(runs, np.random.default_rng(args.seed + 1)),
        *cadence_table(300 if args.quick else 4000, np.random.default_rng(args.seed + 2)),
    ):
        print(line, flush=True)
    print(f"\n{time.perf_counter() - began_s:.0f} s")


# ------------------------------------------------------------------------------------------------------------
# The guard, for many runs at once


@dataclass
class Readings:
    """What the trainer of each run reads; NaN where nothing is said."""

    spent_usd: Floats
    usd_per_hr: Floats
    projected_usd: Floats
    at_s: Floats


@dataclass
class Guards:
    """The memories of `x1_pretrain.money.guard`, one entry a run."""

    limits: Limits
    runs: int
    since_s: Floats = field(init=False)
    spent_usd: Floats = field(init=False)
    said_usd: Floats = field(init=False)  # by the newest reading

    def __post_init__(self) -> None:
        self.since_s, self.spent_usd, self.said_usd = (np.zeros(self.runs) for _ in range(3))
        self.restart(np.ones(self.runs, dtype=bool), 0.0)

    def restart(self, which: Flags, now_s: float, shown: Readings | None = None) -> None:
        """A new process: only what was spent is remembered, and when that was known, by the ledger."""
        create = shown is None
        known_s = np.full(self.runs, np.nan)
        if shown is not None:  # an amount that has moved since has a writer that counts by itself
            stands = shown.spent_usd <= self.said_usd
            known = np.minimum(np.maximum(self.at_s, now_s - HOUR_S), shown.at_s)
            known_s = np.where(stands, known, np.nan)
        self.at_s = np.where(which, known_s, 0.0 if create else self.at_s)
        for name in ("usd_per_hr", "projected_usd", "hour_at_s", "drift_since_s"):
            setattr(self, name, np.where(which, np.nan, 0.0 if create else getattr(self, name)))
        for name in ("hour_from_usd", "hour_usd", "breaches"):
            setattr(self, name, np.where(which, 0.0, 0.0 if create else getattr(self, name)))
        self.since_s = np.where(which, now_s, self.since_s)

    at_s: Floats = field(init=False)
    usd_per_hr: Floats = field(init=False)
    projected_usd: Floats = field(init=False)
    hour_at_s: Floats = field(init=False)
    drift_since_s: Floats = field(init=False)
    hour_from_usd: Floats = field(init=False)
    hour_usd: Floats = field(init=False)
    breaches: Floats = field(init=False)

    def decide(self, now_s: float, shown: Flags, read: Readings, left_s: Floats) -> NDArray[np.int64]:
        """GO, SAVE or NOW for each run; `shown`: those that have a reading."""
        limits, gate = self.limits, float(self.limits.gate_usd_per_hr)
        new = self._remember(now_s, shown, read)
        said = np.fmax(self.hour_usd, self.usd_per_hr)
        over = said > float(limits.drift) * gate
        self.drift_since_s = np.where(over, np.fmin(self.drift_since_s, now_s), np.nan)
        counted = np.maximum(said, gate)
        self.age_s = np.maximum(0.0, now_s - np.where(np.isnan(self.at_s), self.since_s, self.at_s))
        self.now_usd = self.spent_usd + counted * self.age_s / HOUR_S
        projected = np.fmax(self.projected_usd, self.now_usd + counted * left_s / HOUR_S)
        ceiling = float(limits.ceiling_usd)
        breach = (now_s - self.since_s >= limits.warmup_s) & (projected > ceiling)
        self.breaches = np.where(new, np.where(breach, self.breaches + 1, 0.0), self.breaches)
        unanswered = (now_s - self.drift_since_s > limits.answer_s) & (limits.no_answer == "stop")
        at_the_end = self.now_usd + counted * (limits.save_s + limits.end_s) / HOUR_S
        projects = (self.breaches >= 2) & ~np.isnan(projected)
        save = (at_the_end > ceiling) | (self.age_s > limits.stale_s) | projects | unanswered
        return np.where(self.spent_usd > ceiling, NOW, np.where(save, SAVE, GO))

    age_s: Floats = field(init=False)
    now_usd: Floats = field(init=False)

    def _remember(self, now_s: float, shown: Flags, read: Readings) -> Flags:
        """Take the readings in; which of them were new."""
        gate = float(self.limits.gate_usd_per_hr)
        at_s = np.minimum(read.at_s, now_s)
        late = shown & (at_s < self.at_s)
        taken = shown & ~late
        before, after = (np.where(rate > 0, rate, gate) for rate in (self.usd_per_hr, read.usd_per_hr))
        passed_s = np.where(np.isnan(self.at_s), 0.0, at_s - self.at_s)
        least = self.spent_usd + np.where(taken, np.minimum(before, after) * passed_s / HOUR_S, 0.0)
        self.spent_usd = np.where(shown, np.maximum(read.spent_usd, least), self.spent_usd)
        self.said_usd = np.where(taken, read.spent_usd, self.said_usd)
        new: Flags = taken & (at_s != self.at_s)
        self.at_s = np.where(taken, at_s, self.at_s)
        self.usd_per_hr = np.where(taken, read.usd_per_hr, self.usd_per_hr)
        self.projected_usd = np.where(taken, read.projected_usd, self.projected_usd)
        hour_s = at_s - self.hour_at_s
        whole = taken & (hour_s >= HOUR_S)
        with np.errstate(divide="ignore", invalid="ignore"):
            an_hour = (self.spent_usd - self.hour_from_usd) / (hour_s / HOUR_S)
        self.hour_usd = np.where(whole, an_hour, self.hour_usd)
        anew = whole | (taken & np.isnan(self.hour_at_s))
        self.hour_at_s = np.where(anew, at_s, self.hour_at_s)
        self.hour_from_usd = np.where(anew, self.spent_usd, self.hour_from_usd)
        return new


# ------------------------------------------------------------------------------------------------------------
# The world: prices, losses, outages and a watcher


@dataclass(frozen=True)
class Row:
    """One kind of run."""

    price: str
    watcher: str
    read_s: float
    preemptions_per_day: tuple[float, ...] = PREEMPTIONS_PER_DAY  # in equal parts


@dataclass
class World:
    """All runs of all rows, side by side. Draws everything from `random`, so a seed repeats it."""

    rows: list[Row]
    runs: int
    limits: Limits
    work_s: float | None  # what a run needs; None: it would go on for ever, and its end is not known
    random: np.random.Generator

    def __post_init__(self) -> None:
        total = self.total = len(self.rows) * self.runs
        self.guards = Guards(self.limits, total)
        self.read_s = self._each([row.read_s for row in self.rows])
        self.poll_s = self._each([1800.0 if row.watcher == "30 min" else 300.0 for row in self.rows])
        per_day = [np.resize(row.preemptions_per_day, self.runs) for row in self.rows]
        self.preempted = np.concatenate(per_day) / DAY_S * STEP_S  # chance in a step
        self.fails_s = self.random.uniform(HOUR_S, DAY_S, total)  # when a bad watcher turns bad
        self.jump_s = self.random.uniform(0, DAY_S, total)
        self.watcher = np.repeat([row.watcher for row in self.rows], self.runs)
        self.price = np.repeat([row.price for row in self.rows], self.runs)
        self.usd_per_hr = np.full(total, GATE_USD_PER_HR)
        self.dearest = self.usd_per_hr.copy()
        self.true_usd, self.done_s, self.saved_s, self.lost_s = (np.zeros(total) for _ in range(4))
        self.meter_usd, self.metered_s, self.meter_rate = np.zeros(total), np.zeros(total), self.usd_per_hr
        self.said_usd, self.said_s, self.said_rate = np.zeros(total), np.zeros(total), self.usd_per_hr
        self.outage_until_s = np.full(total, -1.0)
        self.back_s = np.zeros(total)  # trains again from then on
        self.read_at_s, self.checked_s = np.full(total, -np.inf), np.zeros(total)
        self.polled_s = np.full(total, -np.inf)
        nothing = np.full(total, np.nan)
        self.file = Readings(np.zeros(total), self.usd_per_hr.copy(), nothing, np.zeros(total))
        self.ended = np.full(total, "", dtype="<U9")

    def _each(self, values: list[float]) -> Floats:
        return np.repeat(np.asarray(values), self.runs)

    def play(self) -> None:
        """Until every run has ended; `true_usd` is then what each has really cost."""
        for now_s in np.arange(0.0, LONGEST_S, STEP_S):
            going = self.ended == ""
            if not going.any():
                return
            if now_s > 0:
                self._minute(float(now_s), going)
            self._watch(float(now_s), going)
            self._guard(float(now_s), going)
        raise AssertionError(f"{(self.ended == '').sum()} runs were never stopped")

    def _minute(self, now_s: float, going: Flags) -> None:
        """Bill and train for a minute; then the price may move and the machine may go."""
        rented = going & (now_s > self.back_s - BOOT_S)
        training = going & (now_s > self.back_s)
        self.true_usd += np.where(rented, self.usd_per_hr * STEP_S / HOUR_S, 0.0)
        self.done_s += np.where(training, STEP_S, 0.0)
        if self.work_s is not None:
            self._end(training & (self.done_s >= self.work_s), "finished", saved=True)
        self._reprice(now_s)
        lost = training & (self.ended == "") & (self.random.random(self.total) < self.preempted)
        self.lost_s += np.where(lost, self.done_s - self.saved_s, 0.0)
        self.done_s = np.where(lost, self.saved_s, self.done_s)
        self.back_s = np.where(lost, now_s + AWAY_S + BOOT_S, self.back_s)

    def _reprice(self, now_s: float) -> None:
        jumped = (self.price == "jumps 25 %") & (now_s >= self.jump_s)
        self.usd_per_hr = np.where(jumped, 1.25 * GATE_USD_PER_HR, self.usd_per_hr)
        if now_s % HOUR_S == 0:
            moved = self.usd_per_hr * np.exp(0.06 * self.random.standard_normal(self.total))
            bounded = np.clip(moved, 0.8 * GATE_USD_PER_HR, 2 * GATE_USD_PER_HR)
            self.usd_per_hr = np.where(self.price == "random walk", bounded, self.usd_per_hr)
        self.dearest = np.where(self.ended == "", np.maximum(self.dearest, self.usd_per_hr), self.dearest)

    def _watch(self, now_s: float, going: Flags) -> None:
        """The sidecar's turn: it meters, asks the provider where that answers, and writes the file."""
        begins = self.random.random(self.total) < OUTAGES_PER_DAY * STEP_S / DAY_S
        until_s = now_s + self.random.exponential(OUTAGE_S, self.total)
        self.outage_until_s = np.where(begins, np.maximum(self.outage_until_s, until_s), self.outage_until_s)
        bad = now_s >= self.fails_s
        there = going & (now_s >= self.back_s - BOOT_S) & ~((self.watcher == "dead") & bad)
        polls = there & (now_s - self.polled_s >= self.poll_s)
        answered = now_s >= self.outage_until_s
        rate = np.where(answered, self.usd_per_hr, np.maximum(self.meter_rate, GATE_USD_PER_HR))
        more = np.maximum(self.meter_rate, rate) * (now_s - self.metered_s) / HOUR_S
        self.meter_usd = np.where(polls, self.meter_usd + more, self.meter_usd)
        said = polls & answered
        whole = np.maximum(self.said_rate, rate) * (now_s - self.said_s) / HOUR_S
        self.meter_usd = np.where(said, np.maximum(self.meter_usd, self.said_usd + whole), self.meter_usd)
        self.said_usd = np.where(said, self.meter_usd, self.said_usd)
        self.said_s = np.where(said, now_s, self.said_s)
        self.said_rate = np.where(said, rate, self.said_rate)
        self.metered_s = np.where(polls, now_s, self.metered_s)
        self.meter_rate = np.where(polls, rate, self.meter_rate)
        self.polled_s = np.where(polls, now_s, self.polled_s)
        self._write(now_s, polls, bad)

    def _write(self, now_s: float, polls: Flags, bad: Flags) -> None:
        file = self.file
        frozen = (self.watcher == "frozen") & bad
        stuck = frozen | ((self.watcher == "stuck") & bad)
        file.at_s = np.where(polls, now_s, file.at_s)
        file.usd_per_hr = np.where(polls & ~frozen, self.meter_rate, file.usd_per_hr)
        file.spent_usd = np.where(polls & ~stuck, self.meter_usd, file.spent_usd)
        if self.work_s is not None:
            rest_usd = file.usd_per_hr * (self.work_s - self.done_s + TEARDOWN_S) / HOUR_S
            file.projected_usd = np.where(polls & ~stuck, file.spent_usd + rest_usd, file.projected_usd)

    def _guard(self, now_s: float, going: Flags) -> None:
        """Trainers that run read when a reading is due, and before a checkpoint; then all of them decide."""
        going = going & (self.ended == "")
        starts = going & (now_s == self.back_s) & (now_s > 0)
        self.guards.restart(starts, now_s, self.file)
        here = going & (now_s >= self.back_s)
        old = now_s - self.file.at_s > self.limits.stale_s
        self._end(starts & old, "refused", saved=True)
        due_s = np.where(self.guards.age_s > self.limits.quiet_s if now_s else False, REREAD_S, self.read_s)
        checkpoint = here & (self.done_s - self.saved_s >= CHECKPOINT_S)
        reads = here & (starts | checkpoint | (now_s - self.read_at_s >= due_s))
        self.read_at_s = np.where(reads, now_s, self.read_at_s)
        left_s = np.full(self.total, np.nan) if self.work_s is None else self.work_s - self.done_s
        action = self.guards.decide(now_s, reads, self.file, left_s)
        self._end(here & (action == SAVE), "saved", saved=True)
        self._end(here & (action == NOW), "at once", saved=False)
        self.saved_s = np.where(checkpoint, self.done_s, self.saved_s)

    def _end(self, which: Flags, how: str, *, saved: bool) -> None:
        """What saving and ending the machine takes is billed as well."""
        which = which & (self.ended == "")
        ending_s = self.random.uniform(60, self.limits.end_s, self.total)
        if saved:
            ending_s += self.random.uniform(1, self.limits.save_s, self.total)
        self.true_usd += np.where(which, self.usd_per_hr * ending_s / HOUR_S, 0.0)
        self.ended = np.where(which, how, self.ended)


def limits() -> Limits:
    return Limits(
        ceiling_usd=Decimal(str(CEILING_USD)),
        gate_usd_per_hr=Decimal(str(GATE_USD_PER_HR)),
        warn_usd=Decimal(str(WARN_USD)),
    )


# ------------------------------------------------------------------------------------------------------------
# The tables


@dataclass(frozen=True)
class Result:
    """The runs of one row."""

    usd: Floats
    ended: NDArray[np.str_]
    dearest_usd_per_hr: Floats

    def share(self, *ways: str) -> str:
        return f"{np.mean(np.isin(self.ended, ways)):.0%}"

    def over(self) -> str:
        excess = round(float(self.usd.max()) - CEILING_USD, 2)
        return f"${excess:.2f}" if excess > 0 else "none"


Results = dict[Row, Result]


def share_over(usd: Floats) -> str:
    """By a cent or more."""
    return f"{np.mean(np.round(usd, 2) > CEILING_USD):.1%}"


def played(
    rows: list[Row], runs: int, bounds: Limits, work_s: float | None, random: np.random.Generator
) -> Results:
    """What each row's runs really cost, how they ended, and the dearest price of each. A watcher that writes
    every half hour needs a guard that waits for it."""
    found: Results = {}
    for seldom in (False, True):
        chosen = [row for row in rows if (row.watcher == "30 min") is seldom]
        if not chosen:
            continue
        patient = replace(bounds, quiet_s=1860, stale_s=3900) if seldom else bounds
        world = World(chosen, runs, patient, work_s, random)
        world.play()
        for index, row in enumerate(chosen):
            part = slice(index * runs, (index + 1) * runs)
            found[row] = Result(world.true_usd[part], world.ended[part], world.dearest[part])
    return found


def ceiling_table(runs: int, random: np.random.Generator) -> Iterator[str]:
    """Nothing but the ceiling holds these runs: their end is unknown, and every dearer price was accepted."""
    rows = [Row(p, w, read_s) for p in PRICES for w in WATCHERS.values() for read_s in (1800.0, 300.0)]
    results = played(rows, runs, replace(limits(), no_answer="continue"), None, random)
    yield f"\nFinal true spending under a $35.00 ceiling; {runs} runs a row, preempted 0, 1 or 6 times a day"
    yield (
        "\n| price | watcher | median | 99 % | most | over $35 | worst over | the same, read every 5 min | "
        "dearest price x poll |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for price in PRICES:
        for label, watcher in WATCHERS.items():
            seldom, often = (results[Row(price, watcher, read_s)] for read_s in (1800.0, 300.0))
            yield f"| {price} | {label} | {ceiling_cells(seldom, often, watcher)} |"


def ceiling_cells(seldom: Result, often: Result, watcher: str) -> str:
    poll_s = 1800 if watcher == "30 min" else 300
    poll_usd = seldom.dearest_usd_per_hr.max() * poll_s / HOUR_S
    cells = [f"${np.quantile(seldom.usd, q):.2f}" for q in (0.5, 0.99, 1.0)]
    return " | ".join([*cells, share_over(seldom.usd), seldom.over(), often.over(), f"${poll_usd:.2f}"])


def plan_table(runs: int, random: np.random.Generator) -> Iterator[str]:
    """Runs as they are: a known end and projections; a dearer hour is a question that nobody answers."""
    rows = [Row(price, "5 min", 1800.0, (often,)) for price in PRICES for often in PREEMPTIONS_PER_DAY]
    rows += [Row("constant", watcher, 1800.0, (1.0,)) for watcher in list(WATCHERS.values())[1:]]
    stopping, going_on = (
        played(rows, runs, replace(limits(), no_answer=default), PLANNED_S, random)
        for default in ("stop", "continue")
    )
    planned = GATE_USD_PER_HR * PLANNED_S / HOUR_S
    yield f"\nRuns planned at ${planned:.2f} of $35.00, stopped early where they would not fit; {runs} a row"
    yield (
        "\n| price | watcher | preemptions a day | finish; no answer stops | median | most | "
        "finish; no answer goes on | median | most | over $35 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    labels = {watcher: label for label, watcher in WATCHERS.items()}
    for row in rows:
        cells = [row.price, labels[row.watcher], f"{row.preemptions_per_day[0]:.0f}"]
        for found in (stopping[row], going_on[row]):
            cells += [found.share("finished"), f"${np.median(found.usd):.2f}", f"${found.usd.max():.2f}"]
        both = np.concatenate([stopping[row].usd, going_on[row].usd])
        yield f"| {' | '.join(cells)} | {share_over(both)} |"


# ------------------------------------------------------------------------------------------------------------
# How often to save


def young_s(save_s: float, mtbf_s: float) -> float:
    """The interval that loses least, to first order: sqrt(2 x time to save x time between losses)."""
    return float(np.sqrt(2 * save_s * mtbf_s))


def lost_share(
    interval_s: float,
    save_s: float,
    mtbf_s: float,
    runs: int,
    random: np.random.Generator,
    segments: int = 400,
) -> Floats:
    """Time spent on saving and on work done twice, as a share of the work, for each of `runs` runs."""
    length_s = interval_s + save_s
    left, passed_s = np.full(runs, segments), np.zeros(runs)
    while (going := left > 0).any():
        lives_s = random.exponential(mtbf_s, runs)
        kept = np.minimum(left, (lives_s // length_s).astype(int))
        done = kept == left
        passed_s += np.where(going, np.where(done, left * length_s, lives_s), 0.0)
        left = np.where(going, left - kept, left)
    return passed_s / (segments * interval_s) - 1


def cadence_table(runs: int, random: np.random.Generator) -> Iterator[str]:
    factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    yield f"\nDollars lost to saving and to work done twice, per day of training at ${GATE_USD_PER_HR}/h\n"
    head = " | ".join(f"{factor:g} x" for factor in factors)
    yield f"| a save takes | a machine lasts | sqrt(2 x both) | {head} | cheapest of 33 |"
    yield "|---|---|---|" + "---|" * (len(factors) + 1)
    for save_s in (5.0, 60.0):
        for hours in (4, 24):
            yield cadence_row(save_s, hours * HOUR_S, factors, runs, random)


def cadence_row(
    save_s: float, mtbf_s: float, factors: tuple[float, ...], runs: int, random: np.random.Generator
) -> str:
    best_s = young_s(save_s, mtbf_s)
    grid = np.geomspace(0.25, 4, 33)
    day_usd = GATE_USD_PER_HR * 24
    seed = int(random.integers(2**32))

    def lost_usd(factor: float) -> float:
        # As long a run and the same luck for every interval, so that they can be compared.
        segments = max(1, round(200 * DAY_S / (factor * best_s) / 20))
        luck = np.random.default_rng(seed)
        return float(lost_share(factor * best_s, save_s, mtbf_s, runs, luck, segments).mean()) * day_usd

    cells = " | ".join(f"${lost_usd(factor):.2f}" for factor in factors)
    cheapest = min(grid, key=lost_usd)
    return (
        f"| {save_s:.0f} s | {mtbf_s / HOUR_S:.0f} h | {best_s / 60:.1f} min | {cells} | {cheapest:.2f} x |"
    )


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {model}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, NumPy {np.__version__}"
    )


if __name__ == "__main__":
    main()
