"""Rows are appended whole, go back with a resume, and wait when the disk is full."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.records.metrics import JsonLines, read_rows, rewind, utc_now


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": math.nan, "text": "naïve\n"})
    file.append({"step": 2, "loss": math.inf})
    first, second = read_rows(tmp_path / "m.jsonl")
    assert math.isnan(first["loss"])
    assert (first["text"], second["loss"]) == ("naïve\n", math.inf)
    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_rows_of_two_threads_are_all_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog's thread tells of a hang, and the loop wakes up in the middle of a row of its own."""
    file, pwrite = JsonLines(tmp_path / "m.jsonl"), os.pwrite
    writing, written = threading.Event(), threading.Event()
    loop = threading.Thread(target=lambda: file.append({"step": 1}))

    def slow(*arguments: Any) -> int:
        count = pwrite(*arguments)
        if threading.current_thread() is loop:
            writing.set()
            written.wait(0.3)  # the other is through, or waits for this one
        return count

    monkeypatch.setattr(os, "pwrite", slow)
    loop.start()
    assert writing.wait(20)
    file.append({"step": 2})
    written.set()
    loop.join(20)
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_torn_last_row_is_ignored_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert [r["step"] for r in read_rows(path)] == [1]
    JsonLines(path).append({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@given(steps=st.lists(st.integers(0, 50), max_size=30), back_to=st.integers(-1, 50), torn=st.booleans())
def test_going_back_splits_the_story_and_loses_nothing(steps: list[int], back_to: int, torn: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        lines = [json.dumps({"step": s}) + "\n" for s in sorted(steps)]
        path.write_text("".join(lines) + ('{"st' if torn else ""))
        moved = rewind(path, back_to)
        aside = path.with_name("metrics.superseded.jsonl")
        kept = path.read_text()
        rest = aside.read_text() if aside.exists() else ""
        assert kept + rest == "".join(lines)
        assert all(json.loads(line)["step"] <= back_to for line in kept.splitlines())
        assert all(json.loads(line)["step"] > back_to for line in rest.splitlines())
        assert moved == rest.count("\n")


def test_a_kill_in_the_middle_of_going_back_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines = tmp_path / "m.jsonl", [b'{"step": %d}\n' % step for step in range(1, 9)]
    path.write_bytes(b"".join(lines))

    def killed(_: int) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "fsync", killed)  # the copy is made, the file is not cut
    with pytest.raises(SystemExit):
        rewind(path, 4)
    monkeypatch.undo()
    aside = tmp_path / "m.superseded.jsonl"
    for torn in (b"", lines[6][:5]):
        aside.write_bytes(b"".join(lines[4:6]) + torn if torn else aside.read_bytes())
        path.write_bytes(b"".join(lines))
        assert rewind(path, 4) == 4
        assert path.read_bytes() == b"".join(lines[:4])
        assert aside.read_bytes() == b"".join(lines[4:])


def test_a_full_disk_leaves_no_half_row_and_the_rows_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles: list[str] = []
    file = JsonLines(tmp_path / "m.jsonl", troubles.append)
    file.append({"step": 1})
    real, room = os.pwrite, 5

    def almost_full(descriptor: int, data: bytes, offset: int) -> int:
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:room], offset)

    monkeypatch.setattr(os, "pwrite", almost_full)
    file.append({"step": 2})  # five bytes of it fit
    room = 0
    file.append({"step": 3})
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"step": 1}\n'
    assert len(troubles) == 1
    assert "rows wait in memory" in troubles[0]
    monkeypatch.setattr(os, "pwrite", real)
    file.append({"step": 4})
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1, 2, 3, 4]


def test_times_are_utc_and_end_in_z() -> None:
    from datetime import datetime

    text = utc_now()
    parsed: Any = datetime.fromisoformat(text)
    assert text.endswith("Z")
    assert abs(parsed.timestamp() - __import__("time").time()) < 5
