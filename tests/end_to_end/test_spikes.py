"""A spike made on purpose, in real runs: noticed, answered by each policy, survived by every resume."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config, write_corpus
from tests.end_to_end.in_process import train_here
from tests.end_to_end.processes import REPOSITORY, Training, curve, rows, weights

from x1_pretrain.records.run_folder import open_run
from x1_pretrain.review.command import FAILED, verify

Capture = pytest.CaptureFixture[str]
STEPS, AT = 90, 60
FAULTY = Path(__file__).with_name("faulty.py")
STABILITY = {"window": 16, "inject_spike_at_step": AT}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=900)


def config(folder: Path, data: Path, run: Path, **stability: Any) -> Path:
    given = {key: value for key, value in {**STABILITY, **stability}.items() if value != "none"}
    sections: dict[str, Any] = {"training": {"total_steps": STEPS}, "checkpoint": {"every": 25}}
    return write_config(
        folder / f"{run.name}.yaml", data={"dir": str(data)}, run_dir=str(run), stability=given, **sections
    )


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "events.jsonl") if row["event"] == name]


@pytest.fixture(scope="module")
def injected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an injection, in one piece."""
    folder = tmp_path_factory.mktemp("injected")
    run = folder / "run"
    assert Training("--config", config(folder, data, run)).end()[0] == 0
    return run


