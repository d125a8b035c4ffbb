"""A request to stop is a flag that the loop polls; a second one leaves at once.

SIGTERM and Ctrl-C ask for a checkpoint and exit code 75. While the first step is being compiled nothing has
been learned since the last checkpoint and Python may not get to poll for minutes: `nothing_to_save` makes the
request leave right away. A hang-up (the terminal is gone) is survived.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from x1_pretrain.errors import INTERRUPTED

REQUESTS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 0.5  # a signal to a process and then to its whole group, as `timeout` sends it, is one request


class Signals:
    """`with Signals() as signals:` ... `if signals.requested: save and leave`."""

    def __init__(self, quiet: bool = False) -> None:
        self._say: Callable[[str], None] = (lambda _: None) if quiet else _say
        self.requested: str | None = None  # the name of the first signal, or who else asked and why
        self.requested_s: float | None = None  # when, by the monotonic clock
        self.exit_code = INTERRUPTED
        self._signalled_s = -math.inf
        self.nothing_to_save = False
        self.opening = False  # nothing was begun yet: whoever waits looks for the request
        self.before_leaving: Callable[[str], None] = lambda _: None  # last words of an immediate exit
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in REQUESTS:
            self._previous[number] = signal.signal(number, self._on_request)
        self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def interrupted(self) -> bool:
        return self.requested is not None

    def ask(self, why: str, exit_code: int) -> None:
        """Leave with another exit code than a signal's. From any thread; the harder request wins."""
        if self.requested is None or exit_code > self.exit_code:
            self.exit_code = max(exit_code, self.exit_code)
            self.requested_s = self.requested_s or time.monotonic()
            self.requested = why
        if self.nothing_to_save:
            self._say(f"\nx1: {why}: nothing was learned since the last checkpoint; leaving\n")
            self._leave(why)

    def _on_request(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if now - self._signalled_s < SAME_S:
            return
        if self._signalled_s > -math.inf:
            self._say(
                f"\nx1: {name} again: leaving at once; the last checkpoint is safe, relaunch to go on from "
                "it\n"
            )
            self._leave(name)
        self._signalled_s = now
        if self.requested is not None:
            self._say(f"\nx1: {name}: leaving already (once more: at once)\n")
            return
        self.requested, self.requested_s = name, now
        if self.nothing_to_save:
            self._say(f"\nx1: {name}: nothing was learned since the last checkpoint; leaving\n")
            self._leave(name)
        if self.opening:
            self._say(f"\nx1: {name}: leaving; what was fetched stays (once more: leave at once)\n")
            return
        self._say(f"\nx1: {name}: saving a checkpoint, then leaving (once more: leave at once)\n")

    def _leave(self, name: str) -> None:
        self.before_leaving(name)
        os._exit(self.exit_code)


def _say(text: str) -> None:
    """Straight to stderr: a handler may not wait for a lock that the interrupted code holds."""
    try:
        os.write(2, text.encode())
    except OSError:
        return  # the terminal is gone; the event in the run folder remains
