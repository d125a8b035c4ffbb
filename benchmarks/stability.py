"""How well are loss spikes noticed? `stability.judge` against two published rules, on the same traces.

    python benchmarks/stability.py                     all tables, about ten minutes on two cores
    python benchmarks/stability.py --only synthetic    traces made up from a law and noise: two minutes
    python benchmarks/stability.py --only real         models trained here on Python's own source
    python benchmarks/stability.py --only response     the same, with five batches of rare tokens, by policy

The peers, written from their descriptions: "mean + 6 sigma", the rule of OLMo-core's SkipStepAdamW (loss or
gradient norm above the mean of the last 128 steps by 6 standard deviations; the spike itself enters them);
ZClip (arXiv 2504.02507: gradient norm above its moving average, alpha 0.97, by 2.5 deviations).
"""

from __future__ import annotations

import sys

sys.path.sort(key=__file__.rpartition("/")[0].__eq__)  # this folder last: it has another `tokenize`

import argparse
import copy
import functools
import math
import os
import platform
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from x1_pretrain.config import ModelConfig, OptimizerConfig, StabilityConfig
from x1_pretrain.corpus.vocabulary import train_tokenizer
from x1_pretrain.learning import optimizers, stability
from x1_pretrain.learning.schedule import learning_rate
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import summed_loss

Floats = NDArray[np.float64]

WATCH, CUT = StabilityConfig(policy="watch"), StabilityConfig(policy="clip")
CLIP = 1.0


class Trace(NamedTuple):
    """What a rule sees of a run: one loss and one gradient norm a step."""

    losses: Floats
    norms: Floats


Rule = Callable[[Trace], list[bool]]  # for each step, whether it stands out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("synthetic", "real", "response"))
    parser.add_argument("--traces", type=int, default=20, help="made-up traces for each cell (20)")
    parser.add_argument("--steps", type=int, default=600, help="steps of each real run (600)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {cost()}")
    if args.only in (None, "synthetic"):
        show(false_alarms_made_up(args.traces))
        show(detection(args.traces))
        show(special_cases(args.traces))
    if args.only in (None, "real"):
        show(false_alarms_real(args.steps))
    if args.only in (None, "response"):
        show(responses(args.steps))
    print(f"\n{time.perf_counter() - began_s:.0f} s")


def show(lines: Iterator[str]) -> None:
    print()
    for line in lines:
        print(line, flush=True)


def cost() -> str:
    """Of one call with full windows."""
    trace = clean(np.random.default_rng(0), 1200, NOISES["large batch"])
    state = stability.State()
    for step in range(200):
        state = follow(state, step, trace)
    fastest_s = math.inf
    for first_step in range(200, 1200, 100):
        begun = time.perf_counter()
        for step in range(first_step, first_step + 100):
            state = follow(state, step, trace)
        fastest_s = min(fastest_s, time.perf_counter() - begun)
    return f"judge takes {fastest_s * 10:.3f} ms a step"


def follow(state: stability.State, step: int, trace: Trace) -> stability.State:
    loss, norm = float(trace.losses[step]), float(trace.norms[step])
    return stability.judge(state, step + 1, loss, norm, WATCH, CLIP).state


# ------------------------------------------------------------------------------------------------------------
# The rules


def ours(trace: Trace) -> list[bool]:
    return [judged.flagged for judged in judgements(trace)]


def judgements(trace: Trace, settings: StabilityConfig = WATCH) -> list[stability.Judged]:
    state, all_of_them = stability.State(), []
    for step, (loss, norm) in enumerate(zip(trace.losses.tolist(), trace.norms.tolist(), strict=True), 1):
        all_of_them.append(stability.judge(state, step, loss, norm, settings, CLIP))
        state = all_of_them[-1].state
    return all_of_them


def mean_and_sigma(trace: Trace, window: int = 128, sigmas: float = 6.0) -> list[bool]:
    """From half a window on, as the original."""

    def above(values: Floats, step: int) -> bool:
        before = values[max(0, step - window) : step]
        return bool(values[step] > before.mean() + sigmas * before.std(ddof=1))

    return [
        step >= window // 2 and (above(trace.losses, step) or above(trace.norms, step))
        for step in range(len(trace.losses))
    ]


