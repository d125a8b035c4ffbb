"""The reader gives what the order says, whatever runs ahead, and its troubles surface at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from x1_pretrain.corpus.order import Order, Source
from x1_pretrain.corpus.reader import POLL_S, Reader, TokenFile
from x1_pretrain.errors import UserError

CONTEXT, BLOCKS = 8, 20


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """Token i is i, so that a row shows where it comes from."""
    np.arange(BLOCKS * CONTEXT + 1, dtype="<u2").tofile(tmp_path / "train.bin")
    return TokenFile(tmp_path / "train.bin", "<u2")


def order(steps: int = 6, batch: int = 4) -> Order:
    return Order(3, [Source("a", BLOCKS)], batch, steps)


def rows_read(reader: Reader[np.ndarray], steps: int) -> list[list[int]]:
    found = []
    for _ in range(steps):
        batch, _ = reader.next()
        assert batch is not None
        found += [row.tolist() for row in batch.tokens]
    return found


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("first", [0, 2])
def test_rows_are_the_blocks_of_the_order(tokens: TokenFile, depth: int, first: int) -> None:
    reader = Reader(order(), [tokens], CONTEXT, lambda rows: rows, first_step=first, depth=depth)
    expected = [
        list(range(d.block * CONTEXT, d.block * CONTEXT + CONTEXT + 1))
        for step in range(first, 6)
        for d in order().step_blocks(step)
    ]
    assert rows_read(reader, 6 - first) == expected
    reader.close()


def test_two_ranks_read_the_batch_of_one(tokens: TokenFile) -> None:
    alone = Reader(order(), [tokens], CONTEXT, lambda rows: rows)
    ranks = [Reader(order(), [tokens], CONTEXT, lambda rows: rows, rank=r, world=2) for r in (0, 1)]
    for _ in range(6):
        whole = alone.next()[0]
        halves = [r.next()[0] for r in ranks]
        assert whole is not None
        assert halves[0] is not None
        assert halves[1] is not None
        woven = np.empty_like(whole.tokens)
        woven[0::2], woven[1::2] = halves[0].tokens, halves[1].tokens
        assert (woven == whole.tokens).all()


def test_a_file_cut_while_training_is_an_error_not_a_hang(tmp_path: Path, tokens: TokenFile) -> None:
    with (tmp_path / "train.bin").open("rb+") as file:
        file.truncate(40)
    reader = Reader(order(), [tokens], CONTEXT, lambda rows: rows)
    with pytest.raises(UserError, match=r"train\.bin.*file ends early"):
        rows_read(reader, 6)


class Held:
    """A stage that takes until `go`; `asked` is asked before each look at what it made."""

    def __init__(self, looks: int) -> None:
        self.go, self.looks = threading.Event(), looks

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.go.wait()
        return rows

    def asked(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_signal_ends_the_wait(tokens: TokenFile) -> None:
    held = Held(looks=2)
    batch, waited_s = Reader(order(), [tokens], CONTEXT, held).next(held.asked)
    held.go.set()
    assert batch is None
    assert waited_s >= 2 * POLL_S


def test_waiting_is_measured(tokens: TokenFile) -> None:
    held = Held(looks=3)

    def asked() -> bool:
        if held.asked():
            held.go.set()
        return False

    begun = time.perf_counter()
    batch, waited_s = Reader(order(), [tokens], CONTEXT, held).next(asked)
    assert batch is not None
    assert 3 * POLL_S <= waited_s <= time.perf_counter() - begun


def test_what_was_read_ahead_is_not_waited_for(tokens: TokenFile) -> None:
    ahead, held = Reader(order(), [tokens], CONTEXT, lambda rows: rows), Held(looks=1)
    while not ahead._queue.full():
        time.sleep(0.001)
    assert ahead.next(held.asked)[0] is not None  # at the first look
