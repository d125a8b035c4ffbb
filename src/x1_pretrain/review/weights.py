"""Whether a model folder holds what its config.json says: every tensor, its shape, fp32, finite. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from x1_pretrain.records.run_folder import read_json

Shape = tuple[int, ...]

FAMILIES = {
    "LlamaForCausalLM": False,
    "Qwen3ForCausalLM": True,
}  # architecture -> has a norm per head on Q and K


def expected_shapes(config: dict[str, Any]) -> dict[str, Shape] | None:
    """Hugging Face's names and shapes for a config.json; none for an architecture not known here."""
    architecture = (config.get("architectures") or [""])[0]
    if architecture not in FAMILIES:
        return None
    d, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, d)
    layer = _layer_shapes(config, FAMILIES[architecture])
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: dict[str, Any], qk_norm: bool) -> dict[str, Shape]:
    d, ff, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or d // heads
    kv = config["num_key_value_heads"] * head
    norms = {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)} if qk_norm else {}
    return {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (heads * head, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, heads * head),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
        **norms,
    }


def problems(model_file: Path, config_file: Path) -> tuple[list[str], str]:
    """What is wrong with the weights, and what was looked at in words."""
    try:
        with safe_open(model_file, framework="numpy") as tensors:
            names = list(tensors.keys())
            slices = {name: tensors.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            found = _shape_problems(shapes, expected_shapes(read_json(config_file)))
            found += [f"{name} is {kind}, expected F32" for name, kind in kinds.items() if kind != "F32"]
            good = [name for name, kind in kinds.items() if kind == "F32"]
            found += [
                f"{name} holds values that are not finite" for name in good if not _finite(tensors, name)
            ]
    except (SafetensorError, OSError) as error:
        return [f"{model_file.name} does not load ({error})"], ""
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    return found, f"{len(names)} tensors, {numbers:,} numbers, all finite, shapes as in config.json"


def reload_problem(model_file: Path) -> tuple[str, int]:
    """Load all, save again, compare: what differs (nothing: ""), and how many bytes there are."""
    try:
        with safe_open(model_file, framework="numpy") as tensors:
            described = tensors.metadata()
        again = save(load_file(model_file), described)
        before = model_file.read_bytes()
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        return f"{model_file.name} does not load ({error})", 0
    if again == before:
        return "", len(before)
    if len(again) != len(before):
        return f"saved again it has {len(again):,} bytes, {model_file.name} has {len(before):,}", len(before)
    place = next(i for i, (a, b) in enumerate(zip(again, before, strict=True)) if a != b)
    return f"saved again it differs from {model_file.name} at byte {place:,}", len(before)


def _finite(tensors: Any, name: str) -> bool:
    return bool(np.isfinite(tensors.get_tensor(name)).all())


def _shape_problems(found: dict[str, Shape], expected: dict[str, Shape] | None) -> list[str]:
    if expected is None:
        return ["config.json names an architecture whose shapes are not known here"]
    lacking = [f"{name} is missing" for name in expected if name not in found]
    extra = [f"{name} is not in config.json's architecture" for name in found if name not in expected]
    wrong = [
        f"{name} has shape {found[name]}, config.json says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return lacking + extra + wrong
