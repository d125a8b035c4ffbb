"""Everything that is known of one spike, gathered from a run's files for its page and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from x1_pretrain.corpus.order import Order
from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.postmortem.data import Seen, data_of, patterns
from x1_pretrain.postmortem.effects import (
    MADE,
    Clipping,
    Lasting,
    Memory,
    Norm,
    Price,
    clipping,
    lasting,
    memory,
    norms,
    price,
)
from x1_pretrain.postmortem.episodes import Spike, seconds_between
from x1_pretrain.postmortem.steps_file import every_step, last_row, rows_between, value
from x1_pretrain.postmortem.verdict import Evidence, State, Verdict, judge
from x1_pretrain.records.data_order import order_of
from x1_pretrain.records.run_folder import Row, Run, is_number, series

SHOWN_AFTER = 64  # steps in the picture after a spike, at least


@dataclass(frozen=True)
class Findings:
    """One spike and all around it. Rows are those of steps.jsonl."""

    run: Run
    spike: Spike
    before: list[Row]  # the detector's window before the onset
    during: list[Row]  # from the onset to the recovery, or as far as it went
    after: list[Row]
    again: list[Row]  # the same steps once more, after a rewind
    every_step: bool  # false: the run has only a row every log.every
    last_step: int
    seen: Seen | None
    no_data: str  # why the data can't be told
    lasting: Lasting | None
    clipping: Clipping | None
    memory: Memory | None
    norms: list[Norm]
    price: Price | None
    clock: Clock
    untouched: bool  # no batch of it reached the weights: every update was left out
    redone_s: float | None  # time of the steps that a rewind threw away
    evidence: Evidence
    verdict: Verdict

    def usd(self, seconds: float | None) -> float | None:
        known = self.price is not None and seconds is not None
        return self.price.usd(seconds, self.clock) if known and self.price and seconds else None

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.evidence.patterns


def gather(run: Run, spike: Spike, spikes: Sequence[Spike], metrics: Sequence[Row], clock: Clock) -> Findings:
    """Read what there is about one spike; `metrics` are the run's rows."""
    window = run.config.stability.window
    last = spike.last
    shown = max(window, SHOWN_AFTER, last - spike.onset)
    rows = rows_between(run, max(1, spike.onset - window), last + shown, spike.rewound_utc)
    before = [row for row in rows if row["step"] < spike.onset]
    during = [row for row in rows if spike.onset <= row["step"] <= last]
    after = [row for row in rows if row["step"] > last]
    newest = last_row(run)
    seen, no_data = _data(run, spike, during)
    after_recovery = _after_recovery(run, spike, spikes, after)
    calm = [row for row in before if not row.get("spike")]
    untouched = all_left_out(spike, seen, rows)
    trend = spike.recovered and not spike.rewound_utc and not untouched
    left = lasting(calm, after_recovery) if trend else None
    resumed = last_resume(run.events()[: spike.events_before], spike.onset)
    evidence = _evidence(run, spike, spikes, during, metrics, seen, left, resumed, untouched)
    return Findings(
        run=run,
        spike=spike,
        before=before,
        during=during,
        after=after,
        again=rows_between(run, spike.rewound_to + 1, last) if spike.rewound_to is not None else [],
        every_step=every_step(run),
        last_step=newest["step"] if newest else spike.last,
        seen=seen,
        no_data=no_data,
        lasting=left,
        clipping=clipping(during),
        memory=memory([*during, *after], spike.grad_norm_before, run.config.optimizer),
        norms=norms(metrics, rows, spike.onset, last) if spike.rewound_to is None else [],
        price=price(run, spike.time_utc, metrics, clock),
        clock=clock,
        untouched=untouched,
        redone_s=_redone_s(rows, spike),
        evidence=evidence,
        verdict=judge(evidence, run.config),
    )


def _data(run: Run, spike: Spike, during: Sequence[Row]) -> tuple[Seen | None, str]:
    """The data of the steps that stood out, by the order that was in force then."""
    try:
        order = order_of(run, run.events()[: spike.events_before + 1])
        broken = [row["step"] for row in during if not finite(row)]
        return data_of(run, order, _steps_of_interest(order, spike, broken), spike.onset), ""
    except UserError as error:
        return None, str(error)


