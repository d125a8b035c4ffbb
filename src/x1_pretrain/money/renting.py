"""One machine: asked for once, waited for, ended when it does not come up.

The launch request is sent once: its intent is in the ledger first, and when no clear answer comes the machine
is looked for by its tag.
"""

from __future__ import annotations

import fcntl
import re
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from x1_pretrain.errors import FAULT, FINISHED, INTERRUPTED, RefusedError, UserError
from x1_pretrain.money import gate
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.machine_jobs import JobOptions, request_for
from x1_pretrain.money.pricing import Wanted
from x1_pretrain.money.providers.base import (
    Offer,
    Provider,
    ProviderError,
    Status,
    UnknownOutcomeError,
)
from x1_pretrain.money.teardown import Ending, end_loudly, say

WAIT_ACTIVE_S = 1800.0
LOOK_EVERY_S = 15.0


class BusyError(RefusedError):
    """Another launch is going on."""


@contextmanager
def one_launch(runs: Path) -> Iterator[TextIO]:
    """From the first check to the row that says what was launched: a second launch would see neither. What it
    yields may be closed before."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".launch.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{runs}: another x1 launch is going on here; wait for it, or end it") from None
        yield lock


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal are a KeyboardInterrupt; what is ignored (nohup) stays so."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    taken = {number: one for number, one in before.items() if one is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def interrupted(folder: Path, clock: Clock) -> int:
    """Somebody ends the launch while a machine is rented that no guard watches."""
    try:
        with interruptible():
            say("interrupted: ending what is rented")
            end_loudly(folder, clock)
    except KeyboardInterrupt:
        say(f"interrupted again: a machine may be left, and bill. `x1 teardown {folder}` ends it")
    return INTERRUPTED


def new_tag(name: str) -> str:
    """Names one attempt: at the provider, in the ledger and in every log."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return f"x1-{short}-{secrets.token_hex(4)}"


def rent(
    wanted: Wanted, provider: Provider, offer: Offer, priced: gate.Quote, ledger: Ledger, clock: Clock,
    options: JobOptions,
) -> Rented:  # fmt: skip
    """Intent, one request, and whatever became of it."""
    tag = new_tag(wanted.config.name)
    all_in = priced.price.all_in_usd_per_hr
    request = request_for(
        wanted.config, offer, tag, all_in, wanted.ceiling_usd, wanted.disk_gib, options, priced.price.tax
    )
    row = {"tag": tag, "provider": provider.name, "usd_per_hr": round(all_in, 6), "sku": offer.sku}
    parts = {"storage_usd_per_hr": round(priced.price.storage_usd_per_hr, 6), "tax": priced.price.tax}
    ledger.append("intent", f"launch {priced.price.what} on {priced.price.where}", **row, **parts)
    machine = account(ledger.rows()).machines[-1]
    try:
        machine.machine_id = provider.launch(request)
    except UnknownOutcomeError as error:
        print(f"{error}\nlooking for it by its tag {tag} ...", flush=True)
        ending = Ending(provider, machine, ledger, clock, print)
        if not ending.resolve():
            raise RefusedError(f"{provider.label} made no machine; nothing is billed. Run it again") from None
        if machine.machine_id is None:
            raise UnknownOutcomeError(
                f"{provider.label} does not say whether {tag} was launched. It stays open in {ledger.file} "
                f"and may bill: look at the provider's own page, then run `x1 teardown {ledger.file.parent}`"
            ) from None
        return machine
    except UserError as error:
        ledger.append("launch_failed", str(error), tag=tag)
        raise
    ledger.append("launched", tag=tag, machine_id=machine.machine_id)
    return machine


def wait_active(provider: Provider, machine: Rented, ledger: Ledger, clock: Clock) -> bool:
    """Until it runs; False when it won't, or was not seen to in half an hour."""
    assert machine.machine_id is not None
    begun, said = clock.steady_s(), ""
    while clock.steady_s() - begun < WAIT_ACTIVE_S:
        try:
            found = provider.machine(machine.machine_id)
            word = found.said if found else "not listed yet"
        except ProviderError as error:
            found, word = None, str(error)
        if word != said:
            print(f"{machine.machine_id}: {word}", flush=True)
            said = word
        if found and found.status is Status.RUNNING:
            ledger.append("active", tag=machine.tag, machine_id=machine.machine_id)
            return True
        if found and found.status in (Status.LOST, Status.TERMINATING, Status.GONE):
            return False
        clock.sleep(LOOK_EVERY_S)
    return False


def bring_up(folder: Path, provider: Provider, machine: Rented, ledger: Ledger, clock: Clock) -> int:
    """Until it works; a machine that does not is ended here."""
    try:
        if wait_active(provider, machine, ledger, clock):
            return FINISHED
        said = "it does not run: ending it"
    except UserError as error:
        said = f"{error}; ending it"
    say(said)
    end_loudly(folder, clock)
    return FAULT
