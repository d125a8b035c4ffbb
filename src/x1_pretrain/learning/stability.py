"""What to do with a step: never let a number that is not finite reach the weights; notice a spike; answer it.

Pure: `judge` takes what was known and one step's loss and gradient norm, and gives a verdict and what is
known now. The same numbers on every rank give the same verdict there.

A number stands out by its distance above medians of the steps before it, in deviations that the spike itself
can't widen. While an episode lasts, the steps before it stay the measure, and what it brings is kept aside.
docs/spikes.md says where the numbers below come from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple, Self

from x1_pretrain.config import StabilityConfig

STREAK_LIMIT = 3  # steps in a row that are not finite before a run stops
KNOWN = 32  # steps before the first judgement (fewer in a smaller window)
RECENT = (8, 32)  # steps, beside the whole window, whose medians say what loss to expect
CALM = 10  # steps in a row that must not stand out before an episode is over
GIVE_UP = 64  # steps after which a loss that stayed up is the new normal
BACK = 3.0  # deviations above the loss before the episode within which a loss counts as back
CLIP_AT = 4.0  # deviations above the usual gradient norm to which gradients are cut
SKIPS = 5  # updates left out in a row, at most: weights that are never updated never recover
LOSS_FLOOR = 0.005  # nats; a deviation is at least this: a very quiet run does not alarm at trifles
NORM_FLOOR = 0.05  # ... and of the logarithm of the gradient norm: about 5 %
NORMAL = 1.4826  # deviations of a normal distribution in its median absolute deviation

# go: make the update · skip: leave it out · rewind: go back to a checkpoint · stop: nothing helps
Verdict = Literal["go", "skip", "rewind", "stop"]


@dataclass(frozen=True)
class Episode:
    """One spike, from the first step that stood out. `before`: the medians of the steps before it."""

    onset: int  # the step (1 is the first update)
    loss_before: float
    grad_norm_before: float
    peak_loss: float
    peak_loss_step: int
    peak_grad_norm: float
    peak_grad_norm_step: int
    last_flagged: int  # the latest step that stood out
    recovered: int | None = None  # the first step from which the loss was back; none: it stayed up


@dataclass(frozen=True)
class State:
    """What is known before a step; part of the checkpoint. Windows hold the latest steps, oldest first."""

    losses: tuple[float, ...] = ()
    log_norms: tuple[float, ...] = ()
    streak: int = 0  # steps just before this one that were not finite
    calm: int = 0  # steps in a row, within an episode, that did not stand out
    episode: Episode | None = None
    rewinds: int = 0
    aside_losses: tuple[float, ...] = ()  # of the steps of the episode
    aside_log_norms: tuple[float, ...] = ()
    skips: int = 0  # updates left out in a row; after SKIPS it stays until a step is below `hard`

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """What `to_json` gave, exactly. Of a damaged tree: nothing is known yet."""
        try:
            return cls(**_read(tree))
        except (TypeError, ValueError, AttributeError):
            return cls()


class Judged(NamedTuple):
    """What to do with a step, why, and what is known after it."""

    verdict: Verdict
    clip: float  # the gradient's norm is cut to this
    loss_z: float | None  # deviations above the median; None while too little is known
    grad_z: float | None
    began: Episode | None  # an episode that this step opened
    ended: Episode | None  # one that this step closed
    state: State
    flagged: bool = False  # this step stood out


class Expected(NamedTuple):
    """What the steps before lead one to expect of a number."""

    level: float
    deviation: float

    def z(self, value: float) -> float:
        return (value - self.level) / self.deviation


class Seen(NamedTuple):
    """One step whose numbers are finite, against what was expected."""

    step: int
    loss: float
    grad_norm: float
    log_norm: float
    loss_z: float
    grad_z: float
    flagged: bool


def judge(
    state: State, step: int, loss: float, grad_norm: float, settings: StabilityConfig, clip: float
) -> Judged:
    """Of the update that would make it `step` steps; `clip` is the limit that holds in any case."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return _not_finite(state, settings, clip)
    state = replace(state, streak=0)
    log_norm = math.log(max(grad_norm, sys.float_info.min))
    if len(state.losses) < min(KNOWN, settings.window):
        after = _entered(state, (loss,), (log_norm,), settings.window)
        return Judged("go", clip, None, None, None, None, after)
    losses, norms = expected_loss(state.losses), expected_log_norm(state.log_norms)
    z = losses.z(loss), norms.z(log_norm)
    seen = Seen(step, loss, grad_norm, log_norm, *z, stands_out(*z, settings.alarm))
    began, ended, after = _episode(state, seen, (losses.level, math.exp(norms.level)), settings.window)
    verdict, after = _answer(after, seen, settings)
    if verdict == "rewind":
        ended, after = after.episode, _over(after, settings.window)
    return Judged(verdict, _clip(norms, settings, clip), *z, began, ended, after, seen.flagged)


def after_rewind(saved: State, now: State) -> State:
    """The state to go on with from a checkpoint: what was normal there, no episode, the rewinds counted."""
    return State(saved.losses, saved.log_norms, rewinds=now.rewinds + 1)


# ------------------------------------------------------------------------------------------------------------
# What is normal


def expected_loss(losses: Sequence[float]) -> Expected:
    """The lowest of medians over the last few, some and all steps: the short ones follow a falling loss, the
    long ones are not drawn along by one that creeps up."""
    level = min(median(losses[-recent:]) for recent in (*RECENT, len(losses)))
    # Differences of neighbours, in which a fall cancels: they have sqrt(2) times the deviation of the loss.
    jumps = [abs(after - before) for before, after in pairwise(losses)]
    return Expected(level, max(NORMAL * median(jumps) / math.sqrt(2), LOSS_FLOOR))


