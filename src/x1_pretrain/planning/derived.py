"""Every number of a plan with its formula, the same with the numbers put in, and its source."""

from __future__ import annotations

from collections.abc import Iterator

from x1_pretrain.laws import forms
from x1_pretrain.learning.recipe import Derived
from x1_pretrain.model import shapes
from x1_pretrain.model.memory import GPU_MEMORY_SHARE
from x1_pretrain.money import gate
from x1_pretrain.money.storage import CHECKPOINT_BYTES, keeps_all
from x1_pretrain.numbers import flop, human
from x1_pretrain.planning.cadence import (
    CHECKPOINT_H,
    DISK_MB_PER_S,
    FEWEST_CHECKPOINTS,
    KEEP_LAST,
    KEEP_LOCAL,
    KEPT,
    NETWORK_MB_PER_S,
)
from x1_pretrain.planning.critique import disk_line
from x1_pretrain.planning.losing import LOSS_S, SAVING_SHARE
from x1_pretrain.planning.planner import (
    EVALUATION_SHARE,
    EVALUATION_TOKENS,
    Plan,
)

ARITHMETIC = "arithmetic"
PALM = "PaLM, arXiv 2204.02311, appendix B"
COUNTS = "model/flops.py, unit-tested"


def lines(made: Plan) -> list[Derived]:
    """In the order in which one follows from another."""
    return [
        *_money(made),
        *_size(made),
        *_tokens(made),
        *made.recipe.lines,
        *_machine(made),
        *_outcome(made),
    ]


def _money(made: Plan) -> Iterator[Derived]:
    ask, machine = made.ask, made.ask.machine
    price, quote = machine.price, made.quote
    hourly = gate.exact(price.usd_per_hr)
    yield Derived(
        "price",
        float(price.usd_per_hr),
        f"{hourly}/h",
        price.what,
        f"{price.what} on {price.where}",
        price.known,
    )
    yield Derived(
        "speed",
        made.tokens_per_sec,
        f"{made.tokens_per_sec:,.0f} tokens/s",
        "FLOP/s / FLOPs per token (attention in full)",
        f"{flop(ask.speed.flops_per_sec)} / {flop(made.cost.palm)}; counted causally it would be "
        f"{ask.speed.flops_per_sec / made.cost.causal:,.0f}",
        f"{ask.speed.said}; {PALM}",
    )
    yield Derived(
        "hours",
        made.hours,
        f"{made.hours:,.1f} h of training",
        "tokens / speed",
        f"{human(made.tokens, 4)} / {made.tokens_per_sec:,.0f} / 3600",
        f"what decided: {made.binding}",
    )
    yield from _mirror(made)
    total = gate.exact(quote.total_usd)
    mirror = [quote.mirror_usd] if made.mirror else []
    parts = [quote.compute_usd, quote.disk_usd, *mirror, quote.reserve_usd]
    kept = f"; {ask.buffer:.0%} kept as a buffer" if made.binding == "--dollars" else ""
    yield Derived(
        "dollars",
        float(quote.total_usd),
        total,
        f"training + disk{' + mirror' if made.mirror else ''} + tax and reserve",
        " + ".join(gate.exact(part) for part in parts),
        f"the gate of x1 launch: {machine.reserve_h:.2f} h paid and not trained{kept}",
    )


def _mirror(made: Plan) -> Iterator[Derived]:
    planned = made.mirror
    if planned is None:
        return
    rates, hours = planned.rates, float(made.quote.hours)
    data = f" + {planned.corpus_gib:,.1f} GiB of data" if planned.corpus_gib else ""
    rows = f" + {planned.rows_gib:,.2f} GiB of rows"
    yield Derived(
        "mirror",
        float(made.quote.mirror_usd),
        f"{gate.exact(made.quote.mirror_usd)}",
        f"what is held{' in the mean' * keeps_all(planned.label)} x hours x price + one fetch",
        f"({planned.checkpoints:,g} x {planned.checkpoint_gib:,.2f} GiB{rows}{data}) x {hours:,.1f} h x "
        f"${float(rates.usd_per_gib_month):.4g} a month + {planned.fetched_gib:,.2f} GiB x "
        f"${float(rates.egress_usd_per_gib):.4g}",
        rates.said,
    )


