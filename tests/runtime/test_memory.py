"""Memory's readings, and the leak detector: against traces whose leak, or lack of one, is known."""

from __future__ import annotations

import json
import math
import mmap
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.model.test_memory import SHAPES, Live, decoder_of, small
from x1_pretrain.model.loss import token_losses
from x1_pretrain.runtime import memory
from x1_pretrain.runtime.memory import LeakDetector, Phase, Window

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------------
# Readings


def test_on_a_cpu_memory_is_what_the_system_says_of_this_process() -> None:
    before = memory.reading(CPU)["memory/rss_gib"]
    assert before == pytest.approx(psutil.Process().memory_info().rss / 2**30, abs=0.05)
    block = np.frombuffer(mmap.mmap(-1, 2**27), dtype=np.uint8)  # new pages, not ones freed by a test before
    block[:] = 1
    assert memory.reading(CPU)["memory/rss_gib"] - before == pytest.approx(len(block) / 2**30, abs=0.02)


def test_pages_of_files_are_not_this_process_own(tmp_path: object) -> None:
    file = f"{tmp_path}/data"
    with open(file, "wb") as out:  # noqa: PTH123 - the fixture's type does not matter here
        out.write(bytes(2**27))
    own, rss = memory.level_gib(CPU), memory.reading(CPU)["memory/rss_gib"]
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    assert int(mapped.sum()) == 0
    assert memory.reading(CPU)["memory/rss_gib"] - rss > 0.1
    assert memory.level_gib(CPU) - own < 0.02


def test_where_there_is_no_proc_psutil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", absent)
    assert memory.reading(CPU)["memory/rss_gib"] == pytest.approx(
        psutil.Process().memory_info().rss / 2**30, rel=0.1
    )


@pytest.mark.parametrize(
    ("predicted", "measured", "words"),
    [
        (10.0, 10.01, "as predicted"),
        (10.0, 10.6, "6% more than predicted"),
        (10.0, 12.5, "25% more than predicted; a plan for a larger model"),
        (10.0, 8.0, "20% less than predicted; compiled code"),
        (10.0, math.nan, "not measured"),
        (0.0, 3.0, "not measured"),
    ],
)
def test_prediction_and_measurement_in_one_line(predicted: float, measured: float, words: str) -> None:
    said = memory.predicted_vs_measured(predicted, measured)
    assert words in said
    assert "\n" not in said


# ------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", [*SHAPES, {"vocab_size": 20_000}, {"d_ff": 2048}])
def test_an_evaluation_takes_no_more_than_was_planned(changes: dict[str, object], bf16: bool) -> None:
    model, sequences = small(**changes), 8
    decoder = decoder_of(model, bf16)
    ids = torch.zeros(sequences, model.context, dtype=torch.long)
    with torch.no_grad(), Live() as live:
        hidden = decoder.hidden(ids).flatten(0, 1)
        token_losses(hidden, decoder.output_weight, ids.flatten(), model.vocab, 4096)
    weights = 0 if bf16 else 4 * sum(p.numel() for p in decoder.parameters())  # in fp32 they are used as is
    planned = memory.evaluation_gib(model, sequences, bf16) * 2**30
    assert live.peak - weights <= planned <= 4 * live.peak


@given(st.integers(1, 512), st.floats(0, 4))
def test_the_batch_of_an_evaluation_fits_or_is_one(micro_batch: int, room: float) -> None:
    model = small(vocab_size=20_000)
    size = memory.evaluation_batch(model, micro_batch, True, room)
    assert 1 <= size <= micro_batch
    assert size == 1 or memory.evaluation_gib(model, size, True) <= room
    if memory.evaluation_gib(model, micro_batch, True) < 0.9 * room:
        assert size == micro_batch  # nothing is compiled anew without need


# ------------------------------------------------------------------------------------------------------------
# Traces


@dataclass
class Trace:
    """20,000 steps of a second, evaluated and saved every 1,800. GiB at the end of each phase."""

    noise: float = 0.0
    step: Callable[[int], float] = lambda s: 0.0  # level by step
    each: dict[str, float] = field(default_factory=dict)  # what one phase keeps each time
    first: dict[str, float] = field(default_factory=lambda: {"evaluation": 0.7, "sampling": 0.2})
    steps: int = 20_000
    every: int = 1800

    def run(self, seed: int) -> Iterator[tuple[str, float, float]]:
        noise, now, kept, seen = random.Random(seed), 0.0, 10.0, set[str]()
        for s in range(self.steps):
            now += 1
            yield "step", kept + self.step(s) + noise.gauss(0, self.noise), now
            for phase, seconds in (("evaluation", 60), ("sampling", 10), ("checkpoint", 5)):
                if (s + 1) % self.every:
                    continue
                now += seconds
                kept += self.each.get(phase, 0.0) + (0.0 if phase in seen else self.first.get(phase, 0.0))
                seen.add(phase)
                yield phase, kept + self.step(s) + noise.gauss(0, self.noise), now


