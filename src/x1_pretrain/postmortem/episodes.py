"""The spikes of a run, each with its numbers: from the events that the loop wrote and the rows of its steps.

for spike in episodes(open_run(folder)):
    print(spike.onset, spike.height, spike.recovery_steps)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from x1_pretrain.errors import UserError
from x1_pretrain.learning.stability import LOSS_FLOOR, NORMAL, stands_out
from x1_pretrain.postmortem.steps_file import plausible, rows_between, value
from x1_pretrain.records.data_order import injected_stretches, order_of, recorded_injections
from x1_pretrain.records.run_folder import Row, Run, is_number, moment, with_numbers


@dataclass(frozen=True)
class Spike:
    """One episode, from the first step that stood out. `before`: medians of the steps before it.

    Steps are updates, counted from 1. A number that no row and no event holds is NaN.
    """

    onset: int
    end: int | None  # when the detector closed it, or a rewind undid it; none: still open
    recovered: int | None  # the first step from which the loss was back; none: not (yet)
    loss_before: float
    grad_norm_before: float
    peak_loss: float
    peak_loss_step: int
    peak_grad_norm: float
    peak_grad_norm_step: int
    injected: bool  # made on purpose
    policy: str | None  # what the run was told to do about spikes
    time_utc: str | None  # of the onset
    tokens: int  # trained before the onset
    flagged: tuple[int, ...]  # the steps in it that stood out
    above: int  # its steps with a loss above the alarm
    loss_scale: float  # one deviation of the loss from step to step before, as the detector had it
    skipped: int  # updates left out
    recovery_s: float | None  # what the steps from the onset to the recovery took; none: not known
    rewound_to: int | None  # the step that a rewind went back to
    rewound_utc: str | None
    events_before: int  # rows of events.jsonl before it began

    @property
    def height(self) -> float:
        """Nats above the median before."""
        return self.peak_loss - self.loss_before

    @property
    def grad_factor(self) -> float:
        """The highest gradient norm over the median before."""
        return self.peak_grad_norm / self.grad_norm_before if self.grad_norm_before > 0 else math.nan

    @property
    def recovery_steps(self) -> int | None:
        return None if self.recovered is None else self.recovered - self.onset

    @property
    def last(self) -> int:
        """Its last step: the one before the recovery, or as far as it went."""
        if self.recovered is not None:
            return max(self.onset, self.recovered - 1, *self.flagged[-1:])
        return max(self.onset, self.end or 0, self.peak_loss_step, *self.flagged[-1:])

    @property
    def open(self) -> bool:
        """It may still be going on."""
        return self.end is None and self.recovered is None


def episodes(run: Run) -> list[Spike]:
    """Every spike of the run as it stands, in the order they happened; one that is still open included."""
    events = [with_numbers(event) for event in run.events()]
    return [_measured(run, told, events) for told in _told(events)]


# -----------------------------------------------------------------------------------------------------------
# What the events tell


@dataclass
class _Told:
    """An episode as the events have it."""

    onset: int
    place: int  # in the events
    begin: Row
    close: Row | None = None
    rewind: Row | None = None


def _told(events: Sequence[Row]) -> list[_Told]:
    """A resume from before an onset forgets it: its steps are done again. A rewind closes what it undoes."""
    found: list[_Told] = []
    for place, event in enumerate(events):
        kind = event.get("event")
        if kind in ("spike", "spike_end") and isinstance(event.get("onset"), int):
            _take(found, event, place)
        elif kind == "rewind" and is_number(event.get("to_step")):
            for one in found:
                if one.rewind is None and one.onset > event["to_step"]:
                    one.rewind = event
        elif kind in ("start", "resume") and is_number(event.get("step")):
            found = [one for one in found if one.rewind or one.onset <= event["step"]]
    return found


def _take(found: list[_Told], event: Row, place: int) -> None:
    """The begin or the end of an episode; one without its other half is still one."""
    same = next((one for one in reversed(found) if one.onset == event["onset"] and not one.rewind), None)
    if same is None:
        same = _Told(event["onset"], place, event)
        found.append(same)
    if event["event"] == "spike_end":
        same.close = event


# -----------------------------------------------------------------------------------------------------------
# What the rows tell


def _measured(run: Run, told: _Told, events: Sequence[Row]) -> Spike:
    """The numbers: the detector's own where it told them, else from the rows."""
    close, rewind = told.close or {}, told.rewind or {}
    end = close.get("end", rewind.get("from_step", rewind.get("step")))
    recovered = close.get("recovered") if is_number(close.get("recovered")) else None
    until = rewind.get("time_utc")
    window = run.config.stability.window
    reach = max(end or 0, recovered or 0) or (1 << 62)
    rows = rows_between(run, max(1, told.onset - window), reach, until)
    before = [row for row in rows if row["step"] < told.onset and not row.get("spike")]
    alarm = run.config.stability.alarm
    during = [row for row in rows if row["step"] >= told.onset]
    middle = level(value(row, "loss") for row in before)[0]
    norm = level(value(row, "grad_norm") for row in before)[0]
    said = told.begin | close
    middle, norm = _known(said.get("loss_before"), middle), _known(said.get("grad_norm_before"), norm)
    loss, grad = peak(during, "loss"), peak(during, "grad_norm")
    scale = _scale(told.begin, middle, before)
    spike = Spike(
        onset=told.onset,
        end=end,
        recovered=recovered,
        loss_before=middle,
        grad_norm_before=norm,
        peak_loss=_known(close.get("peak_loss"), loss[0]),
        peak_loss_step=close.get("peak_loss_step", loss[1] or told.onset),
        peak_grad_norm=_known(close.get("peak_grad_norm"), grad[0]),
        peak_grad_norm_step=close.get("peak_grad_norm_step", grad[1] or told.onset),
        injected=_made(said, events[: told.place + 1], told.onset),
        policy=close.get("policy", run.config.stability.policy),
        time_utc=next((row.get("time_utc") for row in during), told.begin.get("time_utc")),
        tokens=tokens_after(run, told.onset - 1, events[: told.place + 1]),
        flagged=tuple(row["step"] for row in during if stood_out(row, alarm)),
        above=sum(value(row, "loss") > middle + alarm * scale for row in during),
        loss_scale=scale,
        skipped=sum(row.get("verdict") == "skip" for row in during),
        recovery_s=None,
        rewound_to=rewind.get("to_step"),
        rewound_utc=until,
        events_before=told.place,
    )
    return replace(spike, recovery_s=_seconds(rows, spike))