def _steps_of_interest(order: Order, spike: Spike, broken: Sequence[int]) -> list[int]:
    """Injected ones, those that stood out, those that were not finite; where no row says so, the onset."""
    near = range(max(1, spike.onset - 5), min(spike.last, order.total_steps) + 1)
    injected = [step for step in near if spike.injected and order.injects(step - 1)]
    return sorted({*injected, *broken, *(spike.flagged or (spike.onset,))})


def _after_recovery(run: Run, spike: Spike, spikes: Sequence[Spike], after: Sequence[Row]) -> list[Row]:
    """Steps after the recovery, up to the next spike; a trend reaches no farther than half a window."""
    later = min((other.onset for other in spikes if other.onset > spike.last), default=None)
    first = spike.recovered or spike.last
    until = min(first + run.config.stability.window // 2, (later or 1 << 62) - 1)
    return [row for row in after if first <= row["step"] <= until]


def all_left_out(spike: Spike, seen: Seen | None, rows: Sequence[Row]) -> bool:
    """Whether no update was made of the steps that stood out and of those that were injected."""
    flagged = spike.flagged or tuple(range(spike.onset, spike.last + 1))
    steps = {*flagged, *(seen.injected if seen else ())}
    steps |= {row["step"] for row in rows if row.get("injected") and row["step"] <= spike.last}
    made = {row["step"]: row.get("verdict", "go") in MADE for row in rows}
    return all(not made.get(step, True) for step in steps)


def _redone_s(rows: Sequence[Row], spike: Spike) -> float | None:
    if spike.rewound_to is None or spike.end is None:
        return None
    return seconds_between(rows, spike.rewound_to + 1, spike.end)


# -----------------------------------------------------------------------------------------------------------
# The evidence


def _evidence(
    run: Run,
    spike: Spike,
    spikes: Sequence[Spike],
    during: Sequence[Row],
    metrics: Sequence[Row],
    seen: Seen | None,
    left: Lasting | None,
    resumed: int | None,
    untouched: bool,
) -> Evidence:
    logit_max, growth = _logits(metrics, spike.onset)
    return Evidence(
        injected=spike.injected,
        state=state_of(spike),
        not_finite=sum(not finite(row) for row in during),
        precision=str(run.manifest.get("precision")),
        steps_to_recover=spike.recovery_steps,
        patterns=tuple(patterns(seen)) if seen and not spike.injected else (),
        data_seen=seen is not None and seen.corpora.complete,
        onset=spike.onset,
        warmup_steps=run.config.optimizer.warmup_steps,
        steps_since_resume=None if resumed is None else spike.onset - resumed,
        logit_max=logit_max,
        logit_growth=growth,
        lasting=left.difference if left and left.settled and left.reading == "may have" else None,
        untouched=untouched,
        spikes=max(1, sum(not other.injected for other in spikes)),
    )


def last_resume(events: Sequence[Row], onset: int) -> int | None:
    """The step of the last resume that led to `onset`. One that a rewind or a later resume went back over is
    of a past that was given up."""
    found: list[int] = []
    for event in events:
        kind = event.get("event")
        back_to: Any = event.get("to_step" if kind == "rewind" else "step")
        if kind in ("start", "resume", "rewind") and is_number(back_to):
            found = [step for step in found if step < back_to and kind != "start"]
            found += [int(back_to)] if kind == "resume" else []
    return max((step for step in found if step < onset), default=None)


def finite(row: Row) -> bool:
    return all(math.isfinite(value(row, name)) for name in ("loss", "grad_norm") if name in row)


def state_of(spike: Spike) -> State:
    if spike.rewound_to is not None:
        return "rewound"
    if spike.recovered is not None:
        return "recovered"
    return "open" if spike.end is None else "not recovered"


def _logits(metrics: Sequence[Row], onset: int) -> tuple[float | None, float | None]:
    """The last attention-logit maximum before the onset, and its growth over the last quarter of the way."""
    steps, values = series(metrics, "attention/logit_max")
    known = [(s, v) for s, v in zip(steps, values, strict=True) if s < onset and is_number(v)]
    if not known:
        return None, None
    step, latest = known[-1]
    earlier = [v for s, v in known if s <= 0.75 * step]
    return latest, latest / earlier[-1] if earlier and earlier[-1] > 0 else None
