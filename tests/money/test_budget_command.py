"""`x1 budget`: what it shows of a run with a long history, of one with none, and what it writes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.money.fakes import pulled_home

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FAULT, FINISHED, USAGE
from x1_pretrain.money import latch
from x1_pretrain.money.account import account, person_said
from x1_pretrain.money.budget_command import app, per_hundredth_nat, spent_at
from x1_pretrain.money.clock import VARIABLE, Clock, stamp
from x1_pretrain.money.ledger import NAME, Ledger
from x1_pretrain.money.picture import draw, mark

NOON = datetime(2026, 5, 23, 12, tzinfo=UTC)
RATE = Decimal("1.20")


@dataclass
class Hands:
    """A clock that is set by hand."""

    hours: float = 0.0

    def now(self) -> datetime:
        return NOON + timedelta(hours=self.hours)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    clock: Any = Hands()
    return Ledger(tmp_path / "runs" / "x1-50m" / NAME, clock)


def at(ledger: Ledger, hours: float) -> Ledger:
    ledger.clock.hours = hours  # type: ignore[attr-defined]
    return ledger


def poll(ledger: Ledger, hours: float, usd: Decimal, **fields: Any) -> None:
    said = {"machine_usd": usd, "spent_usd": usd, "usd_per_hr": RATE, "machine_id": "pod1"}
    at(ledger, hours).append("poll", tag="a", **(said | fields))


def ten_hours(ledger: Ledger) -> Path:
    """A launch, ten hours at 1.20, an alert, a stop, a raise, two resumes, a confirmed end."""
    ledger.append("gate", "This will start ...", verdict="passed", usd_per_hr=RATE, ceiling_usd=Decimal(10))
    ledger.append("intent", "launch 1x A100 80GB", tag="a", provider="runpod", usd_per_hr=RATE)
    ledger.append("launched", tag="a", machine_id="pod1")
    for hour in range(11):
        poll(ledger, hour, hour * RATE, projected_usd=None if hour < 2 else RATE * 10)
        if hour == 3:
            ledger.append("relaunch", "exit code 75", exit_code=75)
            ledger.append("gate", "This will go on with ...", verdict="passed", usd_per_hr=RATE,
                          ceiling_usd=Decimal(10))  # fmt: skip
            ledger.append("back", "training again after 71 s", down_s=71.0)
        if hour == 7:
            ledger.append("alert_due", key="warn", due="d1", title="more than $8.57 spent [/odd] :x:")
            ledger.append("alert", due="d1", channel="slack-1", result="FAILED")
            ledger.append("alert", due="d1", channel="slack-1", result="SUCCESS")
            ledger.append("stop", "projected to cost $12.00", exit_code=76, spent_usd=Decimal("8.4"))
        if hour == 8:
            ledger.append("raised", "a person set the ceiling to $35.00", ceiling_usd=Decimal(35),
                          before_usd=Decimal(10))  # fmt: skip
    at(ledger, 10.5).append("terminate_confirmed", "pod1 is gone", tag="a", machine_id="pod1")
    losses = [(2, 3.9), (6, 3.5), (8, 3.3)]
    rows = [{"tokens": h * 10**9, "val/loss": loss, "time_utc": stamp(NOON + timedelta(hours=h))}
            for h, loss in losses]  # fmt: skip
    (ledger.file.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ledger.file.parent


def call(*arguments: object) -> int:
    return run_app(app, [str(a) for a in arguments], prog="x1 budget")


def said(captured: pytest.CaptureFixture[str]) -> str:
    return captured.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# show


def test_all_that_happened_and_what_it_comes_to(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    run = ten_hours(ledger)
    assert call("show", run) == FINISHED
    out = said(capsys)
    assert "pod1     runpod    2026-05-23T12:00:00Z  2026-05-23T22:30:00Z  1.20  $12.60" in out
    assert "more than $8.57 spent [/odd] :x: (slack-1: SUCCESS)" in out
    for event in ("gate", "launched", "relaunch", "stop", "raised", "back", "terminate_confirmed"):
        assert f" {event} " in out, event
    assert "spent $12.60 of $35.00\n" in out  # ten and a half hours, though nobody polled the last half
    assert "$1.58 per billion tokens (8,000,000,000 trained)" in out  # 12.60 / 8
    assert "$0.1200 for the last 0.01 nat" in out  # two hours for 0.2 nat
    assert "1 relaunch, 1.2 min not training (71 s at most)" in out
    assert (run / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_a_machine_that_still_bills_counts_up_to_now(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.append("intent", tag="a", provider="runpod", usd_per_hr=RATE)
    poll(ledger, 1, RATE, projected_usd=Decimal("24"))
    now_s = (NOON + timedelta(hours=3)).timestamp()
    monkeypatch.setenv(VARIABLE, f"0.000000001@{now_s}")  # it is 15:00, and stays so
    assert call("show", ledger.file.parent) == FINISHED
    out = said(capsys)
    assert "still open" in out
    assert "spent $3.60, projected $24.00" in out


def test_this_computer_counts_up_to_its_last_poll(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    ledger.append("adopted", tag="a", provider="local", usd_per_hr=Decimal("0.10"), machine_id="here")
    poll(ledger, 1, Decimal("0.10"))
    assert call("show", ledger.file.parent) == FINISHED
    assert "spent $0.10\n" in said(capsys)


def test_a_run_whose_own_script_says_what_was_spent(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    """No sidecar of ours: only what the trainer read is in the ledger."""
    ledger.append("ceiling", "the ceiling is $35.00", ceiling_usd=Decimal(35))
    for hour in range(3):
        at(ledger, hour).append("reading", spent_usd=hour * RATE, projected_usd=Decimal("20"))
    assert call("show", ledger.file.parent, "--picture", ledger.file.with_name("own.svg")) == FINISHED
    assert "spent $2.40 of $35.00, projected $20.00" in said(capsys)
    assert "<svg" in ledger.file.with_name("own.svg").read_text()
    assert spent_at(ledger.rows(), stamp(NOON + timedelta(hours=1.5))) == Decimal("1.8")


@pytest.mark.parametrize("content", [b"", b'{"seq": 1, "event": "ga'])
def test_nothing_yet(ledger: Ledger, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    ledger.file.parent.mkdir(parents=True)
    ledger.file.write_bytes(content)
    assert call("show", ledger.file.parent) == FINISHED
    assert said(capsys) == "spent $0.00\nno picture: nobody has said yet what it costs\n"


def test_a_name_under_runs_will_do(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ten_hours(ledger)
    monkeypatch.chdir(tmp_path)
    assert call("show", "x1-50m") == FINISHED
    assert "picture: runs/x1-50m/budget.png" in said(capsys)


def test_what_can_not_be_shown_is_one_line(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    run = ten_hours(ledger)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / NAME).write_bytes(ledger.file.read_bytes() + b"not json\n")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / NAME).write_bytes(ledger.file.read_bytes() + b'{"seq": 99, "event": "poll", "tag": "a"}\n')
    for arguments, code, words in (
        (("show", tmp_path / "empty"), USAGE, "no ledger.jsonl in it"),
        (("stop", tmp_path / "absent"), USAGE, "no such run folder"),
        (("show", damaged), FAULT, "not a ledger row"),
        (("show", wrong), FAULT, "ledger row 99 (poll)"),
        (("show", run, "--picture", tmp_path / "no" / "such.png"), USAGE, "can't be written"),
        (("show", run, "--picture", tmp_path / "a.word"), USAGE, "name a .png"),
        (("correct", run, "--spent-usd", "nan", "--why", "bill"), USAGE, "--spent-usd"),
        (("correct", run, "--spent-usd", "inf", "--why", "bill"), USAGE, "--spent-usd inf"),
        (("correct", run, "--spent-usd", "-1", "--why", "bill"), USAGE, "--spent-usd"),
        (("correct", run, "--spent-usd", "3"), USAGE, "--why"),
        (("show",), USAGE, "rgument"),
    ):
        assert call(*arguments) == code, arguments
        error = capsys.readouterr().err
        assert words in error, arguments
        assert error.count("\n") == 1, error
    assert not (tmp_path / "absent").exists()


# ------------------------------------------------------------------------------------------------------------
# The numbers below the table


def test_dollars_for_a_hundredth_of_a_nat(ledger: Ledger) -> None:
    ten_hours(ledger)
    rows = ledger.rows()

    def evaluated(*pairs: tuple[float, object]) -> list[dict[str, Any]]:
        return [{"val/loss": loss, "time_utc": stamp(NOON + timedelta(hours=h))} for h, loss in pairs]

    assert per_hundredth_nat(evaluated((1, 4.0)), rows, Clock()) is None
    assert per_hundredth_nat(evaluated((1, 4.0), (2.5, 3.7)), rows, Clock()) == "$0.0600"  # 1.80 for 0.3 nat
    assert (
        per_hundredth_nat(evaluated((0, 9.0), (1, 4.0), (2, 4.0)), rows, Clock())
        == "nothing gained for $1.20: no price"
    )
    assert (
        per_hundredth_nat(evaluated((1, 4.0), (2, "nan"), (3, 3.5)), rows, Clock()) == "$0.0480"
    )  # 2.40 for 0.5
    assert per_hundredth_nat(evaluated((1, 4.0), (2, 3.5)), [], Clock()) is None


def test_between_two_polls_in_proportion(ledger: Ledger) -> None:
    ten_hours(ledger)
    found = [spent_at(ledger.rows(), stamp(NOON + timedelta(hours=h))) for h in (-1, 0, 2.25, 10, 12)]
    assert found == [0, 0, Decimal("2.70"), 12, 12]


def test_the_picture_marks_what_happened_once_each(ledger: Ledger, tmp_path: Path) -> None:
    ten_hours(ledger)
    marks = [word for row in ledger.rows() if (word := mark(row))]
    assert marks == ["launch", "resume", "alert", "stop", "raise", "gone"]
    file = tmp_path / "money.svg"
    assert draw("x1-50m", ledger.rows(), Decimal(35), file)
    for rows in (ledger.rows()[:4], ledger.rows()[:5]):  # one poll, and no ceiling
        assert draw("x1-50m", rows, None, file)
    assert not draw("x1-50m", ledger.rows()[:3], Decimal(35), file)


# ------------------------------------------------------------------------------------------------------------
# A person's word


def test_continue_is_an_answer_and_refused_once_it_is_stopped(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ten_hours(ledger)
    last = ledger.rows()[-1]["seq"]
    assert call("continue", run) == FINISHED
    assert person_said(ledger.rows(), last) == "continue"
    latch.write(run, latch.Stop("over", "guard", 77, "2026-05-23T15:42:01Z"))
    assert call("continue", run) == USAGE
    assert "--raise-ceiling-to" in capsys.readouterr().err


def test_stop_holds_also_where_no_trainer_reads_it(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ten_hours(ledger)
    last = ledger.rows()[-1]["seq"]
    assert call("stop", run) == FINISHED
    assert person_said(ledger.rows(), last) == "stop"
    first = latch.read(run)
    assert first is not None
    assert (first.by, first.exit_code, first.spent_usd, first.ceiling_usd) == ("person", 76, "12.00", "35.00")
    assert call("stop", run) == FINISHED
    assert "stopped already" in said(capsys)
    assert latch.read(run) == first


@pytest.mark.parametrize("amount", ["3.5", "99", "0"])
def test_a_correction_is_what_counts_from_then_on(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], amount: str
) -> None:
    run = ten_hours(ledger)
    assert call("correct", run, "--spent-usd", amount, "--why", "the bill") == FINISHED
    assert f"$12.00 -> ${Decimal(amount):.2f}" in said(capsys)
    known = account(ledger.rows())
    assert known.known_usd == known.spent_by(datetime.now(UTC)) == Decimal(amount)
    assert ledger.rows()[-1]["message"].endswith(": the bill")
    assert call("show", run) == FINISHED
    assert f"spent ${Decimal(amount):.2f} of" in said(capsys)


def test_as_a_command_of_its_own(ledger: Ledger) -> None:
    run = ten_hours(ledger)
    command = [sys.executable, "-m", "x1_pretrain.cli", "budget"]
    done = subprocess.run(
        [*command, "show", run], capture_output=True, text=True, env=dict(os.environ, TERM="dumb")
    )
    assert (done.returncode, done.stderr) == (FINISHED, "")
    assert "spent $12.60 of $35.00" in done.stdout
    gone = subprocess.run([*command, "show", run / "nothing"], capture_output=True, text=True)
    assert (gone.returncode, gone.stdout) == (USAGE, "")
    assert gone.stderr.startswith("x1: ")
    assert gone.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["stop", "continue"])
def test_a_word_is_said_where_the_trainer_reads(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger at home is not the rented machine's: a word here would reach nobody."""
    run = tmp_path / "run"
    ledger = Ledger(run / "ledger.jsonl", Clock())
    ledger.append("intent", tag="x1-a", provider="runpod", usd_per_hr=Decimal("1.19"))
    ledger.append("launched", tag="x1-a", machine_id="pod-7")
    for metrics in ([], [{"step": 1, "tokens": 100}]):
        if metrics:
            pulled_home(run, *metrics)  # rows of the machine, to look at: the trainer is still there
            capsys.readouterr()
        assert run_app(app, [verb, str(run)], prog="x1 budget") == 2
        assert "its trainer runs on pod-7 and reads the ledger there" in capsys.readouterr().err
        assert not (run / "STOP.json").exists()
    (run / "mirror.json").unlink()  # it runs here after all
    assert run_app(app, [verb, str(run)], prog="x1 budget") == 0
