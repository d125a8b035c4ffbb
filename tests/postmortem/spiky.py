"""Run folders with a spike in them, made by hand as the loop would write them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tests.records import builder

BEGIN = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
BATCH_TOKENS, CONTEXT = 128, 32
BEFORE, NORM_BEFORE = 3.0, 0.5
SECONDS = 2.0  # a step


def at(step: float) -> str:
    """When a step ended."""
    moment = BEGIN + timedelta(seconds=SECONDS * step)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def written(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: the loop writes it as a string."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def step_rows(
    last: int, losses: dict[int, float], grad_norms: dict[int, float], **more: Any
) -> list[dict[str, Any]]:
    """A row a step: quiet (noise of 0.02 nats about a flat loss), but for what is given. `more`: of all."""
    noise = np.random.default_rng(0).normal(size=(last + 1, 2))
    rows = []
    for step in range(1, last + 1):
        loss = losses.get(step, BEFORE + 0.02 * noise[step, 0])
        norm = grad_norms.get(step, NORM_BEFORE * math.exp(0.05 * noise[step, 1]))
        row = {"step": step, "time_utc": at(step), "session": 1, "loss": loss, "grad_norm": norm, "clip": 0.8}
        row |= {"lr": 3e-4, "step_s": SECONDS, "wait_s": 0.0, "verdict": "go"}
        row |= {"loss_z": (loss - BEFORE) / 0.02, "grad_z": math.log(max(norm, 1e-9) / NORM_BEFORE) / 0.05}
        rows.append(written(row | more))
    return rows


def event(name: str, step: int, **fields: Any) -> dict[str, Any]:
    row = {"time_utc": at(step), "event": name, "step": step, "session": 1, **fields, "message": name}
    return written(row)


def spike_event(onset: int, loss: float = 5.0, grad_norm: float = 5.0, **more: Any) -> dict[str, Any]:
    told = {"onset": onset, "loss": loss, "grad_norm": grad_norm, "loss_before": BEFORE}
    told |= {"grad_norm_before": NORM_BEFORE, "loss_z": (loss - BEFORE) / 0.02, "grad_z": 40.0}
    return event("spike", onset, **{**told, "injected": False, **more})


def end_event(onset: int, end: int, recovered: int | None, **more: Any) -> dict[str, Any]:
    told = {"onset": onset, "end": end, "recovered": recovered, "loss_before": BEFORE}
    told |= {
        "grad_norm_before": NORM_BEFORE,
        "peak_loss": 5.0,
        "peak_loss_step": onset,
        "peak_grad_norm": 5.0,
    }
    told |= {"peak_grad_norm_step": onset, "injected": False, "policy": "clip"}
    return event("spike_end", end, **{**told, **more})


def metric_rows(last: int, every: int = 10, **more: Any) -> list[dict[str, Any]]:
    rows = []
    for step in range(every, last + 1, every):
        row = {"step": step, "tokens": step * BATCH_TOKENS, "time_utc": at(step), "session": 1}
        row |= {"elapsed_s": SECONDS * step, "train/loss": BEFORE, "grad_norm": NORM_BEFORE}
        row |= {"param_norm": 20.0 + step / 1000, "optimizer/m_norm": 0.1, "optimizer/v_norm": 0.01}
        rows.append(row | more)
    return rows


def build(
    folder: Path,
    steps: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    corpus: Path | None = None,
    total_steps: int = 400,
    **changes: Any,
) -> Path:
    """The run folder. With `corpus` its manifest names that one, else one that is not there."""
    config = builder.build_config(
        folder,
        model__context=CONTEXT,
        model__vocab_size=300,
        training__total_steps=total_steps,
        training__batch_tokens=BATCH_TOKENS,
        **changes,
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(builder.to_yaml(config), encoding="utf-8")
    builder.write_manifest(folder, config)
    if corpus:
        name_corpus(folder, corpus)
    builder.write_lines(folder / "steps.jsonl", list(steps))
    start = event("start", 0)
    builder.write_lines(folder / "events.jsonl", [start, *events])
    builder.write_lines(folder / "metrics.jsonl", metric_rows(steps[-1]["step"] if steps else 0))
    return folder


def name_corpus(folder: Path, corpus: Path) -> None:
    """As the loop records the corpora of a run."""
    manifest = json.loads((folder / "manifest.json").read_text())
    told = json.loads((corpus / "manifest.json").read_text())
    data = {"name": "corpus", "dir": str(corpus), "fingerprint": told["fingerprint"], "weight": 1.0}
    data |= {"train_tokens": told["train"]["tokens"], "val_tokens": told["val"]["tokens"]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"data": [data]}), encoding="utf-8")


def natural(folder: Path, corpus: Path | None = None, last: int = 300, **changes: Any) -> Path:
    """A natural spike at step 201: up by 2 nats, back at 206."""
    losses = {201: 5.0, 202: 4.5, 203: 4.0, 204: 3.6, 205: 3.3}
    grad_norms = {201: 5.0, 202: 4.0, 203: 2.0, 204: 1.0}
    events = [spike_event(201), end_event(201, 216, 206)]
    return build(folder, step_rows(last, losses, grad_norms), events, corpus, **changes)
