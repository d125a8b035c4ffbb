"""Check a run as a careful reviewer would: from its files alone, each check with its evidence in words.

    x1 verify x1-50m-a100 --export experiments/X1-pretraining/run-cloud/

Exit code 0 when every check passed or does not apply, 1 when any failed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import config_hash
from x1_pretrain.corpus.order import Order, Source, block_count
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.money.audit import audit
from x1_pretrain.records import weights
from x1_pretrain.records.export_folder import WEIGHTS
from x1_pretrain.records.run_folder import (
    Row,
    Run,
    find_run,
    is_evaluation,
    is_number,
    is_train,
    last_step,
    open_run,
    openings,
    read_json,
    read_jsonl,
    series,
)
from x1_pretrain.runtime.checkpoint_files import list_checkpoints, newest_good, sha256, step_of, verify_folder

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"

# What the manifest must say. Those in NULLABLE may be null: known, and absent.
MANIFEST_KEYS = (
    *("schema_version", "kind", "run_id", "name", "created_utc", "argv", "commit", "dirty", "seed"),
    *("config_hash", "versions", "hardware", "data", "parameters", "flops_per_token", "tokens_per_step"),
    *("total_steps", "precision", "attention", "compile", "peak_flops", "spent_usd"),
)
NULLABLE = {"commit", "dirty", "peak_flops", "spent_usd"}
VERSION_KEYS = ("python", "torch", "cuda", "flash_attn", "transformers", "numpy", "x1_pretrain")
HARDWARE_KEYS = ("device", "count", "world_size", "cpu", "cores", "ram_gib")  # a GPU: also its memory
DATA_KEYS = ("name", "dir", "fingerprint", "train_tokens", "val_tokens", "weight")


@dataclass(frozen=True)
class Check:
    name: str
    result: str
    evidence: str


def judged(name: str, problems: Sequence[str], evidence: str) -> Check:
    """Failed with its problems, or passed with its evidence."""
    if not problems:
        return Check(name, PASSED, evidence)
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return Check(name, FAILED, "; ".join(problems[:5]) + more)


def verify(run: Run, export: Path | None = None) -> list[Check]:
    """Every check, in the order a reader would ask."""
    rows = cache(run.rows)  # read once, in the first check that needs them
    return [
        attempted("manifest complete", lambda: manifest_complete(run)),
        attempted("config is the recorded one", lambda: config_is_the_recorded(run)),
        attempted("records readable", lambda: rows_whole(run)),
        attempted("no gap or overlap in steps", lambda: steps_covered(run, rows())),
        attempted("sessions agree with events", lambda: sessions_consistent(run, rows())),
        attempted("blocks read in order", lambda: blocks_in_order(run)),
        attempted("final loss in the band", lambda: final_loss(run, rows())),
        attempted("checkpoints verify", lambda: checkpoints_good(run, rows())),
        attempted("final weights sound", lambda: weights_good(run)),
        attempted("below the ceiling", lambda: below_the_ceiling(run)),
        attempted("export equals the final checkpoint", lambda: export_equal(run, export)),
    ]


def attempted(name: str, check: Callable[[], Check]) -> Check:
    """A record too odd to be judged (a null time, ranks of 0) fails its check, and no other."""
    try:
        return check()
    except UserError as error:
        return Check(name, FAILED, str(error))
    except Exception as error:  # files made by anyone may hold anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name, FAILED, f"can't be judged, the records hold something odd ({reason})")


# -----------------------------------------------------------------------------------------------------------
# The manifest and the config


def manifest_complete(run: Run) -> Check:
    missing = _lacking(run.manifest, MANIFEST_KEYS, "")
    missing += [
        f"{key} is null" for key in MANIFEST_KEYS if key not in NULLABLE and run.manifest.get(key, 0) is None
    ]
    missing += _lacking(run.manifest.get("versions"), VERSION_KEYS, "versions.")
    hardware = run.manifest.get("hardware")
    gpu = isinstance(hardware, dict) and hardware.get("device") != "cpu"
    missing += _lacking(hardware, (*HARDWARE_KEYS, *(("gpu_memory_gib",) if gpu else ())), "hardware.")
    for number, corpus in enumerate(run.manifest.get("data") or []):
        missing += _lacking(corpus, DATA_KEYS, f"data[{number}].")
    return judged("manifest complete", missing, f"all {len(MANIFEST_KEYS)} keys, versions, hardware and data")


def _lacking(tree: object, keys: Iterable[str], prefix: str) -> list[str]:
    present = tree if isinstance(tree, dict) else {}
    return [f"{prefix}{key} is missing" for key in keys if key not in present]


def config_is_the_recorded(run: Run) -> Check:
    """The hash in the manifest must come out again, from config.yaml and the recorded data fingerprints."""
    data = [corpus for corpus in run.manifest.get("data") or [] if isinstance(corpus, dict)]
    fingerprints = [str(corpus.get("fingerprint")) for corpus in data]
    now, recorded = config_hash(run.config, fingerprints)[:12], str(run.manifest.get("config_hash"))[:12]
    problems = []
    if now != recorded:
        problems.append(f"config.yaml and the data fingerprints hash to {now}, manifest.json says {recorded}")
    for key, value in (("seed", run.config.seed), ("tokens_per_step", run.config.training.batch_tokens)):
        if run.manifest.get(key) != value:
            problems.append(f"{key}: manifest.json says {run.manifest.get(key)}, config.yaml {value}")
    evidence = f"hash {now} over config.yaml and {len(data)} data fingerprint(s)"
    return judged("config is the recorded one", problems, evidence)


# -----------------------------------------------------------------------------------------------------------
# The rows


def rows_whole(run: Run) -> Check:
    """Lines that are not rows: a torn last one is what a kill leaves, any other is damage."""
    problems, counts = [], []
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = read_jsonl(run.folder / name)
        stray = sum(not is_number(row.get("step")) for row in lines.rows)
        problems += [f"{name} line {number} is not a JSON object" for number in lines.damaged]
        problems += [f"{name} has {stray} row(s) without a step"] if stray else []
        problems += [] if lines.rows else [f"{name} has no rows"]
        torn = " (and a torn last line, left out)" if lines.torn else ""
        counts.append(f"{len(lines.rows):,} rows in {name}{torn}")
    return judged("records readable", problems, ", ".join(counts))


def steps_covered(run: Run, rows: Sequence[Row]) -> Check:
    """Every step that was due is there once, in order, with the tokens it must have."""
    train = [row["step"] for row in rows if is_train(row)]
    evaluated = [row["step"] for row in rows if is_evaluation(row)]
    per_step = run.config.training.batch_tokens
    problems = [f"no training row for step {step}" for step in sorted(due_steps(run, rows) - set(train))]
    for kind, steps in (("training", train), ("evaluation", evaluated)):
        problems += [f"{n} {kind} rows for step {step}" for step, n in Counter(steps).items() if n > 1]
    steps = [row["step"] for row in rows]
    problems += [
        f"step {later} comes after step {earlier}" for earlier, later in pairwise(steps) if later < earlier
    ]
    problems += [
        f"step {row['step']} says {row.get('tokens')} tokens, x {per_step} it is {row['step'] * per_step}"
        for row in rows
        if row.get("tokens") != row["step"] * per_step
    ]
    evidence = f"{len(train):,} training rows up to step {last_step(rows):,}: no gap, no overlap"
    return judged("no gap or overlap in steps", problems, evidence)


def due_steps(run: Run, rows: Sequence[Row]) -> set[int]:
    """The steps that must have a training row: each multiple of log.every, and the run's last step.

    `log.every` may change between sessions; the event that opens a session can say what it was.
    """
    end = last_step(rows)
    opened = openings(run.events()) or [{"step": 0}]
    ends = [*(one["step"] for one in opened[1:]), end]
    due = {end} if end == run.total_steps else set()
    for one, until in zip(opened, ends, strict=True):
        every = one.get("log_every", run.config.log.every)
        due |= {step for step in range(every, until + 1, every) if step > one["step"]}
    return due


def sessions_consistent(run: Run, rows: Sequence[Row]) -> Check:
    """The rows of a session lie between the step it went on from and the step the next one did."""
    events = run.events()
    opened = openings(events)
    problems = [] if opened and opened[0]["event"] == "start" else ["events.jsonl has no start event"]
    numbers = [one.get("session") for one in opened]
    problems += [
        f"session {b} is opened after session {a}" for a, b in pairwise(numbers) if b is None or b <= (a or 0)
    ]
    spans = {
        one.get("session"): (one["step"], min((later["step"] for later in opened[place + 1 :]), default=None))
        for place, one in enumerate(opened)
    }
    problems += [problem for row in rows if (problem := _outside(row, spans))]
    problems += [
        f"time runs backward from step {a['step']} to step {b['step']}"
        for a, b in pairwise(rows)
        if b.get("elapsed_s", 0) < a.get("elapsed_s", 0)
    ]
    if last_step(rows) >= run.total_steps and not any(event.get("event") == "finish" for event in events):
        problems.append(f"step {run.total_steps:,} was reached, but events.jsonl has no finish event")
    resumed = ", ".join(f"{one['step']:,}" for one in opened[1:])
    return judged(
        "sessions agree with events",
        problems,
        f"{len(opened)} session(s)" + (f", resumed from step {resumed}" if resumed else ", never resumed"),
    )


def blocks_in_order(run: Run) -> Check:
    """The blocks that were really read (where they were logged) are those of the order's arithmetic."""
    name, rows = "blocks read in order", read_jsonl(run.folder / "blocks.jsonl").rows
    if not rows:
        return Check(name, NOT_APPLICABLE, "not logged (log.blocks is off)")
    context, order = run.config.model.context, recorded_order(run)
    problems, count = [], 0
    for row in rows:
        expected = order.step_blocks(row["step"] - 1, slice(0, None, row["ranks"]))
        count += len(expected)
        if row["blocks"] != [list(draw) for draw in expected]:
            problems.append(f"step {row['step']} read other blocks than the order says")
    begun = openings(run.events())[:1]  # a branch begins at its parent's step
    first = 1 + (begun[0]["step"] if begun else 0)
    if [row["step"] for row in rows] != list(range(first, first + len(rows))):
        problems.append("the steps in blocks.jsonl have a gap or a double")
    evidence = f"{count:,} blocks of {context} tokens over {len(rows):,} steps are those of the order"
    return judged(name, problems, evidence)


