"""What the loop asks of the machine at every row: is it well, does memory grow, is it as fast as planned?"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from x1_pretrain.config import RunConfig
from x1_pretrain.model.flops import flops_per_token
from x1_pretrain.model.gpus import peak_bf16_flops_per_sec
from x1_pretrain.model.memory import GIB, training_memory
from x1_pretrain.money.clock import Clock
from x1_pretrain.runtime import budget, machine_reading, memory
from x1_pretrain.runtime.assemble import is_cuda
from x1_pretrain.runtime.gpu_health import uuid_of
from x1_pretrain.runtime.host import HostWatch
from x1_pretrain.runtime.machine_reading import network_mount
from x1_pretrain.runtime.memory import LeakDetector
from x1_pretrain.runtime.pace import Facts, PaceKeeper, Slow
from x1_pretrain.runtime.run import Health, Run
from x1_pretrain.runtime.watchdog import suspended_line
from x1_pretrain.runtime.world import World


def open_health(run: Run) -> Health | None:
    """Watching begins; the first rank's business."""
    if not run.world.first:
        return None
    config, settings = run.config, run.config.telemetry
    host = HostWatch(settings, config.folder, config.checkpoint_folder, uuid_of(run.world.device))
    host.start()
    planned, facts = plan(config, run.world, (run.total_steps - run.step) * config.training.batch_tokens)
    cuda = is_cuda(run.world)
    facts = replace(
        facts,
        compile_mode=run.machine.compile_mode,
        compile_why=next((line for line in run.machine.said if line.startswith("compile")), ""),
        attention=run.machine.attention.removeprefix("attention: ").split()[0],
        flash_possible=cuda and "can't be imported" in run.machine.attention,
        micro_batch_was=run.machine.micro_batch,
        data_on_network=next((m for c in run.corpora.values() if (m := network_mount(c.path))), None),
    )
    memory.reading(run.world.device)  # the peak of the micro-batch's trials is no step's
    return Health(
        host,
        PaceKeeper(planned, settings.min_pace),
        facts,
        LeakDetector(settings.leak_gib, "this process's memory"),
        LeakDetector(settings.leak_gib, "GPU memory") if cuda else None,
    )


def plan(config: RunConfig, world: World, tokens: int) -> tuple[float | None, Facts]:
    """The speed that the run was priced with, and what that rests on. None under a clock that runs faster."""
    cuda, speed = is_cuda(world), Clock.from_environment().speed
    name = torch.cuda.get_device_name(world.device) if cuda else "CPU"
    work = budget.work(config, tokens, name, world.size, speed)
    peak = peak_bf16_flops_per_sec(name)
    flops = flops_per_token(config.model).palm
    facts = Facts(
        basis=work.kind,
        source=work.basis,
        peak_tokens_per_sec=peak * world.size / flops if peak else None,
        on_gpu=cuda,
    )
    return (work.tokens_per_sec if speed == 1 else None), facts


# ------------------------------------------------------------------------------------------------------------
# From the loop


def saw(run: Run, phase: memory.Phase) -> None:
    """At the end of a phase; microseconds."""
    if run.health:
        run.health.ram.saw(phase, memory.own_gib())
        if run.health.gpu:
            run.health.gpu.saw(phase, memory.level_gib(run.world.device))


def look(run: Run, row: dict[str, Any]) -> None:
    """After a row was written: what there is to say, a line each."""
    for seconds in run.watchdog.news():
        run.event("suspended", suspended_line(seconds), seconds=round(seconds, 1))
    if run.health is None:
        return
    for message, fields in run.health.host.news():
        run.event("host", message, **fields)
    tell_leaks(run, run.health)
    tell_peak(run, run.health, row)
    if slow := run.health.pace.saw(row, facts_now(run, run.health)):
        tell_slow(run, slow)


def tell_leaks(run: Run, health: Health) -> None:
    device = run.world.device
    rooms = (machine_reading.ram()[0] / GIB, memory.room_gib(device) if health.gpu else None)
    for detector, room in zip((health.ram, health.gpu), rooms, strict=True):
        if detector and (leak := detector.judge(time.monotonic(), room)):
            run.event("leak", leak.message, **leak.fields)


def tell_peak(run: Run, health: Health, row: dict[str, Any]) -> None:
    """Once, from the first row in which nothing was compiled: the prediction against this GPU."""
    if health.peak_told or "memory/peak_gib" not in row or run.clock.steps < run.config.log.every:
        return
    health.peak_told = True
    bf16 = run.machine.precision == "bf16"
    predicted = training_memory(run.config.model, run.machine.micro_batch, bf16).total / GIB
    measured = row["memory/peak_gib"]
    said = memory.predicted_vs_measured(predicted, measured)
    run.event("memory", said, predicted_gib=round(predicted, 3), measured_gib=round(measured, 3))


def facts_now(run: Run, health: Health) -> Facts:
    guard = run.guard
    return replace(
        health.facts,
        tokens_left=(run.total_steps - run.step) * run.config.training.batch_tokens,
        usd_per_hr=guard.limits.gate_usd_per_hr if guard else None,
        left_usd=guard.limits.ceiling_usd - guard.spent_usd
        if guard and guard.spent_usd is not None
        else None,
        micro_batch=run.machine.micro_batch,
        compile_mode=run.machine.compile_mode,
        machine=health.host.seen,
    )


def tell_slow(run: Run, slow: Slow) -> None:
    run.event("slow", slow.message, **slow.fields)
    if run.guard and slow.kind != "well":
        title = f"X1 {run.config.folder.name}: slower than {'planned' if slow.kind == 'plan' else 'usual'}"
        run.guard.notifier.alert(f"slow-{slow.kind}-{run.step}", title, slow.message)
