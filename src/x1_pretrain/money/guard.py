"""Go, save and stop, or stop now: decided from what was last read, the limits and the time. Pure.

What a reading says is the least that can be true. Between readings spending goes on at the dearest of its
rate, the rate of the last hour and the rate the run was priced at; spending that grows slower than its own
rate says is not believed; a lower reading never lowers it. So a dead, stuck or lying watcher runs into the
same limits as an honest one, only earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from enum import StrEnum
from typing import Literal

from x1_pretrain import errors

HOUR_S = 3600
TEARDOWN_S = 300.0  # what ending a machine and seeing it gone takes
ZERO = Decimal(0)
GRAIN = Decimal("1e-9")  # of a measured rate: what arithmetic adds in the last digit is no drift


class Action(StrEnum):
    GO = "go"
    SAVE_AND_STOP = "save and stop"
    STOP_NOW = "stop now"


EXIT_CODES = {Action.SAVE_AND_STOP: errors.BUDGET_CHECKPOINTED, Action.STOP_NOW: errors.BUDGET_STOPPED}


@dataclass(frozen=True)
class Limits:
    """What a run may cost, and how long the guard believes what it can't check."""

    ceiling_usd: Decimal
    gate_usd_per_hr: Decimal  # the rate it was priced at
    warn_usd: Decimal
    drift: Decimal = Decimal("1.2")  # hourly spending above this times the agreed rate is a person's question
    quiet_s: float = 660  # two polls of a sidecar and a minute
    stale_s: float = 1800
    warmup_s: float = 600  # no stop on a projection before: the first steps compile
    answer_s: float = 1800
    no_answer: Literal["stop", "continue"] = "stop"
    save_s: float = 60  # what a graceful stop takes
    end_s: float = TEARDOWN_S


@dataclass(frozen=True)
class Reading:
    """What a watcher said, and the steady second at which it was true."""

    spent_usd: Decimal
    usd_per_hr: Decimal | None  # none: it does not know, or says 0
    projected_usd: Decimal | None
    at_s: float
    seq: int = 0


@dataclass(frozen=True)
class Memory:
    """What the guard knows from before this decision."""

    since_s: float  # when it began to watch
    spent_usd: Decimal = ZERO  # known to be spent ...
    at_s: float | None = None  # ... at this second; none before the first reading
    usd_per_hr: Decimal | None = None  # of the newest reading
    projected_usd: Decimal | None = None
    hour_at_s: float | None = None  # the last hour of spending is measured from here
    hour_from_usd: Decimal = ZERO
    hour_usd: Decimal = ZERO  # what that hour cost
    breaches: int = 0  # projections above the ceiling, in a row
    drift_since_s: float | None = None
    accepted_usd_per_hr: Decimal = ZERO  # by a person


@dataclass(frozen=True)
class Notice:
    """Something a person should hear of, once per key."""

    key: str
    title: str
    body: str


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    notices: tuple[Notice, ...]
    spent_usd: Decimal  # now, as the guard counts
    projected_usd: Decimal | None
    age_s: float  # of what is known
    memory: Memory


def cost(usd_per_hr: Decimal, seconds: float) -> Decimal:
    return usd_per_hr * Decimal(repr(max(0.0, seconds))) / HOUR_S


@dataclass(frozen=True)
class _Standing:
    """Where a run stands at one moment."""

    limits: Limits
    memory: Memory
    now_s: float
    usd_per_hr: Decimal  # counted with
    spent_usd: Decimal  # by now
    projected_usd: Decimal | None
    age_s: float
    answer: Literal["stop", "continue"] | None
    problem: str | None

    def after(self, seconds: float) -> Decimal:
        return self.spent_usd + cost(self.usd_per_hr, seconds)


