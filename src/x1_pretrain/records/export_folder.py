"""The export of a run: a folder of artifacts to show others, written whole or not at all.

manifest.json names every other file with its sha256. Exporting again replaces the earlier export of the same
run and keeps what others put beside it; any other folder with something in it is refused.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.records.checkpoint_files import sha256, step_of
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.records.plots import History, draw_all
from x1_pretrain.records.run_folder import (
    POSTMORTEM,
    Row,
    is_number,
    last_step,
    last_value,
    read_json,
    sessions,
    validation_losses,
)
from x1_pretrain.records.run_manifest import without_passwords

WEIGHTS = {"model.safetensors": "final.safetensors", "optimizer.safetensors": "final-optimizer.safetensors"}
STEM = POSTMORTEM.removesuffix(".md")
STORY = (POSTMORTEM, f"{STEM}*.png", f"{STEM}-data.csv", "report.html")
PICTURES = {".png"}  # everything else that is copied is text
KEEPERS = {".gitkeep", ".gitignore"}  # a folder with nothing else in it counts as empty


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
    beside: tuple[Path, ...] = ()  # what it cost, the proof that its machines are gone, its story
    secret: tuple[str, str] = ("", "")  # an address with a password, and what is written instead
    missing: list[str] = field(default_factory=list)  # what could not be exported, and why

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and last_step(self.rows) >= self.total_steps

    @property
    def label(self) -> str:
        if self.finished:
            return self.name
        of_all = f" of {self.total_steps:,}" if self.total_steps else ""
        return f"{self.name} (unfinished: step {last_step(self.rows):,}{of_all})"

    def public(self, text: str) -> str:
        """Others will read this: no password in the address of the store."""
        secret, instead = self.secret
        return without_passwords(text.replace(secret, instead) if secret else text)


def export(material: Material, output: Path) -> list[str]:
    """Make `output` the export of the run; the names of its files."""
    output = output.resolve()
    _bring_back(output)
    _refuse_others(output, str(material.manifest["run_id"]))
    new = output.with_name(f".{output.name}.exporting")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        _write(material, new)
        _put_in_place(new, output)
    except OSError as error:
        _bring_back(output)
        shutil.rmtree(new, ignore_errors=True)
        what = f"{error.filename or output}: {error.strerror}"
        raise UserError(f"{what}; nothing in {output} was changed: mend that and export again") from None
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
            f"--output {output}: holds the export of run {manifest.get('run_id')}, this one is {run_id}; "
            "choose another folder"
        )


# -----------------------------------------------------------------------------------------------------------
# The files


def _write(material: Material, folder: Path) -> None:
    _write_csv(material.rows, folder / "metrics.csv")
    draw_all(History(material.label, material.rows, material.resumes, material.clip), folder)
    (folder / "mlflow-run-uri.txt").write_text(material.mlflow_line + "\n", encoding="utf-8")
    if material.config_text is not None:
        (folder / "config.yaml").write_text(material.public(material.config_text), encoding="utf-8")
    if material.checkpoint is not None:
        for source, target in WEIGHTS.items():
            shutil.copyfile(material.checkpoint / source, folder / target)
    for file in material.beside:
        _copy_beside(material, file, folder / file.name)
    manifest = _manifest(material, folder)
    _check_copies(material.checkpoint, manifest["files"])
    text = material.public(json.dumps(manifest, indent=1, ensure_ascii=False))
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def story(folder: Path) -> tuple[Path, ...]:
    """What a run tells of itself in words and pictures, as far as it is there."""
    return tuple(file for name in STORY for file in sorted(folder.glob(name)) if file.is_file())


def _copy_beside(material: Material, file: Path, target: Path) -> None:
    """Pictures as they are, text without passwords. Bytes that are no UTF-8 stay what they were."""
    if file.suffix in PICTURES:
        shutil.copyfile(file, target)
    else:
        text = file.read_bytes().decode("utf-8", "surrogateescape")
        target.write_bytes(material.public(text).encode("utf-8", "surrogateescape"))


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


def _check_copies(checkpoint: Path | None, files: dict[str, Any]) -> None:
    """The copies must have the hashes that the checkpoint was sealed with."""
    sealed = read_json(checkpoint / "manifest.json")["files"] if checkpoint else {}
    for source, target in WEIGHTS.items():
        if sealed and sealed[source]["sha256"] != files[target]["sha256"]:
            raise UserError(f"{target}: differs from {checkpoint}/{source} after copying; check the disk")


# -----------------------------------------------------------------------------------------------------------
# Into place


def _put_in_place(new: Path, output: Path) -> None:
    """Two renames; what is not ours was copied before them. `_bring_back` mends a kill between the two."""
    if not output.exists():
        new.rename(output)
        return
    _carry_over(output, new)
    old = _replaced(output)
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    new.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _replaced(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _bring_back(output: Path) -> None:
    """An export that ended between its two renames left the earlier folder, others' files too, put aside."""
    there = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if _replaced(output).is_dir() and not there:
        _replaced(output).rename(output)  # onto nothing or an empty folder


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
