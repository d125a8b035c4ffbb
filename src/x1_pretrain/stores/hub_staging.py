"""What waits for the next commit to a repository of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
MOST_BYTES = 32 << 20  # of small files in memory; more is committed at once
MOST_PATHS = 400


@dataclass(frozen=True, eq=False)
class Staged:
    """What is done to one path: put `data`, or content that the Hub already has, or take it away."""

    size: int = 0
    etag: str = ""
    data: bytes | None = None
    sent: CommitOperationAdd | CommitOperationCopy | None = None

    @property
    def gone(self) -> bool:
        return self.data is None and self.sent is None

    def operation(self, path: str) -> Operation:
        """A new one of `data` each time: a body that failed half-way would be sent from there on."""
        if self.data is not None:
            return CommitOperationAdd(path, BytesIO(self.data))
        return self.sent or CommitOperationDelete(path, is_folder=False)


class Staging:
    """By path; the last word about a path counts. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paths: dict[str, Staged] = {}

    def add(self, path: str, staged: Staged) -> None:
        with self._lock:
            self._paths[path] = staged

    def of(self, path: str) -> Staged | None:
        with self._lock:
            return self._paths.get(path)

    def all(self) -> dict[str, Staged]:
        with self._lock:
            return dict(self._paths)

    def done(self, committed: Mapping[str, Staged]) -> None:
        """Forget what was committed, but for paths that were staged anew meanwhile."""
        with self._lock:
            for path, staged in committed.items():
                if self._paths.get(path) is staged:
                    del self._paths[path]

    def much(self) -> bool:
        with self._lock:
            held = sum(len(one.data or b"") for one in self._paths.values())
            return held > MOST_BYTES or len(self._paths) > MOST_PATHS


def git_oid(data: bytes) -> str:
    """What git calls this content: the Hub's name for the version of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def versions(data: bytes) -> tuple[str, str]:
    """What the Hub may call this content: as a small file, as a large one."""
    return git_oid(data), hashlib.sha256(data).hexdigest()
