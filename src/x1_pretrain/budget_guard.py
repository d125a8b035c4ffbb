"""The sidecar: keeps `budget.json`, asking the provider every five minutes and counting by itself between.

python -m x1_pretrain.budget_guard --run-dir runs/x1-50m-a100 --cap-usd 35 --provider runpod \\
    --instance-id ID --rate-usd-per-hr 1.19 --output /workspace/budget.json
python -m x1_pretrain.budget_guard --run-dir runs/x1 --cap-usd 35 --provider local --rate-usd-per-hr 0.10

`decide` and what it takes are the guard itself, importable from here.
"""

from __future__ import annotations

import math
import os
import signal
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FINISHED, UserError
from x1_pretrain.money import pace
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, parse_stamp, stamp
from x1_pretrain.money.guard import Action, Decision, Limits, Memory, Reading, decide
from x1_pretrain.money.ledger import NAME, Ledger, Row
from x1_pretrain.money.meter import hourly_storage_usd
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.providers.base import Machine, Provider, ProviderError
from x1_pretrain.money.providers.local import MACHINE_ID, Local
from x1_pretrain.money.providers.opened import open_provider
from x1_pretrain.money.sidecar import Request, Sidecar
from x1_pretrain.money.teardown import Ending, write_proof

__all__ = ["Action", "Decision", "Limits", "Memory", "Reading", "decide"]

Flag = typer.Option


def main(
    run_dir: Annotated[Path, Flag(help="the run folder: its ledger, its pace")],
    cap_usd: Annotated[float, Flag(help="the ceiling in dollars")],
    output: Annotated[
        Path | None, Flag(help="the file to keep [default: RUN_DIR/budget.json]", show_default=False)
    ] = None,
    provider: Annotated[str, Flag(help="lambda, runpod, local or fake")] = "local",
    instance_id: Annotated[str | None, Flag(help="the machine, as the provider names it")] = None,
    tag: Annotated[str | None, Flag(help="the name it was launched under, instead of its id")] = None,
    rate_usd_per_hr: Annotated[
        float | None, Flag(help="what an hour costs, all in; counted where the provider states no price")
    ] = None,
    since: Annotated[
        str | None, Flag(help="billed since, 2026-05-23T02:00:00Z [default: the ledger, else now]")
    ] = None,
    spent_before_usd: Annotated[
        float, Flag(min=0, help="what the run had cost before this machine, where its ledger is elsewhere")
    ] = 0.0,
    every_s: Annotated[float, Flag(min=1, help="seconds between polls")] = 300.0,
    disk_gib: Annotated[int, Flag(min=0, help="disk that is billed with the machine")] = 0,
    tax: Annotated[float, Flag(min=0, max=1, help="on top of the provider's prices: 0.10 is 10 %")] = 0.0,
    terminate: Annotated[
        bool, Flag("--terminate", help="end the machine before the ceiling is passed")
    ] = False,
    once: Annotated[bool, Flag("--once", help="write the file once and leave")] = False,
) -> int:
    """The sidecar: keeps budget.json, asking the provider every few minutes."""
    clock = Clock.from_environment()
    ledger = Ledger(run_dir / NAME, clock)
    rate = None if rate_usd_per_hr is None else amount("--rate-usd-per-hr", rate_usd_per_hr, zero=True)
    begun = parse_since(since)
    source = opened(provider, clock, rate, tag)
    if terminate and source.name == "local":
        raise UserError(
            "--terminate: nobody can be asked to end this machine; name its --provider, or leave it out"
        )
    machine = the_machine(ledger, source, instance_id, tag, rate, begun, clock)
    notifier = Notifier(addresses(os.environ), ledger, clock, run=run_dir.name)

    def end(_: str) -> None:
        if not Ending(source, machine, ledger, clock, print).run():
            body = (
                f"{machine.machine_id} could not be seen to be gone. Look at {source.label}'s own page now."
            )
            key = f"unconfirmed-{stamp(clock.now())}"
            notifier.alert(key, f"X1 {run_dir.name}: a machine may still run", body)
        write_proof(run_dir, ledger)

    sidecar = Sidecar(
        folder=run_dir,
        output=output or run_dir / "budget.json",
        provider=source,
        machine=machine,
        ceiling_usd=amount("--cap-usd", cap_usd),
        ledger=ledger,
        clock=clock,
        notifier=notifier,
        left_s=lambda: pace.left_s(run_dir, clock.speed),
        run_id=run_dir.name,
        poll_s=every_s,
        storage_usd_per_hr=hourly_storage_usd(source.storage_usd_per_gib_month, disk_gib),
        tax=Decimal(0) if source.name == "local" else Decimal(str(tax)),  # a stated rate is all in
        before_usd=Decimal(str(spent_before_usd)),
        may_terminate=terminate,
        terminate=end,
    )
    if once:
        print(sidecar.poll().to_json(), end="")
    else:
        keep(sidecar, output or run_dir / "budget.json")
    notifier.close(10.0)
    return FINISHED


