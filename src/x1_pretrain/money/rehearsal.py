"""`--dry-run-budget`: every branch of the guard with made-up readings and real alerts, in under a minute.

Readings go through a real file, alerts to the real addresses (marked as a rehearsal). Nothing is trained and
nothing of the run is touched.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from x1_pretrain.config import BudgetConfig, RunConfig
from x1_pretrain.errors import FINISHED, REFUSED, UserError
from x1_pretrain.money import budget_file, guard, latch
from x1_pretrain.money.budget_file import Address, BudgetFile, NoReadingError
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import Action, Decision, Limits, Memory, Reading, dollars
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.trainer_guard import limits_from

MINUTE_S = 60.0
STEPS = 20  # decisions in a branch


@dataclass(frozen=True)
class Branch:
    """One case: what is read at which minute, and what must come of it."""

    name: str
    readings: tuple[tuple[float, dict[str, Any]], ...]  # minute, fields of the file; empty: nothing comes
    until_min: float
    expected: Action
    notice: str | None = None  # the kind of notice that must be raised
    answer: Any = None


def pace(budget: BudgetConfig) -> Decimal:
    """A made-up price, low enough that the ceiling lasts longer than the longest wait that is played."""
    longest_s = max(budget.warmup_s, budget.answer_s, budget.stop_after_s, budget.alert_after_s)
    hours = math.ceil(4 * budget.drift * (1 + longest_s / guard.HOUR_S))
    # in whole millionths, as budget.json holds it: rounded, it would be dearer than agreed
    return (Decimal(str(budget.cap_usd)) / max(35, hours)).quantize(Decimal("1e-6"), rounding=ROUND_DOWN)


def branches(limits: Limits) -> list[Branch]:
    """All that can happen to a run's money, at this run's own limits."""
    return _by_amount(limits) + _by_rate(limits) + _by_silence(limits)


def _calm(limits: Limits) -> dict[str, Any]:
    half = limits.ceiling_usd / 2
    return {"spent_usd": half, "rate_usd_per_hr": limits.gate_usd_per_hr, "projected_total_usd": half}


def _close(limits: Limits) -> Decimal:
    """Spent, when there is only a minute more than saving and ending the machine take."""
    return limits.ceiling_usd - guard.cost(limits.gate_usd_per_hr, limits.save_s + limits.end_s + MINUTE_S)


def _by_amount(limits: Limits) -> list[Branch]:
    """What was spent, and what will be."""
    cap, calm = limits.ceiling_usd, _calm(limits)
    over = calm | {"projected_total_usd": cap * 2}
    above = calm | {"spent_usd": cap + limits.gate_usd_per_hr}
    warm = limits.warmup_s / MINUTE_S
    once, twice = ((0, calm), (warm + 1, over)), ((0, calm), (warm + 1, over), (warm + 6, over))
    found = [
        Branch("all is well", ((0, calm),), 0, Action.GO),
        Branch("projected above the ceiling, once", once, warm + 1, Action.GO, "projection"),
        Branch("projected above it, twice", twice, warm + 6, Action.SAVE_AND_STOP, "stop"),
        Branch("spent above the ceiling", ((0, above),), 0, Action.STOP_NOW, "stop"),
        Branch("a lower reading lowers nothing", ((0, above), (1, calm)), 1, Action.STOP_NOW, "stop"),
    ]
    if warm > 0:
        early = ((0, over), (warm / 3, over), (warm / 2, over))
        found.append(Branch("projected above it while warming up", early, warm / 2, Action.GO))
    if limits.warn_usd < _close(limits):
        warned = calm | {"spent_usd": (limits.warn_usd + _close(limits)) / 2}
        found.insert(1, Branch("spent above the warning", ((0, warned),), 0, Action.GO, "warn"))
    return found


def _by_rate(limits: Limits) -> list[Branch]:
    """Dearer an hour than agreed, and a person's word."""
    calm, late = _calm(limits), limits.answer_s / MINUTE_S + 1
    dear = calm | {"rate_usd_per_hr": limits.gate_usd_per_hr * limits.drift * Decimal("1.1")}
    default = Action.SAVE_AND_STOP if limits.no_answer == "stop" else Action.GO
    still = ((0, dear), (late, dear))
    return [
        Branch("dearer an hour than agreed", ((0, dear),), 0, Action.GO, "drift"),
        Branch(f"dearer, no answer ({limits.no_answer})", still, late, default, "drift"),
        Branch("dearer, a person says continue", still, late, Action.GO, None, "continue"),
        Branch("a person says stop", ((0, calm),), 0, Action.SAVE_AND_STOP, "stop", "stop"),
    ]


