"""The machine's health: thresholds by a table, NVIDIA's library by a stand-in, the thread by a real one."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.config import TelemetryConfig
from x1_pretrain.records import processes
from x1_pretrain.runtime import gpu_health, host, machine_reading, thresholds
from x1_pretrain.runtime.gpu_health import Gpu, GpuReading, open_gpu
from x1_pretrain.runtime.host import HostWatch, Writes
from x1_pretrain.runtime.machine_reading import Looker, Seen, network_mount
from x1_pretrain.runtime.thresholds import FINE_WRITE, SLOW_WRITE, judge

LIMITS = TelemetryConfig(hot_c=85, steal_share=0.1, low_ram_share=0.05, low_disk_gib=2)
WELL = Seen(
    at_s=0.0,
    wall_s=0.0,
    gpu=GpuReading(60.0, 1900.0, 2000.0, 600.0, 700.0, 0.98),
    slowed_share=0.0,
    own_cpu_share=0.1,
    cpu_share=0.2,
    steal_share=0.0,
    quota_share=0.0,
    load=0.3,
    ram_free_gib=100.0,
    ram_total_gib=128.0,
    swap_gib=0.0,
    disks={"run": 50.0, "checkpoints": 50.0},
    checkpoint_gib=1.0,
    write_mib_per_sec=500.0,
    write_ratio=1.0,
)


def gpu(**changes: Any) -> Seen:
    assert WELL.gpu is not None
    return replace(WELL, gpu=replace(WELL.gpu, **changes))


# ------------------------------------------------------------------------------------------------------------
# Thresholds

UNWELL = [
    ("gpu_fault", gpu(trouble="the driver reports Xid 79: it has fallen off the bus"), "Xid 79"),
    ("gpu_temperature", gpu(temperature_c=85.0), "85 C"),
    ("gpu_slowdown", replace(gpu(slowed=("heat",)), slowed_share=0.4), "heat"),
    ("gpu_clock", gpu(clock_mhz=1200.0, reasons=("power cap",)), "1,200 of 2,000 MHz (power cap"),
    ("cpu_steal", replace(WELL, steal_share=0.1), "10%"),
    ("cpu_quota", replace(WELL, quota_share=0.5), "50%"),
    ("ram", replace(WELL, ram_free_gib=6.0), "6.00 of 128 GiB"),
    ("swap", replace(WELL, swap_gib=1.0), "1.0 GiB"),
    ("disk_run", replace(WELL, disks={"run": 2.0, "checkpoints": 50.0}), "2.00 GiB free for the run"),
    ("disk_checkpoints", replace(WELL, disks={"checkpoints": 9.9}, checkpoint_gib=5.0), "wanted: 10.00"),
    ("write_rate", replace(WELL, write_ratio=0.5, write_mib_per_sec=20.0), "20 MiB/s, 50% of the usual"),
]
NOT_YET = [
    gpu(temperature_c=84.9),
    replace(gpu(slowed=("heat",)), slowed_share=0.2),
    gpu(clock_mhz=1201.0),
    gpu(clock_mhz=300.0, util_share=0.1),  # idle
    gpu(reasons=("power cap",), power_w=700.0),  # a board at its limit is at work
    replace(WELL, steal_share=0.099),
    replace(WELL, ram_free_gib=6.5),
    replace(WELL, disks={"run": 2.01}),
    replace(WELL, disks={"checkpoints": 10.1}, checkpoint_gib=5.0),
    replace(WELL, write_ratio=0.51),
    replace(WELL, clock_jump_s=4.9),
    Seen(at_s=0.0, wall_s=0.0),  # nothing is known
    gpu(temperature_c=float("nan")),
]


def test_nothing_is_said_of_a_machine_that_is_well() -> None:
    assert judge(WELL, LIMITS, frozenset()) == ([], frozenset())


@pytest.mark.parametrize("seen", NOT_YET, ids=range(len(NOT_YET)))
def test_nothing_is_said_just_short_of_a_threshold(seen: Seen) -> None:
    assert judge(seen, LIMITS, frozenset()) == ([], frozenset())


@pytest.mark.parametrize(("what", "seen", "words"), UNWELL, ids=[row[0] for row in UNWELL])
def test_each_threshold_has_one_line_and_one_when_it_is_over(what: str, seen: Seen, words: str) -> None:
    lines, said = judge(seen, LIMITS, frozenset())
    assert [line.what for line in lines] == [what]
    assert words in lines[0].message
    assert not lines[0].well
    assert said == {what}
    assert judge(seen, LIMITS, said) == ([], said)  # not again
    lines, said = judge(WELL, LIMITS, said)
    assert [(line.what, line.well) for line in lines] == [(what, True)]
    assert said == frozenset()


def test_between_the_threshold_and_well_nothing_changes() -> None:
    for temperature in (84.0, 80.1):
        said = frozenset({"gpu_temperature"})
        assert judge(gpu(temperature_c=temperature), LIMITS, said) == ([], said)
    assert judge(gpu(temperature_c=80.0), LIMITS, frozenset({"gpu_temperature"}))[0][0].well


@given(st.lists(st.floats(0, 120), max_size=60))
def test_a_temperature_is_said_in_turns_and_only_beyond_its_marks(temperatures: list[float]) -> None:
    said: frozenset[str] = frozenset()
    turns: list[bool] = []
    for value in temperatures:
        lines, said = judge(gpu(temperature_c=value), LIMITS, said)
        for line in lines:
            assert line.value <= 80 if line.well else line.value >= 85
            turns.append(line.well)
    assert turns == [n % 2 == 1 for n in range(len(turns))]


def test_what_is_unknown_for_a_while_stays_as_it_was() -> None:
    said = frozenset({"gpu_temperature", "ram"})
    assert judge(Seen(at_s=0.0, wall_s=0.0), LIMITS, said) == ([], said)


@pytest.mark.parametrize(("seconds", "words"), [(3600.0, "forward by 3,600 s"), (-90.0, "back by 90 s")])
def test_a_clock_that_jumps_is_told_each_time(seconds: float, words: str) -> None:
    for _ in range(2):
        lines, said = judge(replace(WELL, clock_jump_s=seconds), LIMITS, frozenset())
        assert [line.what for line in lines] == ["clock"]
        assert words in lines[0].message
        assert said == frozenset()


def test_a_threshold_of_nothing_is_switched_off() -> None:
    off = TelemetryConfig(steal_share=0.0, low_ram_share=0.0, low_disk_gib=0.0)
    stolen = replace(WELL, steal_share=0.9, quota_share=0.9, ram_free_gib=0.0, disks={"run": 0.1})
    assert judge(stolen, off, frozenset()) == ([], frozenset())


# ------------------------------------------------------------------------------------------------------------
# NVIDIA's library


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(
            {3: "Not Supported", 15: "GPU is lost", 12: "NVML Shared Library Not Found"}.get(value)
        )
        self.value = value


class FakeNvml:
    """A board: what each query answers, or the number of the error that it raises."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1

    def __init__(self, uuids: tuple[str, ...] = ("GPU-abc",), **answers: Any) -> None:
        self.uuids, self.xids, self.asked = uuids, [], []
        self.answers: dict[str, Any] = {
            "GetTemperature": 61,
            "GetClockInfo": 1980,
            "GetMaxClockInfo": 1980,
            "GetPowerUsage": 650_500,
            "GetEnforcedPowerLimit": 700_000,
            "GetUtilizationRates": SimpleNamespace(gpu=97, memory=50),
            "GetCurrentClocksEventReasons": 0,
            **answers,
        }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        key = name.removeprefix("nvmlDevice")
        if key not in self.__dict__.get("answers", {}):
            raise AttributeError(name)

        def query(*_: Any) -> Any:
            self.asked.append(key)
            answer = self.answers[key]
            if isinstance(answer, NVMLError):
                raise answer
            return answer

        return query

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.uuids:
            raise NVMLError(6)
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return f"whole of {handle}"

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, *_: Any) -> None:
        pass

    def nvmlEventSetWait_v2(self, _: object, __: int) -> Any:
        if not self.xids:
            raise NVMLError(gpu_health.TIMEOUT)
        return SimpleNamespace(eventData=self.xids.pop(0))


