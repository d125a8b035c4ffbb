"""What is wrong with a plan that exists, each finding with its number, where that comes from, and what to do.

Pure. What a finding costs is in dollars of compute where that can be said: hours that were not thought of, or
the share of the bill that does no good. Findings without a price come after those with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.learning.recipe import (
    BATCH_POWER,
    BATCH_SCALE,
    DEEPSEEK,
    Recipe,
    batch_rule,
    body_flops_per_token,
    lr_line,
    lr_rule,
)
from x1_pretrain.model.flops import mfu
from x1_pretrain.model.memory import training_memory
from x1_pretrain.numbers import human
from x1_pretrain.planning import cadence
from x1_pretrain.planning.belief import spread
from x1_pretrain.planning.choice import Candidates
from x1_pretrain.planning.losing import LOSS_S
from x1_pretrain.planning.planner import Ask, Plan, amount, plan, trainable

UNLIKELY_MFU = 0.65  # published runs on A100 and H100 stay below
IMPOSSIBLE_MFU = 0.90  # even a single large matrix product does not reach the data sheet
FAR_LR = 2.0  # a rate further from the rule than this is a finding
FAR_BATCH = 2.5
WARMUP_RANGE = (0.002, 0.10)  # of the steps
ENOUGH_LOST = 0.02  # of the compute
FAR_LOSS = 2.0  # times what a plan is made to lose


@dataclass(frozen=True)
class Finding:
    title: str
    said: str  # the number
    source: str
    do: str
    usd: float | None = None  # None: no price can be put on it


@dataclass(frozen=True)
class Judged:
    """An existing plan, priced; what is wrong with it; and what the same hours buy at the optimum."""

    config: RunConfig
    priced: Plan
    findings: tuple[Finding, ...]
    instead: Plan | None


@dataclass(frozen=True)
class Claim:
    """A speed that somebody states for this config."""

    tokens_per_sec: float


def judge(config: RunConfig, ask: Ask, claim: Claim | None = None) -> Judged:
    """`ask.models` is the ladder to compare with; its tokens, dollars and hours are the user's limits."""
    priced = priced_as_is(config, ask)
    instead = optimum_for(priced, ask)
    found = list(_findings(config, priced, instead, claim))
    ordered = sorted(found, key=lambda one: -1.0 if one.usd is None else one.usd, reverse=True)
    return Judged(config, priced, tuple(ordered), instead)


def priced_as_is(config: RunConfig, ask: Ask) -> Plan:
    """The config as a plan, nothing of it changed."""
    optimizer, steps = config.optimizer, config.training.total_steps
    decay = optimizer.decay(steps) if optimizer.schedule == "wsd" else steps - optimizer.warmup_steps
    given = Recipe(
        config.training.batch_tokens, steps, optimizer.lr, optimizer.min_lr, optimizer.warmup_steps, decay, ()
    )
    return Plan(replace(ask, models=(config.model,)), config.model, given, "--config")


def optimum_for(priced: Plan, ask: Ask) -> Plan | None:
    """The best run of as many hours on the same data; None where there is nothing to choose from."""
    free = replace(
        ask,
        hours=priced.hours,
        dollars=None,
        tokens=None,
        flops=None,
        steps=None,
        ratio=None,
        batch_tokens=None,
        asked_n=None,
    )
    try:
        return plan(free)
    except UserError:  # less than one step of the smallest model
        return None


def _findings(
    config: RunConfig, priced: Plan, instead: Plan | None, claim: Claim | None
) -> Iterator[Finding]:
    if claim:
        yield from _claimed_speed(priced, claim)
    yield from _limits(priced)
    if instead:
        yield from _off_optimum(priced, instead)
    yield from _repeats(priced)
    yield from _band(config, priced)
    yield from _rate(config, priced)
    yield from _batch(config, priced)
    yield from _schedule(config)
    yield from _cadence(priced)
    yield from _memory(config, priced)


def usd_per_hr(priced: Plan) -> float:
    return float(priced.ask.machine.price.all_in_usd_per_hr)


def training_usd(priced: Plan) -> float:
    return priced.hours * usd_per_hr(priced)


# ------------------------------------------------------------------------------------------------------------
# Speed, time, money


