"""Train a model from a config. The same command starts a run and resumes it.

python -m x1_pretrain.train --config configs/x1-50m-a100.yaml --data-dir DIR --ckpt-dir DIR
python -m x1_pretrain.train --config ... --ranks 4
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from x1_pretrain import errors
from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config_reading import load_config, parse_assignment
from x1_pretrain.corpus.reader import Batch
from x1_pretrain.doctor.nccl_env import beside, pick_up
from x1_pretrain.learning import optimizers, stability, vitals
from x1_pretrain.learning.diagnosis import diagnose
from x1_pretrain.learning.schedule import learning_rate
from x1_pretrain.model.flops import mfu
from x1_pretrain.model.loss import IGNORED, chunk_terms, chunk_tokens, summed_loss
from x1_pretrain.money.rehearsal import rehearse
from x1_pretrain.records import checkpoint_files, console
from x1_pretrain.runtime import assemble, fit, health, memory, mirroring, ranks, spikes, telemetry
from x1_pretrain.runtime.budget import over_budget, tell_budget
from x1_pretrain.runtime.evaluating import evaluated, sample
from x1_pretrain.runtime.introduction import write_again
from x1_pretrain.runtime.run import Run, Update
from x1_pretrain.runtime.saving import save
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.start import get_ready, started
from x1_pretrain.runtime.world import ranks_wanted

# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run) -> int:
    """Get ready, train to the last step or to a signal, close. Returns the exit code."""
    if run.saved_step < 0 and not save(run):  # the first proof that a checkpoint fits
        raise errors.RefusedError(
            f"{run.config.checkpoint_folder}: the checkpoint of step {run.step} can't be saved (see above), "
            "so no later one could: make room or choose another --ckpt-dir"
        )
    run.enter("start")
    get_ready(run)
    run.health = health.open_health(run)
    spikes.catch_up(run)
    run.signals.nothing_to_save = True  # until the first step of this session, which may take long
    return finish(run, train_loop(run))


def train_loop(run: Run) -> int:
    """From the current step to the last. Returns the exit code."""
    while True:
        if run.world.any(run.signals.interrupted()):
            return leave(run)
        run.enter("other")
        tell_budget(run)
        mirroring.tell(run)
        done = run.step == run.total_steps
        if due(run, run.config.evaluation.every, run.evaluated_step) and not evaluate_and_sample(run):
            continue  # interrupted: the next turn leaves
        if due(run, run.config.checkpoint.every, run.saved_step, run.config.checkpoint.at):
            if over_budget(run):
                continue  # the next turn leaves
            saved = save(run)
            health.saw(run, "checkpoint")
            if not saved and done:
                run.event(
                    "signal", "the last step is done, its checkpoint is not saved: make room and relaunch"
                )
                return errors.INTERRUPTED
        if done:
            return errors.FINISHED
        health.saw(run, "other")
        run.enter("data")
        batch, waited_s = run.reader.next(run.signals.interrupted if run.world.size == 1 else lambda: False)
        if batch is None:
            continue
        begun = time.perf_counter()
        update = train_step(run, batch)
        if update is None:
            continue  # interrupted before the update: this step has not happened
        update.step_s, update.wait_s = time.perf_counter() - begun + waited_s, waited_s
        if update.judged.verdict == "rewind" and spikes.go_back(run, batch, update):
            continue
        run.step += 1
        run.signals.nothing_to_save = False
        if run.step % run.config.log.every == 0:
            assemble.synchronize(run.world)  # so that the time of the update is in the row it belongs to
            update.step_s = time.perf_counter() - begun + waited_s
        run.clock.count(update.step_s, waited_s)
        log(run, batch, update)


def due(run: Run, every: int, last: int, at: Collection[int] = ()) -> bool:
    """At every multiple of `every`, at the steps of `at` and at the end, but not twice at one step."""
    return (run.step % every == 0 or run.step in at or run.step == run.total_steps) and last < run.step


def train_step(run: Run, batch: Batch[Tensor]) -> Update | None:
    """One update from one global batch, or None if a signal came first."""
    run.enter("step")
    spikes.tell_injection(run)
    found = accumulate(run, batch.tokens)
    if found is None:
        run.optimizer.zero_grad(set_to_none=True)
        return None
    weights = list(run.decoder.parameters())
    run.world.sum_gradients_(weights)
    squares = vitals.group_squares(run.decoder)  # (G,)
    norm = squares.sum().sqrt()
    own = torch.cat([norm[None], squares])  # the first rank's: all must come to the same verdict
    if not run.world.first:
        own.zero_()
    numbers = run.world.sum_(torch.cat([found, own])).tolist()  # the one wait for the device
    loss, grad_norm = numbers[0], numbers[len(found)]
    run.enter("update")  # from here on the state is between two steps
    settings, clip = run.config.stability, run.config.optimizer.clip
    judged = stability.judge(run.stability, run.step + 1, loss, grad_norm, settings, clip)
    run.stability = judged.state
    usual = judged.verdict == "go" and not (judged.flagged or batch.injected)
    telemetry.learn_noise(run, usual, numbers[1 : len(found)], numbers[len(found) + 1 :])
    lr = learning_rate(run.step, run.config.optimizer, run.total_steps)
    if judged.verdict == "go":
        telemetry.look_at_gradients(run)
        optimizers.clip_(weights, judged.clip, norm.fill_(grad_norm))  # the same number on all ranks
        optimizers.set_learning_rate(run.optimizer, lr)
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if judged.state.streak:
        not_finite(run, judged, batch.tokens, loss, grad_norm)
    return Update(loss, grad_norm, lr, judged, batch.injected)


def accumulate(run: Run, tokens: Tensor) -> Tensor | None:
    """Gradients of the mean loss over all counted tokens of the step, a micro-batch at a time; this rank's
    part of that loss, of the tokens, and of what the first micro-batch says of the gradient's noise.
    tokens (n, T + 1). Out of memory: half the micro-batch and once more from the start."""
    here = float((tokens[:, 1:] != IGNORED).sum())  # on the CPU: nothing waits for the device
    counted = run.world.sum_(torch.full((), here, device=run.world.device))
    while True:
        total = torch.zeros((), device=run.world.device)
        first: Tensor | None = None
        with suppress(torch.OutOfMemoryError):
            for rows in torch.split(tokens, telemetry.micro_batch(run, len(tokens))):
                if run.interrupted() and run.world.size == 1:
                    return None
                loss = forward(run, rows.to(run.world.device, non_blocking=True)) / counted
                torch.autograd.backward(loss)
                total += loss.detach()
                if first is None:
                    first = telemetry.after_first(run, rows, len(tokens), counted)
            assert first is not None
            return torch.cat([total[None], counted[None] / run.world.size, first])
        halve_micro_batch(run, len(tokens))  # out here the failed pass no longer holds its activations


def forward(run: Run, tokens: Tensor) -> Tensor:
    """Summed loss of some sequences, (B, T + 1)."""
    hidden = run.decoder.hidden(tokens[:, :-1])  # (B, T, d)
    targets = tokens[:, 1:].reshape(-1)  # (B T,)
    weight, vocab = run.decoder.output_weight, run.decoder.config.vocab
    size, terms = chunk_tokens(tokens.device), run.machine.terms
    return summed_loss(hidden.flatten(0, 1), weight, targets, vocab, size, terms, run.config.training.z_loss)


def halve_micro_batch(run: Run, blocks: int) -> None:
    """A smaller micro-batch is the same step, slower."""
    before = run.machine.micro_batch
    if before == 1 or run.world.size > 1:  # ranks would have to agree; the dry run is there to prevent it
        raise errors.RefusedError(
            f"out of memory at step {run.step} with a micro-batch of {before}; relaunch with "
            f"--set training.micro_batch={max(1, before // 2)}"
            + (" and a smaller model" if before == 1 else "")
        ) from None
    run.machine.micro_batch = fit.divisors_up_to(blocks, before // 2)[0]
    # The blocks were compiled for the old shape, and compiling in mid-run could not be interrupted.
    run.decoder.uncompile_blocks()
    run.machine.terms, run.machine.compile_mode = chunk_terms, "off"
    run.optimizer.zero_grad(set_to_none=True)
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()
    after = run.machine.micro_batch
    run.event(
        "micro_batch",
        f"out of memory with a micro-batch of {before}: going on with {after} x {blocks // after} "
        "accumulated; the global batch is the same",
    )


def not_finite(run: Run, judged: stability.Judged, tokens: Tensor, loss: float, grad_norm: float) -> None:
    """The update was not made. Say so; after a streak, stop: the weights are still good."""
    where = f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}"
    run.event("not_finite", f"{where}: not finite, this update was not made", loss=loss, grad_norm=grad_norm)
    if judged.state.streak == 1 or judged.verdict == "stop":
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        deep = judged.verdict == "stop"
        found = diagnose(run.decoder, run.optimizer, ids, targets, run.machine.precision, deep)
        run.event("diagnosis", "\n  ".join(["  diagnosis:", *found.lines()]))
    if judged.verdict == "stop":
        save(run)  # the weights are still those before the first of them
        last = checkpoint_files.folder_name(max(run.saved_step, 0))
        raise NotFiniteError(
            f"{where}: {judged.state.streak} steps in a row were not finite. The weights are those before "
            f"them; the last checkpoint is {last}. Next: {found.next_step}"
        )


class NotFiniteError(errors.UserError):
    exit_code = errors.FAULT


# ------------------------------------------------------------------------------------------------------------
# Log, evaluate, leave


def log(run: Run, batch: Batch[Tensor], update: Update) -> None:
    """The records of one finished step. The row is written before the line is printed."""
    run.enter("other")
    health.saw(run, "step")
    if run.records:
        telemetry.record_step(run, run.records, run.step, batch, update)
    spikes.tell(run, update)
    run.telemetry.count(update)
    if run.step % run.config.log.every and run.step != run.total_steps:
        run.screen.at(run.step)
        return
    if run.records and run.records.deleted:
        write_again(run)
        save(run)
    row = run.row(**{"train/loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr})
    row |= pace(run) | telemetry.row(run, batch.tokens, update) | memory.reading(run.world.device)
    row |= {"context": run.config.model.context, "attention/flop_share": run.flops.attention_share}
    before, after = run.order.blocks_taken(run.step - 1), run.order.blocks_taken(run.step)
    for name, first, last in zip(run.corpora, before, after, strict=True):
        row[f"mixture/{name}"] = (last - first) / run.config.batch_blocks
    if run.guard:
        row |= run.guard.row(run.own_tokens)
    if run.health:
        row |= run.health.host.row()
    if run.mirror:
        row |= run.mirror.row()
    row |= run.clock.row()
    if run.records:
        run.records.metrics.append(row)
    run.last_rows.append(row)
    eta_s = run.clock.eta_s(run.total_steps - run.step)
    run.screen.say(console.train_line(row, run.total_steps, eta_s))
    run.screen.at(run.step, f"loss {update.loss:.4f}" + (f"  ETA {console.duration(eta_s)}" if eta_s else ""))
    for line in run.sink.news() if run.sink else ():
        run.event("mlflow", line)
    health.look(run, row)
    run.clock.reset()


def pace(run: Run) -> dict[str, float]:
    """Speed since the last row, without evaluation, checkpoints and the compiling first step."""
    if not run.clock.steps:
        return {}
    rate = run.clock.steps * run.config.training.batch_tokens / run.clock.step_s
    row = {"tokens_per_sec": rate, "flops_per_sec": rate * run.flops.causal}
    row["data/wait_share"] = run.clock.wait_s / run.clock.step_s
    if peak := run.machine.peak_flops_per_sec:
        row |= {"mfu": mfu(rate, run.flops.palm, peak), "mfu_causal": mfu(rate, run.flops.causal, peak)}
    return row


def evaluate_and_sample(run: Run) -> bool:
    """Validation loss per domain, and what the model says; False if it was interrupted."""
    found = evaluated(run)
    health.saw(run, "evaluation")
    if found is None or not sample(run):
        return False
    run.evaluated_step = run.step
    health.saw(run, "sampling")
    if found:
        row = run.row(**found) | run.clock.row()
        if run.records:
            run.records.metrics.append(row)
        run.screen.say(console.evaluation_line(row))
    return True


def leave(run: Run) -> int:
    """A signal or the budget guard asked: save, say how to go on. Over budget: at once, without saving."""
    run.enter("leaving")
    why = run.signals.requested or "another rank was asked to stop"
    code = run.world.from_first(run.signals.exit_code)
    tell_budget(run)
    if code == errors.BUDGET_STOPPED:
        good = f"step {run.saved_step}" if run.saved_step >= 0 else "none"
        run.event("over_budget", f"stopped at once by {why}; the last checkpoint is {good}", exit_code=code)
        return code
    if code == errors.REFUSED:  # another writer has the run: what would be saved here is not the run's
        run.event("lease_lost", f"stopped: {why}", exit_code=code)
        return code
    safe = run.saved_step == run.step or save(run)
    code = run.world.from_first(run.signals.exit_code)  # a harder stop may have come while it saved
    at = f"at step {run.step}" if safe else f"from step {max(run.saved_step, 0)}, later steps are lost"
    if code != errors.INTERRUPTED:
        how = f"to go on {at}, add --raise-ceiling-to USD to the same command"
        run.event("budget_stopped", f"stopped by {why}; {how}", exit_code=code, **run.clock.row())
        return code
    said = f"stopped by {why}; relaunch the same command to go on {at}"
    run.event("signal", said, signal=why, **run.clock.row())
    return code


def finish(run: Run, code: int) -> int:
    """Last words; the terminal status goes to MLflow. Rows that never reached the disk make it a fault."""
    run.enter("leaving")
    if code == errors.FINISHED:
        spikes.close(run)
        folder = run.config.folder
        said = f"finished: {run.total_steps:,} steps, {run.tokens:,} tokens in {folder}"
        run.event("finish", said, **run.clock.row())
        run.screen.say(f"next: x1 report {folder}, x1 export {folder} --output DIR, x1 verify {folder}")
    at_once = code == errors.BUDGET_STOPPED
    if run.guard:
        run.guard.close(3.0 if at_once else 10.0)
    if run.sink:
        status = "FINISHED" if code == errors.FINISHED else "KILLED"
        run.sink.close(status, **({"timeout_s": 3.0} if at_once else {}))
        for line in run.sink.news():
            run.event("mlflow", line)
    lost = run.records.sync() if run.records else 0
    code = mirroring.end(run, code)
    run.world.close()
    if lost:
        raise UnwrittenError(
            f"{run.config.folder}: {lost} rows of the records could not be written (see above); the "
            "checkpoints are good. Free some space before the next run"
        )
    return code


class UnwrittenError(errors.UserError):
    exit_code = errors.FAULT


# ------------------------------------------------------------------------------------------------------------
# The command


def overrides_from(assignments: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags by config path; `--set` wins over a flag."""
    given = {path: value for path, value in flags.items() if value is not None}
    return given | dict(parse_assignment(text) for text in assignments)


