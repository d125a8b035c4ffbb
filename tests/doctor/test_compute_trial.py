"""The load under which the driver is asked, with GPUs that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from x1_pretrain.doctor import compute_trial
from x1_pretrain.doctor.gpu import Card


class Gpus:
    """As much of torch as the load needs. `full`: GPUs without room."""

    bfloat16 = "bf16"

    def __init__(self, count: int, full: tuple[int, ...] = ()) -> None:
        self.full, self.calls = full, dict.fromkeys((f"cuda:{n}" for n in range(count)), 0)
        self.now = 0.0
        self.cuda = SimpleNamespace(device_count=lambda: count, synchronize=lambda _: None)

    def randn(self, *_: int, device: str, dtype: str) -> SimpleNamespace:
        if int(device[-1]) in self.full:
            raise RuntimeError("CUDA out of memory")
        return SimpleNamespace(device=device)

    def matmul(self, a: Any, _: Any) -> None:
        self.calls[a.device] += 1
        self.now += 2e-3


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_trial, "SECONDS", 0.01)
    monkeypatch.setattr(compute_trial.gpu, "cards", lambda: (Card("a"), Card("b"), Card("c")))


@pytest.mark.usefixtures("asked")
def test_every_gpu_with_room_is_loaded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = Gpus(3, full=(1,))
    clock = SimpleNamespace(monotonic=lambda: torch.now, perf_counter=lambda: torch.now)
    monkeypatch.setattr(compute_trial, "time", clock)
    found = compute_trial.under_load(torch)
    assert (len(found["cards"]), found["loaded"]) == (3, 2)
    assert torch.calls["cuda:1"] == 0
    assert torch.calls["cuda:0"] == pytest.approx(torch.calls["cuda:2"], abs=20)
    assert torch.calls["cuda:2"] > 100


@pytest.mark.usefixtures("asked")
def test_no_room_anywhere_is_no_reading() -> None:
    assert compute_trial.under_load(Gpus(1, full=(0,))) == {
        "cards": [],
        "loaded": 0,
        "error": "no GPU has room for the load",
    }
