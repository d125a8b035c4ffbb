"""A sweep carried out: its plan on disk, its runs one after another, the table after each.

Every run is `x1 train`, which resumes itself; so the sweep's whole state is which runs have finished.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from x1_pretrain import config as cfg
from x1_pretrain import errors
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import to_yaml
from x1_pretrain.laws import collect
from x1_pretrain.laws.sweep import PlannedRun
from x1_pretrain.money import latch
from x1_pretrain.money.supervise import start
from x1_pretrain.numbers import human
from x1_pretrain.records.console import duration
from x1_pretrain.records.run_folder import is_run, open_run, read_json

PLAN = "sweep.json"
TABLE = "runs.csv"
Tree = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A planned run, and the config it is trained with."""

    run: PlannedRun
    config: RunConfig
    branch_from: Path | None

    @property
    def folder(self) -> Path:
        return self.config.folder

    def finished(self) -> bool:
        return is_run(self.folder) and collect.is_finished(open_run(self.folder))


# ------------------------------------------------------------------------------------------------------------
# The plan on disk


def plan_tree(jobs: Sequence[Job], fingerprints: Sequence[str]) -> Tree:
    """All that decides what the points are."""
    runs = {
        job.run.name: {
            "trunk": job.run.trunk,
            "branch_step": job.run.branch_step,
            "evaluation.tokens": job.config.evaluation.tokens,
            **cfg.step_fields(job.config),
        }
        for job in jobs
    }
    return {"schema_version": 1, "kind": "sweep", "data": list(fingerprints), "runs": runs}


