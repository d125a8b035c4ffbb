"""Starting or resuming a run: open everything, say what it is, and only then spend compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from x1_pretrain.config import MlflowConfig, RunConfig
from x1_pretrain.corpus.injection import rare_tokens
from x1_pretrain.corpus.mixture import open_corpora
from x1_pretrain.corpus.order import Order
from x1_pretrain.corpus.reader import Reader, TokenFile
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.evals.perplexity import windows
from x1_pretrain.learning.stability import State, after_rewind
from x1_pretrain.model.flops import flops_per_token
from x1_pretrain.money.trainer_guard import TrainerGuard
from x1_pretrain.records import checkpoint_files, console
from x1_pretrain.records.lock import FolderLock
from x1_pretrain.records.mirror_state import read_state
from x1_pretrain.records.mlflow_sink import MlflowSink
from x1_pretrain.runtime import assemble, budget, checkpoint, hangs, mirroring, world
from x1_pretrain.runtime.crash import crash_report
from x1_pretrain.runtime.introduction import manifest, open_folder
from x1_pretrain.runtime.mirror import LOG, Mirror
from x1_pretrain.runtime.mirror import job_for as mirror_job
from x1_pretrain.runtime.run import Clock, Run, Telemetry
from x1_pretrain.runtime.session import (
    Session,
    lock_places,
    make_order,
    open_session,
    resolve,
    with_injection,
    write_atomically,
)
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.watchdog import Watchdog
from x1_pretrain.runtime.world import World
from x1_pretrain.stores.address import parse as parse_address
from x1_pretrain.stores.address import refuse_overlap

FETCHING_S = 4 * 3600.0  # other ranks wait so long for what the first one fetches


@contextmanager
def started(
    config: RunConfig,
    signals: Signals,
    fresh: bool,
    device: str,
    raise_ceiling_to: float | None = None,
    branch_from: Path | None = None,
    must_be_mirrored: bool = False,
) -> Iterator[Run | None]:
    """The run, opened, priced and loaded; None if it was finished before."""
    fetching_s = FETCHING_S if config.mirror.uri else 0.0
    here = world.join(device, patience_s=2 * config.training.compile_timeout_s + 600 + fetching_s)
    if config.training.deterministic:
        assemble.be_deterministic(here.device)
    with (
        console.Screen(config.training.total_steps, quiet=not here.first) as screen,
        agreed_mirror(config, signals, here, screen, fresh, must_be_mirrored) as (mirror, locks),
    ):
        corpora = open_corpora(config)
        config = resolve(config, corpora)
        config.blocks_per_rank(here.size)
        session = agreed_session(config, corpora, fresh, here, branch_from, locks)
        with opened(config, corpora, session, mirror, signals, here, screen, raise_ceiling_to) as run:
            yield run


@contextmanager
def opened(
    config: RunConfig,
    corpora: dict[str, Corpus],
    session: Session,
    mirror: Mirror | None,
    signals: Signals,
    here: World,
    screen: console.Screen,
    raise_ceiling_to: float | None,
) -> Iterator[Run | None]:
    """The run of a session; None if it was finished before."""
    with session:
        if session.finished and session.step >= config.training.total_steps:
            screen.say(f"{config.name}: finished before, at step {session.step} ({config.folder})")
            mirroring.send_the_rest(mirror, config, session, corpora, screen.say)
            yield None
            return
        guard = agreed_guard(config, session, signals, here, screen, raise_ceiling_to)
        with closing_guard(guard):
            run = build(config, corpora, session, screen, signals, here)
            run.guard, run.mirror = guard, mirror
            mirroring.begin(run)
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
                if run.mirror:
                    run.mirror.close(f"a fault: {type(error).__name__}")
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


@contextmanager
def agreed_mirror(
    config: RunConfig,
    signals: Signals,
    here: World,
    screen: console.Screen,
    fresh: bool,
    must_exist: bool,
) -> Iterator[tuple[Mirror | None, list[FolderLock] | None]]:
    """The first rank locks the folders and has its mirror put into them what they lack; the others wait,
    or end with the same refusal."""
    mirror: Mirror | None = None
    locks: list[FolderLock] | None = None
    refusal: UserError | None = None
    there = {place for place in (config.folder, config.checkpoint_folder) if place.exists()}
    if here.first and config.mirror.uri:
        try:
            refuse_overlap(parse_address(config.mirror.uri), config.name, config.folder)
            locks = lock_places(config)
            job = mirror_job(config, must_exist, fresh)
            mirror = Mirror.open(job, config.mirror.grace_s, signals, screen.say)
        except UserError as error:
            refusal = error
    try:
        if (said := here.from_first(refusal) if config.mirror.uri else None) is not None:
            raise said
        yield mirror, locks
    finally:
        if mirror:
            mirror.close("refused to start")
        for lock in locks or ():
            lock.close()
        if refusal:
            remove_litter(
                [place for place in (config.checkpoint_folder, config.folder) if place not in there]
            )


def remove_litter(places: list[Path]) -> None:
    """Folders made for a run that then was refused, where nothing else is in them."""
    for place in places:
        if place.is_dir() and {file.name for file in place.iterdir()} <= {"lock", LOG}:
            shutil.rmtree(place, ignore_errors=True)


def agreed_session(
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    fresh: bool,
    here: World,
    branch_from: Path | None,
    locks: list[FolderLock] | None,
) -> Session:
    """The first rank opens the run; the others learn what it found, or end with the same refusal."""
    found: Session | UserError | None = None
    if here.first:
        try:
            found = open_session(config, corpora, fresh, branch_from, locks)
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
    folder = config.checkpoint_folder
    state = read_state(config.folder) if config.mirror.uri else None
    mirrored = state.mirrored if state else ()
    if not checkpoint_files.room_for(folder, needed, good, config.checkpoint.at, mirrored=mirrored):
        raise RefusedError(
            f"{folder}: no room for a checkpoint of {needed / 2**30:.2f} GiB beside {good.name}; free some "
            f"space and relaunch the same command{checkpoint_files.aside_words(folder)}"
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


def get_ready(run: Run) -> None:
    """Find how this machine computes the run best, say it, and write the manifest."""
    machine = run.machine
    assemble.fit_machine(run.config, run.world, run.decoder, run.optimizer, machine, run.signals)
    blocks = run.config.blocks_per_rank(run.world.size)
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
