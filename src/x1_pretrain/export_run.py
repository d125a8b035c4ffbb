"""A run -> the folder of artifacts to show others.

    python -m x1_pretrain.export_run --mlflow-uri file:///workspace/mlruns \\
        --output experiments/X1-pretraining/run-cloud/
    x1 export x1-50m-a100 --output export/

Writes manifest.json, metrics.csv, loss-curve.png, gradnorm-curve.png, throughput.png, final.safetensors,
final-optimizer.safetensors, config.yaml and mlflow-run-uri.txt. With only a store given it takes the newest
X1 run in it, and that run's folder if it is still there; else what MLflow has. Exit code 1 when something
could not be exported; it says what.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config_reading import parse_config, parse_yaml
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.money import audit
from x1_pretrain.records import mlflow_store
from x1_pretrain.records.checkpoint_files import newest_good, step_of
from x1_pretrain.records.export_folder import WEIGHTS, Material, export, story
from x1_pretrain.records.run_folder import (
    Row,
    Run,
    find_run,
    last_step,
    list_runs,
    open_run,
    read_json,
    resume_steps,
)

RUNS = Path("runs")
MLFLOW_OFF = "MLflow was off for this run; metrics.csv holds every point"
MLFLOW_LOST = "mlflow.json of this run names no MLflow run; metrics.csv holds every point"


# -----------------------------------------------------------------------------------------------------------
# Which run


def choose(run: str | None, uri: str | None, experiment: str | None, name: str | None) -> Material:
    """The run that is meant: the folder named, else the newest (or the named) one in the MLflow store."""
    if run is not None:
        return from_folder(open_run(find_run(run, RUNS)))
    if uri is None:
        there = ", ".join(folder.name for folder in list_runs(RUNS)) or "none"
        raise UserError(f"no run given: pass RUN (under {RUNS}/: {there}) or --mlflow-uri URI")
    found, why_not = _in_store(uri, experiment, name)
    if not found:
        return from_folder(_folder_of_store(uri, experiment, name, why_not))
    _say_choice(found)
    folder = found[0].folder
    if _is_that_run(folder, found[0].x1_run_id):
        return from_folder(open_run(folder))
    return from_store(uri, found[0])


def _in_store(uri: str, experiment: str | None, name: str | None) -> tuple[list[mlflow_store.Found], str]:
    """The runs in the store, the newest first; or none, and why."""
    store = mlflow_store.without_password(mlflow_store.database_uri(uri))
    if not mlflow_store.is_installed():
        return [], f"{store} can't be read, MLflow is not installed ({mlflow_store.INSTALL})"
    if not mlflow_store.is_there(uri):
        return [], f"there is no MLflow store at {store}"
    try:
        found = mlflow_store.find_runs(mlflow_store.connect(uri), uri, experiment, name)
    except Exception as error:  # a store may fail in any way; the run folder can still be exported
        return [], f"{store} can't be read ({mlflow_store.reason_of(error)})"
    wanted = (f" named {name!r}" if name else "") + (f" of experiment {experiment!r}" if experiment else "")
    return found, f"no X1 run{wanted} in {store}"


def _folder_of_store(uri: str, experiment: str | None, name: str | None, why_not: str) -> Run:
    """Without the store: the newest run folder that says its metrics went there."""
    for run in map(open_run, list_runs(RUNS)):
        same = run.config.mlflow.uri and mlflow_store.database_uri(run.config.mlflow.uri) == (
            mlflow_store.database_uri(uri)
        )
        if same and experiment in (None, run.config.mlflow.experiment) and name in (None, run.name):
            print(f"{why_not}; exporting from {run.folder}, the newest run folder whose metrics go there")
            return run
    there = ", ".join(folder.name for folder in list_runs(RUNS)) or "none"
    raise UserError(
        f"{why_not}; name a run folder instead: `x1 export RUN --output DIR` (under {RUNS}/: {there})"
    )


def _say_choice(found: Sequence[mlflow_store.Found]) -> None:
    chosen, *others = found
    store = mlflow_store.without_password(chosen.store)
    print(f"run {chosen.name} ({chosen.x1_run_id}), the newest X1 run in {store}")
    if others:
        listed = ", ".join(f"{run.name} ({run.x1_run_id})" for run in others[:10])
        print(f"others there, --run NAME picks one: {listed}")


def _is_that_run(folder: Path, run_id: str) -> bool:
    """The folder may be gone, or hold a later run of the same name."""
    file = folder / "manifest.json"
    return file.is_file() and read_json(file).get("run_id") == run_id


# -----------------------------------------------------------------------------------------------------------
# What there is


def from_folder(run: Run) -> Material:
    """All there is: the folder is the run."""
    rows = run.rows()
    uri = run.config.mlflow.uri
    material = Material(
        name=run.name,
        manifest=run.manifest,
        rows=rows,
        resumes=resume_steps(rows, run.events()),
        total_steps=run.total_steps,
        clip=run.config.optimizer.clip,
        config_text=(run.folder / "config.yaml").read_text(encoding="utf-8"),
        mlflow_line=_mlflow_line(run.mlflow()),
        secret=(uri, mlflow_store.without_password(uri)) if uri else ("", ""),
        beside=(
            *(file for name in audit.FILES if (file := run.folder / name).is_file()),
            *story(run.folder),
        ),
    )
    _pick_checkpoint(material, run)
    return material


def _mlflow_line(pointer: dict[str, Any] | None) -> str:
    """The address of the copy in MLflow, or why there is none."""
    if pointer is None:
        return MLFLOW_OFF
    uri, run_id = pointer.get("uri"), pointer.get("run_id")
    if not isinstance(uri, str) or not isinstance(run_id, str):
        return MLFLOW_LOST
    return mlflow_store.run_uri(uri, pointer.get("experiment_id"), run_id)


def _pick_checkpoint(material: Material, run: Run) -> None:
    """The newest checkpoint that verifies; of a finished run it must be the one of the last step."""
    material.checkpoint, skipped = newest_good(run.checkpoints)
    material.missing += [f"checkpoint {path.name}: {reason}; skipped" for path, reason in skipped]
    if material.checkpoint is None:
        material.missing.append(f"{' and '.join(WEIGHTS.values())}: no good checkpoint in {run.checkpoints}")
    elif material.finished and step_of(material.checkpoint) < last_step(material.rows):
        wanted, got = last_step(material.rows), material.checkpoint.name
        material.missing.append(f"weights of step {wanted}: the newest good checkpoint is {got}")


def from_store(uri: str, found: mlflow_store.Found) -> Material:
    """What MLflow has of a run whose folder is gone: its metrics, its config, its manifest; no weights."""
    client = mlflow_store.connect(uri)
    with tempfile.TemporaryDirectory() as scratch:
        config_text = mlflow_store.kept_file(client, found.run_id, "config.yaml", Path(scratch))
        manifest_text = mlflow_store.kept_file(client, found.run_id, "manifest.json", Path(scratch))
    config = parse_config(parse_yaml(config_text, "config.yaml"), "config.yaml") if config_text else None
    rows = [_whole_numbers(row) for row in mlflow_store.history(client, found.run_id)]
    missing = [f"{' and '.join(WEIGHTS.values())}: the run folder {found.folder} is not on this machine"]
    missing += [
        f"{name}: MLflow has no copy" for name, text in _texts(config_text, manifest_text) if not text
    ]
    return Material(
        name=found.name,
        manifest=json.loads(manifest_text)
        if manifest_text
        else {"run_id": found.x1_run_id, "name": found.name},
        rows=rows,
        resumes=resume_steps(rows, []),
        total_steps=config.training.total_steps if config else None,
        clip=config.optimizer.clip if config else None,
        config_text=config_text,
        mlflow_line=mlflow_store.run_uri(found.store, found.experiment_id, found.run_id),
        missing=missing,
    )


def _texts(config: str | None, manifest: str | None) -> list[tuple[str, str | None]]:
    return [("config.yaml", config), ("the run's manifest", manifest)]


def _whole_numbers(row: Row) -> Row:
    """MLflow keeps every number as a float."""
    return {name: int(value) if name in ("tokens", "session") else value for name, value in row.items()}


# -----------------------------------------------------------------------------------------------------------
# The command


def main(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="run folder, or a name under runs/")
    ] = None,
    output: Annotated[Path, typer.Option(help="the folder to write")] = ...,  # type: ignore[assignment]
    mlflow_uri: Annotated[str | None, typer.Option(help="MLflow store: export its newest X1 run")] = None,
    mlflow_experiment: Annotated[str | None, typer.Option(help="only runs of this experiment")] = None,
    name: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="not the newest run but this one")
    ] = None,
) -> int:
    """Export a run: manifest, metrics, pictures, final weights; one still going on as it stands."""
    if run is not None and name is not None:
        raise UserError(f"RUN {run} and --run {name} both name a run; pass one of them")
    material = choose(run, mlflow_uri, mlflow_experiment, name)
    files = export(material, output)
    checkpoint = f", weights of {material.checkpoint.name}" if material.checkpoint else ""
    print(f"{material.label}{checkpoint}\nexported to {output}: {', '.join(files)}")
    for line in material.missing:
        print(f"not exported: {line}")
    return FAULT if material.missing else FINISHED


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.export_run"))
