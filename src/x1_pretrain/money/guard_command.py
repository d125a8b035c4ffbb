"""`x1 guard RUN`: from off the machine, see what it costs and that it ends.

The same counting as the sidecar's, with the provider's own word, on a laptop, a cron job or a small server.
It ends the machine before the ceiling is passed, and one that stopped working after a while, whatever runs
there. Its numbers are in guard.json; budget.json is the sidecar's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FINISHED, INTERRUPTED, UserError
from x1_pretrain.money import latch, pace
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.audit import PROOF
from x1_pretrain.money.budget_file import BudgetFile
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, duration_s, stamp
from x1_pretrain.money.guard import ZERO, dollars, minutes
from x1_pretrain.money.ledger import NAME, Ledger, LedgerError, Row, find_ledger
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.providers.opened import open_provider
from x1_pretrain.money.sidecar import Request, Sidecar
from x1_pretrain.money.standing import Mirror, Standing, verdict
from x1_pretrain.money.teardown import Ending, end_loudly

DRIFT = Decimal("1.2")  # dearer than this times the agreed price is a person's question
LATE = 1.25  # so much longer than planned, and somebody should look
SILENT_S = 1800.0  # without a word of the mirror, and somebody should look
LOG = "guard.log"  # in the run folder, once the terminal is gone
LOST_FOR_S = 30.0  # a lost machine whose run can go on elsewhere: seen so at two looks


@dataclass
class OuterGuard:
    """Poll until the machine is gone; then say what it came to."""

    folder: Path
    sidecar: Sidecar
    clock: Clock
    linger_s: float
    agreed_usd_per_hr: Decimal = ZERO  # at the launch
    lost_since_s: float | None = None
    mirror: Mirror | None = None  # of the run: what is on the machine is there too
    lost: bool = False  # it was ended because it works no more

    def run(self, stop: Request) -> int:
        while not stop.is_set():
            self._turn()
            self.sidecar.read_ledger()
            if self.sidecar.machine.ended and not self._others():
                return FINISHED
            if self.sidecar.machine.ended is None:
                self.lost = self._over()
            if self.sidecar.machine.ended or self.lost:
                return end_loudly(self.folder, self.clock)
            stop.wait(self.clock.real_s(self._next_look_s()))
        print(
            f"the guard ends; the machine goes on and is billed: `x1 guard {self.folder}` takes it up again, "
            f"`x1 teardown {self.folder}` ends it",
            flush=True,
        )
        return INTERRUPTED

    def _others(self) -> list[Rented]:
        """Earlier machines of the run that nobody has seen to end."""
        return [m for m in self.sidecar.known.open_machines() if m.tag != self.sidecar.machine.tag]

    def _turn(self) -> None:
        try:
            said = self.sidecar.poll()
        except (OSError, UserError) as error:
            print(f"guard: {error}", flush=True)
            return
        self._ask_a_person(said)
        projected = f", {dollars(said.projected_total_usd)} projected" if said.projected_total_usd else ""
        print(
            f"{self.clock.now():%H:%MZ}  {dollars(said.spent_usd)} of {dollars(self.sidecar.ceiling_usd)}"
            f"{projected}  {dollars(said.rate_usd_per_hr or ZERO)}/h  {said.source}",
            flush=True,
        )

    def _ask_a_person(self, said: BudgetFile) -> None:
        """What only a person can decide: dearer than agreed (a trainer's own guard here asks that by itself),
        longer than planned."""
        agreed, now = self.sidecar.machine.usd_per_hr, said.rate_usd_per_hr or ZERO
        name, end = self.folder.name, f"`x1 teardown {self.folder}` ends it; the ceiling holds meanwhile."
        if not pace.trains_here(self.folder) and now > DRIFT * self.agreed_usd_per_hr:
            was = dollars(self.agreed_usd_per_hr)
            body = f"The machine costs {dollars(now)}/h, agreed were {was}/h. {end}"
            self._tell(f"guard-drift-{agreed:f}", f"X1 {name}: dearer than agreed", body)
        planned_s = self.sidecar.planned_s
        if planned_s is not None and self.sidecar.elapsed_s() > LATE * planned_s + self.linger_s:
            body = (
                f"It was planned to take {minutes(planned_s)}, and its machine still runs. Is it done? {end}"
            )
            self._tell("guard-late", f"X1 {name}: longer than planned", body)

    def _tell(self, key: str, title: str, body: str) -> None:
        if self.sidecar.notifier.alert(key, title, body):
            print(f"{title}: {body}", flush=True)

    def _over(self) -> bool:
        """It is gone, as two polls say, or stopped working so long ago that nobody will fetch anything from
        it."""
        if self.sidecar.absent >= 2:
            return True
        told = self.mirror.look() if self.mirror else None
        self._heed(told)
        if not (self.sidecar.lost or self._idles(told)):
            self.lost_since_s = None
            self._ask_about_silence(told)
            return False
        linger_s = self._linger_s(told)
        if self.lost_since_s is None:
            self.lost_since_s = self.clock.steady_s()
            print(self._why(told, linger_s), flush=True)
        return self.clock.steady_s() - self.lost_since_s >= linger_s

    def _heed(self, told: Standing | None) -> None:
        """What the machine's own ledger counts beside the machine, as its mirror has it, counts here too."""
        if told is not None and told.spent_usd is not None and self.sidecar.spent_usd:
            self.sidecar.ahead_usd += max(ZERO, told.spent_usd - self.sidecar.spent_usd)

    def _idles(self, told: Standing | None) -> bool:
        """By the mirror: a machine whose trainer has left may look as well as ever to its provider."""
        if self.mirror is None or told is None or told.writing:
            return False
        before = self.mirror.before
        return before is None or told.epoch > before.epoch

    def _linger_s(self, told: Standing | None) -> float:
        """Nothing need be fetched from a lost machine whose run goes on from its mirror."""
        if self.mirror is None or self.mirror.trouble or not self.sidecar.lost:
            return self.linger_s
        if verdict(told, self.mirror.before)[0] != "move":
            return self.linger_s
        return min(LOST_FOR_S, self.linger_s)

    def _ask_about_silence(self, told: Standing | None) -> None:
        """It may train on, and can't reach its mirror; what it does is then lost with its machine."""
        if told is None or not told.writing or told.silent_s is None or told.silent_s < SILENT_S:
            return
        body = (
            f"Its provider says that the machine works; its mirror was last written "
            f"{minutes(told.silent_s)} ago, at step {told.step:,}. `x1 teardown {self.folder}` ends it."
        )
        self._tell("guard-silent", f"X1 {self.folder.name}: nothing is mirrored", body)

    def _next_look_s(self) -> float:
        usual_s = self.sidecar.next_poll_s()
        return usual_s if self.lost_since_s is None or self.mirror is None else min(usual_s, LOST_FOR_S)

    def _why(self, told: Standing | None, linger_s: float) -> str:
        """What it stopped for, where that is known here, and what comes next."""
        stop = latch.read(self.folder)
        why = f"the run was stopped: {stop.reason}" if stop else "it works no more"
        if self.mirror is not None and not self.mirror.trouble:
            why = f"the machine works no more: {verdict(told, self.mirror.before)[1]}"
        then = f"`x1 teardown {self.folder}` ends it now"
        if stop or (told is not None and told.state == "stopped"):
            then += "; to go on later: x1 launch with --raise-ceiling-to USD"
        return f"{why}; the machine will be ended in {minutes(linger_s)}. {then}"


def guard_machine(folder: Path, clock: Clock, ceiling_usd: Decimal, poll_s: float, linger_s: float) -> int:
    """Until the run's machine is gone."""
    return watched(folder, clock, ceiling_usd, poll_s, linger_s)[0]


def watched(
    folder: Path,
    clock: Clock,
    ceiling_usd: Decimal,
    poll_s: float,
    linger_s: float,
    mirror: Mirror | None = None,
) -> tuple[int, bool]:
    """The exit code, and whether the machine was ended as lost: not by the ceiling, not by a person."""
    ledger = Ledger(folder / NAME, clock)
    machines = account(ledger.rows()).open_machines()
    if not machines:
        print(f"{folder}: no machine is open in its ledger")
        return FINISHED, False
    sidecar = _sidecar(ledger, machines[-1], clock, ceiling_usd, poll_s)
    agreed = launched_with(ledger.rows(), machines[-1].tag, "usd_per_hr")
    guard = OuterGuard(folder, sidecar, clock, linger_s, agreed, mirror=mirror)
    stop, terminals = Request(), [number for number in (1, 2) if os.isatty(number)]
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: hung_up(folder / LOG, terminals))
    code = guard.run(stop)
    proof = f"; proof in {folder / PROOF}" if code == FINISHED else ""
    print(f"{dollars(sidecar.spent_usd)} in all{proof}", flush=True)
    sidecar.notifier.close(20.0)
    for number, handler in before.items():
        signal.signal(number, handler)
    if guard.lost and stop.is_set() and mirror is not None:  # asked for no later than now
        code = INTERRUPTED
        print("interrupted: it is not moved; the same `x1 launch` goes on from its mirror", flush=True)
    return code, guard.lost and not stop.is_set()


