"""The pictures: that they are drawn from any run, and that what they show is what the rows say."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from x1_pretrain.records import plots
from x1_pretrain.records.plots import History, draw_all, smooth


def made_rows(steps: int) -> list[dict[str, float]]:
    generator = np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        where = {
            "step": step,
            "tokens": step * 1000,
            "elapsed_s": step * 2.0,
            "session": 1 + (step > steps // 2),
        }
        rate = 500.0 + generator.normal()
        rows.append(
            {**where, "train/loss": 3 + 5 / step, "grad_norm": 1.0, "param_norm": 9.0, "tokens_per_sec": rate}
        )
        if step % (steps // 3) == 0:
            rows.append({**where, "val/loss": 3.5, "val/web/loss": 3.25, "val/code/loss": 3.75})
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures as they were just before they became files."""
    figures: dict[str, Figure] = {}
    save = plots._save

    def keep(figure: Figure, file: Path) -> None:
        figures[file.name] = figure
        save(figure, file)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def labels(figure: Figure, place: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[place].get_legend().get_texts()]


@pytest.mark.parametrize("steps", [30, 400])
def test_three_png_files_of_a_short_and_of_a_long_run(tmp_path: Path, steps: int) -> None:
    names = draw_all(History("a run", made_rows(steps), [steps // 2], 1.0), tmp_path)
    assert names == ["loss-curve.png", "gradnorm-curve.png", "throughput.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [[], [{"step": 0, "tokens": 0, "val/loss": 5.0}], made_rows(4)[:1]])
def test_a_run_that_hardly_began_is_drawn_too(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    draw_all(History("begun", rows), tmp_path)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nan_and_infinite_losses_do_not_spoil_the_picture(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    rows = made_rows(400)
    for place, bad in ((30, float("nan")), (31, float("inf")), (200, 1e9)):
        rows[place] = rows[place] | {"train/loss": bad, "grad_norm": bad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw_all(History("spiked", rows), tmp_path)
    low, high = drawn["loss-curve.png"].axes[0].get_ylim()
    assert 2 < low < 3.1
    assert 8 < high < 9
    said = [text.get_text() for text in drawn["loss-curve.png"].axes[0].texts]
    assert said == ["1 higher point not shown"]


def test_the_loss_picture_names_domains_final_values_and_resumes(
    tmp_path: Path, drawn: dict[str, Figure]
) -> None:
    draw_all(History("my-run", made_rows(30), [10, 20]), tmp_path)
    figure = drawn["loss-curve.png"]
    assert figure.get_suptitle() == "my-run"
    assert labels(figure) == [
        "train: 3.167 at the end",  # 3 + 5/30
        "val: 3.500 at the end",
        "val/code: 3.750 at the end",
        "val/web: 3.250 at the end",
        "resumed (2 times)",
    ]
    upright = [line.get_xdata()[0] for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert upright == [10, 20]


def test_lines_differ_by_style_so_that_grey_suffices(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    draw_all(History("my-run", made_rows(30)), tmp_path)
    lines = [line for line in drawn["loss-curve.png"].axes[0].lines if line.get_label()[0] != "_"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines) == 4


def test_the_one_domain_of_a_run_is_not_drawn_twice(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    rows = [
        {"step": 1, "tokens": 9, "train/loss": 2.0},
        {"step": 1, "tokens": 9, "val/loss": 3.0, "val/web/loss": 3.0},
    ]
    draw_all(History("one", rows), tmp_path)
    assert labels(drawn["loss-curve.png"]) == ["train: 2.000 at the end", "val/web: 3.000 at the end"]


def test_tokens_stand_over_the_steps(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    draw_all(History("my-run", made_rows(30)), tmp_path)
    (top,) = drawn["loss-curve.png"].axes[0].child_axes
    assert top.get_xlabel() == "tokens (thousands)"
    assert top.get_xlim() == pytest.approx((0, 30))  # 30 steps of 1000 tokens, in thousands


def test_throughput_is_over_training_time_with_its_median(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    rows = [row | {"mfu": 0.25} if "train/loss" in row else row for row in made_rows(30)]
    for number, row in enumerate(row for row in rows if "train/loss" in row):
        row.update(tokens_per_sec=100.0 + number, elapsed_s=number * 600.0)
    draw_all(History("my-run", rows, [10]), tmp_path)
    ax = drawn["throughput.png"].axes[0]
    assert ax.get_xlabel().startswith("training time (hours")
    assert "median: 114.5 tokens/s, MFU 25.0%" in labels(drawn["throughput.png"])
    upright = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "resumed"]
    assert upright == [pytest.approx(9 * 600 / 3600)]  # the tenth row, in hours


def brute_median(values: np.ndarray, window: int) -> list[float]:
    half, size, found = window // 2, len(values), []
    for at in range(size):
        left = at - min(at, half)
        right = min(size - 1, at + min(at, half)) if at < half else min(size - 1, at + half)
        found.append(float(np.nanmedian(np.where(np.isfinite(values), values, np.nan)[left : right + 1])))
    return found


def test_smoothing_is_the_median_of_the_window_seen_by_brute_force() -> None:
    values = np.random.default_rng(1).normal(size=300)
    values[[5, 100, 101]] = [np.nan, np.inf, 1e6]
    assert smooth(values, 9).tolist() == pytest.approx(brute_median(values, 9))


def test_a_spike_leaves_the_smoothed_curve_alone_and_the_first_value_stands() -> None:
    values = np.linspace(10, 3, 200)
    spiked = values.copy()
    spiked[100] = 1000
    assert np.abs(smooth(spiked, 11) - values).max() < 0.2
    assert smooth(values, 11)[0] == 10


@pytest.mark.parametrize("name", ["grad_norm", "train/loss", "val/loss", "param_norm", "tokens_per_sec"])
@pytest.mark.parametrize(("damaged", "steps"), [(-1e308, 30), (1e308, 300), (float("inf"), 300)])
def test_a_damaged_number_is_drawn_as_none(tmp_path: Path, name: str, damaged: float, steps: int) -> None:
    rows = made_rows(steps)
    rows[10] |= {name: damaged}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = draw_all(History("run", rows, clip=1.0), tmp_path)
    assert all((tmp_path / one).stat().st_size > 1000 for one in names)
