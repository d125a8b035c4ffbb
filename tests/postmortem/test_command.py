"""`x1 postmortem` as a command: odd folders, failures, pictures, and a run that goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpora import write_config, write_corpus
from tests.end_to_end.in_process import train_here
from tests.postmortem import spiky
from tests.postmortem.test_page import command, told
from tests.records import builder
from x1_pretrain.errors import UserError
from x1_pretrain.postmortem import command as postmortem
from x1_pretrain.postmortem import picture as spike_picture
from x1_pretrain.postmortem.episodes import episodes
from x1_pretrain.records.run_folder import open_run


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=1500)


# -----------------------------------------------------------------------------------------------------------
# The command, and a run that goes on


def test_no_spike_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = spiky.build(tmp_path / "run", spiky.step_rows(60, {}, {}), [])
    assert command(folder) == 0
    assert "no spike" in capsys.readouterr().out
    assert not list(folder.glob("*postmortem*"))


def test_steps_that_were_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [spiky.event("not_finite", 29), spiky.event("not_finite", 30)]
    assert command(spiky.build(tmp_path / "run", spiky.step_rows(60, {}, {}), broken)) == 0
    assert "steps not finite: 30 and 31 (`--step 30`" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["steps.jsonl", "metrics.jsonl", "events.jsonl"])
def test_torn_and_growing_files(tmp_path: Path, name: str) -> None:
    folder = spiky.natural(tmp_path / "run")
    with (folder / name).open("a") as stream:
        stream.write('{"step": 301, "loss": 3.')
    assert "## Step 201" in told(folder)


@pytest.mark.parametrize("name", ["steps.jsonl", "metrics.jsonl", "ledger.jsonl", "steps.superseded.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\n[1]\n", b'{"step": null}\n'])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    folder = spiky.natural(tmp_path / "run")
    (folder / name).write_bytes(content)
    assert "## Step 201" in told(folder)


def test_rows_that_can_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = spiky.natural(tmp_path / "run")
    (folder / "steps.jsonl").unlink()
    (folder / "steps.jsonl").mkdir()
    assert command(folder) == 2
    said = capsys.readouterr().err
    assert "steps.jsonl: can't be read (Is a directory)" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [{"loss": None, "grad_norm": "x"}, {"time_utc": 7}, {"clip": 0.0}, {"session": None}, {"verdict": 3}],
)
def test_odd_values(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = spiky.natural(tmp_path / "run")
    rows = builder.read_lines(folder / "steps.jsonl")
    rows[202] |= changes
    rows[230] |= changes
    builder.write_lines(folder / "steps.jsonl", rows)
    assert "## Step 201" in told(folder)


def test_the_manifest_without_data(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["data"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "They can't be told" in told(folder)


def test_an_output_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command(spiky.natural(tmp_path / "run"), "--output", tmp_path / "file") == 2
    said = capsys.readouterr().err
    assert "--output" in said
    assert said.count("\n") == 1


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = spiky.natural(tmp_path / "run")
    before = sorted(folder.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(postmortem, "draw", full)
    with pytest.raises(UserError, match="No space left"):
        postmortem.write(folder)
    assert sorted(folder.iterdir()) == before


def test_without_torch(tmp_path: Path) -> None:
    """The trainer starts it beside itself: a second of its own, and no second torch in memory."""
    folder = spiky.natural(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from x1_pretrain.postmortem import command as postmortem; "
        f"postmortem.write(Path({str(folder)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_long_run_is_read_quickly(tmp_path: Path) -> None:
    """100,000 rows: little more than reading them takes."""
    folder = spiky.natural(tmp_path / "run", last=300, total_steps=200_000)
    quiet = {"loss": 3.0, "grad_norm": 0.5, "clip": 0.8, "lr": 3e-4, "step_s": 2.0, "verdict": "go"}
    with (folder / "steps.jsonl").open("a") as stream:
        for step in range(301, 100_001):
            stream.write(json.dumps({"step": step, "time_utc": spiky.at(step), "session": 1, **quiet}) + "\n")
    begun = time.process_time()
    for line in (folder / "steps.jsonl").read_text().splitlines():
        json.loads(line)
    read = time.process_time()
    postmortem.write(folder)
    assert time.process_time() - read < 20 * (read - begun)


# -----------------------------------------------------------------------------------------------------------
# The picture


def test_the_picture_shows_the_spike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    postmortem.write(spiky.natural(tmp_path / "run"))
    upper, lower = figures[0].axes
    line = upper.get_lines()[0]
    assert max(line.get_ydata()) == 5.0
    assert line.get_xdata()[list(line.get_ydata()).index(5.0)] == 201
    assert lower.get_yscale() == "log"
    names = [text.get_text() for text in upper.get_legend().get_texts()]
    assert "back at step 206" in names
    assert "the spike" in names
    assert "cut to this where above" in [text.get_text() for text in lower.get_legend().get_texts()]


def test_a_picture_of_nothing_finite(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": math.nan, "grad_norm": math.nan} for s in range(5)]
    view = spike_picture.View("x", rows, math.nan, math.nan, math.nan, 6.0)
    spike_picture.draw(view, tmp_path / "a.png")
    spike_picture.draw(spike_picture.View("x", [], 3.0, 0.1, 0.5, 6.0), tmp_path / "b.png")


# -----------------------------------------------------------------------------------------------------------
# For real


@pytest.mark.slow
def test_a_real_run_writes_its_own(tmp_path: Path, large: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path / "tiny.yaml",
        data={"dir": str(large)},
        run_dir=str(tmp_path / "run"),
        training={"total_steps": 130},
        evaluation={"every": 130},
        checkpoint={"every": 130},
        stability={"inject_spike_at_step": 100},
    )
    outcome = train_here(capfd, "--config", config)
    assert outcome.code == 0
    folder = tmp_path / "run"
    [spike] = episodes(open_run(folder))
    assert spike.injected
    assert 100 < spike.onset <= 105
    said = " ".join((folder / "spike-postmortem.md").read_text().split())
    assert "rare tokens took the place of the batches of steps 101 to 105" in said
