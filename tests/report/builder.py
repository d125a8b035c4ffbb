"""Run folders for the report: a whole long run in the loop's format, made by formulas, quickly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from x1_pretrain.config import RunConfig, config_hash
from x1_pretrain.config_reading import parse_config, to_yaml

BEGAN = datetime(2026, 11, 20, 8, 0, 0, tzinfo=UTC)
BATCH, STEP_S = 65_536, 0.2
PROMPTS = ["The tallest mountain in the world is", "Once upon a time", "In 1969,"]
SAID = [
    " xv ] the ,, of of",
    " a small tree of the city",
    " the mountain of the sea, and it is",
    " Mount Everest.",
]
Row = dict[str, Any]


def stamp(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def build(
    folder: Path, total: int = 24_000, done: int | None = None, log_every: int = 10, **changes: Any
) -> Path:
    """A run with two resumes, an injected spike, two domains, two corpora whose mixture changes, a ledger.

    `done`: steps so far. `changes`: config fields, `training__batch_tokens=...`.
    """
    done = total if done is None else done
    folder.mkdir(parents=True)
    config = build_config(folder, total, log_every, changes)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest(config)), encoding="utf-8")
    noise = np.random.default_rng(7).normal(size=done + 1) * 0.04
    write(folder / "metrics.jsonl", metrics(config, done, noise))
    write(folder / "steps.jsonl", steps(config, done, noise))
    write(folder / "events.jsonl", events(config, done))
    write(folder / "samples.jsonl", samples(config, done))
    write(folder / "ledger.jsonl", ledger(config, done))
    return folder


def build_config(folder: Path, total: int, log_every: int, changes: dict[str, Any]) -> RunConfig:
    tenth = max(1, total // 20)
    model = {"layers": 4, "d_model": 64, "heads": 4, "kv_heads": 2, "d_ff": 128, "vocab_size": 4096}
    tree: dict[str, Any] = {
        "name": folder.name,
        "run_dir": str(folder),
        "model": model | {"context": 1024},
        "data": {
            "corpora": {n: {"dir": f"/nowhere/{n}", "weight": w} for n, w in (("web", 0.75), ("code", 0.25))}
        },
        "training": {"total_steps": total, "batch_tokens": BATCH},
        "optimizer": {"warmup_steps": total // 50},
        "evaluation": {"every": tenth, "prompts": PROMPTS},
        "checkpoint": {"every": tenth},
        "log": {"every": log_every},
        "budget": {"cap_usd": 35.0, "curr_cost_uri": "http://me:hunter2@example.org/budget.json"},
        "verify": {"loss_band": [2.7, 3.0]},
    }
    for path, value in changes.items():
        section, _, leaf = path.partition("__")
        tree[section] = tree.get(section, {}) | {leaf: value} if leaf else value
    return parse_config(tree, "builder")


def manifest(config: RunConfig) -> Row:
    data = [
        {
            "name": n,
            "dir": c.dir,
            "fingerprint": f"{n}-print",
            "train_tokens": 900_000_000,
            "weight": c.weight,
        }
        for n, c in config.data.mixture().items()
    ]
    return {
        "schema_version": 1,
        "kind": "run",
        "run_id": f"{config.name}-20261120T080000Z-ab12cd",
        "name": config.name,
        "created_utc": stamp(0),
        "argv": ["x1", "train", "--config", "a.yaml", "--mlflow-uri", "http://me:hunter2@example.org/"],
        "commit": "0123456789abcdef",
        "dirty": False,
        "seed": config.seed,
        "config_hash": config_hash(config, ["web-print", "code-print"]),
        "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": "13.0", "flash_attn": None},
        "hardware": {
            "device": "NVIDIA A100 80GB PCIe",
            "count": 1,
            "world_size": 1,
            "cores": 16,
            "ram_gib": 117.9,
        },
        "data": data,
        "parameters": {"non_embedding": 50_331_648, "embedding": 2_097_152, "total": 52_429_376},
        "tokens_per_step": config.training.batch_tokens,
        "total_steps": config.training.total_steps,
    }


# ------------------------------------------------------------------------------------------------------------
# The course of the run


def resumed_at(total: int) -> tuple[int, int]:
    return int(total * 0.3), int(total * 0.62)


def spiked_at(total: int) -> int:
    return int(total * 0.47)


def session(step: int, total: int) -> int:
    first, second = resumed_at(total)
    return 1 + (step > first) + (step > second)


def seconds(step: int, total: int) -> float:
    """Since the run began; a pause of 10 minutes before each resume."""
    return 60 + step * STEP_S + 600 * (session(step, total) - 1)


def train_loss(step: int, total: int, noise: Any) -> float:
    calm = 3.0 + 7.5 * math.exp(-step / (0.02 * total)) + 1.2 * (1 + step / (0.05 * total)) ** -0.8
    after = step - spiked_at(total)
    return calm + float(noise[step]) + (2.2 * math.exp(-after / 40) if after >= 0 else 0.0)


def grad_norm(step: int, total: int, noise: Any) -> float:
    after = step - spiked_at(total)
    calm = 0.35 + 3 * math.exp(-step / (0.01 * total)) + abs(float(noise[step]))
    return calm + (18 * math.exp(-after / 15) if after >= 0 else 0.0)


def place(step: int, config: RunConfig) -> Row:
    total = config.training.total_steps
    injected = min(5, max(0, step - spiked_at(total) + 1))  # the updates from the onset on
    row: Row = {"step": step, "tokens": (step - injected) * config.training.batch_tokens}
    row |= {"time_utc": stamp(seconds(step, total)), "session": session(step, total)}
    if injected:
        row["tokens_injected"] = injected * config.training.batch_tokens
    return row | {"elapsed_s": round(30 + step * STEP_S, 3)}


def metrics(config: RunConfig, done: int, noise: Any) -> Iterator[Row]:
    total, every = config.training.total_steps, config.log.every
    for step in range(1, done + 1):
        if step % every == 0 or step == total:
            yield place(step, config) | training_row(step, config, noise)
        if step % config.evaluation.every == 0 or step == total:
            web = train_loss(step, total, noise * 0) + 0.03
            code = web - 0.6
            domains = {
                "val/web/loss": web,
                "val/web/bpb": web / 3,
                "val/code/loss": code,
                "val/code/bpb": code / 3,
            }
            yield place(step, config) | {"val/loss": (web + code) / 2} | domains


def training_row(step: int, config: RunConfig, noise: Any) -> Row:
    total = config.training.total_steps
    share, late = step / total, step > 0.5 * total
    row: Row = {
        "train/loss": train_loss(step, total, noise),
        "grad_norm": grad_norm(step, total, noise),
        "param_norm": 40 + 30 * share,
        "lr": 3e-4 * (1 - 0.9 * share),
        "tokens_per_sec": BATCH / STEP_S * (1 + 0.01 * float(noise[step])),
        "flops_per_sec": 1.2e14,
        "data/wait_share": 0.002,
        "mfu": 0.41 + 0.02 * float(noise[step]),
        "mfu_causal": 0.37 + 0.02 * float(noise[step]),
        "context": 512 if step <= 0.15 * total else 1024,
        "mixture/web": 0.5 if late else 0.75,
        "mixture/code": 0.5 if late else 0.25,
        "attention/flop_share": 0.11,
        "clipped_share": 0.1,
        "optimizer/m_norm": 0.02 + 0.01 * share,
        "optimizer/v_norm": 1e-5 * (1 + share),
        "noise_scale": 20_000 * (1 + 9 * share),
        "attention/logit_max": 8 + 4 * share,
        "memory/allocated_gib": 31.0,
        "memory/peak_gib": 62.5,
        "memory/headroom_gib": 16.2,
        "memory/total_gib": 79.2,
        "gpu/temperature_c": 61 + 4 * math.sin(step / 300),
        "gpu/util_share": 0.98,
        "budget/spent_usd": seconds(step, total) / 3600 * 1.19,
        "budget/projected_usd": seconds(total, total) / 3600 * 1.19,
        "time/start_s": 30.0,
        "time/step_s": step * STEP_S * 0.95,
        "time/wait_s": step * 0.002,
    }
    row |= {f"grad_norm/{g}": 0.1 * n for n, g in enumerate(("embedding", "attention", "mlp", "norms"), 1)}
    if step % 100 == 0:
        row |= {f"grad_norm/layer.{n}": grad_norm(step, total, noise) / (n + 1) for n in range(4)}
        row |= {f"attention/logit_max/layer.{n}": 6 + n + 4 * share for n in range(4)}
    return row


def steps(config: RunConfig, done: int, noise: Any) -> Iterator[Row]:
    total = config.training.total_steps
    onset = spiked_at(total)
    for step in range(1, done + 1):
        row: Row = {"step": step, "time_utc": stamp(seconds(step, total)), "session": session(step, total)}
        row |= {
            "loss": train_loss(step, total, noise),
            "grad_norm": grad_norm(step, total, noise),
            "clip": 1.0,
        }
        row |= {"lr": 3e-4, "step_s": STEP_S, "wait_s": 0.0, "verdict": "go"}
        yield row | ({"injected": True} if onset <= step < onset + 5 else {})


def event(name: str, step: int, config: RunConfig, message: str, **more: Any) -> Row:
    total = config.training.total_steps
    where = {"time_utc": stamp(seconds(step, total)), "event": name, "step": step}
    return {**where, "session": session(step, total), **more, "message": message}


def events(config: RunConfig, done: int) -> list[Row]:
    total = config.training.total_steps
    onset = spiked_at(total)
    found = [event("start", 0, config, "run starts")]
    found += [
        event("checkpoint", s, config, f"checkpoint step-{s:09d}", seconds=1.5)
        for s in range(config.checkpoint.every, total, config.checkpoint.every)
    ]
    for number, step in enumerate(resumed_at(total), 2):
        found.append(event("signal", step, config, "stopped by SIGTERM; relaunch the same command to go on"))
        again = event("resume", step, config, f"goes on from step-{step:09d}")
        found.append(again | {"session": number, "time_utc": stamp(seconds(step, total) + 600)})
    found.append(event("inject", onset - 1, config, "a spike is injected", first_step=onset - 1, steps=5))
    told = {"onset": onset, "loss_before": 3.2, "grad_norm_before": 0.37, "injected": True}
    peaks = {
        "peak_loss": 5.3,
        "peak_loss_step": onset,
        "peak_grad_norm": 18.4,
        "peak_grad_norm_step": onset + 1,
    }
    found.append(event("spike", onset, config, "the loss jumps", loss=5.3, grad_norm=18.4, **told))
    ended = {"end": onset + 160, "recovered": onset + 130, "policy": "clip"}
    found.append(event("spike_end", onset + 160, config, "the spike is over", **told, **peaks, **ended))
    found.append(event("finish", total, config, f"finished: {total:,} steps"))
    return sorted((e for e in found if e["step"] <= done), key=lambda e: e["time_utc"])


def samples(config: RunConfig, done: int) -> Iterator[Row]:
    every = config.evaluation.every
    for step in range(0, done + 1, every):
        for number, prompt in enumerate(PROMPTS):
            text = SAID[min(len(SAID) - 1, step * len(SAID) // (config.training.total_steps + 1))]
            said = {"prompt": prompt, "text": text * (1 + 9 * (number == 1)), "temperature": 0.8}
            yield {"step": step, "tokens": step * BATCH, "time_utc": stamp(step * STEP_S)} | said


GATE = (
    "This will start 1x A100 80GB on RunPod secure at $1.19/h (live price, 07:55Z), run about 1.3 h for 1.6 "
    "B tokens (327,680 tokens/s, measured) = $1.59, + disk $0.06 + tax/reserve $0.66 = $2.31 of your $35.00 "
    "ceiling; $32.69 buffer."
)


def ledger(config: RunConfig, done: int) -> list[Row]:
    total = config.training.total_steps
    hours = seconds(done, total) / 3600
    said = {
        "verdict": "passed",
        "usd_per_hr": "1.19",
        "hours": "1.333",
        "total_usd": "2.31",
        "ceiling_usd": "35.00",
    }
    rented = {"tag": "x1-a", "provider": "runpod", "usd_per_hr": "1.19"}
    rows: list[Row] = [
        {"event": "gate", **said, "message": GATE},
        {"event": "intent", **rented, "message": "launch 1x A100 80GB"},
        {"event": "launched", "tag": "x1-a", "machine_id": "pod-1"},
        {"event": "poll", "tag": "x1-a", "machine_id": "pod-1", "spent_usd": f"{hours * 1.19:.6f}",
         "machine_usd": f"{hours * 1.19:.6f}", "usd_per_hr": "1.19", "source": "metered"},
    ]  # fmt: skip
    at = [-60.0, -30.0, -10.0, seconds(done, total)]
    if done == total:
        rows.append(
            {
                "event": "terminate_confirmed",
                "tag": "x1-a",
                "machine_id": "pod-1",
                "message": "seen to be gone",
            }
        )
        at.append(seconds(done, total) + 30)
    return [{"seq": n, "time_utc": stamp(at[n - 1]), **row} for n, row in enumerate(rows, 1)]


# ------------------------------------------------------------------------------------------------------------


def write(file: Path, rows: Iterator[Row] | list[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
