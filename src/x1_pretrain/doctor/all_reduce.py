"""Can the GPUs of this machine talk? A timed all-reduce under a watchdog, and the settings that make it work.

As it is first. Hangs, failures and wrong sums are answered with the settings known to help, one at a time and
then all together; each that works is measured, because each has a price. No torch here: the ranks have it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from x1_pretrain.doctor.trial import POLL_S, end_group, last_words

Settings = Mapping[str, str]

# Peer to peer first: IOMMU and missing NVLink make it hang most often. A run on one machine needs no network
# but loopback.
SAFE_NCCL: tuple[Settings, ...] = (
    {"NCCL_P2P_DISABLE": "1"},
    {"NCCL_IB_DISABLE": "1"},
    {"NCCL_SOCKET_IFNAME": "lo"},
    {"NCCL_NET": "Socket", "NCCL_NET_PLUGIN": "none"},
)
SAFE_GLOO: tuple[Settings, ...] = ({"GLOO_SOCKET_IFNAME": "lo"},)  # a host name that does not resolve
MIB = {"nccl": 256, "gloo": 16}

Outcome = Literal["works", "hangs", "fails", "wrong", "not tried"]


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which the ranks hang."""

    start_s: float = 60.0  # importing torch from a cold disk
    first_s: float = 25.0  # between two signs of life after that, the first time: eight GPUs connect slowly
    quiet_s: float = 15.0  # the same, once settings are searched for


@dataclass(frozen=True)
class Attempt:
    """One all-reduce, with these settings on top of the environment."""

    settings: Settings
    outcome: Outcome
    reason: str = ""
    bus_bytes_per_sec: float | None = None

    @property
    def named(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items()) or "as it is"


def worker(backend: str) -> list[str]:
    return [sys.executable, "-m", "x1_pretrain.doctor.all_reduce_worker", backend, str(MIB[backend])]


def combinations(safe: Sequence[Settings]) -> list[Settings]:
    """One at a time, then all together."""
    together = {key: value for settings in safe for key, value in settings.items()}
    return [*safe, together] if len(safe) > 1 else list(safe)


def search(
    command: Sequence[str],
    ranks: int,
    safe: Sequence[Settings],
    deadline: float,
    patience: Patience = Patience(),
    say: Callable[[str], None] = lambda _: None,
    environment: Mapping[str, str] = os.environ,
) -> list[Attempt]:
    """As it is; where that does not work, every combination that there is time for until `deadline` (of the
    monotonic clock). All together is tried only if nothing alone helps."""
    found = [attempt(command, ranks, {}, replace(patience, quiet_s=patience.first_s), environment)]
    if found[0].outcome == "works":
        return found
    for settings in combinations(safe):
        together = len(settings) == sum(map(len, safe)) and len(safe) > 1
        if together and best(found):
            continue
        if time.monotonic() > deadline:
            found.append(Attempt(settings, "not tried", "out of time"))
            continue
        say(" ".join(settings))
        found.append(attempt(command, ranks, settings, patience, environment))
    return found


def best(attempts: Sequence[Attempt]) -> Attempt | None:
    """The fastest that works."""
    working = [one for one in attempts if one.outcome == "works"]
    return max(working, key=lambda one: one.bus_bytes_per_sec or 0.0, default=None)


def attempt(
    command: Sequence[str], ranks: int, settings: Settings, patience: Patience, environment: Mapping[str, str]
) -> Attempt:
    """Start the ranks, watch them, and end them."""
    with tempfile.TemporaryDirectory(prefix="x1-doctor-") as folder:
        place = Path(folder)
        shared = {
            **environment,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                children.append(_start(command, own, place / str(rank)))
            return _watch(children, place, settings, patience)
        finally:
            for child in children:
                end_group(child)


def _start(command: Sequence[str], environment: Mapping[str, str], out: Path) -> subprocess.Popen[bytes]:
    with out.with_suffix(".out").open("wb") as said, out.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,  # closed when this process dies, and then the worker ends
            stdout=said,
            stderr=errors,
            env=dict(environment),
            start_new_session=True,
        )


def _watch(
    children: Sequence[subprocess.Popen[bytes]], place: Path, settings: Settings, patience: Patience
) -> Attempt:
    ranks = len(children)
    heard, since = 0, time.monotonic()
    while any(child.poll() is None for child in children):
        if failed := [rank for rank, child in enumerate(children) if child.poll()]:
            return Attempt(settings, "fails", _reason(place, failed[0], children[failed[0]]))
        said = [_lines(place / f"{rank}.out") for rank in range(ranks)]
        if (lines := sum(map(len, said))) > heard:
            heard, since = lines, time.monotonic()
        limit = patience.quiet_s if all(said) else patience.start_s
        if time.monotonic() - since > limit:
            return Attempt(settings, "hangs", f"no sign of life for {limit:.0f} s after {_stages(said)}")
        time.sleep(POLL_S)
    if failed := [rank for rank, child in enumerate(children) if child.returncode]:
        return Attempt(settings, "fails", _reason(place, failed[0], children[failed[0]]))
    last = (_lines(place / "0.out") or [{}])[-1]
    if "bus_bytes_per_sec" not in last:
        return Attempt(settings, "fails", "the first rank ended without a result")
    if not all((_lines(place / f"{rank}.out") or [{}])[-1].get("right") for rank in range(ranks)):
        return Attempt(settings, "wrong", "the sum that came out is wrong", last["bus_bytes_per_sec"])
    return Attempt(settings, "works", "", last["bus_bytes_per_sec"])


def _stages(said: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """How far the slowest rank came."""
    slowest = min(range(len(said)), key=lambda rank: len(said[rank]))
    stage = said[slowest][-1].get("stage", "its start") if said[slowest] else "its start"
    return f"'{stage}' of rank {slowest}"


def _reason(place: Path, rank: int, child: subprocess.Popen[bytes]) -> str:
    errors = b""
    with suppress(OSError):
        errors = (place / f"{rank}.err").read_bytes()
    return f"rank {rank}: {last_words(errors, child.returncode)}"


def _lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines of JSON; what libraries print beside them is none."""
    found = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            row = json.loads(line)
            found += [row] if isinstance(row, dict) else []
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
