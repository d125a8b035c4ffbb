"""Time, handed to whatever spends money: a wall clock that may jump, and a steady one that does not.

`X1_CLOCK=60@1763694000` rehearses: from that second of the epoch on, time runs 60 times as fast in every
process that reads it, so that an hour's run and its guard can be watched in a minute. A trailing `+3600` or
`-3600` is a wall clock that is wrong by so many seconds.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from x1_pretrain.errors import UserError

VARIABLE = "X1_CLOCK"
_FORM = re.compile(r"(?P<speed>[0-9.]+)@(?P<anchor>[0-9.]+)(?P<skew>[+-][0-9.]+)?")


@dataclass(frozen=True)
class Clock:
    """`now` for files and people, `steady_s` for how long something took."""

    speed: float = 1.0
    anchor_s: float = 0.0  # the second of the epoch at which fast time and real time agree
    skew_s: float = 0.0

    @classmethod
    def from_environment(cls) -> Clock:
        text = os.environ.get(VARIABLE, "").strip()
        if not text:
            return cls()
        found = _FORM.fullmatch(text)
        if not found or not float(found["speed"]) > 0:
            raise UserError(f"{VARIABLE}={text}: expected SPEED@EPOCH_SECONDS, for example 60@1763694000")
        return cls(float(found["speed"]), float(found["anchor"]), float(found["skew"] or 0.0))

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        return self._told(time.time())

    def _told(self, real_s: float) -> datetime:
        fast_s = self.anchor_s + (real_s - self.anchor_s) * self.speed if self.speed != 1.0 else real_s
        return datetime.fromtimestamp(fast_s + self.skew_s, UTC)

    def told(self, real_utc: str) -> str:
        """What this clock showed at a moment that was written by the real one."""
        return real_utc if self == Clock() else stamp(self._told(parse_stamp(real_utc).timestamp()))

    def steady_s(self) -> float:
        """Seconds since this machine started, sleep counted: the same in all its processes, never set."""
        source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime(source) * self.speed

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds) / self.speed)

    def real_s(self, seconds: float) -> float:
        """How long `seconds` of this clock last outside: for timeouts of sockets and processes."""
        return seconds / self.speed

    @cached_property
    def boot(self) -> str:
        """Names the stretch of time over which `steady_s` can be compared."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return "unknown"


def stamp(moment: datetime) -> str:
    """2026-05-23T15:42:01Z, as every file of ours writes a time."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def parse_stamp(text: object) -> datetime:
    """The moment that `stamp` wrote, or any ISO 8601 time; one without a zone is taken as UTC."""
    if not isinstance(text, str):
        raise ValueError(f"expected a time such as 2026-05-23T15:42:01Z, found {text!r}")
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def duration_s(text: str, flag: str) -> float:
    """`4h`, `30m`, `90s`, `7d`, or seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dhms]?)", text.strip())
    if not found:
        raise UserError(f"{flag} {text}: expected a time such as 4h, 30m, 90s or 7d")
    return float(found[1]) * {"d": 86_400, "h": 3600, "m": 60, "s": 1, "": 1}[found[2]]
