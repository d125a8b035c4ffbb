"""Disk and clock, measured for real where that is possible, and against invented ones where it is not."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from x1_pretrain.doctor import clock, disk
from x1_pretrain.doctor.clock import Watch


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = disk.look(tmp_path, limit_s=1.5)
    assert found.trouble is None
    assert found.write_bytes_per_sec is not None
    assert found.read_bytes_per_sec is not None
    assert found.write_bytes_per_sec > 1e5
    assert found.tried_bytes >= disk.CHUNK
    assert found.uncached
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = disk.look(tmp_path / "a" / "b", limit_s=0.5)
    assert found.folder == str(tmp_path)
    assert not (tmp_path / "a").exists()


def test_time_is_kept_by_the_clock_handed_in(tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    found = disk.look(tmp_path, limit_s=9.0, clock=lambda: float(next(ticks)))
    assert found.tried_bytes <= 8 * disk.CHUNK * 5  # a second a look: a few rounds, then it stops
    assert found.write_bytes_per_sec == pytest.approx(found.tried_bytes / 5, rel=0.5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert disk.look(tmp_path, 0.5).trouble == "Permission denied"
    finally:
        tmp_path.chmod(0o700)


def test_an_error_on_the_way_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = disk.look(tmp_path, 0.5)
    assert found.trouble == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_no_name_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment, the doctor leaves nothing."""
    seen: list[list[Path]] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(list(tmp_path.iterdir())), sync(fd)))
    assert disk.look(tmp_path, 0.5).trouble is None
    assert seen
    assert not any(seen)


def test_what_a_killed_doctor_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f"{disk.PREFIX}{gone.pid}", f"{disk.PREFIX}{os.getppid()}", f"{disk.PREFIX}notes", "x1-doctor-1"]
    for name in names:
        (tmp_path / name).touch()
    disk.remove_old(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(names[1:])


@pytest.mark.parametrize(
    ("name", "network"),
    [("ext4", False), ("nfs4", True), ("fuse.sshfs", True), ("overlay", False), ("9p", True), ("", False)],
)
def test_which_file_systems_lie_across_a_network(name: str, network: bool) -> None:
    assert disk.is_network(name) is network


# ------------------------------------------------------------------------------------------------------------


def test_drift_is_what_the_wall_clock_did_beside_the_monotonic_one() -> None:
    assert Watch(1000.0, 50.0).drift_s(Watch(1060.0, 110.0)) == 0.0
    assert Watch(1000.0, 50.0).drift_s(Watch(1000.0, 110.0)) == -60.0


@contextmanager
def server(date: str, status: int = 200) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", date)
            self.send_header("Location", "https://nowhere.invalid/")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("status", [200, 301, 403])
def test_a_servers_date_whatever_else_it_answers(status: int) -> None:
    with server(formatdate(time.time() - 7200, usegmt=True), status) as url:
        found = clock.ahead_s([url])
    assert found is not None
    assert found[0] == pytest.approx(7200, abs=120)
    assert found[1] == url


def test_no_date_no_server_and_a_server_that_never_answers() -> None:
    with server("yesterday, I think") as url:
        assert clock.ahead_s([url]) is None
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        assert clock.fetch_date(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.5) is None
        assert time.monotonic() - begun < 60
    assert clock.ahead_s(["http://127.0.0.1:9"]) is None


def test_the_next_server_is_asked() -> None:
    dates = {"b": "Sat, 21 Nov 2026 09:00:00 GMT"}
    found = clock.ahead_s(["a", "b"], lambda url, _: dates.get(url), wall=lambda: 1795251660.0)
    assert found == (60.0, "b")


def test_the_newest_file(tmp_path: Path) -> None:
    for name, when in (("a", 100.0), ("b", 300.0), ("c", 200.0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    files = [tmp_path / name for name in ("a", "b", "c", "absent")]
    assert clock.newest(files) == (300.0, tmp_path / "b")
    assert clock.newest([tmp_path / "absent"]) is None
