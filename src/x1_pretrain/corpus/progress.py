"""How far tokenizing is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from x1_pretrain.corpus.workers import Event

LINE_EVERY_S = 15.0


class Progress:
    """Adds up what the workers report and shows it."""

    def __init__(self, text_bytes: int, files: int) -> None:
        self._expected_bytes, self._expected_files = text_bytes, files
        self.text_bytes = self.tokens = self.files = 0
        self._started_s = self._said_s = time.monotonic()
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Bar(*columns, transient=True) if sys.stdout.isatty() else None
        self._task = self._bar.add_task("", total=max(1, text_bytes)) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, event: Event) -> None:
        self.text_bytes += event.text_bytes
        self.tokens += event.tokens
        self.files += event.files
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.text_bytes, description=self.line())
        elif time.monotonic() - self._said_s > LINE_EVERY_S:
            self._said_s = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """Files, rates, and the time left by the estimated size of the text."""
        passed_s = max(1e-6, time.monotonic() - self._started_s)
        left_bytes = max(0, self._expected_bytes - self.text_bytes)
        left = (
            f"about {left_bytes * passed_s / self.text_bytes:,.0f} s left" if self.text_bytes else "starting"
        )
        rates = f"{self.text_bytes / passed_s / 1e6:.1f} MB/s, {self.tokens / passed_s / 1e6:.2f} M tokens/s"
        return f"{self.files:,}/{self._expected_files:,} files, {self.tokens:,} tokens, {rates}, {left}"