def test_up_to_the_injection_the_run_is_the_one_without(
    injected: Path, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    run = tmp_path / "clean"
    assert train_here(capfd, "--config", config(tmp_path, data, run, inject_spike_at_step="none")).code == 0
    clean, other = curve(run), curve(injected)
    assert [r for r in clean if r["step"] <= AT] == [r for r in other if r["step"] <= AT]
    after = [r["train/loss"] for r in other if r["step"] == AT + 1]
    assert after[0] > 1.5 + next(r["train/loss"] for r in clean if r["step"] == AT + 1)
    read = {r["step"]: r["blocks"] for r in rows(run / "blocks.jsonl")}
    there = {r["step"]: r["blocks"] for r in rows(injected / "blocks.jsonl")}
    assert {s for s in read if read[s] != there[s]} == set(range(AT + 1, AT + 6))
    assert all(there[s] == [] for s in range(AT + 1, AT + 6))


def test_injected_tokens_are_not_tokens_seen(injected: Path) -> None:
    for row in rows(injected / "metrics.jsonl"):
        unseen = 256 * min(5, max(0, row["step"] - AT))
        assert row["tokens"] == row["step"] * 256 - unseen
        assert row.get("tokens_injected", 0) == unseen
    named = [row["step"] for row in rows(injected / "steps.jsonl") if row.get("injected")]
    assert named == list(range(AT + 1, AT + 6))
    (told,) = events(injected, "inject")
    assert (told["first_step"], told["steps"]) == (AT, 5)


def test_the_spike_is_noticed_at_once_and_its_end_is_told(injected: Path) -> None:
    (spike,), (end,) = events(injected, "spike"), events(injected, "spike_end")
    assert spike["onset"] == end["onset"] == AT + 1
    assert spike["injected"]
    assert end["injected"]
    assert AT + 5 < end["recovered"] <= end["end"] <= STEPS
    losses = {row["step"]: row["loss"] for row in rows(injected / "steps.jsonl")}
    assert end["peak_loss"] == max(losses[s] for s in range(AT, STEPS))


def test_the_post_mortem_is_written_by_itself(injected: Path) -> None:
    at_the_spike, at_the_end = events(injected, "postmortem")
    told = at_the_end
    assert at_the_spike["path"] == told["path"]
    assert told["path"] == str(injected / "spike-postmortem.md")
    assert f"{AT + 1}" in Path(told["path"]).read_text(encoding="utf-8")


def test_a_reviewer_finds_nothing_wrong(injected: Path) -> None:
    assert [check for check in verify(open_run(injected)) if check.result == FAILED] == []


def test_killed_in_the_middle_of_an_injection_and_resumed_without_the_flag(
    injected: Path, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    """The five batches are one thing: what has begun goes on."""
    run = tmp_path / "run"
    file = config(tmp_path, data, run)
    given = ["--config", file, "--set", f"checkpoint.at=[{AT + 2}]"]
    assert killed_at(str(AT + 4), *given) == -signal.SIGKILL
    resumed = train_here(capfd, *given, "--set", "stability.inject_spike_at_step=null")
    assert resumed.code == 0, resumed.err
    assert f"goes on from {run}/checkpoints/step-0000000{AT + 2}" in resumed.out
    assert curve(run) == curve(injected)
    assert weights(run) == weights(injected)


def test_an_injection_can_be_asked_for_only_ahead(data: Path, tmp_path: Path, capfd: Capture) -> None:
    run = tmp_path / "run"
    short = ["--set", "training.total_steps=40", "--set", "checkpoint.every=10"]
    late = train_here(capfd, "--config", config(tmp_path, data, run, inject_spike_at_step=38), *short)
    assert late.code == 2
    assert "the 5 steps after it must lie within training.total_steps 40" in late.one_line
    assert not run.exists()
    file = config(tmp_path, data, run, inject_spike_at_step="none")
    process = Training("held", "--config", file, *short, script=FAULTY)
    process.wait_for_line("FAULT")
    process.send(signal.SIGTERM)
    process.wait_for_line("once more: leave at once")
    (tmp_path / "go").touch()
    assert process.end()[0] == 75
    past = train_here(capfd, "--config", file, *short, "--inject-spike-at-step", "9")
    assert past.code == 78
    assert "give a later step" in past.one_line
    ahead = train_here(capfd, "--config", file, *short, "--inject-spike-at-step", "33")
    assert ahead.code == 0, ahead.err
    assert [e["first_step"] for e in events(run, "inject")] == [33]


# ------------------------------------------------------------------------------------------------------------
# Going back


REWIND = {"policy": "rewind", "patience": 3}


@pytest.fixture(scope="module")
def rewound(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spike stays for longer than the run's patience: it goes back to step 50 and on with other data."""
    folder = tmp_path_factory.mktemp("rewound")
    run = folder / "run"
    assert Training("--config", config(folder, data, run, **REWIND)).end()[0] == 0
    return run


def test_a_spike_that_stays_is_left_behind(rewound: Path) -> None:
    (back,) = events(rewound, "rewind")
    assert back["to_step"] == 50
    assert back["jumps"] == [[50, AT + 5]]
    assert events(rewound, "spike_end")[0]["recovered"] is None
    losses = [row["loss"] for row in rows(rewound / "steps.jsonl")]
    assert len(losses) == STEPS
    assert max(losses[50:]) < min(losses[:5])
    assert not any(row.get("injected") for row in rows(rewound / "steps.jsonl"))
    assert rows(rewound / "metrics.jsonl")[-1]["tokens"] == STEPS * 256


def test_nothing_is_read_twice_over_a_rewind(rewound: Path) -> None:
    """On the stretch that was given up neither."""
    kept, lost = (rows(rewound / f"blocks{name}.jsonl") for name in ("", ".superseded"))
    drawn = [tuple(block) for row in [*kept, *lost] for block in row["blocks"]]
    assert len(drawn) == len(set(drawn))
    assert [row["step"] for row in kept] == list(range(1, STEPS + 1))
    assert [row["step"] for row in lost] == list(range(51, lost[-1]["step"] + 1))


def test_a_reviewer_accepts_a_rewound_run(rewound: Path) -> None:
    assert [check for check in verify(open_run(rewound)) if check.result == FAILED] == []


@pytest.mark.parametrize("place", ["before_the_jump", "after_the_jump", "later"])
def test_killed_around_a_rewind_it_goes_on_as_if_it_had_not_been(
    place: str, rewound: Path, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    run = tmp_path / "run"
    file = config(tmp_path, data, run, **REWIND)
    assert killed_at(place, "--config", file) == -signal.SIGKILL
    resumed = train_here(capfd, "--config", file)
    assert resumed.code == 0, resumed.err
    assert curve(run) == curve(rewound)
    assert weights(run) == weights(rewound)
    assert [check for check in verify(open_run(run)) if check.result == FAILED] == []


def test_every_step_that_was_made_is_on_record_also_the_one_that_decided(rewound: Path) -> None:
    lost = rows(rewound / "steps.superseded.jsonl")
    assert [row["step"] for row in lost] == list(range(51, lost[-1]["step"] + 1))
    assert lost[-1]["verdict"] == "rewind"
    (end,) = events(rewound, "spike_end")
    assert end["end"] == lost[-1]["step"]


@pytest.mark.slow
def test_a_second_injection_right_after_the_first_is_told_too(
    injected: Path, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    run = tmp_path / "run"
    file = config(tmp_path, data, run)
    more = ["--set", f"checkpoint.at=[{AT + 5}]"]
    assert killed_at(str(AT + 8), "--config", file, *more) == -signal.SIGKILL
    done = train_here(capfd, "--config", file, "--inject-spike-at-step", str(AT + 5))
    assert done.code == 0, done.err
    assert [event["first_step"] for event in events(run, "inject")] == [AT, AT + 5]
    assert [check for check in verify(open_run(run)) if check.result == FAILED] == []


def test_a_run_folder_that_is_deleted_comes_back(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = config(tmp_path, data, run, inject_spike_at_step="none")
    process = Training("slow", "--config", file, script=FAULTY)
    process.wait_for_line("step 30/")
    shutil.rmtree(run.rename(tmp_path / "away"), ignore_errors=True)
    code, output = process.end()
    assert code == 0, output
    assert "was deleted while the run goes on" in output
    assert [row["step"] for row in rows(run / "steps.jsonl")] == list(range(1, STEPS + 1))
    assert [check for check in verify(open_run(run)) if check.result == FAILED] == []


def test_skipping_leaves_the_update_out_and_the_weights_as_they_were(
    data: Path, tmp_path: Path, capfd: Capture
) -> None:
    run = tmp_path / "run"
    outcome = train_here(capfd, "--config", config(tmp_path, data, run, policy="skip", hard=8.0))
    assert outcome.code == 0, outcome.err
    flight = {row["step"]: row for row in rows(run / "steps.jsonl")}
    left_out = [s for s, row in flight.items() if row["verdict"] == "skip"]
    assert AT + 1 in left_out
    norms = {r["step"]: r["param_norm"] for r in rows(run / "metrics.jsonl") if "param_norm" in r}
    for step, row in flight.items():
        assert (norms[step] == norms.get(step - 1)) == (row["verdict"] == "skip"), step


def killed_at(place: str, *words: str | Path) -> int:
    process = Training(place, *words, script=Path(__file__), env={"PYTHONPATH": str(REPOSITORY)})
    return process.end()[0]


def kill_here(place: str) -> None:
    """The driver of a run that is killed at one place: `python test_spikes.py PLACE [train's arguments]`."""
    from x1_pretrain.command import run as run_app
    from x1_pretrain.runtime import spikes

    def killing(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    import x1_pretrain.train as train

    if place == "before_the_jump":
        spikes.go_back_on_record = killing  # type: ignore[assignment]
    elif place == "after_the_jump":
        spikes.rewind = killing  # type: ignore[assignment]
    else:
        log = train.log

        def logged(run: Any, *rest: Any) -> None:
            log(run, *rest)
            if (run.order.jumps and run.step == 53) if place == "later" else run.step == int(place):
                killing()

        train.log = logged
    raise SystemExit(run_app(train.app, sys.argv[2:]))


if __name__ == "__main__":
    kill_here(sys.argv[1])
