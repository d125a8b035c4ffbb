"""Whether two things are of one run: by the marks that are written in them."""

from __future__ import annotations

import json
from pathlib import Path

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.head import Head
from x1_pretrain.records.checkpoint_files import list_checkpoints


def mark_in(file: Path, key: str) -> str | None:
    """The `run_id` or `fingerprint` in a file of JSON; none where there is none that can be read."""
    try:
        found = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def run_id_of(folder: Path) -> str | None:
    """Of a run folder or of a checkpoint."""
    return mark_in(folder / "manifest.json", "run_id")


def refuse_another_run(head: Head, where: str, folder: str | Path, run_id: str | None) -> None:
    """RefusedError where `folder` is of `run_id`, and the mirror's run is another."""
    if run_id and head.run_id and run_id != head.run_id:
        raise RefusedError(
            f"{where}: holds the run {head.run_id}, and {folder} is the run {run_id}; give one of them "
            "another name (`name` of the config), or move the mirrored one to the trash (`x1 runs rm`)"
        )


def refuse_checkpoints_of_another(checkpoints: Path, where: str, run_id: str | None) -> None:
    """RefusedError before one of another run is set aside: --ckpt-dir may have been mistyped."""
    if run_id and (found := another_run_in(checkpoints, run_id)):
        raise RefusedError(
            f"{found[0]}: is a checkpoint of the run {found[1]}, and {where} is the run {run_id}; name the "
            "checkpoint folder of this run, or an empty one (--ckpt-dir)"
        )


def another_run_in(checkpoints: Path, run_id: str | None) -> tuple[Path, str] | None:
    """The first checkpoint that is not of this run, and of which it is."""
    found = ((path, run_id_of(path)) for path in list_checkpoints(checkpoints))
    return next(((path, other) for path, other in found if other and other != run_id), None)
