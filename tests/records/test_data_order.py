"""The order of a run's data from its events: against the loop's own reading of them when it goes on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.records import builder

from x1_pretrain.corpus.order import INJECTED_STEPS, Order
from x1_pretrain.errors import UserError
from x1_pretrain.postmortem.episodes import injected_within
from x1_pretrain.records.data_order import injected_stretches, order_of, recorded_injections
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.runtime.session import past_on_record

TOTAL = builder.TOTAL_STEPS


def test_an_injection_that_a_resume_went_back_over_is_none_anywhere(tmp_path: Path) -> None:
    """Injected after step 30, resumed at 20 without the flag: verify and post-mortem say the same."""
    folder = builder.build_run(tmp_path / "run")
    told = builder.event("inject", 30, 1) | {"first_step": 30, "first_batch": 30, "steps": 5}
    events = [builder.event("start", 0, 1), told, builder.event("resume", 20, 2)]
    builder.write_lines(folder / "events.jsonl", events)
    run = open_run(folder)
    assert order_of(run, events[:2]).injected == (30,)
    assert injected_within(events[:2], 31) == (31, 35)
    assert order_of(run).injected == ()
    assert injected_stretches(events) == []
    assert injected_within(events, 31) is None


def test_a_rewind_that_went_nowhere_undoes_nothing() -> None:
    """It was judged at the very step whose batch was injected, and there was no checkpoint."""
    events = [
        builder.event("start", 0, 1),
        builder.event("inject", 12, 1) | {"first_step": 12, "first_batch": 12, "steps": 5},
        builder.event("rewind", 12, 1),
    ]
    assert recorded_injections(events) == [12]


@pytest.mark.parametrize("first", [["x"], "many"])
def test_a_damaged_injection_is_one_line(tmp_path: Path, first: object) -> None:
    folder = builder.build_run(tmp_path / "run")
    events = [builder.event("branch", 0, 1) | {"injected": first}, builder.event("start", 0, 1)]
    builder.write_lines(folder / "events.jsonl", events)
    with pytest.raises(UserError, match="the order of its data can't be told"):
        order_of(open_run(folder))


@dataclass
class Loop:
    """A loop that does nothing but keep its past as the real one does, in events and in checkpoints."""

    order: Order
    step: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    saved: list[SimpleNamespace] = field(default_factory=list)

    def save(self) -> None:
        begun = [first for first in self.order.injected if first < self.order.batch_of(self.step)]
        jumps = [list(jump) for jump in self.order.jumps]
        self.saved.append(SimpleNamespace(step=self.step, jumps=jumps, injected=begun))

    def tell(self, name: str, **fields: Any) -> None:
        self.events.append(builder.event(name, self.step, 1) | fields)

    def inject(self) -> None:
        ahead = self.order.batch_of(self.step)
        free = all(first + INJECTED_STEPS <= ahead for first in self.order.injected)
        if free and self.step + INJECTED_STEPS <= TOTAL:
            self.order = self.with_past(self.order.jumps, [*self.order.injected, ahead])

    def with_past(self, jumps: Any, injected: Any) -> Order:
        o = self.order
        return Order(o.seed, o.sources, o.batch_blocks, o.total_steps, jumps, injected)

    def advance(self) -> None:
        if self.order.batch_of(self.step) in self.order.injected:
            self.tell("inject", first_step=self.step, first_batch=self.order.batch_of(self.step), steps=5)
        self.step += 1

    def rewind(self) -> None:
        back = self.saved[-1]
        if back.step == self.step:
            return
        self.order = self.order.jumped(back.step, self.step)
        on = self.order.batch_of(back.step)
        begun = [first for first in self.order.injected if first < on]
        self.tell("rewind", to_step=back.step, jumps=[list(j) for j in self.order.jumps], injected=begun)
        self.step = back.step

    def resume(self, folder: Path) -> None:
        """From the newest checkpoint or, where that is bad, an earlier one."""
        if len(self.saved) > 1 and random.random() < 0.4:
            self.saved.pop()
        builder.write_lines(folder / "events.jsonl", self.events)
        past = past_on_record(folder, self.saved[-1])  # type: ignore[arg-type]
        self.order = self.with_past([tuple(jump) for jump in past.jumps], past.injected)
        self.step = self.saved[-1].step
        self.tell("resume")


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_the_events_tell_what_the_loop_reads(tmp_path: Path, seed: int) -> None:
    random.seed(seed)
    folder = builder.build_run(tmp_path / "run")
    run = open_run(folder)
    loop = Loop(order_of(run, []))
    loop.tell("start")
    loop.save()
    while loop.step < TOTAL - 1 and len(loop.events) < 40:
        loop.advance()
        what = random.random()
        if what < 0.06:
            loop.inject()
        elif what < 0.16:
            loop.save()
        elif what < 0.19:
            loop.rewind()
        elif what < 0.23:
            loop.resume(folder)
    told = order_of(run, loop.events)
    for step in range(loop.step):
        assert told.step_blocks(step) == loop.order.step_blocks(step), (step, loop.events)
    assert told.injected_before(loop.step) == loop.order.injected_before(loop.step)
