from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from x1_pretrain.errors import INTERRUPTED
from x1_pretrain.records.processes import dies_with_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")

PARENT = """
import signal, subprocess, sys
from x1_pretrain.records.processes import dies_with_parent
subprocess.Popen(["sleep", "60"], preexec_fn=dies_with_parent(signal.SIGKILL), start_new_session=True)
print("started", flush=True)
sys.stdin.read()
"""


def test_a_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
        assert parent.communicate(timeout=30)[0] == b""  # the child held the pipe as well


def test_a_child_whose_parent_is_gone_before_it_asked_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    before = dies_with_parent(signal.SIGKILL)
    assert subprocess.call(["true"], preexec_fn=before) == INTERRUPTED


def test_where_the_system_has_no_such_call_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert dies_with_parent(signal.SIGKILL) is None
