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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x1_pretrain.errors import FINISHED, REFUSED, UserError
from x1_pretrain.mirror.address import parse
from x1_pretrain.mirror.claim import HeldError, Me, Wanted, folder_mark
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.job import Job, Opened, Status
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.mirror.opened import open_store
from x1_pretrain.mirror.outage import Outage
from x1_pretrain.mirror.patience import AwayError
from x1_pretrain.mirror.preflight import AbsentError, preflight
from x1_pretrain.mirror.publisher import Identity, Publisher
from x1_pretrain.mirror.state import MirrorState, folder_id, read_state, write_state
from x1_pretrain.mirror.store import Store, StoreError
from x1_pretrain.mirror.talk import LOOK, GoneError, Orders, Voice, lines_of
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.runtime.processes import started, state_and_start

if TYPE_CHECKING:
    from x1_pretrain.mirror.restore import Restored

TICK_S = 5.0  # between two words to the trainer
ORPHAN_S = 30.0  # to publish what a trainer left that ended without a word
LOST_S = 20.0  # for a trainer whose run was lost to end; then its rows are saved aside
CORPORA_S = 60.0  # at the end, for corpora alone: a rented machine costs more than to send them another time
AWAY_S = 300.0  # for a store that is away when a run goes on
AWAY_AGAIN_S = 10.0
STALE_LOOKS = 4  # a store that takes few writes: signs of life are as rare
LAST_S = 2.0  # of the time to leave, for giving the run back


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
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = read_state(self.folder)
        trainer = f"{os.getppid()} {started(os.getppid())}"
        self.goes_on = self.before is not None and self.before.trainer == trainer
        self.state = MirrorState(job.uri, "", job.name, folder_id(self.folder), trainer=trainer)
        self.outage = Outage(job.stale_s / 3)

    def run(self) -> int:
        try:
            store = open_store(parse(self.job.uri), self.job.endpoint)
        except (UserError, StoreError) as error:
            return self.refuse(error)
        self.every_s = max(self.job.every_s, store.every_s_at_least)
        try:
            return self.hold(store)
        finally:
            store.close()

    def hold(self, store: Store) -> int:
        """The run is claimed, served and given back."""
        try:
            self.state = replace(self.state, label=f"{store.label}/{self.job.name}")
            self.check(store)
            keeper = Keeper(self.claim(store), on_lost=self.orders.wake, asleep=self.asleep)
        except GoneError:
            return self.leave([])
        except (UserError, StoreError) as error:
            return self.refuse(error)
        keeper.start()
        try:
            return self.serve(store, keeper)
        except LostError as error:
            return self.lost(keeper, error)

    def check(self, store: Store) -> None:
        """A store that is away is waited for where the run was mirrored before: one that is relaunched by
        itself would give up too soon."""
        deadline = time.monotonic() + AWAY_S
        while True:
            try:
                return preflight(store, self.job.name, self.job.without_lease)
            except AbsentError as error:
                if self.before and time.monotonic() > deadline:
                    raise AwayError(str(error)) from None
                if not self.before:
                    raise
                self.voice.progress(f"{error}; waiting for it")
                self.orders.sleep(AWAY_AGAIN_S)

    def asleep(self) -> bool:
        """Whether the trainer is stopped (SIGSTOP, Ctrl-Z): it does not live, whatever its mirror does."""
        return (state_and_start(os.getppid()) or ("", ""))[0] in ("T", "t")

    # --- before training -----------------------------------------------------------------------------------

    def claim(self, store: Store) -> Lease:
        host = os.uname().nodename
        mark = folder_mark(self.state.folder, host, self.folder.stat().st_ino)
        stale_s = max(self.job.stale_s, STALE_LOOKS * store.every_s_at_least)
        me = Me(self.job.name, mark, host, os.getpid(), stale_s)
        wanted: Wanted = "there" if self.job.must_exist else "absent" if self.job.fresh else "any"
        lease = Lease.claim(
            store,
            me,
            sleep=self.orders.sleep,
            steady=time.monotonic,
            now_utc=utc_now,
            say=self.voice.progress,
            without_lease=self.job.without_lease,
            wanted="any" if self.goes_on else wanted,
        )
        if self.goes_on and lease.before and self.before:
            self.still_ours(lease, lease.before, self.before)
        return lease

    def still_ours(self, lease: Lease, found: Head, before: MirrorState) -> None:
        """The mirror of this trainer was started again: nobody else may have trained in between."""
        if found.writer.epoch == before.epoch and found.writer.token == before.token:
            return
        lease.release("another session had trained it")
        raise HeldError(
            f"{self.job.name}: {found.writer.host} (process {found.writer.pid}, epoch {found.writer.epoch}) "
            "has trained this run while its mirror here was away; this copy stops and publishes nothing more"
        )

    def serve(self, store: Store, keeper: Keeper) -> int:
        """Restore, then publish until the trainer ends."""
        try:
            restored = None if self.goes_on else self.restore(store, keeper)
            writer = keeper.head.writer
            self.save_state(epoch=writer.epoch, token=writer.token)
            self.voice.say("opened", **asdict(opened(self.job, keeper, restored, self.state)))
            identity = self.wait_for_publish(keeper)
        except GoneError as gone:
            keeper.release(str(gone.order.get("why") or "the trainer ended before it began"))
            return self.leave([])
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
            check(keeper)
            self.orders.sleep(0)  # for a trainer that is gone nothing needs to be fetched

        restored = restore(self.job, keeper.head, store, say)
        check(keeper)
        return restored

    def wait_for_publish(self, keeper: Keeper) -> Identity:
        """The trainer gets ready; meanwhile the keeper holds the run for it."""
        while True:
            order = self.orders.next(TICK_S)
            check(keeper)
            if order and order.get("do") == "publish":
                names = ("run_id", "from_step", "fingerprints", "step_fields")
                identity = Identity(**{name: order[name] for name in names if name in order})
                keeper.resumed_from(identity.from_step)
                return replace(identity, goes_on=self.goes_on)
            if order and order != LOOK:
                raise GoneError(order)
            self.voice.say("status", **asdict(Status()))

    # --- while it trains -----------------------------------------------------------------------------------

    def follow(self, publisher: Publisher, keeper: Keeper) -> int:
        """A look when it is time, or when a checkpoint was sent; a word every few seconds."""
        next_s, cleaning = 0.0, False
        while True:
            order = self.orders.next(min(TICK_S, next_s - time.monotonic()))
            check(keeper)
            if order and order["do"] in ("drain", "gone"):
                return self.drain(publisher, keeper, order)
            if self.asleep():
                next_s = time.monotonic() + TICK_S
            elif order == LOOK or time.monotonic() >= next_s:
                wait_s = self.look(publisher)
                next_s = time.monotonic() + (0.0 if publisher.behind else wait_s)
                if not (cleaning or self.outage.text):
                    cleaning = True
                    threading.Thread(target=publisher.clean_up, name="x1-clean", daemon=True).start()
            else:
                self.tell(publisher.status(self.outage.text))

    def look(self, publisher: Publisher) -> float:
        """One look, and how it went; seconds to the next."""
        try:
            status = publisher.look()
            said, wait_s = self.outage.worked(time.monotonic()), self.every_s
            fields: dict[str, Any] = {"over": True}
        except LostError:
            raise
        except (StoreError, OSError) as error:
            said, fields = self.outage.failed(time.monotonic(), str(error)), {"alert": True}
            wait_s = self.outage.wait_s()
            status = publisher.status(self.outage.text)
        if said:
            self.voice.event(f"{self.state.label}: {said}", **fields)
        for line in publisher.take_news():
            self.voice.event(line)
        self.tell(status)
        self.save_state(
            mirrored=status.mirrored,
            lag_s=status.lag_s,
            lag_bytes=status.lag_bytes,
            trouble=status.trouble,
            sent_bytes=status.sent_bytes,
        )
        return wait_s

    def tell(self, status: Status) -> None:
        self.voice.say("status", **asdict(status))

    # --- the end -------------------------------------------------------------------------------------------

    def drain(self, publisher: Publisher, keeper: Keeper, order: dict[str, Any]) -> int:
        """Send what is left as long as there is time, give the run back, say what the mirror lacks."""
        gone = order["do"] == "gone"
        within_s = ORPHAN_S if gone else float(order.get("within_s", ORPHAN_S))
        why = "the trainer ended without a word" if gone else str(order.get("why", ""))
        deadline = time.monotonic() + within_s
        late = threading.Timer(within_s + LAST_S, self.leave_at_once, [publisher])
        late.daemon = True
        late.start()
        left = self.send_the_rest(publisher, deadline - min(LAST_S, within_s / 4))
        self.give_back(keeper, why)
        late.cancel()
        self.save_state(state="released", why=why)
        return self.leave(left)

    def send_the_rest(self, publisher: Publisher, deadline: float) -> list[str]:
        corpora_until = time.monotonic() + CORPORA_S
        while True:
            wait_s = self.look(publisher)
            left, data = publisher.left(), publisher.corpora_left()
            left_s = (deadline if left else min(deadline, corpora_until)) - time.monotonic()
            if not (left or data) or left_s <= 0:
                publisher.stop()
                return left + data
            if self.outage.text:
                time.sleep(min(wait_s, left_s, 2.0))
            else:
                publisher.wait(min(left_s, TICK_S))

    def leave_at_once(self, publisher: Publisher) -> None:
        """The store does not answer, and the time is over."""
        self.voice.say("drained", left=publisher.left() + publisher.corpora_left())
        os._exit(FINISHED)

    def give_back(self, keeper: Keeper, why: str) -> None:
        try:
            keeper.release(why)
        except StoreError:
            return  # the lease grows stale by itself

    def leave(self, left: list[str]) -> int:
        self.voice.say("drained", left=left)
        return FINISHED

    def refuse(self, error: Exception) -> int:
        code = error.exit_code if isinstance(error, UserError) else REFUSED
        held = isinstance(error, HeldError)
        self.voice.say("refused", message=str(error), exit_code=code, held=held)
        return code

    def lost(self, keeper: Keeper, error: LostError, publisher: Publisher | None = None) -> int:
        """Another writer has the run. Once the trainer has ended, its rows that nobody has are kept aside."""
        keeper.stop()
        self.voice.say("lost", message=str(error))
        self.save_state(state="lost", why=str(error))
        if publisher:
            publisher.stop()
            self.wait_for_the_end(LOST_S)
            late = threading.Timer(LOST_S, os._exit, [REFUSED])
            late.daemon = True
            late.start()
            self.voice.say("drained", left=self.set_aside(publisher))
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
        self.state = replace(self.state, **changes)
        try:
            write_state(self.folder, self.state)
        except OSError:
            return  # a full disk: the next look tries again


def check(keeper: Keeper) -> None:
    if keeper.lost:
        raise keeper.lost


def opened(job: Job, keeper: Keeper, restored: Restored | None, state: MirrorState) -> Opened:
    """What was found, for the trainer."""
    lease = keeper.lease
    before = lease.before if lease.before and lease.before.writer.state != "trashed" else None
    moved = before is not None and before.writer.folder != lease.me.folder
    said = before.status if before else {}
    return Opened(
        label=state.label,
        epoch=lease.epoch,
        found=before is not None,
        run_id=lease.head.run_id,
        notes=list(restored.notes) if restored else [],
        restored_step=restored.restored_step if restored else None,
        restored_bytes=restored.restored_bytes if restored else 0,
        restored_s=restored.restored_s if restored else 0.0,
        moved_from=before.writer.host if before and moved else None,
        down_s=lease.down_s if moved else None,
        last_step=restored.last_step if restored else said.get("step"),
        last_spent_usd=_dollars(said.get("spent_usd")),
    )


def _dollars(text: object) -> float | None:
    try:
        return None if text is None else float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
