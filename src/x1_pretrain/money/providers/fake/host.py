"""A rented machine as a process tree on this computer. It ends when told, or when the fake provider dies.

`python -P fake/host.py MODE COMMAND...` runs the command and stands over all that comes of it, also what put
itself into a session of its own (a daemon, tmux): as a subreaper it inherits every orphan below it. Standard
input is its line to the provider: `t SECONDS` asks for an end (SIGTERM, after so long SIGKILL), and end of
file, which a provider killed at any instant leaves behind, is the plug pulled out.

MODE `container`: the machine ends with its command, whose exit code it returns. `host`: it stays up.
Only Linux has subreapers; elsewhere a process that left the command's session is missed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK_S = 0.05


def main(mode: str, command: list[str]) -> int:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the provider ends it
    script = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_usual_signals
    )
    try:
        _stand_over(script, mode)
    finally:
        kill_until_none()
    code = script.wait()
    return code if code >= 0 else 128 - code


def _stand_over(script: subprocess.Popen[bytes], mode: str) -> None:
    """Until the machine is to end."""
    kill_at_s: float | None = None
    while kill_at_s is None or time.monotonic() < kill_at_s:
        grace_s = _order()
        if grace_s is not None and kill_at_s is None:
            end_all(signal.SIGTERM)
            kill_at_s = time.monotonic() + grace_s
        over = script.poll() is not None
        _reap(script.pid)
        if grace_s == 0.0 or (over and (mode == "container" or (kill_at_s is not None and not _below()))):
            return


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _usual_signals() -> None:
    """In the script, before it begins: it takes signals, and goes down with a host that is itself killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _order() -> float | None:
    """Seconds of grace, if the provider wants an end; 0 if it is gone. Waits a moment for it."""
    ready, _, _ = select.select([0], [], [], TICK_S)
    if not ready:
        return None
    text = os.read(0, 100).decode()
    return float(text.split()[1]) if text.startswith("t ") else 0.0


def _below() -> list[psutil.Process]:
    """All that runs under this machine; what ended while we looked is not."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _reap(keep: int) -> None:
    """Collect orphans that ended; the script itself is waited for by its own handle."""
    for child in psutil.Process().children():
        if child.pid != keep:
            try:
                os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def end_all(number: int) -> None:
    for process in psutil.Process().children(recursive=True):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def kill_until_none() -> None:
    """Again and again: what was being forked while we looked is there at the next look."""
    while _below():
        end_all(signal.SIGKILL)
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
