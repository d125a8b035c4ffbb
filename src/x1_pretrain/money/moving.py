"""A run whose machine is lost goes on at the next provider: same ceiling, same price gate, same ledger.

Only with a mirror. The lost machine is ended first, and seen to be gone; then the price of what is left is
agreed to as at the launch, by the terms that a person agreed to then. Ctrl-C ends whatever is rented.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal

from x1_pretrain.errors import FAULT, FINISHED, INTERRUPTED, REFUSED, RefusedError, UserError
from x1_pretrain.money import ended, gate
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.channels import addresses
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.guard import ZERO, cost, dollars, minutes
from x1_pretrain.money.guard_command import watched
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.machine_jobs import JobOptions
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.pricing import Wanted, agree_on_price
from x1_pretrain.money.providers.base import Offer, Provider
from x1_pretrain.money.renting import one_launch, rent, wait_active
from x1_pretrain.money.standing import Mirror, Standing, verdict
from x1_pretrain.money.teardown import end_loudly

MOST_MOVES = 5
END_TRIES = 4  # of a quarter of an hour each
ASK_MIRROR_S, ASK_MIRROR_FOR_S = 60.0, 3600.0
LOOK_FOR_MACHINE_S = 1800.0  # at least so long, also without --wait: nobody is there to try again
RENT_AGAIN_S = 60.0


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
    moves: int = 0

    def run(self) -> int:
        """Until the run is over, its machines gone."""
        folder, wanted = self.wanted.config.folder, self.wanted
        while True:
            code, lost = watched(
                folder, self.clock, wanted.ceiling_usd, wanted.poll_s, wanted.linger_s, self.mirror
            )
            if not lost:
                return code
            try:
                with interruptible():
                    self._end_for_sure(code)
                    self._move()
            except Over as over:
                self._tell(over)
                return over.code
            except KeyboardInterrupt:
                print("interrupted between two machines: ending what is rented", flush=True)
                end_loudly(folder, self.clock)
                return INTERRUPTED

    def _end_for_sure(self, code: int) -> None:
        """Two machines of one run never bill at once."""
        for _ in range(END_TRIES - 1):
            if code == FINISHED:
                return
            code = end_loudly(self.wanted.config.folder, self.clock)
        if code != FINISHED:
            raise Over(FAULT, "the lost machine could not be seen to be gone: no other is rented")

    def _move(self) -> None:
        """The next machine, up and running."""
        while True:
            now = self._standing()
            do, why = verdict(now, self.mirror.before)
            if do == "over":
                raise Over(FINISHED, f"{why}; it is not moved")
            if self.moves >= self.most:
                raise Over(FAULT, f"{why}; it was moved {self.moves} times already (--moves)")
            self._refuse_other_writer(now)
            wanted = replace(self.wanted, standing=now, wait_s=max(self.wanted.wait_s, LOOK_FOR_MACHINE_S))
            found, offer, priced = self._agree(wanted)
            self.moves += 1
            if self._rented(wanted, found, offer, priced, now):
                return

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
    ) -> bool:
        """Whether it runs. One that does not is ended, and the next provider is asked."""
        folder, rows = wanted.config.folder, self.ledger.rows()
        gone = account(rows).machines[-1]
        told = tuple(map(str, ended.of(account(rows))))
        self.place = next(k for k, one in enumerate(self.providers) if one is provider)
        has_data = now is not None and now.has_data
        options = replace(
            self.options, before_usd=round(priced.spent_usd, 4), ended=told, raised_usd=None,
            data_from_mirror=has_data,
        )  # fmt: skip
        self.ledger.append("gate", gate.sentence(priced), verdict="passed", **priced.fields())
        try:
            with one_launch(folder.parent):
                machine = rent(wanted, provider, offer, priced, self.ledger, self.clock, options)
            if wait_active(provider, machine, self.ledger, self.clock):
                self._moved(gone, machine, priced, now)
                return True
            said = f"{machine.machine_id} at {provider.label} does not run"
        except UserError as error:
            said = str(error)
        print(f"{said}: ending it, and on to the next", flush=True)
        self._end_for_sure(end_loudly(folder, self.clock))
        self.clock.sleep(RENT_AGAIN_S)
        return False

    def _moved(self, gone: Rented, machine: Rented, priced: gate.Quote, before: Standing | None) -> None:
        """On record, with what it cost that nothing was learned."""
        self.mirror.before = before
        now = self.clock.now()
        down_s = self._down_s(gone, before)
        paid_usd = idle_usd(gone, now.timestamp() - down_s) + machine.spent_by(now)
        lost = before.lost_steps if before else 0
        at = before.good_step if before else 0
        again = f", {lost:,} steps to do again" if lost else ""
        said = (
            f"moved ({self.moves} of at most {self.most}): {gone.tag} at {gone.provider} is gone, "
            f"{machine.tag} at {machine.provider} goes on from step {at:,}{again}; nothing learned for "
            f"{minutes(down_s)}, {dollars(paid_usd)}; {gate.exact(priced.total_usd)} of "
            f"{gate.exact(priced.ceiling_usd)} in all by then"
        )
        fields = {"from": gone.tag, "to": machine.tag, "down_s": round(down_s, 1), "lost_steps": lost}
        if before and before.spent_usd is not None and before.step:
            fields["lost_usd"] = round(before.spent_usd * lost / before.step, 6)
        self.ledger.append("moved", said, **fields, downtime_usd=round(paid_usd, 6))
        print(said, flush=True)
        self._alert("moved to another machine", said)

    def _down_s(self, gone: Rented, before: Standing | None) -> float:
        """Since the mirror's last sign of life, by its store's clock; else since the machine's end."""
        told = self.mirror.look() or before
        silent_s = told.silent_s if told and before and told.epoch == before.epoch else None
        if silent_s is not None:
            return max(0.0, silent_s) * self.clock.speed
        return max(0.0, (self.clock.now() - (gone.ended or gone.since)).total_seconds())

    def _tell(self, over: Over) -> None:
        print(over.said, flush=True)
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
    return cost(gone.usd_per_hr, gone.ended.timestamp() - since_s)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM are a KeyboardInterrupt: the guard's own handlers only take note."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
