"""What a run measures beside its loss, between one row of metrics and the next. Nothing here changes a step.

The gradient noise scale wants a gradient over few tokens beside the one over all: that of the first
micro-batch. Where a step is one micro-batch, every `SPLIT_EVERY`-th step is done in two halves.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from x1_pretrain.corpus.reader import Batch
from x1_pretrain.learning import vitals
from x1_pretrain.model.loss import IGNORED
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.runtime.run import Run, Update
from x1_pretrain.runtime.session import Records

SPLIT_EVERY = 16


# ------------------------------------------------------------------------------------------------------------
# The noise scale


def micro_batch(run: Run, blocks: int) -> int:
    """Sequences at a time in this step."""
    size = run.machine.micro_batch
    alone = run.world.size == 1 and 1 < blocks <= size and run.machine.compile_mode == "off"
    if alone and run.config.telemetry.noise_scale != "off" and run.step % SPLIT_EVERY == 0:
        return -(-blocks // 2)
    return size


def after_first(run: Run, rows: Tensor, of: int, counted: Tensor) -> Tensor:
    """After the first of several micro-batches, (6,): squared norms, by group, of its mean gradient, and its
    tokens. Zeros where there is nothing to compare with; the mean of several ranks comes out of their sum."""
    few = torch.zeros(len(vitals.GROUPS) + 1, device=run.world.device)
    if run.config.telemetry.noise_scale == "off" or len(rows) == of * run.world.size:
        return few
    tokens = float((rows[:, 1:] != IGNORED).sum())  # on the CPU: nothing waits for the device
    few[:-1] = vitals.group_squares(run.decoder) * (counted / max(tokens, 1.0)) ** 2
    few[-1] = tokens
    return few / run.world.size


def learn_noise(run: Run, usual: bool, sums: list[float], squares: list[float]) -> None:
    """`sums`: the step's tokens, and what `after_first` made; `squares` of the whole gradient. A spike says
    nothing of the data's noise: one gradient 100 times the usual would weigh 10,000 times as much."""
    run.telemetry.squares = squares
    tokens, *few = sums
    if few[-1] and usual:
        small = dict(zip(vitals.GROUPS, few, strict=False))
        run.telemetry.noise.update(small, dict(zip(vitals.GROUPS, squares, strict=True)), few[-1], tokens)


# ------------------------------------------------------------------------------------------------------------
# Rows


def record_step(run: Run, records: Records, step: int, batch: Batch[Tensor], update: Update) -> None:
    """One row of steps.jsonl, the flight recorder, short and there for every step; and what the step read."""
    judged = update.judged
    row = {"step": step, "time_utc": utc_now(), "session": run.session.number}
    row |= {"loss": update.loss, "grad_norm": update.grad_norm, "clip": judged.clip, "lr": update.lr}
    row |= {"step_s": round(update.step_s, 4), "wait_s": round(update.wait_s, 4)}
    if judged.loss_z is not None and judged.grad_z is not None:
        row |= {"loss_z": round(judged.loss_z, 2), "grad_z": round(judged.grad_z, 2)}
    row["verdict"] = judged.verdict
    spike = judged.state.episode is not None or judged.ended is not None
    row |= ({"injected": True} if update.injected else {}) | ({"spike": True} if spike else {})
    records.steps.append(row)
    if records.blocks:
        read = [list(draw) for draw in batch.draws]  # this rank's: slots 0, ranks, 2 ranks, ...
        records.blocks.append({"step": step, "ranks": run.world.size, "blocks": read})


def row_due(run: Run, step: int) -> bool:
    return step % run.config.log.every == 0 or step == run.total_steps


def dear(run: Run, step: int) -> bool:
    """Whether the row of `step` is the first since a multiple of telemetry.every."""
    every = run.config.telemetry.every
    return row_due(run, step) and step // every != max(0, step - run.config.log.every) // every


def look_at_gradients(run: Run) -> None:
    """Before they are clipped, of the step about to be counted."""
    step = run.step + 1
    run.telemetry.by_layer = (
        vitals.norms(run.decoder, gradients=True, by_layer=True) if dear(run, step) else {}
    )


def row(run: Run, tokens: Tensor, update: Update) -> dict[str, Any]:
    """What the row of this step says of the model's inside."""
    found = run.telemetry.counts() | run.telemetry.noise.row()
    groups = zip(vitals.GROUPS, run.telemetry.squares, strict=False)
    found |= {f"grad_norm/{name}": square**0.5 for name, square in groups if square}
    weights = vitals.norms(run.decoder, gradients=False, by_layer=dear(run, run.step))
    found["param_norm"] = sum(n**2 for name, n in weights.items() if "layer." not in name) ** 0.5
    found |= weights | vitals.moment_norms(run.optimizer)
    if update.judged.verdict == "go":
        found |= vitals.update_ratios(run.decoder, run.optimizer)
    if dear(run, run.step):
        found |= run.telemetry.by_layer
        if run.world.first and not update.injected:
            with suppress(torch.OutOfMemoryError):  # a reading does not end a run
                found |= vitals.probe(run.decoder, tokens[:1, :-1].to(run.world.device))
    return found
