"""The learning rate against its closed form."""

import math
from typing import Any

import pytest

from x1_pretrain.config import OptimizerConfig
from x1_pretrain.learning.schedule import first_difference, learning_rate


def rates(total: int, warmup: int, lr: float = 1e-3, min_lr: float = 1e-4, **more: Any) -> list[float]:
    config = OptimizerConfig(lr=lr, min_lr=min_lr, warmup_steps=warmup, **more)
    return [learning_rate(step, config, total) for step in range(total)]


def test_warm_up_is_linear_and_its_first_update_counts() -> None:
    found = rates(100, 10)
    assert found[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])


def test_the_cosine_falls_from_the_peak_to_the_floor_in_the_last_update() -> None:
    found = rates(111, 11)  # peak at update 10, floor at update 110
    expected = [1e-4 + 9e-4 * (1 + math.cos(math.pi * k / 100)) / 2 for k in range(101)]
    assert found[10:] == pytest.approx(expected)
    assert found[10] == 1e-3
    assert found[110] == pytest.approx(1e-4, rel=1e-12)
    assert found[60] == pytest.approx(5.5e-4)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    found = rates(11, 0)
    assert found[0] == 1e-3
    assert found[5] == pytest.approx(5.5e-4)
    assert found[10] == pytest.approx(1e-4)


def test_warm_up_all_the_way() -> None:
    assert rates(4, 4) == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1)])
def test_a_single_update_has_the_full_rate(total: int, warmup: int) -> None:
    assert rates(total, warmup) == [1e-3]


def test_past_the_end_it_stays_at_the_floor() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=5)
    assert learning_rate(5000, config, 50) == pytest.approx(1e-4)


def test_the_50m_run() -> None:
    config = OptimizerConfig(lr=3e-4, min_lr=3e-5, warmup_steps=1000)
    assert learning_rate(0, config, 84_000) == pytest.approx(3e-7)
    assert learning_rate(999, config, 84_000) == pytest.approx(3e-4)
    assert learning_rate(83_999, config, 84_000) == pytest.approx(3e-5)


# ------------------------------------------------------------------------------------------------------------
# Warm-up, stable, decay


def wsd(total: int, warmup: int, decay: int | None = None) -> list[float]:
    return rates(total, warmup, schedule="wsd", decay_steps=decay)


def test_wsd_holds_the_rate_and_falls_by_the_root_at_the_end() -> None:
    found = wsd(100, 10, 25)
    assert found[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert found[9:75] == [1e-3] * 66
    assert found[75:] == pytest.approx([1e-4 + 9e-4 * (1 - (k / 25) ** 0.5) for k in range(1, 26)])
    assert found[99] == 1e-4  # exactly, in the last update
    assert wsd(100, 10) == wsd(100, 10, 20)


def test_wsd_without_a_decay_is_constant_and_with_no_stable_part_only_rises_and_falls() -> None:
    assert wsd(10, 0, 0) == [1e-3] * 10
    assert wsd(10, 6, 4) == pytest.approx(
        [*(1e-3 * k / 6 for k in range(1, 7)), *(1e-4 + 9e-4 * (1 - (k / 4) ** 0.5) for k in range(1, 5))]
    )
    assert wsd(1, 0, 1) == [1e-4]


def test_runs_of_any_length_share_their_beginning() -> None:
    """What branches rest on: up to its own decay a short run is a long one, exactly; a cosine never is."""
    for short, decay in ((50, 10), (100, 20), (999, 1)):
        assert (
            wsd(1000, 10, 200)[: min(800, short - decay)] == wsd(short, 10, decay)[: min(800, short - decay)]
        )
    assert rates(50, 10)[10:20] != rates(100, 10)[10:20]


def test_the_first_update_that_differs_is_named_from_one() -> None:
    def of(decay: int, total: int) -> tuple[OptimizerConfig, int]:
        return OptimizerConfig(lr=1e-3, warmup_steps=5, schedule="wsd", decay_steps=decay), total

    assert first_difference(40, of(10, 50), of(20, 100)) is None
    assert first_difference(41, of(10, 50), of(20, 100)) == 41
    assert first_difference(90, of(20, 100), of(10, 50)) == 41
