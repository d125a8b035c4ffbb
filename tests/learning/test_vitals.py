"""Norms, update ratios, moments and the probe, each against a computation of its own; and no trace left."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from x1_pretrain.config import ModelConfig, OptimizerConfig
from x1_pretrain.learning import optimizers, vitals
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import summed_loss

VOCAB, LENGTH, LAYERS = 61, 24, 2
SETTINGS = OptimizerConfig(lr=3e-3, warmup_steps=0, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
KINDS = list(itertools.product((True, False), (True, False)))  # tied, qk_norm


def model(tied: bool = True, qk_norm: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
    config = ModelConfig(
        layers=LAYERS,
        d_model=32,
        heads=4,
        kv_heads=2,
        d_ff=80,
        context=LENGTH,
        vocab_size=VOCAB,
        tied_embeddings=tied,
        qk_norm=qk_norm,
        init_std=0.2,  # so that attention has something to attend to
    )
    return Decoder(config, compute_dtype=dtype, seed=5)


def some_ids(seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def backward(decoder: Decoder, seed: int) -> None:
    ids = some_ids(seed, rows=3)
    hidden = decoder.hidden(ids).flatten(0, 1)
    (summed_loss(hidden, decoder.output_weight, ids.flatten(), VOCAB, 32) / 64).backward()


def update(decoder: Decoder, optimizer: torch.optim.AdamW, seed: int) -> None:
    decoder.zero_grad(set_to_none=True)
    backward(decoder, seed)
    optimizers.set_learning_rate(optimizer, 1e-3 * (1 + seed))
    optimizer.step()


def members(decoder: Decoder, group: str) -> list[str]:
    """Written out by hand, from the names."""
    ends = {
        "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        "mlp": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        "embedding": ("embed_tokens.weight",),
        "norms": ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight"),
        "output": ("lm_head.weight",),
    }
    return [name for name, _ in decoder.named_parameters() if name.endswith(ends[group])]


def length(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())


# ------------------------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize(("tied", "qk_norm"), KINDS)
def test_every_parameter_is_in_the_group_of_its_part(tied: bool, qk_norm: bool) -> None:
    decoder = model(tied, qk_norm)
    for group in vitals.GROUPS:
        assert {vitals.group_of(name) for name in members(decoder, group)} <= {group}
    counts = [len(members(decoder, group)) for group in vitals.GROUPS]
    assert sum(counts) == len(list(decoder.parameters()))
    assert counts[-1] == (0 if tied else 1)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("tied", "qk_norm"), KINDS)
def test_norms_by_group_and_by_layer(tied: bool, qk_norm: bool, gradients: bool) -> None:
    decoder = model(tied, qk_norm)
    backward(decoder, 1)
    tensors = {name: w.grad if gradients else w for name, w in decoder.named_parameters()}
    kind = "grad_norm" if gradients else "param_norm"
    expected = {}
    for group in vitals.GROUPS if not tied else vitals.GROUPS[:-1]:
        expected[f"{kind}/{group}"] = length([tensors[name] for name in members(decoder, group)])
    assert vitals.norms(decoder, gradients, by_layer=False) == pytest.approx(expected, rel=1e-5)
    for layer in range(LAYERS):
        inside = [t for name, t in tensors.items() if name.startswith(f"model.layers.{layer}.")]
        expected[f"{kind}/layer.{layer}"] = length(inside)
    assert vitals.norms(decoder, gradients, by_layer=True) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_squares_by_group_are_those_of_the_norms(tied: bool) -> None:
    decoder = model(tied)
    backward(decoder, 2)
    found = dict(zip(vitals.GROUPS, vitals.group_squares(decoder).tolist(), strict=True))
    norms = vitals.norms(decoder, gradients=True, by_layer=False)
    expected = {group: norms.get(f"grad_norm/{group}", 0.0) ** 2 for group in vitals.GROUPS}
    assert found == pytest.approx(expected, rel=1e-5)


def test_padding_of_the_vocabulary_is_in_no_norm() -> None:
    found = []
    for multiple in (1, 128):
        config = model().config.model_copy(update={"vocab_multiple": multiple})
        decoder = Decoder(config, seed=5)
        optimizer = optimizers.build(decoder, SETTINGS, torch.device("cpu"))
        for seed in range(3):
            update(decoder, optimizer, seed)
        looks = vitals.norms(decoder, False, True) | vitals.norms(decoder, True, True)
        found.append(looks | vitals.update_ratios(decoder, optimizer) | vitals.moment_norms(optimizer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_norms_of_sets_whole_and_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vitals.PIECE_ELEMENTS, "cpu", piece)
    sets = [[torch.arange(20.0).view(4, 5).T, torch.tensor([3.0])], [], [torch.full((9,), 2.0)]]
    assert vitals.squared_norms(sets).tolist() == pytest.approx([19 * 20 * 39 / 6 + 9, 0, 36], rel=1e-6)


def test_the_norm_of_a_large_tensor_is_not_short() -> None:
    large = torch.full((20_000_000,), 0.1)
    expected = 20_000_000 * float(large[0]) ** 2
    assert float(vitals.squared_norms([[large]])) == pytest.approx(expected, rel=1e-4)


def test_not_finite_gradients_are_not_finite_norms() -> None:
    decoder = model()
    backward(decoder, 0)
    decoder.model.layers[1].mlp.up_proj.weight.grad[0, 0] = torch.inf
    assert vitals.norms(decoder, True, True)["grad_norm/layer.1"] == float("inf")
    assert vitals.group_squares(decoder)[vitals.GROUPS.index("mlp")] == torch.inf
    assert torch.isfinite(vitals.group_squares(decoder)).sum() == 4


def test_without_gradients_there_are_no_norms_of_them() -> None:
    assert vitals.norms(model(), gradients=True, by_layer=True) == {}


# ------------------------------------------------------------------------------------------------------------
# Updates


@pytest.mark.parametrize(("decay", "eps"), [(0.0, 1e-8), (0.1, 1e-3)])
@pytest.mark.parametrize("piece", [100, 1 << 18])
@pytest.mark.parametrize("tied", [True, False])
def test_update_ratios_are_those_of_the_weights(
    tied: bool, piece: int, decay: float, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vitals.PIECE_ELEMENTS, "cpu", piece)
    decoder = model(tied)
    settings = SETTINGS.model_copy(update={"weight_decay": decay, "eps": eps})
    optimizer = optimizers.build(decoder, settings, torch.device("cpu"))
    for seed in range(5):  # bias correction is largest at the first
        before = {name: w.detach().double().clone() for name, w in decoder.named_parameters()}
        update(decoder, optimizer, seed)
        after = dict(decoder.named_parameters())
        expected = {}
        for group in vitals.GROUPS if not tied else vitals.GROUPS[:-1]:
            names = members(decoder, group)
            moved = length([after[name].double() - before[name] for name in names])
            expected[f"update_ratio/{group}"] = moved / length([before[name] for name in names])
        assert vitals.update_ratios(decoder, optimizer) == pytest.approx(expected, rel=1e-3)


def test_update_ratios_after_a_resume() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, torch.device("cpu"))
    update(decoder, optimizer, 0)
    resumed = optimizers.build(decoder, SETTINGS, torch.device("cpu"))
    assert vitals.update_ratios(decoder, resumed) == {}
    assert vitals.moment_norms(resumed) == {}
    optimizers.load_state_tensors(resumed, decoder, optimizers.state_tensors(optimizer, decoder))
    optimizers.set_learning_rate(resumed, 1e-3)
    assert vitals.update_ratios(decoder, resumed) == pytest.approx(vitals.update_ratios(decoder, optimizer))


def test_moment_norms() -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, torch.device("cpu"))
    update(decoder, optimizer, 0)
    gradients = [w.grad for w in decoder.parameters()]
    squared = [g.double() ** 2 for g in gradients]
    expected = {"optimizer/m_norm": 0.1 * length(gradients), "optimizer/v_norm": 0.05 * length(squared)}
    assert vitals.moment_norms(optimizer) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The probe


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers; x (T, H, D) in float64."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] / theta ** (torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((z.real, z.imag), dim=-1)


def by_hand(decoder: Decoder, ids: Tensor) -> dict[str, float]:
    """The same numbers in float64, all scores at once."""
    p = {name: w.detach().double() for name, w in decoder.named_parameters()}
    c = decoder.config

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[name]

    x, found = p["model.embed_tokens.weight"][ids[0]], {}
    for i in range(c.layers):
        at = f"model.layers.{i}."
        h = normed(x, at + "input_layernorm.weight")
        q, k, v = (
            (h @ p[f"{at}self_attn.{w}_proj.weight"].T).view(len(x), -1, c.head_size) for w in ("q", "k", "v")
        )
        if c.qk_norm:
            q, k = normed(q, at + "self_attn.q_norm.weight"), normed(k, at + "self_attn.k_norm.weight")
        q, k = turned(q, c.rope_theta), turned(k, c.rope_theta)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        scores = torch.stack([q[:, n] @ k[:, n].T for n in range(c.heads)]) / c.head_size**0.5  # (H, T, T)
        seen = torch.tril(torch.ones(len(x), len(x), dtype=torch.bool))
        scores = torch.where(seen, scores, -torch.inf)
        found[f"attention/logit_max/layer.{i}"] = float(scores.max())
        mixed = torch.cat([scores[n].softmax(-1) @ v[:, n] for n in range(c.heads)], dim=-1)
        x = x + mixed @ p[f"{at}self_attn.o_proj.weight"].T
        h = normed(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ p[f"{at}mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ p[f"{at}mlp.up_proj.weight"].T)) @ p[f"{at}mlp.down_proj.weight"].T
        found[f"activation_rms/layer.{i}"] = float(x.square().mean().sqrt())
    found["attention/logit_max"] = max(v for name, v in found.items() if "logit" in name)
    return found


@pytest.mark.parametrize("queries", [1, 5, LENGTH, 256])
@pytest.mark.parametrize(("tied", "qk_norm"), KINDS)
def test_the_probe_gives_what_a_forward_by_hand_gives(
    tied: bool, qk_norm: bool, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitals, "CHUNK_QUERIES", queries)
    decoder, ids = model(tied, qk_norm), some_ids(3)
    assert vitals.probe(decoder, ids) == pytest.approx(by_hand(decoder, ids), rel=1e-4)


def test_a_score_that_attention_does_not_see_does_not_count() -> None:
    q, k = torch.zeros(1, 6, 1, 4), torch.zeros(1, 6, 1, 4)
    q[0, 2], k[0, 5] = 10.0, 10.0  # position 2 can't look at 5
    k[0, 1] = 0.5
    assert float(vitals.largest_logit(q, k)) == pytest.approx(4 * 10 * 0.5 / 2)


def test_the_probe_in_bf16() -> None:
    decoder, ids = model(dtype=torch.bfloat16), some_ids(4)
    assert vitals.probe(decoder, ids) == pytest.approx(by_hand(decoder, ids), rel=3e-2)


def test_the_probe_of_a_short_sequence() -> None:
    decoder, ids = model(), some_ids(4)[:, :1]
    assert vitals.probe(decoder, ids) == pytest.approx(by_hand(decoder, ids), rel=1e-4)


def test_what_is_not_finite_is_told() -> None:
    decoder = model()
    with torch.no_grad():
        decoder.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    found = vitals.probe(decoder, some_ids(4))
    assert found["activation_rms/layer.0"] == pytest.approx(
        by_hand(decoder, some_ids(4))["activation_rms/layer.0"], rel=1e-4
    )
    assert (
        found["activation_rms/layer.1"] != found["activation_rms/layer.1"]
    )  # NaN: the first bad layer shows
    with torch.no_grad():
        decoder.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    found = vitals.probe(decoder, some_ids(4))
    assert found["attention/logit_max"] != found["attention/logit_max"]


@pytest.mark.parametrize("too_long", [False, True])
def test_looking_leaves_no_trace(too_long: bool) -> None:
    decoder = model()
    optimizer = optimizers.build(decoder, SETTINGS, torch.device("cpu"))
    update(decoder, optimizer, 0)
    backward(decoder, 1)
    kernels = [layer.self_attn.attention for layer in decoder.model.layers]
    weights = {name: w.detach().clone() for name, w in decoder.named_parameters()}
    gradients = {name: w.grad.clone() for name, w in decoder.named_parameters()}
    moments = optimizers.state_tensors(optimizer, decoder)
    random, training = torch.get_rng_state(), decoder.training
    if too_long:
        with pytest.raises(ValueError, match="longer than the context"):
            vitals.probe(decoder, torch.zeros(1, LENGTH + 1, dtype=torch.int64))
    else:
        vitals.probe(decoder, some_ids())
        vitals.update_ratios(decoder, optimizer)
        vitals.norms(decoder, True, True)
        vitals.moment_norms(optimizer)
        vitals.group_squares(decoder)
    assert [layer.self_attn.attention for layer in decoder.model.layers] == kernels
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())
    for name, weight in decoder.named_parameters():
        assert torch.equal(weight, weights[name])
        assert torch.equal(weight.grad, gradients[name])
        assert weight.requires_grad
    after = optimizers.state_tensors(optimizer, decoder)
    assert all(torch.equal(after[name], moments[name]) for name in moments)
    assert torch.equal(torch.get_rng_state(), random)
    assert decoder.training == training
    assert torch.is_grad_enabled()


def test_a_failure_within_a_layer_leaves_no_trace_either() -> None:
    decoder = model()
    plain = decoder.model.layers[0].self_attn.attention

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("the kernel broke")

    decoder.model.layers[1].self_attn.attention = broken
    with pytest.raises(RuntimeError, match="the kernel broke"):
        vitals.probe(decoder, some_ids())
    assert [layer.self_attn.attention for layer in decoder.model.layers] == [plain, broken]
    assert not any(m._forward_hooks for m in decoder.modules())


def test_a_compiled_model_is_looked_at_uncompiled_and_stays_compiled() -> None:
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    decoder, graphs = model(), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    for layer in decoder.model.layers:
        layer.compile(backend=backend, dynamic=False)
    with torch.no_grad():
        decoder.hidden(some_ids(rows=3))
        compiled = len(graphs)
        assert compiled > 0
        assert vitals.probe(decoder, some_ids()) == pytest.approx(by_hand(decoder, some_ids()), rel=1e-4)
        decoder.hidden(some_ids(rows=3))
    assert len(graphs) == compiled
