"""Sections of what was learned: the loss, the evaluations, what the model said on the way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from x1_pretrain.report import curves, words
from x1_pretrain.report.blocks import (
    F64,
    Block,
    Chart,
    Curve,
    Folded,
    Level,
    Line,
    Mark,
    Said,
    Section,
    Table,
    Views,
)
from x1_pretrain.report.material import Material, value
from x1_pretrain.report.outlook import Expected, check

EARLY = 0.1  # of the tokens, left out of the closer view
ROWS_SHOWN, TEXTS_SHOWN = 20, 6
WINDOW_ROWS = 20  # over which a mixture's shares are averaged before they are called changed


# ------------------------------------------------------------------------------------------------------------
# Marks: what happened where


def marks(m: Material) -> list[Mark]:
    """Spikes, rewinds, injections, resumes, changes of the mixture and of the context, by place: the tokens
    trained before it."""
    found = [*_spikes(m), *_events(m), *_contexts(m), *_mixtures(m)]
    return sorted(found, key=lambda mark: mark.x)


def _spikes(m: Material) -> list[Mark]:
    made = []
    for number, spike in enumerate(m.spikes, 1):
        back = f", back at step {spike.recovered:,}" if spike.recovered is not None else ", not back"
        what = "injected spike" if spike.injected else "spike"
        text = f"{what} at step {spike.onset:,}: loss up to {words.loss(spike.peak_loss)}{back}"
        made.append(Mark(m.tokens_at(spike.onset - 1), f"S{number}", text, "spike"))
    return made


def _events(m: Material) -> list[Mark]:
    """Of a resume from the very step of an earlier one, and of what was undone, the last counts."""
    made: dict[tuple[str, float], tuple[str, str]] = {}
    for event in m.told("resume", "rewind", "inject"):
        kind = str(event["event"])
        step = value(event, {"resume": "step", "rewind": "to_step", "inject": "first_step"}[kind])
        if step is None or not np.isfinite(step):
            continue
        made[kind, step] = (kind, _told(kind, step, event.get("from_step")))
    counted = {"resume": 0, "rewind": 0, "inject": 0}
    result = []
    for (_, step), (kind, text) in sorted(made.items(), key=lambda item: item[0][1]):
        counted[kind] += 1
        label = {"resume": "R", "rewind": "W", "inject": "I"}[kind] + str(counted[kind])
        result.append(Mark(m.tokens_at(step), label, text, kind))  # type: ignore[arg-type]
    return result


def _told(kind: str, step: float, from_step: object) -> str:
    if kind == "rewind":
        return f"rewound from step {from_step} to {step:,.0f}, over the batches in between"
    return f"{'resumed from' if kind == 'resume' else 'spike injected after'} step {step:,.0f}"


def _contexts(m: Material) -> list[Mark]:
    rows = [(row, v) for row in m.trained if (v := value(row, "context")) is not None]
    changes = [(row, v) for (_, before), (row, v) in pairwise(rows) if v != before]
    return [
        Mark(m.x_of(row), f"C{number}", f"context {v:,.0f} from step {row['step']:,}", "context")
        for number, (row, v) in enumerate(changes, 1)
    ]


def _mixtures(m: Material) -> list[Mark]:
    names = m.named("mixture/")
    if len(names) < 2:
        return []
    x, first = m.column(names[0])
    changes = steps_up(first, 0.05 + 1 / m.run.config.batch_blocks)
    label = names[0].removeprefix("mixture/")
    return [
        Mark(float(x[at]), f"M{number}", f"mixture: {label} {before:.0%} to {after:.0%}", "mixture")
        for number, (at, before, after) in enumerate(changes, 1)
    ]


def steps_up(values: F64, limit: float) -> list[tuple[int, float, float]]:
    """Where the mean of the next rows is another than that of the rows before: place, before, after.

    A step's shares are whole blocks, so single rows say little.
    """
    size, found = min(WINDOW_ROWS, len(values) // 2), []
    if size < 1:
        return []
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(size, len(values) - size + 1)
    before, after = (sums[places] - sums[places - size]) / size, (sums[places + size] - sums[places]) / size
    change = np.abs(after - before)
    while len(change) and change.max() > limit:
        best = int(change.argmax())
        found.append((int(places[best]), float(before[best]), float(after[best])))
        change[max(0, best - size) : best + size + 1] = 0.0
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------
# The loss


def loss(m: Material, expected: Sequence[Expected], placed: Sequence[Mark]) -> Section:
    drawn = loss_curves(m)
    if not drawn:
        return Section("loss", "Loss", [Line("No losses on record yet.", "note")])
    levels = [one.level for one in expected]
    views = [("whole run", _whole(m, drawn, placed, levels))]
    if len(m.trained) >= 20:
        views.append((f"without the first {EARLY:.0%}", _later(m, drawn, placed, levels)))
        views.append(("logarithmic tokens", _log(m, drawn, placed, levels)))
    blocks: list[Block] = [Views("loss-views", views) if len(views) > 1 else views[0][1], *mark_list(placed)]
    return Section("loss", "Loss", [*blocks, *_mixture_chart(m)])


def loss_curves(m: Material) -> list[Curve]:
    x, y = m.every_step("loss", "train/loss")
    drawn = curves.curves("train", x, y, 0, words.loss(float(y[-1]))) if len(x) else []
    for place, name in enumerate(shown_validation(m), 1):
        vx, vy = m.column(name)
        title = "validation" if name == "val/loss" else f"validation {name.split('/')[1]}"
        if len(vx):
            drawn.append(Curve(title, vx, vy, place, last=words.loss(float(vy[-1]))))
    return drawn


def shown_validation(m: Material) -> list[str]:
    """Per domain; the overall one too where there are several, as it is then a line of its own."""
    names = m.validations
    return names if len(names) != 2 or "val/loss" not in names else names[1:]


def _whole(m: Material, drawn: list[Curve], placed: Sequence[Mark], levels: Sequence[Level]) -> Chart:
    return _loss_chart(m, "loss-whole", drawn, placed, levels, 0.0)


def _later(m: Material, drawn: list[Curve], placed: Sequence[Mark], levels: Sequence[Level]) -> Chart:
    return _loss_chart(m, "loss-later", drawn, placed, levels, EARLY * m.tokens)


def _log(m: Material, drawn: list[Curve], placed: Sequence[Mark], levels: Sequence[Level]) -> Chart:
    return _loss_chart(m, "loss-log", drawn, placed, levels, 0.0, x_log=True)


def _loss_chart(
    m: Material,
    name: str,
    drawn: list[Curve],
    placed: Sequence[Mark],
    levels: Sequence[Level],
    first: float,
    x_log: bool = False,
) -> Chart:
    begin = max(first, min((float(c.x[c.x > 0].min()) for c in drawn if (c.x > 0).any()), default=1.0))
    x_range = (begin if x_log else first, max(float(c.x.max()) for c in drawn))
    y_range, above = loss_range(drawn, first, [level.low for level in levels] if first else [])
    notes = [f"{words.count(above, 'higher value')} above the frame"] if above else []
    bad = sum(int((~np.isfinite(c.y)).sum()) for c in drawn[:1])
    notes += [f"{words.count(bad, 'value')} of the training loss not finite: a gap"] if bad else []
    return Chart(
        name,
        "Loss",
        "nats per token",
        drawn,
        x_name="tokens trained" + (", logarithmic" if x_log else ""),
        x_log=x_log,
        x_range=x_range,
        y_range=y_range,
        marks=placed,
        levels=levels,
        notes=notes,
        tall=True,
    )


def loss_range(
    drawn: Sequence[Curve], first: float, also: Sequence[float] = ()
) -> tuple[tuple[float, float] | None, int]:
    """A frame that one spike does not flatten, and how many values it leaves out above."""
    faint = [c for c in drawn if c.faint] or list(drawn[:1])
    seen = [c.y[(c.x >= first) & np.isfinite(c.y)] for c in drawn]
    noisy = np.concatenate([c.y[(c.x >= first) & np.isfinite(c.y)] for c in faint])
    ends = curves.extent(seen)
    if ends is None:
        return None, 0
    calm = [float(np.quantile(noisy, 0.995))] if len(noisy) else []
    calm += [float(c.max()) for c, own in zip(seen, drawn, strict=True) if own not in faint and len(c)]
    calm += [float(noisy[0])] if first == 0 and len(noisy) else []
    low, high = min(ends[0], *also, ends[0]), max(calm, default=ends[1])
    pad = 0.06 * (high - low) or 0.1
    return (low - pad, high + pad), int((noisy > high + pad).sum())


def mark_list(placed: Sequence[Mark]) -> list[Block]:
    if not placed:
        return []
    table = Table("Marks", ["mark", "tokens", "what"], [_mark_row(one) for one in placed], frozenset({0, 2}))
    return [table] if len(placed) <= 6 else [Folded(f"The {len(placed)} marks", [table])]


def _mark_row(mark: Mark) -> list[str]:
    return [mark.label, words.tokens(mark.x), mark.text]


def _mixture_chart(m: Material) -> list[Block]:
    """Only of a mixture that moved."""
    names = m.named("mixture/")
    drawn = []
    for place, name in enumerate(names):
        x, y = m.column(name)
        drawn.append(Curve(name.removeprefix("mixture/"), x, y, place, last=words.share(float(y[-1]))))
    if len(names) < 2 or not any(steps_up(c.y, 0.05 + 1 / m.run.config.batch_blocks) for c in drawn):
        return []
    return [Chart("mixture", "Mixture", "share of the blocks", drawn, y_share=True, y_zero=True)]


# ------------------------------------------------------------------------------------------------------------
# Evaluations


def evaluations(m: Material, expected: Sequence[Expected]) -> Section:
    blocks = check(m, list(expected))
    names = sorted((n for n in m.named("val/") if len(m.column(n)[0])), key=lambda n: (n != "val/loss", n))
    if not names:
        return Section("evaluations", "Evaluations", [*blocks, Line("No evaluation on record yet.", "note")])
    rows = [row for row in m.rows if any(value(row, name) is not None for name in names)]
    head = ["step", "tokens", *(name.removeprefix("val/") for name in names)]
    cells = [_evaluation(m, row, names) for row in rows]
    blocks.append(Table("Validation", head, _shortened(cells), frozenset()))
    if len(rows) > ROWS_SHOWN:
        every = Table("Every evaluation", head, cells, frozenset())
        blocks.append(Folded(f"All {len(rows)} evaluations", [every]))
    return Section("evaluations", "Evaluations", blocks)


def _shortened(rows: list[list[str]]) -> list[list[str]]:
    """The first and the last; in their middle a row that says how many are left out."""
    if len(rows) <= ROWS_SHOWN:
        return rows
    half = ROWS_SHOWN // 2
    out = [""] * len(rows[0])
    out[:2] = "…", f"{len(rows) - 2 * half:,} more"
    return [*rows[:half], out, *rows[-half:]]


def _evaluation(m: Material, row: dict[str, object], names: Sequence[str]) -> list[str]:
    values = (value(row, name) for name in names)
    found = ["" if v is None else words.loss(v) for v in values]
    return [f"{row['step']:,}", words.tokens(m.x_of(row)), *found]


def _spaced(count: int, most: int) -> list[int]:
    """Places from the first to the last, evenly; all where there are few."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


