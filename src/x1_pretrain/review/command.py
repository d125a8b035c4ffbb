"""Check a run as a careful reviewer would: from its files alone, each check with its evidence in words.

    x1 verify x1-50m-a100 --export experiments/X1-pretraining/run-cloud/
    python -m x1_pretrain.review.command runs/x1-50m-a100

Exit code 0 when every check passed or does not apply, 1 when any failed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.records.run_folder import Run, find_run, last_step, open_run
from x1_pretrain.review import manifest, result
from x1_pretrain.review import rows as records
from x1_pretrain.review.check import FAILED, NOT_APPLICABLE, PASSED, Check, attempted


def verify(run: Run, export: Path | None = None) -> list[Check]:
    """Every check, in the order a reader would ask."""
    rows = cache(run.rows)  # read once, in the first check that needs them
    checks: dict[str, Callable[[], Check]] = {
        "manifest complete": lambda: manifest.manifest_complete(run),
        "config is the recorded one": lambda: manifest.config_is_the_recorded(run),
        "records readable": lambda: records.rows_whole(run),
        "no gap or overlap in steps": lambda: records.steps_covered(run, rows()),
        "every step on record": lambda: records.every_step(run, rows),
        "sessions agree with events": lambda: records.sessions_consistent(run, rows()),
        "blocks read in order": lambda: records.blocks_in_order(run),
        "final loss in the band": lambda: result.final_loss(run, rows()),
        "checkpoints verify": lambda: result.checkpoints_good(run, rows()),
        "final weights sound": lambda: result.weights_good(run),
        "final weights reload byte for byte": lambda: result.weights_reload(run),
        "post-mortem written": lambda: result.postmortem_written(run),
        "below the ceiling": lambda: result.below_the_ceiling(run),
        "machine confirmed gone": lambda: result.machine_gone(run),
        "nothing left to mirror": lambda: result.mirrored(run, rows),
        "export equals the final checkpoint": lambda: result.export_equal(run, export),
    }
    return [attempted(name, check) for name, check in checks.items()]


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
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.review.command"))
