"""The order of training data as a function: (step, slot) -> (corpus, epoch, block), and its inverse.

Pure integer arithmetic. Nothing here depends on ranks, micro-batches, workers, files or NumPy's random
streams, so the order of a run is the same on any machine and any number of GPUs, and the whole state to
resume it is the step.

Two parts. A keyed permutation (`Shuffle`) says which block is the k-th of an epoch. An apportionment
(`cumulative_quotas`) says how many blocks of each corpus a step takes. `Order` puts them together.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from x1_pretrain.config import INJECTED_STEPS as INJECTED_STEPS

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

ROUNDS = 8  # of the Feistel network; four make a good permutation, eight are cheap
QUOTA_UNIT = 1 << 30  # one block of quota in the integer arithmetic of the mixture


# ------------------------------------------------------------------------------------------------------------
# The shuffle: a keyed Feistel network over the smallest even number of bits that holds the epoch, walked
# until the value falls inside. At most four times as many values as blocks: fewer than four walks on average.


def _mix(values: U64, key: np.uint64) -> U64:
    """The round function: a 64-bit integer hash (add, then xor-shift and multiply; overflow is meant)."""
    v = values + key
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))


def uniform(values: U64, key: np.uint64) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each value, the same on any machine."""
    mixed = _mix(_mix(values, np.uint64(key)), np.uint64(key))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Shuffle:
    """A permutation of range(size) chosen by `key`, computed element by element, and its inverse."""

    def __init__(self, size: int, key: bytes) -> None:
        if size < 1:
            raise ValueError(f"a shuffle needs at least one element, got {size}")
        half_bits = max(1, -(-(size - 1).bit_length() // 2))
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        self.size = size
        self._half = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> I64:
        """Positions in the epoch -> blocks."""
        return self._walk(positions, backward=False)

    def inverse(self, blocks: npt.ArrayLike) -> I64:
        """Blocks -> positions in the epoch."""
        return self._walk(blocks, backward=True)

    def _walk(self, values: npt.ArrayLike, backward: bool) -> I64:
        v = np.atleast_1d(np.asarray(values, dtype=np.int64))
        if v.size and (v.min() < 0 or v.max() >= self.size):
            raise ValueError(f"a value outside range({self.size})")
        network = self._backward if backward else self._forward
        walked = network(v.astype(np.uint64))
        while (outside := walked >= np.uint64(self.size)).any():
            walked[outside] = network(walked[outside])
        return walked.astype(np.int64)

    def _forward(self, v: U64) -> U64:
        left, right = v >> self._half, v & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & self._mask)
        return (left << self._half) | right

    def _backward(self, v: U64) -> U64:
        left, right = v >> self._half, v & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ (_mix(left, key) & self._mask), left
        return (left << self._half) | right


# ------------------------------------------------------------------------------------------------------------
# The mixture: whole-number quotas whose running totals stay within one block of the wanted shares, at every
# step.


def _whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to `weights` that sum to `total` exactly (largest remainder)."""
    scale = sum(weights)
    exact = [w / scale * total for w in weights]
    shares = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def cumulative_quotas(weights: Sequence[Sequence[float]], batch_blocks: int) -> I64:
    """Blocks of each corpus taken before each step: row s is the total after s steps, (steps + 1, corpora).

    `weights[s]` are the shares wanted in step s. The j-th block of a corpus may be taken from the first step
    whose wanted running total exceeds j - 1, and must be taken by the first step where it reaches j. A
    schedule that keeps all these windows exists (the wanted shares themselves are one, in fractions), and
    taking the earliest deadlines first finds it. Hence every running total is less than one block away from
    what was wanted, always.
    """
    corpora = len(weights[0])
    if corpora == 1:
        return np.arange(len(weights) + 1, dtype=np.int64)[:, None] * batch_blocks
    shares_of = lru_cache(maxsize=None)(lambda w: _whole_shares(w, batch_blocks * QUOTA_UNIT))
    shares = np.array([shares_of(tuple(w)) for w in weights], dtype=np.int64)
    wanted: list[list[int]] = np.cumsum(
        shares, axis=0
    ).T.tolist()  # per corpus, in QUOTA_UNIT, after each step
    taken = [0] * corpora
    rows = [list(taken)]
    for step in range(len(weights)):
        due = [max(taken[i], wanted[i][step] // QUOTA_UNIT) for i in range(corpora)]
        early = [i for i in range(corpora) if wanted[i][step] > due[i] * QUOTA_UNIT]
        early.sort(key=lambda i: (_deadline(wanted[i], int(shares[-1, i]), due[i] + 1), i))
        for i in early[: batch_blocks - (sum(due) - sum(taken))]:
            due[i] += 1
        taken = due
        rows.append(list(taken))
    quotas = np.array(rows, dtype=np.int64)
    assert (quotas.sum(axis=1) == np.arange(len(weights) + 1) * batch_blocks).all()
    return quotas


def _deadline(wanted: Sequence[int], last_share: int, block: int) -> int:
    """The step in which the wanted total reaches `block`; past the end of the run as if it went on unchanged,
    so that a longer run begins like a shorter one.
    """
    target = block * QUOTA_UNIT
    if target <= wanted[-1]:
        return bisect_left(wanted, target)
    return len(wanted) - 1 + -(-(target - wanted[-1]) // max(1, last_share))


# ------------------------------------------------------------------------------------------------------------
# The order


@dataclass(frozen=True)
class Source:
    """One corpus as the order sees it. `key` names its content: the same data, the same order, anywhere."""

    key: str
    blocks: int
    weight: float = 1.0


class Draw(NamedTuple):
    """Which block of which corpus, in which pass over it."""

    corpus: int
    epoch: int
    block: int


class Order:
    """The blocks of a whole run. `batch_blocks` slots a step, the same for any number of ranks.

    A batch is what one step takes from the corpora. Step s reads batch s, with two exceptions that a run
    keeps on record. A jump (step, batch): from that step on the batches go on from that one, so those in
    between are never read. An injection: the `INJECTED_STEPS` batches from its first one on are replaced by
    others, so nothing of them is read either.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[Source],
        batch_blocks: int,
        total_steps: int,
        jumps: Sequence[tuple[int, int]] = (),
        injected: Sequence[int] = (),
    ) -> None:
        self.seed, self.sources = seed, tuple(sources)
        self.batch_blocks, self.total_steps = batch_blocks, total_steps
        self.jumps = tuple((int(step), int(batch)) for step, batch in jumps if step < total_steps)
        self.injected = tuple(sorted(injected))
        self._runs = _stretches(self.jumps, total_steps)
        weights = [tuple(s.weight for s in sources)] * self.batch_of(total_steps)
        self._taken = cumulative_quotas(weights, batch_blocks)
        self._shuffle = lru_cache(maxsize=8)(self._make_shuffle)

    def _make_shuffle(self, corpus: int, epoch: int) -> Shuffle:
        source = self.sources[corpus]
        return Shuffle(source.blocks, f"x1-order-1/{self.seed}/{source.key}/{epoch}".encode())

    def batch_of(self, step: int) -> int:
        """The batch that `step` reads; of total_steps: one past the last."""
        first, batch = max(
            run[:2] for run in self._runs if run[0] <= max(0, step - (step == self.total_steps))
        )
        return batch + step - first

    def injects(self, step: int) -> bool:
        """Whether the batch of `step` is replaced by an injected one."""
        batch = self.batch_of(step)
        return any(first <= batch < first + INJECTED_STEPS for first in self.injected)

    def injected_before(self, step: int) -> int:
        """How many of the first `step` steps trained on an injected batch."""
        return sum(last - first for first, last in self._injected_spans(step))

    def _injected_spans(self, step: int) -> list[tuple[int, int]]:
        """The injected batches, [first, last), among those of the first `step` steps."""
        found = []
        for first, last in self._spans(step):
            for one in self.injected:  # in order; where two overlap, a batch counts once
                span = max(first, one), min(last, one + INJECTED_STEPS)
                found += [span] if span[0] < span[1] else []
                first = max(first, span[1])
        return found

    def _spans(self, step: int) -> list[tuple[int, int]]:
        """The batches, [first, last), of the first `step` steps."""
        return [(b, b + min(step, end) - start) for start, b, end in self._runs if start < step]

    def step_blocks(self, step: int, slots: slice = slice(None)) -> list[Draw]:
        """What the slots of `step` hold; nothing where its batch is injected. Rank r of W reads
        `slice(r, None, W)`."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} outside range({self.total_steps})")
        if self.injects(step):
            return []
        batch = self.batch_of(step)
        draws: list[Draw] = []
        for corpus, (first, last) in enumerate(zip(self._taken[batch], self._taken[batch + 1], strict=True)):
            draws += self._draws(corpus, np.arange(first, last, dtype=np.int64))
        return draws[slots]

    def _draws(self, corpus: int, ordinals: I64) -> list[Draw]:
        """The `ordinals`-th blocks ever drawn from one corpus."""
        epochs, positions = np.divmod(ordinals, self.sources[corpus].blocks)
        blocks = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            blocks[here] = self._shuffle(corpus, int(epoch))(positions[here])
        return [Draw(corpus, int(e), int(b)) for e, b in zip(epochs, blocks, strict=True)]

    def find(self, draw: Draw) -> tuple[int, int] | None:
        """The inverse: the (step, slot) that reads `draw`, or None if no step of the run does."""
        position = int(self._shuffle(draw.corpus, draw.epoch).inverse(draw.block)[0])
        ordinal = draw.epoch * self.sources[draw.corpus].blocks + position
        batch = int(np.searchsorted(self._taken[:, draw.corpus], ordinal, side="right")) - 1
        step = next((s + batch - b for s, b, end in self._runs if b <= batch < b + end - s), None)
        if step is None or self.injects(step):
            return None
        before = self._taken[batch + 1, : draw.corpus] - self._taken[batch, : draw.corpus]
        return step, int(before.sum()) + ordinal - int(self._taken[batch, draw.corpus])

    def blocks_taken(self, step: int) -> list[int]:
        """Blocks of each corpus read by the first `step` steps."""
        taken = sum(
            (self._taken[last] - self._taken[first] for first, last in self._spans(step)), 0 * self._taken[0]
        )
        for first, last in self._injected_spans(step):
            taken = taken - (self._taken[last] - self._taken[first])
        return [int(n) for n in taken]

    def epochs(self) -> list[float]:
        """Passes over each corpus by the end of the run."""
        return [n / s.blocks for n, s in zip(self.blocks_taken(self.total_steps), self.sources, strict=True)]

    def jumped(self, back_to: int, done: int) -> Order:
        """The order of a run that goes back to step `back_to` after `done` steps, and reads on from where it
        was: nothing that was read is read again. An injection that lies ahead keeps its step."""
        on = self.batch_of(done)
        begun = [first + INJECTED_STEPS for first in self.injected if first < on]
        on = max([on, *begun])  # the rest of an injection is jumped over too
        jumps = [jump for jump in self.jumps if jump[0] < back_to] + [(back_to, on)]
        shift = on - self.batch_of(done) + done - back_to
        injected = [first if first < on else first + shift for first in self.injected]
        return Order(self.seed, self.sources, self.batch_blocks, self.total_steps, jumps, injected)


def _stretches(jumps: Sequence[tuple[int, int]], total_steps: int) -> list[tuple[int, int, int]]:
    """(first step, its batch, one past the last step) of each stretch without a jump inside."""
    starts = {0: 0}
    for step, batch in jumps:
        before = max(starts)
        if step < before or batch < starts[before] + step - before:
            raise ValueError(f"jumps {list(jumps)}: a jump goes forward, from one step to a later batch")
        starts[step] = batch
    ends = [*list(starts)[1:], total_steps]
    return [(step, batch, end) for (step, batch), end in zip(starts.items(), ends, strict=True)]


def block_count(tokens: int, context: int) -> int:
    """Blocks of `context` tokens in a corpus: each needs one token more, the target of its last."""
    return max(0, (tokens - 1) // context)


def block_span(block: int, context: int) -> tuple[int, int]:
    """The tokens a block reads, [first, last): `context` inputs and the target after the last of them."""
    return block * context, (block + 1) * context + 1


def blocks_of_span(start: int, end: int, context: int) -> range:
    """The blocks that read a token of [start, end) as an input or have it as a target."""
    return range(max(0, start - 1) // context, max(0, end - 1) // context + 1)
