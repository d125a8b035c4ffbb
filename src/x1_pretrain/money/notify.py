"""Alerts to Slack, mail, a phone: off the caller's thread, each told once, retried until it got through.

The ledger is the queue. `alert()` writes a row `alert_due` and returns; one thread a channel sends what is
due and writes each attempt and its result as a row `alert`. So whatever a killed process left undelivered,
the next Notifier of that run delivers, and several processes of a run tell a thing once between them.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from x1_pretrain.money.channels import CHILD_S, SUCCESS, VARIABLE, labelled, send
from x1_pretrain.money.clock import Clock, parse_stamp, stamp
from x1_pretrain.money.ledger import Ledger, LedgerError, Row

NO_CHANNEL = "no channel"
BACKOFF_S = (10, 30, 90, 300, 900, *[1800] * 6)  # after each failed attempt; about 3 h 20 min in all
MAX_AGE_S = 86_400  # an alert a day old is history, not an alert
LATE_S = 600  # past this a delivered alert says when it was raised
POLL_S = 15.0  # how often a channel looks for alerts that other processes raised


@dataclass(frozen=True)
class Outcome:
    """What became of one message on one channel."""

    channel: str
    result: str  # SUCCESS, or why not, in words

    @property
    def delivered(self) -> bool:
        return self.result == SUCCESS


@dataclass(frozen=True)
class Undelivered:
    """An alert that one channel has not taken yet."""

    key: str
    title: str
    body: str
    channel: str
    due: str  # names the row that raised it
    raised: datetime
    attempts: int = 0
    last_attempt: datetime | None = None
    last_result: str = "not tried yet"

    def wait_s(self, now: datetime) -> float | None:
        """Seconds until it is tried again; None: given up."""
        if self.attempts > len(BACKOFF_S):
            return None
        if self.last_attempt is None:
            return 0.0
        backoff_s = BACKOFF_S[self.attempts - 1]
        return 0.0 if _passed(self.last_attempt, now, backoff_s) else backoff_s - _s(self.last_attempt, now)


# ------------------------------------------------------------------------------------------------------------
# What is due: pure


def is_due(rows: Sequence[Row], run: str, key: str, again_after_s: float | None, now: datetime) -> bool:
    """Whether an alert is to be raised: never before in this run, or long enough ago."""
    raised = [row for row in rows if _is(row, "alert_due", run) and row["key"] == key]
    if not raised:
        return True
    return again_after_s is not None and _passed(_time(raised[-1]), now, again_after_s)


def pending(rows: Sequence[Row], run: str, channels: Sequence[str], now: datetime) -> list[Undelivered]:
    """What each channel has not taken, oldest first. A later alert of a key takes the earlier's place."""
    newest = {row["key"]: row for row in rows if _is(row, "alert_due", run)}
    tried = [row for row in rows if _is(row, "alert", run)]
    left = []
    for row in sorted(newest.values(), key=_time):
        if _s(_time(row), now) > MAX_AGE_S:
            continue
        for channel in channels:
            mine = [t for t in tried if t.get("due") == row["due"] and t["channel"] == channel]
            if not any(t["result"] == SUCCESS for t in mine):
                left.append(_undelivered(row, channel, mine))
    return left


def _undelivered(row: Row, channel: str, tried: list[Row]) -> Undelivered:
    alert = Undelivered(row["key"], row["title"], row["body"], channel, row["due"], _time(row))
    if not tried:
        return alert
    last = tried[-1]
    return replace(alert, attempts=len(tried), last_attempt=_time(last), last_result=last["result"])


def _is(row: Row, event: str, run: str) -> bool:
    return bool(row["event"] == event and row.get("run") == run)


def _time(row: Row) -> datetime:
    return parse_stamp(row["time_utc"])


def _s(since: datetime, now: datetime) -> float:
    return (now - since).total_seconds()


def _passed(since: datetime, now: datetime, seconds: float) -> bool:
    """A wall clock that was set back counts as time gone by: rather one alert too many than none."""
    return not -1.0 <= _s(since, now) < seconds


# ------------------------------------------------------------------------------------------------------------
# The notifier


def _to_stderr(line: str) -> None:
    print(f"x1: {line}", file=sys.stderr, flush=True)


