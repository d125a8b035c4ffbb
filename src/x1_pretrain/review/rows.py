"""Do the rows tell one whole story: each step once, in its session, with its tokens and its data?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from x1_pretrain.records.data_order import order_of
from x1_pretrain.records.run_folder import (
    Row,
    Run,
    is_evaluation,
    is_number,
    is_train,
    last_step,
    openings,
    read_jsonl,
    with_numbers,
)
from x1_pretrain.review.check import NOT_APPLICABLE, PASSED, Check, judged

STEPS = "steps.jsonl"


def rows_whole(run: Run) -> Check:
    """Lines that are not rows: a torn last one is what a kill leaves, any other is damage."""
    problems, counts = [], []
    files = ["metrics.jsonl", "events.jsonl"]
    files += ["steps.jsonl"] if (run.folder / "steps.jsonl").exists() else []
    for name in files:
        lines = read_jsonl(run.folder / name)
        stray = sum(not is_number(row.get("step")) for row in lines.rows)
        problems += [f"{name} line {number} is not a JSON object" for number in lines.damaged]
        problems += [f"{name} has {stray} row(s) without a step"] if stray else []
        problems += [] if lines.rows or name == "steps.jsonl" else [f"{name} has no rows"]
        torn = " (and a torn last line, left out)" if lines.torn else ""
        counts.append(f"{len(lines.rows):,} rows in {name}{torn}")
    return judged("records readable", problems, ", ".join(counts))


def steps_covered(run: Run, rows: Sequence[Row]) -> Check:
    """Every step that was due is there once, in order, with the tokens it must have."""
    train = [row["step"] for row in rows if is_train(row)]
    evaluated = [row["step"] for row in rows if is_evaluation(row)]
    lost = lost_up_to(run.events(), "metrics.jsonl")
    missing = sorted(due_steps(run, rows) - set(train))
    problems = [f"no training row for step {step}{_lost(step, lost)}" for step in missing]
    for kind, steps in (("training", train), ("evaluation", evaluated)):
        problems += [f"{n} {kind} rows for step {step}" for step, n in Counter(steps).items() if n > 1]
    steps = [row["step"] for row in rows]
    problems += [
        f"step {later} comes after step {earlier}" for earlier, later in pairwise(steps) if later < earlier
    ]
    problems += _token_problems(run, rows)
    evidence = f"{len(train):,} training rows up to step {last_step(rows):,}: no gap, no overlap"
    return judged("no gap or overlap in steps", problems, evidence)


def _token_problems(run: Run, rows: Sequence[Row]) -> list[str]:
    """Tokens are steps times tokens per step; those of injected batches are counted apart."""
    per_step, events = run.config.training.batch_tokens, run.events()
    made = any(event.get("event") == "inject" or event.get("injected") for event in events)
    order = order_of(run) if made else None
    problems = []
    for row in rows:
        injected = order.injected_before(row["step"]) if order else 0
        expected = (row["step"] - injected) * per_step
        without = f" without {injected} injected" if injected else ""
        if row.get("tokens") != expected:
            problems.append(
                f"step {row['step']} says {row.get('tokens')} tokens, x {per_step}{without} it is {expected}"
            )
        if row.get("tokens_injected", 0) != injected * per_step:
            problems.append(
                f"step {row['step']} says {row.get('tokens_injected', 0)} injected tokens, "
                f"x {per_step} it is {injected * per_step}"
            )
    return problems


def every_step(run: Run, read_rows: Callable[[], Sequence[Row]]) -> Check:
    """steps.jsonl holds each step once, in order, up to the last, and the numbers of the rows of metrics."""
    name, file, formats = "every step on record", run.folder / STEPS, run.manifest.get("formats")
    from_the_start = isinstance(formats, dict) and STEPS in formats
    if not file.exists() and not from_the_start:
        return Check(name, NOT_APPLICABLE, "no steps.jsonl: an older run")
    rows, events = read_rows(), run.events()
    recorded = [with_numbers(row) for row in read_jsonl(file).rows if is_number(row.get("step"))]
    steps = [row["step"] for row in recorded]
    first = 1 + _begun(events, steps, from_the_start)
    last = max([last_step(rows), saved(events), *steps])
    if last < first:
        return Check(name, PASSED, "no step done yet")
    by_step = {row["step"]: row for row in recorded}
    same = [row for row in rows if is_train(row) and row["step"] in by_step]
    problems = _holes(steps, first, last, lost_up_to(events, STEPS))
    problems += [problem for row in same for problem in _disagreement(row, by_step[row["step"]])]
    span = f"{len(steps):,} steps, {first:,} to {last:,}, each once"
    return judged(name, problems, f"{span}; the {len(same):,} rows of metrics agree")


def _begun(events: Sequence[Row], steps: Sequence[int], from_the_start: bool) -> int:
    """The step after which the rows begin: where the run did. One from before there was such a file has it
    from a later session on."""
    begun: list[int] = sorted({one["step"] for one in reached(events)} or {0})
    if from_the_start:
        return begun[0]
    wanted = steps[0] - 1 if steps else begun[-1]
    return wanted if wanted in begun else begun[0]


def _holes(steps: Sequence[int], first: int, last: int, lost: int) -> list[str]:
    problems = [f"begins at step {steps[0]}, expected {first}"] if steps and steps[0] < first else []
    problems += [
        f"no row of {_stretch(a + 1, b - 1)}{_lost(a + 1, lost)}"
        for a, b in pairwise(sorted({first - 1, *steps, last + 1}))
        if b != a + 1
    ]
    return problems + [f"step {a} is followed by step {b}" for a, b in pairwise(steps) if b <= a]


def _stretch(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def saved(events: Sequence[Row]) -> int:
    """The step of the newest checkpoint, of those that no rewind and no later resume went back over."""
    newest = 0
    for event in events:
        kind = event.get("event")
        step: Any = event.get("to_step" if kind == "rewind" else "step")
        if kind == "checkpoint" and is_number(step):
            newest = step
        elif kind in ("start", "resume", "rewind") and is_number(step):
            newest = min(newest, step)
    return newest


def lost_up_to(events: Sequence[Row], file: str) -> int:
    """The step at which a session came back from a mirror that had lost rows of the file; 0: none did."""
    return max(
        (one["step"] for one in events if is_number(one.get("step")) and _says_lost(one, file)), default=0
    )


def _says_lost(event: Row, file: str) -> bool:
    lost = event.get("lost")
    return event.get("event") == "mirror" and isinstance(lost, list) and file in lost


def _lost(step: int, lost: int) -> str:
    if step > lost:
        return ""
    return f", lost in the mirror that the run came back from (the event of step {lost} says so)"


def _disagreement(row: Row, step: Row) -> list[str]:
    pairs = {"loss": row.get("train/loss"), "grad_norm": row.get("grad_norm")}
    return [
        f"step {row['step']}: {name} is {step.get(name)} in steps.jsonl, {value} in metrics.jsonl"
        for name, value in pairs.items()
        if value != step.get(name) and not (_is_nan(value) and _is_nan(step.get(name)))
    ]


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def due_steps(run: Run, rows: Sequence[Row]) -> set[int]:
    """The steps that must have a training row: each multiple of log.every, and the run's last step.

    `log.every` may change between sessions; the event that opens a session can say what it was.
    """
    end = last_step(rows)
    opened = reached(run.events()) or [{"step": 0}]
    ends = [*(one["step"] for one in opened[1:]), end]
    due = {end} if end == run.total_steps else set()
    for one, until in zip(opened, ends, strict=True):
        every = one.get("log_every", run.config.log.every)
        due |= {step for step in range(every, until + 1, every) if step > one["step"]}
    return due


def reached(events: Sequence[Row]) -> list[Row]:
    """The openings of the sessions; none is of a step beyond where a rewind or a later resume went back to:
    a checkpoint that turned out bad makes a resume begin before the one before it."""
    found: list[Row] = []
    for event in events:
        if not is_number(event.get("step")):
            continue
        opens = event.get("event") in ("start", "resume")
        back_to = event["step"] if opens else event.get("to_step")
        if event.get("event") == "start":
            found = []
        if (opens or event.get("event") == "rewind") and is_number(back_to):
            for one in found:
                one["step"] = min(one["step"], back_to)
        found += [dict(event)] if opens else []
    return found


def sessions_consistent(run: Run, rows: Sequence[Row]) -> Check:
    """The rows of a session lie between the step it went on from and the step the next one did."""
    events = run.events()
    opened = openings(events)
    problems = [] if opened and opened[0]["event"] == "start" else ["events.jsonl has no start event"]
    numbers = [one.get("session") for one in opened]
    problems += [
        f"session {b} is opened after session {a}" for a, b in pairwise(numbers) if b is None or b <= (a or 0)
    ]
    kept = reached(events)
    spans = {
        one.get("session"): (one["step"], min((later["step"] for later in kept[place + 1 :]), default=None))
        for place, one in enumerate(kept)
    }
    problems += [problem for row in rows if (problem := _outside(row, spans))]
    problems += [
        f"time runs backward from step {a['step']} to step {b['step']}"
        for a, b in pairwise(rows)
        if b.get("elapsed_s", 0) < a.get("elapsed_s", 0)
    ]
    if last_step(rows) >= run.total_steps and not any(event.get("event") == "finish" for event in events):
        problems.append(f"step {run.total_steps:,} was reached, but events.jsonl has no finish event")
    resumed = ", ".join(f"{one['step']:,}" for one in opened[1:])
    return judged(
        "sessions agree with events",
        problems,
        f"{len(opened)} session(s)" + (f", resumed from step {resumed}" if resumed else ", never resumed"),
    )


def blocks_in_order(run: Run) -> Check:
    """The blocks that were really read (where they were logged) are those of the order's arithmetic."""
    name, rows = "blocks read in order", read_jsonl(run.folder / "blocks.jsonl").rows
    if not rows:
        return Check(name, NOT_APPLICABLE, "not logged (log.blocks is off)")
    context, order = run.config.model.context, order_of(run)
    problems, count = [], 0
    for row in rows:
        expected = order.step_blocks(row["step"] - 1, slice(0, None, row["ranks"]))
        count += len(expected)
        if row["blocks"] != [list(draw) for draw in expected]:
            problems.append(f"step {row['step']} read other blocks than the order says")
    begun = openings(run.events())[:1]  # a branch begins at its parent's step
    first = 1 + (begun[0]["step"] if begun else 0)
    if [row["step"] for row in rows] != list(range(first, first + len(rows))):
        problems.append("the steps in blocks.jsonl have a gap or a double")
    evidence = f"{count:,} blocks of {context} tokens over {len(rows):,} steps are those of the order"
    return judged(name, problems, evidence)


def _outside(row: Row, spans: dict[Any, tuple[int, int | None]]) -> str | None:
    """An evaluation may repeat the step a session goes on from; a training row may not."""
    session, step = row.get("session"), row["step"]
    if session not in spans:
        return f"step {step} is of session {session}, which events.jsonl never opened"
    first, last = spans[session]
    begun = step > first if is_train(row) else step >= first
    if begun and (last is None or step <= last):
        return None
    return f"step {step} is of session {session}, which covers the steps {first} to {last or 'the end'}"
