"""Is it written down what made the run, and does that hold?"""

from __future__ import annotations

from collections.abc import Iterable

from x1_pretrain.config import config_hash
from x1_pretrain.records.run_folder import Run
from x1_pretrain.review.check import Check, judged

# What the manifest must say. Those in NULLABLE may be null: known, and absent.
MANIFEST_KEYS = (
    *("schema_version", "kind", "run_id", "name", "created_utc", "argv", "commit", "dirty", "seed"),
    *("config_hash", "versions", "hardware", "data", "parameters", "flops_per_token", "tokens_per_step"),
    *("total_steps", "precision", "attention", "compile", "peak_flops", "spent_usd"),
)
NULLABLE = {"commit", "dirty", "peak_flops", "spent_usd"}
VERSION_KEYS = ("python", "torch", "cuda", "flash_attn", "transformers", "numpy", "x1_pretrain")
HARDWARE_KEYS = ("device", "count", "world_size", "cpu", "cores", "ram_gib")  # a GPU: also its memory
DATA_KEYS = ("name", "dir", "fingerprint", "train_tokens", "val_tokens", "weight")


def manifest_complete(run: Run) -> Check:
    missing = _lacking(run.manifest, MANIFEST_KEYS, "")
    missing += [
        f"{key} is null" for key in MANIFEST_KEYS if key not in NULLABLE and run.manifest.get(key, 0) is None
    ]
    missing += _lacking(run.manifest.get("versions"), VERSION_KEYS, "versions.")
    hardware = run.manifest.get("hardware")
    gpu = isinstance(hardware, dict) and hardware.get("device") != "cpu"
    missing += _lacking(hardware, (*HARDWARE_KEYS, *(("gpu_memory_gib",) if gpu else ())), "hardware.")
    for number, corpus in enumerate(run.manifest.get("data") or []):
        missing += _lacking(corpus, DATA_KEYS, f"data[{number}].")
    return judged("manifest complete", missing, f"all {len(MANIFEST_KEYS)} keys, versions, hardware and data")


def _lacking(tree: object, keys: Iterable[str], prefix: str) -> list[str]:
    present = tree if isinstance(tree, dict) else {}
    return [f"{prefix}{key} is missing" for key in keys if key not in present]


def config_is_the_recorded(run: Run) -> Check:
    """The hash in the manifest must come out again, from config.yaml and the recorded data fingerprints."""
    data = [corpus for corpus in run.manifest.get("data") or [] if isinstance(corpus, dict)]
    fingerprints = [str(corpus.get("fingerprint")) for corpus in data]
    now, recorded = config_hash(run.config, fingerprints)[:12], str(run.manifest.get("config_hash"))[:12]
    problems = []
    if now != recorded:
        problems.append(f"config.yaml and the data fingerprints hash to {now}, manifest.json says {recorded}")
    for key, value in (("seed", run.config.seed), ("tokens_per_step", run.config.training.batch_tokens)):
        if run.manifest.get(key) != value:
            problems.append(f"{key}: manifest.json says {run.manifest.get(key)}, config.yaml {value}")
    evidence = f"hash {now} over config.yaml and {len(data)} data fingerprint(s)"
    return judged("config is the recorded one", problems, evidence)
