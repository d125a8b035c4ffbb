"""The commands of the demos: shown as anyone would type them, started, and held to their exit codes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from x1_pretrain.errors import UserError

say = Console(highlight=False, soft_wrap=True).print


def start(*args: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Show a command and start it; `env` is added to its environment."""
    words = [str(a) for a in args]
    say(f"\n[bold]$ x1 {escape(shlex.join(words))}[/bold]")
    command = [sys.executable, "-m", "x1_pretrain.cli", *words]
    return subprocess.Popen(command, env={**os.environ, **(env or {})})


def must(code: int, what: str) -> None:
    if code:
        raise UserError(f"demo: `x1 {what}` ended with exit code {code}, see above")
