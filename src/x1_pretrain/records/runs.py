"""The runs in a folder: one `Listed` a run, from the files alone; nothing long is read to its end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from x1_pretrain.config import RunConfig
from x1_pretrain.money.clock import parse_stamp
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.records import trash
from x1_pretrain.records.checkpoint_files import list_checkpoints, step_of
from x1_pretrain.records.summary import Summary

STATES = {  # the states of a summary, as the list says them; the others are said as they are
    "waiting": "not started",
    "running": "running",
    "stopped": "stopped",
    "interrupted": "interrupted",
    "ended": "ended",
    "died": "died",
    "silent": "silent",
    "finished": "finished",
    "copy": "copy",
}
STOPPED_BY = {
    "by the guard": "by its budget",
    "by the sidecar": "by its budget",
    "by the person": "by a person",
}
WHY_LENGTH = 48


@dataclass(frozen=True)
class Listed:
    """One run, here, in a mirror or both. What is not known is None."""

    name: str
    state: str  # of records.summary, or "in trash", "only a ledger"
    why: str = ""
    where: str = "here"  # here, mirror, both
    run_id: str | None = None
    stage: str | None = None
    parent: dict[str, Any] | None = None  # of a branch: run_id and step
    step: int = 0
    total_steps: int | None = None
    tokens: int = 0
    val_loss: float | str | None = None
    spent_usd: str | None = None
    elapsed_s: float | None = None
    host: str | None = None
    updated_utc: str | None = None
    folder: str | None = None
    mirror: str | None = None  # its address there
    good_here: int | None = None  # step of the newest good checkpoint
    good_mirror: int | None = None
    bytes_here: int | None = None
    bytes_mirror: int | None = None
    behind: dict[str, Any] | None = None  # not mirrored yet: lag_bytes, lag_s, steps
    trash_until_utc: str | None = None
    trouble: str = ""
    steps_here: tuple[int, ...] = ()  # of the checkpoints
    config: RunConfig | None = field(default=None, repr=False, compare=False)

    @property
    def status(self) -> str:
        """For people: `running on gpu-7`, `stopped by its budget`, `interrupted (SIGTERM)`, `died`."""
        if self.trash_until_utc:
            return f"in trash until {self.trash_until_utc[:10]}"
        word = STATES.get(self.state, self.state)
        if self.state == "running":
            told = f" ({_short(self.why)})" if self.why else ""
            return f"running on {self.host}{told}" if self.host else f"running{told}"
        if self.state == "stopped":
            by, _, reason = self.why.partition(":")
            return (
                f"stopped {STOPPED_BY.get(by, by or 'by its budget')}" if reason else "stopped by its budget"
            )
        if self.state == "copy":
            return f"copy {self.why}"
        if self.why and self.state in ("interrupted", "ended", "died"):
            return f"{word} ({_short(self.why)})" if self.state != "ended" else f"ended: {_short(self.why)}"
        return word

    def to_json(self) -> dict[str, Any]:
        """What `x1 runs --json` says of it."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "config"}
        return known | {"status": self.status, "steps_here": list(self.steps_here)}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WHY_LENGTH else f"{line[: WHY_LENGTH - 1]}…"


# -----------------------------------------------------------------------------------------------------------
# Looking


def local_runs(folder: Path, now_s: float) -> list[Listed]:
    """Every run directly in `folder`, and those in its trash; or the one run that `folder` is."""
    if is_begun(folder):
        return [look(folder, now_s)]
    found = [look(child, now_s) for child in _folders(folder) if is_begun(child) or _has_ledger(child)]
    return found + [_trashed(entry, now_s) for entry in trash.entries(folder)]


def is_begun(folder: Path) -> bool:
    """A run folder; also of a run that has no manifest yet, which comes when it is compiled."""
    config, manifest = folder / "config.yaml", folder / "manifest.json"
    return config.is_file() and (manifest.is_file() or (folder / "events.jsonl").is_file())


def _has_ledger(folder: Path) -> bool:
    return (folder / LEDGER).is_file()


def _folders(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as found:
        names = sorted(one.name for one in found if one.is_dir() and not one.name.startswith("."))
    return (folder / name for name in names)


def look(folder: Path, now_s: float) -> Listed:
    """One run folder."""
    summary = Summary(folder)
    told = summary.look(now_s)
    begun = is_begun(folder)
    return Listed(
        name=str(told["name"]),
        state=told["state"] if begun else "only a ledger",
        why=told["why"] if begun else "its folder is on the machine it trained on",
        run_id=told["run_id"],
        stage=told["stage"] if begun else None,
        parent=told["parent"],
        step=told["step"],
        total_steps=told["total_steps"],
        tokens=told["tokens"],
        val_loss=told["val_loss"],
        spent_usd=told["spent_usd"],
        elapsed_s=told["elapsed_s"],
        host=told["host"],
        updated_utc=told["updated_utc"] or told["created_utc"] or _changed(folder),
        folder=str(folder),
        good_here=told["newest_good"],
        bytes_here=size_of(folder, summary.checkpoints),
        steps_here=tuple(sorted(map(step_of, _attempted_list(summary.checkpoints)))),
        trouble=told["trouble"],
        config=summary.config,
    )


def _trashed(entry: trash.Entry, now_s: float) -> Listed:
    """A run in the trash, as it was."""
    found = replace(look(entry.folder, now_s), name=entry.name, trash_until_utc=entry.until_utc)
    if entry.checkpoints:
        found = replace(found, bytes_here=size_of(entry.folder, Path(entry.checkpoints.now)))
    return replace(found, state="in trash", why="")


def _attempted_list(folder: Path) -> list[Path]:
    try:
        return list_checkpoints(folder)
    except OSError:
        return []


def _changed(folder: Path) -> str | None:
    """Of a run that has written no row: when its folder was last changed."""
    try:
        at = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    except OSError:
        return None
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def size_of(folder: Path, checkpoints: Path) -> int:
    """Bytes of all its files; those of checkpoints that lie elsewhere too."""
    own = folder / "checkpoints"
    elsewhere = checkpoints if own.is_symlink() or (checkpoints != own and checkpoints.is_dir()) else None
    return bytes_below(folder) + (bytes_below(elsewhere) if elsewhere else 0)


def bytes_below(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - half the time
            except OSError:
                continue  # removed meanwhile
    return total


# -----------------------------------------------------------------------------------------------------------
# Lists


def newest_first(runs: Iterable[Listed]) -> list[Listed]:
    """By their last record; what is in the trash last."""
    return sorted(runs, key=lambda one: (one.trash_until_utc is None, _age_key(one)), reverse=True)


def _age_key(one: Listed) -> float:
    try:
        return parse_stamp(one.updated_utc).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def descendants(run_id: str | None, runs: Iterable[Listed]) -> list[Listed]:
    """The runs that began from a checkpoint of this one, or of one that did. None in the trash counts."""
    if run_id is None:
        return []
    return [
        one
        for one in runs
        if one.parent is not None
        and one.run_id != run_id
        and one.trash_until_utc is None
        and run_id in (one.parent.get("run_id"), one.parent.get("trunk"))
    ]
