"""What a spike did, in numbers: what it left in the loss, what clipping and Adam's memory made of it, its
price.

All from rows. Nothing here is a judgement; `verdict` makes one of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import numpy as np
import numpy.typing as npt

from x1_pretrain.config import OptimizerConfig
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock, parse_stamp
from x1_pretrain.money.ledger import NAME, LedgerError, read_rows
from x1_pretrain.postmortem.steps_file import plausible, value
from x1_pretrain.records.run_folder import Row, Run, is_number, series

F64 = npt.NDArray[np.float64]

LEAST_BEFORE, LEAST_AFTER = 16, 8  # steps; with fewer no trend is drawn
BLIND = 0.1  # nats of error from which "nothing lasting" would say more than is known
WELL_OUTSIDE = 2.0  # times the error: less may be the line's fault
SETTLED = 32  # steps after the recovery from which the difference is more than a first impression
CALM = 1.1  # Adam's second moment less than a tenth above its usual value counts as back
MADE = ("go", "")  # verdicts after which the update was made

Reading = Literal["may have", "above", "nothing", "blind"]

# -----------------------------------------------------------------------------------------------------------
# What it left in the loss


@dataclass(frozen=True)
class Lasting:
    """The loss after the recovery against the trend before, in nats."""

    difference: float  # found minus expected
    error: float  # 95 % from the scatter of the steps before, and how far a parabola leads away
    expected: float
    found: float
    before: int  # steps that the trend was drawn through
    first: int  # steps after the recovery that it was held against
    last: int
    after: int  # of them

    @property
    def settled(self) -> bool:
        return self.after >= SETTLED

    @property
    def clear(self) -> bool:
        """Outside what the scatter explains."""
        return abs(self.difference) > self.error

    @property
    def reading(self) -> Reading:
        """What may be said of it. Never that the spike was the cause: a loss that flattens lies above a line
        as well."""
        if self.difference > WELL_OUTSIDE * self.error:
            return "may have"
        if self.error > BLIND:
            return "blind"
        return "above" if self.clear and self.difference > 0 else "nothing"


def lasting(before: Sequence[Row], after: Sequence[Row]) -> Lasting | None:
    """A straight line of the loss against the logarithm of the step, extrapolated; least squares."""
    x, y, _ = _points(before)
    x_after, y_after, steps = _points(after)
    if len(x) < LEAST_BEFORE or len(x_after) < LEAST_AFTER:
        return None
    expected, error = _extrapolated(x, y, x_after)
    bent = expected.mean() - _bent(x, y, x_after).mean()  # the trend may be no line
    return Lasting(
        difference=float((y_after - expected).mean()),
        error=math.hypot(error, bent),
        expected=float(expected.mean()),
        found=float(y_after.mean()),
        before=len(x),
        first=steps[0],
        last=steps[-1],
        after=len(steps),
    )


def _bent(x: F64, y: F64, x_after: F64) -> F64:
    """The same by a parabola."""
    centre, width = x.mean(), np.ptp(x)
    return np.asarray(np.polyval(np.polyfit((x - centre) / width, y, 2), (x_after - centre) / width))


def _extrapolated(x: F64, y: F64, x_after: F64) -> tuple[F64, float]:
    """The line at `x_after`, and the 95 % error of the mean difference of so many new points from it."""
    centre, spread = x.mean(), ((x - x.mean()) ** 2).sum()
    slope = ((x - centre) * y).sum() / spread
    variance = ((y - y.mean() - slope * (x - centre)) ** 2).sum() / (len(x) - 2)
    share = 1 / len(x) + (x_after.mean() - centre) ** 2 / spread + 1 / len(x_after)
    return y.mean() + slope * (x_after - centre), 1.96 * math.sqrt(variance * share)


def _points(rows: Sequence[Row]) -> tuple[F64, F64, list[int]]:
    """ln step and loss, where it is finite."""
    good = [row for row in rows if row["step"] > 0 and math.isfinite(value(row, "loss"))]
    steps = [row["step"] for row in good]
    return np.log(np.array(steps, float)), np.array([row["loss"] for row in good], float), steps


# -----------------------------------------------------------------------------------------------------------
# Clipping


@dataclass(frozen=True)
class Clipping:
    """How often and how far the gradient was cut, among some steps."""

    steps: int
    cut: int
    factor: float  # of the hardest cut: the norm over what was left of it
    step: int
    norm: float
    limit: float


def clipping(rows: Iterable[Row]) -> Clipping | None:
    """None where no row says what the gradient was cut to."""
    known = [
        (value(row, "grad_norm"), value(row, "clip"), row["step"])
        for row in rows
        if is_number(row.get("clip")) and row["clip"] > 0 and row.get("verdict", "go") in MADE
    ]
    known = [one for one in known if math.isfinite(one[0])]
    if not known:
        return None
    norm, limit, step = max(known, key=lambda one: one[0] / one[1])
    return Clipping(len(known), sum(n > c for n, c, _ in known), norm / limit, step, norm, limit)


# -----------------------------------------------------------------------------------------------------------
# Adam's memory


@dataclass(frozen=True)
class Memory:
    """The second moment of a weight whose gradient rose and fell as the norm did; 1 is its usual value."""

    steps: float  # 1 / (1 - beta2)
    peak: float
    peak_step: int
    calm_step: int  # the first step after the peak where it was less than a tenth above its usual value

    @property
    def update(self) -> float:
        """What a usual gradient's update comes to at the peak, of what it usually is."""
        return 1 / math.sqrt(self.peak)


