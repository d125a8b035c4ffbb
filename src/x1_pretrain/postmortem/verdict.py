"""From the evidence of a spike to a verdict and advice: fixed rules; the first that fits names the cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from x1_pretrain.config import RunConfig

Cause = Literal["injected", "not finite", "data", "warm-up", "resume", "one batch", "attention", "optimizer"]
State = Literal["recovered", "rewound", "open", "not recovered"]

BRIEF_STEPS = 2  # a loss that is back so soon was one batch's, not the weights'
AFTER_WARMUP = 1.25  # times the warm-up: still its own time
AFTER_RESUME = 5  # steps
LOGITS = 50.0  # attention logits at which softmax all but picks one token
GREW = 2.0  # times: a maximum that grew so far before the onset is on its way ...
GROWN = 20.0  # ... once it is this large: from 5 to 12 is a model that learns to attend
LONG_MEMORY = 0.99  # beta2 from which one spike weighs on a hundred steps


@dataclass(frozen=True)
class Evidence:
    """What is known of one spike; None: not known."""

    injected: bool = False
    state: State = "recovered"
    not_finite: int = 0  # steps without a finite loss or gradient
    precision: str = "bf16"  # of the computation
    steps_to_recover: int | None = None
    patterns: tuple[str, ...] = ()  # what stands out in its data, in words
    data_seen: bool = True  # the documents could be looked at
    onset: int = 1
    warmup_steps: int = 0
    steps_since_resume: int | None = None
    logit_max: float | None = None  # before the onset
    logit_growth: float | None = None
    cut_factor: float | None = None  # of the hardest clip
    lasting: float | None = None  # nats, where well clear of the error: it may have left something
    untouched: bool = False  # every update of it was left out
    spikes: int = 1  # in the whole run, without those made on purpose


class Advice(NamedTuple):
    field: str  # of the config, or a command
    text: str


class Verdict(NamedTuple):
    cause: Cause
    state: State
    advice: list[Advice]


def judge(found: Evidence, config: RunConfig) -> Verdict:
    """The cause that the evidence points to, and what to do."""
    cause = _cause(found)
    advice = [*_for_state(found, config), *_for_cause(cause, found, config)]
    return Verdict(cause, found.state, _once(advice))


def _cause(found: Evidence) -> Cause:
    if found.injected:
        return "injected"
    if found.not_finite:
        return "not finite"
    if found.patterns:
        return "data"
    if found.warmup_steps and found.onset <= AFTER_WARMUP * found.warmup_steps:
        return "warm-up"
    if found.steps_since_resume is not None and 0 < found.steps_since_resume <= AFTER_RESUME:
        return "resume"
    if found.steps_to_recover is not None and found.steps_to_recover <= BRIEF_STEPS:
        return "one batch"
    logits = found.logit_max or 0
    if logits > LOGITS or (logits > GROWN and (found.logit_growth or 0) > GREW):
        return "attention"
    return "optimizer"


# -----------------------------------------------------------------------------------------------------------
# What to do


def _for_state(found: Evidence, config: RunConfig) -> list[Advice]:
    """First what can't wait."""
    policy = config.stability.policy
    if found.state == "not recovered" and policy != "rewind":
        return [
            Advice(
                "stability.policy",
                f"it is {policy!r}, which never goes back. A loss that stays up rarely comes down by itself: "
                f"stop, and in the next run let 'rewind' go back to the checkpoint before step "
                f"{found.onset:,} and jump over its batches",
            )
        ]
    if found.state == "not recovered":
        return [
            Advice(
                "stability.max_rewinds",
                f"the run was allowed {config.stability.max_rewinds}; going back once more with the same "
                "settings is unlikely to help. Stop, and change what is named below in the next run",
            )
        ]
    if found.state == "open":
        return [
            Advice("x1 postmortem", "run it again when the loss has settled; it was still up at the last row")
        ]
    return []


def _for_cause(cause: Cause, found: Evidence, config: RunConfig) -> list[Advice]:
    rules = {
        "injected": _injected,
        "not finite": _not_finite,
        "data": _data,
        "warm-up": _warmup,
        "resume": _resume,
        "one batch": _one_batch,
        "attention": _attention,
        "optimizer": _optimizer,
    }
    return rules[cause](found, config)


