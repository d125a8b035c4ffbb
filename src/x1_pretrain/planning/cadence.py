"""How often a plan saves, and how many checkpoints it keeps. Pure.

Without a mirror a checkpoint is for a run that goes on where it was: half an hour apart. With one it is what
a lost machine leaves: a quarter of an hour is lost at worst.
"""

from __future__ import annotations

import math

from x1_pretrain.planning.losing import Rates

CHECKPOINT_H = 0.5  # what an interruption may cost
FEWEST_CHECKPOINTS = 20
KEPT = 3  # the last two and the one that is being written
KEEP_LAST, KEEP_LOCAL = 4, 2  # with a mirror: an hour to go back to there, on this disk what it had before
DISK_MB_PER_S, NETWORK_MB_PER_S = 500.0, 100.0  # assumed; `x1 doctor --mirror` measures both


def rates(step_s: float, checkpoint_bytes: float, look_s: float, most_mb_per_s: float | None) -> Rates:
    """By the assumed rates of disk and network; `most_mb_per_s` is all that the mirror may send."""
    network = min(NETWORK_MB_PER_S, most_mb_per_s or math.inf)
    return Rates(step_s, checkpoint_bytes / (DISK_MB_PER_S * 1e6), checkpoint_bytes / (network * 1e6), look_s)


def every_alone(step_s: float, steps: int) -> int:
    """Half an hour's worth, and at least twenty in a run; down to two digits."""
    wanted = min(CHECKPOINT_H * 3600 / step_s, steps / FEWEST_CHECKPOINTS)
    unit = 10 ** max(0, math.floor(math.log10(max(wanted, 1.0))) - 1)
    return max(1, int(wanted // unit * unit))


def every_mirrored(pace: Rates, steps: int) -> int:
    """A round number by which a lost machine takes about 15 minutes, at least twenty in a run; fewer where
    the checkpoint is so large that writing it is not cheap. Never more than there are steps."""
    return min(pace.every(at_most=max(1.0, steps / FEWEST_CHECKPOINTS)), steps)
