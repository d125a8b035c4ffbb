"""Numbers made ready to draw: medians over a noisy curve, thinning that keeps its extremes, axes, labels.

Pure arithmetic on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from x1_pretrain.numbers import compact
from x1_pretrain.report.blocks import F64, Curve, Mark

LONG = 200  # values, from which on a curve is drawn as its median over its raw self
BUCKETS = 900  # of a raw curve: about a pixel each; up to four points a bucket
PLACES = 500  # points of a smoothed curve
LABEL_SHARE = 0.1  # of the narrowest plot (280 pixels), that a label of three letters takes
LANES = 3


# ------------------------------------------------------------------------------------------------------------
# Curves


def curves(name: str, x: F64, y: F64, style: int = 0, last: str = "") -> list[Curve]:
    """A curve; a long one as its raw self, faint, below its moving median."""
    if len(x) < LONG:
        return [Curve(name, x, y, style, last=last)]
    at, width = median_places(len(x)), window(len(x))
    middle = medians_at(y, at, width // 2)
    raw = Curve(f"{name}, raw", x, y, style, faint=True)
    return [raw, Curve(name, x[at], middle, style, last=last, line=f"median of {width}")]


def window(count: int) -> int:
    """About a hundredth of the values, an odd number."""
    return min(1001, max(5, count // 100) | 1)


def median_places(count: int) -> npt_int:
    """Where a median is taken: the first, the last, and denser at the start, where a loss falls fast."""
    even = np.linspace(0, count - 1, PLACES // 2)
    early = np.geomspace(1, count, PLACES // 2) - 1
    return np.unique(np.concatenate([even, early]).round().astype(np.int64))


npt_int = np.ndarray[tuple[int], np.dtype[np.int64]]


def medians_at(y: F64, places: npt_int, half: int) -> F64:
    """The median of the finite values around each place. Near the start the window narrows, so that a fall
    is followed; at the end it only looks back, so that the last value is not one row's noise."""
    found = np.full(len(places), np.nan)
    for number, place in enumerate(places):
        reach = min(half, int(place))
        seen = y[place - reach : place + half + 1] if reach == half else y[: 2 * reach + 1]
        seen = seen[np.isfinite(seen)]
        if len(seen):
            found[number] = np.median(seen)
    return found


def thinned(x: F64, y: F64, place: F64, buckets: int = BUCKETS) -> tuple[F64, F64]:
    """At most four points a bucket of `place` (0 to 1, where a point is drawn): first, lowest, highest, last.

    Every extreme stays. A bucket without a finite value becomes a gap (one NaN).
    """
    if len(x) <= 4 * buckets:
        return x, y
    bucket = np.clip((place * buckets).astype(np.int64), 0, buckets - 1)
    edges = np.flatnonzero(np.diff(bucket)) + 1
    kept = [_ends(begin, part) for begin, part in zip((0, *edges), np.split(y, edges), strict=True)]
    index = np.concatenate(kept)
    return x[index], y[index]


def _ends(begin: int, part: F64) -> npt_int:
    """Places of the first, lowest, highest and last finite value, each once and in order."""
    finite = np.flatnonzero(np.isfinite(part))
    if not len(finite):
        return np.array([begin])
    values = part[finite]
    chosen = {finite[0], finite[int(values.argmin())], finite[int(values.argmax())], finite[-1]}
    return begin + np.array(sorted(chosen), dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------
# Axes


class Axis:
    """A range of values and where each lies on it, 0 to 1."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.log = log and low > 0
        if not low < high:  # one value: some room around it
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 1.5, high * 1.5) if self.log else (low - pad, high + pad)
        self.low, self.high = low, high

    def place(self, values: F64) -> F64:
        """Outside the range below 0 or above 1; NaN for what a log axis has no place for."""
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(values > 0, np.log(values), np.nan)
        return np.asarray((logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low)))

    def ticks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    if not (math.isfinite(rough) and rough > 0):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if number == 0 else number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few; all of a short range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**p for p in powers for m in steps if low * 0.999 <= m * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            return found[:: 1 + len(found) // 7]
    return ticks(low, high)


def extent(columns: Sequence[F64], positive: bool = False) -> tuple[float, float] | None:
    """From the lowest to the highest finite value; None without one."""
    values = np.concatenate([np.asarray(c, dtype=float) for c in columns]) if columns else np.empty(0)
    values = values[np.isfinite(values) & ((values > 0) | (not positive))]
    return (float(values.min()), float(values.max())) if len(values) else None


def spread(values: F64) -> float:
    """The largest over the middle one, of the finite values above zero."""
    good = values[np.isfinite(values) & (values > 0)]
    return float(good.max() / np.median(good)) if len(good) else 1.0


def tick_text(value: float, step: float, share: bool) -> str:
    """As short as it can be and as fine as its step; 0 for a logarithmic axis."""
    if share:
        return f"{value * 100:.{0 if step >= 0.01 else 1}f}%"
    if value and (abs(value) >= 10_000 or abs(value) < 1e-3):
        return compact(value) if value > 0 else f"{value:.3g}"
    if step <= 0:
        return f"{value:.3g}"
    return f"{value:,.{min(4, max(0, -math.floor(math.log10(step) + 1e-9)))}f}"


# ------------------------------------------------------------------------------------------------------------
# Labels that do not overlap


IMPORTANCE = ("spike", "rewind", "inject", "resume", "context", "mixture")


def lanes(marks: Sequence[Mark], places: Sequence[float]) -> list[int | None]:
    """Which row above the plot each label stands in; None where there is no room (its line stays).

    No two labels of a row are nearer than a label is wide on the narrowest screen. The important ones are
    placed first.
    """
    taken: list[list[float]] = [[] for _ in range(LANES)]
    found: list[int | None] = [None] * len(marks)
    for number in sorted(range(len(marks)), key=lambda n: (IMPORTANCE.index(marks[n].kind), places[n])):
        here = places[number]
        if not 0 <= here <= 1:
            continue
        for lane, others in enumerate(taken):
            if all(abs(here - other) >= LABEL_SHARE for other in others):
                others.append(here)
                found[number] = lane
                break
    return found
