"""Alerts against real receivers: a mail server, HTTP hooks that work, fail or hang, and killed processes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.money.fakes import MailServer

from x1_pretrain.errors import UserError
from x1_pretrain.money import ledger as ledger_module
from x1_pretrain.money import notify
from x1_pretrain.money.channels import addresses, labelled, reason, shown
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import NAME, Ledger
from x1_pretrain.money.notify import Notifier, Outcome, is_due, pending

RUN = "x1-50m"
SECRET = "s3cr3t"
NOON = datetime(2026, 5, 23, 12, tzinfo=UTC)


# ------------------------------------------------------------------------------------------------------------
# Receivers


@dataclass
class Hook:
    """An HTTP receiver: `statuses` are given in turn, then 200; a status of 0 is silence."""

    statuses: list[int] = field(default_factory=list)
    took: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}"


@pytest.fixture
def hook() -> Iterator[Callable[..., Hook]]:
    servers: list[tuple[ThreadingHTTPServer, Hook]] = []

    def start(*statuses: int) -> Hook:
        one = Hook(list(statuses))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                one.asked.append(message)
                status = one.statuses.pop(0) if one.statuses else 200
                if not status:
                    one.done.wait(30)
                    return
                if status == 200:
                    one.took.append(message)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        one.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append((server, one))
        return one

    yield start
    for server, one in servers:
        one.done.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def gone() -> Iterator[int]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


def rows_of(ledger: Ledger, event: str = "alert") -> list[dict[str, Any]]:
    return [row for row in ledger.rows() if row["event"] == event]


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / RUN / NAME, Clock())


def fast(speed: float = 600.0) -> Clock:
    return Clock(speed, time.time())


# ------------------------------------------------------------------------------------------------------------
# Delivery


def test_a_mail_arrives_as_it_was_worded(ledger: Ledger) -> None:
    mails: list[Any] = []

    class Sink:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            mails.append(envelope)
            return "250 OK"

    sink = MailServer(Sink())
    sink.start()
    try:
        url = f"mailto://127.0.0.1:{sink.port}?mode=insecure&from=x1@example.com&to=me@example.com"
        notifier = Notifier([url], ledger, Clock(), RUN)
        title = "X1 x1-50m: spent $30.10 of $35.00"
        body = f"The run has spent $30.10 <so far> & goes on.\nx1 budget stop {RUN}"
        notifier.alert("spent-30", title, body)
        assert notifier.close(60) == []
    finally:
        sink.stop()
    assert [mail.rcpt_tos for mail in mails] == [["me@example.com"]]
    text = mails[0].content.decode()
    assert "Subject: X1 x1-50m: spent $30.10 of $35.00" in text
    assert f"x1 budget stop {RUN}" in text
    assert "The run has spent $30.10 <so far> & goes on." in text
    assert "pprise" not in text
    row = rows_of(ledger)[0]
    assert (row["key"], row["attempt"], row["result"]) == ("spent-30", 1, "SUCCESS")
    assert row["channel"] == f"mailto://127.0.0.1:{sink.port}"
    assert row["title"] == title


def test_a_hook_that_fails_twice_gets_it_at_the_third_attempt(tmp_path: Path, hook: Any) -> None:
    bad = hook(500, 500)
    ledger = Ledger(tmp_path / NAME, fast(60))
    notifier = Notifier([bad.url], ledger, fast(60), RUN)
    notifier.alert("price", "X1 x1-50m: price", "up")
    assert notifier.close(60) == []
    assert [row["result"] for row in rows_of(ledger)] == ["the service answered with error 500"] * 2 + [
        "SUCCESS"
    ]
    assert [row["attempt"] for row in rows_of(ledger)] == [1, 2, 3]
    assert len(bad.took) == 1
    times = [datetime.fromisoformat(row["time_utc"]) for row in rows_of(ledger)]
    assert times[1] - times[0] >= timedelta(seconds=9)
    assert times[2] - times[1] >= timedelta(seconds=29)


def test_a_channel_that_hangs_or_is_down_stops_neither_the_caller_nor_the_others(
    ledger: Ledger, hook: Any, gone: int
) -> None:
    dumb, good = hook(0), hook()
    notifier = Notifier([dumb.url, f"json://127.0.0.1:{gone}", good.url], ledger, Clock(), RUN)
    began = time.monotonic()
    assert notifier.alert("price", "X1 x1-50m: price", "up")
    assert time.monotonic() - began < 5
    until(lambda: good.took and dumb.asked)
    until(lambda: len(rows_of(ledger)) >= 2)
    left = {alert.channel: alert for alert in notifier.close(0.1)}
    assert set(left) == {shown(dumb.url), f"json://127.0.0.1:{gone}"}
    assert left[f"json://127.0.0.1:{gone}"].last_result == "connection refused: nothing listens there"
    assert left[f"json://127.0.0.1:{gone}"].attempts == 1


def test_nothing_is_lost_while_the_disk_takes_no_rows(
    ledger: Ledger, hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, said = hook(), list[str]()
    append, full = Ledger._write, threading.Event()
    full.set()

    def write(self: Ledger, descriptor: int, row: dict[str, Any], end: int) -> int:
        if full.is_set():
            raise notify.LedgerError("ledger.jsonl: can't be written (No space left on device)")
        return append(self, descriptor, row, end)

    monkeypatch.setattr(Ledger, "_write", write)
    notifier = Notifier([good.url], ledger, Clock(), RUN, said.append)
    notifier.alert("disk", "X1 x1-50m: the disk is full", "make room")
    notifier.alert("disk", "X1 x1-50m: the disk is full", "make room")
    until(lambda: good.took)
    assert len(said) == 1
    assert ledger.rows() == []
    full.clear()
    notifier.alert("other", "X1 x1-50m: other", "b")
    assert notifier.close(60) == []
    assert [row["key"] for row in rows_of(ledger, "alert_due")] == ["disk", "other"]
    assert {(row["key"], row["result"]) for row in rows_of(ledger)} == {
        ("disk", "SUCCESS"),
        ("other", "SUCCESS"),
    }
    assert len(good.took) == 2


def test_a_row_that_another_thread_is_writing_is_not_lost_from_sight(
    ledger: Ledger, hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, append, full = hook(), Ledger.append, threading.Event()
    full.set()

    def write(self: Ledger, event: str, message: str = "", **fields: Any) -> dict[str, Any]:
        if full.is_set():
            raise notify.LedgerError("ledger.jsonl: can't be written (No space left on device)")
        if threading.current_thread() is not threading.main_thread():
            writing.set()
            time.sleep(0.3)
        return append(self, event, message, **fields)

    writing = threading.Event()
    monkeypatch.setattr(Ledger, "append", write)
    notifier = Notifier([good.url], ledger, Clock(), RUN, lambda line: None)
    notifier.alert("disk", "X1 x1-50m: the disk is full", "make room")
    full.clear()
    assert writing.wait(30)  # the channel's thread, after it has sent it: first the row that raised it
    assert not notifier.alert("disk", "X1 x1-50m: the disk is full", "make room")
    assert notifier.close(60) == []
    assert [row["event"] for row in ledger.rows()] == ["alert_due", "alert"]
    assert len(good.took) == 1


def at_line(number: int, handler: Callable[[], object]) -> Callable[..., Any]:
    """A trace that calls the handler before that line of ours, or of what a lock or an Event does."""
    ours, left = {notify.__file__, ledger_module.__file__, threading.__file__}, [number]

    def trace(frame: FrameType, kind: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in ours:
            return None
        if kind == "line":
            left[0] -= 1
            if left[0] == 0:
                handler()
        return trace

    return trace


def test_a_signal_s_handler_may_close_it_at_any_line(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second SIGTERM leaves at once, with the alerts that are on their way."""
    notifier, closed = Notifier(["json://127.0.0.1:9"], ledger, Clock(), RUN, lambda line: None), list[int]()
    notifier.close(0)  # its thread sends nothing
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def too_long(*_: object) -> None:
        raise TimeoutError("it waits for itself")

    before, tracing, line = signal.signal(signal.SIGALRM, too_long), sys.gettrace(), 0
    signal.alarm(30)
    try:
        while len(closed) == line:
            ledger.file.unlink(missing_ok=True)
            line += 1
            sys.settrace(at_line(line, lambda: closed.append(len(notifier.close(0)))))
            notifier.alert("price", "X1 x1-50m: price", "up")
            sys.settrace(tracing)
            told = {(row["event"], row["due"]) for row in ledger.rows()}  # seen twice it may be
            assert [event for event, _ in told] == ["alert_due"], line
            assert notifier._unwritten == []
            with ledger.file.open() as other:
                fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # nor is it held
    finally:
        sys.settrace(tracing)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert line > 50


