"""Starting or resuming a run: open everything, say what it is, and only then spend compute."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from x1_pretrain import config as cfg
from x1_pretrain.config import MlflowConfig, RunConfig
from x1_pretrain.corpus.injection import rare_tokens
from x1_pretrain.corpus.mixture import open_corpora
from x1_pretrain.corpus.order import Order
from x1_pretrain.corpus.reader import Reader, TokenFile
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.evals.perplexity import windows
from x1_pretrain.learning.stability import State, after_rewind
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.money.trainer_guard import TrainerGuard
from x1_pretrain.records import console, run_manifest
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.records.mlflow_sink import MlflowSink
from x1_pretrain.runtime import assemble, budget, checkpoint, checkpoint_files, hangs, world
from x1_pretrain.runtime.crash import crash_report
from x1_pretrain.runtime.run import Clock, Run
from x1_pretrain.runtime.session import (
    Session,
    link_checkpoints,
    make_order,
    open_records,
    open_session,
    resolve,
    with_injection,
    write_atomically,
)
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.telemetry import Telemetry
from x1_pretrain.runtime.watchdog import Watchdog
from x1_pretrain.runtime.world import World


@contextmanager
def started(
    config: RunConfig,
    signals: Signals,
    fresh: bool,
    device: str,
    raise_ceiling_to: float | None = None,
    branch_from: Path | None = None,
) -> Iterator[Run | None]:
    """The run, opened, priced and loaded; None if it was finished before."""
    here = world.join(device, patience_s=2 * config.training.compile_timeout_s + 600)
    if config.training.deterministic:
        assemble.be_deterministic(here.device)
    corpora = open_corpora(config)
    config = resolve(config, corpora)
    assemble.local_blocks(config, here)
    session = agreed_session(config, corpora, fresh, here, branch_from)
    with session, console.Screen(config.training.total_steps, quiet=not here.first) as screen:
        if session.finished and session.step >= config.training.total_steps:
            screen.say(f"{config.name}: finished before, at step {session.step} ({config.folder})")
            yield None
            return
        guard = agreed_guard(config, session, signals, here, screen, raise_ceiling_to)
        with closing_guard(guard):
            run = build(config, corpora, session, screen, signals, here)
            run.guard = guard
            run.watchdog.on_hang = partial(hangs.hung, run)
            run.watchdog.set_peers(here.neighbours())
            try:
                with run.watchdog:
                    yield run
            except Exception as error:
                report = crash_report(error, list(run.last_rows))
                run.note("fault", f"{type(error).__name__}: {error}", **report)
                if run.sink:
                    run.sink.close("FAILED", timeout_s=3.0)
                raise
            finally:
                run.reader.close()
                if run.health:
                    run.health.host.close()


@contextmanager
def closing_guard(guard: TrainerGuard | None) -> Iterator[None]:
    try:
        yield
    finally:
        if guard:
            guard.close(3.0)


def agreed_guard(
    config: RunConfig,
    session: Session,
    signals: Signals,
    here: World,
    screen: console.Screen,
    raise_to_usd: float | None,
) -> TrainerGuard | None:
    """The first rank prices the run and watches its money; the others end with the same refusal."""
    found: TrainerGuard | UserError | None = None
    if here.first:
        try:
            budget.refuse_latched(config, raise_to_usd)
            found = budget.open_guard(config, session, signals, here, screen.say)
        except UserError as error:
            found = error
    refusal = here.from_first(found if isinstance(found, UserError) else None)
    if refusal is not None:
        raise refusal
    return found if isinstance(found, TrainerGuard) else None


def agreed_session(
    config: RunConfig, corpora: Mapping[str, Corpus], fresh: bool, here: World, branch_from: Path | None
) -> Session:
    """The first rank opens the run; the others learn what it found, or end with the same refusal."""
    found: Session | UserError | None = None
    if here.first:
        try:
            found = open_session(config, corpora, fresh, branch_from)
        except UserError as error:
            found = error
    if here.size > 1:
        shared = replace(found, locks=[]) if isinstance(found, Session) else found
        shared = here.from_first(shared)
        found = found if here.first else shared
    if isinstance(found, UserError):
        raise found
    assert found is not None
    return found


def build(
    config: RunConfig,
    corpora: dict[str, Corpus],
    session: Session,
    screen: console.Screen,
    signals: Signals,
    here: World,
) -> Run:
    """Model, optimizer and reader, at the step the session goes on from."""
    state = session.resumed
    tokenizer = next(iter(corpora.values())).tokenizer()
    decoder, optimizer, machine = assemble.build_model(config, here, state.precision if state else None)
    if here.first and session.checkpoint:
        refuse_without_room(config, session.checkpoint, checkpoint.saved_bytes(decoder, tokenizer))
    if session.checkpoint:
        checkpoint.load(session.checkpoint, decoder, optimizer)
    order = make_order(config, corpora, session.past)
    wanted = config.stability.inject_spike_at_step
    if wanted is None or wanted not in session.past.jumped_over:
        order = with_injection(order, wanted, session.step)
    reader = open_reader(config, corpora, order, here, session.step)
    run = Run(
        config=config,
        world=here,
        corpora=corpora,
        tokenizer=tokenizer,
        order=order,
        session=session,
        records=None,
        screen=screen,
        signals=signals,
        decoder=decoder,
        optimizer=optimizer,
        machine=machine,
        flops=flops_per_token(config.model),
        reader=reader,
        windows=windows(corpora, config.model.context, config.evaluation.tokens),
        telemetry=Telemetry.resumed(config, session.step, state.noise if state else {}),
        watchdog=Watchdog(config.folder, here.rank, config.watchdog),
        sink=None,
        step=session.step,
        saved_step=session.step if state and not session.branching else -1,
        evaluated_step=session.last_evaluated,
        stability=known_of_spikes(session),
        clock=Clock(earlier_s=session.elapsed_s),
    )
    if here.first:
        open_folder(run)
    return run


def known_of_spikes(session: Session) -> State:
    """What the detector knows. A kill between a rewind and the next checkpoint leaves that of the checkpoint
    gone back to, as it was before."""
    saved = State.from_json(session.resumed.stability) if session.resumed else State()
    rewinds = session.past.rewinds
    return saved if rewinds is None else after_rewind(saved, State(rewinds=rewinds - 1))


def refuse_without_room(config: RunConfig, good: Path, needed: int) -> None:
    """A resumed run that could not save would be relaunched, and paid, again and again."""
    if not checkpoint_files.room_for(config.checkpoint_folder, needed, good, config.checkpoint.at):
        raise RefusedError(
            f"{config.checkpoint_folder}: no room for a checkpoint of {needed / 2**30:.2f} GiB beside "
            f"{good.name}; free some space and relaunch the same command"
        )


def open_reader(
    config: RunConfig, corpora: Mapping[str, Corpus], order: Order, here: World, step: int
) -> Reader[Tensor]:
    """This rank's batches from `step` on, read ahead."""
    files = [TokenFile(c.path / "train.bin", c.train.dtype, config.model.vocab) for c in corpora.values()]
    pin, rare = here.device.type == "cuda", None
    if order.injected:
        weights = [c.weight for c in config.data.mixture().values()]
        rare = rare_tokens(list(zip(corpora.values(), weights, strict=True)), config.model.vocab)
    return Reader(
        order,
        files,
        config.model.context,
        lambda rows: _tensor(rows, pin),
        step,
        here.rank,
        here.size,
        injection=rare,
    )


