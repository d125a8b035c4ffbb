"""What a run is, on one page: strict models, and the hash of what decides a step. No torch.

A config is a YAML file of these sections. `--set section.field=value` overrides any field. Unknown keys and
wrong types are refused by name, before anything is spent.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from x1_pretrain.errors import UserError

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(ge=0)]

DECAY_SHARE = 0.2  # of a wsd run
INJECTED_STEPS = 5  # batches that one injection replaces


class Section(BaseModel):
    """Strict and frozen: no unknown keys, no silent conversions, no later edits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The decoder. Plain = Hugging Face `LlamaForCausalLM`; with `qk_norm` = `Qwen3ForCausalLM`."""

    layers: Count
    d_model: Count
    heads: Count
    kv_heads: Count
    d_ff: Count
    context: Count = 1024  # tokens a sequence; also the length of a block of data
    vocab_size: Count | None = None  # none: the corpus says
    vocab_multiple: Count = 128  # padded in memory to this multiple; never on disk
    head_dim: Count | None = None  # none: d_model / heads
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5
    tied_embeddings: bool = True
    qk_norm: bool = False
    init_std: Positive = 0.02

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} is odd; rotary embedding needs pairs")
        return self

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def vocab(self) -> int:
        """The vocabulary on disk; only a resolved config has one."""
        if self.vocab_size is None:
            raise ValueError("the vocabulary is not resolved yet: open the corpus first")
        return self.vocab_size

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


class CorpusConfig(Section):
    """One corpus of the mixture."""

    dir: str
    weight: Positive = 1.0


class DataConfig(Section):
    """Either one corpus (`dir`) or a mixture (`corpora`, by name)."""

    dir: str | None = "/workspace/data/tokenized"
    corpora: dict[str, CorpusConfig] = {}

    def mixture(self) -> dict[str, CorpusConfig]:
        """The corpora by name, whichever way they were given."""
        if self.corpora:
            return dict(self.corpora)
        if self.dir is None:
            raise UserError("data: no corpus given; pass --data-dir DIR or set data.corpora in the config")
        return {Path(self.dir).name: CorpusConfig(dir=self.dir)}


class TrainingConfig(Section):
    """How much is trained, in what portions, and how the arithmetic is done."""

    total_steps: Count
    batch_tokens: Count = 524_288  # tokens a step over all ranks; micro-batch and accumulation are derived
    micro_batch: Count | Literal["auto"] = "auto"  # sequences on one device at a time
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the computation; the weights are always fp32
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    compile_timeout_s: Positive = 600.0
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    deterministic: bool = False
    z_loss: NonNegative = 0.0  # times the square of the log of the softmax's sum: keeps logits from drifting


class OptimizerConfig(Section):
    """AdamW with warm-up and decay; weight decay on matrices only."""

    lr: Positive = 3e-4
    min_lr: NonNegative = 3e-5
    warmup_steps: Steps = 1000
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay at the end
    decay_steps: Steps | None = None  # of wsd, up to the last update; none: 20 % of the run
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.schedule == "cosine" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps {self.decay_steps} belongs to schedule wsd, and the schedule is cosine, which "
                "decays from the warm-up to the end; set schedule to wsd or leave decay_steps out"
            )
        return self

    def decay(self, total_steps: int) -> int:
        """Updates of wsd's decay."""
        return round(DECAY_SHARE * total_steps) if self.decay_steps is None else self.decay_steps


class CheckpointConfig(Section):
    """When to save, where, and what to keep."""

    dir: str | None = None  # none: <run folder>/checkpoints
    every: Count = 1800
    keep_last: Annotated[int, Field(ge=2)] = 2  # two: a new one is trusted only after it verified
    keep_every: Count | None = None  # keep every checkpoint whose step is a multiple of this
    keep_best: Steps = 0  # keep so many of those with the lowest validation loss
    keep_local: Count | None = None  # of what is kept, so many here, once the mirror has them; none: all
    at: list[Count] = []  # also save at these steps, and keep those for good


class EvaluationConfig(Section):
    """Validation loss per domain, and what the model says."""

    every: Count = 1800
    tokens: Count = 1_048_576  # at most so many per domain
    prompts: list[str] = ["The tallest mountain in the world is", "Once upon a time", "In 1969,"]
    sample_tokens: Count = 48
    temperature: NonNegative = 0.8


class LogConfig(Section):
    every: Count = 10
    blocks: bool = False  # also write blocks.jsonl: which blocks each step (of the first rank) really read


class MlflowConfig(Section):
    uri: str | None = None
    experiment: str = "x1"