def test_a_damaged_line_in_the_ledger_keeps_no_alert_back(ledger: Ledger, hook: Any) -> None:
    one, said = hook(), list[str]()
    ledger.append("rate")
    ledger.file.write_bytes(ledger.file.read_bytes() + b"{damaged\n")
    notifier = Notifier([one.url], ledger, Clock(), RUN, said.append)
    assert notifier.alert("price", "X1 x1-50m: price", "up")
    assert not notifier.alert("price", "X1 x1-50m: price", "up")
    assert notifier.close(60) == []
    assert len(one.took) == 1
    assert len(said) == 1
    assert "line 2" in said[0]


def test_without_addresses_it_is_said_and_recorded_once(ledger: Ledger) -> None:
    said: list[str] = []
    notifier = Notifier([], ledger, Clock(), RUN, said.append)
    assert notifier.alert("price", "X1 x1-50m: price", "up")
    assert not notifier.alert("price", "X1 x1-50m: price", "up")
    assert [row["result"] for row in rows_of(ledger)] == ["no channel"]
    assert len(said) == 1
    assert "X1 x1-50m: price" in said[0]
    began = time.monotonic()
    assert [alert.channel for alert in notifier.close(60)] == ["none"]
    assert time.monotonic() - began < 30


def test_raising_it_while_the_ledger_is_held_does_not_lock_up(ledger: Ledger, hook: Any) -> None:
    one = hook()
    notifier = Notifier([one.url], ledger, Clock(), RUN)
    with ledger.locked():
        notifier.alert("price", "X1 x1-50m: price", "up")
        until(lambda: one.took)  # its result waits for the ledger
        for number in range(5):
            notifier.alert(f"price {number}", "X1 x1-50m: price", "up")
    assert notifier.close(60) == []
    assert len(one.took) == 6


