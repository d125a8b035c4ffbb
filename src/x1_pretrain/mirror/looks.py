"""What the mirror's process and `x1 push` do alike: claim a run for its folder, then look again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from x1_pretrain.mirror.claim import Me, Wanted, folder_mark
from x1_pretrain.mirror.job import Job, Status
from x1_pretrain.mirror.lease import Lease
from x1_pretrain.mirror.outage import Outage
from x1_pretrain.mirror.publisher import Publisher
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.stores.store import Store, StoreError

STALE_LOOKS = 4  # a store that takes few writes: signs of life are as rare
TROUBLED_S = 2.0  # at most between two looks, once nothing new is to come


def claim_for(
    job: Job,
    store: Store,
    folder_id: str,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    wanted: Wanted = "any",
    pid: int | None = None,
) -> Lease:
    """Become the writer of the job's run, for its folder, which has this id. `pid` is whom others are told
    of: the trainer, for its mirror."""
    host = os.uname().nodename
    mark = folder_mark(folder_id, host, Path(job.folder).stat().st_ino)
    stale_s = max(job.stale_s, STALE_LOOKS * store.every_s_at_least)
    return Lease.claim(
        store,
        Me(job.name, mark, host, pid or os.getpid(), stale_s, job.unattended and not job.goes_on),
        sleep=sleep,
        steady=time.monotonic,
        now_utc=utc_now,
        say=say,
        without_lease=job.without_lease,
        wanted=wanted,
    )


@dataclass(frozen=True)
class Looked:
    """One look, and how it went."""

    status: Status
    wait_s: float  # to the next one
    told: str | None  # of an outage that begins, or is over
    failed: str = ""  # why


@dataclass
class Looks:
    """One look of a publisher after the other; `outage` is what went wrong since something last arrived."""

    publisher: Publisher
    outage: Outage
    every_s: float
    clock: Callable[[], float] = time.monotonic
    well_at: float = field(init=False)  # the last look that worked, or at which something large had arrived
    failed_at: float = 0.0
    _arrived: int = 0

    def __post_init__(self) -> None:
        self.well_at = self.clock()

    def look(self) -> Looked:
        """LostError goes through. A look that worked while what is large fails is neither well nor a failure:
        a store that takes rows and refuses checkpoints is in trouble all the same."""
        arrived, self._arrived = self._arrived, self.publisher.arrived
        if arrived != self._arrived:
            self.well_at = self.clock()
        try:
            status = self.publisher.look()
        except (StoreError, OSError) as error:
            self.failed_at = self.clock()
            told = self.outage.failed(self.clock(), str(error))
            status = self.publisher.status(self.outage.text)
            return Looked(status, self.outage.wait_s(), told, str(error))
        wait_s = 0.0 if self.publisher.behind else self.every_s
        if self.publisher.failing:
            return Looked(replace(status, trouble=self.outage.text), wait_s, None)
        self.well_at = self.clock()
        return Looked(status, wait_s, self.outage.worked(self.clock()))

    def left(self) -> tuple[list[str], list[str]]:
        """What the mirror lacks of the run, and which corpora."""
        return self.publisher.left(), self.publisher.corpora_left()

    def troubled_s(self) -> float:
        """From when all was well to the last failure: what has been under way since then may yet arrive."""
        return max(0.0, self.failed_at - self.well_at)

    def pause(self, looked: Looked, within_s: float) -> None:
        """Until something that is being sent is there; in an outage, until it is worth another try."""
        if looked.failed:
            time.sleep(max(0.0, min(looked.wait_s, within_s, TROUBLED_S)))
        elif not self.publisher.behind:
            self.publisher.wait(within_s)
