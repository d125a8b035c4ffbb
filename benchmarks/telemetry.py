"""What telemetry costs: the real loop with all of it and without, in turns in one process, and its parts.

    python benchmarks/telemetry.py                          the demo's model on a CPU, under 3 minutes
    python benchmarks/telemetry.py --model 50m              the parts beside the 50M model on a CPU
    python benchmarks/telemetry.py --model 50m --device cuda --pairs 10

Blocks of steps with and without follow each other in alternating order; the ratio of each pair is one
measurement. In them every row is a dear one, ten times as often as by default, so the difference is an upper
bound. The parts are timed one by one in further steps, each between two waits for the device, and shared out
over the steps as often as they come by default. "Without" is the loop with one gradient norm, one weight norm
a row, and the check that both are finite.
"""

from __future__ import annotations

import sys

sys.path.sort(key=__file__.rpartition("/")[0].__eq__)  # this folder last: it has another `tokenize`

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import gpu
from x1_pretrain import demo, train
from x1_pretrain.config import LogConfig, RunConfig, TelemetryConfig
from x1_pretrain.config_reading import load_config, parse_config
from x1_pretrain.learning import optimizers, stability, vitals
from x1_pretrain.runtime import assemble, memory, spikes, telemetry
from x1_pretrain.runtime.run import Run
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.start import get_ready, started

Clock = Callable[[], float]

BLOCK = 10  # steps; one row of metrics each
LIMIT = 0.02  # of a step
STEP, ROW, LOOK = "step", "row", "dear row"  # how often a part comes

# What is timed: where it lives, its name there, what it is, how often it comes.
PARTS: list[tuple[Any, str, str, str]] = [
    (telemetry, "after_first", "gradient squares of the first micro-batch", STEP),
    (vitals, "group_squares", "gradient squares by group (instead of one norm)", STEP),
    (telemetry, "learn_noise", "noise scale", STEP),
    (stability, "judge", "spike detector", STEP),
    (spikes, "tell_injection", "is this step injected?", STEP),
    (spikes, "tell", "spike events", STEP),
    (telemetry, "record_step", "row of steps.jsonl", STEP),
    (telemetry, "look_at_gradients", "gradient norms by layer", LOOK),
    (vitals, "probe", "probe: activations, attention logits", LOOK),
    (vitals, "norms", "weight norms", ROW),
    (vitals, "moment_norms", "norms of AdamW's moments", ROW),
    (vitals, "update_ratios", "update ratios", ROW),
    (memory, "reading", "memory", ROW),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["demo", "50m"], default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, help="of blocks with and without; 0: the parts alone")
    parser.add_argument("--blocks", type=int, default=3, help="in which the parts are timed")
    parser.add_argument(
        "--threads",
        type=int,
        help="of torch; with 1 the parts are timed in seconds of CPU: for a busy machine",
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    clock = time.process_time if args.threads == 1 and args.device == "cpu" else time.perf_counter
    pairs = (6 if args.model == "demo" else 0) if args.pairs is None else args.pairs
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        config = config_of(args.model, args.device, args.precision, Path(folder))
        with started(config, signals, True, args.device) as run:
            assert run is not None
            measure(run, pairs, args.blocks, clock, batch_tokens(args.model))


def config_of(model: str, device: str, precision: str, folder: Path) -> RunConfig:
    """A run like the demo's, or like the 50M one; on a CPU two short sequences a step for the latter."""
    big = load_config(gpu.CONFIG, {})
    config = big if model == "50m" else parse_config(demo.config_tree(1_000_000), "demo")
    changes: dict[str, Any] = {"run_dir": str(folder / "run"), "data.dir": str(folder / "corpus")}
    changes |= {"log.every": BLOCK, "telemetry.every": BLOCK, "telemetry.noise_scale": "groups"}
    changes |= {"training.precision": precision, "training.total_steps": 1_000_000}
    if device == "cpu":
        changes |= {"training.compile": "off"}
        if model == "50m":
            changes |= {"model.context": 256, "training.batch_tokens": 512, "training.micro_batch": 1}
    write_corpus(folder / "corpus", config.model.vocab)
    file = folder / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    return load_config(file, changes)


def batch_tokens(model: str) -> int:
    """Of the real run, which the shares are of."""
    small = demo.BATCH_BLOCKS * demo.CONTEXT
    return load_config(gpu.CONFIG, {}).training.batch_tokens if model == "50m" else small


def write_corpus(folder: Path, vocab: int) -> None:
    """Random tokens."""
    folder.mkdir()
    text = gpu.tokenizer_json(vocab)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    facts = {
        split: gpu.write_split(folder, split, n, vocab) for split, n in (("train", 4_000_000), ("val", 5_000))
    }
    manifest = gpu.corpus_manifest(vocab, hashlib.sha256(text.encode()).hexdigest(), facts)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


# The loop, without what it does between steps


def steps(run: Run, count: int) -> float:
    """Seconds of so many steps, with their rows."""
    assemble.synchronize(run.world)
    begun = time.perf_counter()
    for _ in range(count):
        one_step(run)
    assemble.synchronize(run.world)
    return time.perf_counter() - begun


def one_step(run: Run) -> None:
    """As `train.train_loop` does it."""
    batch, waited_s = run.reader.next(lambda: False)
    assert batch is not None
    begun = time.perf_counter()
    update = train.train_step(run, batch)
    assert update is not None
    run.step += 1
    if run.step % run.config.log.every == 0:
        assemble.synchronize(run.world)
    update.step_s, update.wait_s = time.perf_counter() - begun + waited_s, waited_s
    run.clock.count(update.step_s, waited_s)
    train.log(run, batch, update)


@contextmanager
def without(run: Run) -> Iterator[None]:
    """The loop as it would be with no telemetry at all."""
    nothing = torch.zeros(0, device=run.world.device)

    def one_square(decoder: torch.nn.Module) -> torch.Tensor:
        return optimizers.global_norm(w.grad for w in decoder.parameters() if w.grad is not None)[None] ** 2

    def judged(state: Any, step: int, loss: float, norm: float, settings: Any, clip: float) -> Any:
        verdict = "go" if math.isfinite(loss) and math.isfinite(norm) else "stop"
        return stability.Judged(verdict, clip, None, None, None, None, state)

    def plain_row(run: Run, *_: Any) -> dict[str, Any]:
        return {"param_norm": float(optimizers.global_norm(run.decoder.parameters()))}

    def silent(*_: Any, **__: Any) -> None:
        return None

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (telemetry, "micro_batch", lambda run, blocks: run.machine.micro_batch),
        (telemetry, "after_first", lambda *_: nothing),
        (telemetry, "learn_noise", silent),
        (telemetry, "look_at_gradients", silent),
        (telemetry, "row", torch.no_grad()(plain_row)),
        (vitals, "group_squares", one_square),
        (stability, "judge", judged),
        (spikes, "tell_injection", silent),
        (spikes, "tell", silent),
        (memory, "reading", lambda *_: {}),
        (telemetry, "record_step", silent),
        (run.records.steps, "append", silent),
        (run.watchdog, "enter", silent),
        (run.watchdog, "beat", silent),
    ]
    with ExitStack() as stack:
        for where, name, instead in replaced:
            stack.enter_context(patch.object(where, name, instead))
        yield


