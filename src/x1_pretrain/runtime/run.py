"""What the loop holds: one `Run`, and the clock that says where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from x1_pretrain.config import RunConfig
from x1_pretrain.corpus.order import Order
from x1_pretrain.corpus.reader import Reader
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.corpus.tokenizer import Tokenizer
from x1_pretrain.evals.perplexity import Windows
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.flops import FlopsPerToken
from x1_pretrain.money.trainer_guard import TrainerGuard
from x1_pretrain.records import console
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.records.mlflow_sink import MlflowSink
from x1_pretrain.runtime.assemble import Machine
from x1_pretrain.runtime.session import Records, Session
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.world import World


@dataclass
class Clock:
    """Seconds since the last log row, by what they went into, and the pace of this session."""

    started: float = field(default_factory=time.perf_counter)
    earlier_s: float = 0.0  # training time of earlier sessions
    step_s: float = 0.0
    wait_s: float = 0.0
    steps: int = 0
    warm_since: float | None = None  # the end of this session's first step, which compiles
    warm_steps: int = 0

    def elapsed_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.started

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
    sink: MlflowSink | None
    guard: TrainerGuard | None = None  # the first rank's, of a run with a ceiling
    step: int = 0  # updates made so far
    saved_step: int = -1
    evaluated_step: int = -1
    bad_streak: int = 0
    clock: Clock = field(default_factory=Clock)

    @property
    def total_steps(self) -> int:
        return self.config.training.total_steps

    @property
    def tokens(self) -> int:
        return self.step * self.config.training.batch_tokens

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
        return {
            **where,
            "elapsed_s": round(self.clock.elapsed_s(), 3),
            "session": self.session.number,
            **values,
        }