class BudgetConfig(Section):
    """What the run may cost, where to read what it has cost, and what the guard does about it."""

    cap_usd: Positive | None = None  # the ceiling; none: no guard
    curr_cost_uri: str | None = None  # budget.json: a path, file:// or http(s)://
    warn_usd: Positive | None = None  # none: 6/7 of the ceiling
    max_usd_per_hr: Positive | None = None  # a dearer machine is refused
    drift: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.2  # hourly spending above the agreed rate
    on_no_answer: Literal["stop", "continue"] = "stop"  # when nobody answers a drift ...
    answer_s: Positive = 1800.0  # ... for so long
    read_every_s: Positive = 1800.0
    alert_after_s: Positive = 660.0  # without a reading
    stop_after_s: Positive = 1800.0  # without a reading
    warmup_s: NonNegative = 600.0  # no stop on a projection before
    tokens_per_sec: Positive | None = None  # measured elsewhere: prices the run

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.cap_usd and self.warn_usd and self.warn_usd > self.cap_usd:
            raise ValueError(f"warn_usd {self.warn_usd} is above cap_usd {self.cap_usd}")
        return self


class StabilityConfig(Section):
    """Loss spikes: how they are noticed, and what is done about them."""

    # watch: say it; clip: also clip at the usual size of the gradient; skip: also leave out updates far above
    # it; rewind: also go back from a spike that stays, and jump over its batches
    policy: Literal["watch", "clip", "skip", "rewind"] = "clip"
    window: Annotated[int, Field(ge=16, le=1024)] = 128  # steps that the medians look back on
    alarm: Positive = 6.0  # deviations above the median that make a step a spike
    hard: Positive = 20.0  # ... that make policy skip leave the update out
    # steps a spike may stay before policy rewind goes back; after 64 it is the new normal
    patience: Annotated[int, Field(gt=0, lt=64)] = 20
    max_rewinds: Steps = 3
    inject_spike_at_step: Steps | None = None  # the batches of the five steps after it become rare tokens

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.hard < self.alarm:
            raise ValueError(f"hard {self.hard:g} is below alarm {self.alarm:g}")
        return self


class TelemetryConfig(Section):
    """What is measured beside the loss. None of it changes what is trained, but for rounding."""

    every: Count = 100  # steps between the dearer looks: norms by layer, activations, attention logits
    noise_scale: Literal["off", "on", "groups"] = "on"
    host_every_s: Positive = 30.0  # between looks at the machine's health
    min_pace: Share = (
        0.7  # of the planned speed, or of its own usual one, below which the run says why; 0: never
    )
    leak_gib: Positive = 0.1  # steady growth of memory from which on it is called a leak
    hot_c: Positive = 85.0  # of the GPU
    steal_share: Share = 0.1  # of the CPU, that the host gives to others
    low_ram_share: Share = 0.05  # of the RAM, still available
    low_disk_gib: NonNegative = (
        2.0  # free where the run or its checkpoints are written, or two checkpoints' size
    )


class WatchdogConfig(Section):
    """How long a phase may last without progress before the run is taken for hung and ends with 75."""

    enabled: bool = True
    first_step_s: Positive = 3600.0  # from the start to the end of the first step: compiling
    step_s: Positive = 600.0
    data_s: Positive = 300.0
    evaluation_s: Positive = 1800.0
    checkpoint_s: Positive = 1800.0
    save_s: Positive = (
        120.0  # for the alert and the checkpoint of a run that hangs; then it ends with or without
    )


class MirrorConfig(Section):
    """Copies of the run off its machine. `mirror: s3://bucket/runs` in a config is short for its `uri`."""

    # a folder of runs: s3://, gs://, az://, hf:// or a path; none: no mirror
    uri: Annotated[str, Field(min_length=1)] | None = None
    endpoint: str | None = None  # of a store that speaks S3: R2, B2, MinIO
    every_s: Positive = 15.0  # between two looks at what is new
    data: bool = False  # the corpora too
    max_mb_per_s: Positive | None = None  # of what is sent
    stale_s: Annotated[float, Field(ge=3, allow_inf_nan=False)] = (
        90.0  # a silent writer is gone after so long
    )
    grace_s: Positive = 40.0  # after SIGTERM, for what is not mirrored yet
    without_lease: bool = False  # also in a store that can't keep two writers apart
    storage_usd_per_gib_month: NonNegative | None = None  # none: the list price of the store
    egress_usd_per_gib: NonNegative | None = None  # none: the list price