# ------------------------------------------------------------------------------------------------------------
# Several processes, and kills

RAISE = """
import sys, time
from pathlib import Path
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.notify import Notifier
notifier = Notifier(sys.argv[2:], Ledger(Path(sys.argv[1]), Clock()), Clock(), "x1-50m")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    notifier.alert("price", "X1 x1-50m: price", "up")
print("raised", flush=True)
if sys.stdin.readline():
    sys.exit(len(notifier.close(60)) or "apprise" in sys.modules)
"""


def process(ledger: Ledger, *urls: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RAISE, str(ledger.file), *urls]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    return child


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin
    child.stdin.write("go\n")
    child.stdin.flush()


def test_two_processes_that_see_the_same_send_it_once(ledger: Ledger, hook: Any) -> None:
    one, other = hook(), hook()
    children = [process(ledger, one.url, other.url) for _ in range(2)]
    for _ in range(2):  # raise, then close
        for child in children:
            go(child)
    assert [child.wait(60) for child in children] == [0, 0]
    assert (len(one.asked), len(other.asked)) == (1, 1)
    assert len(rows_of(ledger, "alert_due")) == 1


def test_what_another_process_sent_just_before_its_turn_is_not_sent_again(
    ledger: Ledger, hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = hook()

    @contextmanager
    def turn(self: Notifier, channel: str) -> Iterator[bool]:
        due = rows_of(ledger, "alert_due")[0]["due"]
        ledger.append("alert", run=RUN, key="price", due=due, channel=channel, attempt=1, result="SUCCESS")
        yield True

    monkeypatch.setattr(Notifier, "_turn", turn)
    notifier = Notifier([one.url], ledger, Clock(), RUN)
    notifier.alert("price", "X1 x1-50m: price", "up")
    assert notifier.close(60) == []
    until(lambda: f"alerts {shown(one.url)}" not in {thread.name for thread in threading.enumerate()})
    assert one.asked == []


def test_what_a_killed_process_raised_the_next_one_delivers_once(ledger: Ledger, hook: Any) -> None:
    one = hook(0)
    child = process(ledger, one.url)
    go(child)
    until(lambda: one.asked)  # in mid-send
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert [row["key"] for row in rows_of(ledger, "alert_due")] == ["price"]
    assert rows_of(ledger) == []
    Notifier([one.url], ledger, Clock(), "another-run").close(0.3)
    assert one.took == []
    assert Notifier([one.url], ledger, Clock(), RUN).close(60) == []
    assert [message["title"] for message in one.took] == ["X1 x1-50m: price"]
    again = Notifier([one.url], ledger, Clock(), RUN)
    assert not again.alert("price", "X1 x1-50m: price", "up")
    assert again.close(1) == []
    assert len(one.took) == 1


def test_a_living_notifier_delivers_what_another_process_left(ledger: Ledger, hook: Any) -> None:
    one = hook()
    watching = Notifier([one.url], ledger, fast(100), RUN)  # looks every 0.15 s
    Notifier([], ledger, Clock(), RUN, lambda _: None).alert("price", "X1 x1-50m: price", "up")
    until(lambda: one.took)
    assert watching.close(60) == []


# ------------------------------------------------------------------------------------------------------------
# What is due, as tables


def due_row(at_s: float, key: str = "price", due: str = "a", run: str = RUN) -> dict[str, Any]:
    moment = (NOON + timedelta(seconds=at_s)).isoformat()
    return {
        "event": "alert_due",
        "time_utc": moment,
        "run": run,
        "key": key,
        "due": due,
        "title": "t",
        "body": "b",
    }


def tried_row(at_s: float, result: str, channel: str = "one", due: str = "a") -> dict[str, Any]:
    row = due_row(at_s, due=due) | {"event": "alert", "channel": channel, "result": result}
    return row | {"attempt": 1}


@pytest.mark.parametrize(
    ("again_after_s", "at_s", "due"),
    [(None, 1e6, False), (600, 599, False), (600, 600, True), (600, 601, True), (600, -3600, True)],
)
def test_an_alert_is_raised_again_only_after_the_stated_time(
    again_after_s: float | None, at_s: float, due: bool
) -> None:
    rows = [due_row(-5000), due_row(0), due_row(300, key="other"), due_row(300, run="other-run")]
    assert is_due(rows, RUN, "price", again_after_s, NOON + timedelta(seconds=at_s)) is due
    assert is_due(rows, RUN, "never seen", again_after_s, NOON)


def test_a_failed_attempt_waits_longer_each_time_and_is_given_up_at_the_twelfth() -> None:
    expected = [10, 30, 90, 300, 900, 1800, 1800, 1800, 1800, 1800, 1800, None]
    rows, found = [due_row(0)], []
    for _ in expected:
        rows.append(tried_row(5, "connection refused"))
        (alert,) = pending(rows, RUN, ["one"], NOON + timedelta(seconds=5))
        found.append(alert.wait_s(NOON + timedelta(seconds=5)))
    assert found == expected
    assert alert.attempts == 12


def test_waiting_ends_when_the_time_has_passed_or_the_clock_was_set_back() -> None:
    (alert,) = pending([due_row(0), tried_row(5, "refused")], RUN, ["one"], NOON)
    waits = {at_s: alert.wait_s(NOON + timedelta(seconds=at_s)) for at_s in (5, 9, 15, 400, -3600)}
    assert waits == {5: 10, 9: 6, 15: 0, 400: 0, -3600: 0}


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        ([due_row(0)], ["a one", "a two"]),
        ([due_row(0), tried_row(1, "SUCCESS")], ["a two"]),
        ([due_row(0), tried_row(1, "refused"), tried_row(2, "SUCCESS")], ["a two"]),
        ([due_row(0), tried_row(1, "SUCCESS"), tried_row(2, "SUCCESS", "two")], []),
        ([due_row(0), tried_row(1, "SUCCESS"), due_row(9, due="b")], ["b one", "b two"]),
        ([due_row(0), tried_row(1, "no channel", "none")], ["a one", "a two"]),
        ([due_row(0, run="other-run")], []),
        ([due_row(-86_500)], []),
        ([{"event": "rate", "time_utc": "x"}], []),
    ],
)
def test_pending_is_what_each_channel_has_not_taken(rows: list[dict[str, Any]], left: list[str]) -> None:
    found = pending(rows, RUN, ["one", "two"], NOON + timedelta(seconds=60))
    assert [f"{alert.due} {alert.channel}" for alert in found] == left


