"""Approach 2 against parabolas known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.laws.designs import TRUTH, isoflops, measured
from x1_pretrain.laws import forms
from x1_pretrain.laws.parabola import exponent, parabolas
from x1_pretrain.laws.points import Points, points


def bowl(flops: float, best: float, lowest: float, sizes: list[float], square: float = 0.02) -> Points:
    n = np.asarray(sizes)
    return points(n, flops / 6 / n, lowest * np.exp(square * np.log(n / best) ** 2))


def together(*parts: Points) -> Points:
    return points(*(np.concatenate([getattr(p, key) for p in parts]) for key in ("n", "d", "loss")))


def test_a_parabola_is_found_again() -> None:
    (found,) = parabolas(bowl(1.35e17, 33e6, 4.2, [5e6, 25e6, 1e8, 2e8]))
    assert found.n_opt == pytest.approx(33e6, rel=1e-9)
    assert found.loss_opt == pytest.approx(4.2, rel=1e-12)
    assert found.flops == pytest.approx(1.35e17)
    assert (found.points, found.inside) == (4, True)
    x = np.log(25e6)
    assert np.polyval(found.coefficients, x) == pytest.approx(
        np.log(4.2) + 0.02 * np.log(25 / 33) ** 2, rel=1e-9
    )
    assert found.coefficients == pytest.approx(
        (0.02, -0.04 * np.log(33e6), np.log(4.2) + 0.02 * np.log(33e6) ** 2), rel=1e-8
    )


def test_the_three_points_of_a_lab() -> None:
    """Through three points goes one parabola, and its lowest point is at 33.7M."""
    (found,) = parabolas(points([5e6, 25e6, 100e6], [4.5e9, 900e6, 225e6], [4.66, 4.40, 4.48]))
    assert found.n_opt == pytest.approx(33.7e6, rel=0.01)
    x = np.log([5e6, 25e6, 1e8])
    assert np.exp(np.polyval(found.coefficients, x)) == pytest.approx([4.66, 4.40, 4.48], rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "inside"), [([5e6, 1e7, 2e7], False), ([5e6, 1e7, 4e7], True), ([4e7, 1e8, 2e8], False)]
)
def test_a_lowest_point_beyond_the_sizes_says_so(sizes: list[float], inside: bool) -> None:
    (found,) = parabolas(bowl(1e18, 33e6, 3.0, sizes))
    assert found.n_opt == pytest.approx(33e6, rel=1e-6)
    assert found.inside is inside


@pytest.mark.parametrize("square", [-0.02, 0.0])
def test_a_parabola_that_does_not_open_upwards_has_no_lowest_point(square: float) -> None:
    (found,) = parabolas(bowl(1e18, 33e6, 3.0, [5e6, 25e6, 1e8], square))
    assert np.isnan(found.n_opt)
    assert np.isnan(found.loss_opt)
    assert not found.inside


def test_one_for_each_budget_with_three_sizes_from_the_smallest() -> None:
    three = bowl(1e18, 1e8, 3.0, [3e7, 1e8, 3e8])
    two = bowl(1e19, 3e8, 2.7, [1e8, 1e9])
    same = bowl(1e20, 1e9, 2.5, [3e8, 3e8, 1e9])
    low = bowl(1e17, 3e7, 3.5, [1e7, 3e7, 1e8, 2e8])
    found = parabolas(together(three, two, same, low))
    assert [round(np.log10(p.flops)) for p in found] == [17, 18]
    assert [p.points for p in found] == [4, 3]


def test_budgets_that_run_into_each_other_get_none() -> None:
    n = np.geomspace(1e7, 1e9, 40)
    assert parabolas(measured(n, 20 * n[::-1] ** 0.5 * 1e5 * np.geomspace(1, 5, 40))) == ()
    assert parabolas(points([], [], [])) == ()


def test_the_exponent_across_budgets() -> None:
    parts = [bowl(c, 1e8 * (c / 1e18) ** 0.46, 3.0, [1e7, 1e8, 1e9, 1e10]) for c in (1e18, 1e19, 1e21)]
    assert exponent(parabolas(together(*parts))) == pytest.approx(0.46, abs=1e-9)


def test_the_exponent_of_a_law_is_near_the_true_one() -> None:
    """a = beta / (alpha + beta); a parabola's is biased where they differ, by little here."""
    a = exponent(parabolas(isoflops([1e18, 1e19, 1e20], sizes=7, noise=0.0)))
    assert a == pytest.approx(TRUTH.beta / (TRUTH.alpha + TRUTH.beta), abs=0.02)
    found = parabolas(isoflops([1e18], sizes=7, noise=0.0))
    assert found[0].n_opt == pytest.approx(float(forms.optimum(TRUTH, 1e18)[0]), rel=0.1)


def test_no_exponent_without_two_lowest_points_between_their_sizes() -> None:
    good = bowl(1e18, 1e8, 3.0, [3e7, 1e8, 3e8])
    beyond = bowl(1e19, 1e9, 2.7, [3e7, 1e8, 3e8])
    assert exponent(parabolas(good)) is None
    assert exponent(parabolas(together(good, beyond))) is None