def _by_silence(limits: Limits) -> list[Branch]:
    """Nobody says what is spent: counting on."""
    calm, stop = _calm(limits), Action.SAVE_AND_STOP
    stale, quiet = limits.stale_s / MINUTE_S, limits.quiet_s / MINUTE_S
    near = calm | {"spent_usd": _close(limits)}
    free = near | {"rate_usd_per_hr": 0}
    found = [
        Branch("no reading for too long", ((0, calm),), stale + 1, stop, "stop"),
        Branch("no reading close to the ceiling", ((0, near),), 2, stop, "stop"),
        Branch("rate 0: counted at the agreed rate", ((0, free),), 2, stop, "stop"),
    ]
    if quiet < stale:
        found.insert(
            0, Branch("no reading, not yet long", ((0, calm),), (quiet + stale) / 2, Action.GO, "quiet")
        )
    return found


def play(branch: Branch, limits: Limits, folder: Path, clock: Clock) -> Decision:
    """Step by step, each reading through a real file."""
    file, start = folder / "budget.json", clock.now()
    memory, decision = Memory(0.0), None
    readings = dict(branch.readings)
    steps = (branch.until_min * i / STEPS for i in range(STEPS + 1))
    moments = sorted({*readings, *steps})
    for minute in moments:
        reading = None
        if minute in readings:
            now = start + timedelta(minutes=minute)
            budget_file.write(file, _file(readings[minute], now))
            seen = budget_file.parse(Address(str(file)).fetch(), now)
            reading = Reading(
                seen.spent_usd, seen.rate_usd_per_hr, seen.projected_total_usd, minute * MINUTE_S
            )
        decision = guard.decide(reading, limits, minute * MINUTE_S, memory, answer=branch.answer)
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


DAMAGED: tuple[tuple[str, bytes | None], ...] = (
    ("not there", None),
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
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_bytes(text.replace(b"%s", stamp(now).encode()))
        try:
            budget_file.parse(Address(str(file)).fetch(), now)
            found.append((name, "taken for a reading", False))
        except NoReadingError as error:
            found.append((name, str(error).removeprefix(f"{file}: "), True))
    return found


def latch_holds(folder: Path) -> bool:
    """A written STOP.json is found again, also when it is damaged, and refuses."""
    latch.write(folder, latch.Stop("rehearsal", "guard", 76, stamp(Clock().now())))
    whole = latch.read(folder)
    (folder / latch.NAME).write_text("{")
    stops = [whole, latch.read(folder)]
    return all(s is not None and latch.refusal(folder, s).exit_code == REFUSED for s in stops)


def rehearse(config: RunConfig, say: Callable[[Any], None] | None = None) -> int:
    """Play all, send for real, print the table; 0 if everything came out as it must."""
    if config.budget.cap_usd is None:
        raise UserError("--dry-run-budget: needs --budget-cap-usd, the ceiling to rehearse")
    say = say or Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print
    clock = Clock.from_environment()
    limits = limits_from(config.budget, Decimal(str(config.budget.cap_usd)), pace(config.budget))
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
    latched = "ok" if latch_holds(folder) else "WRONG"
    rows.append((f"{latch.NAME} holds", "refuses to start, exit 78", "-", latched))
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
    age_s = (clock.now() - seen.last_update).total_seconds()
    fresh = age_s <= config.budget.stop_after_s
    said = f"{address}: {dollars(seen.spent_usd)} spent, said {guard.minutes(max(0.0, age_s))} ago"
    say(said if fresh else f"{said}: too old, a start would be refused with exit 78; is the sidecar alive?")
    return fresh
