"""The order of a run's data, as its manifest and its events have it: which blocks each step read.

    order = order_of(open_run(folder))
    order.step_blocks(1200)

A run may have jumped over batches, and may have had others put in their place; what it gave up later by going
back, in a resume or a rewind, is no part of it. The loop writes that into its checkpoints; here it is read
from the events, which tell the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from x1_pretrain.corpus.order import INJECTED_STEPS, Order, Source, block_count
from x1_pretrain.errors import UserError
from x1_pretrain.records.run_folder import Row, Run, is_number


def order_of(run: Run, events: Sequence[Row] | None = None) -> Order:
    """The order of the run's data, as it is now; or as it was after the first of its events, `events`."""
    events = run.events() if events is None else events
    context = run.config.model.context
    try:
        sources = [
            Source(one["fingerprint"], block_count(one["train_tokens"], context), one["weight"])
            for one in run.manifest["data"]
        ]
        past = recorded_jumps(events), recorded_injections(events)
        return Order(run.config.seed, sources, run.config.batch_blocks, run.total_steps, *past)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.folder}: the order of its data can't be told (manifest.json, or the jumps and injections "
            f"in events.jsonl: {type(error).__name__} {error}); restore them"
        ) from None


def recorded_jumps(events: Iterable[Row]) -> list[tuple[int, int]]:
    """The batches that were jumped over: each event that names them names them all."""
    named = [event["jumps"] for event in events if "jumps" in event]
    return [(int(step), int(batch)) for step, batch in (named[-1] if named else [])]


def recorded_injections(events: Iterable[Row]) -> list[int]:
    """The first batch of each injection that the run as it stands trained on."""
    inherited, own = _injections(events)
    return sorted({*inherited, *(_first_batch(event) for event in own)})


def injected_stretches(events: Iterable[Row]) -> list[tuple[int, int]]:
    """The same as updates, (first, last), counted from 1; without those of a branch's parent."""
    return [
        (int(event["first_step"]) + 1, int(event["first_step"]) + int(event.get("steps", INJECTED_STEPS)))
        for event in _injections(events)[1]
    ]


def _first_batch(event: Row) -> int:
    return int(event["first_batch" if is_number(event.get("first_batch")) else "first_step"])


def _injections(events: Iterable[Row]) -> tuple[list[int], list[Row]]:
    """First batches from a branch's parent, and the run's own events. What a resume or a rewind went back
    over is told again when it is trained on again. A rewind that found no checkpoint went nowhere."""
    inherited: list[int] = []
    own: dict[int, Row] = {}  # by the step that it began after
    for event in events:
        kind = event.get("event")
        back_to: Any = event.get("to_step" if kind == "rewind" else "step")
        if kind == "branch":
            inherited, own = [int(batch) for batch in event.get("injected", [])], {}
        elif kind == "inject" and is_number(event.get("first_step")):
            own[int(event["first_step"])] = event
        elif kind in ("start", "resume", "rewind") and is_number(back_to):
            own = {step: one for step, one in own.items() if step < back_to}
    return inherited, list(own.values())