def hung_up(log: Path, terminals: Sequence[int]) -> None:
    """The terminal was closed. Somebody still has to watch the machine: the words go into a file."""
    try:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(file, number)
    said = f"{stamp(datetime.now(UTC))} the terminal is gone, the guard goes on; `kill {os.getpid()}` ends it"
    with suppress(OSError):  # a full disk
        os.write(file, f"{said}\n".encode())
    os.close(file)


def _sidecar(ledger: Ledger, machine: Rented, clock: Clock, ceiling_usd: Decimal, poll_s: float) -> Sidecar:
    """Of the machine that is guarded, as it was launched."""
    folder, rows = ledger.file.parent, ledger.rows()
    sidecar = Sidecar(
        folder=folder,
        output=folder / "guard.json",
        provider=open_provider(machine.provider, clock),
        machine=machine,
        ceiling_usd=ceiling_usd,
        ledger=ledger,
        clock=clock,
        notifier=Notifier(addresses(os.environ), ledger, clock, run=folder.name),
        left_s=lambda: pace.left_s(folder, clock.speed) if pace.trains_here(folder) else None,
        run_id=folder.name,
        poll_s=poll_s,
        storage_usd_per_hr=launched_with(rows, machine.tag, "storage_usd_per_hr"),
        tax=launched_with(rows, machine.tag, "tax"),
        before_usd=spent_before(rows, machine.tag),
        planned_s=planned_s(rows),
        may_terminate=True,
        terminate=lambda _: _end(sidecar),
    )
    return sidecar