def _injected(found: Evidence, config: RunConfig) -> list[Advice]:
    harmless = found.state == "recovered" and found.lasting is None
    if harmless or found.untouched or found.state == "rewound":
        return []
    lr = config.optimizer.lr
    return [
        Advice(
            "optimizer.clip",
            f"it is {config.optimizer.clip:g}; a lower one lets less of such a batch through",
        ),
        Advice("optimizer.lr", f"it is {lr:g}; a run that a few odd batches throw off may be near its limit"),
    ]


def _not_finite(found: Evidence, config: RunConfig) -> list[Advice]:
    """In fp32 it was not the precision: the numbers themselves ran away."""
    steps = "1 step was" if found.not_finite == 1 else f"{found.not_finite} steps were"
    if found.precision == "fp32":
        lr = config.optimizer.lr
        return [
            Advice("optimizer.lr", f"it is {lr:g}, and {steps} not finite; try {lr / 2:g}"),
            *_logits(config),
        ]
    text = f"the run computed in {found.precision}, and {steps} not finite. If a run with 'fp32' passes the "
    return [Advice("training.precision", f"{text}same step, it was the precision"), *_logits(config)]


def _data(found: Evidence, config: RunConfig) -> list[Advice]:
    return [
        Advice(
            "data",
            "read the documents named above, and take what should not be there out before the next run",
        ),
        *_policy(config),
    ]


def _warmup(found: Evidence, config: RunConfig) -> list[Advice]:
    optimizer = config.optimizer
    return [
        Advice(
            "optimizer.warmup_steps",
            f"it is {optimizer.warmup_steps:,}, and the loss gave way at step {found.onset:,}; try "
            f"{2 * optimizer.warmup_steps:,}",
        ),
        Advice(
            "optimizer.lr", f"it is {optimizer.lr:g}; {optimizer.lr / 2:g} if a longer warm-up is not enough"
        ),
    ]


def _resume(found: Evidence, config: RunConfig) -> list[Advice]:
    return [
        Advice(
            "x1 verify",
            f"the run had been resumed {found.steps_since_resume} steps before. Check that the checkpoint is "
            "whole and that machine, precision and library versions are the same as before",
        )
    ]


def _one_batch(found: Evidence, config: RunConfig) -> list[Advice]:
    more = (
        [] if found.data_seen else [Advice("data", "look at the batch where the corpus is: it was not here")]
    )
    return [*more, *_policy(config)]


def _attention(found: Evidence, config: RunConfig) -> list[Advice]:
    return _logits(config) + _steps(found, config)[:1]


def _optimizer(found: Evidence, config: RunConfig) -> list[Advice]:
    return [*_steps(found, config), *_logits(config)]


def _steps(found: Evidence, config: RunConfig) -> list[Advice]:
    """The size of the steps, and how long one weighs on the next."""
    optimizer, advice = config.optimizer, []
    if found.spikes > 1 or found.lasting or found.state != "recovered":
        undone = "a spike that had to be undone"
        one = undone if found.state == "rewound" else "a spike that may have left something behind"
        times = f"{found.spikes} spikes" if found.spikes > 1 else one
        advice.append(
            Advice("optimizer.lr", f"it is {optimizer.lr:g}; after {times}, try {optimizer.lr / 1.5:.2g}")
        )
    if optimizer.beta2 >= LONG_MEMORY:
        advice.append(
            Advice(
                "optimizer.beta2",
                f"it is {optimizer.beta2:g}: squared gradients are remembered for "
                f"{1 / (1 - optimizer.beta2):,.0f} steps, too long to notice that they grow; 0.95 notices "
                "within 20",
            )
        )
    return [*advice, *_policy(config)]


def _logits(config: RunConfig) -> list[Advice]:
    advice = []
    if not config.model.qk_norm:
        advice.append(
            Advice("model.qk_norm", "it is off; switched on in a new run it bounds the attention logits")
        )
    if not config.training.z_loss:
        advice.append(Advice("training.z_loss", "it is 0; 1e-5 keeps the output logits from drifting"))
    return advice


def _policy(config: RunConfig) -> list[Advice]:
    """The next stricter one; beyond 'skip' only the cause is left."""
    known = {
        "watch": f"it is 'watch': only clip {config.optimizer.clip:g} stood between; 'clip' follows the norm",
        "clip": "it is 'clip'; 'skip' would also leave out updates far above the usual",
    }
    text = known.get(config.stability.policy)
    return [Advice("stability.policy", text)] if text else []


def _once(advice: list[Advice]) -> list[Advice]:
    """Each field once, the first word on it wins."""
    seen: dict[str, Advice] = {}
    for one in advice:
        seen.setdefault(one.field, one)
    return list(seen.values())
