"""iso-flop.png: what is drawn, read back from the axes; how it looks was judged by eye."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.laws.test_prose import LAW, build, grid, lab
from x1_pretrain.laws import forms, picture
from x1_pretrain.laws.points import points
from x1_pretrain.laws.results import Parabola, Report


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draws a report and hands back the figure's two axes."""

    monkeypatch.setattr(picture, "DPI", 40)  # what is read back does not depend on it

    def draw(report: Report) -> Any:
        kept: list[Figure] = []
        save = Figure.savefig

        def keep(figure: Figure, *args: Any, **more: Any) -> None:
            kept.append(figure)
            save(figure, *args, **more)

        monkeypatch.setattr(Figure, "savefig", keep)
        picture.draw(report, tmp_path / "iso-flop.png")
        monkeypatch.setattr(Figure, "savefig", save)
        return kept[0].axes

    return draw


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax: Any, label: str) -> Any:
    return next(found for found in ax.lines if found.get_label() == label)


def test_a_file_wide_enough_to_read(tmp_path: Path) -> None:
    picture.draw(build(), tmp_path / "iso-flop.png")
    with Image.open(tmp_path / "iso-flop.png") as image:
        assert image.width >= 1200
        shades = np.asarray(image.convert("L"))
    assert shades.min() < 60
    assert shades.max() == 255


def test_each_budget_has_a_look_of_its_own(drawn: Any) -> None:
    left, _ = drawn(build())
    assert legend(left)[:3] == ["1e19 FLOPs", "1e20 FLOPs", "1e21 FLOPs"]
    entries = [line(left, label) for label in legend(left)[:3]]
    assert len({entry.get_marker() for entry in entries}) == 3
    assert len({str(entry.get_linestyle()) for entry in entries}) == 3


def test_the_runs_and_the_curves_are_where_they_belong(drawn: Any) -> None:
    report = build()
    left, _ = drawn(report)
    shown = np.concatenate(
        [np.column_stack(found.get_data()) for found in left.lines if len(found.get_xdata()) == 5]
    )
    expected = np.column_stack([report.points.n, report.points.loss])
    assert np.sort(shown, axis=0) == pytest.approx(np.sort(expected, axis=0))
    curves = [found for found in left.lines if len(found.get_xdata()) == picture.SAMPLES]
    assert len(curves) == 3
    for curve, flops in zip(curves, (1e19, 1e20, 1e21), strict=True):
        n, nats = curve.get_data()
        assert nats == pytest.approx(forms.loss(LAW, n, flops / 6 / n))


def test_the_best_size_of_a_budget_has_its_interval(drawn: Any) -> None:
    report = build(spread=0.3)
    left, _ = drawn(report)
    bars = [found.get_xdata() for found in left.lines if len(found.get_xdata()) == 2]
    assert len(bars) == 3
    for (low, high), flops in zip(bars, (1e19, 1e20, 1e21), strict=True):
        n, _ = forms.optimum(LAW, flops)
        # ln N_opt scatters as beta / (alpha + beta) of ln D_opt at fixed N
        half = 1.96 * 0.3 * LAW.beta / (LAW.alpha + LAW.beta)
        assert (low, high) == pytest.approx((n * np.exp(-half), n * np.exp(half)), rel=0.1)
    assert "the law's best N, 95 % interval" in legend(left)
    none, _ = drawn(build(method="none"))
    assert not [found for found in none.lines if len(found.get_xdata()) == 2]
    assert "the law's best N" in legend(none)


def test_the_size_that_was_asked_for(drawn: Any) -> None:
    report = build(target_n=5e9)
    _, right = drawn(report)
    tokens = report.fitted.tokens_for(5e9)
    band = line(right, "D_opt by this fit")
    assert band.get_xdata()[-1] == pytest.approx(max(5e9, report.points.n.max()))
    assert band.get_ydata() == pytest.approx(forms.tokens_for(LAW, band.get_xdata()))
    star = next(text for text in legend(right) if text.startswith("5 B: "))
    assert f"{tokens.point / 1e9:.3g} B [" in star
    published = next(found for found in right.lines if str(found.get_label()).startswith("Hoffmann refit"))
    assert published.get_ydata() == pytest.approx(forms.tokens_for(forms.REFIT.law, published.get_xdata()))
    assert "95 % interval" in legend(right)


