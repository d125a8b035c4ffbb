"""A run -> the folder of artifacts to show others.

    python -m x1_pretrain.export_run --mlflow-uri file:///workspace/mlruns --output experiments/X1-pretraining/run-cloud/
    x1 export x1-50m-a100 --output export/

Writes manifest.json (with the sha256 of every file), metrics.csv, the three pictures, the final weights and optimizer
state, config.yaml and mlflow-run-uri.txt. The folder appears whole or not at all. Exporting again replaces the earlier
export and keeps what others put beside it. Exit code 1 when something could not be exported; it says what.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import parse_config, parse_yaml
from x1_pretrain.errors import FAULT, FINISHED, RefusedError, UserError
from x1_pretrain.records import mlflow_store
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.records.plots import History, draw_all
from x1_pretrain.records.run_folder import (
    Row,
    Run,
    find_run,
    is_number,
    last_step,
    last_value,
    list_runs,
    open_run,
    read_json,
    resume_steps,
    sessions,
    validation_losses,
)
from x1_pretrain.runtime.checkpoint_files import newest_good, sha256, step_of

RUNS = Path("runs")
WEIGHTS = {"model.safetensors": "final.safetensors", "optimizer.safetensors": "final-optimizer.safetensors"}
KEEPERS = {".gitkeep", ".gitignore"}  # a folder with nothing else in it counts as empty
MLFLOW_OFF = "MLflow was off for this run; metrics.csv holds every point"


@dataclass
class Material:
    """What there is to export, wherever it came from."""

    name: str
    manifest: dict[str, Any]
    rows: Sequence[Row]
    resumes: Sequence[int]
    total_steps: int | None
    clip: float | None
    config_text: str | None
    mlflow_line: str
    checkpoint: Path | None = None
    secret: tuple[str, str] = ("", "")  # an address with a password, and what is written instead
    missing: list[str] = field(default_factory=list)  # what could not be exported, and why

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and last_step(self.rows) >= self.total_steps

    @property
    def label(self) -> str:
        if self.finished:
            return self.name
        return f"{self.name} (unfinished: step {last_step(self.rows):,} of {self.total_steps or '?':,})"


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
    except (
        Exception
    ) as error:  # a server or a database may fail in any way; the run folder can still be exported
        return [], f"{store} can't be read ({type(error).__name__}: {str(error).splitlines()[0][:150]})"
    wanted = "".join(
        f" {what} {value!r}" for what, value in (("in experiment", experiment), ("named", name)) if value
    )
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
    print(
        f"run {chosen.name} ({chosen.x1_run_id}), the newest X1 run in {mlflow_store.without_password(chosen.store)}"
    )
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
    pointer, uri = run.mlflow(), run.config.mlflow.uri
    line = MLFLOW_OFF
    if pointer is not None:
        line = mlflow_store.run_uri(pointer["uri"], pointer.get("experiment_id"), pointer["run_id"])
    material = Material(
        name=run.name,
        manifest=run.manifest,
        rows=rows,
        resumes=resume_steps(rows, run.events()),
        total_steps=run.total_steps,
        clip=run.config.optimizer.clip,
        config_text=(run.folder / "config.yaml").read_text(encoding="utf-8"),
        mlflow_line=line,
        secret=(uri, mlflow_store.without_password(uri)) if uri else ("", ""),
    )
    _pick_checkpoint(material, run)
    return material


def _pick_checkpoint(material: Material, run: Run) -> None:
    """The newest checkpoint that verifies; of a finished run it must be the one of the last step."""
    material.checkpoint, skipped = newest_good(run.checkpoints)
    material.missing += [f"checkpoint {path.name}: {reason}; skipped" for path, reason in skipped]
    if material.checkpoint is None:
        material.missing.append(f"{' and '.join(WEIGHTS.values())}: no good checkpoint in {run.checkpoints}")
    elif material.finished and step_of(material.checkpoint) < last_step(material.rows):
        material.missing.append(
            f"the weights of step {last_step(material.rows)}: the newest good checkpoint is {material.checkpoint.name}"
        )


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
# Writing


def export(material: Material, output: Path) -> list[str]:
    """Make `output` the export of the run; the names of its files."""
    output = output.absolute() if not output.exists() else output.resolve()
    run_id = str(material.manifest["run_id"])
    _refuse_others(output, run_id)
    new = output.with_name(f".{output.name}.exporting")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        _write(material, new)
        if output.exists():
            _carry_over(output, new)
        _put_in_place(new, output)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(
            f"--output {output}: can't be written ({error.strerror}); nothing there was changed"
        ) from None
    return sorted(file.name for file in output.iterdir())


def _refuse_others(output: Path, run_id: str) -> None:
    """Only an empty folder or this run's own earlier export may be written over."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output}: this is a file; expected a folder")
    if {entry.name for entry in output.iterdir()} <= KEEPERS:
        return
    manifest = read_json(output / "manifest.json") if (output / "manifest.json").is_file() else {}
    if manifest.get("kind") != "export":
        raise RefusedError(
            f"--output {output}: not empty and not an export; choose another folder or empty it"
        )
    if manifest.get("run_id") != run_id:
        raise RefusedError(
            f"--output {output}: holds the export of another run ({manifest.get('run_id')}), this one is {run_id}; "
            "choose another folder"
        )


