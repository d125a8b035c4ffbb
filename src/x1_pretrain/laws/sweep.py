"""Which runs measure a law on given budgets: sizes, tokens, cooldowns, and whether the optimum is among them.

Pure arithmetic. A size on a budget is one run, the trunk. With cooldowns its checkpoints start shorter runs
that share its beginning and have a decay of their own (`x1 train --branch-from`): each is a valid point, as
if it had been trained alone, for the FLOPs of its decay. Points of one trunk are one cluster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from x1_pretrain.config import DECAY_SHARE, ModelConfig
from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import Counts
from x1_pretrain.learning.recipe import recipe
from x1_pretrain.model import shapes
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.numbers import compact, flop, human

Count = Literal[
    "true", "6n"
]  # what a budget of FLOPs counts: all the work, or 6 FLOPs a parameter in matrices

SPAN = 20.0  # the shortest cooldown has the trunk's tokens over this, unless asked otherwise
MIN_STEPS = 100  # of the shortest run: a loss after fewer updates is about the optimizer
FEWEST_STEPS = 5  # below this a run has no warm-up, no decay and no meaning
WARMUP_SHARE = 0.25  # of the shortest run that shares it, at most
DEFAULT_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the expected optimum
ALIKE = 1.05  # budgets within this factor are one


@dataclass(frozen=True)
class PlannedRun:
    """One training run, and one point."""

    name: str
    trunk: str  # the name of the run whose beginning it shares; its own for a trunk
    budget: float  # FLOPs, as `count` of the plan counts them
    model: ModelConfig
    steps: int
    batch_tokens: int
    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    branch_step: int = 0  # of the trunk's checkpoint that it starts from
    save_at: tuple[int, ...] = ()  # checkpoints of a trunk that others start from

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def own_tokens(self) -> int:
        """Trained by this run itself."""
        return (self.steps - self.branch_step) * self.batch_tokens

    @property
    def matrices(self) -> int:
        return parameter_counts(self.model).matrices

    @property
    def total(self) -> int:
        return parameter_counts(self.model).total

    @property
    def flops(self) -> float:
        """All the work behind the point, the trunk's part included."""
        return self.tokens * flops_per_token(self.model).causal

    @property
    def own_flops(self) -> float:
        return self.own_tokens * flops_per_token(self.model).causal

    @property
    def six_nd(self) -> float:
        return self.tokens * flops_per_token(self.model).six_n

    @property
    def is_trunk(self) -> bool:
        return self.trunk == self.name


def label(parameters: float) -> str:
    """5.16M, 426k: a size as part of a name."""
    return compact(parameters) if parameters >= 1e6 else f"{parameters / 1e3:.3g}k"


def tokens_on(model: ModelConfig, budget: float, count: Count) -> float:
    """What the budget pays for."""
    flops = flops_per_token(model)
    return budget / (flops.causal if count == "true" else flops.six_n)


def plan(
    sizes: Mapping[float, Sequence[ModelConfig]],
    count: Count = "true",
    cooldowns: int = 1,
    batch_tokens: int | None = None,
    span: float = SPAN,
) -> tuple[PlannedRun, ...]:
    """The runs for each budget and its models, each trunk before its branches. What rounding made the same,
    models or points, is there once."""
    runs: list[PlannedRun] = []
    for budget, models in sizes.items():
        distinct = list(dict.fromkeys(models))
        batch = batch_tokens or batch_for(distinct, budget, count, span if cooldowns > 1 else 1.0)
        for model in sorted(distinct, key=lambda m: parameter_counts(m).matrices):
            runs += family(model, budget, count, lengths_of(cooldowns, span), batch)
    return _named_apart(runs)


def batch_for(models: Sequence[ModelConfig], budget: float, count: Count, span: float) -> int:
    """One batch for a budget: by the rule, and so small that its shortest run still has MIN_STEPS."""
    ruled = min(recipe(model, tokens_on(model, budget, count)).batch_tokens for model in models)
    least = min(models, key=lambda model: tokens_on(model, budget, count))
    shortest = tokens_on(least, budget, count) / span
    sequences = shortest / MIN_STEPS / least.context
    if sequences < 1:
        raise UserError(
            f"--flops {flop(budget)}: the shortest run of size {label(parameter_counts(least).matrices)} "
            f"would have {human(shortest)} tokens, not even {MIN_STEPS} steps of one sequence of "
            f"{least.context}; give more FLOPs, leave that size out, or choose --batch-tokens or a shorter "
            "--context yourself"
        )
    return min(ruled, int(2 ** math.floor(math.log2(sequences))) * least.context)


def family(
    model: ModelConfig, budget: float, count: Count, parts: Sequence[float], batch: int
) -> list[PlannedRun]:
    """A trunk and its branches, longest last but for the trunk, which comes first."""
    steps = round(tokens_on(model, budget, count) / batch)
    shorter, own = lengths(steps, parts)[:-1], recipe(model, max(1, steps) * batch, batch)
    shortest = min([steps, *shorter])
    matrices = label(parameter_counts(model).matrices)
    if shortest < FEWEST_STEPS:
        raise UserError(
            f"--flops {flop(budget)}: a run of size {matrices} would have {shortest} steps of {batch:,} "
            f"tokens; {FEWEST_STEPS} are the least: give more FLOPs or fewer --batch-tokens"
        )
    trunk = PlannedRun(
        name=f"{matrices}-{flop(budget)}",
        trunk=f"{matrices}-{flop(budget)}",
        budget=budget,
        model=model,
        steps=steps,
        batch_tokens=batch,
        lr=own.lr,
        min_lr=own.min_lr,
        warmup_steps=min(own.warmup_steps, max(1, int(WARMUP_SHARE * shortest))),
        decay_steps=decay_of(steps),
    )
    branches = [
        replace(
            trunk,
            name=f"{trunk.name}-{length}steps",
            steps=length,
            decay_steps=decay_of(length),
            branch_step=length - decay_of(length),
        )
        for length in shorter
    ]
    return [replace(trunk, save_at=tuple(sorted({b.branch_step for b in branches}))), *branches]


