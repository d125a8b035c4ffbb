"""The chunked loss against torch's cross-entropy on full logits: value, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from x1_pretrain.model.loss import compiled_chunk_terms, summed_loss, token_losses

TOKENS, WIDTH, VOCAB, PADDED = 37, 12, 29, 32
CHUNKS = [1, 5, 16, 36, 37, 1000]


def case(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    weight = (weight.float() if dtype == torch.bfloat16 else weight.to(dtype)).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[::4] = -1
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, from all logits at once."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy((h @ w.T)[:, :VOCAB], targets, ignore_index=-1, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def reference_with_z(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy alone, and the gradients of its sum with the z-loss, in float64 by autograd."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (h @ w.T)[:, :VOCAB]
    counted = targets != -1
    entropy = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    extra = z_loss * logits.logsumexp(-1)[counted].square().sum()
    return entropy.detach(), *torch.autograd.grad(entropy + extra, (h, w))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_and_gradients_are_those_of_full_logits(chunk: int) -> None:
    hidden, weight, targets = case(torch.float32)
    loss = summed_loss(hidden, weight, targets, VOCAB, chunk)
    loss.backward()
    expected, by_hidden, by_weight = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert relative(loss, expected) < 1e-6
    assert relative(hidden.grad, by_hidden) < 1e-6
    assert relative(weight.grad, by_weight) < 1e-6


@pytest.mark.parametrize("chunk", [7, 64])
def test_gradients_are_the_finite_differences(chunk: int) -> None:
    hidden, weight, targets = case(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: summed_loss(h, w, targets, VOCAB, chunk), (hidden, weight))


@pytest.mark.parametrize("chunk", [5, 1000])
def test_bf16_activations_with_fp32_weights(chunk: int) -> None:
    hidden, weight, targets = case(torch.bfloat16)
    loss = summed_loss(hidden, weight, targets, VOCAB, chunk)
    loss.backward()
    expected, by_hidden, by_weight = reference(hidden, weight, targets)
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    assert relative(loss, expected) < 5e-3
    assert relative(hidden.grad, by_hidden) < 1e-2
    assert relative(weight.grad, by_weight) < 1e-2


def test_the_scale_of_a_bf16_gradient_is_not_rounded() -> None:
    # 1/3 in bf16 is 0.2 % too large; every token's gradient would be, in the same direction.
    hidden, weight, targets = case(torch.bfloat16)
    plain = torch.autograd.grad(summed_loss(hidden, weight, targets, VOCAB, 8), hidden)[0].double()
    third = torch.autograd.grad(summed_loss(hidden, weight, targets, VOCAB, 8) / 3, hidden)[0].double()
    assert ((third * plain).sum() / (plain * plain).sum()).item() == pytest.approx(1 / 3, rel=5e-4)


def test_padded_columns_do_not_exist() -> None:
    hidden, weight, targets = case(torch.float32)
    clean = summed_loss(hidden, weight, targets, VOCAB, 8)
    clean_gradients = torch.autograd.grad(clean, (hidden, weight))
    with torch.no_grad():
        weight[VOCAB:] = 1e4
    loss = summed_loss(hidden, weight, targets, VOCAB, 8)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert torch.equal(loss, clean)
    assert torch.equal(gradients[0], clean_gradients[0])
    assert torch.equal(gradients[1], clean_gradients[1])
    assert torch.count_nonzero(gradients[1][VOCAB:]) == 0


def test_nothing_counted_is_zero_and_moves_nothing() -> None:
    hidden, weight, targets = case(torch.float32)
    loss = summed_loss(hidden, weight, torch.full_like(targets, -1), VOCAB, 8)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(hidden.grad) == 0
    assert torch.count_nonzero(weight.grad) == 0


def test_the_same_twice_to_the_bit() -> None:
    results = []
    for _ in range(2):
        hidden, weight, targets = case(torch.bfloat16)
        loss = summed_loss(hidden, weight, targets, VOCAB, 8)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_frozen_output_matrix_still_passes_gradients_down() -> None:
    hidden, weight, targets = case(torch.float32)
    summed_loss(hidden, weight.detach(), targets, VOCAB, 8).backward()
    assert relative(hidden.grad, reference(hidden, weight, targets)[1]) < 1e-6


@pytest.mark.parametrize("z_loss", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_z_loss_is_in_the_gradient_and_not_in_the_value(chunk: int, z_loss: float) -> None:
    hidden, weight, targets = case(torch.float64)
    loss = summed_loss(hidden, weight, targets, VOCAB, chunk, z_loss=z_loss)
    loss.backward()
    entropy, by_hidden, by_weight = reference_with_z(hidden, weight, targets, z_loss)
    assert relative(loss, entropy) < 1e-12
    assert relative(hidden.grad, by_hidden) < 1e-12
    assert relative(weight.grad, by_weight) < 1e-12
    assert torch.count_nonzero(hidden.grad[targets == -1]) == 0
    assert torch.count_nonzero(weight.grad[VOCAB:]) == 0


def test_z_loss_in_bf16() -> None:
    hidden, weight, targets = case(torch.bfloat16)
    loss = summed_loss(hidden, weight, targets, VOCAB, 8, z_loss=0.1)
    loss.backward()
    entropy, by_hidden, by_weight = reference_with_z(hidden, weight, targets, 0.1)
    assert relative(loss, entropy) < 5e-3
    assert relative(hidden.grad, by_hidden) < 1e-2
    assert relative(weight.grad, by_weight) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_z_loss_is_the_loss_without_it_to_the_bit(dtype: torch.dtype) -> None:
    hidden, weight, targets = case(dtype)
    results = []
    for loss in (
        summed_loss(hidden, weight, targets, VOCAB, 8),
        summed_loss(hidden, weight, targets, VOCAB, 8, z_loss=0.0),
    ):
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_z_loss_changes_no_value_and_is_no_part_of_evaluation() -> None:
    hidden, weight, targets = case(torch.float32)
    plain = summed_loss(hidden, weight, targets, VOCAB, 8)
    assert torch.equal(summed_loss(hidden, weight, targets, VOCAB, 8, z_loss=0.1), plain)
    with torch.no_grad():
        evaluated = summed_loss(hidden, weight, targets, VOCAB, 8, z_loss=0.1)
        assert torch.equal(evaluated, token_losses(hidden, weight, targets, VOCAB, 8).sum())


def test_z_loss_brings_the_sum_of_softmax_to_one() -> None:
    """Descent on it alone: where every logit is equally wrong the cross-entropy has nothing to say."""
    weight = torch.ones(PADDED, WIDTH, dtype=torch.float64)  # all logits alike
    hidden = torch.full((VOCAB, WIDTH), 0.5, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(VOCAB)  # each token once: the cross-entropy's gradient cancels in the sum
    for _ in range(200):
        (by_hidden,) = torch.autograd.grad(
            summed_loss(hidden, weight, targets, VOCAB, 64, z_loss=0.01), hidden
        )
        hidden = (hidden - by_hidden.mean(0)).detach().requires_grad_()
    z = (hidden @ weight.T)[:, :VOCAB].logsumexp(-1)
    torch.testing.assert_close(z, torch.zeros_like(z), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_by_token(chunk: int) -> None:
    hidden, weight, targets = case(torch.float32)
    losses = token_losses(hidden, weight, targets, VOCAB, chunk)
    expected = F.cross_entropy((hidden @ weight.T)[:, :VOCAB], targets, ignore_index=-1, reduction="none")
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(summed_loss(hidden, weight, targets, VOCAB, chunk), losses.sum())


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor that comes out of it."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_never_holds_more_logits_than_a_chunk() -> None:
    tokens, width, padded, chunk = 512, 4, 256, 32
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(padded, width, requires_grad=True)
    targets = torch.randint(0, 250, (tokens,))
    with LargestTensor() as watched:
        summed_loss(hidden, weight, targets, 250, chunk).backward()
        token_losses(hidden, weight, targets, 250, chunk)
    assert watched.numel == chunk * padded


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_compiled_gives_the_same(z_loss: float) -> None:
    hidden, weight, targets = case(torch.float32)
    loss = summed_loss(hidden, weight, targets, VOCAB, 16, compiled_chunk_terms(), z_loss)
    loss.backward()
    expected, by_hidden, by_weight = reference_with_z(hidden, weight, targets, z_loss)
    assert relative(loss, expected) < 1e-6
    assert relative(hidden.grad, by_hidden) < 1e-6
    assert relative(weight.grad, by_weight) < 1e-6
