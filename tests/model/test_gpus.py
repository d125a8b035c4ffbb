"""Kinds of GPU under the names that providers and drivers give them, and the numbers of their data sheets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from x1_pretrain.errors import UserError
from x1_pretrain.model import gpus
from x1_pretrain.model.gpus import kind, kinds, peak_bf16_flops_per_sec

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
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA H20": "h20",
    "NVIDIA GB200": "gb200",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": None,
    "AMD Instinct MI300X OAM": "mi300x",
}


@pytest.mark.parametrize(("names", "expected"), [*LAMBDA.items(), *(((k,), v) for k, v in RUNPOD.items())])
def test_a_machine_is_of_one_kind_at_most(names: tuple[str, ...], expected: str | None) -> None:
    found = [known for known in kinds() if known.matches(*names)]
    assert {known.sold_as or known.name for known in found} == ({expected} if expected else set())
    assert [known.name for known in found if known.sold_as is None] == ([expected] if expected else [])


def test_who_asks_for_an_a100_takes_either_board_and_who_names_one_gets_that() -> None:
    boards = ["NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"]
    assert [kind("a100-80gb").matches(board) for board in boards] == [True, True, False]
    assert [kind("A100 80GB PCIe").matches(board) for board in boards] == [True, False, False]
    assert [kind("a100-40gb-pcie").matches(board) for board in boards] == [False, False, True]


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
    for known in kinds():
        assert kind(known.name) is kind(known.label) is known


def test_a_kinds_own_device_is_of_that_kind() -> None:
    for known in kinds():
        if known.name != "gh200":  # the driver's name for it counts another memory
            assert known.matches(known.device)


# Of the vendors' data sheets: dense bf16 TFLOP/s with fp32 accumulation, GB on the board, GB/s of its memory.
SHEETS = {
    "a10": (125, 24, 600),
    "a40": (149.7, 48, 696),
    "a6000": (154.85, 48, 768),
    "a100-40gb-pcie": (312, 40, 1555),
    "a100-40gb": (312, 40, 1555),
    "a100-80gb-pcie": (312, 80, 1935),
    "a100-80gb": (312, 80, 2039),
    "h100": (989, 80, 3350),
    "h100-pcie": (756, 80, 2000),
    "h100-nvl": (835, 94, 3900),
    "h200": (989, 141, 4800),
    "gh200": (None, 96, 4000),
    "h20": (148, 96, 4000),
    "b200": (2250, 180, 8000),
    "b300": (2250, 288, 8000),
    "gb200": (2500, 186, 8000),
    "gb300": (2500, 288, 8000),
    "l4": (121, 24, 300),
    "l40": (181.05, 48, 864),
    "l40s": (362, 48, 864),
    "rtx6000ada": (None, 48, 960),
    "rtx3090": (71, 24, 936),
    "rtx4090": (165.2, 24, 1008),
    "rtx5090": (209.5, 32, 1792),
    "mi300x": (1300, 192, 5300),
    "mi355x": (2500, 288, 8000),
}


def test_every_board_has_the_numbers_of_its_sheet() -> None:
    assert {k.name for k in kinds()} == set(SHEETS)
    for name, (tflops, memory_gb, bandwidth) in SHEETS.items():
        board = kind(name)
        assert board.peak_flops_per_sec == (None if tflops is None else pytest.approx(tflops * 1e12))
        assert peak_bf16_flops_per_sec(board.device) == board.peak_flops_per_sec, name  # by its pattern too
        assert 0.91 * memory_gb < board.memory_gib <= memory_gb, name
        assert board.bandwidth_gb_per_sec == bandwidth, name
        assert board.link_gb_per_sec is not None
        assert re.match(r"20\d\d-", board.checked)


def test_links_are_in_one_direction() -> None:
    """Half of what NVIDIA prints for NVLink (600 and 900 GB/s); about 32 and 64 for PCIe of 16 lanes."""
    links = {
        "a100-80gb": 300,
        "a100-80gb-pcie": 32,
        "a100-40gb-pcie": 32,
        "h100": 450,
        "h100-pcie": 64,
        "b200": 900,
        "l4": 32,
        "rtx5090": 64,
    }
    assert {name: kind(name).link_gb_per_sec for name in links} == links


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100", 312),
        ("a100-80gb", 312),
        ("a100_40gb", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GB300", 2500),
        ("AMD Instinct MI300X", 1300),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A30", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("Quadro RTX 6000", None),
        ("AMD EPYC", None),
        ("", None),
    ],
)
def test_peaks_are_known_or_not_given(name: str, tflops: float | None) -> None:
    assert peak_bf16_flops_per_sec(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


GOOD = """checked = "2026-11-21"
[[gpu]]
name = "x1"
label = "X1"
device = "ACME X1"
pattern = 'X1'
has = "X1"
memory_gib = 7.5
source = "a sheet"
"""


def table(folder: Path, text: str) -> Path:
    file = folder / "gpus.toml"
    file.write_text(text)
    return file


def test_a_table_of_ones_own_with_what_is_not_known_left_out(tmp_path: Path) -> None:
    (only,) = kinds(table(tmp_path, GOOD))
    assert only.matches("acme-x1")
    assert only.peak_flops_per_sec is only.bandwidth_gb_per_sec is only.link_gb_per_sec is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("memory_gib = 7.5\n", "", r"gpu 1 \(x1\): memory_gib: .*required"),
        ("memory_gib = 7.5", "memory_gib = -1", r"gpu 1 \(x1\): memory_gib: .* found -1"),
        ("memory_gib = 7.5", 'memory_gib = "much"', r"memory_gib: .* found 'much'"),
        ("source =", "sauce =", r"gpu 1 \(x1\): .*source: .*required"),
        ("pattern = 'X1'", "pattern = '('", r"pattern: .*not a regular expression"),
        ("2026-11-21", "yesterday", r"checked: .* found 'yesterday'"),
        ("[[gpu]]", "[[gup]]", r"expected entries \[\[gpu\]\]"),
        ("[[gpu]]", "[[gpu", r"can't be read"),
        ('source = "a sheet"\n', 'source = "a sheet"\nspeed = 3\n', r"speed: .* found 3"),
    ],
)
def test_a_table_that_is_wrong_is_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        kinds(table(tmp_path, GOOD.replace(old, new)))
    assert "gpus.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_given_twice(tmp_path: Path) -> None:
    entry = GOOD[GOOD.index("[[gpu]]") :]
    with pytest.raises(UserError, match="more than one gpu is called 'x1'"):
        kinds(table(tmp_path, GOOD + entry))


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        gpus.kinds(tmp_path / "none.toml")
