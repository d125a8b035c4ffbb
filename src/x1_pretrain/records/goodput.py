"""What the paid seconds of a run went into, from its files alone: useful seconds / paid seconds, the losses
itemised.

    found = goodput(open_run(find_run("x1-50m-a100")))
    found.share, [(part.name, part.seconds, part.usd) for part in found.parts]

Useful is the time of the steps that are in the final run; the same step done twice is useful once. Paid is
the time of the machines in `ledger.jsonl`, and sessions on none of them are left out; without rented
machines, the wall clock from the first session to the last record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import pairwise

from x1_pretrain.money.account import Account, account
from x1_pretrain.money.clock import Clock, parse_stamp
from x1_pretrain.money.ledger import NAME, read_rows
from x1_pretrain.records.run_folder import Row, Run, is_number, is_train, moment, read_jsonl

STEP, WAIT, START, TWICE = "training step", "data wait", "start and compile", "work done twice"
EVALUATION, SAMPLING, CHECKPOINT, OTHER = "evaluation", "sampling", "checkpoint", "other"
BETWEEN, BEFORE, AFTER = "between sessions", "machine before the trainer", "machine after the trainer"
PARTS = (STEP, WAIT, START, EVALUATION, SAMPLING, CHECKPOINT, OTHER, TWICE, BETWEEN, BEFORE, AFTER)

# the phases of the rows, `time/<phase>_s`, as the parts are called
PHASES = {"start": START, "wait": WAIT, "step": STEP, "evaluation": EVALUATION, "sampling": SAMPLING,
          "checkpoint": CHECKPOINT}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Where some of the paid time went; its dollars are its share of the ledger's."""

    name: str
    seconds: float
    usd: Decimal | None
    useful: bool


@dataclass(frozen=True)
class Goodput:
    """The parts that took any time, in the order of `PARTS`; they sum to `paid_s`."""

    parts: list[Part]
    useful_s: float
    paid_s: float
    share: float | None  # useful / paid; none where nothing was paid yet
    note: str  # what was counted as paid, and what was not measured


@dataclass
class Told:
    """All records of one session. `lost` ones are of steps that were done again later."""

    rows: list[Row] = field(default_factory=list)
    lost_rows: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    lost_steps: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)


@dataclass
class Span:
    """One session: from when to when (seconds of the epoch), and into what its time went."""

    begin: float
    end: float
    seconds: dict[str, float]
    itemised: bool  # False: an older run's, whose rows have no time columns


@dataclass
class Machine:
    """A machine that was paid from `begin` to `end`, whether it worked or not."""

    begin: float
    end: float  # of an open one: the last that is known of it
    open: bool = False
    spans: list[Span] = field(default_factory=list)


def goodput(run: Run, clock: Clock = Clock()) -> Goodput:
    """Read everything and add it up. `clock`: the one the ledger was written by, where that was rehearsed."""
    spans = [span for one in told(run).values() if (span := measured(one, run.config.training.batch_tokens))]
    spans.sort(key=lambda span: span.begin)
    ledger = account(read_rows(run.folder / NAME))
    machines = assigned(spans, paid_machines(ledger, clock))
    paid = [span for machine in machines for span in machine.spans] if machines else spans
    seconds = dict.fromkeys(PARTS, 0.0)
    for span in paid:
        for name, amount in span.seconds.items():
            seconds[name] += amount
    _around(seconds, spans, machines, ledger)
    paid_s = sum(seconds.values())
    return Goodput(
        parts=_parts(seconds, paid_s, dollars_known(ledger)),
        useful_s=seconds[STEP],
        paid_s=paid_s,
        share=seconds[STEP] / paid_s if paid_s > 0 else None,
        note=_note(spans, len(spans) - len(paid), machines, ledger),
    )


def _parts(seconds: dict[str, float], paid_s: float, usd: Decimal | None) -> list[Part]:
    share = {name: Decimal(repr(s / paid_s)) for name, s in seconds.items() if s > 0}
    return [
        Part(name, seconds[name], None if usd is None else usd * share[name], name == STEP) for name in share
    ]


def dollars_known(ledger: Account) -> Decimal | None:
    """What the ledger knows was spent; none without one."""
    usd = ledger.settled_usd()
    return usd if usd > 0 or ledger.machines else None


# -----------------------------------------------------------------------------------------------------------
# Sessions


def told(run: Run) -> dict[int, Told]:
    """Every record of the run by its session, those set aside too."""
    found: dict[int, Told] = {}
    files = {"metrics": "rows", "metrics.superseded": "lost_rows", "steps": "steps",
             "steps.superseded": "lost_steps", "events": "events"}  # fmt: skip
    for name, kind in files.items():
        for row in read_jsonl(run.folder / f"{name}.jsonl").rows:
            session = row.get("session", 1)
            if isinstance(session, int) and moment(row) is not None:
                getattr(found.setdefault(session, Told()), kind).append(row)
    for one in found.values():  # a kill while rows were set aside may have left them there twice
        one.lost_steps = list({(row.get("step"), row["time_utc"]): row for row in one.lost_steps}.values())
        one.lost_rows = list({_identity(row): row for row in one.lost_rows}.values())
    return found


