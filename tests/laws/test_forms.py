"""The law's arithmetic against closed forms, brute force, and sums checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import Law

BY_NAME = {which.name: which.law for which in forms.PUBLISHED}
ROUNDED, UNROUNDED = BY_NAME["Hoffmann rounded"], BY_NAME["Hoffmann"]
REFIT, BESIROGLU, MUENNIGHOFF = forms.REFIT.law, BY_NAME["Besiroglu"], BY_NAME["Muennighoff C4"]
# with alpha = beta = 1/2 all roots are squares: L(4e6, 1e8) = 2 + 1000/2000 + 3000/10000
SQUARES = Law(2.0, 1000.0, 0.5, 3000.0, 0.5)

laws = st.builds(
    Law,
    E=st.floats(0.1, 3),
    A=st.floats(10, 3000),
    alpha=st.floats(0.15, 0.8),
    B=st.floats(10, 3000),
    beta=st.floats(0.15, 0.8),
)


def test_a_loss_worked_by_hand() -> None:
    assert forms.loss(SQUARES, 4e6, 1e8) == pytest.approx(2.8, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "d", "rounded", "unrounded", "besiroglu"),
    [
        (5e6, 4.5e9, 4.648, 4.595, 4.686),
        (25e6, 900e6, 4.208, 4.106, 4.212),
        (100e6, 225e6, 4.348, 4.193, 4.449),
        (50e6, 43e9, 3.103, 3.072, 3.098),
        (50e6, 5e9, 3.460, 3.396, 3.420),
    ],
)
def test_losses_of_published_laws(
    n: float, d: float, rounded: float, unrounded: float, besiroglu: float
) -> None:
    found = [forms.loss(law, n, d) for law in (ROUNDED, UNROUNDED, BESIROGLU)]
    assert found == pytest.approx([rounded, unrounded, besiroglu], abs=6e-4)


@pytest.mark.parametrize(
    ("law", "billions"),
    [
        (Law(1.7, 380, 0.32, 290, 0.26), 19.0),
        (ROUNDED, 44.0),
        (UNROUNDED, 29.1),
        (BESIROGLU, 22.7),
        (REFIT, 22.6),
        (MUENNIGHOFF, 19.6),
    ],
)
def test_tokens_for_a_billion_parameters(law: Law, billions: float) -> None:
    assert forms.tokens_for(law, 1e9) / 1e9 == pytest.approx(billions, abs=0.06)


def test_the_optimum_of_a_small_budget() -> None:
    n, d = forms.optimum(ROUNDED, 1.35e17)
    assert (n / 1e6, d / 1e9) == pytest.approx((32.6, 0.69), rel=5e-3)
    n, d = forms.optimum(BESIROGLU, 1.35e17)
    assert (n / 1e6, d / 1e9) == pytest.approx((28.9, 0.78), rel=5e-3)


@given(laws, st.floats(16, 26))
@settings(max_examples=25)
def test_the_optimum_is_the_least_loss_on_its_budget(law: Law, log_flops: float) -> None:
    flops = 10**log_flops
    n, d = forms.optimum(law, flops)
    assert 6 * n * d == pytest.approx(flops, rel=1e-9)
    sizes = n * np.geomspace(0.1, 10, 2001)  # the middle one is n itself
    losses = forms.loss(law, sizes, flops / 6 / sizes)
    assert losses.argmin() == pytest.approx(1000, abs=2)
    assert forms.tokens_for(law, n) == pytest.approx(d, rel=1e-6)


@given(laws, st.floats(16, 26))
@settings(max_examples=25)
def test_the_flops_to_reach_a_loss_reach_it(law: Law, log_flops: float) -> None:
    least = float(forms.loss(law, *forms.optimum(law, 10**log_flops)))
    assert forms.flops_to_reach(law, least) == pytest.approx(10**log_flops, rel=1e-4)


def test_no_flops_reach_the_irreducible_loss() -> None:
    assert forms.flops_to_reach(REFIT, np.array([REFIT.E, 1.0])).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize(
    ("factor", "low", "high"),
    [(1.0, -1e-9, 1e-9), (2.0, 0.033, 0.045), (4.0, 0.13, 0.17), (10.0, 0.32, 0.39)],
)
def test_regret_is_small_near_the_optimum(factor: float, low: float, high: float) -> None:
    nats, share = forms.regret(REFIT, 1e20, factor)
    assert low <= share <= high
    n, d = forms.optimum(REFIT, 1e20)
    root = factor**0.5
    worst = max(forms.loss(REFIT, n / root, d * root), forms.loss(REFIT, n * root, d / root))
    assert nats == pytest.approx(worst - forms.loss(REFIT, n, d), abs=1e-12)


@pytest.mark.parametrize(
    ("epochs", "worth"), [(1, 1.0), (4, 0.93), (4.4, 0.92), (10, 0.78), (15, 0.68), (40, 0.38)]
)
def test_repeated_tokens_fade(epochs: float, worth: float) -> None:
    assert forms.effective_tokens(10e9, epochs * 10e9) / (epochs * 10e9) == pytest.approx(worth, abs=6e-3)


def test_fewer_tokens_than_there_are_count_in_full() -> None:
    assert forms.effective_tokens(10e9, 3e9) == 3e9


def test_rows_and_laws_are_one_thing() -> None:
    rows = np.arange(1.0, 11.0).reshape(2, 5)
    law = Law.of(rows)
    assert law.alpha.tolist() == [3.0, 8.0]
    assert law.rows().tolist() == rows.tolist()
    assert SQUARES.rows().tolist() == list(SQUARES)


def test_many_laws_against_many_points() -> None:
    rows = np.stack([SQUARES.rows(), REFIT.rows(), ROUNDED.rows()])
    n, d = np.array([4e6, 1e9]), np.array([1e8, 2e10])
    found = forms.loss(Law.of(rows).spread(), n, d)
    assert found.shape == (3, 2)
    assert found[0, 0] == pytest.approx(2.8)
    assert found[2, 1] == pytest.approx(forms.loss(ROUNDED, 1e9, 2e10))


def test_the_published_laws_name_their_source() -> None:
    assert forms.PUBLISHED[0] is forms.REFIT
    assert all("arXiv" in which.source and which.counts == "total" for which in forms.PUBLISHED)
    assert len(BY_NAME) == len(forms.PUBLISHED)
