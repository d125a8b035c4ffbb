"""The page of the post-mortem: what is known of a run's spikes, in sentences that its numbers decide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from x1_pretrain.numbers import human
from x1_pretrain.postmortem import page_data, page_verdict
from x1_pretrain.postmortem.effects import MADE as UPDATED
from x1_pretrain.postmortem.effects import Memory, Norm
from x1_pretrain.postmortem.episodes import Spike, tokens_after
from x1_pretrain.postmortem.findings import Findings, state_of
from x1_pretrain.postmortem.steps_file import value
from x1_pretrain.postmortem.words import (
    code,
    count,
    dollars,
    joined,
    moment,
    nats,
    number,
    percent,
    sentence,
    spans,
    spoken,
    table,
    times,
    word,
)
from x1_pretrain.records.run_folder import Run, is_number

WIDTH = 110
NATURAL, MADE = KINDS = "natural", "made on purpose"
STILL_UP = "still up at the last row"
HARDLY = 1.05  # times: a second moment raised by less is not worth a sentence


def page(
    run: Run, spikes: Sequence[Spike], found: Sequence[Findings], pictures: Sequence[str], csv: str
) -> str:
    """The whole page. `found` are the spikes with a section of their own, in order."""
    parts = [f"# Spike post-mortem: {run.name}", _opening(run, spikes, found)]
    if len(spikes) > 1:
        parts.append(overview(spikes))
    for one, picture in zip(found, pictures, strict=True):
        parts += section(one, picture, csv)
    return "\n\n".join(wrapped(part) for part in parts if part) + "\n"


def wrapped(part: str) -> str:
    """Paragraphs to the width of the page; tables, headings, pictures and lists as they are."""
    if part.startswith(("#", "|", "![")):
        return part
    if part.startswith("- "):
        return "\n".join(
            textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            for line in part.split("\n")
        )
    return textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False)


def _opening(run: Run, spikes: Sequence[Spike], found: Sequence[Findings]) -> str:
    step = max((one.last_step for one in found), default=0)
    so_far = "" if step >= run.total_steps else " so far"
    told = f"{count(len(spikes), 'spike')}{so_far}; written at step {step:,} of {run.total_steps:,}"
    more = len(spikes) - len(found)
    only = f" The {count(len(found), 'highest', 'highest')} and newest have a section below." if more else ""
    return f"{sentence(told)}{only} Steps are updates, counted from 1; losses are nats per token."


def overview(spikes: Sequence[Spike]) -> str:
    rows = [
        [
            f"{spike.onset:,}",
            MADE if spike.injected else NATURAL,
            f"{spike.height:+.2f}" if math.isfinite(spike.height) else "not finite",
            f"x{spike.grad_factor:.1f}" if math.isfinite(spike.grad_factor) else "not finite",
            outcome(spike),
        ]
        for spike in spikes
    ]
    return table(["onset", "kind", "height (nats)", "gradient norm", "how it ended"], rows, left=2)


def outcome(spike: Spike) -> str:
    """In a few words, as in a heading."""
    return {
        "recovered": f"recovered in {count(spike.recovery_steps or 0, 'step')}",
        "rewound": f"undone by going back to step {spike.rewound_to or 0:,}",
        "open": STILL_UP,
        "not recovered": "not recovered",
    }[state_of(spike)]


def none(run: Run) -> str:
    """What is said of a run without a spike."""
    broken = [
        e["step"] + 1 for e in run.events() if e.get("event") == "not_finite" and is_number(e.get("step"))
    ]
    if broken:
        steps = spans(sorted(set(broken)))
        return f"no spike, but steps not finite: {steps} (`--step {broken[0]}` looks at that one)"
    return "no spike: its events name none (`--step N` looks at any step)"


# -----------------------------------------------------------------------------------------------------------
# A section


def section(found: Findings, picture: str, csv: str) -> list[str]:
    """All about one spike, a paragraph an entry."""
    spike = found.spike
    kind = MADE if spike.injected else NATURAL
    return [
        f"## Step {spike.onset:,}: {kind}, {outcome(spike)}",
        page_verdict.verdict(found),
        f"![Loss and gradient norm around step {spike.onset:,}]({picture})",
        "### What happened",
        f"{rise(found)} {duration(found)}",
        aftermath(found),
        norms(found.norms),
        "### What the data were",
        *page_data.data(found, csv),
        "### What damped it",
        f"{clipped(found)} {remembered(found)}".strip(),
        "### What to do",
        page_verdict.advice(found),
        closing(found),
    ]


# -----------------------------------------------------------------------------------------------------------
# What happened


def rise(found: Findings) -> str:
    spike = found.spike
    where = f"{human(spike.tokens)} tokens into training" if spike.tokens else "at the very beginning"
    when = f" ({moment(spike.time_utc)})" if spike.time_utc else ""
    told = f"At step {spike.onset:,}, {where}{when}, {_loss(spike)}. {_gradient(spike)}"
    steps = spans(spike.flagged)
    if spike.flagged:
        told += " " + sentence(f"{count(len(spike.flagged), 'step')} stood out ({steps})")
    if spike.above and math.isfinite(spike.loss_scale):
        alarm = found.run.config.stability.alarm
        level = spike.loss_before + alarm * spike.loss_scale
        told += f" The loss was above the alarm level of {level:.3f} ({alarm:g} deviations) for "
        told += f"{count(spike.above, 'step')}."
    return told


def _loss(spike: Spike) -> str:
    before = nats(spike.loss_before)
    if not math.isfinite(spike.peak_loss):
        return f"the loss, {before} until then, stopped being a finite number"
    above = f"{spike.height:.2f} nats above the median of the steps before"
    if spike.height < 3 * spike.loss_scale:
        return (
            "the gradient gave way while the loss hardly moved: it was at most "
            f"{spike.height:.3f} nats above {before}"
        )
    if spike.peak_loss_step == spike.onset:
        return f"the loss jumped from {before} to {spike.peak_loss:.3f}, {above}"
    by = f"by step {spike.peak_loss_step:,}"
    return f"the loss left its path, and {by} it had climbed from {before} to {spike.peak_loss:.3f}, {above}"


def _gradient(spike: Spike) -> str:
    if not math.isfinite(spike.peak_grad_norm):
        return f"The gradient norm, {number(spike.grad_norm_before)} before, was not finite."
    if not math.isfinite(spike.grad_factor):
        peak = f"at step {spike.peak_grad_norm_step:,} with {number(spike.peak_grad_norm)}"
        return f"The gradient norm peaked {peak}."
    same = spike.peak_grad_norm_step == spike.peak_loss_step
    at = "at the same step" if same else f"at step {spike.peak_grad_norm_step:,}"
    usual = number(spike.grad_norm_before)
    return (
        f"The gradient norm peaked {at} with {number(spike.peak_grad_norm)}, {times(spike.grad_factor)} its "
        f"usual {usual}."
    )


def duration(found: Findings) -> str:
    """How long it took and what that cost."""
    spike = found.spike
    if spike.rewound_to is not None and spike.end is not None:
        lost = spike.end - spike.rewound_to
        price = price_of(found, spike.rewound_to + 1, spike.end, found.redone_s)
        return f"It did not come back by itself. Going back threw away {count(lost, 'step')}: {price}."
    if spike.recovered is None:
        since = count(max(0, found.last_step - spike.onset), "step")
        return (
            f"At the last row, {since} later, it had not come back." if spike.end is None else _closed(spike)
        )
    price = price_of(found, spike.onset, spike.recovered - 1, spike.recovery_s)
    steps = count(spike.recovery_steps or 0, "step")
    return f"It was back at step {spike.recovered:,}. The way there took {steps}: {price}."


def _closed(spike: Spike) -> str:
    return f"The episode was closed at step {spike.end or 0:,} without the loss having come back."


def price_of(found: Findings, first: int, last: int, seconds: float | None) -> str:
    """Tokens, minutes and dollars of the steps first to last."""
    run = found.run
    events = run.events()[: found.spike.events_before + 1]  # as it stood then
    tokens = (last - first + 1) * run.config.training.batch_tokens
    injected = tokens - tokens_after(run, last, events) + tokens_after(run, first - 1, events)
    parts = [f"{human(tokens)} tokens"] + ([spoken(seconds)] if seconds else [])
    usd = found.usd(seconds)
    if usd is not None and found.price is not None:
        parts.append(f"{dollars(usd)} at {dollars(found.price.usd_per_hr)} an hour ({found.price.source})")
    elif found.price is None:
        parts.append("no dollars, as the run had no price")
    made = "all of them injected" if injected == tokens else f"{human(injected)} of them injected"
    note = f" ({made}; those count as no tokens trained)" if injected else ""
    return f"{parts[0]}{note}, {joined(parts[1:])}" if parts[1:] else f"{parts[0]}{note}"


def aftermath(found: Findings) -> str:
    left = found.lasting
    if found.untouched and found.spike.rewound_to is None:
        return "Nothing can be left behind: every update of the steps that stood out was left out."
    if left is None:
        return ""
    told = (
        f"A straight line of the loss against the logarithm of the step, through {left.before:,} steps "
        f"before the onset, leads to {left.expected:.3f} for the steps {left.first:,} to {left.last:,}; they "
        f"came to {left.found:.3f}. "
    )
    off = f"The difference of {left.difference:+.3f} nats"
    if not left.clear:
        told += f"{off} is within what scatter and bend of the steps before explain (±{left.error:.3f})."
    elif left.difference < 0:
        told += f"{off} lies below the line (±{left.error:.3f}): nothing was lost."
    else:
        told += (
            f"{off} is more than scatter and bend of the steps before explain (±{left.error:.3f}). A loss "
        )
        told += "that flattens lies above a straight line too"
        told += (
            "; this is well outside the error: the spike may have left something behind."
            if (left.reading == "may have")
            else "."
        )
    if not left.settled and found.last_step < found.run.total_steps:
        told += " `x1 postmortem` run again later looks at more steps."
    return told


NORM_NAMES = {
    "grad_norm": "gradient",
    "param_norm": "weights",
    "optimizer/m_norm": "Adam's first moment",
    "optimizer/v_norm": "Adam's second moment",
    "attention/logit_max": "largest attention logit",
}


def norms(found: Sequence[Norm]) -> str:
    """A table of the norms around it; nothing where the metrics hold none."""
    rows = [
        [_norm_name(norm.name), code(norm.name), *map(_cell, (norm.before, norm.during, norm.after))]
        for norm in found
    ]
    header = ["norm (at step)", "metric", "last before", "highest during", "first after"]
    if not any(norm.during for norm in found if norm.name != "grad_norm"):  # its peak is told above
        rows, header = [[*row[:3], row[4]] for row in rows], [*header[:3], header[4]]
    return table(header, rows, left=2) if rows else ""


def _cell(point: tuple[int, float] | None) -> str:
    return f"{number(point[1])} ({point[0]:,})" if point else ""


def _norm_name(name: str) -> str:
    kind, _, group = name.partition("/")
    words = {"grad_norm": "gradient", "param_norm": "weights", "update_ratio": "update over weights"}
    return NORM_NAMES.get(name) or f"{words.get(kind, kind)}, {group}"


# -----------------------------------------------------------------------------------------------------------
# What damped it


def clipped(found: Findings) -> str:
    spike, cut = found.spike, found.clipping
    skipped = (
        f"{count(spike.skipped, 'update')} {'was' if spike.skipped == 1 else 'were'} left out altogether"
    )
    told = f" {sentence(skipped)}" if spike.skipped else ""
    if cut is None and _none_made(found):
        return f"No update was made in these steps, so there was nothing to clip.{told}"
    if cut is None:
        return told.strip()
    if not cut.cut:
        return f"Clipping did nothing: no gradient of these steps was above {number(cut.limit)}.{told}"
    return (
        f"Clipping cut the gradient in {word(cut.cut)} of {count(cut.steps, 'step')}. Hardest at step "
        f"{cut.step:,}, where a norm of {number(cut.norm)} was cut to {number(cut.limit)}, to "
        f"{percent(1 / cut.factor)} of it.{told}"
    )


def _none_made(found: Findings) -> bool:
    return bool(found.during) and all(row.get("verdict", "go") not in UPDATED for row in found.during)


def remembered(found: Findings) -> str:
    """What beta2 makes of the spike: computed, and measured where the metrics have it."""
    memory, optimizer = found.memory, found.run.config.optimizer
    if memory is None:
        return ""
    span = (
        f"Adam remembers squared gradients for about 1/(1 - {optimizer.beta2:g}) = {memory.steps:,.0f} steps"
    )
    return f"{span}. {_moments(found.norms) or _inflated(found, memory)}"


def _inflated(found: Findings, memory: Memory) -> str:
    if memory.peak < HARDLY:
        return "What got through the clip was too little to move that memory: the updates kept their size."
    weight = "A weight whose gradient rose as the norm did, after clipping, had its second moment raised to"
    usual = f"{memory.peak:.2g} times its usual value by step {memory.peak_step:,}"
    shrunk = f"A usual gradient then moved it {memory.update:.0%} of its usual way"
    calm = f"by step {memory.calm_step:,} that moment was less than a tenth above its usual value"
    known = "" if memory.calm_step <= found.last_step else " (computed: the run is not there yet)"
    return f"{weight} {usual}. {shrunk}; {calm}{known}."


def _moments(norms: Sequence[Norm]) -> str:
    """What the metrics say of the second moment: where they do, no computation has to guess."""
    found = next((norm for norm in norms if norm.name == "optimizer/v_norm"), None)
    then = (found.during or found.after) if found else None
    if found is None or then is None:
        return ""
    grown = then[1] / found.before[1] if found.before[1] > 0 else math.nan
    ratio = f", {grown:.3g} times as much" if math.isfinite(grown) else ""
    return (
        f"Measured over all weights, the norm of that memory (its second moment) was "
        f"{number(found.before[1])} at step {found.before[0]:,} and {number(then[1])} at step "
        f"{then[0]:,}{ratio}."
    )


# -----------------------------------------------------------------------------------------------------------
# What is not known


def closing(found: Findings) -> str:
    """One line on what was not measured, one on where the numbers come from."""
    missing = ["the loss of single documents"]
    if not found.every_step:
        missing.append(f"the steps between the rows (one every {found.run.config.log.every:,})")
    if found.clipping is None and not any(math.isfinite(value(row, "clip")) for row in found.during):
        missing.append("what the gradients were clipped to")
    have = {norm.name for norm in found.norms}
    if not found.spike.rewound_utc:
        missing += ["the norms around it"] if not have else []
        missing += ["Adam's moments"] if have and not have & {"optimizer/m_norm", "optimizer/v_norm"} else []
    if found.spike.recovered and found.spike.recovery_s is None:
        missing.append("how long the recovery took by the clock")
    rows = "`steps.jsonl`" if found.every_step else "`metrics.jsonl`"
    sources = dict.fromkeys([rows, "`metrics.jsonl`", "`events.jsonl`", "`config.yaml`"])
    return f"Not measured: {joined(missing)}. Figures are from {joined(list(sources))}."