def _identity(row: Row) -> tuple[object, object, bool]:
    return row.get("step"), row["time_utc"], is_train(row)


def at(row: Row) -> float:
    """When a row was written, in seconds of the epoch; one that is known to say."""
    return parse_stamp(row["time_utc"]).timestamp()


def amount(row: Row, name: str) -> float:
    """Seconds in a row; what is not a number from 0 up is none."""
    value = float(row[name]) if is_number(row.get(name)) else 0.0
    return value if 0 <= value < math.inf else 0.0


def measured(one: Told, tokens_per_step: int) -> Span | None:
    """Into what the time of a session went. What no column says is `other`."""
    everything = [*one.rows, *one.lost_rows, *one.steps, *one.lost_steps, *one.events]
    if not everything:
        return None
    times = [at(row) for row in everything]
    begin, end = min(times), max(times)
    timed = [row for row in (*one.rows, *one.lost_rows, *one.events) if any(map(_is_time, row))]
    if timed:
        begin = min(begin, _begun(max(timed, key=at)))
        seconds = _by_columns(one, max(timed, key=at))
    elif one.steps or one.lost_steps:
        seconds = _by_steps(one, begin)
    else:
        seconds = _by_speed(one, begin, tokens_per_step)
    end = max(end, begin + sum(seconds.values()))  # columns are rounded: never more than there was
    seconds[OTHER] = seconds.get(OTHER, 0.0) + end - begin - sum(seconds.values())
    return Span(begin, end, seconds, itemised=bool(timed))


def _is_time(name: str) -> bool:
    return name.startswith("time/") and name.endswith("_s")


def _phases(row: Row) -> dict[str, float]:
    """The cumulative columns of a row, by part."""
    found: dict[str, float] = {}
    for name in filter(_is_time, row):
        part = PHASES.get(name[len("time/") : -len("_s")], OTHER)
        found[part] = found.get(part, 0.0) + amount(row, name)
    return found


def _begun(timed: Row) -> float:
    """The columns of a session sum to its wall clock."""
    return at(timed) - sum(_phases(timed).values())


def _by_columns(one: Told, timed: Row) -> dict[str, float]:
    """The last columns on record, then what single steps and checkpoints tell of the time after them."""
    seconds, until = _phases(timed), at(timed)
    after = [row for row in (*one.steps, *one.lost_steps) if at(row) > until]
    _add_steps(seconds, after, _first_step(one))
    _add_checkpoints(seconds, [event for event in one.events if at(event) > until])
    return _set_aside(seconds, sum(_step_s(row) for row in one.lost_steps if row is not _first_step(one)))


def _first_step(one: Told) -> Row | None:
    """The first step of a session compiles: its time is in the start, not in the steps."""
    return min((*one.steps, *one.lost_steps), key=at, default=None)


def _step_s(row: Row) -> float:
    """`step_s` is the whole step; waiting for its data is a part of its own."""
    return max(0.0, amount(row, "step_s") - amount(row, "wait_s"))


def _add_steps(seconds: dict[str, float], rows: Iterable[Row], first: Row | None) -> None:
    own = [row for row in rows if row is not first]
    seconds[STEP] = seconds.get(STEP, 0.0) + sum(map(_step_s, own))
    seconds[WAIT] = seconds.get(WAIT, 0.0) + sum(amount(row, "wait_s") for row in own)


def _add_checkpoints(seconds: dict[str, float], events: Iterable[Row]) -> None:
    saved = sum(amount(event, "seconds") for event in events if event.get("event") == "checkpoint")
    seconds[CHECKPOINT] = seconds.get(CHECKPOINT, 0.0) + saved


def _set_aside(seconds: dict[str, float], lost_s: float) -> dict[str, float]:
    """Steps that were done again are no use."""
    seconds[TWICE] = min(lost_s, seconds.get(STEP, 0.0))
    seconds[STEP] = seconds.get(STEP, 0.0) - seconds[TWICE]
    return seconds


def _by_steps(one: Told, begin: float) -> dict[str, float]:
    """A session that ended before its first row of metrics: its single steps."""
    first = _first_step(one)
    assert first is not None
    seconds = {START: at(first) - begin}
    _add_steps(seconds, (*one.steps, *one.lost_steps), first)
    _add_checkpoints(seconds, [event for event in one.events if at(event) > at(first)])
    return _set_aside(seconds, sum(_step_s(row) for row in one.lost_steps if row is not first))