def _size(made: Plan) -> Iterator[Derived]:
    ask, counts, model = made.ask, made.counts, made.model
    chosen = len(ask.models) > 1
    law = ask.belief
    formula = (
        f"lowest loss by {law.name} of {len(ask.models)} shapes"
        if chosen
        else "as given"
        if made.binding == "--config"
        else "nearest shape"
    )
    asked = "" if ask.asked_n is None else f"{human(ask.asked_n)} asked, "
    yield Derived(
        "N",
        counts.matrices,
        f"{human(counts.matrices)} in matrices",
        formula,
        f"{asked}{counts.matrices:,} + norms {counts.norms:,} + embedding {counts.embedding:,} = "
        f"{counts.total:,}",
        f"law counts {law.counts}" if chosen else COUNTS,
    )
    yield Derived(
        "N in all",
        counts.total,
        human(counts.total),
        "matrices + norms + embedding",
        f"{counts.total:,}",
        COUNTS,
    )
    yield Derived(
        "architecture",
        model.layers,
        f"{model.layers} layers, d {model.d_model}",
        f"{model.heads} heads of {model.head_size}, {model.kv_heads} for keys and values, d_ff {model.d_ff}",
        "\n".join(f"{what}: {rule}" for what, rule in shapes.RULES),
        "model/shapes.py (--explain)",
    )
    yield Derived(
        "context",
        model.context,
        f"{model.context:,}",
        "by size",
        dict(shapes.RULES)["context"],
        "model/shapes.py",
    )


def _tokens(made: Plan) -> Iterator[Derived]:
    counts, tokens = made.counts, made.tokens
    formula = {
        "--tokens": "as given",
        "--steps": "steps x batch",
        "--flops": "FLOPs / FLOPs per token",
        "--ratio": "ratio x N",
        "the law's optimum": "D_opt(N) by the law",
        "--config": "steps x batch",
    }.get(made.binding, "speed x hours")
    yield Derived(
        "D",
        tokens,
        f"{human(tokens, 4)} tokens",
        formula,
        f"{made.recipe.steps:,} x {made.recipe.batch_tokens:,} = {tokens:,}",
        "whole steps",
    )
    by_matrix, by_all = tokens / counts.matrices, tokens / counts.total
    yield Derived(
        "D/N",
        by_matrix,
        f"{by_matrix:,.1f} ({by_all:,.1f})",
        "tokens per parameter in matrices (in all)",
        f"{human(tokens)} / {human(counts.matrices)} ({human(counts.total)})",
        ARITHMETIC,
    )
    yield Derived(
        "FLOPs",
        made.flops,
        flop(made.flops),
        "D x (6 (N + V d) + causal attention)",
        f"{human(tokens, 4)} x {flop(made.cost.causal)}",
        COUNTS,
    )
    yield Derived(
        "6ND",
        made.six_nd,
        f"{flop(made.six_nd)} ({flop(made.six_nd_total)})",
        "N in matrices (in all)",
        f"6 x {human(counts.matrices)} x {human(tokens)}",
        "what scaling laws call C",
    )
    yield from _data(made)


def _data(made: Plan) -> Iterator[Derived]:
    data = made.ask.data
    if data is None:
        return
    for part, epochs in zip(data.parts, data.epochs(made.tokens), strict=True):
        drawn = part.share * made.tokens
        value = forms.effective_tokens(part.tokens, drawn)
        yield Derived(
            f"epochs of {part.name}",
            epochs,
            f"{epochs:.2f}",
            "tokens drawn / tokens there",
            f"{human(drawn)} / {human(part.tokens)}: worth {human(value)}, {value / drawn:.0%} of fresh",
            "Muennighoff et al. 2023, arXiv 2305.16264",
        )


