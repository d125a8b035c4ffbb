"""The order is a function: bijective, invertible, independent of how it is consumed, and random enough."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x1_pretrain.corpus.order import (
    INJECTED_STEPS,
    Draw,
    Order,
    Shuffle,
    Source,
    block_count,
    block_span,
    blocks_of_span,
    cumulative_quotas,
)

KEYS = st.binary(min_size=1, max_size=16)


@given(size=st.integers(1, 3000), key=KEYS)
def test_a_shuffle_is_a_bijection_and_its_inverse_inverts(size: int, key: bytes) -> None:
    shuffle = Shuffle(size, key)
    blocks = shuffle(np.arange(size))
    assert sorted(blocks) == list(range(size))
    assert (shuffle.inverse(blocks) == np.arange(size)).all()


def test_a_shuffle_of_a_large_epoch_is_a_bijection() -> None:
    size = 1_000_003
    assert len(np.unique(Shuffle(size, b"k")(np.arange(size)))) == size


@given(size=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_elements_are_computed_alone_at_any_size(size: int, key: bytes, data: st.DataObject) -> None:
    shuffle = Shuffle(size, key)
    position = data.draw(st.integers(0, size - 1))
    block = int(shuffle(position)[0])
    assert 0 <= block < size
    assert int(shuffle.inverse(block)[0]) == position


def test_the_shuffle_is_pinned_so_that_old_runs_resume_with_their_order() -> None:
    # computed independently from the definition: 8 Feistel rounds, blake2b keys, splitmix64's finaliser
    def feistel(v: int, size: int, key: bytes) -> int:
        import hashlib

        half = max(1, -(-(size - 1).bit_length() // 2))
        mask, m64 = (1 << half) - 1, (1 << 64) - 1
        digest = hashlib.blake2b(key, digest_size=64).digest()
        keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]
        while True:
            left, right = v >> half, v & mask
            for k in keys:
                x = (right + k) & m64
                x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m64
                x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m64
                left, right = right, left ^ ((x ^ (x >> 31)) & mask)
            v = left << half | right
            if v < size:
                return v

    for size in (1, 2, 3, 17, 1000, 70_001):
        positions = range(0, size, max(1, size // 50))
        assert Shuffle(size, b"pin")(list(positions)).tolist() == [
            feistel(p, size, b"pin") for p in positions
        ]


def test_the_shuffle_looks_random() -> None:
    n = 100_000
    p = Shuffle(n, b"seed")(np.arange(n)).astype(float)
    x = np.arange(n, dtype=float)
    # rank correlation with the identity and with the next element: sd of a random permutation is 1 / sqrt(n)
    assert abs(np.corrcoef(x, p)[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(p[:-1], p[1:])[0, 1]) < 4 / np.sqrt(n)
    # neighbours stay neighbours twice on average in a random permutation (Poisson)
    assert (np.abs(np.diff(p)) == 1).sum() <= 12
    assert (p == x).sum() <= 8  # fixed points: Poisson(1)
    # 100 position bins x 100 value bins, 10 expected in each: chi-square with 99 * 99 degrees of freedom
    table = np.histogram2d(x, p, bins=100)[0]
    chi2 = ((table - 10) ** 2 / 10).sum()
    df = 99 * 99
    assert abs(chi2 - df) < 5 * np.sqrt(2 * df)


def test_cycles_of_the_shuffle_are_as_many_as_of_a_random_permutation() -> None:
    n, counts = 2000, []
    for key in range(40):
        p = Shuffle(n, bytes([key]))(np.arange(n))
        seen, cycles = np.zeros(n, bool), 0
        for start in range(n):
            if not seen[start]:
                cycles += 1
                at = start
                while not seen[at]:
                    seen[at] = True
                    at = p[at]
        counts.append(cycles)
    harmonic = sum(1 / k for k in range(1, n + 1))  # the mean; the variance is close to it
    assert abs(np.mean(counts) - harmonic) < 5 * np.sqrt(harmonic / len(counts))


# ------------------------------------------------------------------------------------------------------------
# The mixture

WEIGHTS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=7)


@given(weights=WEIGHTS, batch=st.integers(1, 9), steps=st.integers(1, 60))
def test_running_totals_stay_within_one_block_of_the_shares(
    weights: list[float], batch: int, steps: int
) -> None:
    quotas = cumulative_quotas([weights] * steps, batch)
    total = sum(map(Fraction, weights))
    for step in range(steps + 1):
        for i, weight in enumerate(weights):
            wanted = Fraction(weight) / total * batch * step
            assert abs(int(quotas[step, i]) - wanted) < 1 + Fraction(step + 1, 2**29)
    assert (np.diff(quotas, axis=0) >= 0).all()
    assert (quotas.sum(axis=1) == np.arange(steps + 1) * batch).all()


@given(data=st.data(), batch=st.integers(1, 5), steps=st.integers(1, 40), corpora=st.integers(2, 6))
def test_also_when_the_weights_move_with_training(
    data: st.DataObject, batch: int, steps: int, corpora: int
) -> None:
    row = st.lists(st.floats(0.001, 1.0), min_size=corpora, max_size=corpora)
    weights = data.draw(st.lists(row, min_size=steps, max_size=steps))
    quotas = cumulative_quotas(weights, batch)
    wanted = [Fraction(0)] * corpora
    for step, now in enumerate(weights):
        total = sum(map(Fraction, now))
        for i in range(corpora):
            wanted[i] += Fraction(now[i]) / total * batch
            assert abs(int(quotas[step + 1, i]) - wanted[i]) < 1 + Fraction(step + 2, 2**29)


@pytest.mark.parametrize(
    "weights",
    [[1, 10, 1, 3, 10], [8, 8, 1, 8, 1], [0.9] + [0.005] * 20],
    ids=["5 corpora", "3 equal", "21 corpora"],
)
def test_where_the_largest_remainder_would_fail(weights: list[float]) -> None:
    """With the first two, giving the spare block to the largest remainder comes to owe two blocks at once."""
    quotas = cumulative_quotas([weights] * 400, 1)
    drift = np.abs(quotas - np.arange(401)[:, None] * np.array(weights) / sum(weights))
    assert drift.max() < 1.000001
    assert (np.diff(quotas, axis=0) >= 0).all()


@given(weights=WEIGHTS, batch=st.integers(1, 9), steps=st.integers(1, 60), more=st.integers(1, 60))
def test_a_longer_run_begins_like_a_shorter_one(
    weights: list[float], batch: int, steps: int, more: int
) -> None:
    short, long = (
        cumulative_quotas([weights] * steps, batch),
        cumulative_quotas([weights] * (steps + more), batch),
    )
    assert (long[: steps + 1] == short).all()


# ------------------------------------------------------------------------------------------------------------
# The order

SOURCES = st.lists(
    st.builds(
        Source,
        key=st.text("abc", min_size=1, max_size=3),
        blocks=st.integers(1, 40),
        weight=st.floats(0.05, 1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**63 - 1), sources=SOURCES, batch=st.integers(1, 12), steps=st.integers(1, 25))
def test_every_block_once_an_epoch_and_the_inverse_inverts(
    seed: int, sources: list[Source], batch: int, steps: int
) -> None:
    order = Order(seed, sources, batch, steps)
    seen: Counter[Draw] = Counter()
    for step in range(steps):
        draws = order.step_blocks(step)
        assert len(draws) == batch
        seen.update(draws)
        assert [order.find(d) for d in draws] == [(step, slot) for slot in range(batch)]
    assert max(seen.values()) == 1  # never twice within an epoch
    for corpus, taken in enumerate(order.blocks_taken(steps)):
        drawn = sorted((d.epoch, d.block) for d in seen if d.corpus == corpus)
        full, rest = divmod(taken, sources[corpus].blocks)
        in_epoch = Counter(epoch for epoch, _ in drawn)
        # each epoch is finished before the next begins
        assert [in_epoch[e] for e in range(full)] == [sources[corpus].blocks] * full
        assert in_epoch[full] == rest
        assert len(drawn) == taken


def test_a_block_the_run_never_reaches_has_no_step() -> None:
    order = Order(1, [Source("a", 10)], 2, 3)
    read = {d.block for s in range(3) for d in order.step_blocks(s)}
    unread = next(b for b in range(10) if b not in read)
    assert order.find(Draw(0, 0, unread)) is None
    assert order.find(Draw(0, 5, 0)) is None


@given(
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=3, max_size=6),
    micro=st.sampled_from([1, 2, 3]),
)
def test_ranks_and_micro_batches_only_slice_a_step(worlds: list[int], micro: int) -> None:
    order = Order(7, [Source("a", 50, 0.7), Source("b", 9, 0.3)], 12, len(worlds))
    for step, world in enumerate(worlds):  # the number of ranks changes at every step
        consumed: list[tuple[int, Draw]] = []
        for rank in range(world):
            mine = order.step_blocks(step, slice(rank, None, world))
            for first in range(0, len(mine), micro):
                part = mine[first : first + micro]
                consumed += [(rank + (first + i) * world, d) for i, d in enumerate(part)]
        assert [d for _, d in sorted(consumed)] == order.step_blocks(step)


def test_a_restarted_order_goes_on_with_the_same_sequence() -> None:
    make = lambda: Order(3, [Source("a", 31, 0.6), Source("b", 17, 0.4)], 8, 30)  # noqa: E731
    whole = [make().step_blocks(s) for s in range(30)]
    resumed = make()
    assert [resumed.step_blocks(s) for s in range(13, 30)] == whole[13:]


def test_two_seeds_two_epochs_and_two_corpora_differ() -> None:
    def first_blocks(seed: int, key: str) -> list[int]:
        return [d.block for d in Order(seed, [Source(key, 1000)], 100, 20).step_blocks(0)]

    assert first_blocks(1, "a") != first_blocks(2, "a")
    assert first_blocks(1, "a") != first_blocks(1, "b")
    order = Order(1, [Source("a", 100)], 100, 2)
    assert [d.block for d in order.step_blocks(0)] != [d.block for d in order.step_blocks(1)]
    # two unrelated permutations of 1000 agree in about one place
    a = Order(1, [Source("a", 1000)], 1000, 1).step_blocks(0)
    b = Order(2, [Source("a", 1000)], 1000, 1).step_blocks(0)
    assert sum(x.block == y.block for x, y in zip(a, b, strict=True)) <= 8


def test_the_horizon_does_not_change_the_beginning() -> None:
    sources = [Source("a", 31, 0.6), Source("b", 17, 0.4)]
    assert Order(3, sources, 8, 10).step_blocks(9) == Order(3, sources, 8, 500).step_blocks(9)


def test_epochs_are_counted_from_the_order() -> None:
    order = Order(0, [Source("a", 64, 0.75), Source("b", 32, 0.25)], 16, 8)
    assert order.blocks_taken(8) == [96, 32]
    assert order.epochs() == [1.5, 1.0]


def test_steps_outside_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        Order(0, [Source("a", 4)], 2, 3).step_blocks(3)


@given(tokens=st.integers(0, 5000), context=st.integers(1, 64))
def test_blocks_cover_every_token_as_a_target_once(tokens: int, context: int) -> None:
    n = block_count(tokens, context)
    targets = [t for b in range(n) for t in range(block_span(b, context)[0] + 1, block_span(b, context)[1])]
    assert targets == list(range(1, n * context + 1))
    assert n * context + 1 <= max(tokens, 1) < (n + 1) * context + 1 + (tokens == 0)


@given(context=st.integers(1, 16), start=st.integers(0, 200), length=st.integers(1, 60))
def test_the_blocks_of_a_span_are_those_that_read_it(context: int, start: int, length: int) -> None:
    span = set(range(start, start + length))
    brute = [b for b in range(300) if span & set(range(*block_span(b, context)))]
    assert list(blocks_of_span(start, start + length, context)) == brute


# ------------------------------------------------------------------------------------------------------------
# Jumps and injections


def told(steps: int, jumps: list[tuple[int, int]], injected: list[int]) -> list[int | None]:
    """The batch of each step, None where it is injected: by walking through the run."""
    batches: list[int | None] = []
    batch = 0
    for step in range(steps):
        batch = dict(jumps).get(step, batch)
        batches.append(None if any(n <= batch < n + INJECTED_STEPS for n in injected) else batch)
        batch += 1
    return batches


@st.composite
def histories(draw: st.DrawFn) -> tuple[Order, list[int | None]]:
    steps = draw(st.integers(1, 40))
    places = sorted(draw(st.sets(st.integers(0, steps - 1), max_size=3)))
    jumps: list[tuple[int, int]] = []
    ahead = 0
    for place in places:
        ahead += draw(st.integers(0, 9))
        jumps.append((place, place + ahead))
    injected = draw(st.lists(st.integers(0, steps), max_size=2))
    sources = [Source("a", 37, 0.7), Source("b", 11, 0.3)]
    return Order(5, sources, 6, steps, jumps, injected), told(steps, jumps, injected)


@given(history=histories())
def test_a_step_reads_the_batch_that_walking_through_the_run_gives(
    history: tuple[Order, list[int | None]],
) -> None:
    order, batches = history
    plain = Order(5, order.sources, 6, 200)
    taken = np.zeros(2, dtype=int)
    for step, batch in enumerate(batches):
        assert order.injects(step) == (batch is None)
        assert order.injected_before(step) == batches[:step].count(None)
        assert order.blocks_taken(step) == taken.tolist()
        expected = [] if batch is None else plain.step_blocks(batch)
        assert order.step_blocks(step) == expected
        taken += np.bincount([d.corpus for d in expected], minlength=2)
    assert order.blocks_taken(len(batches)) == taken.tolist()


@given(history=histories())
def test_find_knows_what_was_jumped_over_or_replaced(history: tuple[Order, list[int | None]]) -> None:
    order, batches = history
    plain = Order(5, order.sources, 6, 200)
    for batch in range(max((b for b in batches if b is not None), default=0) + 3):
        for slot, draw in enumerate(plain.step_blocks(batch)):
            found = order.find(draw)
            assert found == ((batches.index(batch), slot) if batch in batches else None)


@given(data=st.data(), total=st.integers(10, 40))
def test_going_back_reads_nothing_again(data: st.DataObject, total: int) -> None:
    """Any number of times: all that was ever read, on the lost stretches too, was read once."""
    order = Order(3, [Source("a", 2000)], 4, total)
    read: list[Draw] = []
    step = 0
    for _ in range(data.draw(st.integers(0, 4))):
        done = data.draw(st.integers(step, total - 1))
        read += [draw for s in range(step, done) for draw in order.step_blocks(s)]
        step = data.draw(st.integers(0, done))
        order = order.jumped(step, done)
    read += [draw for s in range(step, total) for draw in order.step_blocks(s)]
    assert len(set(read)) == len(read)
    again = Order(3, order.sources, 4, total, order.jumps, order.injected)
    assert [again.step_blocks(s) for s in range(total)] == [order.step_blocks(s) for s in range(total)]


def test_an_injection_ahead_keeps_its_step_and_one_behind_is_jumped_over() -> None:
    order = Order(3, [Source("a", 2000)], 4, 60, injected=[10, 40])
    back = order.jumped(8, 12)  # in the middle of the first
    assert [s for s in range(60) if order.injects(s)] == [*range(10, 15), *range(40, 45)]
    assert [s for s in range(60) if back.injects(s)] == list(range(40, 45))
    assert back.batch_of(8) == 15  # the three injected ones that were left are jumped over too


@pytest.mark.parametrize("jumps", [[(5, 4)], [(5, 9), (4, 20)], [(5, 9), (7, 10)]])
def test_a_jump_goes_forward(jumps: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="goes forward"):
        Order(0, [Source("a", 100)], 2, 10, jumps)
