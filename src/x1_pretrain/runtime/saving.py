"""Saving a run: publish a checkpoint, then remove old ones; on a full disk, make room and try again."""

from __future__ import annotations

import time
from pathlib import Path

from x1_pretrain import config as cfg
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.checkpoint_files import CheckpointFailedError, DiskFullError
from x1_pretrain.records.metrics import read_rows
from x1_pretrain.records.retention import losses_at, to_go_back_to
from x1_pretrain.runtime import checkpoint
from x1_pretrain.runtime.checkpoint import RunState
from x1_pretrain.runtime.run import Run


def save(run: Run) -> bool:
    """Publish a checkpoint, then remove old ones. On failure: say so, make room if that is it, go on."""
    run.enter("checkpoint")
    saved = run.world.first and save_here(run)
    if not run.world.from_first(saved):
        return False
    run.saved_step = run.step
    return True


def save_here(run: Run) -> bool:
    """The first rank's part."""
    try:
        try:
            write_checkpoint(run)
        except DiskFullError as error:
            run.event("checkpoint_failed", f"checkpoint at step {run.step} not saved: {error}")
            write_in_made_room(run, error)
    except (CheckpointFailedError, OSError) as error:
        good = checkpoint_files.folder_name(run.saved_step)
        last = f"the last good one is {good}" if run.saved_step >= 0 else "there is none"
        aside = checkpoint_files.aside_words(run.config.checkpoint_folder)
        run.event("checkpoint_failed", f"checkpoint at step {run.step} not saved: {error}; {last}{aside}")
        return False
    return True


def write_in_made_room(run: Run, error: DiskFullError) -> None:
    """Room is made in steps, until it is enough or there is nothing left to remove."""
    while make_room(run):
        try:
            return write_checkpoint(run)
        except DiskFullError as still:
            error = still
    raise error


def write_checkpoint(run: Run) -> None:
    assert run.records is not None
    folder, settings = run.config.checkpoint_folder, run.config.checkpoint
    begun = time.perf_counter()
    run.records.sync()
    path = checkpoint.save(folder, state_of(run), run.decoder, run.optimizer, run.tokenizer)
    took = time.perf_counter() - begun
    run.event("checkpoint", f"checkpoint {path} ({took:.1f} s)", path=str(path), seconds=round(took, 3))
    if run.health:
        run.health.host.note_write(sum(file.stat().st_size for file in path.iterdir()), took)
    here = checkpoint_files.list_checkpoints(folder)
    if len(here) > (settings.keep_local or settings.keep_last):
        prune(run, path)


def prune(run: Run, newest: Path) -> None:
    """Remove what the policy does not keep, once the newest is known to be good."""
    folder, settings = run.config.checkpoint_folder, run.config.checkpoint
    if checkpoint_files.verify_folder(newest) is not None:
        return
    losses = losses_at(read_rows(run.config.folder / "metrics.jsonl")) if settings.keep_best else {}
    checkpoint_files.prune(
        folder,
        newest,
        settings.keep_last,
        settings.keep_every,
        settings.at,
        keep_best=settings.keep_best,
        losses=losses,
        needed=needed(run),
        mirrored=mirrored(run),
        keep_local=settings.keep_local if run.mirror else None,
    )


def mirrored(run: Run) -> list[int]:
    """Steps whose checkpoints are safe elsewhere."""
    return run.mirror.status.mirrored if run.mirror else []


def needed(run: Run) -> list[int]:
    """While a spike lasts the checkpoint to go back to stays here."""
    episode = run.stability.episode
    if run.config.stability.policy != "rewind" or episode is None:
        return []
    there = map(checkpoint_files.step_of, checkpoint_files.list_checkpoints(run.config.checkpoint_folder))
    return list(to_go_back_to(list(there), [episode.onset]))


def make_room(run: Run) -> bool:
    """Whether removing older checkpoints freed anything: those that the mirror has go first."""
    folder = run.config.checkpoint_folder
    good, _ = checkpoint_files.newest_good(folder)
    if good is None:
        return False
    safe, keep_at = mirrored(run), run.config.checkpoint.at
    gone = checkpoint_files.free(folder, good, keep_at, needed=needed(run), mirrored=safe)
    if not gone:
        return False
    elsewhere = sum(checkpoint_files.step_of(path) in safe for path in gone)
    said = f"removed {len(gone)} older checkpoints to make room ({elsewhere} of them are in the mirror); "
    run.event("made_room", f"{said}{good.name} stays")
    return True


def state_of(run: Run) -> RunState:
    fingerprints = [c.fingerprint for c in run.corpora.values()]
    return RunState(
        run_id=run.session.run_id,
        step=run.step,
        tokens=run.tokens,
        elapsed_s=run.clock.elapsed_s(),
        session=run.session.number,
        config_hash=cfg.config_hash(run.config, fingerprints),
        step_fields=cfg.step_fields(run.config),
        fingerprints=fingerprints,
        precision=run.machine.precision,
        context=run.config.model.context,
        jumps=[list(jump) for jump in run.order.jumps],
        injected=[first for first in run.order.injected if first < run.order.batch_of(run.step)],
        stability=run.stability.to_json(),
        noise=run.telemetry.noise.to_json(),
        parent=run.session.parent,
    )
