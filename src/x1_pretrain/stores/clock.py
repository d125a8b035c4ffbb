"""The clock of a store: asked by an object of this moment, then kept for a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from x1_pretrain.stores.store import DeniedError

KEPT_S = 60.0


class StoreClock:
    """`probe` writes something and tells the time the store gave it."""

    def __init__(
        self, probe: Callable[[], datetime], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe, self._monotonic = probe, monotonic
        self._lock = threading.Lock()
        self._told: datetime | None = None
        self._at = 0.0

    def now(self) -> datetime | None:
        """None where nothing may be written; UnreachableError when the store doesn't answer."""
        with self._lock:
            if self._told is None or self._monotonic() - self._at > KEPT_S:
                before = self._monotonic()
                try:
                    self._told = self._probe()
                except DeniedError:
                    return None
                self._at = (before + self._monotonic()) / 2  # it was made somewhere between
            return self._told + timedelta(seconds=self._monotonic() - self._at)
