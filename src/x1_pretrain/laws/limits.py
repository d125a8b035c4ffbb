"""What the runs behind a fit can not tell, and what was believed before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from x1_pretrain.laws import forms, words
from x1_pretrain.laws.forms import Law
from x1_pretrain.laws.prediction import Prediction
from x1_pretrain.laws.results import Posterior, Report
from x1_pretrain.numbers import human, with_interval


def cannot_tell(report: Report) -> Iterable[str]:
    """What the gate found, and what it means for the question."""
    verdict = report.verdict
    if verdict.identified:
        return
    yield "## What these runs can't tell"
    yield (
        "No interval is given from the runs alone, because a bootstrap of them would report an accuracy "
        "that is "
        "not there:"
    )
    yield "\n".join(f"- {words.sentence(why)}." for why in verdict.reasons)
    if verdict.points < 5:
        yield (
            f"Nearly every pair of exponents has a law that passes through all {words.FEW[verdict.points]} "
            "losses "
            "exactly, so an exact fit is no evidence here."
        )
    if verdict.budgets == 1:
        yield _one_budget(report)


def _one_budget(report: Report) -> str:
    """One budget shows a lowest point, and nothing of where it goes."""
    lowest = next((p for p in report.parabolas if p.inside), None)
    seen = (
        f" They do show that on this budget the best size is near {human(lowest.n_opt)} parameters."
        if lowest
        else ""
    )
    return (
        f"How the best size moves when the budget grows is exactly what D_opt({human(report.target_n)}) "
        "asks, and "
        f"on one budget no run says anything about it.{seen}"
    )


def prior_and_posterior(report: Report, found: Prediction) -> Iterable[str]:
    believed = report.posterior
    if believed is None:
        return
    yield "## Prior and posterior side by side"
    yield _prior_words(believed)
    yield _side_by_side(report)
    yield dominance(report, found)


def _prior_words(believed: Posterior) -> str:
    prior = believed.prior
    names = (
        "E",
        f"A/N^alpha at N = {human(prior.n0)}",
        f"B/D^beta at D = {human(prior.d0)}",
        "alpha",
        "beta",
    )
    parts = [
        f"{name} {centre:.3g} give or take {np.expm1(spread):.0%}"
        for name, centre, spread in zip(names, prior.centre, prior.spread, strict=True)
    ]
    return (
        f'What was believed before the first run, the prior "{prior.name}": {"; ".join(parts)} (one standard '
        f"deviation of the logarithm each); runs scatter by {prior.noise[0]:.2%} of the loss, within a "
        f"factor of {np.exp(prior.noise[1]):.2g}. Its source: {prior.source}."
    )


def _side_by_side(report: Report) -> str:
    fitted = report.fitted
    asked: tuple[tuple[str, Callable[[Law], object]], ...] = (
        ("E", lambda law: law.E),
        ("alpha", lambda law: law.alpha),
        ("beta", lambda law: law.beta),
        (f"D_opt({human(report.target_n)})", lambda law: forms.tokens_for(law, report.target_n)),
    )
    rows = []
    for name, quantity in asked:
        cells = [_middle(quantity(Law.of(draws))) for draws in (fitted.prior_draws, fitted.draws)]
        rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(["| | prior: median, middle 95 % | posterior: the same |", "|---|---|---|", *rows])


def _middle(values: object) -> str:
    low, middle, high = np.nanquantile(np.asarray(values, dtype=float), [0.025, 0.5, 0.975])
    return with_interval(float(middle), float(low), float(high))


def dominance(report: Report, found: Prediction) -> str:
    """How much of the answer the runs decided."""
    believed, prior = report.posterior, found.prior_tokens
    if believed is None or prior is None:
        return ""
    narrowed = f"from a factor of {words.factor(prior):.2g} either way to {words.factor(found.tokens):.2g}"
    share = (
        f"{believed.shrinkage:.0%} of the variance of ln D_opt({human(believed.target_n)}) under the prior"
    )
    if report.fitted.prior_dominated:
        return (
            f"The answer is prior-dominated: the runs took away {share}, narrowing it {narrowed}; where it "
            "lies within that is still what was believed beforehand, and another prior would move it."
        )
    return f"The runs decide the answer: they took away {share}, narrowing it {narrowed}."
