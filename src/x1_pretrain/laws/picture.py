"""`iso-flop.png`: the runs and the law through them, and the best tokens for every size. Legible in grey.

Left, loss against size: a marker and a line of its own for each budget, the law's best size on it with its
interval, parabolas as a second opinion. Right, D against N: the runs, the law's D_opt with its band out to
the size that was asked for, and a published law. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from x1_pretrain.laws import forms, prediction
from x1_pretrain.laws.fitted import Band
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.points import budgets
from x1_pretrain.laws.results import Report
from x1_pretrain.numbers import compact, flop, human, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

DPI = 150
MOST_BUDGETS = 6  # each with a style of its own; more, or budgets that run together, are shown in bands
BANDS = 5
SAMPLES = 60  # along a curve
INK = "#1b1b1b"
# Dark enough on white, apart in grey by line and marker.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1f5fa8", "linestyle": "-", "marker": "o"},
    {"color": "#c1440e", "linestyle": "--", "marker": "s"},
    {"color": "#2e7d32", "linestyle": "-.", "marker": "^"},
    {"color": "#7b3fa0", "linestyle": ":", "marker": "D"},
    {"color": "#8a6d00", "linestyle": (0, (6, 2)), "marker": "v"},
    {"color": "#444444", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
)


@dataclass(frozen=True)
class Group:
    """Runs of about one budget."""

    label: str
    member: npt.NDArray[np.bool_]
    flops: float  # C = 6ND of the curve through them, at ...
    size: float  # ... this N
    tilt: float  # d ln C / d ln N along the curve: runs of one true budget have not one 6ND

    def tokens(self, n: F64) -> F64:
        """D of the curve at these sizes."""
        return np.asarray(self.flops * (n / self.size) ** self.tilt / (6 * n))


def draw(report: Report, file: Path) -> None:
    """Draw the picture of a fit into `file`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 6.6), dpi=DPI, layout="constrained")
    figure.suptitle(_title(report), fontsize=14)
    left, right = figure.subplots(1, 2)
    _losses(left, report)
    _tokens(right, report)
    for ax in (left, right):
        ax.grid(visible=True, color="0.9", linewidth=0.6)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncol=2, fontsize=10, frameon=False)
    figure.savefig(file, format="png")


def _title(report: Report) -> str:
    kind = {"bootstrap": "95 % interval", "posterior": "middle 95 % of the posterior", "none": "no interval"}
    tokens = report.fitted.tokens_for(report.target_n)
    dominated = ", prior-dominated" if report.fitted.prior_dominated else ""
    words = f"{with_interval(*tokens)} tokens for {human(report.target_n)} parameters"
    return f"{words} ({kind[report.fitted.method]}{dominated})"


# ------------------------------------------------------------------------------------------------------------
# Left: loss against size


def groups(report: Report) -> list[Group]:
    """The budgets; where they are many or run into each other, bands of FLOPs."""
    points = report.points
    separate = _on_budgets(report)
    number = budgets(points.flops) if separate else _bands(points.flops)
    found = [number == one for one in np.unique(number)]
    return [_group(report, member, separate) for member in found]


def _group(report: Report, member: npt.NDArray[np.bool_], one: bool) -> Group:
    points = report.points
    sizes, work = np.log(points.n[member]), np.log(6.0 * (points.n * points.d)[member])
    tilted = one and len(np.unique(sizes)) > 1
    tilt = float(np.polyfit(sizes, work, 1)[0]) if tilted else 0.0
    middle, flops = (float(np.exp(logs.mean())) for logs in (sizes, work))
    return Group(_name(points.flops[member], one), member, flops, middle, tilt)


def _on_budgets(report: Report) -> bool:
    flops = report.points.flops
    return prediction.separate(report.points) and bool(budgets(flops).max() < MOST_BUDGETS)


def _bands(flops: F64) -> npt.NDArray[np.int64]:
    """Up to five bands of equal width in ln C."""
    logs = np.log(flops)
    edges = np.linspace(logs.min(), logs.max(), BANDS + 1)[1:-1]
    return np.asarray(np.searchsorted(edges, logs, side="right"), dtype=np.int64)


def _name(flops: F64, one: bool) -> str:
    if one or flops.max() < 1.3 * flops.min():
        return f"{flop(float(f'{np.exp(np.log(flops).mean()):.2e}'))} FLOPs"
    return f"{float(f'{flops.min():.1e}'):.2g} to {float(f'{flops.max():.1e}'):.2g} FLOPs".replace("e+", "e")


def _losses(ax: Axes, report: Report) -> None:
    points, fitted = report.points, report.fitted
    many = len(points) > 60
    best: list[tuple[Band, float]] = []
    for group, style in zip(groups(report), STYLES, strict=False):
        n, nats = points.n[group.member], points.loss[group.member]
        best.append(_curve(ax, report, group, style))
        dots: dict[str, Any] = {
            "markersize": 4 if many else 8,
            "alpha": 0.75 if many else 1.0,
            "markeredgecolor": "white",
        }
        ax.plot(n, nats, **style | {"linestyle": "none"}, **dots, markeredgewidth=0.5, zorder=4)
        # one entry for the runs and the curve of a budget
        ax.plot([], [], **style, markersize=7, label=group.label)
    _optima(ax, best, fitted.method)
    _parabolas(ax, report)
    _limit(ax, report, best)
    ax.set(xlabel=f"N, {_counted(report)}", ylabel="loss (nats per token)")
    where = "on each budget" if _on_budgets(report) else "amid each band of FLOPs"
    ax.set_title(f"Loss against size; curves: the law {where}", fontsize=12)


