"""What every command shares: a typer app of one function, its exit code, its errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
import typer.main

from x1_pretrain.errors import USAGE, guarded

# typer brings its own copy of click or uses the one installed: the base of its errors is found by name
UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def single(function: Callable[..., object]) -> typer.Typer:
    """A typer app whose only command is `function`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    return app


def run(app: typer.Typer, args: list[str] | None = None, prog: str | None = None) -> int:
    """Run `app` and return its exit code; usage errors are one line naming the flag, exit code 2."""
    command = typer.main.get_command(app)

    def call() -> object:
        return command.main(
            args=sys.argv[1:] if args is None else args, prog_name=prog, standalone_mode=False
        )

    try:
        return guarded(call)
    except UsageProblem as error:
        where = prog or "x1"
        print(f"x1: {_message(error)} (`{where} --help` lists the options)", file=sys.stderr)
        return USAGE
    except typer.Abort:
        print("x1: interrupted", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    """click's own wording: it names the option."""
    wording: Callable[[], str] = getattr(error, "format_message", lambda: str(error))
    return wording().rstrip(".")
