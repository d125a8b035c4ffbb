"""Memory: what is in use now, whether it grows and in which phase, and what was predicted against measured.

A leak is growth that lasts. Three things look like one and are not: what a phase allocates the first time
(a jump), a cache that fills and is emptied (a sawtooth), and an allocator that settles (fast, then flat).
`LeakDetector` takes memory at the end of every phase; each `judge` may close a window of at least
`window_s`, whose level is the median after its steps. The judgement is on the windows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, Self

import numpy as np
import psutil
import torch

from x1_pretrain.config import ModelConfig
from x1_pretrain.model.flops import parameter_counts
from x1_pretrain.model.memory import GPU_MEMORY_SHARE, LOSS_CHUNK_TOKENS, token_bytes

GIB = 2**30
WARMUP_STEPS = 50  # compiling, choosing kernels, filling caches
FEWEST_STEPS = 10  # in a window
FEWEST_WINDOWS = 24  # before anything is judged; the history keeps up to twice as many, of growing length
EXCUSED_JUMPS = 2
STILL_GROWING = 0.75  # pace of the newer half against the whole: an allocator that settles stays below
Phase = Literal["step", "evaluation", "sampling", "checkpoint", "other"]

# ------------------------------------------------------------------------------------------------------------
# Readings


def reading(device: torch.device) -> dict[str, float]:
    """The memory of a row, GiB: of the GPU, or of this process on a CPU. The peak is since the last call."""
    if device.type != "cuda":
        return {"memory/rss_gib": _statm_gib()[0]}
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory/allocated_gib": torch.cuda.memory_allocated(device) / GIB,
        "memory/peak_gib": peak / GIB,
        "memory/reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        "memory/headroom_gib": free / GIB,
        "memory/total_gib": total / GIB,
    }


def level_gib(device: torch.device) -> float:
    """What `LeakDetector.saw` is given; microseconds. On a CPU without file pages, which come and go with the
    reading of data and which the system takes back when it needs them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return own_gib()


def own_gib() -> float:
    """This process's own memory in the machine's RAM: beside a GPU too, where loaders leak."""
    resident, shared = _statm_gib()
    return resident - shared


def _statm_gib() -> tuple[float, float]:
    """Resident, and of that file pages and memory shared with others."""
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:  # not Linux
        return psutil.Process().memory_info().rss / GIB, 0.0
    page_gib = os.sysconf("SC_PAGE_SIZE") / GIB
    return int(pages[1]) * page_gib, int(pages[2]) * page_gib


def predicted_vs_measured(predicted_gib: float, measured_gib: float) -> str:
    """One line for the event `memory`: the peak of a step by `model.memory`'s arithmetic and as it was."""
    if not (0 < predicted_gib < float("inf") and 0 < measured_gib < float("inf")):
        return "memory: the peak of a step was not measured"
    off = measured_gib / predicted_gib - 1
    said = (
        f"memory: {predicted_gib:.2f} GiB predicted for the peak of a step, {measured_gib:.2f} GiB measured"
    )
    if abs(off) < 0.005:
        return f"{said}: as predicted"
    said += f": {abs(off):.0%} {'more' if off > 0 else 'less'} than predicted"
    if off > 0.1:
        return f"{said}; a plan for a larger model would be as far off: leave it that much room"
    return f"{said}; compiled code keeps less than the prediction counts" if off < -0.1 else said


# ------------------------------------------------------------------------------------------------------------
# Evaluation, inside what is free


