"""Is what came of the run what it should be: loss, weights, money, machines, post-mortem, export?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from x1_pretrain.money.audit import audit, gone
from x1_pretrain.postmortem.episodes import episodes
from x1_pretrain.postmortem.page import KINDS, STILL_UP
from x1_pretrain.records.behind import last_word
from x1_pretrain.records.checkpoint_files import list_checkpoints, newest_good, sha256, step_of, verify_folder
from x1_pretrain.records.export_folder import WEIGHTS
from x1_pretrain.records.mirror_state import NAME as MIRROR
from x1_pretrain.records.run_folder import POSTMORTEM, Row, Run, last_step, read_json, series
from x1_pretrain.review import weights
from x1_pretrain.review.check import FAILED, NOT_APPLICABLE, Check, judged


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


def weights_reload(run: Run) -> Check:
    """The newest good checkpoint's weights, loaded and saved again, are the same file."""
    name, (newest, _) = "final weights reload byte for byte", newest_good(run.checkpoints)
    if newest is None:
        return Check(name, NOT_APPLICABLE, f"no good checkpoint in {run.checkpoints}")
    problem, size = weights.reload_problem(newest / "model.safetensors")
    problems = [f"{newest.name}: {problem}"] if problem else []
    return judged(name, problems, f"{newest.name}: loaded and saved again, the same {size:,} bytes")


def postmortem_written(run: Run) -> Check:
    """Every spike that is over has its place in the post-mortem, and none is told as still going on."""
    name, file = "post-mortem written", run.folder / POSTMORTEM
    spikes = episodes(run)
    over = [spike for spike in spikes if not spike.open]
    if not over:
        return Check(name, NOT_APPLICABLE, "a spike is still going on" if spikes else "no spike on record")
    writes = f"`x1 postmortem {run.folder}` writes it"
    if not file.is_file():
        return judged(name, [f"no {POSTMORTEM} in {run.folder}: {writes}"], "")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    problems = []
    for onset in dict.fromkeys(spike.onset for spike in over):
        ended = [not spike.open for spike in spikes if spike.onset == onset]
        if problem := _untold(lines, onset, sum(ended), len(ended) - sum(ended)):
            problems.append(f"{problem}: {writes}")
    onsets = ", ".join(f"{spike.onset:,}" + (" (injected)" if spike.injected else "") for spike in over)
    return judged(name, problems, f"{POSTMORTEM} has every spike: of step {onsets}")


def _untold(lines: Sequence[str], onset: int, over: int, still_up: int) -> str | None:
    """What is wrong with how the spikes of one onset are told: each in its section; of many spikes the lesser
    have only their row of the overview."""
    sections = [line for line in lines if line.startswith(f"## Step {onset:,}:")]
    rows = [line for line in lines if _is_overview_row(line, onset)]
    if any(sum(STILL_UP in line for line in told) > still_up for told in (sections, rows)):
        return f"{POSTMORTEM} has the spike of step {onset:,} as {STILL_UP}, and it is over"
    if max(sum(STILL_UP not in line for line in told) for told in (sections, rows)) < over:
        return f"the spike of step {onset:,} is not in {POSTMORTEM}"
    return None


def _is_overview_row(line: str, onset: int) -> bool:
    """Other tables hold numbers too: of documents, norms, sources."""
    cells = [cell.strip() for cell in line.split("|")]
    return len(cells) > 3 and cells[0] == "" and cells[1] == f"{onset:,}" and cells[2] in KINDS


def below_the_ceiling(run: Run) -> Check:
    """What was spent."""
    name, found = "below the ceiling", audit(run.folder)
    if found is None:
        return Check(name, NOT_APPLICABLE, "no ledger.jsonl: the run had no ceiling")
    return judged(name, *found)


def machine_gone(run: Run) -> Check:
    """Every machine that was rented for the run was seen to end."""
    name, found = "machine confirmed gone", gone(run.folder)
    if found is None:
        return Check(name, NOT_APPLICABLE, "no machine was rented for it, as far as is known here")
    return judged(name, *found)


def mirrored(run: Run, rows: Callable[[], Sequence[Row]]) -> Check:
    """What the run's mirror said last: it has everything, the newest good checkpoint included."""
    name, file = "nothing left to mirror", run.folder / MIRROR
    if not file.exists():
        return Check(name, NOT_APPLICABLE, f"no {MIRROR}: no mirror, or this folder is a copy of the run")
    state = last_word(run.folder)
    if state is None:
        return Check(name, FAILED, f"{file} can't be read")
    if state.state == "lost":
        return Check(name, FAILED, f"another writer has the run: {state.why}")
    newest = next(iter(list_checkpoints(run.checkpoints)), None)
    behind = f"{state.lag_s:.0f} s, {state.lag_bytes:,} bytes"
    if state.state == "writing" and last_step(rows()) < run.total_steps:
        return Check(name, NOT_APPLICABLE, f"still being mirrored to {state.label}, behind by {behind}")
    problems = [f"{state.lag_bytes:,} bytes are not mirrored"] if state.lag_bytes else []
    if newest is not None and step_of(newest) not in state.mirrored:
        problems.append(f"{newest.name} is not mirrored")
    if problems:
        why = f" ({state.trouble})" if state.trouble else ""
        problems[-1] += f"{why}: `x1 push {run.folder} {state.uri}` sends what is left"
    return judged(name, problems, f"{state.label} has all of it, as epoch {state.epoch}")


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
