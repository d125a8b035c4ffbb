"""Two copies of a record file become one, and no row is lost. Pure: bytes in, bytes out."""

from __future__ import annotations

import json
from collections import Counter
from itertools import dropwhile, takewhile
from typing import Any


def whole_lines(data: bytes) -> bytes:
    """Without a torn last line, which nobody acted on."""
    return data[: data.rfind(b"\n") + 1]


def split_lines(data: bytes) -> list[bytes]:
    return (
        data.splitlines(keepends=True) if b"\r" not in data else [x + b"\n" for x in data.split(b"\n")[:-1]]
    )


def common_lines(one: bytes, other: bytes) -> int:
    """Bytes of the lines that both begin with."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        shared = size
    else:
        low, high = 0, size  # one[:low] is shared, one[:high] is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
        shared = low
    return one.rfind(b"\n", 0, shared) + 1


def rows_only_in(local: bytes, *others: bytes) -> bytes:
    """The lines of `local` that none of the others has."""
    known = {line for other in others for line in split_lines(other)}
    return b"".join(line for line in split_lines(local) if line not in known)


def mended(mirrored: bytes, local: bytes, aside: bytes) -> tuple[bytes, bytes, int]:
    """A file that lacks rows which the mirror has, and which no resume moved `aside` since: as it should be,
    with its own rows behind; those of its rows that have no place there; how many it gets back."""
    theirs, lines = split_lines(mirrored), split_lines(local)
    ours = set(lines)
    theirs = theirs[: len(theirs) - _given_up(theirs, lines, set(split_lines(aside)) - ours)]
    back = [line for line in theirs if line not in ours]
    if not back:
        return local, b"", 0
    known = set(theirs)
    end = max((number for number, line in enumerate(lines, start=1) if line in known), default=0)
    changed = {_place(line) for line in back} - {None}
    whole = b"".join(theirs + [line for line in lines[end:] if _place(line) not in changed])
    return whole, rows_only_in(local, whole), len(back)


def _given_up(theirs: list[bytes], ours: list[bytes], moved: set[bytes]) -> int:
    """How many rows at the end of the mirror's are of steps that were given up since. A row without a time
    may be the same when its step is done again, and so be moved and valid: it counts as given up only from
    where another row took its place."""
    last = list(takewhile(moved.__contains__, reversed(theirs)))[::-1]
    if not last or any(b'"time_utc"' in line for line in last):
        return len(last)
    taken = {_place(line) for line in ours} - {None}
    return len(list(dropwhile(lambda line: _place(line) not in taken, last)))


def _place(line: bytes) -> tuple[int, bool, str] | None:
    """What two versions of a row have in common. Of a step there may be a row of the training, one of the
    evaluation and a sample of each prompt."""
    try:
        row = _row(line)
    except ValueError:
        return None
    step = row.get("step")
    return (step, "val/loss" in row, str(row.get("prompt"))) if isinstance(step, int) else None


def merged_ledger(mirrored: bytes, local: bytes) -> bytes:
    """The rows of both, those of the mirror first where they part, numbered anew from there.

    A row counts as the same whatever its number is: a merge is done again without doubling anything.
    ValueError names a line that is no row: sums without it would be wrong.
    """
    if mirrored.startswith(local) or local.startswith(mirrored):
        return max(mirrored, local, key=len)
    shared = common_lines(mirrored, local)
    rest = [_row(line) for line in split_lines(mirrored[shared:])]
    known = Counter(_unnumbered(row) for row in rest)
    for row in map(_row, split_lines(local[shared:])):
        key = _unnumbered(row)
        if known[key] > 0:
            known[key] -= 1
        else:
            rest.append(row)
    number = _last_number(mirrored[:shared])
    again = [{**row, "seq": number + place} for place, row in enumerate(rest, start=1)]
    return mirrored[:shared] + b"".join(_line(row) for row in again)


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not a row: {line[:80]!r}")
    return row


def _unnumbered(row: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key != "seq"}, sort_keys=True)


def _last_number(data: bytes) -> int:
    lines = split_lines(data)
    try:
        return int(_row(lines[-1])["seq"]) if lines else 0
    except (ValueError, LookupError, TypeError):
        return len(lines)


def _line(row: dict[str, Any]) -> bytes:
    """As money.ledger writes it."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
