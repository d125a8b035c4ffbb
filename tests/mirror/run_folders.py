"""A run folder as a trainer leaves it, without a trainer; and a mirror's process, driven by hand."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from x1_pretrain.demo import config_tree
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.job import Job
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.checkpoint_files import folder_name
from x1_pretrain.records.metrics import rewind
from x1_pretrain.stores.store import Store

RUN_ID = "tiny-20261121T000000Z-abcdef"


class RunFolder:
    """`runs/tiny`, one call a thing that a trainer does."""

    def __init__(self, folder: Path, name: str = "tiny") -> None:
        self.folder, self.name = folder, name
        folder.mkdir(parents=True)
        tree = {**config_tree(1_000_000), "name": name, "run_dir": str(folder)}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        manifest = {"schema_version": 1, "kind": "run", "run_id": RUN_ID, "name": name}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        self.event("start", 0)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def job(self, mirror: Path | str, **changes: Any) -> Job:
        fields: dict[str, Any] = {"name": self.name, "folder": str(self.folder), "uri": str(mirror)}
        fields |= {"checkpoints": str(self.checkpoints), "run_id": RUN_ID, "every_s": 0.2}
        return Job(**(fields | changes))

    def append(self, file: str, **row: Any) -> None:
        with (self.folder / file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def event(self, event: str, step: int, **fields: Any) -> None:
        self.append("events.jsonl", event=event, step=step, message=event, session=1, **fields)

    def step(self, step: int, **fields: Any) -> None:
        now = f"2026-11-21T00:00:{step % 60:02d}.000Z"
        self.append("steps.jsonl", step=step, time_utc=now, loss=3.0, session=1, **fields)
        self.append("metrics.jsonl", step=step, tokens=step * 100, time_utc=now, session=1, **fields)

    def save(self, step: int, size: int = 20_000, seed: int = 0, run_id: str = RUN_ID, **state: Any) -> Path:
        """A checkpoint; `seed` changes its weights, its tokenizer is always the same."""

        def write(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(content(f"model {step} {seed}", size))
            (folder / "optimizer.safetensors").write_bytes(content(f"optimizer {step} {seed}", 2 * size))
            (folder / "tokenizer.json").write_bytes(content("tokenizer", 5000))
            (folder / "state.json").write_text(json.dumps({"step": step, "run_id": run_id, **state}))

        return checkpoint_files.publish(self.checkpoints, step, run_id, write)

    def remove(self, step: int) -> None:
        path = self.checkpoints / folder_name(step)
        shutil.rmtree(path.rename(path.with_name(f".writing-removing-{path.name}")))

    def rewind(self, to_step: int) -> None:
        """In the trainer's order: checkpoints, event, rows."""
        for path in checkpoint_files.list_checkpoints(self.checkpoints):
            if checkpoint_files.step_of(path) > to_step:
                self.remove(checkpoint_files.step_of(path))
        self.event("rewind", to_step, to_step=to_step)
        for name in ("metrics.jsonl", "steps.jsonl", "blocks.jsonl"):
            rewind(self.folder / name, to_step)


def content(seed: str, size: int) -> bytes:
    """Bytes that nothing compresses, the same for the same seed."""
    return hashlib.shake_256(seed.encode()).digest(size)


# --- what a reader of the mirror sees -----------------------------------------------------------------------


def record(store: Store, head: Head, name: str) -> bytes:
    """A record file, from its pieces, each as the head says."""
    found = b""
    for piece in head.records.get(name, []):
        data = store.get(f"{head.name}/{piece.path}")[0]
        assert len(data) == piece.bytes, piece
        assert hashlib.sha256(data).hexdigest() == piece.sha256, piece
        found += data
    return found


def check_checkpoint(store: Store, head: Head, step: int) -> dict[str, bytes]:
    """The files of a published checkpoint, after every hash about it was looked at."""
    published = head.published(step)
    assert published is not None, f"{step} is not published"
    base = f"{head.name}/{published.path}"
    manifest = store.get(f"{base}/manifest.json")[0]
    chunks = store.get(f"{base}/chunks.json")[0]
    assert hashlib.sha256(manifest).hexdigest() == published.manifest_sha256
    assert hashlib.sha256(chunks).hexdigest() == published.chunks_sha256
    listed, told = json.loads(manifest)["files"], json.loads(chunks)
    assert listed.keys() == told["files"].keys()
    files = {}
    for name, want in listed.items():
        data = store.read(f"{base}/{name}", 0, want["bytes"])
        assert hashlib.sha256(data).hexdigest() == want["sha256"], name
        size = told["chunk_bytes"]
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert [hashlib.sha256(piece).hexdigest() for piece in pieces] == told["files"][name], name
        files[name] = data
    assert published.bytes == sum(map(len, files.values())) + len(manifest) + len(chunks)
    return files


# --- a mirror's process -------------------------------------------------------------------------------------


class Driven:
    """`python -m x1_pretrain.mirror.worker`, with this process as its trainer."""

    def __init__(self, job: Job, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self.happenings: list[dict[str, Any]] = []
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "x1_pretrain.mirror.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.tell(do="open", **asdict(job))

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(json.loads(line))

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def until(self, what: str, within_s: float = 20.0, **fields: Any) -> dict[str, Any]:
        """The next happening of a kind, with these fields."""
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                one = self._queue.get(timeout=left)
            except queue.Empty:
                break
            self.happenings.append(one)
            if one["is"] == what and all(one.get(key) == value for key, value in fields.items()):
                return one
        raise AssertionError(f"no {what} {fields} within {within_s} s, but {self.happenings[-5:]}")

    def open(self) -> dict[str, Any]:
        return self.until("opened")

    def publish(self, from_step: int = 0) -> None:
        self.tell(do="publish", run_id=RUN_ID, from_step=from_step, fingerprints=["f"], step_fields={"a": 1})

    def drain(self, within_s: float = 20.0, why: str = "finished") -> list[str]:
        self.tell(do="drain", within_s=within_s, why=why)
        left = self.until("drained", within_s + 10)["left"]
        assert self.process.wait(10) == 0
        return list(left)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
