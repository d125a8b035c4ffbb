"""Opening a run: all that must be true before the first step, checked before any compute is spent.

A run folder has one writer at a time. The same command starts a run and resumes it: from the newest
checkpoint that verifies, never silently from zero, and never with a config that would change what a step is.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from x1_pretrain import config as cfg
from x1_pretrain.config import RunConfig
from x1_pretrain.corpus.order import Order, Source, block_count
from x1_pretrain.corpus.shards import Corpus, open_corpus
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.records.metrics import JsonLines, read_rows, rewind
from x1_pretrain.runtime import checkpoint, checkpoint_files
from x1_pretrain.runtime.branch import read_parent, short
from x1_pretrain.runtime.checkpoint import RunState

STEP_FILES = (
    "metrics.jsonl",
    "samples.jsonl",
    "blocks.jsonl",
)  # rows carry a step, and go back with a resume


# ------------------------------------------------------------------------------------------------------------
# Data


def open_corpora(config: RunConfig) -> dict[str, Corpus]:
    """The corpora of the mixture, by name; each checked to be usable by this model."""
    corpora = {name: open_corpus(Path(c.dir), name) for name, c in config.data.mixture().items()}
    tokenizers = {c.manifest.tokenizer.sha256 for c in corpora.values()}
    if len(tokenizers) > 1:
        raise UserError(
            f"data: the corpora {', '.join(corpora)} were tokenized differently; one model has one "
            "tokenizer: tokenize them again with the same tokenizer.json"
        )
    _refuse_twins(corpora)
    for name, corpus in corpora.items():
        if block_count(len(corpus.train), config.model.context) < 1:
            raise UserError(
                f"{corpus.path}: corpus '{name}' has {len(corpus.train)} training tokens, less than one "
                f"block of {config.model.context} + 1; add text or set a smaller model.context"
            )
    return corpora


def _refuse_twins(corpora: Mapping[str, Corpus]) -> None:
    """The same data under two names would be read twice, in the same order."""
    seen: dict[str, str] = {}
    for name, corpus in corpora.items():
        if twin := seen.get(corpus.fingerprint):
            raise UserError(
                f"data.corpora: '{twin}' and '{name}' hold the same data; name it once, with both weights"
            )
        seen[corpus.fingerprint] = name


def resolve(config: RunConfig, corpora: Mapping[str, Corpus]) -> RunConfig:
    """The config with the vocabulary filled in, after checking every id against it."""
    found = max(c.vocab_size for c in corpora.values())
    vocab = config.model.vocab_size or found
    for corpus in corpora.values():
        if corpus.vocab_size > vocab:
            raise UserError(
                f"{corpus.path}: its tokenizer has {corpus.vocab_size} ids, model.vocab_size is {vocab}; "
                f"set model.vocab_size={corpus.vocab_size} or leave it out"
            )
        corpus.check_ids(vocab)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab})})


def make_order(config: RunConfig, corpora: Mapping[str, Corpus]) -> Order:
    """The order of this run's blocks."""
    mixture = config.data.mixture()
    sources = [
        Source(c.fingerprint, block_count(len(c.train), config.model.context), mixture[name].weight)
        for name, c in corpora.items()
    ]
    return Order(config.seed, sources, config.batch_blocks, config.training.total_steps)


# ------------------------------------------------------------------------------------------------------------
# The run folder


@dataclass
class Session:
    """An opened run: where it is, who it is, where it goes on from."""

    folder: Path
    run_id: str
    number: int  # 1 for the first session
    resumed: RunState | None
    checkpoint: Path | None  # that `resumed` is from
    skipped: list[tuple[Path, str]]  # newer checkpoints that did not verify
    superseded_rows: int
    last_evaluated: int  # step of the newest evaluation on record, -1 for none
    finished: bool  # an earlier session said so
    locks: list[IO[str]]  # the first rank's
    branching: bool = False  # a new run: `resumed` and `checkpoint` are still its parent's

    @property
    def step(self) -> int:
        return self.resumed.step if self.resumed else 0

    @property
    def parent(self) -> dict[str, Any] | None:
        """Of a branch: the run_id, step and checkpoint that it began from."""
        return self.resumed.parent if self.resumed else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in self.locks:
            lock.close()


