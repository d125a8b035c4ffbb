"""Run folders made by hand, in the format the training loop writes: small, complete, and easy to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from x1_pretrain.config import RunConfig, config_hash
from x1_pretrain.config_reading import parse_config, to_yaml
from x1_pretrain.records.checkpoint_files import publish
from x1_pretrain.review.weights import expected_shapes

RUN_ID = "tiny-20261121T101500Z-ab12cd"
FINGERPRINT = "f" * 64
TOTAL_STEPS, LOG_EVERY, EVAL_EVERY, RESUMED_AT = 42, 5, 20, 20
TOKENS_PER_STEP = 64

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "tie_word_embeddings": True,
}


def build_config(folder: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": folder.name,
        "run_dir": str(folder),
        "model": {
            "layers": 2,
            "d_model": 8,
            "heads": 4,
            "kv_heads": 2,
            "d_ff": 12,
            "context": 16,
            "vocab_size": 11,
        },
        "data": {"dir": "/nowhere/corpus"},
        "training": {"total_steps": TOTAL_STEPS, "batch_tokens": TOKENS_PER_STEP},
        "optimizer": {"warmup_steps": 2},
        "evaluation": {"every": EVAL_EVERY},
        "checkpoint": {"every": 20},
        "log": {"every": LOG_EVERY},
    }
    for path, value in changes.items():
        section, _, leaf = path.partition("__")
        tree[section] = tree.get(section, {}) | {leaf: value} if leaf else value
    return parse_config(tree, "builder")


def build_run(folder: Path, steps: int = TOTAL_STEPS, run_id: str = RUN_ID, **changes: Any) -> Path:
    """A run of two sessions up to `steps` (finished when that is all of them), with its checkpoints."""
    folder.mkdir(parents=True)
    config = build_config(folder, **changes)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_manifest(folder, config, run_id)
    write_lines(folder / "metrics.jsonl", rows(steps))
    write_lines(folder / "events.jsonl", events(steps))
    (folder / "checkpoints").mkdir()
    for step in sorted({0, 20, steps}):
        build_checkpoint(folder, step, run_id)
    return folder


def write_manifest(folder: Path, config: RunConfig, run_id: str = RUN_ID) -> None:
    manifest = {
        "schema_version": 1,
        "kind": "run",
        "run_id": run_id,
        "name": config.name,
        "created_utc": "2026-11-21T10:15:00.000Z",
        "argv": ["train", "--config", "tiny.yaml"],
        "commit": None,
        "dirty": None,
        "seed": config.seed,
        "config_hash": config_hash(config, [FINGERPRINT]),
        "versions": dict.fromkeys(("python", "torch", "numpy", "x1_pretrain"), "1.0")
        | dict.fromkeys(("cuda", "flash_attn", "transformers")),
        "hardware": {
            "device": "cpu",
            "count": 1,
            "world_size": 1,
            "cpu": "a cpu",
            "cores": 2,
            "ram_gib": 4.0,
        },
        "data": [
            {
                "name": "corpus",
                "dir": "/nowhere/corpus",
                "fingerprint": FINGERPRINT,
                "train_tokens": 9000,
                "val_tokens": 100,
                "weight": 1.0,
            }
        ],
        "parameters": {"non_embedding": 1000, "embedding": 88, "total": 1088},
        "flops_per_token": {"6N": 6000, "palm": 6500, "causal": 6300},
        "tokens_per_step": TOKENS_PER_STEP,
        "total_steps": config.training.total_steps,
        "precision": "fp32",
        "attention": "sdpa",
        "compile": "off",
        "peak_flops": None,
        "spent_usd": None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def rows(steps: int) -> list[dict[str, Any]]:
    """Training rows every LOG_EVERY and at the end, evaluation rows every EVAL_EVERY and at the end."""
    made = []
    for step in range(1, steps + 1):
        if step % LOG_EVERY == 0 or step == TOTAL_STEPS:
            made.append(
                place(step) | {"train/loss": train_loss(step), "lr": 3e-4, "grad_norm": 0.5 + 1 / step}
            )
            made[-1] |= {"param_norm": 10.0 + step / 100, "tokens_per_sec": 640.0 + step}
        if step % EVAL_EVERY == 0 or step == TOTAL_STEPS:
            loss = train_loss(step) + 0.05
            made.append(place(step) | {"val/loss": loss, "val/corpus/loss": loss, "val/corpus/bpb": loss / 3})
    return made


def place(step: int) -> dict[str, Any]:
    """What every row carries. A step takes 0.1 s."""
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "time_utc": f"2026-11-21T10:15:{step:02d}.000Z",
        "elapsed_s": round(step * 0.1, 3),
        "session": 1 if step <= RESUMED_AT else 2,
    }


def train_loss(step: int) -> float:
    return 2.0 + 3.0 / step


def events(steps: int) -> list[dict[str, Any]]:
    found = [event("start", 0, 1), event("checkpoint", 20, 1), event("resume", RESUMED_AT, 2)]
    return [*found, event("finish", steps, 2)] if steps == TOTAL_STEPS else found


def event(name: str, step: int, session: int) -> dict[str, Any]:
    time_utc = f"2026-11-21T10:15:{step:02d}.000Z"
    return {"time_utc": time_utc, "event": name, "step": step, "session": session, "message": name}


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def build_weights(seed: int) -> dict[str, np.ndarray]:
    shapes = expected_shapes(HF_CONFIG)
    assert shapes is not None
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def build_checkpoint(
    folder: Path, step: int, run_id: str = RUN_ID, weights: dict[str, np.ndarray] | None = None
) -> Path:
    """A sealed checkpoint of the run in `folder`; its weights differ from step to step."""
    config_hash_of_run = json.loads((folder / "manifest.json").read_text())["config_hash"]
    tensors = weights if weights is not None else build_weights(step)

    def write(target: Path) -> None:
        save_file(tensors, target / "model.safetensors")
        save_file(
            {f"m.{name}": tensor * 0 for name, tensor in tensors.items()}, target / "optimizer.safetensors"
        )
        (target / "config.json").write_text(json.dumps(HF_CONFIG))
        (target / "state.json").write_text(
            json.dumps({"step": step, "run_id": run_id, "config_hash": config_hash_of_run})
        )

    return publish(folder / "checkpoints", step, run_id, write)
