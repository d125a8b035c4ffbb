"""Counts and FLOPs against published sums, the real parameters, a brute force and torch's own counter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from x1_pretrain.config import ModelConfig
from x1_pretrain.config_reading import load_config
from x1_pretrain.model import flops, gpus
from x1_pretrain.model.decoder import Decoder

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "x1-50m-a100.yaml"
SHAPES = [
    {},
    {"kv_heads": 4},
    {"tied_embeddings": False},
    {"qk_norm": True},
    {"head_dim": 24},
    {"qk_norm": True, "head_dim": 8, "tied_embeddings": False, "kv_heads": 1},
]


def small(**changes: object) -> ModelConfig:
    base = {
        "layers": 3,
        "d_model": 64,
        "heads": 4,
        "kv_heads": 2,
        "d_ff": 176,
        "context": 48,
        "vocab_size": 300,
    }
    return ModelConfig(**{**base, **changes})


def test_the_50m_run_counts_as_published() -> None:
    counts = flops.parameter_counts(load_config(CONFIG).model)
    assert counts == (50_331_648, 13_056, 38_597_376, 88_942_080)


def test_the_50m_run_costs_as_published() -> None:
    cost = flops.flops_per_token(load_config(CONFIG).model)
    assert cost.six_n == pytest.approx(3.020e8, rel=1e-3)
    assert cost.palm == pytest.approx(3.020e8 + 2.316e8 + 7.55e7, rel=1e-3)
    assert cost.palm == pytest.approx(6.09e8, rel=2e-3)
    assert cost.causal == pytest.approx(5.71e8, rel=2e-3)
    assert cost.attention_share == pytest.approx(3.77e7 / 5.71e8, rel=5e-3)


@pytest.mark.parametrize("changes", SHAPES)
def test_counts_are_those_of_the_real_decoder_without_padding(changes: dict[str, object]) -> None:
    config = small(**changes, vocab_multiple=1)
    weights = dict(Decoder(config).named_parameters())
    vocabulary = {n: w.numel() for n, w in weights.items() if "embed" in n or "lm_head" in n}
    norms = {n: w.numel() for n, w in weights.items() if "norm" in n}
    total = sum(w.numel() for w in weights.values())
    matrices = total - sum(vocabulary.values()) - sum(norms.values())
    expected = (matrices, sum(norms.values()), sum(vocabulary.values()), total)
    assert flops.parameter_counts(config) == expected
    assert flops.parameter_counts(small(**changes)) == expected  # padding is not counted


@pytest.mark.parametrize("changes", SHAPES)
def test_palm_is_what_torch_counts_forward_and_backward(changes: dict[str, object]) -> None:
    # On the meta device attention is plain matrix products, counted in full: the PaLM convention exactly.
    config = small(**changes, vocab_size=384)
    with torch.device("meta"):
        decoder = Decoder(config)
        ids = torch.zeros(2, 48, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        decoder(ids).sum().backward()
    assert counter.get_total_flops() / ids.numel() == flops.flops_per_token(config).palm


def test_causal_is_what_a_count_of_pairs_gives() -> None:
    config = small(vocab_size=384)
    pairs = sum(1 for i in range(48) for j in range(48) if j <= i)
    score_and_mix = 2 * 16 + 2 * 16  # multiply-adds of one pair and head of 16, forward
    attention = 3 * score_and_mix * 4 * 3 * pairs / 48  # x heads x layers, per token
    dense = 6 * (flops.parameter_counts(config).matrices + 384 * 64)
    cost = flops.flops_per_token(config)
    assert cost.causal == dense + attention
    assert cost.attention_share == pytest.approx(attention / (dense + attention))


def test_a_shorter_context_costs_less_attention_only() -> None:
    config = small()
    short, full = flops.flops_per_token(config, 12), flops.flops_per_token(config)
    assert short == flops.flops_per_token(small(context=12))
    assert full.palm - short.palm == 12 * 3 * 64 * (48 - 12)
    assert full.causal - short.causal == 6 * 3 * 64 * (48 - 12)
    assert full.six_n == short.six_n


def test_mfu_of_the_published_estimate() -> None:
    # 150 TFLOP/s of an A100's 312 is 48 %; at 6.09e8 FLOP a token that is 246k tokens/s.
    peak = gpus.peak_bf16_flops_per_sec("NVIDIA A100-SXM4-80GB")
    assert peak == 312e12
    assert flops.mfu(246_305, 6.09e8, peak) == pytest.approx(0.4808, abs=1e-4)
    assert flops.mfu(246_305 * 2, 6.09e8, peak, gpus=2) == pytest.approx(0.4808, abs=1e-4)


def test_the_arithmetic_and_the_files_need_no_torch() -> None:
    names = "x1_pretrain.model.flops, x1_pretrain.model.gpus, x1_pretrain.model.memory"
    code = f"import sys, {names}, x1_pretrain.model.huggingface; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