def test_a_gpu_is_read_in_the_units_of_the_rows() -> None:
    seen = Gpu(FakeNvml(), "abc").read()
    assert seen == GpuReading(61.0, 1980.0, 1980.0, 650.5, 700.0, 0.97)


def test_a_gpu_is_found_by_its_identity_not_by_its_number() -> None:
    nvml = FakeNvml(uuids=("GPU-other", "GPU-abc"))
    assert Gpu(nvml, "abc")._handle == "GPU-abc"
    assert Gpu(FakeNvml(uuids=("MIG-abc",)), "abc")._handle == "whole of MIG-abc"


def test_what_a_board_does_not_report_is_none_and_not_asked_again() -> None:
    nvml = FakeNvml(GetPowerUsage=NVMLError(3), GetTemperature=NVMLError(4))
    board = Gpu(nvml, "abc")
    for _ in range(3):
        seen = board.read()
        assert (seen.power_w, seen.temperature_c, seen.clock_mhz, seen.trouble) == (None, None, 1980.0, None)
    assert nvml.asked.count("GetPowerUsage") == 1


def test_reasons_for_lower_clocks_by_name() -> None:
    seen = Gpu(FakeNvml(GetCurrentClocksEventReasons=0x4 | 0x40 | 0x1), "abc").read()
    assert seen.reasons == ("heat, by the hardware", "power cap")
    assert seen.slowed == ("heat, by the hardware",)


