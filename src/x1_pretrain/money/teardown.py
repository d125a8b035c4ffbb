"""`x1 teardown RUN`: end a run's machines, and see that they are gone.

A provider's "terminated" is a promise. A machine counts as gone when two reads, some time apart, do not find
it any more; the proof goes into the run folder. What can't be confirmed stays open in the ledger, loudly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.money import budget_file
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.audit import PROOF
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import ZERO, dollars
from x1_pretrain.money.ledger import NAME, Ledger, LedgerError, find_ledger
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.providers.base import Machine, Provider, ProviderError, Status
from x1_pretrain.money.providers.opened import open_provider
from x1_pretrain.money.sidecar import last_seq
from x1_pretrain.records.formats import VERSIONS

READ_EVERY_S = 10.0
APART_S = 10.0  # between the two reads that count
ASK_AGAIN_S = 60.0  # still there: the first request may have been ignored
LISTED_BY_S = 120.0  # a machine just launched may not be listed before
PATIENCE_S = 900.0


@dataclass
class Ending:
    """One machine on its way out."""

    provider: Provider
    machine: Rented
    ledger: Ledger
    clock: Clock
    say: Callable[[str], None]
    apart_s: float = APART_S
    patience_s: float = PATIENCE_S
    seen: bool = False  # there, in this process's own reads
    begun_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun_s = self.clock.steady_s()

    def run(self) -> bool:
        """Ask, look, ask again; whether it is confirmed gone."""
        if self.machine.machine_id is None and not self.resolve():
            return True
        if self.machine.machine_id is None:
            self._not_confirmed()
            return False
        begun_s, gone = self.clock.steady_s(), list[str]()
        asked_s: float | None = None
        while self.clock.steady_s() - begun_s < self.patience_s:
            if asked_s is None or self.clock.steady_s() - asked_s >= ASK_AGAIN_S:
                self._ask()
                asked_s = self.clock.steady_s()
            gone = self._look(gone)
            if len(gone) >= 2 and self._old_enough():
                self._confirm(gone)
                return True
            self.clock.sleep(self.apart_s if gone else READ_EVERY_S)
        self._not_confirmed()
        return False

    def _ask(self) -> None:
        assert self.machine.machine_id is not None
        self._note("terminate_sent")
        try:
            self.provider.terminate(self.machine.machine_id)
        except ProviderError as error:
            self.say(f"terminate {self.machine.machine_id}: {error}")

    def _look(self, gone: list[str]) -> list[str]:
        """The reads in a row that did not find it."""
        try:
            found = self._read()
        except ProviderError as error:
            self.say(f"{self.machine.machine_id}: {error}")
            return gone  # no answer says nothing, either way
        if found is None or found.status is Status.GONE:
            said = "not found" if found is None else found.said
            self.say(f"{self.machine.machine_id}: {said} (read {len(gone) + 1} of 2)")
            return [*gone, f"{stamp(self.clock.now())} {said}"]
        self.say(f"{self.machine.machine_id}: {found.said}")
        self.seen = True
        return []

    def _read(self) -> Machine | None:
        """As the single read and the list agree; where they don't, it is there."""
        assert self.machine.machine_id is not None
        single_read = self.provider.machine(self.machine.machine_id)
        if single_read is not None and single_read.status is not Status.GONE:
            return single_read
        listed = [m for m in self.provider.machines() if m.id == self.machine.machine_id]
        return listed[0] if listed and listed[0].status is not Status.GONE else single_read

    def _old_enough(self) -> bool:
        """Whether a machine that is not listed would have been by now. Either clock will do: the wall clock
        may have been set back."""
        age_s = (self.clock.now() - self.machine.since).total_seconds()
        return self.seen or max(age_s, self.clock.steady_s() - self.begun_s) >= LISTED_BY_S

    def _found_by_tag(self) -> bool | None:
        """A launch whose answer was lost: its tag tells whether there is a machine. None: no answer."""
        begun_s, absent = self.clock.steady_s(), 0
        while self.clock.steady_s() - begun_s < self.patience_s:
            try:
                found = [m for m in self.provider.machines() if m.tag == self.machine.tag]
                absent += not found
            except ProviderError as error:
                self.say(f"{self.machine.tag}: {error}")
                found = []
            if found:
                self._adopt([m.id for m in found])
                return True
            if absent >= 2 and self._old_enough():
                return False
            self.clock.sleep(self.apart_s)
        return None

    def _adopt(self, ids: list[str]) -> None:
        """The first is the one that was asked for. One launch that made several: the others bill too."""
        self.machine.machine_id, *others = ids
        self._note("launched", "found by its tag")
        for machine_id in others:
            row = {"tag": machine_id, "provider": self.provider.name, "machine_id": machine_id}
            said = f"one more machine under the tag {self.machine.tag}"
            self.say(f"{machine_id}: {said}; `x1 teardown` ends it")
            self.ledger.append("adopted", said, usd_per_hr=self.machine.usd_per_hr, **row)

    def resolve(self) -> bool:
        """Whether there is a machine, after a launch without an answer; what is not there is closed."""
        found = self._found_by_tag()
        if found is False:
            said = "no machine with this tag is listed: the launch made none"
            self._note("launch_failed", said)
            self.machine.ended = self.clock.now()
            self.say(f"{self.machine.tag}: {said}")
        return found is not False

    def _confirm(self, reads: list[str]) -> None:
        said = f"{self.machine.machine_id} is gone"
        self._note(
            "terminate_confirmed",
            said,
            provider=self.provider.name,
            reads=reads,
            billed_usd=self._billed(),
        )
        self.machine.ended = self.clock.now()

    def _billed(self) -> Decimal | None:
        assert self.machine.machine_id is not None
        try:
            return self.provider.billed_usd(self.machine.machine_id, self.machine.since)
        except ProviderError:
            return None  # the bill comes later than the end

    def _not_confirmed(self) -> None:
        self._note(
            "terminate_unconfirmed", f"{self.machine.machine_id or self.machine.tag} was not seen to end"
        )

    def _note(self, event: str, message: str = "", **fields: Any) -> None:
        """Into the ledger. A full disk does not keep a machine alive."""
        row = {"tag": self.machine.tag, "machine_id": self.machine.machine_id, **fields}
        try:
            self.ledger.append(event, message, **row)
        except LedgerError as error:
            self.say(str(error))


