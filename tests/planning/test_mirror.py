"""The mirror in a plan: its store's bill is shown with its formula, and comes out of the dollars."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.planning.plans import ask
from x1_pretrain.command import run
from x1_pretrain.config_reading import load_config
from x1_pretrain.model.shapes import shape_for
from x1_pretrain.money import storage
from x1_pretrain.money.pricing import mirror_planned
from x1_pretrain.money.storage import Rates
from x1_pretrain.planning.command import app
from x1_pretrain.planning.planner import Mirror, Plan, Speed, plan

DEAR = Rates(Decimal(72), Decimal(1), "as a test has it")  # ten cents a GiB and hour
HUB = "hf://user/runs"
LADDER = "configs/x1-50m-a100.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_it_costs_by_hand() -> None:
    """The last four checkpoints and one on its way, of 12 bytes a parameter, and 600 bytes of rows a step,
    for all the hours that are paid; and one of them fetched, with the rows."""
    made = plan(ask(hours=10.0, mirror=Mirror("s3://bucket/runs", DEAR)))
    gib, rows = 12 * made.counts.total / 2**30, 600 * made.recipe.steps / 2**30
    expected = (5 * gib + rows) * float(made.quote.hours) / 10 + gib + rows
    assert expected <= float(made.quote.mirror_usd) < expected + 0.01
    alone = plan(ask(hours=10.0))
    assert made.quote.total_usd == alone.quote.total_usd + made.quote.mirror_usd


def test_a_repository_keeps_every_checkpoint_in_its_history() -> None:
    made = plan(ask(hours=10.0, mirror=Mirror(HUB, DEAR)))
    assert made.mirror is not None
    assert made.mirror.checkpoints == (made.recipe.steps // made.checkpoint_every + 2) / 2 > 10
    assert made.disk.checkpoints == 5  # of this computer's
    expected = (made.mirror.gib * float(made.quote.hours)) / 10 + made.mirror.fetched_gib
    assert expected <= float(made.quote.mirror_usd) < expected + 0.01


def test_the_data_too() -> None:
    with_data = plan(ask(hours=10.0, mirror=Mirror("s3://bucket/runs", DEAR, data=True)))
    without = plan(ask(hours=10.0, mirror=Mirror("s3://bucket/runs", DEAR)))
    assert with_data.quote.mirror_usd > without.quote.mirror_usd
    assert with_data.mirror is not None
    assert with_data.mirror.corpus_gib == with_data.disk.corpus_bytes / 2**30


@pytest.mark.parametrize("mirror", [Mirror("s3://bucket/runs", DEAR), Mirror(HUB, storage.rates(HUB))])
@pytest.mark.parametrize("buffer", [0.0, 0.1])
@pytest.mark.parametrize("dollars", [6, 35, 400])
def test_it_comes_out_of_the_dollars(dollars: int, buffer: float, mirror: Mirror) -> None:
    """Also where no buffer is kept, and where the store is a good part of the bill."""
    given = ask(dollars=Decimal(dollars), buffer=buffer)
    made = plan(replace(given, mirror=mirror))
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
    monkeypatch.setenv("COLUMNS", "300")
    out = x1(capsys, "--dollars", "35", "--mirror", "s3://bucket/runs", "--output", "p.yaml")
    assert "+ mirror $" in out.splitlines()[0]
    assert "Amazon S3" in out
    config = load_config(tmp_path / "p.yaml")
    assert config.mirror.uri == "s3://bucket/runs"
    assert (config.checkpoint.keep_last, config.checkpoint.keep_local) == (4, 2)
    assert (
        storage.most_kept(config.checkpoint, config.training.total_steps) == 5
    )  # what the plan is priced with
    assert "at worst" in out
    found: dict[str, Any] = json.loads(x1(capsys, "--dollars", "35", "--json"))
    assert found["quote"]["mirror_usd"] == 0
    assert "at worst" not in json.dumps(found["lines"])
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


@pytest.mark.parametrize("uri", ["s3://bucket/runs", HUB])
def test_the_gate_of_a_launch_counts_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, uri: str
) -> None:
    """Checkpoints, rows and a corpus that is nowhere yet."""
    file = tmp_path / "c.yaml"
    file.write_text((REPOSITORY / LADDER).read_text() + f"\nmirror: {{uri: '{uri}', data: true}}\n")
    found = json.loads(x1(capsys, "--config", str(file), "--json"))
    line = next(line for line in found["plan"]["lines"] if line["what"] == "mirror")
    gate = mirror_planned(load_config(file))
    assert gate is not None
    kept = f"{gate.checkpoints:g} x {gate.checkpoint_gib:,.2f} GiB + {gate.rows_gib:,.2f} GiB of rows"
    assert f"({kept} + {gate.corpus_gib:,.1f} GiB of data) x" in line["numbers"]
    assert gate.corpus_gib > 1


# ------------------------------------------------------------------------------------------------------------
# How often it saves


def mirrored(**changes: Any) -> Plan:
    return plan(ask(mirror=Mirror("s3://bucket/runs", DEAR), **changes))


def test_a_lost_machine_takes_a_quarter_of_an_hour() -> None:
    """The 50M model, 44 B tokens at 150 TFLOP/s: by hand, with 500 MB/s to the disk and 100 to the store."""
    made = mirrored(tokens=44e9)
    step_s, size = made.seconds / made.recipe.steps, 12 * made.counts.total
    assert made.losing is not None
    by_hand = made.checkpoint_every * step_s + 2 * size / 500e6 + 15 + size / 100e6
    assert made.losing.worst_s() == pytest.approx(by_hand)
    assert 10 * 60 < by_hand < 1.05 * 15 * 60
    assert str(made.checkpoint_every).rstrip("0") in ("1", "15", "2", "25", "3", "4", "5", "6", "8")
    alone = plan(ask(tokens=44e9))
    assert alone.losing is None
    assert made.checkpoint_every < 0.6 * alone.checkpoint_every  # half an hour, as before


def test_a_short_run_saves_twenty_times_and_a_large_model_in_a_hundredth_of_the_time() -> None:
    short = mirrored(tokens=2e9)
    assert 20 <= short.recipe.steps / short.checkpoint_every <= 40
    large = plan(
        ask(
            shape_for(3e9, 50257, None),
            tokens=60e9,
            gpus=64,
            speed=Speed(1e16, "stated", measured=True),
            mirror=Mirror("s3://bucket/runs", DEAR),
        )
    )
    assert large.losing is not None
    assert large.losing.write_s > 60
    assert 0.005 < large.losing.write_s / large.losing.period_s <= 0.01
    assert large.losing.worst_s() > 3600  # said, not hidden
    assert large.losing.keeps_up


def test_what_is_sent_no_faster_is_lost() -> None:
    """A limit of 1 MB/s on a checkpoint of a gigabyte: the mirror still gets each."""
    held = plan(ask(tokens=44e9, mirror=Mirror("s3://b/r", DEAR, most_mb_per_s=1.0)))
    assert held.losing is not None
    assert held.losing.send_s == pytest.approx(12 * held.counts.total / 1e6)
    assert held.losing.keeps_up


def test_the_disk_has_room_for_what_is_kept_while_the_mirror_is_away() -> None:
    made, alone = mirrored(tokens=10e9).disk, plan(ask(tokens=10e9)).disk
    assert made.total_bytes - alone.total_bytes == 2 * made.checkpoint_bytes


def test_a_cadence_that_is_given_is_judged_and_not_changed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """1,800 steps of 2.5 s; the advice, taken, leaves no finding."""
    text = (REPOSITORY / LADDER).read_text()
    file = tmp_path / "c.yaml"

    def findings() -> list[dict[str, Any]]:
        found = json.loads(x1(capsys, "--config", str(file), "--json"))["findings"]
        return [one for one in found if "checkpoint" in one["title"]]

    file.write_text(text)
    assert findings() == []  # no mirror: nothing is said of it
    file.write_text(text + "\nmirror: {uri: s3://bucket/runs}\n")
    assert load_config(file).checkpoint.every == 1800
    (found,) = findings()
    assert found["title"] == "a checkpoint every 1,800 steps"
    minutes = int(found["said"].partition(" min")[0].rpartition(" ")[2])
    assert 60 < minutes < 120
    advised = int(found["do"].partition(":")[0].rpartition(" ")[2].replace(",", ""))
    tree = yaml.safe_load(text)
    tree["checkpoint"] = {**tree.get("checkpoint", {}), "every": advised}
    file.write_text(yaml.safe_dump(tree | {"mirror": "s3://bucket/runs"}))
    assert findings() == []


def test_a_repository_of_the_hub_is_looked_at_once_a_minute(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--n", "50M", "--tokens", "10B", "--json")
    lines = {
        uri: next(
            line
            for line in json.loads(x1(capsys, *words, "--mirror", uri))["lines"]
            if line["what"] == "checkpoints"
        )
        for uri in ("s3://b-c/r", "hf://user/r")
    }
    assert " + 15.0 + " in lines["s3://b-c/r"]["numbers"]
    assert " + 60.0 + " in lines["hf://user/r"]["numbers"]
    assert "writing below 1% of the time" in lines["s3://b-c/r"]["formula"]
