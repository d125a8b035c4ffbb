"""The table of shapes against Transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.records import builder

from x1_pretrain.review.weights import expected_shapes, problems


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_transformers_makes(architecture: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    fields = builder.HF_CONFIG | {"architectures": [architecture], "tie_word_embeddings": tied, "head_dim": 4}
    kind = {"LlamaForCausalLM": transformers.LlamaConfig, "Qwen3ForCausalLM": transformers.Qwen3Config}[
        architecture
    ]
    known = {key: value for key, value in fields.items() if key not in ("architectures", "model_type")}
    model = getattr(transformers, architecture)(kind(**known))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]  # the same tensor as the embedding; saved once
    assert expected_shapes(fields) == shapes


def write(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> tuple[Path, Path]:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(builder.HF_CONFIG | config))
    return folder / "model.safetensors", folder / "config.json"


def test_sound_weights_have_no_problems_and_are_counted(tmp_path: Path) -> None:
    weights = builder.build_weights(1)
    found, evidence = problems(*write(tmp_path, weights))
    assert found == []
    assert f"{sum(tensor.size for tensor in weights.values()):,} numbers" in evidence


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found_and_named(tmp_path: Path, bad: float) -> None:
    weights = builder.build_weights(1)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = bad
    assert problems(*write(tmp_path, weights))[0] == [
        "model.layers.1.mlp.up_proj.weight holds values that are not finite"
    ]


def test_missing_extra_misshapen_and_half_precision_tensors_are_named(tmp_path: Path) -> None:
    weights = builder.build_weights(1)
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = np.zeros(3, np.float32)
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((8, 12), np.float32)
    weights["model.layers.0.input_layernorm.weight"] = np.zeros(8, np.float16)
    found = problems(*write(tmp_path, weights))[0]
    assert found == [
        "model.norm.weight is missing",
        "model.extra.weight is not in config.json's architecture",
        "model.layers.0.mlp.up_proj.weight has shape (8, 12), config.json says (12, 8)",
        "model.layers.0.input_layernorm.weight is F16, expected F32",
    ]


def test_a_cut_file_and_an_unknown_architecture_are_problems(tmp_path: Path) -> None:
    files = write(tmp_path, builder.build_weights(1), architectures=["OtherForCausalLM"])
    assert "shapes are not known" in problems(*files)[0][0]
    files[0].write_bytes(files[0].read_bytes()[:-4])
    assert "does not load" in problems(*files)[0][0]