def share_of_peak(priced: Plan, tokens_per_sec: float, flops: float) -> float | None:
    machine = priced.ask.machine
    if machine.peak_flops_per_sec is None:
        return None
    return mfu(tokens_per_sec, flops, machine.peak_flops_per_sec, machine.gpus)


def _claimed_speed(priced: Plan, claim: Claim) -> Iterator[Finding]:
    palm = share_of_peak(priced, claim.tokens_per_sec, priced.cost.palm)
    causal = share_of_peak(priced, claim.tokens_per_sec, priced.cost.causal)
    if palm is None or causal is None or palm <= UNLIKELY_MFU:
        return
    word = "impossible" if palm > IMPOSSIBLE_MFU else "unlikely"
    believed_h = priced.tokens / claim.tokens_per_sec / 3600
    missing_h = priced.hours - believed_h
    honest = priced.ask.speed
    also = (
        ""
        if honest.flops_per_sec == claim.tokens_per_sec * priced.cost.palm
        else (
            f"; {honest.said} gives {honest.tokens_per_sec(priced.model):,.0f} (attention in full) to "
            f"{honest.flops_per_sec / priced.cost.causal:,.0f} (causal), so {priced.hours:.1f} h, not "
            f"{believed_h:.1f}"
        )
    )
    yield Finding(
        f"{claim.tokens_per_sec:,.0f} tokens/s is {word}",
        f"it needs {causal:.0%} (causal) to {palm:.0%} (attention in full) of the peak{also}",
        "FLOPs per token: 6 (N + V d) + attention; data sheet",
        "measure 100 steps, then plan with --tokens-per-sec or --like RUN",
        missing_h * usd_per_hr(priced) if also else None,
    )


def _limits(priced: Plan) -> Iterator[Finding]:
    ask = priced.ask
    rate = priced.tokens_per_sec
    if ask.hours is not None and priced.hours > ask.hours:
        seconds = ask.hours * 3600
        fits, most = seconds * rate, seconds * ask.speed.flops_per_sec / priced.cost.causal
        step = int(fits / priced.recipe.batch_tokens)
        yield Finding(
            f"{priced.hours:.1f} h, not {ask.hours:g}",
            f"{human(priced.tokens)} tokens at {rate:,.0f}/s; {ask.hours:g} h give {human(fits)} (attention "
            f"in full) to {human(most)} (causal), step {step:,} of {priced.recipe.steps:,}",
            ask.speed.said,
            f"set training.total_steps to {step:,}, or pay for the hours",
            (priced.hours - ask.hours) * usd_per_hr(priced),
        )
    if ask.dollars is not None and priced.quote.buffer_usd < 0:
        yield Finding(
            f"${priced.quote.total_usd:,.2f}, not ${ask.dollars:,.2f}",
            f"x1 launch refuses it: {priced.hours:.1f} h of training and {ask.machine.reserve_h:.1f} h "
            "around it",
            "the gate's sentence",
            f"`x1 plan --dollars {amount(ask.dollars)}` makes one that fits",
            float(-priced.quote.buffer_usd),
        )


# ------------------------------------------------------------------------------------------------------------
# Size, data, loss


def _off_optimum(priced: Plan, instead: Plan) -> Iterator[Finding]:
    lost = priced.expected.point - instead.expected.point
    hours = hours_to_reach(priced.expected.point, instead)
    enough = hours / instead.hours
    if lost <= 0 or 1 - enough < ENOUGH_LOST:
        return
    yield Finding(
        f"{priced.tokens / priced.counts.matrices:,.0f} tokens per parameter in matrices",
        f"loss {priced.expected.point:.2f}; the same hours give {instead.expected.point:.2f} with "
        f"{human(instead.counts.matrices)} ({human(instead.counts.total)} in all) x {human(instead.tokens)} "
        "tokens",
        f"{priced.ask.belief.name}, {priced.ask.belief.counts}",
        f"a larger model gets to the same loss in {human(hours, 2)} h; keep this one where a small model is "
        "what you want to serve (--inference-tokens)"
        if instead.counts.matrices > priced.counts.matrices
        else f"a smaller model on more tokens gets to the same loss in {human(hours, 2)} h",
        (1 - enough) * training_usd(priced),
    )


