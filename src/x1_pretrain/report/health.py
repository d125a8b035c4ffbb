"""Sections of how the run felt: gradients and weights, the noise scale, layers, memory, the machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from x1_pretrain.records.behind import newest
from x1_pretrain.report import curves, state, words
from x1_pretrain.report.blocks import (
    F64,
    Block,
    Chart,
    Curve,
    Facts,
    Folded,
    Level,
    Line,
    Mark,
    Section,
    Strip,
)
from x1_pretrain.report.material import Material, clean

COLUMNS = 72  # of a strip
WIDE = 20.0  # a curve whose peak is so many times its middle is drawn on a logarithmic axis
STRIPS = (
    ("grad_norm/layer.", "Gradient norm by layer"),
    ("param_norm/layer.", "Parameter norm by layer"),
    ("activation_rms/layer.", "Activation RMS by layer"),
    ("attention/logit_max/layer.", "Largest attention logit by layer"),
)
GROUPS = (
    ("grad_norm/", "Gradient norm by group"),
    ("param_norm/", "Parameter norm by group"),
    ("update_ratio/", "Update over weight, by group"),
)
HOST = (
    ("gpu/temperature_c", "GPU temperature", "degrees C"),
    ("gpu/clock_mhz", "GPU clock", "MHz"),
    ("gpu/power_w", "GPU power", "W"),
    ("gpu/util_share", "GPU busy", "share"),
    ("host/cpu_share", "CPU busy", "share"),
    ("disk/free_gib", "Disk free", "GiB"),
    ("disk/write_mib_per_sec", "Checkpoint write speed", "MiB/s"),
)
LAG = (
    ("mirror/lag_s", "Age of the oldest thing not mirrored", "seconds"),
    ("mirror/lag_bytes", "Not mirrored", "bytes"),
)


def norms(m: Material, placed: Sequence[Mark]) -> Section:
    x, grad = m.every_step("grad_norm", "grad_norm")
    if not len(x):
        return Section("norms", "Gradients and weights", [Line("No gradient norm on record yet.", "note")])
    blocks: list[Block] = [Facts(_norm_facts(m, grad)), _gradient(m, x, grad, placed)]
    blocks += _simple(m, "param_norm", "Parameter norm", "L2")
    blocks += _noise(m)
    blocks += _moments(m)
    blocks += _simple(m, "attention/logit_max", "Largest attention logit", "logit")
    folded = [*_groups(m), *_strips(m)]
    if folded:
        blocks.append(Folded("By group and by layer", folded))
    return Section("norms", "Gradients and weights", blocks)


def _norm_facts(m: Material, grad: F64) -> list[tuple[str, str, str]]:
    good = grad[np.isfinite(grad)]
    facts = [
        (
            "gradient norm",
            words.number(float(np.median(good)) if len(good) else None),
            "median, before clipping",
        )
    ]
    if len(good):
        facts.append(("its peak", words.number(float(good.max())), "largest finite value on record"))
    cut = m.column("clipped_share")[1]
    if np.isfinite(cut).any():
        share = float(cut[np.isfinite(cut)].mean())
        facts.append(("clipped", words.share(share), "of the updates, mean of the rows"))
    if (noise := m.last("noise_scale")) is not None:
        facts.append(("critical batch", f"{words.tokens(noise)} tokens", "noise scale, last estimate"))
        facts.append(("batch", f"{words.tokens(m.run.config.training.batch_tokens)} tokens", "of a step"))
    return facts


def _gradient(m: Material, x: F64, grad: F64, placed: Sequence[Mark]) -> Chart:
    clip = m.run.config.optimizer.clip
    drawn = curves.curves("gradient norm", x, grad, 0, words.number(float(grad[-1])))
    cx, cut = m.every_step("clip", "clip")
    if len(cx) and np.isfinite(cut).any():
        drawn += [c for c in curves.curves("cut to", cx, cut, 1, words.number(float(cut[-1]))) if not c.faint]
    bad = int((~np.isfinite(grad)).sum())
    return Chart(
        "gradient",
        "Gradient norm",
        "L2, before clipping",
        drawn,
        y_log=curves.spread(grad) > WIDE,
        marks=placed,
        levels=[Level(clip, clip, f"clip {clip:g}")],
        notes=[f"{words.count(bad, 'value')} not finite: a gap"] if bad else [],
    )


def _simple(m: Material, name: str, title: str, unit: str, style: int = 0) -> list[Block]:
    """One metric as one chart; nothing where it has no rows."""
    x, y = m.column(name)
    if not len(x) or not np.isfinite(y).any():
        return []
    share = name.endswith("_share")
    last = words.share(float(y[-1])) if share else words.number(float(y[-1]))
    drawn = [c for c in curves.curves(title, x, y, style, last) if len(x) >= curves.LONG or not c.faint]
    wide = curves.spread(y) > WIDE and bool((y[np.isfinite(y)] > 0).all())
    return [Chart(_anchor(name), title, unit, drawn, y_log=wide and not share, y_share=share, y_zero=share)]


def _anchor(name: str) -> str:
    return "m-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def _noise(m: Material) -> list[Block]:
    x, y = m.column("noise_scale")
    if not len(x) or not (y[np.isfinite(y)] > 0).any():
        return []
    batch = float(m.run.config.training.batch_tokens)
    drawn = curves.curves("noise scale", x, y, 0, f"{words.tokens(float(y[-1]))} tokens")
    note = "a batch well below it buys steps for tokens at par; well above it, tokens are wasted"
    level = Level(batch, batch, f"batch {words.tokens(batch)}")
    return [Chart("noise", "Gradient noise scale", "tokens", drawn, y_log=True, levels=[level], notes=[note])]


def _moments(m: Material) -> list[Block]:
    drawn: list[Curve] = []
    for place, (name, title) in enumerate(
        (("optimizer/m_norm", "first moment"), ("optimizer/v_norm", "second moment"))
    ):
        x, y = m.column(name)
        last = words.number(float(y[-1])) if len(y) else ""
        drawn += [c for c in curves.curves(title, x, y, place, last) if len(c.x) and not c.faint]
    return [Chart("moments", "Adam's moments", "L2", drawn, y_log=True)] if drawn else []


def _groups(m: Material) -> list[Block]:
    made: list[Block] = []
    for prefix, title in GROUPS:
        drawn: list[Curve] = []
        for place, name in enumerate(n for n in m.named(prefix) if "/layer." not in n):
            x, y = m.column(name)
            last = words.number(float(y[-1])) if len(y) else ""
            drawn += [c for c in curves.curves(name.removeprefix(prefix), x, y, place, last) if not c.faint]
        drawn = [curve for curve in drawn if len(curve.x)]
        if drawn:
            made.append(
                Chart(_anchor(prefix), title, "L2" if "norm" in prefix else "ratio", drawn, y_log=True)
            )
    return made


# ------------------------------------------------------------------------------------------------------------
# Layers


def _strips(m: Material) -> list[Block]:
    return [strip for prefix, title in STRIPS if (strip := _strip(m, prefix, title)) is not None]


def _strip(m: Material, prefix: str, title: str) -> Strip | None:
    names = [name for name in m.named(prefix) if name.removeprefix(prefix).isdigit()]
    names.sort(key=lambda name: int(name.removeprefix(prefix)))
    columns = [m.column(name) for name in names]
    spans = [x for x, _ in columns if len(x)]
    if not spans:
        return None
    low, high = min(float(x.min()) for x in spans), max(float(x.max()) for x in spans)
    count = min(COLUMNS, max(len(x) for x in spans))
    values = np.array([binned(x, y, low, high, count) for x, y in columns])
    ends = (f"{words.tokens(low)} tokens", f"{words.tokens(high)} tokens")
    rows = [f"layer {name.removeprefix(prefix)}" for name in names]
    return Strip(_anchor(prefix), title, rows, values, *ends, note="the mean of the rows in a cell")


def binned(x: F64, y: F64, low: float, high: float, count: int) -> F64:
    """Means of the finite values of y in `count` equal parts of low to high; NaN where there is none."""
    place = np.zeros(len(x)) if high <= low else (x - low) / (high - low) * count
    cell, good = np.clip(place.astype(np.int64), 0, count - 1), np.isfinite(y)
    sums = np.bincount(cell[good], weights=y[good], minlength=count)
    sizes = np.bincount(cell[good], minlength=count)
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)


# ------------------------------------------------------------------------------------------------------------
# The machine


def machine(m: Material) -> Section:
    memory = _memory(m)
    host = [block for name, title, unit in HOST for block in _simple(m, name, title, unit)]
    hardware = m.manifest.get("hardware")
    blocks: list[Block] = [Facts(_hardware(hardware))] if isinstance(hardware, dict) else []
    blocks += memory or [Line("Memory: not measured.", "note")]
    blocks += (
        [Folded("Health of the machine", host)] if host else [Line("Machine health: not measured.", "note")]
    )
    return Section("machine", "Machine", [*blocks, *_mirror(m)])


def _mirror(m: Material) -> list[Block]:
    """The copies off this machine: what they lacked at the last word, and over the run."""
    found = m.mirror
    if found is None:
        return []
    state = f"epoch {found.epoch}, {found.state}" + (f": {clean(found.why)}" if found.why else "")
    left = f"{found.lag_bytes:,} bytes" if found.lag_bytes else "nothing"
    facts = [
        ("mirror", clean(found.label), state),
        ("mirrored", newest(found), "the newest it has"),
        (
            "not mirrored",
            left,
            f"for {words.duration(found.lag_s)}" if found.lag_bytes else "at its last word",
        ),
    ]
    trouble = [Line(f"It can't send: {clean(found.trouble)}", "bad")] if found.trouble else []
    charts = [chart for name, title, unit in LAG for chart in _simple(m, name, title, unit)]
    return [Facts(facts), *trouble, *([Folded("How far behind the mirror was", charts)] if charts else [])]


def _hardware(hardware: dict[str, object]) -> list[tuple[str, str, str]]:
    device = str(hardware.get("device", "not recorded"))
    facts = [
        (
            "device",
            f"{hardware.get('count', '?')} x {device}",
            f"world size {hardware.get('world_size', '?')}",
        )
    ]
    facts.append(("host", f"{hardware.get('cores', '?')} cores", str(hardware.get("cpu", ""))))
    facts.append(("RAM", f"{hardware.get('ram_gib', '?')} GiB", str(hardware.get("system", ""))))
    return facts


def _memory(m: Material) -> list[Block]:
    kinds = (
        ("peak_gib", "peak"),
        ("allocated_gib", "allocated"),
        ("reserved_gib", "reserved"),
        ("rss_gib", "resident"),
    )
    drawn: list[Curve] = []
    for place, (kind, title) in enumerate(kinds):
        x, y = m.column(f"memory/{kind}")
        last = words.gib(float(y[-1])) if len(y) else ""
        drawn += [c for c in curves.curves(title, x, y, place, last) if len(c.x) and not c.faint]
    if not drawn:
        return []
    total = m.last("memory/total_gib")
    levels = [Level(total, total, f"the device has {words.gib(total)}")] if total else []
    facts = []
    for kind in ("peak_gib", "rss_gib"):
        if (peak := state.highest(m, f"memory/{kind}")) is not None:
            facts.append(("peak memory", words.gib(peak), "of the logged rows"))
            break
    if (room := state.lowest(m, "memory/headroom_gib")) is not None:
        facts.append(("headroom", words.gib(room), "the least on record"))
    return [Facts(facts), Chart("memory", "Memory", "GiB", drawn, y_zero=True, levels=levels)]
