"""How to train a given model on given tokens: batch, steps, learning rate, warm-up, decay. Pure.

Each value comes with its formula and where that comes from. The rules hold for AdamW and a dense decoder;
they were fitted between 1e17 and 2e19 FLOPs, and outside of that each line says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from x1_pretrain.config import DECAY_SHARE, ModelConfig
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.numbers import flop, human

DEEPSEEK = "DeepSeek LLM 2024, arXiv 2401.02954"
LR_SCALE, LR_POWER = 0.3118, -0.125  # lr = scale x C^power, C in FLOPs without embeddings
BATCH_SCALE, BATCH_POWER = 0.2920, 0.3271  # tokens = scale x C^power
FITTED_FLOPS = (1e17, 2e19)  # where both were fitted
WARMUP_SHARES = (0.01, 0.10)  # of the steps: never shorter, never longer


@dataclass(frozen=True)
class Derived:
    """A number of the plan, and how it came to be."""

    name: str
    value: float
    shown: str
    formula: str  # with words
    numbers: str  # the same with the numbers put in
    source: str


@dataclass(frozen=True)
class Recipe:
    batch_tokens: int
    steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    lines: tuple[Derived, ...]

    @property
    def tokens(self) -> int:
        return self.batch_tokens * self.steps


def recipe(model: ModelConfig, tokens: float, batch_tokens: int | None = None, ranks: int = 1) -> Recipe:
    """The recipe for at most `tokens`; `batch_tokens` overrides the rule for the batch."""
    flops = body_flops_per_token(model) * tokens
    batch = batch_line(model, flops, batch_tokens, ranks)
    steps = max(1, int(tokens // batch.value))
    warmup = warmup_line(parameter_counts(model).matrices, batch.value, steps)
    decay = round(DECAY_SHARE * steps)
    rate = lr_line(flops)
    lines = (batch, _steps_line(tokens, batch.value, steps), rate, warmup, _decay_line(steps, decay))
    return Recipe(int(batch.value), steps, rate.value, 0.0, int(warmup.value), decay, lines)


def body_flops_per_token(model: ModelConfig) -> float:
    """What DeepSeek's formulas call M: no vocabulary, attention as if not causal."""
    return flops_per_token(model).palm - 6.0 * model.vocab * model.d_model


def batch_rule(flops: float) -> float:
    """Tokens a step."""
    return BATCH_SCALE * math.pow(flops, BATCH_POWER)


def lr_rule(flops: float) -> float:
    """Below the FLOPs it was fitted on it stays: at 6e11 the formula gives 0.011, which left a model of 98k
    at 3.70 nats where 0.003 came to 3.31."""
    return LR_SCALE * math.pow(max(flops, FITTED_FLOPS[0]), LR_POWER)


def batch_line(model: ModelConfig, flops: float, given: int | None, ranks: int) -> Derived:
    """Tokens a step: a power of two of sequences a rank, so that it divides into micro-batches."""
    if given is not None:
        return Derived("batch", given, f"{given:,} tokens", "given", "as given", "--batch-tokens")
    best = batch_rule(flops)
    per_rank = 2 ** max(0, round(math.log2(best / (model.context * ranks))))
    tokens = per_rank * ranks * model.context
    numbers = (
        f"{BATCH_SCALE} x ({flop(flops)})^{BATCH_POWER} = {human(best)} -> {per_rank * ranks:,} sequences x "
        f"{model.context:,}"
    )
    formula = f"{BATCH_SCALE} C^{BATCH_POWER}, to a power of two of sequences"
    return Derived("batch", tokens, f"{tokens:,} tokens", formula, numbers, DEEPSEEK + _outside(flops))


def lr_line(flops: float) -> Derived:
    """The highest rate, to two digits: more would be a pretence."""
    rate = float(f"{lr_rule(flops):.1e}")
    numbers = f"{LR_SCALE} x ({flop(max(flops, FITTED_FLOPS[0]))})^{LR_POWER} = {lr_rule(flops):.3g}"
    formula = f"{LR_SCALE} C^{LR_POWER}, C = 6N D + attention, no vocabulary"
    return Derived("learning rate", rate, f"{rate:.2g}", formula, numbers, DEEPSEEK + _outside(flops))


def warmup_line(n: float, batch_tokens: float, steps: int) -> Derived:
    """As many tokens as parameters: longer only costs, above all in small models."""
    low, high = (max(1, round(share * steps)) for share in WARMUP_SHARES)
    wanted = math.ceil(n / batch_tokens)
    chosen = min(max(wanted, low), high, steps)
    numbers = f"{human(n)} / {batch_tokens:,.0f} = {wanted:,}, within [{low:,}, {high:,}]"
    formula = "N tokens, within 1 % and 10 % of the steps"
    return Derived(
        "warm-up", chosen, f"{chosen:,} steps", formula, numbers, "Porian et al. 2024, arXiv 2406.19146"
    )


def _steps_line(tokens: float, batch_tokens: float, steps: int) -> Derived:
    numbers = f"{human(tokens, 4)} / {batch_tokens:,.0f}"
    return Derived("steps", steps, f"{steps:,}", "tokens / batch, rounded down", numbers, "arithmetic")


def _decay_line(steps: int, decay: int) -> Derived:
    return Derived(
        "decay",
        decay,
        f"last {decay:,} steps to 0",
        f"{DECAY_SHARE:.0%} of the steps, 1 - sqrt",
        f"{DECAY_SHARE} x {steps:,}",
        "Hägele et al. 2024, arXiv 2405.18392",
    )


def _outside(flops: float) -> str:
    low, high = FITTED_FLOPS
    return "" if low <= flops <= high else "; extrapolated: fitted on 1e17 to 2e19 FLOPs"
