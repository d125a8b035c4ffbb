"""When is a machine unwell? Every threshold, with the line that is said when it is crossed. Pure.

A line is said when a threshold is crossed and when all is well again, with a margin between the two, and
never repeated in between. Each line ends in what a person can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from x1_pretrain.config import TelemetryConfig
from x1_pretrain.runtime.machine_reading import Seen

COOLER_C = 5.0  # below the threshold, before the GPU is called cool again
BUSY_SHARE, LOW_CLOCK, FINE_CLOCK = 0.5, 0.6, 0.7  # utilisation, and clocks as shares of the highest
SLOWED_LOOKS, OFTEN = 5, 0.4  # a single look at a moment's slowdown is nothing
SWAPPED_GIB = 1.0
SLOW_WRITE, FINE_WRITE = 0.5, 0.8  # against the median of earlier writes
CHECKPOINTS_FREE = 2.0  # room for the next checkpoint and some
JUMP_S = 5.0


class Line(NamedTuple):
    """Something for the run's events."""

    what: str
    message: str
    value: float
    well: bool  # it was said before, and is over

    @property
    def fields(self) -> dict[str, Any]:
        return {"what": self.what, "value": float(f"{self.value:.4g}"), "well": self.well}


class Check(NamedTuple):
    """One threshold. Crossed at `limit`, over at `fine`; which side is bad follows from their order."""

    what: str
    value: float | None  # None: not known now, nothing changes
    limit: float
    fine: float
    problem: str
    well: str

    @property
    def bad(self) -> bool:
        assert self.value is not None
        return self.value >= self.limit if self.limit > self.fine else self.value <= self.limit

    @property
    def over(self) -> bool:
        assert self.value is not None
        return self.value <= self.fine if self.limit > self.fine else self.value >= self.fine


def judge(seen: Seen, limits: TelemetryConfig, said: frozenset[str]) -> tuple[list[Line], frozenset[str]]:
    """What is new in this look, and what is then said and not over yet."""
    lines: list[Line] = []
    for check in checks(seen, limits):
        if check.value is None or check.value != check.value:
            continue
        if check.what not in said and check.bad:
            said = said | {check.what}
            lines.append(Line(check.what, check.problem, check.value, well=False))
        elif check.what in said and check.over:
            said = said - {check.what}
            lines.append(Line(check.what, check.well, check.value, well=True))
    if abs(seen.clock_jump_s) >= JUMP_S:
        lines.append(Line("clock", _jumped(seen.clock_jump_s), seen.clock_jump_s, well=False))
    return lines, said


def checks(seen: Seen, limits: TelemetryConfig) -> Iterator[Check]:
    """Every threshold, in the order in which it is told."""
    yield from _gpu_checks(seen, limits)
    yield from _cpu_checks(seen, limits)
    yield from _memory_checks(seen, limits)
    yield from _disk_checks(seen, limits)


def _gpu_checks(seen: Seen, limits: TelemetryConfig) -> Iterator[Check]:
    gpu = seen.gpu
    if gpu is None:
        return
    yield Check(
        "gpu_fault",
        float(gpu.trouble is not None),
        1.0,
        0.0,
        f"GPU: {gpu.trouble}. If steps stop or numbers go wrong, stop the run and relaunch it on another "
        "machine; checkpoints are safe",
        "GPU: it answers again",
    )
    temperature = gpu.temperature_c
    yield Check(
        "gpu_temperature",
        temperature,
        limits.hot_c,
        limits.hot_c - COOLER_C,
        f"GPU: {_n(temperature)} C (telemetry.hot_c {limits.hot_c:g}); too hot, it slows itself down. "
        "Look at fans and air flow; on a rented machine ask for another",
        f"GPU: {_n(temperature)} C, cool again",
    )
    why = ", ".join(gpu.slowed) or "not said"
    yield Check(
        "gpu_slowdown",
        seen.slowed_share,
        OFTEN,
        0.0,
        f"GPU: slowed down ({why}) at {_pc(seen.slowed_share)} of the latest {SLOWED_LOOKS} looks. "
        "The fault is in the machine's cooling or power, not in the run: on a rented one ask for another",
        "GPU: no longer slowed down",
    )
    share = _clock_share(gpu.clock_mhz, gpu.max_clock_mhz, gpu.util_share)
    reasons = ", ".join(gpu.reasons) or "no reason given"
    yield Check(
        "gpu_clock",
        share,
        LOW_CLOCK,
        FINE_CLOCK,
        f"GPU: busy at {_n(gpu.clock_mhz)} of {_n(gpu.max_clock_mhz)} MHz ({reasons}; {_n(gpu.power_w)} of "
        f"{_n(gpu.power_limit_w)} W). nvidia-smi -q -d CLOCK,POWER,PERFORMANCE shows the limits in force",
        f"GPU: back at {_n(gpu.clock_mhz)} MHz",
    )


