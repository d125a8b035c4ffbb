"""Whether the text of some blocks is unlike the text before them: more repetitive, or made of rarer tokens.

The loss of a single sequence is not on record, so this looks at the tokens themselves. Two numbers a block,
each compared with the blocks of the steps before: how far it compresses (repeated lines, tables, one word
over and over) and how surprising its tokens are by their frequencies there (another language, noise, binary).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from x1_pretrain.postmortem.episodes import level

I64 = npt.NDArray[np.int64]
DEVIATIONS = 6.0  # a block is odd beyond so many robust standard deviations from the median ...
SHARE = 0.15  # ... if that is also this far from it


@dataclass(frozen=True)
class Look:
    """How one block compares. Deviations from the median of the blocks before."""

    size: float  # compressed bytes over bytes
    size_z: float
    surprise: float  # nats a token, by the frequencies of the blocks before
    surprise_z: float
    repetitive: bool
    rare: bool

    @property
    def odd(self) -> bool:
        return self.repetitive or self.rare

    @property
    def oddness(self) -> float:
        """To sort by: the larger deviation in the odd direction."""
        return max(-self.size_z, self.surprise_z)


class Texture:
    """What the blocks before were like."""

    def __init__(self, before: Sequence[I64], vocab: int) -> None:
        counted, held = before[::2], before[1::2]  # a block must not be judged by its own tokens
        counts = np.ones(vocab) + sum(np.bincount(block, minlength=vocab)[:vocab] for block in counted)
        self._nats = -np.log(counts / counts.sum())
        self.sizes = level(compressed_size(block) for block in before)
        self.surprises = level(self._surprise(block) for block in held)

    def _surprise(self, block: I64) -> float:
        return float(self._nats[block].mean())

    def look(self, block: I64) -> Look:
        size, surprise = compressed_size(block), self._surprise(block)
        size_z, repetitive = _deviates(-size, -self.sizes[0], self.sizes[1])
        surprise_z, rare = _deviates(surprise, *self.surprises)
        return Look(size, -size_z, surprise, surprise_z, repetitive, rare)


def compressed_size(block: I64) -> float:
    """Share of its bytes that are left after zlib, which finds what repeats."""
    raw = block.astype("<u4").tobytes()
    return len(zlib.compress(raw, 1)) / len(raw)


def _deviates(value: float, middle: float, scale: float) -> tuple[float, bool]:
    """Deviations above the middle, and whether that is much."""
    above = value - middle
    z = above / max(scale, 1e-3 * abs(middle), 1e-12)
    return z, z > DEVIATIONS and above > SHARE * abs(middle)
