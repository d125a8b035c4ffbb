"""The folder as Transformers reads it: the same logits, the same continuation; misfits refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from x1_pretrain.config import ModelConfig
from x1_pretrain.errors import RefusedError
from x1_pretrain.model import huggingface
from x1_pretrain.model.decoder import Decoder

transformers = pytest.importorskip("transformers", reason="the equality is with the real Transformers")

VOCAB, EOT = 301, 300
VARIANTS = list(itertools.product([True, False], [4, 2, 1], [False, True]))  # tied, kv_heads, qk_norm


def trained(tied: bool, kv_heads: int, qk_norm: bool, **changes: object) -> Decoder:
    """A decoder whose norms too are far from their start and whose settings are no one's defaults."""
    config = {"layers": 3, "d_model": 64, "heads": 4, "d_ff": 160, "context": 96, "vocab_size": VOCAB}
    config |= {"rope_theta": 5000.0, "norm_eps": 3e-4, "init_std": 0.1, **changes}
    decoder = Decoder(ModelConfig(**config, tied_embeddings=tied, kv_heads=kv_heads, qk_norm=qk_norm), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, weight in decoder.named_parameters():
        if "norm" in name:
            weight.detach().copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return decoder


def write(decoder: Decoder, folder: Path) -> Path:
    save_file(huggingface.disk_state(decoder), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface.config_json(decoder.config, EOT)))
    (folder / "generation_config.json").write_text(json.dumps(huggingface.generation_config(EOT)))
    return folder


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def read(folder: Path, **options: object):  # type: ignore[no-untyped-def]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    return model.eval()


@pytest.mark.parametrize(("tied", "kv_heads", "qk_norm"), VARIANTS)
def test_logits_are_those_of_transformers(tied: bool, kv_heads: int, qk_norm: bool, tmp_path: Path) -> None:
    decoder = trained(tied, kv_heads, qk_norm)
    theirs = read(write(decoder, tmp_path))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    with torch.no_grad():
        ours, expected = decoder(tokens(2, 96)), theirs(tokens(2, 96)).logits
    assert ours.shape == expected.shape == (2, 96, VOCAB)
    assert expected[:, 1:].std() > 0.1  # not nearly uniform, where everything would agree
    assert (ours - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_is_that_of_transformers(qk_norm: bool, tmp_path: Path) -> None:
    decoder = trained(True, 2, qk_norm)
    theirs = read(write(decoder, tmp_path), dtype=torch.bfloat16)
    half = Decoder(decoder.config, compute_dtype=torch.bfloat16)
    huggingface.load_disk_state(half, huggingface.disk_state(decoder))
    with torch.no_grad():
        q, p = (
            half(tokens(2, 96)).float().log_softmax(-1),
            theirs(tokens(2, 96)).logits.float().log_softmax(-1),
        )
    assert (p.exp() * (p - q)).sum(-1).mean() <= 1e-4


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_head_size_of_its_own(qk_norm: bool, tmp_path: Path) -> None:
    decoder = trained(True, 2, qk_norm, head_dim=24)
    theirs = read(write(decoder, tmp_path))
    with torch.no_grad():
        assert (decoder(tokens(1, 96)) - theirs(tokens(1, 96)).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(("tied", "kv_heads", "qk_norm"), [(True, 2, False), (False, 4, True)])
def test_greedy_continuations_are_alike(tied: bool, kv_heads: int, qk_norm: bool, tmp_path: Path) -> None:
    decoder = trained(tied, kv_heads, qk_norm)
    theirs = read(write(decoder, tmp_path)).generate(tokens(1, 7), do_sample=False, max_new_tokens=40)
    assert torch.equal(decoder.generate(tokens(1, 7), 40, stop_id=EOT), theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_disk_is_unpadded_fp32_and_reads_back_under_any_padding(tied: bool, tmp_path: Path) -> None:
    decoder = trained(tied, 2, False)
    state = load_file(write(decoder, tmp_path) / "model.safetensors")
    assert ("lm_head.weight" in state) is not tied
    assert state["model.embed_tokens.weight"].shape == (VOCAB, 64)
    assert {t.dtype for t in state.values()} == {torch.float32}
    for multiple in (1, 64, 500):
        other = Decoder(decoder.config.model_copy(update={"vocab_multiple": multiple}), seed=9)
        with torch.no_grad():
            other.output_weight.fill_(7.0)  # the padding must be cleared too
        huggingface.load_disk_state(other, state)
        assert all(torch.equal(t, state[n]) for n, t in huggingface.disk_state(other).items())
        assert torch.count_nonzero(other.output_weight[VOCAB:]) == 0


def test_a_state_is_a_copy() -> None:
    decoder = trained(True, 2, False)
    state = huggingface.disk_state(decoder)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for weight in decoder.parameters():
            weight += 1.0
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_misfits_are_refused_by_name() -> None:
    decoder = trained(True, 2, False)
    state = huggingface.disk_state(decoder)
    before = huggingface.disk_state(decoder)
    name = "model.layers.1.self_attn.k_proj.weight"

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        with pytest.raises(RefusedError) as caught:
            huggingface.load_disk_state(decoder, tensors)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"{name} is missing" in refusal({n: t for n, t in state.items() if n != name})
    assert f"{name} has shape [64, 64], expected [32, 64]" in refusal({**state, name: torch.ones(64, 64)})
    assert "lm_head.weight is not part" in refusal({**state, "lm_head.weight": torch.ones(VOCAB, 64)})
    padded = {**state, "model.embed_tokens.weight": torch.ones(384, 64)}
    assert "model.embed_tokens.weight has shape [384, 64], expected [301, 64]" in refusal(padded)
    assert all(torch.equal(t, before[n]) for n, t in huggingface.disk_state(decoder).items())


def test_ids_only_and_no_row_that_never_learns(tmp_path: Path) -> None:
    theirs = read(write(trained(True, 2, False), tmp_path))
    assert theirs.get_input_embeddings().padding_idx is None
    assert set(huggingface.generation_config(EOT)) == {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert theirs.generation_config.eos_token_id == EOT
    assert not theirs.generation_config.do_sample


def test_the_tokenizer_opens_and_adds_nothing(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["one two three, one two"], trainer)
    write(trained(True, 2, False), tmp_path)
    bpe.save(str(tmp_path / "tokenizer.json"))
    settings = huggingface.tokenizer_config(trained(True, 2, False).config, "<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = " one ,two  <|endoftext|>three"
    assert opened(text)["input_ids"] == bpe.encode(text).ids
    assert opened.decode(opened(text)["input_ids"]) == text
    assert opened.eos_token == "<|endoftext|>"
    assert opened.model_max_length == 96
