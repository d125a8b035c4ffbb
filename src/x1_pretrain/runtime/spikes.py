"""What the loop does about a spike beside its update: say so, have the post-mortem written, go back.

Going back: the newest good checkpoint from before the spike, and the order of the data jumps over every batch
that was read since. Nothing is read twice, and the steps that were lost stay on record as superseded.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from x1_pretrain.corpus.order import INJECTED_STEPS, Order
from x1_pretrain.corpus.reader import Batch
from x1_pretrain.errors import FAULT, UserError
from x1_pretrain.learning import stability
from x1_pretrain.learning.stability import Episode
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.metrics import read_rows, rewind
from x1_pretrain.records.mlflow_sink import MlflowSink
from x1_pretrain.records.run_folder import POSTMORTEM
from x1_pretrain.runtime import checkpoint, telemetry
from x1_pretrain.runtime.run import Run, Telemetry, Update
from x1_pretrain.runtime.session import STEP_FILES, Records, open_records
from x1_pretrain.runtime.start import open_reader

POSTMORTEM_S = 60.0  # what the end of a run waits for one


class UnrecordedError(UserError):
    """Going back would cut rows that nothing else tells of."""

    exit_code = FAULT


# ------------------------------------------------------------------------------------------------------------
# Saying it


def tell_injection(run: Run) -> None:
    """Before the first batch of an injection is trained on."""
    if run.order.batch_of(run.step) not in run.order.injected:
        return
    first, last = run.step + 1, run.step + INJECTED_STEPS
    message = (
        f"injected on purpose: the batches of steps {first} to {last} are rare tokens, not data; they count "
        "as no tokens seen"
    )
    if run.step < stability.KNOWN:
        message += f"; too early to be noticed: the first {stability.KNOWN} steps are only learned from"
    fields = {"first_step": run.step, "first_batch": run.order.batch_of(run.step), "steps": INJECTED_STEPS}
    run.event("inject", message, **fields)
    if run.guard:
        run.guard.record("inject", message, **fields)


def tell(run: Run, update: Update) -> None:
    """The events of one step."""
    judged = update.judged
    if judged.verdict == "skip" and not judged.state.streak:
        message = (
            f"step {run.step}: loss {update.loss:.3f} ({judged.loss_z or 0:.0f} deviations up), gradient "
            f"norm {update.grad_norm:.3g} ({judged.grad_z or 0:.0f}): update left out"
        )
        z = {"loss_z": judged.loss_z, "grad_z": judged.grad_z}
        run.event("skip", message, loss=update.loss, grad_norm=update.grad_norm, **z)
    if judged.began:
        began(run, judged.began, update)
    if judged.ended:
        ended(run, judged.ended, run.step)
        start_postmortem(run)
    tell_postmortem(run)


def began(run: Run, episode: Episode, update: Update) -> None:
    what = "a spike (injected)" if was_injected(run, episode) else "a spike"
    z = update.judged
    message = (
        f"{what} at step {episode.onset}: loss {update.loss:.3f} after {episode.loss_before:.3f}, gradient "
        f"norm {update.grad_norm:.3g} after {episode.grad_norm_before:.3g}"
    )
    fields: dict[str, Any] = {"onset": episode.onset, "loss": update.loss, "grad_norm": update.grad_norm}
    fields |= {"loss_before": episode.loss_before, "grad_norm_before": episode.grad_norm_before}
    fields |= {"loss_z": z.loss_z, "grad_z": z.grad_z, "injected": was_injected(run, episode)}
    run.event("spike", message, **fields)


def ended(run: Run, episode: Episode, step: int) -> None:
    """The episode is over at `step`, one way or another: on record."""
    height = f"{episode.peak_loss - episode.loss_before:.2f} nats at its highest"
    if episode.recovered is None:
        how = f"has not gone down by step {step}"
    else:
        how = f"is over: back at step {episode.recovered}"
    message = f"the spike of step {episode.onset} {how}; {height}"
    fields = {**asdict(episode), "end": step, "injected": was_injected(run, episode)}
    run.event("spike_end", message, **fields, policy=run.config.stability.policy)


def was_injected(run: Run, episode: Episode) -> bool:
    """Whether it began with an injected batch, or within a few steps of one."""
    near = range(max(0, episode.onset - 1 - INJECTED_STEPS), min(episode.onset, run.total_steps))
    return any(run.order.injects(step) for step in near)


# ------------------------------------------------------------------------------------------------------------
# The post-mortem: written by a process of its own, so that training does not wait for a picture


def start_postmortem(run: Run) -> None:
    if not run.records:
        return
    wait_for_postmortem(run, 0.0)
    if run.postmortem:  # of what was known then; two would write the same files
        run.postmortem.terminate()
        run.postmortem.wait()
    run.records.sync()
    command = [sys.executable, "-m", "x1_pretrain.postmortem.command", str(run.config.folder)]
    try:
        log = (run.config.folder / "postmortem.log").open("wb")
        run.postmortem_before = written_ns(run.config.folder / POSTMORTEM)
        with log:
            run.postmortem = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        with suppress(psutil.Error):
            psutil.Process(run.postmortem.pid).nice(10)
    except OSError as error:
        run.event("postmortem", f"the post-mortem can't be written now ({error}): x1 postmortem RUN")


def tell_postmortem(run: Run) -> None:
    """Say where it is, once it is there."""
    if run.postmortem is None or run.postmortem.poll() is None:
        return
    code, run.postmortem = run.postmortem.returncode, None
    log, folder = run.config.folder / "postmortem.log", run.config.folder
    path = folder / POSTMORTEM
    if code == 0 and written_ns(path) == run.postmortem_before:
        return  # there was nothing to tell
    if code == 0:
        run.event("postmortem", f"post-mortem: {path}", path=str(path))
        log.unlink(missing_ok=True)
        return
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    why = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    run.event("postmortem", f"no post-mortem ({why}); try x1 postmortem {folder}")


def written_ns(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def wait_for_postmortem(run: Run, limit_s: float) -> None:
    if run.postmortem is None:
        return
    with suppress(subprocess.TimeoutExpired):
        run.postmortem.wait(limit_s)
    tell_postmortem(run)


def on_record(run: Run) -> list[dict[str, Any]]:
    return list(read_rows(run.config.folder / "events.jsonl")) if run.records else []


def catch_up(run: Run) -> None:
    """An earlier session may have been killed before it had the post-mortem of its last spike."""
    owed: list[int] = []  # onsets
    for row in on_record(run):
        if row["event"] == "spike_end":
            owed.append(row["onset"])
        elif row["event"] == "rewind" and "jumps" in row:
            owed = [-1] if owed else []  # whatever comes, that one was
        elif row["event"] == "resume":
            owed = [onset for onset in owed if onset <= row["step"]]
        elif row["event"] == "postmortem" and "path" in row:
            owed = []
    if owed:
        start_postmortem(run)


def close(run: Run) -> None:
    """At the end of the run a spike that is still open ends too. Only now can be told what each left behind:
    when it ended, hardly any steps had followed it."""
    told = [row for row in on_record(run) if row["event"] == "spike_end"]
    open_one = run.stability.episode
    if open_one is not None and not any(row["onset"] == open_one.onset for row in told):
        ended(run, open_one, run.step)
    if told or open_one is not None:
        wait_for_postmortem(run, POSTMORTEM_S)
        start_postmortem(run)
    wait_for_postmortem(run, POSTMORTEM_S)


# ------------------------------------------------------------------------------------------------------------
# Going back


def go_back(run: Run, batch: Batch[Tensor], update: Update) -> bool:
    """To the newest good checkpoint from before the spike; False if there is none, and the run goes on."""
    judged, done = update.judged, run.step + 1
    onset = judged.ended.onset if judged.ended else done - judged.state.streak + 1
    good = run.world.from_first(before(run, onset) if run.world.first else None)
    if good is None:
        run.stability = replace(judged.state, rewinds=run.config.stability.max_rewinds)
        update.judged = judged._replace(verdict="skip", state=run.stability)
        run.event("rewind", f"no checkpoint from before step {onset} to go back to: the run goes on as it is")
        return False
    run.enter("checkpoint")  # weights are read into place: nothing may be saved from outside
    state = checkpoint.read_state(good)
    order = run.order.jumped(state.step, done)
    if run.world.first and run.records:
        telemetry.record_step(run, run.records, done, batch, update)
        if judged.ended:
            ended(run, judged.ended, done)
        go_back_on_record(run, run.records, good, order, judged.state.rewinds + 1)
        start_postmortem(run)  # of what is now on record
    # The others load, and read what is on record, only now; all know the same of it.
    run.evaluated_step = run.world.from_first(last_evaluated(run.config.folder) if run.world.first else -1)
    checkpoint.load(good, run.decoder, run.optimizer)
    run.reader.close()
    run.order = order
    run.reader = open_reader(run.config, run.corpora, order, run.world, state.step)
    run.step = run.saved_step = state.step
    run.stability = stability.after_rewind(stability.State.from_json(state.stability), judged.state)
    run.telemetry = Telemetry.resumed(run.config, state.step, state.noise)
    run.clock.reset()
    return True


def before(run: Run, onset: int) -> Path | None:
    """The newest checkpoint whose weights had not seen the step `onset`."""
    for path in checkpoint_files.list_checkpoints(run.config.checkpoint_folder):
        if checkpoint_files.step_of(path) < onset and checkpoint_files.verify_folder(path) is None:
            return path
    return None


def go_back_on_record(run: Run, records: Records, good: Path, order: Order, rewinds: int) -> None:
    """In an order that a kill at any point leaves in a state to resume from: first the checkpoints of the
    steps that are given up, then the jump, then the rows."""
    step = checkpoint_files.step_of(good)
    on = order.batch_of(step)
    jumped = on - run.order.batch_of(step)
    epochs = jumped * run.config.batch_blocks / sum(source.blocks for source in run.order.sources)
    message = (
        f"going back to {good.name} and on with other data: {jumped} batches are jumped over "
        f"({epochs:.3f} epochs)"
    )
    fields: dict[str, Any] = {"from_step": run.step, "to_step": step, "rewinds": rewinds}
    fields |= {"jumps": [list(jump) for jump in order.jumps]}
    fields["injected"] = [first for first in order.injected if first < on]
    checkpoint_files.remove_newer(run.config.checkpoint_folder, good)
    run.event("rewind", message, **fields)
    if run.guard:
        run.guard.record("rewind", message, **fields)
    if records.sync():
        raise UnrecordedError(
            f"{run.config.folder}: going back from a spike can't be put on record, the disk is full; free "
            "some space and relaunch the same command"
        )
    if run.sink:
        run.sink.close("KILLED", timeout_s=5.0)
        for line in run.sink.news():
            run.event("mlflow", line)
    records.close()
    for name in STEP_FILES:
        rewind(run.config.folder / name, step)
    run.records = open_records(run.config.folder, run.config.log.blocks, run.screen.say)
    if run.sink:
        settings = run.config.mlflow
        run.sink = MlflowSink(run.config.folder, settings.uri or "", settings.experiment)


def last_evaluated(folder: Path) -> int:
    return max((r["step"] for r in read_rows(folder / "metrics.jsonl") if "val/loss" in r), default=-1)
