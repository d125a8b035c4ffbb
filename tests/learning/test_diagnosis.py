"""Each cause of a number that is not finite is named by the look that can see it, and nothing is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from x1_pretrain.config import ModelConfig, OptimizerConfig
from x1_pretrain.learning import optimizers
from x1_pretrain.learning.diagnosis import diagnose
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import chunk_terms, summed_loss

VOCAB, CONTEXT = 50, 16


def made(dtype: torch.dtype = torch.float32, **model: Any) -> tuple[Decoder, torch.optim.AdamW]:
    sizes = {"layers": 3, "d_model": 16, "heads": 2, "kv_heads": 1, "d_ff": 32}
    config = ModelConfig(**{**sizes, "context": CONTEXT, "vocab_size": VOCAB, **model})
    decoder = Decoder(config, compute_dtype=dtype, seed=3)
    optimizer = optimizers.build(decoder, OptimizerConfig(lr=1e-3), torch.device("cpu"))
    ids, targets = batch()
    hidden = decoder.hidden(ids).flatten(0, 1)
    torch.autograd.backward(
        summed_loss(hidden, decoder.output_weight, targets.flatten(), VOCAB, 64, chunk_terms)
        / targets.numel()
    )
    optimizer.step()  # so that there are moments, and gradients lie in `.grad`
    return decoder, optimizer


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def test_a_healthy_batch_is_called_healthy() -> None:
    decoder, optimizer = made()
    ids, targets = batch()
    found = diagnose(decoder, optimizer, ids, targets, "fp32")
    assert not found.failed
    logits = decoder(ids[:2])[..., :VOCAB]  # by another way than the chunked loss
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:2].flatten())
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.largest_logit == pytest.approx(logits.abs().max().item(), rel=1e-5)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(decoder.parameters()))]).norm()
    assert found.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    assert "finite when computed again" in found.lines()[-1]


def test_a_weight_is_named_with_its_count_and_the_first_layer_it_poisons() -> None:
    decoder, optimizer = made()
    with torch.no_grad():
        decoder.get_parameter("model.layers.1.mlp.up_proj.weight")[2, :3] = float("nan")
    found = diagnose(decoder, optimizer, *batch(), "fp32")
    assert [(b.name, b.count, b.of) for b in found.weights] == [("model.layers.1.mlp.up_proj.weight", 3, 512)]
    assert found.first_bad is not None
    assert found.first_bad.name == "model.layers.1.mlp.up_proj"
    names = [seen.name for seen in found.forward]
    assert "model.layers.0" in names
    assert not any(name.startswith("model.layers.2") for name in names)
    assert "relaunch to resume" in found.lines()[-1]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_moment_is_named(value: float) -> None:
    decoder, optimizer = made()
    weight = decoder.get_parameter("model.norm.weight")
    optimizer.state[weight]["exp_avg_sq"][0] = value
    found = diagnose(decoder, optimizer, *batch(), "fp32")
    assert [b.name for b in found.moments] == ["exp_avg_sq of model.norm.weight"]
    assert not found.weights


def test_one_bad_sequence_among_good_ones_is_found() -> None:
    decoder, optimizer = made(tied_embeddings=False)  # else the row is in every logit, too
    ids, targets = batch()
    ids, targets = ids % 40, targets % 40
    ids[3, 4] = 45
    with torch.no_grad():
        decoder.model.embed_tokens.weight[45] = float("inf")
    found = diagnose(decoder, optimizer, ids, targets, "fp32")
    assert found.sequence == 3
    assert any("sequence 3 of the batch" in line for line in found.lines())


@pytest.mark.parametrize("token", [VOCAB, 60_000, -1])
def test_a_token_beyond_the_vocabulary_is_named_and_never_run(token: int) -> None:
    decoder, optimizer = made()
    ids, targets = batch()
    ids, targets = ids.clone(), targets.clone()
    ids[2, 7] = token
    targets[2, 6] = token if token > 0 else 0
    found = diagnose(decoder, optimizer, ids, targets, "fp32")
    assert found.bad_ids == [(2, 7, token)]  # once, though it is a target, too
    assert not found.forward
    assert not found.failed
    assert found.lines()[0] == f"token id {token} at position 7 of sequence 2 is not in the vocabulary"
    assert "tokenize" in found.lines()[-1]


def test_an_ignored_target_is_no_bad_token() -> None:
    decoder, optimizer = made()
    ids, targets = batch()
    targets = targets.clone()
    targets[0, :5] = -1
    found = diagnose(decoder, optimizer, ids, targets, "fp32")
    assert not found.bad_ids
    assert not found.failed


def test_an_overflow_of_bf16_alone_is_told_from_divergence() -> None:
    decoder, optimizer = made(torch.bfloat16)

    class Overflow(torch.nn.Module):  # finite in fp32, not where activations are bf16
        def forward(self, x: Tensor) -> Tensor:
            return x if x.dtype == torch.float32 else x * float("inf")

    decoder.model.layers[1].mlp = Overflow()
    found = diagnose(decoder, optimizer, *batch(), "bf16")
    assert not found.failed
    assert found.first_bad is not None
    assert found.first_bad.name == "model.layers.1.mlp"
    assert found.fp32_loss is not None
    assert torch.isfinite(torch.tensor(found.fp32_loss))
    assert "training.precision=fp32" in found.lines()[-1]
    assert decoder.model.compute_dtype == torch.bfloat16


def test_divergence_is_named_when_fp32_overflows_too() -> None:
    decoder, optimizer = made(torch.bfloat16)
    with torch.no_grad():
        decoder.model.layers[0].mlp.down_proj.weight.fill_(3e38)
        decoder.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    found = diagnose(decoder, optimizer, *batch(), "bf16")
    assert found.first_bad is not None
    assert found.first_bad.name.startswith("model.layers.0.mlp")
    assert "optimizer.lr" in found.lines()[-1]


def test_a_gradient_that_is_the_first_is_named_from_the_output_back() -> None:
    decoder, optimizer = made()

    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float("inf")

    original = decoder.model.layers[1].self_attn.o_proj.forward
    decoder.model.layers[1].self_attn.o_proj.forward = lambda x: Cliff.apply(original(x))
    found = diagnose(decoder, optimizer, *batch(), "fp32")
    assert found.first_bad is None
    assert found.gradient is not None
    assert found.gradient.name == "gradient of model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize("damage", ["none", "weight"])
def test_nothing_is_changed(damage: str) -> None:
    decoder, optimizer = made(torch.bfloat16)
    if damage == "weight":
        with torch.no_grad():
            decoder.model.embed_tokens.weight[0, 0] = float("nan")

    def everything() -> list[Tensor]:
        grads = [p.grad for p in decoder.parameters()]
        moments = [t for s in optimizer.state.values() for t in s.values()]
        return [t.detach().clone() for t in (*decoder.parameters(), *grads, *moments) if t is not None]

    before, random = everything(), torch.get_rng_state()
    kernels = [layer.self_attn.attention for layer in decoder.model.layers]
    with torch.no_grad():  # also the caller's mode stays
        diagnose(decoder, optimizer, *batch(), "bf16")
        assert not torch.is_grad_enabled()
    for a, b in zip(before, everything(), strict=True):
        assert torch.equal(a.view(-1), b.view(-1)) or (a.isnan() == b.isnan()).all()
    assert torch.equal(random, torch.get_rng_state())
    assert kernels == [layer.self_attn.attention for layer in decoder.model.layers]
    assert not any(m._forward_hooks for m in decoder.modules())


def test_it_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, optimizer = made()
    short = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def fail(*_: Any) -> None:
        raise short

    monkeypatch.setattr(Decoder, "hidden", fail)
    found = diagnose(decoder, optimizer, *batch(), "fp32")
    assert found.failed
    assert any("out of memory. Tried" in line for line in found.lines())
    assert all("\n" not in line for line in found.lines())
    assert diagnose(
        decoder, optimizer, torch.zeros(0, 8, dtype=torch.int64), torch.zeros(0, 8), "fp32"
    ).lines()


def test_compiled_blocks_are_looked_into() -> None:
    decoder, optimizer = made()
    for layer in decoder.model.layers:
        layer.compile(backend="eager", dynamic=False)
    decoder.hidden(batch()[0])
    with torch.no_grad():
        decoder.get_parameter("model.layers.2.self_attn.v_proj.weight")[0, 0] = float("nan")
    found = diagnose(decoder, optimizer, *batch(), "fp32")
    assert found.first_bad is not None
    assert found.first_bad.name == "model.layers.2.self_attn.v_proj"


def test_the_cheap_look_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, optimizer = made()
    monkeypatch.setattr(Decoder, "hidden", lambda *_: pytest.fail("it ran the batch"))
    found = diagnose(decoder, optimizer, *batch(), "bf16", deep=False)
    assert not found.failed
    assert "weights, moments and token ids are good" in found.next_step
    with torch.no_grad():
        decoder.get_parameter("model.norm.weight")[0] = float("-inf")
    assert diagnose(decoder, optimizer, *batch(), "bf16", deep=False).weights[0].name == "model.norm.weight"
