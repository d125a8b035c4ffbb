"""Sections of what happened: spikes with their post-mortems, and the events worth knowing."""

from __future__ import annotations

import math

from x1_pretrain.postmortem.episodes import Spike
from x1_pretrain.report import markdown, words
from x1_pretrain.report.blocks import Block, Folded, Happened, Line, Link, Markdown, Picture, Section, Table
from x1_pretrain.report.material import Material, PostMortem

# Everyday events: counted, not listed.
EVERYDAY = {"checkpoint", "machine", "batch", "micro_batch", "mlflow", "made_room", "data"}
SHOWN = 40


def spikes(m: Material) -> Section:
    steps = words.count(m.step, "step")
    if not m.spikes:
        missing = "" if m.steps else ", as far as the rows tell: the run kept no row for every step"
        return Section("spikes", "Spikes", [Line(f"No spike in {steps}{missing}.", "note")])
    head = ["", "step", "kind", "loss before", "peak", "gradient norm", "back after", "answer"]
    rows = [_spike(number, spike) for number, spike in enumerate(m.spikes, 1)]
    made = sum(spike.injected for spike in m.spikes)
    on_purpose = "" if not made else ", made on purpose" if made == len(rows) else f", {made} made on purpose"
    said = f"{words.count(len(rows), 'spike')} in {steps}{on_purpose}"
    blocks: list[Block] = [Line(f"{said}."), Table("Spikes", head, rows, frozenset({0, 2, 7}))]
    for one in m.postmortems:
        blocks += _postmortem(one)
    blocks += [Picture(png, "The spike and its recovery, from its post-mortem") for png in m.pictures]
    if not m.postmortems:
        blocks.append(Line("No post-mortem beside the run; `x1 postmortem RUN` writes one.", "note"))
    return Section("spikes", "Spikes", blocks)


def _postmortem(one: PostMortem) -> list[Block]:
    """Its verdicts to read at once; the whole text folded, since the page may be all that somebody has."""
    verdicts: list[Block] = [Line(said) for said in markdown.verdict(one.text)]
    link = Link(one.target, f"The same as a file: {one.name}")
    return [*verdicts, Folded(f"The post-mortem: {one.name}", [Markdown(one.text), link])]


def _spike(number: int, spike: Spike) -> list[str]:
    steps = spike.recovery_steps
    back = "not yet" if spike.open else "never" if steps is None else words.count(steps, "step")
    factor = f" ({spike.grad_factor:.1f}x)" if math.isfinite(spike.grad_factor) else ""
    answer = f"rewound to {spike.rewound_to:,}" if spike.rewound_to is not None else spike.policy or "none"
    answer += f", {words.count(spike.skipped, 'update')} left out" if spike.skipped else ""
    return [
        f"S{number}",
        f"{spike.onset:,}",
        "injected" if spike.injected else "natural",
        words.loss(spike.loss_before),
        f"{words.loss(spike.peak_loss)} at {spike.peak_loss_step:,}",
        f"{spike.peak_grad_norm:.3g}{factor}",
        back,
        answer,
    ]


def events(m: Material) -> Section:
    if not m.events:
        return Section("events", "What happened", [Line("No events on record.", "note")])
    kept = [event for event in m.events if worth_telling(event)]
    rows = [_event(event) for event in kept]
    saved, last = m.told("checkpoint"), max(len(rows) - SHOWN // 2, SHOWN // 2)
    blocks: list[Block] = []
    if saved:
        blocks.append(
            Line(f"{words.count(len(saved), 'checkpoint')} saved, the last at step {_step(saved[-1])}.")
        )
    if m.redone:
        blocks.append(Line(f"{words.count(m.redone, 'row')} of steps that were done again are set aside."))
    shown = rows if len(rows) <= SHOWN else [*rows[: SHOWN // 2], *rows[last:]]
    middle = rows[SHOWN // 2 : last] if len(rows) > SHOWN else []
    return Section("events", "What happened", [*blocks, Happened(shown, middle)])


def worth_telling(event: dict[str, object]) -> bool:
    """That a mirror is there, and that it had all at the end, is told by every session."""
    if event.get("event") == "mirror":
        return "epoch" not in event and event.get("left") != []
    return event.get("event") not in EVERYDAY


def _event(event: dict[str, object]) -> tuple[str, str, str, str]:
    said = str(event.get("message") or "").strip() or "no words on record"
    return words.when(event.get("time_utc")), _step(event), str(event.get("event")).replace("_", " "), said


def _step(event: dict[str, object]) -> str:
    step = event.get("step")
    return f"{step:,}" if isinstance(step, int) else "?"