def room_gib(device: torch.device) -> float:
    """What this process can still get: of a GPU what is free on it, and what it holds there without use."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available) / GIB
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + held) / GIB


def evaluation_gib(model: ModelConfig, sequences: int, bf16: bool) -> float:
    """What evaluating takes beyond the weights, at most: a layer at a time, then a chunk of logits."""
    tokens, s = sequences * model.context, 2 if bf16 else 4
    layer = tokens * token_bytes(model.model_copy(update={"layers": 1}), bf16)
    matrices = (2 if bf16 else 0) * parameter_counts(model).matrices / model.layers
    output = (2 if bf16 else 0) * model.padded_vocab * model.d_model
    loss = s * tokens * model.d_model + output + 8 * min(tokens, LOSS_CHUNK_TOKENS) * model.padded_vocab
    return (max(layer + matrices, loss) + 64 * tokens) / GIB


def evaluation_batch(model: ModelConfig, micro_batch: int, bf16: bool, room_gib: float) -> int:
    """Sequences at a time: training's, halved until they fit into `GPU_MEMORY_SHARE` of the room."""
    size = micro_batch
    while size > 1 and evaluation_gib(model, size, bf16) > GPU_MEMORY_SHARE * room_gib:
        size = -(-size // 2)
    return size


# ------------------------------------------------------------------------------------------------------------
# Leaks

NEXT = {
    "step": "it goes with every step: look for tensors that are kept (a loss put into a list with its graph)",
    "evaluation": "a larger evaluation.every slows it down",
    "sampling": "fewer evaluation.prompts slow it down",
    "checkpoint": "a larger checkpoint.every slows it down",
    "other": "it is in logging or telemetry: a larger telemetry.every or log.every slows it down",
}


@dataclass(frozen=True)
class Leak:
    """Growth that lasts. `gib` so far, over `hours`."""

    where: str
    phase: str
    gib: float
    hours: float
    gib_per_hour: float
    gib_per_1000_steps: float
    full_in_hours: float | None  # at this pace; None: how much room there is was not given
    over: bool = False  # the memory came back: a cache that took long to fill

    @property
    def message(self) -> str:
        if self.over:
            return (
                f"leak: no more; {self.where} gave back more than half of the {self.gib:.2f} GiB, so it was "
                "a cache that fills slowly"
            )
        full = "" if self.full_in_hours is None else f"; full in {_hours(self.full_in_hours)} at this pace"
        return (
            f"leak: {self.where} grows in the phase {self.phase}, by {self.gib_per_hour:.3g} GiB/h = "
            f"{self.gib_per_1000_steps:.3g} GiB per 1,000 steps ({self.gib:.2f} GiB in {_hours(self.hours)})"
            f"{full}. The run goes on. Next: {NEXT[self.phase]}; stopping it (Ctrl-C) and relaunching the "
            "same command starts with empty memory and loses nothing"
        )

    @property
    def fields(self) -> dict[str, Any]:
        fields = (
            "where",
            "phase",
            "gib",
            "hours",
            "gib_per_hour",
            "gib_per_1000_steps",
            "full_in_hours",
            "over",
        )
        return {name: _short(getattr(self, name)) for name in fields}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(hours * 60))} min"


@dataclass(frozen=True)
class Window:
    """One window, or several that follow each other as one. Steps and seconds are at its end."""

    level: float
    steps: int
    at_s: float
    grown: dict[str, float]  # by phase, those other than step

    @classmethod
    def merged(cls, windows: Sequence[Self]) -> Self:
        phases = {phase for one in windows for phase in one.grown}
        grown = {phase: sum(one.grown.get(phase, 0.0) for one in windows) for phase in phases}
        return cls(fmean(one.level for one in windows), windows[-1].steps, windows[-1].at_s, grown)


@dataclass
class History:
    """All windows of a session in at most twice `FEWEST_WINDOWS`: when full, each two become one."""

    windows: list[Window] = field(default_factory=list)
    _stride: int = 1
    _pending: list[Window] = field(default_factory=list)

    def add(self, window: Window) -> None:
        self._pending.append(window)
        if len(self._pending) < self._stride:
            return
        self.windows.append(Window.merged(self._pending))
        self._pending = []
        if len(self.windows) == 2 * FEWEST_WINDOWS:
            pairs = zip(self.windows[::2], self.windows[1::2], strict=True)
            self.windows = [Window.merged(pair) for pair in pairs]
            self._stride *= 2