def _curve(ax: Axes, report: Report, group: Group, style: dict[str, Any]) -> tuple[Band, float]:
    """The law along one budget; returns its best size with the interval, and the loss there."""
    fitted, n = report.fitted, report.points.n[group.member]
    size = fitted.band(lambda law: _best_size(law, group))
    ends = (min(n.min() / 1.5, size.point / 2), max(n.max() * 1.5, size.point * 2))
    along = np.geomspace(*ends, SAMPLES)
    nats = forms.loss(fitted.law, along, group.tokens(along))
    ax.plot(along, nats, color=style["color"], linestyle=style["linestyle"], linewidth=1.8, zorder=3)
    at = np.array([size.point])
    return size, float(forms.loss(fitted.law, at, group.tokens(at))[0])


def _best_size(law: Law, group: Group) -> Any:
    """Where the law is lowest along the curve: alpha A N^-alpha = (1 - tilt) beta B D^-beta."""
    alone = 1.0 - group.tilt
    scale = group.tokens(np.array([1.0]))[0]  # D = scale N^-alone
    power = law.alpha + law.beta * alone
    return np.power(law.alpha * law.A / (alone * law.beta * law.B) * scale**law.beta, 1.0 / power)


def _optima(ax: Axes, best: list[tuple[Band, float]], method: str) -> None:
    label = "the law's best N, " + {"bootstrap": "95 % interval", "posterior": "posterior 95 %"}.get(
        method, ""
    )
    for size, nats in best:
        if size.has_interval:
            ax.plot([size.low, size.high], [nats, nats], color=INK, linewidth=5, alpha=0.35, zorder=5)
        ax.plot(size.point, nats, color=INK, marker="|", markersize=15, markeredgewidth=2.2, zorder=6)
    style: dict[str, Any] = {
        "color": INK,
        "marker": "|",
        "markersize": 13,
        "markeredgewidth": 2.2,
        "linewidth": 5,
    }
    ax.plot([], [], label=label.rstrip(", "), alpha=0.6, **style)


def _parabolas(ax: Axes, report: Report) -> None:
    """Thin, over the sizes they were fitted on."""
    if not prediction.separate(report.points) or len(report.parabolas) > MOST_BUDGETS:
        return
    for place, found in enumerate(report.parabolas):
        near = np.abs(np.log(report.points.flops / found.flops)) < 0.3
        along = np.geomspace(report.points.n[near].min(), report.points.n[near].max(), SAMPLES)
        label = None if place else "approach 2, second opinion"
        nats = np.exp(np.polyval(found.coefficients, np.log(along)))
        ax.plot(along, nats, color="0.45", linewidth=0.9, linestyle=(0, (2, 1.5)), zorder=2, label=label)


def _limit(ax: Axes, report: Report, best: list[tuple[Band, float]]) -> None:
    """Around the runs and the optima: the ends of curves may leave."""
    nats = np.concatenate([report.points.loss, [loss for _, loss in best]])
    n = np.concatenate([report.points.n, [size.point for size, _ in best]])
    pad = 0.07 * float(np.ptp(nats)) or 0.05
    ax.set_ylim(nats.min() - pad, nats.max() + pad)
    ax.set_xlim(n.min() / 1.6, n.max() * 1.6)
    ax.set_xscale("log")
    _human_log(ax.xaxis, report.points.n, (float(n.min()) / 1.6, float(n.max()) * 1.6))


# ------------------------------------------------------------------------------------------------------------
# Right: the best tokens for a size


def _tokens(ax: Axes, report: Report) -> None:
    points, fitted = report.points, report.fitted
    n = np.geomspace(min(points.n.min(), report.target_n), max(points.n.max(), report.target_n), 40)
    bands = [fitted.tokens_for(float(size)) for size in n]
    _runs(ax, report)
    _band(ax, report, n, bands)
    other = forms.REFIT
    ax.plot(
        n,
        forms.tokens_for(other.law, n),
        color="#c1440e",
        linestyle="--",
        linewidth=1.4,
        zorder=5,
        label=_other(report),
    )
    _lowest(ax, report)
    _asked(ax, report)
    _extent(ax, report, n, bands)
    ax.set(xlabel=f"N, {_counted(report)}", ylabel="D, tokens")
    ax.set_title("The best number of tokens for a size", fontsize=12)


def _runs(ax: Axes, report: Report) -> None:
    points = report.points
    many = len(points) > 60
    for group, style in zip(groups(report), STYLES, strict=False):
        look: dict[str, Any] = {
            "markersize": 3 if many else 6,
            "alpha": 0.7,
            "markeredgecolor": "white",
            "markeredgewidth": 0.4,
        }
        ax.plot(
            points.n[group.member], points.d[group.member], **style | {"linestyle": "none"}, **look, zorder=2
        )
    ax.axvspan(points.n.min(), points.n.max(), color="0.94", zorder=0, label="sizes that were run")


