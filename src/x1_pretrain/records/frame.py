"""A run on one screen: what `x1 watch` shows, as lines of text for a width."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from x1_pretrain.money.guard import dollars
from x1_pretrain.numbers import compact, human
from x1_pretrain.records.behind import behind, newest
from x1_pretrain.records.console import duration
from x1_pretrain.records.following import Curve, Seen, State
from x1_pretrain.records.goodput import PARTS, Goodput
from x1_pretrain.records.naming import titled
from x1_pretrain.records.run_folder import Row, is_number

NARROWEST, WIDEST = 60, 200
LABEL = 12  # columns for the name of a line
COLORS = {"waiting": "yellow", "running": "green", "finished": "bold green", "stopped": "bold red",
          "ended": "bold yellow", "died": "bold red", "silent": "bold yellow",
          "copy": "bold cyan"}  # fmt: skip
SPARKS, ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
BAR, ASCII_BAR = ("█", "░"), ("#", ".")
PART_COLORS = ("green", "cyan", "yellow", "blue", "magenta", "bright_blue", "white", "red", "bright_red",
               "bright_yellow", "bright_magenta")  # fmt: skip
PART_MARKS = "#wsevco2-<>"
EVENTS = 5
LOUD = {"spike", "not_finite", "skip", "rewind", "fault", "hang", "leak", "slow", "host", "signal",
        "over_budget", "checkpoint_failed", "suspended", "lease_lost", "moved"}  # fmt: skip


def frame(
    seen: Seen, state: State, now_s: float, width: int, plain: bool = False, height: int | None = None
) -> list[Text]:
    """The whole screen. `plain`: for a terminal that has ASCII only. `height`: rows it has, which events
    fill."""
    width = max(NARROWEST, min(WIDEST, width))
    above = [
        *_head(seen, state, now_s, width, plain),
        Text(""),
        *_losses(seen, width, plain),
        *_pairs("speed", _speed(seen), width),
        *_pairs("gradient", _gradient(seen), width),
        *_pairs("machine", _machine(seen), width),
        *_goodput(seen.goodput, width, plain),
        *_pairs("spikes", _spikes(seen), width),
        *_pairs("checkpoint", _checkpoint(seen), width),
        *_mirror(seen, state.kind == "running", now_s, width),
    ]
    below = [*_sample(seen, width), *_foot(seen, width)]
    free = EVENTS if height is None else max(EVENTS, height - len(above) - len(below) - 1)
    return [_cut(line, width) for line in (*above, *_events(seen, width, free), *below)]


def status_line(seen: Seen, state: State, now_s: float) -> str:
    """The same in one line, for a log."""
    loss = seen.steps.last.get("loss") if seen.steps.last else seen.metrics.latest.get("train/loss")
    parts = [state.kind + (f" ({state.why})" if state.why else ""), _place(seen)]
    parts += [f"loss {loss:.4f}"] if is_number(loss) and loss is not None else []
    parts += _speed(seen)[:2]
    if seen.goodput is not None and seen.goodput.share is not None:
        parts.append(f"goodput {seen.goodput.share:.0%}")
    if state.kind == "running" and (left := seen.eta_s(now_s)) is not None:
        parts.append(f"ETA {duration(left)}")
    if seen.mirror is not None:
        parts.append(f"mirror: {behind(seen.mirror, state.kind == 'running', now_s)}")
    return clean("  ".join([*parts, *_spent(seen)]))


def event_line(event: Row) -> str:
    """One event, with its time: 10:15:02 spike ..."""
    clock = str(event.get("time_utc", ""))[11:19]
    name, said = str(event.get("event", "")), str(event.get("message", "")).strip()
    return clean(f"{clock} {said}" if name.split("_")[0] in said else f"{clock} {name}: {said}")


def clean(text: object) -> str:
    """One line that no terminal takes for a command."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


# -----------------------------------------------------------------------------------------------------------
# The head


