"""The learning rate against its closed form."""

import math

import pytest

from x1_pretrain.config import OptimizerConfig
from x1_pretrain.learning.schedule import learning_rate


def rates(total: int, warmup: int, lr: float = 1e-3, min_lr: float = 1e-4) -> list[float]:
    config = OptimizerConfig(lr=lr, min_lr=min_lr, warmup_steps=warmup)
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
