"""When the watchdog gives a run up: what it tells, and what it saves before the process ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from x1_pretrain.runtime.assemble import is_cuda
from x1_pretrain.runtime.run import Run
from x1_pretrain.runtime.saving import save_here
from x1_pretrain.runtime.watchdog import Hang


def hung(run: Run, hang: Hang) -> None:
    """From the watchdog's thread, bounded in time by it; no collectives: another rank may be what hangs."""
    path = str(hang.path) if hang.path else None
    run.note("hang", hang.line(), phase=hang.phase, seconds=round(hang.seconds, 1), path=path)
    if run.records:
        run.records.sync()
    if run.guard:
        run.guard.notifier.alert(f"hang-{run.step}", f"X1 {run.config.name}: hung, relaunching", hang.line())
    if run.world.first and hang.at_rest and run.saved_step < run.step:
        with beside_what_hangs(run):
            save_here(run)


def beside_what_hangs(run: Run) -> AbstractContextManager[object]:
    """A stream of its own: on the usual one a copy would wait behind the kernel that does not end."""
    if not is_cuda(run.world):
        return nullcontext()
    stream = torch.cuda.Stream(run.world.device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)
