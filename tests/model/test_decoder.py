"""The decoder's own promises: its start, its padding, its causality, its compiled form, its continuations.

That it computes what Hugging Face's classes compute is shown in test_huggingface.py.
"""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from x1_pretrain.config import ModelConfig
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import summed_loss

VOCAB = 61


def small(**changes: object) -> ModelConfig:
    base = {
        "layers": 2,
        "d_model": 32,
        "heads": 4,
        "kv_heads": 2,
        "d_ff": 80,
        "context": 24,
        "vocab_size": VOCAB,
    }
    return ModelConfig(**{**base, "init_std": 0.3, **changes})


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
def test_padding_changes_neither_weights_nor_logits_and_stays_zero(tied: bool) -> None:
    bare = Decoder(small(tied_embeddings=tied, vocab_multiple=1), seed=3)
    padded = Decoder(small(tied_embeddings=tied, vocab_multiple=128), seed=3)
    assert padded.model.embed_tokens.weight.shape == (128, 32)
    for name, weight in padded.named_parameters():
        rows = padded.disk_rows(name, weight)
        assert torch.equal(weight[:rows], bare.get_parameter(name))
        assert torch.count_nonzero(weight[rows:]) == 0
    assert padded(ids(2, 24)).shape == (2, 24, VOCAB)
    torch.testing.assert_close(padded(ids(2, 24)), bare(ids(2, 24)), rtol=0, atol=1e-5)


def test_padding_gets_no_gradient() -> None:
    decoder = Decoder(small())
    tokens = ids(2, 25)
    hidden = decoder.hidden(tokens[:, :-1]).flatten(0, 1)
    summed_loss(hidden, decoder.output_weight, tokens[:, 1:].flatten(), VOCAB, 16).backward()
    gradient = decoder.model.embed_tokens.weight.grad
    assert torch.count_nonzero(gradient[VOCAB:]) == 0
    assert torch.count_nonzero(gradient[:VOCAB]) > 0


def test_a_seed_is_a_start_and_touches_no_other_randomness() -> None:
    before = torch.get_rng_state()
    first, again, other = (Decoder(small(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.output_weight, other.output_weight)


def test_the_scale_of_the_start() -> None:
    decoder = Decoder(small(layers=8, d_model=128, d_ff=256, init_std=0.02, vocab_size=1000))
    for name, weight in decoder.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        writes_to_residual = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(16) if writes_to_residual else 0.02
        real = weight[: decoder.disk_rows(name, weight)]
        assert real.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(real.mean().item()) < 0.1 * expected, name


def test_an_untrained_model_knows_nothing() -> None:
    decoder = Decoder(small(init_std=0.02))
    tokens = ids(8, 25)
    loss = torch.nn.functional.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_a_later_one(dtype: torch.dtype) -> None:
    decoder = Decoder(small(), compute_dtype=dtype)
    tokens = ids(1, 24)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCAB
    a, b = decoder(tokens), decoder(changed)
    assert torch.equal(a[:, :10], b[:, :10])
    assert (a[:, 10:] != b[:, 10:]).any(dim=-1).all()


def test_weights_are_fp32_and_activations_bf16_and_both_agree() -> None:
    plain, half = Decoder(small()), Decoder(small(), compute_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert half.hidden(ids(2, 24)).dtype == torch.bfloat16
    p, q = plain(ids(2, 24)).log_softmax(-1), half(ids(2, 24)).float().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 2e-3


def test_a_sequence_beyond_the_context_is_not_taken() -> None:
    with pytest.raises(ValueError, match="25 tokens is longer than the context of 24"):
        Decoder(small())(ids(1, 25))


def test_compiled_layers_compute_the_same_under_the_same_names() -> None:
    def run(decoder: Decoder) -> tuple[torch.Tensor, ...]:
        hidden = decoder.hidden(ids(2, 24))
        return hidden.detach(), *torch.autograd.grad(hidden.square().sum(), list(decoder.parameters()))

    plain, compiled = Decoder(small(layers=3)), Decoder(small(layers=3))
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    compiled.compile_blocks("default")
    counters.clear()
    found, expected = run(compiled), run(plain)
    assert counters["stats"]["unique_graphs"] == 1  # one program for all layers
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    compiled.generate(ids(1, 3), 4)
    assert counters["stats"]["unique_graphs"] == 1  # new lengths were run eagerly


def test_greedy_takes_the_likeliest_and_crops_to_the_context() -> None:
    decoder = Decoder(small())
    tokens = ids(1, 20)
    out = decoder.generate(tokens, 12)
    for _ in range(12):
        likeliest = decoder(tokens[:, -24:])[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, likeliest), dim=1)
    assert torch.equal(out, tokens)


def test_it_stops_after_the_stop_token() -> None:
    decoder = Decoder(small())
    free = decoder.generate(ids(1, 5), 12)
    stop = int(free[0, 8])
    first = next(i for i in range(5, 17) if int(free[0, i]) == stop)
    assert torch.equal(decoder.generate(ids(1, 5), 12, stop_id=stop), free[:, : first + 1])


def test_samples_follow_the_tempered_distribution() -> None:
    decoder = Decoder(small(vocab_size=7, init_std=0.2))
    prompt = torch.tensor([[1, 2, 3]])
    generator = torch.Generator().manual_seed(0)
    draws = [int(decoder.generate(prompt, 1, 0.7, generator)[0, -1]) for _ in range(1000)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=7) / 1000
    expected = (decoder(prompt)[0, -1] / 0.7).softmax(-1)
    assert expected.max() > 0.2  # far from uniform, or the test would see nothing
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.055)  # 3.5 standard deviations


def test_a_generator_repeats_its_sample() -> None:
    decoder = Decoder(small())
    a, b = (decoder.generate(ids(1, 5), 10, 1.0, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, decoder.generate(ids(1, 5), 10, 1.0, torch.Generator().manual_seed(5)))
