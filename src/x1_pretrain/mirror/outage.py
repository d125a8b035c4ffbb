"""A store that fails: how long to wait before the next try, when a person hears of it, when it is over."""

from __future__ import annotations

import random
from collections.abc import Callable

from x1_pretrain.numbers import span

FIRST_S, MOST_S = 1.0, 60.0  # between two tries
PATIENCE = 3  # failures in a row before anything is said


class Outage:
    """Failures in a row. Each outage is told once when it begins, and once when it is over."""

    def __init__(self, patience_s: float, chance: Callable[[], float] = random.random) -> None:
        self.text = ""  # of the last failure; empty while all is well
        self._patience_s, self._chance = patience_s, chance
        self._failures, self._since, self._told = 0, 0.0, False

    def failed(self, now: float, text: str) -> str | None:
        """A try failed. The message, the first time that it is worth one."""
        self._since = self._since if self._failures else now
        self._failures, self.text = self._failures + 1, text
        if self._told or not (self._failures >= PATIENCE or now - self._since >= self._patience_s):
            return None
        self._told = True
        return f"can't be mirrored now ({text}); training goes on, and it is tried again and again"

    def worked(self, now: float) -> str | None:
        """A try worked. The message, if there was one before."""
        told, since = self._told, self._since
        self._failures, self._told, self.text = 0, False, ""
        return f"is mirrored again, after {span(now - since)}" if told else None

    def wait_s(self) -> float:
        """Before the next try: doubled with each failure, and no two machines at the same beat."""
        longest = min(MOST_S, FIRST_S * 2.0 ** (min(self._failures, 10) - 1))
        return longest * (0.5 + 0.5 * self._chance())
