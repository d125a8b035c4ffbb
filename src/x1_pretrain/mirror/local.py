"""The checkpoints of a run folder as a mirror sees them: by their manifests, read once each. No hashing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from x1_pretrain.mirror.head import is_plain
from x1_pretrain.records.checkpoint_files import list_checkpoints, step_of

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Local:
    """A checkpoint folder that its manifest describes."""

    step: int
    path: Path
    manifest: bytes
    manifest_sha256: str
    files: Mapping[str, tuple[int, str]]  # name -> bytes, sha256; without the manifest
    since: float  # when it was first seen, by the clock of this process

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values()) + len(self.manifest)


class LocalCheckpoints:
    """Those of one folder, of one run. A look at what is known costs a stat each."""

    def __init__(
        self, folder: Path, run_id: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run_id = run_id
        self._folder, self._clock = folder, clock
        self._known: dict[int, tuple[tuple[int, int, int], Local | None]] = {}

    def look(self) -> dict[int, Local]:
        """By step; those of another run, or without a manifest that can be read, are left out."""
        known: dict[int, tuple[tuple[int, int, int], Local | None]] = {}  # another thread may look meanwhile
        for path in list_checkpoints(self._folder):
            try:
                found = (path / MANIFEST).stat()
            except OSError:
                continue
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            before = self._known.get(step_of(path))
            if before is None or before[0] != stamp:
                before = (stamp, self._read(path, self._clock()))
            known[step_of(path)] = before
        self._known = known
        return {step: local for step, (_, local) in known.items() if local is not None}

    def _read(self, path: Path, since: float) -> Local | None:
        try:
            data = (path / MANIFEST).read_bytes()
            tree = json.loads(data)
            listed, of_run = tree["files"], tree["run_id"]
            files = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in listed.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        if tree["step"] != step_of(path) or (self.run_id is not None and of_run != self.run_id):
            return None
        if not all(is_plain(name) and name not in (MANIFEST, "chunks.json") for name in files):
            return None  # it could not come back
        return Local(step_of(path), path, data, hashlib.sha256(data).hexdigest(), files, since)
