"""The JSON-lines files of a run folder, as they are written: appended, never torn, never twice.

A row is on its way to the disk (in the operating system's hands) before anything printed says so: a killed
process loses none. After a resume from an older checkpoint, the rows of the steps that will be done again are
moved to `<name>.superseded.jsonl`, so that the file tells one story and nothing is lost.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def utc_now() -> str:
    """Now, as every file of a run writes it: 2026-05-23T15:42:01.123Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonLines:
    """An append-only file of JSON rows with one process that writes.

    When the disk is full a row waits in memory and goes out with the next one that fits; `on_trouble` hears
    of it once per trouble.
    """

    def __init__(self, path: Path, on_trouble: Callable[[str], None] = lambda _: None) -> None:
        self.path, self._on_trouble = path, on_trouble
        self._writing = threading.RLock()  # the watchdog's thread tells of a hang while the loop may go on
        self._waiting: list[bytes] = []
        self._in_trouble = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._end = _complete_length(path)  # a torn last row, from a kill in mid-write, is written over
        os.ftruncate(self._file, self._end)

    def append(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(plain(row), ensure_ascii=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Try to write what waits. A failed write leaves no half row behind."""
        with self._writing:
            while self._waiting:
                data = self._waiting[0]
                try:
                    written = os.pwrite(self._file, data, self._end)
                    if written != len(data):
                        os.ftruncate(self._file, self._end)
                        raise OSError(28, "No space left on device")
                except OSError as error:
                    self._trouble(error)
                    return
                self._end += written
                self._waiting.pop(0)
            self._in_trouble = False

    def _trouble(self, error: OSError) -> None:
        if not self._in_trouble:
            self._in_trouble = True
            self._on_trouble(
                f"{self.path} can't be written ({error.strerror}); rows wait in memory until it can"
            )

    def sync(self) -> None:
        """Through to the disk itself."""
        self.flush()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._trouble(error)

    @property
    def waiting(self) -> int:
        """Rows that are not in the file yet."""
        return len(self._waiting)

    @property
    def deleted(self) -> bool:
        return os.fstat(self._file).st_nlink == 0

    def restore(self) -> None:
        """Write a deleted file again: whoever has it open still has what is in it."""
        data = os.pread(self._file, self._end, 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        again = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(again, data, 0)
        os.close(self._file)
        self._file = again

    def close(self) -> None:
        self.flush()
        os.close(self._file)


def _complete_length(path: Path) -> int:
    """Bytes up to the end of the last complete row."""
    data = path.read_bytes()
    return data.rfind(b"\n") + 1


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they are written as the strings a reader's float() takes."""
    bad = {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**row, **bad}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete rows of a file; a torn last line is passed over."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            row = _parsed(line)
            if row is not None:
                yield {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row, or None for what a power cut or a bad disk left; `x1 verify` names such lines."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and all(isinstance(row.get(key, 0), int) for key in ("step", "session"))
    return row if whole and "step" in row else None


def rewind(path: Path, step: int) -> int:
    """Move the rows after `step`, and a torn last line, to `<name>.superseded.jsonl`; how many were moved.

    Rows are in step order, so they are the end of the file: it is copied, then cut. After a kill in between
    it is done again.
    """
    if not path.exists():
        return 0
    kept, moved = 0, 0
    with path.open("rb+") as stream:
        for line in stream:
            row = _parsed(line)
            if not line.endswith(b"\n") or (row is not None and row.get("step", 0) > step):
                break
            kept += len(line)
        stream.seek(kept)
        rest = stream.read()
        if rest:
            moved = rest.count(b"\n")
            _set_aside(path.with_name(f"{path.stem}.superseded.jsonl"), rest[: rest.rfind(b"\n") + 1])
            stream.truncate(kept)
    return moved


def _set_aside(file: Path, rows: bytes) -> None:
    """Behind what is there, on the disk. Not again what a kill left there, or a mirror gave back."""
    with file.open("a+b") as aside:
        aside.seek(0)
        there = aside.read()
        aside.truncate(there.rfind(b"\n") + 1)
        known = set(there.splitlines(keepends=True))
        aside.write(b"".join(row for row in rows.splitlines(keepends=True) if row not in known))
        aside.flush()
        os.fsync(aside.fileno())