def opened(name: str, clock: Clock, rate: Decimal | None, tag: str | None) -> Provider:
    """The provider; on a machine without its key, only the stated rate can be counted."""
    if name == "local":
        if rate is None:
            raise UserError("--rate-usd-per-hr: is needed with --provider local; for example 0.08, or 0")
        return Local(rate, clock)
    try:
        return open_provider(name, clock)
    except UserError as error:
        if tag is None or rate is None:
            raise
        print(f"sidecar: {error}. Counting at the stated {rate} USD/h from here", flush=True)
        return Local(rate, clock)


def the_machine(
    ledger: Ledger,
    provider: Provider,
    instance_id: str | None,
    tag: str | None,
    rate: Decimal | None,
    since: datetime | None,
    clock: Clock,
) -> Rented:
    """The machine as the ledger knows it; one that X1 did not launch from here is taken up into it."""
    if provider.name == "local":
        instance_id = MACHINE_ID
    found = listed(provider, tag)
    instance_id = instance_id or (found.id if found else None)
    for machine in reversed(account(ledger.rows()).machines):
        same_id = instance_id is not None and machine.machine_id == instance_id
        if tag is not None and provider.name == "local":
            named = machine.tag == tag  # every local machine goes by the same id
        else:
            named = same_id or (machine.tag == tag if tag else instance_id is None and machine.open)
        if named and machine.provider == provider.name and machine.ended is None:
            if since is None or machine.polled is None or since <= machine.polled:
                return machine
            given_back(machine, ledger)
            tag = f"{tag or instance_id}-{since:%Y%m%dT%H%M%SZ}"
            break
    if rate is None:
        raise UserError(
            "--rate-usd-per-hr: is needed for a machine that the ledger does not know: what an hour of it "
            "costs, all in"
        )
    if instance_id is None and tag is None:
        raise UserError("--instance-id: is needed, or --tag: which machine is it, as the provider names it?")
    begun = since or began(found, provider, tag, clock)
    row: Row = {"tag": tag or instance_id, "provider": provider.name, "machine_id": instance_id}
    idle = provider.name != "local" or since is not None or tag is not None
    ledger.append("adopted", since_utc=stamp(begun), usd_per_hr=rate, bills_idle=idle, **row)
    return account(ledger.rows()).machines[-1]


def given_back(machine: Rented, ledger: Ledger) -> None:
    """A machine billed since a later time was rented anew: before, it ended at its last poll."""
    assert machine.polled is not None
    ledger.append(
        "terminate_confirmed",
        "rented anew since then, says --since",
        tag=machine.tag,
        machine_id=machine.machine_id,
        ended_utc=stamp(machine.polled),
    )


def listed(provider: Provider, tag: str | None) -> Machine | None:
    """The machine under a tag. Where it can't be found yet, each poll looks again."""
    if tag is None:
        return None
    try:
        return next((m for m in provider.machines() if m.tag == tag), None)
    except ProviderError as error:
        print(f"sidecar: {error}", flush=True)
        return None


def began(found: Machine | None, provider: Provider, tag: str | None, clock: Clock) -> datetime:
    """Since when it bills: as the provider says, unless its clock is ahead of ours; else since it is up."""
    now = clock.now()
    if found is not None and found.started is not None and found.started <= now:
        return found.started
    if tag is None or provider.name == "fake" or clock.speed != 1.0:  # its machines are processes here
        return now
    return min(now, born())


def born() -> datetime:
    """When this machine or container was started: the age of its first process."""
    import psutil

    return datetime.fromtimestamp(psutil.Process(1).create_time(), UTC)


def amount(flag: str, value: float, *, zero: bool = False) -> Decimal:
    """Dollars out of an option."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{flag} {value}: expected dollars, {'0 or more' if zero else 'more than 0'}")
    return Decimal(str(value))


def parse_since(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_stamp(text)
    except ValueError:
        raise UserError(f"--since {text}: expected a time such as 2026-05-23T02:00:00Z") from None


def keep(sidecar: Sidecar, output: Path) -> None:
    """Until SIGTERM or Ctrl-C."""
    stop = Request()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    every = f"{sidecar.poll_s / 60:g} min"
    print(f"sidecar: {output} every {every} from {sidecar.provider.label}", flush=True)
    sidecar.run(stop)
    if sidecar.machine.ended is not None:
        print("sidecar: the machine is gone, nothing is left to count", flush=True)
        return
    try:
        sidecar.poll()  # what the run's last minutes cost
    except (OSError, UserError) as error:
        print(f"sidecar: the last poll failed ({error})", flush=True)


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.budget_guard"))