# ------------------------------------------------------------------------------------------------------------
# A run's machines


def end_all(
    folder: Path, clock: Clock, say: Callable[[str], None], patience_s: float = PATIENCE_S
) -> list[Rented]:
    """End every machine that the run's ledger has open; those that could not be confirmed."""
    ledger = Ledger(folder / NAME, clock)
    unconfirmed = []
    for machine in account(ledger.rows()).open_machines():
        if not _end_one(machine, ledger, clock, say, patience_s):
            unconfirmed.append(machine)
    write_proof(folder, ledger, say)
    _final_budget(folder, ledger, clock, say)
    return unconfirmed


def _end_one(
    machine: Rented, ledger: Ledger, clock: Clock, say: Callable[[str], None], patience_s: float
) -> bool:
    try:
        provider = open_provider(machine.provider, clock)
    except UserError as error:  # no key here: the others are ended all the same
        say(f"{machine.machine_id or machine.tag}: {error}")
        return False
    say(f"ending {machine.machine_id or machine.tag} at {provider.label}")
    return Ending(provider, machine, ledger, clock, say, patience_s=patience_s).run()


def say(line: str) -> None:
    """On the screen, where there still is one: a terminal that was closed keeps no machine alive."""
    with suppress(OSError, ValueError):
        print(line, flush=True)


def end_loudly(folder: Path, clock: Clock, patience_s: float = PATIENCE_S) -> int:
    """`end_all`, told on the screen; what could not be confirmed is alerted. The exit code."""
    unconfirmed = end_all(folder, clock, say, patience_s)
    return _loud(folder, unconfirmed, Ledger(folder / NAME, clock), clock) if unconfirmed else FINISHED