def test_a_repeated_alert_goes_out_again_with_its_new_numbers(tmp_path: Path, hook: Any) -> None:
    one, clock = hook(), fast(3600)
    notifier = Notifier([one.url], Ledger(tmp_path / NAME, clock), clock, RUN)
    notifier.alert("stale", "X1 x1-50m: no news for 11 min", "b", again_after_s=1800)
    assert not notifier.alert("stale", "X1 x1-50m: no news for 12 min", "b", again_after_s=1800)
    until(lambda: len(one.took) == 1)
    until(lambda: notifier.alert("stale", "X1 x1-50m: no news for 41 min", "b", again_after_s=1800))
    assert notifier.close(60) == []
    assert [m["title"] for m in one.took] == [
        "X1 x1-50m: no news for 11 min",
        "X1 x1-50m: no news for 41 min",
    ]


def test_a_late_alert_says_when_it_was_raised(tmp_path: Path, hook: Any) -> None:
    one, file = hook(), tmp_path / NAME
    early = Clock(skew_s=-3600)
    Notifier([], Ledger(file, early), early, RUN, lambda _: None).alert("price", "X1 x1-50m: price", "up")
    raised = rows_of(Ledger(file, Clock()), "alert_due")[0]["time_utc"]
    assert Notifier([one.url], Ledger(file, Clock()), Clock(), RUN).close(60) == []
    assert one.took[0]["message"].startswith("up")
    assert raised in one.took[0]["message"]


