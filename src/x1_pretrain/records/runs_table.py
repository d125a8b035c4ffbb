"""Runs as a table for a terminal: one row a run, the least needed columns left out where it is narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

from x1_pretrain.money.guard import dollars
from x1_pretrain.numbers import compact, size
from x1_pretrain.records.runs import Listed

GAP = "  "
SHORTEST_NAME = 12
# heading, how the value is set, and how early it is left out (1 first); 0 stays
COLUMNS = (
    ("RUN", "<", 0),
    ("STATUS", "<", 0),
    ("STEP", ">", 0),
    ("VAL LOSS", ">", 7),
    ("SPENT", ">", 6),
    ("GOOD CHECKPOINT", "<", 5),
    ("NOT MIRRORED", "<", 8),
    ("WHERE", "<", 4),
    ("SIZE", ">", 3),
    ("TOKENS", ">", 2),
    ("STAGE", "<", 1),
)


def lines(runs: Sequence[Listed], width: int | None) -> list[str]:
    """The table; with a last line that says what was left out. `width` None: everything."""
    rows = [cells(one, runs) for one in runs]
    keep, left_out = list(range(len(COLUMNS))), []
    while width is not None and _width(rows, keep) > width:
        spare = [place for place in keep if COLUMNS[place][2] > 0]
        if not spare:
            break
        first = min(spare, key=lambda place: COLUMNS[place][2])
        keep.remove(first)
        left_out.append(COLUMNS[first][0].lower())
    if width is not None and (excess := _width(rows, keep) - width) > 0:
        _shorten(rows, excess)
    table = [_line([COLUMNS[place][0] for place in keep], rows, keep)]
    table += [_line([row[place] for place in keep], rows, keep) for row in rows]
    if left_out:
        note = f"too narrow for: {', '.join(reversed(left_out))} (--json has all)"
        table.append(note if width is None else cut(note, max(width, SHORTEST_NAME)))
    return table


def _widths(rows: Sequence[Sequence[str]], keep: Sequence[int]) -> list[int]:
    return [max(len(COLUMNS[place][0]), *(len(row[place]) for row in rows), 0) for place in keep]


def _width(rows: Sequence[Sequence[str]], keep: Sequence[int]) -> int:
    return sum(_widths(rows, keep)) + len(GAP) * (len(keep) - 1)


def _line(values: Sequence[str], rows: Sequence[Sequence[str]], keep: Sequence[int]) -> str:
    widths = _widths(rows, keep)
    set_ = [f"{v:{COLUMNS[p][1]}{w}}" for v, p, w in zip(values, keep, widths, strict=True)]
    return GAP.join(set_).rstrip()


def _shorten(rows: list[list[str]], excess: int) -> None:
    """The status first, then the name, then the steps: a part of each is better than a broken table."""
    for place, shortest in ((1, len("running on …")), (0, SHORTEST_NAME), (2, len("10,000,000/…"))):
        widest = max(len(row[place]) for row in rows)
        target = max(shortest, widest - max(0, excess))
        for row in rows:
            row[place] = cut(row[place], target)
        excess -= widest - max(len(row[place]) for row in rows)


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def cells(one: Listed, runs: Sequence[Listed]) -> list[str]:
    """What the table says of one run, in the order of the columns; `-` for what is not known."""
    return [
        one.name,
        one.status,
        steps(one),
        loss(one.val_loss),
        cost(one.spent_usd) or "-",
        good(one),
        behind(one),
        one.where,
        "/".join(size(known) for known in (one.bytes_here, one.bytes_mirror) if known is not None) or "-",
        compact(one.tokens) if one.tokens else "-",
        stage(one, runs),
    ]


def steps(one: Listed) -> str:
    if not one.total_steps:
        return f"{one.step:,}" if one.step else "-"
    return f"{one.step:,}/{one.total_steps:,} {math.floor(100 * one.step / one.total_steps)}%"


def loss(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4f}"


def cost(spent_usd: str | None) -> str | None:
    try:
        return dollars(Decimal(spent_usd)) if spent_usd is not None else None
    except ArithmeticError:
        return None


def hours(seconds: float | None) -> str | None:
    """21 h, 35 min, 40 s"""
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.0f} h"


def made(one: Listed) -> str:
    """What it took to make: $24.80 and 21 h; nothing where that is not known."""
    return " and ".join(text for text in (cost(one.spent_usd), hours(one.elapsed_s)) if text)


def good(one: Listed) -> str:
    """The step of the newest good checkpoint, and where it is."""
    here, there = one.good_here, one.good_mirror
    if here is None and there is None:
        return "none"
    if here == there:
        return f"{here:,} both"
    said = [f"{here:,} here" if here is not None else "", f"{there:,} mirror" if there is not None else ""]
    return ", ".join(part for part in said if part)


def behind(one: Listed) -> str:
    """What would be lost with this machine."""
    if one.behind is None:
        return "-" if one.where == "mirror" or one.trash_until_utc else "no mirror"
    told = one.behind
    parts = [size(told["lag_bytes"])] if told["lag_bytes"] else []
    parts += [f"{told['lag_s']:.0f} s"] if told["lag_bytes"] and told["lag_s"] else []
    parts += [f"{len(told['steps'])} checkpoint{'s' * (len(told['steps']) > 1)}"] if told["steps"] else []
    parts += ["in trouble"] if told["trouble"] else []
    return ", ".join(parts) or ("nothing" if told["lag_bytes"] is not None else "rows not known")


def stage(one: Listed, runs: Sequence[Listed]) -> str:
    """A branch says what it began from: by name where that run is known."""
    if one.parent is None:
        return one.stage or "-"
    parent = one.parent.get("run_id")
    known = next((other.name for other in runs if other.run_id == parent), parent)
    return f"{one.stage or 'branch'} from {known}@{one.parent.get('step')}"
