"""The arithmetic of memory against what autograd keeps, and against all that lives during a real step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from x1_pretrain.config import ModelConfig, OptimizerConfig
from x1_pretrain.learning import optimizers
from x1_pretrain.model import loss, memory
from x1_pretrain.model.decoder import Decoder

DTYPES = {True: torch.bfloat16, False: torch.float32}
SHAPES: list[dict[str, object]] = [
    {},
    {"kv_heads": 2},
    {"kv_heads": 1, "qk_norm": True},
    {"head_dim": 64, "tied_embeddings": False},
    {"layers": 5, "d_model": 256, "d_ff": 704, "heads": 8, "kv_heads": 2, "context": 64},
]


def small(**changes: object) -> ModelConfig:
    base = {
        "layers": 3,
        "d_model": 128,
        "heads": 4,
        "kv_heads": 4,
        "d_ff": 384,
        "context": 128,
        "vocab_size": 500,
    }
    return ModelConfig(**{**base, **changes})


def decoder_of(model: ModelConfig, bf16: bool) -> Decoder:
    return Decoder(model, compute_dtype=DTYPES[bf16])


def kept(decoder: Decoder, ids: Tensor) -> int:
    """Bytes that the layers' forward pass keeps beside the parameters, each storage once."""
    own = {p.untyped_storage()._cdata for p in decoder.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder.hidden(ids)
    assert hidden.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", SHAPES)
def test_activations_are_what_autograd_keeps(changes: dict[str, object], bf16: bool) -> None:
    """A CPU's attention keeps the same as flash attention: q, k, v, the output, a logarithm per head."""
    model = small(**changes)
    ids = torch.zeros(4, model.context, dtype=torch.long)
    expected = memory.training_memory(model, 4, bf16)
    real = kept(decoder_of(model, bf16), ids)
    # Not counted: the norms' weights in bf16, and the rotary table, which all layers share.
    assert expected.activations + expected.casts == pytest.approx(real, rel=0.01)


class Live(TorchDispatchMode):
    """Bytes of all storages alive, and their peak, by watching every operation's results come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


def peak_of_a_step(model: ModelConfig, sequences: int, bf16: bool) -> int:
    """Of a second step: gradients and moments are there, as they are in all steps but the first."""
    decoder = decoder_of(model, bf16)
    optimizer = optimizers.build(decoder, OptimizerConfig(), torch.device("cpu"))
    ids = torch.randint(model.vocab, (sequences, model.context))

    def step() -> None:
        hidden = decoder.hidden(ids).flatten(0, 1)  # (N, d)
        chunk = loss.chunk_tokens(torch.device("cuda"))
        loss.summed_loss(hidden, decoder.output_weight, ids.flatten(), model.vocab, chunk).backward()

    step()
    optimizer.step()
    live = Live()
    for weight in decoder.parameters():
        assert weight.grad is not None
        for tensor in (weight.data, weight.grad, *optimizer.state[weight].values()):
            live.add(tensor)
    with live:
        step()
    return live.peak


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("changes", "sequences"),
    [
        ({"kv_heads": 2}, 4),
        ({"layers": 6, "qk_norm": True}, 8),
        ({"vocab_size": 8000}, 4),  # the loss decides
        ({"vocab_size": 8000, "tied_embeddings": False}, 1),
        ({"layers": 2, "d_model": 192, "d_ff": 512, "vocab_size": 256}, 48),  # the backward pass decides
    ],
)
def test_the_total_is_the_peak_of_a_real_step(changes: dict[str, object], sequences: int, bf16: bool) -> None:
    model = small(**changes)
    real = peak_of_a_step(model, sequences, bf16)
    assert memory.training_memory(model, sequences, bf16).total == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_loss_takes_the_memory_of_one_chunk_of_logits_and_their_logarithms(dtype: torch.dtype) -> None:
    """8 bytes a logit in either precision, however many chunks: nothing of the one before is kept."""
    tokens, chunk, padded = 4 * 64, 64, 8192
    hidden = torch.randn(tokens, 4).to(dtype).requires_grad_()
    targets = torch.randint(0, padded, (tokens,))
    for run in (
        lambda: loss.summed_loss(hidden, torch.zeros(padded, 4), targets, padded, chunk),
        lambda: loss.token_losses(hidden, torch.zeros(padded, 4), targets, padded, chunk),
    ):
        with Live() as live:
            run()
        assert 8 * chunk * padded < live.peak < 8.5 * chunk * padded


def test_the_chunk_is_the_one_that_a_gpu_takes() -> None:
    assert loss.chunk_tokens(torch.device("cuda")) == memory.LOSS_CHUNK_TOKENS


def the_50m_run() -> ModelConfig:
    return small(layers=8, d_model=768, heads=12, kv_heads=4, d_ff=2048, context=1024, vocab_size=50257)


def test_the_state_of_the_published_run() -> None:
    """16 bytes for each of 88,978,176 parameters, padding and all; 2 for each in a layer's matrix."""
    found = memory.training_memory(the_50m_run(), 1)
    assert found.weights == found.gradients == found.moments / 2 == 4 * (88_942_080 + (50304 - 50257) * 768)
    assert found.casts == 2 * 50_331_648


def test_state_is_spread_over_shards_and_activations_are_not() -> None:
    alone, spread = (memory.training_memory(the_50m_run(), 2, shards=n) for n in (1, 8))
    assert alone.weights + alone.gradients + alone.moments == pytest.approx(
        8 * (spread.weights + spread.gradients + spread.moments)
    )
    assert (spread.activations, spread.loss) == (alone.activations, alone.loss)
    assert spread.casts == alone.casts * 2 / 8  # two of eight layers


@pytest.mark.parametrize("blocks", [1, 6, 64, 500, 512])
@pytest.mark.parametrize("memory_gib", [4.0, 22.0, 79.2])
def test_the_largest_micro_batch_is_that_of_a_search(blocks: int, memory_gib: float) -> None:
    model = the_50m_run()

    def fits(n: int) -> bool:
        return memory.training_memory(model, n).total <= 0.92 * memory_gib * 2**30

    fitting = [n for n in range(1, blocks + 1) if blocks % n == 0 and fits(n)]
    assert memory.largest_micro_batch(model, blocks, memory_gib) == (max(fitting) if fitting else None)


def test_what_does_not_fit_at_all() -> None:
    assert memory.largest_micro_batch(the_50m_run(), 512, 2.0) is None
    assert memory.largest_micro_batch(the_50m_run(), 512, 79.2, bf16=True) == 256