def test_an_older_library_calls_them_throttle_reasons() -> None:
    nvml = FakeNvml(GetCurrentClocksThrottleReasons=0x80)
    del nvml.answers["GetCurrentClocksEventReasons"]
    assert Gpu(nvml, "abc").read().slowed == ("power brake from outside",)


def test_the_numbers_are_those_of_the_real_library() -> None:
    nvml = pytest.importorskip("pynvml")
    names = {
        0x08: "HwSlowdown",
        0x20: "SwThermalSlowdown",
        0x40: "HwThermalSlowdown",
        0x80: "HwPowerBrakeSlowdown",
        0x02: "ApplicationsClocksSetting",
        0x04: "SwPowerCap",
        0x10: "SyncBoost",
    }
    assert set(names) == set(gpu_health.SLOWDOWNS | gpu_health.OTHER_REASONS)
    for bit, name in names.items():
        assert getattr(nvml, f"nvmlClocksThrottleReason{name}") == bit
    assert nvml.nvmlEventTypeXidCriticalError == gpu_health.XID_EVENT
    assert (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED) == (
        gpu_health.LOST,
        gpu_health.RESET_REQUIRED,
    )
    assert (nvml.NVML_ERROR_TIMEOUT, nvml.NVML_ERROR_UNKNOWN) == (gpu_health.TIMEOUT, gpu_health.UNKNOWN)
    assert nvml.NVML_CLOCK_SM == 1
    assert nvml.NVML_TEMPERATURE_GPU == 0
    for query in ("GetHandleByUUID", "GetTemperature", "GetEnforcedPowerLimit", "RegisterEvents"):
        assert hasattr(nvml, f"nvmlDevice{query}")


