"""Which checkpoints are kept: one policy, for the disk of the machine and for the mirror. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def kept(
    steps: Iterable[int],
    keep_last: int,
    keep_every: int | None,
    keep_at: Collection[int],
    losses: Mapping[int, float],
    keep_best: int,
) -> set[int]:
    """Those of `steps` that stay: always the newest, the `keep_last` newest in all, the multiples of
    `keep_every`, those in `keep_at`, and the `keep_best` with the lowest of `losses`. A step without a loss,
    or with one that is not finite, is none of the best; of two equal ones the later is."""
    newest_first = sorted(set(steps), reverse=True)
    judged = [step for step in newest_first if math.isfinite(losses.get(step, math.nan))]
    best = sorted(judged, key=lambda step: losses[step])[: max(0, keep_best)]  # stable: the later first
    return {
        *newest_first[: max(1, keep_last)],
        *(step for step in newest_first if keep_every and step % keep_every == 0),
        *set(newest_first).intersection(keep_at),
        *best,
    }


def to_go_back_to(steps: Collection[int], onsets: Iterable[int]) -> set[int]:
    """Of `steps`, the newest before each of the spikes that began at `onsets`: a rewind goes back there."""
    before = ([step for step in steps if step < onset] for onset in onsets)
    return {max(found) for found in before if found}


def losses_at(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Validation loss by step, of rows of metrics; where a step is there twice, the later row's."""
    found: dict[int, float] = {}
    for row in rows:
        step, loss = row.get("step"), row.get("val/loss")
        if _is_number(step) and _is_number(loss):
            found[int(step)] = float(loss)  # type: ignore[arg-type]
        elif _is_number(step) and loss is not None:  # "nan": measured, and no number
            found.pop(int(step), None)  # type: ignore[arg-type]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["kept", "losses_at", "to_go_back_to"]
