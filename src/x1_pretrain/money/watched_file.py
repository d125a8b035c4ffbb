"""`budget.json` as a trainer sees it: fetched beside the decisions, and its time turned into steady time.

A wall clock may jump; how old a reading is must not. So a state of the file gets its steady second when it is
first seen, and keeps it.
"""

from __future__ import annotations

import queue
import threading

from x1_pretrain.money import budget_file
from x1_pretrain.money.budget_file import Address, BudgetFile, NoReadingError
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import Reading

REREAD_S = 60.0  # how often an old reading is looked for anew


class WatchedFile:
    """`read_now()` at the start and before a checkpoint; between them `poll()`, which never waits."""

    def __init__(self, address: Address, clock: Clock, read_every_s: float, quiet_s: float) -> None:
        self.address, self.problem = address, None
        self._clock, self._every_s, self._quiet_s = clock, read_every_s, quiet_s
        self._taking = threading.Lock()
        self._seen: BudgetFile | None = None
        self._at_s = 0.0  # the steady second at which `seen` was true
        self._asked_s = clock.steady_s()
        self._fetching = False
        self._found: queue.SimpleQueue[BudgetFile | NoReadingError] = queue.SimpleQueue()

    problem: str | None  # why the last fetch gave nothing

    @property
    def seen(self) -> BudgetFile:
        """The newest good state of the file."""
        assert self._seen is not None, "nothing was read yet"
        return self._seen

    def read_now(self) -> Reading | None:
        """Waits for the answer, some seconds at most; None with `problem` set."""
        self._asked_s = self._clock.steady_s()
        return self._take(self._fetch())

    def poll(self) -> Reading | None:
        """A reading that has come in; asks for the next one when it is due."""
        if not self._found.empty():
            self._fetching = False
            return self._take(self._found.get())
        if not self._fetching and self._due():
            self._fetching, self._asked_s = True, self._clock.steady_s()
            fetch = threading.Thread(target=lambda: self._found.put(self._fetch()), daemon=True)
            fetch.start()
        return None

    def _due(self) -> bool:
        now_s = self._clock.steady_s()
        old = now_s - self._at_s > self._quiet_s
        return now_s - self._asked_s >= (min(REREAD_S, self._every_s) if old else self._every_s)

    def _fetch(self) -> BudgetFile | NoReadingError:
        try:
            return budget_file.parse(self.address.fetch(), self._clock.now())
        except NoReadingError as error:
            return error
        except Exception as error:  # it must reach the one who waits
            return NoReadingError(f"{self.address}: {type(error).__name__}: {error}")

    def _take(self, found: BudgetFile | NoReadingError) -> Reading | None:
        if isinstance(found, NoReadingError):
            self.problem = str(found)
            return None
        self.problem = None
        with self._taking:  # the loop and the guard's thread both read
            if self._seen is None or found.last_update != self._seen.last_update:
                age_s = max(0.0, (self._clock.now() - found.last_update).total_seconds())
                self._at_s = self._clock.steady_s() - age_s
            self._seen = found
            return Reading(
                found.spent_usd, found.rate_usd_per_hr, found.projected_total_usd, self._at_s, found.seq
            )
