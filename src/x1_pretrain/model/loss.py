"""Cross-entropy without ever holding all logits: a chunk of tokens at a time, forward and backward at once.

For 65,536 tokens and GPT-2's vocabulary the logits alone are 6.6 GB in bf16 and 13.2 GB in fp32, and the
gradient is as much again. Here the memory is that of one chunk. Columns that only pad the vocabulary are
excluded exactly.

Shapes: N tokens, n tokens of one chunk, d = d_model, P = padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -1  # the target of a token that doesn't count


def chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits are in memory at once: with GPT-2's vocabulary 4,096 take 0.8 GiB in fp32. On a CPU
    1,024 are as fast."""
    return 4096 if device.type == "cuda" else 1024


# (hidden (n, d), weight (P, d), targets (n,), vocab, z_loss)
# -> (cross-entropies (n,), gradient by the logits (n, P) of their sum with the z-loss)
ChunkTerms = Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


def masked_logits(hidden: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """(n, P), fp32 or wider; minus infinity in the padded columns."""
    wide = _accumulator(hidden.dtype)
    logits = (hidden @ weight.T).to(wide)  # (n, P); those in bf16 are not kept
    logits[:, vocab:] = float("-inf")
    return logits


def chunk_terms(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Losses of one chunk, and the gradient by the logits. Rows of ignored tokens have no meaning.

    The z-loss of a token is z_loss x z^2, z the logarithm of the sum that softmax divides by. Its gradient by
    the logits is 2 z_loss z x softmax.
    """
    logits = masked_logits(hidden, weight, vocab)  # (n, P)
    column = targets.clamp(min=0)[:, None]  # (n, 1)
    target_logit = logits.gather(1, column)  # (n, 1)
    logp = torch.log_softmax(logits, dim=-1)  # (n, P)
    del logits
    target_logp = logp.gather(1, column)  # (n, 1)
    gradient = logp.exp_()  # (n, P)
    if z_loss:
        gradient *= 1.0 + 2.0 * z_loss * (target_logit - target_logp)  # the difference is z
    gradient.scatter_add_(1, column, torch.full_like(target_logp, -1.0))
    return -target_logp[:, 0], gradient.to(hidden.dtype)


def compiled_chunk_terms(mode: str = "default") -> ChunkTerms:
    """`chunk_terms` compiled: the passes over the logits become one or two. Pass it to `summed_loss`."""
    compiled: ChunkTerms = torch.compile(chunk_terms, mode=mode, dynamic=False)
    return compiled


def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    chunk_tokens: int,
    terms: ChunkTerms = chunk_terms,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum of the cross-entropies, in nats, of the tokens whose target is not `IGNORED`; an fp32 scalar.

    hidden (N, d); weight (P, d), cast to hidden's dtype; targets (N,) below `vocab`. Gradients flow to hidden
    and weight; they are computed in the forward pass, so backward costs a multiplication.

    With `z_loss` the gradient is that of cross-entropy + z_loss x (log of softmax's sum)^2, summed over the
    same tokens. The value stays the cross-entropy, so that it compares with other runs and with validation:
    it is then not the function whose gradient this is.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, weight, targets, vocab, chunk_tokens).sum()
    total: Tensor = _SummedLoss.apply(hidden, weight, targets, vocab, chunk_tokens, terms, z_loss)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, chunk_tokens: int) -> Tensor:
    """Cross-entropy of each token, in nats, (N,); 0 where the target is `IGNORED`. Without gradients."""
    cast_weight = weight.to(hidden.dtype)
    losses = torch.zeros(len(targets), dtype=_accumulator(hidden.dtype), device=hidden.device)  # (N,)
    for span in _spans(len(targets), chunk_tokens):
        column = targets[span].clamp(min=0)[:, None]  # (n, 1)
        logits = masked_logits(hidden[span], cast_weight, vocab)  # (n, P)
        picked = torch.log_softmax(logits, dim=-1).gather(1, column)[:, 0]  # (n,)
        del logits  # before those of the next chunk
        losses[span] = torch.where(targets[span] == IGNORED, 0.0, -picked)
    return losses


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab: int,
        chunk_tokens: int,
        terms: ChunkTerms,
        z_loss: float,
    ) -> Tensor:
        wide = _accumulator(hidden.dtype)
        cast_weight = weight.to(hidden.dtype)
        by_hidden, by_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if by_hidden else None  # (N, d)
        grad_weight = torch.zeros_like(weight, dtype=wide) if by_weight else None  # (P, d)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for span in _spans(len(targets), chunk_tokens):
            counted = targets[span] != IGNORED  # (n,)
            chunk = hidden[span], cast_weight, targets[span]  # (n, d), (P, d), (n,)
            losses, grad_logits = terms(*chunk, vocab, z_loss)  # (n,), (n, P)
            total += torch.where(counted, losses, 0.0).sum()
            # Ignored tokens are masked in the (n, d) tensors: d is far smaller than P.
            if grad_hidden is not None:
                grad_hidden[span] = torch.where(counted[:, None], grad_logits @ cast_weight, 0.0)
            if grad_weight is not None:
                grad_weight += grad_logits.T @ torch.where(counted[:, None], hidden[span], 0.0)
            del grad_logits  # before the logits of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scaled in fp32: the scale rounded to bf16 would be off by up to 0.4 % for all tokens alike.
        by_hidden = None if grad_hidden is None else (grad_hidden * scale[None, None]).to(grad_hidden.dtype)
        by_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return by_hidden, by_weight, None, None, None, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _spans(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