def _band(ax: Axes, report: Report, n: F64, bands: list[Band]) -> None:
    fitted = report.fitted
    ax.plot(n, [band.point for band in bands], color=INK, linewidth=2, zorder=4, label="D_opt by this fit")
    if not bands[0].has_interval:
        return
    label = "95 % interval" if fitted.method == "bootstrap" else "posterior, middle 95 %"
    label += ", prior-dominated" if fitted.prior_dominated else ""
    low, high = [band.low for band in bands], [band.high for band in bands]
    ax.fill_between(n, low, high, color="#1f5fa8", alpha=0.25, linewidth=0, zorder=1, label=label)
    before = [prediction.prior_tokens(fitted, float(size)) for size in n]
    for side in ("low", "high"):
        ends = [getattr(band, side) for band in before if band is not None]
        if ends:
            said = "the prior alone, middle 95 %" if side == "low" else None
            ax.plot(n, ends, color="0.35", linestyle=":", linewidth=1.3, zorder=3, label=said)


def _other(report: Report) -> str:
    same = report.fitted.counts == forms.REFIT.counts
    return f"{forms.REFIT.name}" + ("" if same else " (N: all parameters)")


def _lowest(ax: Axes, report: Report) -> None:
    """Where the parabolas have their lowest points."""
    found = [p for p in report.parabolas if p.inside]
    if not found or not prediction.separate(report.points):
        return
    sizes = np.array([p.n_opt for p in found])
    tokens = np.array([_six_nd(report, p.flops) for p in found]) / (6 * sizes)
    look: dict[str, Any] = {
        "color": "0.2",
        "marker": "x",
        "markersize": 8,
        "markeredgewidth": 1.6,
        "linestyle": "none",
    }
    ax.plot(sizes, tokens, label="approach 2, second opinion", zorder=5, **look)


def _six_nd(report: Report, flops: float) -> float:
    """6ND of the runs on a budget that is given in the file's own FLOPs."""
    points = report.points
    near = np.abs(np.log(points.flops / flops)) < 0.3
    return float(flops * np.exp(np.log(6 * points.n[near] * points.d[near] / points.flops[near]).mean()))


def _asked(ax: Axes, report: Report) -> None:
    tokens = report.fitted.tokens_for(report.target_n)
    if tokens.has_interval:
        ends = [[tokens.point - tokens.low], [tokens.high - tokens.point]]
        ax.errorbar([report.target_n], [tokens.point], yerr=ends, color=INK, capsize=6, linewidth=2, zorder=6)
    name = f"{human(report.target_n)}: {with_interval(*tokens)}"
    look: dict[str, Any] = {
        "color": INK,
        "marker": "*",
        "markersize": 15,
        "linestyle": "none",
        "markeredgecolor": "white",
    }
    ax.plot(report.target_n, tokens.point, label=name, zorder=7, **look)


def _extent(ax: Axes, report: Report, n: F64, bands: list[Band]) -> None:
    ends = [end for band in bands for end in band if np.isfinite(end)]
    points = [band.point for band in bands]
    low = max(min(*ends, *report.points.d), min(*points, *report.points.d) / 30)
    high = min(max(*ends, *report.points.d), max(*points, *report.points.d) * 30)
    ax.set_xlim(n.min() / 1.6, n.max() * 1.6)
    ax.set_ylim(low / 1.6, high * 1.6)
    ax.set(xscale="log", yscale="log")
    sizes = np.append(report.points.n, report.target_n)
    _human_log(ax.xaxis, sizes, (float(n.min()) / 1.6, float(n.max()) * 1.6))
    _human_log(ax.yaxis, None, (low / 1.6, high * 1.6))


# ------------------------------------------------------------------------------------------------------------
# Axes


def _human_log(axis: Axis, values: F64 | None, ends: tuple[float, float]) -> None:
    """Ticks of a log axis, as 5M and 25M: the sizes themselves where few and apart, else round ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.set_major_locator(FixedLocator(ticks(values, ends)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axis.set_minor_formatter(NullFormatter())


def ticks(values: F64 | None, ends: tuple[float, float]) -> list[float]:
    """At most eight."""
    few = sorted({float(f"{value:.2g}") for value in ([] if values is None else values)})
    apart = np.log(ends[1] / ends[0]) / 12
    spread = 3 <= len(few) <= 7 and np.diff(np.log(few)).min() > apart
    if spread and few[0] < 4 * ends[0] and few[-1] > ends[1] / 4:
        return few
    decades = range(int(np.floor(np.log10(ends[0]))), int(np.ceil(np.log10(ends[1]))) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [value for value in found if ends[0] <= value <= ends[1]]
        if len(found) <= 8:
            return found
    return found[:: -(-len(found) // 8)]


def _counted(report: Report) -> str:
    return {
        "matrices": "parameters in matrices",
        "total": "all parameters",
        "as given": "parameters as the file counts them",
    }[report.points.counts]