@pytest.mark.parametrize(
    ("code", "words"), [(15, "fallen off the bus"), (16, "needs a reset"), (999, "unknown")]
)
def test_a_lost_gpu_is_one_line(code: int, words: str) -> None:
    nvml = FakeNvml()
    board = Gpu(nvml, "abc")
    nvml.answers = dict.fromkeys(nvml.answers, NVMLError(code))
    trouble = board.read().trouble
    assert trouble is not None
    assert words in trouble
    lines, said = judge(replace(WELL, gpu=board.read()), LIMITS, frozenset())
    assert [line.what for line in lines] == ["gpu_fault"]
    assert judge(replace(WELL, gpu=board.read()), LIMITS, said)[0] == []


def test_a_fault_that_the_driver_reports_stays() -> None:
    nvml = FakeNvml()
    board = Gpu(nvml, "abc")
    assert board.read().trouble is None
    nvml.xids = [63, 79]
    assert board.read().trouble == "the driver reports Xid 79: it has fallen off the bus"
    assert board.read().trouble == "the driver reports Xid 79: it has fallen off the bus"
    nvml.xids = [12345]
    assert "12345" in str(board.read().trouble)


def test_without_the_library_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found, said = open_gpu("abc")
    assert found is None
    assert "pip install nvidia-ml-py" in str(said)


def test_without_a_driver_one_line_says_so() -> None:
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise NVMLError(12)

    found, said = open_gpu("abc", NoDriver())
    assert found is None
    assert "NVML Shared Library Not Found" in str(said)
    assert open_gpu("unknown", FakeNvml())[0] is None
    assert open_gpu(None) == (None, None)  # on a CPU nothing is missing


def test_importing_needs_no_library() -> None:
    before = set(sys.modules)
    importlib.import_module("x1_pretrain.runtime.host")
    assert "pynvml" not in set(sys.modules) - before


# ------------------------------------------------------------------------------------------------------------
# The machine around it

MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
server:/export /mnt/my\040data nfs4 rw 0 0
s3 /mnt/bucket fuse.s3fs rw 0 0
/dev/sdb1 /mnt/bucket/local xfs rw 0 0
overlay /home fuse.fuse-overlayfs rw 0 0
//nas/share /nas cifs rw 0 0
tmpfs /nas/fast tmpfs rw 0 0
a b
"""


@pytest.mark.parametrize(
    ("folder", "where"),
    [
        ("/runs/x", None),
        ("/mnt/my data/runs/x", "nfs4 at /mnt/my data"),
        ("/mnt/my", None),
        ("/mnt/bucket/checkpoints", "fuse.s3fs at /mnt/bucket"),
        ("/mnt/bucket/local/x", None),
        ("/mnt/bucketful", None),
        ("/home/me", None),
        ("/nas", "cifs at /nas"),
        ("/nas/fast/x", None),
    ],
)
def test_which_folders_are_on_the_network(folder: str, where: str | None) -> None:
    assert network_mount(Path(folder), MOUNTS) == where


def test_a_mount_with_an_odd_name_hurts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_bytes(b"disk /mnt/\xff ext4 rw 0 0\nserver:/x / nfs rw 0 0\n")
    monkeypatch.setattr(machine_reading, "MOUNTS", tmp_path / "mounts")
    assert network_mount(tmp_path) == "nfs at /"


def test_where_there_is_no_list_of_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_reading, "MOUNTS", tmp_path / "absent")
    assert network_mount(tmp_path) is None


def test_a_device_is_called_what_cuda_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_health.uuid_of(torch.device("cpu")) is None
    for uuid, expected in (("GPU-abc", "abc"), ("abc", "abc"), (None, None)):
        properties = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert gpu_health.uuid_of(torch.device("cuda")) == expected


def test_shares_are_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(10.0, 80.0, 5.0, 5.0), (16.0, 82.0, 5.0, 7.0)])  # of 10 s: 6 user, 2 idle, 2 stolen

    def cpu() -> dict[str, float]:
        return dict(zip(("user", "idle", "iowait", "steal"), next(ticks), strict=True))

    monkeypatch.setattr(machine_reading, "_cpu", cpu)
    looker = Looker({})
    first, second = looker.look(), looker.look()
    assert (first.cpu_share, first.steal_share) == (None, None)
    assert second.cpu_share == pytest.approx(0.6)
    assert second.steal_share == pytest.approx(0.2)


def test_a_busy_process_sees_itself() -> None:
    looker = Looker({})
    begun, worked = looker.look().at_s, time.process_time()
    while time.process_time() < worked + 0.3:
        sum(range(1000))
    seen = looker.look()
    worked = time.process_time() - worked
    assert seen.own_cpu_share is not None
    assert seen.own_cpu_share * (seen.at_s - begun) * processes.cores() == pytest.approx(worked, rel=0.3)


def test_the_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    disks = Looker({"run": tmp_path / "a" / "b"}).look().disks
    assert disks["run"] == pytest.approx(psutil.disk_usage(str(tmp_path)).free / 2**30, rel=0.05)


def test_a_clock_set_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    looker = Looker({})
    assert looker.look().clock_jump_s == 0.0
    now = time.time()
    monkeypatch.setattr(machine_reading.time, "time", lambda: now - 7200)
    assert looker.look().clock_jump_s == pytest.approx(-7200, abs=120)


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{900 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {100 * 2**20}\n")
    assert machine_reading.ram(tmp_path) == ((1024 - 900 + 100) * 2**20, 2**30)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_reading.ram(tmp_path)[1] == psutil.virtual_memory().total


def test_an_older_container_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{2**30}")
    (tmp_path / "memory/memory.usage_in_bytes").write_text(f"{2**29}")
    assert machine_reading.ram(tmp_path) == (2**29, 2**30)


def test_waiting_for_the_containers_share_of_the_cpu(tmp_path: Path) -> None:
    assert machine_reading.throttled_s(tmp_path) is None
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nthrottled_usec 2500000\n")
    assert machine_reading.throttled_s(tmp_path) == 2.5


# ------------------------------------------------------------------------------------------------------------
# The thread


def wait_for(true: Callable[[], object], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


BUSY = {"cpu_quota", "swap"}  # a busy machine may have that to say


def watch(folder: Path, **more: Any) -> HostWatch:
    settings = TelemetryConfig(host_every_s=0.02, low_disk_gib=0.0, steal_share=0.0, low_ram_share=0.0)
    return HostWatch(settings, folder, folder / "checkpoints", **more)


def test_a_row_has_the_newest_look_under_the_names_of_the_metrics(tmp_path: Path) -> None:
    found = watch(tmp_path, gpu_uuid="abc", nvml=FakeNvml())
    assert found.row() == {}
    found.start()
    found.note_write(100 * 2**20, 0.5)
    wait_for(lambda: "host/cpu_share" in found.row())
    row = found.row()
    found.close()
    assert row.keys() == {
        "gpu/temperature_c",
        "gpu/clock_mhz",
        "gpu/power_w",
        "gpu/util_share",
        "host/cpu_share",
        "disk/free_gib",
        "disk/write_mib_per_sec",
    }
    assert row["disk/write_mib_per_sec"] == 200.0
    assert row["gpu/util_share"] == 0.97
    assert [fields["what"] for _, fields in found.news() if fields["what"] not in BUSY] == []


def test_heat_comes_and_goes_in_the_news(tmp_path: Path) -> None:
    nvml, said = FakeNvml(GetTemperature=90), list[bool]()
    found = watch(tmp_path, gpu_uuid="abc", nvml=nvml)
    found.start()

    def heard() -> list[bool]:
        said.extend(fields["well"] for _, fields in found.news() if fields["what"] == "gpu_temperature")
        return said

    wait_for(heard)
    nvml.answers["GetTemperature"] = 50
    wait_for(lambda: len(heard()) > 1)
    found.close(60)
    assert said == [False, True]
    assert not found._thread.is_alive()


def test_one_slowed_look_is_not_said_and_two_are(tmp_path: Path) -> None:
    found = watch(tmp_path, gpu_uuid="abc", nvml=(nvml := FakeNvml()))
    found._begin()
    for bits, expected in ((0x40, []), (0, []), (0x40, ["gpu_slowdown"]), (0x40, []), (0, [])):
        nvml.answers["GetCurrentClocksEventReasons"] = bits
        found._look()
        assert [fields["what"] for _, fields in found.news() if fields["what"] not in BUSY] == expected


def test_a_thread_that_fails_says_one_line_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([WELL])

    def broken(_: Looker) -> Seen:
        for seen in looks:
            return seen
        raise ValueError("no such sensor")

    monkeypatch.setattr(Looker, "look", broken)
    found = watch(tmp_path)
    found.start()
    wait_for(lambda: not found._thread.is_alive())
    news = found.news()
    assert len(news) == 1
    assert "no longer watched (ValueError: no such sensor)" in news[0][0]
    assert found.news() == []
    assert found.row() == {}
    found.close()


def test_a_thread_that_hangs_is_told_of_and_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, go_on, real = threading.Event(), threading.Event(), machine_reading.shutil.disk_usage

    def hangs(folder: Path) -> Any:
        there.set()
        go_on.wait(60)
        return real(folder)

    monkeypatch.setattr(machine_reading.shutil, "disk_usage", hangs)
    found = watch(tmp_path)
    found.start()
    assert there.wait(60)
    monkeypatch.setattr(host, "HANGS_S", 0.1)
    said: list[Any] = []
    wait_for(lambda: said.extend(found.news()) or said)
    assert "it hangs at asking for the free space" in said[0][0]
    assert found.news() == []  # once
    begun = time.monotonic()
    found.close(0.05)
    assert time.monotonic() - begun < 30
    go_on.set()


def test_it_says_when_the_machine_answers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HANGS_S", 60.0)
    found = watch(tmp_path)
    found.start()
    wait_for(lambda: found.seen)
    found._hung = True
    assert [fields["well"] for _, fields in found.news() if fields["what"] == "watch"] == [True]
    found.close()


def test_folders_on_the_network_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "network_mount", lambda folder: f"nfs at {folder}")
    found = watch(tmp_path)
    found.start()
    wait_for(lambda: found.seen)
    found.close()
    said = [fields["what"] for _, fields in found.news() if fields["what"] not in BUSY]
    assert said == ["network_run", "network_checkpoints"]


def test_closing_what_never_started(tmp_path: Path) -> None:
    watch(tmp_path).close()


def test_the_usual_rate_of_writing_needs_some_writes() -> None:
    writes = Writes()
    for seconds in (1.0, 1.0, 1.0):
        writes = writes.noted(2**30, seconds)
        assert writes.ratio is None
    assert writes.noted(2**30, 4.0).ratio == pytest.approx(0.25)
    assert writes.noted(0, 1.0) == writes.noted(5, 0.0) == writes
    assert writes.gib == 1.0


@pytest.mark.parametrize(("size", "seconds"), [(2**30, 0.9), (15 << 20, 9.0)], ids=["brief", "small"])
def test_a_checkpoint_that_holds_nothing_up_is_written_well(size: int, seconds: float) -> None:
    """And it ends what was said of an earlier one."""
    writes = Writes()
    for took in (0.01, 0.01, 0.01, 5.0):
        writes = writes.noted(2**30, took)
    assert writes.ratio is not None
    assert writes.ratio < SLOW_WRITE
    after = writes.noted(size, seconds)
    assert after.ratio is not None
    assert after.ratio >= FINE_WRITE
    assert after.rates[-1] == pytest.approx(size / 2**20 / seconds)


def test_every_line_ends_in_what_can_be_done_and_has_no_second_line() -> None:
    for _, seen, _ in UNWELL:
        for line in judge(seen, LIMITS, frozenset())[0]:
            assert "\n" not in line.message
            assert len(line.message) > 60
    assert {check.what for check in thresholds.checks(WELL, LIMITS)} == {row[0] for row in UNWELL}
