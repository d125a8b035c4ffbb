"""Looking into a model in training: norms by group of weights and by layer, how far an update moved them,
the size of activations and of attention logits.

Nothing here changes what is trained, draws random numbers, or leaves a trace. Each look reads its numbers
from the device together. Padded vocabulary rows are zero with zero gradients, so no norm sees them.

Shapes: T tokens, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW

from x1_pretrain.learning import optimizers
from x1_pretrain.learning.optimizers import MOMENTS
from x1_pretrain.model.decoder import Block, Decoder

GROUPS = ("embedding", "attention", "mlp", "norms", "output")
# Of a tensor at once. On a CPU temporaries then stay in its cache, which is 2.4 times as fast, and sums stay
# exact: the fp32 norm of 39 million numbers in one piece is 0.3 % short. A GPU wants few, large kernels.
PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}
CHUNK_QUERIES = 256  # whose attention logits are in memory at once


def group_of(name: str) -> str:
    """The group of a parameter, by its name. A tied embedding is an embedding: there is no output then."""
    if "norm" in name:
        return "norms"
    for part, group in (("self_attn", "attention"), ("mlp", "mlp"), ("embed_tokens", "embedding")):
        if f".{part}." in name:
            return group
    return "output"


def layer_of(name: str) -> int | None:
    """The layer of a parameter; None for those outside of the layers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


# ------------------------------------------------------------------------------------------------------------
# Norms


@torch.no_grad()
def squared_norms(sets: Sequence[Sequence[Tensor]]) -> Tensor:
    """The squared L2 norm of each set of tensors, (sets,), on their device; 0 for an empty set."""
    pieces = [[piece for tensor in members for piece in _pieces(tensor)] for members in sets]
    squares = torch.stack(torch._foreach_norm([piece for part in pieces for piece in part])).square()
    parts = torch.split(squares, [len(part) for part in pieces])
    return torch.stack([part.sum() for part in parts])  # (sets,)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor, or where it is large pieces of it."""
    size = PIECE_ELEMENTS[tensor.device.type]
    return (tensor,) if tensor.numel() <= size else torch.split(tensor.flatten(), size)


@torch.no_grad()
def group_squares(decoder: Decoder) -> Tensor:
    """Squared gradient norms in the order of `GROUPS`, (5,), left on the device: waits for nothing."""
    members: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, weight in decoder.named_parameters():
        if weight.grad is not None:
            members[group_of(name)].append(weight.grad)
    return squared_norms([members[group] for group in GROUPS])


@torch.no_grad()
def norms(decoder: Decoder, gradients: bool, by_layer: bool) -> dict[str, float]:
    """L2 norms of the gradients or of the weights: `grad_norm/<group>`, and `grad_norm/layer.<i>`."""
    kind = "grad_norm" if gradients else "param_norm"
    named = [(name, w.grad if gradients else w) for name, w in decoder.named_parameters()]
    tensors = {name: t for name, t in named if t is not None}
    found = squared_norms([[t] for t in tensors.values()]).tolist() if tensors else []
    squares: dict[str, float] = defaultdict(float)
    for name, square in zip(tensors, found, strict=True):
        squares[f"{kind}/{group_of(name)}"] += square
        if by_layer and (layer := layer_of(name)) is not None:
            squares[f"{kind}/layer.{layer}"] += square
    return {name: math.sqrt(square) for name, square in squares.items()}


@torch.no_grad()
def moment_norms(optimizer: AdamW) -> dict[str, float]:
    """L2 norms of AdamW's two moments over all weights; nothing before the first update."""
    weights = [
        weight for group in optimizer.param_groups for weight in group["params"]
    ]  # always in one order
    states = [state for weight in weights if (state := optimizer.state.get(weight))]
    if not states:
        return {}
    first, second = squared_norms([[state[moment] for state in states] for moment in MOMENTS]).sqrt().tolist()
    return {"optimizer/m_norm": first, "optimizer/v_norm": second}


# ------------------------------------------------------------------------------------------------------------
# Updates


