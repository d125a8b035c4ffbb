"""The reader gives what the order says, whatever runs ahead, and its troubles surface at once."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from x1_pretrain.corpus.order import Order, Source
from x1_pretrain.corpus.reader import Reader, TokenFile
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
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"train\.bin.*file ends early"):
        rows_read(reader, 6)
    assert time.monotonic() - begun < 2


def test_a_signal_ends_the_wait(tokens: TokenFile) -> None:
    def slow(rows: np.ndarray) -> np.ndarray:
        time.sleep(0.5)
        return rows

    reader = Reader(order(), [tokens], CONTEXT, slow)
    polls = iter([False, False, True])
    batch, waited_s = reader.next(lambda: next(polls))
    assert batch is None
    assert 0.1 < waited_s < 0.5


def test_waiting_is_measured(tokens: TokenFile) -> None:
    def slow(rows: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        return rows

    _, waited_s = Reader(order(), [tokens], CONTEXT, slow).next()
    assert 0.25 < waited_s < 1.5
    ahead = Reader(order(), [tokens], CONTEXT, lambda rows: rows)
    time.sleep(0.2)
    assert ahead.next()[1] < 0.1
