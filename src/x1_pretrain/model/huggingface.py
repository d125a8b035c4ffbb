"""A decoder as a Hugging Face folder: the JSON files beside the weights, and the weights as they lie on disk.

On disk the vocabulary is unpadded and everything is fp32, so the folder loads in Transformers and in whatever
reads its format, and gives the same logits. Torch is not imported: tensors have methods of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from x1_pretrain.config import ModelConfig
from x1_pretrain.errors import RefusedError

if TYPE_CHECKING:
    from torch import Tensor

    from x1_pretrain.model.decoder import Decoder


def config_json(config: ModelConfig, eot_id: int) -> dict[str, Any]:
    """`config.json`: `LlamaForCausalLM`, or `Qwen3ForCausalLM` when queries and keys are normed."""
    family = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
    if config.qk_norm:
        family = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    return {
        **family,
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # Transformers 4 reads the first, 5 writes the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        # No pad_token_id: Transformers would make it the embedding's padding_idx, and fine-tuning there would
        # never train the end-of-text row.
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def generation_config(eot_id: int) -> dict[str, Any]:
    """`generation_config.json`: ids only. Sampling defaults here would be applied by servers, unseen."""
    return {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}


def tokenizer_config(config: ModelConfig, eot_token: str) -> dict[str, Any]:
    """`tokenizer_config.json`, beside the `tokenizer.json` of the corpus. Nothing is added to a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot_token,
        "eos_token": eot_token,
        "pad_token": eot_token,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
    }


def disk_state(decoder: Decoder) -> dict[str, Tensor]:
    """The weights as they go to disk: by Hugging Face's names, fp32, on the CPU, without vocabulary padding.

    Copies, so that training may go on while they are written. Tied embeddings have no `lm_head.weight`.
    """
    return {
        name: weight.detach()[: decoder.disk_rows(name, weight)].float().cpu().clone()
        for name, weight in decoder.named_parameters()
    }


def load_disk_state(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's tensors into `decoder`, zeros into its padding. All names and shapes must fit."""
    parameters = dict(decoder.named_parameters())
    shapes = {name: (decoder.disk_rows(name, p), *p.shape[1:]) for name, p in parameters.items()}
    refuse_misfits("model.safetensors", shapes, tensors)
    for name, parameter in parameters.items():
        rows = shapes[name][0]
        weight = parameter.detach()  # shares memory; writing to it is no step of the autograd graph
        weight[:rows].copy_(tensors[name])
        weight[rows:].zero_()


def refuse_misfits(file: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Refuse a set of tensors that is not exactly the expected one; the first misfit is named."""
    remedy = "the checkpoint is of another model; check the model section of the config"
    for name, shape in expected.items():
        if name not in found:
            raise RefusedError(f"{file}: tensor {name} is missing, expected shape {list(shape)}; {remedy}")
        if tuple(found[name].shape) != shape:
            raise RefusedError(
                f"{file}: tensor {name} has shape {list(found[name].shape)}, expected {list(shape)}; {remedy}"
            )
    for name in found:
        if name not in expected:
            raise RefusedError(f"{file}: tensor {name} is not part of this model; {remedy}")
