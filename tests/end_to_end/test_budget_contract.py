"""`x1 train --budget-cap-usd 35.0 --budget-curr-cost-uri ...`, with the file that a user's sidecar keeps."""

from __future__ import annotations

import http.server
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config
from tests.end_to_end.in_process import Outcome, train_here
from tests.end_to_end.processes import Training, curve, last_step, rows, wait_until, weights

from x1_pretrain.command import run as run_app
from x1_pretrain.money import budget_file
from x1_pretrain.money.budget_command import app as budget_app
from x1_pretrain.records.checkpoint_files import newest_good, step_of

QUICK = ["--set", "budget.read_every_s=0.3", "--set", "budget.warmup_s=0"]
SLOW_PHASE = Path(__file__).with_name("slow_phase.py")
LONG = 200_000  # steps: minutes, if nothing stops it


def say(file: Path, spent: Any = 14.20, projected: Any = 28.4, rate: Any = 1.10, age_s: float = 0.0) -> None:
    """The five published fields, written as a user's script might."""
    when = datetime.now(UTC) - timedelta(seconds=age_s)
    tree = {
        "spent_usd": spent,
        "rate_usd_per_hr": rate,
        "hours_elapsed": 12.9,
        "projected_total_usd": projected,
        "last_update_utc": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(tree))
    new.replace(file)


@pytest.fixture
def budget(tmp_path: Path) -> Path:
    file = tmp_path / "budget.json"
    say(file)
    return file


@pytest.fixture
def command(tmp_path: Path, corpus: Path, budget: Path) -> list[str | Path]:
    config = write_config(
        tmp_path / "c.yaml",
        training={"total_steps": 30, "compile": "off"},
        optimizer={"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 5},
        checkpoint={"every": 1000},
        evaluation={"every": 100_000, "prompts": []},
        log={"every": 10, "blocks": False},
    )
    cap: list[str | Path] = ["--budget-cap-usd", "35.0", "--budget-curr-cost-uri", budget]
    return ["--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run", *cap]


class Watched:
    """Runs the trainer here while a thread does something to its budget from a step on."""

    def __init__(self, run: Path, at_step: int, act: Callable[[], None], repeat: bool = False) -> None:
        self.run, self.at_step, self.act, self.repeat = run, at_step, act, repeat
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._go, daemon=True)

    def _go(self) -> None:
        while not self.stop.wait(0.05):
            if last_step(self.run) >= self.at_step:
                self.act()
                if not self.repeat:
                    return

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def events(run: Path) -> list[str]:
    return [row["event"] for row in rows(run / "events.jsonl")]


def ledger(run: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "ledger.jsonl") if row["event"] == event]


# ------------------------------------------------------------------------------------------------------------
# Start


