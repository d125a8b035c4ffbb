"""Facts about the host: cores, memory, limits, container. Reads files, changes nothing, needs no root."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from x1_pretrain.records.processes import cores


@dataclass(frozen=True)
class Host:
    """None: this system doesn't say, or sets no limit."""

    python: tuple[int, int]
    system: str
    cores: int  # that this process may run on
    cpu_quota: float | None  # cores a container may use
    load: float  # of the last minute, as a share of all cores: what others do on this machine
    memory_bytes: int  # available now, within a container's limit
    shm_bytes: int | None
    open_files: int | None  # limit
    locked_bytes: int | None  # limit
    container: bool
    nvidia_driver: bool  # the kernel has it, whatever the container shows
    infiniband: bool
    environment: dict[str, str]  # the variables that bear on GPUs and threads


WATCHED = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
PREFIXES = ("NCCL_", "GLOO_")


def look(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Host:
    """What this machine is. `root` is where /proc, /sys and /dev lie."""
    return Host(
        python=(sys.version_info.major, sys.version_info.minor),
        system=platform.platform(),
        cores=cores(),
        cpu_quota=cpu_quota(root),
        load=os.getloadavg()[0] / (os.cpu_count() or 1),
        memory_bytes=min(psutil.virtual_memory().available, memory_left(root) or sys.maxsize),
        shm_bytes=_shm(root),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
        container=in_container(root),
        nvidia_driver=(root / "proc/driver/nvidia/version").exists(),
        infiniband=any((root / "sys/class/infiniband").glob("*")),
        environment={
            key: value for key, value in environment.items() if key in WATCHED or key.startswith(PREFIXES)
        },
    )


def cpu_quota(root: Path) -> float | None:
    """Cores that the control group allows: version 2, else version 1."""
    words = _words(root / "sys/fs/cgroup/cpu.max")
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        return int(words[0]) / int(words[1])
    quota = _words(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _words(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota and period and quota[0].isdigit() and period[0].isdigit():
        return int(quota[0]) / int(period[0])
    return None


def memory_left(root: Path) -> int | None:
    """What the control group's memory limit leaves; None without a limit. Its file cache can be given up."""
    group = root / "sys/fs/cgroup"
    for most, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, current = _words(group / most), _words(group / used)
        if limit and current and limit[0].isdigit() and current[0].isdigit() and int(limit[0]) < 1 << 60:
            words = _words((group / most).with_name("memory.stat"))
            stat = dict(zip(words[::2], words[1::2], strict=False))
            given_up = int(stat[cache]) if stat.get(cache, "").isdigit() else 0
            return max(0, int(limit[0]) - int(current[0]) + given_up)
    return None


def in_container(root: Path) -> bool:
    if any((root / name).exists() for name in (".dockerenv", "run/.containerenv")):
        return True
    return any("container=" in word for word in _environ_of_first(root))


def _environ_of_first(root: Path) -> list[str]:
    try:
        return (root / "proc/1/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # another user's, outside a container
        return []


def _shm(root: Path) -> int | None:
    try:
        return shutil.disk_usage(root / "dev/shm").free
    except OSError:
        return None


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
