"""What a checkpoint holds: a Hugging Face model folder, the optimizer's state, and the state of the run.

    model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json
    optimizer.safetensors state.json manifest.json

Full tensors by parameter name, so that the number of ranks is free to change.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from x1_pretrain.corpus.tokenizer import Tokenizer
from x1_pretrain.errors import RefusedError
from x1_pretrain.learning import optimizers
from x1_pretrain.model import huggingface
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.checkpoint_files import CheckpointFailedError, DiskFullError


@dataclass(frozen=True)
class RunState:
    """All that a run is besides its tensors. The order of the data needs the step and nothing else."""

    run_id: str
    step: int
    tokens: int
    elapsed_s: float  # wall-clock of training so far, over all sessions
    session: int
    config_hash: str
    step_fields: dict[
        str, Any
    ]  # the config fields the hash is over, so that a refusal can name the one that differs
    fingerprints: list[str]  # of the corpora, in the order of the mixture
    precision: str
    context: int
    jumps: list[list[int]] = field(default_factory=list)  # of the order: [step, batch]
    injected: list[int] = field(default_factory=list)  # first batches of the injections up to here
    stability: dict[str, Any] = field(default_factory=dict)  # what the spike detector knows
    noise: dict[str, Any] = field(default_factory=dict)  # ... and the gradient noise scale
    parent: dict[str, Any] | None = None  # of a branch: run_id, step, checkpoint it began from, and its trunk


def save(folder: Path, state: RunState, decoder: Decoder, optimizer: AdamW, tokenizer: Tokenizer) -> Path:
    """Publish the checkpoint of `state.step`. CheckpointFailedError if it can't be written or must not be."""
    weights = huggingface.disk_state(decoder)
    moments = optimizers.state_tensors(optimizer, decoder)
    both = {**weights, **moments}
    broken = [name for name, tensor in both.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointFailedError(f"{broken[0]} holds values that are not finite; such are never saved")

    def write(target: Path) -> None:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, target / "optimizer.safetensors", metadata={"format": "pt"})
        (target / "tokenizer.json").write_text(tokenizer.json_text, encoding="utf-8")
        _write_json(target / "config.json", huggingface.config_json(decoder.config, tokenizer.eot_id))
        _write_json(target / "generation_config.json", huggingface.generation_config(tokenizer.eot_id))
        names = huggingface.tokenizer_config(decoder.config, tokenizer.eot_text)
        _write_json(target / "tokenizer_config.json", names)
        _write_json(target / "state.json", {"schema_version": 1, **asdict(state)})

    try:
        needed = saved_bytes(decoder, tokenizer)
        return checkpoint_files.publish(folder, state.step, state.run_id, write, needed)
    except CheckpointFailedError:
        raise
    except Exception as error:  # safetensors reports a full disk with an exception of its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise DiskFullError("No space left on device") from error
        raise


def saved_bytes(decoder: Decoder, tokenizer: Tokenizer) -> int:
    """Bytes of a checkpoint on disk: weights and two moments in fp32, the tokenizer, and the small files."""
    rows = {name: decoder.disk_rows(name, p) for name, p in decoder.named_parameters()}
    numbers = sum(rows[name] * p[0].numel() for name, p in decoder.named_parameters())
    return 12 * numbers + len(tokenizer.json_text.encode()) + (64 << 10)


def read_state(checkpoint: Path) -> RunState:
    """The state of a verified checkpoint."""
    content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    version = content.pop("schema_version", None)
    if version != 1:
        raise RefusedError(
            f"{checkpoint}: state.json has schema version {version}, this x1 reads 1; update x1"
        )
    if streak := content.pop("bad_streak", None):  # before there was a detector
        content["stability"] = {"streak": streak}
    try:
        state = RunState(**content)
    except TypeError as error:
        raise RefusedError(f"{checkpoint}: state.json is not of this version ({error})") from None
    if not isinstance(state.step_fields, dict) or state.precision not in ("bf16", "fp32"):
        raise RefusedError(f"{checkpoint}: state.json holds values that this version never wrote")
    return state


def load(checkpoint: Path, decoder: Decoder, optimizer: AdamW) -> None:
    """Put a verified checkpoint's tensors into the model and its optimizer."""
    huggingface.load_disk_state(decoder, load_file(checkpoint / "model.safetensors"))
    optimizers.load_state_tensors(optimizer, decoder, load_file(checkpoint / "optimizer.safetensors"))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
