"""`prediction.md`: what a fit says, in sentences that its numbers decide; and the same in a few lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import numpy as np

from x1_pretrain.laws import forms, limits, outlook, words
from x1_pretrain.laws.fitted import Band
from x1_pretrain.laws.forms import FIELDS
from x1_pretrain.laws.prediction import Beside, Prediction, predict, separate
from x1_pretrain.laws.results import Estimate, Report
from x1_pretrain.numbers import flop, human, interval, with_interval

WIDTH = 110
FIVE = 5  # numbers of the law: with no more points than that an exact fit is one of many
FAIR = 1.5  # a form whose misfit is more than this times the best is no rival
ALIKE = 1.15  # two numbers of tokens within this factor are the same for a person who plans
ESTIMATORS = {"huber": "Huber(1e-3)", "lad": "least absolute deviations", "least-squares": "least squares"}
COUNTS = {
    "matrices": "N counts the parameters in matrices, without embeddings",
    "total": "N counts all parameters, embeddings too",
    "as given": "What N counts the file does not say",
}


def page(report: Report) -> str:
    """The whole page, Markdown."""
    found = predict(report.fitted, report.target_n)
    parts = [
        f"# {_title(report, found)}",
        _prediction(report, found),
        "## What it rests on",
        *_basis(report),
        *limits.cannot_tell(report),
        *limits.prior_and_posterior(report, found),
        "## Beside published laws",
        _published(report, found),
        *_choices(report),
        "## How far this reaches",
        *outlook.reach(report, found),
        "## What being off costs",
        outlook.regret(found),
        *outlook.next(report),
        *outlook.second_opinion(report),
    ]
    return "\n\n".join(_wrapped(part) for part in parts if part) + "\n"


def summary(report: Report) -> str:
    """The same for a terminal, in a few lines."""
    found = predict(report.fitted, report.target_n)
    said = [_title(report, found), _short_basis(report)]
    if report.fitted.method == "posterior":
        said += [f"no interval from the runs alone: {words.sentence(why)}" for why in report.verdict.reasons]
        said.append(limits.dominance(report, found))
    said += [f"one run there ends at {words.nats(found.loss)}", _published(report, found)]
    said += [outlook.distance(found), outlook.next_sentence(report)]
    said += [f"note: {note}" for note in report.points.notes]
    return "\n".join(text for text in said if text)


def _wrapped(part: str) -> str:
    """Paragraphs to the width of the page; tables, headings and lists as they are."""
    if part.startswith(("#", "|")):
        return part
    if part.startswith("- "):
        return "\n".join(
            textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False)
            for line in part.split("\n")
        )
    return textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False)


# ------------------------------------------------------------------------------------------------------------
# The answer and what it rests on


def _title(report: Report, found: Prediction) -> str:
    kind = {"bootstrap": "", "posterior": " (posterior)", "none": " (no interval)"}[report.fitted.method]
    dominated = ", prior-dominated" if report.fitted.prior_dominated else ""
    return f"D_opt({human(found.n)}) = {with_interval(*found.tokens)} tokens{kind}{dominated}"


def _prediction(report: Report, found: Prediction) -> str:
    tokens, ratio = found.tokens, found.per_parameter
    size, best = human(found.n), human(tokens.point)
    per = f"{human(ratio.point)} a parameter"
    if not tokens.has_interval:
        return (
            f"A model of {size} parameters is best trained on about {best} tokens, {per}; no interval is "
            "known."
        )
    ends = words.between(tokens, human)
    span = {
        "bootstrap": f"the 95 % interval is {ends} ({words.between(ratio, human)} a parameter)",
        "posterior": f"19 chances in 20 lie {words.words_between(tokens)} ({words.between(ratio, human)} a "
        "parameter)",
        "none": "",
    }[report.fitted.method]
    return (
        f"A model of {size} parameters makes the best use of its FLOPs on {best} tokens, {per}; {span}. "
        f"{_width_words(tokens)} One run there should end at {words.nats(found.loss)}, having cost C = 6ND = "
        f"{flop(found.flops)}."
    )


def _width_words(tokens: Band) -> str:
    factor = words.factor(tokens)
    if factor < 1.3:
        return "That is narrow enough to plan by."
    if factor < 2.5:
        return f"That is a factor of {factor:.2g} either way, and the optimum is flat enough to plan by it."
    if factor < 10:
        return f"That is a factor of {factor:.2g} either way: good for the order of size, no more."
    return f"That is a factor of {factor:.2g} either way: these runs do not settle the question."


def _basis(report: Report) -> Iterable[str]:
    points, verdict = report.points, report.verdict
    yield (
        f"{_short_basis(report)[0].upper()}{_short_basis(report)[1:]}: N from {human(points.n.min())} to "
        f"{human(points.n.max())}, D from {human(points.d.min())} to {human(points.d.max())}, losses from "
        f"{points.loss.min():.3f} to {points.loss.max():.3f} nats per token. {COUNTS[points.counts]}. "
        f"{_scatter_words(report)}"
    )
    yield f"The law is L = {words.formula(report.fitted.law)}. {_how(report)}"
    yield _parameters(report)
    if points.notes:
        yield "\n".join(f"- {words.sentence(note)}." for note in points.notes)
    if verdict.identified and report.best.agreeing < 0.5:
        yield (
            f"Only {report.best.agreeing:.0%} of {report.best.starts} starts ended at this optimum; look at "
            "the "
            "losses of single runs before trusting it."
        )


def _short_basis(report: Report) -> str:
    points, verdict = report.points, report.verdict
    flops = (points.flops.min(), points.flops.max())
    span = f"about {flop(flops[0])}" if flops[1] < 1.2 * flops[0] else f"{flop(flops[0])} to {flop(flops[1])}"
    runs = words.count(points.clusters, "run")
    of = runs if points.clusters == len(points) else f"{words.count(len(points), 'point')} of {runs}"
    basis = "counted as 6ND" if points.flops_basis == "6ND" else points.flops_basis
    on = f" on {words.count(verdict.budgets, 'budget')}" if separate(points) else ""
    return f"{of}{on}, {span} FLOPs ({basis})"


def _scatter_words(report: Report) -> str:
    sd = report.verdict.residual_sd
    if not np.isfinite(sd):
        return "With no more points than numbers to fit, how far runs scatter about a law can't be seen."
    middle = float(np.exp(np.log(report.points.loss).mean()))
    return f"Runs scatter about the law by {sd:.2%} of the loss, about {sd * middle:.3f} nats."


def _how(report: Report) -> str:
    """Which estimate, and where its intervals come from."""
    if report.fitted.method == "posterior":
        assert report.posterior is not None
        return (
            f"Of {len(report.posterior.draws):,} draws of the posterior under the prior "
            f'"{report.posterior.prior.name}" (worth {report.posterior.effective:,.0f} independent ones) it '
            "is the one nearest the middle of all."
        )
    if report.fitted.method == "none":
        return "It is a point only."
    error = " and by how much the answer moves without the largest budget" if report.held_out else ""
    return (
        f"It is the optimum of Huber(1e-3) on ln L, summed, which {report.best.agreeing:.0%} of "
        f"{report.best.starts} starts reached; intervals come from {report.replicates:,} refits to whole "
        "runs drawn "
        f"with replacement{error}."
    )


def _parameters(report: Report) -> str:
    rows = [
        f"| {name} | {band.point:.5g} | {words.ends(band, '.4g')} |"
        for name, band in zip(FIELDS, report.parameters, strict=True)
    ]
    head = "middle 95 % of the posterior" if report.fitted.method == "posterior" else "95 % interval"
    return "\n".join([f"| | point | {head} |", "|---|---|---|", *rows])


# ------------------------------------------------------------------------------------------------------------
# Beside others


def _published(report: Report, found: Prediction) -> str:
    first, *others = found.beside
    place = _place(first, found.tokens)
    said = f"{first.published.name} gives {human(first.tokens)} tokens at this size, {place}."
    count = _other_count(report, first)
    rest = "; ".join(f"{b.published.name} {human(b.tokens)}" for b in others)
    inside = [b for b in found.beside if b.inside]
    tally = f" {_tally(len(inside), len(found.beside))}" if found.tokens.has_interval else ""
    return f"{said}{count} Others: {rest}.{tally}"


def _place(other: Beside, tokens: Band) -> str:
    ratio = other.tokens / tokens.point
    if other.inside is None:
        return f"{ratio:.2g} times the number here"
    if other.inside:
        close = 1 / ALIKE < ratio < ALIKE
        return "the same for any plan, and inside the interval" if close else "inside the interval"
    if other.tokens > tokens.high:
        return f"outside the interval: {other.tokens / tokens.high:.2g} times its upper end"
    return f"outside the interval: its lower end is {tokens.low / other.tokens:.2g} times that"


def _other_count(report: Report, other: Beside) -> str:
    if other.same_count:
        return ""
    if report.points.counts == "matrices":
        return (
            " Its N counts embeddings too and the N here does not, so this is not the same question: at "
            "small "
            "sizes embeddings are a large part."
        )
    return " Its N counts all parameters; if the file's N does not, this is not the same question."


def _tally(inside: int, of: int) -> str:
    if inside == of:
        return f"All {words.FEW.get(of, of)} lie inside the interval: these runs can't choose among them."
    if inside == 0:
        return f"None of the {words.FEW.get(of, of)} lies inside the interval."
    verb = "lies" if inside == 1 else "lie"
    return (
        f"{words.capital(words.FEW.get(inside, 'one'))} of the {words.FEW.get(of, of)} {verb} inside the "
        "interval."
    )


def _choices(report: Report) -> Iterable[str]:
    """How the answer depends on estimator and form."""
    if not report.others:
        return
    rows = [*([report.best] if len(report.points) > FIVE else []), *report.others]
    found = [(e, float(forms.tokens_for(e.law, report.target_n)), _misfit(report, e)) for e in rows]
    yield "## If it is fitted differently"
    yield "\n".join(
        [
            f"| form | estimator | alpha | beta | D_opt({human(report.target_n)}) | misfit |",
            "|---|---|---|---|---|---|",
            *(_choice(*row) for row in found),
        ]
    )
    fair = [tokens for _, tokens, misfit in found if not misfit > FAIR]
    worse = len(found) - len(fair)
    yield _choice_words(report, fair) + (_worse_words(worse) if worse else "")


def _misfit(report: Report, e: Estimate) -> float:
    """The objective over that of the free form, where both are of one estimator and the free one has any."""
    if e.estimator != report.best.estimator or len(report.points) <= FIVE or report.best.objective <= 0:
        return float("nan")
    return e.objective / report.best.objective


def _choice(e: Estimate, tokens: float, misfit: float) -> str:
    times = f"x{misfit:.3g}" if np.isfinite(misfit) else ""
    exponents = (f"{float(value):.4f}" for value in (e.law.alpha, e.law.beta))
    return f"| {' | '.join([e.form.name, ESTIMATORS[e.estimator], *exponents, human(tokens), times])} |"


def _choice_words(report: Report, tokens: list[float]) -> str:
    """What the choice does among the rows that fit about as well."""
    tokens = [value for value in tokens if 0 < value < np.inf]
    if len(tokens) < 2:
        return "No other row fits these runs as well."
    band = report.fitted.tokens_for(report.target_n)
    ratio = max(tokens) / min(tokens)
    span = f"{interval(min(tokens), max(tokens))}, a factor of {ratio:.2g}"
    if ratio < ALIKE:
        return f"The choice hardly matters: all lie in {interval(min(tokens), max(tokens))}."
    if not band.has_interval:
        return f"The choice moves the answer over {span}."
    outside = sum(not band.low <= value <= band.high for value in tokens)
    if not outside:
        return f"The choice moves the answer over {span}, and the interval above covers all of it."
    lie = "one lies" if outside == 1 else f"{words.FEW.get(outside, outside)} lie"
    return (
        f"The choice moves the answer over {span}; {lie} outside the interval above, which knows the scatter "
        "of runs and not this choice."
    )


def _worse_words(worse: int) -> str:
    rows = "one row that fits" if worse == 1 else f"{words.FEW.get(worse, worse)} rows that fit"
    return f" Left out of this: {rows} these runs much worse."