def _tensor(rows: npt.NDArray[np.int64], pin: bool) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory() if pin else tensor


# ------------------------------------------------------------------------------------------------------------
# What is written and said before the first step


def open_folder(run: Run) -> None:
    """The records, the resolved config, and the first event: where this session goes on from."""
    session, config = run.session, run.config
    try:
        run.records = open_records(config.folder, config.log.blocks, run.screen.say)
    except OSError as error:
        raise UserError(f"{error.filename or config.folder}: can't be written ({error.strerror})") from None
    write_atomically(config.folder / "config.yaml", cfg.to_yaml(without_secrets(config)))
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
    write_atomically(folder / "config.yaml", cfg.to_yaml(without_secrets(run.config)))
    write_atomically(folder / "manifest.json", json.dumps(manifest(run), indent=1) + "\n")
    said = f"{folder} was deleted while the run goes on: records, config and manifest are written again"
    run.event("deleted", f"{said}; a checkpoint is saved now, earlier ones are lost if they were there")


def without_secrets(config: RunConfig) -> RunConfig:
    """Others read the run folder; a resume takes the address from its command."""
    if not config.budget.curr_cost_uri:
        return config
    uri = run_manifest.without_passwords(config.budget.curr_cost_uri)
    return config.model_copy(update={"budget": config.budget.model_copy(update={"curr_cost_uri": uri})})


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


def get_ready(run: Run) -> None:
    """Find how this machine computes the run best, say it, and write the manifest."""
    machine = run.machine
    assemble.fit_machine(run.config, run.world, run.decoder, run.optimizer, machine, run.signals)
    blocks = assemble.local_blocks(run.config, run.world)
    micro, context = machine.micro_batch, run.config.model.context
    for line in machine.said:
        run.event("machine", f"  {line}")
    run.event(
        "batch",
        f"  {run.world.size} rank(s) x {blocks // micro} accumulated x {micro} sequences x {context} tokens "
        f"= {run.config.training.batch_tokens:,} tokens a step",
    )
    if not run.windows:
        run.event("no_validation", "  the corpus has no validation tokens: there will be no validation loss")
    if not run.world.first:
        return
    write_atomically(run.config.folder / "manifest.json", json.dumps(manifest(run), indent=1) + "\n")
    settings = run.config.mlflow
    if settings.uri is None and settings.experiment != MlflowConfig().experiment:
        run.event(
            "mlflow", f"  MLflow is off: experiment {settings.experiment} was named, but no --mlflow-uri"
        )
    if settings.uri:
        run.sink = MlflowSink(run.config.folder, settings.uri, settings.experiment)
    run.signals.before_leaving = lambda name: last_words(run, name)


def last_words(run: Run, why: str) -> None:
    """Before an exit that nothing follows: the event, and alerts that are on their way."""
    run.note("signal", f"left at once on {why}", signal=why)
    if run.guard:
        run.guard.notifier.close(3.0)


def first_written(run: Run) -> str | None:
    """When this run's first session wrote its manifest."""
    try:
        earlier = json.loads((run.config.folder / "manifest.json").read_text(encoding="utf-8"))
        return earlier["created_utc"] if earlier["run_id"] == run.session.run_id else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
    ):  # the first session, or someone damaged it: written anew
        return None


def manifest(run: Run) -> dict[str, Any]:
    """`manifest.json` of the run folder."""
    config, counts, flops = run.config, parameter_counts(run.config.model), run.flops
    mixture = config.data.mixture()
    fingerprints = [c.fingerprint for c in run.corpora.values()]
    return {
        "schema_version": 1,
        "kind": "run",
        "run_id": run.session.run_id,
        "name": config.name,
        "created_utc": first_written(run) or utc_now(),
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
