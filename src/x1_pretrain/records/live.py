"""A run, live in the terminal, from its files alone: on the machine it runs on, or over ssh.

    x1 watch x1-50m-a100
    ssh -t gpu x1 watch x1-50m-a100        (-t: with a terminal, for the live screen)
    x1 watch x1-50m-a100 --once            (one screen, and leave)

It only looks. Where the output is no terminal it writes a line every few seconds instead. q or Ctrl-C leaves
with exit code 0; a run that finished ends it with 0, one that ended otherwise with 1 and a line that says
why.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.records.following import Seen, State, open_followed
from x1_pretrain.records.frame import WIDEST, clean, event_line, frame, status_line

SCREEN_S, LINES_S = 1.0, 10.0  # between two looks


def watch(seen: Seen, console: Console, every_s: float) -> int:
    """On a terminal a screen that is drawn again, else lines; until the run is over or somebody leaves."""
    if console.is_terminal:
        state = on_screen(seen, console, every_s)
        seen.recount(time.time())
        show(seen, state, console)
    else:
        state = in_lines(seen, every_s)
    if not state.over:
        return FINISHED  # somebody left
    if state.kind == "finished":
        return FINISHED
    print(f"x1 watch: {clean(seen.run.folder)}: {state.kind}: {clean(state.why)}", file=sys.stderr)
    return FAULT


def on_screen(seen: Seen, console: Console, every_s: float) -> State:
    """The screen, until the run is over or a key is pressed; how the run stood then."""
    state = looked(seen)
    with keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            lines = drawn(seen, state, console, console.height)
            live.update(Group(*lines[: console.height]), refresh=True)
            if state.over or pressed(every_s):
                return state
            state = looked(seen)


def in_lines(seen: Seen, every_s: float) -> State:
    """What happens, and how it stands every so often."""
    state, told = looked(seen), False
    while True:
        for event in seen.fresh_events if told else ():  # not the whole past again
            print(event_line(event))
        print(
            f"{time.strftime('%H:%M:%S', time.gmtime())} {status_line(seen, state, time.time())}", flush=True
        )
        told = True
        if state.over:
            return state
        time.sleep(every_s)
        state = looked(seen)


def show(seen: Seen, state: State, console: Console) -> None:
    """One screen, as it is."""
    height = console.height - 1 if console.is_terminal else None  # a row for the prompt
    for line in drawn(seen, state, console, height):
        console.print(line, no_wrap=True, overflow="ellipsis", crop=True, highlight=False)


def looked(seen: Seen) -> State:
    now_s = time.time()
    seen.look(now_s)
    state = seen.state(now_s)
    if state.over:  # the last word of the run: its goodput is not one of a minute ago
        seen.recount(now_s)
    return state


def drawn(seen: Seen, state: State, console: Console, height: int | None) -> list[Text]:
    plain = "utf" not in console.encoding.lower()
    return frame(seen, state, time.time(), console.width, plain, height)


@contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """Waits so long for a key that leaves: q, Escape, Ctrl-D. Without a keyboard it only waits."""
    if not sys.stdin or not sys.stdin.isatty():
        yield _only_wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield lambda seconds: _key(descriptor, seconds)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _only_wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _key(descriptor: int, seconds: float) -> bool:
    """Whether one of the keys came in that time; others are passed over, and do not shorten it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            pressed = os.read(descriptor, 64)
            if pressed in (b"", b"\x1b", b"\x04") or pressed[:1] in b"qQ":
                return True
    return False


Gone = Annotated[str | None, typer.Option(hidden=True)]


def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or the name of a run under runs/")],
    every: Annotated[
        float | None,
        typer.Option(min=0.1, help="seconds between looks [1; 10 where the output is no terminal]"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="one screen, and leave")] = False,
    linger: Gone = None,
    every_s: Gone = None,
) -> int:
    """A run, live in the terminal, from its files alone. q leaves."""
    for flag, value in (("--linger", linger), ("--every-s", every_s)):
        if value is not None:
            raise UserError(
                f"{flag} {value}: belongs to `x1 guard {run}`, which ends machines; watch only looks"
            )
    seen = Seen(open_followed(run))
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    with suppress(KeyboardInterrupt, BrokenPipeError):
        if once:
            if not console.is_terminal and "COLUMNS" not in os.environ:
                console.width = 120
            show(seen, looked(seen), console)
            return FINISHED
        console.width = min(console.width, WIDEST) if not console.is_terminal else console.width
        return watch(seen, console, every or (SCREEN_S if console.is_terminal else LINES_S))
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    return FINISHED


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 watch"))
