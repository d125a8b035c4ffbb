"""What a fitted law says of a size or a budget.

    x1 predict --fit fit.json --n 1B [--d 20B] [--flops 1e21] [--gpu a100-80gb --mfu 0.4]

The best number of tokens with its interval, the loss, what being off costs, how far this is from what was
measured, what published laws say, and which run to make next.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from x1_pretrain.command import run, single
from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms, prediction
from x1_pretrain.laws.fitted import Band, Fitted, published, read_fit
from x1_pretrain.laws.prediction import Beside, Beyond, Prediction
from x1_pretrain.laws.results import NextRun
from x1_pretrain.money.gate import ASSUMED_MFU
from x1_pretrain.numbers import flop, for_json, human, parse_amount, with_interval

FAR = 1.5  # times the largest fitted, from which on it is called extrapolation
Flag = typer.Option


@dataclass(frozen=True)
class Asked:
    n: float | None
    d: float | None
    flops: float | None
    usd_per_flop: float | None


def main(
    fit: Annotated[Path | None, Flag(help="a fit.json [default: the published law, refitted]")] = None,
    n: Annotated[str | None, Flag(help="parameters, as the fit counts them: 50M, 1B")] = None,
    d: Annotated[str | None, Flag(help="the loss at this many tokens, beside the best number")] = None,
    flops: Annotated[str | None, Flag(help="the best N and D for this budget of C = 6ND")] = None,
    usd_per_flop: Annotated[float | None, Flag(help="price of a training FLOP, for the next run")] = None,
    gpu: Annotated[str | None, Flag(help="the same from a GPU's list price: a100-80gb")] = None,
    mfu: Annotated[float | None, Flag(help=f"share of its peak [default: {ASSUMED_MFU}, assumed]")] = None,
    as_json: Annotated[bool, Flag("--json", help="print JSON")] = False,
) -> None:
    """What a fitted law says of a size or a budget."""
    asked = Asked(
        n=parse_amount(n, "--n") if n is not None else None,
        d=parse_amount(d, "--d") if d is not None else None,
        flops=parse_amount(flops, "--flops") if flops is not None else None,
        usd_per_flop=_usd_per_flop(usd_per_flop, gpu, mfu),
    )
    if asked.n is None and (asked.flops is None or asked.d is not None):
        raise UserError(
            "x1 predict: nothing to predict for; give --n 1B (with --d, if you like) or --flops 1e21"
        )
    fitted = published(forms.REFIT) if fit is None else read_fit(fit)
    answer = answered(fitted, asked)
    print(json.dumps(for_json(tree(answer)), indent=1) if as_json else "\n".join(lines(answer)))


@dataclass(frozen=True)
class Answer:
    fitted: Fitted
    asked: Asked
    size: Prediction | None
    at: Band | None  # the loss of one run at the N and D that were asked for
    budget: tuple[Band, Band, Band] | None  # N, D, loss
    next_runs: tuple[NextRun, ...]


def answered(fitted: Fitted, asked: Asked) -> Answer:
    return Answer(
        fitted=fitted,
        asked=asked,
        size=prediction.predict(fitted, asked.n) if asked.n else None,
        at=fitted.loss(asked.n, asked.d) if asked.n and asked.d else None,
        budget=prediction.best_for(fitted, asked.flops) if asked.flops else None,
        next_runs=_next_runs(fitted, asked),
    )


def _next_runs(fitted: Fitted, asked: Asked) -> tuple[NextRun, ...]:
    if asked.n is None or not len(fitted.draws):
        return ()
    from x1_pretrain.laws.next_run import next_runs

    return next_runs(fitted, asked.n, asked.usd_per_flop)


def _usd_per_flop(given: float | None, gpu: str | None, mfu: float | None) -> float | None:
    """The price of a FLOP: given, or a GPU's list price over what it does."""
    if given is not None and gpu is not None:
        raise UserError("--usd-per-flop and --gpu both give a price; leave one out")
    if mfu is not None and gpu is None:
        raise UserError("--mfu is a share of a GPU's peak; name the GPU with --gpu")
    if given is not None and not (math.isfinite(given) and given > 0):
        raise UserError(f"--usd-per-flop {given:g}: expected a price above zero, such as 2e-18")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g}: expected a share of the peak between 0 and 1, such as 0.4")
    return given if gpu is None else _price_on(gpu, ASSUMED_MFU if mfu is None else mfu)