def zclip(trace: Trace, alpha: float = 0.97, limit: float = 2.5, warmup: int = 25) -> list[bool]:
    """The average follows the clipped norm: the further out, the more it is cut."""
    first = trace.norms[:warmup]
    mean, variance = float(first.mean()), float(first.var())
    flags = [False] * warmup
    for norm in trace.norms[warmup:].tolist():
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        flags.append(z > limit)
        kept = mean + limit * limit / z * math.sqrt(variance) if z > limit else norm
        variance = alpha * variance + (1 - alpha) * (kept - mean) ** 2
        mean = alpha * mean + (1 - alpha) * kept
    return flags


RULES: dict[str, Rule] = {"x1": ours, "mean + 6 sigma": mean_and_sigma, "ZClip": zclip}


# ------------------------------------------------------------------------------------------------------------
# Made-up traces


@dataclass(frozen=True)
class Noise:
    """Standard deviations at the end of a run: of the loss in nats, of the log of the gradient norm."""

    loss: float
    norm: float


NOISES = {"large batch": Noise(0.012, 0.06), "small batch": Noise(0.06, 0.2)}


def clean(rng: np.random.Generator, steps: int, noise: Noise) -> Trace:
    """A power law from 10.4 nats; a gradient norm with a hump in the warm-up and a slow drift. Heavy tails
    (Student's t, 5 degrees of freedom), wider while the loss is high, a part of it lasting for some steps."""
    t = np.arange(steps)
    law = 2.8 + 7.6 * (1 + t / 60) ** -0.5
    width = noise.loss * (0.5 + 0.5 * law / 3.5)
    losses = law + width * (0.95 * heavy(rng, steps) + 0.3 * lasting(rng, steps))
    hump = 1.2 * np.exp(-(((t - 60) / 40) ** 2)) + 1.5 * np.exp(-t / 15)
    drift = np.cumsum(rng.normal(0, 0.003, steps))
    log_norms = -1.0 + hump + drift + noise.norm * (0.95 * heavy(rng, steps) + 0.3 * lasting(rng, steps))
    return Trace(losses, np.exp(log_norms))


def heavy(rng: np.random.Generator, steps: int) -> Floats:
    return rng.standard_t(5, steps) / math.sqrt(5 / 3)


def lasting(rng: np.random.Generator, steps: int, keep: float = 0.9) -> Floats:
    """An AR(1) of unit width."""
    values, fresh = np.zeros(steps), rng.normal(0, math.sqrt(1 - keep**2), steps)
    for step in range(1, steps):
        values[step] = keep * values[step - 1] + fresh[step]
    return values


def spiked(trace: Trace, at: int, height: float, factor: float, shape: Floats) -> Trace:
    """`height` nats and `factor` on the gradient norm at the top of the shape, from index `at` on."""
    whole = np.zeros(len(trace.losses))
    end = min(at + len(shape), len(whole))
    whole[at:end] = shape[: end - at]
    return Trace(trace.losses + height * whole, trace.norms * factor**whole)


SHAPES: dict[str, Floats] = {
    "one step": np.ones(1),
    "5 steps": np.ones(5),
    "5 steps, then back slowly": np.concatenate([np.ones(5), np.exp(-np.arange(1, 60) / 15)]),
    "rises over 30 steps": np.concatenate([np.arange(1, 31) / 30, np.exp(-np.arange(1, 60) / 15)]),
}
SIZES = ((0.05, 1.5), (0.2, 2.0), (0.5, 5.0), (1.0, 10.0), (5.0, 100.0))  # nats, times the norm


# ------------------------------------------------------------------------------------------------------------
# Tables of made-up traces


def table(*heads: str) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"