def _head(seen: Seen, state: State, now_s: float, width: int, plain: bool) -> list[Text]:
    name = Text().append(clean(titled(seen.run)), "bold")
    said = Text().append(state.kind, COLORS[state.kind])
    quiet = seen.quiet_s(now_s)
    if state.kind == "running" and quiet >= 60:
        said.append(f", last record {duration(quiet)} ago", "yellow")
    if seen.session is not None:
        said.append(f"  session {clean(seen.session)}")
    first = Text("  ").join([name, said])
    left = seen.eta_s(now_s) if state.kind == "running" else None
    facts = [_place(seen), *([f"ETA {duration(left)}"] if left is not None else []), *_spent(seen)]
    if len(first) + 2 + len("  ".join(facts)) <= width:
        lines = [first.append("  " + "  ".join(facts))]
    else:
        lines = [first, Text("  ".join(facts))]
    lines += _wrapped("", state.why, width, COLORS[state.kind])
    return [*lines, _bar(seen, width, plain)]


def _place(seen: Seen) -> str:
    total = seen.run.total_steps
    return f"step {seen.step:,} of {total:,} ({seen.step / total:.1%})"


def _spent(seen: Seen) -> list[str]:
    if seen.spent_usd is None:
        return [f"ceiling {dollars(seen.ceiling_usd)}"] if seen.ceiling_usd is not None else []
    of = f" of {dollars(seen.ceiling_usd)}" if seen.ceiling_usd is not None else ""
    return [f"{dollars(seen.spent_usd)}{of} spent"]


