"""How far a prediction reaches beyond its runs, what being off costs, what to run next, a second opinion."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from x1_pretrain.laws import forms, words
from x1_pretrain.laws.prediction import Prediction, separate
from x1_pretrain.laws.results import HeldOut, Parabola, Report
from x1_pretrain.numbers import flop, human

EDGE = 1.5  # times the largest fitted: up to here the target is at the edge of the data, not beyond it
FAR = 30.0  # from here on a fit says little of its own error


def reach(report: Report, found: Prediction) -> Iterable[str]:
    yield distance(found)
    if report.held_out is not None:
        yield _held_out_words(report, report.held_out)
    elif report.fitted.method == "bootstrap":
        yield (
            "Leaving the largest budget out leaves too little to fit, so the error of the law itself is "
            "not known."
        )


def distance(found: Prediction) -> str:
    far = found.beyond
    if not far.known:
        return ""
    over = [
        (what, ratio) for what, ratio in (("N", far.n), ("D", far.d), ("FLOPs", far.flops)) if ratio > EDGE
    ]
    if far.furthest <= 1:
        return (
            f"{human(found.n)} parameters on {human(found.tokens.point)} tokens lie inside what was measured."
        )
    if not over:
        return f"The target lies at the edge of what was measured: at most {far.furthest:.2g} times outside."
    words = ", ".join(
        f"{human(ratio)} times {'below the smallest' if what in far.below else 'the largest'} {what}"
        for what, ratio in over
    )
    risk = (
        " At such a distance a small error of an exponent is a large one of D_opt, and nothing measured "
        "here could show it."
        if far.furthest > FAR
        else ""
    )
    return f"This extrapolates: {words} of the runs.{risk}"


def _held_out_words(report: Report, held: HeldOut) -> str:
    moved = float(forms.tokens_for(held.law, report.target_n))
    here = report.fitted.tokens_for(report.target_n)
    return (
        f"As a rehearsal, the law was fitted without the {words.count(held.points, 'point')} of the most "
        "FLOPs, "
        "up to "
        f"{flop(held.flops_fitted_to)} instead of {flop(held.flops_left_out)}. It then predicts those losses "
        f"{_bias_words(held, report.verdict.residual_sd)}. That law would answer "
        f"{human(moved)} "
        f"tokens, {moved / here.point:.3g} times the number above; the interval includes this."
    )


def _bias_words(held: HeldOut, scatter: float) -> str:
    times = held.rms / scatter if scatter > 0 else np.nan
    if abs(held.bias) >= 0.5 * held.rms:
        side = "too high" if held.bias > 0 else "too low"
        return (
            f"{abs(held.bias):.2%} {side} on average (rms {held.rms:.2%}, {times:.2g} times the scatter of "
            "the fit)"
        )
    if times > 1.3:
        return (
            f"with little bias ({held.bias:+.2%}), but {times:.2g} times as far off as it fits (rms "
            f"{held.rms:.2%})"
        )
    return f"as well as it fits the others (bias {held.bias:+.2%}, rms {held.rms:.2%})"


def regret(found: Prediction) -> str:
    parts = [
        f"{r.factor:g} times off wastes {r.wasted.point:.0%} ({r.nats.point:.4f} nats)" for r in found.regrets
    ]
    first = found.regrets[0].wasted.point
    flat = "The optimum is flat: tokens per parameter" if first < 0.1 else "Tokens per parameter"
    tail = ""
    if found.tokens.has_interval and (factor := words.factor(found.tokens)) > 1.05:
        worst = min(factor, 1e3)
        tail = (
            f" The interval's own ends are {worst:.2g} times from the middle"
            f"{'' if factor == worst else ' and more'}."
        )
    return f"{flat} {', '.join(parts)} of the compute.{tail}"


def next(report: Report) -> Iterable[str]:
    if sentence := next_sentence(report):
        yield "## What to run next"
        yield sentence


def next_sentence(report: Report) -> str:
    if not report.next_runs:
        return ""
    best = report.next_runs[0]
    cost = f"${best.usd:,.2f}" if best.usd is not None else f"{flop(best.flops)} FLOPs"
    by = "dollar" if best.usd is not None else "FLOP"
    run = f"{human(best.n)} parameters on {human(best.d)} tokens ({cost})"
    if best.width_after > 0.98 * best.width_before:
        return (
            f"No single run of those considered narrows the interval by as much as 2 %; the best for a {by} "
            f"would be {run}."
        )
    aside = ", model error aside" if report.held_out else ""
    return (
        f"Of the runs considered, {run} narrows the interval most for a {by}: from a factor of "
        f"{best.width_before:.2g} either way to {best.width_after:.2g}{aside}."
    )


def second_opinion(report: Report) -> Iterable[str]:
    """Approach 2 beside the law, budget by budget."""
    if not report.parabolas or not separate(report.points):
        return
    yield "## A second opinion: a parabola for each budget"
    inside = [p for p in report.parabolas if p.inside]
    yield "\n".join(
        [
            "| FLOPs | sizes | lowest at N | the law's | |",
            "|---|---|---|---|---|",
            *map(_bowl(report), report.parabolas),
        ]
    )
    if not inside:
        yield (
            "No budget has its lowest point between its sizes, so the parabolas say nothing; runs are "
            "missing there."
        )
        return
    ratios = [p.n_opt / _law_n(report, p) for p in inside]
    worst = max(ratios, key=lambda ratio: abs(np.log(ratio)))
    agree = "agree with the law" if 1 / 1.25 < worst < 1.25 else "differ from the law"
    yield (
        f"Where the lowest point lies between sizes, the parabolas {agree}: at most by "
        f"{max(worst, 1 / worst) - 1:.0%} in N. A parabola is biased where alpha and beta differ or sizes "
        "lie to one side, so this is a check and not the answer."
    )


def _bowl(report: Report) -> Callable[[Parabola], str]:
    def row(p: Parabola) -> str:
        n = human(p.n_opt) if np.isfinite(p.n_opt) else "none"
        place = "" if p.inside else "not between its sizes" if np.isfinite(p.n_opt) else "opens downwards"
        return f"| {flop(p.flops)} | {p.points} | {n} | {human(_law_n(report, p))} | {place} |"

    return row


def _law_n(report: Report, p: Parabola) -> float:
    """The law's best N on the budget of a parabola; the law's budget is 6ND."""
    near = np.abs(np.log(report.points.flops / p.flops)) < 0.5
    ratio = np.exp(
        np.log(6 * report.points.n[near] * report.points.d[near] / report.points.flops[near]).mean()
    )
    return float(forms.optimum(report.fitted.law, p.flops * (ratio if near.any() else 1.0))[0])