def test_it_runs_below_the_ceiling_and_says_the_price(
    command: list[str | Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = train_here(capfd, *command)
    assert done.code == 0, done.err
    assert "This will start 1x CPU on this machine at $1.10/h" in done.out
    assert "of your $35.00 ceiling" in done.out
    run = tmp_path / "run"
    assert not (run / "STOP.json").exists()
    assert [row["verdict"] for row in ledger(run, "gate")] == ["passed"]
    last = [row for row in rows(run / "metrics.jsonl") if "train/loss" in row][-1]
    assert 14.2 <= last["budget/spent_usd"] < 14.3
    assert last["budget/projected_usd"] == pytest.approx(28.4, abs=0.1)
    assert json.loads((run / "manifest.json").read_text())["spent_usd"].startswith("14.2")


@pytest.mark.parametrize("form", ["file", "http"])
def test_addresses_may_be_file_and_http(
    form: str,
    command: list[str | Path],
    budget: Path,
    served: Callable[[Path], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    command[-1] = f"file://{budget}" if form == "file" else served(budget)
    assert train_here(capfd, *command).code == 0


@pytest.fixture
def served() -> Iterator[Callable[[Path], str]]:
    servers = []

    def serve(file: Path) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(file.read_bytes())

            def log_message(self, *_: object) -> None:
                return

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/budget.json"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda f: f.unlink(), "No such file"),
        (lambda f: f.write_text('{"spent_usd": 14.2, "rate_'), "half a file"),
        (lambda f: f.write_text(""), "empty"),
        (lambda f: say(f, spent="14.20"), "expected a number"),
        (lambda f: say(f, spent=-1), "-1"),
        (lambda f: say(f, age_s=-3600), "in the future"),
        (lambda f: say(f, age_s=3600), "is the sidecar alive"),
        (lambda f: say(f, rate=0), "rate_usd_per_hr is missing or 0"),
    ],
)
def test_nothing_starts_without_a_valid_reading(
    damage: Callable[[Path], Any],
    word: str,
    command: list[str | Path],
    budget: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(budget)
    done = train_here(capfd, *command)
    assert done.code == 78
    assert word in done.one_line
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_ceiling_needs_an_address(command: list[str | Path], capfd: pytest.CaptureFixture[str]) -> None:
    done = train_here(capfd, *command[:-2])
    assert done.code == 2
    assert "--budget-curr-cost-uri" in done.one_line


def test_over_the_ceiling_at_the_start_is_77_and_latched(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    say(budget, spent=35.01)
    done = train_here(capfd, *command)
    assert (done.code, "$35.01 spent, above the ceiling of $35.00" in done.one_line) == (77, True)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    say(budget, spent=1.0)  # a file that now says less changes nothing
    assert train_here(capfd, *command).code == 78


def test_a_run_that_can_not_end_below_the_ceiling_is_refused(
    command: list[str | Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = ["--set", "budget.tokens_per_sec=0.1"]  # 7680 tokens in 21.3 h at $1.10/h = $23.47
    done = train_here(capfd, *command, *slow)
    assert done.code == 78
    assert "the total: $37.7" in done.one_line
    assert "too much" in done.one_line  # 14.20 + 23.47 + 5 minutes of 1.10
    assert "it pays for about" in done.one_line
    assert [row["verdict"] for row in ledger(tmp_path / "run", "gate")] == ["refused"]


def test_a_dear_hour_is_refused(command: list[str | Path], capfd: pytest.CaptureFixture[str]) -> None:
    done = train_here(capfd, *command, "--set", "budget.max_usd_per_hr=1.0")
    assert (done.code, "$1.10/h is above --max-price $1.00/h" in done.one_line) == (78, True)


# ------------------------------------------------------------------------------------------------------------
# On the way


def long(command: list[str | Path]) -> list[str | Path]:
    return [*command, "--total-steps", str(LONG), *QUICK]


def stopped(run: Path, done: Outcome, code: int) -> dict[str, Any]:
    assert done.code == code, done.out[-2000:] + done.err
    stop: dict[str, Any] = json.loads((run / "STOP.json").read_text())
    assert stop["exit_code"] == code
    assert [row["exit_code"] for row in ledger(run, "stop")][-1] == code
    return stop


def test_more_than_thirty_spent_goes_on(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    say(budget, spent=30.5, projected=34.0)
    assert train_here(capfd, *command).code == 0
    told = [row["message"] for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "budget"]
    assert len(told) == 1
    assert told[0].startswith("budget: more than $30.00 spent. $30.50 of $35.00 spent, $34.00 projected")


def test_projected_above_the_ceiling_saves_and_leaves_with_76(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with Watched(run, 50, lambda: say(budget, projected=35.5), repeat=True):
        done = train_here(capfd, *long(command))
    assert "projected to cost $35.50 in all" in stopped(run, done, 76)["reason"]
    good, _ = newest_good(run / "checkpoints")
    assert good is not None
    assert step_of(good) >= 50  # saved where it stopped, not at a multiple of 1000 only
    assert "budget_stopped" in events(run)
    keys = [row["key"] for row in rows(run / "events.jsonl") if row["event"] == "budget"]
    assert keys == ["projection", "stop-76"]  # the first breach warned, the second stopped


def test_spent_above_the_ceiling_leaves_at_once_with_77(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with Watched(run, 50, lambda: say(budget, spent=35.2)):
        done = train_here(capfd, *long(command), "--ckpt-every", "100000")
    assert "$35.20 spent" in stopped(run, done, 77)["reason"]
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == ["step-000000000"]  # only the first
    assert last_step(run) >= 50


def test_it_is_read_before_every_checkpoint(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    never = ["--set", "budget.read_every_s=100000"]
    with Watched(run, 50, lambda: say(budget, spent=35.2)):
        done = train_here(capfd, *long(command), *never, "--ckpt-every", "500")
    stopped(run, done, 77)
    assert last_step(run) % 500 == 0
    assert step_of(newest_good(run / "checkpoints")[0]) == last_step(run) - 500  # type: ignore[arg-type]


def test_a_silent_watcher_is_said_and_then_ends_it(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    soon = ["--set", "budget.alert_after_s=1.2", "--set", "budget.stop_after_s=4"]

    def fresh_until_it_is_damaged() -> None:
        if last_step(run) < 50:
            say(budget)
        else:
            budget.write_text('{"spent_usd": 14.2, "ra')

    with Watched(run, -1, fresh_until_it_is_damaged, repeat=True):
        done = train_here(capfd, *long(command), *soon)
    assert "no valid reading" in stopped(run, done, 76)["reason"]
    keys = [row["key"] for row in rows(run / "events.jsonl") if row["event"] == "budget"]
    assert list(dict.fromkeys(keys)) == ["quiet", "stop-76"]  # quiet twice if the fresh words came late, too
    assert "budget_stale" in events(run)


@pytest.mark.parametrize("answer", ["stop", pytest.param("continue", marks=pytest.mark.slow), "nothing"])
def test_dearer_than_agreed_is_a_persons_decision(
    answer: str,
    command: list[str | Path],
    budget: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    asked = threading.Event()

    def act() -> None:
        say(budget, rate=1.40)
        told = [r for r in rows(run / "events.jsonl") if r.get("key", "").startswith("drift")]
        if told and not asked.is_set() and answer != "nothing":
            asked.set()
            assert run_app(budget_app, [answer, str(run)], prog="x1 budget") == 0

    wait = ["--set", f"budget.answer_s={ {'stop': 60, 'continue': 3, 'nothing': 1.2}[answer] }"]
    # 1.40 is 1.27 of 1.10; after "continue" it goes on beyond the time for an answer, to its last step
    steps = ["--total-steps", "1500" if answer == "continue" else str(LONG)]
    with Watched(run, 50, act, repeat=True):
        done = train_here(capfd, *command, *QUICK, *wait, *steps)
    told = next(r["message"] for r in rows(run / "events.jsonl") if r.get("key", "").startswith("drift"))
    assert "It costs $1.40/h, agreed were $1.10/h. You decide" in told
    if answer == "continue":
        assert done.code == 0
        assert ledger(run, "answer")[0]["answer"] == "continue"
    else:
        why = "nobody answered" if answer == "nothing" else "a person decided to stop"
        assert why in stopped(run, done, 76)["reason"]


def test_a_stopped_run_goes_on_only_when_a_person_raises_the_ceiling(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    steps = ["--total-steps", "500", "--set", "training.batch_tokens=512", *QUICK]
    with Watched(run, 50, lambda: say(budget, projected=36.0), repeat=True):
        done = train_here(capfd, *command, *steps)
    stopped(run, done, 76)
    assert 50 <= last_step(run) < 500
    say(budget, spent=20.0, projected=36.0)

    refused = train_here(capfd, *command, *steps)
    assert (refused.code, "--raise-ceiling-to" in refused.one_line) == (78, True)
    low = train_here(capfd, *command, *steps, "--raise-ceiling-to", "34")
    assert (low.code, "the ceiling is $35.00" in low.one_line) == (78, True)
    assert (run / "STOP.json").exists()
    done = train_here(capfd, *command, *steps, "--raise-ceiling-to", "40")
    assert done.code == 0, done.err
    raised = ledger(run, "raised")
    assert (raised[-1]["before_usd"], raised[-1]["ceiling_usd"]) == ("35.0", "40.0")
    assert not (run / "STOP.json").exists()

    say(budget)
    place = command.index("--run-dir") + 1
    command[place] = whole
    assert train_here(capfd, *command, *steps).code == 0
    unpriced = [
        [{k: v for k, v in row.items() if not k.startswith("budget/")} for row in curve(p)]
        for p in (run, whole)
    ]
    assert unpriced[0] == unpriced[1]
    assert weights(run) == weights(whole)


def test_the_ledger_remembers_what_a_file_forgot(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    say(budget, spent=34.0, projected=34.5)
    assert train_here(capfd, *command, "--total-steps", "20").code == 0
    say(budget, spent=2.0, projected=3.0)  # a sidecar that lost its memory
    longer = ["--total-steps", "20", "--run-dir", tmp_path / "run"]
    done = train_here(capfd, *command, *longer)
    assert "$34.00 spent before" in done.out or "finished before" in done.out


def test_a_hanging_loop_is_ended(command: list[str | Path], budget: Path, tmp_path: Path) -> None:
    """A step that never returns can't poll: the guard ends the process itself."""
    run = tmp_path / "run"
    script = tmp_path / "hang.py"
    script.write_text(
        "import sys, time\n"
        "import x1_pretrain.train as train\n"
        "from x1_pretrain.command import run\n"
        "from x1_pretrain.money import trainer_guard\n"
        "trainer_guard.LEAVE_NOW_S = 1.0\n"
        "step, calls = train.train_step, [0]\n"
        "def hang(*a):\n"
        "    calls[0] += 1\n"
        "    time.sleep(600 if calls[0] > 20 else 0)\n"
        "    return step(*a)\n"
        "train.train_step = hang\n"
        "raise SystemExit(run(train.app, sys.argv[1:]))\n"
    )
    process = Training(*long(command), script=script)
    wait_until(lambda: last_step(run) >= 20, process.process)
    say(budget, spent=36.0)
    code, output = process.end()
    assert code == 77, output
    assert "did not leave in time" in output
    assert json.loads((run / "STOP.json").read_text())["exit_code"] == 77


def test_two_ranks_leave_together(command: list[str | Path], budget: Path, tmp_path: Path) -> None:
    """The first rank's guard stops both, with a checkpoint."""
    run = tmp_path / "run"
    training = Training(*long(command), "--ranks", "2")
    with Watched(run, 20, lambda: say(budget, projected=36), repeat=True):
        code, output = training.end(120)
    assert code == 76, output
    assert json.loads((run / "STOP.json").read_text())["exit_code"] == 76
    good, _ = newest_good(run / "checkpoints")
    assert good is not None
    assert 0 <= step_of(good) - last_step(run) < 10  # every tenth step is in the log


# ------------------------------------------------------------------------------------------------------------
# Rehearsal


def test_the_rehearsal_shows_every_branch_and_touches_nothing(
    command: list[str | Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = train_here(capfd, *command, "--dry-run-budget")
    assert done.code == 0, done.out
    for branch in ("save and stop, exit 76", "stop now, exit 77", "refuses to start, exit 78"):
        assert branch in done.out
    assert "WRONG" not in done.out
    assert "$14.20 spent" in done.out
    assert not (tmp_path / "run").exists()


def test_the_rehearsal_says_that_a_start_would_be_refused(
    command: list[str | Path], budget: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    budget.unlink()
    done = train_here(capfd, *command, "--dry-run-budget")
    assert done.code == 78
    assert "a start would be refused" in done.out


# ------------------------------------------------------------------------------------------------------------
# What an attack found


def test_one_signal_does_not_undo_a_graceful_stop(
    command: list[str | Path], budget: Path, tmp_path: Path
) -> None:
    """The guard asked, the checkpoint is being written, and a SIGTERM comes: it is saved all the same."""
    run = tmp_path / "run"
    process = Training("checkpoint", *long(command), script=SLOW_PHASE)
    try:
        with Watched(run, 50, lambda: say(budget, projected=36), repeat=True):
            process.wait_for_line("PHASE checkpoint")
            process.send(signal.SIGTERM)
            code, output = process.end()
    finally:
        process.process.kill()
    assert code == 76, output
    assert "leaving already" in output
    good, _ = newest_good(run / "checkpoints")
    assert good is not None
    assert step_of(good) >= 50


def test_a_disk_that_hangs_is_a_silent_watcher(
    command: list[str | Path],
    budget: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read that never returns holds up neither the decisions nor, for long, the loop."""
    run, hanging = tmp_path / "run", threading.Event()
    opener = budget_file._at_once

    def open_(path: str, flags: int) -> int:
        while hanging.is_set():
            time.sleep(0.05)
        return opener(path, flags)

    monkeypatch.setattr(budget_file, "_at_once", open_)
    monkeypatch.setattr(budget_file, "HTTP_TOTAL_S", 0.5)
    soon = ["--set", "budget.alert_after_s=1.2", "--set", "budget.stop_after_s=2.5"]
    with Watched(run, 50, hanging.set):
        done = train_here(capfd, *long(command), *soon)
    hanging.clear()
    assert "no valid reading" in stopped(run, done, 76)["reason"]


def test_a_guard_that_fails_stops_the_run_and_says_so(
    command: list[str | Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def damage() -> None:
        with (run / "ledger.jsonl").open("a") as file:
            file.write("garbage\n")

    with Watched(run, 50, damage):
        done = train_here(capfd, *long(command))
    assert done.code == 76
    assert "the budget guard failed" in json.loads((run / "STOP.json").read_text())["reason"]
    assert "ledger.jsonl, line" in done.out


def test_a_run_with_a_ceiling_does_not_lose_it(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    say(budget, spent=36)
    assert train_here(capfd, *command).code == 77
    (run / "STOP.json").unlink()  # by hand: the ledger holds the stop too
    say(budget)
    done = train_here(capfd, *command)
    assert (done.code, "STOP.json was removed" in done.one_line) == (78, True)
    say(budget, spent=36)
    bare = command[:-4]
    done = train_here(capfd, *bare, "--raise-ceiling-to", "40")
    assert (done.code, "needs --budget-cap-usd" in done.one_line) == (2, True)
    done = train_here(capfd, *bare, "--run-dir", tmp_path / "new", "--budget-curr-cost-uri", budget)
    assert (done.code, "nothing is guarded" in done.one_line) == (2, True)
    for wrong in ("nan", "inf", "-1"):
        done = train_here(capfd, *command, "--raise-ceiling-to", wrong)
        assert (done.code, "expected a number above 0" in done.one_line) == (2, True)
    assert train_here(capfd, *command, "--raise-ceiling-to", "40", "--total-steps", "30").code == 0
    (run / "events.jsonl").write_text("")  # as if it had not finished
    done = train_here(capfd, *bare)
    assert (done.code, "has a ceiling of $40.00" in done.one_line) == (78, True)


def test_a_raised_ceiling_can_be_lowered_again(
    command: list[str | Path], budget: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    place = command.index("35.0")
    done = train_here(capfd, *command, "--raise-ceiling-to", "50", "--total-steps", "10")
    assert "of your $50.00 ceiling" in done.out
    (run / "events.jsonl").write_text("")
    done = train_here(capfd, *command, "--total-steps", "10")
    assert "the ceiling in force is $50.00: a person raised it" in done.out
    (run / "events.jsonl").write_text("")
    command[place] = "20"
    done = train_here(capfd, *command, "--total-steps", "10")
    assert "of your $20.00 ceiling" in done.out


def test_a_signed_address_stays_out_of_the_run_folder(
    command: list[str | Path],
    budget: Path,
    served: Callable[[Path], str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command[-1] = served(budget) + "?sig=S3CR3T"
    assert train_here(capfd, *command).code == 0
    written = [
        p for p in (tmp_path / "run").iterdir() if p.is_file() and "S3CR3T" in p.read_text(errors="replace")
    ]
    assert written == []
