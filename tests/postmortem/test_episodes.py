"""The spikes of a run: what the events and the rows of its steps come to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.postmortem import spiky
from tests.records import builder
from x1_pretrain.postmortem.episodes import Spike, episodes, seconds_between, tokens_after
from x1_pretrain.postmortem.steps_file import last_row, rows_between
from x1_pretrain.records.run_folder import open_run


def of(folder: Path) -> list[Spike]:
    return episodes(open_run(folder))


def test_a_natural_spike_with_its_numbers(tmp_path: Path) -> None:
    [spike] = of(spiky.natural(tmp_path / "run"))
    assert (spike.onset, spike.recovered, spike.end, spike.recovery_steps) == (201, 206, 216, 5)
    assert spike.height == pytest.approx(2.0)
    assert spike.grad_factor == pytest.approx(10.0)
    assert spike.flagged == (201, 202, 203, 204, 205)
    assert spike.above == 5
    assert spike.loss_scale == pytest.approx(0.02)  # the z of the onset says so
    assert spike.tokens == 200 * spiky.BATCH_TOKENS
    assert spike.recovery_s == pytest.approx(5 * spiky.SECONDS)
    assert spike.last == 205
    assert not spike.injected
    assert not spike.open


def test_no_events_no_spikes(tmp_path: Path) -> None:
    assert of(spiky.build(tmp_path / "run", spiky.step_rows(50, {}, {}), [])) == []


def test_an_open_spike_has_its_peak_from_the_rows(tmp_path: Path) -> None:
    rows = spiky.step_rows(260, {201: 5.0, 202: 6.5, 203: 6.0}, {201: 5.0, 204: 8.0})
    [spike] = of(spiky.build(tmp_path / "run", rows, [spiky.spike_event(201)]))
    assert (spike.end, spike.recovered, spike.open) == (None, None, True)
    assert (spike.peak_loss, spike.peak_loss_step) == (6.5, 202)
    assert (spike.peak_grad_norm, spike.peak_grad_norm_step) == (8.0, 204)


def test_without_events_saying_so_the_medians_come_from_the_rows(tmp_path: Path) -> None:
    rows = spiky.step_rows(230, {201: 5.0}, {})
    [spike] = of(spiky.build(tmp_path / "run", rows, [spiky.event("spike", 201, onset=201)]))
    assert spike.loss_before == pytest.approx(spiky.BEFORE, abs=0.01)
    assert spike.loss_scale == pytest.approx(0.02, rel=0.3)
    assert spike.grad_norm_before == pytest.approx(spiky.NORM_BEFORE, rel=0.02)


def test_a_resume_from_before_the_onset_forgets_the_spike(tmp_path: Path) -> None:
    """Its steps are done again, and it is found again."""
    events = [
        spiky.spike_event(201),
        spiky.event("resume", 150),
        spiky.spike_event(203),
        spiky.end_event(203, 220, 207),
    ]
    found = of(spiky.build(tmp_path / "run", spiky.step_rows(230, {}, {}), events))
    assert [spike.onset for spike in found] == [203]


def test_a_resume_within_a_spike_keeps_it(tmp_path: Path) -> None:
    events = [spiky.spike_event(201), spiky.event("resume", 203), spiky.end_event(201, 215, 205)]
    [spike] = of(spiky.build(tmp_path / "run", spiky.step_rows(230, {}, {}), events))
    assert (spike.onset, spike.recovered) == (201, 205)


def rewound(folder: Path, later: list[dict[str, object]] | None = None) -> Path:
    """Up at 201, given up at 221, back to 180; its rows lie aside, and other rows have their steps."""
    old = spiky.step_rows(221, dict.fromkeys(range(201, 222), 5.0), {201: 9.0})
    new = [row | {"time_utc": spiky.at(row["step"] + 60)} for row in spiky.step_rows(300, {}, {})]
    events = [
        spiky.spike_event(201),
        spiky.end_event(201, 221, None, policy="rewind"),
        spiky.event("rewind", 221, from_step=221, to_step=180, jumps=[[180, 221]]),
        *(later or []),
    ]
    spiky.build(folder, old[:180] + new[180:], events, stability__policy="rewind")
    builder.write_lines(folder / "steps.superseded.jsonl", old[180:])
    return folder


def test_a_spike_that_a_rewind_undid_is_still_seen(tmp_path: Path) -> None:
    [spike] = of(rewound(tmp_path / "run"))
    assert (spike.onset, spike.end, spike.rewound_to, spike.recovered) == (201, 221, 180, None)
    assert spike.flagged == tuple(range(201, 222))  # from the rows that were moved aside
    assert spike.above == 21


def test_after_a_rewind_the_same_step_can_spike_again(tmp_path: Path) -> None:
    again = [spiky.spike_event(201) | {"time_utc": spiky.at(261)}, spiky.end_event(201, 215, 205)]
    first, second = of(rewound(tmp_path / "run", again))
    assert (first.onset, first.rewound_to, second.onset, second.rewound_to) == (201, 180, 201, None)
    assert second.recovered == 205


def test_an_injection_counts_no_tokens(tmp_path: Path) -> None:
    events = [
        spiky.event("inject", 200, first_step=200, first_batch=200, steps=5),
        spiky.spike_event(201, injected=True),
        spiky.end_event(201, 216, 207, injected=True),
    ]
    folder = spiky.build(tmp_path / "run", spiky.step_rows(260, {201: 5.0}, {}), events)
    [spike] = of(folder)
    assert spike.injected
    run = open_run(folder)
    counted = [tokens_after(run, step, run.events()) // spiky.BATCH_TOKENS for step in (200, 203, 205, 250)]
    assert counted == [200, 200, 200, 245]


def test_after_a_rewind_the_steps_of_an_injection_read_other_data(tmp_path: Path) -> None:
    """They were injected only in the past that was given up."""
    inject = spiky.event("inject", 200, first_step=200, first_batch=200, steps=5)
    folder = rewound(tmp_path / "run")
    events = builder.read_lines(folder / "events.jsonl")
    builder.write_lines(folder / "events.jsonl", [events[0], inject, *events[1:]])
    run = open_run(folder)
    now, then = run.events(), run.events()[:3]
    assert tokens_after(run, 215, then) == (215 - 5) * spiky.BATCH_TOKENS
    assert tokens_after(run, 215, now) == 215 * spiky.BATCH_TOKENS


def injected(folder: Path, *events: dict[str, object], told: bool | None = None) -> bool:
    """What is said of the last spike, where the detector said `told` or nothing of it."""
    spiked = {name: value for name, value in spiky.spike_event(201).items() if name != "injected"}
    spiked |= {} if told is None else {"injected": told}
    history = [one for one in events if one.get("event") != "later"]
    later = [one["row"] for one in events if one.get("event") == "later"]
    folder = spiky.build(folder, spiky.step_rows(260, {201: 5.0}, {}), [*history, spiked, *later])
    return of(folder)[-1].injected


INJECT = spiky.event("inject", 200, first_step=200, first_batch=200, steps=5)


def test_the_detectors_own_word_on_what_was_made_on_purpose_holds(tmp_path: Path) -> None:
    assert not injected(tmp_path / "denied", INJECT, told=False)
    assert injected(tmp_path / "told", told=True)


def test_without_its_word_the_events_until_then_tell(tmp_path: Path) -> None:
    rewind = spiky.event("rewind", 221, from_step=221, to_step=180, jumps=[[180, 221]])
    no_rewind = spiky.event("rewind", 203)  # there was no checkpoint to go back to
    later = {"event": "later", "row": INJECT}
    assert injected(tmp_path / "made", INJECT)
    assert injected(tmp_path / "stayed", INJECT, no_rewind)
    assert not injected(tmp_path / "rewound", INJECT, rewind)
    assert not injected(tmp_path / "resumed", INJECT, spiky.event("resume", 150))
    assert not injected(tmp_path / "after", later)


def test_a_natural_spike_where_an_injected_one_was_rewound(tmp_path: Path) -> None:
    folder = rewound(tmp_path / "run", [spiky.spike_event(201), spiky.end_event(201, 215, 205)])
    events = builder.read_lines(folder / "events.jsonl")
    events[1:1] = [INJECT]
    events[2]["injected"] = events[3]["injected"] = True
    builder.write_lines(folder / "events.jsonl", events)
    assert [spike.injected for spike in of(folder)] == [True, False]


def test_a_branch_off_an_injected_trunk_counts_its_parents_tokens(tmp_path: Path) -> None:
    branch = spiky.event("branch", 60, injected=[50], jumps=[], run_id="trunk")
    folder = spiky.build(tmp_path / "run", spiky.step_rows(80, {}, {}), [])
    builder.write_lines(folder / "events.jsonl", [branch, spiky.event("start", 60)])
    run = open_run(folder)
    assert tokens_after(run, 80, run.events()) == 75 * spiky.BATCH_TOKENS


def test_a_not_finite_peak_is_the_highest(tmp_path: Path) -> None:
    rows = spiky.step_rows(230, {201: 5.0, 202: math.nan}, {202: math.inf})
    [spike] = of(spiky.build(tmp_path / "run", rows, [spiky.spike_event(201)]))
    assert (spike.peak_loss, spike.peak_loss_step) == (math.inf, 202)
    assert spike.peak_grad_norm == math.inf


def test_damaged_events_do_not_stop_it(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(
            '{"event": "spike", "onset": "many"}\n[1]\nnot json\n{"event": "rewind"}\n{"event": "spi'
        )
    assert [spike.onset for spike in of(folder)] == [201]


def test_a_run_from_before_the_flight_recorder(tmp_path: Path) -> None:
    folder = spiky.natural(tmp_path / "run")
    (folder / "steps.jsonl").unlink()
    [spike] = of(folder)
    assert (spike.onset, spike.height, spike.flagged) == (201, 2.0, ())


def test_a_pause_between_sessions_is_not_the_spikes(tmp_path: Path) -> None:
    rows = spiky.step_rows(20, {}, {})
    for row in rows[10:]:
        row |= {"session": 2, "time_utc": spiky.at(row["step"] + 5000)}
    assert seconds_between(rows, 9, 12) == pytest.approx(4 * spiky.SECONDS)


# -----------------------------------------------------------------------------------------------------------
# steps.jsonl by halving


@given(data=st.data())
def test_a_section_is_what_reading_everything_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    steps = sorted(data.draw(st.sets(st.integers(1, 2000), max_size=700)))
    first = data.draw(st.integers(-5, 2100))
    last = data.draw(st.integers(first - 1, 2200))
    folder = tmp_path_factory.mktemp("runs") / "run"
    spiky.build(folder, [], [])
    lines = [json.dumps({"step": s, "loss": 1.0, "pad": "x" * (s % 90)}) for s in steps]
    for place in data.draw(st.lists(st.integers(0, len(lines)), max_size=3)):
        lines.insert(place, data.draw(st.sampled_from(["", "{torn", "[1]", '{"step": "x"}'])))
    (folder / "steps.jsonl").write_text("".join(line + "\n" for line in lines) + '{"step": 99')
    run = open_run(folder)
    assert [row["step"] for row in rows_between(run, first, last)] == [s for s in steps if first <= s <= last]
    newest = last_row(run)
    assert (newest["step"] if newest else None) == (steps[-1] if steps else None)


def test_each_row_of_a_long_file_is_found(tmp_path: Path) -> None:
    folder = spiky.build(tmp_path / "run", [], [])
    lines = [json.dumps({"step": step, "pad": "x" * (step % 50)}) + "\n" for step in range(1, 1201)]
    (folder / "steps.jsonl").write_text("".join(lines))
    run = open_run(folder)
    for step in range(1, 1201):
        assert [row["step"] for row in rows_between(run, step, step)] == [step]