def write_proof(folder: Path, ledger: Ledger, say: Callable[[str], None] = print) -> None:
    """What was seen, for whoever asks later: no screenshot needed."""
    rows = [r for r in ledger.rows() if r["event"] == "terminate_confirmed"]
    if not rows:
        return
    try:
        tree = {"schema_version": VERSIONS[PROOF], "confirmed": rows}
        new = folder / f".{PROOF}.{os.getpid()}.new"  # the guard and a sidecar may both write it
        new.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        new.replace(folder / PROOF)
    except OSError as error:
        say(f"{folder / PROOF}: can't be written ({error.strerror}); the ledger has the same rows")


def _final_budget(folder: Path, ledger: Ledger, clock: Clock, say: Callable[[str], None]) -> None:
    """The last word of budget.json: nothing is left to come, or what still bills."""
    known, now = account(ledger.rows()), clock.now()
    if not known.machines:
        return
    left = known.open_machines()
    until = now if left else max(m.ended or now for m in known.machines)
    began = min(m.since for m in known.machines)
    spent = max(known.known_usd, known.spent_by(now))
    file = folder / "budget.json"
    said = budget_file.BudgetFile(
        spent_usd=spent,
        rate_usd_per_hr=sum((m.usd_per_hr for m in left), ZERO),
        hours_elapsed=Decimal(str(max(0.0, (until - began).total_seconds()) / 3600)),
        projected_total_usd=None if left else spent,
        last_update=now,
        run_id=folder.name,
        provider=known.machines[-1].provider,
        instance_id=known.machines[-1].machine_id,
        ceiling_usd=known.ceiling_usd,
        source="metered",
        seq=last_seq(file) + 1,
    )
    try:
        budget_file.write(file, said)
    except OSError as error:
        say(f"{file}: can't be written ({error.strerror})")


def disks_line(provider: Provider) -> str | None:
    """Disks that go on billing, by name, with their price a day."""
    try:
        disks = provider.disks()
    except ProviderError as error:
        return f"{provider.label}: its disks could not be read ({error})"
    if not disks:
        return None
    listed = ", ".join(f"{d.name} ({d.gib:.0f} GiB) ${d.usd_per_day:.2f} a day" for d in disks)
    return f"still billing at {provider.label}: {listed}"


def main(
    run: Annotated[Path, typer.Argument(help="the run folder")],
    patience: Annotated[float, typer.Option(min=1, help="minutes to wait for the proof")] = PATIENCE_S / 60,
) -> int:
    """End a run's machines, and see that they are gone."""
    run = find_ledger(run, "`x1 reconcile` lists what is running at the providers")
    clock = Clock.from_environment()
    ledger = Ledger(run / NAME, clock)
    before = account(ledger.rows())
    if not before.open_machines():
        print(f"{run}: no machine is open in its ledger")
        return FINISHED
    code = end_loudly(run, clock, patience * 60)
    for name in sorted({m.provider for m in before.open_machines()}):
        _say_disks(name, clock)
    if code != FINISHED:
        return code
    spent = account(ledger.rows()).spent_by(clock.now())
    print(f"confirmed: no machine of {run} is left; about {dollars(spent)} in all; proof in {run / PROOF}")
    return FINISHED


def _say_disks(name: str, clock: Clock) -> None:
    try:
        line = disks_line(open_provider(name, clock))
    except UserError:
        return  # said when its machine was to be ended
    if line:
        print(line)


def _loud(run: Path, unconfirmed: list[Rented], ledger: Ledger, clock: Clock) -> int:
    names = ", ".join(f"{m.machine_id or m.tag} at {m.provider}" for m in unconfirmed)
    hourly = sum((m.usd_per_hr for m in unconfirmed), ZERO)
    body = (
        f"{names} could not be seen to be gone; it may bill {dollars(hourly)}/h. Look at "
        f"the provider's own page now, then run `x1 teardown {run}` again."
    )
    say(f"NOT CONFIRMED: {body}")
    notifier = Notifier(addresses(os.environ), ledger, clock, run=run.name)
    notifier.alert(f"unconfirmed-{stamp(clock.now())}", f"X1 {run.name}: a machine may still run", body)
    notifier.close(20.0)
    return FAULT


def said_yes(question: str) -> bool:
    """A person's word at the terminal; no word is a no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 teardown"))