def hours_to_reach(target: float, instead: Plan) -> float:
    """The least time in which some size gets there, by halving: below what `instead` takes."""
    ask = instead.ask
    found = Candidates.of(trainable(ask)[0], ask.belief)
    low, high = 0.0, instead.hours
    for _ in range(24):
        middle = (low + high) / 2
        tokens = ask.speed.flops_per_sec * middle * 3600 / found.palm
        there = float(ask.belief.loss(found.n, tokens, ask.data).min()) <= target
        low, high = (low, middle) if there else (middle, high)
    return high


def _repeats(priced: Plan) -> Iterator[Finding]:
    data = priced.ask.data
    if data is None:
        return
    for part, epochs in zip(data.parts, data.epochs(priced.tokens), strict=True):
        if epochs <= 1:
            continue
        drawn = part.share * priced.tokens
        value = forms.effective_tokens(part.tokens, drawn) / drawn
        yield Finding(
            f"{epochs:.2f} epochs of {part.name}",
            f"{priced.recipe.steps:,} steps x {priced.recipe.batch_tokens:,} = {human(priced.tokens)} "
            f"tokens, {human(drawn)} of them from {human(part.tokens)}: worth {value:.0%} of fresh ones",
            "Muennighoff et al. 2023, arXiv 2305.16264",
            "up to 4 epochs cost little; beyond, get more text or train a larger model",
            (1 - value) * training_usd(priced) * part.share,
        )


def _band(config: RunConfig, priced: Plan) -> Iterator[Finding]:
    if config.verify.loss_band is None:
        return
    low, high = config.verify.loss_band
    data, tokens, belief = priced.ask.data, float(priced.tokens), priced.ask.belief
    counts: tuple[forms.Counts, ...] = ("matrices", "total")
    both = [replace(belief, fitted=replace(belief.fitted, counts=which)) for which in counts]
    by_matrices, by_all = (
        float(forms.loss(one.law, *one.counted(priced.model, tokens, data))) for one in both
    )
    outside = [value for value in (by_matrices, by_all) if not low <= value <= high]
    if not outside:
        return
    word = "would" if len(outside) == 2 else "may well"
    others = spread(priced.model, tokens, data)
    yield Finding(
        f"the band [{low:.2f}, {high:.2f}] of verify.loss_band",
        f"the law says {by_matrices:.2f} (N in matrices) or {by_all:.2f} (all parameters), the published "
        f"ones {min(others):.2f} to {max(others):.2f}: x1 verify {word} FAIL a run that is as it should be",
        f"{priced.ask.belief.name}; other text and another tokenizer shift the level",
        "take the band from a law of your own: x1 plan --fit fit.json writes it",
    )


# ------------------------------------------------------------------------------------------------------------
# Recipe and machine


def _rate(config: RunConfig, priced: Plan) -> Iterator[Finding]:
    flops = body_flops_per_token(priced.model) * priced.tokens
    rule, lr = lr_rule(flops), config.optimizer.lr
    if 1 / FAR_LR < lr / rule < FAR_LR:
        return
    times, word = (rule / lr, "below") if lr < rule else (lr / rule, "above")
    yield Finding(
        f"learning rate {lr:g}",
        f"{times:.1f} times {word} the rule, {lr_line(flops).numbers}",
        "DeepSeek LLM 2024; measured WSD runs of 48M parameters agree: 1.5e-3 at 10 B tokens, 2e-3 at 44 B",
        f"try {rule:.1e} on 2 % of the steps before the whole run",
    )


def _batch(config: RunConfig, priced: Plan) -> Iterator[Finding]:
    rule, batch = batch_rule(body_flops_per_token(priced.model) * priced.tokens), config.training.batch_tokens
    if 1 / FAR_BATCH < batch / rule < FAR_BATCH:
        return
    word = "below" if batch < rule else "above"
    yield Finding(
        f"batch of {batch:,} tokens",
        f"{max(batch / rule, rule / batch):.1f} times {word} the rule, {human(rule)}",
        f"{DEEPSEEK}: {BATCH_SCALE} C^{BATCH_POWER}",
        "larger batches waste tokens, smaller ones the GPU; the rate moves with it, about as its square root",
    )


