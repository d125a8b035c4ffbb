"""`x1 report`: where the page goes, several runs, predictions, the watch."""

from __future__ import annotations

import contextlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.report import builder
from tests.report.reading import Reading
from x1_pretrain.command import run as command
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.report.blocks import Chart, Page, Views
from x1_pretrain.report.command import app, page_of, watching
from x1_pretrain.report.page import html


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return builder.build(tmp_path / "runs" / "a", total=400)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = command(app, [str(one) for one in arguments])
    return code, "".join(capsys.readouterr())


def test_one_run_has_its_page_in_its_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, run)
    assert code == 0
    assert f"report: {run / 'report.html'}" in text
    assert "<title>a: report</title>" in (run / "report.html").read_text()
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_a_run_is_found_by_its_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(run.parent.parent):
        assert said(capsys, "a", "--output", "page.html")[0] == 0
        assert Path("page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("nowhere",), "there is no such folder"),
        (("{run}", "--output", "{run}/config.yaml/x.html"), "can't be written"),
        (("{run}", "--prediction", "{run}/none.json"), "can't be read"),
        (("{run}", "--prediction", "{run}/config.yaml"), "not valid JSON"),
        (("{run}", "--prediction", "{run}/manifest.json"), "expected a fit.json"),
        (("{run}", "{run}/.", "--prediction", "x"), "speaks of one run"),
        (("{run}", "--every", "0"), "--every"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], wanted: str
) -> None:
    code, text = said(capsys, *(one.format(run=run) for one in arguments))
    assert code == 2
    assert wanted in text
    assert len(text.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------
# Several runs


def test_several_runs_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = builder.build(run.parent / "b", total=400, optimizer__lr=1e-4, training__z_loss=1e-4)
    with contextlib.chdir(run.parent.parent):
        assert said(capsys, "a", "b")[0] == 0
        text = Path("report.html").read_text()
    page = Reading(text)
    table = re.search(r"<caption>Fields that differ</caption>.*?</table>", text, re.S)
    assert table
    fields = re.findall(r'<th scope="row">([^<]*)</th>', table[0])
    assert sorted(fields) == ["optimizer.lr", "training.z_loss"]
    assert "optimizer.lr 0.0003 0.0001" in page.words
    last = [r for r in builder.read(other / "metrics.jsonl") if "val/loss" in r][-1]["val/loss"]
    assert f"validation loss, last {last:.4f} {last:.4f}" in page.words
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', text)
    assert all("a" in one and "b" in one for one in legends)


def test_runs_of_one_name_are_told_apart(run: Path) -> None:
    twin = run.parent / "twin" / "a"
    builder.build(twin, total=400)
    page = page_of([open_run(run), open_run(twin)], datetime.now(UTC))
    assert str(twin) in page.title
    Reading(html(page))


def test_a_spike_of_one_step_is_seen_and_marked_beside_another_run(run: Path) -> None:
    """Rows every ten steps know nothing of it; the steps do."""
    other = builder.build(run.parent / "b", total=400)
    steps = builder.read(other / "steps.jsonl")
    builder.write(
        other / "steps.jsonl",
        [r | ({"loss": 99.0, "grad_norm": 777.0} if r["step"] == 333 else {}) for r in steps],
    )
    page = page_of([open_run(run), open_run(other)], datetime.now(UTC))
    text = html(page)
    charts = {s.id: [c for b in s.blocks if isinstance(b, Views) for _, c in b.views] for s in page.sections}
    norms = [b for s in page.sections if s.id == "norms" for b in s.blocks if isinstance(b, Chart)]
    train = [c for c in charts["loss"] if c.id == "train-0"]
    assert max(float(c.y.max()) for c in train[0].curves) == 99.0
    assert max(float(c.y.max()) for c in norms[0].curves) == 777.0
    assert "1 higher value above the frame" in text
    marks = [(mark.label, mark.text) for mark in train[0].marks]
    assert {label for label, _ in marks} == {"S1", "S2", "I1", "I2"}
    assert next(said for label, said in marks if label == "S2").startswith("b: injected spike at step 188")
    assert {m.label for m in norms[0].marks} == {"S1", "S2", "I1", "I2"}
    assert text.count("b: injected spike at step 188") > 1  # in the chart and in the table


def test_runs_of_one_config_are_named_by_their_folders(run: Path) -> None:
    other = run.parent / "b"
    builder.build(run.parent / "x" / "a", total=400).rename(other)
    page = page_of([open_run(run), open_run(other)], datetime.now(UTC))
    assert page.title == "a · a (b)"


def test_eight_runs_one_of_them_empty(run: Path) -> None:
    folders = [run, *(builder.build(run.parent / f"r{n}", total=60, done=10 * n) for n in range(7))]
    page = html(page_of([open_run(folder) for folder in folders], datetime.now(UTC)))
    Reading(page)
    styles = set(re.findall(r'<path class="(c c\d(?: d\d)?)" d="M0 4H36"', page))
    assert len(styles) >= 6


def broken_at(folder: Path) -> Path:
    builder.build(folder, total=60)
    (folder / "manifest.json").write_text("{")
    return folder


def test_a_broken_run_is_named_and_the_others_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place of several, however many are left."""
    builder.build(run.parent / "b", total=400)
    broken_at(run.parent / "broken")
    with contextlib.chdir(run.parent.parent):
        for names, title in ((("a", "broken", "b", "gone"), "a · b"), (("a", "broken"), "a")):
            capsys.readouterr()
            assert command(app, list(names)) == 1
            out, err = capsys.readouterr()
            assert out.startswith("report: report.html")
            assert err.count("\n") == len(err.splitlines()) == sum(one in ("broken", "gone") for one in names)
            assert "x1: runs/broken/manifest.json: not valid JSON" in err
            text = Path("report.html").read_text()
            assert f"<title>{title}: report</title>" in text
            assert "Not on this page: runs/broken/manifest.json: not valid JSON" in Reading(text).words
    assert not (run / "report.html").exists()


def test_broken_runs_alone_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken_at(run.parent / "broken")
    with contextlib.chdir(run.parent.parent):
        code, text = said(capsys, "broken", "gone")
        assert (code, text.count("\n")) == (2, 1)
        assert "runs/broken/manifest.json: not valid JSON" in text
        assert not Path("report.html").exists()
        assert said(capsys, "a", "broken", "--prediction", "x")[0] == 2


# ------------------------------------------------------------------------------------------------------------
# Predictions


LAW: dict[str, Any] = {
    "schema_version": 1,
    "kind": "scaling-law-fit",
    **{k: {"point": v} for k, v in {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}.items()},
    "method": "none",
    "N_counts": "matrices",
    "scatter": 0.0,
    "draws": [],
    "ranges": {"N": [1e6, 1e9], "D": [1e8, 1e10], "flops": [1e15, 1e20]},
    "identifiability": {"reasons": [], "prior_dominated": False},
}


def test_a_fit_is_asked_about_this_run(run: Path) -> None:
    file = run.parent / "fit.json"
    file.write_text(json.dumps(LAW))
    tokens = 400 * builder.BATCH
    want = 1.69 + 406.4 / 50_331_648**0.34 + 410.7 / tokens**0.28  # the law, by hand
    words = Reading(html(page_of([open_run(run)], datetime.now(UTC), file))).words
    assert f"{want:.4f} to {want:.4f}" in words
    assert "gave a point without an interval: the run ended" in words


@pytest.mark.parametrize(("low", "high", "verdict"), [(2.0, 4.0, "Yes:"), (9.0, 9.5, "No:")])
def test_a_printed_prediction_is_held_against_the_run(
    run: Path, low: float, high: float, verdict: str
) -> None:
    at = {
        "N": 5e7,
        "D": 400 * builder.BATCH,
        "loss": {"point": (low + high) / 2, "low95": low, "high95": high},
    }
    file = run.parent / "prediction.json"
    file.write_text(json.dumps({"fit": "fit.json", "at": at}))
    words = Reading(html(page_of([open_run(run)], datetime.now(UTC), file))).words
    assert f"{verdict} val/loss ended at" in words.replace("Yes: val/loss ended at", "", verdict == "No:")
    assert f"{low:.4f} to {high:.4f}" in words
    assert "the run has D" not in words
    at["D"] = 1e12
    file.write_text(json.dumps({"at": at}))
    assert "the run has D = 26.2 M" in Reading(html(page_of([open_run(run)], datetime.now(UTC), file))).words


# ------------------------------------------------------------------------------------------------------------
# The watch


def test_the_watch_ends_with_the_run_and_the_last_page_stays_still(tmp_path: Path) -> None:
    folder = builder.build(tmp_path / "live", total=400, done=50)
    file, slept = tmp_path / "page.html", list[float]()

    def build(refresh_s: float | None) -> Page:
        now = datetime.fromtimestamp(
            builder.BEGAN.timestamp() + builder.seconds(50 + 175 * len(slept), 400), UTC
        )
        return page_of([open_run(folder)], now, refresh_s=refresh_s)

    def sleep(seconds: float) -> None:
        text = file.read_text()
        assert 'data-refresh="7"' in text
        assert '<noscript><meta http-equiv="refresh" content="7"></noscript>' in text
        slept.append(seconds)
        builder.write(folder / "metrics.jsonl", _until(folder, 50 + 175 * len(slept)))

    watching(build, file, 7.0, sleep, say=lambda _: None)
    assert slept == [7.0, 7.0]
    text = file.read_text()
    assert "data-refresh=" not in text.partition("<style>")[0]
    assert "step 400 of 400; finished" in Reading(text).words


def _until(folder: Path, done: int) -> list[dict[str, Any]]:
    config = open_run(folder).config
    import numpy as np

    return list(builder.metrics(config, done, np.zeros(done + 1)))


def test_ctrl_c_leaves_a_page_that_stays_still(tmp_path: Path) -> None:
    folder = builder.build(tmp_path / "live", total=400, done=50)
    file, heard = tmp_path / "page.html", list[str]()
    now = datetime.fromtimestamp(builder.BEGAN.timestamp() + 100, UTC)

    def sleep(_: float) -> None:
        raise KeyboardInterrupt

    watching(lambda s: page_of([open_run(folder)], now, refresh_s=s), file, 7.0, sleep, heard.append)
    assert "data-refresh=" not in file.read_text().partition("<style>")[0]
    assert "the watch ends" in heard[-1]
