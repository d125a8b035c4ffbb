"""`x1_pretrain.train` with one phase made slow and announced, so that a test can send a signal into it.

    python slow_phase.py PHASE [train's arguments]

The code under test is untouched: the phase's own function is wrapped to print a line and to take longer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import x1_pretrain.train as train
from x1_pretrain.command import run
from x1_pretrain.corpus.reader import Reader
from x1_pretrain.evals import perplexity
from x1_pretrain.records import checkpoint_files
from x1_pretrain.runtime import fit

FROM_STEP = 12  # slow only once there is something to lose


def announced(function: Callable[..., Any], phase: str, seconds: float, calls: int = 0) -> Callable[..., Any]:
    """`function`, which from its `calls`-th call on first says so and sleeps."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            print(f"PHASE {phase}", flush=True)
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # a signal handler runs between short sleeps, as in real work
                time.sleep(0.01)
        return function(*args, **kwargs)

    return wrapped


def slow_down(phase: str) -> None:
    if phase == "step":
        train.forward = announced(train.forward, phase, 0.4, calls=2 * FROM_STEP)
    elif phase == "first-step":
        train.forward = announced(train.forward, phase, 600)
    elif phase == "evaluation":
        perplexity._padded = announced(perplexity._padded, phase, 0.4, calls=8)
    elif phase == "data":
        Reader.read = announced(Reader.read, phase, 600, calls=FROM_STEP)  # type: ignore[method-assign]
    elif phase == "checkpoint":
        checkpoint_files._seal = announced(checkpoint_files._seal, phase, 1.5, calls=1)
    elif phase == "endless-checkpoint":
        checkpoint_files._seal = announced(checkpoint_files._seal, phase, 600, calls=1)
    elif phase == "compile":
        fit.try_compile = announced(fit.try_compile, phase, 0)


if __name__ == "__main__":
    slow_down(sys.argv[1])
    raise SystemExit(run(train.app, sys.argv[2:]))
