"""A run whose machine is lost goes on at the next provider: same ceiling, same price gate, same ledger.

Only with a mirror. The lost machine is ended first, and seen to be gone; then the price of what is left is
agreed to as at the launch, by the terms that a person agreed to then. While a machine works and is guarded,
Ctrl-C ends the guard alone; at any other moment it ends whatever is rented.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from decimal import Decimal

from x1_pretrain.errors import FAULT, FINISHED, REFUSED, RefusedError, UserError
from x1_pretrain.money import ended, gate, latch
from x1_pretrain.money.account import Account, Rented, account
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import ZERO, cost, dollars, minutes
from x1_pretrain.money.guard_command import watched
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.machine_jobs import JobOptions
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.pricing import Wanted, agree_on_price
from x1_pretrain.money.providers.base import Offer, Provider
from x1_pretrain.money.renting import BusyError, interrupted, interruptible, one_launch, rent, wait_active
from x1_pretrain.money.standing import Mirror, Standing, published_nothing, verdict
from x1_pretrain.money.teardown import end_loudly, say

MOST_MOVES = 5
END_TRIES = 4  # of a quarter of an hour each
ASK_MIRROR_S, ASK_MIRROR_FOR_S = 60.0, 3600.0
LOOK_FOR_MACHINE_S = 1800.0  # at least so long, also without --wait: nobody is there to try again
RENT_AGAIN_S = 60.0
MOST_SILENT = 2  # machines in a row that worked and published nothing: the next would do no better


class Over(Exception):
    """The run is not moved any more."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code, self.said = code, said


