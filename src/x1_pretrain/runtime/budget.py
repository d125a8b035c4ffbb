"""The seam between a run and its money: the limits from the config, the sentence, the first reading."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal

import torch

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import BUDGET_STOPPED, INTERRUPTED, RefusedError, UserError
from x1_pretrain.model.flops import flops_per_token
from x1_pretrain.model.gpus import peak_bf16_flops_per_sec
from x1_pretrain.money import gate, latch
from x1_pretrain.money.account import account
from x1_pretrain.money.budget_file import Address
from x1_pretrain.money.channels import SUCCESS, VARIABLE, addresses
from x1_pretrain.money.clock import Clock, parse_stamp
from x1_pretrain.money.guard import ZERO, Action, dollars
from x1_pretrain.money.ledger import NAME, Ledger, Row, usd
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.pace import tokens_per_sec
from x1_pretrain.money.trainer_guard import TrainerGuard, limits_from
from x1_pretrain.money.watched_file import WatchedFile
from x1_pretrain.records.run_folder import read_jsonl
from x1_pretrain.runtime.run import Run
from x1_pretrain.runtime.session import Session
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.world import World


class InterruptedEarlyError(UserError):
    """Somebody asked to leave before anything began."""

    exit_code = INTERRUPTED


class OverBudgetError(UserError):
    """Found at the start: nothing is trained, nothing is saved."""

    exit_code = BUDGET_STOPPED


def refuse_latched(config: RunConfig, raise_to_usd: float | None) -> None:
    """A stopped run goes on only with an explicit raise, which the ledger keeps."""
    clock = Clock.from_environment()
    ledger = Ledger(config.folder / NAME, clock)
    stop = latch.in_force(config.folder, ledger.rows())
    if raise_to_usd is not None and config.budget.cap_usd is None:
        raise UserError(
            f"--raise-ceiling-to {raise_to_usd:g}: needs --budget-cap-usd, the ceiling that is raised"
        )
    if raise_to_usd is not None:
        latch.raise_ceiling(config.folder, positive(raise_to_usd), config.budget.cap_usd, ledger)
    elif stop is not None:
        raise latch.refusal(config.folder, stop)


def positive(usd: float) -> Decimal:
    if not (math.isfinite(usd) and usd > 0):
        raise UserError(f"--raise-ceiling-to {usd}: expected a number above 0")
    return Decimal(str(usd))


def open_guard(
    config: RunConfig, session: Session, signals: Signals, here: World, say: Callable[[str], None]
) -> TrainerGuard | None:
    """The guard after its first reading and its sentence; None without a ceiling."""
    clock = Clock.from_environment()
    ledger = Ledger(config.folder / NAME, clock)
    if config.budget.cap_usd is None:
        if config.budget.curr_cost_uri is not None:
            raise UserError(
                "--budget-curr-cost-uri: needs --budget-cap-usd, the ceiling it is read for; without one "
                "nothing is guarded"
            )
        refuse_unguarded(ledger)
        return None
    if config.budget.curr_cost_uri is None:
        raise UserError(
            f"--budget-cap-usd {config.budget.cap_usd}: needs --budget-curr-cost-uri, where a sidecar says "
            "what was spent (python -m x1_pretrain.budget_guard --help)"
        )
    ceiling = ceiling_in_force(Decimal(str(config.budget.cap_usd)), ledger, say)
    notifier = open_notifier(config, ledger, clock, say)
    wanted = limits_from(config.budget, ceiling, ZERO)
    address = Address(config.budget.curr_cost_uri)
    found = TrainerGuard(
        name=config.folder.name,
        folder=config.folder,
        file=WatchedFile(address, clock, config.budget.read_every_s, wanted.quiet_s),
        limits=wanted,
        ledger=ledger,
        clock=clock,
        notifier=notifier,
        ask_to_leave=signals.ask,
    )
    try:
        if signals.interrupted():
            raise InterruptedEarlyError(f"{signals.requested}: nothing was started")
        pass_gate(found, config, session, here, say)
    except BaseException:
        found.close(3.0)
        raise
    found.start()
    return found


def refuse_unguarded(ledger: Ledger) -> None:
    """A run that began under a ceiling does not go on without one by leaving out a flag."""
    ceiling = account(ledger.rows()).ceiling_usd if ledger.file.exists() else None
    if ceiling is not None:
        raise RefusedError(
            f"{ledger.file}: this run has a ceiling of {dollars(ceiling)}; give --budget-cap-usd and "
            "--budget-curr-cost-uri as before"
        )


def ceiling_in_force(cap_usd: Decimal, ledger: Ledger, say: Callable[[str], None]) -> Decimal:
    """What the command says, unless a person raised it since; on record either way. A cap below the one that
    was raised is a new decision, to lower it."""
    known = account(ledger.rows())
    if (ceiling := known.in_force(cap_usd)) != cap_usd:
        say(f"  the ceiling in force is {dollars(ceiling)}: a person raised it")
    if known.raised and ceiling == known.ceiling_usd:
        return ceiling
    if known.ceiling_usd != cap_usd:
        ledger.append("ceiling", f"the ceiling is {dollars(cap_usd)}", ceiling_usd=cap_usd)
    return cap_usd


def agreed_rate(rows: list[Row]) -> Decimal | None:
    """Dollars an hour that somebody agreed to: what the run was first priced at, or more where a person said
    `continue`; a raise of the ceiling agrees to what comes next. A relaunch agrees to nothing."""
    agreed: Decimal | None = None
    for row in rows:
        if row["event"] == "raised":
            agreed = None
        elif row["event"] == "agreed" or (
            row["event"] == "gate" and row.get("verdict") == "passed" and agreed is None
        ):
            agreed = usd(row, "usd_per_hr")
    return agreed


def open_notifier(config: RunConfig, ledger: Ledger, clock: Clock, say: Callable[[str], None]) -> Notifier:
    """Alerts that reach somebody, tried before anything starts."""
    notifier = Notifier(addresses(os.environ), ledger, clock, run=config.folder.name, say=say)
    if not notifier.channels:
        say(
            f"  alerts: none ({VARIABLE} is not set): what the guard says is here, in events.jsonl and in "
            "the ledger only; docs/alerts.md sets up Slack or mail in two minutes"
        )
        return notifier
    if tested_lately(ledger.rows(), notifier.channels, clock.now()):
        return notifier
    failed = [one for one in notifier.test() if not one.delivered]
    if failed:
        notifier.close(0.0)
        said = ", ".join(f"{one.channel}: {one.result}" for one in failed)
        raise RefusedError(
            f"{VARIABLE}: the test alert did not get through ({said}); alerts are part of the guard: put the "
            "address right, or take it out"
        )
    return notifier


def tested_lately(rows: list[Row], channels: list[str], now: datetime) -> bool:
    """Every channel took a test message within a day: a relaunch does not send another."""
    fine = {
        row.get("channel")
        for row in rows
        if row["event"] == "alert" and row.get("key") == "test" and row.get("result") == SUCCESS
        if (now - parse_stamp(row["time_utc"])).total_seconds() < 86_400
    }
    return fine >= set(channels)


def pass_gate(
    found: TrainerGuard, config: RunConfig, session: Session, here: World, say: Callable[[str], None]
) -> None:
    """Read what was spent, say what the rest will cost, and refuse what can't end below the ceiling."""
    decision = found.first(agreed_rate(found.ledger.rows()))
    quote = _quote(found, config, session, here)
    priced = gate.sentence(quote, "go on with" if session.step else "start")
    say(priced)
    if decision.action is Action.STOP_NOW:
        found.latch(decision.reason, BUDGET_STOPPED)
        found.ledger.append("stop", decision.reason, exit_code=BUDGET_STOPPED)
        raise OverBudgetError(f"{decision.reason}; nothing was started")
    terms = gate.broken(quote, _decimal(config.budget.max_usd_per_hr))
    if decision.action is not Action.GO:
        terms.append(decision.reason)
    found.ledger.append("gate", priced, verdict="refused" if terms else "passed", **quote.fields())
    if terms:
        raise RefusedError(f"refused: {'; '.join(terms)}. {priced}")


