"""One step of the run, dry: the model at its final shape, its micro-batch, speed and memory, compiled or not.

First as it is, then compiled: whatever a compiler does, the first measurement stands. Random tokens, because
the speed does not depend on the text. One GPU: what several cost each other, the all-reduce is measured for.

Parts: model, micro_batch, eager, compile, compiled; refused, where the run would be.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import AdamW

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.doctor.trial import Facts, Voice, answered
from x1_pretrain.errors import UserError
from x1_pretrain.learning import optimizers
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import chunk_tokens, summed_loss
from x1_pretrain.model.memory import training_memory
from x1_pretrain.runtime import assemble
from x1_pretrain.runtime.assemble import Machine
from x1_pretrain.runtime.fit import compile_modes, divisors_up_to
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.world import World, join

MEASURE_SHARE = 0.12  # of the time, for each measurement
COMPILE_SHARE = 0.8  # of what is left by then, over all modes that are tried
FEWEST = 3  # micro-batches measured, where there is time
MOST = 40


@dataclass(frozen=True)
class Bench:
    """What is measured with."""

    config: RunConfig
    world: World
    decoder: Decoder
    optimizer: AdamW
    machine: Machine


def answer(task: Facts, voice: Voice) -> None:
    """`task`: the config with its vocabulary and a rank's share of the batch, device, limit_s."""
    begun = time.monotonic()
    try:
        bench = build(task)
        voice.say("model", precision=bench.machine.said[0], attention=bench.machine.said[1])
        fit(bench, "off", 0.0)
        said = bench.machine.said[-2]
        facts = fitting(bench, MEASURE_SHARE * task["limit_s"])
        micro, blocks = bench.machine.micro_batch, bench.config.batch_blocks
        voice.say("micro_batch", sequences=micro, blocks=blocks, said=said)
        voice.say("eager", **facts)
        left_s = task["limit_s"] - (time.monotonic() - begun)
        try_compiled(bench, voice, left_s, MEASURE_SHARE * task["limit_s"])
    except UserError as error:
        voice.say("refused", message=str(error))


def fitting(bench: Bench, limit_s: float) -> Facts:
    """Measured; out of memory with the moments there, with half the micro-batch, as the run does it."""
    while True:
        with suppress(torch.OutOfMemoryError):
            return measure(bench, limit_s)
        micro = bench.machine.micro_batch
        if micro == 1:
            raise UserError("out of memory with one sequence at a time; a smaller model or context is needed")
        bench.machine.micro_batch = divisors_up_to(bench.config.batch_blocks, micro // 2)[0]
        bench.decoder.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def build(task: Facts) -> Bench:
    """As a run is built, without a run."""
    config = parse_config(task["config"], "doctor")
    world = join(task["device"])
    if config.training.deterministic:
        assemble.be_deterministic(world.device)
    return Bench(config, world, *assemble.build_model(config, world, None))


def fit(bench: Bench, mode: str, compile_s: float) -> None:
    """The run's own search, with this mode of compilation and so long for each."""
    changed: dict[str, Any] = {"compile": mode}
    if mode != "off":
        changed |= {"micro_batch": bench.machine.micro_batch, "compile_timeout_s": compile_s}
    training = bench.config.training.model_copy(update=changed)
    config = bench.config.model_copy(update={"training": training})
    assemble.fit_machine(config, bench.world, bench.decoder, bench.optimizer, bench.machine, Signals())


def try_compiled(bench: Bench, voice: Voice, left_s: float, measure_s: float) -> None:
    """Max-autotune where the config wants it, then default, then none: as the run falls back."""
    training = bench.config.training
    wanted = training.compile
    modes = compile_modes(wanted, bench.world.device, training.deterministic)
    bench.optimizer.state.clear()  # a run compiles before its first update: as much memory must be free
    each_s = (left_s - measure_s) * COMPILE_SHARE / (len(modes) + 1)  # and once more in this process
    fit(bench, wanted, max(1.0, min(each_s, training.compile_timeout_s)))
    voice.say("compile", wanted=wanted, mode=bench.machine.compile_mode, message=bench.machine.said[-1])
    if bench.machine.compile_mode != "off":
        voice.say("compiled", **measure(bench, measure_s))


def measure(bench: Bench, limit_s: float) -> Facts:
    """Seconds of a micro-batch, of an update and of a forward without gradients; peak memory of all that."""
    sequences, probe_s = affordable(bench, limit_s)
    cuda = assemble.is_cuda(bench.world)
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.world.device)
    micro_s: list[float] = []
    end = time.perf_counter() + limit_s
    while len(micro_s) < FEWEST or (time.perf_counter() < end and len(micro_s) < MOST):
        micro_s.append(micro_step(bench, sequences))
        if time.perf_counter() > end + limit_s:  # far slower than the probe: what there is must do
            break
    update_s = min(update(bench) for _ in range(2))  # the first makes the moments
    micro_step(bench, sequences)  # with the moments there: the peak
    with torch.no_grad():
        micro_step(bench, sequences)  # not counted: another program
        forward_s = micro_step(bench, sequences)
    bench.decoder.zero_grad(set_to_none=True)
    bf16 = bench.machine.precision == "bf16"
    return {
        "sequences": sequences,
        "probe_s": probe_s,
        "micro_s": micro_s,
        "update_s": update_s,
        "forward_s": forward_s,
        "peak_bytes": torch.cuda.max_memory_allocated(bench.world.device) if cuda else None,
        "resident_bytes": resident_bytes(),
        "predicted_bytes": training_memory(bench.config.model, sequences, bf16).total,
    }


def affordable(bench: Bench, limit_s: float) -> tuple[int, float]:
    """The micro-batch, or on a slow device as many of its sequences as can be measured in time."""
    wanted = bench.machine.micro_batch
    if assemble.is_cuda(bench.world) or bench.machine.compile_mode != "off":
        micro_step(bench, wanted)
        return wanted, micro_step(bench, wanted)
    micro_step(bench, 1)
    one_s = micro_step(bench, 1)
    return max(1, min(wanted, int(limit_s / (FEWEST + 3) / one_s))), one_s


def micro_step(bench: Bench, sequences: int) -> float:
    """Seconds of a forward, and of a backward where gradients are on."""
    model, device = bench.config.model, bench.world.device
    ids = torch.randint(model.vocab, (sequences, model.context + 1), device=device)  # (B, T + 1)
    assemble.synchronize(bench.world)
    begun = time.perf_counter()
    hidden = bench.decoder.hidden(ids[:, :-1]).flatten(0, 1)  # (B T, d)
    targets = ids[:, 1:].reshape(-1)  # (B T,)
    weight, terms = bench.decoder.output_weight, bench.machine.terms
    loss = summed_loss(hidden, weight, targets, model.vocab, chunk_tokens(device), terms) / targets.numel()
    if loss.requires_grad:
        torch.autograd.backward(loss)
    assemble.synchronize(bench.world)
    return time.perf_counter() - begun


def update(bench: Bench) -> float:
    """Seconds of norm, clip and update; as much for a small gradient as for a large one."""
    weights = list(bench.decoder.parameters())
    assemble.synchronize(bench.world)
    begun = time.perf_counter()
    norm = optimizers.global_norm(w.grad for w in weights if w.grad is not None)
    optimizers.clip_(weights, bench.config.optimizer.clip, norm)
    bench.optimizer.step()
    assemble.synchronize(bench.world)
    return time.perf_counter() - begun


def resident_bytes() -> int:
    """The most memory this process had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    answered(answer)
