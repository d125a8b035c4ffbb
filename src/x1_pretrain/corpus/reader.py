"""Reading ahead: a background thread turns the order into token arrays, a few steps before they are needed.

The thread only follows the order; how far ahead it is decides nothing. Its death is an error at the next
batch, and the time spent waiting for it is handed to the caller with every batch.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from x1_pretrain.corpus.injection import Rare, injected_rows
from x1_pretrain.corpus.order import Draw, Order, block_span
from x1_pretrain.errors import UserError

T = TypeVar("T")
POLL_S = 0.1


class TokenFile:
    """Random access to a flat file of tokens by positional reads: a short read, or a token that is not in the
    vocabulary (of `vocab` ids), is an error with a name, never a crash."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, vocab: int | None = None) -> None:
        self.path, self.dtype, self._vocab = path, np.dtype(dtype), vocab
        self._descriptor = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def span(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens [start, end)."""
        width = self.dtype.itemsize
        raw = os.pread(self._descriptor, (end - start) * width, start * width)
        if len(raw) != (end - start) * width:
            raise UserError(
                f"{self.path}: tokens {start} to {end} can't be read, the file ends early: it was changed "
                "or cut while the run was reading it; tokenize again, then relaunch the same command to "
                "resume"
            )
        tokens = np.frombuffer(raw, self.dtype)
        if self._vocab is not None and tokens.size and tokens.max() >= self._vocab:
            at = int((tokens >= self._vocab).argmax())
            raise UserError(
                f"{self.path}: token id {tokens[at]} at token {start + at} is not in the vocabulary of "
                f"{self._vocab}: the file was changed while the run was reading it; restore it or tokenize "
                "again, then relaunch the same command to resume"
            )
        return tokens.astype(np.int64)

    def close(self) -> None:
        self._close()
        self._descriptor = -1


class Batch(NamedTuple, Generic[T]):
    """One rank's part of one step: its blocks in slot order (none of an injected batch), and the tokens after
    `stage`."""

    step: int
    draws: list[Draw]
    tokens: T
    injected: bool = False


class Reader(Generic[T]):
    """Batches of `order` from `first_step` on, for the slots rank, rank + world, ...

    `stage` runs in the reading thread on each (blocks, context + 1) int64 array: the place to pin memory.
    """

    def __init__(
        self,
        order: Order,
        files: Sequence[TokenFile],
        context: int,
        stage: Callable[[npt.NDArray[np.int64]], T],
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        depth: int = 2,
        injection: Rare | None = None,
    ) -> None:
        self._injection = injection
        self._order, self._files, self._context, self._stage = order, files, context, stage
        self._slots = slice(rank, None, world)
        self._queue: queue.Queue[Batch[T]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="x1-reader", daemon=True)
        self._thread.start()

    def read(self, step: int) -> Batch[T]:
        """One batch, read now."""
        if self._injection is not None and self._order.injects(step):
            slots = range(self._order.batch_blocks)[self._slots]
            batch, length = self._order.batch_of(step), self._context + 1
            rare = injected_rows(self._injection, self._order.seed, batch, slots, length)
            return Batch(step, [], self._stage(rare), injected=True)
        draws = self._order.step_blocks(step, self._slots)
        rows = [self._files[d.corpus].span(*block_span(d.block, self._context)) for d in draws]
        return Batch(step, draws, self._stage(np.stack(rows)))

    def _run(self, first_step: int) -> None:
        try:
            for step in range(first_step, self._order.total_steps):
                batch = self.read(step)
                while not self._stop.is_set():
                    try:
                        self._queue.put(batch, timeout=POLL_S)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to the training thread, which raises it
            self._error = error

    def next(self, interrupted: Callable[[], bool] = lambda: False) -> tuple[Batch[T] | None, float]:
        """The next batch and the seconds waited for it; None as soon as `interrupted` says so."""
        begun = time.perf_counter()
        while not interrupted():
            try:
                return self._queue.get(timeout=POLL_S), time.perf_counter() - begun
            except queue.Empty:
                if isinstance(self._error, Exception):
                    raise self._error from None
                if self._error is not None:  # a SystemExit would end the run as if it were finished
                    raise RuntimeError(f"the reading thread ended with {self._error!r}") from None
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the reading thread ended early") from None
        return None, time.perf_counter() - begun

    def close(self) -> None:
        """End the thread; files stay open for whoever owns them."""
        self._stop.set()
        self._thread.join(timeout=10)
