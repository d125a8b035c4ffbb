"""A run's money over its hours: spent, projected, the ceiling; alerts, stops, raises and resumes marked."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from x1_pretrain.money.clock import parse_stamp, stamp
from x1_pretrain.money.ledger import Row, usd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# what happened: its color and its sign at the top, so that they differ in black and white too
MARKS = {
    "launch": ("#1e8449", "^"),
    "alert": ("#d98c00", "v"),
    "stop": ("#c0392b", "X"),
    "raise": ("#7d3c98", "P"),
    "resume": ("#2471a3", ">"),
    "gone": ("#555555", "s"),
}
NAMED = {"launched": "launch", "alert_due": "alert", "stop": "stop", "raised": "raise",
         "terminate_confirmed": "gone"}  # fmt: skip


def amounts(rows: list[Row], key: str = "spent_usd") -> list[tuple[datetime, Decimal]]:
    """What was said and when: by the sidecar's polls, or by the trainer's readings where there are none."""
    polls = [row for row in rows if row["event"] == "poll"]
    said = polls or [row for row in rows if row["event"] == "reading"]
    return [(parse_stamp(row["time_utc"]), usd(row, key)) for row in said if row.get(key) is not None]


def mark(row: Row) -> str | None:
    """What a row is in the picture, if anything."""
    if row["event"] == "gate":
        resumed = row.get("verdict") == "passed" and " go on with " in row.get("message", "")
        return "resume" if resumed else None
    return NAMED.get(row["event"])


def draw(name: str, rows: list[Row], ceiling_usd: Decimal | None, file: Path) -> bool:
    """Write the picture; False where there is nothing to draw yet."""
    spent, told = amounts(rows), amounts(rows, "projected_usd")
    if not spent:
        return False
    from matplotlib.figure import Figure

    marks = [(parse_stamp(row["time_utc"]), word) for row in rows if (word := mark(row))]
    begun = min(at for at, _ in [*spent, *marks])
    end = _hours(max(at for at, _ in [*spent, *marks]), begun)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    _line(axes, spent, begun, color="#1f4e79", linewidth=2, label="spent")
    _line(axes, told, begun, color="#1f4e79", linewidth=1.2, linestyle=":", label="projected")
    ceilings = _ceilings(rows, begun, ceiling_usd, end)
    if ceilings:
        axes.step(*zip(*ceilings, strict=True), where="post", color="#c0392b", linewidth=1.4, label="ceiling")
    _marks(axes, marks, begun)
    top = max([float(usd) for _, usd in spent] + [usd for _, usd in ceilings])
    high = max(
        [top, *(min(float(usd), 1.25 * top) for _, usd in told)]
    )  # a wild projection leaves the picture
    axes.set_ylim(0, high * 1.08 or 1)
    axes.set_xlim(-0.02 * (end or 1), 1.02 * (end or 1))
    axes.set_xlabel(f"hours since {stamp(begun)}")
    axes.set_ylabel("USD")
    axes.yaxis.set_major_formatter("${x:,.2f}")
    axes.set_title(f"{name}: what it cost", loc="left", pad=28)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=120)
    return True


def _hours(moment: datetime, begun: datetime) -> float:
    return (moment - begun).total_seconds() / 3600


def _line(axes: Axes, said: list[tuple[datetime, Decimal]], begun: datetime, **look: object) -> None:
    """One amount over the hours; a dot at the last one, which may be the only one."""
    if said:
        x, y = [_hours(at, begun) for at, _ in said], [float(usd) for _, usd in said]
        axes.plot(x, y, marker="o", markevery=[len(x) - 1], markersize=4, **look)  # type: ignore[arg-type]


def _ceilings(
    rows: list[Row], begun: datetime, ceiling_usd: Decimal | None, end: float
) -> list[tuple[float, float]]:
    """The ceiling from when to when: a raise lifts it."""
    if ceiling_usd is None:
        return []
    raises = [row for row in rows if row["event"] == "raised"]
    first = usd(raises[0], "before_usd") if raises else ceiling_usd
    lifted = [(_hours(parse_stamp(row["time_utc"]), begun), float(usd(row, "ceiling_usd"))) for row in raises]
    return [(0.0, float(first)), *lifted, (end, float(ceiling_usd))]


def _marks(axes: Axes, marks: list[tuple[datetime, str]], begun: datetime) -> None:
    """A thin line for each thing that happened, its sign above, named once in the legend."""
    above = axes.get_xaxis_transform()
    for place, (word, (color, sign)) in enumerate(MARKS.items()):
        hours = [_hours(at, begun) for at, what in marks if what == word]
        for at in hours:
            axes.axvline(at, color=color, linewidth=0.8, alpha=0.5, zorder=1)
        if hours:  # on two heights: a raise and its resume come together
            high = [1.025 + 0.04 * (place % 2)] * len(hours)
            axes.plot(hours, high, sign, color=color, transform=above, clip_on=False, label=word)
