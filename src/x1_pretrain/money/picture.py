"""A run's money over its hours: spent, projected, the ceiling; alerts, stops, raises and resumes marked."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path

from x1_pretrain.money.clock import parse_stamp
from x1_pretrain.money.ledger import Row

MARKS = {"alert_due": ("alert", "#d98c00"), "stop": ("stop", "#c0392b"), "raised": ("raise", "#7d3c98"),
         "relaunch": ("resume", "#2471a3"), "launched": ("launch", "#1e8449"),
         "terminate_confirmed": ("gone", "#555555")}  # fmt: skip


def draw(name: str, rows: list[Row], ceiling_usd: Decimal | None, file: Path) -> bool:
    """Write the picture; False where there is nothing to draw yet."""
    polls = [row for row in rows if row["event"] == "poll"]
    if not polls:
        return False
    from matplotlib.figure import Figure

    begun = parse_stamp(polls[0]["time_utc"])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    hours = [_hours(row, begun) for row in polls]
    spent = [float(row["spent_usd"]) for row in polls]
    axes.plot(hours, spent, color="#1f4e79", linewidth=2, label="spent")
    told = [
        (h, float(r["projected_usd"])) for h, r in zip(hours, polls, strict=True) if r.get("projected_usd")
    ]
    if told:
        axes.plot(*zip(*told, strict=True), color="#1f4e79", linestyle=":", label="projected")
    _ceilings(axes, rows, begun, ceiling_usd, max(hours))
    _marks(axes, rows, begun, max([*spent, *(p for _, p in told), float(ceiling_usd or 0)]))
    axes.set_xlabel("hours since the first poll")
    axes.set_ylabel("USD")
    axes.set_title(f"{name}: what it cost")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(file, dpi=120)
    return True


def _hours(row: Row, begun: datetime) -> float:
    return (parse_stamp(row["time_utc"]) - begun).total_seconds() / 3600


def _ceilings(axes: object, rows: list[Row], begun: datetime, ceiling: Decimal | None, end: float) -> None:
    """The ceiling as a step line: a raise lifts it."""
    steps = [
        (_hours(row, begun), float(row["before_usd"]), float(row["ceiling_usd"]))
        for row in rows
        if row["event"] == "raised"
    ]
    if ceiling is None:
        return
    x, y = [0.0], [steps[0][1] if steps else float(ceiling)]
    for at, before, after in steps:
        x += [at, at]
        y += [before, after]
    x.append(max(end, x[-1]))
    y.append(float(ceiling))
    axes.plot(x, y, color="#c0392b", linewidth=1.2, label="ceiling")  # type: ignore[attr-defined]


def _marks(axes: object, rows: list[Row], begun: datetime, top: float) -> None:
    """One thin line for each thing that happened, named once in the legend."""
    named: set[str] = set()
    for row in rows:
        if row["event"] not in MARKS:
            continue
        label, color = MARKS[row["event"]]
        axes.axvline(  # type: ignore[attr-defined]
            _hours(row, begun), color=color, linewidth=0.9, alpha=0.7,
            label=None if label in named else label,
        )  # fmt: skip
        named.add(label)
    axes.set_ylim(top=top * 1.08 or 1)  # type: ignore[attr-defined]
