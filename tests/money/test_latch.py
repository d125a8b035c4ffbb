"""STOP.json: the first reason stays, whoever else stops too; whatever state the file is in, it is a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from x1_pretrain.errors import REFUSED
from x1_pretrain.money import latch
from x1_pretrain.money.latch import NAME, Stop

OVER = Stop(
    "$35.02 spent, above the ceiling of $35.00", "guard", 77, "2026-05-23T15:42:01Z", "35.02", "35.00"
)
LATER = Stop("a person decided to stop", "person", 76, "2026-05-23T15:50:00Z")


def test_it_is_read_as_it_was_written_and_cleared(tmp_path: Path) -> None:
    run = tmp_path / "not" / "there" / "yet"
    assert latch.read(run) is None
    latch.write(run, OVER)
    assert latch.read(run) == OVER
    assert [f.name for f in run.iterdir()] == [NAME]
    latch.clear(run)
    latch.clear(run)
    assert latch.read(run) is None


def test_the_first_reason_stays(tmp_path: Path) -> None:
    latch.write(tmp_path, OVER)
    latch.write(tmp_path, LATER)
    assert latch.read(tmp_path) == OVER


def test_a_reason_written_in_between_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else latches after this one looked and before it named its own file."""
    fsync = os.fsync

    def other_first(descriptor: int) -> None:
        fsync(descriptor)
        monkeypatch.setattr(os, "fsync", fsync)
        other = threading.Thread(target=latch.write, args=(tmp_path, OVER))
        other.start()
        other.join()

    monkeypatch.setattr(os, "fsync", other_first)
    latch.write(tmp_path, LATER)
    assert latch.read(tmp_path) == OVER
    assert [f.name for f in tmp_path.iterdir()] == [NAME]


def test_a_reason_written_in_between_stays_without_hard_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        (tmp_path / NAME).write_text(json.dumps(asdict(OVER)))  # by another process, just now
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    latch.write(tmp_path, LATER)
    assert latch.read(tmp_path) == OVER


def test_one_that_is_cleared_while_it_is_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_json = latch.read_json

    def late(file: Path) -> dict[str, Any]:
        latch.clear(tmp_path)
        return read_json(file)

    latch.write(tmp_path, OVER)
    monkeypatch.setattr(latch, "read_json", late)
    assert latch.read(tmp_path) is None


def test_a_disk_without_hard_links_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    latch.write(tmp_path, OVER)
    latch.write(tmp_path, LATER)
    assert latch.read(tmp_path) == OVER


def test_a_full_disk_still_latches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    latch.write(tmp_path, OVER)
    stop = latch.read(tmp_path)
    assert stop is not None
    assert [f.name for f in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe\x00", b"{}", b'{"reason": 3, "exit_code": "77"}', b"[" * 100_000],
    ids=lambda content: str(content[:20]),
)
def test_damaged_it_is_a_stop_all_the_same(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    stop = latch.read(tmp_path)
    assert stop is not None
    error = latch.refusal(tmp_path, stop)
    assert error.exit_code == REFUSED
    assert "--raise-ceiling-to" in str(error)
    assert "\n" not in str(error)
    latch.write(tmp_path, OVER)
    assert (tmp_path / NAME).read_bytes() == content


def test_a_link_to_nothing_and_a_folder_of_that_name_are_stops(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / NAME).symlink_to("gone")
    (tmp_path / "b" / NAME).mkdir(parents=True)
    assert latch.read(tmp_path / "a") is not None
    assert latch.read(tmp_path / "b") is not None


def test_the_refusal_says_where_when_how_much_why_and_what_next(tmp_path: Path) -> None:
    said = str(latch.refusal(tmp_path, OVER))
    assert said.startswith(
        f"{tmp_path / NAME}: stopped 2026-05-23T15:42:01Z at $35.02 of $35.00: $35.02 spent"
    )
    assert "at $" not in str(latch.refusal(tmp_path, LATER))


def test_it_is_whole_however_its_writer_dies(tmp_path: Path) -> None:
    """Killed between any two system calls, there is no latch or a whole one."""
    code = """
import os, sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from x1_pretrain.money import latch
left = int(sys.argv[2])
def counting(real):
    def call(*a, **k):
        global left
        left -= 1
        if left < 0: os._exit(9)
        return real(*a, **k)
    return call
for name in ("fsync", "link", "open"): setattr(os, name, counting(getattr(os, name)))
latch.write(Path(sys.argv[1]), latch.Stop("why", "guard", 77, "2026-05-23T15:42:01Z"))
os._exit(0)
"""
    ends = []
    for calls in range(5):
        run = tmp_path / str(calls)
        ends.append(subprocess.run([sys.executable, "-c", code, str(run), str(calls)]).returncode)
        stop = latch.read(run)
        assert stop is None or stop.reason == "why"
        assert stop is not None or ends[-1] == 9
    assert ends[0] == 9
    assert ends[-1] == 0
    assert json.loads((tmp_path / "4" / NAME).read_bytes())["exit_code"] == 77
