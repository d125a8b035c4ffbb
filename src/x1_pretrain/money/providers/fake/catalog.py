"""What the fake provider rents out, and how a request and its answer look to both of its APIs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from typing import Any

from x1_pretrain.errors import UserError
from x1_pretrain.model import gpus
from x1_pretrain.money.providers.fake.machines import World


@dataclass(frozen=True)
class Call:
    """A request, read."""

    method: str
    parts: tuple[str, ...]  # of the path below the API's root
    query: Mapping[str, str]
    body: Any  # parsed JSON; None where there is none


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any = None  # None: no body at all
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """A GPU as RunPod rents it, by the piece."""

    id: str
    name: str
    memory_gb: int
    secure_usd_per_hr: Decimal
    community_usd_per_hr: Decimal
    pool: str | None = None


@dataclass(frozen=True)
class Box:
    """A machine as Lambda rents it, whole."""

    name: str
    gpu_description: str
    gpu_count: int
    usd_per_hr: Decimal
    vcpus: int
    memory_gib: int
    storage_gib: int


def _board(id_: str, name: str, memory_gb: int, secure: str, community: str, pool: str | None) -> Board:
    return Board(id_, name, memory_gb, Decimal(secure), Decimal(community), pool)


BOARDS = (
    _board("NVIDIA A100 80GB PCIe", "A100 PCIe", 80, "1.19", "1.09", "AMPERE_80"),
    _board("NVIDIA A100-SXM4-80GB", "A100 SXM", 80, "1.39", "1.29", "AMPERE_80"),
    _board("NVIDIA H100 PCIe", "H100 PCIe", 80, "2.39", "1.99", "ADA_80_PRO"),
    _board("NVIDIA H100 80GB HBM3", "H100 SXM", 80, "2.69", "2.49", "ADA_80_PRO"),
    _board("NVIDIA L40S", "L40S", 48, "0.86", "0.79", "ADA_48_PRO"),
    _board("NVIDIA GeForce RTX 4090", "RTX 4090", 24, "0.69", "0.34", "ADA_24"),
    _board("NVIDIA RTX A6000", "RTX A6000", 48, "0.49", "0.33", "AMPERE_48"),
)
BOXES = (
    Box("gpu_1x_a10", "A10 (24 GB PCIe)", 1, Decimal("1.29"), 30, 200, 1400),
    Box("gpu_1x_a6000", "A6000 (48 GB)", 1, Decimal("1.09"), 14, 100, 200),
    Box("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)", 1, Decimal("1.48"), 30, 200, 512),
    Box("gpu_1x_a100_80gb_sxm4", "A100 (80 GB SXM4)", 1, Decimal("1.79"), 30, 225, 2048),
    Box("gpu_8x_a100_80gb_sxm4", "A100 (80 GB SXM4)", 8, Decimal("22.32"), 240, 1800, 19456),
    Box("gpu_1x_h100_pcie", "H100 (80 GB PCIe)", 1, Decimal("3.29"), 26, 200, 1024),
    Box("gpu_1x_h100_sxm5", "H100 (80 GB SXM5)", 1, Decimal("4.29"), 26, 225, 2816),
)
MAX_COUNT = 8  # GPUs of a RunPod pod


class Prices:
    """The price list, with at most one kind of GPU at a price of your own. Prices are for one GPU."""

    def __init__(self, gpu: str | None = None, usd_per_hr: Decimal | None = None) -> None:
        self._kind = gpus.kind(gpu) if gpu is not None and usd_per_hr is not None else None
        if usd_per_hr is not None and not (usd_per_hr.is_finite() and usd_per_hr > 0):
            raise UserError(f"price {usd_per_hr}: expected USD per hour, more than 0")
        self._usd_per_hr = usd_per_hr or Decimal(0)

    def board(self, world: World, board: Board, cloud: str) -> Decimal:
        """One GPU of a pod, now."""
        listed = board.secure_usd_per_hr if cloud == "SECURE" else board.community_usd_per_hr
        mine = self._kind is not None and self._kind.matches(board.id)
        return (self._usd_per_hr if mine else listed) * world.market

    def box(self, world: World, box: Box) -> Decimal:
        """A whole Lambda machine, now."""
        mine = self._kind is not None and self._kind.matches(box.name, box.gpu_description)
        return (self._usd_per_hr * box.gpu_count if mine else box.usd_per_hr) * world.market


def cents(usd: Decimal) -> int:
    """Lambda states whole cents: a fraction of one is rounded up."""
    return int((usd * 100).to_integral_value(ROUND_CEILING))


def full(world: World, api: str, names: tuple[str, ...]) -> bool:
    """Whether a fault leaves nothing of these free, as a catalogue shows it. Looking does not use it up."""
    return any(
        fault.kind == "no_capacity" and fault.active(world.at_s) and fault.api in ("any", api)
        and fault.concerns(names)
        for fault in world.faults
    )  # fmt: skip