def false_alarms_made_up(traces: int, steps: int = 4000) -> Iterator[str]:
    yield f"False alarms per 10,000 steps: {traces} made-up clean runs of {steps} steps each\n"
    yield from table("", *RULES, "x1: episodes")
    for name, noise in NOISES.items():
        runs = [clean(np.random.default_rng(seed), steps, noise) for seed in range(traces)]
        yield f"| {name} | {rates(runs)} |"


def rates(runs: Sequence[Trace]) -> str:
    """Cells: steps that stand out per 10,000, by rule; then the episodes that ours opens."""
    steps = sum(len(run.losses) for run in runs)
    found = [sum(sum(rule(run)) for run in runs) for rule in RULES.values()]
    found.append(sum(j.began is not None for run in runs for j in judgements(run)))
    return " | ".join(f"{1e4 * n / steps:.1f}" for n in found)


def detection(traces: int, at: int = 300) -> Iterator[str]:
    yield f"Spikes noticed, of {traces} each (median delay in steps where not 0)\n"
    yield from table("", "nats, norm", *(f"{n}: {rule}" for n in NOISES for rule in RULES))
    for name, shape in SHAPES.items():
        for height, factor in SIZES:
            cells = []
            for noise in NOISES.values():
                steps, seeds = at + len(shape), range(9000, 9000 + traces)
                runs = [clean(np.random.default_rng(seed), steps, noise) for seed in seeds]
                runs = [spiked(run, at, height, factor, shape) for run in runs]
                cells += [noticed(rule, runs, at, len(shape)) for rule in RULES.values()]
            yield f"| {name} | {height:g}, x{factor:g} | {' | '.join(cells)} |"


def noticed(rule: Rule, runs: Sequence[Trace], at: int, length: int) -> str:
    """Of runs with a spike from index `at` on, in how many some step of it stands out, and how late."""
    delays = []
    for run in runs:
        flags = rule(run)
        delays += [d for d in (first(flags[at : at + length]),) if d is not None]
    late = statistics.median(delays) if delays else 0
    return f"{len(delays)}" + (f" ({late:g})" if late else "")


def first(flags: Sequence[bool]) -> int | None:
    return next((i for i, flag in enumerate(flags) if flag), None)


def special_cases(traces: int) -> Iterator[str]:
    yield f"Particular cases, both noises: 1 nat and x10 for 5 steps unless said otherwise; of {2 * traces}\n"
    yield from table("", *RULES)
    for name, at, start in (
        ("early: at step 40", 39, 0),
        ("early: at step 70", 69, 0),
        ("5 steps after a resume, state kept", 1005, 0),
        ("5 steps after a resume, state lost", 1005, 1000),
    ):
        runs = [spiked(run, at, 1.0, 10.0, np.ones(5)) for run in both(traces, at + 50)]
        runs = [Trace(run.losses[start:], run.norms[start:]) for run in runs]
        cells = [noticed(rule, runs, at - start, 5) for rule in RULES.values()]
        yield f"| {name} | {' | '.join(cells)} |"
    runs = both(traces, 700)
    for at in (500, 520, 540):
        runs = [spiked(run, at, 1.0, 10.0, np.ones(5)) for run in runs]
    cells = [noticed(rule, runs, 540, 5) for rule in RULES.values()]
    yield f"| the third of three, 20 steps apart | {' | '.join(cells)} |"
    runs = [spiked(run, 500, 0.3, 1.5, np.ones(500)) for run in both(traces, 1000)]
    cells = [f"{shifted(rule, runs, 500):.1f}" for rule in RULES.values()]
    yield f"| a lasting shift of 0.3 nats, x1.5: steps flagged in a run | {' | '.join(cells)} |"
    cells = [f"{shifted(rule, runs, 600):.1f}" for rule in RULES.values()]
    yield f"| ... from 100 steps after it on | {' | '.join(cells)} |"


def both(traces: int, steps: int) -> list[Trace]:
    return [clean(np.random.default_rng(s), steps, noise) for noise in NOISES.values() for s in range(traces)]


def shifted(rule: Rule, runs: Sequence[Trace], since: int) -> float:
    return sum(sum(rule(run)[since:]) for run in runs) / len(runs)


