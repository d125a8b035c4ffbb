"""The newest rows of a growing `.jsonl` file, found from its end: at no cost that grows with the run."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

from x1_pretrain.records.run_folder import Row, parse_row, with_numbers
from x1_pretrain.records.tail import SEAM_BYTES

BLOCK_BYTES = 256 << 10


class Newest:
    """The newest row of each kind, a kind being known by texts that its rows hold.

    Newest(folder / "metrics.jsonl", {"any": ['"step"'], "evaluation": ['"val/loss"']}).look()["evaluation"]

    What was looked at once is not read again, unless rows were cut off the end and others follow.
    """

    def __init__(self, file: Path, kinds: Mapping[str, Collection[str]]) -> None:
        self.rows: dict[str, Row] = {}
        self._file, self._kinds = file, {name: [t.encode() for t in texts] for name, texts in kinds.items()}
        self._end, self._seam = 0, b""

    def look(self) -> dict[str, Row]:
        """As far as the file goes now; one that is not there has no rows."""
        try:
            with self._file.open("rb") as stream:
                self._follow(stream)
        except FileNotFoundError:
            self._forget()
        return self.rows

    def _forget(self) -> None:
        self.rows, self._end, self._seam = {}, 0, b""

    def _follow(self, stream: IO[bytes]) -> None:
        if _between(stream, self._end - len(self._seam), self._end) != self._seam:
            self._forget()
        start = self._end
        found: dict[str, Row] = {}
        position = end = _complete(stream, start)
        torn = b""  # the later part of a row that begins before the block
        while position > start and len(found) < len(self._kinds):
            begin = max(start, position - BLOCK_BYTES)
            block = _between(stream, begin, position) + torn
            first = block.find(b"\n") + 1 if begin > start else 0
            torn, position = block[:first] or (block if begin > start else b""), begin
            if begin > start and not first:
                continue
            for kind in self._kinds.keys() - found.keys():
                if row := _last(block[first:], self._kinds[kind]):
                    found[kind] = row
        self.rows = self.rows | found
        self._end, self._seam = end, _between(stream, max(0, end - SEAM_BYTES), end)
        if len(self._seam) < min(SEAM_BYTES, end):  # rows were cut off just now
            self._forget()


def _between(stream: IO[bytes], begin: int, end: int) -> bytes:
    stream.seek(begin)
    return stream.read(end - begin)


def _complete(stream: IO[bytes], start: int) -> int:
    """Where the last complete row ends: the writer may be in the middle of another."""
    position = stream.seek(0, os.SEEK_END)
    while position > start:
        begin = max(start, position - BLOCK_BYTES)
        if (at := _between(stream, begin, position).rfind(b"\n")) >= 0:
            return begin + at + 1
        position = begin
    return start


def _last(lines: bytes, texts: Collection[bytes]) -> Row | None:
    """The last of the whole `lines` that is a row and holds one of the texts."""
    end = len(lines)
    while (at := max((lines.rfind(text, 0, end) for text in texts), default=-1)) >= 0:
        begin = lines.rfind(b"\n", 0, at) + 1
        if (row := parse_row(lines[begin : lines.find(b"\n", at)])) is not None:
            return with_numbers(row)
        end = begin
    return None