@torch.no_grad()
def update_ratios(decoder: Decoder, optimizer: AdamW) -> dict[str, float]:
    """|last update| / |weights before it|, by group; nothing before the first update. The optimizer must
    still have that update's rate.

    Computed from what AdamW keeps. With a = lr m^ / (sqrt(v^) + eps) and c = lr x weight decay, an update is
    w' = (1 - c) w - a. So w = (w' + a) / (1 - c), and w' - w = -(a + c w') / (1 - c).
    """
    step = optimizers.updates(optimizer)  # once: it may be on the device
    if step == 0:
        return {}
    settings = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for name, weight in decoder.named_parameters():
        if state := optimizer.state.get(weight):
            squares[group_of(name)] += _update_squares(weight, state, settings[weight], step)
    if not squares:
        return {}
    sums = torch.stack([torch.stack(parts).sum(0) for parts in squares.values()]).tolist()  # (groups, 2)
    return {f"update_ratio/{g}": math.sqrt(u / w) for g, (u, w) in zip(squares, sums, strict=True) if w}


def _update_squares(
    weight: Tensor, state: dict[str, Any], settings: dict[str, Any], step: int
) -> list[Tensor]:
    """|a + c w'|^2 and |w' + a|^2 of each piece of one weight, (2,) each."""
    (beta1, beta2), lr = settings["betas"], settings["lr"]
    spread = math.sqrt(1 - beta2**step)  # a = scale x m / (sqrt(v) + eps x spread)
    scale = lr * spread / (1 - beta1**step)
    squares = []
    for w, m, v in zip(*map(_pieces, (weight, *(state[name] for name in MOMENTS))), strict=True):
        below = v.sqrt().add_(settings["eps"] * spread)
        update = (w * (lr * settings["weight_decay"])).addcdiv_(m, below, value=scale)
        before = torch.addcdiv(w, m, below, value=scale)
        squares.append(torch.stack([update.norm(), before.norm()]).square())
    return squares


# ------------------------------------------------------------------------------------------------------------
# A look inside of one forward pass


@torch.no_grad()
def probe(decoder: Decoder, ids: Tensor) -> dict[str, float]:
    """One forward of one sequence, ids (1, T), uncompiled: `activation_rms/layer.<i>`, the root mean square
    of what a layer gives to the next; `attention/logit_max/layer.<i>`, the largest q k / sqrt(D) over heads
    and pairs that attention sees; and `attention/logit_max` over all layers."""
    layers = [cast(Block, layer) for layer in decoder.model.layers]
    rms: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for number, layer in enumerate(layers):
            stack.enter_context(_watched(layer, number, rms, logits))
        decoder.hidden(ids)
    found = torch.stack([*(rms[i] for i in rms), *(logits[i] for i in logits)]).tolist()
    named = [f"activation_rms/layer.{i}" for i in rms] + [f"attention/logit_max/layer.{i}" for i in logits]
    return {**dict(zip(named, found, strict=True)), "attention/logit_max": max(found[len(rms) :])}


@contextmanager
def _watched(layer: Block, number: int, rms: dict[int, Tensor], logits: dict[int, Tensor]) -> Iterator[None]:
    """For the duration of the block: what the layer gives out, and what its attention is given."""
    plain = layer.self_attn.attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits[number] = largest_logit(q, k)
        return plain(q, k, v)

    def keep(_: Any, __: Any, output: Tensor) -> None:
        rms[number] = output.float().square().mean().sqrt()

    hook = layer.register_forward_hook(keep)
    layer.self_attn.attention = attention
    try:
        yield
    finally:
        layer.self_attn.attention = plain
        hook.remove()


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest q k / sqrt(D) over heads and causal pairs, a scalar; q (1, T, H, D), k (1, T, K, D)."""
    _, length, heads, size = q.shape
    shared = k[0].float().repeat_interleave(heads // k.shape[2], dim=1)  # (T, H, D)
    largest = []
    for start in range(0, length, CHUNK_QUERIES):
        rows = q[0, start : start + CHUNK_QUERIES].float()  # (n, H, D)
        stop = start + len(rows)
        scores = torch.einsum("nhd,thd->hnt", rows, shared[:stop])  # (H, n, t)
        future = torch.ones(len(rows), stop, dtype=torch.bool, device=q.device).triu_(start + 1)  # (n, t)
        largest.append(scores.masked_fill_(future, -math.inf).amax())
    return torch.stack(largest).amax() / math.sqrt(size)