# ------------------------------------------------------------------------------------------------------------
# Samples


def samples(m: Material) -> Section:
    said: dict[str, dict[int, str]] = {}
    for row in m.samples:
        prompt, text = row.get("prompt"), row.get("text")
        if isinstance(prompt, str) and isinstance(text, str):
            said.setdefault(prompt, {})[row["step"]] = text  # a step done again: what it said last
    if not said:
        return Section("samples", "What it said", [Line("No samples on record.", "note")])
    blocks: list[Block] = [Line(_sampling(m))]
    return Section("samples", "What it said", [*blocks, *(_timeline(m, p, t) for p, t in said.items())])


def _sampling(m: Material) -> str:
    settings = m.run.config.evaluation
    return (
        f"The same prompts at each evaluation; up to {settings.sample_tokens} tokens drawn at temperature "
        f"{settings.temperature:g}. One draw each: an anecdote, no measurement."
    )


def _timeline(m: Material, prompt: str, texts: dict[int, str]) -> Said:
    steps = sorted(texts)
    told = [(f"step {step:,}, {words.tokens(m.tokens_at(step))} tokens", texts[step]) for step in steps]
    shown = set(_spaced(len(steps), TEXTS_SHOWN))
    few = [one for at, one in enumerate(told) if at in shown]
    return Said(prompt, few, [one for at, one in enumerate(told) if at not in shown])
