"""From a config to what the loop computes with: model, optimizer, and what this machine can do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.optim import AdamW

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.learning import optimizers
from x1_pretrain.model import attention, gpus
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import ChunkTerms, chunk_terms, chunk_tokens, compiled_chunk_terms, summed_loss
from x1_pretrain.model.memory import GPU_MEMORY_SHARE
from x1_pretrain.records import run_manifest
from x1_pretrain.runtime import fit
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.world import World


@dataclass
class Machine:
    """How this run is computed here. `said` is one line for each choice."""

    precision: fit.Precision
    attention: str
    said: list[str]
    micro_batch: int = 1
    evaluation_batch: int | None = None  # where less than that fits
    compile_mode: str = "off"
    terms: ChunkTerms = chunk_terms
    peak_flops_per_sec: float | None = None  # of all GPUs of the run; None: not known, so no MFU


def be_deterministic(device: torch.device) -> None:
    """Bitwise repeatable steps, for tests of exactness; slower on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False


def wanted_attention(config: RunConfig) -> attention.Requested:
    """flash_attn's backward adds in any order, which torch's deterministic switch does not see."""
    return "sdpa" if config.training.deterministic else config.training.attention


def build_model(config: RunConfig, world: World, remembered: str | None) -> tuple[Decoder, AdamW, Machine]:
    """Weights from the seed, on the device, in the precision chosen (a resumed run keeps the one it has)."""
    keep = remembered if config.training.precision == "auto" else None
    precision, why = world.from_first(
        fit.choose_precision(keep or config.training.precision, world.device, config.model)
    )
    if keep:
        why = f"precision: {precision} (as the run was started)"
    dtype = fit.DTYPES[precision]
    kernel, which = attention.choose(wanted_attention(config), world.device, dtype)
    if config.training.deterministic:
        which = "attention: sdpa (deterministic)"
    decoder = Decoder(config.model, compute_dtype=dtype, attention=kernel, seed=config.seed).to(world.device)
    machine = Machine(precision=precision, attention=which, said=[why, which])
    return decoder, optimizers.build(decoder, config.optimizer, world.device), machine


def fit_machine(
    config: RunConfig, world: World, decoder: Decoder, optimizer: AdamW, machine: Machine, signals: Signals
) -> None:
    """Micro-batch and compilation, found by trying."""
    found_here, how = _micro_batch(config, world, decoder, optimizer, machine.precision)
    machine.micro_batch = world.minimum(found_here or 0)
    if not machine.micro_batch:
        raise RefusedError(f"{how}; a smaller model.context or model is needed")
    if is_cuda(world):
        torch.cuda.empty_cache()  # the compile trial is another process on the same GPU
    found = fit.Compilation("off", "")
    if world.first:
        found = fit.choose_compilation(
            config, world.device, machine.precision, machine.micro_batch, signals.interrupted
        )
    found = world.from_first(found)
    machine.said += [how, found.message]
    if found.mode != "off" and not signals.interrupted():
        signals.nothing_to_save = True  # compiling can't be polled
        use_compiled(decoder, machine, found.mode, config.training.z_loss)
    if is_cuda(world) and machine.precision == "bf16":
        peak = gpus.peak_bf16_flops_per_sec(torch.cuda.get_device_name(world.device))
        machine.peak_flops_per_sec = peak * world.size if peak else None


def use_compiled(decoder: Decoder, machine: Machine, mode: str, z_loss: float) -> None:
    """Compile here what the trial compiled, at the shapes of training and of evaluation, and go on without if
    it fails all the same."""
    decoder.compile_blocks(mode)
    machine.compile_mode, machine.terms = mode, compiled_chunk_terms()
    try:
        dry_run(decoder, machine.micro_batch, machine.terms, z_loss)
        with torch.no_grad():
            dry_run(decoder, machine.micro_batch)
    except Exception as error:  # a compiler can raise anything; training does not depend on it
        decoder.uncompile_blocks()
        machine.compile_mode, machine.terms = "off", chunk_terms
        reason = " ".join(str(error).split())[:200]
        machine.said.append(f"compile: off after all ({type(error).__name__}: {reason})")
    decoder.zero_grad(set_to_none=True)


def _micro_batch(
    config: RunConfig, world: World, decoder: Decoder, optimizer: AdamW, precision: fit.Precision
) -> tuple[int | None, str]:
    wanted, blocks = config.training.micro_batch, config.blocks_per_rank(world.size)
    if wanted != "auto":
        if blocks % wanted:
            near = fit.divisors_up_to(blocks, wanted)[0]
            raise UserError(
                f"training.micro_batch {wanted} does not divide the {blocks} blocks of a rank's step; "
                f"the nearest below is {near}"
            )
        return wanted, f"micro-batch: {wanted} sequences (asked for)"
    if not is_cuda(world):
        return fit.cpu_micro_batch(config.model, blocks, precision, psutil.virtual_memory().available)
    total = torch.cuda.get_device_properties(world.device).total_memory
    moments = 0 if optimizer.state else 8 * sum(p.numel() for p in decoder.parameters())  # not there yet
    probe = fit.cuda_peak(lambda n: dry_run(decoder, n), world.device)
    found = fit.largest_fitting(blocks, probe, total * GPU_MEMORY_SHARE - moments)
    decoder.zero_grad(set_to_none=True)
    return found


def dry_run(decoder: Decoder, sequences: int, terms: ChunkTerms = chunk_terms, z_loss: float = 0.0) -> None:
    """A forward of `sequences` full sequences, and a backward where gradients are on; no update."""
    device = decoder.output_weight.device
    ids = torch.zeros(sequences, decoder.config.context, dtype=torch.int64, device=device)  # (B, T)
    hidden = decoder.hidden(ids).flatten(0, 1)  # (B T, d)
    weight, vocab = decoder.output_weight, decoder.config.vocab
    loss = summed_loss(hidden, weight, ids.flatten(), vocab, chunk_tokens(device), terms, z_loss)
    if loss.requires_grad:
        torch.autograd.backward(loss)


def synchronize(world: World) -> None:
    """Wait for the GPU, so that a clock read now has the work in it."""
    if is_cuda(world):
        torch.cuda.synchronize(world.device)


def is_cuda(world: World) -> bool:
    return world.device.type == "cuda"


def hardware(world: World) -> dict[str, Any]:
    """What the manifest says of the machine."""
    found: dict[str, Any] = {
        "device": "cpu",
        "count": world.size,
        "world_size": world.size,
        **run_manifest.host(),
    }
    if is_cuda(world):
        properties = torch.cuda.get_device_properties(world.device)
        found |= {"device": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found
