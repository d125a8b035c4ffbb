"""What is written and said of a run before its first step: records, config, manifest, who it is."""

from __future__ import annotations

import json
from typing import Any

import torch

from x1_pretrain import config as cfg
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import to_yaml
from x1_pretrain.errors import UserError
from x1_pretrain.model.flops import parameter_counts
from x1_pretrain.records import run_manifest
from x1_pretrain.records.formats import of_run
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.records.mirror_state import go_on_without
from x1_pretrain.runtime import assemble
from x1_pretrain.runtime.run import Run
from x1_pretrain.runtime.session import link_checkpoints, open_records, write_atomically


def open_folder(run: Run) -> None:
    """The records, the resolved config, and the first event: where this session goes on from."""
    session, config = run.session, run.config
    try:
        if run.config.mirror.uri is None:  # else its process says that the folder is no copy any more
            go_on_without(config.folder)
        run.records = open_records(config.folder, config.log.blocks, run.screen.say)
    except OSError as error:
        raise UserError(f"{error.filename or config.folder}: can't be written ({error.strerror})") from None
    write_atomically(config.folder / "config.yaml", to_yaml(without_secrets(config)))
    link_checkpoints(config)
    run.screen.say(introduction(run))
    for note in dict.fromkeys(lock.note for lock in session.locks if lock.note):
        run.event("lock", f"  {note}")
    for path, reason in session.skipped:
        run.event("skipped_checkpoint", f"skipped {path}: {reason}", path=str(path))
    every = config.log.every
    if session.branching:
        parent = session.parent or {}
        told = f"branches from {session.checkpoint}, step {run.step} of run {parent.get('run_id')}"
        past = {"jumps": session.past.jumps, "injected": session.past.injected}
        run.event("branch", f"run {session.run_id} {told}", **parent, **past)
    if session.checkpoint is None or session.branching:
        run.event("start", f"run {session.run_id} starts in {config.folder}", log_every=every)
        return
    redone = f"; {session.superseded_rows} rows of later steps set aside" if session.superseded_rows else ""
    run.event("resume", f"run {session.run_id} goes on from {session.checkpoint}{redone}", log_every=every)


def write_again(run: Run) -> None:
    """Someone removed the run folder while the run goes on: what is known of it is written again."""
    assert run.records is not None
    folder = run.config.folder
    run.records.restore()
    write_atomically(folder / "config.yaml", to_yaml(without_secrets(run.config)))
    write_atomically(folder / "manifest.json", json.dumps(manifest(run), indent=1) + "\n")
    said = f"{folder} was deleted while the run goes on: records, config and manifest are written again"
    run.event("deleted", f"{said}; a checkpoint is saved now, earlier ones are lost if they were there")


def without_secrets(config: RunConfig) -> RunConfig:
    """Others read the run folder, and its mirror; a resume takes the addresses from its command."""
    public = run_manifest.without_passwords
    sections: dict[str, Any] = {}
    if config.budget.curr_cost_uri:
        uri = public(config.budget.curr_cost_uri)
        sections["budget"] = config.budget.model_copy(update={"curr_cost_uri": uri})
    if config.mlflow.uri:
        sections["mlflow"] = config.mlflow.model_copy(update={"uri": public(config.mlflow.uri)})
    return config.model_copy(update=sections)


def introduction(run: Run) -> str:
    """What the run is, in exact numbers, each with what it counts."""
    config, counts, flops = run.config, parameter_counts(run.config.model), run.flops
    model, training = config.model, config.training
    epochs = ", ".join(f"{e:.2f} epochs of {n}" for n, e in zip(run.corpora, run.order.epochs(), strict=True))
    total = training.total_steps * training.batch_tokens
    size = (
        f"{config.name}: {counts.matrices:,} parameters in matrices + {counts.norms:,} in norms + "
        f"{counts.embedding:,} in embeddings = {counts.total:,}"
    )
    length = (
        f"  a step: {config.batch_blocks} blocks x {model.context:,} = {training.batch_tokens:,} tokens; "
        f"the run: {training.total_steps:,} steps = {total:,} tokens = {epochs}"
    )
    work = (
        f"  training FLOPs per token: {flops.six_n:.3e} (6N, no embeddings), {flops.palm:.3e} (PaLM: with "
        f"the output matrix, attention not halved), {flops.causal:.3e} (causal: the true work)"
    )
    return "\n".join((size, length, work))


def written_before(run: Run) -> dict[str, Any]:
    """The manifest of this run's session before; {} for the first one, or if someone damaged it."""
    try:
        earlier = json.loads((run.config.folder / "manifest.json").read_text(encoding="utf-8"))
        return dict(earlier) if earlier["run_id"] == run.session.run_id else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def manifest(run: Run) -> dict[str, Any]:
    """`manifest.json` of the run folder."""
    earlier = written_before(run)
    config, counts, flops = run.config, parameter_counts(run.config.model), run.flops
    mixture = config.data.mixture()
    fingerprints = [c.fingerprint for c in run.corpora.values()]
    return {
        "schema_version": 1,
        "kind": "run",
        "formats": of_run(earlier),
        "run_id": run.session.run_id,
        "name": config.name,
        "created_utc": earlier.get("created_utc") or utc_now(),
        "updated_utc": utc_now(),
        "session": run.session.number,
        "argv": run_manifest.argv(),
        **run_manifest.source_state(),
        "seed": config.seed,
        "config_hash": cfg.config_hash(config, fingerprints),
        "versions": {**run_manifest.versions(), "cuda": torch.version.cuda},
        "hardware": assemble.hardware(run.world),
        "data": [
            {
                "name": name,
                "dir": str(corpus.path),
                "fingerprint": corpus.fingerprint,
                "train_tokens": len(corpus.train),
                "val_tokens": len(corpus.val),
                "weight": mixture[name].weight,
            }
            for name, corpus in run.corpora.items()
        ],
        "parameters": {
            "non_embedding": counts.matrices,
            "norms": counts.norms,
            "embedding": counts.embedding,
            "total": counts.total,
        },
        "flops_per_token": {"6N": flops.six_n, "palm": flops.palm, "causal": flops.causal},
        "tokens_per_step": config.training.batch_tokens,
        "total_steps": config.training.total_steps,
        "parent": run.session.parent,
        "precision": run.machine.precision,
        "attention": run.machine.attention.removeprefix("attention: "),
        "compile": run.machine.compile_mode,
        "micro_batch": run.machine.micro_batch,
        "peak_flops": run.machine.peak_flops_per_sec,
        "spent_usd": str(round(run.guard.spent_usd, 4)) if run.guard and run.guard.spent_usd else None,
    }
