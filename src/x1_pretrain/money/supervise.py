"""`x1 supervise`: sidecar and trainer, kept alive; relaunched when it is safe, never when a limit stopped it.

x1 supervise --provider local --rate-usd-per-hr 0.10 -- --config c.yaml --data-dir D --run-dir R \\
    --budget-cap-usd 35 --budget-curr-cost-uri R/budget.json

What follows `--` are the trainer's own options. Exit code 75 and a killed trainer are relaunched; 0, 1, 2,
76, 77 and 78 end it. SIGTERM goes on to the trainer, which saves. When the supervisor is killed its children
get SIGTERM from the kernel, so that nothing trains unwatched.

A run with a mirror that comes to an empty machine brings its ledger along: it is fetched before anything
counts, and what the launcher knows of earlier machines (`--ended`) goes into it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import load_config, parse_assignment
from x1_pretrain.errors import FAULT, FINISHED, INTERRUPTED, REFUSED, UserError
from x1_pretrain.money import ended, latch
from x1_pretrain.money.budget_file import Address
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.ledger import NAME, Ledger, LedgerError, Row, read_rows
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.trainer_options import mirror_of, trainer_option, trainer_options, without_option
from x1_pretrain.records.processes import dies_with_parent
from x1_pretrain.records.run_folder import read_jsonl

GRACE_S = 45.0  # real seconds a child gets after SIGTERM: a checkpoint, and some
FIRST_READING_S = 180.0  # real seconds until the sidecar must have written its file
SIDECAR_PAUSE_S = 2.0
RAISE = "--raise-ceiling-to"
NO_PROGRESS = 3  # relaunches in a row that got no further
LEDGER_PATIENCE_S = 300.0  # with a store that does not answer, before anything starts


@dataclass
class Supervisor:
    """Two children, one loop."""

    folder: Path
    budget: Path
    trainer_command: Sequence[str]
    sidecar_command: Sequence[str]
    ledger: Ledger
    clock: Clock
    max_relaunches: int = 20
    pause_s: float = 5.0
    grace_s: float = GRACE_S
    relaunches: int = 0
    stuck: int = 0
    asked: str | None = None
    down_since_s: float | None = None
    batches: int = 0  # sessions that had got ready when the last one ended
    trainer: subprocess.Popen[bytes] | None = None
    sidecar: subprocess.Popen[bytes] | None = None
    sidecar_started: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Until the run ends, a limit stops it, or somebody asks. The trainer's last exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_request)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            if not self._first_reading():
                return INTERRUPTED if self.asked else REFUSED
            return self._until_done()
        finally:
            self._end(self.trainer)
            self._end(self.sidecar)

    def _until_done(self) -> int:
        raises = trainer_option(self.trainer_command, RAISE) is not None
        while not self.asked:
            if (stop := latch.in_force(self.folder, self.rows())) and not raises:
                say(str(latch.refusal(self.folder, stop)))
                return REFUSED
            step = last_step(self.folder)
            code = self._train()
            if (last := self._verdict(code, last_step(self.folder) > step)) is not None:
                return last
            self.trainer_command, raises = without_option(self.trainer_command, RAISE), False
            self.relaunches += 1
            self._pause()
        return INTERRUPTED

    def _train(self) -> int:
        """One session of the trainer; its exit code."""
        self.trainer = start(self.trainer_command)
        if self.asked:  # while it was being started
            self.trainer.send_signal(signal.SIGTERM)
        while (code := self.trainer.poll()) is None:
            self._keep_sidecar()
            self._note_return()
            time.sleep(0.1)
        self._note_return()  # it may have been short
        self.down_since_s, self.batches = self.clock.steady_s(), batches(self.folder)
        self._note("session_end", exit_code=code, step=last_step(self.folder))
        return code

    def rows(self) -> list[Row]:
        """A damaged ledger is the trainer's to refuse."""
        try:
            return self.ledger.rows()
        except LedgerError:
            return []

    def _note(self, event: str, message: str = "", **fields: Any) -> None:
        """A ledger that can't be written is said, and ends nothing."""
        try:
            self.ledger.append(event, message, **fields)
        except LedgerError as error:
            say(str(error))

    def _verdict(self, code: int, moved: bool) -> int | None:
        """The code to leave with, or None to relaunch."""
        killed = code < 0
        self.stuck = 0 if moved else self.stuck + 1
        if self.asked:
            return INTERRUPTED if killed else code
        if code != INTERRUPTED and not killed:
            return code
        why = f"killed by {signal.Signals(-code).name}" if killed else f"exit code {code}"
        if self.relaunches >= self.max_relaunches:
            say(f"the trainer ended ({why}) and was relaunched {self.relaunches} times already: giving up")
            return FAULT if killed else code
        if self.stuck >= NO_PROGRESS:
            say(f"the trainer ended ({why}); {self.stuck} sessions in a row made no step: giving up")
            return FAULT if killed else code
        said = f"the trainer ended ({why}): relaunch {self.relaunches + 1} of at most {self.max_relaunches}"
        self._note("relaunch", said, exit_code=code)
        say(said)
        return None

    def _pause(self) -> None:
        end = time.monotonic() + self.clock.real_s(self.pause_s)
        while time.monotonic() < end and not self.asked:
            time.sleep(0.05)

    def _note_return(self) -> None:
        """How long nothing was learned: from the trainer's end to the first row of its next session."""
        if self.down_since_s is None or not self.relaunches:
            return
        if batches(self.folder) > self.batches:
            down_s = self.clock.steady_s() - self.down_since_s
            self._note("back", f"training again after {down_s:.0f} s", down_s=round(down_s, 1))
            self.down_since_s = None

    # --------------------------------------------------------------------------------------------------------
    # The sidecar

    def _first_reading(self) -> bool:
        """Nothing trains before somebody counts."""
        before = stamp_of(self.budget)
        self._start_sidecar()
        end = time.monotonic() + FIRST_READING_S
        while stamp_of(self.budget) == before:
            if self.sidecar is not None and self.sidecar.poll() is not None:
                say(f"the sidecar ended with exit code {self.sidecar.returncode}, see above: nothing starts")
                return False
            if self.asked:
                say(f"{self.asked}: nothing was started")
                return False
            if time.monotonic() > end:
                say(f"the sidecar wrote no {self.budget} in {FIRST_READING_S:.0f} s: nothing starts")
                return False
            time.sleep(0.05)
        return True

    def _start_sidecar(self) -> None:
        self.sidecar = start(self.sidecar_command)
        self.sidecar_started = time.monotonic()

    def _keep_sidecar(self) -> None:
        """A dead sidecar comes back; the guard counts on meanwhile."""
        if self.sidecar is None or self.sidecar.poll() is None:
            return
        if time.monotonic() - self.sidecar_started < SIDECAR_PAUSE_S:
            return
        code = self.sidecar.returncode
        self._note("sidecar", f"the sidecar ended with exit code {code}: started again", exit_code=code)
        self._start_sidecar()

    # --------------------------------------------------------------------------------------------------------
    # Signals and ends

    def _on_request(self, number: int, _: object) -> None:
        self.asked = signal.Signals(number).name
        if self.trainer is not None and self.trainer.poll() is None:
            self.trainer.send_signal(signal.SIGTERM)

    def _end(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start(command: Sequence[str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """A child in a group of its own (Ctrl-C reaches it through us), told to end when we are gone."""
    return subprocess.Popen(
        command,
        env={**os.environ, "X1_UNATTENDED": "1"},
        start_new_session=True,
        preexec_fn=dies_with_parent(signal.SIGTERM),
        stdout=log,
        stderr=log,
    )


def batches(folder: Path) -> int:
    return sum(e.get("event") == "batch" for e in read_jsonl(folder / "events.jsonl").rows)


def last_step(folder: Path) -> int:
    steps = [r.get("step", 0) for r in read_jsonl(folder / "metrics.jsonl").rows]
    return max((s for s in steps if isinstance(s, int)), default=0)


def stamp_of(file: Path) -> object:
    try:
        return json.loads(file.read_bytes()).get("last_update_utc"), file.stat().st_mtime_ns
    except (OSError, ValueError, AttributeError):
        return None


def say(text: str) -> None:
    print(f"x1 supervise: {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# The command


def main(
    context: typer.Context,
    provider: Annotated[
        str, typer.Option(help="who is asked for the price: lambda, runpod, local, fake")
    ] = "local",
    instance_id: Annotated[str | None, typer.Option(help="this machine, as the provider names it")] = None,
    tag: Annotated[str | None, typer.Option(help="the name it was launched under, instead of its id")] = None,
    rate_usd_per_hr: Annotated[float | None, typer.Option(help="what an hour costs, all in")] = None,
    since: Annotated[str | None, typer.Option(help="billed since, 2026-05-23T02:00:00Z")] = None,
    every_s: Annotated[float, typer.Option(min=1, help="seconds between the sidecar's polls")] = 300.0,
    disk_gib: Annotated[int, typer.Option(min=0, help="disk billed with the machine")] = 0,
    tax: Annotated[float, typer.Option(min=0, max=1, help="on top of prices: 0.10 is 10 %")] = 0.0,
    terminate: Annotated[
        bool, typer.Option("--terminate", help="the sidecar may end this machine at the ceiling")
    ] = False,
    spent_before_usd: Annotated[
        float, typer.Option(min=0, help="what the run had cost before, where its ledger is elsewhere")
    ] = 0.0,
    ended_: Annotated[
        list[str],
        typer.Option("--ended", metavar="TAG=TIME=USD", help="a machine of the run that is gone; repeatable"),
    ] = [],  # noqa: B006
    max_relaunches: Annotated[int, typer.Option(min=0, help="after exit code 75 or a kill")] = 20,
    pause_s: Annotated[float, typer.Option(min=0, help="seconds before a relaunch")] = 5.0,
) -> int:
    """Sidecar and trainer, kept alive: x1 supervise [OPTIONS] -- TRAINER OPTIONS"""
    arguments = list(context.args)
    config = trainer_option(arguments, "--config")
    cap, uri = (
        trainer_option(arguments, "--budget-cap-usd"),
        trainer_option(arguments, "--budget-curr-cost-uri"),
    )
    if config is None or cap is None:
        raise UserError(
            "x1 supervise [OPTIONS] -- TRAINER OPTIONS: the trainer's options need --config FILE and "
            "--budget-cap-usd USD"
        )
    loaded = load_config(
        Path(config), dict(parse_assignment(text) for text in trainer_options(arguments, "--set"))
    )
    folder = Path(trainer_option(arguments, "--run-dir") or loaded.folder)
    budget = Address(uri).path if uri else folder / "budget.json"
    if budget is None:
        raise UserError(
            f"--budget-curr-cost-uri {Address(str(uri))}: x1 supervise keeps this file itself; give a path"
        )
    if uri is None:
        arguments += ["--budget-curr-cost-uri", str(budget)]
    clock = Clock.from_environment()
    ledger = Ledger(folder / NAME, clock)
    gone = [ended.read(text) for text in ended_]
    bring_ledger(loaded, arguments, folder)
    ended.write((one for one in gone if one.tag != tag), ledger)
    if tag is not None and any(
        r["event"] == "adopted" and r.get("tag") == tag for r in read_rows(ledger.file)
    ):
        arguments = without_option(arguments, RAISE)  # a reboot repeats the script, not the person
    raised = trainer_option(arguments, RAISE)
    sidecar = [sys.executable, "-m", "x1_pretrain.budget_guard", "--run-dir", str(folder)]
    sidecar += ["--output", str(budget), "--cap-usd", raised or cap, "--provider", provider]
    sidecar += ["--every-s", str(every_s), "--disk-gib", str(disk_gib), "--tax", str(tax)]
    for flag, value in (("--instance-id", instance_id), ("--tag", tag), ("--since", since)):
        sidecar += [flag, value] if value is not None else []
    if rate_usd_per_hr is not None:
        sidecar += ["--rate-usd-per-hr", str(rate_usd_per_hr)]
    sidecar += ["--spent-before-usd", str(spent_before_usd)] if spent_before_usd else []
    sidecar += ["--terminate"] if terminate else []
    supervisor = Supervisor(
        folder=folder,
        budget=budget,
        trainer_command=[sys.executable, "-m", "x1_pretrain.train", *arguments],
        sidecar_command=sidecar,
        ledger=ledger,
        clock=clock,
        max_relaunches=max_relaunches,
        pause_s=pause_s,
        grace_s=GRACE_S + (loaded.mirror.grace_s if mirror_of(loaded, arguments) else 0),
    )
    code = supervisor.run()
    if code == FINISHED:
        say("the run is finished")
    if not supervisor.asked:
        tell_end(folder, ledger, clock, code)
    return code


# ------------------------------------------------------------------------------------------------------------
# The ledger of a run that comes from elsewhere


def bring_ledger(config: RunConfig, arguments: Sequence[str], folder: Path) -> None:
    """What the run has cost elsewhere, before anybody counts here; together with what this folder knows."""
    mirrored = mirror_of(config, arguments)
    if mirrored is None:
        return
    from x1_pretrain.mirror.restore import ledger_from

    uri, name = mirrored
    try:
        rows = ledger_from(uri, config.mirror.endpoint, name, folder, LEDGER_PATIENCE_S)
    except UserError as error:
        if not (folder / NAME).exists():
            raise
        say(f"{error}; going on with the ledger that is here")
        return
    if rows:
        say(f"{rows} rows of the ledger are from {uri}/{name}")


ENDS = {0: "finished", 76: "stopped by the budget", 77: "stopped at once by the budget"}


def tell_end(folder: Path, ledger: Ledger, clock: Clock, code: int) -> None:
    """The machine bills on when its run is over: somebody should know."""
    notifier = Notifier(addresses(os.environ), ledger, clock, run=folder.name, say=say)
    if notifier.channels:
        what = ENDS.get(code, f"ended with exit code {code}")
        body = (
            "Its machine is there, and may bill, until somebody ends it: `x1 teardown` where it was launched."
        )
        notifier.alert(f"end-{stamp(clock.now())}", f"X1 {folder.name}: the run is over ({what})", body)
    notifier.close(15.0)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 supervise"))
