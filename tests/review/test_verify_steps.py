"""The checks of what every step leaves: steps.jsonl, injections, jumps, spikes and their post-mortem."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file
from tests.records import builder

from x1_pretrain.corpus.order import Order
from x1_pretrain.records.data_order import order_of, recorded_injections, recorded_jumps
from x1_pretrain.records.formats import of_run
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.review.command import verify

EVERY, STEPS, SESSIONS = "every step on record", "no gap or overlap in steps", "sessions agree with events"
BLOCKS, POSTMORTEM, RELOAD = (
    "blocks read in order",
    "post-mortem written",
    "final weights reload byte for byte",
)
Rows = list[dict[str, Any]]


def results(folder: Path) -> dict[str, tuple[str, str]]:
    return {check.name: (check.result, check.evidence) for check in verify(open_run(folder))}


def failed(folder: Path) -> dict[str, str]:
    return {name: evidence for name, (result, evidence) in results(folder).items() if result == "failed"}


def step_rows(steps: int = builder.TOTAL_STEPS) -> Rows:
    return [
        {"step": s, "time_utc": "2026-11-21T10:15:00.000Z", "session": 1 if s <= 20 else 2}
        | {"loss": builder.train_loss(s), "grad_norm": 0.5 + 1 / s, "step_s": 0.1, "verdict": "go"}
        for s in range(1, steps + 1)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = builder.build_run(tmp_path / "tiny")
    builder.write_lines(folder / "steps.jsonl", step_rows())
    says_formats(folder, of_run({}))
    return folder


def says_formats(folder: Path, formats: dict[str, int] | None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("formats", None)
    manifest |= {} if formats is None else {"formats": formats}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_step_once_and_the_same_numbers(folder: Path) -> None:
    result, evidence = results(folder)[EVERY]
    assert result == "passed"
    assert evidence == "42 steps, 1 to 42, each once; the 9 rows of metrics agree"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.pop(11), "no row of step 12"),
        (lambda rows: rows.__delitem__(slice(11, 19)), "no row of steps 12 to 19"),
        (lambda rows: rows.__delitem__(slice(0, 20)), "no row of steps 1 to 20"),  # all of a session
        (lambda rows: rows.insert(20, rows.pop(10)), "step 21 is followed by step 11"),
        (lambda rows: rows.insert(11, rows[10]), "step 11 is followed by step 11"),
        (lambda rows: rows.pop(0), "no row of step 1"),
        (lambda rows: rows.pop(), "no row of step 42"),
        (lambda rows: rows.insert(0, rows[0] | {"step": 0}), "begins at step 0, expected 1"),
        (lambda rows: rows[9].update(loss=1.0), "step 10: loss is 1.0 in steps.jsonl, 2.3 in metrics.jsonl"),
        (lambda rows: rows[9].update(grad_norm="nan"), "step 10: grad_norm is nan in steps.jsonl, 0.6"),
        (lambda rows: rows.clear(), "no row of steps 1 to 42"),
    ],
)
def test_a_step_missing_twice_or_other_is_seen(
    folder: Path, change: Callable[[Rows], Any], said: str
) -> None:
    rows = step_rows()
    change(rows)
    builder.write_lines(folder / "steps.jsonl", rows)
    assert set(failed(folder)) == {EVERY}
    assert said in failed(folder)[EVERY]


def test_a_loss_that_is_no_number_agrees_with_itself(folder: Path) -> None:
    rows, metrics = step_rows(), builder.read_lines(folder / "metrics.jsonl")
    rows[9]["loss"] = metrics[1]["train/loss"] = "nan"
    builder.write_lines(folder / "steps.jsonl", rows)
    builder.write_lines(folder / "metrics.jsonl", metrics)
    assert failed(folder) == {}


def test_a_run_without_the_file_is_older_than_it_or_lost_it(folder: Path) -> None:
    (folder / "steps.jsonl").unlink()
    assert failed(folder) == {EVERY: "no row of steps 1 to 42"}
    says_formats(folder, None)
    assert results(folder)[EVERY] == ("not applicable", "no steps.jsonl: an older run")


def test_a_run_from_before_the_file_has_it_from_a_later_session_on(folder: Path) -> None:
    """Session 2 went on from step 20. What the first wrote into the manifest the next ones keep to."""
    builder.write_lines(folder / "steps.jsonl", step_rows()[20:])
    assert failed(folder) == {EVERY: "no row of steps 1 to 20"}
    for formats in (None, of_run({"run_id": "x"})):
        says_formats(folder, formats)
        builder.write_lines(folder / "steps.jsonl", step_rows()[20:])
        assert results(folder)[EVERY][1].startswith("22 steps, 21 to 42, each once")
        assert failed(folder) == {}
        builder.write_lines(folder / "steps.jsonl", step_rows()[22:])
        assert failed(folder) == {EVERY: "no row of steps 1 to 22"}  # no session began there
        builder.write_lines(folder / "steps.jsonl", [])
        assert failed(folder) == {EVERY: "no row of steps 21 to 42"}


def test_steps_that_a_checkpoint_knows_of_are_missed_at_the_end(tmp_path: Path) -> None:
    """No row of metrics was due there."""
    folder = builder.build_run(tmp_path / "tiny", 23)
    builder.write_lines(folder / "steps.jsonl", step_rows(21))
    told = [one for one in builder.read_lines(folder / "events.jsonl") if one["event"] != "checkpoint"]
    builder.write_lines(folder / "events.jsonl", told)
    assert EVERY not in failed(folder)
    told.append(builder.event("checkpoint", 23, 2))
    builder.write_lines(folder / "events.jsonl", told)
    assert failed(folder)[EVERY] == "no row of steps 22 to 23"
    told.append(builder.event("rewind", 24, 2) | {"from_step": 24, "to_step": 21, "jumps": [[21, 24]]})
    builder.write_lines(folder / "events.jsonl", told)
    assert EVERY not in failed(folder)


def test_a_branch_begins_after_its_parent(folder: Path) -> None:
    events = [one | {"step": max(10, one["step"])} for one in builder.read_lines(folder / "events.jsonl")]
    builder.write_lines(folder / "events.jsonl", [builder.event("branch", 10, 1), *events])
    builder.write_lines(folder / "steps.jsonl", step_rows()[10:])
    assert EVERY not in failed(folder)


def restored(folder: Path, *lost: str) -> None:
    """A session that began at step 20 came back from a mirror that had lost rows of these files."""
    events = builder.read_lines(folder / "events.jsonl")
    told = builder.event("mirror", 20, 2) | {"message": "mirrored in s3://runs", "lost": list(lost)}
    builder.write_lines(folder / "events.jsonl", [*events, told])


def test_what_the_mirror_lost_is_told_as_that(folder: Path) -> None:
    builder.write_lines(folder / "steps.jsonl", [row for row in step_rows() if row["step"] not in (3, 30)])
    restored(folder, "steps.jsonl")
    assert failed(folder)[EVERY] == (
        "no row of step 3, lost in the mirror that the run came back from (the event of step 20 says so); "
        "no row of step 30"
    )
    rows = [row for row in builder.read_lines(folder / "metrics.jsonl") if row["step"] not in (15, 30)]
    builder.write_lines(folder / "metrics.jsonl", rows)
    assert failed(folder)[STEPS] == "no training row for step 15; no training row for step 30"
    restored(folder, "metrics.jsonl")
    assert failed(folder)[STEPS].startswith("no training row for step 15, lost in the mirror that")
    assert failed(folder)[STEPS].endswith("; no training row for step 30")


# -----------------------------------------------------------------------------------------------------------
# Injections and jumps


def inject(folder: Path, first: int, **rows_too: bool) -> None:
    """The batches of the five steps after `first` were not data."""
    events = builder.read_lines(folder / "events.jsonl")
    told = builder.event("inject", first, 1) | {"first_step": first, "first_batch": first, "steps": 5}
    events.insert(next(i for i, e in enumerate(events) if e["step"] > first), told)
    builder.write_lines(folder / "events.jsonl", events)
    rows = builder.read_lines(folder / "metrics.jsonl")
    for row in rows:
        made = min(5, max(0, row["step"] - first))
        row["tokens"] -= made * builder.TOKENS_PER_STEP
        if made:
            row["tokens_injected"] = made * builder.TOKENS_PER_STEP
    builder.write_lines(folder / "metrics.jsonl", rows)


def test_injected_tokens_are_counted_apart(folder: Path) -> None:
    inject(folder, 12)
    assert failed(folder) == {}
    rows = builder.read_lines(folder / "metrics.jsonl")
    rows[-1]["tokens"] += 64
    del rows[-2]["tokens_injected"]
    builder.write_lines(folder / "metrics.jsonl", rows)
    said = failed(folder)[STEPS]
    assert "step 42 says 2432 tokens, x 64 without 5 injected it is 2368" in said
    assert "step 42 says 0 injected tokens, x 64 it is 320" in said


def test_tokens_of_an_injection_nobody_told_of_are_an_error(folder: Path) -> None:
    inject(folder, 12)
    events = [e for e in builder.read_lines(folder / "events.jsonl") if e["event"] != "inject"]
    builder.write_lines(folder / "events.jsonl", events)
    assert set(failed(folder)) == {STEPS}


def event(name: str, step: int, **more: Any) -> dict[str, Any]:
    return {"event": name, "step": step, **more}


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([event("start", 0), event("inject", 12, first_step=12, first_batch=12)], [12]),
        ([event("inject", 12, first_step=12, first_batch=12), event("resume", 10)], []),
        ([event("inject", 12, first_step=12, first_batch=12), event("resume", 14)], [12]),
        (
            [
                event("inject", 12, first_step=12, first_batch=12),
                event("resume", 10),
                event("inject", 12, first_step=12, first_batch=12),
            ],
            [12],
        ),
        (
            [
                event("inject", 12, first_step=12, first_batch=12),
                event("rewind", 30, to_step=14, jumps=[[14, 30]]),
                event("inject", 20, first_step=20, first_batch=36),
            ],
            [12, 36],
        ),
        ([event("branch", 20, injected=[3], jumps=[]), event("start", 20)], [3]),
    ],
)
def test_what_was_gone_back_over_is_no_injection(events: Rows, found: list[int]) -> None:
    assert recorded_injections(events) == found


def test_the_last_word_on_jumps_holds() -> None:
    events = [event("branch", 5, jumps=[[5, 9]]), event("rewind", 30, to_step=8, jumps=[[5, 9], [8, 30]])]
    assert recorded_jumps(events) == [(5, 9), (8, 30)]


def rewound(folder: Path, blocks: bool = True) -> Path:
    """Session 2, at step 30, went back to step 10 and read on at batch 30."""
    events = builder.read_lines(folder / "events.jsonl")
    told = builder.event("rewind", 30, 2) | {"from_step": 30, "to_step": 10, "jumps": [[10, 30]]}
    events.insert(3, told)
    builder.write_lines(folder / "events.jsonl", events)
    for name in ("metrics", "steps"):
        rows = builder.read_lines(folder / f"{name}.jsonl")
        for row in rows:
            row["session"] = 1 if row["step"] <= 10 else 2
        builder.write_lines(folder / f"{name}.jsonl", rows)
    config = open_run(folder).config
    sources = order_of(open_run(folder)).sources
    before = Order(config.seed, sources, config.batch_blocks, 80)  # batches, without the jump

    def batch(step: int) -> int:
        return step if step < 10 else step + 20

    rows = [
        {"step": s + 1, "ranks": 1, "blocks": [list(draw) for draw in before.step_blocks(batch(s))]}
        for s in range(42)
    ]
    builder.write_lines(folder / "blocks.jsonl", rows if blocks else [])
    return folder


def test_a_rewind_is_followed_in_steps_sessions_and_blocks(folder: Path) -> None:
    rewound(folder)
    found = results(folder)
    assert {name: found[name][0] for name in (STEPS, EVERY, SESSIONS, BLOCKS)} == dict.fromkeys(
        (STEPS, EVERY, SESSIONS, BLOCKS), "passed"
    )


def test_a_rewind_nobody_told_of_is_seen(folder: Path) -> None:
    rewound(folder)
    events = [e for e in builder.read_lines(folder / "events.jsonl") if e["event"] != "rewind"]
    builder.write_lines(folder / "events.jsonl", events)
    assert set(failed(folder)) == {SESSIONS, BLOCKS}


def test_injected_steps_read_no_blocks(folder: Path) -> None:
    inject(folder, 12)
    order = order_of(open_run(folder))
    rows = [
        {"step": s, "ranks": 1, "blocks": [list(draw) for draw in order.step_blocks(s - 1)]}
        for s in range(1, 43)
    ]
    assert [row["step"] for row in rows if not row["blocks"]] == [13, 14, 15, 16, 17]
    builder.write_lines(folder / "blocks.jsonl", rows)
    assert results(folder)[BLOCKS][0] == "passed"
    rows[12]["blocks"] = rows[0]["blocks"]
    builder.write_lines(folder / "blocks.jsonl", rows)
    assert "step 13 read other blocks" in failed(folder)[BLOCKS]


# -----------------------------------------------------------------------------------------------------------
# Post-mortem and weights


def spike(folder: Path, onset: int, end: int | None) -> None:
    events = builder.read_lines(folder / "events.jsonl")
    begun = {"onset": onset, "loss": 9.0, "grad_norm": 9.0, "injected": False}
    events.insert(3, builder.event("spike", onset, 2) | begun)
    if end is not None:
        close = {"onset": onset, "end": end, "recovered": end, "peak_loss": 9.0, "peak_loss_step": onset}
        events.insert(4, builder.event("spike_end", end, 2) | close)
    builder.write_lines(folder / "events.jsonl", events)


def test_every_spike_has_its_place_in_the_post_mortem(folder: Path) -> None:
    assert results(folder)[POSTMORTEM] == ("not applicable", "no spike on record")
    spike(folder, 25, None)
    assert results(folder)[POSTMORTEM] == ("not applicable", "a spike is still going on")
    spike(folder, 30, 33)
    assert "no spike-postmortem.md" in failed(folder)[POSTMORTEM]
    page = folder / "spike-postmortem.md"
    page.write_text("# Spike post-mortem: tiny\n\n## Step 3: natural\n\nStep 30 is not looked at.\n")
    assert "the spike of step 30 is not in spike-postmortem.md" in failed(folder)[POSTMORTEM]
    page.write_text("# Spike post-mortem: tiny\n\n## Step 30: natural, recovered in 3 steps\n")
    assert results(folder)[POSTMORTEM][0] == "passed"
    page.write_text("# Spike post-mortem: tiny\n\n| onset | kind |\n|---|---|\n| 30 | natural |\n")
    assert results(folder)[POSTMORTEM][0] == "passed"


def test_a_cell_of_another_table_is_no_place_for_a_spike(folder: Path) -> None:
    spike(folder, 30, 33)
    page = folder / "spike-postmortem.md"
    for row in ("| 30 | `web.txt` | 7 | 32 |", "| code | natural | 30 |", "| 30 | 5 |", "30 | natural |"):
        page.write_text(f"# Spike post-mortem: tiny\n\n## Step 3: natural, recovered\n\n{row}\n")
        assert "the spike of step 30 is not in" in failed(folder)[POSTMORTEM], row
    page.write_text("# Spike post-mortem: tiny\n\n| 30 | made on purpose | +2.00 | x9.0 | recovered |\n")
    assert POSTMORTEM not in failed(folder)


def test_a_page_from_when_the_spike_was_still_up_is_out_of_date(folder: Path) -> None:
    spike(folder, 30, 33)
    page, row = folder / "spike-postmortem.md", "| 30 | natural | +2.00 | x9.0 | recovered in 3 steps |"
    page.write_text("# Spike post-mortem: tiny\n\n## Step 30: natural, still up at the last row\n")
    assert "as still up at the last row, and it is over: `x1 postmortem" in failed(folder)[POSTMORTEM]
    page.write_text(page.read_text() + f"\n{row}\n")
    assert POSTMORTEM in failed(folder)
    page.write_text(f"{row}\n\n## Step 30: natural, recovered in 3 steps\n")
    assert POSTMORTEM not in failed(folder)


def test_two_spikes_of_one_step_have_two_places(folder: Path) -> None:
    """The first was undone by a rewind; the second came on the same step number, and is over too."""
    spike(folder, 30, 33)
    events = builder.read_lines(folder / "events.jsonl")
    again = [dict(one) for one in events[3:5]]
    rewind = builder.event("rewind", 33, 2) | {"from_step": 33, "to_step": 20, "jumps": [[20, 33]]}
    builder.write_lines(folder / "events.jsonl", [*events[:5], rewind, *again, *events[5:]])
    page, row = folder / "spike-postmortem.md", "| 30 | natural | +2.00 | x9.0 | recovered |\n"
    page.write_text(row)
    assert "the spike of step 30 is not in" in failed(folder)[POSTMORTEM]
    page.write_text(2 * row)
    assert POSTMORTEM not in failed(folder)


def test_a_resume_from_before_an_earlier_one_keeps_to_its_own_log_every(tmp_path: Path) -> None:
    """Session 2 went on from 30 with a row every 10; its checkpoint was bad, session 3 went on from 20."""
    folder = builder.build_run(tmp_path / "tiny", log__every=10)
    events = [
        builder.event("start", 0, 1) | {"log_every": 5},
        builder.event("resume", 30, 2) | {"log_every": 10},
        builder.event("resume", 20, 3) | {"log_every": 10},
        builder.event("finish", 42, 3),
    ]
    builder.write_lines(folder / "events.jsonl", events)
    rows = [
        row for row in builder.rows(42) if row["step"] <= 20 or row["step"] % 10 == 0 or row["step"] == 42
    ]
    rows = [row | {"session": 1 if row["step"] <= 20 else 3} for row in rows]
    builder.write_lines(folder / "metrics.jsonl", rows)
    assert not {STEPS, SESSIONS} & set(failed(folder)), failed(folder)
    rows = [row for row in rows if row["step"] != 15]  # due in session 1, which had a row every 5
    builder.write_lines(folder / "metrics.jsonl", rows)
    assert "no training row for step 15" in failed(folder)[STEPS]


def test_weights_that_come_out_other_are_seen(folder: Path) -> None:
    """A file that loads, and whose tensors lie in another order than any writer of the format puts them."""
    assert results(folder)[RELOAD][0] == "passed"
    tensors = {"b": np.arange(4, dtype=np.float32), "a": np.ones(2, dtype=np.float32)}
    data = b"".join(t.tobytes() for t in tensors.values())
    header = {
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
    }
    size = int.from_bytes(save(tensors)[:8], "little")  # the usual header is as long:
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size
    reseal(folder, lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text + data))
    assert "saved again it differs from model.safetensors at byte" in failed(folder)[RELOAD]
    reseal(folder, lambda file: save_file(tensors, file))
    assert RELOAD not in failed(folder)
    reseal(folder, lambda file: file.write_bytes(b"no weights"))
    assert "does not load" in failed(folder)[RELOAD]


def reseal(folder: Path, write: Callable[[Path], object]) -> None:
    """A good checkpoint (its hashes match) with other weights."""
    from x1_pretrain.records.checkpoint_files import sha256

    place = folder / "checkpoints" / "step-000000042"
    write(place / "model.safetensors")
    manifest = json.loads((place / "manifest.json").read_text())
    file = place / "model.safetensors"
    manifest["files"]["model.safetensors"] |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (place / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "checkpoints" / "step-000000020", ignore_errors=True)


def test_an_older_run_only_watched(tmp_path: Path) -> None:
    """Its config knows no policy, and its hash is that of a run without one."""
    folder = builder.build_run(tmp_path / "old", stability={"policy": "watch"})
    text = (folder / "config.yaml").read_text()
    head, _, after = text.partition("stability:\n")
    kept = after[after.index(next(line for line in after.splitlines() if line and line[0] != " ")) :]
    (folder / "config.yaml").write_text(head + kept)
    assert "stability" not in (folder / "config.yaml").read_text()
    assert open_run(folder).config.stability.policy == "watch"
    assert failed(folder) == {}
