"""Run folders -> `runs.csv`, the table that a law is fitted on. Read from the records, never by hand.

A run is a point when it finished: its schedule had ended and its last evaluation is of its last step.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from x1_pretrain.learning.schedule import learning_rate
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.money.account import account
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.money.ledger import read_rows, usd
from x1_pretrain.records.run_folder import Run, find_run, is_run, open_run, series

COLUMNS = (
    *(
        "run_id",
        "N",
        "D",
        "val_loss",
        "usd_spent",
        "N_total",
        "flops",
        "trunk",
        "schedule",
        "decayed",
        "seed",
    ),
    *("steps", "batch_tokens", "context", "lr", "val_tokens", "data", "checkpoint", "run_dir"),
)


class Collected(NamedTuple):
    rows: list[dict[str, Any]]
    left_out: list[str]  # each with the reason


def collect(
    folders: Iterable[Path], usd_per_hr: Decimal | None = None, unfinished: bool = False
) -> Collected:
    """A row for each run folder, in the order given; a folder named twice is there once."""
    found = Collected([], [])
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if not is_run(folder):  # planned, or killed before it had a manifest
            found.left_out.append(f"{folder}: not begun")
            continue
        run = open_run(folder)
        steps, losses = series(run.rows(), "val/loss")
        if not steps:
            found.left_out.append(f"{folder}: no validation loss on record")
        elif unfinished or is_finished(run):
            row = row_of(run, steps[-1], losses[-1], usd_per_hr)
            twin = next((one for one in found.rows if one["run_id"] == row["run_id"]), None)
            if twin:
                found.left_out.append(f"{folder}: a copy of {twin['run_dir']}, run {row['run_id']}")
            else:
                found.rows.append(row)
        else:
            found.left_out.append(
                f"{folder}: unfinished, evaluated at step {steps[-1]:,} of {run.total_steps:,}"
            )
    return found


def is_finished(run: Run) -> bool:
    """Its last step is evaluated and it said so."""
    evaluated = series(run.rows(), "val/loss")[0]
    said = any(event.get("event") == "finish" for event in run.events())
    return said and bool(evaluated) and evaluated[-1] == run.total_steps


def row_of(run: Run, step: int, loss: float, usd_per_hr: Decimal | None) -> dict[str, Any]:
    """The point that the evaluation at `step` is."""
    config, counts = run.config, parameter_counts(run.config.model)
    tokens = step * config.training.batch_tokens
    run_id, parent = str(run.manifest["run_id"]), run.manifest.get("parent") or {}
    checkpoint = run.checkpoints / f"step-{step:09d}"
    schedule, decayed = ending(run, step)
    return {
        "run_id": run_id,
        "N": counts.matrices,
        "D": tokens,
        "val_loss": loss,
        "usd_spent": "" if (spent := spent_usd(run, usd_per_hr)) is None else format(spent, ".4f"),
        "N_total": counts.total,
        "flops": f"{tokens * flops_per_token(config.model).causal:.6e}",
        "trunk": parent.get("trunk", run_id),
        "schedule": schedule,
        "decayed": "yes" if decayed else "no",
        "seed": config.seed,
        "steps": step,
        "batch_tokens": config.training.batch_tokens,
        "context": config.model.context,
        "lr": config.optimizer.lr,
        "val_tokens": evaluated_tokens(run),
        "data": "+".join(str(corpus["fingerprint"])[:12] for corpus in run.manifest["data"]),
        "checkpoint": checkpoint if checkpoint.is_dir() else "",
        "run_dir": run.folder,
    }


def ending(run: Run, step: int) -> tuple[str, bool]:
    """The schedule's name, and whether it had come down by `step`."""
    optimizer, total = run.config.optimizer, run.total_steps
    flat = optimizer.min_lr == optimizer.lr
    if flat or (optimizer.schedule == "wsd" and optimizer.decay(total) == 0):
        return "constant", False
    return optimizer.schedule, step == total and learning_rate(
        total - 1, optimizer, total
    ) == optimizer.min_lr


def evaluated_tokens(run: Run) -> int:
    """Validation tokens behind the loss: all there are, or the limit for each domain."""
    there = sum(int(corpus.get("val_tokens", 0)) for corpus in run.manifest["data"])
    rows = [row for row in run.rows() if "val/loss" in row]
    domains = sum(name.startswith("val/") and name.endswith("/bpb") for name in rows[-1])
    return min(there, max(1, domains) * run.config.evaluation.tokens)


def spent_usd(run: Run, usd_per_hr: Decimal | None) -> Decimal | None:
    """What this run itself cost: by its ledger where money was watched, else its hours at a price, else
    unknown."""
    if (run.folder / LEDGER).is_file():
        rows = read_rows(run.folder / LEDGER)
        known = account(rows)
        if known.machines:  # its own, from their launch to their end
            return known.settled_usd()
        # The readings are of a bill that others added to before; the newest is in the last row of training.
        counted = series(run.rows(), "budget/spent_usd")[1]
        spent = max([known.settled_usd(), *(Decimal(repr(one)) for one in counted)])
        before = next((usd(row, "spent_usd") for row in rows if row.get("spent_usd") is not None), None)
        return None if before is None else max(Decimal(0), spent - before)
    seconds = series(run.rows(), "elapsed_s")[1]
    if usd_per_hr is None or not seconds:
        return None
    return usd_per_hr * Decimal(repr(max(seconds))) / 3600


def write_table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The old table or the new one, never a half."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text(text.getvalue(), encoding="utf-8")
    new.replace(file)


def named_runs(names: Sequence[str]) -> list[Path]:
    """The folders that a person means: paths, or names under runs/."""
    return [find_run(name) for name in names]
