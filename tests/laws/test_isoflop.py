"""`x1 isoflop` up to where it trains: its plan in words, its configs, its refusals, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.records.builder import build_run
from x1_pretrain import errors
from x1_pretrain.command import run as run_app
from x1_pretrain.config_reading import load_config
from x1_pretrain.laws import isoflop, sweep, sweep_run
from x1_pretrain.laws.sweep_run import Job, Purse

Capture = pytest.CaptureFixture[str]
ASKED = ("--flops", "4e10", "--sizes", "100k,200k", "--batch-tokens", "256", "--context", "32")


def x1(capfd: Capture, *args: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = run_app(isoflop.app, [str(a) for a in args], prog="x1 isoflop")
    return code, *capfd.readouterr()


def refused(capfd: Capture, *args: str | Path, code: int = 2) -> str:
    found, _, err = x1(capfd, *args)
    assert (found, err.count("\n")) == (code, 1), err
    return err


# ------------------------------------------------------------------------------------------------------------
# The plan


def test_the_published_lab_as_a_plan(tmp_path: Path, capfd: Capture) -> None:
    lab = ("--flops", "1.35e17", "--sizes", "5M,25M,100M", "--output", tmp_path / "law", "--dry-run")
    lab = (*lab, "--data-dir", tmp_path / "no")
    code, out, err = x1(capfd, *lab, "--gpu", "a100-80gb", "--usd-per-hr", "1.5")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["5.16M-1.35e17", "24.8M-1.35e17", "101M-1.35e17"]
    assert all(line.split()[8] == "1.35e17" for line in lines[1:4])
    assert "3 runs, 4.05e17 FLOPs in all" in out
    assert "MFU of 0.35 (assumed, PaLM convention) of A100 80GB's 3.12e14 FLOP/s" in out
    assert out.count("in between") == 2
    assert out.count("not in between") == 0
    assert "a vocabulary of 50,257 is assumed" in out
    hours, usd = (sum(float(line.split()[column]) for line in lines[1:4]) for column in (-2, -1))
    assert usd == pytest.approx(1.5 * hours, abs=0.03)
    assert not (tmp_path / "law").exists()
    _, six, _ = x1(capfd, *lab, "--count", "6n")
    assert "not one budget: by all the work they are up to 2.41 x apart" in six
    assert six.splitlines()[1].split()[-1] == "1.35e17"  # no speed known: no hours, no dollars


def test_the_default_sizes_and_several_budgets(tmp_path: Path, capfd: Capture) -> None:
    options = ("--flops", "1e17,1e18", "--flops", "1e19", "--output", tmp_path, "--dry-run")
    _, out, _ = x1(capfd, *options, "--data-dir", tmp_path, "--flops-per-sec", "1e14")
    assert "15 runs" in out
    assert (out.count(": in between"), out.count("not in between")) == (6, 0)
    assert "at 1e14 FLOP/s, measured (--flops-per-sec)" in out
    assert "USD" in out


def test_all_that_is_held_out_is_evaluated_unless_stated(
    tmp_path: Path, corpus: Path, capfd: Capture
) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    largest = max(sum(b - a for a, b in spans) for spans in manifest["val_spans"].values())
    jobs = jobs_of(corpus, tmp_path)
    assert {job.config.evaluation.tokens for job in jobs} == {largest}
    stated = jobs_of(corpus, tmp_path, **{"evaluation.tokens": 64})
    assert {job.config.evaluation.tokens for job in stated} == {64}
    _, out, _ = x1(capfd, *ASKED, "--output", tmp_path, "--dry-run", "--data-dir", corpus)
    assert "measured on the whole held-out part" in out


def jobs_of(corpus: Path, output: Path, **overrides: Any) -> list[Job]:
    overrides["data.dir"] = str(corpus)
    base = isoflop.base_config(None, overrides)
    found = isoflop.held(base)
    assert found is not None
    model = base.model.model_copy(update={"vocab_size": found.vocab_size, "context": 32})
    models = isoflop.models_for([4e10], [1e5, 2e5], "true", model)
    planned = sweep.plan(models, "true", 3, 256)
    tokens = isoflop.evaluated(base, found)
    return [isoflop.job_of(run, base, output, 5, overrides, tokens) for run in planned]


def test_each_config_is_what_was_planned_and_a_person_has_the_last_word(tmp_path: Path, corpus: Path) -> None:
    jobs = jobs_of(corpus, tmp_path, **{"optimizer.lr": 1e-3, "training.precision": "fp32"})
    assert len({job.folder for job in jobs}) == len(jobs) == 6
    for job in jobs:
        config, run = job.config, job.run
        assert (config.training.total_steps, config.training.batch_tokens) == (run.steps, 256)
        assert (config.optimizer.lr, config.training.precision, config.seed) == (1e-3, "fp32", 5)
        assert (config.optimizer.schedule, config.optimizer.decay_steps) == ("wsd", run.decay_steps)
        assert (config.model.context, config.model.vocab_size) == (32, run.model.vocab_size)
        assert config.checkpoint.at == list(run.save_at)
        if run.is_trunk:
            assert job.branch_from is None
        else:
            (trunk,) = [other for other in jobs if other.run.name == run.trunk]
            assert job.branch_from == trunk.config.checkpoint_folder / f"step-{run.branch_step:09d}"
            assert run.branch_step in trunk.config.checkpoint.at


def test_a_base_config_gives_everything_else(tmp_path: Path, corpus: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text(
        "name: base\nmodel: {layers: 1, d_model: 64, heads: 2, kv_heads: 2, d_ff: 64, qk_norm: true,"
        " tied_embeddings: false}\n"
        f"data: {{dir: {corpus}}}\ntraining: {{total_steps: 5000}}\noptimizer: {{clip: 0.5}}\n"
        "evaluation: {tokens: 99, prompts: [a]}\n"
    )
    base = isoflop.base_config(file, {})
    model = base.model.model_copy(update={"vocab_size": 300, "context": 32})
    (run,) = sweep.plan(isoflop.models_for([4e10], [1e5], "true", model), "true", 1, 256)
    config = isoflop.job_of(run, base, tmp_path, None, {}, isoflop.evaluated(base, isoflop.held(base))).config
    assert (config.model.qk_norm, config.model.tied_embeddings) == (True, False)
    assert config.model == run.model  # what was counted is what is trained
    assert (config.optimizer.clip, config.optimizer.lr, config.evaluation.tokens) == (0.5, run.lr, 99)
    assert (config.evaluation.prompts, config.seed) == (["a"], 42)


# ------------------------------------------------------------------------------------------------------------
# Refusals


def test_bad_usage_is_one_line(tmp_path: Path, corpus: Path, capfd: Capture) -> None:
    out = ("--output", tmp_path / "law")
    assert "--flops: missing" in refused(capfd, *out)
    assert "--flops nonsense: expected a positive amount" in refused(capfd, *out, "--flops", "nonsense")
    assert "--sizes 0: expected a positive amount" in refused(capfd, *out, "--flops", "1e17", "--sizes", "0")
    assert "no GPU is called 'a9000'" in refused(capfd, *out, *ASKED, "--gpu", "a9000", "--data-dir", corpus)
    said = refused(capfd, *out, *ASKED, "--set", "training.total_steps=5")
    assert "--set training.total_steps: each run has its own; see --flops" in said
    said = refused(capfd, *out, *ASKED, "--data-dir", tmp_path / "absent")
    assert f"{tmp_path / 'absent'}: no such corpus folder; pass --data-dir DIR" in said
    assert "--collect only" in refused(capfd, tmp_path, *out, *ASKED)
    assert "--output" in refused(capfd, *ASKED)
    said = refused(capfd, *out, *ASKED, "--data-dir", corpus, "--set", "optimizer.warmup_steps=8000")
    assert "k-4e10: optimizer.warmup_steps 8000" in said
    assert not (tmp_path / "law").exists()


def test_a_plan_above_the_ceiling_is_refused_before_anything_starts(
    tmp_path: Path, corpus: Path, capfd: Capture
) -> None:
    """2 x 4e10 FLOPs at 1e6 FLOP/s are 22 hours, so 22 dollars at one an hour."""
    asked = (*ASKED, "--output", tmp_path / "law", "--data-dir", corpus, "--flops-per-sec", "1e6")
    said = refused(capfd, *asked, "--usd-per-hr", "1", "--budget-cap-usd", "3", code=78)
    assert "--budget-cap-usd 3: the 2 runs cost about $22." in said
    assert not (tmp_path / "law").exists()
    runs = [job.run for job in jobs_of(corpus, tmp_path) if job.run.is_trunk]
    isoflop.refuse_dear(runs, sweep.Pace("", flops_per_sec=1e6), Decimal(1), 23)
    isoflop.refuse_dear(runs, sweep.Pace("unknown"), Decimal(1), 3)


def test_a_changed_plan_is_refused_naming_the_first_difference(tmp_path: Path, corpus: Path) -> None:
    def tree(data: str = "f", **overrides: Any) -> dict[str, Any]:
        return sweep_run.plan_tree(jobs_of(corpus, tmp_path, **overrides), [data])

    sweep_run.agree(tmp_path, tree())
    before = (tmp_path / "sweep.json").read_bytes()
    sweep_run.agree(tmp_path, tree())  # the same plan is no news
    sweep_run.agree(tmp_path, tree(**{"log.every": 3}))  # nor is what changes no point
    changed: list[tuple[dict[str, Any], str]] = [
        (tree("g"), "the content of the corpora is another"),
        (tree(**{"optimizer.clip": 0.5}), "optimizer.clip: 1.0 -> 0.5"),
        (tree(**{"evaluation.tokens": 64}), "evaluation.tokens: "),
    ]
    fewer = tree()
    gone = max(name for name, run in fewer["runs"].items() if run["trunk"] == name)
    del fewer["runs"][gone]
    for now, named in [*changed, (fewer, f"run {gone} was planned and is not now")]:
        with pytest.raises(errors.RefusedError) as error:
            sweep_run.agree(tmp_path, now)
        assert named in str(error.value)
        assert str(tmp_path / "sweep.json") in str(error.value)
    assert (tmp_path / "sweep.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------
# Carrying out, with a stand-in for the trainer


@pytest.fixture
def jobs(tmp_path: Path, corpus: Path) -> list[Job]:
    return jobs_of(corpus, tmp_path)[:2]


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Every run is this Python text, with the run's folder as its argument."""

    def command(job: Job, output: Path, options: Any) -> list[str]:
        return [sys.executable, "-c", script, str(job.folder), *options]

    monkeypatch.setattr(sweep_run, "command", command)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (75, "was interrupted and saved; the same command goes on from there"),
        (76, "was stopped by the budget, its checkpoint is saved; to go on, add --raise-ceiling-to USD"),
        (77, "was stopped over the budget"),
        (78, "was refused (see above)"),
        (1, "ended with exit code 1 (see above)"),
        (2, "ended with exit code 2 (see above)"),
    ],
)
def test_a_run_that_does_not_end_well_ends_the_sweep_with_its_code(
    code: int, named: str, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    stand_in(monkeypatch, f"raise SystemExit({code})")
    assert sweep_run.carry_out(jobs, tmp_path, [], Purse(), None) == code
    out, err = capfd.readouterr()
    assert err.count("\n") == 1
    assert f"run 1 of 2, {jobs[0].run.name}," in err
    assert named in err
    assert "run 2 of 2" not in out
    assert (tmp_path / "runs.csv").read_text().count("\n") == 1  # the header: no point yet


def test_a_killed_run_is_a_fault_that_says_so(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    stand_in(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert sweep_run.carry_out(jobs, tmp_path, [], Purse(), None) == errors.FAULT
    assert "was killed by SIGKILL; the same command goes on" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGTERM, 0)])
