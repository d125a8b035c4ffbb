"""`mirror.json` in a run folder: which mirror it has, in which epoch it last wrote, how far that came.

The mirror's process writes it at every look; `x1 runs`, `x1 watch` and the supervisor read it. The id of the
folder in it lets a later session in the same folder go on at once, and the epoch tells a folder that was left
behind by a later writer.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from x1_pretrain.errors import RefusedError
from x1_pretrain.records.metrics import utc_now

SCHEMA_VERSION = 1
NAME = "mirror.json"
PULLED = "pulled"  # why it was written: what is in such a folder is the mirror's
PULLED_HOME = "pulled into the folder that it was launched from"  # but for what its guard wrote there
ALONE = "trained on here without it"  # nobody has said since what the mirror lacks


@dataclass(frozen=True)
class MirrorState:
    """What a run folder knows of its mirror."""

    uri: str
    label: str
    name: str  # of the run in the mirror
    folder: str  # id of the run folder
    epoch: int = 0  # its last as writer
    token: str = ""
    state: Literal["writing", "released", "lost"] = "writing"
    why: str = ""  # released, or lost to whom
    mirrored: list[int] = field(default_factory=list)  # steps of the checkpoints in the mirror
    lag_s: float = 0.0
    lag_bytes: int = 0
    trouble: str = ""
    sent_bytes: int = 0
    updated_utc: str = ""

    @property
    def is_copy(self) -> bool:
        """Of a folder that `x1 pull` brought, and that nobody trained in since."""
        return self.why in (PULLED, PULLED_HOME)


def read_state(folder: Path) -> MirrorState | None:
    """The state of a run folder's mirror, None where it has none, or where the file tells nothing: it can
    be written again, only its epoch and the folder's id are lost."""
    file = folder / NAME
    try:
        tree = json.loads(file.read_bytes())
        version = tree.pop("schema_version")
        if tree.pop("kind") != "mirror-state":
            return None
        if version > SCHEMA_VERSION:
            raise RefusedError(
                f"{file}: schema version {version}, this x1 reads up to {SCHEMA_VERSION}; update x1"
            )
        known = {name: tree[name] for name in MirrorState.__dataclass_fields__ if name in tree}
        return MirrorState(**known) if _sound(known) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _sound(tree: Mapping[str, Any]) -> bool:
    words = ("uri", "label", "name", "folder")
    return all(isinstance(tree.get(name), str) for name in words) and isinstance(tree.get("epoch", 0), int)


def folder_id(folder: Path) -> str:
    """The id of a run folder: the one it was given, or a new one, which `write_state` keeps."""
    state = read_state(folder)
    return state.folder if state and state.folder else secrets.token_hex(8)


def is_anothers(folder: Path, tokens: Collection[str]) -> bool:
    """Whether a session that has none of these tokens wrote the state last; or an x1 newer than this one."""
    try:
        found = read_state(folder)
    except RefusedError:
        return True
    return found is not None and found.token not in tokens


def go_on_without(folder: Path) -> None:
    """A session trains in the folder, and does not mirror it. Folder and epoch stay, for one that does."""
    found = read_state(folder)
    if found and found.state != "lost":
        write_state(folder, replace(found, state="released", why=ALONE))


def write_state(folder: Path, state: MirrorState) -> None:
    """Whole or not at all."""
    content = {"schema_version": SCHEMA_VERSION, "kind": "mirror-state", **asdict(state)}
    content["updated_utc"] = utc_now()
    temporary = folder / f".{NAME}.{os.getpid()}.new"  # a killed trainer's mirror may be at it as well
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / NAME)
