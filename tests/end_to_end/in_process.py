"""`x1 train` called in this process: its exit code and its output, in a tenth of the time of a new one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from x1_pretrain import train
from x1_pretrain.command import run


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def one_line(self) -> str:
        """What a person reads on stderr: exactly one line, never a traceback."""
        assert self.err.startswith("x1: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


def train_here(capfd: pytest.CaptureFixture[str], *args: str | Path) -> Outcome:
    capfd.readouterr()
    code = run(train.app, [str(a) for a in args], prog="x1 train")
    out, err = capfd.readouterr()
    return Outcome(code, out, err)
