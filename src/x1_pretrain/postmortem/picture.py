"""The picture of a spike: loss and gradient norm, step by step, around it. Legible also in grey.

What is a band or a span is shaded and named in the legend; every line has its own style.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from x1_pretrain.postmortem.steps_file import value
from x1_pretrain.records.plots import DPI, INK
from x1_pretrain.records.run_folder import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

F64 = npt.NDArray[np.float64]

ALARM, CLIP, BACK, MADE = "#c1440e", "#1f5fa8", "#2e7d32", "#7b3fa0"


@dataclass(frozen=True)
class View:
    """What the picture shows."""

    title: str
    rows: Sequence[Row]  # of steps
    loss_before: float
    loss_scale: float
    grad_norm_before: float
    alarm: float  # deviations above the median
    span: tuple[int, int] | None = None  # of the spike
    recovered: int | None = None
    injected: Sequence[int] = ()
    again: Sequence[Row] = ()  # the same steps after a rewind
    marked: int | None = None  # a step that someone asked about


def draw(view: View, file: Path) -> None:
    """Loss above, gradient norm below on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.4), dpi=DPI, layout="constrained")
    figure.suptitle(view.title, fontsize=13)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = np.array([row["step"] for row in view.rows], dtype=float)
    losses, norms = (np.array([value(row, name) for row in view.rows]) for name in ("loss", "grad_norm"))
    _loss(upper, view, steps, losses)
    _norm(lower, view, steps, norms)
    for ax in (upper, lower):
        _events(ax, view, named=ax is upper)
        ax.grid(visible=True, color="0.9", linewidth=0.6)
        if len(steps):
            ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    _legend(upper)
    _legend(lower)
    lower.set_xlabel("step")
    _whole_steps(lower)
    figure.savefig(file, format="png")


def _loss(ax: Axes, view: View, steps: F64, losses: F64) -> None:
    _line(ax, steps, losses, "loss")
    _second(ax, view, "loss")
    if math.isfinite(view.loss_before):
        wide = view.alarm * view.loss_scale
        ax.axhspan(view.loss_before - wide, view.loss_before + wide, color="0.88", zorder=0)
        label = f"median before: {view.loss_before:.3f}; band: ±{view.alarm:g} deviations"
        ax.axhline(view.loss_before, color="0.35", linestyle="--", linewidth=1.0, label=label)
    ax.set_ylabel("loss (nats per token)")
    _lost(ax, steps, losses)
    _headroom(ax, 0.30)


def _norm(ax: Axes, view: View, steps: F64, norms: F64) -> None:
    good = np.where(norms > 0, norms, np.nan)
    _line(ax, steps, good, "gradient norm before clipping")
    _second(ax, view, "grad_norm")
    cut = np.array([value(row, "clip") for row in view.rows])
    if np.isfinite(cut).any():
        ax.step(
            steps,
            cut,
            where="mid",
            color=CLIP,
            linestyle="-.",
            linewidth=1.2,
            label="cut to this where above",
        )
    if view.grad_norm_before > 0:
        label = f"median before: {view.grad_norm_before:.3g}"
        ax.axhline(view.grad_norm_before, color="0.35", linestyle="--", linewidth=1.0, label=label)
    if np.isfinite(good).any():
        ax.set_yscale("log")
        _plain_numbers(ax)
    ax.set_ylabel("gradient norm (L2, log scale)")
    _lost(ax, steps, norms)
    _headroom(ax, 0.36)


def _line(ax: Axes, steps: F64, values: F64, label: str) -> None:
    shown = np.where(np.isfinite(values), values, np.nan)
    ax.plot(steps, shown, color=INK, linewidth=1.3, marker=".", markersize=3.5, label=label, zorder=4)


def _second(ax: Axes, view: View, name: str) -> None:
    """The same steps on other data, where the run went back."""
    if view.again:
        steps = [row["step"] for row in view.again]
        style: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.6, "zorder": 3.5}
        ax.plot(steps, [value(row, name) for row in view.again], label="after going back", **style)


def _lost(ax: Axes, steps: F64, values: F64) -> None:
    """Steps without a finite value, marked at the foot."""
    bad = steps[~np.isfinite(values)]
    if len(bad):
        where = ax.get_xaxis_transform()
        ax.plot(bad, np.full(len(bad), 0.03), "x", color=ALARM, transform=where, label="not finite", zorder=5)


def _events(ax: Axes, view: View, named: bool) -> None:
    """What happened, in both panels; named in one legend."""

    def label(text: str) -> str | None:
        return text if named else None

    if view.span:
        first, last = view.span
        ax.axvspan(first - 0.5, last + 0.5, color="#f3d9c9", zorder=0.5, label=label("the spike"))
    for place, step in enumerate(view.injected):
        name = label("injected batches") if place == 0 else None
        hatch: dict[str, Any] = {"facecolor": MADE, "edgecolor": "white", "hatch": "////", "linewidth": 0}
        ax.axvspan(step - 0.5, step + 0.5, ymax=0.05, zorder=3, label=name, **hatch)
    if view.recovered is not None:
        style: dict[str, Any] = {"color": BACK, "linestyle": (0, (4, 2)), "linewidth": 1.4, "zorder": 3}
        ax.axvline(view.recovered, label=label(f"back at step {view.recovered:,}"), **style)
    if view.marked is not None:
        style = {"color": ALARM, "linestyle": ":", "linewidth": 1.4, "zorder": 3}
        ax.axvline(view.marked, label=label(f"step {view.marked:,}"), **style)


# -----------------------------------------------------------------------------------------------------------
# Axes


def _headroom(ax: Axes, share: float) -> None:
    """Raise the upper limit, so that the legend covers no line."""
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log" and low > 0
    ax.set_ylim(low, high * (high / low) ** share if log else high + share * (high - low))


def _legend(ax: Axes) -> None:
    ax.legend(loc="upper center", ncols=3, fontsize=8, framealpha=0.95)


def _whole_steps(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _plain_numbers(ax: Axes) -> None:
    """0.5, 1, 20 instead of powers of ten; a narrow range has numbers too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_ylim()
    wide = high / low > 50
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
