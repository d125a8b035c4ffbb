"""An architecture from a size: the rules of `RULES`, and the nearest shape that follows them.

Width and depth are whole numbers, so sizes come in steps. The nearest is the nearest in the logarithm of the
parameters in matrices, with a handicap for a depth that strays from the rule: 3 % off in size weighs as much
as 40 % off in depth. What was asked and what was found may differ: who calls says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from x1_pretrain.config import ModelConfig
from x1_pretrain.errors import UserError
from x1_pretrain.model.flops import parameter_counts

RULES = (
    (
        "width",
        (
            "a multiple of 64, of 128 from 1024, of 256 from 2048, of 1024 from 4096; toys have 16, 32, 48, "
            "64 or 96; heads must share keys"
        ),
    ),
    (
        "depth",
        (
            "d_model / aspect, with aspect = 96 (d_model / 768)^0.5, at most 128: GPT-2 and nanochat have 64 "
            "at 768, the published 50M run has 96, LLaMA 7B and 13B have 128"
        ),
    ),
    ("head size", "64 below d_model 2048 (GPT-2), else 128 (LLaMA); toys 16 up to 64, 32 up to 128"),
    (
        "key-value heads",
        (
            "all below 4 heads; from 32 heads 8 (Llama 3); else heads / 3 where that is whole (the published "
            "50M run: 12 and 4; Llama 3.2 3B: 24 and 8), or heads / 4, but at least 2"
        ),
    ),
    (
        "d_ff",
        (
            "8/3 d_model, rounded up to a multiple of 64, of 256 from d_model 1024: SwiGLU's three matrices "
            "have the weights of a plain MLP's two at 4 d_model (Shazeer 2020, LLaMA)"
        ),
    ),
    ("context", "1024 below 200M in matrices (GPT-2), 2048 below 3B (LLaMA), 4096 above (Llama 2)"),
    (
        "embeddings",
        "one table for input and output below 3B in matrices (GPT-2, Llama 3.2), else two (Llama 3)",
    ),
)

WIDEST, DEEPEST, FEWEST = 24_576, 160, 2
STEPS = ((64, 16), (128, 32), (1024, 64), (2048, 128), (4096, 256), (WIDEST + 1, 1024))  # of the width, below
STRAY = 0.085  # the handicap: so much of the logarithm of size for one e-fold of depth


class Shape(NamedTuple):
    """A candidate; `cost` is its handicap."""

    log_size: float
    cost: float
    d_model: int
    layers: int


def shape_for(matrices: float, vocab_size: int = 50257, context: int | None = None) -> ModelConfig:
    """The architecture nearest to so many parameters in matrices."""
    if not matrices > 0 or math.isinf(matrices):
        raise UserError(f"a model of {matrices:g} parameters: expected a positive number, for example 50e6")
    wanted = math.log(matrices)
    nearest = min(_shapes(), key=lambda shape: (shape.log_size - wanted) ** 2 + shape.cost)
    return _config(nearest.d_model, nearest.layers, vocab_size, context)


def ladder(
    vocab_size: int = 50257, context: int | None = None, low: float = 1e5, high: float = 1e11
) -> list[ModelConfig]:
    """Every architecture that is nearest to some size, smallest first, with `low` to `high` in matrices."""
    within = [shape for shape in _shapes() if math.log(low) <= shape.log_size <= math.log(high)]
    return [_config(shape.d_model, shape.layers, vocab_size, context) for shape in within]


def aspect(d_model: int) -> float:
    """Width over depth."""
    return min(128.0, 96 * math.sqrt(d_model / 768))


def head_size(d_model: int) -> int:
    if d_model <= 128:
        return 16 if d_model <= 64 else 32  # one head of 64 learns far slower than four of 16
    return 64 if d_model < 2048 else 128


def kv_heads(heads: int) -> int | None:
    """None where no rule shares the heads evenly: such widths are left out."""
    if heads < 4:
        return heads
    if heads >= 32:
        return 8 if heads % 8 == 0 else None
    if heads % 3 == 0:
        return heads // 3
    return max(2, heads // 4) if heads % 4 == 0 else None


def feed_forward(d_model: int) -> int:
    multiple = 64 if d_model < 1024 else 256
    return -(-8 * d_model // (3 * multiple)) * multiple


def context_for(matrices: float) -> int:
    return 1024 if matrices < 200e6 else 2048 if matrices < 3e9 else 4096


def _widths() -> Iterator[int]:
    d_model = 16
    while d_model <= WIDEST:
        if kv_heads(d_model // head_size(d_model)):
            yield d_model
        d_model += next(step for below, step in STEPS if d_model < below)


def _config(d_model: int, layers: int, vocab_size: int = 1, context: int | None = None) -> ModelConfig:
    heads = d_model // head_size(d_model)
    shared = kv_heads(heads)
    assert shared is not None
    model = ModelConfig(
        layers=layers, d_model=d_model, heads=heads, kv_heads=shared, d_ff=feed_forward(d_model), vocab_size=1
    )
    matrices = parameter_counts(model).matrices
    more = {
        "vocab_size": vocab_size,
        "context": context or context_for(matrices),
        "tied_embeddings": matrices < 3e9,
    }
    return ModelConfig(**{**model.model_dump(), **more})


@cache
def _shapes() -> tuple[Shape, ...]:
    """The candidates that are nearest to some size, smallest first.

    The distance of size x from a candidate at c is (x - c)^2 + cost: without x^2, which all share, a straight
    line in x. The lines that are lowest somewhere are the corners of the lower hull of the points
    (c, c^2 + cost).
    """
    hull: list[Shape] = []
    for shape in sorted(_candidates()):
        if hull and hull[-1].log_size == shape.log_size:
            continue  # of one size the cheapest came first
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], shape):
            hull.pop()
        hull.append(shape)
    return tuple(hull)


def _candidates() -> Iterator[Shape]:
    for d_model in _widths():
        layer = parameter_counts(_config(d_model, 1)).matrices
        for layers in range(FEWEST, DEEPEST + 1):
            stray = STRAY * math.log(d_model / layers / aspect(d_model))
            yield Shape(math.log(layers * layer), stray**2, d_model, layers)


def _slope(a: Shape, b: Shape) -> float:
    rise = b.log_size**2 + b.cost - a.log_size**2 - a.cost
    return rise / (b.log_size - a.log_size)