def recorded_order(run: Run) -> Order:
    """The order of the run's data, from what its manifest recorded of the corpora."""
    context = run.config.model.context
    sources = [
        Source(c["fingerprint"], block_count(c["train_tokens"], context), c["weight"])
        for c in run.manifest["data"]
    ]
    return Order(run.config.seed, sources, run.config.batch_blocks, run.total_steps)


def _outside(row: Row, spans: dict[Any, tuple[int, int | None]]) -> str | None:
    """An evaluation may repeat the step a session goes on from; a training row may not."""
    session, step = row.get("session"), row["step"]
    if session not in spans:
        return f"step {step} is of session {session}, which events.jsonl never opened"
    first, last = spans[session]
    begun = step > first if is_train(row) else step >= first
    if begun and (last is None or step <= last):
        return None
    return f"step {step} is of session {session}, which covers the steps {first} to {last or 'the end'}"


# -----------------------------------------------------------------------------------------------------------
# The result


def final_loss(run: Run, rows: Sequence[Row]) -> Check:
    """The last validation loss against the band in the config."""
    name, band = "final loss in the band", run.config.verify.loss_band
    if band is None:
        return Check(name, NOT_APPLICABLE, "the config sets no verify.loss_band")
    if last_step(rows) < run.total_steps:
        return Check(name, NOT_APPLICABLE, f"not finished: step {last_step(rows):,} of {run.total_steps:,}")
    steps, losses = series(rows, "val/loss")
    if not losses:
        return Check(name, FAILED, "no val/loss in metrics.jsonl")
    found, (low, high) = f"val/loss {losses[-1]:.4f} at step {steps[-1]:,}", band
    problems = [] if low <= losses[-1] <= high else [f"{found}, outside [{low:.2f}, {high:.2f}]"]
    if steps[-1] != run.total_steps:
        problems.append(f"the last evaluation is of step {steps[-1]:,}, the run ended at {run.total_steps:,}")
    return judged(name, problems, f"{found}, inside [{low:.2f}, {high:.2f}]")


