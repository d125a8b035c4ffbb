"""What the driver says of the GPUs, through nvidia-smi: it can hang, so it is run with a limit. No torch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from x1_pretrain.model.gpus import Kind, kinds

LIMIT_S = 15.0  # without persistence mode each call loads the driver anew: seconds a GPU
FIELDS = {  # ours -> nvidia-smi's names: older drivers have only the last
    "name": ("name",),
    "uuid": ("uuid",),
    "driver": ("driver_version",),
    "memory_mib": ("memory.total",),
    "used_mib": ("memory.used",),
    "temperature_c": ("temperature.gpu",),
    "power_w": ("power.draw",),
    "power_limit_w": ("power.limit",),
    "power_default_w": ("power.default_limit",),
    "clock_mhz": ("clocks.sm",),
    "reasons": ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
    "ecc_errors": ("ecc.errors.uncorrected.volatile.total",),
    "persistence": ("persistence_mode",),
    "mig": ("mig.mode.current",),
    "pcie_gen": ("pcie.link.gen.current",),
    "pcie_gen_max": ("pcie.link.gen.max",),
    "pcie_width": ("pcie.link.width.current",),
    "pcie_width_max": ("pcie.link.width.max",),
}
# Bits of the reasons why a clock is below its most. Power at its cap is usual under full load.
POWER_CAP = 0x04
BAD_REASONS = {0x08: "hardware slowdown", 0x20: "too hot", 0x40: "too hot (hardware)", 0x80: "power brake"}

Ask = Callable[[Sequence[str]], str]  # arguments -> what nvidia-smi printed; OSError or RuntimeError


@dataclass(frozen=True)
class Card:
    """One GPU as the driver sees it. None: it doesn't say."""

    name: str
    uuid: str = ""
    driver: str = ""
    memory_mib: float | None = None
    used_mib: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None  # of the board as it was sold
    clock_mhz: float | None = None
    reasons: int | None = None
    ecc_errors: float | None = None
    persistence: bool | None = None
    mig: bool | None = None
    pcie_gen: float | None = None
    pcie_gen_max: float | None = None
    pcie_width: float | None = None
    pcie_width_max: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Driver:
    """The driver, its GPUs, and who computes on them; or why it can't be asked."""

    cuda: str | None = None  # the newest CUDA that it runs
    version: str | None = None
    cards: tuple[Card, ...] = ()
    processes: tuple[str, ...] = ()  # the uuid of the GPU that each computes on
    trouble: str | None = None


def ask(arguments: Sequence[str]) -> str:
    """What `nvidia-smi arguments` prints."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nvidia-smi gave no answer within {LIMIT_S:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"nvidia-smi: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def look(ask: Ask = ask) -> Driver | None:
    """None where there is no nvidia-smi: no NVIDIA driver, or one that a container doesn't show."""
    try:
        heading = ask([])
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        return Driver(trouble=str(error)[:200])
    try:
        found = cards(ask)
        running = [row[1] for row in _query(ask, "compute-apps", ["pid", "gpu_uuid"])]
    except (OSError, RuntimeError) as error:
        return Driver(cuda=cuda_of(heading), trouble=str(error)[:200])
    return Driver(cuda_of(heading), found[0].driver if found else None, found, tuple(running))


def cuda_of(heading: str) -> str | None:
    """The newest CUDA that the driver runs; drivers since 590 call it "CUDA UMD Version"."""
    found = re.search(r"CUDA(?: UMD)? Version *: *(\d+\.\d+)", heading)
    return found[1] if found else None


def cards(ask: Ask = ask) -> tuple[Card, ...]:
    """Every GPU. A field that this driver doesn't know is left out, not the whole answer."""
    columns: dict[str, list[str]] = {}
    wanted = {ours: names[0] for ours, names in FIELDS.items()}
    try:
        rows = _query(ask, "gpu", list(wanted.values()))
        columns = {ours: [row[n] for row in rows] for n, ours in enumerate(wanted)}
    except RuntimeError:
        for ours, names in FIELDS.items():
            columns |= {ours: values} if (values := _first_known(ask, names)) else {}
    count = len(columns.get("name", []))
    return tuple(_card({ours: values[n] for ours, values in columns.items()}) for n in range(count))


def _first_known(ask: Ask, names: Sequence[str]) -> list[str] | None:
    for name in names:
        try:
            return [row[0] for row in _query(ask, "gpu", [name])]
        except RuntimeError:
            continue
    return None


def _query(ask: Ask, what: str, names: Sequence[str]) -> list[list[str]]:
    out = ask([f"--query-{what}={','.join(names)}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]
    if any(len(row) != len(names) for row in rows):
        raise RuntimeError(f"nvidia-smi: expected {len(names)} columns of {what}")
    return rows


def _card(cells: Mapping[str, str]) -> Card:
    words = {key: cells.get(key, "") for key in ("name", "uuid", "driver")}
    flags = {key: _flag(cells.get(key, "")) for key in ("persistence", "mig")}
    skipped = {*words, *flags, "reasons"}
    numbers = {key: _number(text) for key, text in cells.items() if key not in skipped}
    return Card(**words, **flags, **numbers, reasons=_bits(cells.get("reasons", "")))  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    """None for "[N/A]" and "[Not Supported]"."""
    try:
        return float(text)
    except ValueError:
        return None


def _flag(text: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text)


def _bits(text: str) -> int | None:
    try:
        return int(text, 16)
    except ValueError:
        return None


def ours(cards: Sequence[Card], visible: str | None) -> tuple[Card, ...]:
    """The cards that CUDA_VISIBLE_DEVICES leaves to the run; all where it says nothing that can be read."""
    words = [word.strip() for word in (visible or "").split(",") if word.strip()]
    found = []
    for word in words:
        named = [
            c
            for n, c in enumerate(cards)
            if str(n) == word or (word[:4] == "GPU-" and c.uuid.startswith(word))
        ]
        found += named
    return tuple(found) if words and len(found) == len(words) else tuple(cards)


def at_power_cap(card: Card) -> bool:
    """Its power cap holds the clock down, and nothing else that should not."""
    return bool((card.reasons or 0) & POWER_CAP) and not throttled(card.reasons)


def throttled(reasons: int | None) -> list[str]:
    """Why the clock is held down, where it should not be."""
    return [words for bit, words in BAD_REASONS.items() if (reasons or 0) & bit]


def kind_of(device_name: str) -> Kind | None:
    """The entry of the GPU table for a device by its name; a slice of a GPU (MIG) has none."""
    name = device_name.upper().replace("_", "-")
    if re.search(r"\bMIG\b", name):
        return None
    return next((known for known in kinds() if re.search(known.pattern, name)), None)