def decide(
    reading: Reading | None,
    limits: Limits,
    now_s: float,
    memory: Memory,
    *,
    left_s: float | None = None,
    answer: Literal["stop", "continue"] | None = None,
    problem: str | None = None,
) -> Decision:
    """`reading`: a new one, or None between readings; `left_s`: what the run still needs, by its own pace;
    `answer`: a person's, given since the last decision; `problem`: why there is no new reading."""
    known_at_s = memory.at_s
    memory = _agreed(_remembered(memory, reading, limits, now_s), limits, now_s, answer)
    rate = _counted_rate(memory, limits)
    age_s = max(0.0, now_s - (memory.since_s if memory.at_s is None else memory.at_s))
    spent = memory.spent_usd + cost(rate, age_s)
    own = spent + cost(rate, left_s) if left_s is not None else None
    projected = max((p for p in (memory.projected_usd, own) if p is not None), default=None)
    if memory.at_s != known_at_s:  # the same reading again confirms nothing
        warm = now_s - memory.since_s >= limits.warmup_s
        over = warm and projected is not None and projected > limits.ceiling_usd
        memory = replace(memory, breaches=memory.breaches + 1 if over else 0)
    at = _Standing(limits, memory, now_s, rate, spent, projected, age_s, answer, problem)
    action, reason = _verdict(at)
    return Decision(action, reason, _notices(at, action, reason), spent, projected, age_s, memory)


def relaunched(now_s: float, spent_usd: Decimal, gap_s: float | None, reading_at_s: float) -> Memory:
    """What a new process knows from the ledger: so much was known to be spent `gap_s` ago. Up to an hour of
    that time counts; longer than that, the machine was surely away."""
    if gap_s is None:
        return Memory(now_s, spent_usd)
    return Memory(now_s, spent_usd, at_s=min(now_s - min(gap_s, HOUR_S), reading_at_s))


def _remembered(memory: Memory, reading: Reading | None, limits: Limits, now_s: float) -> Memory:
    """What is known after a reading: never less than before, never slower than its own rate says."""
    if reading is None:
        return memory
    at_s, least = min(reading.at_s, now_s), memory.spent_usd
    if memory.at_s is not None:
        if at_s < memory.at_s:  # overtaken by a newer one: only its amount still says something
            return replace(memory, spent_usd=max(least, reading.spent_usd))
        gate = limits.gate_usd_per_hr
        least += cost(min(memory.usd_per_hr or gate, reading.usd_per_hr or gate), at_s - memory.at_s)
    spent = max(reading.spent_usd, least)
    memory = replace(
        memory,
        spent_usd=spent,
        at_s=at_s,
        usd_per_hr=reading.usd_per_hr,
        projected_usd=reading.projected_usd,
    )
    if memory.hour_at_s is None:
        return replace(memory, hour_at_s=at_s, hour_from_usd=spent)
    if at_s - memory.hour_at_s < HOUR_S:
        return memory
    hours = Decimal(repr(at_s - memory.hour_at_s)) / HOUR_S
    hour_usd = ((spent - memory.hour_from_usd) / hours).quantize(GRAIN, ROUND_FLOOR)
    return replace(memory, hour_at_s=at_s, hour_from_usd=spent, hour_usd=hour_usd)


def _said_rate(memory: Memory) -> Decimal:
    """Dollars an hour by what was read: the rate it states, or what the last hour really cost."""
    return max(memory.usd_per_hr or ZERO, memory.hour_usd)


def _counted_rate(memory: Memory, limits: Limits) -> Decimal:
    """Dollars an hour to count on with: never less than the run was priced at."""
    return max(_said_rate(memory), limits.gate_usd_per_hr)


def _agreed_rate(memory: Memory, limits: Limits) -> Decimal:
    return max(limits.gate_usd_per_hr, memory.accepted_usd_per_hr)


def _agreed(memory: Memory, limits: Limits, now_s: float, answer: str | None) -> Memory:
    """Since when it has cost more an hour than was agreed; a person's `continue` is a new agreement."""
    rate = _said_rate(memory)
    if answer == "continue":
        memory = replace(memory, accepted_usd_per_hr=max(rate, memory.accepted_usd_per_hr))
    if rate <= limits.drift * _agreed_rate(memory, limits):
        return replace(memory, drift_since_s=None)
    return memory if memory.drift_since_s is not None else replace(memory, drift_since_s=now_s)


