"""`head.json`: who writes a mirrored run, and all that is published of it, in one small document.

The document is only ever replaced by compare-and-swap. Whoever wrote it last is the writer; what it does not
name does not exist. So a checkpoint and the rows before it appear at once, a listing is never believed, and a
writer that lost its place can publish nothing more, whatever it still sends.

    <mirror>/<run>/head.json
    <mirror>/<run>/e0003-1a2b3c4d/checkpoints/step-000001800/{model.safetensors, ..., manifest.json}
    <mirror>/<run>/e0003-1a2b3c4d/checkpoints/step-000001800/chunks.json
    <mirror>/<run>/e0003-1a2b3c4d/records/metrics.jsonl/000000000000-0000262144-1a2b3c4d
    <mirror>/<run>/e0003-1a2b3c4d/files/config.yaml-1a2b3c4d
    <mirror>/data/<fingerprint>/{manifest.json, train.bin, ...}
    <mirror>/trash/<run>-20261121T130000Z.json

Every epoch writes under a name of its own: two writers never touch the same object, and a run that was thrown
away shares none with a new one of its name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from x1_pretrain.errors import RefusedError

SCHEMA_VERSION = 1
NAME = "head.json"
TRASH = "trash"
DATA = "data"
CHUNK_BYTES = 8 << 20  # files of a checkpoint are verified, and fetched again, in pieces of this size

State = Literal["writing", "released", "trashed"]


@dataclass(frozen=True)
class Writer:
    """Who may publish."""

    epoch: int  # raised by one at each take-over, so by one a session
    token: str  # of this session: 8 hex digits
    folder: str  # of the run folder: a later session in the same folder need not wait for this one's lease
    host: str
    pid: int
    since_utc: str
    beat: int = 0  # raised at every write of the head
    beat_utc: str = ""  # by the writer's clock: for people only
    stale_s: float = 90.0  # without a beat for so long it is gone
    state: State = "writing"
    why: str = ""  # it was released: finished, stopped by SIGTERM, ...

    @property
    def space(self) -> str:
        """The folder of this epoch's objects."""
        return f"e{self.epoch:04d}-{self.token}"


@dataclass(frozen=True)
class Epoch:
    """A writer of the past or the present, and from which step it went on."""

    epoch: int
    token: str
    host: str
    since_utc: str
    from_step: int = 0

    @property
    def space(self) -> str:
        return f"e{self.epoch:04d}-{self.token}"


@dataclass(frozen=True)
class Object:
    """A published piece of a file."""

    path: str  # below the run
    bytes: int
    sha256: str


def is_plain(name: str) -> bool:
    """A name of a file in a checkpoint's folder, and of none outside it."""
    return bool(name) and "/" not in name and not name.startswith(".") and name.isprintable()


@dataclass(frozen=True)
class Published:
    """A checkpoint: a folder of objects, of which its manifests say what they must hold."""

    step: int
    epoch: int
    path: str  # below the run
    bytes: int
    manifest_sha256: str
    chunks_sha256: str  # of chunks.json: {"chunk_bytes": n, "files": {name: [sha256, ...]}}
    time_utc: str
    val_loss: float | None = None


@dataclass(frozen=True)
class Head:
    """The whole document."""

    name: str
    writer: Writer
    run_id: str = ""  # empty until the first session knows it
    step_fields: dict[str, Any] = field(default_factory=dict)  # what a step is: config.step_fields
    fingerprints: list[str] = field(default_factory=list)  # of the corpora
    epochs: list[Epoch] = field(default_factory=list)
    checkpoints: list[Published] = field(default_factory=list)  # by step, oldest first
    records: dict[str, list[Object]] = field(default_factory=dict)  # file name -> its pieces in their order
    files: dict[str, Object] = field(default_factory=dict)  # small files, whole
    data: dict[str, str] = field(default_factory=dict)  # corpus name -> fingerprint, of those mirrored whole
    status: dict[str, Any] = field(default_factory=dict)  # how the run stands: records.summary
    trashed_utc: str | None = None

    @property
    def trashed(self) -> bool:
        return self.writer.state == "trashed"

    def named(self) -> list[Object | Published]:
        """All that it names, below the run; the corpora apart, which other runs share."""
        pieces = [piece for many in self.records.values() for piece in many]
        return [*pieces, *self.files.values(), *self.checkpoints]

    def last_step(self) -> int | None:
        """How far the run came, by its own word if it said one; None before it published anything."""
        told, newest = self.status.get("step"), self.newest()
        said = told if isinstance(told, int) else None
        return said or (newest.step if newest else said)

    def published(self, step: int) -> Published | None:
        return next((one for one in self.checkpoints if one.step == step), None)

    def newest(self) -> Published | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def of_losing_branch(self, epoch: int, step: int) -> bool:
        """Whether a checkpoint that a folder made as `epoch` was given up: a later writer went on from an
        earlier step."""
        return any(one.epoch > epoch and one.from_step < step for one in self.epochs)


def encode(head: Head) -> bytes:
    """With a hash of all the rest: stores answer with damaged bytes now and then."""
    content = {"schema_version": SCHEMA_VERSION, "kind": "mirror", **asdict(head)}
    return _dumped({"sha256": hashlib.sha256(_dumped(content)).hexdigest(), **content})


def _dumped(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def damaged(data: bytes) -> bool:
    """Whether these can't be the bytes that were written."""
    try:
        tree = json.loads(data)
        said = tree.pop("sha256")
        return bool(hashlib.sha256(_dumped(tree)).hexdigest() != said)
    except (ValueError, LookupError, TypeError, AttributeError):
        return True


def decode(data: bytes, origin: str) -> Head:
    """The document in `data`; RefusedError names `origin` where it is not one that this version reads."""
    try:
        tree = json.loads(data)
        said = tree.pop("sha256", None)
        version, kind = tree.pop("schema_version"), tree.pop("kind")
        if kind != "mirror":
            raise ValueError(f"kind {kind!r}")
        if version > SCHEMA_VERSION:
            raise RefusedError(
                f"{origin}: schema version {version}, this x1 reads up to {SCHEMA_VERSION}; update x1"
            )
        if said != hashlib.sha256(_dumped({"schema_version": version, "kind": kind, **tree})).hexdigest():
            raise ValueError("its hash is another")
        tree["writer"] = Writer(**tree["writer"])
        tree["epochs"] = [Epoch(**one) for one in tree["epochs"]]
        tree["checkpoints"] = [Published(**one) for one in tree["checkpoints"]]
        tree["records"] = {name: [Object(**o) for o in many] for name, many in tree["records"].items()}
        tree["files"] = {name: Object(**one) for name, one in tree["files"].items()}
        return Head(**tree)
    except RefusedError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusedError(
            f"{origin}: not the head of a mirrored run ({error}); bring back an earlier version of it "
            "(the bucket may keep them), or remove it and go on in the folder where the run was trained"
        ) from None
