"""The learning rate of each update: linear warm-up, then one of two ways down.

cosine falls from the warm-up to the end, so the rate of every update depends on how long the run is. wsd
(warm-up, stable, decay) holds the highest rate and falls only at the end: one trunk then serves runs of many
lengths, which branch off where their decay begins.
"""

from __future__ import annotations

import math

from x1_pretrain.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """For the update that follows `step` finished ones: 0 gives the first update, total_steps - 1 the last.

    Warm-up goes in equal parts from lr / warmup_steps (never 0: the first update counts) to lr; either way
    down is at min_lr in the last update.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        return _stable_then_decay(step, config, total_steps)
    peak = max(config.warmup_steps - 1, 0)  # the update that has the full rate
    decay_steps = total_steps - 1 - peak
    if decay_steps <= 0:
        return config.lr
    share = min((step - peak) / decay_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def _stable_then_decay(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Falls as 1 - sqrt, the best of the shapes that Hägele et al. 2024 (arXiv 2405.18392) compare."""
    decay_steps = config.decay(total_steps)
    into = step + 1 - (total_steps - decay_steps)  # updates into the decay, this one counted
    if decay_steps == 0 or into <= 0:
        return config.lr
    return config.min_lr + (config.lr - config.min_lr) * (1.0 - math.sqrt(min(into / decay_steps, 1.0)))


def first_difference(
    steps: int, one: tuple[OptimizerConfig, int], other: tuple[OptimizerConfig, int]
) -> int | None:
    """The first of `steps` updates (from 1) whose rate is not exactly the same under both (config, total)."""
    return next((s + 1 for s in range(steps) if learning_rate(s, *one) != learning_rate(s, *other)), None)
