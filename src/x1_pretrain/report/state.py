"""How a run stands and what it amounts to: a few figures that the head, the tables and the watch share."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from x1_pretrain.records.run_folder import ENDINGS, SILENT_S, moment
from x1_pretrain.report import words
from x1_pretrain.report.blocks import Tone
from x1_pretrain.report.material import Material, clean, value


@dataclass(frozen=True)
class State:
    words: str
    tone: Tone
    over: bool  # nothing more will come


def state(m: Material) -> State:
    """From the records alone: a page may be made on another machine than the run's."""
    if m.finished:
        return State("finished", "good", True)
    if m.stop is not None:
        return State(f"stopped by the {m.stop.by}: {clean(m.stop.reason)}", "bad", True)
    quiet_s = silence_s(m)
    if (event := _ending(m)) is not None:
        said = f"{ENDINGS[event['event']]}: {event.get('message', 'no reason on record')}"
        return State(said, "bad", quiet_s is not None and quiet_s > SILENT_S)
    if quiet_s is None:
        return State("not begun: no records yet", "note", False)
    if quiet_s > max(SILENT_S, 2 * _usual_interval_s(m)):
        return State(f"unfinished, and silent for {words.duration(quiet_s)}", "bad", False)
    return State(f"running, last record {words.duration(max(0.0, quiet_s))} ago", "note", False)


def _ending(m: Material) -> dict[str, Any] | None:
    """The last ending that no later session followed."""
    found = None
    for event in m.events:
        if event.get("event") in ("start", "resume", "branch"):
            found = None
        elif event.get("event") in ENDINGS:
            found = event
    return found


def silence_s(m: Material) -> float | None:
    """Since the newest record; None without one."""
    times = [moment(row) for row in (*m.rows[-1:], *m.steps[-1:], *m.events[-1:])]
    known = [time for time in times if time is not None]
    return (m.now - max(known)).total_seconds() if known else None


def _usual_interval_s(m: Material) -> float:
    times = [moment(row) for row in m.trained[-50:]]
    seconds = [time.timestamp() for time in times if time is not None]
    return float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0


# ------------------------------------------------------------------------------------------------------------
# Figures


def spent_usd(m: Material) -> Decimal | None:
    """What it really cost, as far as is known by now; None where nobody counted."""
    counted = m.money.settled_usd() if m.money is not None else None
    if m.money is not None and (counted or m.money.machines):
        return counted
    seen = m.last("budget/spent_usd")
    return None if seen is None or not np.isfinite(seen) else Decimal(repr(seen))


def usd_per_billion(m: Material) -> Decimal | None:
    """A branch starts its money at zero, so only the tokens that it trained itself are held against it."""
    spent, own = spent_usd(m), m.tokens - m.inherited_tokens
    return None if spent is None or own <= 0 else spent / Decimal(repr(own / 1e9))


def training_loss(m: Material) -> tuple[int, float] | None:
    """The last step that tells its loss, and that loss."""
    for rows, name in ((m.steps, "loss"), (m.trained, "train/loss")):
        for row in reversed(rows):
            if (found := value(row, name)) is not None and row["step"] >= m.trained_to:
                return row["step"], found
    return None


def trained_s(m: Material) -> float | None:
    """Seconds in the trainer, over all sessions, pauses left out."""
    return m.last("elapsed_s")


def parameters(m: Material, kind: str = "total") -> float | None:
    found = m.manifest.get("parameters")
    amount = found.get(kind) if isinstance(found, dict) else None
    return float(amount) if isinstance(amount, int | float) and not isinstance(amount, bool) else None


def sessions(m: Material) -> int:
    return len({row.get("session", 1) for row in (*m.rows, *m.events)})


def median(m: Material, name: str) -> float | None:
    values = m.column(name)[1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def injected_tokens(m: Material) -> float:
    """Trained on injected sequences: not among the tokens."""
    return max((float(v) for v in m.column("tokens_injected")[1] if np.isfinite(v)), default=0.0)


def lowest(m: Material, name: str) -> float | None:
    values = m.column(name)[1]
    values = values[np.isfinite(values)]
    return float(values.min()) if len(values) else None


def highest(m: Material, name: str) -> float | None:
    values = m.column(name)[1]
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else None