def _price_on(gpu: str, mfu: float) -> float:
    from x1_pretrain.model.gpus import kind
    from x1_pretrain.money.prices import list_price

    found = kind(gpu)
    price = list_price(found.name)
    if found.peak_flops_per_sec is None or price is None:
        lacking = "peak" if found.peak_flops_per_sec is None else "price"
        raise UserError(f"--gpu {gpu}: no {lacking} is known for it; give --usd-per-flop instead")
    return float(price.usd_per_hr) / 3600 / (found.peak_flops_per_sec * mfu)


# ------------------------------------------------------------------------------------------------------------
# For a person


def lines(answer: Answer) -> list[str]:
    said = [*_law_lines(answer.fitted)]
    if answer.size is not None:
        said += ["", *_size_lines(answer.size)]
        if answer.at is not None and answer.asked.n and answer.asked.d:
            said += _at_lines(answer.fitted, answer.asked.n, answer.asked.d, answer.at)
        said += ["", *_regret_lines(answer.size), "", *_beside_lines(answer.fitted, answer.size.beside)]
    if answer.budget is not None and answer.asked.flops:
        said += ["", *_budget_lines(answer.fitted, answer.asked.flops, answer.budget)]
    if answer.next_runs:
        said += ["", *_next_lines(answer.next_runs)]
    return said


def _law_lines(fitted: Fitted) -> list[str]:
    e, a, alpha, b, beta = map(float, fitted.law)
    formula = f"L = {e:.4g} + {a:.4g} / N^{alpha:.4g} + {b:.4g} / D^{beta:.4g} nats per token"
    return [
        f"{formula}; N counts {counted(fitted)}; from {fitted.origin}",
        {
            "bootstrap": "intervals: 95 %, of the bootstrap over runs"
            + (" and the model error of leaving the largest budget out" if fitted.without_largest else ""),
            "posterior": "intervals: the middle 95 % of the posterior"
            + (", which the prior dominates: see the prior beside it" if fitted.prior_dominated else ""),
            "none": "a point only: there are no draws of this law, so nothing here has an interval",
        }[fitted.method],
        *(f"why no interval from the runs alone: {why}" for why in fitted.reasons),
    ]


def _dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 0.01 else f"${usd:.1g}"


def counted(fitted: Fitted) -> str:
    return {
        "matrices": "parameters in matrices",
        "total": "all parameters",
        "as given": "what the column N held",
    }[fitted.counts]


def _size_lines(size: Prediction) -> list[str]:
    rows = [
        ("D_opt", f"{with_interval(*size.tokens)} tokens"),
        ("D/N", with_interval(*size.per_parameter)),
        ("loss there", f"{_nats(size.loss)} nats per token{' (one run)' if size.loss.has_interval else ''}"),
        ("C = 6ND", f"{flop(size.flops)}{distance(size.beyond)}"),
    ]
    if size.prior_tokens is not None:
        rows.insert(
            1, ("prior's D_opt", f"{with_interval(*size.prior_tokens)} tokens, before any run was seen")
        )
    return [f"N = {human(size.n)}", *(f"  {name:<14}{text}" for name, text in rows)]


def _at_lines(fitted: Fitted, n: float, d: float, band: Band) -> list[str]:
    one = " (one run)" if band.has_interval else ""
    far = distance(prediction.beyond(fitted, n, d))
    return [f"  {f'at D = {human(d)}':<13} {_nats(band)} nats per token{one}; D/N = {d / n:.3g}{far}"]


def _regret_lines(size: Prediction) -> list[str]:
    said = ["tokens per parameter off, at the same FLOPs: the worse of too many and too few"]
    for found in size.regrets:
        nats, share = found.nats.point, found.wasted
        ends = f" [{share.low:.1%}, {share.high:.1%}]" if share.has_interval else ""
        said.append(
            f"  by {found.factor:g}x".ljust(16) + f"+{nats:.4f} nats = {share.point:.1%} of the compute{ends}"
        )
    return said


def _beside_lines(fitted: Fitted, beside: tuple[Beside, ...]) -> list[str]:
    same = all(other.same_count for other in beside)
    count = "as here" if same else f"here it counts {counted(fitted)}, so the question is not quite the same"
    said = [f"published laws (their N counts all parameters, {count})"]
    for other in beside:
        place = {True: "inside the interval", False: "outside the interval", None: ""}[other.inside]
        text = (
            f"D_opt {human(other.tokens)}, loss at our D_opt {other.loss:.3f}{', ' if place else ''}{place}"
        )
        said.append(f"  {other.published.name:<18}{text}")
    return said


