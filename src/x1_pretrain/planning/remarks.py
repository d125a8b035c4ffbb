"""What a reader of a plan should know beside its numbers, a line each."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from x1_pretrain.laws import forms
from x1_pretrain.model.flops import parameter_counts
from x1_pretrain.model.memory import training_memory
from x1_pretrain.money import gate
from x1_pretrain.numbers import human
from x1_pretrain.planning.critique import UNLIKELY_MFU
from x1_pretrain.planning.planner import Plan

MOST_EPOCHS = 4.0  # up to here a repeated token is worth nearly a fresh one
SMALL = 20e6  # in matrices: kernels too short to fill a data-centre GPU
FAR_RATIO = 5.0  # in either direction of 20 tokens per parameter


def notes(made: Plan, here: Path = Path()) -> list[str]:
    return [*_speed(made), *_size(made), *_data(made), *_law(made), *_disk(made, here)]


def notes_on_judged(made: Plan, here: Path = Path()) -> list[str]:
    """Size and data are findings then."""
    return [*_speed(made), *_law(made), *_disk(made, here)]


def _speed(made: Plan) -> Iterator[str]:
    machine, speed = made.ask.machine, made.ask.speed
    if made.mfu is not None and made.mfu > UNLIKELY_MFU:
        yield (
            f"this speed needs {made.mfu:.0%} of the peak (PaLM's count); published runs stay below "
            f"{UNLIKELY_MFU:.0%}"
        )
    if not speed.measured:
        yield (
            "the speed is not measured: 100 steps on the machine, then --tokens-per-sec or --like RUN, make "
            "the hours real"
        )
        if made.counts.matrices < SMALL:
            yield f"a model of {human(made.counts.matrices)} keeps a large GPU waiting: expect less"
    width = made.shared.width(machine.gpus)
    if machine.gpus > 1 and not speed.measured and width.efficiency is not None and width.efficiency < 0.97:
        yield (
            f"the hours count {machine.gpus:,} GPUs as {machine.gpus:,} times one, as x1 launch does; "
            f"exchanging gradients leaves about {width.efficiency:.0%} of that ({width.hours:,.1f} h)"
        )
    if machine.gpus > 1 and width.stops and made.micro_batch is not None:
        yield f"data parallelism alone is not enough on {machine.gpus:,} GPUs: {width.stops}"


def _size(made: Plan) -> Iterator[str]:
    ask, machine = made.ask, made.ask.machine
    if ask.asked_n is not None and abs(math.log(made.counts.matrices / ask.asked_n)) > 0.01:
        yield f"{human(ask.asked_n)} asked; the nearest shape has {human(made.counts.matrices)} in matrices"
    if machine.memory_gib is not None and made.micro_batch is None:
        needed = training_memory(made.model, 1).total / 2**30
        yield (
            f"one {machine.label} can't hold it: {needed:,.0f} GiB for one sequence, of "
            f"{machine.memory_gib:g}; x1 gives every rank the whole model, so this needs sharding that x1 "
            "doesn't do"
        )
    if made.left_out is not None:
        yield (
            f"{human(parameter_counts(made.left_out).matrices)} would do better, and does not fit one "
            f"{machine.label}: the largest that fits was taken"
        )
    ratio = made.tokens / made.counts.matrices / 20.0
    if not 1 / FAR_RATIO < ratio < FAR_RATIO:
        regret = forms.optimum(ask.belief.law, made.six_nd_of_law)[1] / made.tokens
        yield (
            f"{human(made.tokens / made.counts.matrices)} tokens per parameter in matrices is far from 20; "
            f"the law's own optimum for these FLOPs has {regret:.2g} times the tokens"
        )


def _data(made: Plan) -> Iterator[str]:
    data = made.ask.data
    if data is None:
        yield f"no --data: {human(made.tokens)} fresh tokens are taken to be there"
        return
    epochs = max(data.epochs(made.tokens))
    worth = data.effective(made.tokens)
    if made.tokens > data.tokens:
        yield (
            f"{human(made.tokens)} tokens are asked and {human(data.tokens)} are there ({data.origin}): "
            f"worth {human(worth)} fresh ones"
        )
    if epochs > MOST_EPOCHS:
        yield f"{epochs:.1f} epochs: beyond {MOST_EPOCHS:g} a repeat is worth ever less; more text helps most"
    if made.binding.startswith("the data") and made.ask.dollars is not None:
        left = made.ask.dollars - made.quote.total_usd
        yield f"the data end this plan, not the dollars: {gate.exact(left)} of them would buy nothing more"


def _law(made: Plan) -> Iterator[str]:
    fitted = made.ask.belief.fitted
    n, d = made.ask.belief.n(made.model), float(made.tokens)
    for name, value, (low, high) in (("N", n, fitted.n_range), ("D", d, fitted.d_range)):
        if value > high or value < low:
            edge = high if value > high else low
            times = max(value / edge, edge / value)
            yield f"{name} {human(value)} is {times:.3g} times outside of what the law was fitted on"
    if fitted.prior_dominated:
        yield f"{fitted.origin}: its data hardly moved the prior; the size is mostly what was believed before"


def _disk(made: Plan, here: Path) -> Iterator[str]:
    needed, priced_gib = made.disk.total_bytes, made.ask.machine.disk_gib
    if priced_gib is not None and needed > priced_gib * 2**30:
        yield f"{needed / 1e9:,.1f} GB of disk are needed; the price has {priced_gib:,} GiB (--disk-gib)"
    free = shutil.disk_usage(here).free
    if free < needed:
        yield f"{needed / 1e9:,.1f} GB of disk are needed, and this machine has {free / 1e9:,.1f} GB free"
