"""The watchdog's second: a small process of its own, for a hang in which no Python of the trainer can run.

A library that blocks while it holds Python's lock stops the watchdog's thread too. This process is told at
every tick how long it may stay silent. After that it has the stacks written (faulthandler's signal handler
needs no lock), and kills: nothing gentler reaches such a process, and a killed trainer is relaunched like one
that left with 75. Time in which the trainer is stopped, or in which this process did not run either, does not
count.

A script on the standard library alone, started as `python -I -S guardian.py SPOOL`: it is there in 10 ms.
stdin: one JSON object a line, first {"path", "header"}, then {"left_s", "phase", "step"} at each tick.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TICK_S = 0.5
DUMP_S = 5.0  # the longest wait for the stacks
WAKE_S = 2.0  # then for a word from one that the asking woke up, on a busy machine


def watch(parent: int, spool: int, clock: Callable[[], float] = time.monotonic) -> None:
    """Until the trainer is gone, or was killed."""
    buffer, silent_s, last = b"", 0.0, clock()
    about: dict[str, Any] = {}
    latest: dict[str, Any] = {}
    while os.getppid() == parent:
        ready, _, _ = select.select([0], [], [], TICK_S)
        between, last = clock() - last, clock()
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for row in map(json.loads, lines):
                about, latest = (row, latest) if "path" in row else (about, row)
            silent_s = 0.0
        elif latest and not stopped(parent):
            silent_s += min(between, 2 * TICK_S)
            if silent_s > latest["left_s"]:
                stacks = asked_stacks(parent, spool)
                if select.select([0], [], [], WAKE_S)[0]:
                    continue  # the signal woke it up: then it speaks for itself
                end(parent, stacks, about, latest, silent_s)
                return


def stopped(pid: int) -> bool:
    """By SIGSTOP, Ctrl-Z or a debugger."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text[text.rfind(")") + 2] in "Tt"


def end(parent: int, stacks: str, about: dict[str, Any], latest: dict[str, Any], silent_s: float) -> None:
    """Stacks into the run folder, a line on the screen, SIGKILL."""
    what = (
        f"x1: hang: in phase {latest['phase']} at step {latest['step']} no Python has run for {silent_s:.0f} "
        "s; a library holds its lock. Killed; relaunch the same command to go on from the last checkpoint"
    )
    file = Path(f"{about['path']}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt")
    try:
        file.write_text(f"{what}\n{about['header']}\n{stacks}", encoding="utf-8")
        what += f". Stacks: {file}"
    except OSError as error:
        what += f". {file} can't be written ({error.strerror}):\n{stacks}"
    try:
        os.write(2, f"\n{what}\n".encode())
    finally:
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)


def asked_stacks(parent: int, spool: int) -> str:
    """What faulthandler wrote into the spool at our asking."""
    before = size = os.fstat(spool).st_size
    os.kill(parent, signal.SIGUSR1)
    deadline = time.monotonic() + DUMP_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        previous, size = size, os.fstat(spool).st_size
        if size == previous > before:
            break
    text = os.pread(spool, size - before, before).decode(errors="replace")
    return text or "no stacks: the process does not answer signals (waiting for a disk or a driver?)\n"


if __name__ == "__main__":
    watch(os.getppid(), int(sys.argv[1]))