def _budget_lines(fitted: Fitted, flops: float, budget: tuple[Band, Band, Band]) -> list[str]:
    n, d, loss = budget
    far = distance(prediction.beyond(fitted, n.point, d.point))
    return [
        f"C = 6ND = {flop(flops)}{far}",
        f"  {'best N':<14}{with_interval(*n)} parameters",
        f"  {'best D':<14}{with_interval(*d)} tokens, {d.point / n.point:.3g} a parameter",
        f"  {'loss there':<14}{_nats(loss)} nats per token",
    ]


def _next_lines(runs: tuple[NextRun, ...]) -> list[str]:
    by = "dollar" if runs[0].usd is not None else "FLOP"
    said = [f"what to run next, the most for a {by} first (what it does to the draws of D_opt, either way)"]
    for found in runs[:3]:
        cost = f"{flop(found.flops)} FLOPs" if found.usd is None else _dollars(found.usd)
        width = f"x{found.width_before:.3g} -> x{found.width_after:.3g}"
        said.append(f"  {f'{human(found.n)} on {human(found.d)}':<20}{cost:<18}{width}")
    return said


def distance(beyond: Beyond) -> str:
    """Where this lies among what was measured, to put behind a number."""
    if not beyond.known:
        return ""
    if beyond.furthest <= 1:
        return ", inside what was measured"
    if beyond.furthest <= FAR:
        return f", at the edge of what was measured ({beyond.furthest:.2g}x outside)"
    parts = [("N", beyond.n), ("D", beyond.d), ("FLOPs", beyond.flops)]
    over = ", ".join(
        f"{name} {human(ratio)}x {'below the smallest' if name in beyond.below else 'the largest'}"
        for name, ratio in parts
        if ratio > FAR
    )
    return f", an extrapolation: {over} fitted"


def _nats(band: Band) -> str:
    ends = f" [{band.low:.3f}, {band.high:.3f}]" if band.has_interval else ""
    return f"{band.point:.3f}{ends}"


# ------------------------------------------------------------------------------------------------------------
# For a program


def tree(answer: Answer) -> dict[str, Any]:
    fitted, size = answer.fitted, answer.size
    made: dict[str, Any] = {
        "fit": fitted.origin,
        "law": dict(zip(forms.FIELDS, map(float, fitted.law), strict=True)),
        "N_counts": fitted.counts,
        "interval": fitted.method,
        "prior_dominated": fitted.prior_dominated,
        "reasons": list(fitted.reasons),
    }
    if size is not None:
        made |= _size_tree(size)
    if answer.at is not None:
        made["at"] = {"N": answer.asked.n, "D": answer.asked.d, "loss": _band_tree(answer.at)}
    if answer.budget is not None:
        named = zip(("N", "D", "loss"), map(_band_tree, answer.budget), strict=True)
        made["budget"] = {"flops": answer.asked.flops, **dict(named)}
    made["next_runs"] = [vars(found) for found in answer.next_runs]
    return made


def _size_tree(size: Prediction) -> dict[str, Any]:
    return {
        "N": size.n,
        "D_opt": _band_tree(size.tokens),
        "D_per_N": _band_tree(size.per_parameter),
        "loss": _band_tree(size.loss),
        "flops_6ND": size.flops,
        "prior_D_opt": None if size.prior_tokens is None else _band_tree(size.prior_tokens),
        "times_the_largest_fitted": {"N": size.beyond.n, "D": size.beyond.d, "6ND": size.beyond.flops},
        "regret": [
            {"factor": r.factor, "nats": _band_tree(r.nats), "wasted_share": _band_tree(r.wasted)}
            for r in size.regrets
        ],
        "published": [
            {
                "name": other.published.name,
                "N_counts": other.published.counts,
                "D_opt": other.tokens,
                "loss_at_our_D_opt": other.loss,
                "inside_interval": other.inside,
                "source": other.published.source,
            }
            for other in size.beside
        ],
    }


def _band_tree(band: Band) -> dict[str, Any]:
    return {"point": band.point, "low95": band.low, "high95": band.high}


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run(app, prog="x1 predict"))