def _verdict(at: _Standing) -> tuple[Action, str]:
    """The first limit that is broken, the hardest first."""
    limits, memory = at.limits, at.memory
    ceiling = f"the ceiling of {dollars(limits.ceiling_usd)}"
    if memory.spent_usd > limits.ceiling_usd:
        return Action.STOP_NOW, f"{dollars(memory.spent_usd)} spent, above {ceiling}"
    if at.answer == "stop":
        return Action.SAVE_AND_STOP, "a person decided to stop"
    to_the_end = at.after(limits.save_s + limits.end_s)
    if to_the_end > limits.ceiling_usd:
        said = f"about {dollars(to_the_end)} once it has saved and its machine is gone, above {ceiling}"
        return Action.SAVE_AND_STOP, said
    if at.age_s > limits.stale_s:
        said = f"no valid reading for {minutes(at.age_s)}; about {dollars(at.spent_usd)} spent by now"
        return Action.SAVE_AND_STOP, said
    if memory.breaches >= 2 and at.projected_usd is not None:
        return Action.SAVE_AND_STOP, f"projected to cost {dollars(at.projected_usd)} in all, above {ceiling}"
    waited_s = at.now_s - memory.drift_since_s if memory.drift_since_s is not None else 0.0
    if waited_s > limits.answer_s and limits.no_answer == "stop":
        agreed = dollars(_agreed_rate(memory, limits))
        said = f"it costs {dollars(_said_rate(memory))}/h, agreed were {agreed}/h"
        return Action.SAVE_AND_STOP, f"{said}, and nobody answered in {minutes(limits.answer_s)}"
    return Action.GO, f"{dollars(at.spent_usd)} of {dollars(limits.ceiling_usd)} spent"


def _notices(at: _Standing, action: Action, reason: str) -> tuple[Notice, ...]:
    found = []
    limits, ceiling = at.limits, dollars(at.limits.ceiling_usd)
    spent = f"{dollars(at.spent_usd)} of {ceiling} spent"
    projected = f", {dollars(at.projected_usd)} projected" if at.projected_usd is not None else ""
    if at.spent_usd > limits.warn_usd:
        on = f" It goes on, and stops by itself below {ceiling}." if action is Action.GO else ""
        body = f"{spent}{projected}.{on}"
        found.append(Notice("warn", f"more than {dollars(limits.warn_usd)} spent", body))
    if at.age_s > limits.quiet_s:
        found.append(Notice("quiet", "nobody says what is spent", _quiet(at, spent)))
    if at.memory.breaches == 1 and action is Action.GO:
        body = f"{spent}{projected}. If the next reading says so too, it saves and stops."
        found.append(Notice("projection", f"projected to pass {ceiling}", body))
    if at.memory.drift_since_s is not None:
        found.append(_drift(at))
    if action is not Action.GO:
        how = "To go on from the last checkpoint: the same command with --raise-ceiling-to USD."
        found.append(
            Notice(f"stop-{EXIT_CODES[action]}", f"{action}: {reason}", f"{spent}{projected}. {how}")
        )
    return tuple(found)


def _quiet(at: _Standing, spent: str) -> str:
    why = f" ({at.problem})" if at.problem else ""
    return (
        f"The last valid reading is {minutes(at.age_s)} old{why}; counting on at {dollars(at.usd_per_hr)}/h: "
        f"about {spent}. At {minutes(at.limits.stale_s)} it saves and stops. Is the sidecar alive?"
    )


def _drift(at: _Standing) -> Notice:
    rate, agreed = dollars(_said_rate(at.memory)), dollars(_agreed_rate(at.memory, at.limits))
    stops = at.limits.no_answer == "stop"
    default = "saves and stops" if stops else "goes on, and the ceiling still holds"
    body = (
        f"It costs {rate}/h, agreed were {agreed}/h. You decide: `x1 budget continue RUN` or `x1 budget stop "
        f"RUN`. Without an answer in {minutes(at.limits.answer_s)} it {default}."
    )
    return Notice(f"drift-{rate}", f"{rate}/h instead of {agreed}/h", body)


def dollars(amount: Decimal) -> str:
    return f"${amount:,.2f}"


def minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR_S else f"{seconds / HOUR_S:.1f} h"
