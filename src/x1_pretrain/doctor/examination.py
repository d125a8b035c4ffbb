"""Everything that is measured, in order, each within its share of the time. Judges nothing.

The time is shared out from the back: a check gets its own limit or what is left, and the dry run, which the
estimate rests on, gets the rest but never less than a third of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from x1_pretrain.config import RunConfig
from x1_pretrain.doctor import all_reduce, clock, disk, gpu, machine, mirror, services, trial
from x1_pretrain.doctor.all_reduce import Attempt
from x1_pretrain.doctor.disk import Disk
from x1_pretrain.doctor.machine import Host
from x1_pretrain.doctor.mirror import Visit
from x1_pretrain.doctor.services import Alerts, Budget, Store
from x1_pretrain.doctor.trial import Facts, Trial
from x1_pretrain.errors import UserError
from x1_pretrain.model.flops import GPT2_VOCABULARY

# Seconds at most, of a whole of 115; a shorter whole shrinks them alike.
WHOLE_S = 115.0
COMPUTE_S, DISK_S, DATA_S, MLFLOW_S, MIRROR_S = 35.0, 7.0, 20.0, 15.0, 25.0
GPU_S = 3.0  # more for each GPU after the first
STEP_LEAST = 0.35  # of the whole
HANG_S = 90.0  # for finding settings that work, once an all-reduce hangs


@dataclass(frozen=True)
class Options:
    """What was asked for. `gpus` None: all that are there, one process where there are none."""

    config: RunConfig | None
    data_dir: str | None
    folder: Path  # where checkpoints will go
    gpus: int | None
    device: str
    alerts: bool
    full_hash: bool
    offline: bool
    limit_s: float
    dated_files: tuple[Path, ...]  # known to exist before now
    environment: Mapping[str, str]
    mirror: str | None = None  # where copies go, without a config


@dataclass
class Examined:
    """All facts. A check that does not apply leaves its field as it is."""

    host: Host
    driver: gpu.Driver | None
    compute: Trial = field(default_factory=Trial)
    disk: Disk | None = None
    data: Trial | None = None
    alerts: Alerts = field(default_factory=Alerts)
    store: Store | None = None
    mlflow: Trial | None = None
    budget: Budget | None = None
    mirror: Visit | None = None
    step: Trial | None = None
    attempts: list[Attempt] = field(default_factory=list)
    ranks: int = 1  # processes of the run
    cuda: bool = False  # the run computes on GPUs
    drift: tuple[float, float] = (0.0, 0.0)  # seconds of it, over seconds
    ahead: tuple[float, str] | None = None
    behind_file: tuple[float, str] | None = None

    @property
    def devices(self) -> Facts:
        return self.compute.part("devices")

    @property
    def vocab(self) -> int | None:
        """Of the corpora, where they opened."""
        opened = self.data.part("open").get("corpora", []) if self.data else []
        return max((corpus["vocab_size"] for corpus in opened), default=None)


def examine(options: Options, say: Callable[[str], None]) -> Examined:
    """Look at all of it."""
    begun, scale = time.monotonic(), min(1.0, options.limit_s / WHOLE_S)
    watch = clock.now()
    say("the machine")
    found = Examined(machine.look(environment=options.environment), gpu.look())
    say("torch, and how fast it computes here")
    shown = len(found.driver.cards) if found.driver else 0
    found.compute = compute(options, (COMPUTE_S + GPU_S * max(0, shown - 1)) * scale)
    seen = int(found.devices.get("count", 0))
    found.cuda = options.device != "cpu" and seen > 0
    found.ranks = options.gpus or max(1, seen)
    say(f"the disk of {options.folder}")
    found.disk = disk.look(options.folder, DISK_S * scale)
    talk(options, found, say, scale)
    if options.mirror or (options.config and options.config.mirror.uri):
        say("the mirror")
        found.mirror = mirror.look(
            options.config, options.mirror, options.folder, MIRROR_S * scale, options.environment
        )
    if options.config or options.data_dir:
        say("the data")
        found.data = data(options, found.ranks, DATA_S * scale)
    if options.config:
        left_s = options.limit_s - (time.monotonic() - begun)
        left_s -= 20.0 * scale if found.ranks > 1 else 0.0  # for the all-reduce, where it works
        say("a dry run at the final shape")
        found.step = step(options, found, max(left_s, STEP_LEAST * options.limit_s), say)
    reduce(options, found, say)
    found.drift = watch.drift_s(later := clock.now()), later.monotonic - watch.monotonic
    return found


def compute(options: Options, limit_s: float) -> Trial:
    config = options.config
    task = {
        "device": options.device,
        "gpus": options.gpus or 64,
        "products": products(config) if config else [],
        "attention": config.training.attention if config else "auto",
    }
    return trial.run("x1_pretrain.doctor.compute_trial", task, limit_s, options.environment)


def products(config: RunConfig) -> list[list[Any]]:
    """The model's matrix products as [name, columns out, columns in]."""
    model = config.model
    width = (model.heads + 2 * model.kv_heads) * model.head_size
    vocab = model.vocab_size or GPT2_VOCABULARY
    return [
        ["qkv", width, model.d_model],
        ["mlp up", model.d_ff, model.d_model],
        ["mlp down", model.d_model, model.d_ff],
        ["output", vocab, model.d_model],
    ]