def _decimal(value: float | None) -> Decimal | None:
    return None if value is None else Decimal(str(value))


def _quote(found: TrainerGuard, config: RunConfig, session: Session, here: World) -> gate.Quote:
    """The rest of the run at the rate that the watcher states."""
    seen, decision = found.file.seen, found.decision
    assert decision is not None
    rate = seen.rate_usd_per_hr or found.limits.gate_usd_per_hr
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU"
    known = f"{found.file.address}, {seen.last_update:%H:%MZ}"
    where = {"lambda": "Lambda", "runpod": "RunPod"}.get(seen.provider or "", seen.provider or "this machine")
    left = config.training.total_steps - session.step
    return gate.Quote(
        gate.Price(f"{here.size}x {name}", where, rate, known),
        work(config, left * config.training.batch_tokens, name, here.size, found.clock.speed),
        found.limits.ceiling_usd,
        gate.reserve_h(0.0, found.limits.end_s, setup_h=ZERO),
        spent_usd=decision.spent_usd,
    )


def work(config: RunConfig, tokens: int, gpu: str, gpus: int, speed: float) -> gate.Work:
    """What is left and how fast: stated, measured earlier in this run, or assumed from the peak. `speed`: of
    the clock; where an hour passes in a minute, a second has few tokens."""
    if stated := config.budget.tokens_per_sec:
        return gate.Work(tokens, stated, f"{stated:,.0f} tokens/s, stated", "stated")
    if measured := tokens_per_sec(read_jsonl(config.folder / "metrics.jsonl").rows):
        measured /= speed
        basis = f"{measured:,.0f} tokens/s, measured earlier in this run"
        return gate.Work(tokens, measured, basis, "measured")
    peak = peak_bf16_flops_per_sec(gpu)
    rate = gate.assumed_rate(peak, flops_per_token(config.model).palm, gpus)
    if rate is None:
        return gate.Work(tokens, None, "measured once it runs")
    basis = f"an estimate: {rate:,.0f} tokens/s at an assumed MFU of {gate.ASSUMED_MFU:.2f}"
    return gate.Work(tokens, rate, basis)


def over_budget(run: Run) -> bool:
    """What was spent is read before every checkpoint."""
    if run.guard:
        run.guard.look()
    return run.world.any(run.signals.interrupted())


def tell_budget(run: Run) -> None:
    """What the guard has to say, in the order it happened; and to the guard, how long the run still takes."""
    if run.guard is None:
        return
    run.guard.alive()
    left_s = run.clock.eta_s(run.total_steps - run.step)
    run.guard.left_s = left_s * run.guard.clock.speed if left_s is not None else None
    for name, message, fields in run.guard.news():
        run.event(name, message, **fields)
