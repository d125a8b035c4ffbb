"""AdamW against its formula; its state: whole, by name, unpadded, and going on as if never interrupted."""

import math

import pytest
import torch
from safetensors.torch import load, save

from x1_pretrain.config import ModelConfig, OptimizerConfig
from x1_pretrain.errors import RefusedError
from x1_pretrain.learning import optimizers
from x1_pretrain.model import huggingface
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import summed_loss

CPU = torch.device("cpu")
VOCAB = 61
SETTINGS = OptimizerConfig(
    lr=1e-2, min_lr=0.0, warmup_steps=0, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6
)


def model(multiple: int = 128, tied: bool = True) -> Decoder:
    config = ModelConfig(
        layers=2,
        d_model=32,
        heads=4,
        kv_heads=2,
        d_ff=80,
        context=16,
        vocab_size=VOCAB,
        vocab_multiple=multiple,
        tied_embeddings=tied,
        qk_norm=True,
    )
    return Decoder(config, seed=5)


def train(decoder: Decoder, optimizer: torch.optim.AdamW, steps: range) -> list[float]:
    """Some updates, each on its own data; the losses."""
    losses = []
    for step in steps:
        tokens = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        hidden = decoder.hidden(tokens[:, :-1]).flatten(0, 1)
        loss = summed_loss(hidden, decoder.output_weight, tokens[:, 1:].flatten(), VOCAB, 32) / 64
        loss.backward()
        optimizers.set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_updates_follow_the_formula_and_norms_do_not_decay() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, CPU)
    expected = {n: p.detach().double().clone() for n, p in decoder.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in expected.items()}
    second = {n: torch.zeros_like(p) for n, p in expected.items()}
    for step in range(1, 4):
        for index, (name, weight) in enumerate(decoder.named_parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            weight.grad = torch.randn(weight.shape, generator=generator)
            g = weight.grad.double()
            decay = 0.0 if "norm" in name else 0.1
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            mean, spread = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            expected[name] = expected[name] * (1 - 1e-2 * decay) - 1e-2 * mean / (spread.sqrt() + 1e-6)
        optimizer.step()
    for name, weight in decoder.named_parameters():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_rate_set_is_the_rate_of_the_next_update_in_every_group() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS.model_copy(update={"weight_decay": 0.0}), CPU)
    optimizers.set_learning_rate(optimizer, 2.5e-3)
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    for weight in decoder.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for name, weight in decoder.named_parameters():  # the first step of Adam is the rate times the sign
        torch.testing.assert_close(before[name] - weight, torch.full_like(weight, 2.5e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multiple", [128, 1])
def test_continued_from_disk_equals_uninterrupted_to_the_bit(tied: bool, multiple: int) -> None:
    whole = model(multiple, tied)
    losses = train(whole, whole_optimizer := optimizers.build(whole, SETTINGS, CPU), range(4))

    part = model(multiple, tied)
    optimizer = optimizers.build(part, SETTINGS, CPU)
    assert train(part, optimizer, range(4)) == losses
    state = load(save(optimizers.state_tensors(optimizer, part)))
    weights = load(save(huggingface.disk_state(part)))

    resumed = model(multiple, tied)
    torch.nn.init.ones_(resumed.output_weight)
    huggingface.load_disk_state(resumed, weights)
    fresh = optimizers.build(resumed, SETTINGS, CPU)
    optimizers.load_state_tensors(fresh, resumed, state)
    assert train(resumed, fresh, range(4, 9)) == train(whole, whole_optimizer, range(4, 9))
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_padding_reads_the_same_state() -> None:
    decoder = model(multiple=128)
    optimizer = optimizers.build(decoder, SETTINGS, CPU)
    train(decoder, optimizer, range(3))
    state = optimizers.state_tensors(optimizer, decoder)
    assert state["exp_avg.model.embed_tokens.weight"].shape == (VOCAB, 32)
    other = model(multiple=1)
    huggingface.load_disk_state(other, huggingface.disk_state(decoder))
    fresh = optimizers.build(other, SETTINGS, CPU)
    optimizers.load_state_tensors(fresh, other, state)
    again = optimizers.state_tensors(fresh, other)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert train(other, fresh, range(3, 6)) == pytest.approx(train(decoder, optimizer, range(3, 6)), abs=1e-5)


def test_the_state_has_all_names_before_the_first_update_and_after() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, CPU)
    names = [n for n, _ in decoder.named_parameters()]
    expected = {"step", *(f"{m}.{n}" for n in names for m in ("exp_avg", "exp_avg_sq"))}
    start = optimizers.state_tensors(optimizer, decoder)
    assert start.keys() == expected
    assert all(torch.count_nonzero(t) == 0 for t in start.values())
    train(decoder, optimizer, range(3))
    state = optimizers.state_tensors(optimizer, decoder)
    assert state.keys() == expected
    assert state["step"] == 3
    assert all(torch.count_nonzero(t) > 0 for t in state.values())


def test_a_state_of_zero_updates_starts_like_a_fresh_optimizer() -> None:
    one, two = model(), model()
    fresh, loaded = (optimizers.build(m, SETTINGS, CPU) for m in (one, two))
    optimizers.load_state_tensors(loaded, two, optimizers.state_tensors(fresh, one))
    assert train(one, fresh, range(3)) == train(two, loaded, range(3))


def test_a_state_is_a_copy() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, CPU)
    train(decoder, optimizer, range(2))
    state = optimizers.state_tensors(optimizer, decoder)
    before = {name: tensor.clone() for name, tensor in state.items()}
    train(decoder, optimizer, range(2, 4))
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_misfits_are_refused_by_name() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, CPU)
    state = optimizers.state_tensors(optimizer, decoder)
    name = "exp_avg_sq.model.layers.1.mlp.up_proj.weight"

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        with pytest.raises(RefusedError) as caught:
            optimizers.load_state_tensors(optimizer, decoder, tensors)
        return str(caught.value)

    without = {n: t for n, t in state.items() if n != name}
    assert refusal(without).startswith(f"optimizer.safetensors: tensor {name} is missing")
    assert f"{name} has shape [1, 32], expected [80, 32]" in refusal({**state, name: torch.ones(1, 32)})
    assert "extra is not part" in refusal({**state, "extra": torch.ones(1)})
    assert "step is missing" in refusal({n: t for n, t in state.items() if n != "step"})
    assert not optimizer.state  # nothing was half loaded


def test_the_norm_is_that_of_one_long_vector() -> None:
    decoder = model()
    for index, weight in enumerate(decoder.parameters()):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
    gradients = [p.grad for p in decoder.parameters()]
    squares = math.fsum(float(x) ** 2 for g in gradients for x in g.flatten().tolist())
    assert optimizers.global_norm(gradients).item() == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize(("size", "expected"), [(10.0, 1.0), (0.5, 0.5)])
def test_clipping_only_shortens(size: float, expected: float) -> None:
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    for weight in weights:
        weight.grad = torch.full_like(weight, size / math.sqrt(7))
    direction = weights[0].grad.clone()
    optimizers.clip_(weights, 1.0, optimizers.global_norm([w.grad for w in weights]))
    after = optimizers.global_norm([w.grad for w in weights])
    assert after.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights[0].grad, direction * expected / size, rtol=1e-5, atol=0)
