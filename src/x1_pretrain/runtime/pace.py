"""Is the run as fast as was planned, and as it usually is? If not: why, most likely, and what it costs. Pure.

Speed is that of the steps, waiting for data included; evaluations and checkpoints are not in it. `PaceKeeper`
takes a row of metrics at a time and speaks once an occasion; the text is for a person who must decide
whether to stop or to go on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from statistics import harmonic_mean, median
from typing import Any, Literal, NamedTuple

from x1_pretrain.money.guard import dollars
from x1_pretrain.numbers import human
from x1_pretrain.records.run_folder import is_number
from x1_pretrain.runtime.machine_reading import Seen

ROW_S = 10.0  # shorter rows are taken together: a moment's noise is none of our business
WARMUP_ROWS = 2  # with a speed, at the beginning of a session
JUDGED_ROWS = 5  # whose median is held against the plan
LOOK_BACK, SLOW_ROWS = 10, 4  # so many of the latest rows below the usual: slow; none: well again
USUAL_ROWS = 200
POSSIBLE_MFU = 0.65  # published runs stay below
WORTH_SAYING = 0.05  # of waiting, stealing, clocks
BUSY_ELSEWHERE = 0.5  # of the CPU
IDLE_GPU = 0.6

Basis = Literal["measured", "stated", "assumed"]
Kind = Literal["plan", "usual", "well"]


@dataclass(frozen=True)
class Facts:
    """What is known when a run is found slow. None: not known."""

    tokens_left: int = 0
    basis: Basis = "assumed"  # of the planned speed
    source: str = ""  # ... in words: "an assumed MFU of 0.35"
    peak_tokens_per_sec: float | None = None  # at the data sheet's peak of all GPUs (PaLM's count)
    usd_per_hr: Decimal | None = None  # as agreed
    left_usd: Decimal | None = None  # below the ceiling
    on_gpu: bool = True
    compile_mode: str = "off"
    compile_why: str = ""  # the line that was said of it
    attention: str = "sdpa"
    flash_possible: bool = False  # this GPU could, were the package there
    micro_batch: int | None = None
    micro_batch_was: int | None = None  # before it was halved
    data_on_network: str | None = None  # `nfs at /mnt/data`
    wait_share: float | None = None  # for data, in the rows that were slow
    machine: Seen | None = None


class Cause(NamedTuple):
    """One likely cause. `share`: of the lost speed that it would explain, measured or a rule of thumb."""

    share: float
    said: str


@dataclass(frozen=True)
class Slow:
    """`plan`: below the planned speed; `usual`: below its own; `well`: it is back."""

    kind: Kind
    tokens_per_sec: float
    planned: float | None
    usual: float | None
    causes: tuple[str, ...]
    message: str

    @property
    def fields(self) -> dict[str, Any]:
        speeds = {"tokens_per_sec": self.tokens_per_sec, "planned": self.planned, "usual": self.usual}
        rounded = {name: None if v is None else round(v, 1) for name, v in speeds.items()}
        return {"kind": self.kind, **rounded, "causes": list(self.causes)}


# ------------------------------------------------------------------------------------------------------------
# The judgement


def judge(
    measured: float, planned: float | None, usual: float | None, facts: Facts, min_pace: float = 0.7
) -> Slow | None:
    """Against its own usual speed first: that is news whatever was planned."""
    if usual is not None and measured < min_pace * usual:
        return _slow("usual", measured, usual, planned, usual, facts)
    if planned is not None and measured < min_pace * planned:
        return _slow("plan", measured, planned, planned, usual, facts)
    return None


def _slow(
    kind: Kind, measured: float, wanted: float, planned: float | None, usual: float | None, facts: Facts
) -> Slow:
    found = ranked(kind, measured, wanted, facts)
    causes = tuple(cause.said for cause in found) or (
        "nothing that is watched explains it; x1 doctor measures this machine",
    )
    numbered = "; ".join(f"({n}) {said}" for n, said in enumerate(causes, start=1))
    against = f"its usual {human(wanted)}" if kind == "usual" else _planned(wanted, facts)
    message = (
        f"slow: {human(measured)} tokens/s, {measured / wanted:.0%} of {against}. Likely why: {numbered}. "
        f"{bill(measured, wanted, facts)}Stop with Ctrl-C (it saves; the same command goes on later) or go on"
    )
    return Slow(kind, measured, planned, usual, causes, message)


def _planned(wanted: float, facts: Facts) -> str:
    source = (
        facts.source or {"measured": "measured before", "stated": "stated", "assumed": "assumed"}[facts.basis]
    )
    return f"the planned {human(wanted)} ({source})"


def ranked(kind: Kind, measured: float, wanted: float, facts: Facts) -> list[Cause]:
    """The likely causes, the one that explains most first."""
    lost = 1 - measured / wanted
    found = [*_of_the_data(facts, lost), *_of_the_gpu(facts, lost), *_of_the_cpu(facts, lost)]
    found += _of_the_code(facts)
    if kind == "plan":
        found += _of_the_plan(measured, wanted, facts, bool(found))
    return sorted(found, key=lambda cause: -cause.share)


def _of_the_data(facts: Facts, lost: float) -> Iterator[Cause]:
    wait = facts.wait_share
    if wait is None or not wait >= WORTH_SAYING:
        return
    where = f", which are on the network ({facts.data_on_network})" if facts.data_on_network else ""
    yield Cause(
        min(1.0, wait / lost),
        f"it waits for data {wait:.0%} of the time{where}: copy them to a local disk, free the CPU",
    )


def _of_the_gpu(facts: Facts, lost: float) -> Iterator[Cause]:
    gpu = facts.machine.gpu if facts.machine else None
    if gpu is None:
        return
    if gpu.trouble:
        yield Cause(1.0, f"{gpu.trouble}: take another machine")
    clocks = gpu.clock_mhz / gpu.max_clock_mhz if gpu.clock_mhz and gpu.max_clock_mhz else None
    missing = 0.0 if clocks is None else 1 - clocks
    if gpu.slowed:
        heat = "" if gpu.temperature_c is None else f" at {gpu.temperature_c:.0f} C"
        said = f"the GPU is slowed down{heat} ({', '.join(gpu.slowed)}): cooling or power of the machine"
        yield Cause(max(0.5, min(1.0, missing / lost)), said)
    elif clocks is not None and missing >= 2 * WORTH_SAYING and _busy(gpu.util_share):
        why = ", ".join(gpu.reasons) or "no reason given"
        cap = f", {gpu.power_w:.0f} of {gpu.power_limit_w:.0f} W" if gpu.power_w and gpu.power_limit_w else ""
        said = f"the GPU runs at {gpu.clock_mhz:.0f} of {gpu.max_clock_mhz:.0f} MHz ({why}{cap})"
        yield Cause(min(1.0, missing / lost), said)
    waits = facts.wait_share is not None and facts.wait_share >= WORTH_SAYING
    if gpu.util_share is not None and gpu.util_share < IDLE_GPU and not waits:
        said = (
            f"the GPU is busy only {gpu.util_share:.0%} of the time, and not for want of data: work in too "
        )
        yield Cause(
            0.4, said + "small pieces (a larger training.micro_batch, training.compile) or a slow CPU"
        )


def _busy(share: float | None) -> bool:
    return share is None or share >= IDLE_GPU


def _of_the_cpu(facts: Facts, lost: float) -> Iterator[Cause]:
    seen = facts.machine
    if seen is None:
        return
    direct = 0.5 if facts.on_gpu else 1.0  # beside a GPU the CPU counts only where it holds that up
    if seen.steal_share is not None and seen.steal_share >= WORTH_SAYING:
        said = f"the host gives {seen.steal_share:.0%} of the CPU to other machines: take another machine"
        yield Cause(direct * min(1.0, seen.steal_share / lost), said)
    if seen.quota_share is not None and seen.quota_share >= WORTH_SAYING:
        said = f"the container used up its CPU and waited {seen.quota_share:.0%} of the time: rent more cores"
        yield Cause(direct * min(1.0, seen.quota_share / lost), said)
    others = None
    if seen.cpu_share is not None and seen.own_cpu_share is not None:
        others = seen.cpu_share - seen.own_cpu_share
    if others is not None and others >= BUSY_ELSEWHERE:
        said = f"other processes use {others:.0%} of the CPU: end them (top shows them)"
        yield Cause(direct * min(1.0, others), said)
    if seen.swap_gib is not None and seen.swap_gib >= 1:
        yield Cause(0.6, f"{seen.swap_gib:.1f} GiB of memory were moved to disk: end what else runs here")


def _of_the_code(facts: Facts) -> Iterator[Cause]:
    """Rules of thumb: how much each costs was not measured here."""
    if facts.micro_batch_was and facts.micro_batch and facts.micro_batch < facts.micro_batch_was:
        said = (
            f"out of memory cut the micro-batch from {facts.micro_batch_was} to {facts.micro_batch} and gave "
        )
        said += f"up compiled code: relaunch with --set training.micro_batch={facts.micro_batch}"
        yield Cause(0.55, said)
    elif facts.on_gpu and facts.compile_mode == "off":
        why = f" ({facts.compile_why.removeprefix('compile: ')})" if facts.compile_why else ""
        yield Cause(0.5, f"the model is not compiled{why}")
    if facts.on_gpu and facts.attention == "sdpa" and facts.flash_possible:
        yield Cause(0.3, "attention is PyTorch's sdpa where flash_attn would run (pip install flash-attn)")


def _of_the_plan(measured: float, wanted: float, facts: Facts, other: bool) -> Iterator[Cause]:
    """The planned speed itself may be the mistake."""
    peak = facts.peak_tokens_per_sec
    implied = wanted / peak if peak else None
    reached = f"; the run reaches {measured / peak:.2f}" if peak else ""
    if implied is not None and implied > POSSIBLE_MFU:
        said = f"the planned speed needs an MFU of {implied:.2f}, more than published runs reach{reached}"
        yield Cause(1.0, f"{said}: the plan was wrong, not the machine")
    elif facts.basis == "assumed":
        said = f"the planned speed was never measured, it rests on {facts.source or 'an assumption'}{reached}"
        yield Cause(0.35 if other else 0.7, f"{said}: small or narrow models stay below it")


# ------------------------------------------------------------------------------------------------------------
# What it costs


def bill(measured: float, wanted: float, facts: Facts) -> str:
    """What finishing takes at this speed; a sentence that ends in a space, or nothing."""
    if facts.tokens_left <= 0 or measured <= 0:
        return ""
    now_h, then_h = (facts.tokens_left / rate / 3600 for rate in (measured, wanted))
    said = f"To finish at this speed: {_hours(now_h)} more instead of {_hours(then_h)}"
    if facts.usd_per_hr:
        costs, hoped = (cost(hours, facts.usd_per_hr) for hours in (now_h, then_h))
        said += f", {dollars(costs)} instead of {dollars(hoped)} at {dollars(facts.usd_per_hr)}/h"
        if facts.left_usd is not None and costs > facts.left_usd:
            said += (
                f". Below the ceiling {dollars(facts.left_usd)} are left: that pays for "
                f"{float(facts.left_usd / costs):.0%} of the rest, then the guard stops it"
            )
    return f"{said}; evaluations and checkpoints come on top. "


def cost(hours: float, usd_per_hr: Decimal) -> Decimal:
    return usd_per_hr * Decimal(repr(hours))


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{max(1, math.ceil(hours * 60))} min"


# ------------------------------------------------------------------------------------------------------------
# Over time


@dataclass
class PaceKeeper:
    """Takes every row of metrics in order; says something at most once an occasion. One per session."""

    planned: float | None
    min_pace: float = 0.7
    _rows: int = 0
    _pending: list[tuple[float, float | None]] = field(default_factory=list)
    _since_s: float | None = None
    _latest: deque[tuple[float, float | None]] = field(default_factory=lambda: deque(maxlen=LOOK_BACK))
    _normal: deque[float] = field(default_factory=lambda: deque(maxlen=USUAL_ROWS))
    _below_plan: bool = False
    _below_usual: bool = False

    def saw(self, row: Mapping[str, Any], facts: Facts) -> Slow | None:
        """What this row makes worth saying. Rows without a speed (evaluations) say nothing."""
        rate: Any = row.get("tokens_per_sec")
        if not is_number(rate) or not 0 < rate < math.inf or self.min_pace <= 0:
            return None
        self._pending.append((float(rate), _share(row.get("data/wait_share"))))
        if not self._long_enough(row.get("elapsed_s")):
            return None
        rate, wait = harmonic_mean([r for r, _ in self._pending]), _mean(w for _, w in self._pending)
        self._pending, self._rows = [], self._rows + 1
        if self._rows <= WARMUP_ROWS:
            return None
        self._latest.append((rate, wait))
        usual = median(self._normal) if len(self._normal) >= JUDGED_ROWS else None
        if usual is None or rate >= self.min_pace * usual:
            self._normal.append(rate)
        return self._against_usual(usual, facts) or self._against_plan(usual, facts)

    def _long_enough(self, elapsed_s: Any) -> bool:
        """Whether the rows since the last judgement cover `ROW_S`; rows without a clock always do."""
        if not is_number(elapsed_s):
            return True
        if self._since_s is not None and elapsed_s - self._since_s < ROW_S:
            return False
        first, self._since_s = self._since_s is None, float(elapsed_s)
        return not first

    def _against_usual(self, usual: float | None, facts: Facts) -> Slow | None:
        if usual is None:
            return None
        slow = [(rate, wait) for rate, wait in self._latest if rate < self.min_pace * usual]
        if not self._below_usual and len(slow) >= SLOW_ROWS:
            self._below_usual = True
            facts = replace(facts, wait_share=_mean(wait for _, wait in slow))
            return judge(median(rate for rate, _ in slow), self.planned, usual, facts, self.min_pace)
        if self._below_usual and not slow:
            self._below_usual = False
            return self._well(f"its usual {human(usual)}", usual)
        return None

    def _against_plan(self, usual: float | None, facts: Facts) -> Slow | None:
        if self.planned is None or len(self._latest) < JUDGED_ROWS:
            return None
        if usual is not None and any(rate < self.min_pace * usual for rate, _ in self._latest):
            return None  # a fall from its own speed is told as that, if it lasts
        newest = list(self._latest)[-JUDGED_ROWS:]
        measured = median(rate for rate, _ in newest)
        if not self._below_plan and measured < self.min_pace * self.planned:
            self._below_plan = True
            facts = replace(facts, wait_share=_mean(wait for _, wait in newest))
            return judge(measured, self.planned, None, facts, self.min_pace)
        if self._below_plan and measured >= (1 + self.min_pace) / 2 * self.planned:
            self._below_plan = False
            return self._well(f"the planned {human(self.planned)}", usual)
        return None

    def _well(self, wanted: str, usual: float | None) -> Slow:
        measured = median(rate for rate, _ in list(self._latest)[-JUDGED_ROWS:])
        said = f"slow no more: {human(measured)} tokens/s again ({wanted})"
        return Slow("well", measured, self.planned, usual, (), said)


def _share(value: Any) -> float | None:
    return float(value) if is_number(value) and 0 <= value <= 1 else None


def _mean(shares: Sequence[float | None] | Iterator[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
