"""A fitted law with its uncertainty: `fit.json`, and the intervals that follow from it.

An interval has up to three parts: the draws (bootstrap replicates or posterior), the model error (how far
the prediction moves when the largest budget is left out of the fit), and for a single run's loss the
scatter of runs about the law. They are added in quadrature, in logarithms.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import F64, Counts, Law

SCHEMA_VERSION = 1
KIND = "scaling-law-fit"
KEPT_DRAWS = 4000  # as many are used and kept in the file, so that both give the same intervals
Z95 = 1.959963984540054


class Band(NamedTuple):
    """A value with its 95 % interval; without one, low and high are NaN."""

    point: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


@dataclass(frozen=True)
class Fitted:
    """What `x1 predict` and `x1 plan` know of a law."""

    law: Law  # the point estimate: optimum of the reported estimator, or the posterior's centre
    method: Literal["bootstrap", "posterior", "none"]  # what the draws are
    draws: F64  # (R, 5): E, A, alpha, B, beta a row; (0, 5) for none
    prior_draws: F64  # (P, 5), of the posterior; (0, 5) else
    counts: Counts  # what N counts
    scatter: float  # sd of a run's ln L about the law
    without_largest: Law | None  # the law fitted without the largest budget
    n_range: tuple[float, float]
    d_range: tuple[float, float]
    flops_range: tuple[float, float]  # of 6ND
    prior_dominated: bool
    reasons: tuple[str, ...]  # why no frequentist interval, where there is none
    origin: str

    def band(self, quantity: Callable[[Law], Any], scatter: float = 0.0) -> Band:
        """A positive quantity of the law with its 95 % interval; of a posterior the median is the point."""
        point = float(quantity(self.law))
        if not len(self.draws):
            return Band(point, np.nan, np.nan)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            logs = np.log(np.asarray(quantity(Law.of(self.draws)), dtype=float))
        low, middle, high = np.nanquantile(logs, [0.025, 0.5, 0.975])
        error = scatter**2 + self.model_error(quantity) ** 2
        if not np.isfinite(error):  # without the largest budget there is no answer at all
            return Band(point, np.nan, np.nan)
        centre = middle if self.method == "posterior" else np.log(point)
        down = np.hypot(max(centre - low, 0.0), Z95 * error**0.5)
        up = np.hypot(max(high - centre, 0.0), Z95 * error**0.5)
        return Band(*(float(np.exp(centre + by)) for by in (0.0, -down, up)))

    def model_error(self, quantity: Callable[[Law], Any]) -> float:
        """How far ln(quantity) moves when the largest budget is left out; 0 where that was not fitted."""
        if self.without_largest is None:
            return 0.0
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            moved = float(np.log(quantity(self.without_largest) / quantity(self.law)))
        return abs(moved) if np.isfinite(moved) else np.inf

    def tokens_for(self, n: float) -> Band:
        """D_opt(N)."""
        return self.band(lambda law: forms.tokens_for(law, n))

    def loss(self, n: float, d: float, single_run: bool = True) -> Band:
        """The loss at (N, D): of one run (with the scatter of runs), or of the law itself."""
        return self.band(lambda law: forms.loss(law, n, d), self.scatter if single_run else 0.0)


def published(which: forms.Published) -> Fitted:
    """A published law as a `Fitted`: a point, no draws."""
    nowhere = (np.nan, np.nan)
    none = np.empty((0, 5))
    law, counts, name = which.law, which.counts, which.name
    return Fitted(law, "none", none, none, counts, 0.0, None, nowhere, nowhere, nowhere, False, (), name)


# ------------------------------------------------------------------------------------------------------------
# fit.json


def read_fit(file: Path) -> Fitted:
    """A `fit.json` that `fit_scaling_law` wrote; anything else is refused in one line."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--fit {file}: can't be read ({error.strerror}); make it with "
            "`python -m x1_pretrain.fit_scaling_law --input runs.csv --output fit.json`"
        ) from None
    except ValueError as error:
        raise UserError(f"--fit {file}: not valid JSON ({error})") from None
    try:
        return _fitted(tree, str(file))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--fit {file}: not a fit.json that this version reads ({type(error).__name__}: {error}); make "
            "it anew with `python -m x1_pretrain.fit_scaling_law`"
        ) from None


def _fitted(tree: dict[str, Any], origin: str) -> Fitted:
    if tree["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"--fit {origin}: schema_version {tree['schema_version']} is newer than this x1 reads "
            f"({SCHEMA_VERSION}); update x1"
        )
    law = Law(*(float(tree[field]["point"]) for field in forms.FIELDS))
    _refuse_no_law(np.array([law]), "the point estimate")
    if tree.get("kind", KIND) != KIND:
        raise ValueError(f"kind is {tree['kind']!r}, expected {KIND!r}")
    for key, known in (("method", ("bootstrap", "posterior", "none")), ("N_counts", get_args(Counts))):
        if tree[key] not in known:
            raise ValueError(f"{key} is {tree[key]!r}, expected one of {', '.join(known)}")
    held_out = tree.get("without_largest_budget")
    ranges = [tuple(map(float, tree["ranges"][key])) for key in ("N", "D", "flops")]
    if not all(0 < low <= high < np.inf for low, high in ranges):
        raise ValueError(f"ranges are {tree['ranges']}, expected [smallest, largest] each")
    scatter, draws = float(tree["scatter"]), _rows(tree["draws"])
    if not 0 <= scatter < np.inf:
        raise ValueError(f"scatter is {scatter}")
    if (tree["method"] == "none") != (len(draws) == 0):
        raise ValueError(f"{len(draws)} draws of method {tree['method']}")
    _refuse_no_law(draws, "a draw")
    if held_out:
        _refuse_no_law(
            np.array([[held_out["law"][f] for f in forms.FIELDS]], dtype=float), "the held-out law"
        )
    if not isinstance(tree["identifiability"]["reasons"], list):
        raise ValueError("identifiability.reasons is no list")
    return Fitted(
        law=law,
        method=tree["method"],
        draws=draws,
        prior_draws=_rows(tree.get("prior_draws", [])),
        counts=tree["N_counts"],
        scatter=scatter,
        without_largest=Law(*(float(held_out["law"][f]) for f in forms.FIELDS)) if held_out else None,
        n_range=(ranges[0][0], ranges[0][1]),
        d_range=(ranges[1][0], ranges[1][1]),
        flops_range=(ranges[2][0], ranges[2][1]),
        prior_dominated=bool(tree["identifiability"]["prior_dominated"]),
        reasons=tuple(tree["identifiability"]["reasons"]),
        origin=origin,
    )


def _refuse_no_law(rows: F64, what: str) -> None:
    """E at least 0, the rest above, all finite, exponents below anything that was ever fitted."""
    wrong = ~np.isfinite(rows).all(axis=1) | (rows[:, 0] < 0) | (rows[:, 1:] <= 0).any(axis=1)
    wrong |= (rows[:, [2, 4]] > 100).any(axis=1)
    if wrong.any():
        raise ValueError(f"{what} is {tuple(map(float, rows[wrong][0]))}")


def _rows(rows: Any) -> F64:
    if any(len(row) != len(forms.FIELDS) for row in rows):
        raise ValueError(f"a draw that is not {len(forms.FIELDS)} numbers")
    return np.asarray(rows, dtype=float).reshape(-1, len(forms.FIELDS))