def lock_folder(folder: Path) -> IO[str]:
    """Hold the run folder until this process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise RefusedError(
            f"{folder}: {holder} is training here; end it first, or use another --run-dir"
        ) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    lock.flush()
    return lock


def open_session(
    config: RunConfig, corpora: Mapping[str, Corpus], fresh: bool, branch_from: Path | None = None
) -> Session:
    """Lock the folder, find where to go on from, and put the records back to that step."""
    folder = config.folder
    for place in (folder, config.checkpoint_folder):
        _refuse_corpus(place)
    locks: list[IO[str]] = []
    try:
        # checkpoints may lie elsewhere, and be shared with another run by mistake
        for place in dict.fromkeys((folder, config.checkpoint_folder)):
            locks.append(lock_folder(place))
        return _found(config, corpora, fresh, locks, branch_from)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: can't be written ({error.strerror}); see --run-dir"
        ) from None
    except BaseException:
        for lock in locks:
            lock.close()
        raise


def _found(
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    fresh: bool,
    locks: list[IO[str]],
    branch_from: Path | None,
) -> Session:
    """The session that the locked folder and its checkpoints amount to, or a refusal."""
    folder = config.folder
    good, skipped = checkpoint_files.newest_good(config.checkpoint_folder)
    if good is None:
        _refuse_silent_restart(config, skipped)
    elif fresh:
        raise UserError(
            f"--fresh: {good} exists; leave --fresh out to go on from it, or give a new --run-dir"
        )
    state = checkpoint.read_state(good) if good else None
    if state is not None and good is not None:
        _refuse_another_run(config, corpora, state, good)
        _refuse_another_parent(folder, state, branch_from)
    parent = read_parent(config, corpora, branch_from) if branch_from and good is None else None
    checkpoint_files.remove_temporaries(config.checkpoint_folder)
    step = state.step if state else -1
    superseded = {name: rewind(folder / name, step) for name in STEP_FILES}
    rows = list(read_rows(folder / "metrics.jsonl"))
    last_evaluated = max((r["step"] for r in rows if "val/loss" in r), default=-1)
    if last_evaluated < step:  # killed between the samples of this step and its evaluation: both are redone
        rewind(folder / "samples.jsonl", step - 1)
    return Session(
        folder=folder,
        run_id=state.run_id if state else new_run_id(config.name),
        number=1 + max((r.get("session", 0) for r in read_rows(folder / "events.jsonl")), default=0),
        resumed=state or parent,
        checkpoint=Path(parent.parent["checkpoint"]) if parent and parent.parent else good,
        skipped=skipped,
        superseded_rows=superseded["metrics.jsonl"],
        last_evaluated=last_evaluated,
        finished=any(r.get("event") == "finish" for r in read_rows(folder / "events.jsonl")),
        locks=locks,
        branching=parent is not None,
    )


def _refuse_another_parent(folder: Path, state: RunState, branch_from: Path | None) -> None:
    """A run that has begun has its past: another can't be given to it. By the step: trunks may be moved."""
    began = Path((state.parent or {}).get("checkpoint", "")).name
    if branch_from is not None and branch_from.resolve().name != began:
        past = f"branched from {state.parent['checkpoint']}" if state.parent else "did not branch off another"
        raise RefusedError(
            f"--branch-from {branch_from}: the run in {folder} {past}; leave it out to go on, or give a new "
            "--run-dir"
        )


def _refuse_corpus(place: Path) -> None:
    """A run in a corpus folder would write its manifest over the corpus's."""
    if (place / "train.bin").exists() or (place / "train.idx.npy").exists():
        raise RefusedError(f"{place}: is a corpus folder; give --run-dir and --ckpt-dir folders of their own")


def new_run_id(name: str) -> str:
    return f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def _refuse_silent_restart(config: RunConfig, skipped: list[tuple[Path, str]]) -> None:
    """No good checkpoint: fine for a new run, and for one that never saved; otherwise someone must decide."""
    where = config.checkpoint_folder
    if skipped:
        listing = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise RefusedError(
            f"{where}: no checkpoint verifies, and a run is never restarted from zero by itself ({listing}); "
            "restore one from a copy, or start anew with another --run-dir and --ckpt-dir"
        )
    saved = [r["step"] for r in read_rows(config.folder / "events.jsonl") if r.get("event") == "checkpoint"]
    if saved and max(saved) > 0:
        raise RefusedError(
            f"{where}: this run saved a checkpoint at step {max(saved)}, but there is none here now; put "
            "the folder back (or name it with --ckpt-dir), or start anew with another --run-dir"
        )


def _refuse_another_run(
    config: RunConfig, corpora: Mapping[str, Corpus], state: RunState, found: Path
) -> None:
    """Refuse to go on with a config or with data that would change what a step is."""
    fingerprints = [c.fingerprint for c in corpora.values()]
    if state.config_hash == cfg.config_hash(config, fingerprints):
        return
    changed = cfg.changed_fields(state.step_fields, cfg.step_fields(config))
    before, now = state.fingerprints, fingerprints
    if before != now:
        changed.append(f"content of the corpora: {short(before)} -> {short(now)}")
    raise RefusedError(
        f"{found}: made with another config, which would change what a step is ({'; '.join(changed)}); "
        "put these back to resume, or start a new run with another --run-dir (and --ckpt-dir)"
    )


# ------------------------------------------------------------------------------------------------------------
# The files that the loop appends to


@dataclass
class Records:
    """The open files of a run folder."""

    metrics: JsonLines
    events: JsonLines
    samples: JsonLines
    blocks: JsonLines | None

    def sync(self) -> int:
        """Through to the disk; how many rows are still waiting for room there."""
        files = [f for f in (self.metrics, self.events, self.samples, self.blocks) if f is not None]
        for file in files:
            file.sync()
        return sum(file.waiting for file in files)


def open_records(folder: Path, with_blocks: bool, on_trouble: Any) -> Records:
    def lines(name: str) -> JsonLines:
        return JsonLines(folder / f"{name}.jsonl", on_trouble)

    return Records(
        lines("metrics"), lines("events"), lines("samples"), lines("blocks") if with_blocks else None
    )


def write_atomically(file: Path, text: str) -> None:
    """The old content or the new one, never a half."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    checkpoint_files.sync_file(new)
    new.replace(file)


def link_checkpoints(config: RunConfig) -> None:
    """`checkpoints` in the run folder leads to them, also when they lie elsewhere."""
    link = config.folder / "checkpoints"
    target = config.checkpoint_folder.absolute()
    if link.absolute() == target or (link.exists() and not link.is_symlink()):
        return
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    except OSError:
        return  # a convenience only: config.yaml says where they are