def checkpoints_good(run: Run, rows: Sequence[Row]) -> Check:
    """Every checkpoint matches its hashes and is of this run; a finished run has that of its last step."""
    name, there = "checkpoints verify", list_checkpoints(run.checkpoints)
    finished = last_step(rows) >= run.total_steps
    if not there and not finished:
        return Check(name, NOT_APPLICABLE, f"none yet in {run.checkpoints}")
    reasons = {path.name: verify_folder(path) or _stranger(path, run) for path in there}
    problems = [f"{path}: {reason}" for path, reason in reasons.items() if reason]
    if finished and run.total_steps not in map(step_of, there):
        problems.append(f"finished, but no checkpoint of step {run.total_steps:,} in {run.checkpoints}")
    return judged(name, problems, f"every file matches its sha256: {', '.join(reasons)}")


def _stranger(path: Path, run: Run) -> str | None:
    """Why a sound checkpoint is not one of this run."""
    state = read_json(path / "state.json") if (path / "state.json").is_file() else {}
    for key in ("run_id", "config_hash"):
        if state.get(key) != run.manifest.get(key):
            return f"its {key} is {state.get(key)}, the run's is {run.manifest.get(key)}"
    return None


def weights_good(run: Run) -> Check:
    """The newest good checkpoint's weights, read: names, shapes, type, no NaN or infinity."""
    name, (newest, _) = "final weights sound", newest_good(run.checkpoints)
    if newest is None:
        return Check(name, NOT_APPLICABLE, f"no good checkpoint in {run.checkpoints}")
    problems, evidence = weights.problems(newest / "model.safetensors", newest / "config.json")
    return judged(name, [f"{newest.name}: {problem}" for problem in problems], f"{newest.name}: {evidence}")


