"""The host as its files tell it, from trees made by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from x1_pretrain.doctor import machine


def put(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"sys/fs/cgroup/cpu.max": "garbage"}, None),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_cores_a_container_may_use(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    for name, text in files.items():
        put(tmp_path, name, text)
    assert machine.cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": "1000", "memory.current": "400"}, 600),
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 1\ninactive_file 150\n"}, 750),
        ({"memory.max": "1000", "memory.current": "4000"}, 0),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"}, None),
        ({"memory/memory.limit_in_bytes": "100", "memory/memory.usage_in_bytes": "1"}, 99),
    ],
)
def test_the_memory_a_container_has_left(tmp_path: Path, files: dict[str, str], left: int | None) -> None:
    for name, text in files.items():
        put(tmp_path, f"sys/fs/cgroup/{name}", text)
    assert machine.memory_left(tmp_path) == left


def test_what_tells_a_container(tmp_path: Path) -> None:
    assert not machine.in_container(tmp_path)
    put(tmp_path, "proc/1/environ", "A=1\0container=docker\0")
    assert machine.in_container(tmp_path)
    put(tmp_path / "other", ".dockerenv", "")
    assert machine.in_container(tmp_path / "other")


def test_a_look_at_this_machine_and_at_an_empty_one(tmp_path: Path) -> None:
    here = machine.look()
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.memory_bytes > 1 << 20
    environment = {"NCCL_NET": "IB", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "-1"}
    bare = machine.look(tmp_path, environment)
    assert bare.environment == {"NCCL_NET": "IB", "CUDA_VISIBLE_DEVICES": "-1"}
    assert (bare.shm_bytes, bare.nvidia_driver, bare.infiniband) == (None, False, False)
    put(tmp_path, "proc/driver/nvidia/version", "x")
    put(tmp_path, "sys/class/infiniband/mlx5_0/x", "x")
    seen = machine.look(tmp_path, {})
    assert (seen.nvidia_driver, seen.infiniband) == (True, True)