def memory(rows: Sequence[Row], usual: float, optimizer: OptimizerConfig) -> Memory | None:
    """`rows` from the onset on. After the last of them the gradient is taken as usual again."""
    if not rows or not usual > 0:
        return None
    beta2, v, peak, peak_step, calm_step = optimizer.beta2, 1.0, 1.0, rows[0]["step"], 0
    for row in rows:
        norm = min(value(row, "grad_norm"), value(row, "clip") if "clip" in row else optimizer.clip)
        if row.get("verdict", "go") in MADE and math.isfinite(norm):
            v = beta2 * v + (1 - beta2) * (norm / usual) ** 2
        if v > peak:
            peak, peak_step, calm_step = v, row["step"], 0
        elif v < CALM and not calm_step:
            calm_step = row["step"]
    if not calm_step:
        left = math.log((CALM - 1) / (v - 1)) / math.log(beta2) if v > CALM and beta2 > 0 else 0
        calm_step = rows[-1]["step"] + math.ceil(left)
    return Memory(1 / (1 - beta2), peak, peak_step, calm_step)


# -----------------------------------------------------------------------------------------------------------
# Norms


@dataclass(frozen=True)
class Norm:
    """A metric before, at its highest during, and after; each with its step."""

    name: str
    before: tuple[int, float]
    during: tuple[int, float] | None
    after: tuple[int, float] | None


def norms(metrics: Sequence[Row], steps: Sequence[Row], first: int, last: int) -> list[Norm]:
    """The norms on both sides of the steps first to last, or in them; the gradient's from the steps' rows."""
    names = {name for row in metrics for name in row if is_norm(name)}
    found = [
        _norm(name, steps if name == "grad_norm" else metrics, first, last)
        for name in sorted(names, key=_rank)
    ]
    return [norm for norm in found if norm is not None]


def is_norm(name: str) -> bool:
    parts = name.split("/")
    whole = name in ("grad_norm", "param_norm", "optimizer/m_norm", "optimizer/v_norm")
    grouped = parts[0] in ("grad_norm", "param_norm", "update_ratio") and "layer" not in name
    return whole or (grouped and len(parts) == 2) or name == "attention/logit_max"


def _rank(name: str) -> tuple[int, str]:
    order = ("grad_norm", "param_norm", "optimizer", "update_ratio", "attention")
    return order.index(name.split("/")[0]), name


def _norm(name: str, rows: Sequence[Row], first: int, last: int) -> Norm | None:
    points = [(s, plausible(v)) for s, v in zip(*series(rows, name), strict=True)]
    before = [point for point in points if point[0] < first]
    during = [point for point in points if first <= point[0] <= last]
    after = [point for point in points if point[0] > last]
    if not before or not (during or after):
        return None
    highest = max(during, key=lambda point: (math.isnan(point[1]), point[1])) if during else None
    return Norm(name, before[-1], highest, after[0] if after else None)


# -----------------------------------------------------------------------------------------------------------
# Money


@dataclass(frozen=True)
class Price:
    """What an hour of the run cost, and which record says so."""

    usd_per_hr: float
    source: str

    def usd(self, seconds: float, clock: Clock) -> float:
        """A rehearsal's clock runs fast, and its dollars with it."""
        return self.usd_per_hr * seconds * clock.speed / 3600


def price(run: Run, at_utc: str | None, rows: Sequence[Row], clock: Clock) -> Price | None:
    """From the machines in the ledger, else the agreed rate there, else how `budget/spent_usd` grew."""
    try:
        ledger = read_rows(run.folder / NAME)
        machines = account(ledger).machines
        now = parse_stamp(clock.told(at_utc)) if at_utc else None
    except (LedgerError, ValueError):
        ledger, machines, now = [], [], None
    billed = [m for m in machines if now and m.since <= now and (m.ended is None or now <= m.ended)]
    if hourly := sum((m.usd_per_hr for m in billed), Decimal(0)):
        return Price(float(hourly), "ledger.jsonl, the machines rented then")
    agreed = [
        row["usd_per_hr"] for row in ledger if row["event"] in ("gate", "agreed") and "usd_per_hr" in row
    ]
    if agreed and float(agreed[-1]) > 0:
        return Price(float(agreed[-1]), "ledger.jsonl, the agreed rate")
    return _grown(rows)


def _grown(rows: Sequence[Row]) -> Price | None:
    spent = [
        row for row in rows if is_number(row.get("budget/spent_usd")) and is_number(row.get("elapsed_s"))
    ]
    if len(spent) < 2:
        return None
    hours = (spent[-1]["elapsed_s"] - spent[0]["elapsed_s"]) / 3600
    usd = spent[-1]["budget/spent_usd"] - spent[0]["budget/spent_usd"]
    return Price(usd / hours, "metrics.jsonl, budget/spent_usd") if hours > 0 and usd > 0 else None
