"""A mirrored run made by hand: what is in the store is known byte by byte, whoever published it.

run = Mirrored(FolderStore(tmp_path / "mirror"))
run.checkpoint(100)                      # published, of random bytes; run.originals / step-... has it
run.records["metrics.jsonl"] = rows      # lines
head = run.save()                        # head.json, as after the claim of the next writer
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from x1_pretrain.mirror.claim import UNSAID
from x1_pretrain.mirror.head import Epoch, Head, Object, Published, Writer, encode
from x1_pretrain.mirror.job import Job
from x1_pretrain.records import checkpoint_files
from x1_pretrain.stores.store import Meta, Store, UnreachableError

RUN_ID = "tiny-20261121T120000Z-abcdef"
CHUNK = 4096  # of a published checkpoint here: many of them in a small file


def row(step: int, **more: Any) -> bytes:
    return json.dumps({"step": step, **more}).encode() + b"\n"


def rows(first: int, last: int, **more: Any) -> bytes:
    return b"".join(row(step, **more) for step in range(first, last + 1))


def event(name: str, step: int, **more: Any) -> bytes:
    return json.dumps({"event": name, "step": step, "session": 1, **more}).encode() + b"\n"


def make_checkpoint(
    folder: Path, step: int, size: int = 20_000, seed: int = 0, run_id: str = RUN_ID, **state: Any
) -> Path:
    def write(target: Path) -> None:
        rng = random.Random(step * 1000 + seed)
        for name, count in (("model.safetensors", size), ("optimizer.safetensors", 2 * size)):
            with (target / name).open("wb") as file:
                for begin in range(0, count, 1 << 20):
                    file.write(rng.randbytes(min(1 << 20, count - begin)))
        content = {"schema_version": 1, "step": step, "run_id": run_id, **state}
        (target / "state.json").write_text(json.dumps(content))

    return checkpoint_files.publish(folder, step, run_id, write)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Mirrored:
    store: Store
    originals: Path
    name: str = "tiny"
    run_id: str = RUN_ID
    space: str = "e0001-00000001"
    epochs: list[Epoch] = field(default_factory=lambda: [epoch(1)])
    published: list[Published] = field(default_factory=list)
    records: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    step_fields: dict[str, Any] = field(default_factory=dict)
    fingerprints: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    piece_bytes: int = 500

    def checkpoint(
        self, step: int, size: int = 20_000, seed: int = 0, chunk: int = CHUNK, **state: Any
    ) -> Published:
        path = make_checkpoint(self.originals, step, size, seed, self.run_id, **state)
        one = publish(self.store, self.name, f"{self.space}/checkpoints/{path.name}", path, chunk)
        self.published.append(one)
        return one

    def key(self, one: Published, name: str) -> str:
        return f"{self.name}/{one.path}/{name}"

    def save(self) -> Head:
        """As it is when the next writer has claimed it."""
        last = self.epochs[-1].epoch + 1
        head = Head(
            self.name,
            Writer(last, f"{last:08x}", "elsewhere", "here", 1, "2026-11-21T13:00:00Z"),
            run_id=self.run_id,
            step_fields=self.step_fields,
            fingerprints=self.fingerprints,
            epochs=[*self.epochs, epoch(last, UNSAID)],
            checkpoints=sorted(self.published, key=lambda one: one.step),
            records={name: self._pieces(name, data) for name, data in self.records.items()},
            files={name: self._put(f"files/{name}", data) for name, data in self.files.items()},
            data=self.data,
        )
        self.store.put(f"{self.name}/head.json", encode(head))
        return head

    def _pieces(self, name: str, data: bytes) -> list[Object]:
        pieces, piece, begin = [], b"", 0
        for line in data.splitlines(keepends=True):
            piece += line
            if len(piece) >= self.piece_bytes:
                pieces.append(self._put(f"records/{name}/{begin:012d}", piece))
                begin, piece = begin + len(piece), b""
        return [*pieces, self._put(f"records/{name}/{begin:012d}", piece)] if piece else pieces

    def _put(self, path: str, data: bytes) -> Object:
        self.store.put(f"{self.name}/{self.space}/{path}", data)
        return Object(f"{self.space}/{path}", len(data), digest(data))


def epoch(number: int, from_step: int = 0) -> Epoch:
    return Epoch(number, f"{number:08x}", "there", "2026-11-21T12:00:00Z", from_step)


def publish(store: Store, run: str, path: str, folder: Path, chunk: int = CHUNK) -> Published:
    manifest = (folder / "manifest.json").read_bytes()
    hashes: dict[str, list[str]] = {}
    for name in json.loads(manifest)["files"]:
        data = (folder / name).read_bytes()
        store.put(f"{run}/{path}/{name}", data)
        hashes[name] = [digest(data[at : at + chunk]) for at in range(0, len(data), chunk)]
    chunks = json.dumps({"chunk_bytes": chunk, "files": hashes}).encode()
    store.put(f"{run}/{path}/chunks.json", chunks)
    store.put(f"{run}/{path}/manifest.json", manifest)
    size = sum(file.stat().st_size for file in folder.iterdir())
    step = checkpoint_files.step_of(folder)
    return Published(step, 1, path, size, digest(manifest), digest(chunks), "2026-11-21T12:30:00Z")


def job_of(folder: Path, **more: Any) -> Job:
    return Job("tiny", str(folder), str(folder / "checkpoints"), "mirror", **more)


class Counting:
    """A store that counts its reads of ranges, and does what a test says instead of some."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads: list[tuple[str, int, int]] = []
        self.instead: dict[int, Exception] = {}  # number of a read -> what it raises
        self.dead_from: int | None = None  # number of the first read that is never answered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str, start: int, end: int) -> bytes:
        number = len(self.reads)
        self.reads.append((key.rpartition("/")[2], start, end))
        if number in self.instead:
            raise self.instead[number]
        if self.dead_from is not None and number >= self.dead_from:
            raise UnreachableError("no answer")
        return self._store.read(key, start, end)

    def get(self, key: str) -> tuple[bytes, Meta]:
        return self._store.get(key)