def agree(output: Path, tree: Tree) -> None:
    """Write the plan, or refuse one that differs from what this folder was begun with."""
    file = output / PLAN
    tree = json.loads(json.dumps(tree))
    if file.exists():
        if difference := first_difference(read_json(file), tree):
            raise errors.RefusedError(
                f"{file}: begun with another plan ({difference}); put that back to go on, or give another "
                "--output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(tree, indent=1) + "\n")


def first_difference(before: Tree, now: Tree) -> str | None:
    """In a few words; None where the plans are the same."""
    if before.get("data") != now["data"]:
        return "the content of the corpora is another"
    was, runs = before.get("runs", {}), now["runs"]
    for name in sorted(was.keys() | runs.keys()):
        if name not in was or name not in runs:
            return f"run {name} was {'not planned' if name not in was else 'planned and is not now'}"
        if changed := cfg.changed_fields(was[name], runs[name]):
            return f"{name}: {changed[0]}"
    return None


def write(file: Path, text: str) -> None:
    """The old content or the new one, never a half."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


# ------------------------------------------------------------------------------------------------------------
# The runs


@dataclass(frozen=True)
class Purse:
    """One budget for all runs: the same ceiling and the same reading are given to each."""

    cap_usd: float | None = None
    curr_cost_uri: str | None = None
    raise_to_usd: float | None = (
        None  # a person's word to the run that was stopped; a new ceiling for the rest
    )

    def options(self, folder: Path) -> list[str]:
        stopped = self.raise_to_usd is not None and (folder / latch.NAME).exists()
        cap = self.cap_usd if stopped or self.raise_to_usd is None else self.raise_to_usd
        given = {
            "--budget-cap-usd": cap,
            "--budget-curr-cost-uri": self.curr_cost_uri,
            "--raise-ceiling-to": self.raise_to_usd if stopped else None,
        }
        return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


@dataclass
class Relay:
    """Signals on their way to the run that trains."""

    child: subprocess.Popen[bytes] | None = None
    asked: str | None = None

    def take(self, number: int, _frame: object) -> None:
        self.asked = signal.Signals(number).name
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def wait_for(self, command: Sequence[str], log: Path | None = None) -> int:
        with nullcontext() if log is None else log.open("ab") as output:
            self.child = start(command, output)
        if self.asked:  # it came while the child was being made
            self.child.send_signal(signal.SIGTERM)
        return self.child.wait()


@contextmanager
def relaying() -> Iterator[Relay]:
    """SIGTERM and Ctrl-C go on to the run, which saves; a lost terminal ends nothing."""
    relay = Relay()
    before = {number: signal.signal(number, relay.take) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield relay
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(
    jobs: Sequence[Job],
    output: Path,
    options: Sequence[str],
    purse: Purse,
    usd_per_hr: Decimal | None,
    brief: bool = False,
) -> int:
    """Each run that has not finished, in order; the exit code of the first that did not end well."""
    done = [job.finished() for job in jobs]
    worked_s, worked_flops = 0.0, 0.0
    with relaying() as relay:
        for number, job in enumerate(jobs):
            if done[number]:
                print(f"-- {job.run.name}: finished before", flush=True)
                continue
            left = sum(other.run.own_flops for other, is_done in zip(jobs, done, strict=True) if not is_done)
            rate = worked_flops / worked_s if worked_s else None
            print(header(job, number + 1, len(jobs), left / rate if rate else None), flush=True)
            begun = time.monotonic()
            refuse_without_beginning(job)
            log = log_of(job, output) if brief else None
            code = relay.wait_for(command(job, output, [*options, *purse.options(job.folder)]), log)
            found = table(jobs, output, usd_per_hr)
            if brief:
                print(outcome(job, found, time.monotonic() - begun), flush=True)
            if code or relay.asked:
                seen = f"see {log}" if log else "see above"
                reason = why(code or errors.INTERRUPTED, job, f"run {number + 1} of {len(jobs)}", seen)
                print(f"x1: {reason}", file=sys.stderr)
                return code if code > 0 else errors.INTERRUPTED if relay.asked else errors.FAULT
            done[number] = True
            worked_s, worked_flops = worked_s + time.monotonic() - begun, worked_flops + job.run.own_flops
    found = table(jobs, output, usd_per_hr)
    print(f"-- all {len(jobs)} runs finished: {len(found.rows)} points in {output / TABLE}")
    fit = f"--input {output / TABLE} --output {output / 'fit.json'}"
    print(f"next: x1 fit {fit}")
    return errors.FINISHED


def refuse_without_beginning(job: Job) -> None:
    if job.branch_from and not job.branch_from.is_dir() and not is_run(job.folder):
        raise errors.UserError(
            f"{job.branch_from}: {job.run.name} begins with this checkpoint, and it is gone; remove "
            f"{job.branch_from.parents[1]} to have its trunk trained again"
        )


def command(job: Job, output: Path, options: Sequence[str]) -> list[str]:
    """The same one starts and resumes the run."""
    file = output / "configs" / f"{job.run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, to_yaml(job.config))
    branch = ["--branch-from", str(job.branch_from)] if job.branch_from else []
    return [sys.executable, "-m", "x1_pretrain.train", "--config", str(file), *branch, *options]


def header(job: Job, number: int, runs: int, eta_s: float | None) -> str:
    run = job.run
    part = f"from step {run.branch_step:,} of {run.trunk}, " if not run.is_trunk else ""
    eta = f"; all that is left: about {duration(eta_s)}" if eta_s else ""
    return f"\n-- run {number} of {runs}: {run.name}, {part}to {human(run.tokens)} tokens{eta}"


def log_of(job: Job, output: Path) -> Path:
    file = output / "logs" / f"{job.run.name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def outcome(job: Job, found: collect.Collected, seconds: float) -> str:
    """The loss of the run that just ended, from its records."""
    rows = (row for row in found.rows if Path(row["run_dir"]) == job.folder.resolve())
    nats = next((row["val_loss"] for row in rows), None)
    return f"   {f'loss {nats:.4f}' if nats is not None else 'not finished'}, {duration(seconds)}"


def table(jobs: Sequence[Job], output: Path, usd_per_hr: Decimal | None) -> collect.Collected:
    found = collect.collect([job.folder for job in jobs], usd_per_hr)
    collect.write_table(output / TABLE, found.rows)
    return found


def why(code: int, job: Job, which: str, seen: str) -> str:
    """Why the sweep ends here, and how to go on."""
    where = f"{which}, {job.run.name},"
    again = "the same command goes on from there"
    raised = "to go on, add --raise-ceiling-to USD to the same command"
    told = {
        errors.INTERRUPTED: f"{where} was interrupted and saved; {again}",
        errors.BUDGET_CHECKPOINTED: f"{where} was stopped by the budget, its checkpoint is saved; {raised}",
        errors.BUDGET_STOPPED: f"{where} was stopped over the budget; {raised}",
        errors.REFUSED: f"{where} was refused ({seen}); once that is settled, {again}",
    }
    if code < 0:
        return f"{where} was killed by {signal.Signals(-code).name}; {again}"
    return told.get(code, f"{where} ended with exit code {code} ({seen}); once that is mended, {again}")
