"""One HTML file that shows a run, or several side by side: what happened, and what it cost.

    x1 report x1-50m-a100                       -> runs/x1-50m-a100/report.html
    x1 report run-a run-b --output both.html
    x1 report x1-50m-a100 --watch               writes it again every 30 s until the run is over

It needs nothing but the run folder, and the page nothing but itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, UserError
from x1_pretrain.records.run_folder import Run, find_run, open_run
from x1_pretrain.report import compare, story
from x1_pretrain.report.blocks import Line, Page
from x1_pretrain.report.material import clean, gather
from x1_pretrain.report.page import html

NAME = "report.html"
Flag = typer.Option


def main(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="run folders, or names of runs under runs/")
    ],
    output: Annotated[
        Path | None, Flag(help=f"the file [default: RUN/{NAME}; ./{NAME} for several]", show_default=False)
    ] = None,
    prediction: Annotated[
        Path | None,
        Flag(help="a fit.json, or what `x1 predict --n N --d D --json` printed", show_default=False),
    ] = None,
    verify: Annotated[bool, Flag("--verify", help="also run the checks of `x1 verify`")] = False,
    watch: Annotated[bool, Flag("--watch", help="write it again until the runs are over")] = False,
    every: Annotated[float, Flag(help="seconds between two writings of --watch", min=1.0)] = 30.0,
) -> int:
    """One HTML file that shows a run, or several side by side: those of them that can be read."""
    names = list(dict.fromkeys(runs))
    opened, broken = open_all(names)
    if prediction is not None and len(names) > 1:
        raise UserError(
            f"--prediction {prediction}: speaks of one run, {len(names)} were named; report them one by one"
        )
    for line in broken:
        print(f"x1: {line}", file=sys.stderr)
    file = output or (opened[0].folder / NAME if len(names) == 1 else Path(NAME))
    file = file / NAME if file.is_dir() else file

    def build(refresh_s: float | None) -> Page:
        page = page_of(opened, datetime.now(UTC), prediction, verify, refresh_s, file.parent)
        absent = [Line(f"Not on this page: {clean(line)}", "bad") for line in broken]
        return replace(page, lead=[*absent, *page.lead])

    if watch:
        watching(build, file, every, time.sleep)
    else:
        write(html(build(None)), file)
    print(f"report: {file} ({file.stat().st_size / 1024:,.0f} KiB)")
    return FAULT if broken else FINISHED


def open_all(names: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs that can be opened, and why the others can't; UserError if none can."""
    opened, broken = [], list[UserError]()
    for name in names:
        try:
            opened.append(open_run(find_run(name)))
        except UserError as error:
            broken.append(error)
    if not opened:
        raise broken[0]
    return opened, [str(error) for error in broken]


def page_of(
    runs: Sequence[Run],
    now: datetime,
    prediction: Path | None = None,
    verify: bool = False,
    refresh_s: float | None = None,
    page_folder: Path | None = None,
) -> Page:
    """The files are read again at each call."""
    found = [gather(run, now, verify, page_folder) for run in runs]
    if len(found) > 1:
        return compare.page(found, refresh_s)
    return story.page(found[0], prediction, refresh_s)


def watching(
    build: Callable[[float | None], Page],
    file: Path,
    every_s: float,
    sleep: Callable[[float], None],
    say: Callable[[str], None] = print,
) -> None:
    """Write the page until nothing more will come; the last one no longer reloads itself, however it ends."""
    page = build(every_s)
    say(f"watching: {file} is written every {every_s:g} s and reloads itself; Ctrl-C ends it")
    try:
        while page.refresh_s is not None:
            write(html(page), file)
            sleep(every_s)
            page = build(every_s)
    except KeyboardInterrupt:
        say("the watch ends; the page stays as it is")
    write(html(replace(page, refresh_s=None)), file)


def write(text: str, file: Path) -> None:
    """The old page or the new one, never a half."""
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise UserError(
            f"--output {file}: can't be written ({error.strerror or error}); name another place"
        ) from None


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.report.command"))
