"""What a trainer and its mirror, a process of its own, say to each other: one JSON object a line.

The trainer writes `Job` and then orders into the mirror's standard input; the mirror writes what happens to
its standard output. When the input ends without an order to drain, the trainer is gone.

    orders      {"do": "publish", "run_id": "...", "from_step": 1800, "fingerprints": [], "step_fields": {}}
                                                           from here on the folder is the run's
                {"do": "drain", "within_s": 40.0, "why": "finished"}
    happenings  {"is": "status", ...Status}                at every look, at least every few seconds
                {"is": "opened", ...Opened}                after the first status, or:
                {"is": "refused", "message": "...", "exit_code": 78, "held": false}   held: by another writer
                {"is": "progress", "text": "..."}          one line that replaces the one before
                {"is": "event", "name": "mirror", "message": "...", "fields": {...}}
                {"is": "lost", "message": "..."}           another writer has the run
                {"is": "drained", "left": ["checkpoint of step 1800", ...]}    last
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from x1_pretrain import config as cfg
from x1_pretrain.config import RunConfig


@dataclass(frozen=True)
class Job:
    """A run and its mirror."""

    name: str  # of the run in the mirror
    folder: str  # the run folder
    checkpoints: str  # the checkpoint folder
    uri: str
    endpoint: str | None = None
    every_s: float = 15.0
    data: bool = False
    max_mb_per_s: float | None = None
    stale_s: float = 90.0
    without_lease: bool = False
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    keep_at: list[int] = field(default_factory=list)
    must_exist: bool = False  # --resume-from: a mirror without the run is refused
    fresh: bool = False  # --fresh: a mirror with the run is refused
    goes_on: bool = False  # in the middle of training: the mirror before it ended, nothing may be restored
    unattended: bool = (
        False  # nobody tries again: a store that is away is waited for, as is a holder that may die
    )
    run_id: str | None = None  # of the run folder, if it has one
    step_fields: dict[str, Any] = field(default_factory=dict)  # of the config, before the corpora are open
    corpora: dict[str, str] = field(default_factory=dict)  # name -> folder


def of_config(config: RunConfig, folder: Path, checkpoints: Path, uri: str, **more: Any) -> Job:
    """Of the run that a config describes; `more` are fields of the job."""
    keep = config.checkpoint
    return Job(
        name=config.name,
        folder=str(folder),
        checkpoints=str(checkpoints),
        uri=uri,
        stale_s=config.mirror.stale_s,
        without_lease=config.mirror.without_lease,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        keep_best=keep.keep_best,
        keep_at=list(keep.at),
        step_fields=cfg.step_fields(config),
        corpora={name: one.dir for name, one in config.data.mixture().items()},
        **more,
    )


@dataclass(frozen=True)
class Opened:
    """What the mirror found, and what it put into the run folder."""

    label: str  # s3://bucket/runs/x1-50m
    epoch: int
    found: bool  # the run was there
    run_id: str = ""
    notes: list[str] = field(
        default_factory=list
    )  # lines for the screen and events: skipped, taken over, ...
    lost: list[str] = field(default_factory=list)  # record files of which the mirror lacks rows
    restored_step: int | None = None  # a checkpoint was fetched
    restored_bytes: int = 0
    restored_s: float = 0.0
    moved_from: str | None = None  # the writer before, on another machine
    down_s: float | None = None  # since its last beat, by the store's clock
    last_step: int | None = None  # that the writer before published a row of (head.status) ...
    last_spent_usd: float | None = None  # ... and what the run had cost by then


@dataclass(frozen=True)
class Status:
    """How far behind the mirror is."""

    lag_s: float = 0.0  # age of the oldest thing that is not mirrored yet
    lag_bytes: int = 0
    mirrored: list[int] = field(default_factory=list)  # steps of the checkpoints it has
    held_bytes: int = 0  # of the run, by its head: checkpoints, records, small files and corpora
    trouble: str = ""  # why nothing can be sent now
    sent_bytes: int = 0  # of this session
