"""The machine's health while a run lasts: a thread that looks, and one line for each threshold crossed.

The thread is never waited for: if a driver or a disk hangs, it hangs alone, and that is said. What is worth a
line is decided in `thresholds`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from x1_pretrain.config import TelemetryConfig
from x1_pretrain.runtime.gpu_health import open_gpu
from x1_pretrain.runtime.machine_reading import GIB, Looker, Seen, network_mount
from x1_pretrain.runtime.thresholds import SLOWED_LOOKS, judge

WRITES = 3  # earlier ones that say what is usual
BRIEF_S, SMALL_BYTES = 1.0, 16 << 20  # a write so short or so small holds nothing up: its rate is chance
HUNG_LOOKS, HANGS_S = 10, 5.0  # intervals without a look, and at least so long


@dataclass(frozen=True)
class Writes:
    """Rates of the checkpoints so far, MiB/s, and the size of the newest."""

    rates: tuple[float, ...] = ()
    gib: float | None = None
    brief: bool = False  # the newest: no disk is slow that wrote it

    def noted(self, size: int, seconds: float) -> Writes:
        if size <= 0 or seconds <= 0:
            return self
        brief = seconds < BRIEF_S or size < SMALL_BYTES
        return Writes((*self.rates, size / 2**20 / seconds)[-20:], size / GIB, brief)

    @property
    def ratio(self) -> float | None:
        if len(self.rates) <= WRITES:
            return None
        if self.brief:
            return 1.0
        return self.rates[-1] / median(self.rates[:-1])


class HostWatch:
    """`start`, then `row` and `news` from the loop whenever it likes; neither ever waits."""

    def __init__(
        self,
        settings: TelemetryConfig,
        run_folder: Path,
        checkpoint_folder: Path,
        gpu_uuid: str | None = None,
        nvml: Any = None,
    ) -> None:
        self._settings, self._uuid, self._nvml = settings, gpu_uuid, nvml
        self._folders = {"run": run_folder, "checkpoints": checkpoint_folder}
        self._news: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._writes = Writes()
        self._said: frozenset[str] = frozenset()
        self._slowed: deque[bool] = deque(maxlen=SLOWED_LOOKS)
        self._looker: Looker | None = None
        self._alive_s = time.monotonic()
        self._ended = self._hung = False
        self._thread = threading.Thread(target=self._run, name="host-watch", daemon=True)
        self.seen: Seen | None = None  # the newest look

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """It is a daemon: one that hangs is left behind."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def note_write(self, size: int, seconds: float) -> None:
        """A checkpoint of `size` bytes was written."""
        self._writes = self._writes.noted(size, seconds)

    def row(self) -> dict[str, float]:
        """The newest look, for a row of metrics; nothing while looks hang."""
        seen = self.seen
        if seen is None or self._ended or self._late_s() > 0:
            return {}
        gpu = seen.gpu
        known: dict[str, float | None] = {
            "gpu/temperature_c": gpu.temperature_c if gpu else None,
            "gpu/clock_mhz": gpu.clock_mhz if gpu else None,
            "gpu/power_w": gpu.power_w if gpu else None,
            "gpu/util_share": gpu.util_share if gpu else None,
            "host/cpu_share": seen.cpu_share,
            "disk/free_gib": seen.disks.get("checkpoints"),
            "disk/write_mib_per_sec": self._writes.rates[-1] if self._writes.rates else None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """(message, fields) of what happened since the last call, for the event `host`."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        late_s = self._late_s()
        if late_s > 0 and not self._hung:
            found.append((self._hangs(late_s), {"what": "watch", "value": round(late_s), "well": False}))
        elif self._hung and late_s <= 0:
            found.append(("host: the machine answers again", {"what": "watch", "value": 0, "well": True}))
        self._hung = late_s > 0
        return found

    def _late_s(self) -> float:
        """Seconds since the newest look, if that is too long."""
        if self._ended or self._stop.is_set() or not self._thread.is_alive():
            return 0.0
        quiet = time.monotonic() - self._alive_s
        return quiet if quiet > max(HANGS_S, HUNG_LOOKS * self._settings.host_every_s) else 0.0

    def _hangs(self, late_s: float) -> str:
        doing = self._looker.doing if self._looker else "opening the GPU"
        return (
            f"host: no look at the machine for {late_s:,.0f} s, it hangs at {doing}. The run goes on; "
            "if that is where its data or checkpoints are, it will hang there too"
        )

    # --------------------------------------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        try:
            self._begin()
            while True:
                self._look()
                if self._stop.wait(self._settings.host_every_s):
                    return
        except Exception as error:  # a reading is never worth a run
            self._ended = True
            said = f"host: the machine's health is no longer watched ({type(error).__name__}: {error})"
            self._say(said, "watch", 0.0)

    def _begin(self) -> None:
        gpu, missing = open_gpu(self._uuid, self._nvml)
        if missing:
            self._say(f"host: {missing}", "gpu_unwatched", 0.0)
        for name, folder in self._folders.items():
            if where := network_mount(folder):
                self._say(_network(name, where), f"network_{name}", 0.0)
        self._looker = Looker(self._folders, gpu)

    def _look(self) -> None:
        assert self._looker is not None
        seen, writes = self._looker.look(), self._writes
        if seen.gpu is not None:
            self._slowed.append(bool(seen.gpu.slowed))
        self.seen = seen = replace(
            seen,
            slowed_share=sum(self._slowed) / SLOWED_LOOKS if seen.gpu is not None else None,
            checkpoint_gib=writes.gib,
            write_mib_per_sec=writes.rates[-1] if writes.rates else None,
            write_ratio=writes.ratio,
        )
        self._alive_s = time.monotonic()
        lines, self._said = judge(seen, self._settings, self._said)
        for line in lines:
            self._news.put((line.message, line.fields))

    def _say(self, message: str, what: str, value: float) -> None:
        self._news.put((message, {"what": what, "value": value, "well": False}))


def _network(name: str, where: str) -> str:
    advice = (
        "a slow or lost connection stops the loop while it saves; where checkpoints take many seconds, "
        "choose a local --ckpt-dir and copy from there"
        if name == "checkpoints"
        else "every row is written there; if steps become irregular, choose a local --run-dir"
    )
    return f"disk: the {name} folder is on the network ({where}): {advice}"