def _write(material: Material, folder: Path) -> None:
    _write_csv(material.rows, folder / "metrics.csv")
    draw_all(History(material.label, material.rows, material.resumes, material.clip), folder)
    (folder / "mlflow-run-uri.txt").write_text(material.mlflow_line + "\n", encoding="utf-8")
    if material.config_text is not None:
        (folder / "config.yaml").write_text(_public(material.config_text, material), encoding="utf-8")
    if material.checkpoint is not None:
        for source, target in WEIGHTS.items():
            shutil.copyfile(material.checkpoint / source, folder / target)
    manifest = _manifest(material, folder)
    text = _public(json.dumps(manifest, indent=1, ensure_ascii=False), material)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _public(text: str, material: Material) -> str:
    """Others will read this: no password in the address of the store."""
    secret, instead = material.secret
    return text.replace(secret, instead) if secret else text


def _write_csv(rows: Sequence[Row], file: Path) -> None:
    """Long form, one line a point. A metric that two rows of one step hold (tokens) is written once."""
    done: set[tuple[int, str]] = set()
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("step", "name", "value"))
        for row in rows:
            for name, value in row.items():
                if name != "step" and is_number(value) and (row["step"], name) not in done:
                    done.add((row["step"], name))
                    writer.writerow((row["step"], name, repr(value)))


def _manifest(material: Material, folder: Path) -> dict[str, Any]:
    """The run's own manifest, then how it ended and what is in this folder."""
    rows = material.rows
    spent = last_value(rows, "budget/spent_usd")
    return {
        **material.manifest,
        "schema_version": 1,
        "kind": "export",
        "exported_utc": utc_now(),
        "status": "finished" if material.finished else "unfinished",
        "total_steps": material.total_steps,
        "final": {
            "step": last_step(rows),
            "tokens": int(last_value(rows, "tokens") or 0),
            "elapsed_s": last_value(rows, "elapsed_s"),
            "losses": {name: last_value(rows, name) for name in ("train/loss", *validation_losses(rows))},
        },
        "spent_usd": spent if spent is not None else material.manifest.get("spent_usd"),
        "sessions": sessions(rows),
        "resumed_from_steps": list(material.resumes),
        "checkpoint": _checkpoint(material.checkpoint),
        "not_exported": material.missing,
        "files": {file.name: _identity(file) for file in sorted(folder.iterdir())},
    }


def _checkpoint(path: Path | None) -> dict[str, Any] | None:
    return {"name": path.name, "step": step_of(path), "files": WEIGHTS} if path else None


def _identity(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _carry_over(old: Path, new: Path) -> None:
    """What others put beside an earlier export (a post-mortem, a screenshot) stays."""
    ours = {"manifest.json"}
    if (old / "manifest.json").is_file():
        ours |= set(read_json(old / "manifest.json").get("files", {}))
    for entry in old.iterdir():
        if entry.name in ours or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _put_in_place(new: Path, output: Path) -> None:
    if output.exists():
        old = output.with_name(f".{output.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        new.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(output)


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
    """Export a run: manifest, metrics, pictures, final weights. A run still going on is exported as it stands."""
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
