"""Worker processes for units. They end when the parent ends, and their own death is an error at once."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

from x1_pretrain.corpus.fast_engine import FastokensEngine, with_fastokens
from x1_pretrain.corpus.sources import BadSource, bad_source_line
from x1_pretrain.corpus.tokenizer import EngineName, Tokenizer, load_tokenizer
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
    process: subprocess.Popen[bytes]
    pipe: Connection
    unit: Unit | None = None


class Crew:
    """Worker processes, started before there is work: they load their libraries while the parent prepares."""

    def __init__(self, workers: int) -> None:
        self._workers = [_start() for _ in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.pipe.close()

    def write_parts(self, units: Sequence[Unit], job: Job) -> Iterator[Event]:
        """Write the part of every unit, in any order; yields what happens."""
        # The largest first, so that no long one is left for the end; popped from the back.
        waiting = sorted(units, key=lambda unit: unit.text_bytes)
        for worker in self._workers:
            _send(worker, job)
            _give(worker, waiting)
        while busy := {worker.pipe: worker for worker in self._workers if worker.unit}:
            for pipe in wait(list(busy), timeout=0.5):
                worker = busy[pipe]  # type: ignore[index]
                event = _receive(worker, job)
                if event.kind == "done":
                    _give(worker, waiting)
                yield event


def _start() -> _Worker:
    mine, theirs = socket.socketpair()
    # Not multiprocessing's way, which would load the command's module and its libraries in each worker again.
    code = f"import sys; sys.path[:] = {sys.path!r}; from x1_pretrain.corpus.workers import serve"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; serve({theirs.fileno()})"],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is for the parent, which ends its workers
    )
    theirs.close()
    return _Worker(process, Connection(mine.detach()))


def _give(worker: _Worker, waiting: list[Unit]) -> None:
    worker.unit = waiting.pop() if waiting else None
    if worker.unit:
        _send(worker, worker.unit)


def _send(worker: _Worker, message: Job | Unit) -> None:
    with contextlib.suppress(BrokenPipeError):  # it died: the next receive says so
        worker.pipe.send(message)


def _receive(worker: _Worker, job: Job) -> Event:
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        raise UserError(_obituary(worker)) from None
    if isinstance(message, Event):
        return message
    if message.kind == "source":
        raise UserError(bad_source_line(message.reason))
    if message.kind == "disk":
        raise UserError(
            f"{job.parts.parent}: can't write ({message.reason}); make room and run the same command: it "
            "goes on where this one stopped"
        )
    raise RuntimeError(f"a tokenizing process failed:\n{message.reason}")


def _obituary(worker: _Worker) -> str:
    try:
        code = worker.process.wait(5)
    except subprocess.TimeoutExpired:
        code = 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = "; the system may be out of memory: fewer --workers need less" if code == -signal.SIGKILL else ""
    where = f" while reading {worker.unit.pieces[0].source.relative}" if worker.unit else ""
    return f"a tokenizing process {how}{where}{hint}; the same command goes on where this one stopped"


def serve(handle: int) -> None:
    """A worker's life: a job, then units in, parts on disk, events out. It ends when the parent does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    os.environ["RAYON_NUM_THREADS"] = "1"
    pipe = Connection(handle)
    _import_early()
    try:
        job: Job = pipe.recv()
        tokenizer = load_for(job)
        while True:
            unit: Unit = pipe.recv()
            for size, tokens in write_part(unit, job, tokenizer):
                pipe.send(Event("progress", size, tokens))
            pipe.send(Event("done", files=sum(piece.opens_file for piece in unit.pieces)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BadSource as error:
        pipe.send(Failure("source", str(error)))
    except OSError as error:
        pipe.send(Failure("disk", error.strerror or str(error)))
    except Exception:
        pipe.send(Failure("fault", traceback.format_exc()))


def _import_early() -> None:
    """Load, while the parent prepares, what reading and encoding will need."""
    for name in ("pyarrow.parquet", "fastokens"):
        with contextlib.suppress(ImportError):  # whoever needs it says so
            importlib.import_module(name)


def load_for(job: Job) -> Tokenizer:
    """The job's tokenizer with the engine that the parent checked and chose."""
    engine: EngineName = "tokenizers" if job.engine == "tokenizers" else "tiktoken"
    tokenizer = load_tokenizer(job.tokenizer_file, engine=engine)
    return with_fastokens(tokenizer) if job.engine == FastokensEngine.name else tokenizer


def usable_workers() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_partials(parts: Path) -> None:
    """Remove what a killed run left half written."""
    for file in parts.glob("*.partial"):
        file.unlink()