def _bar(seen: Seen, width: int, plain: bool) -> Text:
    full, empty = ASCII_BAR if plain else BAR
    done = min(width, width * seen.step // seen.run.total_steps)
    return Text().append(full * done, "green").append(empty * (width - done), "dim")


# -----------------------------------------------------------------------------------------------------------
# Losses


def _losses(seen: Seen, width: int, plain: bool) -> list[Text]:
    last, curve = seen.steps.last, seen.steps.loss
    value = last.get("loss") if last else seen.metrics.latest.get("train/loss")
    curve = curve if last else seen.metrics.loss
    room = width - LABEL - 9
    lines = []
    if is_number(value) and value is not None:
        rows = sparkline(curve.means, room, 2, plain)
        lines.append(_labelled("loss", f"{value:<8.4f} ").append(rows[0] if rows else "", "cyan"))
        lines += [Text(" " * (LABEL + 9)).append(row, "cyan") for row in rows[1:]]
        lines += _pairs("", _scale(curve, room), width)
    return [*lines, *_validation(seen, width)]


def _scale(curve: Curve, room: int) -> list[str]:
    """What the bars stand for: from where to where, the extremes that a mean hides, over which steps."""
    if not curve.means:
        return []
    low, high = _range(resampled(curve.means, room))
    facts = [f"bars {low:.4f} to {high:.4f}", f"lowest {curve.lowest:.4f}", f"highest {curve.highest:.4f}"]
    if curve.first_step is not None and curve.last_step is not None:
        facts.append(f"steps {curve.first_step:,} to {curve.last_step:,}")
    return facts


def _range(shown: Sequence[float]) -> tuple[float, float]:
    """The first fall of a loss leaves the picture at the top, so that the rest has the scale."""
    return min(shown), max(shown[len(shown) // 5 :])


def sparkline(values: Sequence[float], width: int, height: int, plain: bool = False) -> list[str]:
    """Bars of `height` rows, the top row first."""
    shown = resampled(values, width)
    if not shown:
        return []
    low, high = _range(shown)
    marks = ASCII_SPARKS if plain else SPARKS
    levels = height * len(marks)
    scale = (levels - 1) / (high - low) if high > low else 0.0
    tops = [1 + round(min(levels - 1, (v - low) * scale)) for v in shown]
    return ["".join(_mark(top - row * len(marks), marks) for top in tops) for row in reversed(range(height))]


def _mark(level: int, marks: str) -> str:
    return " " if level <= 0 else marks[min(level, len(marks)) - 1]


def resampled(values: Sequence[float], width: int) -> list[float]:
    """`width` means, each of its share of the values; where there are fewer, each stands wider."""
    if len(values) <= width:
        return [values[i * len(values) // width] for i in range(width)] if values else []
    edges = [i * len(values) // width for i in range(width + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _validation(seen: Seen, width: int) -> list[Text]:
    row = seen.metrics.evaluated
    if row is None:
        return []
    facts = [f"all {row['val/loss']:.4f}{_change(row, seen.metrics.before, 'val/loss')}"]
    domains = [name.split("/")[1] for name in row if name.startswith("val/") and name.count("/") == 2]
    for domain in dict.fromkeys(domains):
        loss, bpb = row.get(f"val/{domain}/loss"), row.get(f"val/{domain}/bpb")
        if is_number(loss) and loss is not None:
            bits = f" ({bpb:.3f} bits/byte)" if is_number(bpb) and bpb is not None else ""
            facts.append(f"{domain} {loss:.4f}{bits}")
    return _pairs("validation", [*facts, f"at step {row['step']:,}"], width)


def _change(row: Row, before: Row | None, name: str) -> str:
    if before is None or not is_number(before.get(name)) or not is_number(row.get(name)):
        return ""
    return f" ({row[name] - before[name]:+.4f} since step {before['step']:,})"


# -----------------------------------------------------------------------------------------------------------
# Figures


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _speed(seen: Seen) -> list[str]:
    row, facts = seen.metrics.latest, []
    if (rate := _number(row, "tokens_per_sec")) is not None:
        facts.append(f"{compact(rate)} tokens/s")
    if (used := _number(row, "mfu")) is not None:
        facts.append(f"MFU {used:.1%}")
    if (wait := _number(row, "data/wait_share")) is not None:
        facts.append(f"data wait {wait:.1%}")
    if tokens := _number(row, "tokens"):  # none before the first step
        exact = 1_000 <= tokens < 999_999.5
        facts.append(f"{tokens:,.0f} tokens" if exact else f"{human(tokens)} tokens")
    if (price := _number(row, "budget/usd_per_billion_tokens")) is not None:
        facts.append(f"${price:,.2f} per billion")
    return facts


def _gradient(seen: Seen) -> list[str]:
    row = seen.metrics.latest | (seen.steps.last or {})
    facts = []
    if is_number(row.get("grad_norm")):
        facts.append(f"norm {row['grad_norm']:.3g}")
    if (clip := _number(row, "clip")) is not None:
        facts.append(f"cut at {clip:.3g}")
    if (share := _number(row, "clipped_share")) is not None:
        facts.append(f"clipped {share:.0%}")
    if (scale := _number(row, "noise_scale")) is not None:
        facts.append(f"noise scale {human(scale)} tokens")
    if (rate := _number(row, "lr")) is not None:
        facts.append(f"lr {rate:.2e}")
    return facts


def _machine(seen: Seen) -> list[str]:
    row, facts = seen.metrics.latest, []
    used = _number(row, "memory/peak_gib") or _number(row, "memory/reserved_gib")
    used = used if used is not None else _number(row, "memory/rss_gib")
    if used is not None:
        total = _number(row, "memory/total_gib")
        facts.append(f"memory {used:.1f}{f' of {total:.1f}' if total else ''} GiB")
    for name, form in (("gpu/temperature_c", "{:.0f} C"), ("gpu/power_w", "{:.0f} W"),
                       ("gpu/util_share", "GPU {:.0%}"), ("host/cpu_share", "CPU {:.0%}"),
                       ("disk/free_gib", "disk {:,.0f} GiB free")):  # fmt: skip
        if (value := _number(row, name)) is not None:
            facts.append(form.format(value))
    return facts


def _goodput(found: Goodput | None, width: int, plain: bool) -> list[Text]:
    """A bar of the paid time, and what its parts are, the largest first."""
    if found is None or found.share is None:
        return []
    room, used, sum_s, bar = width - LABEL - 7, 0, 0.0, Text()
    for part in found.parts:
        sum_s += part.seconds
        end, place = round(room * sum_s / found.paid_s), PARTS.index(part.name)
        mark = PART_MARKS[place] if plain else ("█" if part.useful else "▓")
        bar.append(mark * (end - used), PART_COLORS[place])
        used = end
    largest = sorted(found.parts, key=lambda part: -part.seconds)
    facts = [f"{p.name} {p.seconds / found.paid_s:.1%}" for p in largest if p.seconds >= 0.001 * found.paid_s]
    colors = [PART_COLORS[PARTS.index(part.name)] for part in largest]
    return [
        _labelled("goodput", f"{found.share:>6.1%} ").append_text(bar),
        *_pairs("", facts, width, colors),
    ]


# -----------------------------------------------------------------------------------------------------------
# What happened, what it says


def _spikes(seen: Seen) -> list[str]:
    """Of however long ago: a spike must not scroll out of sight."""
    if not seen.opened:
        return []
    known = seen.spikes.known
    if not known:
        return ["0"]
    last = known[-1]
    back = "not back yet"
    if last.rewound_to is not None:
        back = f"rewound to {last.rewound_to:,}"
    elif last.recovered is not None:
        back = f"back at {last.recovered:,}"
    elif last.closed:
        back = "never back"
    return [f"{len(known):,}, last at {last.onset:,}, {back}"]


def _checkpoint(seen: Seen) -> list[str]:
    """The newest, from which a relaunch would go on."""
    event = seen.checkpoint
    if event is None or not is_number(event.get("step")):
        return []
    took = f" ({seconds:.1f} s)" if (seconds := _number(event, "seconds")) is not None else ""
    clock = str(event.get("time_utc", ""))[11:19]
    return [f"last at {event['step']:,}{took}", *([f"{clock} UTC"] if clock else [])]


def _mirror(seen: Seen, running: bool, now_s: float, width: int) -> list[Text]:
    """How far the copies off this machine have come, and why they come no further."""
    found = seen.mirror
    if found is None:
        return []
    facts = [behind(found, running, now_s), newest(found), found.label, f"epoch {found.epoch}"]
    said = _pairs("mirror", facts, width)
    if found.trouble:
        said += _wrapped(" " * LABEL, found.trouble, width, "yellow")
    if found.state == "lost":
        said += _wrapped(" " * LABEL, f"lost: {found.why}", width, "bold red")
    return said


def _events(seen: Seen, width: int, most: int) -> list[Text]:
    told = [event for event in seen.events if event.get("event") not in ("machine", "batch")][-most:]
    if not told:
        return []
    lines = [_cut(Text(event_line(e), "yellow" if e.get("event") in LOUD else ""), width) for e in told]
    return [Text(""), *lines]


def _sample(seen: Seen, width: int) -> list[Text]:
    if seen.sample is None:
        return []
    prompt, text = clean(seen.sample.get("prompt", "")), clean(seen.sample.get("text", ""))
    at = seen.sample.get("step")
    said = Text().append(f"at step {at:,}: " if is_number(at) and at is not None else "", "dim")
    said.append(prompt, "bold").append(f" {text}", "italic")
    return [Text(""), said[:width], _cut(said[width:], width)]


def _foot(seen: Seen, width: int) -> list[Text]:
    lines = []
    for machine in seen.machines:
        name = machine.machine_id or machine.tag
        said = f"{name} ({machine.provider}) bills: `x1 guard {seen.run.folder}` is what ends it"
        lines.append(Text(said, "yellow"))
    if seen.trouble:
        lines += _wrapped("", seen.trouble, width, "red")
    return [Text(""), *lines] if lines else []


# -----------------------------------------------------------------------------------------------------------
# Lines


def _labelled(name: str, text: str) -> Text:
    return Text().append(f"{name:<{LABEL}}", "dim").append(text)


def _pairs(name: str, facts: Sequence[str], width: int, colors: Sequence[str] = ()) -> list[Text]:
    """Facts side by side, on as many lines as they need."""
    if not facts:
        return []
    line, lines = _labelled(name, ""), []
    for number, fact in enumerate(facts):
        if len(line) > LABEL and len(line) + 2 + len(fact) > width:
            lines.append(line)
            line = _labelled("", "")
        line.append("  " if len(line) > LABEL else "")
        line.append(clean(fact), colors[number] if colors else "")
    return [*lines, line]


def _wrapped(indent: str, text: str, width: int, color: str) -> list[Text]:
    """What is wrong, to its last word: the cause stands at the end of a line, behind a path."""
    lines = textwrap.wrap(clean(text), width - len(indent), break_on_hyphens=False)
    return [Text(indent).append(line, color) for line in lines]


def _cut(line: Text, width: int) -> Text:
    """Never two lines for one: the end of a long one is left out."""
    short = line.copy()
    short.truncate(width, overflow="ellipsis")
    return short
