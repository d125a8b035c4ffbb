"""Who a process is: its id means something only with the time it was started, and that with the boot."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from x1_pretrain.errors import INTERRUPTED

SET_PDEATHSIG = 1  # of prctl
STATES = {"T": "stopped", "t": "held by a debugger", "D": "waiting for a disk or a driver", "Z": "ended"}


def boot_id() -> str:
    """This boot of this machine; `-` where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "-"


def state_and_start(pid: int) -> tuple[str, str] | None:
    """One letter for what it is doing, and when it was started (ticks since the boot); None: not there, or
    the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rfind(")") + 2 :].split()  # the name before it may hold anything, also brackets
    return fields[0], fields[19]


def started(pid: int) -> str:
    """When it was started; `-` where the system does not say."""
    found = state_and_start(pid)
    return found[1] if found else "-"


def is_alive(pid: int, start: str = "-") -> bool:
    """Whether that process, started then, still runs. A zombie does not, nor one that has its id."""
    if not Path("/proc/self/stat").exists():
        return _answers(pid)
    found = state_and_start(pid)
    return found is not None and found[0] not in "ZX" and start in ("-", found[1])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def dies_with_parent(number: int) -> Callable[[], None] | None:
    """For `preexec_fn`: the kernel sends the child that signal when the thread that started it ends. None
    where the system can't. Nothing is looked up after the fork, where another thread's lock may be held."""
    prctl, parent = getattr(ctypes.CDLL(None), "prctl", None), os.getpid()
    if prctl is None:
        return None

    def before() -> None:
        prctl(SET_PDEATHSIG, number)
        if os.getppid() != parent:  # gone before it was asked for
            os._exit(INTERRUPTED)

    return before


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