def below_the_ceiling(run: Run) -> Check:
    """What was spent, and that no machine was left behind."""
    found = audit(run.folder)
    if found is None:
        return Check("below the ceiling", NOT_APPLICABLE, "no ledger.jsonl: the run had no ceiling")
    return judged("below the ceiling", *found)


def export_equal(run: Run, export: Path | None) -> Check:
    """The exported weights are the checkpoint's, byte for byte; every exported file is as it was written."""
    name = "export equals the final checkpoint"
    if export is None:
        return Check(name, NOT_APPLICABLE, "no --export folder given")
    if not (export / "manifest.json").is_file():
        return Check(name, FAILED, f"{export} is not an export: it has no manifest.json")
    manifest, newest = read_json(export / "manifest.json"), newest_good(run.checkpoints)[0]
    problems = _export_problems(run, export, manifest)
    for source, target in WEIGHTS.items():
        if newest is None or not (export / target).is_file():
            problems.append(
                f"{target} is missing" if newest else "there is no good checkpoint to compare with"
            )
        elif sha256(export / target) != sha256(newest / source):
            problems.append(f"{target} differs from {newest.name}/{source}")
    at = newest.name if newest else ""
    return judged(
        name, problems, f"{', '.join(WEIGHTS.values())} are {at}'s, byte for byte; all hashes match"
    )


def _export_problems(run: Run, export: Path, manifest: dict[str, Any]) -> list[str]:
    problems = []
    if manifest.get("run_id") != run.manifest.get("run_id"):
        problems.append(f"it is of run {manifest.get('run_id')}, not {run.manifest.get('run_id')}")
    for file, identity in manifest.get("files", {}).items():
        if not (export / file).is_file():
            problems.append(f"{file} is in its manifest but not there")
        elif sha256(export / file) != identity["sha256"]:
            problems.append(f"{file} does not match its hash")
    return problems


# -----------------------------------------------------------------------------------------------------------
# The command


def report(run: Run, checks: Sequence[Check], show: Callable[[str], None] = print) -> None:
    """A line a check, the result first."""
    show(f"{run.folder}: {_state(run)}")
    width = max(len(check.name) for check in checks)
    for check in checks:
        show(f"  {check.result:<{len(NOT_APPLICABLE)}}  {check.name:<{width}}  {check.evidence}")
    counts = Counter(check.result for check in checks)
    show(", ".join(f"{counts[result]} {result}" for result in (PASSED, FAILED, NOT_APPLICABLE)))


def _state(run: Run) -> str:
    try:
        step = last_step(run.rows())
    except UserError:  # "records readable" says why
        return "its rows can't be read"
    state = "finished" if step >= run.total_steps else "unfinished"
    return f"{state}, step {step:,} of {run.total_steps:,}"


def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or the name of a run under runs/")],
    export: Annotated[
        Path | None, typer.Option(help="also compare this export with the final checkpoint")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the checks as JSON")] = False,
) -> int:
    """Check a run: manifest, config, steps, sessions, final loss, checkpoints, weights. 0 good, 1 not."""
    opened = open_run(find_run(run))
    checks = verify(opened, export)
    good = all(check.result != FAILED for check in checks)
    if as_json:
        content = {"run": str(opened.folder), "good": good, "checks": [asdict(check) for check in checks]}
        print(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        report(opened, checks)
    return FINISHED if good else FAULT


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.records.verify"))
