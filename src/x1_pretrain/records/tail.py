"""Following a `.jsonl` file that another process writes, at a cost that does not grow with it."""

from __future__ import annotations

from pathlib import Path

from x1_pretrain.records.run_folder import Row, parse_row, with_numbers

SEAM_BYTES = 256  # before the place reached: enough of the last row to tell it from another


class Tail:
    """The complete rows that a growing file got since the last look.

    A resume or a rewind cuts rows off the end of a file and others follow: then all of it is read again, and
    `again` is true of that one read.
    """

    def __init__(self, file: Path) -> None:
        self.again = False
        self._file, self._offset, self._seam = file, 0, b""

    def read(self) -> list[Row]:
        """The rows since the last call. A file that is not there has none."""
        try:
            data = self._fresh()
        except FileNotFoundError:
            self.again, self._offset, self._seam = self._offset > 0, 0, b""
            return []
        complete = data[: data.rfind(b"\n") + 1]  # the writer may be in the middle of a row
        self._offset += len(complete)
        self._seam = (self._seam + complete)[-SEAM_BYTES:]
        rows = [parse_row(line) for line in complete.splitlines()]
        return [with_numbers(row) for row in rows if row is not None]

    def _fresh(self) -> bytes:
        """What comes after the place reached; from the start where that is no longer what it was."""
        with self._file.open("rb") as stream:
            stream.seek(self._offset - len(self._seam))
            self.again = stream.read(len(self._seam)) != self._seam
            if self.again:
                self._offset, self._seam = 0, b""
                stream.seek(0)
            return stream.read()