def _by_speed(one: Told, begin: float, tokens_per_step: int) -> dict[str, float]:
    """An older run has no time columns: its speed says how long its steps took, its events the checkpoints;
    evaluation and samples stay in `other`."""
    lost = {id(row) for row in one.lost_rows}
    rows = [row for row in (*one.rows, *one.lost_rows) if is_train(row) and is_number(row.get("step"))]
    rows.sort(key=at)
    opening = next((event["step"] for event in one.events if is_number(event.get("step"))), 0)
    seconds, lost_s, done = dict.fromkeys((STEP, WAIT, START, CHECKPOINT), 0.0), 0.0, opening
    for row in rows:
        rate, count = amount(row, "tokens_per_sec"), row["step"] - done
        count -= done == opening  # the first step is not in the speed: it compiles
        done = row["step"]
        took_s = count * tokens_per_step / rate if rate and count > 0 else 0.0
        wait_s = took_s * min(1.0, amount(row, "data/wait_share"))
        seconds[STEP], seconds[WAIT] = seconds[STEP] + took_s - wait_s, seconds[WAIT] + wait_s
        lost_s += took_s - wait_s if id(row) in lost else 0.0
    _add_checkpoints(seconds, one.events)
    if rows:
        before = {WAIT: 0.0}
        _add_checkpoints(before, [e for e in one.events if at(e) <= at(rows[0])])
        known = before[CHECKPOINT] + _first_interval_s(rows[0], opening, tokens_per_step)
        seconds[START] = max(0.0, at(rows[0]) - begin - known)
    return _set_aside(seconds, lost_s)


def _first_interval_s(row: Row, opening: float, tokens_per_step: int) -> float:
    """How long the steps up to a session's first row took, without its very first."""
    rate = amount(row, "tokens_per_sec")
    return max(0.0, row["step"] - opening - 1) * tokens_per_step / rate if rate else 0.0


# -----------------------------------------------------------------------------------------------------------
# Machines


def paid_machines(ledger: Account, clock: Clock) -> list[Machine]:
    """The rented ones, and one's own that are paid by the hour. A launch that made none was not paid; a
    rehearsed machine lives in the rehearsal's time alone."""
    return [
        Machine(_real_s(clock, m.since), _real_s(clock, m.ended or m.polled or m.since), m.ended is None)
        for m in ledger.machines
        if m.bills_idle
        and (m.machine_id is not None or m.ended is None)
        and (m.provider != "fake" or clock != Clock())
    ]


def _real_s(clock: Clock, moment: datetime) -> float:
    """Rows of metrics carry real time; a ledger that was rehearsed carries the clock's."""
    told_s = moment.timestamp() - clock.skew_s
    return clock.anchor_s + (told_s - clock.anchor_s) / clock.speed


def assigned(spans: Sequence[Span], machines: list[Machine]) -> list[Machine]:
    """Each session to the machine it ran on: the last begun that lived then. No machine at all where none
    fits any session: such a ledger's clock is not the run's."""
    for span in spans:
        fits = [m for m in machines if m.begin < span.end and (m.open or m.end > span.begin)]
        if fits:
            max(fits, key=lambda machine: machine.begin).spans.append(span)
    return machines if any(machine.spans for machine in machines) else []


def _around(
    seconds: dict[str, float], spans: Sequence[Span], machines: Sequence[Machine], ledger: Account
) -> None:
    """The paid time that no session covers."""
    for machine in machines:
        first = machine.spans[0].begin if machine.spans else machine.end
        seconds[BEFORE] += max(0.0, first - machine.begin)
        seconds[BETWEEN] += _gaps_s(machine.spans)
        if machine.spans:
            seconds[AFTER] += max(0.0, machine.end - machine.spans[-1].end)
    if not machines and not _only_while_it_works(ledger):
        seconds[BETWEEN] += _gaps_s(spans)


def _gaps_s(spans: Sequence[Span]) -> float:
    return sum(max(0.0, later.begin - earlier.end) for earlier, later in pairwise(spans))


def _only_while_it_works(ledger: Account) -> bool:
    return bool(ledger.machines) and not any(m.bills_idle for m in ledger.machines)


def _note(spans: Sequence[Span], unpaid: int, machines: Sequence[Machine], ledger: Account) -> str:
    """What was counted, in a sentence or two."""
    if not spans:
        return "not measured: the run has no records yet"
    if machines:
        said = f"paid: {len(machines)} machine{'s' * (len(machines) > 1)} in ledger.jsonl"
        said += ", as far as is known by now" if any(machine.open for machine in machines) else ""
        sessions = "1 session" if unpaid == 1 else f"{unpaid} sessions"
        said += f"; {sessions} on none of them left out" if unpaid else ""
    elif _only_while_it_works(ledger):
        said = "paid: the sessions alone, on a machine of one's own"
    else:
        why = "the ledger's machines do not fit the sessions" if ledger.machines else "no machine in a ledger"
        said = f"paid: wall clock from the first session to the last record, gaps included ({why})"
    older = sum(not span.itemised for span in spans)
    if older:
        which = "this run" if older == len(spans) else f"{older} of {len(spans)} sessions"
        said += f". Evaluation and sampling of {which} not measured (rows without time columns): in `{OTHER}`"
    return said