# ------------------------------------------------------------------------------------------------------------
# Real runs: tiny models on the source of Python's standard library


@dataclass(frozen=True)
class Recipe:
    seed: int
    lr: float
    sequences: int  # of a batch
    warmup: int
    schedule: Literal["cosine", "wsd"]
    qk_norm: bool


RECIPES = (
    Recipe(0, 3e-3, 16, 50, "cosine", False),
    Recipe(1, 1e-2, 16, 50, "wsd", False),
    Recipe(2, 3e-3, 8, 150, "cosine", True),
    Recipe(3, 3e-2, 8, 20, "cosine", True),
    Recipe(4, 1e-3, 16, 0, "wsd", False),
    Recipe(5, 1e-2, 4, 100, "cosine", False),
    Recipe(6, 2e-3, 64, 100, "cosine", True),
)
CONTEXT, VOCABULARY, TEXT_CHARS = 128, 1024, 6_000_000


@functools.cache
def source_tokens() -> Tensor:
    library, texts, total = Path(sysconfig.get_path("stdlib")), [], 0
    for file in (*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))):
        if total < TEXT_CHARS and "site-packages" not in file.parts:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
            total += len(texts[-1])
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts[:150], VOCABULARY)
    return torch.tensor(np.concatenate([tokenizer.encode(text) for text in texts]).astype(np.int64))