class VerifyConfig(Section):
    """What `x1 verify` holds the finished run against."""

    loss_band: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None  # [low, high]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.loss_band and not self.loss_band[0] <= self.loss_band[1]:
            raise ValueError(f"loss_band {self.loss_band}: the first number is the lower end")
        return self


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    run_dir: str | None = None  # none: runs/<name>
    model: ModelConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    mlflow: MlflowConfig = MlflowConfig()
    budget: BudgetConfig = BudgetConfig()
    stability: StabilityConfig = StabilityConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    mirror: MirrorConfig = MirrorConfig()
    verify: VerifyConfig = VerifyConfig()

    @model_validator(mode="before")
    @classmethod
    def _short_mirror(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("mirror"), str):
            return {**tree, "mirror": {"uri": tree["mirror"]}}
        return tree

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.training.batch_tokens % self.model.context:
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens} is not a multiple of model.context "
                f"{self.model.context}; the nearest is {self._nearest_batch()}"
            )
        if self.optimizer.warmup_steps > self.training.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than "
                f"training.total_steps {self.training.total_steps}"
            )
        self._decay_fits()
        self._injection_fits()
        if self.mirror.uri and self.name in ("data", "trash"):
            raise ValueError(f"name {self.name}: a mirror has a folder of that name; give the run another")
        if late := [step for step in self.checkpoint.at if step > self.training.total_steps]:
            raise ValueError(
                f"checkpoint.at {late[0]} is after the end, training.total_steps {self.training.total_steps}"
            )
        return self

    def _decay_fits(self) -> None:
        optimizer, total = self.optimizer, self.training.total_steps
        decay = optimizer.decay(total)
        if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay > total:
            raise ValueError(
                f"optimizer.warmup_steps {optimizer.warmup_steps} + {decay} of decay (optimizer.decay_steps) "
                f"are more than training.total_steps {total}"
            )

    def _injection_fits(self) -> None:
        wanted, total = self.stability.inject_spike_at_step, self.training.total_steps
        if wanted is not None and wanted + INJECTED_STEPS > total:
            raise ValueError(
                f"stability.inject_spike_at_step {wanted}: the {INJECTED_STEPS} steps after it must lie "
                f"within training.total_steps {total}"
            )

    def _nearest_batch(self) -> int:
        return max(1, round(self.training.batch_tokens / self.model.context)) * self.model.context

    @property
    def batch_blocks(self) -> int:
        """Blocks (sequences of `context` tokens) in one step, over all ranks."""
        return self.training.batch_tokens // self.model.context

    def blocks_per_rank(self, ranks: int) -> int:
        """Those of a step that one of so many computes."""
        blocks, rest = divmod(self.batch_blocks, ranks)
        if rest:
            raise UserError(
                f"training.batch_tokens {self.training.batch_tokens} is {self.batch_blocks} blocks of "
                f"{self.model.context}, which {ranks} ranks can't share evenly"
            )
        return blocks

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.checkpoint.dir) if self.checkpoint.dir else self.folder / "checkpoints"


# Fields that may change when a run resumes: they do not change what a step computes. Everything else is the
# run. Where the data lie may change; what they hold may not: the corpus fingerprints are part of the hash.
HARMLESS = (
    "name",
    "run_dir",
    "model.vocab_multiple",
    "data.dir",
    "data.corpora.*.dir",
    "training.micro_batch",
    "training.compile",
    "training.compile_timeout_s",
    "training.attention",
    "training.deterministic",
    "checkpoint.",
    "evaluation.",
    "log.",
    "mlflow.",
    "budget.",
    "stability.inject_spike_at_step",  # only ahead of where the run is: see session.injections
    "telemetry.",
    "watchdog.",
    "mirror.",
    "verify.",
)


# Fields that came later. At these values a step is what it was before them, so they are left out of the hash:
# an older run is still itself.
ADDED: dict[str, Any] = {
    "optimizer.schedule": "cosine",
    "optimizer.decay_steps": None,
    "training.z_loss": 0.0,
    "stability.policy": "watch",
    "stability.window": 128,
    "stability.alarm": 6.0,
    "stability.hard": 20.0,
    "stability.patience": 20,
    "stability.max_rewinds": 3,
}


def _is_harmless(path: str) -> bool:
    starred = re.sub(r"^(data\.corpora\.).+(\.[^.]+)$", r"\1*\2", path)
    return any(starred.startswith(h) if h.endswith(".") else starred == h for h in HARMLESS)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def step_fields(config: RunConfig) -> dict[str, Any]:
    """The fields that decide what a step computes, flat."""
    return {
        path: value
        for path, value in flatten(config.model_dump()).items()
        if not _is_harmless(path) and not (path in ADDED and value == ADDED[path])
    }


def config_hash(config: RunConfig, fingerprints: Iterable[str]) -> str:
    """One hash over all that decides a step: those fields, and the content of the corpora in their order."""
    canonical = json.dumps([step_fields(config), list(fingerprints)], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`field: before -> after` for each step-deciding field that differs."""
    was, now = ({**ADDED, **fields} for fields in (before, after))
    missing = "(absent)"
    return [
        f"{path}: {was.get(path, missing)} -> {now.get(path, missing)}"
        for path in sorted(was.keys() | now.keys())
        if was.get(path, missing) != now.get(path, missing)
    ]
