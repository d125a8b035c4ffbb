"""The peers that spike detection is measured against do what their descriptions say."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/stability.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("stability_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["stability_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["stability_benchmark"]


def test_mean_and_sigma_against_the_plain_formula(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(3, 0.1, 300), np.exp(rng.normal(0, 0.2, 300))
    losses[200], norms[250], losses[20] = 9.0, 50.0, 90.0
    flags = script.mean_and_sigma(script.Trace(losses, norms))
    for step in range(64, 300):
        expected = False
        for values in (losses, norms):
            before = values[max(0, step - 128) : step].tolist()
            limit = statistics.mean(before) + 6 * statistics.stdev(before)
            expected |= bool(values[step] > limit)
        assert flags[step] == expected
    assert not any(flags[:64])
    assert flags[200]
    assert flags[250]


def test_zclip_notices_and_is_not_drawn_along(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    norms = 1 + rng.normal(0, 0.01, 6000)
    norms[100:105] = 50.0
    flags = script.zclip(script.Trace(np.ones(6000), norms))
    assert all(flags[100:105])  # the clipped value enters the average, not the spike
    # 1 in 161 of a normal distribution; a moving average of about 60 steps adds some
    assert 5800 / 161 * 0.7 < sum(flags[200:]) < 5800 / 161 * 2


def test_made_up_runs_have_the_noise_they_say(script: ModuleType) -> None:
    for noise in script.NOISES.values():
        run = script.clean(np.random.default_rng(1), 20_000, noise)
        tail = run.losses[-10_000:]
        assert np.std(np.diff(tail)) / 2**0.5 == pytest.approx(noise.loss * 0.95, rel=0.15)
        assert np.std(np.diff(np.log(run.norms[-10_000:]))) / 2**0.5 == pytest.approx(noise.norm, rel=0.1)
    plain = script.clean(np.random.default_rng(1), 100, noise)
    spiked = script.spiked(plain, 95, 2.0, 10.0, np.ones(50))  # cut off by the end
    assert spiked.losses - plain.losses == pytest.approx([0.0] * 95 + [2.0] * 5)
    assert spiked.norms / plain.norms == pytest.approx([1.0] * 95 + [10.0] * 5)
