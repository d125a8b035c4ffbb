"""How often to save, against what a lost machine takes: by hand, and for any run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.planning.losing import LOSS_S, Rates, Timing, round_down, round_up

A100 = Rates(step_s=2.92, write_s=2.134, send_s=10.67, look_s=15.0)  # 1.07 GB at 500 and at 100 MB/s
SECONDS = st.floats(0.001, 1e4)
RATES = st.builds(Rates, st.floats(1e-4, 1e3), SECONDS, SECONDS, st.floats(0.1, 600))


@pytest.mark.parametrize(
    ("every", "minutes", "steps"), [(100, 5.4, 109), (300, 15.1, 309), (1800, 88.1, 1809)]
)
def test_the_table_of_the_page(every: int, minutes: float, steps: int) -> None:
    """docs/mirror.md, x1-50m on an A100."""
    found = A100.timing(every)
    assert found.worst_s() / 60 == pytest.approx(minutes, abs=0.05)
    assert found.worst_steps(A100.step_s) == pytest.approx(steps, abs=0.5)


def test_a_mirror_that_lags_loses_the_sending_twice() -> None:
    """100 s between two, 200 to send: the last that is there began to be sent two sendings ago."""
    assert not Timing(98, 2, 195, 5).keeps_up
    assert Timing(98, 2, 195, 5).worst_s() == 98 + 2 + 2 + 2 * (195 + 5)
    assert Timing(198, 2, 195, 5).keeps_up


def test_a_quarter_of_an_hour() -> None:
    assert A100.every() == 300
    assert A100.every(at_most=120) == 100


def test_a_large_checkpoint_is_written_in_a_hundredth_of_the_time() -> None:
    """24 s each: every 2,400 s, which is more than a quarter of an hour."""
    assert Rates(step_s=10.0, write_s=24.0, send_s=120.0, look_s=15.0).every() == 250


def test_a_slow_line_sends_each() -> None:
    found = Rates(step_s=1.0, write_s=1.0, send_s=2000.0, look_s=15.0)
    assert found.every() == 2500
    assert found.timing(2500).keeps_up
    assert found.every(at_most=40) == 100  # a run of 800 steps: twenty in all, but for the writing


@given(RATES, st.one_of(st.just(math.inf), st.integers(1, 10**6)))
def test_any_cadence_is_round_and_has_a_reason(rates: Rates, at_most: float) -> None:
    every = rates.every(at_most)
    assert every in (round_down(every), round_up(every))
    timing = rates.timing(every)
    assert timing.write_s <= 0.0100001 * timing.period_s
    assert timing.keeps_up or every >= at_most
    sooner = rates.timing(every / 2.01)  # the next smaller round number is nearer than that
    reasons = [
        timing.worst_s() <= 1.05 * LOSS_S * 1.0001 and every <= at_most,
        sooner.write_s > 0.01 * sooner.period_s,
        not sooner.keeps_up,
        every == 1,
    ]
    assert any(reasons)


@given(st.floats(1, 1e9))
def test_round_numbers_are_near(value: float) -> None:
    below, above = round_down(value), round_up(value)
    assert below <= value <= above
    assert above <= 2 * below  # from 1 to 2; else nearer
    assert len(str(below).rstrip("0")) <= 2
