"""The page about a fit says what its numbers say, and nothing else. `build` makes reports by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from x1_pretrain.laws import forms, prose
from x1_pretrain.laws.fitted import Band, Fitted
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.points import Points, budgets, points
from x1_pretrain.laws.results import (
    HOFFMANN,
    TIED,
    Estimate,
    Form,
    HeldOut,
    NextRun,
    Parabola,
    Posterior,
    Prior,
    Report,
    Verdict,
)

LAW = Law(1.8, 480.0, 0.35, 2100.0, 0.37)
REASON = "3 points for 5 numbers: infinitely many laws pass through them"


def grid(flops: tuple[float, ...] = (1e19, 1e20, 1e21)) -> Points:
    """Five sizes about the optimum of each budget, on the law."""
    n = np.concatenate([forms.optimum(LAW, c)[0] * 2.0 ** np.arange(-2, 3) for c in flops])
    d = np.repeat(flops, 5) / (6 * n)
    return points(n, d, forms.loss(LAW, n, d))


def lab() -> Points:
    return points([5e6, 25e6, 1e8], [4.5e9, 9e8, 2.25e8], [4.66, 4.40, 4.48])


def cloud(law: Law, spread: float, count: int = 400) -> F64:
    """Draws whose D_opt scatters by `spread` in ln, at every size: only B moves."""
    moved = np.exp(law.beta * spread * np.random.default_rng(0).standard_normal(count))
    return Law(law.E, law.A, law.alpha, law.B * moved, law.beta).rows()


def estimate(law: Law = LAW, **more: Any) -> Estimate:
    return replace(Estimate(law, HOFFMANN, "huber", 1e-3, 64, 0.95), **more)


def build(
    data: Points | None = None,
    method: Literal["bootstrap", "posterior", "none"] = "bootstrap",
    spread: float = 0.1,
    target_n: float = 1e9,
    law: Law = LAW,
    dominated: bool = False,
    **more: Any,
) -> Report:
    data = grid() if data is None else data
    draws = np.empty((0, 5)) if method == "none" else cloud(law, spread)
    prior = cloud(law, 2.0) if method == "posterior" else np.empty((0, 5))
    identified = method == "bootstrap"
    number = int(budgets(data.flops).max()) + 1
    reasons = () if identified else (REASON,)
    scatter = 0.004 if len(data) > 5 else float("nan")
    ranges = [(float(v.min()), float(v.max())) for v in (data.n, data.d, data.flops)]
    fitted = Fitted(law, method, draws, prior, data.counts, 0.004, None, *ranges, dominated, reasons, "here")
    report = Report(
        points=data,
        best=estimate(law),
        others=(),
        verdict=Verdict(identified, reasons, len(data), data.clusters, number, 5, 1e5, scatter),
        fitted=fitted,
        parameters=tuple(Band(float(p), float(p) * 0.9, float(p) * 1.1) for p in law),  # type: ignore[arg-type]
        held_out=None,
        posterior=None if method != "posterior" else _posterior(draws, prior),
        parabolas=(),
        next_runs=(),
        target_n=target_n,
        replicates=400,
        seconds=0.1,
    )
    return replace(report, **more)


def _posterior(draws: F64, prior: F64) -> Posterior:
    believed = Prior(
        name="published",
        n0=1e8,
        d0=2e9,
        centre=(1.8, 0.8, 0.8, 0.35, 0.34),
        spread=(0.3, 0.4, 0.4, 0.17, 0.2),
        noise=(0.006, 0.6),
        source="three laws",
    )
    return Posterior(believed, draws, prior, np.full(len(draws), 0.006), 350.0, 1e9, 0.72)


def page(report: Report) -> str:
    """The page, its lines joined: sentences are looked for, not where they wrap."""
    return " ".join(prose.page(report).split())


# ------------------------------------------------------------------------------------------------------------
# The answer


def test_the_prediction_its_interval_and_its_ratio() -> None:
    report = build()
    tokens = report.fitted.tokens_for(1e9)
    text = page(report)
    best = forms.tokens_for(LAW, 1e9)
    assert f"on {best / 1e9:.1f} B tokens, {best / 1e9:.1f} a parameter" in text
    assert f"the 95 % interval is {tokens.low / 1e9:.1f} B to {tokens.high / 1e9:.1f} B" in text
    assert f"= {6e9 * best:.3g}".replace("e+", "e") in text
    assert f"end at {forms.loss(LAW, 1e9, best):.3f} [" in text
    assert "posterior" not in text.lower()


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        (0.05, "narrow enough to plan by"),
        (0.3, "flat enough to plan by it"),
        (0.8, "order of size, no more"),
        (1.5, "do not settle the question"),
    ],
)
def test_the_width_decides_the_words(spread: float, said: str) -> None:
    text = page(build(spread=spread))
    assert said in text
    assert sum(words in text for words in ("narrow enough", "flat enough", "no more.", "do not settle")) == 1


def test_what_was_fitted_is_counted() -> None:
    text = page(build())
    assert "15 runs on three budgets, 1e19 to 1e21 FLOPs (counted as 6ND)" in text
    assert "What N counts the file does not say" in text
    data = grid()
    trunks = replace(data, cluster=np.arange(15) // 5, counts="matrices", notes=("mind",))
    trunks = replace(trunks, flops_basis="as measured")
    text = page(build(trunks))
    assert "15 points of three runs" in text
    assert "(as measured)" in text
    assert "without embeddings" in text
    assert "- mind." in text


def test_budgets_that_run_together_are_not_counted() -> None:
    n = np.geomspace(1e7, 1e9, 40)
    data = points(n, 20 * n, forms.loss(LAW, n, 20 * n))
    assert "40 runs, 1.2e16 to 1.2e20 FLOPs" in page(build(data))


def test_without_draws_there_is_no_interval() -> None:
    text = page(build(method="none"))
    assert "no interval is known" in text
    assert "95 %" not in text.split("## What it rests on")[0]


# ------------------------------------------------------------------------------------------------------------
# What the points can not tell


def test_three_points_of_one_budget() -> None:
    bowl = Parabola(1.35e17, 3, 33.7e6, 4.39, True, (0.01, -0.35, 4.5))
    text = page(build(lab(), "posterior", spread=1.0, dominated=True, parabolas=(bowl,)))
    assert "prior-dominated" in text.split("##")[0]
    assert "## What these runs can't tell" in text
    assert REASON in text
    assert "passes through all three losses exactly" in text
    assert "on one budget no run says anything about it" in text
    assert "on this budget the best size is near 33.7 M parameters" in text
    assert "19 chances in 20" in text
    assert "how far runs scatter about a law can't be seen" in text
    assert "95 % interval is" not in text


def test_prior_and_posterior_stand_side_by_side() -> None:
    report = build(lab(), "posterior", spread=0.8, dominated=True)
    text = prose.page(report)
    row = next(line for line in text.splitlines() if line.startswith("| D_opt(1 B)"))
    prior, posterior = row.split("|")[2:4]
    best = forms.tokens_for(LAW, 1e9) / 1e9
    for cell, spread in ((prior, 2.0), (posterior, 0.8)):
        middle = float(cell.split()[0])
        assert middle == pytest.approx(best, rel=3 * spread / 20)
    said = page(report)
    assert 'the prior "published": E 1.8 give or take 35%' in said
    assert "took away 72% of the variance" in said
    assert "still what was believed beforehand" in said
    decided = page(build(lab(), "posterior", spread=0.2))
    assert "The runs decide the answer" in decided
    assert "prior-dominated" not in decided


def test_enough_points_have_no_such_section() -> None:
    text = page(build())
    for words in ("can't tell", "believed", "exact fit"):
        assert words not in text


# ------------------------------------------------------------------------------------------------------------
# Beside others


def test_a_published_number_inside_and_outside() -> None:
    inside = page(build(spread=0.3))
    assert "and inside the interval" in inside
    published = forms.tokens_for(forms.REFIT.law, 1e9)
    near = LAW._replace(B=LAW.B * (published / 3 / forms.tokens_for(LAW, 1e9)) ** LAW.beta)
    below = build(spread=0.05, law=near)
    high = below.fitted.tokens_for(1e9).high
    assert f"outside the interval: {published / high:.2g} times its upper end" in page(below)
    above = page(build(spread=0.05, law=LAW._replace(B=LAW.B * 2)))
    assert "outside the interval: its lower end is" in above
    assert "None of the five lies inside" in above
    assert "None of" not in inside
    wide = page(build(lab(), "posterior", spread=2.0))
    assert "All five lie inside the interval" in wide


def test_another_count_is_said() -> None:
    matrices = page(build(replace(grid(), counts="matrices")))
    total = page(build(replace(grid(), counts="total")))
    assert "this is not the same question: at small sizes" in matrices
    assert "not the same question" not in total


def test_how_the_answer_depends_on_the_choice() -> None:
    def with_d_opt(factor: float, **more: Any) -> Estimate:
        return estimate(LAW._replace(B=LAW.B * factor**LAW.beta), **more)

    lad = with_d_opt(1.02, estimator="lad")
    same = page(build(others=(lad,)))
    assert "The choice hardly matters" in same
    moved = page(build(others=(lad, with_d_opt(2.0, form=TIED)), spread=0.1))
    assert "a factor of 2; one lies outside the interval above" in moved
    covered = page(build(others=(lad, with_d_opt(2.0, form=TIED)), spread=0.8))
    assert "the interval above covers all of it" in covered
    bad = with_d_opt(5.0, form=Form("alpha=0.2", alpha=0.2), objective=9e-3)
    left_out = page(build(others=(lad, bad)))
    assert "| alpha=0.2 |" in left_out
    assert "x9 |" in left_out
    assert "The choice hardly matters" in left_out
    assert "Left out of this: one row that fits these runs much worse" in left_out


# ------------------------------------------------------------------------------------------------------------
# How far, how flat, what next


@pytest.mark.parametrize(
    ("times", "said", "unsaid"),
    [
        (0.5, "lie inside what was measured", "extrapolates"),
        (1.3, "at the edge of what was measured: at most 1.3 times outside", "extrapolates"),
        (3.0, "3 times the largest FLOPs of the runs.", "small error of an exponent"),
        (100, "100 times the largest FLOPs of the runs. At such a distance", "inside what was measured"),
    ],
)
def test_the_warning_depends_on_the_distance(times: float, said: str, unsaid: str) -> None:
    top = 6e9 * float(forms.tokens_for(LAW, 1e9)) / times
    text = page(build(grid((top / 100, top / 10, top))))
    assert said in text
    assert unsaid not in text


def test_the_distance_is_in_numbers() -> None:
    report = build(target_n=2e10)
    far = 2e10 / report.points.n.max()
    assert f"{far:.3g} times the largest N" in page(report)


@pytest.mark.parametrize(
    ("bias", "rms", "said"),
    [
        (0.0005, 0.004, "as well as it fits the others (bias +0.05%, rms 0.40%)"),
        (0.0200, 0.021, "2.00% too high on average (rms 2.10%, 5.2 times the scatter of the fit)"),
        (-0.020, 0.021, "2.00% too low on average"),
        (0.0010, 0.012, "with little bias (+0.10%), but 3 times as far off as it fits"),
    ],
)
def test_leaving_the_largest_budget_out(bias: float, rms: float, said: str) -> None:
    other = LAW._replace(B=LAW.B * 1.5**LAW.beta)
    text = page(build(held_out=HeldOut(other, 5, 1e20, 1e21, bias, rms)))
    assert said in text
    assert "without the five points of the most FLOPs, up to 1e20 instead of 1e21" in text
    assert "1.5 times the number above" in text
    assert "leaves too little to fit" in page(build())


def test_what_being_off_costs() -> None:
    c = 6e9 * forms.tokens_for(LAW, 1e9)
    text = page(build())
    for factor in (2.0, 4.0, 10.0):
        nats, share = forms.regret(LAW, c, factor)
        assert f"{factor:g} times off wastes {share:.0%} ({nats:.4f} nats)" in text


def test_the_next_run_by_dollars_or_flops() -> None:
    run = NextRun(50e6, 2e9, 3.5, 6e17, 3.0, 1.5)
    text = page(build(next_runs=(run,)))
    assert "50 M parameters on 2 B tokens ($3.50) narrows the interval most for a dollar" in text
    assert "from a factor of 3 either way to 1.5" in text
    unpriced = page(build(next_runs=(replace(run, usd=None),)))
    assert "(6e17 FLOPs) narrows the interval most for a FLOP" in unpriced
    vain = page(build(next_runs=(replace(run, width_after=2.99),)))
    assert "No single run of those considered narrows the interval" in vain
    assert "## What to run next" not in page(build())


def test_the_second_opinion_agrees_or_does_not() -> None:
    bowls = [
        Parabola(c, 5, float(forms.optimum(LAW, c)[0]) * f, 3.0, True, (0.1, 0.0, 0.0))
        for c, f in ((1e19, 1.0), (1e20, 1.1))
    ]
    assert "agree with the law: at most by 10% in N" in page(build(parabolas=tuple(bowls)))
    off = replace(bowls[0], n_opt=bowls[0].n_opt * 2)
    assert "differ from the law: at most by 100% in N" in page(build(parabolas=(off,)))
    outside = replace(bowls[0], inside=False)
    said = page(build(parabolas=(outside, replace(outside, n_opt=float("nan")))))
    assert "not between its sizes" in said
    assert "opens downwards" in said
    assert "the parabolas say nothing" in said


# ------------------------------------------------------------------------------------------------------------
# Form


def test_lines_fit_and_hold_no_holes() -> None:
    for report in (build(), build(lab(), "posterior", dominated=True), build(method="none")):
        text = prose.page(report)
        assert all(len(line) <= 110 for line in text.splitlines() if not line.startswith(("|", "#")))
        assert "nan" not in text.lower().split()
        assert "None " not in text.replace("None of the", "")
        assert ".." not in text.replace("...", "")
        assert "\n\n\n" not in text


def test_the_summary_is_short_and_agrees() -> None:
    report = build(lab(), "posterior", spread=1.0, dominated=True)
    said = prose.summary(report)
    assert said.splitlines()[0] == prose.page(report).splitlines()[0].removeprefix("# ")
    assert REASON in said
    assert "prior-dominated" in said
    assert len(said.splitlines()) < 12
    assert "no interval from the runs" not in prose.summary(build())
