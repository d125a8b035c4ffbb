"""Reading a run folder: its config, its manifest, its rows, its events, its checkpoints.

run = open_run(find_run("x1-50m-a100"))
steps, losses = series(run.rows(), "train/loss")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config, parse_yaml
from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import parse_stamp
from x1_pretrain.records.formats import check_manifest, refuse_newer
from x1_pretrain.stores.address import refuse_uri

Row = dict[str, Any]  # one JSON object of metrics.jsonl or events.jsonl

NEEDED = ("config.yaml", "manifest.json")  # without these two a folder is not a run
POSTMORTEM = "spike-postmortem.md"  # of a run with spikes: what they were

SILENT_S = 900.0  # a run that wrote nothing for so long is not taken for one that goes on
ENDINGS = {  # events that end a session -> what is said of it
    "signal": "interrupted",
    "fault": "ended by a fault",
    "hang": "ended, it hung",
    "budget_stopped": "stopped by its budget",
    "over_budget": "stopped at once, over its budget",
    "lease_lost": "ended, another writer has the run",
}


class Lines(NamedTuple):
    """What a .jsonl file holds."""

    rows: list[Row]
    damaged: list[
        int
    ]  # line numbers, from 1, that are not one JSON object; a torn last line is not among them
    torn: bool  # the last line has no newline: the writer was killed in the middle of it


@dataclass(frozen=True)
class Run:
    """An opened run folder. The files are read again at each call: the run may still be going on."""

    folder: Path
    config: RunConfig
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def total_steps(self) -> int:
        return self.config.training.total_steps

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are: in the run folder (a folder or a link), else where the config says."""
        inside = self.folder / "checkpoints"
        return inside if inside.exists() else self.config.checkpoint_folder

    def rows(self) -> list[Row]:
        """The rows of metrics that carry a step, as all should; `verify` counts those that don't."""
        rows = read_jsonl(self.folder / "metrics.jsonl").rows
        return [with_numbers(row) for row in rows if is_number(row.get("step"))]

    def events(self) -> list[Row]:
        return read_jsonl(self.folder / "events.jsonl").rows

    def samples(self) -> list[Row]:
        return read_jsonl(self.folder / "samples.jsonl").rows

    def mlflow(self) -> dict[str, Any] | None:
        """Which MLflow run holds the copy of the metrics; none when MLflow was off."""
        file = self.folder / "mlflow.json"
        return read_json(file) if file.exists() else None


# -----------------------------------------------------------------------------------------------------------
# Files


def read_jsonl(file: Path) -> Lines:
    """The rows of `file`. A torn last line (a kill in mid-write) is left out; no file is no rows."""
    try:
        *lines, tail = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Lines([], [], False)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    rows: list[Row] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    return Lines(rows, damaged, bool(tail.strip()))


def parse_row(line: bytes) -> Row | None:
    """The JSON object on a line, or None when it is not one."""
    try:
        row = json.loads(line)
    except ValueError:  # also bytes that are not UTF-8
        return None
    return row if isinstance(row, dict) else None


def with_numbers(row: Row) -> Row:
    """JSON has no NaN or infinity; a row of metrics holds them as strings."""
    return {name: float(v) if v in ("nan", "inf", "-inf") else v for name, v in row.items()}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; RefusedError if a later x1 wrote it."""
    try:
        tree = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(
            f"{file}: not valid JSON ({error}); restore the file, nothing here can be trusted"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(tree).__name__}")
    refuse_newer(tree, file)
    return tree


def find_run(text: str, runs: Path = Path("runs")) -> Path:
    """The folder that `text` means: a path, or the name of a run under `runs`."""
    candidates = [Path(text), runs / text]
    for folder in candidates:
        if is_run(folder):
            return folder
    refuse_uri(text)
    present = next((folder for folder in candidates if folder.exists()), None)
    raise UserError(_not_a_run(present or Path(text), runs))


def is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


def list_runs(folder: Path) -> list[Path]:
    """The run folders directly under `folder`, the most recently changed first."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_run, folder.iterdir()), key=_last_change, reverse=True)


def _last_change(run: Path) -> float:
    for name in ("metrics.jsonl", "manifest.json"):
        with suppress(OSError):
            return (run / name).stat().st_mtime
    return 0.0  # thrown away meanwhile


