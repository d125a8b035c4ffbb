"""A GPU's own account of itself, through NVIDIA's management library (package nvidia-ml-py, imported only
here and only when asked): temperature, clock, power, utilisation, why it slowed down, and its faults.

What a board or a container does not report is None. A fault of the GPU is one line in `trouble`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Reasons for lower clocks (nvml.h, nvmlClocksEventReason*). Those that somebody should do something about:
SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat, by the hardware",
    0x80: "power brake from outside",
}
# ... and those that are the board's usual life under load, which explain a clock but are no fault.
OTHER_REASONS = {0x02: "clocks set by somebody", 0x04: "power cap", 0x10: "clocks tied to another GPU's"}

# Of the driver's fault numbers ("Xid"), the ones that a training run meets.
XIDS = {
    13: "a kernel read or wrote where it may not: a bug in a kernel, rarely the GPU",
    31: "a kernel read or wrote where it may not: a bug in a kernel, rarely the GPU",
    48: "memory error that could not be corrected",
    63: "a bad row of its memory was remapped; it takes effect at the next reset",
    64: "a bad row of its memory could not be remapped",
    74: "a fault on the link between GPUs",
    79: "it has fallen off the bus",
    94: "memory error that could not be corrected, contained in one program",
    95: "memory error that could not be corrected, not contained",
    119: "its system processor does not answer",
    120: "its system processor reports a fault",
}
XID_EVENT = 0x08  # nvmlEventTypeXidCriticalError
LOST, RESET_REQUIRED, TIMEOUT, UNKNOWN = 15, 16, 10, 999  # nvmlReturn_t
FAULTS = {LOST: "it has fallen off the bus", RESET_REQUIRED: "it needs a reset", UNKNOWN: "unknown error"}


@dataclass(frozen=True)
class GpuReading:
    """None: not reported here."""

    temperature_c: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    util_share: float | None = None
    reasons: tuple[str, ...] = ()  # for lower clocks, all
    slowed: tuple[str, ...] = ()  # those of them that are not usual
    trouble: str | None = None


class Gpu:
    """One GPU, by the identity that CUDA gives it. CUDA_VISIBLE_DEVICES renumbers; an identity stays."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml, self._uuid = nvml, uuid
        self._unsupported: set[str] = set()
        self._fault: str | None = None
        self._xid: str | None = None
        nvml.nvmlInit()
        self._handle = _handle(nvml, uuid)
        self._events = self._registered()

    def read(self) -> GpuReading:
        """All that it says now."""
        nvml, handle, self._fault = self._nvml, self._handle, None
        util = self._ask("nvmlDeviceGetUtilizationRates", handle)
        power, limit = (
            self._ask(f"nvmlDevice{what}", handle) for what in ("GetPowerUsage", "GetEnforcedPowerLimit")
        )
        bits = self._reasons()
        clock = getattr(nvml, "NVML_CLOCK_SM", 1)
        self._look_for_xids()
        return GpuReading(
            temperature_c=_number(self._ask("nvmlDeviceGetTemperature", handle, 0)),  # of the chip
            clock_mhz=_number(self._ask("nvmlDeviceGetClockInfo", handle, clock)),
            max_clock_mhz=_number(self._ask("nvmlDeviceGetMaxClockInfo", handle, clock)),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            util_share=None if util is None else util.gpu / 100,
            reasons=tuple(name for bit, name in (SLOWDOWNS | OTHER_REASONS).items() if bits & bit),
            slowed=tuple(name for bit, name in SLOWDOWNS.items() if bits & bit),
            trouble=self._fault or self._xid,
        )

    def _reasons(self) -> int:
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            if (bits := self._ask(name, self._handle)) is not None:
                return int(bits)
        return 0

    def _ask(self, name: str, *arguments: Any) -> Any:
        """None for what is not reported here; a fault of the GPU is kept."""
        if name in self._unsupported or self._fault:
            return None
        query: Callable[..., Any] | None = getattr(self._nvml, name, None)
        if query is None:
            return None
        try:
            return query(*arguments)
        except self._nvml.NVMLError as error:
            code = getattr(error, "value", None)
            if code in FAULTS:
                self._fault = f"the GPU does not answer: {FAULTS[code]}"
            else:
                self._unsupported.add(name)
            return None

    def _registered(self) -> Any:
        """Where the driver puts the GPU's faults for us; None where it does not."""
        try:
            events = self._nvml.nvmlEventSetCreate()
            self._nvml.nvmlDeviceRegisterEvents(self._handle, XID_EVENT, events)
        except (self._nvml.NVMLError, AttributeError):
            return None
        return events

    def _look_for_xids(self) -> None:
        """The newest; it stays: a fault does not go away by itself."""
        while self._events is not None:
            try:
                number = int(self._nvml.nvmlEventSetWait_v2(self._events, 0).eventData)
            except (self._nvml.NVMLError, AttributeError) as error:
                if getattr(error, "value", None) != TIMEOUT:
                    self._events = None
                return
            meaning = XIDS.get(number, "see NVIDIA's page on Xid errors")
            self._xid = f"the driver reports Xid {number}: {meaning}"


def _handle(nvml: Any, uuid: str) -> Any:
    """A slice of a GPU (MIG) has a name of another kind; health is that of the whole GPU."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        part = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def uuid_of(device: torch.device) -> str | None:
    """What CUDA calls this device, whatever its number; None on a CPU."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(uuid).removeprefix("GPU-").removeprefix("MIG-") if uuid else None


def open_gpu(uuid: str | None, nvml: Any = None) -> tuple[Gpu | None, str | None]:
    """The GPU, or one line on why there is nothing to read (None on a CPU: nothing is missing)."""
    if uuid is None:
        return None, None
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None, "the GPU's health is not watched: nvidia-ml-py is missing (pip install nvidia-ml-py)"
    try:
        return Gpu(nvml, uuid), None
    except (nvml.NVMLError, OSError) as error:
        return None, f"the GPU's health is not watched: NVIDIA's library says {str(error) or 'nothing'}"