def _clock_share(clock: float | None, highest: float | None, busy: float | None) -> float | None:
    """An idle GPU clocks down rightly."""
    if clock is None or not highest or busy is None or busy < BUSY_SHARE:
        return None
    return clock / highest


def _cpu_checks(seen: Seen, limits: TelemetryConfig) -> Iterator[Check]:
    limit = limits.steal_share
    if not limit:
        return
    yield Check(
        "cpu_steal",
        seen.steal_share,
        limit,
        limit / 2,
        f"CPU: the host gives {_pc(seen.steal_share)} of its time to other machines (telemetry.steal_share "
        f"{limit:g}). If data wait grows too, take another machine or a dedicated one",
        f"CPU: {_pc(seen.steal_share)} stolen, fine again",
    )
    yield Check(
        "cpu_quota",
        seen.quota_share,
        limit,
        limit / 2,
        f"CPU: this container used up its share and waited {_pc(seen.quota_share)} of the time. Rent more "
        "CPU cores, or stop what else runs here",
        f"CPU: the container waits {_pc(seen.quota_share)} of the time, fine again",
    )


def _memory_checks(seen: Seen, limits: TelemetryConfig) -> Iterator[Check]:
    free, total = seen.ram_free_gib, seen.ram_total_gib
    share = free / total if free is not None and total and limits.low_ram_share else None
    yield Check(
        "ram",
        share,
        limits.low_ram_share,
        1.5 * limits.low_ram_share,
        f"RAM: {_n(free, 2)} of {_n(total)} GiB available (telemetry.low_ram_share "
        f"{limits.low_ram_share:g}); at none the system ends a process, likely this one. Stop what else runs "
        "here, and look for lines of `leak`",
        f"RAM: {_n(free, 2)} GiB available again",
    )
    yield Check(
        "swap",
        seen.swap_gib,
        SWAPPED_GIB,
        SWAPPED_GIB / 2,
        f"RAM: {_n(seen.swap_gib, 1)} GiB were moved to swap since the start, which slows everything. "
        "Stop what else runs here, or take a machine with more RAM",
        "RAM: swapped memory came back",
    )


def _disk_checks(seen: Seen, limits: TelemetryConfig) -> Iterator[Check]:
    for name, free in seen.disks.items():
        limit = limits.low_disk_gib
        if name == "checkpoints" and seen.checkpoint_gib is not None:
            limit = max(limit, CHECKPOINTS_FREE * seen.checkpoint_gib)
        yield Check(
            f"disk_{name}",
            free,
            limit,
            1.25 * limit + 0.01,
            f"disk: {_n(free, 2)} GiB free for the {name} (wanted: {limit:.2f}). Make room, or lower "
            "checkpoint.keep_last or checkpoint.keep_every and relaunch; a checkpoint that does not fit is "
            "not saved",
            f"disk: {_n(free, 2)} GiB free for the {name} again",
        )
    rate = seen.write_mib_per_sec
    yield Check(
        "write_rate",
        seen.write_ratio,
        SLOW_WRITE,
        FINE_WRITE,
        f"disk: the last checkpoint was written at {_n(rate)} MiB/s, {_pc(seen.write_ratio)} of the usual. "
        "The disk is full, shared or failing: put --ckpt-dir on a local one",
        f"disk: checkpoints are written at {_n(rate)} MiB/s again",
    )


def _jumped(seconds: float) -> str:
    way = "forward" if seconds > 0 else "back"
    return (
        f"clock: it was set {way} by {abs(seconds):,.0f} s (or the machine slept). Durations and rates "
        "are of another clock and stay right; dates in the records shift, and so do those by which the "
        "budget is read: look at the next reading"
    )


def _n(value: float | None, digits: int = 0) -> str:
    return "?" if value is None else f"{value:,.{digits}f}"


def _pc(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"