# Measuring


def measure(run: Run, pairs: int, blocks: int, clock: Clock, batch: int) -> None:
    get_ready(run)
    steps(run, BLOCK)  # the first ones allocate
    if pairs:
        with without(run):
            steps(run, BLOCK)
    run.screen.say = lambda *_: None  # type: ignore[method-assign]
    ratios = [ratios_of_a_pair(run, with_first=bool(n % 2)) for n in range(pairs)]
    seconds, step_s, split_s = timed_parts(run, blocks, clock)
    print(f"\n{description(run)}\n\nA step takes {step_s * 1000:,.1f} ms (median).")
    if (times := batch / run.config.training.batch_tokens) > 1:
        print(f"Shares are of a step of {batch:,} tokens at this pace: {times * step_s:,.0f} s.")
        step_s, split_s = times * step_s, 0.0
    tell_parts(run, seconds, step_s, split_s, blocks)
    if ratios:
        print(f"\nWith against without, {pairs} pairs of {BLOCK} steps, every row a dear one, median:\n")
    for kind, found in zip(("seconds", "seconds of CPU"), zip(*ratios, strict=True), strict=False):
        low, high = interval(found)
        print(
            f"- {kind}: {statistics.median(found) - 1:+.2%} of a step "
            f"(95 % interval {low - 1:+.2%} to {high - 1:+.2%})"
        )


def ratios_of_a_pair(run: Run, with_first: bool) -> tuple[float, float]:
    """Time with telemetry over time without, of a block each: by the clock, and of this process's threads
    (which other work on the machine does not lengthen)."""
    wall: dict[bool, float] = {}
    busy: dict[bool, float] = {}
    for on in (with_first, not with_first):
        with ExitStack() as stack:
            if not on:
                stack.enter_context(without(run))
            begun = time.process_time()
            wall[on] = steps(run, BLOCK)
            busy[on] = time.process_time() - begun
    return wall[True] / wall[False], busy[True] / busy[False]


