"""`steps.jsonl`, one row a step: the rows of a stretch, without reading the rest of a long file.

Rows are in step order, so the first one wanted is found by halving the file. Rows of steps that were done
again lie in `steps.superseded.jsonl`; `rows_between` can give the stretch as it stood at an earlier moment,
which is how a spike that a rewind undid is still seen. A run from before `steps.jsonl` has the rows of its
metrics, one every few steps.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO

from x1_pretrain.errors import UserError
from x1_pretrain.records.plots import LARGEST
from x1_pretrain.records.run_folder import Row, Run, is_number, is_train, parse_row, read_jsonl, with_numbers

NAME, SUPERSEDED = "steps.jsonl", "steps.superseded.jsonl"
LINES_TRIED = 1_000  # damaged lines in a row that are passed over while halving


def rows_between(run: Run, first: int, last: int, until_utc: str | None = None) -> list[Row]:
    """The rows of steps first to last, in order, each step once; with `until_utc` as they stood then."""
    file = run.folder / NAME
    if not file.exists():
        return _of_metrics(run, first, last)
    rows = _section(file, first, last)
    if until_utc is not None:
        moved = read_jsonl(run.folder / SUPERSEDED).rows
        rows = [row for row in moved + rows if str(row.get("time_utc", "")) <= until_utc]
    by_step = {row["step"]: with_numbers(row) for row in rows if _wanted(row, first, last)}
    return [by_step[step] for step in sorted(by_step)]


def every_step(run: Run) -> bool:
    """Whether the run has a row for every step, and not only for some."""
    return (run.folder / NAME).exists()


def last_row(run: Run) -> Row | None:
    """The newest whole row."""
    file = run.folder / NAME
    if not file.exists():
        return next(iter(_of_metrics(run, 0, 1 << 62)[-1:]), None)
    with _opened(file) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - (1 << 16)))
        lines = stream.read().split(b"\n")[:-1]
    rows = (parse_row(line) for line in reversed(lines))
    return next((with_numbers(row) for row in rows if row is not None and is_step(row)), None)


def value(row: Row, name: str) -> float:
    """A number of a row; NaN where there is none."""
    return plausible(float(row[name])) if is_number(row.get(name)) else math.nan


def plausible(number: float) -> float:
    """Beyond LARGEST no number can be reckoned with, or drawn: it is none, as after an overflow."""
    return number if abs(number) <= LARGEST or math.isinf(number) else math.nan


def is_step(row: Row) -> bool:
    return isinstance(row.get("step"), int) and is_number(row.get("step"))


def _wanted(row: Row, first: int, last: int) -> bool:
    return is_step(row) and first <= row["step"] <= last


def _of_metrics(run: Run, first: int, last: int) -> list[Row]:
    names = {"train/loss": "loss", "grad_norm": "grad_norm", "lr": "lr", "time_utc": "time_utc"}
    return [
        {"step": row["step"], **{new: row[old] for old, new in names.items() if old in row}}
        for row in run.rows()
        if is_train(row) and _wanted(row, first, last)
    ]


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def _section(file: Path, first: int, last: int) -> list[Row]:
    """The rows from the first of step `first` or later up to the last of step `last`; a torn line is none."""
    with _opened(file) as stream:
        stream.seek(_place(stream, first))
        rows = []
        for line in stream:
            row = parse_row(line) if line.endswith(b"\n") else None
            if row is None or not is_step(row):
                continue
            if row["step"] > last:
                break
            rows.append(row)
    return rows


def _place(stream: IO[bytes], first: int) -> int:
    """Where a line begins before which every row is of a step below `first`; by halving."""
    low, high = 0, os.fstat(stream.fileno()).st_size
    while high - low > 1 << 14:
        middle = (low + high) // 2
        stream.seek(middle)
        stream.readline()  # the rest of a line
        begin, step = stream.tell(), _next_step(stream)
        if step is None or step >= first:
            high = middle
        else:
            low = begin
    return low


def _next_step(stream: IO[bytes]) -> int | None:
    for _ in range(LINES_TRIED):
        line = stream.readline()
        if not line:
            return None
        row = parse_row(line)
        if row is not None and is_step(row):
            return int(row["step"])
    return None
