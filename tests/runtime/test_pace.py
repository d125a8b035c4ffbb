"""Slower than planned, slower than usual: when it is said, why, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.runtime import pace
from x1_pretrain.runtime.gpu_health import GpuReading
from x1_pretrain.runtime.machine_reading import Seen
from x1_pretrain.runtime.pace import Facts, PaceKeeper, Slow, judge

WELL = GpuReading(60.0, 1900.0, 2000.0, 600.0, 700.0, 0.98)
MACHINE = Seen(0.0, 0.0, gpu=WELL, own_cpu_share=0.2, cpu_share=0.3, steal_share=0.0, quota_share=0.0)
FINE = Facts(
    tokens_left=360_000_000,
    basis="measured",
    source="measured on this GPU",
    peak_tokens_per_sec=200_000.0,
    usd_per_hr=Decimal("2.00"),
    compile_mode="default",
    attention="flash",
    wait_share=0.0,
    machine=MACHINE,
)


def with_gpu(**changes: Any) -> Facts:
    return replace(FINE, machine=replace(MACHINE, gpu=replace(WELL, **changes)))


def with_machine(**changes: Any) -> Facts:
    return replace(FINE, machine=replace(MACHINE, **changes))


# ------------------------------------------------------------------------------------------------------------
# One judgement


def test_the_thresholds_are_shares_of_the_planned_and_of_the_usual_speed() -> None:
    assert judge(70_000, 100_000, 100_000, FINE, 0.7) is None
    assert judge(69_999, 100_000, None, FINE, 0.7).kind == "plan"  # type: ignore[union-attr]
    assert judge(69_999, None, 100_000, FINE, 0.7).kind == "usual"  # type: ignore[union-attr]
    assert judge(60_000, 100_000, 100_000, FINE, 0.7).kind == "usual"  # type: ignore[union-attr]
    assert judge(80_000, 100_000, None, FINE, 0.9) is not None
    assert judge(1.0, None, None, FINE) is None


CAUSES = [
    (replace(FINE, wait_share=0.4), "waits for data 40%"),
    (replace(FINE, wait_share=0.4, data_on_network="nfs at /mnt"), "nfs at /mnt"),
    (with_gpu(trouble="the driver reports Xid 79"), "Xid 79"),
    (with_gpu(slowed=("heat",), temperature_c=91.0, clock_mhz=1000.0), "slowed down at 91 C (heat)"),
    (with_gpu(clock_mhz=1000.0, reasons=("power cap",)), "1000 of 2000 MHz (power cap, 600 of 700 W)"),
    (with_gpu(util_share=0.4), "busy only 40%"),
    (with_machine(steal_share=0.3), "gives 30% of the CPU to other machines"),
    (with_machine(quota_share=0.3), "waited 30% of the time"),
    (with_machine(cpu_share=0.95), "other processes use 75% of the CPU"),
    (with_machine(swap_gib=4.0), "4.0 GiB of memory"),
    (
        replace(FINE, compile_mode="off", compile_why="compile: off; default failed: no gcc"),
        "off; default failed",
    ),
    (replace(FINE, attention="sdpa", flash_possible=True), "flash_attn"),
    (replace(FINE, micro_batch=4, micro_batch_was=8, compile_mode="off"), "from 8 to 4"),
    (replace(FINE, basis="assumed", source="an assumed MFU of 0.35"), "an assumed MFU of 0.35"),
    (replace(FINE, peak_tokens_per_sec=120_000.0), "needs an MFU of 0.83"),
]


@pytest.mark.parametrize(("facts", "words"), CAUSES, ids=[words for _, words in CAUSES])
def test_a_cause_that_is_there_alone_is_the_only_one_named(facts: Facts, words: str) -> None:
    slow = judge(50_000, 100_000, None, facts)
    assert slow is not None
    assert len(slow.causes) == 1
    assert words in slow.causes[0]
    assert slow.causes[0] in slow.message


NO_CAUSES = [
    FINE,
    replace(FINE, wait_share=0.04),
    with_gpu(reasons=("power cap",), power_w=700.0),  # at its limit and at its clocks
    with_gpu(clock_mhz=300.0, util_share=0.7, max_clock_mhz=None),
    with_machine(steal_share=0.04, cpu_share=0.6),
    replace(FINE, attention="sdpa"),  # nothing better to be had
    replace(FINE, on_gpu=False, compile_mode="off", machine=replace(MACHINE, gpu=None)),
    replace(FINE, machine=None, wait_share=None, peak_tokens_per_sec=None),
]


@pytest.mark.parametrize("facts", NO_CAUSES, ids=range(len(NO_CAUSES)))
def test_what_does_not_explain_it_is_not_named(facts: Facts) -> None:
    slow = judge(50_000, 100_000, None, facts)
    assert slow is not None
    assert slow.causes == ("nothing that is watched explains it; x1 doctor measures this machine",)


def test_the_cause_that_explains_most_comes_first() -> None:
    """Half of the speed is gone: waiting 45% explains nine tenths, clocks at 80% two fifths."""
    facts = replace(with_gpu(clock_mhz=1600.0, reasons=("power cap",)), wait_share=0.45)
    slow = judge(50_000, 100_000, None, facts)
    assert slow is not None
    assert [c[:8] for c in slow.causes] == ["it waits", "the GPU "]
    slow = judge(50_000, 100_000, None, replace(facts, wait_share=0.1))
    assert slow is not None
    assert [c[:8] for c in slow.causes] == ["the GPU ", "it waits"]


def test_an_impossible_plan_is_named_before_everything_else() -> None:
    facts = replace(FINE, peak_tokens_per_sec=110_000.0, compile_mode="off", wait_share=0.1, basis="stated")
    slow = judge(50_000, 100_000, None, facts)
    assert slow is not None
    assert "the plan was wrong, not the machine" in slow.causes[0]
    assert "reaches 0.45" in slow.causes[0]


def test_the_plan_is_no_cause_where_the_run_was_faster_before() -> None:
    facts = replace(FINE, basis="assumed", source="an assumed MFU of 0.35")
    slow = judge(50_000, None, 100_000, facts)
    assert slow is not None
    assert "MFU" not in slow.message


def test_it_says_what_finishing_costs() -> None:
    """360 M tokens: 2 h at 50,000 a second instead of 1 h; at $2 an hour $4 instead of $2."""
    slow = judge(50_000, 100_000, None, FINE)
    assert slow is not None
    assert "2.0 h more instead of 1.0 h, $4.00 instead of $2.00 at $2.00/h" in slow.message
    assert "50% of the planned 100,000 (measured on this GPU)" in slow.message
    assert "Ctrl-C" in slow.message
    assert "\n" not in slow.message


def test_it_says_when_the_money_will_not_do() -> None:
    slow = judge(50_000, 100_000, None, replace(FINE, left_usd=Decimal("3.00")))
    assert slow is not None
    assert "$3.00 are left: that pays for 75% of the rest" in slow.message
    slow = judge(50_000, 100_000, None, replace(FINE, left_usd=Decimal("4.01")))
    assert slow is not None
    assert "ceiling" not in slow.message


def test_without_a_price_or_an_end_it_says_less() -> None:
    slow = judge(50_000, 100_000, None, replace(FINE, usd_per_hr=None))
    assert slow is not None
    assert "$" not in slow.message
    assert "2.0 h more" in slow.message
    slow = judge(50_000, 100_000, None, replace(FINE, tokens_left=0))
    assert slow is not None
    assert "To finish" not in slow.message


def test_the_fields_of_the_event() -> None:
    slow = judge(50_000, 100_000, None, FINE)
    assert slow is not None
    assert slow.fields.keys() == {"kind", "tokens_per_sec", "planned", "usual", "causes"}
    assert slow.fields["tokens_per_sec"] == 50_000


@given(
    st.floats(1, 1e9),
    st.floats(1e-3, 0.69),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["measured", "stated", "assumed"]),
)
def test_whatever_is_known_the_line_can_be_written(
    planned: float, share: float, wait: float, steal: float, on_gpu: bool, basis: pace.Basis
) -> None:
    facts = replace(with_machine(steal_share=steal), wait_share=wait, on_gpu=on_gpu, basis=basis)
    slow = judge(planned * share, planned, None, facts)
    assert slow is not None
    assert slow.causes
    found = pace.ranked("plan", planned * share, planned, facts)
    assert [c.share for c in found] == sorted((c.share for c in found), reverse=True)
    assert all(0 < c.share <= 1 for c in found)


# ------------------------------------------------------------------------------------------------------------
# Over time


def told(
    rates: Iterable[float | None], planned: float | None = None, wait: float = 0.0, row_s: float = 20.0
) -> list[tuple[int, Slow]]:
    """(row, what was said) of a session; None is a row of an evaluation."""
    keeper, said = PaceKeeper(planned), []
    for number, rate in enumerate(rates):
        row: dict[str, Any] = {"step": number, "elapsed_s": number * row_s, "data/wait_share": wait}
        row |= {"val/loss": 3.0} if rate is None else {"tokens_per_sec": rate}
        if slow := keeper.saw(row, FINE):
            said.append((number, slow))
    return said


def kinds(said: list[tuple[int, Slow]]) -> list[str]:
    return [slow.kind for _, slow in said]


def test_a_run_at_its_planned_speed_hears_nothing() -> None:
    assert told([100.0] * 300, planned=100.0) == []
    assert told([71.0] * 300, planned=100.0) == []


def test_a_run_below_the_plan_hears_it_once_and_soon() -> None:
    said = told([50.0] * 300, planned=100.0)
    assert kinds(said) == ["plan"]
    assert 5 <= said[0][0] <= 10


def test_the_first_rows_are_not_judged() -> None:
    assert told([5.0, 20.0] + [100.0] * 50, planned=100.0) == []


def test_one_slow_row_or_three_are_nothing() -> None:
    for slow in (1, 2, 3):
        assert told(([100.0] * 30 + [20.0] * slow) * 3, planned=None) == []


def test_a_fall_is_said_and_so_is_its_end() -> None:
    said = told([100.0] * 30 + [50.0] * 20 + [100.0] * 30)
    assert kinds(said) == ["usual", "well"]
    assert said[0][0] == 30 + pace.SLOW_ROWS - 1
    assert said[1][0] == 50 + pace.LOOK_BACK - 1
    assert said[0][1].tokens_per_sec == 50.0
    assert said[1][1].tokens_per_sec == 100.0


def test_speed_that_halves_now_and_then_is_seen_with_its_waiting() -> None:
    keeper, said = PaceKeeper(None), []
    for number in range(60):
        slow = number > 20 and number % 2 == 0
        row = {"tokens_per_sec": 50.0 if slow else 100.0, "data/wait_share": 0.5 if slow else 0.0}
        if found := keeper.saw(row, FINE):
            said.append(found)
    assert [slow.kind for slow in said] == ["usual"]
    assert "waits for data 50%" in said[0].message  # not the mean over all rows


def test_a_speed_that_stays_low_does_not_become_the_usual_one() -> None:
    assert kinds(told([100.0] * 30 + [50.0] * 1000)) == ["usual"]


def test_one_occasion_is_one_line() -> None:
    """The fall is below the plan too, but it is the same fall."""
    assert kinds(told([100.0] * 30 + [50.0] * 100 + [100.0] * 30, planned=100.0)) == ["usual", "well"]


def test_a_run_below_the_plan_that_also_falls_hears_both() -> None:
    said = told([60.0] * 30 + [30.0] * 30 + [60.0] * 30 + [100.0] * 30, planned=100.0)
    assert kinds(said) == ["plan", "usual", "well", "well"]
    assert "planned" in said[-1][1].message


def test_evaluations_are_no_rows_of_speed() -> None:
    rates = [r for n in range(100) for r in ([100.0, None] if n % 5 == 0 else [100.0])]
    assert told(rates, planned=100.0) == []


def test_short_rows_are_taken_together() -> None:
    """Rows of a second that jump about by a factor of two: on ten seconds it evens out."""
    jumpy = [100.0 if n % 2 else 45.0 for n in range(600)]
    assert told(jumpy, row_s=1.0) == []
    assert kinds(told(jumpy, row_s=20.0)) == ["usual"]


def test_a_demo_of_a_minute_is_never_judged() -> None:
    assert told([1.0] * 600, planned=100.0, row_s=0.1) == []


def test_switched_off() -> None:
    keeper = PaceKeeper(100.0, min_pace=0.0)
    assert not any(keeper.saw({"tokens_per_sec": 1.0}, FINE) for _ in range(50))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, None, "nan", True])
def test_a_speed_that_is_none_counts_for_nothing(rate: Any) -> None:
    keeper = PaceKeeper(100.0)
    for _ in range(30):
        assert keeper.saw({"tokens_per_sec": rate, "data/wait_share": "x"}, FINE) is None
    assert not keeper._latest


@given(st.lists(st.floats(1, 1000), max_size=150), st.none() | st.floats(1, 1000))
def test_every_fall_is_over_before_the_next(rates: list[float], planned: float | None) -> None:
    open_now: list[str] = []
    for _, slow in told(rates, planned):
        if slow.kind == "well":
            assert open_now
            open_now.pop()
        else:
            assert slow.kind not in open_now
            open_now.append(slow.kind)


@pytest.mark.parametrize("spread", [0.03, 0.1])
def test_noise_is_not_slowness(spread: float) -> None:
    import random

    for seed in range(20):
        noise = random.Random(seed)
        assert told([100 * math.exp(noise.gauss(0, spread)) for _ in range(500)], planned=95.0) == []
