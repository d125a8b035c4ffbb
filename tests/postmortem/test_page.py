"""What the pages of a post-mortem say, and their tables, from run folders as the loop leaves them."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

from tests.corpora import write_corpus
from tests.postmortem import spiky
from tests.postmortem.test_episodes import rewound
from tests.records import builder
from x1_pretrain.command import run as run_app
from x1_pretrain.postmortem import command as postmortem
from x1_pretrain.postmortem.episodes import episodes
from x1_pretrain.postmortem.tracing import draws_of
from x1_pretrain.postmortem.words import count, joined, percent, spans, spoken
from x1_pretrain.records.data_order import order_of
from x1_pretrain.records.run_folder import open_run


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=1500)


def command(*args: object) -> int:
    return run_app(postmortem.app, [str(arg) for arg in args], prog="x1 postmortem")


def told(folder: Path, step: int | None = None) -> str:
    """The page as one line, so that a sentence can be looked for wherever it is wrapped."""
    return " ".join(postmortem.write(folder, step)[0].read_text(encoding="utf-8").split())


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / postmortem.DATA).open(newline="") as stream:
        return list(csv.DictReader(stream))


# -----------------------------------------------------------------------------------------------------------
# What the page says


def test_a_natural_spike(tmp_path: Path, large: Path) -> None:
    folder = spiky.natural(tmp_path / "run", large)
    said = told(folder)
    assert "## Step 201: natural, recovered in five steps" in said
    assert "the loss jumped from 3.000 to 5.000, 2.00 nats above the median" in said
    assert "The gradient norm peaked at the same step with 5, 10 times its usual 0.5" in said
    assert (
        "The way there took five steps: 640 tokens, 10 seconds and no dollars, as the run had no price"
        in said
    )
    assert "a norm of 5 was cut to 0.8, to 16 % of it" in said
    assert "1/(1 - 0.95) = 20 steps" in said
    assert "nothing lasting is to be seen" in said
    assert (folder / "spike-postmortem.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".postmortem-*"))


def test_the_table_holds_every_document_of_its_batches(tmp_path: Path, large: Path) -> None:
    folder = spiky.natural(tmp_path / "run", large)
    told(folder)
    rows, order = table(folder), order_of(open_run(folder))
    assert {row["read"] for row in rows} == {"yes"}
    for step in range(201, 206):
        mine = [row for row in rows if row["step"] == str(step)]
        assert sum(int(row["tokens"]) for row in mine) == spiky.BATCH_TOKENS
        assert {int(row["block"]) for row in mine} == {draw.block for draw in draws_of(order, step)}


def test_an_injected_spike(tmp_path: Path, large: Path) -> None:
    losses = dict.fromkeys(range(201, 206), 8.0)
    events = [
        spiky.event("inject", 200, first_step=200, first_batch=200, steps=5),
        spiky.spike_event(201, 8.0, injected=True),
        spiky.end_event(201, 216, 206, injected=True, peak_loss=8.0),
    ]
    folder = spiky.build(tmp_path / "run", spiky.step_rows(300, losses, {}), events, large)
    said = told(folder)
    assert "made on purpose: rare tokens took the place of the batches of steps 201 to 205" in said
    assert "no source document among them. Their 640 tokens are not counted as trained" in said
    assert "The 20 blocks that the order had there are not read in this epoch" in said
    assert "One of the injected sequences begins" in said
    assert "Nothing needs to change" in said
    rows = table(folder)
    assert {row["read"] for row in rows} == {"no, replaced by an injection"}
    assert sum(int(row["tokens"]) for row in rows) == 640


def test_a_rewound_spike(tmp_path: Path) -> None:
    said = told(rewound(tmp_path / "run"))
    assert "undone by going back to step 180" in said
    assert "Going back threw away 41 steps: 5,250 tokens, 82 seconds" in said


def test_a_spike_with_a_price(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    row = {"seq": 1, "time_utc": spiky.at(0), "event": "intent", "tag": "a", "provider": "p"}
    builder.write_lines(folder / "ledger.jsonl", [row | {"usd_per_hr": "36.00", "machine_id": "a"}])
    assert "$0.10 at $36.00 an hour (ledger.jsonl, the machines rented then)" in told(folder)


def test_lasting_damage(tmp_path: Path) -> None:
    losses = {201: 5.0} | dict.fromkeys(range(202, 301), 3.2)
    events = [spiky.spike_event(201), spiky.end_event(201, 214, 202)]
    said = told(spiky.build(tmp_path / "run", spiky.step_rows(300, losses, {}), events))
    found = re.search(r"the loss then lay (0\.\d+) nats above a straight line", said)
    assert found
    assert float(found[1]) == pytest.approx(0.2, abs=0.02)
    assert "A loss that flattens does so too" in said
    assert "it may have left something behind" in said
    assert "left this behind" not in said


def skipped(folder: Path, last: int = 300, after: float = 3.05, **changes: object) -> Path:
    """Every update of an injected spike left out; the loss lies higher afterwards, for whatever reason."""
    losses = dict.fromkeys(range(201, 206), 8.0) | dict.fromkeys(range(206, last + 1), after)
    rows = spiky.step_rows(last, losses, {})
    for row in rows[200:205]:
        row |= {"verdict": "skip", "injected": True}
    events = [
        spiky.event("inject", 200, first_step=200, first_batch=200, steps=5),
        spiky.spike_event(201, 8.0, injected=True),
        spiky.end_event(201, 216, 206, injected=True, peak_loss=8.0, policy="skip"),
    ]
    return spiky.build(folder, rows, events, stability__policy="skip", **changes)


def test_where_every_update_was_left_out_nothing_can_be_left_behind(tmp_path: Path) -> None:
    said = told(skipped(tmp_path / "run"))
    assert "every update of it was left out, so nothing can be left behind" in said
    assert "straight line" not in said
    assert "optimizer.clip" not in said.split("### What to do")[1]
    assert "optimizer.lr" not in said
    assert "stability.policy `skip` left every update of it out" in said
    assert "No update was made in these steps" in said
    assert "what the gradients were clipped to" not in said


def test_one_update_that_was_made_is_enough_for_the_trend(tmp_path: Path) -> None:
    folder = skipped(tmp_path / "run")
    rows = builder.read_lines(folder / "steps.jsonl")
    rows[202]["verdict"] = "go"
    builder.write_lines(folder / "steps.jsonl", rows)
    said = told(folder)
    assert "nothing can be left behind" not in said
    assert "it may have left something behind" in said


def test_going_back_leaves_nothing_behind(tmp_path: Path) -> None:
    assert "it had read since: nothing can be left behind." in told(rewound(tmp_path / "run"))


def test_a_large_error_is_said_instead_of_nothing_lasting(tmp_path: Path) -> None:
    """Noise of half a nat: the mean of 64 steps is good to about 0.15, and no verdict may claim more."""
    rows = spiky.step_rows(300, {}, {})
    for row in rows:
        row["loss"] = 5.0 if 201 <= row["step"] < 206 else 3.0 + 25 * (row["loss"] - 3.0)
    for row in rows[205:]:
        row["loss"] += 0.1
    said = told(spiky.build(tmp_path / "run", rows, [spiky.spike_event(201), spiky.end_event(201, 216, 206)]))
    assert re.search(r"an effect below 0\.\d\d nats could not be seen", said)
    assert "nothing lasting" not in said
    assert "left something behind" not in said


def test_a_policy_is_credited_only_where_it_did_something(tmp_path: Path) -> None:
    def run(name: str, clip: float) -> str:
        losses = dict.fromkeys(range(201, 206), 8.0)
        events = [
            spiky.spike_event(201, 8.0, injected=True),
            spiky.end_event(201, 216, 206, injected=True, peak_loss=8.0),
        ]
        rows = spiky.step_rows(300, losses, {201: 5.0}, clip=clip)
        return told(spiky.build(tmp_path / name, rows, events, stability__policy="clip", optimizer__clip=1.0))

    assert "with stability.policy `clip` the run took it" in run("tighter", 0.8)
    alone = run("alone", 1.0)
    assert "the run took it with optimizer.clip 1 alone" in alone
    assert "with stability.policy" not in alone


def test_an_evaluation_within_the_recovery_is_not_billed_to_it(tmp_path: Path) -> None:
    """Rows written 100 s apart, of steps that took 6 ms each: 5 of them are 30 ms."""
    folder = spiky.natural(tmp_path / "run")
    rows = [
        row | {"step_s": 0.006, "time_utc": spiky.at(50 * row["step"])}
        for row in builder.read_lines(folder / "steps.jsonl")
    ]
    builder.write_lines(folder / "steps.jsonl", rows)
    assert "The way there took five steps: 640 tokens, 30 ms and" in told(folder)


def test_a_measured_second_moment_stands_alone(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    rows = builder.read_lines(folder / "metrics.jsonl")
    for row in rows:
        row["optimizer/v_norm"] = 0.0112 if row["step"] >= 210 else 0.01
    builder.write_lines(folder / "metrics.jsonl", rows)
    said = told(folder)
    assert "was 0.01 at step 200 and 0.0112 at step 210, 1.12 times as much" in said
    assert "its usual value by step" not in said


def test_numbers_that_overflow_count_as_not_finite(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    rows = builder.read_lines(folder / "steps.jsonl")
    for place, odd in ((150, {"loss": 1e308}), (160, {"loss": "inf"}), (202, {"grad_norm": 1e300})):
        rows[place] |= odd
    rows[170]["loss"] = -1e308
    rows[220]["loss"] = -1e308
    rows[180] |= {"grad_norm": -1e308, "step_s": 1e308}
    builder.write_lines(folder / "steps.jsonl", rows)
    events = builder.read_lines(folder / "events.jsonl")
    events[2] |= {"peak_loss": 1e308, "grad_norm_before": 1e300}
    builder.write_lines(folder / "events.jsonl", events)
    said = told(folder)
    assert "## Step 201" in said
    assert "nan" not in said.lower()
    assert re.search(r"The difference of [+-]0\.0\d\d nats", said)
    assert told(folder, 101)


def test_a_spike_still_open(tmp_path: Path) -> None:
    rows = spiky.step_rows(210, dict.fromkeys(range(201, 211), 5.0), {})
    said = told(spiky.build(tmp_path / "run", rows, [spiky.spike_event(201)]))
    assert "At the last row, nine steps later, it had not come back." in said
    assert "run it again when the loss has settled" in said


def test_not_finite_numbers(tmp_path: Path) -> None:
    rows = spiky.step_rows(300, {201: 5.0, 202: math.nan}, {202: math.inf})
    said = told(spiky.build(tmp_path / "run", rows, [spiky.spike_event(201), spiky.end_event(201, 213, 203)]))
    assert "One step in it had no finite loss or gradient" in said
    assert " nan" not in said.lower()


def test_a_corpus_elsewhere_is_one_sentence(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    said = told(folder)
    assert "can't be named here (/nowhere/corpus is not on this machine)" in said
    assert said.count("/nowhere/corpus") == 1
    rows = table(folder)
    assert len(rows) == 20  # five steps of four blocks
    assert {row["file"] for row in rows} == {""}


def test_a_run_from_before_the_flight_recorder(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    (folder / "steps.jsonl").unlink()
    said = told(folder)
    assert "the steps between the rows (one every 5)" in said
    assert "what the gradients were clipped to" in said


# -----------------------------------------------------------------------------------------------------------
# Several spikes


def several(folder: Path, onsets: list[int], last: int = 390) -> Path:
    losses = {onset: 4.0 + place / 10 for place, onset in enumerate(onsets)}
    events = []
    for onset in onsets:
        events += [spiky.spike_event(onset, losses[onset])]
        events += [
            spiky.end_event(onset, onset + 12, onset + 1, peak_loss=losses[onset], peak_loss_step=onset)
        ]
    return spiky.build(folder, spiky.step_rows(last, losses, {}), events)


def test_two_spikes_have_a_section_and_a_picture_each(tmp_path: Path) -> None:
    files = postmortem.write(several(tmp_path / "run", [150, 250]))
    names = {file.name for file in files}
    assert names == {
        "spike-postmortem.md",
        "spike-postmortem-data.csv",
        "spike-postmortem.png",
        "spike-postmortem-250.png",
    }
    page = files[0].read_text()
    assert page.index("## Step 150") < page.index("## Step 250")
    assert page.index("(spike-postmortem.png)") < page.index("(spike-postmortem-250.png)")
    assert "| 150 | natural | +1.00 |" in page


def test_of_many_the_highest_and_the_newest(tmp_path: Path) -> None:
    onsets = [380, 60, 80, 100, 120, 140, 160, 180]  # the first is the lowest, and the newest
    folder = several(tmp_path / "run", sorted(onsets))
    page = postmortem.write(folder)[0].read_text()
    shown = [int(step.replace(",", "")) for step in re.findall(r"^## Step ([\d,]+)", page, re.M)]
    assert len(shown) == postmortem.MOST_SECTIONS
    assert shown == sorted([380, 180, 160, 140, 120])
    assert page.count("| natural |") == len(onsets)
    asked = postmortem.write(folder, 80)[0].read_text()
    assert "## Step 80" in asked


def test_spikes_at_one_step_have_pictures_of_their_own(tmp_path: Path) -> None:
    again = [spiky.spike_event(201), spiky.end_event(201, 215, 205)]
    folder = rewound(tmp_path / "run", again)
    spikes = episodes(open_run(folder))
    assert postmortem.picture_names(spikes, spikes) == ["spike-postmortem.png", "spike-postmortem-201-2.png"]


# -----------------------------------------------------------------------------------------------------------
# Any step


def test_a_quiet_step(tmp_path: Path, large: Path) -> None:
    folder = spiky.natural(tmp_path / "run", large)
    files = postmortem.write(folder, 100)
    assert files[0].name == "postmortem-step-100.md"
    said = " ".join(files[0].read_text().split())
    assert "# Step 100 of run: nothing stood out here" in said
    assert "Nothing else is on record for these steps" in said
    assert not (folder / "spike-postmortem.md").exists()


def test_a_bump_that_no_detector_saw(tmp_path: Path) -> None:
    folder = spiky.build(tmp_path / "run", spiky.step_rows(300, {201: 3.5}, {}), [])
    assert "# Step 201 of run: it stood out" in told(folder, 201)
    assert "the loss was highest at step 201 with 3.500" in told(folder, 195)


def test_an_injection_that_nobody_noticed_is_named(tmp_path: Path, large: Path) -> None:
    events = [spiky.event("inject", 60, first_step=60, first_batch=60, steps=1)]
    said = told(spiky.build(tmp_path / "run", spiky.step_rows(100, {}, {}), events, large), 61)
    assert "# Step 61 of run: an injected batch, which did not stand out" in said
    assert "nothing stood out here" not in said
    rows = spiky.step_rows(100, {}, {})
    rows[60]["injected"] = True  # and without the corpus: by its row
    assert "an injected batch" in told(spiky.build(tmp_path / "bare", rows, []), 61)


def test_one_injected_step_is_one_batch(tmp_path: Path, large: Path) -> None:
    events = [
        spiky.event("inject", 200, first_step=200, first_batch=200, steps=1),
        spiky.spike_event(201, 8.0, injected=True),
        spiky.end_event(201, 216, 202, injected=True, peak_loss=8.0),
    ]
    said = told(spiky.build(tmp_path / "run", spiky.step_rows(300, {201: 8.0}, {}), events, large))
    assert "took the place of the batch of step 201." in said


def test_a_step_near_a_spike_means_the_spike(tmp_path: Path) -> None:
    assert "## Step 201: natural" in told(spiky.natural(tmp_path / "run"), 190)


def test_a_step_that_was_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(spiky.natural(tmp_path / "run"), "--step", 350) == 2
    said = capsys.readouterr().err
    assert "there is no row for step 350: the run has done 300 of 400 steps" in said
    assert said.count("\n") == 1


# -----------------------------------------------------------------------------------------------------------
# Words


def test_words() -> None:
    assert [count(n, "step") for n in (0, 1, 2, 12, 1200)] == [
        *("no steps", "one step", "two steps", "12 steps", "1,200 steps")
    ]
    assert [spoken(s) for s in (2.04, 42, 120, 7200)] == [
        "2.0 seconds",
        "42 seconds",
        "2.0 minutes",
        "2.0 hours",
    ]
    assert [spoken(s) for s in (0.03, 0.0004)] == ["30 ms", "less than 1 ms"]
    assert [percent(share) for share in (1 / 1.97, 1 / 452)] == ["51\u00a0%", "0.22\u00a0%"]
    assert spans([1, 2, 3, 7, 1200]) == "1 to 3, 7 and 1,200"
    assert joined(["a"]) == "a"
    assert joined([]) == ""


def test_attention_logits_are_told_with_their_growth(tmp_path: Path) -> None:
    def run(name: str, logits: list[float]) -> Path:
        folder = spiky.natural(tmp_path / name)
        rows = builder.read_lines(folder / "metrics.jsonl")
        for row in rows:
            row["attention/logit_max"] = logits[0] if row["step"] <= 150 else logits[1]
        builder.write_lines(folder / "metrics.jsonl", rows)
        return folder

    cause = "Attention is the likeliest cause: its logits had reached"
    grown = told(run("grown", [10.0, 32.0]))
    assert (
        f"{cause} 32 before it, 3.2 times what they were at three quarters of the way there; its data"
        in grown
    )
    assert f"{cause} 60 before it; its data" in told(run("high", [50.0, 60.0]))
    assert cause not in told(run("learning", [5.0, 12.0]))


def test_what_adams_memory_is_back_to_is_what_is_tested(tmp_path: Path) -> None:
    """The second moment, in AdamW's own recursion, at the step that is named and at the one before."""
    folder = spiky.natural(tmp_path / "run")
    rows = builder.read_lines(folder / "metrics.jsonl")
    for row in rows:
        del row["optimizer/v_norm"]  # measured, it is told and nothing is computed
    builder.write_lines(folder / "metrics.jsonl", rows)
    found = re.search(r"by step (\d+) that moment was less than a tenth above its usual value", told(folder))
    assert found
    v, values = 1.0, {}
    for row in builder.read_lines(folder / "steps.jsonl"):
        if row["step"] >= 201:
            v = 0.95 * v + 0.05 * (min(row["grad_norm"], row["clip"]) / spiky.NORM_BEFORE) ** 2
            values[row["step"]] = v
    assert values[int(found[1])] < 1.1 <= values[int(found[1]) - 1]


def test_a_spike_after_going_back_over_a_resume_does_not_blame_it(tmp_path: Path) -> None:
    """Resumed at 200, back to 180 at 221, up again at 195: 15 steps after going back, not -5 after 200."""
    folder = rewound(tmp_path / "run", [spiky.spike_event(195), spiky.end_event(195, 210, 199)])
    events = builder.read_lines(folder / "events.jsonl")
    builder.write_lines(folder / "events.jsonl", [events[0], spiky.event("resume", 200), *events[1:]])
    first, second = told(folder).split("## Step 195")
    assert "It came one step after the run was resumed" in first
    assert "after the run was resumed" not in second
