"""`--dry-run-budget`: every branch of the guard with made-up readings and real alerts, in under a minute.

Readings go through a real file, alerts to the real addresses (marked as a rehearsal). Nothing is trained and
nothing of the run is touched.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import FINISHED, REFUSED, UserError
from x1_pretrain.money import budget_file, guard, latch
from x1_pretrain.money.budget_file import Address, BudgetFile, NoReadingError
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import Action, Decision, Limits, Memory, Reading, dollars
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.notify import Notifier, addresses
from x1_pretrain.money.trainer_guard import limits_from

MINUTE_S = 60.0


@dataclass(frozen=True)
class Branch:
    """One case: what is read at which minute, and what must come of it."""

    name: str
    readings: tuple[tuple[float, dict[str, Any]], ...]  # minute, fields of the file; empty: nothing comes
    until_min: float
    expected: Action
    notice: str | None = None  # the kind of notice that must be raised
    answer: Any = None


def branches(limits: Limits) -> list[Branch]:
    """All that can happen to a run's money, at this run's own limits."""
    cap, rate = limits.ceiling_usd, Decimal(1)
    half, warn = cap / 2, (limits.warn_usd + cap) / 2 if limits.warn_usd < cap else cap
    warm = limits.warmup_s / MINUTE_S + 1
    calm = {"spent_usd": half, "rate_usd_per_hr": rate, "projected_total_usd": half}
    over = calm | {"projected_total_usd": cap * 2}
    dear = calm | {"rate_usd_per_hr": rate * limits.drift * Decimal("1.1")}
    wait = limits.answer_s / MINUTE_S
    stale, quiet = limits.stale_s / MINUTE_S, limits.quiet_s / MINUTE_S
    default = Action.SAVE_AND_STOP if limits.no_answer == "stop" else Action.GO
    steady = tuple((m, dear) for m in _every(5, wait + 2))
    return [
        Branch("all is well", ((0, calm),), 1, Action.GO),
        Branch("spent above the warning", ((0, calm | {"spent_usd": limits.warn_usd + (cap - warn) / 4}),),
               0, Action.GO, "warn"),
        Branch("projected above the ceiling, once", ((0, calm), (warm, over)), warm, Action.GO, "projection"),
        Branch("projected above it, twice", ((0, calm), (warm, over), (warm + 5, over)), warm + 5,
               Action.SAVE_AND_STOP, "stop"),
        Branch("projected above it while warming up", ((0, over), (1, over), (2, over)), 2,
               Action.SAVE_AND_STOP if limits.warmup_s <= 2 * MINUTE_S else Action.GO),
        Branch("spent above the ceiling", ((0, calm | {"spent_usd": cap + 1}),), 0, Action.STOP_NOW, "stop"),
        Branch("dearer an hour than agreed", ((0, dear),), 1, Action.GO, "drift"),
        Branch(f"dearer, no answer ({limits.no_answer})", steady, wait + 1, default, "drift"),
        Branch("dearer, a person says continue", steady, wait + 1, Action.GO, None, "continue"),
        Branch("a person says stop", ((0, calm),), 1, Action.SAVE_AND_STOP, "stop", "stop"),
        Branch("no reading, not yet long", ((0, calm),), quiet + 1, Action.GO, "quiet"),
        Branch("no reading for too long", ((0, calm),), stale + 1, Action.SAVE_AND_STOP, "stop"),
        Branch("no reading close to the ceiling", ((0, calm | {"spent_usd": cap - Decimal("0.11")}),), 5,
               Action.SAVE_AND_STOP, "stop"),
        Branch("rate 0: counted at the agreed rate",
               ((0, calm | {"rate_usd_per_hr": 0, "spent_usd": cap - Decimal("0.11")}),), 5,
               Action.SAVE_AND_STOP, "stop"),
        Branch("a lower reading lowers nothing", ((0, calm | {"spent_usd": cap + 1}), (1, calm)), 1,
               Action.STOP_NOW, "stop"),
    ]  # fmt: skip


def _every(minutes: float, until: float) -> list[float]:
    return [i * minutes for i in range(int(until / minutes) + 1)]


def play(branch: Branch, limits: Limits, folder: Path, clock: Clock) -> Decision:
    """Minute by minute, each reading through a real file."""
    file, start = folder / "budget.json", clock.now()
    memory, decision = Memory(0.0), None
    readings = dict(branch.readings)
    moments = sorted({*readings, *(float(m) for m in range(int(branch.until_min) + 1)), branch.until_min})
    for minute in moments:
        reading = None
        if minute in readings:
            now = start + timedelta(minutes=minute)
            budget_file.write(file, _file(readings[minute], now))
            seen = budget_file.parse(Address(str(file)).fetch(), now)
            reading = Reading(
                seen.spent_usd, seen.rate_usd_per_hr, seen.projected_total_usd, minute * MINUTE_S
            )
        answer = branch.answer if minute == moments[-1] or branch.answer == "continue" else None
        decision = guard.decide(reading, limits, minute * MINUTE_S, memory, answer=answer)
        memory = decision.memory
    assert decision is not None
    return decision


def _file(fields: dict[str, Any], now: Any) -> BudgetFile:
    return BudgetFile(
        spent_usd=fields["spent_usd"],
        rate_usd_per_hr=Decimal(fields["rate_usd_per_hr"]),
        hours_elapsed=Decimal(1),
        projected_total_usd=fields["projected_total_usd"],
        last_update=now,
    )


DAMAGED: tuple[tuple[str, bytes], ...] = (
    ("half a file", b'{"spent_usd": 14.2, "rate_usd'),
    ("an empty file", b""),
    ("NaN", b'{"spent_usd": NaN, "last_update_utc": "%s"}'),
    ("a negative amount", b'{"spent_usd": -1, "last_update_utc": "%s"}'),
    ("an amount as text", b'{"spent_usd": "14.2", "last_update_utc": "%s"}'),
    ("a time in the future", b'{"spent_usd": 14.2, "last_update_utc": "2999-01-01T00:00:00Z"}'),
    ("no time", b'{"spent_usd": 14.2}'),
)


def refused_files(folder: Path, clock: Clock) -> list[tuple[str, str, bool]]:
    """Each kind of damage: what the reader says of it, and whether it refused it."""
    file, now, found = folder / "damaged.json", clock.now(), []
    for name, text in DAMAGED:
        file.write_bytes(text.replace(b"%s", stamp(now).encode()))
        try:
            budget_file.parse(Address(str(file)).fetch(), now)
            found.append((name, "taken for a reading", False))
        except NoReadingError as error:
            found.append((name, str(error), True))
    return found


def latch_holds(folder: Path) -> bool:
    """A written STOP.json is found again."""
    latch.write(folder, latch.Stop("rehearsal", "guard", 76, stamp(Clock().now())))
    return latch.read(folder) is not None


def rehearse(config: RunConfig, say: Callable[[Any], None] | None = None) -> int:
    """Play all, send for real, print the table; 0 if everything came out as it must."""
    if config.budget.cap_usd is None:
        raise UserError("--dry-run-budget: needs --budget-cap-usd, the ceiling to rehearse")
    say = say or Console(highlight=False, soft_wrap=True).print
    clock = Clock.from_environment()
    limits = limits_from(config.budget, Decimal(str(config.budget.cap_usd)), Decimal(1))
    with tempfile.TemporaryDirectory(prefix="x1-rehearsal-") as name:
        folder = Path(name)
        notifier = Notifier(addresses(os.environ), Ledger(folder / "ledger.jsonl", clock), clock, config.name)
        rows = _played(config, limits, folder, clock, notifier)
        say(_table(rows))
        undelivered = notifier.close(40.0) if notifier.channels else []
    say(_alerts(notifier.channels, undelivered))
    address_is_fine = _say_address(config, clock, say)
    wrong = [row for row in rows if row[-1] != "ok"]
    if wrong or undelivered or not address_is_fine:
        say("NOT as it must be: see above. Nothing was started.")
        return REFUSED
    say(f"All {len(rows)} branches came out as they must.")
    return FINISHED


def _played(
    config: RunConfig, limits: Limits, folder: Path, clock: Clock, notifier: Notifier
) -> list[tuple[str, str, str, str]]:
    rows = []
    sent: set[str] = set()
    for branch in branches(limits):
        decision = play(branch, limits, folder, clock)
        kinds = {n.key.partition("-")[0] for n in decision.notices}
        fine = decision.action is branch.expected and (branch.notice is None or branch.notice in kinds)
        for notice in decision.notices:
            kind = notice.key.partition("-")[0] if not notice.key.startswith("stop") else notice.key
            if kind not in sent:
                sent.add(kind)
                notifier.alert(kind, f"X1 {config.name}: [rehearsal] {notice.title}", notice.body)
        code = guard.EXIT_CODES.get(decision.action)
        does = f"{decision.action}" + (f", exit {code}" if code else "")
        rows.append((branch.name, does, ", ".join(sorted(kinds)) or "-", "ok" if fine else "WRONG"))
    for name, said, fine in refused_files(folder, clock):
        rows.append((f"budget.json: {name}", said, "-", "ok" if fine else "WRONG"))
    rows.append(
        ("STOP.json holds", "refuses to start, exit 78", "-", "ok" if latch_holds(folder) else "WRONG")
    )
    return rows


def _table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    table = Table("what happens", "what X1 does", "alerts", "", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _alerts(channels: Sequence[str], undelivered: Sequence[Any]) -> str:
    if not channels:
        return "alerts: no channel (X1_ALERTS is not set; docs/alerts.md): nothing was sent"
    lost = f"; NOT delivered: {len(undelivered)}" if undelivered else ", all delivered"
    return f"alerts: sent to {', '.join(channels)}{lost}"


def _say_address(config: RunConfig, clock: Clock, say: Callable[[Any], None]) -> bool:
    """What the run's own address says now."""
    if config.budget.curr_cost_uri is None:
        say("--budget-curr-cost-uri: not given, so not tried")
        return True
    address = Address(config.budget.curr_cost_uri)
    try:
        seen = budget_file.parse(address.fetch(), clock.now())
    except NoReadingError as error:
        say(f"{address}: no reading ({error}); a start would be refused with exit 78")
        return False
    age = guard.minutes((clock.now() - seen.last_update).total_seconds())
    say(f"{address}: {dollars(seen.spent_usd)} spent, said {age} ago")
    return True
