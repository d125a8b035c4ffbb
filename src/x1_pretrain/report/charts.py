"""Charts as inline SVG. The lines stretch with the page; words and numbers are HTML and keep their size.

A chart says everything without a script; with it, pointing or the arrow keys read out values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from x1_pretrain.numbers import for_json
from x1_pretrain.report import words
from x1_pretrain.report.blocks import F64, Chart, Curve, Level, Mark, Stack, Strip
from x1_pretrain.report.curves import Axis, extent, lanes, thinned, tick_text
from x1_pretrain.report.markup import esc, place, tag

WIDTH, HEIGHT = 1800, 600  # of the drawing's own grid
STYLES = 6
CROWD = 16  # marks
DOTTED = 40  # points, up to which each of a curve's has a dot: the line between two is no measurement
READ_OUT = 400  # places at which values can be read
SHADES = 7


def chart(c: Chart) -> str:
    """A figure: caption, legend, frame, and the values for the read-out."""
    x_axis, y_axis = axes(c)
    body = "".join(
        [
            _caption(c),
            _legend(c),
            f'<div class="frame{" tall" if c.tall else ""}">',
            _y_labels(c, y_axis),
            _lanes(c, x_axis),
            f'<div class="plot" data-chart="{esc(c.id)}">{_drawing(c, x_axis, y_axis)}</div>',
            _x_labels(c, x_axis),
            "</div>",
            _notes(c.notes),
            _values(c, x_axis),
        ]
    )
    return tag("figure", body, cls="chart", id=c.id)


def axes(c: Chart) -> tuple[Axis, Axis]:
    x_range = c.x_range or extent([curve.x for curve in c.curves]) or (0.0, 1.0)
    x_axis = Axis(*x_range, log=c.x_log)
    if c.y_range is not None:
        return x_axis, Axis(*c.y_range)
    shown = [curve.y for curve in c.curves] + [np.array([one.low, one.high]) for one in c.levels]
    low, high = extent(shown, positive=c.y_log) or (0.0, 1.0)
    if c.y_log and low > 0:
        return x_axis, Axis(low / 1.15, high * 1.15, log=True)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return x_axis, Axis(0.0 if c.y_zero and low >= 0 else low - pad, high + pad)


# ------------------------------------------------------------------------------------------------------------
# Words around the frame


def _caption(c: Chart) -> str:
    return f"<figcaption><b>{esc(c.title)}</b> <span>{esc(c.y_name)} over {esc(c.x_name)}</span></figcaption>"


def _legend(c: Chart) -> str:
    """The curves with their last values, then what the levels are: words in the frame would cover curves."""
    items = [
        _key(f'<path class="{_class(one)}" d="M0 4H36"/>') + _said(one) for one in c.curves if not one.faint
    ]
    items += [_key(_level_key(one)) + esc(one.text) for one in c.levels]
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _said(curve: Curve) -> str:
    line = f" (line: {esc(curve.line)})" if curve.line else ""
    return esc(curve.name) + (f": last value <b>{esc(curve.last)}</b>" if curve.last else "") + line


def _key(drawn: str) -> str:
    return f'<svg class="key" viewBox="0 0 36 8" aria-hidden="true">{drawn}</svg>'


def _level_key(one: Level) -> str:
    if one.low < one.high:
        return '<path class="band" d="M0 0H36V8H0z"/><path class="limit" d="M0 1H36M0 7H36"/>'
    return '<path class="limit" d="M0 4H36"/>'


def _class(curve: Curve) -> str:
    again = f" d{curve.style // STYLES}" if curve.style >= STYLES else ""  # more curves than colours
    return f"c c{curve.style % STYLES}{again}{' faint' if curve.faint else ''}"


def _y_labels(c: Chart, axis: Axis) -> str:
    marks = [tick for tick in axis.ticks(6) if 0 <= _at(axis, tick) <= 1]
    step = 0.0 if axis.log else _step(marks)
    labels = (
        f'<span style="bottom:{place(_at(axis, tick))}">{esc(tick_text(tick, step, c.y_share))}</span>'
        for tick in marks
    )
    return f'<div class="y" aria-hidden="true">{"".join(labels)}</div>'


def _x_labels(c: Chart, axis: Axis) -> str:
    """Every second one gives way on a narrow screen; those at the ends lean inwards."""
    marks = [tick for tick in axis.ticks(6) if 0 <= _at(axis, tick) <= 1]
    labels = []
    for number, tick in enumerate(marks):
        at = _at(axis, tick)
        lean = " first" if at < 0.04 else " last" if at > 0.96 else ""
        odd = " odd" if (number % 2) != (len(marks) - 1) % 2 else ""
        labels.append(
            f'<span class="tick{lean}{odd}" style="left:{place(at)}">{esc(words.axis(tick))}</span>'
        )
    return f'<div class="x" aria-hidden="true">{"".join(labels)}</div>'


def _at(axis: Axis, value: float) -> float:
    return float(axis.place(np.array([value]))[0])


def _step(marks: Sequence[float]) -> float:
    return min((after - before for before, after in pairwise(marks)), default=0.0)


def _lanes(c: Chart, axis: Axis) -> str:
    """The labels of the marks, in rows that no two share a place of."""
    places = [_at(axis, mark.x) for mark in c.marks]
    rows = lanes(c.marks, places)
    used = max((row for row in rows if row is not None), default=-1) + 1
    if not used:
        return ""
    labels = (
        f'<span class="mark {mark.kind}" style="left:{place(at)};top:{row * 1.25:.2f}em" '
        f'title="{esc(mark.text)}">{esc(mark.label)}</span>'
        for mark, at, row in zip(c.marks, places, rows, strict=True)
        if row is not None
    )
    height = f"{used * 1.25 + 0.2:.2f}em"
    return f'<div class="lanes" style="height:{height}" aria-hidden="true">{"".join(labels)}</div>'


def _notes(notes: Sequence[str]) -> str:
    return f'<p class="aside">{esc("; ".join(notes))}.</p>' if notes else ""


# ------------------------------------------------------------------------------------------------------------
# Lines


def _drawing(c: Chart, x_axis: Axis, y_axis: Axis) -> str:
    parts = [*_grid(y_axis), *(_level(one, y_axis) for one in c.levels)]
    parts += [_mark(mark, x_axis, len(c.marks) > CROWD) for mark in c.marks]
    ordered = sorted(c.curves, key=lambda curve: not curve.faint)
    parts += [_line(one, x_axis, y_axis) for one in ordered]
    name = f"{c.id}-desc"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{c.id}-title {name}"><title id="{c.id}-title">{esc(c.title)}</title>'
        f'<desc id="{name}">{esc(described(c))}</desc>'
        f"{''.join(parts)}</svg>"
    )


def described(c: Chart) -> str:
    """The chart in words, for who can't see it."""
    said = [f"{c.y_name} over {c.x_name}."]
    for curve in c.curves:
        ends = extent([curve.y])
        if curve.faint or ends is None:
            continue
        finish = f", at the end {curve.last}" if curve.last else ""
        said.append(f"{curve.title}: from {ends[0]:.4g} to {ends[1]:.4g}{finish}.")
    return " ".join([*said, *(f"{one.text}." for one in c.levels), *(f"{one.text}." for one in c.marks[:20])])


