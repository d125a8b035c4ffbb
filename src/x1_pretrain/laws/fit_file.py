"""`fit.json`: the fit as others read it. The numbers first, the draws last, one a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.laws.fitted import KIND, SCHEMA_VERSION, Band
from x1_pretrain.laws.fitting import predicted
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.results import Estimate, HeldOut, Posterior, Report
from x1_pretrain.numbers import for_json
from x1_pretrain.records.metrics import utc_now

HUBER = "Huber(1e-3) on ln L, summed"
MIDDLE = "the draw nearest the middle of the posterior; D_opt and losses are its medians"


def tree(report: Report) -> dict[str, Any]:
    """All but the draws."""
    fitted, points = report.fitted, report.points
    interval = "ci95" if fitted.method == "bootstrap" else "posterior95"
    fields = zip(forms.FIELDS, report.parameters, strict=True)
    parameters = {name: {"ci95": None} | _band(band, interval) for name, band in fields}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        **parameters,
        "form": "L = E + A / N^alpha + B / D^beta, nats per token",
        "N_counts": points.counts,
        "method": fitted.method,
        "estimator": HUBER if fitted.method == "bootstrap" else MIDDLE,
        "objective": report.best.objective,
        "n": len(points),
        "clusters": points.clusters,
        "replicates": report.replicates,
        "scatter": fitted.scatter,
        "identifiability": _verdict(report),
        "predictions": _predictions(report),
        "robustness": [_estimate(report.best), *map(_estimate, report.others)],
        "without_largest_budget": _held_out(report.held_out),
        "prior": _prior(report.posterior),
        "isoflop_parabolas": [vars(parabola) for parabola in report.parabolas],
        "next_runs": [vars(run) for run in report.next_runs],
        "ranges": {"N": fitted.n_range, "D": fitted.d_range, "flops": fitted.flops_range},
        "data": {"file": points.origin, "sha256": points.sha256, "notes": points.notes},
        "flops": points.flops_basis,
        "written_utc": utc_now(),
    }


def text(report: Report) -> str:
    """The whole file. JSON has no NaN: what is not known is null."""
    head = json.dumps(for_json(tree(report)), indent=1)
    draws = f'"draws": {_rows(report.fitted.draws)}'
    prior = f'"prior_draws": {_rows(report.fitted.prior_draws)}'
    return f"{head[:-2]},\n {draws},\n {prior}\n}}\n"


def write(report: Report, file: Path) -> None:
    whole(file, lambda new: new.write_text(text(report), encoding="utf-8"))


def whole(file: Path, fill: Callable[[Path], object]) -> None:
    """The old content or the new one, never a half, and nothing left over."""
    new = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fill(new)
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise UserError(
            f"--output {file}: can't be written ({error.strerror or error}); make room or name another place"
        ) from None


def _ends(band: Band) -> list[float] | None:
    return [band.low, band.high] if band.has_interval else None


def _band(band: Band, interval: str) -> dict[str, Any]:
    return {"point": band.point, interval: _ends(band)}


def _law(law: Law) -> dict[str, float]:
    return dict(zip(forms.FIELDS, map(float, law), strict=True))


def _verdict(report: Report) -> dict[str, Any]:
    verdict = report.verdict
    return {
        "identified": verdict.identified,
        "reasons": verdict.reasons,
        "budgets": verdict.budgets,
        "rank": verdict.rank,
        "condition": verdict.condition,
        "residual_sd": verdict.residual_sd,
        "prior_dominated": report.fitted.prior_dominated,
    }


def _predictions(report: Report) -> dict[str, Any]:
    """D_opt, tokens a parameter and the loss there, at the size that was asked for and at a billion."""
    interval = "ci95" if report.fitted.method == "bootstrap" else "posterior95"
    found = {}
    for n in dict.fromkeys((1e9, report.target_n)):
        bands = predicted(report.fitted, n)
        found[f"{n:.6g}"] = {name: _band(band, interval) for name, band in bands.items()}
    return found


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "form": estimate.form.name,
        "estimator": estimate.estimator,
        "objective": estimate.objective,
        "agreeing_starts": f"{estimate.agreeing:.0%} of {estimate.starts}",
        **_law(estimate.law),
        "D_opt_1e9": float(forms.tokens_for(estimate.law, 1e9)),
    }


def _held_out(held_out: HeldOut | None) -> dict[str, Any] | None:
    return None if held_out is None else vars(held_out) | {"law": _law(held_out.law)}


def _prior(posterior: Posterior | None) -> dict[str, Any] | None:
    if posterior is None:
        return None
    more = {"effective_draws": posterior.effective, "shrinkage_of_ln_D_opt": posterior.shrinkage}
    return vars(posterior.prior) | more


def _rows(draws: F64) -> str:
    rows = ",\n  ".join("[" + ", ".join(f"{value:.7g}" for value in row) + "]" for row in draws)
    return f"[\n  {rows}\n ]" if rows else "[]"
