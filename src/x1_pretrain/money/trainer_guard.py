"""The trainer's side of the guard: a thread that reads, decides, and asks the loop to leave.

It reads every half hour, and every minute once what it has is old; between readings it counts on. The loop
waits for it only to read once before a checkpoint. When the loop does not leave in time (a hang), it ends the
process: the latch is written and the last checkpoint is safe.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from x1_pretrain.config import BudgetConfig
from x1_pretrain.errors import BUDGET_CHECKPOINTED, BUDGET_STOPPED, RefusedError
from x1_pretrain.money import budget_file, guard, latch
from x1_pretrain.money.account import account, person_said
from x1_pretrain.money.budget_file import Address, BudgetFile, NoReadingError
from x1_pretrain.money.clock import Clock, parse_stamp, stamp
from x1_pretrain.money.guard import Action, Decision, Limits, Memory, Reading
from x1_pretrain.money.ledger import Ledger, LedgerError, Row
from x1_pretrain.money.notify import Notifier

TICK_S = 0.25  # real seconds between decisions
REREAD_S = 60.0  # how often an old reading is looked for anew
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
    address: Address
    limits: Limits
    ledger: Ledger
    clock: Clock
    notifier: Notifier
    ask_to_leave: Callable[[str, int], None]  # why, exit code
    read_every_s: float = 1800.0
    left_s: float | None = None  # what the run still needs, by its own pace; the loop keeps it
    decision: Decision | None = None
    _memory: Memory = field(init=False)
    _seen: BudgetFile | None = None  # the newest good state of the file ...
    _seen_at_s: float = 0.0  # ... and the steady second at which it was true
    _read_at_s: float = 0.0
    _kept_at_s: float | None = None
    _problem: str | None = None
    _answered_seq: int = 0
    _ledger_size: int = -1
    _news: queue.SimpleQueue[News] = field(default_factory=queue.SimpleQueue)
    _told: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _leaving: Action = Action.GO
    _thread: threading.Thread | None = None
    _timer: threading.Timer | None = None

    _began: datetime = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.clock.now()
        self._memory = Memory(self.clock.steady_s())
        self._answered_seq = max((r.get("seq", 0) for r in self.ledger.rows()), default=0)

    # --------------------------------------------------------------------------------------------------------
    # Reading

    def first(self, agreed_usd_per_hr: Decimal | None) -> Decision:
        """The reading that a start needs; without one nothing starts. It also says what an hour costs, unless
        less was agreed before."""
        try:
            self._seen = self._parsed()
        except NoReadingError as error:
            raise RefusedError(
                f"--budget-curr-cost-uri {self.address}: {error}. Nothing starts without knowing what was "
                "spent; start the sidecar (python -m x1_pretrain.budget_guard --help) or correct the address"
            ) from None
        now_s = self.clock.steady_s()
        age_s = max(0.0, (self.clock.now() - self._seen.last_update).total_seconds())
        if age_s > self.limits.stale_s:
            raise RefusedError(
                f"--budget-curr-cost-uri {self.address}: the last update is {guard.minutes(age_s)} old, "
                f"expected at most {guard.minutes(self.limits.stale_s)}; is the sidecar alive?"
            )
        rates = [r for r in (self._seen.rate_usd_per_hr, agreed_usd_per_hr) if r]
        if not rates:
            raise RefusedError(
                f"--budget-curr-cost-uri {self.address}: rate_usd_per_hr is missing or 0, and nothing can be "
                "counted without a rate; put there what an hour costs"
            )
        self.limits = replace(self.limits, gate_usd_per_hr=min(rates))
        self._seen_at_s, self._read_at_s = now_s - age_s, now_s
        rows = self.ledger.rows()
        known_usd, gap_s = account(rows).known_usd, self._gap_s(rows)
        self._memory = guard.relaunched(now_s, known_usd, gap_s, self._seen_at_s)
        return self._judge(self._reading())

    def _gap_s(self, rows: list[Row]) -> float | None:
        """Since an earlier process of this run, on the same machine, last knew what was spent."""
        for row in reversed(rows):
            if row["event"] in ("launched", "adopted", "terminate_confirmed"):
                return None  # between two machines nothing was billed
            if row["event"] == "reading":
                return max(0.0, (self.clock.now() - parse_stamp(row["true_utc"])).total_seconds())
        return None

    @property
    def seen(self) -> BudgetFile | None:
        """The newest good state of the file."""
        return self._seen

    def _parsed(self) -> BudgetFile:
        return budget_file.parse(self.address.fetch(), self.clock.now())

    def _read(self) -> Reading | None:
        """A new reading, or None with `_problem` set. The file's time becomes steady time when first seen."""
        self._read_at_s = self.clock.steady_s()
        try:
            found = self._parsed()
        except NoReadingError as error:
            self._set_problem(str(error))
            return None
        self._set_problem(None)
        if self._seen is None or found.last_update != self._seen.last_update:
            age_s = max(0.0, (self.clock.now() - found.last_update).total_seconds())
            self._seen_at_s = self._read_at_s - age_s
        self._seen = found
        return self._reading()

    def _reading(self) -> Reading:
        assert self._seen is not None
        found = self._seen
        return Reading(
            found.spent_usd, found.rate_usd_per_hr, found.projected_total_usd, self._seen_at_s, found.seq
        )

    def _set_problem(self, problem: str | None) -> None:
        if problem is not None and problem != self._problem:
            said = f"budget: {self.address} is no reading ({problem}); counting on from the last good one"
            self._news.put(News("budget_stale", said, {}))
        self._problem = problem

    def _due(self) -> bool:
        now_s = self.clock.steady_s()
        old = now_s - self._seen_at_s > self.limits.quiet_s
        return now_s - self._read_at_s >= (min(REREAD_S, self.read_every_s) if old else self.read_every_s)

    # --------------------------------------------------------------------------------------------------------
    # Deciding

    def look(self) -> Decision:
        """Read now and decide: before every checkpoint, and whenever a reading is due."""
        with self._lock:
            return self._decide(self._read())

    def _judge(self, reading: Reading | None) -> Decision:
        """Decide, remember, tell."""
        answer = self._answer()
        decision = guard.decide(
            reading,
            self.limits,
            self.clock.steady_s(),
            self._memory,
            left_s=self.left_s,
            answer=answer,
            problem=self._problem,
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
            self._leave(Action.SAVE_AND_STOP, f"{latch.NAME}: {stop.reason}", decision)
        if decision.action is not Action.GO:
            self._leave(decision.action, decision.reason, decision)
        return decision

    def _keep(self, decision: Decision) -> None:
        """What the guard knows outlives this process."""
        assert self._seen is not None
        self._write(
            "reading",
            true_utc=stamp(self._seen.last_update),
            spent_usd=round(decision.memory.spent_usd, 6),
            projected_usd=None if decision.projected_usd is None else round(decision.projected_usd, 6),
        )

    def _write(self, event: str, **fields: Any) -> None:
        """A full disk is said; the guard goes on from what it has in memory."""
        try:
            self.ledger.append(event, **fields)
        except LedgerError as error:
            self._set_problem(str(error))

    def _answer(self) -> Any:
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

    def _tell(self, notice: guard.Notice) -> None:
        """Once for each occasion: another ceiling, another outage, another stop is another occasion."""
        occasion = {"quiet": f"{self._seen_at_s:.0f}", "stop": stamp(self._began)}
        kind = notice.key.partition("-")[0]
        key = f"{notice.key}-{occasion.get(kind, format(self.limits.ceiling_usd, 'f'))}"
        if key in self._told:
            return
        self._told.add(key)
        self.notifier.alert(key, f"X1 {self.name}: {notice.title}", notice.body)
        self._news.put(News("budget", f"budget: {notice.title}. {notice.body}", {"key": notice.key}))

    def _leave(self, action: Action, reason: str, decision: Decision) -> None:
        """Latch first; then ask. A hard stop overtakes a graceful one, never the other way."""
        if self._leaving is Action.STOP_NOW or self._leaving is action:
            return
        self._leaving = action
        code = guard.EXIT_CODES[action]
        self._last_resort(LEAVE_NOW_S if action is Action.STOP_NOW else LEAVE_SAVING_S)
        spent, ceiling = f"{decision.spent_usd:.2f}", f"{self.limits.ceiling_usd:.2f}"
        stop = latch.Stop(reason, "guard", code, stamp(self.clock.now()), spent, ceiling)
        self._news.put(News("budget_stop", f"budget: {action}: {reason}", {"exit_code": code}))
        try:
            latch.write(self.folder, stop)
            self.ledger.append("stop", reason, exit_code=code, spent_usd=round(decision.memory.spent_usd, 6))
        except (OSError, LedgerError) as error:  # a full disk must not keep it running
            self._news.put(News("budget_stop", f"budget: {error}", {}))
        self.ask_to_leave(f"the budget guard: {reason}", code)

    def _last_resort(self, patience_s: float) -> None:
        """End the process if the loop has not left by then."""
        if self._timer:
            self._timer.cancel()
        self._timer = threading.Timer(patience_s, _end_this_process)
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
                    self._decide(self._read() if self._due() else None)
            except Exception as error:  # whatever it was, a run without a guard does not go on
                why = f"the budget guard failed ({type(error).__name__}: {error})"
                self.ask_to_leave(why, BUDGET_CHECKPOINTED)
                return

    def news(self) -> list[News]:
        """What the loop should write to its events."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def row(self) -> dict[str, float]:
        """For the metrics."""
        if self.decision is None:
            return {}
        row = {"budget/spent_usd": float(round(self.decision.spent_usd, 4))}
        if self.decision.projected_usd is not None:
            row["budget/projected_usd"] = float(round(self.decision.projected_usd, 4))
        return row

    @property
    def spent_usd(self) -> Decimal | None:
        return self.decision.spent_usd if self.decision else None

    def close(self, drain_s: float = 10.0) -> None:
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
