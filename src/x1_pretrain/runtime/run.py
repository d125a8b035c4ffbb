"""What the loop holds: one `Run`, the clock that says where its time went, what it watches and counts."""

from __future__ import annotations

import subprocess
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import psutil
from torch import Tensor
from torch.optim import AdamW

from x1_pretrain.config import RunConfig
from x1_pretrain.corpus.order import Order
from x1_pretrain.corpus.reader import Reader
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.corpus.tokenizer import Tokenizer
from x1_pretrain.evals.perplexity import Windows
from x1_pretrain.learning.noise import NoiseScales
from x1_pretrain.learning.stability import Judged, State
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.flops import FlopsPerToken
from x1_pretrain.money.trainer_guard import TrainerGuard
from x1_pretrain.records import console
from x1_pretrain.records.metrics import read_rows, utc_now
from x1_pretrain.records.mlflow_sink import MlflowSink
from x1_pretrain.runtime.assemble import Machine
from x1_pretrain.runtime.host import HostWatch
from x1_pretrain.runtime.memory import LeakDetector
from x1_pretrain.runtime.mirror import Mirror
from x1_pretrain.runtime.pace import Facts, PaceKeeper
from x1_pretrain.runtime.session import Records, Session
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.watchdog import Phase, Watchdog
from x1_pretrain.runtime.world import World

# What the rows call the time of a phase.
TIME_OF: dict[Phase, str] = {"data": "wait", "update": "step", "leaving": "other"}


@dataclass
class Clock:
    """Where the seconds go: by phase over the session, and the pace since the last log row."""

    started: float = field(default_factory=time.perf_counter)
    earlier_s: float = 0.0  # training time of earlier sessions
    step_s: float = 0.0
    wait_s: float = 0.0
    steps: int = 0
    warm_since: float | None = None  # the end of this session's first step, which compiles
    warm_steps: int = 0
    totals_s: dict[str, float] = field(default_factory=lambda: {"start": process_age_s()})
    _phase: str = "start"
    _since: float = field(default_factory=time.perf_counter)

    def elapsed_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.started

    def enter(self, phase: Phase) -> None:
        """The time from here on is that of `phase`. Up to the end of the first step, which compiles, all but
        evaluations and checkpoints belongs to the start."""
        name = TIME_OF.get(phase, phase)
        if self.warm_since is None and name in ("wait", "step", "other"):
            name = "start"
        now = time.perf_counter()
        self.totals_s[self._phase] = self.totals_s.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    def row(self) -> dict[str, float]:
        """Seconds of this session, this process's whole life, by what they went into."""
        self.enter("other")
        return {f"time/{name}_s": round(seconds, 3) for name, seconds in self.totals_s.items()}

    def count(self, step_s: float, wait_s: float) -> None:
        if self.warm_since is None:
            self.warm_since = time.perf_counter()
            return
        self.step_s, self.wait_s = self.step_s + step_s, self.wait_s + wait_s
        self.steps, self.warm_steps = self.steps + 1, self.warm_steps + 1

    def eta_s(self, steps_left: int) -> float | None:
        if self.warm_since is None or not self.warm_steps:
            return None
        return (time.perf_counter() - self.warm_since) / self.warm_steps * steps_left

    def reset(self) -> None:
        self.step_s, self.wait_s, self.steps = 0.0, 0.0, 0


def process_age_s() -> float:
    """Imports come before any clock of ours."""
    return max(0.0, time.time() - float(psutil.Process().create_time()))


@dataclass
class Update:
    """What came of one step."""

    loss: float
    grad_norm: float  # before clipping
    lr: float
    judged: Judged
    injected: bool
    step_s: float = 0.0
    wait_s: float = 0.0  # of it, for data


