"""What a model counts and costs: parameters, and floating-point operations per token.

Arithmetic on a config; no torch. FLOPs are of training (forward + backward = 3 x forward), a multiply-add is
two. The same run has a different MFU under each convention, so every number goes by the convention's name.

L layers, H heads, D head size, T tokens of context, V vocabulary, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from x1_pretrain.config import ModelConfig

GPT2_VOCABULARY = 50_257  # what is assumed where no corpus says


class ParameterCounts(NamedTuple):
    """Parameters on disk: vocabulary padding is not counted."""

    matrices: int  # the layers' matrices: the N of the scaling laws
    norms: int
    embedding: int  # both tables when they are untied
    total: int


@dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs per token by convention."""

    six_n: float  # 6 N, N = matrices without embeddings: what scaling laws mean by C = 6ND
    palm: float  # 6 (N + V d) + 12 L H D T: attention as if not causal; what most trainers print as MFU
    causal: float  # 6 (N + V d) + 6 L H D (T + 1): the work that has to be done
    attention_share: float  # of `causal`: the part that grows with the context


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Parameters by kind; the config must have its vocabulary."""
    d, size = config.d_model, config.head_size
    attention = 2 * d * size * (config.heads + config.kv_heads)  # q and o, k and v
    matrices = config.layers * (attention + 3 * d * config.d_ff)
    norms = d * (2 * config.layers + 1) + (2 * size * config.layers if config.qk_norm else 0)
    embedding = config.vocab * d * (1 if config.tied_embeddings else 2)
    return ParameterCounts(matrices, norms, embedding, matrices + norms + embedding)


def flops_per_token(config: ModelConfig, context: int | None = None) -> FlopsPerToken:
    """At the config's context, or at a shorter one (early in a context ramp)."""
    length = config.context if context is None else context
    matrices = parameter_counts(config).matrices
    # The output matrix counts whether tied or not; the input embedding is a lookup, no multiplication.
    dense = 6.0 * (matrices + config.vocab * config.d_model)
    width = config.layers * config.heads * config.head_size
    attention = 6.0 * width * (length + 1)  # a token looks at (T + 1) / 2 positions on average
    return FlopsPerToken(
        six_n=6.0 * matrices,
        palm=dense + 12.0 * width * length,
        causal=dense + attention,
        attention_share=attention / (dense + attention),
    )


def mfu(tokens_per_sec: float, flops: float, peak_flops_per_sec: float, gpus: int = 1) -> float:
    """Share of the GPUs' peak that `flops` per token amount to; say the convention of `flops` beside it."""
    return tokens_per_sec * flops / (peak_flops_per_sec * gpus)
