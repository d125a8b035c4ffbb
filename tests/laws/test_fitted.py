"""Bands against closed forms, and files that are no fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x1_pretrain.errors import UserError
from x1_pretrain.laws import fitted, forms
from x1_pretrain.laws.fitted import Fitted, read_fit
from x1_pretrain.laws.forms import Law

LAW = Law(1.8, 480.0, 0.35, 2100.0, 0.37)


def with_draws(e_sd: float = 0.0, b_sd: float = 0.0, size: int = 200_000, **changes: Any) -> Fitted:
    """E and B scatter about the law, normal in the logarithm."""
    rng = np.random.default_rng(0)
    draws = np.tile(np.array(LAW, dtype=float), (size, 1))
    draws[:, 0] *= np.exp(e_sd * rng.standard_normal(size))
    draws[:, 3] *= np.exp(b_sd * rng.standard_normal(size))
    none = np.empty((0, 5))
    one = (1e6, 1e9)
    made = Fitted(LAW, "bootstrap", draws, none, "total", 0.0, None, one, one, one, False, (), "memory")
    return replace(made, **changes)


def test_the_interval_of_a_lognormal_quantity() -> None:
    band = with_draws(e_sd=0.1).band(lambda law: law.E)
    assert band.point == pytest.approx(1.8)
    assert band.low == pytest.approx(1.8 * np.exp(-0.196), rel=3e-3)
    assert band.high == pytest.approx(1.8 * np.exp(0.196), rel=3e-3)
    assert band.has_interval


def test_tokens_for_follows_the_draws() -> None:
    # D_opt goes as B^(1/beta)
    band = with_draws(b_sd=0.05).tokens_for(1e9)
    exact = (0.37 * 2100 * 1e9**0.35 / (0.35 * 480)) ** (1 / 0.37)
    assert band.point == pytest.approx(exact)
    assert np.log(band.high / band.point) == pytest.approx(1.96 * 0.05 / 0.37, rel=0.02)


def test_a_single_runs_loss_also_scatters_about_the_law() -> None:
    fit = with_draws(e_sd=0.01, scatter=0.02)
    of_law, of_run = fit.loss(1e8, 2e9, single_run=False), fit.loss(1e8, 2e9)
    law_sd = 0.01 * 1.8 / of_law.point  # of ln L: only E scatters
    assert np.log(of_law.high / of_law.point) == pytest.approx(1.96 * law_sd, rel=0.02)
    assert np.log(of_run.high / of_run.point) == pytest.approx(1.96 * np.hypot(law_sd, 0.02), rel=0.02)
    assert np.log(of_run.point / of_run.low) == pytest.approx(1.96 * np.hypot(law_sd, 0.02), rel=0.02)


def test_sums_of_independent_errors_agree_with_simulation() -> None:
    fit = with_draws(e_sd=0.02, scatter=0.015)
    rng = np.random.default_rng(1)
    runs = forms.loss(Law.of(fit.draws), 1e8, 2e9) * np.exp(0.015 * rng.standard_normal(len(fit.draws)))
    band = fit.loss(1e8, 2e9)
    assert [band.low, band.high] == pytest.approx(np.quantile(runs, [0.025, 0.975]), rel=1e-3)


def test_the_model_error_is_how_far_the_answer_moves_without_the_largest_budget() -> None:
    other = LAW._replace(B=LAW.B * 1.3**LAW.beta)  # D_opt is 1.3 times larger
    fit = with_draws(b_sd=0.05, without_largest=other)
    band = fit.tokens_for(1e9)
    assert fit.model_error(lambda law: forms.tokens_for(law, 1e9)) == pytest.approx(np.log(1.3))
    width = 1.96 * np.hypot(0.05 / 0.37, np.log(1.3))
    assert np.log(band.high / band.point) == pytest.approx(width, rel=0.02)
    assert np.log(band.point / band.low) == pytest.approx(width, rel=0.02)
    assert with_draws().model_error(lambda law: law.E) == 0.0


def test_no_scatter_no_model_error_no_spread_is_a_point() -> None:
    band = with_draws(size=10).tokens_for(1e9)
    assert band.low == pytest.approx(band.point)
    assert band.high == pytest.approx(band.point)


def test_the_sides_of_a_skewed_interval_stay_apart() -> None:
    """Draws all above the point: the lower end is the point itself, not the lowest draw."""
    fit = with_draws(e_sd=0.1)
    above = fit.draws.copy()
    above[:, 0] = 1.8 * np.exp(np.abs(np.log(above[:, 0] / 1.8)))
    band = replace(fit, draws=above).band(lambda law: law.E)
    assert band.low == pytest.approx(1.8)
    assert band.high == pytest.approx(1.8 * np.exp(0.2241), rel=3e-3)  # 97.5 % of |z| is 2.2414


def test_of_a_posterior_the_median_is_the_point() -> None:
    fit = with_draws(e_sd=0.1, method="posterior", law=LAW._replace(E=2.5))
    assert fit.band(lambda law: law.E).point == pytest.approx(1.8, rel=2e-3)
    assert replace(fit, method="bootstrap").band(lambda law: law.E).point == pytest.approx(2.5)


def test_draws_without_an_answer_are_left_out() -> None:
    fit = with_draws(e_sd=0.1)
    fit.draws[:1000, 3] = -1.0  # no D_opt: the root of a negative number
    assert fit.tokens_for(1e9).has_interval


def test_without_draws_there_is_no_interval() -> None:
    for law in forms.PUBLISHED:
        band = fitted.published(law).tokens_for(1e9)
        assert not band.has_interval
        assert band.point == pytest.approx(float(forms.tokens_for(law.law, 1e9)))
        assert fitted.published(law).counts == law.counts


# ------------------------------------------------------------------------------------------------------------
# fit.json


def tree(**changes: Any) -> dict[str, Any]:
    values = dict(zip(forms.FIELDS, LAW, strict=True))
    return {
        "schema_version": 1,
        **{name: {"point": value, "ci95": [value, value]} for name, value in values.items()},
        "method": "bootstrap",
        "draws": [list(LAW), [1.7, 470, 0.34, 2000, 0.36]],
        "prior_draws": [],
        "N_counts": "matrices",
        "scatter": 0.004,
        "without_largest_budget": {"law": values | {"E": 1.9}, "points": 3},
        "ranges": {"N": [1e6, 2e8], "D": [1e8, 5e9], "flops": [1e15, 1e18]},
        "identifiability": {"prior_dominated": False, "reasons": ["one", "two"]},
    } | changes


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    file.write_text(json.dumps(tree()))
    fit = read_fit(file)
    assert fit.law == LAW
    assert fit.draws.tolist() == [list(LAW), [1.7, 470, 0.34, 2000, 0.36]]
    assert fit.prior_draws.shape == (0, 5)
    assert fit.without_largest == LAW._replace(E=1.9)
    assert (fit.method, fit.counts, fit.scatter) == ("bootstrap", "matrices", 0.004)
    assert (fit.n_range, fit.d_range, fit.flops_range) == ((1e6, 2e8), (1e8, 5e9), (1e15, 1e18))
    assert (fit.prior_dominated, fit.reasons, fit.origin) == (False, ("one", "two"), str(file))


def test_what_may_be_absent(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    content = tree(without_largest_budget=None, method="none", draws=[])
    del content["prior_draws"]
    file.write_text(json.dumps(content))
    fit = read_fit(file)
    assert fit.without_largest is None
    assert fit.draws.shape == fit.prior_draws.shape == (0, 5)


def lacking(key: str) -> dict[str, Any]:
    return {name: value for name, value in tree().items() if name != key}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "not valid JSON"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[1, 2]", "not a fit.json that this version reads"),
        ("{}", "'schema_version'"),
        (json.dumps(lacking("alpha")), "'alpha'"),
        (json.dumps(lacking("draws")), "'draws'"),
        (json.dumps(lacking("identifiability")), "'identifiability'"),
        (json.dumps(tree(schema_version=99)), "schema_version 99 is newer than this x1 reads (1); update x1"),
        (json.dumps(tree(B={"point": -3.0})), "the point estimate is"),
        (json.dumps(tree(E={"point": float("nan")})), "the point estimate is"),
        (json.dumps(tree(beta={"point": None})), "TypeError"),
        (json.dumps(tree(draws=[[1.0, 2.0, 3.0]])), "ValueError"),
        (json.dumps(tree(draws=[list(LAW), [1.0]])), "ValueError"),
        (json.dumps(tree(scatter="much")), "ValueError"),
        (json.dumps(tree(ranges={"N": [1, 2], "D": [1, 2]})), "'flops'"),
    ],
)
def test_no_fit_is_refused_in_one_line(tmp_path: Path, content: str | bytes, says: str) -> None:
    file = tmp_path / "fit.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_fit(file)
    message = str(caught.value)
    assert message.startswith(f"--fit {file}: ")
    assert says in message
    assert "\n" not in message


def test_no_file_says_how_to_make_one(tmp_path: Path) -> None:
    for missing in (tmp_path / "fit.json", tmp_path):
        with pytest.raises(UserError, match=r"can't be read .*fit_scaling_law --input runs.csv"):
            read_fit(missing)