# ------------------------------------------------------------------------------------------------------------
# The test send


def test_the_test_send_says_of_each_channel_what_became_of_it(ledger: Ledger, hook: Any, gone: int) -> None:
    good, missing, denied, dumb = hook(), hook(404), hook(403), hook(0)
    urls = [good.url, missing.url, denied.url, dumb.url + "?rto=1", f"json://127.0.0.1:{gone}"]
    urls += [
        "json://no-such-host.invalid",
        f"mailto://127.0.0.1:{gone}?mode=insecure&from=a@e.com&to=b@e.com",
    ]
    urls += [hook(500).url + "?optional=yes", hook(418).url]
    began = time.monotonic()
    outcomes = Notifier(urls, ledger, Clock(), RUN).test()
    assert time.monotonic() - began < 15
    words = [
        "SUCCESS",
        "HTTP 404",
        "HTTP 401 or 403",
        "no answer within",
        "connection refused",
        "no such host",
    ]
    words += ["connection refused", "error 500", "error 418"]
    for outcome, word in zip(outcomes, words, strict=True):
        assert outcome.result.startswith(word) or word in outcome.result, outcome
        assert outcome.delivered is (word == "SUCCESS")
    assert [(row["key"], row["result"]) for row in rows_of(ledger)] == [("test", o.result) for o in outcomes]
    assert good.took[0]["title"] == "X1 x1-50m: test"


def test_a_mail_server_that_says_nothing_is_left_after_the_stated_time(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "CHILD_S", 1.0)
    with socket.socket() as dumb:
        dumb.bind(("127.0.0.1", 0))
        dumb.listen()
        url = f"mailto://127.0.0.1:{dumb.getsockname()[1]}?mode=insecure&from=a@e.com&to=b@e.com"
        began = time.monotonic()
        outcomes = Notifier([url], ledger, Clock(), RUN).test()
    assert time.monotonic() - began < 9  # it is asked for 10 s otherwise
    assert outcomes == [Outcome(shown(url), "no answer within 1 s")]


def test_no_channel_is_no_success(ledger: Ledger) -> None:
    outcomes = Notifier([], ledger, Clock(), RUN).test()
    assert [outcome.delivered for outcome in outcomes] == [False]
    assert "X1_ALERTS is not set" in outcomes[0].result


def test_every_wording_of_a_failure_is_ours() -> None:
    leak = f"POST https://hooks.slack.com/services/T/B/{SECRET} "
    for log in ("error=404.", "(535, b'no", "Connection refused", "SSLError(", "error=599", "what?", ""):
        assert SECRET not in reason("FAILURE", leak + log)
    assert "error 599" in reason("FAILURE", "error=599.")
    assert "password" in reason("FAILURE", "Socket Exception: (535, b'5.7.8 bad credentials')")


# ------------------------------------------------------------------------------------------------------------
# Secrets

