"""Kinds of GPU under the names that providers give them."""

from __future__ import annotations

import pytest

from x1_pretrain.errors import UserError
from x1_pretrain.model.flops import peak_bf16_flops_per_sec
from x1_pretrain.money.providers.gpus import KINDS, kind

LAMBDA = {  # instance type, what it says of its GPU: kind
    ("gpu_1x_a10", "A10 (24 GB PCIe)"): "a10",
    ("gpu_1x_a6000", "A6000 (48 GB)"): "a6000",
    ("gpu_1x_a100", "A100 (40 GB PCIe)"): "a100-40gb",
    ("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)"): "a100-40gb",
    ("gpu_8x_a100", "A100 (40 GB SXM4)"): "a100-40gb",
    ("gpu_8x_a100_80gb_sxm4", "A100 (80 GB SXM4)"): "a100-80gb",
    ("gpu_1x_h100_pcie", "H100 (80 GB PCIe)"): "h100-pcie",
    ("gpu_1x_h100_sxm5", "H100 (80 GB SXM5)"): "h100",
    ("gpu_8x_h100_sxm5gdr", "H100 (80 GB SXM5)"): "h100",
    ("gpu_1x_gh200", "GH200 (96 GB)"): "gh200",
    ("gpu_8x_b200_sxm6", "B200 (180 GB SXM6)"): "b200",
    ("gpu_1x_rtx6000", "RTX 6000 (24 GB)"): None,
    ("gpu_8x_v100", "Tesla V100 (16 GB)"): None,
    ("cpu_4x_general", "N/A"): None,
}
RUNPOD = {
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A40": "a40",
    "NVIDIA A30": None,
    "NVIDIA B200": "b200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": None,
    "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": None,
    "AMD Instinct MI300X OAM": "mi300x",
}


@pytest.mark.parametrize(("names", "expected"), [*LAMBDA.items(), *(((k,), v) for k, v in RUNPOD.items())])
def test_a_machine_is_of_one_kind_at_most(names: tuple[str, ...], expected: str | None) -> None:
    assert [known.name for known in KINDS if known.matches(*names)] == ([expected] if expected else [])


@pytest.mark.parametrize("typed", ["a100-80gb", "A100-80GB", "a100_80gb", "A100 80GB", " a10080gb "])
def test_a_kind_as_people_type_it(typed: str) -> None:
    assert kind(typed).label == "A100 80GB"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("a100", "did you mean a100-40gb or a100-80gb?"),
        ("4090", "did you mean rtx4090?"),
        ("a100-8gb", "did you mean a100-80gb"),
        ("h10", "did you mean h100 or h100-pcie or h100-nvl?"),
        ("tpu-v5e", "known: a10, a40"),
        ("", "known: a10, a40"),
    ],
)
def test_a_kind_that_nobody_knows(typed: str, hint: str) -> None:
    with pytest.raises(UserError, match="no GPU is called") as raised:
        kind(typed)
    assert hint in str(raised.value)


def test_names_and_labels_are_distinct() -> None:
    for known in KINDS:
        assert kind(known.name) is kind(known.label) is known


def test_the_drivers_name_has_the_boards_peak() -> None:
    """Dense bf16 peaks of the data sheets, TFLOP/s, of the boards that runs are planned for."""
    sheets = {"a100-40gb": 312, "a100-80gb": 312, "h100": 989, "h100-pcie": 756, "h200": 989, "l40s": 362}
    assert {name: peak_bf16_flops_per_sec(kind(name).device) for name in sheets} == {
        name: tflops * 1e12 for name, tflops in sheets.items()
    }


def test_a_kinds_own_device_is_of_that_kind() -> None:
    for known in KINDS:
        if known.name != "gh200":  # the driver's name for it counts another memory
            assert known.matches(known.device)
