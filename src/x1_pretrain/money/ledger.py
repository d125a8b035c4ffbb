"""`ledger.jsonl`: every event that costs, warns or decides, appended and synced before anyone acts on it.

Several processes write one ledger (launch, supervisor, sidecar, trainer): each append locks the file. Rows
are never changed. A kill in mid-write leaves a torn last line, which was never acted on: the next append cuts
it off and says so in a row of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from x1_pretrain.errors import FAULT, UserError
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.records.formats import FORMATS
from x1_pretrain.stores.address import refuse_uri

Row = dict[str, Any]
NAME = "ledger.jsonl"
TAIL_BYTES = 1 << 16
HANDLER_S = 2.0  # a signal's handler waits no longer: leaving may be what it is for


class LedgerError(UserError):
    """The one memory of what was spent can't be read or written: nothing that costs may follow."""

    exit_code = FAULT


class Ledger:
    """`Ledger(run_folder / NAME, clock).append("intent", "1x A100 ...", usd_per_hr=Decimal("1.19"))`"""

    def __init__(self, file: Path, clock: Clock) -> None:
        self.file, self.clock = file, clock
        self._mutex = threading.RLock()
        self._held: int | None = None

    def append(self, event: str, message: str = "", **fields: Any) -> Row:
        """One more row, on the disk when this returns."""
        with self.locked():
            assert self._held is not None
            end, number = self._cut_torn_end(self._held)
            row = {"seq": number + 1, "time_utc": stamp(self.clock.now()), "event": event, **fields}
            row |= {} if end else {"schema_version": FORMATS[NAME]}  # the first of a file says its version
            row = plain(row | {"message": message} if message else row)
            self._write(self._held, row, end)
        return row

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process appends meanwhile: look, then append. A handler that comes in the middle appends
        too, under the same lock; while another process has that, it waits a moment, then LedgerError."""
        with self._mutex:
            if self._held is not None:
                self._hold_again(self._held)
                yield
                return
            try:  # Ctrl-C may come in here: what is held is let go
                self._hold()
                yield
            finally:
                self._let_go()

    def _hold(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._held = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fcntl.flock(self._held, fcntl.LOCK_EX)
        except OSError as error:
            raise LedgerError(f"{self.file}: can't be written ({error.strerror})") from None

    def _hold_again(self, held: int) -> None:
        """This thread has the lock, or a signal came while it was waiting for it."""
        end = time.monotonic() + HANDLER_S
        while True:
            try:
                return fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() > end:
                    raise LedgerError(f"{self.file}: another process holds it ({error.strerror})") from None
            time.sleep(0.02)

    def _let_go(self) -> None:
        """Unlocked before it is forgotten: a handler that came between would wait for its own thread."""
        if self._held is not None:
            with suppress(OSError):
                fcntl.flock(self._held, fcntl.LOCK_UN)
            held, self._held = self._held, None
            os.close(held)

    def _cut_torn_end(self, descriptor: int) -> tuple[int, int]:
        """Where the next row goes, and the number of the last one."""
        size = os.fstat(descriptor).st_size
        tail = _tail(descriptor, size)
        whole = tail.rfind(b"\n") + 1
        number = _last_number(tail[:whole])
        torn = len(tail) - whole
        if not torn:
            return size, number
        os.ftruncate(descriptor, size - torn)
        row = {"seq": number + 1, "time_utc": stamp(self.clock.now()), "event": "repaired"}
        said = f"the last line was torn ({torn} bytes, from a kill in mid-write) and is cut off"
        return self._write(descriptor, row | {"message": said}, size - torn), number + 1

    def _write(self, descriptor: int, row: Row, end: int) -> int:
        data = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            written = os.write(descriptor, data)  # at the end, also if a handler wrote there meanwhile
            if written != len(data):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, end)
            raise LedgerError(
                f"{self.file}: the row '{row['event']}' can't be written ({error.strerror}); make room there"
            ) from None
        return end + written

    def rows(self) -> list[Row]:
        """All rows; a torn last line is not one yet."""
        return read_rows(self.file)


def read_rows(file: Path) -> list[Row]:
    """The rows of a ledger; none where there is no file. A damaged line is refused by its number."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(f"{file}: can't be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("event"), str):
            raise LedgerError(
                f"{file}, line {number}: not a ledger row, and sums without it would be wrong. Put it "
                "right from a copy, or remove it, and run `x1 reconcile`"
            )
        _refuse_newer(row, file, number)
        rows.append(row)
    return rows


def _refuse_newer(row: Row, file: Path, number: int) -> None:
    """Sums without what such a row means would be wrong."""
    version = row.get("schema_version", 1)
    if isinstance(version, int) and version > FORMATS[NAME]:
        raise LedgerError(
            f"{file}, line {number}: schema version {version}, this x1 reads up to {FORMATS[NAME]}; update x1"
        )


def _tail(descriptor: int, size: int) -> bytes:
    """The end of the file, with its last whole row in it, however long that is."""
    length = TAIL_BYTES
    while (tail := os.pread(descriptor, length, max(0, size - length))).count(b"\n") < 2 and length < size:
        length *= 2
    return tail


def _last_number(data: bytes) -> int:
    last = data.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        return int(json.loads(last)["seq"])
    except (ValueError, LookupError, TypeError):
        return data.count(b"\n")  # an empty file, or one that someone edited


def plain(row: Row) -> Row:
    """As JSON holds it: money as a string, never a rounded binary number."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        return stamp(value)
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def usd(row: Row, key: str) -> Decimal:
    """An amount in a row."""
    return Decimal(str(row[key]))


def find_ledger(run: Path, otherwise: str) -> Path:
    """The folder of a run that keeps a ledger: a path, or a name under `runs`."""
    folder = next((f for f in (run, Path("runs") / run) if (f / NAME).is_file()), None)
    if folder is not None:
        return folder
    refuse_uri(str(run))
    known = run.is_dir() or (Path("runs") / run).is_dir()
    raise UserError(
        f"{run}: {f'no {NAME} in it' if known else 'no such run folder, and none under runs/'}; {otherwise}"
    )
