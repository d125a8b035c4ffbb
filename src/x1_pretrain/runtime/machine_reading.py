"""The machine around the GPU, one look at a time: CPU, what others take of it, memory, disks, clocks.

In a container the limits are the container's, where it states them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from x1_pretrain.records.processes import cores
from x1_pretrain.runtime.gpu_health import Gpu, GpuReading

GIB = 2**30
MOUNTS = Path("/proc/mounts")
CGROUP = Path("/sys/fs/cgroup")
NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "lustre",
    "glusterfs",
    "beegfs",
    "gpfs",
    "wekafs",
    "fuse",
}
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.mergerfs", "fuse.lxcfs", "fuse.ntfs"}


@dataclass(frozen=True)
class Seen:
    """One look. None: not known here. Shares are of all cores, over the time since the look before."""

    at_s: float  # of the clock that never goes back
    wall_s: float
    gpu: GpuReading | None = None
    slowed_share: float | None = None  # of the latest looks, those at which the GPU was slowed down
    own_cpu_share: float | None = None  # this process
    cpu_share: float | None = None  # everybody
    steal_share: float | None = None  # the host gave it to other machines
    quota_share: float | None = None  # of the time, in which the container had used up its share
    load: float | None = None  # waiting or running, per core
    ram_free_gib: float | None = None
    ram_total_gib: float | None = None
    swap_gib: float | None = None  # in use, beyond what was at the first look
    disks: Mapping[str, float] = field(default_factory=dict)  # folder: GiB free
    checkpoint_gib: float | None = None  # size of the newest checkpoint
    write_mib_per_sec: float | None = None  # of the newest checkpoint
    write_ratio: float | None = None  # that, against the usual
    clock_jump_s: float = 0.0  # of the wall clock, since the look before


class Looker:
    """Takes looks. What needs two of them (shares, jumps) is None at the first."""

    def __init__(self, folders: Mapping[str, Path], gpu: Gpu | None = None) -> None:
        self._folders, self._gpu = folders, gpu
        self._process = psutil.Process()
        self._before: tuple[float, float, dict[str, float], float, float | None] | None = None
        self._first_swap: float | None = None
        self.doing = ""  # for whom wonders where it hangs

    def look(self) -> Seen:
        """A few milliseconds, unless a disk or a driver hangs."""
        self.doing = "reading the GPU"
        gpu = self._gpu.read() if self._gpu else None
        self.doing = "reading the CPU"
        now, wall, cpu = time.monotonic(), time.time(), _cpu()
        own = sum(self._process.cpu_times()[:2])
        paused = throttled_s()
        shares = self._shares(now, cpu, own, paused)
        jump = 0.0 if self._before is None else (wall - self._before[1]) - (now - self._before[0])
        self._before = (now, wall, cpu, own, paused)
        ram_free, ram_total = ram()
        swap = psutil.swap_memory().used / GIB
        self._first_swap = swap if self._first_swap is None else self._first_swap
        return Seen(
            at_s=now,
            wall_s=wall,
            gpu=gpu,
            **shares,
            load=os.getloadavg()[0] / cores(),
            ram_free_gib=ram_free / GIB,
            ram_total_gib=ram_total / GIB,
            swap_gib=max(0.0, swap - self._first_swap),
            disks=self._disks(),
            clock_jump_s=jump,
        )

    def _shares(self, now: float, cpu: dict[str, float], own: float, paused: float | None) -> dict[str, Any]:
        if self._before is None:
            return {}
        then, _, cpu_then, own_then, paused_then = self._before
        passed = {name: max(0.0, cpu[name] - cpu_then.get(name, 0.0)) for name in cpu}
        total, seconds = sum(passed.values()), now - then
        if total <= 0 or seconds <= 0:
            return {}
        idle = passed.get("idle", 0.0) + passed.get("iowait", 0.0)
        steal = passed.get("steal", 0.0)
        quota = None if paused is None or paused_then is None else (paused - paused_then) / seconds / cores()
        return {
            "own_cpu_share": (own - own_then) / seconds / cores(),
            "cpu_share": (total - idle - steal) / total,
            "steal_share": steal / total,
            "quota_share": quota,
        }

    def _disks(self) -> dict[str, float]:
        free = {}
        for name, folder in self._folders.items():
            self.doing = f"asking for the free space of {folder}"
            try:
                free[name] = shutil.disk_usage(_existing(folder)).free / GIB
            except OSError:
                continue  # what writes there will say so
        return free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), folder)


def _cpu() -> dict[str, float]:
    """Seconds by kind, all cores. Guests are counted in user already."""
    times = psutil.cpu_times()._asdict()
    return {name: float(value) for name, value in times.items() if not name.startswith("guest")}


# ------------------------------------------------------------------------------------------------------------
# The container's limits


def ram(root: Path = CGROUP) -> tuple[float, float]:
    """Bytes available and in all: the container's where they are less than the machine's."""
    machine = psutil.virtual_memory()
    free, total = float(machine.available), float(machine.total)
    for limit_file, used_file, kept in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(root / limit_file), _number(root / used_file)
        if limit is None or used is None or limit >= total:
            continue
        cache = _field((root / used_file).with_name("memory.stat"), kept) or 0.0
        return min(free, max(0.0, limit - used + cache)), limit
    return free, total


def throttled_s(root: Path = CGROUP) -> float | None:
    """Seconds for which the container had to wait because its share of the CPU was used up."""
    if (micro := _field(root / "cpu.stat", "throttled_usec")) is not None:
        return micro / 1e6
    nano = _field(root / "cpu" / "cpu.stat", "throttled_time")
    return None if nano is None else nano / 1e9


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _field(file: Path, name: str) -> float | None:
    try:
        found = dict(line.split() for line in file.read_text().splitlines())
        return float(found[name])
    except (OSError, ValueError, KeyError):
        return None


# ------------------------------------------------------------------------------------------------------------
# Mounts


def network_mount(folder: Path, mounts: str | None = None) -> str | None:
    """`nfs at /mnt/data` if this folder lies on another machine, else None."""
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(errors="replace")  # a name may be in any code
        except OSError:  # not Linux
            return None
    real = Path(os.path.realpath(folder))
    best: tuple[Path, str] | None = None
    for line in mounts.splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = Path(_unescaped(parts[1]))
        if real.is_relative_to(point) and (best is None or len(point.parts) >= len(best[0].parts)):
            best = point, parts[2]  # of two at one point, the later covers the earlier
    if best is None or not _is_network(best[1]):
        return None
    return f"{best[1]} at {best[0]}"


def _is_network(kind: str) -> bool:
    return kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


def _unescaped(text: str) -> str:
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, letter)
    return text
