"""The mirror in a plan: its store's bill is shown with its formula, and comes out of the dollars."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.planning.plans import ask
from x1_pretrain.command import run
from x1_pretrain.config import load_config
from x1_pretrain.money import storage
from x1_pretrain.money.storage import Rates
from x1_pretrain.planning.command import app
from x1_pretrain.planning.planner import Mirror, plan

DEAR = Rates(Decimal(72), Decimal(1), "as a test has it")  # ten cents a GiB and hour
LADDER = "configs/x1-50m-a100.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_it_costs_by_hand() -> None:
    """Three checkpoints of 12 bytes a parameter, for all the hours that are paid, and one of them fetched."""
    made = plan(ask(hours=10.0, mirror=Mirror("s3://bucket/runs", DEAR)))
    gib = 12 * made.counts.total / 2**30
    expected = 3 * gib * float(made.quote.hours) / 10 + gib
    assert expected <= float(made.quote.mirror_usd) < expected + 0.01
    alone = plan(ask(hours=10.0))
    assert made.quote.total_usd == alone.quote.total_usd + made.quote.mirror_usd


def test_the_data_too() -> None:
    with_data = plan(ask(hours=10.0, mirror=Mirror("s3://bucket/runs", DEAR, data=True)))
    without = plan(ask(hours=10.0, mirror=Mirror("s3://bucket/runs", DEAR)))
    assert with_data.quote.mirror_usd > without.quote.mirror_usd
    assert with_data.mirror is not None
    assert with_data.mirror.corpus_gib == with_data.disk.corpus_bytes / 2**30


@pytest.mark.parametrize("buffer", [0.0, 0.1])
@pytest.mark.parametrize("dollars", [6, 35, 400])
def test_it_comes_out_of_the_dollars(dollars: int, buffer: float) -> None:
    """Also where no buffer is kept, and where the store is a good part of the bill."""
    given = ask(dollars=Decimal(dollars), buffer=buffer)
    made = plan(replace(given, mirror=Mirror("s3://bucket/runs", DEAR)))
    alone = plan(given)
    assert made.quote.mirror_usd > 0
    assert made.quote.total_usd <= dollars
    assert made.tokens < alone.tokens


def x1(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(app, [*words, "--usd-per-hr", "1.19"], "x1 plan") == code
    said = capsys.readouterr()
    return said.err if code else said.out


def test_the_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = x1(capsys, "--dollars", "35", "--mirror", "s3://bucket/runs", "--output", "p.yaml")
    assert "+ mirror $" in out.splitlines()[0]
    assert "Amazon S3" in out
    assert load_config(tmp_path / "p.yaml").mirror.uri == "s3://bucket/runs"
    found: dict[str, Any] = json.loads(x1(capsys, "--dollars", "35", "--json"))
    assert found["quote"]["mirror_usd"] == 0
    assert "mirror" not in [line["what"] for line in found["lines"]]
    assert "did you mean s3://" in x1(capsys, "--dollars", "35", "--mirror", "s4://b/r", code=2)


def test_a_config_that_says_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its own prices, and as many checkpoints as it keeps."""
    config = (REPOSITORY / LADDER).read_text()
    file = tmp_path / "c.yaml"
    file.write_text(config + "\nmirror: {uri: s3://bucket/runs, storage_usd_per_gib_month: 72}\n")
    found = json.loads(x1(capsys, "--config", str(file), "--json"))
    loaded = load_config(file)
    kept = storage.most_kept(loaded.checkpoint, loaded.training.total_steps)
    line = next(line for line in found["plan"]["lines"] if line["what"] == "mirror")
    assert f"({kept} x " in line["numbers"]
    assert "in part as stated" in line["source"]
    assert line["value"] > 0
