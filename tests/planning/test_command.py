"""`x1 plan` as a user types it."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.records.builder import build_run, rows
from x1_pretrain.command import run
from x1_pretrain.config_reading import load_config
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.money import gate, launch
from x1_pretrain.money.clock import duration_s
from x1_pretrain.money.prices import ListPrice
from x1_pretrain.planning import flags
from x1_pretrain.planning.command import app

LAB = str(Path(__file__).resolve().parents[2] / "configs/x1-50m-a100.yaml")
MINE = ("--usd-per-hr", "1.19")  # no list price, so that a new one breaks no test


class Said:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: str, code: int = 0) -> str:
        assert run(app, [*args], "x1 plan") == code
        found = self._capsys.readouterr()
        if code:
            assert found.out == ""
            assert len(found.err.splitlines()) == 1, found.err
            assert len(found.err) < 400
        return found.out if code == 0 else found.err

    def tree(self, *args: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(*args, "--json"))
        return found


@pytest.fixture
def x1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return Said(capsys)


# ------------------------------------------------------------------------------------------------------------
# The dial


def test_dollars_become_a_config_that_training_takes(x1: Said) -> None:
    said = x1("--dollars", "$35", "--output", "plan.yaml")
    config = load_config(Path("plan.yaml"))
    tokens = config.training.total_steps * config.training.batch_tokens
    assert config.optimizer.schedule == "wsd"
    assert config.optimizer.min_lr == 0
    assert gate.billions(tokens) in said
    assert "of your $35.00 ceiling" in said
    assert "plan.yaml: written" in said
    total = re.search(r"= \$([\d.]+) of your \$35", said)
    assert total is not None
    assert 31 < float(total[1]) <= 31.5


def test_the_sentence_is_the_gates_and_the_speed_its_assumption(x1: Said) -> None:
    tree = x1.tree("--dollars", "35", *MINE, "--n", "50M")
    palm = flops_per_token(load_config(Path(LAB)).model).palm
    speed = next(line["value"] for line in tree["lines"] if line["what"] == "speed")
    assert speed == pytest.approx(gate.assumed_rate(312e12, palm, 1))
    assert tree["mfu_palm"] == pytest.approx(gate.ASSUMED_MFU)
    assert tree["sentence"] in x1("--dollars", "35", *MINE, "--n", "50M")
    assert tree["quote"]["total_usd"] <= 31.51


def test_every_number_comes_with_formula_and_source(x1: Said) -> None:
    tree = x1.tree("--dollars", "35", "--data-tokens", "10B")
    names = [line["what"] for line in tree["lines"]]
    for wanted in (
        "price", "speed", "hours", "dollars", "N", "architecture", "context", "D", "D/N", "FLOPs", "6ND",
        "epochs of data", "batch", "steps", "learning rate", "warm-up", "decay", "a step", "micro-batch",
        "checkpoints", "evaluations", "disk", "final loss", "if D/N is off",
    ):  # fmt: skip
        assert wanted in names
    for line in tree["lines"]:
        assert all(line[key] for key in ("shown", "formula", "numbers", "source")), line
    assert re.fullmatch(r"x2 4%, x4 1[56]%, x10 3[567]%", tree["lines"][-1]["shown"])
    said = x1("--dollars", "35", "--data-tokens", "10B", "--explain")
    for line in tree["lines"]:
        assert f"{line['what']}: {line['shown']}" in said


@pytest.mark.parametrize("columns", [None, 80, 110])
def test_it_is_readable_at_any_width(x1: Said, columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    said = x1("--dollars", "35", "--data-tokens", "10B")
    assert "\x1b" not in said
    assert "…" not in said
    if columns:
        assert max(map(len, said.splitlines())) <= columns
        ways = said[said.index("How long?") : said.index("On a napkin")]
        assert re.search(r"\n20:1 +[\d,]+ +\S+ B( +\d[\d.e]+)+", ways)  # a row on one line
    for word in ("0.0014", "warm-up", "learning rate"):
        assert word in said


def test_the_napkin_of_seventy_billion(x1: Said) -> None:
    said = x1("--n", "70B", "--tokens", "200B", "--gpu", "a100-80gb", "--gpus", "2048")
    for number in (
        "8.4e22 FLOPs",
        "1.52 days",
        "3.04 / 3.80 / 5.07 days",
        "D/N = 2.9",
        "5.88e23",
        "21.3 days",
    ):
        assert number in said
    assert "can't hold it" in said


def test_three_ways_side_by_side(x1: Said) -> None:
    said = x1("--n", "524M", "--steps", "20k", "--flops", "4e19", "--ratio", "20")
    assert "this plan (--steps)" in said
    for name in ("4e19 true FLOPs", "4e19 = 6ND", "20:1"):
        assert name in said
    asked = next(line for line in said.splitlines() if "524 M asked" in line and line.startswith("20"))
    assert "19,989" in asked
    assert "10.5 B" in asked


def test_what_is_served_is_printed_with_both_costs(x1: Said) -> None:
    said = x1("--dollars", "35", "--inference-tokens", "100B")
    assert re.search(r"For 100 B tokens served: \S+ FLOPs more of training", said)
    assert "fewer of serving" in said


# ------------------------------------------------------------------------------------------------------------
# Data, laws, speeds


def test_a_corpus_is_counted_and_written_down(x1: Said, corpus: Path) -> None:
    said = x1("--hours", "0.01", *MINE, "--n", "1M", "--data", str(corpus), "--output", "p.yaml")
    config = load_config(Path("p.yaml"))
    vocab = json.loads((corpus / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    assert config.model.vocab_size == vocab
    assert config.data.dir == str(corpus)
    assert "epochs of" in said
    assert "are asked and" in said


def fit_file(folder: Path) -> Path:
    point = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 2000.0, "beta": 0.36}
    draws = [[1.7 + 0.01 * k, 400, 0.34, 2000, 0.36] for k in range(-2, 3)]
    tree = {
        "schema_version": 1,
        **{key: {"point": value, "ci95": [value, value]} for key, value in point.items()},
        "method": "bootstrap",
        "draws": draws,
        "N_counts": "matrices",
        "scatter": 0.003,
        "ranges": {"N": [1e6, 1e8], "D": [1e7, 1e9], "flops": [1e14, 1e18]},
        "identifiability": {"prior_dominated": False, "reasons": []},
    }
    file = folder / "fit.json"
    file.write_text(json.dumps(tree))
    return file


def test_a_law_of_ones_own_gives_the_band(x1: Said, tmp_path: Path) -> None:
    fit = str(fit_file(tmp_path))
    tree = x1.tree("--n", "50M", "--tokens", "5B", "--fit", fit, "--output", "p.yaml")
    config = load_config(Path("p.yaml"))
    expected = 1.7 + 400 / parameter_counts(config.model).matrices ** 0.34 + 2000 / tree["tokens"] ** 0.36
    assert tree["loss"]["point"] == pytest.approx(expected)
    assert config.verify.loss_band is not None
    assert config.verify.loss_band[0] < expected < config.verify.loss_band[1]
    assert tree["law_counts"] == "parameters in matrices"
    assert any("outside of what the law was fitted on" in note for note in tree["notes"])


def measured(folder: Path, device: str, ranks: int) -> Path:
    build_run(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["hardware"] = {"device": device, "world_size": ranks}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_run_like_it_says_how_fast(x1: Said, tmp_path: Path) -> None:
    folder = measured(tmp_path / "before", "NVIDIA A100-SXM4-80GB", 2)
    first, *_, last = [row for row in rows(42) if "train/loss" in row]
    rate = (last["tokens"] - first["tokens"]) / (last["elapsed_s"] - first["elapsed_s"])
    palm = flops_per_token(load_config(folder / "config.yaml").model).palm
    tree = x1.tree("--n", "100k", "--tokens", "1M", *MINE, "--gpus", "4", "--like", str(folder))
    speed = next(line for line in tree["lines"] if line["what"] == "speed")
    assert "measured in" in speed["source"]  # FLOP/s travel, tokens/s don't; four GPUs are twice two
    assert speed["numbers"].startswith(f"{2 * rate * palm:.3g}".replace("e+0", "e").replace("e+", "e"))
    other = measured(tmp_path / "other", "NVIDIA H100 80GB HBM3", 1)
    assert "not on A100 80GB" in x1("--dollars", "35", "--like", str(other), code=2)


def test_a_faster_or_slower_speed(x1: Said) -> None:
    tree = x1.tree("--n", "50M", "--tokens", "10B", *MINE, "--tokens-per-sec", "246k")
    assert tree["quote"]["hours"] == pytest.approx(10e9 / 246e3 / 3600, rel=1e-3)
    tree = x1.tree("--n", "50M", "--tokens", "10B", *MINE, "--mfu", "0.4")
    assert tree["mfu_palm"] == pytest.approx(0.4)
    tree = x1.tree("--n", "50M", "--tokens", "10B", *MINE, "--flops-per-sec", "150e12", "--gpus", "2")
    assert tree["mfu_palm"] == pytest.approx(150 / 312)


def test_a_gpu_that_is_not_in_the_table(x1: Said) -> None:
    own = ("--gpu", "abacus", "--n", "50M", "--tokens", "1B")
    assert "nothing is guessed" in x1(*own, code=2)
    assert "nothing is guessed" in x1(*own, *MINE, code=2)
    tree = x1.tree(*own, *MINE, "--tokens-per-sec", "20k")
    assert tree["mfu_palm"] is None
    assert tree["napkin"] is None
    assert tree["quote"]["hours"] == pytest.approx(1e9 / 20e3 / 3600, rel=1e-2)


# ------------------------------------------------------------------------------------------------------------
# A plan that exists


def test_the_published_lab(x1: Said) -> None:
    args = ("--config", LAB, "--gpu", "a100-80gb", "--data-tokens", "10B", "--tokens-per-sec", "500k")
    said = x1(*args, "--flops-per-sec", "150e12", "--hours", "24")
    for number in (
        "84,000 steps x 524,288 = 44 B tokens", "4.40 epochs", "92% of fresh",
        "500,000 tokens/s is impossible",
        "246,276", "22.7 B", "3.10", "[3.20, 3.50]", "learning rate 0.0003", "The same 49.7 h at the optimum",
    ):  # fmt: skip
        assert number in said
    tree = json.loads(x1(*args, "--json"))
    # the claim can't be, so it prices nothing
    assert tree["plan"]["mfu_palm"] == pytest.approx(gate.ASSUMED_MFU)
    assert len(tree["findings"]) >= 5
    fair = json.loads(x1("--config", LAB, "--tokens-per-sec", "200k", "--json"))
    assert fair["plan"]["quote"]["hours"] == pytest.approx(44.04e9 / 200e3 / 3600, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the flag


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "--dollars: is needed"),
        (("--dollars", "many"), "--dollars many: expected a positive amount"),
        (("--dollars", "-3"), "--dollars"),
        (("--dollars", "nan"), "--dollars nan"),
        (("--dollars", "0.5"), "nothing is left to train with"),
        (("--n", "50X", "--tokens", "1B"), "--n 50X"),
        (("--n", "50M", "--tokens", "0"), "--tokens 0"),
        (("--hours", "0"), "--hours 0"),
        (("--n", "50M", "--steps", "1.5"), "--steps 1.5: expected a whole number"),
        (("--gpu", "a100-80", "--dollars", "35"), "did you mean"),
        (("--dollars", "35", "--mfu", "1.2"), "--mfu 1.2: expected a share"),
        (("--dollars", "35", "--tokens-per-sec", "200k"), "needs --n or --config"),
        (("--n", "50M", "--dollars", "35", "--tokens-per-sec", "1M"), "which is impossible"),
        (
            ("--dollars", "35", "--mfu", "0.4", "--flops-per-sec", "1e14"),
            "--flops-per-sec: contradicts --mfu",
        ),
        (("--config", LAB, "--n", "50M"), "--n: contradicts --config"),
        (("--config", LAB, "--output", "x.yaml"), "--output: is for a new plan"),
        (("--n", "50M", "--tokens", "44B", "--dollars", "35"), "above --dollars 35; that buys"),
        (("--n", "50M", "--tokens", "1B", "--steps", "3"), "--steps: contradicts --tokens"),
        (("--ratio", "20", "--dollars", "35"), "--ratio: is tokens per parameter, and needs --n"),
        (("--dollars", "35", "--data", "nowhere"), "nowhere: no such corpus folder"),
        (("--dollars", "35", "--data", "x", "--data-tokens", "1B"), "--data-tokens: contradicts --data"),
        (("--dollars", "35", "--fit", "no.json"), "--fit no.json: can't be read"),
        (("--n", "50M", "--tokens", "1B", "--batch-tokens", "1000"), "the nearest is 1,024"),
        (("--n", "50M", "--tokens", "1000", "--batch-tokens", "4096"), "less than one step of 4,096"),
        (
            ("--n", "50M", "--inference-tokens", "1B", "--dollars", "35"),
            "--inference-tokens: decides the size",
        ),
        (("--dollars", "35", "--like", "nowhere"), "not a run folder"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml: can't be read"),
    ],
)
def test_bad_input_is_one_line(x1: Said, args: tuple[str, ...], line: str) -> None:
    assert line in x1(*args, code=2)


def test_a_gpu_without_a_list_price_needs_one(x1: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "list_price", lambda *_: None)
    assert "--usd-per-hr: is needed" in x1("--dollars", "35", code=2)


def test_tax_and_disk_are_those_of_the_provider(x1: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(provider: str) -> dict[str, Any]:
        price = ListPrice(
            kind="a100-80gb", provider=provider, usd_per_hr=Decimal(2), date="2026-11-01", source="a page"
        )
        monkeypatch.setattr(flags, "list_price", lambda *_: price)
        quote: dict[str, Any] = x1.tree("--n", "50M", "--tokens", "10B", "--gpus", "2")["quote"]
        return quote

    assert listed("Lambda")["usd_per_hr"] == pytest.approx(4 * 1.10)
    assert listed("Lambda")["disk_usd"] == 0
    assert listed("RunPod secure")["usd_per_hr"] == pytest.approx(4 + 0.10 * 200 / 720, abs=1e-5)


def test_corpora_of_different_tokenizers_are_no_mixture(x1: Said, corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "both" / name).mkdir(parents=True)
        tree = json.loads((corpus / "manifest.json").read_text())
        tree["tokenizer"]["sha256"] = name * 64
        (tmp_path / "both" / name / "manifest.json").write_text(json.dumps(tree))
    assert "different tokenizers" in x1("--dollars", "35", "--data", "both", code=2)


def test_a_gpu_without_a_peak_needs_a_speed(x1: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = flags.gpus.kind("a100-80gb").model_copy(update={"peak_bf16_tflops": None})
    monkeypatch.setattr(flags.gpus, "kind", lambda _: kind)
    assert "no peak is known for A100 80GB" in x1("--dollars", "35", code=2)
    assert x1("--n", "50M", "--tokens", "1B", "--tokens-per-sec", "20k")


def test_a_file_of_someone_elses_is_not_overwritten(x1: Said) -> None:
    Path("mine.yaml").write_text("name: mine\n")
    assert run(app, ["--dollars", "35", "--output", "mine.yaml"]) == 78
    assert Path("mine.yaml").read_text() == "name: mine\n"
    assert run(app, ["--dollars", "35", "--output", "plan.yaml"]) == 0
    assert run(app, ["--dollars", "30", "--output", "plan.yaml"]) == 0  # a plan may follow a plan


def test_an_edited_plan_is_a_persons_own_work(x1: Said) -> None:
    assert "plan.yaml: written" in x1("--dollars", "35", *MINE)
    edited = Path("plan.yaml").read_text().replace("seed: 42", "seed: 43")
    assert "seed: 43" in edited
    Path("plan.yaml").write_text(edited)
    assert "not written: plan.yaml is there" in x1("--dollars", "30", *MINE)
    assert Path("plan.yaml").read_text() == edited
    assert "edited since" in x1("--dollars", "30", *MINE, "--output", "plan.yaml", code=78)


def test_the_data_end_a_plan_that_dollars_would_not(x1: Said) -> None:
    said = x1("--dollars", "35", *MINE, "--data-tokens", "10M")
    assert "what decided: the data: 40 epochs" in " ".join(said.split())
    tree = x1.tree("--dollars", "35", *MINE, "--data-tokens", "10M")
    assert 395e6 < tree["tokens"] <= 400e6
    assert tree["quote"]["total_usd"] < 5
    assert any("the data end this plan, not the dollars" in note for note in tree["notes"])
    assert x1.tree("--dollars", "35", *MINE, "--data-tokens", "10B")["decided_by"] == "--dollars"


def test_a_sum_writes_no_file(x1: Said) -> None:
    x1("--n", "70B", "--tokens", "200B", "--gpus", "2048", *MINE)
    assert not Path("plan.yaml").exists()


def test_the_ceiling_goes_on_to_launch(x1: Said) -> None:
    assert "x1 launch --config plan.yaml" in x1("--dollars", "35", *MINE)
    said = " ".join(x1("--dollars", "35", "--gpu", "a100-80gb").split())
    assert re.search(r"x1 launch --config plan.yaml --provider \w+ .*--budget-cap-usd 35.00", said)


def test_json_writes_no_file_unless_told(x1: Said) -> None:
    x1.tree("--dollars", "35", *MINE)
    assert not Path("plan.yaml").exists()


# ------------------------------------------------------------------------------------------------------------
# Promises


def test_what_is_paid_around_the_training_is_what_x1_launch_counts() -> None:
    defaults = {name: p.default for name, p in inspect.signature(launch.main).parameters.items()}
    assert defaults["every_s"] == flags.POLL_S
    assert duration_s(defaults["linger"], "--linger") == flags.LINGER_S
    assert defaults["disk_gib"] == flags.DISK_GIB


def test_it_starts_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from x1_pretrain.planning.command import app; from x1_pretrain.command import "
        "run\n"
        "code = run(app, ['--dollars', '35']); heavy = {'torch', 'scipy', 'matplotlib', 'transformers'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
