"""What a machine that dies takes with it, and how often to save so that it is little. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOSS_S = 900.0  # that a plan is made to lose at worst
ABOUT = 1.05  # of that: a round number of steps may be a little more
SAVING_SHARE = 0.01  # of the time, that writing checkpoints may take
ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # times a power of ten


@dataclass(frozen=True)
class Timing:
    """In seconds: of training between two checkpoints, of writing one, of sending it, between two looks."""

    train_s: float
    write_s: float
    send_s: float
    look_s: float

    @property
    def period_s(self) -> float:
        """Of the clock, between two checkpoints."""
        return self.train_s + self.write_s

    @property
    def keeps_up(self) -> bool:
        """Each is sent before the next is there."""
        return self.look_s + self.send_s <= self.period_s

    def worst_s(self) -> float:
        """Paid time that is lost when the machine dies just before the next checkpoint is in the mirror:
        since the last one that is there began to be written. Where sending takes longer than training
        between two, the newest is sent each time, and those before it are passed over."""
        if self.keeps_up:
            return self.period_s + self.write_s + self.look_s + self.send_s
        return self.period_s + self.write_s + 2 * (self.look_s + self.send_s)

    def worst_steps(self, step_s: float) -> float:
        """Steps that are done again: of that time the writing made none."""
        return (self.worst_s() - 2 * self.write_s) / step_s


@dataclass(frozen=True)
class Rates:
    """What decides how often to save. In seconds, as above."""

    step_s: float
    write_s: float
    send_s: float
    look_s: float

    def timing(self, every: float) -> Timing:
        return Timing(every * self.step_s, self.write_s, self.send_s, self.look_s)

    @property
    def keeping_up(self) -> float:
        """Steps between two checkpoints below which the mirror can't send each."""
        return max(0.0, self.look_s + self.send_s - self.write_s) / self.step_s

    @property
    def cheap(self) -> float:
        """Steps between two below which writing them takes more than its share of the time."""
        return self.write_s * (1 / SAVING_SHARE - 1) / self.step_s

    def every(self, at_most: float = math.inf, loss_s: float = LOSS_S) -> int:
        """Steps between two checkpoints, a round number: about `loss_s` are lost at worst, and it is not more
        than `at_most`. Never so few that the writing is not cheap, nor, up to `at_most`, that the mirror
        can't send each."""
        beside_s = 2 * self.write_s + self.look_s + self.send_s
        most = min(at_most, (ABOUT * loss_s - beside_s) / self.step_s)
        least = max(1.0, self.cheap, min(self.keeping_up, at_most))
        every = round_down(max(1.0, most))
        return every if every >= least else round_up(least)


def round_down(value: float) -> int:
    """The largest round number up to `value`, of at least 1."""
    return max(whole for whole in _around(value) if whole <= value)


def round_up(value: float) -> int:
    """The smallest round number from `value` on."""
    return min(whole for whole in _around(value) if whole >= value)


def _around(value: float) -> list[int]:
    unit = 10.0 ** math.floor(math.log10(value))
    found = [step * unit * power for power in (0.1, 1.0, 10.0) for step in ROUND]
    return [round(one) for one in found if one >= 0.9 and math.isclose(one, round(one))]