def _grid(axis: Axis) -> list[str]:
    rows = [_y(axis, tick) for tick in axis.ticks(6) if 0 <= _at(axis, tick) <= 1]
    return [f'<path class="grid" d="{"".join(f"M0 {row}H{WIDTH}" for row in rows)}"/>']


def _y(axis: Axis, value: float) -> int:
    return round((1 - _at(axis, value)) * HEIGHT)


def _level(one: Level, axis: Axis) -> str:
    top, bottom = _y(axis, one.high), _y(axis, one.low)
    lines = f'<path class="limit" d="M0 {top}H{WIDTH}{f"M0 {bottom}H{WIDTH}" if bottom != top else ""}"/>'
    band = f'<path class="band" d="M0 {top}H{WIDTH}V{bottom}H0z"/>' if bottom != top else ""
    return band + lines


def _mark(mark: Mark, axis: Axis, crowded: bool) -> str:
    """A spike is seen in the curve itself, and a crowd of lines would hide it: those only begin above."""
    at = _at(axis, mark.x)
    depth = HEIGHT // 8 if crowded or mark.kind in ("spike", "inject") else HEIGHT
    return f'<path class="at {mark.kind}" d="M{round(at * WIDTH)} 0V{depth}"/>' if 0 <= at <= 1 else ""


