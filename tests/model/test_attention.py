"""Attention against a loop over positions, and the choice of kernel: said, probed, never trusted unseen."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from x1_pretrain.model import attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def by_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention, one position of one head at a time."""
    batch, length, heads, size = q.shape
    group = heads // k.shape[2]
    rows = []
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                scores = (k[b, : t + 1, h // group] @ q[b, t, h]) / size**0.5
                rows.append(torch.softmax(scores, dim=0) @ v[b, : t + 1, h // group])
    return torch.stack(rows).view(batch, length, heads, size)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_is_causal_grouped_attention(kv_heads: int) -> None:
    q, k, v = (torch.randn(2, 9, n, 8, dtype=torch.float64) for n in (4, kv_heads, kv_heads))
    torch.testing.assert_close(attention.sdpa(q, k, v), by_loop(q, k, v))


@pytest.mark.parametrize("requested", ["auto", "flash", "sdpa"])
def test_a_cpu_always_has_sdpa_and_the_line_says_why(requested: attention.Requested) -> None:
    kernel, line = attention.choose(requested, CPU, torch.bfloat16)
    assert kernel is attention.sdpa
    assert line.startswith("attention: sdpa (")
    assert ("asked for" if requested == "sdpa" else "the device is cpu") in line


def test_fp32_has_no_flash_kernel() -> None:
    kernel, line = attention.choose("flash", CUDA, torch.float32)
    assert kernel is attention.sdpa
    assert "not float32" in line


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    kernel, line = attention.choose("auto", CUDA, torch.bfloat16)
    assert kernel is attention.sdpa
    assert "flash_attn can't be imported: ModuleNotFoundError" in line


def test_a_package_built_for_another_torch_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise OSError('flash_attn_2.so:\\nundefined symbol: _ZN3c104')")
    monkeypatch.syspath_prepend(tmp_path)
    kernel, line = attention.choose("auto", CUDA, torch.bfloat16)
    assert kernel is attention.sdpa
    assert "undefined symbol: _ZN3c104" in line
    assert "\n" not in line


def test_an_installed_package_is_called_causal_after_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = lambda q, k, v, causal=False: attention.sdpa(q, k, v) if causal else q
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "_why_not_flash", lambda device, dtype: None)  # as if the CPU were a GPU
    kernel, line = attention.choose("auto", CPU, torch.bfloat16)
    assert "flash_attn (agrees with sdpa" in line
    q, k, v = (torch.randn(1, 5, n, 8) for n in (4, 2, 2))
    assert torch.equal(kernel(q, k, v), attention.sdpa(q, k, v))


def test_a_wrong_package_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = lambda q, k, v, causal=False: not_causal(q, k, v)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "_why_not_flash", lambda device, dtype: None)
    kernel, line = attention.choose("auto", CPU, torch.bfloat16)
    assert kernel is attention.sdpa
    assert "differs from sdpa" in line


def not_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def no_value_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.sdpa(q, k, v.detach()) + 0 * v.sum()


def raising(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        (not_causal, "output differs"),
        (no_value_gradient, "dv differs"),
        (lambda q, k, v: attention.sdpa(q, k, v) * float("nan"), "output differs"),
        (raising, "no kernel image"),
    ],
)
def test_the_trial_sees_a_wrong_kernel(kernel: attention.Attention, word: str) -> None:
    assert word in (attention.disagreement(kernel, CPU, torch.bfloat16) or "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trial_passes_a_right_kernel_of_other_arithmetic(dtype: torch.dtype) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, float("-inf")).softmax(-1), v)

    assert attention.disagreement(plain, CPU, dtype) is None
