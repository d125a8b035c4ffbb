"""`python -m x1_pretrain.fit_scaling_law` as a user runs it: the three files, and what they may not say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x1_pretrain import fit_scaling_law
from x1_pretrain.command import run
from x1_pretrain.laws import forms
from x1_pretrain.laws.fitted import read_fit
from x1_pretrain.laws.fitting import centre, usd_per_flop
from x1_pretrain.laws.forms import Law
from x1_pretrain.laws.points import points

TRUTH = Law(1.8, 480.0, 0.35, 2000.0, 0.37)
LAB = "run_id,N,D,val_loss,usd_spent\nA,5M,4.5B,4.66,1.1\nB,25M,900M,4.40,.9\nC,100M,225M,4.48,.9\n"


def fit(tmp_path: Path, text: str, *more: str) -> tuple[int, dict[str, Any]]:
    file, output = tmp_path / "runs.csv", tmp_path / "out" / "fit.json"
    file.write_text(text, encoding="utf-8")
    args = ["--input", str(file), "--output", str(output), "--no-picture", *more]
    code = run(fit_scaling_law.app, args, prog="fit")
    return code, json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}


def grid(ratios: list[float], noise: float = 0.003) -> str:
    """Runs of the true law on budgets that are far apart."""
    rng = np.random.default_rng(5)
    rows = ["run_id,N,D,val_loss"]
    for budget in (1e17, 1e18, 1e19):
        for k, ratio in enumerate(ratios):
            n = (budget / 6 / 20) ** 0.5 * ratio
            d = budget / 6 / n
            rows.append(f"r{budget:g}-{k},{n},{d},{forms.loss(TRUTH, n, d) * np.exp(rng.normal(0, noise))}")
    return "\n".join(rows) + "\n"


def test_the_published_command_on_the_labs_three_points(tmp_path: Path) -> None:
    """Three points identify nothing: no frequentist interval anywhere, a posterior that says it is one."""
    code, found = fit(tmp_path, LAB, "--bootstrap", "1000")
    assert code == 0
    for field in forms.FIELDS:
        assert found[field]["ci95"] is None
        low, high = found[field]["posterior95"]
        assert low < found[field]["point"] < high
    assert found["method"] == "posterior"
    assert found["replicates"] == 0
    verdict = found["identifiability"]
    assert not verdict["identified"]
    assert verdict["prior_dominated"]
    assert any("3 points" in reason for reason in verdict["reasons"])
    low, high = found["predictions"]["1e+09"]["D_opt"]["posterior95"]
    assert 4e9 < low < 1e10 < 1.5e11 < high < 4e11  # by another sampler: [7, 257] B
    assert found["prior"]["name"] == "published"
    page = (tmp_path / "out" / "prediction.md").read_text(encoding="utf-8")
    assert "prior-dominated" in page
    assert "What these runs can't tell" in page


def test_the_posteriors_law_passes_by_the_points(tmp_path: Path) -> None:
    """Medians taken parameter by parameter would miss them by several hundredths of a nat."""
    fit(tmp_path, LAB)
    law = read_fit(tmp_path / "out" / "fit.json").law
    told = forms.loss(law, np.array([5e6, 25e6, 1e8]), np.array([4.5e9, 9e8, 2.25e8]))
    assert told == pytest.approx([4.66, 4.40, 4.48], abs=0.02)


def test_the_middle_draw_is_the_middle_one() -> None:
    """Of laws that differ in one number only, the one with the median of it."""
    values = np.array([1.0, 1.5, 1.8, 1.9, 3.0])
    draws = np.stack([[e, 400.0, 0.34, 410.0, 0.28] for e in values])
    assert centre(draws, points([1e7, 1e8], [1e9, 1e9], [3.0, 2.9])).E == 1.8


def test_three_budgets_pin_the_truth_down(tmp_path: Path) -> None:
    code, found = fit(tmp_path, grid([0.25, 0.5, 1.0, 2.0, 4.0]), "--bootstrap", "1000")
    assert code == 0
    assert found["method"] == "bootstrap"
    assert found["identifiability"]["identified"]
    for field, true in zip(forms.FIELDS, TRUTH, strict=True):
        low, high = found[field]["ci95"]
        assert low < found[field]["point"] < high
        assert low * 0.98 < true < high * 1.02, field
    low, high = found["predictions"]["1e+09"]["D_opt"]["ci95"]
    assert low < forms.tokens_for(TRUTH, 1e9) < high
    assert len(found["draws"]) == 1000
    assert found["without_largest_budget"]["points"] == 5


def test_predict_reads_the_numbers_that_fit_wrote(tmp_path: Path) -> None:
    _, found = fit(tmp_path, grid([0.25, 0.5, 1.0, 2.0, 4.0]), "--n", "3B")
    told = found["predictions"]["3e+09"]["D_opt"]
    band = read_fit(tmp_path / "out" / "fit.json").tokens_for(3e9)
    assert band.point == pytest.approx(told["point"], rel=1e-9)
    assert [band.low, band.high] == pytest.approx(told["ci95"], rel=1e-4)  # draws are kept to seven digits


def test_trunks_are_clusters(tmp_path: Path) -> None:
    """24 points of three trunks are three independent runs: too few for a bootstrap over runs."""
    rng, rows = np.random.default_rng(1), ["run_id,N,D,val_loss,trunk"]
    for name, n, d in (("A", 5e6, 4.5e9), ("B", 25e6, 9e8), ("C", 1e8, 2.25e8)):
        for k, part in enumerate(np.geomspace(0.05, 1, 8)):
            nats = forms.loss(TRUTH, n, d * part) * np.exp(rng.normal(0, 0.003))
            rows.append(f"{name}{k},{n},{d * part},{nats},{name}")
    _, found = fit(tmp_path, "\n".join(rows) + "\n")
    assert (found["n"], found["clusters"], found["method"]) == (24, 3, "posterior")
    assert any("3 independent runs" in reason for reason in found["identifiability"]["reasons"])
    low, high = found["predictions"]["1e+09"]["D_opt"]["posterior95"]
    assert low < forms.tokens_for(TRUTH, 1e9) < high
    assert high / low < 20  # the lab's three points alone leave a factor of 40


def test_the_chinchilla_points(tmp_path: Path, shared: Path) -> None:
    text = (shared / "scaling" / "chinchilla_ndl.csv").read_text(encoding="utf-8")
    code, found = fit(tmp_path, text)
    assert code == 0
    got = [found[field]["point"] for field in forms.FIELDS]
    assert got == pytest.approx([1.817218, 477.826, 0.347310, 2143.417, 0.367172], rel=2e-5)
    assert found["objective"] == pytest.approx(0.001018274018, rel=1e-7)
    by_name = {(row["form"], row["estimator"]): row for row in found["robustness"]}
    lad = by_name["hoffmann", "lad"]
    assert [lad["A"], lad["B"]] == pytest.approx([482.01, 2085.43], rel=1e-4)  # as Besiroglu et al. print
    low, high = found["predictions"]["1e+09"]["D_opt"]["ci95"]
    boot = np.nanquantile(forms.tokens_for(Law.of(np.array(found["draws"])), 1e9), [0.025, 0.975])
    assert low < boot[0] < boot[1] < high  # the model error widens it
    assert found["n"] == 240


def test_what_a_run_cost_is_per_flop_of_6nd() -> None:
    from dataclasses import replace

    some = points([1e6, 1e6], [1e8, 2e8], [4.0, 3.9])
    assert usd_per_flop(some) is None
    priced = replace(some, usd=np.array([1.2, np.nan]), flops=np.array([9e15, 9e15]))
    assert usd_per_flop(priced) == pytest.approx(1.2 / 6e14)


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    fit(tmp_path, LAB)
    json.loads((tmp_path / "out" / "fit.json").read_text(encoding="utf-8"), parse_constant=refuse)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("x1: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        (LAB, ["--bootstrap", "10"], "--bootstrap 10"),
        (LAB, ["--n", "big"], "--n"),
        (LAB, ["--prior", "strong"], "strong"),
        ("run_id,N,D,val_loss\nA,5M,4.5B,4.66\nB,25M,900M,4.40\n", [], "2 points"),
        ("run_id,N,D,val_loss\nA,5M,4.5B,nan\n", [], "val_loss"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, more: list[str], said: str
) -> None:
    code, _ = fit(tmp_path, text, *more)
    assert code == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize("name", ["runs.csv", "prediction.md", "iso-flop.png"])
def test_the_fit_is_not_written_over_its_input_or_its_own_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(LAB, encoding="utf-8")
    args = ["--input", str(file), "--output", str(tmp_path / name)]
    assert run(fit_scaling_law.app, args, prog="fit") == 2
    assert "--output" in one_line(capsys)
    assert file.read_text(encoding="utf-8") == LAB


def test_a_place_for_the_page_that_is_taken_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "prediction.md").mkdir(parents=True)
    assert fit(tmp_path, LAB)[0] == 2
    assert "prediction.md" in one_line(capsys)
    assert not list((tmp_path / "out").glob(".*.new"))


def test_bayesian_gives_one_interval_to_fit_and_predict(tmp_path: Path) -> None:
    _, found = fit(tmp_path, grid([0.25, 0.5, 1.0, 2.0, 4.0]), "--bayesian")
    assert found["without_largest_budget"] is None
    told = found["predictions"]["1e+09"]["D_opt"]["posterior95"]
    band = read_fit(tmp_path / "out" / "fit.json").tokens_for(1e9)
    assert [band.low, band.high] == pytest.approx(told, rel=1e-3)


def test_a_second_fit_does_not_take_the_first_ones_page(tmp_path: Path) -> None:
    fit(tmp_path, LAB)
    page = (tmp_path / "out" / "prediction.md").read_text(encoding="utf-8")
    args = ["--input", str(tmp_path / "runs.csv"), "--output", str(tmp_path / "out" / "tight.json")]
    assert run(fit_scaling_law.app, [*args, "--prior", "tight", "--no-picture"], prog="fit") == 0
    assert (tmp_path / "out" / "prediction.md").read_text(encoding="utf-8") == page
    assert (tmp_path / "out" / "tight-prediction.md").exists()


def test_dollars_of_branches_are_for_their_own_steps() -> None:
    from dataclasses import replace

    trunk = points([1e6] * 3, [5e7, 1e8, 2e8], [4.2, 4.0, 3.9], cluster=[0, 0, 0])
    priced = replace(trunk, usd=np.array([0.05, 0.1, 1.0]))  # each fifth of its length, and the trunk
    assert usd_per_flop(priced) == pytest.approx(1.0 / (6e6 * 2e8))


def test_a_folder_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way", encoding="utf-8")
    file = tmp_path / "runs.csv"
    file.write_text(LAB, encoding="utf-8")
    args = ["--input", str(file), "--output", str(tmp_path / "out" / "fit.json")]
    assert run(fit_scaling_law.app, args, prog="fit") == 2
    assert "--output" in one_line(capsys)


def test_no_torch_and_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(LAB, encoding="utf-8")
    code = (
        "import sys; from x1_pretrain import fit_scaling_law as f; from x1_pretrain.command import run;"
        f"code = run(f.app, ['--input', {str(file)!r}, '--output', {str(tmp_path / 'fit.json')!r}]);"
        "print(sorted({'torch', 'scipy', 'pandas'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert (tmp_path / "iso-flop.png").read_bytes().startswith(b"\x89PNG")