def _made(said: Row, until: Sequence[Row], onset: int) -> bool:
    """On purpose: the detector's own word, which knew what each step read; else by the events until then."""
    return bool(said["injected"]) if "injected" in said else injected_within(until, onset) is not None


def stood_out(row: Row, alarm: float) -> bool:
    """Whether the step stood out by itself; `spike` in a row says that it lay within an episode."""
    if is_number(row.get("loss_z")) and is_number(row.get("grad_z")):
        return stands_out(row["loss_z"], row["grad_z"], alarm)
    return bool(row.get("spike"))


def _scale(begin: Row, middle: float, before: Sequence[Row]) -> float:
    """The detector's deviation, from what it said at the onset; else from the rows."""
    z, loss = value(begin, "loss_z"), value(begin, "loss")
    if math.isfinite(loss - middle) and z and (loss - middle) / z > 0:
        return (loss - middle) / z
    return deviation(before)


def deviation(rows: Iterable[Row]) -> float:
    """Of the loss from step to step, as the detector takes it: from differences, in which a fall cancels."""
    losses = [value(row, "loss") for row in rows]
    steps = [abs(b - a) for a, b in pairwise(losses) if math.isfinite(b - a)]
    return max(NORMAL * float(np.median(steps)) / math.sqrt(2), LOSS_FLOOR) if steps else math.nan


def _known(told: Any, counted: float) -> float:
    known = plausible(float(told)) if is_number(told) else math.nan
    return counted if math.isnan(known) else known


def level(values: Iterable[float]) -> tuple[float, float]:
    """Median and robust standard deviation of the finite values; NaN for none."""
    finite = np.array([v for v in values if math.isfinite(v)])
    if not len(finite):
        return math.nan, math.nan
    middle = float(np.median(finite))
    return middle, NORMAL * float(np.median(np.abs(finite - middle)))


def peak(rows: Iterable[Row], name: str) -> tuple[float, int | None]:
    """The highest value and its step; infinity is higher than any number, and NaN counts as infinity."""
    best: tuple[float, int | None] = (-math.inf, None)
    for row in rows:
        if name not in row:
            continue
        found = value(row, name)
        found = math.inf if math.isnan(found) else found
        if found > best[0]:
            best = (found, row["step"])
    return best if best[1] is not None else (math.nan, None)


def _seconds(rows: Sequence[Row], spike: Spike) -> float | None:
    """What its steps took, up to the one that was back."""
    return None if spike.recovered is None else seconds_between(rows, spike.onset, spike.recovered - 1)


def seconds_between(rows: Sequence[Row], first: int, last: int) -> float | None:
    """What the steps first to last took by themselves: an evaluation or a checkpoint that was due between
    them is not theirs. Where a row does not say, by the clock; a pause between two sessions is left out."""
    own = [value(row, "step_s") for row in rows if first <= row["step"] <= last]
    if own and all(map(math.isfinite, own)):
        return sum(own) or None
    total = 0.0
    for before, row in pairwise(rows):
        if first <= row["step"] <= last:
            begin, end = moment(before), moment(row)
            same = row.get("session") == before.get("session") and row["step"] == before["step"] + 1
            if same and begin and end and end >= begin:
                total += (end - begin).total_seconds()
            elif is_number(row.get("step_s")):
                total += row["step_s"]  # waiting for data is part of it
            else:
                return None
    return total or None


# -----------------------------------------------------------------------------------------------------------
# Tokens and injections


def injected_within(events: Sequence[Row], onset: int) -> tuple[int, int] | None:
    """The injection that an onset lies in or right behind: its last batch may be the first to stand out. What
    a resume or a rewind undid by then is none."""
    return next((one for one in injected_stretches(events) if one[0] <= onset <= one[1] + 1), None)


def tokens_after(run: Run, step: int, events: Sequence[Row]) -> int:
    """Tokens trained by the end of `step`, as the run stood after `events`; injected ones are not counted."""
    try:
        made = order_of(run, events).injected_before(step) if recorded_injections(events) else 0
    except (UserError, TypeError, ValueError):  # without the order: as if the run had never gone back
        made = sum(max(0, min(last, step) - first + 1) for first, last in injected_stretches(events))
    return (step - made) * run.config.training.batch_tokens