@dataclass
class Mover:
    """`run()` guards the machine that was just launched, and those after it."""

    wanted: Wanted
    providers: list[Provider]  # as the user listed them
    options: JobOptions
    ledger: Ledger
    clock: Clock
    mirror: Mirror
    place: int = 0  # of the provider that has the machine
    most: int = MOST_MOVES
    moves: int = 0  # machines that were rented
    silent: int = 0  # in a row, that worked and published nothing
    busy: bool = False  # another launch here is being waited for
    refused_s: float | None = None  # since when no request brought a machine

    def run(self, up: bool = True) -> int:
        """Until the run is over, its machines gone. Not `up`: the first did not come up, and was ended."""
        try:
            with interruptible():
                return self._run(up)
        except Over as over:
            self._tell(over)
            return over.code
        except KeyboardInterrupt:
            return interrupted(self.wanted.config.folder, self.clock)
        except BaseException as error:
            say(f"{type(error).__name__}: {error}; ending what is rented")
            end_loudly(self.wanted.config.folder, self.clock)
            raise

    def _run(self, up: bool) -> int:
        folder, wanted = self.wanted.config.folder, self.wanted
        while True:
            code = FINISHED if up else end_loudly(folder, self.clock)
            if up:
                code, lost = watched(
                    folder, self.clock, wanted.ceiling_usd, wanted.poll_s, wanted.linger_s, self.mirror
                )
                if not lost:
                    return code
            self._end_for_sure(code)
            self._move(worked=up)
            up = True

    def _end_for_sure(self, code: int) -> None:
        """Two machines of one run never bill at once."""
        for _ in range(END_TRIES - 1):
            if code == FINISHED:
                return
            code = end_loudly(self.wanted.config.folder, self.clock)
        if code != FINISHED:
            raise Over(FAULT, "the lost machine could not be seen to be gone: no other is rented")

    def _move(self, worked: bool) -> None:
        """The next machine, up and running."""
        gone = account(self.ledger.rows()).machines[-1]
        now, self.refused_s, self.busy = self._standing(), None, False
        if worked:
            self.silent = self.silent + 1 if published_nothing(now, self.mirror.before) else 0
        while True:
            self._refuse(now)
            wanted = replace(self.wanted, standing=now, wait_s=max(self.wanted.wait_s, LOOK_FOR_MACHINE_S))
            found, offer, priced = self._agree(wanted)
            machine = self._rented(wanted, found, offer, priced, now)
            if machine is not None:
                self._moved(gone, machine, priced, now)
                return
            self.clock.sleep(RENT_AGAIN_S)
            now = self._standing()

    def _refuse(self, now: Standing | None) -> None:
        """What keeps it from going on elsewhere."""
        if stop := latch.in_force(self.wanted.config.folder, self.ledger.rows()):
            raise Over(FINISHED, f"the run was stopped: {stop.reason}; it is not moved")
        do, why = verdict(now, self.mirror.before)
        if do != "move":
            raise Over(FINISHED if do == "over" else FAULT, f"{why}; it is not moved")
        if self.moves >= self.most:
            raise Over(FAULT, f"{why}; it was moved {self.moves} times already (--moves)")
        if self.silent >= MOST_SILENT:
            said = f"{self.silent} machines in a row worked, and published nothing: look at their start-up"
            raise Over(FAULT, f"{said}; it is not moved")
        self._refuse_other_writer(now)

    def _standing(self) -> Standing | None:
        """The mirror's word is waited for: without it nobody knows what is left to do."""
        begun_s = self.clock.steady_s()
        while True:
            now = self.mirror.look()
            if not self.mirror.trouble:
                return now
            if self.clock.steady_s() - begun_s > ASK_MIRROR_FOR_S:
                raise Over(FAULT, f"the mirror did not answer for an hour ({self.mirror.trouble})")
            self.clock.sleep(ASK_MIRROR_S)

    def _refuse_other_writer(self, now: Standing | None) -> None:
        """The lost machine is gone, so whoever still writes is another."""
        if now is None or not now.writing or (now.silent_s is not None and now.silent_s > now.stale_s):
            return
        self.clock.sleep(1.5 * self.wanted.config.mirror.every_s * self.clock.speed)
        later = self.mirror.look()
        if later is not None and later.writing and (later.epoch, later.beat) != (now.epoch, now.beat):
            raise Over(REFUSED, f"the run is being trained on {later.host}, which was not launched from here")

    def _agree(self, wanted: Wanted) -> tuple[Provider, Offer, gate.Quote]:
        following = self.place + 1
        order = [self.providers[(following + k) % len(self.providers)] for k in range(len(self.providers))]
        try:
            return agree_on_price(wanted, order, self.ledger, self.clock)
        except RefusedError as error:
            raise Over(REFUSED, str(error)) from None
        except UserError as error:
            raise Over(FAULT, str(error)) from None

    def _rented(
        self, wanted: Wanted, provider: Provider, offer: Offer, priced: gate.Quote, now: Standing | None
    ) -> Rented | None:
        """A machine that runs. One that does not is ended, and the next provider is asked."""
        folder = wanted.config.folder
        try:
            with one_launch(folder.parent):
                self.ledger.append("gate", gate.sentence(priced), verdict="passed", **priced.fields())
                options = self._options(priced, now)
                self.place = next(k for k, one in enumerate(self.providers) if one is provider)
                machine = rent(wanted, provider, offer, priced, self.ledger, self.clock, options)
        except BusyError as error:
            if not self.busy:
                say(f"{error}; waiting for it")
            self.busy = True
            return None
        except UserError as error:
            self._not_made(str(error))
            return None
        self.moves += 1
        try:
            if wait_active(provider, machine, self.ledger, self.clock):
                return machine
            said = f"{machine.machine_id} at {provider.label} does not run"
        except UserError as error:
            said = str(error)
        say(f"{said}: ending it, and on to the next")
        self._end_for_sure(end_loudly(folder, self.clock))
        return None

    def _options(self, priced: gate.Quote, now: Standing | None) -> JobOptions:
        """What the next machine is told."""
        told = tuple(map(str, ended.of(account(self.ledger.rows()))))
        return replace(
            self.options, before_usd=round(priced.spent_usd, 4), ended=told, raised_usd=None,
            data_from_mirror=now is not None and now.has_data,
        )  # fmt: skip

    def _not_made(self, said: str) -> None:
        """A request that brought no machine is no move; but nobody asks for ever."""
        say(f"{said}: on to the next")
        self._end_for_sure(end_loudly(self.wanted.config.folder, self.clock))
        now_s, for_s = self.clock.steady_s(), max(self.wanted.wait_s, LOOK_FOR_MACHINE_S)
        self.refused_s = now_s if self.refused_s is None else self.refused_s
        if now_s - self.refused_s >= for_s:
            raise Over(FAULT, f"no machine could be had for {minutes(for_s)}: {said}")

    def _moved(self, gone: Rented, machine: Rented, priced: gate.Quote, before: Standing | None) -> None:
        """On record, with what it cost that nothing was learned."""
        since_s = self._idle_since_s(gone, before)
        self.mirror.before = before
        now, known = self.clock.now(), account(self.ledger.rows())
        down_s, paid_usd = max(0.0, now.timestamp() - since_s), idle_usd(gone, since_s)
        paid_usd += sum((m.spent_by(now) for m in after(known, gone)), ZERO)
        lost = before.lost_steps if before else 0
        at = before.good_step if before else 0
        again = f", {lost:,} steps to do again" if lost else ""
        spent_usd = max(known.known_usd, known.spent_by(now), priced.spent_usd)
        said = (
            f"moved ({self.moves} of at most {self.most}): {gone.tag} at {gone.provider} is gone, "
            f"{machine.tag} at {machine.provider} goes on from step {at:,}{again}; nothing learned for "
            f"{minutes(down_s)}, {dollars(paid_usd)}; {dollars(spent_usd)} of "
            f"{gate.exact(priced.ceiling_usd)} spent so far"
        )
        fields = {"from": gone.tag, "to": machine.tag, "down_s": round(down_s, 1), "lost_steps": lost}
        if before and before.spent_usd is not None and before.step:
            fields["lost_usd"] = round(before.spent_usd * lost / before.step, 6)
        self.ledger.append("moved", said, **fields, downtime_usd=round(paid_usd, 6))
        say(said)
        self._alert("moved to another machine", said)

    def _idle_since_s(self, gone: Rented, before: Standing | None) -> float:
        """The mirror's last sign of life, by its store's clock; else the lost machine's end; one that
        published nothing was idle all the time."""
        told, began_s = self.mirror.look() or before, gone.since.timestamp()
        if published_nothing(before, self.mirror.before):
            return began_s
        silent_s = told.silent_s if told and before and told.epoch == before.epoch else None
        if silent_s is None:
            return (gone.ended or gone.since).timestamp()
        return max(began_s, self.clock.now().timestamp() - max(0.0, silent_s) * self.clock.speed)

    def _tell(self, over: Over) -> None:
        say(over.said)
        if over.code != FINISHED:
            self._alert("not moved", f"{over.said}. Its machines are gone, its mirror is there.")

    def _alert(self, title: str, body: str) -> None:
        notifier = Notifier(addresses(os.environ), self.ledger, self.clock, run=self.ledger.file.parent.name)
        key = f"{title}-{stamp(self.clock.now())}"
        notifier.alert(key, f"X1 {self.wanted.config.name}: {title}", body)
        notifier.close(20.0)


def idle_usd(gone: Rented, since_s: float) -> Decimal:
    """What a lost machine still cost after its last sign of life."""
    if gone.ended is None:
        return ZERO
    return cost(gone.usd_per_hr, max(0.0, gone.ended.timestamp() - since_s))


def after(known: Account, gone: Rented) -> list[Rented]:
    """The machines that were rented for a lost one."""
    place = next(k for k, machine in enumerate(known.machines) if machine.tag == gone.tag)
    return known.machines[place + 1 :]
