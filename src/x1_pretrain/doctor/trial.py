"""A check in a process of its own: it may hang or crash, and what it had found by then still counts.

The child reads its task as one line of JSON from standard input and writes one JSON object a line, each with
its "part". It ends when its standard input is closed, so that none outlives the doctor.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

Facts = dict[str, Any]
POLL_S = 0.05
ENDED = "ended after"  # what is said of a child whose time was up
DYING_S = 5.0  # a process inside a driver call may not even die at once


@dataclass(frozen=True)
class Trial:
    """What a child said, by part, and what went wrong with it (None: it ended by itself, well)."""

    parts: dict[str, Facts] = field(default_factory=dict)
    trouble: str | None = None

    def part(self, name: str) -> Facts:
        return self.parts.get(name, {})


def run(
    module: str,
    task: Mapping[str, Any],
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    on_part: Callable[[str], None] = lambda _: None,
    leave_s: float = 0.0,
) -> Trial:
    """Run `python -m module` on `task` for at most `limit_s`. `leave_s`: for a child that cleans up, however
    it ends; it sees that its standard input is closed."""
    parts: dict[str, Facts] = {}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env=None if environment is None else dict(environment),
        )
        try:
            reader = threading.Thread(target=_collect, args=(child.stdout, parts, on_part), daemon=True)
            reader.start()
            trouble = _watch(child, task, limit_s)
        finally:
            leave(child, leave_s)
        reader.join(1.0)
        errors.seek(0)
        if trouble is None and child.returncode:
            trouble = last_words(errors.read(), child.returncode)
    return Trial(dict(parts), trouble)


def _watch(child: subprocess.Popen[bytes], task: Mapping[str, Any], limit_s: float) -> str | None:
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps(task).encode() + b"\n")
        child.stdin.flush()  # and stays open: the child ends when this process does
    deadline = time.monotonic() + limit_s
    while child.poll() is None:
        if time.monotonic() > deadline:
            return f"{ENDED} {limit_s:.0f} s without an answer"
        time.sleep(POLL_S)
    return None


def _collect(out: IO[bytes], parts: dict[str, Facts], on_part: Callable[[str], None]) -> None:
    for line in out:
        try:
            said = json.loads(line)
            name = said.pop("part")
        except (ValueError, KeyError, TypeError, AttributeError):  # killed in mid-line
            continue
        parts[name] = said
        on_part(name)


def leave(child: subprocess.Popen[bytes], leave_s: float) -> None:
    """End a child, which may first have so long to clean up."""
    try:
        if leave_s and child.stdin is not None:
            with suppress(OSError):
                child.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                child.wait(leave_s)
    finally:
        end_group(child)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child that leads its session, and all that it started there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(DYING_S)


def last_words(stderr: bytes, code: int) -> str:
    """The line that names the exception: the last that looks like one, else the last of all."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\w*:", line)]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return (named or ([] if code < 0 else lines) or [ended])[-1][:300]


# ------------------------------------------------------------------------------------------------------------
# The child's side


class Voice:
    """The child's way to its parent. Whatever libraries print goes to stderr instead."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def say(self, part: str, **facts: Any) -> None:
        os.write(self._descriptor, json.dumps({"part": part, **facts}).encode() + b"\n")


def answered(answer: Callable[[Facts, Voice], None], at_end: Callable[[], None] = lambda: None) -> None:
    """The whole life of a child: read the task, answer it, leave without waiting for any thread. `at_end`:
    what is done before it leaves in the middle, because the parent did or does not want to wait."""
    voice = Voice()
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(at_end,), daemon=True).start()
    answer(task, voice)
    os._exit(0)


def _end_with_parent(at_end: Callable[[], None]) -> None:
    sys.stdin.read()
    try:
        at_end()
    finally:
        os._exit(1)
