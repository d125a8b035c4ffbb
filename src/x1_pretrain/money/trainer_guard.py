"""The trainer's side of the guard: a thread that decides four times a second and asks the loop to leave.

Between readings it counts on. The loop waits for it only to read once before a checkpoint. When the loop does
not leave in time (a hang), it ends the process: the latch is written and the last checkpoint is safe.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from x1_pretrain.config import BudgetConfig
from x1_pretrain.errors import BUDGET_CHECKPOINTED, BUDGET_STOPPED, RefusedError
from x1_pretrain.money import guard, latch
from x1_pretrain.money.account import account, person_said
from x1_pretrain.money.clock import Clock, parse_stamp, stamp
from x1_pretrain.money.guard import Action, Decision, Limits, Memory, Reading
from x1_pretrain.money.ledger import Ledger, LedgerError, Row, usd
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.watched_file import WatchedFile

TICK_S = 0.25  # real seconds between decisions
LOCK_S = 15.0
TELL_S = 3.0
LEAVE_NOW_S, LEAVE_SAVING_S = 10.0, 300.0  # real seconds the loop gets


class News(NamedTuple):
    """Something for the run's events."""

    name: str
    message: str
    fields: dict[str, Any]


@dataclass
class TrainerGuard:
    """`first()` before anything is built, `start()`, `look()` before a checkpoint, `news()` in the loop."""

    name: str  # of the run
    folder: Path
    file: WatchedFile
    limits: Limits
    ledger: Ledger
    clock: Clock
    notifier: Notifier
    ask_to_leave: Callable[[str, int], None]  # why, exit code
    left_s: float | None = None  # what the run still needs, by its own pace; the loop keeps it
    decision: Decision | None = None
    _memory: Memory = field(init=False)
    _began: datetime = field(init=False)
    _ticked_s: float = field(init=False)
    _kept_at_s: float | None = None
    _said_problem: str | None = None
    _answered_seq: int = 0
    _ledger_size: int = -1
    _news: queue.SimpleQueue[News] = field(default_factory=queue.SimpleQueue)
    _told: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _leaving: Action = Action.GO
    _thread: threading.Thread | None = None
    _arming: threading.Lock = field(default_factory=threading.Lock)
    _timer: threading.Timer | None = None
    _ends_s: float = math.inf  # when it ends the process

    def __post_init__(self) -> None:
        self._began, self._ticked_s = self.clock.now(), self.clock.steady_s()
        self._memory = Memory(self._ticked_s)
        said = [r.get("seq", 0) for r in self.ledger.rows() if r["event"] in ("gate", "agreed", "raised")]
        self._answered_seq = max(said, default=0)  # what a person said between two sessions counts

    # --------------------------------------------------------------------------------------------------------
    # Deciding

    def first(self, agreed_usd_per_hr: Decimal | None) -> Decision:
        """The reading that a start needs; without one nothing starts. It also says what an hour costs, unless
        that was agreed before."""
        reading, now_s = self.file.read_now(), self.clock.steady_s()
        if reading is None:
            raise self._no_start(
                f"{self.file.problem}. Nothing starts without knowing what was spent; start the sidecar "
                "(python -m x1_pretrain.budget_guard --help) or correct the address"
            )
        if now_s - reading.at_s > self.limits.stale_s:
            raise self._no_start(
                f"the last update is {guard.minutes(now_s - reading.at_s)} old, expected at most "
                f"{guard.minutes(self.limits.stale_s)}; is the sidecar alive?"
            )
        rate = agreed_usd_per_hr or reading.usd_per_hr
        if not rate:
            raise self._no_start(
                "rate_usd_per_hr is missing or 0, and nothing can be counted without a rate; put there what "
                "an hour costs"
            )
        self.limits = replace(self.limits, gate_usd_per_hr=rate)
        rows = self.ledger.rows()
        gap_s = self._gap_s(rows, reading.spent_usd)
        self._memory = guard.relaunched(now_s, account(rows).known_usd, gap_s, reading.at_s)
        return self._judge(reading)

    def _no_start(self, why: str) -> RefusedError:
        return RefusedError(f"--budget-curr-cost-uri {self.file.address}: {why}")

    def _gap_s(self, rows: list[Row], said_usd: Decimal) -> float | None:
        """Since an earlier process of this run, on the same machine, last knew what was spent; None where
        the amount has moved since: then its writer is alive and counts by itself."""
        for row in reversed(rows):
            if row["event"] in ("launched", "adopted", "terminate_confirmed"):
                return None  # between two machines nothing was billed
            if row["event"] == "reading":
                if said_usd > usd(row, "said_usd"):
                    return None
                return max(0.0, (self.clock.now() - parse_stamp(row["true_utc"])).total_seconds())
        return None

    def look(self) -> Decision | None:
        """Read now and decide: before every checkpoint."""
        reading = self.file.read_now()
        if not self._lock.acquire(timeout=LOCK_S):
            return self.decision  # the thread hangs: `alive` says so
        try:
            return self._decide(reading)
        finally:
            self._lock.release()

    def _judge(self, reading: Reading | None) -> Decision:
        """Decide, remember, tell."""
        answer = self._answer()
        self._say_problem()
        decision = guard.decide(
            reading,
            self.limits,
            self.clock.steady_s(),
            self._memory,
            left_s=self.left_s,
            answer=answer,
            problem=self.file.problem,
        )
        self._memory, self.decision = decision.memory, decision
        if answer == "continue":
            self._write("agreed", usd_per_hr=decision.memory.accepted_usd_per_hr)
        if reading is not None and reading.at_s != self._kept_at_s:
            self._keep(decision)
            self._kept_at_s = reading.at_s
        for notice in decision.notices:
            self._tell(notice)
        return decision

    def _decide(self, reading: Reading | None) -> Decision:
        """Judge, and act on it."""
        decision = self._judge(reading)
        if stop := latch.read(self.folder):
            self._leave(Action.SAVE_AND_STOP, f"{latch.NAME}: {stop.reason}")
        if decision.action is not Action.GO:
            self._leave(decision.action, decision.reason)
        return decision

    def _answer(self) -> Literal["stop", "continue"] | None:
        """A person's answer since this process began; the ledger is read only when it has grown."""
        try:
            size = self.ledger.file.stat().st_size
        except OSError:
            return None
        if size == self._ledger_size:
            return None
        self._ledger_size = size
        rows = self.ledger.rows()
        said = person_said(rows, self._answered_seq)
        if said:
            self._answered_seq = max(r.get("seq", 0) for r in rows)
            self._news.put(News("budget_answer", f"budget: a person said {said}", {"answer": said}))
        return said

    # --------------------------------------------------------------------------------------------------------
    # Telling and keeping

    def _say_problem(self) -> None:
        problem = self.file.problem
        if problem is not None and problem != self._said_problem:
            said = (
                f"budget: {self.file.address} is no reading ({problem}); counting on from the last good one"
            )
            self._news.put(News("budget_stale", said, {}))
        self._said_problem = problem

    def _keep(self, decision: Decision) -> None:
        """What the guard knows outlives this process."""
        projected = decision.projected_usd
        self._write(
            "reading",
            true_utc=stamp(self.file.seen.last_update),
            said_usd=self.file.seen.spent_usd,
            spent_usd=round(decision.memory.spent_usd, 6),
            projected_usd=None if projected is None else round(projected, 6),
        )

    def _write(self, event: str, message: str = "", **fields: Any) -> None:
        """A full disk is told; the guard goes on from what it has in memory."""
        try:
            self.ledger.append(event, message, **fields)
        except LedgerError as error:
            self._tell(guard.Notice("ledger", "the ledger can't be written", str(error)))

    def _tell(self, notice: guard.Notice) -> None:
        """Once for each occasion: another ceiling, another outage, another stop is another occasion."""
        began = stamp(self._began)
        occasion = {"quiet": f"{self._memory.at_s:.0f}", "stop": began, "ledger": began, "guard": began}
        kind = notice.key.partition("-")[0]
        key = f"{notice.key}-{occasion.get(kind, format(self.limits.ceiling_usd, 'f'))}"
        if key in self._told:
            return
        self._told.add(key)
        body = notice.body.replace(" RUN`", f" {self.folder}`")
        self.notifier.alert(key, f"X1 {self.name}: {notice.title}", body)
        self._news.put(News("budget", f"budget: {notice.title}. {body}", {"key": notice.key}))

    def news(self) -> list[News]:
        """What the loop should write to its events."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def record(self, event: str, message: str, **fields: Any) -> None:
        """Something of the run's that whoever reads the ledger should know."""
        self._write(event, message, **fields)

    def row(self, tokens: int) -> dict[str, float]:
        """For the metrics; `tokens`: trained by this run, none of a parent's: its money starts at zero."""
        if self.decision is None:
            return {}
        row = {"budget/spent_usd": float(round(self.decision.spent_usd, 4))}
        if tokens:
            row["budget/usd_per_billion_tokens"] = float(round(self.decision.spent_usd * 10**9 / tokens, 4))
        if self.decision.projected_usd is not None:
            row["budget/projected_usd"] = float(round(self.decision.projected_usd, 4))
        return row

    @property
    def spent_usd(self) -> Decimal | None:
        return self.decision.spent_usd if self.decision else None

    # --------------------------------------------------------------------------------------------------------
    # Leaving

    def _leave(self, action: Action, reason: str) -> None:
        """Latch first; then ask. A hard stop overtakes a graceful one, never the other way."""
        if self._leaving is Action.STOP_NOW or self._leaving is action:
            return
        self._leaving = action
        code = guard.EXIT_CODES[action]
        self._last_resort(LEAVE_NOW_S if action is Action.STOP_NOW else LEAVE_SAVING_S)
        self._news.put(News("budget_stop", f"budget: {action}: {reason}", {"exit_code": code}))
        try:
            self.latch(reason, code)
        except OSError as error:  # a full disk must not keep it running
            self._news.put(News("budget_stop", f"budget: {latch.NAME}: {error}", {}))
        self._write("stop", reason, exit_code=code, spent_usd=round(self._memory.spent_usd, 6))
        self.ask_to_leave(f"the budget guard: {reason}", code)

    def latch(self, reason: str, code: int) -> None:
        """STOP.json, with what was spent."""
        spent = f"{self.spent_usd:.2f}" if self.spent_usd is not None else None
        ceiling = f"{self.limits.ceiling_usd:.2f}"
        latch.write(self.folder, latch.Stop(reason, "guard", code, stamp(self.clock.now()), spent, ceiling))

    def _last_resort(self, patience_s: float) -> None:
        """End the process if the loop has not left by then. The soonest end holds; after `close` there is
        none."""
        with self._arming:
            ends_s = time.monotonic() + patience_s
            if self._stop.is_set() or ends_s >= self._ends_s:
                return
            if self._timer:
                self._timer.cancel()
            self._ends_s, self._timer = ends_s, threading.Timer(patience_s, _end_this_process)
            self._timer.daemon = True
            self._timer.start()

    # --------------------------------------------------------------------------------------------------------
    # The thread

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="x1-budget", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                with self._lock:
                    self._decide(self.file.poll())
                self._ticked_s = self.clock.steady_s()
            except Exception as error:  # whatever it was, a run without a guard does not go on
                self.fail(f"{type(error).__name__}: {error}")
                return

    def alive(self) -> bool:
        """For the loop: a guard that hangs, on a disk that does not answer, is none."""
        if self._thread is None or self.clock.steady_s() - self._ticked_s < self.limits.stale_s:
            return True
        self.fail(f"it has not answered for {guard.minutes(self.limits.stale_s)}")
        return False

    def fail(self, why: str) -> None:
        """Nothing guards any more: save and stop. What may hang (a disk, a lock) comes last, in a thread."""
        reason = f"the budget guard failed: {why}"
        self._last_resort(LEAVE_SAVING_S)
        self.ask_to_leave(reason, BUDGET_CHECKPOINTED)
        notice = guard.Notice("guard", "the budget guard failed", f"{why}. The run saves and stops.")

        def tell() -> None:
            self._leave(Action.SAVE_AND_STOP, reason)
            self._tell(notice)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(TELL_S)

    def close(self, drain_s: float = 10.0) -> None:
        """Once: what comes later finds it closed."""
        with self._arming:
            if self._stop.is_set():
                return
            self._stop.set()
            if self._timer:
                self._timer.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2.0)
        self.notifier.close(drain_s)


def limits_from(budget: BudgetConfig, ceiling_usd: Decimal, gate_usd_per_hr: Decimal) -> Limits:
    """The guard's limits, as the config has them."""
    warn = Decimal(str(budget.warn_usd)) if budget.warn_usd else ceiling_usd * 6 / 7
    return Limits(
        ceiling_usd=ceiling_usd,
        gate_usd_per_hr=gate_usd_per_hr,
        warn_usd=warn,
        drift=Decimal(str(budget.drift)),
        quiet_s=budget.alert_after_s,
        stale_s=budget.stop_after_s,
        warmup_s=budget.warmup_s,
        answer_s=budget.answer_s,
        no_answer=budget.on_no_answer,
    )


def _end_this_process() -> None:
    os.write(2, b"\nx1: the run did not leave in time after the budget guard stopped it; ending it\n")
    os._exit(BUDGET_STOPPED)
