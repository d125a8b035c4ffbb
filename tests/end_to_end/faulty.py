"""`x1_pretrain.train` in which one thing goes wrong, at a step of one's choice.

    python faulty.py FAULT [train's arguments]

The code under test is untouched: one function is wrapped. A hang announces itself by `FAULT`.
"""

from __future__ import annotations

import ctypes
import datetime as clock
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import x1_pretrain.train as train
from x1_pretrain.command import run
from x1_pretrain.corpus.reader import Reader
from x1_pretrain.evals import perplexity
from x1_pretrain.records import checkpoint_files, metrics

AT_STEP = 12


def stuck_for_ever(*_: Any) -> None:
    """The name that has to be in the stacks."""
    print("FAULT", flush=True)
    while True:
        time.sleep(0.1)


def stuck_with_pythons_lock(*_: Any) -> None:
    """A library that waits for itself, and keeps every Python thread from running."""
    print("FAULT", flush=True)
    time.sleep(1.5)  # the watchdog looks once a second: it has to have seen this phase
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def held(run: Any) -> None:
    """Until the file `go` is beside the run's folder; no hang."""
    print("FAULT", flush=True)
    while not (run.config.folder.parent / "go").exists():
        run.watchdog.beat()
        time.sleep(0.02)


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def before(function: Callable[..., Any], fault: Callable[..., None], calls: int) -> Callable[..., Any]:
    """`function`, with `fault` before each call from the `calls`-th on."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            fault(*args)
        return function(*args, **kwargs)

    return wrapped


def at_step(fault: Callable[[Any], None], last: int = 10**9) -> None:
    """`fault(run)` before the forward pass of the updates from AT_STEP + 1 to `last`."""
    original = train.train_step

    def wrapped(run: Any, batch: Any) -> Any:
        if AT_STEP <= run.step < last:
            fault(run)
        return original(run, batch)

    train.train_step = wrapped


def spoil_weight(run: Any) -> None:
    with torch.no_grad():
        run.decoder.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = float("nan")


def spoil_gradient(run: Any) -> None:
    """The next backward pass gives one gradient that is not a number."""
    weight = run.decoder.get_parameter("model.layers.0.self_attn.q_proj.weight")
    handle = weight.register_hook(lambda g: (handle.remove(), g * float("nan"))[1])


def set_clock_back(*_: Any) -> None:
    """An hour, in what the records call now; and what Python calls the time of day."""

    class Earlier(clock.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return clock.datetime.now(tz) - clock.timedelta(hours=1)

    metrics.datetime = Earlier  # type: ignore[misc]
    real = time.time
    if not getattr(real, "set_back", False):
        earlier = lambda: real() - 3600  # noqa: E731
        earlier.set_back = True  # type: ignore[attr-defined]
        time.time = earlier


def break_it(fault: str) -> None:
    if fault == "slow":
        at_step(lambda _: time.sleep(0.06))
    elif fault == "held":
        at_step(held, last=AT_STEP + 1)
        at_step(lambda _: time.sleep(0.06))
    elif fault == "reader-dies":
        Reader.read = before(Reader.read, raising(OSError(5, "Input/output error")), AT_STEP)  # type: ignore
    elif fault == "reader-ends":  # a thread that is gone without a word
        Reader._run = lambda *_: None  # type: ignore[method-assign]
    elif fault == "data-hangs":
        Reader.read = before(Reader.read, stuck_for_ever, AT_STEP)  # type: ignore[method-assign]
    elif fault == "step-hangs":
        train.forward = before(train.forward, stuck_for_ever, 2 * AT_STEP)
    elif fault == "library-hangs":
        train.forward = before(train.forward, stuck_with_pythons_lock, 2 * AT_STEP)
    elif fault == "evaluation-hangs":
        perplexity._padded = before(perplexity._padded, stuck_for_ever, 8)
    elif fault == "checkpoint-hangs":
        checkpoint_files._seal = before(checkpoint_files._seal, stuck_for_ever, 1)
    elif fault == "exception":
        train.forward = before(train.forward, raising(RuntimeError("a cosmic ray")), 2 * AT_STEP)
    elif fault == "weight":
        at_step(spoil_weight)
    elif fault == "gradient":
        at_step(spoil_gradient)
    elif fault == "gradient-once":
        at_step(spoil_gradient, last=AT_STEP + 1)
    elif fault == "clock":
        at_step(set_clock_back)
    else:
        raise SystemExit(f"no fault {fault}")


if __name__ == "__main__":
    break_it(sys.argv[1])
    raise SystemExit(run(train.app, sys.argv[2:]))
