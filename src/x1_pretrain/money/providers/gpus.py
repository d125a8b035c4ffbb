"""What `--gpu a100-80gb` means: the kinds of GPU that runs are planned for, under every provider's names.

A provider names the same board in its own words ("gpu_8x_a100_80gb_sxm4", "NVIDIA A100-SXM4-80GB"). A kind
is recognised by the words that must be there and those that must not.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from x1_pretrain.errors import UserError


@dataclass(frozen=True)
class Kind:
    name: str  # what a person types
    label: str  # what a person reads
    device: str  # as the driver calls it: the name that `peak_bf16_flops_per_sec` understands
    has: frozenset[str]
    lacks: frozenset[str] = frozenset()

    def matches(self, *names: str) -> bool:
        """Whether a provider's names for a machine or a GPU, taken together, are of this kind."""
        words = set(_words(" ".join(names)))
        return self.has <= words and not self.lacks & words


def _kind(name: str, label: str, device: str, has: str, lacks: str = "") -> Kind:
    return Kind(name, label, device, frozenset(has.split()), frozenset(lacks.split()))


KINDS = (
    _kind("a10", "A10", "NVIDIA A10", "A10"),
    _kind("a40", "A40", "NVIDIA A40", "A40"),
    _kind("a6000", "RTX A6000", "NVIDIA RTX A6000", "A6000"),
    _kind("a100-40gb", "A100 40GB", "NVIDIA A100-SXM4-40GB", "A100 40GB"),
    _kind("a100-80gb", "A100 80GB", "NVIDIA A100-SXM4-80GB", "A100 80GB"),
    _kind("h100", "H100 SXM", "NVIDIA H100 80GB HBM3", "H100", "PCIE NVL"),
    _kind("h100-pcie", "H100 PCIe", "NVIDIA H100 PCIe", "H100 PCIE"),
    _kind("h100-nvl", "H100 NVL", "NVIDIA H100 NVL", "H100 NVL"),
    _kind("h200", "H200 SXM", "NVIDIA H200", "H200", "NVL"),
    _kind("gh200", "GH200", "NVIDIA GH200 480GB", "GH200"),
    _kind("b200", "B200", "NVIDIA B200", "B200"),
    _kind("b300", "B300", "NVIDIA B300", "B300"),
    _kind("l4", "L4", "NVIDIA L4", "L4"),
    _kind("l40", "L40", "NVIDIA L40", "L40"),
    _kind("l40s", "L40S", "NVIDIA L40S", "L40S"),
    _kind("rtx6000ada", "RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", "6000 ADA"),
    _kind("rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090", "3090", "TI"),
    _kind("rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "4090", "D"),
    _kind("rtx5090", "RTX 5090", "NVIDIA GeForce RTX 5090", "5090", "D"),
    _kind("mi300x", "MI300X", "AMD Instinct MI300X OAM", "MI300X"),
)


def kind(text: str) -> Kind:
    """The kind that a person means by "a100-80gb", "A100 80GB" or "a100_80gb"."""
    wanted = _squeezed(text)
    for known in KINDS:
        if wanted in (_squeezed(known.name), _squeezed(known.label)):
            return known
    likely = _likely(wanted)
    hint = f"did you mean {' or '.join(likely)}?" if likely else f"known: {', '.join(k.name for k in KINDS)}"
    raise UserError(f"no GPU is called {text!r}; {hint}")


def _likely(wanted: str) -> list[str]:
    """Kinds whose name holds what was typed ("a100", "4090") first, else those spelt nearly so."""
    if holding := [k.name for k in KINDS if len(wanted) > 1 and wanted in _squeezed(k.name)]:
        return holding
    names = {_squeezed(k.name): k.name for k in KINDS}
    return [names[close] for close in difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)]


def _words(text: str) -> list[str]:
    """gpu_1x_h100_pcie "H100 (80 GB PCIe)" -> GPU 1X H100 PCIE H100 80GB PCIE."""
    return re.sub(r"\b(\d+) GB\b", r"\1GB", re.sub(r"[^A-Z0-9]+", " ", text.upper())).split()


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())