def alarms(trace: Trace, seed: int = 0) -> list[tuple[float, memory.Leak]]:
    """(hour, leak) of all that was said."""
    detector, said, steps = LeakDetector(where="GPU memory"), [], 0
    for phase, gib, now in trace.run(seed):
        detector.saw(phase, gib)  # type: ignore[arg-type]
        steps += phase == "step"
        if phase == "step" and steps % 10 == 0 and (leak := detector.judge(now, room_gib=20.0)):
            said.append((now / 3600, leak))
    return said


def jumps(*at: int) -> Callable[[int], float]:
    return lambda s: float(sum(s >= step for step in at))


QUIET = {
    "steady": Trace(),
    "noise": Trace(noise=0.02),
    "loud noise": Trace(noise=0.5),
    "a cache emptied every 1,500 steps": Trace(step=lambda s: s % 1500 / 750, noise=0.01),
    "two jumps": Trace(step=jumps(700, 2500), noise=0.01),
    "three jumps": Trace(step=jumps(700, 2500, 6000), noise=0.01),
    "an allocator that settles": Trace(step=lambda s: 1.5 * (1 - math.exp(-s / 300)), noise=0.002),
    "memory that shrinks": Trace(step=lambda s: -s / 10_000, noise=0.01),
    "growth too small to matter": Trace(step=lambda s: 0.09 * s / 20_000),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_leak_is_not_called_one(name: str) -> None:
    for seed in range(3):
        assert alarms(QUIET[name], seed) == []


LEAKS = {
    "step": (Trace(step=lambda s: 0.1 * s / 1000), "step", 0.1),
    "step in noise": (Trace(step=lambda s: 0.1 * s / 1000, noise=0.05), "step", 0.1),
    "evaluation": (Trace(each={"evaluation": 0.18}), "evaluation", 0.1),
    "evaluation in noise": (Trace(each={"evaluation": 0.18}, noise=0.02), "evaluation", 0.1),
    "sampling": (Trace(each={"sampling": 0.18}), "sampling", 0.1),
    "checkpoint": (Trace(each={"checkpoint": 0.18}), "checkpoint", 0.1),
    "in the saw of a cache": (Trace(step=lambda s: s % 500 / 500 + 0.2 * s / 1000), "step", 0.2),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found_with_its_phase_and_its_pace(name: str) -> None:
    trace, phase, per_1000 = LEAKS[name]
    for seed in range(3):
        said = [leak for _, leak in alarms(trace, seed)]
        assert said
        assert said[-1].phase == phase
        assert said[-1].gib_per_1000_steps == pytest.approx(per_1000, rel=0.25)
        assert said[-1].gib_per_hour == pytest.approx(per_1000 * 3.6 / 1.04, rel=0.25)
        assert said[-1].full_in_hours == pytest.approx(20 / said[-1].gib_per_hour)
        assert phase in said[-1].message
        assert "GPU memory" in said[-1].message


def test_growth_that_quickens_is_found() -> None:
    said = alarms(Trace(step=lambda s: 4 * (s / 20_000) ** 2))
    assert said
    assert {leak.phase for _, leak in said} == {"step"}


def test_a_leak_that_begins_late_is_found_within_the_hour() -> None:
    said = alarms(Trace(step=lambda s: max(0.0, 0.5 * (s - 12_000) / 1000)))
    assert 12_000 / 3600 < said[0][0] < 12_000 * 1.04 / 3600 + 1


def test_it_is_said_again_only_when_it_has_doubled() -> None:
    said = [leak.gib for _, leak in alarms(Trace(step=lambda s: 0.1 * s / 1000))]
    assert 3 <= len(said) <= 5  # 2 GiB in all, from 0.1 on
    assert all(later >= 2 * earlier for earlier, later in pairwise(said))


def test_a_cache_that_fills_for_an_hour_is_taken_back() -> None:
    """Nobody can tell it from a leak before it is emptied; after that nothing is said of it any more."""
    said = [leak for _, leak in alarms(Trace(step=lambda s: s % 3600 / 1800, noise=0.01))]
    assert [leak.over for leak in said] == [False] * (len(said) - 1) + [True]
    assert len(said) <= 3
    assert "no more" in said[-1].message


def test_nothing_is_judged_while_the_run_warms_up() -> None:
    said = alarms(Trace(step=lambda s: 2.0 * s / 1000))
    assert said[0][0] * 3600 > 300 + memory.FEWEST_WINDOWS * 60 - 61


def test_a_judgement_costs_little_and_the_history_stays_small() -> None:
    detector = LeakDetector()
    for phase, gib, now in Trace(noise=0.01).run(0):
        detector.saw(phase, gib)  # type: ignore[arg-type]
        detector.judge(now)
    assert len(detector._all.windows) < 2 * memory.FEWEST_WINDOWS
    assert len(detector._recent) <= memory.FEWEST_WINDOWS


@pytest.mark.slow
def test_rates_of_false_alarms_and_of_detection() -> None:
    """The table of docs/machine-health.md."""
    seeds = range(30)
    for name, trace in QUIET.items():
        assert not [seed for seed in seeds if alarms(trace, seed)], name
    for name, (trace, phase, _) in LEAKS.items():
        found = [alarms(trace, seed) for seed in seeds]
        assert all(found), name
        assert sum(said[-1][1].phase == phase for said in found) >= 29, name


# ------------------------------------------------------------------------------------------------------------
# The pieces


@settings(max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=4, max_size=40), st.integers(0, 2**20))
def test_theil_sen_is_scipys(levels: list[float], seed: int) -> None:
    x = np.cumsum(np.random.default_rng(seed).integers(1, 9, len(levels))).astype(float)
    y = np.array(levels)
    assert memory.theil_sen(x, y) == pytest.approx(stats.theilslopes(y, x)[0], abs=1e-9)


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10), min_size=24, max_size=30))
def test_the_best_two_jumps_are_those_of_brute_force(levels: list[float]) -> None:
    y = np.array(levels)
    x = np.arange(len(y), dtype=float)
    parabola = float(((y - np.polyval(np.polyfit(x, y, 2), x)) ** 2).sum())
    pieces = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(y, [a, b]))
        for a in range(1, len(y))
        for b in range(a + 1, len(y))
    )
    if abs(parabola - pieces) > 1e-6:
        assert memory.smoother_than_jumps(y) == (parabola < pieces)


