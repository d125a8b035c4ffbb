"""What a run folder is to its mirror, and which checkpoint it goes on from: nothing is changed here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x1_pretrain.mirror.claim import UNSAID
from x1_pretrain.mirror.fetch import is_same
from x1_pretrain.mirror.head import Head, Object, Published
from x1_pretrain.records.checkpoint_files import list_checkpoints, step_of
from x1_pretrain.records.mirror_state import read_state

MARKER = ".restoring.json"  # in a run folder whose records are being replaced


@dataclass(frozen=True)
class Standing:
    """Whose rows are the run's: the folder's, or the mirror's."""

    ours: bool
    epoch: int = 0  # the folder's last as writer; 0: not known
    changed: bool = False  # no other wrote since, but its events are not what they were


def standing(folder: Path, head: Head) -> Standing:
    """The folder tells the run's story if it was the last to write it, and lost nothing since; or if it
    only has more than the mirror, wherever it comes from."""
    if (begun := _marked_epoch(folder)) is not None:
        return Standing(False, begun)
    if not head.records and not head.checkpoints:
        return Standing(True)
    state = read_state(folder)
    own = next((e for e in head.epochs if state and (e.epoch, e.token) == (state.epoch, state.token)), None)
    if own is None:
        whole = all(
            begins_with(folder / name, head.records.get(name, []))
            for name in ("events.jsonl", "metrics.jsonl")
        )
        return Standing(whole and (folder / "events.jsonl").exists())
    later = [e for e in head.epochs if own.epoch < e.epoch < head.writer.epoch and e.from_step != UNSAID]
    same = begins_with(folder / "events.jsonl", head.records.get("events.jsonl", []))
    return Standing(same and not later, own.epoch, changed=not (same or later))


def _marked_epoch(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / MARKER).read_bytes())["epoch"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def begins_with(file: Path, pieces: Iterable[Object]) -> bool:
    """Whether a local file begins with what the mirror has of it. Nothing is fetched for that."""
    try:
        with file.open("rb") as stream:
            return all(
                hashlib.sha256(stream.read(piece.bytes)).hexdigest() == piece.sha256 for piece in pieces
            )
    except FileNotFoundError:
        return not list(pieces)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to go on from: a local folder, or a published one."""

    step: int
    local: Path | None = None
    published: Published | None = None

    def __str__(self) -> str:
        return str(self.local) if self.local else f"the mirrored checkpoint of step {self.step}"


def candidates(checkpoints: Path, head: Head, ours: bool) -> list[Candidate]:
    """The newest first; of two of one step the local one, unless the mirror tells the story and has another
    one."""
    found = [(path, head.published(step_of(path))) for path in list_checkpoints(checkpoints)]
    trusted = {path for path, twin in found if ours or twin is None or is_same(path, twin)}
    ranked = [
        (step_of(path), 2 if path in trusted else 0, Candidate(step_of(path), path)) for path, _ in found
    ]
    ranked += [(one.step, 1, Candidate(one.step, None, one)) for one in head.checkpoints]
    return [one for _, _, one in sorted(ranked, key=lambda entry: entry[:2], reverse=True)]


def of_lost_branch(checkpoints: Path, head: Head, standing: Standing) -> list[Path]:
    """Local checkpoints of a branch that was given up, or of which nobody knows whose they are."""
    if standing.ours:
        return []
    found = []
    for path in list_checkpoints(checkpoints):
        twin = head.published(step_of(path))
        mine = twin is not None and is_same(path, twin)
        if not mine and (standing.epoch == 0 or head.of_losing_branch(standing.epoch, step_of(path))):
            found.append(path)
    return found


def given_up(events: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Steps of checkpoints that the run went back behind and did not come to again, and the step it went back
    to. Such weights do not belong to the rows and the order of the data as they are on record."""
    saved: set[int] = set()
    gone: dict[int, int] = {}
    for row in events:
        event, step = row.get("event"), row.get("to_step" if row.get("event") == "rewind" else "step")
        if not isinstance(step, int):
            continue
        if event in ("resume", "rewind", "start"):
            gone |= {one: step for one in saved if one > step}
            saved = {one for one in saved if one <= step}
        if event in ("checkpoint", "resume"):
            saved.add(step)
            gone.pop(step, None)
    return gone
