"""What a person sees while a run goes on: one line a log interval, and a live bar below it on a terminal."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


def duration(seconds: float) -> str:
    """3725 -> `1h02m`; 65 -> `1m05s`; 12 -> `12s`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def compact(number: float) -> str:
    """1234567 -> `1.23M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def train_line(row: dict[str, Any], total_steps: int, eta_s: float | None) -> str:
    """One log interval. What was not measured is left out, never guessed."""
    parts = [f"step {row['step']:>{len(str(total_steps))}}/{total_steps}", f"loss {row['train/loss']:.4f}"]
    parts += [f"lr {row['lr']:.2e}", f"|g| {row['grad_norm']:.2f}"]
    if "tokens_per_sec" in row:
        parts.append(f"{compact(row['tokens_per_sec'])} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    memory = row.get("memory/reserved_gib", row.get("memory/rss_gib"))
    if memory is not None:
        parts.append(f"mem {memory:.1f} GiB")
    if row.get("data/wait_share", 0.0) >= 0.01:
        parts.append(f"data wait {row['data/wait_share']:.0%}")
    if eta_s is not None:
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join(parts)


def evaluation_line(row: dict[str, Any]) -> str:
    domains = [key.split("/")[1] for key in row if key.startswith("val/") and key.endswith("/bpb")]
    each = "  ".join(f"{d} {row[f'val/{d}/loss']:.4f} ({row[f'val/{d}/bpb']:.3f} bits/byte)" for d in domains)
    return f"eval at step {row['step']}: validation loss {row['val/loss']:.4f}  {each}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the output is gone. rich would end the program here; a run goes on."""
        self.quiet = True
        _send_to_nowhere(self.file.fileno())


class Screen:
    """Lines, and on a terminal a bar that stays below them. `quiet` ranks say nothing."""

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self._console = _Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._lost = quiet or sys.stdout is None  # a supervisor may give no output at all
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._note = ""
        if sys.stdout is not None and sys.stdout.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"))
            self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console)
            self._task = self._progress.add_task("training", total=total_steps, note="")

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line. A terminal that went away does not end a run: the records have it all."""
        if self._lost:
            return
        try:
            self._console.print(text, markup=False)
            self._console.file.flush()
        except OSError:
            self._lost = True
            _send_to_nowhere(self._console.file.fileno())

    def at(self, step: int, note: str | None = None) -> None:
        """Move the bar; a note stays beside it until the next one."""
        if self._progress is not None and self._task is not None and not self._lost:
            self._note = self._note if note is None else note
            self._progress.update(self._task, completed=step, note=self._note)


def _send_to_nowhere(descriptor: int) -> None:
    """Later writes, and the interpreter's own at its exit, must not fail on a terminal that is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