Flag = typer.Option


def main(
    config: Annotated[Path, Flag(help="the run's YAML file", show_default=False)],
    data_dir: Annotated[
        str | None, Flag(help="corpus folder, made by tokenize_data [config: data.dir]")
    ] = None,
    ckpt_dir: Annotated[str | None, Flag(help="where checkpoints go [default: in the run folder]")] = None,
    run_dir: Annotated[str | None, Flag(help="the run folder [default: runs/<name>]")] = None,
    total_steps: Annotated[int | None, Flag(help="updates in all [training.total_steps]")] = None,
    ckpt_every: Annotated[int | None, Flag(help="steps between checkpoints [checkpoint.every]")] = None,
    eval_every: Annotated[int | None, Flag(help="steps between evaluations [evaluation.every]")] = None,
    log_every: Annotated[int | None, Flag(help="steps between log lines [log.every]")] = None,
    mlflow_uri: Annotated[
        str | None, Flag(help="also send metrics there, e.g. file:///workspace/mlruns")
    ] = None,
    mlflow_experiment: Annotated[str | None, Flag(help="MLflow experiment [mlflow.experiment]")] = None,
    resume_from_latest: Annotated[
        bool,
        Flag(
            "--resume-from-latest/--fresh",
            help="go on from the newest good checkpoint, or refuse if one exists",
        ),
    ] = True,
    branch_from: Annotated[
        Path | None, Flag(help="a new run that goes on from another run's checkpoint folder")
    ] = None,
    budget_cap_usd: Annotated[
        float | None, Flag(help="the ceiling in dollars: never passed [budget.cap_usd]")
    ] = None,
    budget_curr_cost_uri: Annotated[
        str | None, Flag(help="where a sidecar says what was spent: a path, file:// or http(s)://")
    ] = None,
    dry_run_budget: Annotated[
        bool, Flag("--dry-run-budget", help="try every branch of the guard, with real alerts, and leave")
    ] = False,
    raise_ceiling_to: Annotated[
        float | None, Flag(help="a person's decision to go on after the guard stopped the run")
    ] = None,
    inject_spike_at_step: Annotated[
        int | None,
        Flag(help="a rehearsal: the five batches after this step become rare tokens [stability...]"),
    ] = None,
    mirror: Annotated[
        str | None,
        Flag(help="copies of the run go there: s3://BUCKET/RUNS, gs://, az://, hf://, a folder [mirror.uri]"),
    ] = None,
    mirror_data: Annotated[bool, Flag("--mirror-data", help="the corpora too [mirror.data]")] = False,
    resume_from: Annotated[
        str | None, Flag(help="go on with a mirrored run, s3://BUCKET/RUNS/NAME, and mirror it there")
    ] = None,
    deterministic: Annotated[bool, Flag(help="bitwise repeatable steps (slower on a GPU)")] = False,
    device: Annotated[str, Flag(help="cpu, cuda or auto")] = "auto",
    ranks_: Annotated[
        str, Flag("--ranks", metavar="N", help="processes, one a GPU of this machine; auto: all of them")
    ] = "1",
    set_: Annotated[
        list[str], Flag("--set", metavar="FIELD=VALUE", help="override any config field; repeatable")
    ] = [],  # noqa: B006
) -> int:
    """Train a model from a config. The same command starts a run and resumes it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks for stacks, once there is a watchdog to write them
    flags = {
        "data.dir": data_dir,
        "checkpoint.dir": ckpt_dir,
        "run_dir": run_dir,
        "training.total_steps": total_steps,
        "checkpoint.every": ckpt_every,
        "evaluation.every": eval_every,
        "log.every": log_every,
        "mlflow.uri": mlflow_uri,
        "mlflow.experiment": mlflow_experiment,
        "budget.cap_usd": budget_cap_usd,
        "budget.curr_cost_uri": budget_curr_cost_uri,
        "stability.inject_spike_at_step": inject_spike_at_step,
        "training.deterministic": deterministic or None,
        "mirror.uri": mirror,
        "mirror.data": mirror_data or None,
    }
    loaded = load_config(config, overrides_from(set_, flags))
    if resume_from:
        loaded = mirroring.resumed_from(resume_from, loaded)
    if data_dir and loaded.data.corpora:
        raise errors.UserError(
            f"--data-dir {data_dir}: the config names several corpora (data.corpora: "
            f"{', '.join(loaded.data.corpora)}); "
            "set their folders with --set data.corpora.NAME.dir=DIR"
        )
    if dry_run_budget:
        return rehearse(loaded)
    if (size := ranks_wanted(ranks_, device)) > 1:
        loaded.blocks_per_rank(size)
        return ranks.run(size)
    if (picked := pick_up(config, os.environ)) and not ranks.place()[0]:
        print(f"from {beside(config)}: {' '.join(f'{key}={value}' for key, value in picked.items())}")
    with (
        Signals(quiet=ranks.place()[0] > 0) as signals,
        started(
            loaded,
            signals,
            not resume_from_latest,
            device,
            raise_ceiling_to,
            branch_from,
            must_be_mirrored=resume_from is not None,
        ) as run,
    ):
        return train(run) if run else errors.FINISHED  # none: it was finished before


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.train"))
