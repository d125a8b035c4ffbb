"""Causal attention: which kernel computes it, chosen once, with the reason in one line.

Every kernel takes q (B, T, H, D) and k, v (B, T, K, D) with H a multiple of K, and returns (B, T, H, D).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Requested = Literal["auto", "flash", "sdpa"]

# bf16 has 8 bits of mantissa: two right kernels differ by a few of its last places, a wrong one by far more.
PROBE_TOLERANCE = 3e-2


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own kernel: right on every device."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
    shared = q.shape[1] != k.shape[1]
    if shared and q.is_cuda and q.dtype == torch.float32:  # no fast kernel there shares heads
        repeats = q.shape[1] // k.shape[1]
        k, v, shared = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), False
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2)  # (B, T, H, D)


def choose(requested: Requested, device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """The kernel for this device, and one line that says which and why."""
    if requested == "sdpa":
        return sdpa, "attention: sdpa (asked for)"
    reason = _why_not_flash(device, dtype)
    if reason is not None:
        return sdpa, f"attention: sdpa (flash_attn not used: {reason})"
    try:
        flash = _flash_attention()
    except Exception as error:  # a binary package built for another torch fails with more than ImportError
        return sdpa, f"attention: sdpa (flash_attn can't be imported: {_one_line(error)})"
    reason = disagreement(flash, device, dtype)
    if reason is not None:
        return sdpa, f"attention: sdpa (flash_attn is installed, but {reason})"
    return flash, "attention: flash_attn (agrees with sdpa on this device)"


def disagreement(candidate: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run `candidate` and `sdpa` forward and backward on small tensors; how they differ, or None."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 128, heads, 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    try:
        found = _outputs(candidate, inputs)
    except Exception as error:  # whatever a foreign kernel raises, the answer is not to use it
        return f"a small trial of it failed: {_one_line(error)}"
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, _outputs(sdpa, inputs), strict=True):
        difference = ((a - b).norm() / b.norm()).item()
        if not difference <= PROBE_TOLERANCE:  # also true for NaN
            return f"its {name} differs from sdpa by {difference:.3g} of the norm"
    return None


def _outputs(kernel: Attention, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = kernel(*leaves)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    return [t.detach().float() for t in (out, *gradients)]


def _why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    return None


def _flash_attention() -> Attention:
    package = importlib.import_module("flash_attn")
    kernel = package.flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = kernel(q, k, v, causal=True)
        return out  # (B, T, H, D)

    return flash


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
