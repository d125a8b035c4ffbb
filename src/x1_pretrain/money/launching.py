"""From the agreed price to the guard: no machine is left alone in between, whatever happens."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import NoReturn, TextIO

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import FINISHED
from x1_pretrain.money import gate
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import dollars
from x1_pretrain.money.guard_command import guard_machine
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.machine_jobs import JobOptions, ranks_flag, train_flags
from x1_pretrain.money.moving import Mover
from x1_pretrain.money.pricing import Wanted
from x1_pretrain.money.providers.base import Offer, Provider, UnknownOutcomeError
from x1_pretrain.money.renting import bring_up, interrupted, interruptible, rent
from x1_pretrain.money.teardown import end_loudly, say

Agreed = tuple[Provider, Offer, gate.Quote]


def rent_and_guard(
    wanted: Wanted, agreed: Agreed, options: JobOptions, ledger: Ledger, clock: Clock, lock: TextIO,
    mover: Mover | None, detach: bool,
) -> int:  # fmt: skip
    """Until the run's last machine is gone, or its guard is told to leave. `lock` keeps other launches out
    until there is a machine."""
    folder = wanted.config.folder
    options = replace(options, before_usd=round(agreed[2].spent_usd, 4))
    try:
        with interruptible():
            code = _rented(wanted, agreed, options, ledger, clock, lock)
            if detach and code == FINISHED:
                say(f"running. Nobody ends it at the ceiling until you start: x1 guard {folder}")
                return FINISHED
            if mover is not None:
                mover.place = next(k for k, one in enumerate(mover.providers) if one is agreed[0])
                return mover.run(up=code == FINISHED) if not detach else code
            return _guarded(wanted, clock) if code == FINISHED else code
    except KeyboardInterrupt:
        return interrupted(folder, clock)


def _rented(
    wanted: Wanted, agreed: Agreed, options: JobOptions, ledger: Ledger, clock: Clock, lock: TextIO
) -> int:
    """A machine that works; else none."""
    provider, offer, priced = agreed
    try:
        machine: Rented = rent(wanted, provider, offer, priced, ledger, clock, options)
        lock.close()
        return bring_up(wanted.config.folder, provider, machine, ledger, clock)
    except (KeyboardInterrupt, UnknownOutcomeError):
        raise  # the first is ended by the caller; of the second nobody knows more
    except BaseException as error:
        if account(ledger.rows()).open_machines():
            say(f"{type(error).__name__}: {error}; ending what is rented")
            end_loudly(wanted.config.folder, clock)
        raise


def _guarded(wanted: Wanted, clock: Clock) -> int:
    """Without a mirror the machine's work is there alone: an error of the guard's ends the guard."""
    folder = wanted.config.folder
    try:
        return guard_machine(folder, clock, wanted.ceiling_usd, wanted.poll_s, wanted.linger_s)
    except Exception:
        say(f"the guard ends; the machine goes on and is billed: `x1 guard {folder}` takes it up again")
        raise


def start_here(
    config: RunConfig, file: Path, wanted: Wanted, rate: Decimal | None, options: JobOptions
) -> NoReturn:
    """This machine is the provider: the supervisor takes over this process."""
    command = [sys.executable, "-m", "x1_pretrain.money.supervise", "--provider", "local"]
    command += ["--rate-usd-per-hr", str(rate), "--", "--config", str(file)]
    command += ["--budget-cap-usd", str(wanted.ceiling_usd), "--run-dir", str(config.folder)]
    command += ["--data-dir", options.data_dir] if options.data_dir else []
    command += ranks_flag(wanted.gpus)
    command += train_flags(config, replace(options, raised_usd=None))  # it is raised already
    for assignment in options.assignments:
        command += ["--set", assignment]
    print(f"x1 supervise: starting here, {dollars(wanted.ceiling_usd)} at most", flush=True)
    os.execv(command[0], command)
