"""The first and the last word of a post-mortem: what caused the spike, how it ended, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from x1_pretrain.postmortem.steps_file import value
from x1_pretrain.postmortem.verdict import GREW, Evidence
from x1_pretrain.postmortem.words import code, count, joined, sentence, spans, times

if TYPE_CHECKING:
    from x1_pretrain.postmortem.effects import Lasting
    from x1_pretrain.postmortem.findings import Findings


def verdict(found: Findings) -> str:
    """The cause, and how it ended."""
    return f"**Verdict.** {sentence(cause(found))} {ending(found)}"


def cause(found: Findings) -> str:
    """In words as sure as the evidence is."""
    evidence = found.evidence
    back = count(evidence.steps_to_recover or 0, "step")
    match found.verdict.cause:
        case "injected":
            return f"This spike was made on purpose: rare tokens took the place of {_batches(found)}"
        case "not finite":
            broken = count(evidence.not_finite, "step")
            return f"{broken} in it had no finite loss or gradient. {_arithmetic(evidence.precision)}"
        case "data":
            return f"The data are the likeliest cause: {joined(evidence.patterns)}"
        case "warm-up":
            within = "within" if evidence.onset <= evidence.warmup_steps else "right after"
            return (
                f"The learning rate is the likeliest cause: step {evidence.onset:,} lies {within} the "
                f"warm-up of {evidence.warmup_steps:,} steps{_data(found)}"
            )
        case "resume":
            since = count(evidence.steps_since_resume or 0, "step")
            return f"It came {since} after the run was resumed, which is too close to be taken for chance"
        case "one batch":
            return f"One batch made it: the loss was back after {back}, too soon for a cure{_data(found)}"
        case "attention":
            return (
                f"Attention is the likeliest cause: its logits had reached {evidence.logit_max or 0:.0f} "
                f"before it{_growth(evidence)}{_data(found)}"
            )
        case "optimizer":
            return f"The optimizer is the likeliest cause, for want of another{_data(found)}"


def _growth(evidence: Evidence) -> str:
    if (evidence.logit_growth or 0) <= GREW:
        return ""
    return f", {times(evidence.logit_growth or 0)} what they were at three quarters of the way there"


def _batches(found: Findings) -> str:
    steps = found.seen.injected if found.seen else []
    if not steps:
        return "some of its batches"
    return f"the batch of step {steps[0]:,}" if len(steps) == 1 else f"the batches of steps {spans(steps)}"


def _arithmetic(precision: str) -> str:
    if precision == "fp32":
        return "The run computed in fp32, so it was not the precision: the numbers themselves ran away"
    return f"The run computed in {precision}, which is the first thing to doubt"


def _data(found: Findings) -> str:
    if found.evidence.data_seen:
        return "; nothing sets its data apart from those before"
    return "; its data could not be looked at here"


def ending(found: Findings) -> str:
    """How it ended, and what it left behind."""
    spike, left = found.spike, found.lasting
    if spike.rewound_to is not None:
        return (
            f"The run went back to step {spike.rewound_to:,} and jumped over the batches it had read since: "
            "nothing can be left behind."
        )
    if spike.recovered is None:
        return "It had not recovered at the last row." if spike.end is None else "The loss did not come back."
    told = f"The run was back after {count(spike.recovery_steps or 0, 'step')}"
    if found.untouched:
        return f"{told}; every update of it was left out, so nothing can be left behind."
    if left is None or not left.settled:
        return f"{told}; too few steps have followed to say what it left behind."
    return f"{told}{lasted(left)}"


def lasted(left: Lasting) -> str:
    """The rest of the sentence: no more than the error allows, and no cause."""
    match left.reading:
        case "may have":
            return (
                f", and the loss then lay {left.difference:.3f} nats above a straight line through the steps "
                f"before. A loss that flattens does so too, but this is well outside the error of "
                f"±{left.error:.3f}: it may have left something behind."
            )
        case "above":
            return (
                f", and the loss then lay {left.difference:.3f} nats above a straight line through the steps "
                f"before (±{left.error:.3f}); a loss that flattens does so too."
            )
        case "blind":
            return (
                f". Whether it left anything behind is not known: an effect below {left.error:.2f} nats "
                "could not be seen."
            )
        case "nothing":
            return f", and nothing lasting is to be seen (to within {left.error:.3f} nats)."


def advice(found: Findings) -> str:
    if not found.verdict.advice:
        return f"Nothing needs to change: {credit(found)}."
    return "\n".join(f"- {code(one.field)}: {one.text}." for one in found.verdict.advice)


def credit(found: Findings) -> str:
    """What took it; a policy only where the rows show that it did something."""
    config = found.run.config
    policy = f"stability.policy {code(config.stability.policy)}"
    if found.spike.rewound_to is not None:
        return f"{policy} undid it"
    if found.untouched:
        return f"{policy} left every update of it out"
    tighter = any(
        value(row, "clip") < (1 - 1e-6) * config.optimizer.clip
        and value(row, "grad_norm") > value(row, "clip")
        for row in found.during
    )
    if tighter or found.spike.skipped:
        return f"with {policy} the run took it"
    if found.clipping and found.clipping.cut:
        return (
            f"the run took it with optimizer.clip {config.optimizer.clip:g} alone; {policy} changed nothing"
        )
    return "the run took it by itself"
