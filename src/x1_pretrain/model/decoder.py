"""The decoder: pre-norm transformer with rotary positions, grouped-query attention and SwiGLU.

Its parameters carry Hugging Face's names (`LlamaForCausalLM`; `Qwen3ForCausalLM` with `qk_norm`) and it
computes the same function, so a saved state needs no conversion. Weights are fp32; activations are in
`compute_dtype`.

Shapes: B sequences, T tokens, d = d_model, H heads, K key-value heads, D = head size, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x1_pretrain.config import ModelConfig
from x1_pretrain.model.attention import Attention, sdpa

VOCAB_TENSORS = (
    "model.embed_tokens.weight",
    "lm_head.weight",
)  # the two with a row per token of the vocabulary


class Linear(nn.Module):
    """x W^T, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Token ids to vectors, in the dtype of the weights."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Divide by the root mean square, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Rounding to the activation dtype comes before the weight, as in Transformers: it decides last bits.
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return self.weight.to(x.dtype) * normed


def rotary_table(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (T, D) each, both halves of a head alike."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))  # (D/2,)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, D)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head by its position's angle; x (B, T, H, D), cos, sin (T, D)."""
    first, second = x.chunk(2, dim=-1)  # (B, T, H, D/2)
    turned = torch.cat((-second, first), dim=-1)  # (B, T, H, D)
    return x * cos[:, None, :] + turned * sin[:, None, :]


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        d, size = config.d_model, config.head_size
        self.head_size = size
        self.attention = attention
        self.q_proj = Linear(d, config.heads * size)
        self.k_proj = Linear(d, config.kv_heads * size)
        self.v_proj = Linear(d, config.kv_heads * size)
        self.o_proj = Linear(config.heads * size, d)
        self.q_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, -1, self.head_size)  # (B, T, H, D)
        k = self.k_proj(x).view(batch, length, -1, self.head_size)  # (B, T, K, D)
        v = self.v_proj(x).view(batch, length, -1, self.head_size)  # (B, T, K, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, T, H, D)
        return cast(Tensor, self.o_proj(mixed.reshape(batch, length, -1)))  # (B, T, d)


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))  # (B, T, d)


class Block(nn.Module):
    """One layer. Also the unit that is compiled."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = SelfAttention(config, attention)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)  # (B, T, d)
        return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x)))  # (B, T, d)


class Trunk(nn.Module):
    """Everything but the output matrix; Hugging Face calls it `model`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, attention: Attention, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.embed_tokens = Embedding(config.padded_vocab, config.d_model)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        cos, sin = rotary_table(config.context, config.head_size, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)  # (T, D), fp32
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length > len(self.cos):
            raise ValueError(f"a sequence of {length} tokens is longer than the context of {len(self.cos)}")
        x = self.embed_tokens(ids).to(self.compute_dtype)  # (B, T, d)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return cast(Tensor, self.norm(x))  # (B, T, d)


class Decoder(nn.Module):
    """A causal language model from a resolved config (`vocab_size` set).

    Embedding rows are padded in memory to `config.padded_vocab` for the matrix kernels. The padded rows are
    zero, get no gradient, never reach a logit and are never written.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        attention: Attention = sdpa,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, attention, compute_dtype)
        self.lm_head = None if config.tied_embeddings else Linear(config.d_model, config.padded_vocab)
        self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw the weights on the CPU: the same seed gives the same weights on any device and padding.

        Matrices and embeddings are normal(0, init_std). The two matrices of a layer that write to the
        residual stream are narrower by sqrt(2 x layers): their sum then doesn't grow with depth.
        """
        generator = torch.Generator().manual_seed(seed)
        narrow = 1.0 / math.sqrt(2 * self.config.layers)
        for name, weight in self.named_parameters():
            if weight.ndim != 2 or weight.is_meta:
                continue
            rows = self.disk_rows(name, weight)
            to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = self.config.init_std * (narrow if to_residual else 1.0)
            weight.zero_()
            weight[:rows].copy_(torch.randn(rows, weight.shape[1], generator=generator, device="cpu") * std)

    @property
    def output_weight(self) -> nn.Parameter:
        """The matrix that turns hidden states into logits, (padded V, d)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def disk_rows(self, name: str, tensor: Tensor) -> int:
        """How many rows of the named parameter (or of its optimizer state) are real: the rest is padding."""
        return self.config.vocab if name in VOCAB_TENSORS else tensor.shape[0]

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states, (B, T, d), for the loss; ids (B, T)."""
        return cast(Tensor, self.model(ids))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the real vocabulary, (B, T, V); ids (B, T)."""
        hidden = self.hidden(ids)
        return F.linear(hidden, self.output_weight.to(hidden.dtype))[..., : self.config.vocab]

    def compile_blocks(self, mode: str) -> None:
        """Compile each layer in place ("default" or "max-autotune"), which happens at the next forward.

        One compiled program serves all layers, since they differ in weights only. Max-autotune goes without
        CUDA graphs: they would be recorded once per layer and hold memory for each.
        """
        inductor_mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
        for layer in self.model.layers:
            layer.compile(mode=inductor_mode, dynamic=False)

    def uncompile_blocks(self) -> None:
        """Back to plain execution."""
        for layer in self.model.layers:
            layer._compiled_call_impl = None

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_id: int | None = None,
    ) -> Tensor:
        """Continue one prompt, (1, T) -> (1, T + new), up to and with `stop_id`.

        Temperature 0 takes the likeliest token. Plain: each token runs the whole window again, uncompiled,
        for its length is new every time.
        """
        with torch.compiler.set_stance("force_eager"):
            for _ in range(max_new_tokens):
                logits = self._next_logits(ids[:, -self.config.context :])  # (V,)
                token = _pick(logits, temperature, generator)
                ids = torch.cat((ids, torch.tensor([[token]], device=ids.device, dtype=ids.dtype)), dim=1)
                if token == stop_id:
                    break
        return ids

    def _next_logits(self, ids: Tensor) -> Tensor:
        last = self.hidden(ids)[:, -1]  # (1, d)
        return F.linear(last, self.output_weight.to(last.dtype))[0, : self.config.vocab].float().cpu()  # (V,)


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """One token id; drawn on the CPU, so that the generator gives the same draws on any device."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
