"""The mirror's process: it keeps copies of a run off its machine while a trainer, another process, trains.

python -m x1_pretrain.mirror.worker        started by the trainer; what they say to each other: mirror/job.py

It ignores the signals that end a trainer, which tells it how long it may still take. Should the trainer end
without a word, it publishes what is there, gives the run back and ends as well.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x1_pretrain.errors import FINISHED, INTERRUPTED, REFUSED, RefusedError, UserError
from x1_pretrain.mirror.claim import HeldError, Wanted
from x1_pretrain.mirror.found import as_opened, is_ours
from x1_pretrain.mirror.head import NAME as HEAD
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.job import Job, Status
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.mirror.lease_words import who
from x1_pretrain.mirror.leftovers import held_bytes, lies_there
from x1_pretrain.mirror.looks import Looked, Looks, claim_for
from x1_pretrain.mirror.outage import Outage
from x1_pretrain.mirror.patience import AwayError
from x1_pretrain.mirror.preflight import AbsentError, preflight
from x1_pretrain.mirror.publisher import Identity, Publisher
from x1_pretrain.mirror.talk import LOOK, GoneError, Orders, Voice, lines_of
from x1_pretrain.records.mirror_state import MirrorState, folder_id, is_anothers, read_state, write_state
from x1_pretrain.records.processes import state_and_start
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store, StoreError, UnreachableError

if TYPE_CHECKING:
    from x1_pretrain.mirror.restore import Restored

TICK_S = 5.0  # between two words to the trainer
ORPHAN_S = 30.0  # to publish what a trainer left that ended without a word
LOST_S = 20.0  # for a trainer whose run was lost to end; then its rows are saved aside
CORPORA_S = 60.0  # at the end, for corpora alone: a rented machine costs more than to send them another time
AWAY_S = 3600.0  # for a store that is away when a run goes on
AWAY_AGAIN_S = 10.0
REFUSALS = 3  # of a store in which the run was mirrored before: a gateway has its bad moments
TROUBLE_S = 60.0  # at the end, of nothing but trouble: every second of it is paid for
LAST_S = 2.0  # of the time to leave, for giving the run back
GIVEN_UP_S = 10.0  # for the same where the store was given up


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    voice, orders = Voice(sys.stdout), Orders(lines_of(sys.stdin.fileno()))
    job = orders.job()
    if job is None:
        return FINISHED
    return Worker(job, voice, orders).run()


class Worker:
    """One session of a mirror, from the claim to the end."""

    def __init__(self, job: Job, voice: Voice, orders: Orders) -> None:
        self.job, self.voice, self.orders = job, voice, orders
        self.folder = Path(job.folder)
        self.before: MirrorState | None = None
        self.outage = Outage(job.stale_s / 3)
        self.leaving = False  # the last order was taken
        self.refused = False  # nothing began

    def run(self) -> int:
        try:
            self.know_the_folder()
            store = open_store(parse(self.job.uri), self.job.endpoint)
        except (UserError, StoreError) as error:
            return self.refuse(error)
        self.every_s = max(self.job.every_s, store.every_s_at_least)
        try:
            return self.hold(store)
        finally:
            if (
                not self.refused
            ):  # else nothing is on its way, and a request that was given up may still hold it
                with suppress(StoreError):
                    store.close()

    def know_the_folder(self) -> None:
        """Which mirror it had."""
        job = self.job
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.before = read_state(self.folder)
            self.state = MirrorState(job.uri, "", job.name, folder_id(self.folder))
        except OSError as error:
            raise unwritable(error, self.folder) from None

    def keep_id(self) -> None:
        """Of the folder, before anything is claimed in its name: the next session has to know its own."""
        if self.before is None and not self.job.goes_on:
            try:
                write_state(self.folder, self.state)
            except OSError as error:
                raise unwritable(error, self.folder) from None

    def hold(self, store: Store) -> int:
        """The run is claimed, served and given back."""
        try:
            self.state = replace(self.state, label=f"{store.label}/{self.job.name}")
            self.refuse_empty_place(store)
            self.check(store)
            self.keep_id()
            keeper = Keeper(self.claim(store), on_lost=self.orders.wake, asleep=self.asleep)
        except GoneError:
            return self.leave_early()
        except (UserError, StoreError) as error:
            return self.refuse(error)
        keeper.start()
        try:
            return self.serve(store, keeper)
        except LostError as error:
            return self.lost(keeper, error)

    def refuse_empty_place(self, store: Store) -> None:
        """Where a disk is not mounted, its mount point looks like a mirror without runs."""
        before = self.before
        if not (isinstance(store, FolderStore) and before and before.mirrored and before.uri == self.job.uri):
            return
        if look(store, self.job.name) is None:
            raise RefusedError(
                f"{self.state.label}: is not there, and step {before.mirrored[-1]} was mirrored to it; is "
                f"the disk mounted? If it was removed for good, remove {self.folder / 'mirror.json'} as well"
            )

    def check(self, store: Store) -> None:
        """A store that is away is waited for where the run was mirrored before: one that is relaunched by
        itself would give up too soon."""
        deadline, refusals = time.monotonic() + AWAY_S, 0
        relaunched = bool(self.before and self.before.token) or self.job.goes_on or self.job.unattended
        while True:
            try:
                preflight(store, self.job.name, self.job.without_lease)
                return self.refuse_without_head(store)
            except AbsentError as error:
                if not (relaunched or self.job.must_exist):
                    raise
                if time.monotonic() > deadline:
                    raise AwayError(str(error)) from None
                self.voice.progress(f"{error}; waiting for it")
            except (RefusedError, StoreError) as error:
                refusals += 1
                if not relaunched or refusals == REFUSALS:
                    raise
                self.voice.progress(f"{error}; asking again")
            self.orders.sleep(AWAY_AGAIN_S)

    def refuse_without_head(self, store: Store) -> None:
        """What lies there may be all that is left of a run: the next one of its name would hide it."""
        name = self.job.name
        if self.job.run_id or self.job.goes_on or look(store, name) is not None:
            return
        if lies_there(store, name) and look(store, name) is None:  # it comes before all else
            raise RefusedError(
                f"{self.state.label}: has a run's objects, and its {HEAD} was removed; bring that back (the "
                "bucket may keep earlier versions), go on in the folder where the run was trained, or take "
                "another name"
            )

    def asleep(self) -> bool:
        """Whether the trainer is stopped (SIGSTOP, Ctrl-Z): it does not live, whatever its mirror does."""
        return (state_and_start(os.getppid()) or ("", ""))[0] in ("T", "t")

    # --- before training -----------------------------------------------------------------------------------

    def claim(self, store: Store) -> Lease:
        wanted: Wanted = "there" if self.job.must_exist else "absent" if self.job.fresh else "any"
        wanted = "any" if self.job.goes_on else wanted
        say, sleep = self.voice.progress, self.orders.sleep
        lease = claim_for(
            self.job, store, self.state.folder, say=say, sleep=sleep, wanted=wanted, pid=os.getppid()
        )
        if self.job.goes_on and lease.before:
            self.refuse_anothers(lease, lease.before)
        return lease

    def refuse_anothers(self, lease: Lease, found: Head) -> None:
        """The mirror of this trainer was started again: nobody else may have trained in between."""
        if is_ours(found, lease, self.before):
            return
        with suppress(StoreError, LostError):  # it grows stale by itself
            lease.release("another session had trained it")
        raise HeldError(
            f"{self.job.name}: {who(found.writer)} has trained this run while its mirror here was away; "
            "this copy stops and publishes nothing more"
        )

    def serve(self, store: Store, keeper: Keeper) -> int:
        """Restore, then publish until the trainer ends."""
        try:
            restored = None if self.job.goes_on else self.restore(store, keeper)
            writer = keeper.head.writer
            self.save_state(epoch=writer.epoch, token=writer.token)
            self.tell(self.before_training(keeper))
            self.voice.say("opened", **asdict(as_opened(keeper.lease, restored, self.state)))
            identity = self.wait_for_publish(keeper)
        except GoneError as gone:
            self.give_back(keeper, str(gone.order.get("why") or "the trainer ended before it began"))
            return self.leave_early()
        except LostError:
            raise
        except (UserError, StoreError, OSError) as error:
            self.give_back(keeper, "it could not go on from the mirror")
            return self.refuse(error)
        publisher = Publisher(self.job, store, keeper, identity, self.orders.wake)
        try:
            return self.follow(publisher, keeper)
        except LostError as error:
            return self.lost(keeper, error, publisher)

    def restore(self, store: Store, keeper: Keeper) -> Restored:
        from x1_pretrain.mirror.restore import restore

        def say(text: str) -> None:
            self.voice.progress(text)
            keeper.check()
            self.orders.sleep(0)  # for a trainer that is gone nothing needs to be fetched

        restored = restore(self.job, keeper.head, store, say)
        keeper.check()
        return restored

    def wait_for_publish(self, keeper: Keeper) -> Identity:
        """The trainer gets ready; meanwhile the keeper holds the run for it."""
        while True:
            order = self.orders.next(TICK_S)
            keeper.check()
            if order and order.get("do") == "publish":
                names = ("run_id", "from_step", "fingerprints", "step_fields")
                identity = Identity(**{name: order[name] for name in names if name in order})
                keeper.resumed_from(identity.from_step)
                return identity
            if order and order != LOOK:
                raise GoneError(order)
            self.tell(self.before_training(keeper))

    def before_training(self, keeper: Keeper) -> Status:
        """Nothing is behind yet; what is there is paid."""
        return Status(held_bytes=held_bytes(keeper.head, self.job.corpora))

    # --- while it trains -----------------------------------------------------------------------------------

    def follow(self, publisher: Publisher, keeper: Keeper) -> int:
        """A look when it is time, or when a checkpoint was sent; a word every few seconds."""
        next_s, cleaning, looks = 0.0, False, Looks(publisher, self.outage, self.every_s)
        while True:
            order = self.orders.next(min(TICK_S, next_s - time.monotonic()))
            keeper.check()
            if order and order["do"] in ("drain", "gone"):
                return self.drain(looks, keeper, order)
            if self.asleep():
                next_s = time.monotonic() + TICK_S
            elif order == LOOK or time.monotonic() >= next_s:
                next_s = time.monotonic() + self.look(looks).wait_s
                if not (cleaning or self.outage.text):
                    cleaning = True
                    threading.Thread(target=publisher.clean_up, name="x1-clean", daemon=True).start()
            else:
                self.tell(publisher.status(self.outage.text))

    def look(self, looks: Looks) -> Looked:
        """One look, and what there is to say of it."""
        looked = looks.look()
        status = looked.status
        if looked.told:
            fields = {"alert": True} if looked.failed else {"over": True}
            self.voice.event(f"{self.state.label}: {looked.told}", **fields)
        for line in looks.publisher.take_news():
            self.voice.event(line)
        self.tell(status)
        self.save_state(
            mirrored=status.mirrored,
            lag_s=status.lag_s,
            lag_bytes=status.lag_bytes,
            trouble=status.trouble,
            sent_bytes=status.sent_bytes,
        )
        return looked

    def tell(self, status: Status) -> None:
        self.voice.say("status", **asdict(status))

    # --- the end -------------------------------------------------------------------------------------------

    def drain(self, looks: Looks, keeper: Keeper, order: dict[str, Any]) -> int:
        """Send what is left as long as there is time, give the run back, say what the mirror lacks."""
        self.leaving = True
        gone = order["do"] == "gone"
        within_s = ORPHAN_S if gone else float(order.get("within_s", ORPHAN_S))
        why = "the trainer ended without a word" if gone else str(order.get("why", ""))
        deadline = time.monotonic() + within_s
        late = self.late(within_s + LAST_S, looks.publisher)
        try:
            left = self.send_the_rest(looks, deadline - min(LAST_S, within_s / 4))
            if looks.troubled_s() > TROUBLE_S:
                late.cancel()
                late = self.late(GIVEN_UP_S, looks.publisher)
            with suppress(StoreError):  # the lease grows stale by itself
                keeper.release(why)
        finally:
            late.cancel()
        self.save_state(state="released", why=why)
        return self.leave(left)

    def send_the_rest(self, looks: Looks, deadline: float) -> list[str]:
        looks.well_at = time.monotonic()  # of what was before, nothing is held against the store
        corpora_until = looks.well_at + CORPORA_S
        while True:
            looked = self.look(looks)
            left, data = looks.left()
            left_s = (deadline if left else min(deadline, corpora_until)) - time.monotonic()
            if not (left or data) or left_s <= 0 or looks.troubled_s() > TROUBLE_S:
                looks.publisher.stop()
                return left + data
            looks.pause(looked, min(left_s, TICK_S))

    def late(self, after_s: float, publisher: Publisher) -> threading.Timer:
        timer = threading.Timer(after_s, self.leave_at_once, [publisher])
        timer.daemon = True
        timer.start()
        return timer

    def leave_at_once(self, publisher: Publisher) -> None:
        """The store does not answer, and the time is over."""
        try:
            self.voice.say("drained", left=publisher.left() + publisher.corpora_left())
        finally:
            os._exit(FINISHED)

    def give_back(self, keeper: Keeper, why: str) -> None:
        with suppress(StoreError, LostError):  # the lease grows stale by itself, or another has it already
            keeper.release(why)

    def leave_early(self) -> int:
        """Nothing is left behind, unless the run had a mirror before this one: then nobody knows."""
        return FINISHED if self.job.goes_on else self.leave([])

    def leave(self, left: list[str]) -> int:
        self.voice.say("drained", left=left)
        return FINISHED

    def refuse(self, error: Exception) -> int:
        away = isinstance(error, UnreachableError)  # it may be there when this is relaunched
        code = error.exit_code if isinstance(error, UserError) else INTERRUPTED if away else REFUSED
        held, self.refused = isinstance(error, HeldError), True
        self.voice.say("refused", message=str(error), exit_code=code, held=held)
        return code

    def lost(self, keeper: Keeper, error: LostError, publisher: Publisher | None = None) -> int:
        """Another writer has the run. Once the trainer has ended, its rows that nobody has are kept aside."""
        keeper.stop()
        self.voice.say("lost", message=str(error))
        self.save_state(state="lost", why=str(error))
        if publisher:
            publisher.stop()
            if not self.leaving:
                self.wait_for_the_end(LOST_S)
            late = threading.Timer(LOST_S, os._exit, [REFUSED])
            late.daemon = True
            late.start()
            self.voice.say("drained", left=self.set_aside(publisher))
            late.cancel()
        return REFUSED

    def wait_for_the_end(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while (left_s := deadline - time.monotonic()) > 0:
            order = self.orders.next(left_s)
            if order and order["do"] in ("drain", "gone"):
                return

    def set_aside(self, publisher: Publisher) -> list[str]:
        try:
            place = publisher.save_aside()
        except (StoreError, OSError):
            return publisher.left()
        self.voice.event(
            f"its rows that were not published are kept apart in {publisher.store.label}/{place}"
        )
        return []

    def save_state(self, **changes: Any) -> None:
        """Not over that of a session after this one: a trainer that was killed and relaunched has a new one
        while its old one still does its last things."""
        self.state = replace(self.state, **changes)
        tokens = {self.state.token, self.before.token if self.before else "", ""}
        if not self.state.token or is_anothers(self.folder, tokens):
            return
        try:
            write_state(self.folder, self.state)
        except OSError:
            return  # a full disk: the next look tries again


def unwritable(error: OSError, folder: Path) -> RefusedError:
    return RefusedError(f"{error.filename or folder}: can't be written ({error.strerror}); see --run-dir")


if __name__ == "__main__":
    sys.exit(main())