@dataclass
class Telemetry:
    """Of one run, from its start on; counts are since the last row."""

    noise: NoiseScales
    steps: int = 0
    clipped: int = 0
    injected: int = 0
    by_layer: dict[str, float] = field(default_factory=dict)  # gradients', where this row is a dear one
    squares: list[float] = field(default_factory=list)  # of the last gradient, by group

    def count(self, update: Update) -> None:
        self.steps += 1
        self.clipped += update.grad_norm > update.judged.clip
        self.injected += update.injected

    @classmethod
    def resumed(cls, config: RunConfig, step: int, saved: Mapping[str, Any]) -> Self:
        """At `step`: a row counts the steps since the one before also where a resume lies between them."""
        found = cls(NoiseScales.from_json(saved, config.telemetry.noise_scale == "groups"))
        if since := step % config.log.every:
            for row in read_rows(config.folder / "steps.jsonl"):
                if step - since < row["step"] <= step:
                    found.steps += 1
                    found.clipped += row["grad_norm"] > row["clip"]
                    found.injected += row.get("injected", False)
        return found

    def counts(self) -> dict[str, float]:
        """Since the last row."""
        row: dict[str, float] = {"clipped_share": self.clipped / max(1, self.steps)}
        row |= {"injected_steps": self.injected} if self.injected else {}
        self.steps = self.clipped = self.injected = 0
        return row


@dataclass
class Health:
    """Of one session, on its first rank."""

    host: HostWatch
    pace: PaceKeeper
    facts: Facts  # of the session's start
    ram: LeakDetector
    gpu: LeakDetector | None = None
    peak_told: bool = False


@dataclass
class Run:
    """All that the loop uses."""

    config: RunConfig
    world: World
    corpora: dict[str, Corpus]
    tokenizer: Tokenizer
    order: Order
    session: Session
    records: Records | None  # the first rank's
    screen: console.Screen
    signals: Signals
    decoder: Decoder
    optimizer: AdamW
    machine: Machine
    flops: FlopsPerToken
    reader: Reader[Tensor]
    windows: list[Windows]
    telemetry: Telemetry
    watchdog: Watchdog
    sink: MlflowSink | None
    guard: TrainerGuard | None = None  # the first rank's, of a run with a ceiling
    mirror: Mirror | None = None  # the first rank's, of a run with copies off its machine
    step: int = 0  # updates made so far
    saved_step: int = -1
    evaluated_step: int = -1
    stability: State = field(default_factory=State)  # what the spike detector knows
    last_rows: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=50))
    clock: Clock = field(default_factory=Clock)
    health: Health | None = None  # the first rank's
    postmortem: subprocess.Popen[bytes] | None = None  # being written
    postmortem_before: int = 0  # when the page was written that it replaces

    @property
    def total_steps(self) -> int:
        return self.config.training.total_steps

    @property
    def tokens(self) -> int:
        """Trained so far; those of injected batches are not among them."""
        return (self.step - self.injected_steps) * self.config.training.batch_tokens

    @property
    def own_tokens(self) -> int:
        """Of a branch: without its parent's, which it did not pay for."""
        begun = int((self.session.parent or {}).get("step", 0))
        return self.tokens - (begun - self.order.injected_before(begun)) * self.config.training.batch_tokens

    @property
    def injected_steps(self) -> int:
        return self.order.injected_before(self.step)

    def enter(self, phase: Phase) -> None:
        """What the loop does from here on."""
        self.clock.enter(phase)
        self.watchdog.enter(phase, self.step)

    def interrupted(self) -> bool:
        """Whether someone asked to stop. Asked at each piece of a long phase: that one comes is progress."""
        self.watchdog.beat()
        return self.signals.interrupted()

    def event(self, name: str, message: str, **more: Any) -> None:
        """Say it and keep it."""
        self.screen.say(message)
        self.note(name, message, **more)

    def note(self, name: str, message: str, **more: Any) -> None:
        """Keep it."""
        if self.records:
            row = {"time_utc": utc_now(), "event": name, "step": self.step, "session": self.session.number}
            self.records.events.append({**row, **more, "message": message.strip()})

    def row(self, **values: Any) -> dict[str, Any]:
        where = {"step": self.step, "tokens": self.tokens, "time_utc": utc_now()}
        if injected := self.injected_steps:
            where["tokens_injected"] = injected * self.config.training.batch_tokens
        return {
            **where,
            "elapsed_s": round(self.clock.elapsed_s(), 3),
            "session": self.session.number,
            **values,
        }
