"""The page of one run: whole, safe, true to the files, honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.report import builder
from tests.report.reading import Reading
from x1_pretrain.errors import UserError
from x1_pretrain.records.mirror_state import MirrorState, write_state
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.report import learning, material, words
from x1_pretrain.report.command import page_of
from x1_pretrain.report.material import gather
from x1_pretrain.report.page import html

NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


def made(*folders: Path, **options: Any) -> str:
    return html(page_of([open_run(folder) for folder in folders], NOW, **options))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build(tmp_path_factory.mktemp("report") / "x1-long", total=24_000)


@pytest.fixture(scope="module")
def text(long_run: Path) -> str:
    return made(long_run)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return builder.build(tmp_path / "x1-small", total=600)


# ------------------------------------------------------------------------------------------------------------
# Whole and alone


def test_the_page_is_balanced_and_every_anchor_leads_somewhere(text: str) -> None:
    page = Reading(text)
    assert len(page.ids) == len(set(page.ids))
    ids = set(page.ids)
    for tag, name, value in page.attributes:
        if tag == "a" and name == "href" and value.startswith("#"):
            assert value[1:] in ids
        if name in ("aria-labelledby", "for"):
            assert set(value.split()) <= ids
    assert page.tags.count("h1") == 1
    assert {"main", "header", "nav", "footer"} <= set(page.tags)


def test_nothing_is_fetched_from_anywhere(text: str) -> None:
    page = Reading(text)
    loading = [v for _, name, v in page.attributes if name in ("src", "srcset", "action", "data", "poster")]
    assert all(value.startswith("data:image/png;base64,") for value in loading)
    links = [v for tag, name, v in page.attributes if name in ("href", "xlink:href")]
    assert not [value for value in links if ":" in value or value.startswith("//")]
    code = "".join(d for tag, d in page.texts if tag in ("style", "script"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(|//\w", code)
    assert "link" not in page.tags
    policy = next(v for _, name, v in page.attributes if name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")


def test_the_policy_lets_only_the_page_s_own_script_run(text: str) -> None:
    import base64
    import hashlib

    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert not re.search(r"\son\w+=", text)  # no handlers in attributes, which the policy would stop


def test_charts_speak_to_those_who_can_t_see_them(text: str) -> None:
    drawings = re.findall(r'<svg[^>]*role="img"[^>]*>(.*?)</svg>', text, re.S)
    assert len(drawings) > 8
    assert all("<title" in one for one in drawings)
    assert "training loss" in text.lower()
    described = re.search(r'<desc id="loss-whole-desc">(.*?)</desc>', text)
    assert described
    assert "spike at step 11,280" in described[1]


def test_no_coordinate_is_broken(text: str) -> None:
    for path in re.findall(r' d="([^"]*)"', text):
        assert not re.search(r"nan|inf|e[+-]", path), path[:80]


# ------------------------------------------------------------------------------------------------------------
# True


def test_the_figures_are_those_of_the_files(long_run: Path, text: str) -> None:
    page = Reading(text)
    rows = builder.read(long_run / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    spent = float(builder.read(long_run / "ledger.jsonl")[3]["spent_usd"])
    ended = (
        24_000 * builder.STEP_S + 1260 + 30 + 30
    )  # from the launch to the end: two pauses, start, teardown
    facts = page.facts()
    assert facts["training loss"] == f"{train[-1]['train/loss']:.4f}"
    assert facts["validation loss"] == f"{[r for r in rows if 'val/loss' in r][-1]['val/loss']:.4f}"
    assert facts["parameters"] == "52.4 M"
    assert facts["tokens"] == "1.57 B"  # 23,995 steps of 65,536: five were injected
    assert facts["time"] == f"{train[-1]['elapsed_s'] / 60:.1f} min"
    paid = float(facts["cost"].removeprefix("$"))
    assert spent <= paid <= ended / 3600 * 1.19 + 0.01
    assert float(facts["per billion tokens"].removeprefix("$")) == pytest.approx(paid / 1.5725, abs=0.01)
    assert "327,680 injected" in page.words.replace("328,000", "327,680")


def test_a_branch_is_priced_by_the_tokens_it_trained_itself(run: Path) -> None:
    """Its money starts at zero, its tokens at the parent's."""
    whole = float(Reading(made(run)).facts()["per billion tokens"].removeprefix("$"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["parent"] = {"run_id": "trunk", "step": 150, "checkpoint": "x"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    facts = Reading(made(run)).facts()
    trained = open_run(run).rows()[-1]["tokens"]
    own = trained - 150 * builder.BATCH
    assert float(facts["per billion tokens"].removeprefix("$")) == pytest.approx(
        whole * trained / own, rel=0.02
    )
    manifest["parent"] = {"step": "many"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert float(Reading(made(run)).facts()["per billion tokens"].removeprefix("$")) == whole


def test_the_sentence_of_the_gate_and_what_it_came_to(text: str) -> None:
    words = Reading(text).words
    assert f"Said before it started: “{builder.GATE}”" in words
    cost = re.search(
        r"It really cost \$(\d+\.\d\d), \$(\d+\.\d\d) less than said; below the ceiling of \$35", words
    )
    assert cost
    assert float(cost[1]) + float(cost[2]) == pytest.approx(2.31, abs=0.011)


def test_what_happened_is_marked_where_it_happened(long_run: Path, text: str) -> None:
    words = Reading(text).words
    assert "R1 472 M resumed from step 7,200" in words
    assert "S1 739 M injected spike at step 11,280: loss up to 5.3000, back at step 11,410" in words
    assert "C1 237 M context 1,024 from step 3,610" in words
    moved = re.search(r"M1 (\d+) M mixture: code 25% to 50%", words)
    assert moved
    assert abs(int(moved[1]) - 786) <= 2  # half of 1.573 B


SMALL = 512  # tokens a step: places that a rounded number would not tell


def small(folder: Path, log_every: int, **changes: Any) -> Path:
    return builder.build(folder, total=400, log_every=log_every, training__batch_tokens=SMALL, **changes)


@pytest.mark.parametrize("log_every", [1, 7, 10, 400])
def test_injected_steps_add_no_tokens_wherever_the_rows_are(tmp_path: Path, log_every: int) -> None:
    """Step s has trained s batches, less the five from the onset on: by hand, for each."""
    folder, onset = small(tmp_path / "a", log_every, model__context=32), builder.spiked_at(400)
    for without in (False, True):
        if without:  # the events tell it too
            (folder / "steps.jsonl").unlink()
        found = gather(open_run(folder), NOW)
        for step in range(401):
            made_up = sum(onset <= s < onset + 5 for s in range(1, step + 1))
            assert found.tokens_at(step) == (step - made_up) * SMALL, step
        placed = {mark.label: mark for mark in learning.marks(found)}
        assert placed["S1"].x == placed["I1"].x == (onset - 1) * SMALL


def test_tokens_are_exact_below_a_million(tmp_path: Path) -> None:
    page = Reading(made(small(tmp_path / "a", 10, model__context=32)))
    assert page.facts()["tokens"] == f"{395 * SMALL:,}" == "202,240"
    assert f"S1 {187 * SMALL:,} injected spike at step 188" in page.words
    assert words.tokens(999_999.7) == "1 M"
    assert [words.flops(v) for v in (7.581e8, 1.2e14, 3.2e9, 12.0)] == [
        "758 MFLOP/s",
        "120 TFLOP/s",
        "3.2 GFLOP/s",
        "12 FLOP/s",
    ]


def test_the_headline_has_the_loss_of_the_last_step(run: Path) -> None:
    steps = [row for row in builder.read(run / "steps.jsonl") if row["step"] <= 597]
    rows = [row for row in builder.read(run / "metrics.jsonl") if row["step"] <= 590]
    builder.write(run / "steps.jsonl", steps)
    builder.write(run / "metrics.jsonl", rows)
    page = Reading(made(run))
    assert page.facts()["training loss"] == f"{steps[-1]['loss']:.4f}"
    assert "of step 597" in page.words
    builder.write(run / "steps.jsonl", steps[:100])  # an old recorder: the rows know better
    assert Reading(made(run)).facts()["training loss"] == f"{rows[-1]['train/loss']:.4f}"


def test_the_legend_does_not_call_the_last_value_a_median(run: Path) -> None:
    last = builder.read(run / "steps.jsonl")[-1]["loss"]
    assert f"train: last value <b>{last:.4f}</b> (line: median of 7)" in made(run)


def test_up_to_twenty_evaluations_are_shown_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    for every, count in ((20, 20), (10, 40)):
        folder = builder.build(tmp_path / str(every), total=400, evaluation__every=every)
        text = made(folder)
        table = re.search(r"<caption>Validation</caption>.*?</table>", text, re.S)
        assert table
        steps = re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', table[0])
        assert [s for s in steps if s != "…"] == (
            [str(s) for s in range(20, 401, 20)]
            if count == 20
            else [str(s) for s in (*range(10, 101, 10), *range(310, 401, 10))]
        )
        assert ("20 more" in table[0]) == (count == 40)


def test_every_chart_has_the_same_horizontal_axis(text: str) -> None:
    """Labels of the axes: apart from the closer and the logarithmic view all are one."""
    axes = re.findall(r'data-chart="([^"]*)".*?<div class="x"[^>]*>(.*?)</div>', text, re.S)
    places = {name: re.sub(r"<[^>]*>", " ", re.sub(r'class="[^"]*"', "", labels)) for name, labels in axes}
    shared = {labels for name, labels in places.items() if name not in ("loss-later", "loss-log")}
    assert len(places) > 8
    assert len(shared) == 1
    assert re.sub(r"<[^>]*>", "", axes[0][1]).startswith("0")


def test_a_folder_of_another_name_is_named(run: Path) -> None:
    assert page_of([open_run(run)], NOW).title == "x1-small"
    other = run.rename(run.parent / "again")
    assert page_of([open_run(other)], NOW).title == "x1-small (again)"


def test_on_a_narrow_screen_each_cell_says_what_it_is(run: Path) -> None:
    text = made(run, verify=True)
    table = re.search(r'<table class="cards"><caption>The checks.*?</table>', text, re.S)
    assert table
    cells = re.findall(r'<td data-head="([^"]*)">', table[0])
    assert set(cells) == {"check", "evidence"}
    assert '<th scope="row" class="number" data-head="step">30</th>' in text


def test_the_read_out_holds_the_values_of_the_rows(long_run: Path, text: str) -> None:
    figure = text[text.index('<figure class="chart" id="loss-whole"') :]
    values = json.loads(re.search(r'class="values">(.*?)</script>', figure, re.S)[1])  # type: ignore[index]
    last = [row for row in builder.read(long_run / "metrics.jsonl") if "val/loss" in row][-1]
    by_name = {curve["name"]: curve["y"] for curve in values["curves"]}
    assert by_name["validation"][-1] == pytest.approx(last["val/loss"], rel=1e-4)
    assert by_name["validation web"][-1] == pytest.approx(last["val/web/loss"], rel=1e-4)
    assert values["x"][-1] == 1.0
    assert len(values["x"]) == len(values["at"]) <= 400


def test_what_it_said_from_checkpoint_to_checkpoint(text: str) -> None:
    words = Reading(text).words
    assert "step 24,000, 1.57 B tokens The tallest mountain in the world is Mount Everest." in words
    assert words.index("xv ] the") < words.index("Mount Everest.")


def test_the_paid_time_adds_up(text: str) -> None:
    rows = re.findall(r'<th scope="row"><span class="swatch [^"]*">(\w)</span> ([^<]*)</th>(.*?)</tr>', text)
    shares = [float(re.findall(r">([\d.]+)%<", cells)[0]) for _, _, cells in rows]
    assert rows[0][1] == "training step"
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))


def test_the_run_is_held_against_its_band(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    assert "Yes: val/loss ended at" in Reading(made(run)).words
    (run / "config.yaml").write_text(config.replace("- 2.7", "- 1.0").replace("- 3.0", "- 1.5"))
    assert re.search(r"No: val/loss ended at [\d.]+, \+[\d.]+ outside", Reading(made(run)).words)


def test_checks_are_shown_when_asked_for(run: Path) -> None:
    assert "Not run for this page" in Reading(made(run)).words
    words = Reading(made(run, verify=True)).words
    assert "✗ FAILED" in words
    assert "manifest complete" in words


# ------------------------------------------------------------------------------------------------------------
# Safe


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_everything_that_anyone_wrote_is_escaped(run: Path) -> None:
    samples = builder.read(run / "samples.jsonl")
    builder.write(
        run / "samples.jsonl", [r | {"prompt": EVIL, "text": EVIL + "\x00\x1b[31m\ud800"} for r in samples]
    )
    events = builder.read(run / "events.jsonl")
    builder.write(run / "events.jsonl", [e | {"message": EVIL, "event": e["event"]} for e in events])
    rows = builder.read(run / "metrics.jsonl")
    extra = {f"val/{EVIL}/loss": 3.0, f"grad_norm/{EVIL}": 1.0, "mixture/" + EVIL: 0.5}
    builder.write(run / "metrics.jsonl", [r | extra for r in rows])
    ledger = builder.read(run / "ledger.jsonl")
    builder.write(run / "ledger.jsonl", [r | {"message": EVIL} for r in ledger])
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"run_id": EVIL, "versions": {EVIL: EVIL}, "hardware": {"device": EVIL, "cpu": EVIL}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = made(run)
    page = Reading(text)
    assert "<img src=x" not in text
    assert text.count("<script>") == 1
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    assert "alert(1)" in page.words  # shown, as text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    text.encode("utf-8")


def test_no_password_of_an_address_is_shown(run: Path) -> None:
    events = builder.read(run / "events.jsonl")
    events[0]["message"] = "reads http://me:hunter2@example.org/budget.json?sig=hunter2"
    builder.write(run / "events.jsonl", events)
    assert "hunter2" not in made(run)
    assert "hunter2" not in made(run, builder.build(run.parent / "b", total=300, budget__cap_usd=20.0))


def test_no_password_of_a_stop_or_a_problem_is_shown(run: Path) -> None:
    """A guard's reason may quote the address it read, and so may what could not be read here."""
    stop = {"reason": "no reading of http://me:hunter2@example.org/b?sig=hunter2", "by": "guard"}
    (run / "STOP.json").write_text(json.dumps(stop | {"exit_code": 76, "time_utc": "now"}))
    rows = builder.read(run / "metrics.jsonl")
    builder.write(run / "metrics.jsonl", [row for row in rows if row["step"] < 500])
    steps = builder.read(run / "steps.jsonl")
    builder.write(run / "steps.jsonl", [row for row in steps if row["step"] < 500])
    found = page_of([open_run(run)], NOW)
    assert "stopped by the guard: no reading of http://example.org/b" in found.state
    assert "hunter2" not in html(found)


def test_no_password_of_a_record_that_can_not_be_read_is_shown(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise UserError("http://me:hunter2@example.org/b: no reading")

    monkeypatch.setattr(material, "goodput", broken)
    text = made(run)
    assert "http://example.org/b: no reading" in text
    assert "hunter2" not in text


# ------------------------------------------------------------------------------------------------------------
# Honest about what is missing


def test_a_run_that_has_not_begun(run: Path) -> None:
    for name in ("metrics", "steps", "events", "samples", "ledger"):
        (run / f"{name}.jsonl").unlink()
    words = Reading(made(run)).words
    assert "step 0 of 600; not begun: no records yet" in words
    for said in (
        "No losses on record yet.",
        "No evaluation on record yet.",
        "No samples on record.",
        "No events on record.",
        "No speed on record yet.",
        "Goodput: not measured",
        "No ledger: nobody priced this run",
        "No gradient norm on record yet.",
        "Memory: not measured.",
    ):
        assert said in words


def test_a_young_run_says_it_runs(tmp_path: Path) -> None:
    folder = builder.build(tmp_path / "young", total=24_000, done=37)
    seconds = builder.seconds(37, 24_000)
    now = builder.BEGAN.timestamp() + seconds + 5
    page = page_of([open_run(folder)], datetime.fromtimestamp(now, UTC), refresh_s=30)
    assert page.state == "step 37 of 24,000; running, last record 5.0 s ago"
    assert page.refresh_s == 30
    Reading(html(page))


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("signal", "interrupted: stopped by SIGTERM"),
        ("fault", "ended by a fault"),
        ("over_budget", "over its budget"),
    ],
)
def test_an_ended_run_says_why(tmp_path: Path, event: str, said: str) -> None:
    folder = builder.build(tmp_path / "ended", total=24_000, done=37)
    with (folder / "events.jsonl").open("a") as out:
        row = {
            "time_utc": "2026-11-20T08:02:00Z",
            "event": event,
            "step": 37,
            "message": "stopped by SIGTERM",
        }
        out.write(json.dumps(row) + "\n")
    page = page_of([open_run(folder)], NOW)
    assert said in page.state
    assert page.tone == "bad"


def test_a_stopped_run_says_who_stopped_it(tmp_path: Path) -> None:
    folder = builder.build(tmp_path / "stopped", total=24_000, done=37)
    stop = {"reason": "projected above the ceiling", "by": "guard", "exit_code": 76, "time_utc": "now"}
    (folder / "STOP.json").write_text(json.dumps(stop))
    assert "stopped by the guard: projected above the ceiling" in page_of([open_run(folder)], NOW).state


def test_losses_that_are_not_finite_are_gaps_and_counted(run: Path) -> None:
    steps = builder.read(run / "steps.jsonl")
    bad = [r | ({"loss": "nan", "grad_norm": "inf"} if 300 <= r["step"] < 303 else {}) for r in steps]
    builder.write(run / "steps.jsonl", bad)
    text = made(run)
    assert "3 values of the training loss not finite: a gap" in Reading(text).words
    test_no_coordinate_is_broken(text)


def test_torn_and_damaged_lines_are_named_and_left_out(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = '{"step": 40, "train/loss": 3'
    file.write_text("\n".join(lines) + '\n{"step": 999, "train')
    words = Reading(made(run)).words
    assert "metrics.jsonl: 1 damaged lines are left out (line 4)" in words
    assert "metrics.jsonl: the last line is torn" in words


def test_a_damaged_ledger_is_said_and_costs_are_not_guessed(run: Path) -> None:
    (run / "ledger.jsonl").write_text("nonsense\n")
    words = Reading(made(run)).words
    assert "line 1: not a ledger row" in words
    assert "It really cost" not in words


ODD: list[dict[str, Any]] = [
    {"step": 10, "tokens": "many", "train/loss": [1]},
    {"step": 11, "tokens": "nan", "train/loss": "inf", "tokens_per_sec": "-inf"},
    {"step": -4, "train/loss": 2.0},
    {"step": True, "train/loss": 2.0},
    {"step": 12, "train/loss": 10**400, "tokens": 10**400, "grad_norm": 1e308},
    {
        "step": 13,
        "train/loss": -1e308,
        "grad_norm": -1e308,
        "time_utc": 7,
        "session": "x",
        "memory/peak_gib": "nan",
    },
    {"step": 14, "train/loss": 1e308, "noise_scale": -5, "grad_norm/layer.0": 0.0, "mixture/web": "nan"},
    {"step": 15, "train/loss": None, "context": "long", "time_utc": None, "val/loss": "nan", "val/x/loss": 0},
    {"step": 10**30, "train/loss": 1.0},
]


def test_odd_rows_never_break_a_page(run: Path) -> None:
    for name in ("metrics", "steps", "events", "samples"):
        builder.write(
            run / f"{name}.jsonl", [row | {"loss": row.get("train/loss"), "event": "resume"} for row in ODD]
        )
    text = made(run)
    Reading(text)
    test_no_coordinate_is_broken(text)


@pytest.mark.parametrize("one", range(len(ODD)))
def test_an_odd_row_alone_or_at_the_end_does_not_either(run: Path, one: int) -> None:
    whole = builder.read(run / "metrics.jsonl")
    for rows in ([ODD[one]], [*whole, ODD[one]]):
        builder.write(run / "metrics.jsonl", rows)
        text = made(run)
        Reading(text)
        test_no_coordinate_is_broken(text)


@pytest.mark.parametrize(
    "data", [None, [], ["x"], {}, [{"name": None, "weight": "heavy", "train_tokens": "all"}]]
)
def test_a_manifest_with_little_in_it(run: Path, data: Any) -> None:
    little = {"kind": "run", "data": data, "parameters": [1], "hardware": "a box", "versions": 3, "argv": "x"}
    (run / "manifest.json").write_text(json.dumps(little))
    assert Reading(made(run)).facts()["parameters"] == "not measured"


def test_folders_in_the_place_of_files(run: Path) -> None:
    for name in ("events.jsonl", "samples.jsonl", "ledger.jsonl"):
        (run / name).unlink()
        (run / name).mkdir()
    words = Reading(made(run)).words
    assert "can't be read" in words


def test_a_post_mortem_is_linked_and_its_picture_is_in_the_page(run: Path, tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 50
    (run / "spike-postmortem.md").write_text("# It rose")
    (run / "spike-postmortem.png").write_bytes(png)
    (run / "spike-postmortem-2.png").write_bytes(b"no picture")
    text = html(page_of([open_run(run)], NOW, page_folder=tmp_path / "elsewhere"))
    links = [v for tag, name, v in Reading(text).attributes if (tag, name) == ("a", "href") and "spike" in v]
    assert links[-1] == "../x1-small/spike-postmortem.md"
    assert '<div class="scroll picture" tabindex="0"' in text  # scrolls by itself where it is too wide
    assert text.count("data:image/png;base64,") == 1


def test_the_text_of_a_post_mortem_is_in_the_page(run: Path) -> None:
    said = f"# It rose\n\n**Verdict.** Made on purpose.\n\n{EVIL} http://me:hunter2@example.org/\n"
    (run / "spike-postmortem.md").write_text(said)
    (run / "spike-postmortem-2.md").mkdir()
    text = made(run)
    assert '<p class="line">Made on purpose.</p><details>' in text  # the verdict before the fold
    assert '<div class="prose"><h3>It rose</h3><p class="line"><b>Verdict.</b> Made on purpose.</p>' in text
    assert "<img src=x" not in text
    assert "hunter2" not in text
    assert "spike-postmortem-2.md: can't be read" in Reading(text).words


def test_the_corpus_tells_of_itself_when_it_is_at_hand(run: Path, corpus: Path) -> None:
    facts = json.loads((corpus / "manifest.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    own = {"name": "tiny", "dir": str(corpus), "fingerprint": facts["fingerprint"], "weight": 1.0}
    manifest["data"] = [own | {"train_tokens": facts["train"]["tokens"]}]
    (run / "manifest.json").write_text(json.dumps(manifest))
    words = Reading(made(run)).words
    assert f"{facts['train']['documents']:,}" in words
    for name in facts["domains"]:
        assert f"{facts['domain_counts'][name]['train_tokens']:,}" in words
    for kind in ("train", "val"):  # the domains of the small corpus that tests and the demo write
        parts = [one[f"{kind}_tokens"] for one in facts["domain_counts"].values()]
        assert min(parts) > 0
        assert sum(parts) == facts[kind]["tokens"]
    assert sum(one["documents"] for one in facts["domain_counts"].values()) == sum(
        facts[kind]["documents"] for kind in ("train", "val")
    )
    epochs = (600 - 5) * builder.BATCH / facts["train"]["tokens"]
    assert f"{epochs:.3g}" in words
    own["fingerprint"] = "other"
    manifest["data"] = [own]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "of another content than the run was trained on" in Reading(made(run)).words


# ------------------------------------------------------------------------------------------------------------
# Big


def test_a_long_run_makes_a_small_page_quickly(tmp_path: Path) -> None:
    folder = builder.build(tmp_path / "big", total=84_000)
    begun = time.process_time()
    rows = builder.read(folder / "metrics.jsonl")
    read = time.process_time()
    text = made(folder)
    assert len(rows) > 1000
    assert time.process_time() - read < 50 * (read - begun)
    assert len(text.encode()) < 2_000_000
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------
# The mirror


def test_the_mirror_is_on_the_page_where_there_is_one(run: Path) -> None:
    assert "not mirrored" not in made(run)
    told = {"uri": "s3://b/runs", "label": "s3://b/runs/x1-small", "name": "x1-small", "folder": "ab12"}
    write_state(run, MirrorState(**told, epoch=3, mirrored=[0, 400]))  # type: ignore[arg-type]
    page = made(run)
    assert "s3://b/runs/x1-small" in page
    assert "epoch 3, writing" in page
    assert "checkpoint of step 400" in page
    assert "How far behind the mirror was" not in page  # no row says it
    rows = builder.read(run / "metrics.jsonl")
    lag = [row | {"mirror/lag_s": 7.0 + n, "mirror/lag_bytes": 1000.0 * n} for n, row in enumerate(rows)]
    builder.write(run / "metrics.jsonl", lag)
    trouble = {"lag_bytes": 12_345, "lag_s": 600.0, "trouble": "<b>403</b> https://me:secret@host/ said no"}
    write_state(run, MirrorState(**told, state="lost", why="host b", **trouble))  # type: ignore[arg-type]
    page = made(run)
    Reading(page)
    for said in (
        "12,345 bytes",
        "epoch 0, lost: host b",
        "no checkpoint yet",
        "&lt;b&gt;403",
        "m-mirror-lag-s",
    ):
        assert said in page, said
    assert "secret" not in page


def test_a_mirror_file_of_a_later_version_is_a_problem_on_record(run: Path) -> None:
    (run / "mirror.json").write_text('{"schema_version": 99, "kind": "mirror-state"}')
    assert any("schema version 99" in problem for problem in gather(open_run(run), NOW).problems)


def test_a_mirrors_everyday_events_are_not_listed(run: Path) -> None:
    place = {"time_utc": "2026-11-20T10:00:00.000Z", "event": "mirror", "step": 9, "session": 1}
    told = [
        place | {"message": "mirrored in s3://b/runs/x1-small (epoch 4)", "epoch": 4},
        place | {"message": "it can not be reached", "alert": True},
        place | {"message": "it is mirrored again", "over": True},
        place | {"message": "skipped the mirrored checkpoint of step 8"},
        place | {"message": "all of it is mirrored", "left": []},
        place | {"message": "one checkpoint is not", "left": ["checkpoint of step 9"]},
    ]
    builder.write(run / "events.jsonl", [*builder.read(run / "events.jsonl"), *told])
    page = made(run)
    shown = [one["message"] in page for one in told]
    assert shown == [False, True, True, True, False, True]