def _not_a_run(folder: Path, runs: Path) -> str:
    if not folder.exists():
        problem = "there is no such folder"
    elif not folder.is_dir():
        problem = "this is a file"
    else:
        problem = f"no {' and no '.join(n for n in NEEDED if not (folder / n).is_file())} in it"
    return f"{folder}: not a run folder ({problem}); {_nearby(folder, runs)}"


def _nearby(folder: Path, runs: Path) -> str:
    places = dict.fromkeys([folder, folder.parent, runs])  # in order, each once
    found = {str(run): run for place in places for run in list_runs(place)}
    if not found:
        return f"no run folders near it; the runs of this machine are usually under {runs}/"
    by_name = {run.name: path for path, run in found.items()}
    close = [by_name[name] for name in get_close_matches(folder.name, by_name, n=3, cutoff=0.4)]
    return f"run folders near it: {', '.join(close or list(found)[:5])}"


def open_run(folder: Path) -> Run:
    """Open a run folder, or say in one line why it is not one."""
    if not is_run(folder):
        raise UserError(_not_a_run(folder, Path("runs")))
    manifest = read_json(folder / "manifest.json")
    if manifest.get("kind") != "run":
        raise UserError(f"{folder}/manifest.json: expected kind 'run', found {manifest.get('kind')!r}")
    check_manifest(manifest, folder / "manifest.json")
    tree = parse_yaml(_config_text(folder / "config.yaml"), str(folder / "config.yaml"))
    if not isinstance(tree, dict):
        raise UserError(f"{folder}/config.yaml: expected sections, found {type(tree).__name__}")
    if "stability" not in tree:  # written before there was a choice: such a run only watched
        tree["stability"] = {"policy": "watch"}
    return Run(folder, parse_config(tree, str(folder / "config.yaml")), manifest)


def _config_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); restore the file") from None


# -----------------------------------------------------------------------------------------------------------
# Rows


def is_number(value: object) -> bool:
    """True for what a curve can hold; a JSON true is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def moment(row: Row) -> datetime | None:
    """When a row was written; None where it does not say, or says no time."""
    try:
        return parse_stamp(row.get("time_utc"))
    except (ValueError, OverflowError):
        return None


def series(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in the order of the rows."""
    points = [(row["step"], float(row[name])) for row in rows if "step" in row and is_number(row.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def is_train(row: Row) -> bool:
    return "train/loss" in row


def is_evaluation(row: Row) -> bool:
    return any(name.startswith("val/") for name in row)


def validation_losses(rows: Iterable[Row]) -> list[str]:
    """The names `val/loss`, `val/<domain>/loss` that the rows hold, the overall one first."""
    names = {name for row in rows for name in row if name.startswith("val/") and name.endswith("loss")}
    return sorted(names, key=lambda name: (name != "val/loss", name))


def last_step(rows: Iterable[Row]) -> int:
    """The number of steps done by the end of the rows."""
    return max((row["step"] for row in rows if is_number(row.get("step"))), default=0)


def last_value(rows: Sequence[Row], name: str) -> float | None:
    values = series(rows, name)[1]
    return values[-1] if values else None


def openings(events: Iterable[Row]) -> list[Row]:
    """The first event of each session, from the last start on: a run killed before it saved starts anew."""
    found: list[Row] = []
    for event in events:
        if not is_number(event.get("step")):
            continue
        if event.get("event") == "start":
            found = [event]
        elif event.get("event") == "resume":
            found.append(event)
    return found


def resume_steps(rows: Sequence[Row], events: Iterable[Row]) -> list[int]:
    """The steps the run was resumed from; without events, where the session number of the rows grows."""
    told = [one["step"] for one in openings(events) if one["event"] == "resume"]
    if told:
        return told
    return [one["step"] for one, other in pairwise(rows) if other.get("session", 1) > one.get("session", 1)]


def sessions(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """From when to when, and over which steps, each session trained."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if is_train(row):
            found.setdefault(row.get("session", 1), []).append(row)
    return [
        {
            "session": number,
            "first_row_step": own[0]["step"],
            "last_row_step": own[-1]["step"],
            "first_row_utc": own[0].get("time_utc"),
            "last_row_utc": own[-1].get("time_utc"),
        }
        for number, own in sorted(found.items())
    ]