class Trainer:
    """A model, its optimizer and its place in a run."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self.recipe, self.steps, self.step = recipe, steps, 0
        shape = {"layers": 2, "d_model": 64, "heads": 4, "kv_heads": 4, "d_ff": 192}
        model = ModelConfig(**shape, context=CONTEXT, vocab_size=VOCABULARY, qk_norm=recipe.qk_norm)
        self.decoder = Decoder(model, seed=recipe.seed)
        self.settings = OptimizerConfig(
            lr=recipe.lr, min_lr=recipe.lr / 10, warmup_steps=recipe.warmup, schedule=recipe.schedule
        )
        self.optimizer = optimizers.build(self.decoder, self.settings, torch.device("cpu"))
        self.draws = torch.Generator().manual_seed(recipe.seed)
        self.state = stability.State()

    def batch(self) -> Tensor:
        ids = source_tokens()
        starts = torch.randint(0, len(ids) - CONTEXT - 1, (self.recipe.sequences,), generator=self.draws)
        return torch.stack([ids[start : start + CONTEXT + 1] for start in starts.tolist()])  # (B, T + 1)

    def update(self, batch: Tensor, settings: StabilityConfig) -> stability.Judged:
        """One step as the training loop makes it."""
        hidden = self.decoder.hidden(batch[:, :-1]).flatten(0, 1)  # (B T, d)
        targets = batch[:, 1:].flatten()  # (B T,)
        mean = summed_loss(hidden, self.decoder.output_weight, targets, VOCABULARY, 4096) / len(targets)
        torch.autograd.backward(mean)
        weights = list(self.decoder.parameters())
        norm = optimizers.global_norm(w.grad for w in weights if w.grad is not None)
        self.loss, self.norm = float(mean.detach()), float(norm)
        judged = stability.judge(self.state, self.step + 1, self.loss, self.norm, settings, CLIP)
        self.state = judged.state
        if judged.verdict == "go":
            optimizers.clip_(weights, judged.clip, norm)
            rate = learning_rate(self.step, self.settings, self.steps)
            optimizers.set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return judged


def real_trace(recipe: Recipe, steps: int) -> Trace:
    trainer, seen = Trainer(recipe, steps), []
    for _ in range(steps):
        trainer.update(trainer.batch(), WATCH)
        seen.append((trainer.loss, trainer.norm))
    return Trace(*np.array(seen).T)


def false_alarms_real(steps: int) -> Iterator[str]:
    yield f"False alarms per 10,000 steps: real clean runs of {steps} steps, 2 layers, d = 64\n"
    yield from real_tables(RECIPES, (real_trace(recipe, steps) for recipe in RECIPES))


def real_tables(recipes: Sequence[Recipe], traces: Iterable[Trace]) -> Iterator[str]:
    yield from table("lr, sequences, warm-up", *RULES, "x1: episodes", "cut below 1.0 by policy clip")
    runs = []
    for recipe, trace in zip(recipes, traces, strict=True):
        runs.append(trace)
        what = f"{recipe.lr:g} {recipe.schedule}{', QK-norm' if recipe.qk_norm else ''}"
        yield (
            f"| {what}, {recipe.sequences}, {recipe.warmup} | {rates(runs[-1:])} | {cut_share(runs[-1:])} |"
        )
    yield f"| all {len(runs)} | {rates(runs)} | {cut_share(runs)} |"
    yield from ("", "Largest deviations of these runs, and steps above 4:\n")
    yield from table("", "largest", "above 4, of 10,000 steps")
    for name in ("loss_z", "grad_z"):
        z = np.array([getattr(j, name) for run in runs for j in judgements(run) if j.loss_z is not None])
        yield f"| `{name}` | {z.max():.1f} | {1e4 * np.mean(z > 4):.1f} |"


def cut_share(runs: Sequence[Trace]) -> str:
    """Of the steps, those whose gradient is cut to less than it would be without adaptive clipping."""
    judged = [(j, norm) for run in runs for j, norm in zip(judgements(run, CUT), run.norms, strict=True)]
    return f"{np.mean([j.clip < CLIP and norm > j.clip for j, norm in judged]):.1%}"


# ------------------------------------------------------------------------------------------------------------
# What each policy makes of the same bad batches


def responses(steps: int, after: int = 150) -> Iterator[str]:
    yield f"Five batches of the rarest 1 % of tokens after {steps // 2} steps, by policy\n"
    yield from table(
        "lr", "policy", "peak, nats above", "back after, steps", "loss it leaves, nats", "skipped"
    )
    for recipe in (RECIPES[0], RECIPES[1], RECIPES[3]):
        before = Trainer(recipe, steps)
        for _ in range(steps // 2):
            before.update(before.batch(), WATCH)
        without = response(copy.deepcopy(before), WATCH, after, injected=0)
        for policy in ("watch", "clip", "skip"):
            settings = StabilityConfig(policy=policy)
            found = response(copy.deepcopy(before), settings, after, injected=5)
            yield f"| {recipe.lr:g} | {policy} | {' | '.join(summary(found, without))} |"


class Response(NamedTuple):
    losses: Floats  # of the data that are not injected
    peak: float
    skipped: int


def response(trainer: Trainer, settings: StabilityConfig, after: int, injected: int) -> Response:
    ids = source_tokens()
    rare = torch.bincount(ids, minlength=VOCABULARY).argsort()[: VOCABULARY // 100]
    losses, peak, skipped = [], 0.0, 0
    for number in range(injected + after):
        batch = trainer.batch() if number >= injected else rare_batch(rare, trainer)
        judged = trainer.update(batch, settings)
        skipped += judged.verdict == "skip"
        peak = max(peak, trainer.loss)
        if number >= injected:
            losses.append(trainer.loss)
    return Response(np.array(losses), peak, skipped)


def rare_batch(rare: Tensor, trainer: Trainer) -> Tensor:
    draws = torch.Generator().manual_seed(trainer.step)
    return rare[torch.randint(0, len(rare), (trainer.recipe.sequences, CONTEXT + 1), generator=draws)]


def summary(found: Response, without: Response) -> Iterator[str]:
    """Against the same run without the bad batches, which reads the same data afterwards."""
    more = found.losses - without.losses
    smooth = np.convolve(more, np.ones(5) / 5, mode="valid")
    back = first([bool(value < 0.05) for value in smooth])
    yield f"{found.peak - statistics.median(without.losses):.2f}"
    yield "not within these" if back is None else f"{back}"
    yield f"{more[:50].mean():.3f} (first 50 steps), {more[-50:].mean():.3f} (last 50)"
    yield f"{found.skipped}"


if __name__ == "__main__":
    main()