def talk(options: Options, found: Examined, say: Callable[[str], None], scale: float) -> None:
    """Clock, alerts, budget file, MLflow."""
    say("the clock, alerts, MLflow")
    found.ahead = None if options.offline else clock.ahead_s()
    newest = clock.newest([*options.dated_files, *(_corpus_files(options))])
    if newest:
        found.behind_file = newest[0] - time.time(), str(newest[1])
    found.alerts = services.alerts(options.environment, options.alerts)
    if options.config is None:
        return
    found.budget = services.budget(options.config, datetime.now(UTC))
    found.store = store = services.store(options.config)
    if store and store.installed and store.writable and (store.file is None or store.file.exists()):
        task = {"uri": options.config.mlflow.uri}
        found.mlflow = trial.run(
            "x1_pretrain.doctor.mlflow_trial", task, MLFLOW_S * scale, options.environment
        )


def _corpus_files(options: Options) -> list[Path]:
    config = options.config
    folders = [c.dir for c in config.data.mixture().values()] if config else []
    return [Path(folder) / "manifest.json" for folder in folders]


def data(options: Options, ranks: int, limit_s: float) -> Trial:
    task = {
        "config": options.config.model_dump(mode="json") if options.config else None,
        "folders": {Path(options.data_dir).name: options.data_dir} if options.data_dir else {},
        "gpus": ranks,
        "limit_s": limit_s,
        "full_hash": options.full_hash,
    }
    limit_s = 3600.0 if options.full_hash else limit_s
    return trial.run("x1_pretrain.doctor.data_trial", task, limit_s, options.environment)


def step(options: Options, found: Examined, limit_s: float, say: Callable[[str], None]) -> Trial:
    """One rank's share of a step. Without data and without a vocabulary in the config: GPT-2's."""
    assert options.config is not None
    config = options.config
    vocab = config.model.vocab_size or found.vocab or GPT2_VOCABULARY
    try:
        share = config.blocks_per_rank(found.ranks) * config.model.context
    except UserError as error:
        return Trial({"refused": {"message": str(error)}})
    tree = config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab}),
            "training": config.training.model_copy(update={"batch_tokens": share}),
        }
    ).model_dump(mode="json")
    task = {"config": tree, "device": "cuda" if found.cuda else "cpu", "limit_s": 0.9 * limit_s}
    return trial.run(
        "x1_pretrain.doctor.step_trial",
        task,
        limit_s,
        options.environment,
        lambda part: say(f"a dry run at the final shape: {part} done"),
    )


def reduce(options: Options, found: Examined, say: Callable[[str], None]) -> None:
    """Between the ranks of the run, where there are several and each has a device."""
    seen = int(found.devices.get("count", 0))
    if found.ranks < 2 or "version" not in found.compute.part("torch") or (found.cuda and seen < found.ranks):
        return
    if not found.cuda and options.device != "cpu":
        return  # GPUs were asked for and are not there: said elsewhere
    backend, safe = ("nccl", all_reduce.SAFE_NCCL) if found.cuda else ("gloo", all_reduce.SAFE_GLOO)
    say(f"an all-reduce between {found.ranks} ranks")
    found.attempts = all_reduce.search(
        all_reduce.worker(backend),
        found.ranks,
        safe,
        time.monotonic() + HANG_S,
        say=lambda settings: say(f"the all-reduce did not work; trying {settings}"),
        environment=options.environment,
    )
