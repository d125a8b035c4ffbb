"""What this machine can do with this model: precision, micro-batch, compilation. Each measured, each said.

None of these choices changes what a step is; they only decide how it is computed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from x1_pretrain.config import ModelConfig, RunConfig
from x1_pretrain.model.memory import sequence_bytes

Precision = Literal["bf16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

CPU_MICRO_BATCH_TOKENS = 8192  # more only costs memory: the caches of a CPU are full long before
CPU_MEMORY_SHARE = 0.3
POLL_S = 0.1
BF16_GAIN = 1.15  # what bf16 must be faster by to be chosen on a CPU


# ------------------------------------------------------------------------------------------------------------
# Precision


def choose_precision(requested: str, device: torch.device, model: ModelConfig) -> tuple[Precision, str]:
    """The precision of the computation and one line that says why."""
    if requested in ("bf16", "fp32"):
        return ("bf16" if requested == "bf16" else "fp32"), f"precision: {requested} (asked for)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16", f"precision: bf16 (compute capability {major}.{minor})"
        return "fp32", f"precision: fp32 (compute capability {major}.{minor} has no fast bf16)"
    gain = matmul_seconds(model, torch.float32) / matmul_seconds(model, torch.bfloat16)
    chosen: Precision = "bf16" if gain >= BF16_GAIN else "fp32"
    return (
        chosen,
        f"precision: {chosen} (measured: matrix products in bf16 take 1/{gain:.2f} of the time of fp32)",
    )


def matmul_seconds(model: ModelConfig, dtype: torch.dtype) -> float:
    """Time of the model's widest product at 2048 tokens; the best of several."""
    x = torch.randn(2048, model.d_model).to(dtype)  # (N, d)
    w = torch.randn(model.d_ff, model.d_model).to(dtype)  # (F, d)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - begun)
    return min(times)


# ------------------------------------------------------------------------------------------------------------
# Micro-batch


def divisors_up_to(blocks: int, limit: int) -> list[int]:
    """The micro-batches that divide a rank's blocks exactly, largest first."""
    return [n for n in range(min(blocks, limit), 0, -1) if blocks % n == 0]


def cpu_micro_batch(
    model: ModelConfig, blocks: int, precision: Precision, free_bytes: int
) -> tuple[int, str]:
    by_memory = max(1, int(free_bytes * CPU_MEMORY_SHARE / sequence_bytes(model, precision == "bf16")))
    by_cache = max(1, CPU_MICRO_BATCH_TOKENS // model.context)
    chosen = divisors_up_to(blocks, min(by_memory, by_cache))[0]
    return chosen, f"micro-batch: {chosen} sequences (CPU: at most {CPU_MICRO_BATCH_TOKENS} tokens at a time)"


def largest_fitting(
    blocks: int, probe: Callable[[int], float | None], limit_bytes: float
) -> tuple[int | None, str]:
    """The largest micro-batch whose dry run fits, tried upward until one does not; None if not even one
    sequence.

    `probe(n)` is the peak memory of n sequences in bytes, None when it runs out. No prediction: what a first
    pass allocates once, and what grows in steps, would spoil it, and small passes cost little.
    """
    best, peak_bytes = None, 0.0
    for candidate in reversed(divisors_up_to(blocks, blocks)):
        peak = probe(candidate)
        if peak is None or peak > limit_bytes:
            break
        best, peak_bytes = candidate, peak
    if best is None:
        return None, f"not even one sequence fits into {limit_bytes / 2**30:.1f} GiB"
    beyond = "" if best == blocks else "; more did not fit"
    usable = f"peak {peak_bytes / 2**30:.1f} GiB of {limit_bytes / 2**30:.1f} GiB usable"
    return best, f"micro-batch: {best} sequences (dry run: {usable}{beyond})"


def cuda_peak(dry_run: Callable[[int], None], device: torch.device) -> Callable[[int], float | None]:
    """A probe for `largest_fitting`: peak memory of a dry run on the GPU, None when it runs out."""

    def probe(sequences: int) -> float | None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            dry_run(sequences)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return float(torch.cuda.max_memory_reserved(device))

    return probe


# ------------------------------------------------------------------------------------------------------------
# Compilation: tried in a process of its own, because a compiler can hang or crash as well as raise


@dataclass(frozen=True)
class Compilation:
    """The mode to use ("off" for none), and what happened on the way to it."""

    mode: str
    message: str


def compile_modes(requested: str, device: torch.device, deterministic: bool = False) -> list[str]:
    """The modes to try, best first. Max-autotune chooses by timing: two starts may choose differently."""
    if requested == "max-autotune" and deterministic:
        return ["default"]
    if requested == "auto":
        return ["default"] if device.type == "cuda" else []
    return {"off": [], "default": ["default"], "max-autotune": ["max-autotune", "default"]}[requested]


def choose_compilation(
    config: RunConfig,
    device: torch.device,
    precision: Precision,
    micro_batch: int,
    interrupted: Callable[[], bool],
) -> Compilation:
    """Try the wanted mode at the final shape, bounded in time; fall back and say why."""
    modes = compile_modes(config.training.compile, device, config.training.deterministic)
    trouble: list[str] = []
    task = {
        "config": config.model_dump(mode="json"),
        "device": str(device),
        "precision": precision,
        "micro_batch": micro_batch,
    }
    for mode in modes:
        begun = time.perf_counter()
        failure = try_compile({**task, "mode": mode}, config.training.compile_timeout_s, interrupted)
        if failure is None:
            took = f"compile: {mode} (tried in {time.perf_counter() - begun:.0f} s)"
            return Compilation(mode, "; ".join([took, *trouble]))
        if interrupted():
            break
        trouble.append(f"{mode} failed: {failure}")
    if not modes:
        why = "asked for" if config.training.compile == "off" else "on a CPU only when asked for"
        return Compilation("off", f"compile: off ({why})")
    return Compilation("off", "; ".join(["compile: off", *trouble]))


def try_compile(task: dict[str, object], limit_s: float, interrupted: Callable[[], bool]) -> str | None:
    """None if the trial process compiled and ran the model, else one line on what went wrong."""
    command = [sys.executable, "-m", "x1_pretrain.runtime.compile_trial"]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe could fill up and stop the child
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(task).encode() + b"\n")
    child.stdin.flush()  # and stays open: the child ends when this process does
    deadline = time.monotonic() + limit_s
    while child.poll() is None and time.monotonic() < deadline and not interrupted():
        time.sleep(POLL_S)
    code = child.poll()
    if code is None:
        end_group(child)
        return "interrupted" if interrupted() else f"still compiling after {limit_s:.0f} s, ended"
    errors.seek(0)
    return None if code == 0 else _last_words(errors.read(), code)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End the trial and the compiler processes it started."""
    with suppress(ProcessLookupError):  # it ended by itself in between
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_words(stderr: bytes, code: int) -> str:
    """The line that names the exception: the last that looks like one, else the last of all."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\w*:", line)]
    return (named or lines or [f"exit code {code}"])[-1][:200]