def test_a_posterior_is_named_and_shown_beside_its_prior(drawn: Any) -> None:
    left, right = drawn(build(lab(), "posterior", spread=1.0, dominated=True))
    assert "posterior, middle 95 %, prior-dominated" in legend(right)
    assert "the prior alone, middle 95 %" in legend(right)
    assert "prior-dominated" in left.figure.get_suptitle()
    assert not [text for text in legend(right) + legend(left) if "interval" in text]


def test_parabolas_are_thin_and_a_second_opinion(drawn: Any) -> None:
    n = np.log(forms.optimum(LAW, 1e19)[0])
    bowl = Parabola(1e19, 5, float(np.exp(n)), 3.0, True, (0.01, -0.02 * n, 1.1 + 0.01 * n * n))
    left, right = drawn(build(parabolas=(bowl,)))
    shown = line(left, "approach 2, second opinion")
    assert shown.get_linewidth() < 1
    assert min(shown.get_ydata()) == pytest.approx(np.exp(1.1), rel=1e-3)
    mark = line(right, "approach 2, second opinion")
    assert mark.get_xdata()[0] * mark.get_ydata()[0] * 6 == pytest.approx(1e19)
    assert "approach 2, second opinion" not in legend(drawn(build())[0])


def test_many_budgets_are_shown_in_a_few_bands(drawn: Any) -> None:
    many = grid(tuple(np.geomspace(1e18, 1e22, 12)))
    n = np.geomspace(1e7, 1e9, 100)
    running = points(n, 20 * n, forms.loss(LAW, n, 20 * n))
    for data in (many, running):
        groups = picture.groups(build(data))
        assert 3 <= len(groups) <= picture.BANDS
        assert np.sum([group.member for group in groups], axis=0).tolist() == [1] * len(data)
        assert all(" to " in group.label for group in groups)
        left, _ = drawn(build(data))
        assert len(legend(left)) <= picture.BANDS + 2


def test_curves_are_along_6nd_where_flops_are_counted_otherwise() -> None:
    data = grid((1e19, 1e20))
    counted = replace(data, flops=2 * data.flops, flops_basis="as measured")
    groups = picture.groups(build(counted))
    assert [group.flops for group in groups] == pytest.approx([1e19, 1e20])
    assert [group.label for group in groups] == ["2e19 FLOPs", "2e20 FLOPs"]


@pytest.mark.parametrize(
    ("values", "ends", "expected"),
    [
        ([5e6, 25e6, 1e8], (3e6, 1.5e8), [5e6, 25e6, 1e8]),
        (None, (0.8e6, 3e7), [1e6, 2e6, 5e6, 1e7, 2e7]),
        ([1e6, 3e6, 9e6], (0.8e6, 1e9), [1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9]),
        (None, (0.8e4, 1.5e12), [1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12][::2]),
    ],
)
def test_ticks_are_those_a_person_would_write(
    values: list[float] | None, ends: tuple[float, float], expected: list[float]
) -> None:
    found = picture.ticks(None if values is None else np.array(values), ends)
    assert found == pytest.approx(expected)


def test_sizes_on_the_axis_read_as_sizes(drawn: Any) -> None:
    left, right = drawn(build(lab(), "posterior", dominated=True))
    assert [text.get_text() for text in left.get_xticklabels()] == ["5M", "25M", "100M"]
    assert [text.get_text() for text in right.get_xticklabels()] == ["5M", "25M", "100M", "1B"]


def test_matplotlib_waits_until_a_picture_is_drawn() -> None:
    code = "import sys, x1_pretrain.laws.picture; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