class Notifier:
    """`Notifier(addresses(os.environ), ledger, clock, run="x1-50m").alert("spent-30", title, body)`

    Backoff and `again_after_s` are seconds of the clock; what waits for sockets is in real seconds.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        ledger: Ledger,
        clock: Clock,
        run: str,
        say: Callable[[str], None] = _to_stderr,
    ) -> None:
        self._urls = labelled(addresses)
        self._ledger, self._clock, self._run, self._say = ledger, clock, run, say
        self.channels = list(self._urls)  # safe to show
        self._unwritten: list[Row] = []  # rows that the disk did not take yet
        self._said: set[str] = set()  # troubles of the ledger, each said once
        self._stopping = False
        # A signal's handler may close it at any line, where an Event would wait for its own thread
        self._wakes = {channel: queue.SimpleQueue[None]() for channel in self.channels}
        for channel in self.channels:
            threading.Thread(
                target=self._serve, args=(channel,), name=f"alerts {channel}", daemon=True
            ).start()

    def alert(self, key: str, title: str, body: str, again_after_s: float | None = None) -> bool:
        """Have it told once for this run, or again every `again_after_s` while this is called; whether it was
        raised now. Returns as soon as the ledger has it."""
        title = " ".join(title.split())
        try:
            with self._ledger.locked():
                raised = self._raise(key, title, body, again_after_s)
        except LedgerError:
            raised = self._raise(key, title, body, again_after_s)
        if raised and not self.channels:
            self._say(f"ALERT, and {VARIABLE} names no channel to send it to: {title}. {body}")
        for wake in self._wakes.values():
            wake.put(None)
        return raised

    def _raise(self, key: str, title: str, body: str, again_after_s: float | None) -> bool:
        if not is_due(self._rows(), self._run, key, again_after_s, self._clock.now()):
            return False
        due = uuid.uuid4().hex[:12]
        self._write("alert_due", title, key=key, due=due, title=title, body=body)
        if not self.channels:
            self._write_attempt(key, due, title, Outcome("none", NO_CHANNEL), 1)
        return True

    def undelivered(self) -> list[Undelivered]:
        """What some channel has not taken, what was given up on too."""
        return pending(self._rows(), self._run, self.channels or ["none"], self._clock.now())

    def close(self, timeout_s: float = 20.0) -> list[Undelivered]:
        """Wait for what can still be sent in so many real seconds, then stop; what is undelivered."""
        end = time.monotonic() + timeout_s
        while self._worth_waiting(end - time.monotonic()):
            time.sleep(0.05)
        self._flush()
        self._stopping = True
        for wake in self._wakes.values():
            wake.put(None)
        return self.undelivered()

    def _worth_waiting(self, left_s: float) -> bool:
        if left_s <= 0 or not self.channels:
            return False
        now = self._clock.now()
        waits = [alert.wait_s(now) for alert in self.undelivered()]
        return any(wait is not None and self._clock.real_s(wait) < left_s for wait in waits)

    def test(self) -> list[Outcome]:
        """Send a test message to every channel at once, within 15 s, and say what became of each. With no
        channel there is one outcome that says so: the list is never empty. Never raises."""
        title, body = f"X1 {self._run}: test", "Alerts of this run arrive here. Nothing needs to be done."
        found = dict.fromkeys(self.channels, f"no answer within {CHILD_S:g} s")

        def one(channel: str) -> None:
            found[channel] = send(self._urls[channel], title, body)

        threads = [threading.Thread(target=one, args=(channel,), daemon=True) for channel in self.channels]
        for thread in threads:
            thread.start()
        end = time.monotonic() + CHILD_S + 1.0
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        outcomes = [Outcome(channel, result) for channel, result in found.items()]
        outcomes = outcomes or [Outcome("none", f"{NO_CHANNEL}: {VARIABLE} is not set; see docs/alerts.md")]
        for outcome in outcomes:
            self._write_attempt("test", "", title, outcome, 1)
        return outcomes

    # --------------------------------------------------------------------------------------------------------
    # One thread a channel

    def _serve(self, channel: str) -> None:
        while not self._stopping:
            try:
                wait_s = self._send_what_is_due(channel)
            except Exception as error:  # a channel that stopped for good would be silence
                self._say(f"alerts to {channel}: {type(error).__name__}; tried again in {POLL_S:g} s")
                wait_s = POLL_S
            with suppress(queue.Empty):
                self._wakes[channel].get(timeout=max(0.05, self._clock.real_s(wait_s)))

    def _send_what_is_due(self, channel: str) -> float:
        """Send one alert if any is due; seconds until the next look."""
        if not self._next(channel):
            return self._pause_s(channel)
        with self._turn(channel) as mine:
            if not mine:
                return 0.2 * self._clock.speed  # another process is sending to it
            alert = self._next(channel)  # which that one may have sent meanwhile
            if alert:
                self._try(alert)
        return 0.0 if alert else self._pause_s(channel)

    def _next(self, channel: str) -> Undelivered | None:
        now = self._clock.now()
        ready = (
            alert for alert in pending(self._rows(), self._run, [channel], now) if alert.wait_s(now) == 0
        )
        return next(ready, None)

    def _pause_s(self, channel: str) -> float:
        now = self._clock.now()
        waits = [alert.wait_s(now) for alert in pending(self._rows(), self._run, [channel], now)]
        return min([POLL_S, *(wait for wait in waits if wait is not None)])

    def _try(self, alert: Undelivered) -> None:
        body = alert.body
        if _s(alert.raised, self._clock.now()) > LATE_S:
            body += f"\n(Raised at {stamp(alert.raised)}; it could not be delivered before.)"
        outcome = Outcome(alert.channel, send(self._urls[alert.channel], alert.title, body))
        attempt = alert.attempts + 1
        self._write_attempt(alert.key, alert.due, alert.title, outcome, attempt)
        if not outcome.delivered and attempt > len(BACKOFF_S):
            told = f"{alert.channel} ({outcome.result}): {alert.title}"
            self._say(f"alert given up after {attempt} attempts on {told}")

    @contextmanager
    def _turn(self, channel: str) -> Iterator[bool]:
        """One sender a channel in all processes of the run. The lock ends with its process."""
        name = re.sub(r"[^a-z0-9.]+", "-", channel).strip("-")
        try:
            lock = os.open(self._ledger.file.with_name(f".alerts-{name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # a full or read-only disk: then rather twice than never
            yield True
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks
            mine = True
        try:
            yield mine
        finally:
            os.close(lock)

    # --------------------------------------------------------------------------------------------------------
    # The ledger, and memory while the disk takes nothing: an alert may be about just that

    def _rows(self) -> list[Row]:
        unwritten = list(self._unwritten)  # before the file: what is written meanwhile is seen twice
        try:
            rows = self._ledger.rows()
        except LedgerError as error:
            self._trouble(error)
            rows = _readable(self._ledger.file)
        return [*rows, *(row for row in unwritten if not any(_same(row, one) for one in rows))]

    def _trouble(self, error: LedgerError) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            self._say(f"{error}; alerts are sent all the same")

    def _write_attempt(self, key: str, due: str, title: str, outcome: Outcome, attempt: int) -> None:
        said = f"{title} -> {outcome.channel}: {outcome.result}"
        fields = {"key": key, "due": due, "title": title, "channel": outcome.channel}
        self._write("alert", said, **fields, attempt=attempt, result=outcome.result)

    def _write(self, event: str, message: str, **fields: Any) -> None:
        row = {"time_utc": stamp(self._clock.now()), "event": event, "message": message, "run": self._run}
        self._unwritten.append(row | fields)
        self._flush()

    def _flush(self) -> None:
        """What waits goes to the disk, one thread at a time and in order; what does not get there stays."""
        try:
            with self._ledger.locked():
                while waiting := self._unwritten[:1]:
                    row = {name: value for name, value in waiting[0].items() if name != "time_utc"}
                    self._ledger.append(**row)
                    with suppress(ValueError):  # a handler has done the same meanwhile
                        self._unwritten.remove(waiting[0])
        except LedgerError as error:
            self._trouble(error)


def _same(row: Row, written: Row) -> bool:
    return all(written.get(name) == value for name, value in row.items() if name != "time_utc")


def _readable(file: Path) -> list[Row]:
    """The sound rows of a damaged ledger: good for what was told already, not for sums."""
    rows = []
    with suppress(OSError):  # said by the caller
        for line in file.read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("event"), str)]
