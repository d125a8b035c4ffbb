"""The same plan on more GPUs: what data parallelism gives, and where it alone stops making sense. Pure.

The loop sums its gradients once a step, after the last micro-batch, without overlap: a step takes its
arithmetic and then its all-reduce. A ring moves 2 (W-1)/W of the fp32 gradients through every GPU's link.
"""

from __future__ import annotations

from dataclasses import dataclass

from x1_pretrain.config import ModelConfig
from x1_pretrain.model.flops import parameter_counts
from x1_pretrain.model.memory import largest_micro_batch, training_memory

NODE_GPUS = 8
BETWEEN_NODES_GB_PER_SEC = 50.0  # assumed: one 400 Gb/s network card a GPU
WIDTHS = (8, 64, 1024)


@dataclass(frozen=True)
class Width:
    """One number of GPUs."""

    gpus: int
    tokens_per_gpu: float  # a step
    compute_s: float  # a step
    exchange_s: float | None  # None: the link is not known
    efficiency: float | None
    hours: float
    usd: float | None
    stops: str  # why not so wide; empty where it makes sense


@dataclass(frozen=True)
class Shared:
    """What all widths have in common."""

    model: ModelConfig
    batch_tokens: int
    steps: int
    seconds_per_step: float  # on one GPU
    link_gb_per_sec: float | None
    memory_gib: float | None
    usd_per_gpu_hr: float
    reserve_h: float

    def width(self, gpus: int) -> Width:
        compute_s = self.seconds_per_step / gpus
        moved_s = exchange_s(parameter_counts(self.model).total, gpus, self.link_gb_per_sec)
        step_s = compute_s + (moved_s or 0.0)
        hours = self.steps * step_s / 3600
        usd = (hours + self.reserve_h) * self.usd_per_gpu_hr * gpus
        share = None if moved_s is None else compute_s / step_s
        return Width(
            gpus,
            self.batch_tokens / gpus,
            compute_s,
            moved_s,
            share,
            hours,
            usd,
            self.stops(gpus, compute_s, moved_s),
        )

    def stops(self, gpus: int, compute_s: float, moved_s: float | None) -> str:
        sequences = self.batch_tokens / self.model.context
        if self.memory_gib is not None and largest_micro_batch(self.model, 1, self.memory_gib) is None:
            needed = training_memory(self.model, 1).total / 2**30
            return f"{needed:,.0f} GiB for one sequence on {self.memory_gib:,.0f}: shard the model"
        if sequences < gpus:
            return f"{sequences:,.0f} sequences a step, fewer than GPUs"
        if moved_s is not None and moved_s > compute_s:
            return "exchange takes longer than arithmetic"
        return ""

    def widest(self) -> int:
        """The largest power of two at which data parallelism makes sense; 0 for none."""
        widths = [2**k for k in range(15)]
        return max((gpus for gpus in widths if not self.width(gpus).stops), default=0)


def exchange_s(parameters: float, gpus: int, link_gb_per_sec: float | None) -> float | None:
    """Seconds to sum fp32 gradients over a ring: the slowest link of the way decides."""
    if gpus == 1:
        return 0.0
    if link_gb_per_sec is None:
        return None
    link = link_gb_per_sec if gpus <= NODE_GPUS else min(link_gb_per_sec, BETWEEN_NODES_GB_PER_SEC)
    return 2.0 * (gpus - 1) / gpus * 4.0 * parameters / (link * 1e9)