def test_a_signal_goes_on_to_the_run_and_nothing_follows(
    number: signal.Signals,
    code: int,
    jobs: list[Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
) -> None:
    stand_in(
        monkeypatch,
        "import signal, sys, time, pathlib\n"
        "def leave(number, frame): print('saved on', number); raise SystemExit(" + str(code) + ")\n"
        "for one in (signal.SIGTERM, signal.SIGINT): signal.signal(one, leave)\n"
        "pathlib.Path(sys.argv[1] + '.ready').parent.mkdir(parents=True, exist_ok=True)\n"
        "pathlib.Path(sys.argv[1] + '.ready').touch()\n"
        "time.sleep(600)\n",
    )
    ready = jobs[0].folder.with_name(f"{jobs[0].folder.name}.ready")

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    before = signal.getsignal(number)
    thread.start()
    assert sweep_run.carry_out(jobs, tmp_path, [], Purse(), None) == errors.INTERRUPTED
    thread.join()
    out, err = capfd.readouterr()
    assert f"saved on {int(number)}" in out
    assert "run 2 of 2" not in out
    assert "interrupted and saved" in err
    assert signal.getsignal(number) is before


def test_finished_runs_are_skipped_and_the_rest_is_done(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    jobs[0].folder.parent.mkdir(parents=True)
    build_run(jobs[0].folder)
    assert jobs[1].branch_from is not None
    with pytest.raises(errors.UserError, match="it is gone; remove"):  # a finished trunk without it
        sweep_run.carry_out(jobs, tmp_path, [], Purse(), None)
    jobs[1].branch_from.mkdir(parents=True)
    capfd.readouterr()
    asked: list[str] = []

    def command(job: Job, output: Path, options: Any) -> list[str]:
        asked.append(job.run.name)
        return [sys.executable, "-c", "pass"]

    monkeypatch.setattr(sweep_run, "command", command)
    assert sweep_run.carry_out(jobs, tmp_path, [], Purse(), None) == 0
    out = capfd.readouterr().out
    assert asked == [jobs[1].run.name]
    assert f"-- {jobs[0].run.name}: finished before" in out
    assert f"from step {jobs[1].run.branch_step:,} of {jobs[0].run.name}" in out
    assert (tmp_path / "runs.csv").read_text().count("\n") == 2


def test_one_budget_for_all_and_a_raise_for_the_run_that_was_stopped(tmp_path: Path) -> None:
    cap = ["--budget-cap-usd", "3.0", "--budget-curr-cost-uri", "b.json"]
    assert Purse().options(tmp_path) == []
    assert Purse(3.0, "b.json").options(tmp_path) == cap
    raised = Purse(3.0, "b.json", 5.0)
    assert raised.options(tmp_path) == ["--budget-cap-usd", "5.0", "--budget-curr-cost-uri", "b.json"]
    (tmp_path / "STOP.json").write_text("{}")
    assert raised.options(tmp_path) == [*cap, "--raise-ceiling-to", "5.0"]


def test_the_command_of_a_run_is_one_that_anybody_could_type(jobs: list[Job], tmp_path: Path) -> None:
    trunk, branch = (sweep_run.command(job, tmp_path, ["--device", "cpu"]) for job in jobs)
    assert trunk[1:4] == ["-m", "x1_pretrain.train", "--config"]
    assert load_config(Path(trunk[4])) == jobs[0].config
    assert trunk[5:] == ["--device", "cpu"]
    assert branch[5:7] == ["--branch-from", str(jobs[1].branch_from)]


# ------------------------------------------------------------------------------------------------------------
# Collecting alone


def test_published_runs_become_a_table_without_a_grep(tmp_path: Path, capfd: Capture) -> None:
    runs = [build_run(tmp_path / name, run_id=name) for name in ("A", "B")]
    runs.append(build_run(tmp_path / "C", steps=30, run_id="C"))
    code, out, _ = x1(capfd, "--collect", *runs, "--output", tmp_path / "law")
    assert (code, "left out" in out, "2 points in" in out) == (0, True, True)
    assert out.startswith(f"left out {tmp_path / 'C'}: unfinished, evaluated at step 20 of 42")
    text = (tmp_path / "law" / "runs.csv").read_text()
    assert [line.split(",")[0] for line in text.splitlines()] == ["run_id", "A", "B"]
    code, out, _ = x1(capfd, "--collect", *runs, "--output", tmp_path / "law", "--include-unfinished")
    assert (code, "3 points in" in out) == (0, True)
    assert ",no," in (tmp_path / "law" / "runs.csv").read_text().splitlines()[-1]


def test_collecting_what_is_no_run_is_one_line(tmp_path: Path, capfd: Capture) -> None:
    out = ("--output", tmp_path / "law")
    assert "--collect: name the run folders" in refused(capfd, "--collect", *out)
    assert "not a run folder" in refused(capfd, "--collect", tmp_path, *out)
    half = build_run(tmp_path / "half", steps=30)
    code, said, err = x1(capfd, "--collect", half, *out)
    assert (code, err.count("\n"), "left out" in said) == (2, 1, True)
    assert not (tmp_path / "law").exists()


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, x1_pretrain.laws.isoflop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "matplotlib", "scipy", "tokenizers"} & set(done.stdout.split())
