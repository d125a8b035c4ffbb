"""Thinning, medians, axes, labels: against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.marks import mark
from x1_pretrain.report import curves
from x1_pretrain.report.curves import LABEL_SHARE, Axis

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=400), st.integers(1, 20))
def test_thinning_keeps_the_ends_and_every_extreme(values: list[float], buckets: int) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    place = x / max(1, len(y) - 1)
    thin_x, thin_y = curves.thinned(x, y, place, buckets)
    assert len(thin_x) <= max(4 * buckets, len(y) if len(y) <= 4 * buckets else 0)
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert (np.diff(thin_x) > 0).all()
    assert set(zip(thin_x, thin_y, strict=True)) <= set(zip(x, y, strict=True))
    for number in range(buckets):  # brute force: each bucket's own extremes
        own = y[np.minimum((place * buckets).astype(int), buckets - 1) == number]
        kept = thin_y[np.minimum((thin_x / max(1, len(y) - 1) * buckets).astype(int), buckets - 1) == number]
        if len(own):
            assert (kept.min(), kept.max()) == (own.min(), own.max())


def test_one_spike_among_a_hundred_thousand_values_stays() -> None:
    y = np.zeros(100_000)
    y[54_321] = 7.0
    x = np.arange(100_000.0)
    thin_x, thin_y = curves.thinned(x, y, x / 1e5)
    assert thin_x[thin_y == 7.0].tolist() == [54_321.0]
    assert len(thin_x) <= 4 * curves.BUCKETS


def test_a_bucket_of_nothing_finite_is_a_gap() -> None:
    y = np.where((np.arange(100) >= 40) & (np.arange(100) < 60), np.nan, 1.0)
    x = np.arange(100.0)
    _, thin_y = curves.thinned(x, y, x / 100, buckets=10)
    assert np.isnan(thin_y).sum() == 2  # one for each of the two empty buckets


@given(st.lists(finite | st.just(float("nan")), min_size=1, max_size=60), st.integers(0, 8))
def test_medians_are_those_of_the_values_around(values: list[float], half: int) -> None:
    y = np.array(values)
    places = np.arange(len(y))
    found = curves.medians_at(y, places, half)
    for at in places:
        reach = min(half, at)
        near = sorted(v for v in values[at - reach : at + reach + 1] if v == v)
        if not near:
            assert np.isnan(found[at])
            continue
        middle = len(near) // 2
        want = near[middle] if len(near) % 2 else (near[middle - 1] + near[middle]) / 2
        if at + half < len(y):  # at the end it only looks back, by half a window
            assert found[at] == pytest.approx(want)


def test_a_long_curve_is_its_median_over_its_raw_self() -> None:
    x = np.arange(3000.0)
    raw, middle = curves.curves("train", x, np.where(x == 1500, 99.0, 1.0))
    assert raw.faint
    assert raw.y.max() == 99.0
    assert set(middle.y) == {1.0}
    assert (middle.x[0], middle.x[-1]) == (0.0, 2999.0)
    assert [c.faint for c in curves.curves("train", x[:50], x[:50])] == [False]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_inside_and_evenly_apart(low: float, width: float, count: int) -> None:
    if width < 1e-6 * abs(low):  # finer than floating point
        return
    found = curves.ticks(low, low + width, count)
    assert len(found) <= count + 2
    assert all(low - 1e-6 * width <= t <= low + 1.000001 * width for t in found)
    if len(found) > 1:
        step = found[1] - found[0]
        digits = f"{step:.0e}".partition("e")[0]
        assert digits in {"1", "2", "5"}
        assert np.allclose(np.diff(found), step, rtol=1e-3)


@given(st.floats(1e-8, 1e8), st.floats(1.01, 1e9))
def test_log_ticks_lie_inside_and_are_few(low: float, times: float) -> None:
    found = curves.log_ticks(low, low * times)
    assert all(low * 0.998 <= t <= low * times * 1.002 for t in found)
    assert len(found) <= 10


def test_an_axis_places_values() -> None:
    assert Axis(2, 6).place(np.array([2.0, 4.0, 7.0])).tolist() == [0.0, 0.5, 1.25]
    log = Axis(1, 100, log=True).place(np.array([1.0, 10.0, 100.0, 0.0]))
    assert log[:3] == pytest.approx([0, 0.5, 1])
    assert np.isnan(log[3])
    one = Axis(3, 3)
    assert one.low < 3 < one.high


@pytest.mark.parametrize(
    ("value", "step", "share", "want"),
    [
        (0.0, 0.5, False, "0.0"),
        (3.25, 0.25, False, "3.2"),
        (1.2e9, 2e8, False, "1.2B"),
        (300_000, 100_000, False, "300K"),
        (0.4, 0.1, True, "40%"),
        (0.005, 0.005, True, "0.5%"),
        (0.001, 0.0, False, "0.001"),
        (5.0, 5.0, False, "5"),
    ],
)
def test_ticks_are_written_short(value: float, step: float, share: bool, want: str) -> None:
    assert curves.tick_text(value, step, share) == want


@given(st.lists(st.tuples(st.sampled_from(curves.IMPORTANCE), st.floats(-0.2, 1.2)), max_size=60))
def test_no_two_labels_of_a_row_touch(given_marks: list[tuple[str, float]]) -> None:
    marks = [mark(kind) for kind, _ in given_marks]
    places = [at for _, at in given_marks]
    rows = curves.lanes(marks, places)
    shown = [(row, at) for row, at in zip(rows, places, strict=True) if row is not None]
    for row, at in shown:
        assert 0 <= at <= 1
        others = [other for r, other in shown if r == row]
        assert sum(abs(at - other) < LABEL_SHARE for other in others) == 1  # itself
    if sum(0 <= at <= 1 for at in places):
        assert shown  # somebody gets a place


def test_a_spike_gets_a_label_before_anything_else() -> None:
    marks = [*[mark("resume")] * 5, mark("spike")]
    rows = curves.lanes(marks, [0.5] * 6)
    assert rows[5] == 0
    assert sum(row is not None for row in rows) == curves.LANES
