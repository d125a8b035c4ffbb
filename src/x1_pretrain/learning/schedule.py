"""The learning rate of each update: linear warm-up, then cosine decay."""

from __future__ import annotations

import math

from x1_pretrain.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """For the update that follows `step` finished ones: 0 gives the first update, total_steps - 1 the last.

    Warm-up goes in equal parts from lr / warmup_steps (never 0: the first update counts) to lr; the cosine
    falls from there and is at min_lr in the last update.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    peak = max(config.warmup_steps - 1, 0)  # the update that has the full rate
    decay_steps = total_steps - 1 - peak
    if decay_steps <= 0:
        return config.lr
    share = min((step - peak) / decay_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))
