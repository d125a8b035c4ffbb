"""Opening a run: all that must be true before the first step, checked before any compute is spent.

A run folder has one writer at a time. The same command starts a run and resumes it: from the newest
checkpoint that verifies, never silently from zero, and never with a config that would change what a step is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from x1_pretrain import config as cfg
from x1_pretrain.config import RunConfig
from x1_pretrain.corpus import mixture
from x1_pretrain.corpus.order import INJECTED_STEPS, Order
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.formats import check_folder
from x1_pretrain.records.lock import FolderLock, lock_folder
from x1_pretrain.records.metrics import JsonLines, read_rows, rewind
from x1_pretrain.runtime import checkpoint
from x1_pretrain.runtime.branch import read_parent, short
from x1_pretrain.runtime.checkpoint import RunState

STEP_FILES = (
    "metrics.jsonl",
    "steps.jsonl",
    "samples.jsonl",
    "blocks.jsonl",
)  # rows carry a step, and go back with a resume


# ------------------------------------------------------------------------------------------------------------
# Data


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


def make_order(config: RunConfig, corpora: Mapping[str, Corpus], past: Past | None = None) -> Order:
    """The order of this run's blocks, with what it jumped over and where others were put in."""
    past = past or Past([], [])
    try:
        jumps = [(int(step), int(batch)) for step, batch in past.jumps]
        return mixture.make_order(config, corpora, jumps, past.injected)
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError(
            f"{config.folder}: its record of jumps over batches is damaged ({error}); restore events.jsonl "
            "and the checkpoint, or start a new run with another --run-dir"
        ) from None


def with_injection(order: Order, wanted: int | None, done: int) -> Order:
    """The order with the injection that the config asks for, if it lies ahead. One that has begun stays."""
    begun = [first for first in order.injected if first < order.batch_of(done)]
    if wanted is not None and wanted >= done:
        ahead = order.batch_of(wanted)
        if any(first + INJECTED_STEPS > ahead for first in begun):
            raise UserError(
                f"stability.inject_spike_at_step {wanted}: an injection is still going on at step {done}; "
                "give a later step"
            )
        begun.append(ahead)
    elif wanted is not None and order.batch_of(wanted) not in begun:
        raise RefusedError(
            f"stability.inject_spike_at_step {wanted}: the run is at step {done} already; give a later step, "
            "or branch off an earlier checkpoint (--branch-from)"
        )
    return Order(order.seed, order.sources, order.batch_blocks, order.total_steps, order.jumps, begun)


# ------------------------------------------------------------------------------------------------------------
# The run folder


@dataclass
class Past:
    """What the order of the data has to know of the run so far."""

    jumps: list[list[int]]
    injected: list[int]  # first batches
    jumped_over: list[int | None] = field(
        default_factory=list
    )  # steps of injections from before the last jump
    rewinds: int | None = None  # with a jump that the checkpoint does not know of yet: how many it makes

    @classmethod
    def of(cls, state: RunState | None) -> Past:
        """As a checkpoint has it; without one nothing has happened yet."""
        return cls(state.jumps, state.injected) if state else cls([], [])


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
    elapsed_s: float  # of training so far, as the newest row has it
    finished: bool  # an earlier session said so
    locks: list[FolderLock]  # the first rank's
    past: Past
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


def lock_places(config: RunConfig) -> list[FolderLock]:
    """The run folder is this process's; and that of the checkpoints, which may lie elsewhere and be shared
    with another run by mistake."""
    places = list(dict.fromkeys((config.folder, config.checkpoint_folder)))
    for place in places:
        _refuse_corpus(place)
    locks: list[FolderLock] = []
    with _let_go_on_error(config, locks):
        for place in places:
            locks.append(lock_folder(place))
    return locks


@contextmanager
def _let_go_on_error(config: RunConfig, locks: list[FolderLock]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        for lock in locks:
            lock.close()
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{error.filename or config.folder}: can't be written ({error.strerror}); see --run-dir"
        ) from None


def open_session(
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    fresh: bool,
    branch_from: Path | None = None,
    locks: list[FolderLock] | None = None,
) -> Session:
    """Lock the folder, find where to go on from, and put the records back to that step."""
    locks = lock_places(config) if locks is None else locks
    with _let_go_on_error(config, locks):
        return _found(config, corpora, fresh, locks, branch_from)


def _found(
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    fresh: bool,
    locks: list[FolderLock],
    branch_from: Path | None,
) -> Session:
    """The session that the locked folder and its checkpoints amount to, or a refusal."""
    folder = config.folder
    check_folder(folder)
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
    past = state or parent
    return Session(
        folder=folder,
        run_id=state.run_id if state else new_run_id(config.name),
        number=1 + max((r.get("session", 0) for r in read_rows(folder / "events.jsonl")), default=0),
        resumed=past,
        checkpoint=Path(parent.parent["checkpoint"]) if parent and parent.parent else good,
        skipped=skipped,
        superseded_rows=superseded["metrics.jsonl"],
        last_evaluated=last_evaluated,
        elapsed_s=max([past.elapsed_s if past else 0.0, *(r.get("elapsed_s", 0.0) for r in rows)]),
        finished=any(r.get("event") == "finish" for r in read_rows(folder / "events.jsonl")),
        locks=locks,
        past=past_on_record(folder, state) if state else Past.of(parent),
        branching=parent is not None,
    )


def past_on_record(folder: Path, state: RunState) -> Past:
    """A rewind is on record before it is acted on: an event that names other jumps wins over the checkpoint,
    which is from before it."""
    saved = Past.of(state)
    rows = list(read_rows(folder / "events.jsonl"))
    named = [place for place, row in enumerate(rows) if "jumps" in row]
    if not named:
        return saved
    last = rows[named[-1]]
    begun = [row.get("first_step") for row in rows[: named[-1]] if row.get("event") == "inject"]
    if last["jumps"] == saved.jumps:
        return Past(saved.jumps, saved.injected, begun)
    return Past(last["jumps"], last.get("injected", []), begun, last.get("rewinds"))


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
    steps: JsonLines
    events: JsonLines
    samples: JsonLines
    blocks: JsonLines | None

    def sync(self) -> int:
        """Through to the disk; how many rows are still waiting for room there."""
        for file in self._files():
            file.sync()
        return sum(file.waiting for file in self._files())

    @property
    def deleted(self) -> bool:
        """Whether someone removed the folder, or a file of it, from under the run."""
        return any(file.deleted for file in self._files())

    def restore(self) -> None:
        for file in self._files():
            if file.deleted:
                file.restore()

    def _files(self) -> list[JsonLines]:
        files = (self.metrics, self.steps, self.events, self.samples, self.blocks)
        return [file for file in files if file is not None]

    def close(self) -> None:
        """Before the files are cut back."""
        for file in self._files():
            file.close()


def open_records(folder: Path, with_blocks: bool, on_trouble: Any) -> Records:
    def lines(name: str) -> JsonLines:
        return JsonLines(folder / f"{name}.jsonl", on_trouble)

    return Records(
        lines("metrics"),
        lines("steps"),
        lines("events"),
        lines("samples"),
        lines("blocks") if with_blocks else None,
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
