"""The version of every file we write, in one place: a newer one is refused with a line, an older one is read.

A JSON file says its own `schema_version`. A `.jsonl` file of a run folder has no room for one that would not
be in the way of every reader of its rows: the folder's manifest says it, under `formats`. The ledger, which
may be all there is of a run, says it in its first row. A number goes up when readers of today would take the
file for something else than it is; a new key, or a new file, is no reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from x1_pretrain.errors import RefusedError

# The lines of a run folder: what its manifest says of them
FORMATS = {
    "config.yaml": 1,
    "metrics.jsonl": 1,
    "steps.jsonl": 1,
    "events.jsonl": 1,
    "samples.jsonl": 1,
    "blocks.jsonl": 1,
    "ledger.jsonl": 1,
}

# Everything that says its own: by its `kind`, else by its name
VERSIONS = FORMATS | {
    "run": 1,  # manifest.json of a run folder
    "checkpoint": 1,  # manifest.json of a checkpoint
    "state.json": 1,
    "export": 1,  # manifest.json of an export
    "sweep": 1,
    "budget.json": 1,
    "guard.json": 1,
    "STOP.json": 1,
    "termination.json": 1,
    "mlflow.json": 1,
    "mirror-state": 1,  # mirror.json
    "trashed": 1,  # trashed.json of a run in the trash
}


def of_run(earlier: Mapping[str, Any]) -> dict[str, int]:
    """For a run folder's manifest; `earlier` is what a session before wrote, {} if there was none. A run from
    before `steps.jsonl` never says that it has it: it lacks the first steps."""
    told = earlier.get("formats")
    without = bool(earlier) and not (isinstance(told, dict) and "steps.jsonl" in told)
    return {name: number for name, number in FORMATS.items() if not (without and name == "steps.jsonl")}


def refuse_newer(tree: Mapping[str, Any], file: Path) -> None:
    """RefusedError if `tree`, which is what `file` says, was written by a later x1."""
    kind = tree.get("kind")
    name = kind if isinstance(kind, str) and kind in VERSIONS else file.name
    _compare(tree.get("schema_version"), VERSIONS.get(name, 1), str(file))


def check_folder(folder: Path) -> None:
    """RefusedError if a run folder holds a file of a later version; before anything in it is read as rows, or
    written. A folder without a manifest, or with a damaged one, is not judged here."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict):
        check_manifest(manifest, file)


def check_manifest(manifest: Mapping[str, Any], file: Path) -> None:
    """The same of a manifest that was read already."""
    refuse_newer(manifest, file)
    told = manifest.get("formats")
    for name, version in told.items() if isinstance(told, dict) else ():
        _compare(version, VERSIONS.get(name, 1), str(file.with_name(str(name))))


def _compare(found: object, known: int, what: str) -> None:
    """A version that is no number is not ours to judge: what else is wrong with the file is said by its
    reader."""
    if isinstance(found, int) and not isinstance(found, bool) and found > known:
        raise RefusedError(f"{what}: schema version {found}, this x1 reads up to {known}; update x1")