SERVICES = {
    f"https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/{SECRET}laz0cOXrIdevi7FQ0": "https://hooks.slack.com",
    f"slack://T1JJ3T3L2/A1BRTD4JD/{SECRET}laz0cOXrIdevi7FQ0/#general": "slack://",
    f"mailto://me:{SECRET}@example.com?to=a@b.com": "mailto://example.com",
    f"mailtos://{SECRET}:pw@example.com:465": "mailtos://example.com:465",
    f"mailtos://example.com:465?user=me&pass={SECRET}&to=a@b.com": "mailtos://example.com:465",
    f"ntfy://{SECRET}-topic": "ntfy://",
    f"ntfys://ntfy.example.com/{SECRET}-topic": "ntfys://ntfy.example.com",
    f"ntfys://tk_{SECRET}abc@ntfy.example.com/topic?token=tk_{SECRET}": "ntfys://ntfy.example.com",
    f"tgram://123456789:abcdefg_{SECRET}fg/12345": "tgram://",
    f"discord://4174216298/{SECRET}JHZ_BlaBla": "discord://",
    f"json://127.0.0.1:9/hook?+X-Token={SECRET}&-k={SECRET}&:f={SECRET}": "json://127.0.0.1:9",
    f"jsons://me:{SECRET}@example.com/{SECRET}/path#{SECRET}": "jsons://example.com",
    f"pbul://o.{SECRET}abc": "pbul://",
    f"pagerduty://{SECRET}aaaa@{SECRET}bbbb/src": "pagerduty://",
    f"gotify://example.com/{SECRET}abc": "gotify://example.com",
    f"json://[::1]:9/{SECRET}": "json://[::1]:9",
}
BROKEN = [
    f"mailto://u.x:{SECRET}/y@example.com",
    f"mailto://u.{SECRET}:pa#ss@example.com",
    f"mailto://u.{SECRET}:12?pa@example.com",
    f"json://[{SECRET}",
    f"{SECRET}",
    f"foo://{SECRET}",
    f"https://example.com/{SECRET}",
    f"json://127.0.0.1/a,json://127.0.0.1/{SECRET}",
    f"twilio://AC{SECRET}:x",
]


def test_only_scheme_and_server_of_an_address_are_shown() -> None:
    assert {url: shown(url) for url in SERVICES} == SERVICES
    assert [url for url in BROKEN if SECRET in shown(url)] == []
    same = [f"slack://T1JJ3T3L2/A1BRTD4JD/{SECRET}laz0cOXrIdevi7FQ{n}" for n in range(3)]
    assert labelled(same) == {"slack://": same[0], "slack:// (2)": same[1], "slack:// (3)": same[2]}


def test_apprise_understands_the_services_and_each_other_address_is_refused_in_one_line() -> None:
    text = " \n".join(SERVICES)
    assert addresses({"X1_ALERTS": text}) == list(SERVICES)
    assert addresses({}) == addresses({"X1_ALERTS": " "}) == []
    for url in (BROKEN[3], *BROKEN[4:]):
        with pytest.raises(UserError, match=r"X1_ALERTS: address 2 of 2 \(") as refusal:
            addresses({"X1_ALERTS": f"json://127.0.0.1:9 {url}"})
        assert SECRET not in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_no_secret_reaches_the_ledger_the_outcomes_the_log_or_the_screen(
    ledger: Ledger, hook: Any, gone: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.NOTSET)
    denied, good = hook(403), hook()
    urls = [
        f"{denied.url}/{SECRET}?+X-Token={SECRET}",
        f"json://me:{SECRET}@127.0.0.1:{good.port}/{SECRET}?+X-Token={SECRET}",
        f"mailto://{SECRET}:{SECRET}@127.0.0.1:{gone}?mode=insecure&from={SECRET}@e.com&to={SECRET}@e.com",
        f"ntfy://{SECRET}:{SECRET}@127.0.0.1:{gone}/{SECRET}",
        f"gotify://127.0.0.1:{gone}/{SECRET}",
        f"form://127.0.0.1:{gone}/{SECRET}",
    ]
    assert addresses({"X1_ALERTS": " ".join(urls)}) == urls
    notifier = Notifier(urls, ledger, Clock(), RUN)
    notifier.alert("price", "X1 x1-50m: price", "up")
    until(lambda: len(rows_of(ledger)) == len(urls))
    left = notifier.close(0.1)
    assert len(left) == len(urls) - 1
    assert len(good.took) == 1
    seen = (
        ledger.file.read_text() + repr(left) + repr(notifier.channels) + caplog.text + str(capfd.readouterr())
    )
    seen += " ".join(path.name for path in ledger.file.parent.iterdir())
    assert SECRET not in seen
