"""`--dry-run-budget`: every branch, real alerts, nothing touched, and a guard that is wrong is found out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.table import Table
from tests.money.fakes import MailServer

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.errors import FINISHED, REFUSED, UserError
from x1_pretrain.money import guard, rehearsal
from x1_pretrain.money.budget_file import Address, BudgetFile, write
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import Action
from x1_pretrain.money.rehearsal import branches, pace, play, rehearse
from x1_pretrain.money.trainer_guard import limits_from

CONFIG = {
    "name": "x1-50m",
    "model": {"layers": 1, "heads": 1, "kv_heads": 1, "d_model": 16, "d_ff": 16},
    "training": {"total_steps": 2000, "batch_tokens": 8192},
}


def config(**budget: object) -> RunConfig:
    return parse_config(CONFIG | {"budget": {"cap_usd": 35.0} | budget}, "test")


def rehearsed(run: RunConfig) -> tuple[int, list[list[str]], str]:
    """The exit code, the rows of the table, and the lines below it."""
    said: list[Any] = []
    code = rehearse(run, said.append)
    table = next(one for one in said if isinstance(one, Table))
    cells = [list(column.cells) for column in table.columns]
    return code, [list(row) for row in zip(*cells, strict=True)], "\n".join(x for x in said if x is not table)


@pytest.fixture(autouse=True)
def no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("X1_ALERTS", raising=False)


def test_every_branch_of_the_contract_is_in_the_table() -> None:
    code, rows, lines = rehearsed(config())
    assert code == FINISHED
    assert {row[-1] for row in rows} == {"ok"}
    does = {row[0]: (row[1], row[2]) for row in rows}
    stop, now = "save and stop, exit 76", "stop now, exit 77"
    assert does["spent above the warning"] == ("go", "warn")
    assert does["projected above the ceiling, once"] == ("go", "projection")
    assert does["projected above it, twice"] == (stop, "stop")
    assert does["projected above it while warming up"] == ("go", "-")
    assert does["spent above the ceiling"][0] == does["a lower reading lowers nothing"][0] == now
    assert does["dearer an hour than agreed"] == ("go", "drift")
    assert does["dearer, no answer (stop)"] == (stop, "drift, stop")
    assert does["dearer, a person says continue"][0] == does["all is well"][0] == "go"
    assert does["a person says stop"][0] == stop
    assert does["no reading, not yet long"] == ("go", "quiet")
    assert does["no reading for too long"] == (stop, "quiet, stop")
    assert does["no reading close to the ceiling"][0] == does["rate 0: counted at the agreed rate"][0] == stop
    refused = {name.removeprefix("budget.json: ") for name in does if name.startswith("budget.json")}
    assert refused == {"not there", "half a file", "an empty file", "NaN", "a negative amount",
                       "an amount as text", "a time in the future", "no time"}  # fmt: skip
    assert does["STOP.json holds"] == ("refuses to start, exit 78", "-")
    assert f"All {len(rows)} branches came out as they must." in lines
    assert "nothing was sent" in lines


@pytest.mark.parametrize(
    "budget",
    [{"cap_usd": 0.05}, {"cap_usd": 1}, {"cap_usd": 5000}, {"on_no_answer": "continue"}, {"warmup_s": 0},
     {"warmup_s": 90}, {"warn_usd": 35.0}, {"warn_usd": 1.0}, {"alert_after_s": 1800}, {"drift": 1.0},
     {"answer_s": 1, "stop_after_s": 5, "alert_after_s": 2}, {"answer_s": 604_800}],
    ids=str,
)  # fmt: skip
def test_it_holds_at_other_settings(budget: dict[str, object]) -> None:
    code, rows, _ = rehearsed(config(**budget))
    assert [row for row in rows if row[-1] != "ok"] == []
    assert code == FINISHED
    names = {row[0] for row in rows}
    assert ("projected above it while warming up" in names) == (budget.get("warmup_s") != 0)
    assert ("dearer, no answer (continue)" in names) == ("on_no_answer" in budget)


hours = st.floats(1, 200_000)


@example(1.0, 1.0, 1.0, 1.0, 12938.0, 1.0, 1.0)  # an hour that cost what was agreed, and 1e-28 dollars
@settings(max_examples=25)
@given(
    st.floats(0.05, 10_000), hours, hours, hours, st.floats(0, 40_000), st.floats(1, 4), st.floats(0.1, 1.0)
)
def test_it_holds_at_any_setting(
    tmp_path_factory: pytest.TempPathFactory,
    cap: float, quiet: float, stale: float, answer: float, warmup: float, drift: float, warn: float,
) -> None:  # fmt: skip
    folder = tmp_path_factory.getbasetemp()
    budget = config(
        cap_usd=cap, alert_after_s=quiet, stop_after_s=stale, answer_s=answer, warmup_s=warmup, drift=drift,
        warn_usd=cap * warn,
    ).budget  # fmt: skip
    limits = limits_from(budget, Decimal(str(cap)), pace(budget))
    for branch in branches(limits):
        decision = play(branch, limits, folder, Clock())
        kinds = {n.key.partition("-")[0] for n in decision.notices}
        assert decision.action is branch.expected, (branch.name, decision.reason)
        assert branch.notice is None or branch.notice in kinds, branch.name


# ------------------------------------------------------------------------------------------------------------
# A guard that is wrong

ABOVE = {"spent above the ceiling", "a lower reading lowers nothing"}


@pytest.mark.parametrize(
    ("only", "instead", "wrong"),
    [
        (Action.STOP_NOW, Action.GO, ABOVE),
        (Action.STOP_NOW, Action.SAVE_AND_STOP, ABOVE),
        (Action.SAVE_AND_STOP, Action.GO, {"projected above it, twice", "a person says stop",
                                          "no reading for too long", "dearer, no answer (stop)",
                                          "no reading close to the ceiling",
                                          "rate 0: counted at the agreed rate"}),
    ],
)  # fmt: skip
def test_a_guard_that_decides_wrong_is_found_out(
    monkeypatch: pytest.MonkeyPatch, only: Action, instead: Action, wrong: set[str]
) -> None:
    decide = guard.decide

    def broken(*arguments: Any, **options: Any) -> Any:
        found = decide(*arguments, **options)
        return replace(found, action=instead) if found.action is only else found

    monkeypatch.setattr(guard, "decide", broken)
    code, rows, lines = rehearsed(config())
    assert code == REFUSED
    assert {row[0] for row in rows if row[-1] == "WRONG"} == wrong
    assert "NOT as it must be" in lines


@pytest.mark.parametrize("kind", ["warn", "projection", "drift", "quiet"])
def test_a_guard_that_tells_nobody_is_found_out(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    decide = guard.decide

    def silent(*arguments: Any, **options: Any) -> Any:
        found = decide(*arguments, **options)
        return replace(found, notices=tuple(n for n in found.notices if not n.key.startswith(kind)))

    monkeypatch.setattr(guard, "decide", silent)
    code, rows, _ = rehearsed(config())
    assert code == REFUSED
    assert any(row[-1] == "WRONG" for row in rows)


ZERO_SPENT = BudgetFile(Decimal(0), None, None, None, datetime.now(UTC))


@pytest.mark.parametrize(
    ("name", "instead", "wrong"),
    [
        (
            "budget_file.parse",
            lambda *_: BudgetFile(Decimal(0), None, None, None, datetime.now(UTC)),
            "budget.json",
        ),
        ("latch.read", lambda _: None, "STOP.json holds"),
    ],
)
def test_a_reader_that_believes_anything_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: Any, wrong: str
) -> None:
    monkeypatch.setattr(f"x1_pretrain.money.{name}", instead)
    code, rows, _ = rehearsed(config())
    assert code == REFUSED
    assert any(row[0].startswith(wrong) and row[-1] == "WRONG" for row in rows)


# ------------------------------------------------------------------------------------------------------------
# Its own address, and what it needs


def test_the_address_of_the_run_is_tried(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    assert "no reading" in rehearsed(config(curr_cost_uri=str(file)))[2]
    assert rehearsed(config(curr_cost_uri=str(file)))[0] == REFUSED
    now = datetime.now(UTC)
    write(file, BudgetFile(Decimal("14.2"), Decimal("1.1"), None, None, now - timedelta(minutes=5)))
    code, _, lines = rehearsed(config(curr_cost_uri=f"file://{file}"))
    assert code == FINISHED
    assert "$14.20 spent, said 5 min ago" in lines
    write(file, BudgetFile(Decimal("14.2"), Decimal("1.1"), None, None, now - timedelta(hours=3)))
    code, _, lines = rehearsed(config(curr_cost_uri=str(file)))
    assert code == REFUSED
    assert "said 3.0 h ago: too old" in lines
    assert Address(str(file)).fetch() == file.read_bytes()


def test_without_a_ceiling_there_is_nothing_to_rehearse() -> None:
    with pytest.raises(UserError, match="--budget-cap-usd"):
        rehearse(config(cap_usd=None))


# ------------------------------------------------------------------------------------------------------------
# As a user runs it


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    took: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            took.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"json://127.0.0.1:{server.server_port}", took
    server.shutdown()
    server.server_close()


@pytest.fixture
def mails() -> Iterator[tuple[str, list[str]]]:
    subjects: list[str] = []

    class Sink:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            subjects.append(str(message_from_bytes(envelope.content)["Subject"]))
            return "250 OK"

    sink = MailServer(Sink())
    sink.start()
    yield f"mailto://127.0.0.1:{sink.port}?mode=insecure&from=x1@example.com&to=me@example.com", subjects
    sink.stop()


def train(folder: Path, alerts: str) -> subprocess.CompletedProcess[str]:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    command = [
        sys.executable,
        "-m",
        "x1_pretrain.cli",
        "train",
        "--config",
        file,
        "--run-dir",
        folder / "run",
    ]
    return subprocess.run(
        [*command, "--budget-cap-usd", "35", "--dry-run-budget"],
        capture_output=True, text=True, cwd=folder, env=dict(os.environ, X1_ALERTS=alerts), timeout=59,
    )  # fmt: skip


def test_real_alerts_arrive_once_each_in_time_and_nothing_of_the_run_is_touched(
    tmp_path: Path, hook: tuple[str, list[dict[str, Any]]], mails: tuple[str, list[str]]
) -> None:
    begun = time.monotonic()
    done = train(tmp_path, f"{hook[0]} {mails[0]}")
    assert time.monotonic() - begun < 30
    assert done.returncode == FINISHED, done.stdout + done.stderr
    assert "all delivered" in done.stdout
    titles = [message["title"] for message in hook[1]]
    assert len(titles) == len(set(titles)) == 6
    assert sorted(titles) == sorted(" ".join(subject.split()) for subject in mails[1])
    for words in ("more than $30.00 spent", "projected to pass $35.00", "nobody says what is spent",
                  "stop now:", "save and stop:", "instead of $1.00/h"):  # fmt: skip
        assert sum(words in title for title in titles) == 1, words
    assert all(title.startswith("X1 x1-50m: [rehearsal] ") for title in titles)
    assert len(re.findall(r" ok *$", done.stdout, re.MULTILINE)) == 24
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c.yaml"]


def test_an_address_that_takes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        channels = ("json-1",)

        def __init__(self, *_: object) -> None:
            """As a notifier is opened."""

        def alert(self, *_: object) -> bool:
            return True

        def close(self, _: float) -> list[str]:
            return ["warn"]

    monkeypatch.setattr(rehearsal, "Notifier", Deaf)
    code, _, lines = rehearsed(config())
    assert code == REFUSED
    assert "NOT delivered: 1" in lines
