"""Saving a run: publish a checkpoint, then remove old ones; on a full disk, make room and try again."""

from __future__ import annotations

import time

from x1_pretrain import config as cfg
from x1_pretrain.runtime import checkpoint, checkpoint_files
from x1_pretrain.runtime.checkpoint import RunState
from x1_pretrain.runtime.checkpoint_files import CheckpointFailedError, DiskFullError
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
            if not make_room(run):
                raise
            write_checkpoint(run)
    except (CheckpointFailedError, OSError) as error:
        good = checkpoint_files.folder_name(run.saved_step)
        last = f"the last good one is {good}" if run.saved_step >= 0 else "there is none"
        run.event("checkpoint_failed", f"checkpoint at step {run.step} not saved: {error}; {last}")
        return False
    return True


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
    older = checkpoint_files.list_checkpoints(folder)
    if len(older) > settings.keep_last and checkpoint_files.verify_folder(path) is None:
        checkpoint_files.prune(folder, path, settings.keep_last, settings.keep_every, needed(run))


def needed(run: Run) -> list[int]:
    """Steps whose checkpoints stay: those asked for, and while a spike lasts the one to go back to."""
    episode, steps = run.stability.episode, list(run.config.checkpoint.at)
    if run.config.stability.policy == "rewind" and episode is not None:
        there = map(checkpoint_files.step_of, checkpoint_files.list_checkpoints(run.config.checkpoint_folder))
        steps += sorted(step for step in there if step < episode.onset)[-1:]
    return steps


def make_room(run: Run) -> bool:
    """Whether removing all older checkpoints but the newest good one freed anything."""
    folder = run.config.checkpoint_folder
    good, _ = checkpoint_files.newest_good(folder)
    if good is None or not checkpoint_files.prune(folder, good, 1, None, needed(run)):
        return False
    run.event("made_room", f"removed older checkpoints to make room; {good.name} stays")
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