def timed_parts(run: Run, blocks: int, clock: Clock) -> tuple[dict[str, list[float]], float, float]:
    """Seconds of each part's calls over some blocks; median seconds of a step; and how many more one takes
    that is split in two for the noise scale."""
    seconds: dict[str, list[float]] = defaultdict(list)
    inside: list[str] = []

    def timed(work: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:  # a part of a part: counted there
                return work(*args, **kwargs)
            inside.append(what)
            assemble.synchronize(run.world)
            begun = clock()
            try:
                return work(*args, **kwargs)
            finally:
                assemble.synchronize(run.world)
                seconds[what].append(clock() - begun)
                inside.pop()

        return call

    assert run.records is not None
    more = [
        (run.records.steps, "append", "row of steps.jsonl, written", STEP),
        (run.watchdog, "enter", "watchdog: marks", STEP),
        (run.watchdog, "beat", "watchdog: marks", STEP),
    ]
    whole = []
    with ExitStack() as stack:
        for where, name, what, _ in PARTS + more:
            stack.enter_context(patch.object(where, name, timed(getattr(where, name), what)))
        for _ in range(blocks * BLOCK):
            begun = clock()
            steps(run, 1)
            if run.step % BLOCK:
                whole.append(clock() - begun)
    return seconds, statistics.median(whole), cost_of_halves_s(run, clock)


def cost_of_halves_s(run: Run, clock: Clock, rounds: int = 10) -> float:
    """How many more seconds a step takes in two halves, if this run ever does that: median, in turns."""
    blocks = assemble.local_blocks(run.config, run.world)
    sizes = set()
    for turn in range(telemetry.SPLIT_EVERY):
        with patch.object(run, "step", turn):
            sizes.add(telemetry.micro_batch(run, blocks))
    if len(sizes) == 1:
        return 0.0
    batch, _ = run.reader.next(lambda: False)
    assert batch is not None
    differences = []
    for _ in range(rounds):
        took = []
        for size in (blocks, -(-blocks // 2)):
            begun = clock()
            with patch.object(telemetry, "micro_batch", lambda *_, size=size: size):
                train.accumulate(run, batch.tokens)
            took.append(clock() - begun)
            run.optimizer.zero_grad(set_to_none=True)
        differences.append(took[1] - took[0])
    run.step += 1  # the reader is ahead by the batch used here
    return statistics.median(differences)


def tell_parts(run: Run, seconds: dict[str, list[float]], step_s: float, split_s: float, blocks: int) -> None:
    every = {STEP: 1, ROW: LogConfig().every, LOOK: TelemetryConfig().every}
    often = {what: how for _, _, what, how in PARTS}
    print("\n| part | every | ms each time | share of step time |")
    print("|---|---|---|---|")
    total = 0.0
    for what, each_s in seconds.items():
        how = often.get(what, STEP)
        once_s = sum(each_s) / blocks / (BLOCK if how == STEP else 1)  # in one step, or for one row
        share = once_s / every[how] / step_s
        total += share
        when = f"{every[how]} steps" if every[how] > 1 else "step"
        print(f"| {what} | {when} | {1000 * once_s:.3f} | {share:.3%} |")
    if split_s:
        share = split_s / telemetry.SPLIT_EVERY / step_s
        total += max(0.0, share)
        print(
            f"| a step in two halves | {telemetry.SPLIT_EVERY} steps | {1000 * split_s:.3f} | {share:.3%} |"
        )
    print(f"| all | | | {total:.3%} {'(' if total < LIMIT else '(not '}below {LIMIT:.0%}) |")
    for what, tick_s, look in threads(run):
        begun = time.perf_counter()
        for _ in range(5):
            look()
        took = (time.perf_counter() - begun) / 5
        print(f"| in a thread: {what} | {tick_s:g} s | {took * 1000:.3f} | {took / tick_s:.3%} of one core |")


def threads(run: Run) -> Iterator[tuple[str, float, Callable[[], object]]]:
    yield "watchdog", run.watchdog._tick_s, run.watchdog.look


def description(run: Run) -> str:
    where, model = run.world.device, run.config.model
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return (
        f"{run.config.name}: {sum(w.numel() for w in run.decoder.parameters()):,} weights, "
        f"{run.config.training.batch_tokens:,} tokens a step in micro-batches of {run.machine.micro_batch} x "
        f"{model.context}, {run.machine.precision}, compile {run.machine.compile_mode}; {name}, torch "
        f"{torch.__version__}"
    )


def interval(ratios: tuple[float, ...]) -> tuple[float, float]:
    """Of the median, by resampling the pairs."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


if __name__ == "__main__":
    main()
