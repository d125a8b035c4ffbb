"""AdamW for a decoder: its groups, its state by parameter name, and the norm of the gradient.

On disk the state is `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`, unpadded like the weights, and
`step`, the number of updates done. Full tensors: any number of ranks and any vocabulary padding read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from x1_pretrain.config import OptimizerConfig
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.huggingface import refuse_misfits

MOMENTS = ("exp_avg", "exp_avg_sq")


def build(decoder: Decoder, config: OptimizerConfig, device: torch.device) -> AdamW:
    """AdamW with decay on matrices (the embedding is one) and none on norms."""
    weights = list(decoder.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim != 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    """One rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm over all gradients together, a scalar on their device: measuring waits for nothing."""
    return get_total_norm(list(gradients))


def clip_(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients down to `max_norm`, given their measured norm; smaller ones stay as they are."""
    clip_grads_with_norm_(parameters, max_norm, norm)


def state_tensors(optimizer: AdamW, decoder: Decoder) -> dict[str, Tensor]:
    """The optimizer's whole state as named CPU tensors (copies); zeros where no update was made yet."""
    tensors = {"step": torch.tensor(float(updates(optimizer)))}
    for name, parameter in decoder.named_parameters():
        rows = decoder.disk_rows(name, parameter)
        state = optimizer.state.get(parameter, {})  # indexing would insert an empty one
        for moment in MOMENTS:
            value = state.get(moment, torch.zeros_like(parameter))
            tensors[f"{moment}.{name}"] = value.detach()[:rows].cpu().clone()
    return tensors


def load_state_tensors(optimizer: AdamW, decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Continue from a saved state. Every name and shape must fit; a misfit is refused by its name."""
    parameters = dict(decoder.named_parameters())
    rows = {name: decoder.disk_rows(name, p) for name, p in parameters.items()}
    shapes = {f"{m}.{name}": (rows[name], *p.shape[1:]) for name, p in parameters.items() for m in MOMENTS}
    refuse_misfits("optimizer.safetensors", {"step": (), **shapes}, tensors)
    for name, parameter in parameters.items():
        # A tensor each: the optimizer counts up in place. Fused kernels want it where the weights are.
        optimizer.state[parameter]["step"] = tensors["step"].to(parameter.device, torch.float32, copy=True)
        for moment in MOMENTS:
            padded = torch.zeros_like(parameter)
            padded.detach()[: rows[name]].copy_(tensors[f"{moment}.{name}"])
            optimizer.state[parameter][moment] = padded


def updates(optimizer: AdamW) -> int:
    """How many updates were made; one number, since every update is of all weights."""
    steps = [cast(Tensor, state["step"]) for state in optimizer.state.values() if state]
    counts = set(map(int, torch.stack(steps).tolist())) if steps else set()
    if len(counts) > 1:
        raise ValueError(f"the weights have had different numbers of updates: {sorted(counts)}")
    return counts.pop() if counts else 0
