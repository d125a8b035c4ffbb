"""A branch: a new run that begins with the past of another, where its own would have been the same.

So one trunk with a stable learning rate serves runs of many lengths, each with a decay of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from x1_pretrain import config as cfg
from x1_pretrain.config import OptimizerConfig, RunConfig
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.learning.schedule import first_difference
from x1_pretrain.records import checkpoint_files
from x1_pretrain.runtime import checkpoint
from x1_pretrain.runtime.checkpoint import RunState

# Fields that only set the learning rate may differ: the rates themselves are compared, update by update.
SCHEDULE = (
    "training.total_steps",
    *(f"optimizer.{name}" for name in ("schedule", "decay_steps", "lr", "min_lr", "warmup_steps")),
)


def read_parent(config: RunConfig, corpora: Mapping[str, Corpus], given: Path) -> RunState:
    """The state that a branch begins with, from the checkpoint folder `given`."""
    found = given.resolve()  # also through `latest`
    problem = "no such folder" if not found.is_dir() else checkpoint_files.verify_folder(found)
    if problem:
        raise UserError(
            f"--branch-from {given}: {problem}; expected a checkpoint folder, such as "
            f"runs/NAME/checkpoints/{checkpoint_files.folder_name(1800)}"
        )
    state = checkpoint.read_state(found)
    if problems := unlike(config, [c.fingerprint for c in corpora.values()], state):
        raise RefusedError(
            f"--branch-from {given}: this run would not have come by it ({'; '.join(problems)}); put these "
            "back, take an earlier checkpoint, or start a run of its own without --branch-from"
        )
    parent: dict[str, Any] = {"run_id": state.run_id, "step": state.step, "checkpoint": str(found)}
    parent["trunk"] = (state.parent or parent).get("trunk", state.run_id)  # also of a branch of a branch
    return replace(state, elapsed_s=0.0, parent=parent)  # the time until here was the parent's


def unlike(config: RunConfig, fingerprints: list[str], state: RunState) -> list[str]:
    """What of the past in `state` would not be this run's own; each in a few words."""
    total = config.training.total_steps
    problems = cfg.changed_fields(_unscheduled(state.step_fields), _unscheduled(cfg.step_fields(config)))
    if state.fingerprints != fingerprints:
        problems.append(f"content of the corpora: {short(state.fingerprints)} -> {short(fingerprints)}")
    before = (optimizer_of(state.step_fields), state.step_fields["training.total_steps"])
    differs = first_difference(state.step, before, (config.optimizer, total))
    if differs is not None:
        problems.append(f"the learning rate of update {differs} of the {state.step} before it is another")
    if state.step >= total:
        problems.append(f"it is of step {state.step}, and training.total_steps is {total}")
    return problems


def _unscheduled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in fields.items() if path not in SCHEDULE}


def optimizer_of(fields: Mapping[str, Any]) -> OptimizerConfig:
    """The optimizer's section in the flat fields of a state; fields that came later have their defaults."""
    own = {path.removeprefix("optimizer."): v for path, v in fields.items() if path.startswith("optimizer.")}
    return OptimizerConfig(**own)


def short(fingerprints: list[str]) -> str:
    return "+".join(f[:12] for f in fingerprints)