def decay_of(steps: int) -> int:
    return max(1, round(DECAY_SHARE * steps))


def lengths_of(points: int, span: float = SPAN) -> list[float]:
    """The points of one trunk as shares of it, evenly spaced on a log scale, its own end last."""
    return [span ** (-back / (points - 1)) for back in range(points - 1, 0, -1)] + [1.0]


def lengths(steps: int, parts: Sequence[float]) -> list[int]:
    """In steps; what rounding makes the same is there once."""
    return sorted({round(steps * part) for part in parts})


def _named_apart(runs: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Two models whose sizes read the same get their exact ones."""
    seen = Counter(run.name for run in runs)
    return tuple(
        replace(
            run,
            name=run.name.replace(label(run.matrices), str(run.matrices), 1),
            trunk=run.trunk.replace(label(run.matrices), str(run.matrices), 1),
        )
        if seen[run.trunk] > 1
        else run
        for run in runs
    )


# ------------------------------------------------------------------------------------------------------------
# Where the optimum is expected


@dataclass(frozen=True)
class Bracket:
    """The sizes on one budget against the optimum that published laws expect there, by one count of N."""

    budget: float
    counts: Counts
    smallest: float
    largest: float
    optimum: float  # of our refit ...
    low: float  # ... and over all published laws
    high: float

    @property
    def holds(self) -> bool:
        return self.smallest < self.optimum < self.largest


def bracket(trunks: Sequence[PlannedRun], counts: Counts, count: Count) -> Bracket:
    """Of the trunks on one budget: the optimum is that of all shapes there are, each on what it can pay."""
    sizes = [_sized(run.model, counts) for run in trunks]
    budget, model = trunks[0].budget, trunks[0].model
    ladder = _ladder(model.vocab, model.context)

    def optimum(law: forms.Law) -> float:
        def nats(shape: ModelConfig) -> float:
            return float(forms.loss(law, _sized(shape, counts), tokens_on(shape, budget, count)))

        return _sized(min(ladder, key=nats), counts)

    optima = [optimum(known.law) for known in forms.PUBLISHED]
    refit = optimum(forms.REFIT.law)
    return Bracket(budget, counts, min(sizes), max(sizes), refit, min(optima), max(optima))


def _sized(model: ModelConfig, counts: Counts) -> float:
    found = parameter_counts(model)
    return float(found.total if counts == "total" else found.matrices)


def _ladder(vocab_size: int, context: int) -> list[ModelConfig]:
    """From the smallest toy."""
    return shapes.ladder(vocab_size, context, low=1.0)


def size_to_add(found: Bracket, vocab_size: int, context: int) -> float | None:
    """Parameters in matrices of the size that would put the optimum in between; None where it is already."""
    if found.holds:
        return None
    wanted = found.optimum * (2.0 if found.optimum >= found.largest else 0.5)
    nearest = min(
        _ladder(vocab_size, context), key=lambda shape: abs(math.log(_sized(shape, found.counts) / wanted))
    )
    return float(parameter_counts(nearest).matrices)


def default_models(budget: float, count: Count, vocab_size: int, context: int) -> list[ModelConfig]:
    """The one that our refit expects to be best on the budget, and two on each side. The refit counts all
    parameters, so the steps between them are in all parameters too."""

    def expected(model: ModelConfig) -> float:
        tokens = tokens_on(model, budget, count)
        return float(forms.loss(forms.REFIT.law, parameter_counts(model).total, tokens))

    ladder = _ladder(vocab_size, context)
    best = parameter_counts(min(ladder, key=expected)).total
    return [_of_total(best * factor, ladder) for factor in DEFAULT_SIZES]


def _of_total(wanted: float, ladder: Sequence[ModelConfig]) -> ModelConfig:
    return min(ladder, key=lambda model: abs(math.log(parameter_counts(model).total / wanted)))


def apart(trunks: Sequence[PlannedRun]) -> float:
    """Most over least true FLOPs of runs that are meant for one budget."""
    work = [run.flops for run in trunks]
    return max(work) / min(work)


# ------------------------------------------------------------------------------------------------------------
# What it takes


@dataclass(frozen=True)
class Pace:
    """How fast a machine trains, and what says so."""

    basis: str
    flops_per_sec: float | None = None  # true FLOPs, measured
    palm_flops_per_sec: float | None = None  # MFU x peak, in the convention of MFU

    def seconds(self, run: PlannedRun) -> float | None:
        """Of the run's own training; None where no speed is known."""
        if self.flops_per_sec:
            return run.own_flops / self.flops_per_sec
        if self.palm_flops_per_sec:
            return run.own_tokens * flops_per_token(run.model).palm / self.palm_flops_per_sec
        return None


def disk_bytes(runs: Sequence[PlannedRun]) -> float:
    """Of the checkpoints that stay: the first and the last of each run, and those that others start from."""
    return sum(12.0 * run.total * (2 + len(run.save_at)) for run in runs)
