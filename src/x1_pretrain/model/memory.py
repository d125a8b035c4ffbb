"""What training takes of a GPU's memory, by arithmetic on a config: an estimate for plans, no torch.

The peak lies between the forward and the backward pass: all that the latter needs is there, and the loss's
own chunk on top. Counted is what this decoder keeps when it isn't compiled, with an attention kernel that
keeps no matrix of all pairs (flash attention; PyTorch's own, where it can). Compiled it keeps less: the
compiler computes some of it again. What a run really uses is found by trying, at its start.

d = d_model, H and K query and key-value heads of size D, F = d_ff, P = padded vocabulary, s = bytes of an
activation (2 in bf16, 4 in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

from x1_pretrain.config import ModelConfig
from x1_pretrain.model.flops import parameter_counts

GPU_MEMORY_SHARE = 0.92  # the rest is left to fragmentation and evaluation
LOSS_CHUNK_TOKENS = 4096  # of `loss.chunk_tokens` on a GPU
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float  # fp32
    gradients: float  # fp32
    moments: float  # AdamW's two, fp32
    casts: float  # the weights again in bf16, which the backward pass needs
    activations: float
    loss: float  # chunk of logits and gradients computed ahead, or what the backward pass works with

    @property
    def total(self) -> float:
        state = self.weights + self.gradients + self.moments
        return state + self.casts + self.activations + self.loss


def training_memory(model: ModelConfig, micro_batch: int, bf16: bool = True, shards: int = 1) -> Memory:
    """At the peak of a step of `micro_batch` sequences at a time. `shards`: GPUs that weights, gradients and
    moments are spread over (1: each has them all); of gathered layers two are there at a time."""
    padding = (model.padded_vocab - model.vocab) * model.d_model * (1 if model.tied_embeddings else 2)
    counts = parameter_counts(model)
    weights = 4.0 * (counts.total + padding) / shards
    layers_cast = model.layers if shards == 1 else min(2, model.layers)
    copied = 2.0 if bf16 else (0.0 if shards == 1 else 4.0)
    tokens = micro_batch * model.context
    return Memory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        casts=copied * counts.matrices / model.layers * layers_cast,
        activations=float(tokens * token_bytes(model, bf16)),
        loss=float(_loss_bytes(model, tokens, bf16)),
    )


def token_bytes(model: ModelConfig, bf16: bool) -> int:
    """What one token leaves for the backward pass, over all layers."""
    s, d = (2 if bf16 else 4), model.d_model
    norm = _norm_bytes(d, s)
    both = (model.heads + model.kv_heads) * model.head_size
    attention = 2 * s * both + 4 * model.heads  # q, k, v, the output, and a logarithm per head
    if model.qk_norm:
        attention += (4 + s) * both + 4 * (model.heads + model.kv_heads)
    swiglu = 4 * s * model.d_ff  # gate, its SiLU, up, their product
    layer = 2 * (norm + s * d) + attention + swiglu  # s d: a norm's output, which the matrices multiply
    return model.layers * layer + norm + 8  # the last norm, the token's id


def _norm_bytes(width: int, s: int) -> int:
    """An RMSNorm keeps its input in fp32, the root, and what it has normed, before its weight."""
    return 4 * width + 4 + s * width


def sequence_bytes(model: ModelConfig, bf16: bool) -> int:
    """What one sequence leaves for the backward pass."""
    return model.context * token_bytes(model, bf16)


def _loss_bytes(model: ModelConfig, tokens: int, bf16: bool) -> int:
    """The most of three moments. In the loss: the gradients by the hidden states and by the output matrix,
    and a chunk of logits in fp32 with their logarithms. As the backward pass begins: a scaled copy of that
    matrix's gradient. In its first layer: what SwiGLU and a norm work with.
    """
    s, d = (2 if bf16 else 4), model.d_model
    ahead = 2 * s * tokens * d + 4 * model.padded_vocab * d
    chunk = min(tokens, LOSS_CHUNK_TOKENS) * model.padded_vocab * 8
    if bf16:
        chunk += 2 * model.padded_vocab * d  # the matrix itself
    last_layer = tokens * (2 * s * model.d_ff + 6 * d)
    return max(ahead + chunk, ahead + 4 * model.padded_vocab * d, last_layer)


def largest_micro_batch(
    model: ModelConfig, blocks: int, memory_gib: float, bf16: bool = True, shards: int = 1
) -> int | None:
    """The most sequences at a time that divide a rank's `blocks` exactly and fit; None if not one does."""
    usable = memory_gib * GIB * GPU_MEMORY_SHARE
    for sequences in range(blocks, 0, -1):
        if blocks % sequences == 0 and training_memory(model, sequences, bf16, shards).total <= usable:
            return sequences
    return None
