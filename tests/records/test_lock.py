"""One writer a folder: by the kernel's lock, and without it by name and heartbeat. With real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from x1_pretrain.errors import RefusedError
from x1_pretrain.records import lock
from x1_pretrain.records.lock import Holder, lock_folder
from x1_pretrain.records.processes import boot_id, is_alive, started

SCRIPT = """
import errno, os, sys, time
from pathlib import Path
from x1_pretrain.errors import RefusedError
from x1_pretrain.records import lock

def unsupported(file, how):
    raise OSError(int(sys.argv[2]), "fake")

lock.SETTLE_S = 1.0 if "rivals" in sys.argv else 0.1
try:
    held = lock.lock_folder(Path(sys.argv[1]), **({"flock": unsupported} if sys.argv[2] != "0" else {}))
except RefusedError as error:
    print("REFUSED", error, flush=True)
    raise SystemExit(78)
print("HELD", held.note, flush=True)
if "fork" in sys.argv:
    if os.fork() == 0:
        time.sleep(600)
    print("FORKED", flush=True)
sys.stdin.read()
held.close()
"""
KINDS = [0, errno.ENOLCK, errno.EOPNOTSUPP]


def holding(folder: Path, number: int = 0, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(number), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def unsupported(number: int) -> Callable[[IO[str], int], None]:
    def flock(_: IO[str], __: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", KINDS)
def test_a_second_process_is_refused_with_who_since_when_and_what_to_do(number: int, tmp_path: Path) -> None:
    first = holding(tmp_path, number)
    assert first_line(first) == "HELD None"
    second = holding(tmp_path, number)
    said = first_line(second)
    assert second.wait(60) == 78
    host = re.escape(os.uname().nodename)
    assert re.search(
        rf"process {first.pid} on {host}, since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ, is training here; "
        rf"`kill {first.pid}` .*--run-dir",
        said,
    ), said
    kill(first)


@pytest.mark.parametrize("number", KINDS)
def test_a_killed_holder_keeps_nothing_and_is_named(number: int, tmp_path: Path) -> None:
    first = holding(tmp_path, number)
    assert first_line(first) == "HELD None"
    kill(first)
    second = holding(tmp_path, number)
    said = first_line(second)
    assert said.startswith(f"HELD the lock of process {first.pid} on "), said
    assert said.endswith("taken over")
    second.communicate("")
    assert second.returncode == 0


@pytest.mark.parametrize("number", KINDS)
def test_one_that_ended_well_leaves_no_name(number: int, tmp_path: Path) -> None:
    first = holding(tmp_path, number)
    first_line(first)
    first.communicate("")
    assert (tmp_path / "lock").read_text() == ""
    third = holding(tmp_path, number)
    assert first_line(third) == "HELD None"
    kill(third)


def test_a_child_that_outlives_its_killed_trainer_is_explained(tmp_path: Path) -> None:
    first = holding(tmp_path, 0, "fork")
    assert first_line(first) == "HELD None"
    assert first_line(first) == "FORKED"
    first.kill()  # the fork lives on, and with it the kernel's lock
    first.wait()
    second = holding(tmp_path)
    said = first_line(second)
    assert second.wait(60) == 78
    assert f"though process {first.pid}" in said
    assert "fuser -v" in said
    os.killpg(first.pid, signal.SIGKILL)


def test_an_id_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    mine = Holder.here()
    stranger = Holder(os.getppid(), mine.host, mine.since, mine.boot, "1", "abcdefgh")
    (tmp_path / "lock").write_text(stranger.line())
    with_name = lock_folder(tmp_path, unsupported(errno.ENOLCK))
    assert with_name.note is not None
    assert f"process {os.getppid()}" in with_name.note
    with_name.close()


def elsewhere(host: str = "other-machine") -> Holder:
    return Holder(4711, host, "2026-01-01T00:00:00Z", "another-boot", "99", "abcdefgh")


@pytest.mark.parametrize("number", KINDS)
def test_a_holder_on_another_machine_is_believed_as_long_as_it_renews_its_lock(
    number: int, tmp_path: Path
) -> None:
    file = tmp_path / "lock"
    file.write_text(elsewhere().line())
    heart = subprocess.Popen(
        [sys.executable, "-c", f"import os,time\nwhile True: time.sleep(0.2); os.utime({str(file)!r})"]
    )
    said: list[str] = []
    options = {"flock": unsupported(number)} if number else {}
    try:
        with pytest.raises(RefusedError, match=r"process 4711 on other-machine.*end it on other-machine"):
            lock_folder(tmp_path, say=said.append, **options)
    finally:
        heart.kill()
        heart.wait()
    assert "waiting up to " in said[0]


@pytest.mark.parametrize("age_s", [0, 3600])
def test_a_lock_that_is_not_renewed_is_taken_after_the_stated_time(
    age_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(lock, "beats", partial(lock.beats, sleep=slept.append))
    file = tmp_path / "lock"
    file.write_text(elsewhere().line())
    then = time.time() - age_s
    os.utime(file, (then, then))
    held = lock_folder(tmp_path, say=lambda _: None)
    if age_s:
        assert not slept
    else:
        assert lock.STALE_S - 30 < sum(slept) <= lock.STALE_S  # less what this test took until then
    assert held.note is not None
    held.close()
    assert not list(tmp_path.glob(".lock-probe*"))


def test_a_machine_that_was_restarted_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_S", 0.0)
    (tmp_path / "lock").write_text(elsewhere(os.uname().nodename).line())
    held = lock_folder(tmp_path)
    assert held.note is not None
    held.close()


def test_another_container_on_this_kernel_needs_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "beats", lambda *_: pytest.fail("waits for a sign of life"))
    holder = Holder(1, "container-7", "2026-01-01T00:00:00Z", boot_id(), "5", "abcdefgh")
    (tmp_path / "lock").write_text(holder.line())
    lock_folder(tmp_path).close()


def test_the_heartbeat_renews_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    held = lock_folder(tmp_path)
    os.utime(tmp_path / "lock", (1, 1))
    end = time.monotonic() + 60
    while (tmp_path / "lock").stat().st_mtime < 1e9:
        assert time.monotonic() < end
        time.sleep(0.01)
    held.close()


@pytest.mark.parametrize(
    "text", ["", "process 5 on old-host\n", "\0\0\0", "process x on y since z", "é" * 5000]
)
def test_whatever_a_lock_file_holds_a_free_lock_is_taken(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text, encoding="utf-8")
    held = lock_folder(tmp_path)
    assert Holder.read((tmp_path / "lock").read_text()) is not None
    held.close()
    held.close()  # twice is harmless


def test_two_that_start_at_the_same_time_without_a_kernels_lock_are_not_both_let_in(tmp_path: Path) -> None:
    rivals = [holding(tmp_path, errno.ENOLCK, "rivals") for _ in range(4)]
    said = [first_line(r) for r in rivals]
    assert sum(line.startswith("HELD") for line in said) == 1, said
    for rival in rivals:
        kill(rival)


def test_a_rival_that_wrote_its_name_a_moment_later_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival = elsewhere()
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / "lock").write_text(rival.line()))
    with pytest.raises(RefusedError, match="process 4711 on other-machine"):
        lock_folder(tmp_path, unsupported(errno.ENOLCK))
    assert Holder.read((tmp_path / "lock").read_text()) == rival  # and is left alone


@pytest.mark.parametrize("another", [False, True])
def test_a_folder_that_was_moved_away_before_its_lock_came_is_not_held(tmp_path: Path, another: bool) -> None:
    """`x1 runs rm` lets go of a lock that lies in the trash by then."""
    folder = tmp_path / "run"

    def moved(file: IO[str], how: int) -> None:
        folder.rename(tmp_path / "trash")
        if another:
            held.append(lock_folder(folder))
        fcntl.flock(file, how)

    held: list[lock.FolderLock] = []
    with pytest.raises(RefusedError, match="was moved away"):
        lock_folder(folder, moved)
    assert (tmp_path / "trash" / "lock").read_text() == ""
    for one in held:
        one.close()


def test_a_disk_error_is_not_taken_for_a_disk_without_locks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"):
        lock_folder(tmp_path, unsupported(errno.EIO))


def test_this_process_is_alive_and_a_zombie_is_not() -> None:
    assert is_alive(os.getpid(), started(os.getpid()))
    assert not is_alive(os.getpid(), "1")
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid)  # ended, not waited for
    child.wait()
    assert not is_alive(child.pid)