def _schedule(config: RunConfig) -> Iterator[Finding]:
    optimizer, steps = config.optimizer, config.training.total_steps
    low, high = WARMUP_RANGE
    if not low <= optimizer.warmup_steps / steps <= high:
        yield Finding(
            f"warm-up of {optimizer.warmup_steps:,} steps",
            f"{optimizer.warmup_steps / steps:.1%} of {steps:,}; usual is {low:.1%} to {high:.0%}",
            "Porian et al. 2024: about N tokens",
            f"set optimizer.warmup_steps to about {max(1, round(0.01 * steps)):,}",
        )
    if optimizer.min_lr > 0.1 * optimizer.lr * (1 + 1e-9):
        yield Finding(
            f"min_lr {optimizer.min_lr:g}",
            f"{optimizer.min_lr / optimizer.lr:.0%} of lr: the decay is where loss falls, and it is cut "
            "short",
            "Hägele et al. 2024: to 0",
            "set optimizer.min_lr to 0, or a tenth of lr at most",
        )
    if optimizer.schedule == "cosine":
        yield Finding(
            "a cosine to the last step",
            f"stopped before step {steps:,}, by money or by you, it is 0.02 to 0.07 nats above a run that "
            "was planned for that length",
            "intermediate checkpoints of the OLMo ladder",
            "set optimizer.schedule to wsd: a shorter run then branches off any checkpoint before the decay "
            "(x1 train --branch-from CHECKPOINT --total-steps N)",
        )


def _cadence(priced: Plan) -> Iterator[Finding]:
    """A lost machine, where there is a mirror."""
    pace, losing = priced.pace, priced.losing
    if pace is None or losing is None or losing.worst_s() <= FAR_LOSS * LOSS_S:
        return
    better = cadence.every_mirrored(pace, priced.recipe.steps)
    then_s = pace.timing(better).worst_s()
    if better >= priced.checkpoint_every:  # so large a model is not saved more often
        return
    usd = losing.worst_s() / 3600 * usd_per_hr(priced)
    yield Finding(
        f"a checkpoint every {priced.checkpoint_every:,} steps",
        f"a machine that is lost takes up to {losing.worst_s() / 60:,.0f} min with it, ${usd:,.2f}",
        "docs/mirror.md; the rates of disk and network are assumed",
        f"set checkpoint.every to {better:,}: {then_s / 60:,.0f} min at worst",
    )


def _memory(config: RunConfig, priced: Plan) -> Iterator[Finding]:
    machine = priced.ask.machine
    if priced.blocks_per_rank < 1:
        yield Finding(
            f"{config.batch_blocks:,} sequences for {machine.gpus:,} ranks",
            "a rank needs one sequence at least",
            "arithmetic",
            "fewer GPUs, or a larger batch",
        )
    if machine.memory_gib is None:
        return
    micro = config.training.micro_batch
    if priced.micro_batch is None:
        needed = training_memory(priced.model, 1).total / 2**30
        yield Finding(
            f"{machine.label} can't hold it",
            f"{needed:,.0f} GiB for one sequence, of {machine.memory_gib:g}: every rank has the whole model",
            "memory model: fp32 weights, gradients and moments, bf16 casts, activations, loss",
            "a GPU with more memory, or a smaller model",
        )
    elif isinstance(micro, int) and micro > priced.micro_batch:
        yield Finding(
            f"training.micro_batch {micro}",
            f"about {training_memory(priced.model, micro).total / 2**30:,.0f} GiB of {machine.memory_gib:g}",
            "memory model",
            f"{priced.micro_batch} fits; auto finds it by trying",
        )


def disk_line(priced: Plan) -> str:
    """Disk, as a sum."""
    disk = priced.disk
    return (
        f"corpus {disk.corpus_bytes / 1e9:,.1f} GB + {disk.checkpoints} checkpoints x "
        f"{disk.checkpoint_bytes / 1e9:,.2f} GB + export {disk.export_bytes / 1e9:,.2f} GB = "
        f"{disk.total_bytes / 1e9:,.1f} GB"
    )
