"""`x1 predict`: what follows from a fit.json, for a person and for a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x1_pretrain.command import run
from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import Law
from x1_pretrain.laws.predict import app

LAW = Law(1.8, 480.0, 0.35, 2100.0, 0.37)
SPREAD = 0.2  # sd of ln D_opt, at every size


def fit_tree(method: str = "bootstrap", **more: Any) -> dict[str, Any]:
    moved = np.exp(LAW.beta * SPREAD * np.random.default_rng(0).standard_normal(1000))
    rows = Law(LAW.E, LAW.A, LAW.alpha, LAW.B * moved, LAW.beta).rows()
    wide = Law(LAW.E, LAW.A, LAW.alpha, LAW.B * moved**10, LAW.beta).rows()
    return {
        "schema_version": 1,
        **{name: {"point": float(value)} for name, value in zip(forms.FIELDS, LAW, strict=True)},
        "method": method,
        "draws": [] if method == "none" else rows.tolist(),
        "prior_draws": wide.tolist() if method == "posterior" else [],
        "N_counts": "total",
        "scatter": 0.004,
        "ranges": {"N": [1e7, 1e9], "D": [1e8, 2e10], "flops": [1e17, 1e20]},
        "identifiability": {
            "prior_dominated": method == "posterior",
            "reasons": ["too few runs"] if method == "posterior" else [],
        },
    } | more


def predict(capsys: pytest.CaptureFixture[str], folder: Path, *args: str, **tree: Any) -> str:
    file = folder / "fit.json"
    file.write_text(json.dumps(fit_tree(**tree)))
    assert run(app, ["--fit", str(file), *args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert run(app, list(args)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_the_best_number_of_tokens_and_its_interval(capsys: Any, tmp_path: Path) -> None:
    said = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json"))
    best = forms.tokens_for(LAW, 1e9)
    assert said["D_opt"]["point"] == pytest.approx(best)
    half = 1.96 * SPREAD
    assert said["D_opt"]["low95"] == pytest.approx(best * np.exp(-half), rel=0.05)
    assert said["D_opt"]["high95"] == pytest.approx(best * np.exp(half), rel=0.05)
    assert said["D_per_N"]["point"] == pytest.approx(best / 1e9)
    assert said["loss"]["point"] == pytest.approx(forms.loss(LAW, 1e9, best))
    assert said["flops_6ND"] == pytest.approx(6e9 * best)
    assert said["times_the_largest_fitted"] == pytest.approx(
        {"N": 1.0, "D": best / 2e10, "6ND": 6e9 * best / 1e20}
    )
    text = predict(capsys, tmp_path, "--n", "1B")
    low, high = (said["D_opt"][end] / 1e9 for end in ("low95", "high95"))
    assert f"{best / 1e9:.3g} B [{low:.3g}, {high:.3g}] tokens" in text
    assert "N counts all parameters" in text


def test_the_model_error_widens_the_interval(capsys: Any, tmp_path: Path) -> None:
    other = LAW._replace(B=LAW.B * 2.0**LAW.beta)  # twice the tokens at every size
    held = {"law": dict(zip(forms.FIELDS, map(float, other), strict=True))}
    said = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json", without_largest_budget=held))
    half = 1.96 * np.hypot(SPREAD, np.log(2))
    assert said["D_opt"]["high95"] / said["D_opt"]["point"] == pytest.approx(np.exp(half), rel=0.05)
    assert "model error" in predict(capsys, tmp_path, "--n", "1B", without_largest_budget=held)
    assert "model error" not in predict(capsys, tmp_path, "--n", "1B")


def test_the_loss_at_a_given_number_of_tokens(capsys: Any, tmp_path: Path) -> None:
    said = json.loads(predict(capsys, tmp_path, "--n", "200M", "--d", "5 B", "--json"))["at"]
    expected = forms.loss(LAW, 2e8, 5e9)
    assert (said["N"], said["D"]) == (2e8, 5e9)
    assert said["loss"]["point"] == pytest.approx(expected)
    # of one run: at least the scatter of runs to either side
    assert said["loss"]["high95"] >= expected * np.exp(1.95 * 0.004)
    assert f"{expected:.3f} [" in predict(capsys, tmp_path, "--n", "200M", "--d", "5 B")


def test_the_best_use_of_a_budget(capsys: Any, tmp_path: Path) -> None:
    said = json.loads(predict(capsys, tmp_path, "--flops", "1e21", "--json"))["budget"]
    sizes = np.geomspace(1e8, 1e11, 20001)  # the lowest of many sizes
    losses = forms.loss(LAW, sizes, 1e21 / 6 / sizes)
    assert said["N"]["point"] == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert said["loss"]["point"] == pytest.approx(losses.min())
    assert 6 * said["N"]["point"] * said["D"]["point"] == pytest.approx(1e21)
    assert said["N"]["low95"] < said["N"]["point"] < said["N"]["high95"]
    text = predict(capsys, tmp_path, "--flops", "1e21")
    assert "D_opt" not in text
    assert "an extrapolation: " in text
    assert "FLOPs 10x the largest" in text


def test_what_being_off_costs(capsys: Any, tmp_path: Path) -> None:
    said = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json"))
    flops = said["flops_6ND"]
    for row in said["regret"]:
        n, d = forms.optimum(LAW, flops)
        best = forms.loss(LAW, n, d)
        side = row["factor"] ** 0.5
        worse = max(forms.loss(LAW, n * side, d / side), forms.loss(LAW, n / side, d * side))
        assert row["nats"]["point"] == pytest.approx(worse - best)
        # with the rest of the budget the optimum reaches the same loss
        rest = flops * (1 - row["wasted_share"]["point"])
        assert forms.loss(LAW, *forms.optimum(LAW, rest)) == pytest.approx(worse)
        assert row["wasted_share"]["low95"] <= row["wasted_share"]["point"] <= row["wasted_share"]["high95"]
    assert [row["factor"] for row in said["regret"]] == [2, 4, 10]


@pytest.mark.parametrize(
    ("n", "said"),
    [("100M", ", inside what was measured"), ("1B", "at the edge"), ("10B", "an extrapolation")],
)
def test_how_far_that_is_from_the_data(capsys: Any, tmp_path: Path, n: str, said: str) -> None:
    if n == "1B":
        top = 6e9 * forms.tokens_for(LAW, 1e9)
        ranges = {"N": [1e7, 1e9], "D": [1e8, 1e12], "flops": [1e17, top / 1.2]}
        text = predict(capsys, tmp_path, "--n", n, ranges=ranges)
    else:
        text = predict(capsys, tmp_path, "--n", n)
    line = next(line for line in text.splitlines() if "C = 6ND" in line)
    assert said in line


def test_published_laws_stand_beside_it_with_their_count(capsys: Any, tmp_path: Path) -> None:
    said = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json"))["published"]
    rounded = next(row for row in said if row["name"] == "Hoffmann rounded")
    assert rounded["D_opt"] == pytest.approx(44e9, rel=0.01)
    assert rounded["N_counts"] == "total"
    assert rounded["inside_interval"] is False
    text = predict(capsys, tmp_path, "--n", "1B")
    assert "their N counts all parameters, as here" in text
    other = predict(capsys, tmp_path, "--n", "1B", N_counts="matrices")
    assert "here it counts parameters in matrices, so the question is not quite the same" in other


def test_a_posterior_shows_its_prior_and_why(capsys: Any, tmp_path: Path) -> None:
    text = predict(capsys, tmp_path, "--n", "1B", method="posterior")
    assert "prior dominates" in text
    assert "before any run was seen" in text
    assert "why no interval from the runs alone: too few runs" in text
    said = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json", method="posterior"))
    prior, posterior = (np.log(said[k]["high95"] / said[k]["low95"]) for k in ("prior_D_opt", "D_opt"))
    assert prior == pytest.approx(10 * posterior, rel=0.01)
    plain = predict(capsys, tmp_path, "--n", "1B")
    assert "prior" not in plain


def test_without_draws_it_is_a_point_and_says_so(capsys: Any, tmp_path: Path) -> None:
    text = predict(capsys, tmp_path, "--n", "1B", "--flops", "1e20", method="none")
    assert "a point only" in text
    assert "[" not in text
    assert "nan" not in text.lower().replace("nats", "")
    said = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json", method="none"))
    assert said["D_opt"]["low95"] is None
    assert said["next_runs"] == []


def test_without_a_fit_it_is_the_published_law(capsys: Any) -> None:
    assert run(app, ["--n", "1B"]) == 0
    text = capsys.readouterr().out
    assert "Hoffmann refit" in text.splitlines()[0]
    assert "a point only" in text
    assert "22.6 B" in text


def test_the_next_run_is_named_with_its_price(capsys: Any, tmp_path: Path) -> None:
    flops = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json"))["next_runs"]
    priced = json.loads(predict(capsys, tmp_path, "--n", "1B", "--json", "--usd-per-flop", "2e-18"))
    assert flops
    assert flops[0]["usd"] is None
    for row in priced["next_runs"]:
        assert row["usd"] == pytest.approx(2e-18 * row["flops"])
    assert "first" in predict(capsys, tmp_path, "--n", "1B", "--usd-per-flop", "2e-18")
    # a GPU's price: half the share of its peak costs twice as much
    half, whole = (
        json.loads(predict(capsys, tmp_path, "--n", "1B", "--json", "--gpu", "a100-80gb", "--mfu", mfu))
        for mfu in ("0.2", "0.4")
    )
    per_flop = [tree["next_runs"][0]["usd"] / tree["next_runs"][0]["flops"] for tree in (half, whole)]
    assert per_flop[0] == pytest.approx(2 * per_flop[1])
    assert 1e-18 < per_flop[1] < 1e-17  # $0.5 to $4.5 an hour at 312e12 x 0.4


def test_what_can_not_be_asked_is_one_line(capsys: Any, tmp_path: Path) -> None:
    assert "give --n 1B" in refused(capsys)
    assert "give --n 1B" in refused(capsys, "--flops", "1e21", "--d", "1B")
    assert "--n -1B: expected a positive amount" in refused(capsys, "--n=-1B")
    assert "--d many" in refused(capsys, "--n", "1B", "--d", "many")
    assert "leave one out" in refused(capsys, "--n", "1B", "--usd-per-flop", "1e-18", "--gpu", "h100")
    assert "name the GPU" in refused(capsys, "--n", "1B", "--mfu", "0.4")
    assert "--mfu 40" in refused(capsys, "--n", "1B", "--gpu", "h100", "--mfu", "40")
    assert "--usd-per-flop -1" in refused(capsys, "--n", "1B", "--usd-per-flop=-1")
    assert "no GPU is called 'z80'" in refused(capsys, "--n", "1B", "--gpu", "z80")
    assert "none.json: can't be read" in refused(capsys, "--n", "1B", "--fit", str(tmp_path / "none.json"))


def test_it_starts_without_the_heavy_libraries(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    file.write_text(json.dumps(fit_tree()))
    code = (
        "import sys; from x1_pretrain.command import run; from x1_pretrain.laws.predict import app\n"
        f"assert run(app, ['--fit', {str(file)!r}, '--n', '1B', '--flops', '1e21']) == 0\n"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'pandas') if m in sys.modules], file=sys.stderr)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stderr.strip() == "[]"
