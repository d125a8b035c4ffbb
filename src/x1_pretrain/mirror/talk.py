"""The two ends of a mirror's process: orders come in, happenings go out, a JSON object a line."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from x1_pretrain.mirror.job import Job

GONE = {"do": "gone"}  # the input ended
LOOK = {"do": "look"}  # something happened here


class GoneError(Exception):
    """The trainer ended, or wants to, before it began; `order` is what it said."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        super().__init__(order.get("why", ""))
        self.order = order


class Voice:
    """What happens, told to the trainer. Whether it still listens is not this side's trouble."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def say(self, what: str, **fields: Any) -> None:
        line = json.dumps({"is": what, **fields}, ensure_ascii=False)
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return  # a trainer that was killed reads no more

    def progress(self, text: str) -> None:
        self.say("progress", text=text)

    def event(self, message: str, **fields: Any) -> None:
        self.say("event", name="mirror", message=message, fields=fields)


def lines_of(descriptor: int) -> Iterator[bytes]:
    """The lines of a pipe. Not `sys.stdin`: Python can't end while a thread waits for that."""
    rest = b""
    while data := os.read(descriptor, 1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest


class Orders:
    """What the trainer wants, read by a thread."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._leaving: dict[str, Any] | None = None

    def job(self) -> Job | None:
        """The first line; None if the trainer ended before it. From then on orders are read."""
        line = next(self._lines, b"")
        if not line.endswith(b"\n"):
            return None
        tree = json.loads(line)
        tree.pop("do", None)
        job = Job(**tree)
        threading.Thread(target=self._read, name="x1-orders", daemon=True).start()
        return job

    def _read(self) -> None:
        for line in self._lines:
            try:
                order = json.loads(line)
            except ValueError:
                break  # torn: the trainer was killed in the middle of it
            if order.get("do") == "drain":
                self._leaving = order
            self._queue.put(order)
        self._leaving = self._leaving or GONE
        self._queue.put(GONE)

    def wake(self) -> None:
        self._queue.put(LOOK)

    def next(self, within_s: float) -> dict[str, Any] | None:
        """The next order, `look` where something happened here, or None when the time is over."""
        try:
            return self._queue.get(timeout=max(0.0, within_s))
        except queue.Empty:
            return None

    def sleep(self, seconds: float) -> None:
        """GoneError as soon as the trainer ends or wants to."""
        until = time.monotonic() + seconds
        while True:
            if self._leaving:
                raise GoneError(self._leaving)
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.2))
