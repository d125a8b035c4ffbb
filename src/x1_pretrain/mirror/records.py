"""The record files of a run in the mirror: each is a row of pieces, whole lines, that grows at its end.

The last piece is replaced by a longer one until it has PIECE_BYTES; then a new one begins. A resume or a
rewind cuts rows off a file: pieces that it no longer begins with are given up and sent anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from x1_pretrain.mirror.head import Object
from x1_pretrain.mirror.sending import Rate
from x1_pretrain.records.retention import losses_at
from x1_pretrain.records.run_folder import parse_row
from x1_pretrain.stores.store import Store

PIECE_BYTES = 256 << 10  # from this size on a piece stays as it is
BACKLOG_BYTES = 4 << 20  # at most so much at once, where more waits
SEAM_BYTES = 256  # before the place reached: enough of the last row to tell it from another
EVENTS = "events.jsonl"
MONEY = "ledger.jsonl"  # of which no row may go


@dataclass
class Followed:
    """A local record file, and what the mirror has of it."""

    pieces: list[Object] = field(default_factory=list)
    end: int = 0  # bytes in the pieces
    seam: bytes | None = None  # the bytes before `end`; None: not compared with the local file yet
    stamp: tuple[int, int, int] | None = None  # of the local file as all its lines were sent
    owed: int = 0  # bytes that a head has named: what was cut off is sent again up to there, however long

    def cut(self, count: int) -> None:
        del self.pieces[count:]
        self.end = sum(piece.bytes for piece in self.pieces)


class Records:
    """All record files of one run. `losses` and `rewinds` are what its new rows said."""

    def __init__(self, folder: Path, run: str, space: str, published: Mapping[str, list[Object]]) -> None:
        self.losses: dict[int, float] = {}  # validation loss by step
        self.rewinds: list[int] = []  # steps gone back to, of new rows; whoever reads it empties it
        self._folder, self._run, self._space = folder, run, space
        self._files = {
            name: Followed(list(pieces), sum(p.bytes for p in pieces)) for name, pieces in published.items()
        }

    def sizes(self) -> dict[str, int]:
        """Bytes of each local record file, now; of the events last, so that rows which a rewind has cut off
        are not missing without its event."""
        files = [file for file in self._folder.glob("*.jsonl") if not file.name.startswith(".")]
        found = {}
        for file in sorted(files, key=lambda file: (file.name == EVENTS, file.name)):
            with suppress(OSError):
                found[file.name] = file.stat().st_size
        return found

    def unsent(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Bytes of each file that the mirror lacks; files of which it lacks nothing are left out."""
        found = {}
        for name, size in sizes.items():
            file = self._files.get(name, Followed())
            if size > file.end and not (file.stamp and file.stamp[2] == size):  # else a torn last line
                found[name] = size - file.end
        return found

    def pieces(self) -> dict[str, list[Object]]:
        return {name: list(file.pieces) for name, file in sorted(self._files.items()) if file.pieces}

    def advance(
        self,
        sizes: Mapping[str, int],
        store: Store,
        rate: Rate,
        enough: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Send what is new of each file, up to the size it had; False if there was `enough` before the end.
        What was sent is remembered if this breaks."""
        for name in sorted(sizes):
            try:
                with (self._folder / name).open("rb") as local:
                    if not self._advance(name, local, sizes[name], store, rate, enough):
                        return False
            except FileNotFoundError:
                continue  # the mirror keeps what it has
        return True

    def rewound(self, sizes: Mapping[str, int]) -> bool:
        """Whether training went back since the files had these sizes: then what was read of them meanwhile
        may be of two stories."""
        try:
            with (self._folder / EVENTS).open("rb") as local:
                local.seek(sizes.get(EVENTS, 0))
                return any("to_step" in row for row in _rows_with(local.read(), b'"rewind"'))
        except FileNotFoundError:
            return False

    def distrust(self) -> None:
        """Compare every piece with the local file before the next ones are sent."""
        for file in self._files.values():
            file.seam, file.stamp = None, None

    def tail(self, name: str) -> bytes:
        """The complete lines that the mirror lacks."""
        with (self._folder / name).open("rb") as local:
            followed = self._files.get(name, Followed())
            local.seek(followed.end)
            data = local.read()
        return data[: data.rfind(b"\n") + 1]

    def unpublished(self, published: Mapping[str, list[Object]]) -> dict[str, bytes]:
        """The complete lines of each file that are not among `published` pieces."""
        found = {}
        for name, size in self.sizes().items():
            with (self._folder / name).open("rb") as local:
                file = Followed(list(published.get(name, [])))
                file.cut(sum(1 for _ in _common(file.pieces, local, size)))
                local.seek(file.end)
                data = local.read()
            if lines := data[: data.rfind(b"\n") + 1]:
                found[name] = lines
        return found

    def _advance(
        self, name: str, local: BinaryIO, size: int, store: Store, rate: Rate, enough: Callable[[], bool]
    ) -> bool:
        now = os.fstat(local.fileno())
        stamp = (now.st_ino, now.st_mtime_ns, size)
        file = self._files.setdefault(name, Followed())
        if file.stamp == stamp:
            return True
        if not self._continues(file, local, size):
            if file.pieces and enough():
                return False
            file.owed = max(file.owed, file.end)
            self._go_back(name, file, local, size)
        while True:
            last = file.pieces[-1] if file.pieces else None
            begin = file.end - last.bytes if last and last.bytes < PIECE_BYTES else file.end
            lines = _lines(local, begin, size, file.end)
            if begin + len(lines) <= file.end:
                break
            if file.end >= file.owed and enough():
                return False
            self._learn(name, lines[file.end - begin :])
            piece = self._send(name, begin, lines, store, rate)
            file.pieces[len(file.pieces) - (begin < file.end) :] = [piece]
            file.end, file.seam = begin + len(lines), lines[-SEAM_BYTES:]
        file.stamp, file.owed = stamp, 0
        return True

    def _continues(self, file: Followed, local: BinaryIO, size: int) -> bool:
        """Whether the file still begins with what the mirror has of it."""
        if file.seam is None or size < file.end:
            return False
        local.seek(file.end - len(file.seam))
        return local.read(len(file.seam)) == file.seam

    def _go_back(self, name: str, file: Followed, local: BinaryIO, size: int) -> None:
        """To the pieces that the file does begin with; of the ledger the others are kept beside."""
        if name == "metrics.jsonl":
            self.losses = {}
        same, seam = 0, b""
        for data in _common(file.pieces, local, size):
            self._learn(name, data, again=True)
            same, seam = same + 1, data[-SEAM_BYTES:]
        if same < len(file.pieces) and name == MONEY:
            self._files[f"ledger.lost-{self._space}.jsonl"] = Followed(list(file.pieces), file.end)
        file.cut(same)
        file.seam, file.stamp = seam, None

    def _learn(self, name: str, lines: bytes, again: bool = False) -> None:
        if name == "metrics.jsonl":
            self.losses |= losses_at(_rows_with(lines, b'"val/loss"'))
        if name == EVENTS and not again:
            rows = _rows_with(lines, b'"rewind"')
            self.rewinds += [r["to_step"] for r in rows if isinstance(r.get("to_step"), int)]

    def _send(self, name: str, begin: int, lines: bytes, store: Store, rate: Rate) -> Object:
        digest = hashlib.sha256(lines).hexdigest()
        path = f"{self._space}/records/{name}/{begin:012d}-{len(lines):010d}-{digest[:8]}"
        store.put(f"{self._run}/{path}", lines)
        rate.count(len(lines))
        return Object(path, len(lines), digest)


def _common(pieces: Iterable[Object], local: BinaryIO, size: int) -> Iterator[bytes]:
    """The content of those pieces that a local file begins with."""
    local.seek(0)
    for piece in pieces:
        data = local.read(piece.bytes) if local.tell() + piece.bytes <= size else b""
        if hashlib.sha256(data).hexdigest() != piece.sha256:
            return
        yield data


def _lines(local: BinaryIO, begin: int, size: int, past: int) -> bytes:
    """Complete lines from `begin`: a backlog's piece, and more where that does not reach beyond `past`."""
    local.seek(begin)
    data = local.read(min(BACKLOG_BYTES, size - begin))
    if begin + data.rfind(b"\n") + 1 <= past and begin + len(data) < size:
        data += local.read(size - begin - len(data))
    return data[: data.rfind(b"\n") + 1]


def _rows_with(lines: bytes, word: bytes) -> Iterable[dict[str, Any]]:
    marked = (line for line in lines.splitlines() if word in line)
    return [row for line in marked if (row := parse_row(line)) is not None]