def test_two_windows_become_one_without_losing_growth() -> None:
    first, second = Window(10.0, 100, 60.0, {"evaluation": 0.5}), Window(11.0, 200, 120.0, {"sampling": 0.25})
    both = Window.merged([first, second])
    assert both == Window(10.5, 200, 120.0, {"evaluation": 0.5, "sampling": 0.25})


def phases() -> st.SearchStrategy[Phase]:
    return st.sampled_from(["step", "evaluation", "sampling", "checkpoint", "other"])


@given(st.lists(st.tuples(phases(), st.floats(allow_nan=True, allow_infinity=True)), max_size=80))
def test_no_reading_breaks_it(seen: list[tuple[Phase, float]]) -> None:
    detector = LeakDetector(window_s=0.0, warmup_s=0.0)
    for now, (phase, gib) in enumerate(seen * 8):
        detector.saw(phase, gib)
        detector.judge(float(now))


# ------------------------------------------------------------------------------------------------------------
# A real process

LEAKY = """
import json, sys
import numpy as np, torch
from x1_pretrain.runtime.memory import LeakDetector, level_gib
leaks, kept = sys.argv[1], []
cpu, detector, weight = torch.device("cpu"), LeakDetector(where="memory", least_gib=0.05), torch.ones(64, 64)
for step in range(1, 6001):
    weight = torch.tanh(weight @ weight / 64)
    detector.saw("step", level_gib(cpu))
    if step % 100 == 0:
        scratch = np.ones(2**20)
        kept += [np.ones(2**19)] if leaks == "evaluation" else []  # 4 MiB
        del scratch
        detector.saw("evaluation", level_gib(cpu))
        detector.saw("checkpoint", level_gib(cpu))
    if step % 10 == 0 and (leak := detector.judge(float(step))):
        print(json.dumps(leak.fields))
"""


def process(leaks: str) -> list[dict[str, object]]:
    done = subprocess.run([sys.executable, "-c", LEAKY, leaks], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_that_leaks_in_its_evaluations_is_told_so() -> None:
    said = process("evaluation")
    assert {row["phase"] for row in said} == {"evaluation"}
    per_1000 = said[-1]["gib_per_1000_steps"]
    assert per_1000 == pytest.approx(10 * 4 / 1024, rel=0.2)


def test_a_process_that_does_not_leak_is_left_alone() -> None:
    assert process("nothing") == []
