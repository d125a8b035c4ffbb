"""Worker processes for units. They end when the parent ends, and their own death is an error at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Literal, NamedTuple

from x1_pretrain.corpus.sources import BadSource
from x1_pretrain.corpus.tokenizer import load_tokenizer
from x1_pretrain.corpus.units import Job, Unit, write_part
from x1_pretrain.errors import UserError


class Event(NamedTuple):
    """What a worker has done since its last event."""

    kind: Literal["progress", "done"]
    text_bytes: int = 0
    tokens: int = 0
    files: int = 0


class Failure(NamedTuple):
    """Why a worker can't go on."""

    kind: Literal["source", "disk", "fault"]
    reason: str


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    unit: Unit | None = None


def run_units(units: Sequence[Unit], job: Job, workers: int) -> Iterator[Event]:
    """Write the part of every unit, in any order, `workers` at a time; yields what happens."""
    # Spawned, not forked: no child holds an end of another's pipe, so a broken pipe means a dead process.
    context = multiprocessing.get_context("spawn")
    # The largest first, so that no long one is left for the end; popped from the back.
    waiting = sorted(units, key=lambda unit: unit.text_bytes)
    crew: list[_Worker] = []
    try:
        for _ in range(min(workers, len(units))):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            crew.append(_Worker(process, mine))
        yield from _hand_out(crew, waiting, job)
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


def _hand_out(crew: list[_Worker], waiting: list[Unit], job: Job) -> Iterator[Event]:
    for worker in crew:
        _give(worker, waiting)
    while busy := {worker.pipe: worker for worker in crew if worker.unit}:
        for pipe in wait(list(busy), timeout=0.5):
            worker = busy[pipe]  # type: ignore[index]
            event = _receive(worker, job)
            if event.kind == "done":
                _give(worker, waiting)
            yield event
        yield Event("progress")  # a heartbeat: lets the caller look at the clock and at signals


def _give(worker: _Worker, waiting: list[Unit]) -> None:
    worker.unit = waiting.pop() if waiting else None
    if worker.unit:
        with contextlib.suppress(BrokenPipeError):  # it died: the next receive says so
            worker.pipe.send(worker.unit)


def _receive(worker: _Worker, job: Job) -> Event:
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        raise UserError(_obituary(worker)) from None
    if isinstance(message, Event):
        return message
    if message.kind == "source":
        raise UserError(f"{message.reason}; mend or remove the file, or leave it out with --skip-bad")
    if message.kind == "disk":
        raise UserError(
            f"{job.parts.parent}: can't write ({message.reason}); make room and run the same command: it goes "
            "on where this one stopped"
        )
    raise RuntimeError(f"a tokenizing process failed:\n{message.reason}")


def _obituary(worker: _Worker) -> str:
    worker.process.join(5)
    code = worker.process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = "; the system may be out of memory: fewer --workers need less" if code == -signal.SIGKILL else ""
    files = worker.unit.pieces if worker.unit else ()
    where = f" while reading {files[0].source.relative}" if files else ""
    return f"a tokenizing process {how}{where}{hint}; the same command goes on where this one stopped"


def _serve(pipe: Connection, job: Job) -> None:
    """A worker's life: units in, parts on disk, events out. It ends when the parent's end of the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    try:
        tokenizer = load_tokenizer(job.tokenizer_file)
        while True:
            unit: Unit = pipe.recv()
            for size, tokens in write_part(unit, job, tokenizer):
                pipe.send(Event("progress", size, tokens))
            pipe.send(Event("done", files=sum(piece.opens_file for piece in unit.pieces)))
    except (EOFError, BrokenPipeError):
        return
    except BadSource as error:
        pipe.send(Failure("source", str(error)))
    except OSError as error:
        pipe.send(Failure("disk", error.strerror or str(error)))
    except Exception:
        pipe.send(Failure("fault", traceback.format_exc()))


def usable_workers() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_partials(parts: Path) -> None:
    """Remove what a killed run left half written."""
    for file in parts.glob("*.partial"):
        file.unlink()
