"""What the machine's numbers mean, as tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from x1_pretrain.doctor import judge_machine as judge
from x1_pretrain.doctor.disk import Disk
from x1_pretrain.doctor.gpu import Card, Driver
from x1_pretrain.doctor.machine import Host
from x1_pretrain.doctor.trial import ENDED
from x1_pretrain.model.gpus import kind

HOST = Host(
    python=(3, 12),
    system="Linux",
    cores=16,
    cpu_quota=None,
    load=0.1,
    memory_bytes=64 << 30,
    shm_bytes=32 << 30,
    open_files=65536,
    locked_bytes=None,
    container=False,
    nvidia_driver=False,
    infiniband=False,
    environment={},
)
CARD = Card("NVIDIA H100 80GB HBM3", used_mib=4.0, temperature_c=31.0, persistence=True, reasons=1)
DRIVER = Driver("12.8", "570.86", (CARD,))
TORCH = {"version": "2.13.0+cu128", "cuda": "12.8", "hip": None, "problem": None}
SEEN = {"count": 1, "names": [CARD.name]}
RATE = {
    "bf16": 700e12,
    "fp32": 50e12,
    "side": 8192,
    "products": {"qkv": 500e12},
    "copy_bytes_per_sec": 2.9e12,
    "upload_bytes_per_sec": 50e9,
}


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "broken"), ((3, 11), "ok"), ((3, 14), "ok"), ((2, 7), "broken")]
)
def test_python(version: tuple[int, int], status: str) -> None:
    assert judge.python(version, "Linux").status == status


@pytest.mark.parametrize(
    ("facts", "trouble", "status", "words"),
    [
        (TORCH, None, "ok", "CUDA 12.8"),
        ({**TORCH, "cuda": None, "hip": "6.4"}, None, "ok", "ROCm 6.4"),
        ({**TORCH, "cuda": None}, None, "ok", "CPU"),
        ({**TORCH, "problem": "torch 2.5 is too old: `make setup`"}, None, "broken", "too old"),
        ({"error": "ImportError: libcudnn.so.9"}, None, "broken", "libcudnn.so.9"),
        ({}, "killed by SIGSEGV", "broken", "SIGSEGV"),
        ({}, None, "broken", "no answer"),
    ],
)
def test_torch(facts: dict[str, Any], trouble: str | None, status: str, words: str) -> None:
    found = judge.torch(facts, trouble)
    assert found.status == status
    assert words in found.found
    assert bool(found.fix) == (status == "broken")


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "works", "status"),
    [
        (None, "12.8", None, "-"),
        (DRIVER, "12.8", True, "ok"),
        (DRIVER, "12.6", True, "ok"),
        (DRIVER, "13.0", False, "broken"),  # the driver runs 12.8 at most
        (DRIVER, "13.0", None, "broken"),
        (DRIVER, "12.9", True, "ok"),  # measured to work: no rule overrules that
        (DRIVER, "12.10", False, "broken"),  # 12.10 is newer than 12.8, not older
        (DRIVER, "9.2", False, "ok"),  # the versions fit: the fault is elsewhere
        (DRIVER, None, None, "broken"),
        (Driver(trouble="nvidia-smi gave no answer within 15 s"), "12.8", None, "broken"),
        (replace(DRIVER, cuda=None), "12.8", True, "ok"),
    ],
)
def test_driver_against_torch(
    driver: Driver | None, torch_cuda: str | None, works: bool | None, status: str
) -> None:
    found = judge.driver(driver, torch_cuda, works)
    assert found.status == status
    assert bool(found.fix) == (status == "broken")


@pytest.mark.parametrize(
    ("host", "driver", "devices", "cuda", "wanted", "status", "fix"),
    [
        (HOST, DRIVER, SEEN, "12.8", None, "ok", ""),
        (HOST, DRIVER, SEEN, "12.8", 1, "ok", ""),
        (HOST, DRIVER, SEEN, "12.8", 2, "broken", "smaller --gpus"),
        (HOST, None, {}, None, None, "-", ""),
        (HOST, None, {}, None, 1, "broken", "rent"),
        (replace(HOST, container=True), None, {}, "12.8", 1, "broken", "--gpus all"),
        (replace(HOST, container=True, nvidia_driver=True), None, {}, "12.8", None, "broken", "--gpus all"),
        (replace(HOST, nvidia_driver=True), None, {}, "12.8", None, "broken", "dmesg"),
        (HOST, DRIVER, {"count": 0}, None, None, "broken", "CPU build"),
        (
            replace(HOST, environment={"CUDA_VISIBLE_DEVICES": ""}),
            DRIVER,
            {"count": 0},
            "12.8",
            None,
            "broken",
            "CUDA_VISIBLE_DEVICES",
        ),
        (HOST, DRIVER, {"count": 0, "error": "RuntimeError: bad"}, "12.8", None, "broken", "RuntimeError"),
    ],
)
def test_gpus_wanted_shown_and_seen(
    host: Host,
    driver: Driver | None,
    devices: dict[str, Any],
    cuda: str | None,
    wanted: int | None,
    status: str,
    fix: str,
) -> None:
    found = judge.gpus(host, driver, devices, cuda, wanted)
    assert found.status == status
    assert fix in found.fix
    assert bool(found.fix) == bool(fix)


def test_kinds() -> None:
    h100, a100 = kind("h100"), kind("a100-80gb")
    assert judge.kind([], []).status == "-"
    assert judge.kind(["a", "b"], [h100, h100]).status == "ok"
    assert judge.kind(["a", "b"], [h100, a100]).status == "slow"
    unknown = judge.kind(["Tesla T4"], [None])
    assert (unknown.status, "gpus.toml" in unknown.found) == ("slow", True)
    assert "MIG" in judge.kind(["A100 MIG 1g.5gb"], [None]).found


@pytest.mark.parametrize(
    ("idle", "busy", "processes", "status", "words"),
    [
        (CARD, CARD, 0, "ok", "no throttling"),
        (replace(CARD, ecc_errors=2.0), CARD, 0, "broken", "2 uncorrected"),
        (replace(CARD, used_mib=20480.0), CARD, 0, "slow", "20.0 GiB"),
        (CARD, CARD, 3, "slow", "3 other"),
        (CARD, replace(CARD, reasons=0x44), 0, "slow", "too hot"),
        (CARD, replace(CARD, reasons=0x4), 0, "ok", "no throttling"),
        (replace(CARD, mig=True), CARD, 0, "slow", "MIG"),
        (CARD, replace(CARD, pcie_width=4.0, pcie_width_max=16.0), 0, "slow", "x4 of x16"),
        (replace(CARD, pcie_width=4.0, pcie_width_max=16.0), CARD, 0, "ok", ""),  # a link sleeps when idle
        (replace(CARD, persistence=False), CARD, 0, "ok", "persistence mode off"),
    ],
)
def test_health(idle: Card, busy: Card, processes: int, status: str, words: str) -> None:
    found = judge.health([idle], [busy], processes)
    assert found.status == status
    assert words in found.found
    assert bool(found.fix) == (status in ("slow", "broken"))


def test_health_without_a_gpu_or_a_reading_under_load() -> None:
    assert judge.health([], [], 0).status == "-"
    assert judge.health([CARD], [], 0).status == "ok"


@pytest.mark.parametrize(
    ("bf16", "peak", "status"),
    [
        ([700e12], 989e12, "ok"),
        ([0.55 * 989e12], 989e12, "ok"),
        ([0.54 * 989e12], 989e12, "slow"),
        ([0.16 * 989e12], 989e12, "slow"),
        ([0.14 * 989e12], 989e12, "broken"),
        ([700e12, 690e12], 989e12, "ok"),
        ([700e12, 590e12], 989e12, "slow"),  # the second holds the first back
        ([1e9], None, "ok"),
    ],
)
def test_products_against_the_data_sheet(bf16: list[float], peak: float | None, status: str) -> None:
    found = judge.product([{**RATE, "bf16": rate} for rate in bf16], peak, {"works": True})
    assert found.status == status
    assert found.measured["bf16_flops_per_sec"] == bf16


def test_a_product_that_fails_hangs_or_was_not_tried() -> None:
    wrong = {"works": False, "error": "no kernel image is available"}
    assert judge.product([], 1e12, wrong).status == "broken"
    assert judge.product([], 1e12, {"works": True}, "ended after 35 s").status == "broken"
    assert judge.product([], None, {}, "ImportError").status == "-"
    assert judge.product([], None, {}).status == "-"


def test_a_cpu_that_is_too_busy_for_the_trial_is_no_broken_gpu() -> None:
    late = judge.product([], None, {"works": True}, f"{ENDED} 35 s without an answer", gpu=False)
    assert late.status == "slow"
    assert "the CPU is busy" in late.fix
    crashed = judge.product([], None, {"works": True}, "killed by SIGSEGV", gpu=False)
    assert crashed.status == "broken"
    assert "GPU" not in late.fix + crashed.fix


L4 = Card("NVIDIA L4", reasons=0x4, power_w=71.8, power_limit_w=72.0, power_default_w=72.0)


@pytest.mark.parametrize(
    ("share", "busy", "status", "words"),
    [
        (0.45, [L4], "ok", "the board's own power cap of 72 W holds the clock down, and nothing else does"),
        (0.45, [L4, L4], "ok", "own power cap of 72 W"),
        (0.45, [replace(L4, reasons=0x44)], "slow", "55% expected"),  # it is too hot as well
        (0.45, [replace(L4, reasons=0x0)], "slow", "55% expected"),
        (0.45, [L4, replace(L4, reasons=0x0)], "slow", "55% expected"),
        (0.45, [], "slow", "55% expected"),
        (0.45, [replace(L4, power_limit_w=50.0)], "slow", "power cap of 50 W, lowered from 72 W"),
        (0.10, [L4], "broken", "55% expected"),
        (0.60, [L4], "ok", "60% of the data sheet"),
    ],
)
def test_a_board_at_its_power_cap_is_well(share: float, busy: list[Card], status: str, words: str) -> None:
    found = judge.product([{**RATE, "bf16": share * 121e12}], 121e12, {"works": True}, None, busy)
    assert found.status == status
    assert words in found.found
    assert ("another machine" in found.fix) == (words == "55% expected" and status != "ok")


def test_health_says_which_gpus_were_looked_at() -> None:
    four = [CARD] * 4
    assert "no throttling on the 2 of 4 under load" in judge.health(four, [CARD] * 2, 0).found
    assert "no throttling;" in judge.health(four, four, 0).found
    assert "throttling not looked at under load" in judge.health(four, [], 0).found
    busy = [replace(CARD, power_w=power) for power in (65.0, 70.0, 68.0, 66.0)]
    assert "65 to 70 W under load" in judge.health(four, busy, 0).found


@pytest.mark.parametrize(("share", "status"), [(0.9, "ok"), (0.7, "ok"), (0.69, "slow"), (0.19, "broken")])
def test_bandwidth(share: float, status: str) -> None:
    found = judge.copy([RATE, {**RATE, "copy_bytes_per_sec": share * 1e12}], 1e12)
    assert found.status == status
    assert judge.copy([RATE], None).status == "ok"
    assert judge.copy([], None).status == "-"


@pytest.mark.parametrize(("rate", "status"), [(50e9, "ok"), (5e9, "ok"), (3e9, "slow")])
def test_upload(rate: float, status: str) -> None:
    assert judge.upload([{**RATE, "upload_bytes_per_sec": rate}]).status == status
    assert judge.upload([{"bf16": 1.0}]).status == "-"


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "status"),
    [
        (16, None, 16, "ok"),
        (64, 4.0, 64, "slow"),
        (64, 4.0, 4, "ok"),
        (2, None, 1, "ok"),
        (1, 0.5, 1, "ok"),
        (4, None, None, "-"),
    ],
)
def test_cpu(cores: int, quota: float | None, threads: int | None, status: str) -> None:
    found = judge.cpu(replace(HOST, cores=cores, cpu_quota=quota), threads)
    assert found.status == status
    if status == "slow":
        assert "OMP_NUM_THREADS=4" in found.fix
    assert judge.cpu(replace(HOST, load=0.9), 16).status == "slow"


@pytest.mark.parametrize(
    ("available", "needed", "status"),
    [(10, None, "ok"), (10, 9.0, "ok"), (10, 12.0, "slow"), (10, 20.0, "broken")],
)
def test_memory(available: int, needed: float | None, status: str) -> None:
    assert judge.memory(available << 30, needed and needed * 2**30, "why").status == status


@pytest.mark.parametrize(
    ("free", "ranks", "status"),
    [(64 << 20, 1, "-"), (64 << 20, 2, "slow"), (8 << 30, 2, "ok"), (None, 2, "-")],
)
def test_shared_memory(free: int | None, ranks: int, status: str) -> None:
    found = judge.shared_memory(replace(HOST, shm_bytes=free), ranks)
    assert found.status == status
    assert ("--shm-size" in found.fix) == (status == "slow")


@pytest.mark.parametrize(
    ("files", "locked", "infiniband", "ranks", "status"),
    [
        (65536, None, False, 1, "ok"),
        (None, 64 << 10, False, 8, "ok"),
        (256, None, False, 1, "slow"),
        (65536, 64 << 10, True, 8, "slow"),
        (65536, 64 << 10, True, 1, "ok"),
        (65536, None, True, 8, "ok"),
    ],
)
def test_limits(files: int | None, locked: int | None, infiniband: bool, ranks: int, status: str) -> None:
    host = replace(HOST, open_files=files, locked_bytes=locked, infiniband=infiniband)
    assert judge.limits(host, ranks).status == status


DISK = Disk("/x", 10 << 30, "ext4", 500e6, 900e6, 1 << 30, "O_DIRECT")


@pytest.mark.parametrize(
    ("disk", "status", "words"),
    [
        (DISK, "ok", "477 MiB/s"),
        (replace(DISK, write_bytes_per_sec=99e6), "slow", ""),
        (replace(DISK, read_bytes_per_sec=99e6), "slow", ""),
        (replace(DISK, file_system="nfs4"), "ok", "network"),
        (replace(DISK, trouble="Permission denied"), "broken", "Permission denied"),
        (replace(DISK, write_bytes_per_sec=None), "broken", "too full"),
    ],
)
def test_disk(disk: Disk, status: str, words: str) -> None:
    found = judge.disk_rate(disk)
    assert found.status == status
    assert words in found.found


@pytest.mark.parametrize(
    ("checkpoint", "status"), [(1_000_000, "ok"), (20e6, "ok"), (20.1e6, "slow"), (2e9, "slow")]
)
def test_a_slow_disk_is_fast_enough_for_a_small_checkpoint(checkpoint: float, status: str) -> None:
    disk = replace(DISK, write_bytes_per_sec=20e6, read_bytes_per_sec=90e6)
    assert judge.disk_rate(disk, int(checkpoint)).status == status


@pytest.mark.parametrize(("free", "needed", "status"), [(5, None, "ok"), (5, 5.0, "ok"), (5, 6.0, "broken")])
def test_disk_space(free: int, needed: float | None, status: str) -> None:
    assert judge.disk_space(free << 30, needed and needed * 2**30, "3 checkpoints").status == status


@pytest.mark.parametrize(
    ("drift", "ahead", "behind", "status", "words"),
    [
        (0.0, (1.0, "http://s"), None, "ok", "ahead of http://s"),
        (0.0, (-59.0, "http://s"), (9e9, "f"), "ok", "behind http://s"),  # a server knows better than a file
        (0.0, (61.0, "http://s"), None, "broken", "61 s ahead"),
        (0.0, (-3600.0, "http://s"), None, "broken", "behind"),
        (-30.0, (0.0, "http://s"), None, "broken", "jumped by -30.0 s"),
        (0.0, None, None, "ok", "offline"),
        (0.0, None, (-50.0, "f"), "ok", "offline"),
        (0.0, None, (86400.0, "manifest.json"), "broken", "manifest.json"),
    ],
)
def test_clock(
    drift: float, ahead: tuple[float, str] | None, behind: tuple[float, str] | None, status: str, words: str
) -> None:
    found = judge.clock(drift, 60.0, ahead, behind)
    assert found.status == status
    assert words in found.found