def _end(sidecar: Sidecar) -> None:
    """All of the run's machines; with a ledger that can't be read, at least the one that is guarded."""
    try:
        end_loudly(sidecar.folder, sidecar.clock)
    except LedgerError as error:
        print(f"guard: {error}", flush=True)
        Ending(sidecar.provider, sidecar.machine, sidecar.ledger, sidecar.clock, print).run()


def launched_with(rows: list[Row], tag: str, name: str) -> Decimal:
    """What the launch kept of its price's parts: tax and storage come on top of what a provider states."""
    intent = next((r for r in rows if r["event"] == "intent" and r.get("tag") == tag), {})
    return Decimal(str(intent.get(name, 0)))


def spent_before(rows: list[Row], tag: str) -> Decimal:
    """What the gate counted before this machine, also where this ledger knows no more of it: the run may have
    been elsewhere. A correction by a person since then says it anew."""
    spent, launched = ZERO, False
    for row in rows:
        if row["event"] == "intent" and row.get("tag") == tag:
            launched = True
        elif row["event"] == "gate" and "before_usd" in row and not launched:
            spent = Decimal(str(row["before_usd"])) if row.get("verdict") == "passed" else spent
        elif row["event"] == "correction" and launched:
            return ZERO
    return spent if launched else ZERO


def planned_s(rows: list[Row]) -> float | None:
    """How long the gate said it takes."""
    hours = [
        r["hours"] for r in rows if r["event"] == "gate" and r.get("verdict") == "passed" and r.get("hours")
    ]
    return float(hours[-1]) * 3600 if hours else None


def main(
    run: Annotated[Path, typer.Argument(help="the run folder that was launched from here")],
    every_s: Annotated[float, typer.Option(min=1, help="seconds between polls")] = 300.0,
    linger: Annotated[
        str, typer.Option(help="end a machine that stopped working after so long: 15m, 1h")
    ] = "15m",
) -> int:
    """From off the machine: see what it costs, and that it ends."""
    clock = Clock.from_environment()
    linger_s = duration_s(linger, "--linger")
    folder = find_ledger(run, "name the folder of a run that was launched from here")
    ceiling = account(Ledger(folder / NAME, clock).rows()).ceiling_usd
    if ceiling is None:
        raise UserError(f"{folder / NAME}: no ceiling on record; launch the run with x1 launch")
    return guard_machine(folder, clock, ceiling, every_s, linger_s)


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 guard"))
