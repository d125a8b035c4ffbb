"""The small files of a run in the mirror: whole, whenever their content changed."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from x1_pretrain.mirror.head import Object
from x1_pretrain.mirror.sending import Rate
from x1_pretrain.stores.store import Store

PATTERNS = (
    "config.yaml",
    "manifest.json",
    "budget.json",
    "guard.json",
    "STOP.json",
    "termination.json",
    "x1-nccl.env",
    "spike-postmortem*",
    "report.html",
    "hang-*.txt",
)
KEPT = ("config.yaml", "manifest.json", "budget.json", "termination.json")  # also once they are gone here
MOST_BYTES = 64 << 20


class SmallFiles:
    """Those of one run folder, and the manifests of its corpora as `corpus-<name>.json`."""

    def __init__(
        self,
        folder: Path,
        run: str,
        space: str,
        published: Mapping[str, Object],
        corpora: Mapping[str, str],
    ) -> None:
        self.objects = dict(published)
        self._folder, self._run, self._space, self._corpora = folder, run, space, dict(corpora)
        self._stamps: dict[str, tuple[int, int, int]] = {}

    def unsent(self) -> list[str]:
        """Names of those that changed since they were sent."""
        return [name for name, path in self._there() if _stamp(path) not in (None, self._stamps.get(name))]

    def look(self, store: Store, rate: Rate) -> None:
        """Send what changed; `objects` is what the mirror then has."""
        there = dict(self._there())
        for name in self.objects.keys() - there.keys() - set(KEPT):
            if not name.startswith("corpus-"):
                del self.objects[name]  # a latch that was lifted
                self._stamps.pop(name, None)
        for name, path in there.items():
            stamp = _stamp(path)
            if stamp is not None and stamp != self._stamps.get(name):
                self._send(name, path, store, rate)
                self._stamps[name] = stamp

    def _there(self) -> Iterator[tuple[str, Path]]:
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in PATTERNS) and path.is_file():
                yield path.name, path
        for name, folder in self._corpora.items():
            if (path := Path(folder) / "manifest.json").is_file():
                yield f"corpus-{name}.json", path

    def _send(self, name: str, path: Path, store: Store, rate: Rate) -> None:
        try:
            data = path.read_bytes() if path.stat().st_size <= MOST_BYTES else None
        except FileNotFoundError:
            return
        if data is None:
            return
        digest, before = hashlib.sha256(data).hexdigest(), self.objects.get(name)
        if before and before.sha256 == digest:
            return
        place = f"{self._space}/files/{name}-{digest[:8]}"  # the one before stays until the head names this
        store.put(f"{self._run}/{place}", data)
        rate.count(len(data))
        self.objects[name] = Object(place, len(data), digest)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