def _line(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    d = path(curve, x_axis, y_axis)
    drawn = f'<path class="{_class(curve)}" d="{d}"/>'
    if len(curve.x) > DOTTED or curve.faint:
        return drawn
    dots = re.sub(r"[ML](\S+ -?\d+)(?:h\.1)?", r"M\1h.1", d)
    return f'{drawn}<path class="{_class(curve)} dots" d="{dots}"/>'


def path(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    """The line, broken where there is no finite value; what lies far outside the frame is cut to its rim."""
    across = x_axis.place(curve.x)
    near = np.isfinite(across) & (across >= -0.02) & (across <= 1.02)
    x, y = thinned(curve.x[near], curve.y[near], np.clip(across[near], 0, 1))
    right = np.round(np.clip(x_axis.place(x), -0.02, 1.02) * WIDTH)
    down = np.round((1 - np.clip(y_axis.place(y), -0.5, 1.5)) * HEIGHT)
    return lines(right, np.where(np.isfinite(y), down, np.nan))


def lines(right: F64, down: F64) -> str:
    """SVG's words for it; a point alone is a short dash."""
    words_, pen = [], False
    good = np.isfinite(down)
    for number, (x, y) in enumerate(zip(right, down, strict=True)):
        if not good[number]:
            pen = False
            continue
        alone = not pen and (number + 1 == len(down) or not good[number + 1])
        words_.append(f"{'L' if pen else 'M'}{x:.0f} {y:.0f}" + ("h.1" if alone else ""))
        pen = True
    return "".join(words_)


# ------------------------------------------------------------------------------------------------------------
# Values for the read-out


def _values(c: Chart, axis: Axis) -> str:
    """What the script reads: where each place lies, its tokens, the curves' values there."""
    shown = [curve for curve in c.curves if not curve.faint and len(curve.x)]
    if not shown:
        return ""
    points = _points(shown, axis)
    tree = {
        "x": [round(float(at), 4) for at in axis.place(points)],
        "at": [words.axis_exact(float(point)) for point in points],
        "curves": [
            {"name": one.title, "style": one.style % STYLES, "y": _read(one, points, axis)} for one in shown
        ],
        "share": c.y_share,
    }
    text = json.dumps(for_json(tree), separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" class="values">{text}</script>'


def _points(shown: Sequence[Curve], axis: Axis) -> F64:
    """The places of the curve with the most, thinned."""
    found = max((np.unique(curve.x) for curve in shown), key=len)
    across = axis.place(found)
    found = found[np.isfinite(across) & (across >= 0) & (across <= 1)]
    if len(found) <= READ_OUT:
        return found
    return found[np.unique(np.linspace(0, len(found) - 1, READ_OUT).round().astype(np.int64))]


def _read(curve: Curve, points: F64, axis: Axis) -> list[float | None]:
    """The curve's own value nearest to each place; none further off than a hundredth of the frame, where it
    has more than a few."""
    order = np.argsort(curve.x, kind="stable")
    x, y = curve.x[order], curve.y[order]
    right = np.clip(np.searchsorted(x, points), 0, len(x) - 1)
    left = np.maximum(right - 1, 0)
    near = np.where(np.abs(x[left] - points) < np.abs(x[right] - points), left, right)
    off = np.abs(axis.place(x[near]) - axis.place(points))
    return [
        float(f"{v:.5g}") if np.isfinite(v) and d < 0.02 else None for v, d in zip(y[near], off, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------
# Bars and strips


def stack(s: Stack) -> str:
    """A bar of parts, each with its letter, and the table that explains the letters."""
    whole = sum(part.size for part in s.parts) or 1.0
    bars, rows = [], []
    for number, part in enumerate(s.parts):
        key, share = chr(ord("A") + number), part.size / whole
        shade = "useful" if part.useful else f"lost l{number % 4}"
        bars.append(
            f'<div class="{shade}" style="flex-grow:{max(share, 1e-4):.5f}" title="{esc(part.name)}">'
            f"{key if share > 0.06 else ''}</div>"
        )
        cells = "".join(f'<td class="number">{esc(cell)}</td>' for cell in part.columns)
        rows.append(
            f'<tr><th scope="row"><span class="swatch {shade}">{key}</span> {esc(part.name)}</th>{cells}</tr>'
        )
    head = "".join(
        f'<th scope="col"{" class=number" if n else ""}>{esc(one)}</th>' for n, one in enumerate(s.head)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    bar = f'<div class="stack" aria-hidden="true">{"".join(bars)}</div>'
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(s.title)}">{table}</div>'
    return tag("figure", f"<figcaption><b>{esc(s.title)}</b></figcaption>{bar}{scroll}", "chart", s.id)


def strip(s: Strip) -> str:
    """Darker is larger, on a logarithmic scale where all are above zero."""
    rows, columns = s.values.shape
    ends = extent([s.values.ravel()])
    if ends is None:
        return ""
    axis = Axis(*ends, log=ends[0] > 0)
    shade = np.floor(np.clip(axis.place(s.values), 0, 0.9999) * SHADES)
    parts = []
    for level in range(SHADES):
        cells = np.argwhere(shade == level)
        if len(cells):
            d = "".join(f"M{column} {row}h1v1h-1z" for row, column in cells)
            parts.append(
                f'<path class="cell" fill-opacity="{0.08 + 0.92 * level / (SHADES - 1):.2f}" d="{d}"/>'
            )
    said = f"{s.title}, {rows} layers: from {ends[0]:.3g} (light) to {ends[1]:.3g} (dark)"
    names = "".join(f"<span>{esc(name)}</span>" for name in _few(s.names))
    note = f"{said}; {s.note}" if s.note else said
    return (
        f'<figure class="chart" id="{s.id}"><figcaption><b>{esc(s.title)}</b></figcaption><div class="strip">'
        f'<div class="names">{names}</div>'
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img" '
        f'style="height:{max(5, 1.1 * rows):.1f}em"><title>{esc(said)}</title>{"".join(parts)}</svg></div>'
        f'<div class="ends"><span>{esc(s.x_from)}</span><span>{esc(s.x_to)}</span></div>'
        f'<p class="aside">{esc(note)}.</p></figure>'
    )


def _few(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) <= 3 else (names[0], names[-1])
