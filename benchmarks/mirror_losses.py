"""What a machine that dies takes with it, at worst and on average, by the cadence of its run's checkpoints.

    python benchmarks/mirror_losses.py     the tables of docs/mirror.md, at once

Arithmetic, not a measurement: speeds are at the MFU that plans assume, the rates of disk and network are
those in the heads of the tables. The formula is held against a simulated mirror by
tests/mirror/test_losses.py.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# This folder leaves the path before anything else: its `tokenize` would hide the standard library's.
sys.path[:] = [folder for folder in sys.path if not folder.endswith("benchmarks")]

from collections.abc import Iterator
from pathlib import Path

from x1_pretrain.config import MirrorConfig, RunConfig
from x1_pretrain.config_reading import load_config
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.model.gpus import kind
from x1_pretrain.money.gate import ASSUMED_MFU
from x1_pretrain.money.prices import table as prices
from x1_pretrain.money.storage import CHECKPOINT_BYTES
from x1_pretrain.planning.losing import Timing

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DISK_MB_PER_S = 500.0  # that a checkpoint is written with
NETWORK_MB_PER_S = (100.0, 10.0)  # of the upload: a data center's, somebody's home
LOOK_S = float(MirrorConfig().every_s)
CADENCES = (100, 300, 900, 1800)  # steps


def timing(config: RunConfig, every: int, step_s: float, network_mb_per_s: float) -> Timing:
    size = checkpoint_bytes(config)
    write_s, send_s = size / (DISK_MB_PER_S * 1e6), size / (network_mb_per_s * 1e6)
    return Timing(every * step_s, write_s, send_s, LOOK_S)


def checkpoint_bytes(config: RunConfig) -> int:
    return CHECKPOINT_BYTES * parameter_counts(config.model).total


def seconds_per_step(config: RunConfig, gpu: str) -> float:
    """At the assumed MFU."""
    peak = kind(gpu).peak_flops_per_sec
    assert peak is not None
    return config.training.batch_tokens * flops_per_token(config.model).palm / (ASSUMED_MFU * peak)


def usd_per_hr(gpu: str, provider: str) -> float:
    return float(next(p.usd_per_hr for p in prices() if (p.kind, p.provider) == (gpu, provider)))


def lines(file: str, gpu: str, provider: str) -> Iterator[str]:
    """One run's table."""
    config, price = load_config(CONFIGS / file), usd_per_hr(gpu, provider)
    step_s, label = seconds_per_step(config, gpu), kind(gpu).label
    size = checkpoint_bytes(config) / 1e9
    yield (
        f"**{config.name}** on one {label} at ${price:.2f} an hour ({provider}): {step_s:.2f} s a step at an "
        f"assumed MFU of {ASSUMED_MFU}, checkpoints of {size:.2f} GB, written at {DISK_MB_PER_S:.0f} MB/s."
    )
    yield ""
    fast, slow = NETWORK_MB_PER_S
    yield (
        f"| `checkpoint.every` | one each | lost at worst, sent at {fast:.0f} MB/s | steps | dollars | "
        f"at {slow:.0f} MB/s | dollars |"
    )
    yield "|---|---|---|---|---|---|---|"
    for every in CADENCES:
        one, other = (timing(config, every, step_s, rate) for rate in NETWORK_MB_PER_S)
        cells = [f"{every:,}", minutes(one.period_s), minutes(one.worst_s())]
        cells += [f"{one.worst_steps(step_s):,.0f}", dollars(one, price)]
        cells += [minutes(other.worst_s()), dollars(other, price)]
        yield f"| {' | '.join(cells)} |"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def dollars(one: Timing, price: float) -> str:
    return f"${one.worst_s() / 3600 * price:.2f}"


RUNS = (
    ("x1-50m-a100.yaml", "a100-80gb", "RunPod community"),
    ("x1-isoflop-A.yaml", "rtx4090", "RunPod community"),
)


def tables() -> str:
    return "\n\n".join("\n".join(lines(*run)) for run in RUNS)


if __name__ == "__main__":
    print(tables())