@dataclass
class LeakDetector:
    """`saw` at the end of every phase, `judge` now and then (at every row). One per kind of memory."""

    least_gib: float = 0.1  # growth below is not worth a word
    where: str = "memory"
    window_s: float = 60.0
    warmup_s: float = 300.0  # after the first steps: an allocator settles
    _last: float | None = None
    _steps: int = 0
    _known: set[str] = field(default_factory=set)  # phases that have been there
    _once: float = 0.0  # what phases allocated the first time
    _levels: list[float] = field(default_factory=list)
    _grown: dict[str, float] = field(default_factory=dict)
    _warm_s: float | None = None
    _opened_s: float = 0.0
    _recent: list[Window] = field(default_factory=list)
    _peak: float = float("-inf")  # before the recent windows
    _all: History = field(default_factory=History)
    _said: dict[str, float] = field(default_factory=dict)
    _alarm: tuple[Leak, float] | None = None  # the newest that was said, and the level then

    def saw(self, phase: Phase, gib: float) -> None:
        """Memory in use at the end of a phase."""
        change = 0.0 if self._last is None else gib - self._last
        self._last = gib
        if phase == "step":
            self._steps += 1
            self._levels.append(gib - self._once)
        elif phase in self._known:
            self._grown[phase] = self._grown.get(phase, 0.0) + change
        else:
            self._known.add(phase)
            self._once += change

    def judge(self, now_s: float, room_gib: float | None = None) -> Leak | None:
        """A leak that has not been said, or has doubled since, or is over. `now_s`: of a clock that never
        goes back; `room_gib`: what is still free."""
        if not self._window_closes(now_s):
            return None
        level = self._recent[-1].level
        if self._alarm and level < self._alarm[1] - self._alarm[0].gib / 2:
            over, self._alarm = replace(self._alarm[0], over=True), None
            return over
        peaks = (float("-inf"), self._peak)
        for windows, peak in zip((self._all.windows, self._recent), peaks, strict=True):
            leak = grows(windows, peak, self.least_gib, self.where, room_gib)
            if leak and leak.gib >= 2 * self._said.get(leak.phase, 0.0):
                self._said[leak.phase], self._alarm = leak.gib, (leak, level)
                return leak
        return None

    def _window_closes(self, now_s: float) -> bool:
        if self._warm_s is None and self._steps >= WARMUP_STEPS:
            self._warm_s = now_s + self.warmup_s
        if self._warm_s is None or now_s < self._warm_s:
            self._open(now_s)
            return False
        if now_s - self._opened_s < self.window_s or len(self._levels) < FEWEST_STEPS:
            return False
        window = Window(median(self._levels), self._steps, now_s, self._grown)
        self._all.add(window)
        self._recent.append(window)
        if len(self._recent) > FEWEST_WINDOWS:
            self._peak = max(self._peak, self._recent.pop(0).level)
        self._open(now_s)
        return True

    def _open(self, now_s: float) -> None:
        self._levels, self._grown, self._opened_s = [], {}, now_s


def grows(
    windows: Sequence[Window], peak: float, least_gib: float, where: str, room_gib: float | None
) -> Leak | None:
    """The leak that these windows show, if any. `peak`: the highest level before them."""
    if len(windows) < FEWEST_WINDOWS:
        return None
    levels = np.array([one.level for one in windows])
    steps = np.array([one.steps for one in windows], dtype=np.float64)
    slope = theil_sen(steps, levels)
    gib = slope * float(steps[-1] - steps[0])
    if not (gib >= least_gib and lasts(levels, peak)):
        return None
    half = len(windows) // 2
    settles = theil_sen(steps[half:], levels[half:]) < STILL_GROWING * slope
    if settles or not smoother_than_jumps(levels):
        return None
    hours = (windows[-1].at_s - windows[0].at_s) / 3600
    per_hour = gib / hours
    full = None if room_gib is None else max(0.0, room_gib) / per_hour
    return Leak(where, blamed(windows), gib, hours, per_hour, slope * 1000, full)


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """The median of the slopes of all pairs."""
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def lasts(levels: np.ndarray, peak: float) -> bool:
    """Every level of the newest quarter is above all of the older half and all before: a cache that is
    emptied now and then comes back to where it was. By chance alone: 1 in 18,564 for 24 windows."""
    quarter, half = len(levels) // 4, len(levels) // 2
    return float(levels[-quarter:].min()) > max(peak, float(levels[:half].max()))


def smoother_than_jumps(levels: np.ndarray) -> bool:
    """Whether a parabola fits better than three constant pieces: two jumps that do not come again."""
    n, centred = len(levels), levels - levels.mean()
    x = np.linspace(-1.0, 1.0, n)
    curve = centred - np.polyval(np.polyfit(x, centred, 2), x)
    total = np.concatenate([[0.0], np.cumsum(centred)])
    a, b = np.triu_indices(n - 1, 1) + np.array(1)  # where the second and the third piece begin
    pieces = total[a] ** 2 / a + (total[b] - total[a]) ** 2 / (b - a) + (total[n] - total[b]) ** 2 / (n - b)
    return float((curve**2).sum()) < float((centred**2).sum() - pieces.max())


def blamed(windows: Sequence[Window]) -> str:
    """The phase that grew most. Steps have what the others leave: levels are medians, and so less noisy than
    single readings. A phase that was there in two windows only may have jumped, which is no leak."""
    seen = Counter(phase for one in windows[1:] for phase in one.grown)
    grown = {phase: sum(one.grown.get(phase, 0.0) for one in windows[1:]) for phase in sorted(seen)}
    grown["step"] = windows[-1].level - windows[0].level - sum(grown.values())
    return max((p for p in grown if p == "step" or seen[p] > EXCUSED_JUMPS), key=lambda p: grown[p])