def expected_log_norm(log_norms: Sequence[float]) -> Expected:
    level = median(log_norms)
    spread = median([abs(value - level) for value in log_norms])
    return Expected(level, max(NORMAL * spread, NORM_FLOOR))


def stands_out(loss_z: float, grad_z: float, alarm: float) -> bool:
    """The loss is far up; or the gradient is, and the loss halfway. A large gradient alone is an odd batch,
    and clipping takes the harm from it."""
    return loss_z > alarm or (grad_z > alarm and loss_z > alarm / 2)


def _entered(state: State, losses: tuple[float, ...], log_norms: tuple[float, ...], window: int) -> State:
    return replace(
        state, losses=(*state.losses, *losses)[-window:], log_norms=(*state.log_norms, *log_norms)[-window:]
    )


# ------------------------------------------------------------------------------------------------------------
# The episode


def _episode(
    state: State, seen: Seen, before: tuple[float, float], window: int
) -> tuple[Episode | None, Episode | None, State]:
    """The episode that began with this step, the one that ended with it, and the state that follows."""
    if state.episode is None and not seen.flagged:
        return None, None, _entered(state, (seen.loss,), (seen.log_norm,), window)
    state = replace(
        state,
        aside_losses=(*state.aside_losses, seen.loss),
        aside_log_norms=(*state.aside_log_norms, seen.log_norm),
        calm=0 if seen.flagged else state.calm + 1,
    )
    if state.episode is None:
        step, loss, norm = seen.step, seen.loss, seen.grad_norm
        began = Episode(step, *before, loss, step, norm, step, last_flagged=step)
        return began, None, replace(state, episode=began)
    now = _followed(state.episode, seen)
    state = replace(state, episode=now)
    if now.recovered is not None and state.calm >= CALM:
        return None, now, _over(state, window)
    if seen.step - now.onset >= GIVE_UP:  # what came since is the new normal, what was before is past
        return None, now, _over(replace(state, losses=(), log_norms=()), window)
    return None, None, state


def _followed(episode: Episode, seen: Seen) -> Episode:
    if seen.loss > episode.peak_loss:
        episode = replace(episode, peak_loss=seen.loss, peak_loss_step=seen.step)
    if seen.grad_norm > episode.peak_grad_norm:
        episode = replace(episode, peak_grad_norm=seen.grad_norm, peak_grad_norm_step=seen.step)
    recovered = (episode.recovered or seen.step) if seen.loss_z <= BACK else None
    return replace(
        episode, recovered=recovered, last_flagged=seen.step if seen.flagged else episode.last_flagged
    )


def _over(state: State, window: int) -> State:
    """No episode any more; its steps are past ones like all others."""
    state = _entered(state, state.aside_losses, state.aside_log_norms, window)
    return replace(state, episode=None, calm=0, aside_losses=(), aside_log_norms=())


# ------------------------------------------------------------------------------------------------------------
# The answer


def _not_finite(state: State, settings: StabilityConfig, clip: float) -> Judged:
    """Under every policy: no update, and nothing of the step is remembered but that it was."""
    state = replace(state, streak=state.streak + 1, calm=0)
    if state.streak < STREAK_LIMIT:
        return Judged("skip", clip, None, None, None, None, state)
    verdict: Verdict = "rewind" if _may_rewind(state, settings) else "stop"
    return Judged(verdict, clip, None, None, None, state.episode, _over(state, settings.window))


def _answer(state: State, seen: Seen, settings: StabilityConfig) -> tuple[Verdict, State]:
    """What the policy says to a step that is known to be finite."""
    if settings.policy not in ("skip", "rewind"):
        return "go", state
    if _stayed_up(state.episode, seen.step, settings.patience) and _may_rewind(state, settings):
        return "rewind", state
    if max(seen.loss_z, seen.grad_z) <= settings.hard:
        return "go", replace(state, skips=0)
    if state.skips >= SKIPS:
        return "go", state
    return "skip", replace(state, skips=state.skips + 1)


def _stayed_up(episode: Episode | None, step: int, patience: int) -> bool:
    return episode is not None and episode.recovered is None and step - episode.onset >= patience


def _may_rewind(state: State, settings: StabilityConfig) -> bool:
    return settings.policy == "rewind" and state.rewinds < settings.max_rewinds


def _clip(norms: Expected, settings: StabilityConfig, clip: float) -> float:
    """The usual size of the gradient and a few deviations more, where that is below the limit."""
    usual = norms.level + CLIP_AT * norms.deviation
    if settings.policy == "watch" or usual >= math.log(clip):
        return clip
    return min(clip, math.exp(usual))


# ------------------------------------------------------------------------------------------------------------
# Reading a state


WINDOWS = ("losses", "log_norms", "aside_losses", "aside_log_norms")


def _read(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a state that a tree has; ValueError or TypeError for one that can't be."""
    known = {field.name: tree[field.name] for field in fields(State) if field.name in tree}
    for name, value in known.items():
        if name == "episode":
            known[name] = None if value is None else Episode(**_numbers(value))
        elif name in WINDOWS:
            known[name] = tuple(_numbers(dict(enumerate(value))).values())
        elif type(value) is not int or value < 0:
            raise ValueError(f"{name} {value!r}")
    for losses, log_norms in (WINDOWS[:2], WINDOWS[2:]):
        if len(known.get(losses, ())) != len(known.get(log_norms, ())):
            raise ValueError(f"{losses} and {log_norms} differ in length")
    return known


def _numbers(values: Mapping[Any, Any]) -> Mapping[Any, Any]:
    for name, value in values.items():
        if name == "recovered" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} {value!r}")
    return values
