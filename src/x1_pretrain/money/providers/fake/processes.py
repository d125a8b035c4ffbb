"""The fake provider's machines as real processes: what they were launched with runs, and really ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from x1_pretrain.money.providers.fake.machines import Machine, State, World

HOST = Path(__file__).with_name("host.py")
LEAVE_S = 10.0  # real seconds that the end of all hosts may take


class Processes:
    """Follows a world: one `host` for each machine that runs, in `folder`/<machine id>.

    `real_s` turns virtual seconds into real ones. With `disks_die` the folder of a machine that was taken
    away, whose host failed or that is gone, is deleted as soon as nothing runs in it; `<machine id>.log`
    beside it stays. All calls come from one thread.
    """

    def __init__(
        self, folder: Path, grace_s: float, real_s: Callable[[float], float], disks_die: bool = False
    ) -> None:
        self.folder, self._grace_s, self._real_s = folder, grace_s, real_s
        self._disks_die = disks_die
        self._wiped: set[str] = set()
        self._hosts: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._told: set[tuple[str, int]] = set()

    def follow(self, world: World) -> None:
        """Start what has come up, end what goes down, and report the pods whose command is over."""
        with world.lock:
            machines = [(m, (m.id, m.boots), m.state) for m in world.machines.values()]
        for machine, key, state in machines:
            if state is State.RUNNING and key not in self._hosts:
                self._hosts[key] = self._start(machine)
            self._end_earlier_boots(machine.id, machine.boots)
            host = self._hosts.get(key)
            if host is None:
                continue
            if state in (State.ENDING, State.PREEMPTED):
                self._tell(key, self._grace_s)
            elif state in (State.GONE, State.UNHEALTHY, State.EXITED):
                self._unplug(key)
            elif machine.api == "runpod" and host.poll() is not None:
                world.exited(*key)
            if state in (State.GONE, State.UNHEALTHY, State.PREEMPTED):
                self._wipe(machine.id)

    def _end_earlier_boots(self, machine_id: str, boots: int) -> None:
        for key in list(self._hosts):
            if key[0] == machine_id and key[1] < boots:
                self._unplug(key)

    def _wipe(self, machine_id: str) -> None:
        """Its disk is no more."""
        hosts = [host for (owner, _), host in self._hosts.items() if owner == machine_id]
        if not self._disks_die or machine_id in self._wiped or any(host.poll() is None for host in hosts):
            return
        shutil.rmtree(self.folder / machine_id, ignore_errors=True)
        self._wiped.add(machine_id)

    def _start(self, machine: Machine) -> subprocess.Popen[bytes]:
        home = self.folder / machine.id
        home.mkdir(parents=True, exist_ok=True)
        mode = "container" if machine.api == "runpod" else "host"
        kept = self.folder / f"{machine.id}.log" if self._disks_die else home / "log"
        with kept.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", str(HOST), mode, *_command(machine, home, log)],
                cwd=home,
                env={**os.environ, **_environment(machine), "X1_INSTANCE_ID": machine.id},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the provider's terminal is the provider's own
            )

    def _tell(self, key: tuple[str, int], grace_s: float) -> None:
        """Ask a host to end its processes, once."""
        host = self._hosts[key]
        if key in self._told or host.stdin is None or host.stdin.closed:
            return
        self._told.add(key)
        try:
            host.stdin.write(b"t %.3f\n" % self._real_s(grace_s))
            host.stdin.flush()
        except BrokenPipeError:
            host.poll()  # it has ended by itself

    def _unplug(self, key: tuple[str, int]) -> None:
        host = self._hosts[key]
        if host.stdin is not None and not host.stdin.closed:
            host.stdin.close()
        host.poll()

    def close(self) -> None:
        """Everything ends now, and is waited for."""
        for key in self._hosts:
            self._unplug(key)
        for host in self._hosts.values():
            host.wait(LEAVE_S)
        for machine_id in {owner for owner, _ in self._hosts}:
            self._wipe(machine_id)


def _command(machine: Machine, home: Path, log: IO[bytes]) -> list[str]:
    """What the machine runs: a pod's `args`, or the script that a Lambda instance gets as `user_data`."""
    if machine.api == "runpod":
        return ["bash", "-c", str(machine.asked.get("args") or "sleep infinity")]
    script = home / "user-data"
    text = str(machine.asked.get("user_data") or "#!/bin/sh\n")
    if not text.startswith("#!"):
        log.write(b"user_data is not run: here only a script that begins with #! is\n")
        text = "#!/bin/sh\n"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o700)
    return [str(script)]


def _environment(machine: Machine) -> dict[str, str]:
    return {str(k): str(v) for k, v in (machine.asked.get("env") or {}).items()}