def _machine(made: Plan) -> Iterator[Derived]:
    machine, recipe = made.ask.machine, made.recipe
    yield Derived(
        "a step",
        recipe.batch_tokens,
        f"{recipe.batch_tokens:,} tokens",
        made.product,
        made.product,
        ARITHMETIC,
    )
    if machine.memory_gib is not None:
        needed = made.memory.total / 2**30
        states = (made.memory.weights + made.memory.gradients + made.memory.moments) / 2**30
        micro = made.micro_batch
        yield Derived(
            "micro-batch",
            micro or 0,
            f"{micro:,} sequences" if micro else "none fits",
            f"the most that fits {GPU_MEMORY_SHARE:.0%} of {machine.memory_gib:g} GiB",
            f"{needed:,.1f} GiB: states {states:,.1f}, activations {made.memory.activations / 2**30:,.1f}, "
            f"loss {made.memory.loss / 2**30:,.1f}, casts {made.memory.casts / 2**30:,.1f}",
            "model/memory.py, an estimate",
        )
    yield _checkpoints(made)
    rarer = made.evaluation_every
    yield Derived(
        "evaluations",
        rarer,
        f"every {rarer:,} steps",
        "as given" if made.ask.every else f"at checkpoints, at most {EVALUATION_SHARE:.0%} of the arithmetic",
        f"{EVALUATION_TOKENS:,} / 3 of every {rarer * recipe.batch_tokens:,} tokens",
        "a forward pass is a third of a step",
    )
    disk = made.disk
    yield Derived(
        "disk",
        disk.total_bytes,
        f"{disk.total_bytes / 1e9:,.1f} GB",
        f"corpus + {disk.checkpoints} checkpoints + export",
        disk_line(made),
        f"{CHECKPOINT_BYTES} bytes a parameter, 2 or 4 a token",
    )


def _checkpoints(made: Plan) -> Derived:
    every, steps = made.checkpoint_every, made.recipe.steps
    apart = f"{every * made.step_s / 60:.0f} min apart, {steps // every:,} in all"
    losing, given = made.losing, made.ask.every is not None
    if losing is None:
        return Derived(
            "checkpoints",
            every,
            f"every {every:,} steps",
            "as given" if given else f"{CHECKPOINT_H * 60:.0f} min, at least {FEWEST_CHECKPOINTS} in all",
            f"{apart}, {KEPT - 1} kept",
            "what an interruption may cost",
        )
    rule = (
        f"about {LOSS_S / 60:.0f} min, at least {FEWEST_CHECKPOINTS} in all, writing below "
        f"{SAVING_SHARE:.0%} of the time; lost = between two + 2 x writing + look + sending"
    )
    terms = [losing.train_s, 2 * losing.write_s, losing.look_s, losing.send_s]
    late = "" if losing.keeps_up else " and the last two again: it lags"
    kept = "" if given else f"; the last {KEEP_LAST} kept there, {KEEP_LOCAL} of them here"
    return Derived(
        "checkpoints",
        every,
        f"every {every:,} steps; lost with the machine: {minutes(losing.worst_s())} at worst",
        f"as given; {rule.rpartition('; ')[2]}" if given else rule,
        f"{' + '.join(f'{term:,.1f}' for term in terms)} s{late}; writing takes "
        f"{losing.write_s / losing.period_s:.1%} of the time; {apart}{kept}",
        f"docs/mirror.md; written at {DISK_MB_PER_S:g}, sent at {NETWORK_MB_PER_S:g} MB/s, assumed; "
        "x1 doctor measures them",
    )


def minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 120 else f"{seconds:,.0f} s"


def _outcome(made: Plan) -> Iterator[Derived]:
    belief, loss = made.ask.belief, made.expected
    law = belief.law
    where = (
        "95 % of runs, by your own fit"
        if belief.own
        else "spread of published laws and of both counts of N: other data, other tokenizer; a level of your "
        "own needs a fit of your own"
    )
    n, worth = belief.counted(made.model, float(made.tokens), made.ask.data)
    yield Derived(
        "final loss",
        loss.point,
        f"{loss.point:.2f} [{loss.low:.2f}, {loss.high:.2f}]" if loss.has_interval else f"{loss.point:.2f}",
        "E + A/N^alpha + B/D^beta, nats a token",
        f"{law.E:.3f} + {law.A:.4g}/({flop(n)})^{law.alpha:.3f} + {law.B:.4g}/({flop(worth)})^{law.beta:.3f}",
        f"{belief.name}, N = {belief.counts}; {where}",
    )
    regrets = made.regrets()
    yield Derived(
        "if D/N is off",
        regrets[0][2],
        ", ".join(f"x{off:g} {share:.0%}" for off, _, share in regrets),
        "compute wasted",
        ", ".join(f"x{off:g}: {nats:+.4f} nats" for off, nats, _ in regrets),
        f"{belief.name}, at 6ND {flop(made.six_nd_of_law)}",
    )
