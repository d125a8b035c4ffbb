"""The three pictures of a run: loss, gradient norm, throughput. Legible at a glance, also in grey.

Every line has its own style, not only its own colour; final values stand in the legend; resumes are thin
vertical lines. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from x1_pretrain.records import run_folder
from x1_pretrain.records.run_folder import Row, is_number, is_train, last_step, validation_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

F64 = npt.NDArray[np.float64]

DPI = 150
LARGEST = 1e30  # a number beyond it overflows on the way to a pixel, and means nothing: drawn as not finite
LONG_RUN_ROWS = 200  # from here on a curve is drawn smoothed over its raw self, and the loss gets a close-up
RAW, INK = "0.75", "#1b1b1b"
# Dark enough on white, apart in grey by style and marker.
VALIDATION_STYLES = (
    {"color": "#c1440e", "linestyle": "-", "marker": "o"},
    {"color": "#1f5fa8", "linestyle": "--", "marker": "s"},
    {"color": "#2e7d32", "linestyle": "-.", "marker": "^"},
    {"color": "#7b3fa0", "linestyle": ":", "marker": "D"},
    {"color": "#8a6d00", "linestyle": "--", "marker": "v"},
)


@dataclass(frozen=True)
class History:
    """What the pictures show of a run."""

    title: str
    rows: Sequence[Row]
    resumes: Sequence[int] = ()  # the steps the run was resumed from
    clip: float | None = None  # the gradient norm above which a step was clipped


def draw_all(history: History, folder: Path) -> list[str]:
    """Draw the pictures into `folder`; the names of the files."""
    pictures = {
        "loss-curve.png": loss_curve,
        "gradnorm-curve.png": gradnorm_curve,
        "throughput.png": throughput,
    }
    for name, draw in pictures.items():
        draw(history, folder / name)
    return list(pictures)


# -----------------------------------------------------------------------------------------------------------
# The pictures


def loss_curve(history: History, file: Path) -> None:
    """Training and validation loss over steps, tokens on top; a long run's later nine tenths also closer."""
    long = len(series(history.rows, "train/loss")[0]) >= LONG_RUN_ROWS
    figure = _figure((13.5, 5.6) if long else (9.0, 5.6), history.title)
    axes = figure.subplots(1, 2, squeeze=False, width_ratios=[1.15, 1])[0] if long else [figure.subplots()]
    for ax in axes:
        _draw_losses(ax, history)
        _mark_resumes(ax, history.resumes)
        ax.set(xlabel="step", ylabel="loss (nats per token)")
        _count_steps(ax)
    _limit_losses(axes[0], history.rows, first=0)
    if long:
        _limit_losses(axes[1], history.rows, first=last_step(history.rows) // 10)
        axes[1].set_ylabel("")
    for ax in axes:
        _tokens_on_top(ax, history.rows)
        ax.grid(visible=True, color="0.9", linewidth=0.6)
    _legend(axes[0])
    _save(figure, file)


def gradnorm_curve(history: History, file: Path) -> None:
    """Norm of the gradient (before clipping) above, norm of the parameters below."""
    figure = _figure((9.0, 7.0), history.title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    _curve(upper, *series(history.rows, "grad_norm"), "gradient norm", "{:.3g}")
    if history.clip is not None:
        upper.axhline(history.clip, color="#c1440e", linestyle=":", label=f"clipped above {history.clip:g}")
    if _spread(series(history.rows, "grad_norm")[1]) > 20:
        upper.set_yscale("log")
    _curve(lower, *series(history.rows, "param_norm"), "parameter norm", "{:.4g}")
    for ax, name in ((upper, "gradient norm (L2)"), (lower, "parameter norm (L2)")):
        _mark_resumes(ax, history.resumes)
        ax.set_ylabel(name)
        _room_for_legend(ax, 0.35)
        _legend(ax)
    lower.set_xlabel("step")
    _count_steps(lower)
    lower.set_xlim(0, max(1, last_step(history.rows)))
    _tokens_on_top(upper, history.rows)
    _save(figure, file)


def throughput(history: History, file: Path) -> None:
    """Tokens a second over the hours of training, gaps between sessions left out."""
    figure = _figure((9.0, 5.2), history.title)
    ax = figure.subplots()
    unit, unit_name = (
        (1000.0, "thousand tokens/s") if _peak_rate(history.rows) >= 10_000 else (1.0, "tokens/s")
    )
    rows = [row for row in history.rows if is_train(row) and _sound(row, "tokens_per_sec", "elapsed_s")]
    clock, clock_name = _clock(rows)
    rates = np.array([row["tokens_per_sec"] for row in rows], dtype=float) / unit
    _curve(ax, [row["elapsed_s"] / clock for row in rows], rates, "tokens/s", "{:,.4g}")
    if len(rates):
        ax.axhline(
            float(np.median(rates)),
            color="#1f5fa8",
            linestyle="--",
            label=_median_label(rows, rates, unit_name),
        )
    _mark_resumes(ax, [_elapsed_at(rows, step) / clock for step in history.resumes])
    ax.set(xlabel=f"training time ({clock_name}, pauses between sessions left out)", ylabel=unit_name)
    ax.set_ylim(0, 1.25 * float(rates.max()) if len(rates) else 1)
    ax.set_xlim(0, rows[-1]["elapsed_s"] / clock if rows else 1)
    _legend(ax)
    _save(figure, file)


# -----------------------------------------------------------------------------------------------------------
# Curves


def series(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """As the run folder's, but for damaged numbers: what can't be drawn is NaN."""
    steps, values = run_folder.series(rows, name)
    return steps, [value if abs(value) <= LARGEST else math.nan for value in values]


def _sound(row: Row, *names: str) -> bool:
    return all(is_number(row.get(name)) and abs(row[name]) <= LARGEST for name in names)


def smooth(values: F64, window: int) -> F64:
    """Centred moving median of the finite values over an odd `window`, no longer than they are.

    It follows a fall and a step, and passes over a spike.

    At the start, where a loss falls fast, the window narrows to the first value itself; at the end it only
    looks back, so that the last value is not one row's noise.
    """
    half = window // 2
    finite = np.where(np.isfinite(values), values, np.nan)
    smoothed = finite.copy()
    smoothed[half : len(values) - half] = _medians(sliding_window_view(finite, 2 * half + 1))
    for at in range(half):
        smoothed[at] = _medians(finite[None, : 2 * at + 1])[0]
        smoothed[-1 - at] = _medians(finite[None, -1 - at - half :])[0]
    return smoothed


def _window(rows: int) -> int:
    """About a hundredth of the run, an odd number of rows."""
    return min(101, max(5, rows // 100) | 1)


def _medians(windows: F64) -> F64:
    """The median of each row; NaN where nothing in it is finite."""
    if np.isfinite(windows).all():
        return np.asarray(np.median(windows, axis=1))
    some = np.isfinite(windows).any(axis=1)
    medians = np.full(len(windows), np.nan)
    medians[some] = np.nanmedian(windows[some], axis=1)
    return medians


def _curve(
    ax: Axes, x: Sequence[float], y: Sequence[float] | F64, name: str, form: str, **style: Any
) -> None:
    """One line; of a long run its smoothed self over a light raw one. The legend says the last value."""
    values = np.asarray(y, dtype=float)
    if not len(values):
        ax.plot([], [], label=f"{name}: no rows", color=INK)
        return
    shown = values
    if len(values) >= LONG_RUN_ROWS:
        ax.plot(x, values, color=RAW, linewidth=0.6, zorder=1)
        shown = smooth(values, window := _window(len(values)))
        name = f"{name}, median of {window} rows"
    marker = {"marker": "."} if len(values) < 60 else {}
    label = f"{name}: {form.format(float(shown[-1]))} at the end"
    ax.plot(x, shown, label=label, **{"color": INK, "linewidth": 1.6, "zorder": 3, **marker, **style})


def _draw_losses(ax: Axes, history: History) -> None:
    _curve(ax, *series(history.rows, "train/loss"), "train", "{:.3f}")
    for place, name in enumerate(_shown_validation(history.rows)):
        steps, losses = series(history.rows, name)
        style = VALIDATION_STYLES[place % len(VALIDATION_STYLES)]
        ax.plot(
            steps,
            losses,
            label=f"{name.removesuffix('/loss')}: {losses[-1]:.3f} at the end",
            markersize=4,
            markevery=max(1, len(steps) // 15),
            linewidth=1.4,
            zorder=4,
            **style,  # type: ignore[arg-type]
        )


def _shown_validation(rows: Sequence[Row]) -> list[str]:
    """Per domain; the overall one too where there are several, as it is then a line of its own."""
    names = validation_losses(rows)
    return names if len(names) != 2 or "val/loss" not in names else names[1:]


def _limit_losses(ax: Axes, rows: Sequence[Row], first: int) -> None:
    """Axes around the losses from step `first` on, so that one spike does not flatten the rest."""
    end = max(1, last_step(rows))
    train = _finite_from(rows, "train/loss", first)
    shown = np.concatenate([train, *(_finite_from(rows, name, first) for name in _shown_validation(rows))])
    ax.set_xlim(first, end)
    if not len(shown):
        return
    whole = shown[len(train) :].tolist() + train[: first == 0].tolist()  # validation, and where the run began
    high = max([*whole, *(np.quantile(train, [0.995]) if len(train) else ())])
    low = float(shown.min())
    pad = 0.05 * (high - low) or 0.1
    ax.set_ylim(low - pad, high + pad)
    if above := int((train > high + pad).sum()):
        text = f"{above} higher {'point' if above == 1 else 'points'} not shown"
        ax.text(0.98, 0.98, text, transform=ax.transAxes, ha="right", va="top", fontsize=8, color="0.35")


def _finite_from(rows: Sequence[Row], name: str, first: int) -> F64:
    steps, values = series(rows, name)
    return np.array([v for step, v in zip(steps, values, strict=True) if step >= first and np.isfinite(v)])


def _mark_resumes(ax: Axes, places: Sequence[float]) -> None:
    for number, place in enumerate(places):
        label = f"resumed ({len(places)} times)" if len(places) > 1 else "resumed"
        ax.axvline(
            place,
            color="0.45",
            linewidth=0.9,
            linestyle=(0, (6, 3)),
            zorder=2,
            label=None if number else label,
        )


# -----------------------------------------------------------------------------------------------------------
# Axes and words


def _figure(size: tuple[float, float], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=13)
    return figure


def _tokens_on_top(ax: Axes, rows: Sequence[Row]) -> None:
    """Tokens are steps times a constant, so the upper axis is the lower one in another unit."""
    per_step = next(
        (row["tokens"] / row["step"] for row in reversed(rows) if row.get("tokens") and row["step"]), None
    )
    if per_step is None:
        return
    unit, name = _token_unit(per_step * last_step(rows))
    scale = per_step / unit
    top = ax.secondary_xaxis("top", functions=(lambda step: step * scale, lambda tokens: tokens / scale))
    top.set_xlabel(f"tokens ({name})" if name else "tokens")


def _token_unit(tokens: float) -> tuple[float, str]:
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if tokens >= unit:
            return unit, name
    return 1.0, ""


def _clock(rows: Sequence[Row]) -> tuple[float, str]:
    longest_s = rows[-1]["elapsed_s"] if rows else 0
    for unit_s, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest_s >= 2 * unit_s:
            return unit_s, name
    return 1.0, "seconds"


def _elapsed_at(rows: Sequence[Row], step: int) -> float:
    """Training seconds at the last row up to `step`."""
    return float(max((row["elapsed_s"] for row in rows if row["step"] <= step), default=0.0))


def _peak_rate(rows: Sequence[Row]) -> float:
    return max((rate for rate in series(rows, "tokens_per_sec")[1] if np.isfinite(rate)), default=0.0)


def _median_label(rows: Sequence[Row], rates: F64, unit_name: str) -> str:
    mfu = [share for share in series(rows, "mfu")[1] if np.isfinite(share)]
    share = f", MFU {np.median(mfu):.1%}" if mfu else ""
    return f"median: {np.median(rates):,.4g} {unit_name}{share}"


def _spread(values: Iterable[float]) -> float:
    """The largest over the middle one, of the finite values above zero."""
    good = [value for value in values if np.isfinite(value) and value > 0]
    return float(max(good) / np.median(good)) if good else 1.0


def _room_for_legend(ax: Axes, share: float) -> None:
    """Raise the upper limit by a share of the height, so that the legend covers no line."""
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log" and low > 0
    ax.set_ylim(low, high * (high / low) ** share if log else high + share * (high - low))


def _count_steps(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _legend(ax: Axes) -> None:
    ax.grid(visible=True, color="0.9", linewidth=0.6)
    ax.legend(loc="upper right", fontsize=9, framealpha=0.95)


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, format="png")
