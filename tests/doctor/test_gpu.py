"""nvidia-smi's answers, of old and new drivers, damaged ones too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from x1_pretrain.doctor import gpu
from x1_pretrain.doctor.gpu import Card

HEADING = """Mon Nov  9 10:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |
"""
ANSWERS = {
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-1",
    "driver_version": "570.86.15",
    "memory.total": "81559",
    "memory.used": "4",
    "temperature.gpu": "31",
    "power.draw": "70.12",
    "power.limit": "650.00",
    "power.default_limit": "700.00",
    "clocks.sm": "345",
    "clocks_event_reasons.active": "0x0000000000000001",
    "clocks_throttle_reasons.active": "0x0000000000000001",
    "ecc.errors.uncorrected.volatile.total": "0",
    "persistence_mode": "Enabled",
    "mig.mode.current": "[N/A]",
    "pcie.link.gen.current": "1",
    "pcie.link.gen.max": "5",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
}


def driver(unknown: Sequence[str] = (), gpus: int = 2, pids: str = "", heading: str = HEADING) -> gpu.Ask:
    """An nvidia-smi that refuses a query with a field it doesn't know, as the real one does."""

    def ask(arguments: Sequence[str]) -> str:
        if not arguments:
            return heading
        query = arguments[0]
        if query.startswith("--query-compute-apps"):
            return pids
        fields = query.removeprefix("--query-gpu=").split(",")
        if bad := [field for field in fields if field in unknown]:
            raise RuntimeError(f'Field "{bad[0]}" is not a valid field to query.')
        return "".join(", ".join(ANSWERS[field] for field in fields) + "\n" for _ in range(gpus))

    return ask


def test_everything_is_read() -> None:
    found = gpu.look(driver(pids="123, GPU-1\n456, GPU-2\n"))
    assert found is not None
    assert (found.cuda, found.version, found.processes) == ("12.8", "570.86.15", ("GPU-1", "GPU-2"))
    assert len(found.cards) == 2
    card = found.cards[0]
    assert card.name == "NVIDIA H100 80GB HBM3"
    assert (card.memory_mib, card.reasons, card.persistence, card.mig) == (81559.0, 1, True, None)
    assert (card.pcie_gen, card.pcie_gen_max) == (1.0, 5.0)
    assert (card.power_limit_w, card.power_default_w) == (650.0, 700.0)


def test_a_driver_that_lacks_fields_still_says_the_rest() -> None:
    cards = gpu.cards(driver(unknown=["clocks_event_reasons.active", "mig.mode.current"]))
    assert [card.reasons for card in cards] == [1, 1]  # by the older name
    assert cards[0].name == "NVIDIA H100 80GB HBM3"
    assert cards[0].memory_mib == 81559.0


def test_no_driver_a_dead_driver_and_a_silent_one() -> None:
    def absent(_: Sequence[str]) -> str:
        raise FileNotFoundError("nvidia-smi")

    def dead(_: Sequence[str]) -> str:
        raise RuntimeError("nvidia-smi: Failed to initialize NVML: Driver/library version mismatch")

    assert gpu.look(absent) is None
    found = gpu.look(dead)
    assert found is not None
    assert "mismatch" in str(found.trouble)
    nothing = gpu.look(lambda _: "")
    assert nothing is not None
    assert (nothing.cards, nothing.cuda) == ((), None)


@pytest.mark.parametrize(
    ("heading", "cuda"),
    [
        ("| CUDA Version: 12.4 |", "12.4"),
        ("| CUDA UMD Version: 13.0 |", "13.0"),
        ("CUDA Version : 11.8", "11.8"),
        ("nothing", None),
    ],
)
def test_which_cuda_the_driver_runs(heading: str, cuda: str | None) -> None:
    assert gpu.cuda_of(heading) == cuda


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (None, []),
        (0x1, []),
        (0x4, []),  # power at its cap is usual under load
        (0x8, ["hardware slowdown"]),
        (0x60, ["too hot", "too hot (hardware)"]),
        (0x84, ["power brake"]),
    ],
)
def test_why_a_clock_is_held_down(bits: int | None, words: list[str]) -> None:
    assert gpu.throttled(bits) == words


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_the_kind_by_the_drivers_name(name: str, kind: str | None) -> None:
    found = gpu.kind_of(name)
    assert (found.name if found else None) == kind


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        (None, ["a", "b", "c"]),
        ("", ["a", "b", "c"]),
        ("1", ["b"]),
        ("2, 0", ["c", "a"]),
        ("GPU-c", ["c"]),
        ("7", ["a", "b", "c"]),
        ("-1", ["a", "b", "c"]),
    ],
)
def test_which_cards_are_the_runs(visible: str | None, left: list[str]) -> None:
    cards = [Card(name, uuid=f"GPU-{name}") for name in "abc"]
    assert [card.name for card in gpu.ours(cards, visible)] == left


def test_a_card_goes_through_json() -> None:
    card = gpu.cards(driver(gpus=1))[0]
    assert Card(**card.to_json()) == card
