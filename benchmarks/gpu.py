"""Every check that needs a GPU, in one command and one table.

    python benchmarks/gpu.py --output gpu.json             all, in under eight minutes
    python benchmarks/gpu.py --only train,resume           some of them
    python benchmarks/gpu.py --smoke                       a tiny model on a CPU: do the checks run?

Each check runs in a process of its own with a time limit: one that raises, hangs or dies is a row that says
so, and the rest go on. Needs torch with CUDA and transformers, no network and no data: it makes a corpus.
Exit code 0: every check gave its numbers. 1: at least one row says `failed`. 2: no GPU.
"""

from __future__ import annotations

import sys

sys.path.sort(key=__file__.rpartition("/")[0].__eq__)  # this folder last: it has another `tokenize`

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout, whatever is installed

from x1_pretrain.config import ModelConfig, RunConfig
from x1_pretrain.config_reading import load_config
from x1_pretrain.learning import optimizers
from x1_pretrain.model import attention, flops, gpus, huggingface, loss
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.memory import GPU_MEMORY_SHARE, largest_micro_batch, training_memory
from x1_pretrain.runtime import assemble, fit

Work = Callable[[], object]

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs/x1-50m-a100.yaml"
SMOKE = {"layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "d_ff": 128, "context": 64, "vocab_size": 512}
END = "<|endoftext|>"
DOCUMENT_TOKENS = 500
ROUNDS = 5
LIMIT_S = 470.0  # of all checks together
LEAST_S = 15.0  # with less left, a check is not started


@dataclass(frozen=True)
class Row:
    """One line of the table. A value that is text has no unit."""

    check: str
    what: str
    value: float | str
    unit: str = ""
    note: str = ""

    @property
    def failed(self) -> bool:
        return isinstance(self.value, str) and self.value.startswith("failed")


@dataclass(frozen=True)
class Bench:
    """What every check gets: where it runs, how big, and a folder for files."""

    smoke: bool
    folder: Path
    compile: str = "default"  # of the training run

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def overrides(self) -> dict[str, Any]:
        return {f"model.{name}": value for name, value in SMOKE.items()} if self.smoke else {}

    @property
    def config(self) -> RunConfig:
        batch = {"training.batch_tokens": 64 * SMOKE["context"]} if self.smoke else {}
        return load_config(CONFIG, self.overrides | batch)

    def pick(self, full: Any, small: Any) -> Any:
        """A size for the GPU, or for the smoke run."""
        return small if self.smoke else full

    def ids(self, sequences: int, extra: int = 0) -> Tensor:
        """Random tokens, (B, T + extra)."""
        model = self.config.model
        shape = (sequences, model.context + extra)
        return torch.randint(0, model.vocab, shape, generator=torch.Generator().manual_seed(0)).to(
            self.device
        )


# Time and memory


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def once_s(device: torch.device, work: Work) -> float:
    """Seconds until the device has done it."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def median_s(device: torch.device, work: Work, repeats: int) -> float:
    """Seconds of one call: the median over rounds of `repeats` calls, after one that warms up."""
    work()
    return statistics.median(once_s(device, lambda: repeat(work, repeats)) for _ in range(ROUNDS)) / repeats


def repeat(work: Work, times: int) -> None:
    for _ in range(times):
        work()


def peak_gib(device: torch.device, work: Work) -> float:
    """What a call needs beyond what is allocated before it; NaN on a CPU."""
    if device.type != "cuda":
        work()
        return math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def peak_flops(device: torch.device) -> float:
    """The data sheet's bf16 peak, FLOP/s; NaN when the table has none."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return gpus.peak_bf16_flops_per_sec(name) or math.nan


def mfu_note(bench: Bench, tokens_per_sec: float) -> str:
    """Both conventions by name."""
    if math.isnan(peak_flops(bench.device)):
        return "no peak known, so no MFU"
    per_token, peak = flops.flops_per_token(bench.config.model), peak_flops(bench.device)
    shares = {c: flops.mfu(tokens_per_sec, getattr(per_token, c), peak) for c in ("palm", "causal")}
    return ", ".join(f"MFU {name} {share:.3f}" for name, share in shares.items())


# The machine


def device(bench: Bench) -> Iterator[Row]:
    """What it is, and what is installed."""
    if bench.device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        capability = f"compute capability {found.major}.{found.minor}, {found.multi_processor_count} SMs"
        yield Row("device", "name", found.name, note=capability)
        yield Row("device", "memory", found.total_memory / 2**30, "GiB", driver())
    yield Row("device", "table peak, bf16", peak_flops(bench.device) / 1e12, "TFLOP/s", "model/gpus.toml")
    cores = len(os.sched_getaffinity(0))
    yield Row("device", "python", platform.python_version(), note=f"{cores} cores, {platform.platform()}")
    yield Row("device", "torch", torch.__version__, note=f"CUDA {torch.version.cuda}")
    for package in ("triton", "transformers", "flash-attn", "numpy", "safetensors", "tokenizers"):
        try:
            yield Row("device", package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Row("device", package, "not installed")


def driver() -> str:
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi did not answer"
    return f"{query}: {done.stdout.strip()}"


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device reaches at best: the measure for everything below."""
    model, tokens = bench.config.model, bench.pick(16384, 64)
    big = bench.pick(8192, 64)
    shapes = {f"{big} x {big} x {big}": (big, big, big)}
    shapes["a layer's gate"] = (tokens, model.d_model, model.d_ff)
    shapes["logits of a chunk"] = (
        bench.pick(loss.chunk_tokens(bench.device), 64),
        model.d_model,
        model.padded_vocab,
    )
    for name, (n, k, m) in shapes.items():
        a, b = (torch.randn(s, device=bench.device).bfloat16() for s in ((n, k), (k, m)))
        rate = 2.0 * n * k * m / median_s(bench.device, partial(torch.matmul, a, b), 10)
        share = f"{rate / peak_flops(bench.device):.3f} of the table's peak; {n} x {k} x {m}, random numbers"
        yield Row("ceilings", f"bf16 product, {name}", rate / 1e12, "TFLOP/s", share)
    source = torch.empty(bench.pick(2 << 30, 1 << 20), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = median_s(bench.device, lambda: target.copy_(source), 10)
    yield Row("ceilings", "memory copy", 2 * len(source) / seconds / 1e9, "GB/s", "read + written")


# Kernels of the model


def attention_kernels(bench: Bench) -> Iterator[Row]:
    """Forward and backward of causal attention, bf16, each way there is."""
    model, dtype = bench.config.model, torch.bfloat16
    _, line = attention.choose("auto", bench.device, dtype)
    yield Row("attention", "choice", line)
    sizes = [(bench.pick(16, 2), model.context, h, model.head_size) for h in (model.heads, model.kv_heads)]
    q, k, v = (torch.randn(sizes[i], device=bench.device).to(dtype).requires_grad_() for i in (0, 1, 1))
    tokens = q.shape[0] * q.shape[1]
    work_flops = 6.0 * tokens * model.heads * model.head_size * (model.context + 1)
    for name, kernel in attention_ways(bench, model.heads // model.kv_heads).items():
        try:
            seconds = median_s(bench.device, partial(gradients, kernel, q, k, v), bench.pick(20, 2))
        except Exception as error:  # a backend that does not do this shape is an answer
            yield Row("attention", name, "not available", note=one_line(error))
            continue
        note = f"{work_flops / seconds / 1e12:.1f} TFLOP/s (causal); q {list(q.shape)}, kv {list(k.shape)}"
        yield Row("attention", name, seconds * 1e3, "ms", note)


def attention_ways(bench: Bench, groups: int) -> dict[str, attention.Attention]:
    """Name -> kernel."""

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.sdpa(q, *(x.repeat_interleave(groups, dim=2) for x in (k, v)))

    def only(backend: SDPBackend) -> attention.Attention:
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention.sdpa(q, k, v)

        return kernel

    ways: dict[str, attention.Attention] = {
        "sdpa, enable_gqa": attention.sdpa,
        "sdpa, heads repeated": repeated,
    }
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    ways |= {f"sdpa, enable_gqa, {name} only": only(backend) for name, backend in backends.items()}
    flash, line = attention.choose("flash", bench.device, torch.bfloat16)
    return ways if flash is attention.sdpa else {**ways, line: flash}


def gradients(kernel: attention.Attention, *inputs: Tensor) -> None:
    out = kernel(*inputs)
    torch.autograd.grad(out, inputs, out.detach())


def loss_chunks(bench: Bench) -> Iterator[Row]:
    """Forward and backward of the loss alone: chunk sizes, eager and compiled, and all logits at once."""
    model, tokens = bench.config.model, bench.pick(32768, 256)
    hidden = torch.randn(tokens, model.d_model, device=bench.device).bfloat16().requires_grad_()  # (N, d)
    weight = (torch.randn(model.padded_vocab, model.d_model, device=bench.device) * 0.02).requires_grad_()
    targets = torch.randint(0, model.vocab, (tokens,), device=bench.device)  # (N,)

    def full() -> None:
        logits = F.linear(hidden, weight.to(hidden.dtype))[:, : model.vocab]  # (N, V)
        back(F.cross_entropy(logits.float(), targets, reduction="sum"), hidden, weight)

    def chunked(chunk: int, terms: loss.ChunkTerms) -> None:
        back(loss.summed_loss(hidden, weight, targets, model.vocab, chunk, terms), hidden, weight)

    yield loss_row(bench, tokens, "F.cross_entropy, all logits", full)
    for chunk in bench.pick([1024, 2048, 4096, 8192, 16384, 32768], [64, 256]):
        yield loss_row(bench, tokens, f"chunks of {chunk}", partial(chunked, chunk, loss.chunk_terms))
        torch.compiler.reset()
        terms = loss.compiled_chunk_terms()
        yield loss_row(bench, tokens, f"chunks of {chunk}, compiled", partial(chunked, chunk, terms))


def back(total: Tensor, *leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(total)


def loss_row(bench: Bench, tokens: int, what: str, work: Work) -> Row:
    try:
        first_s = once_s(bench.device, work)
        seconds, gib = median_s(bench.device, work, 2), peak_gib(bench.device, work)
    except torch.OutOfMemoryError:
        return Row("loss", what, "out of memory")
    return Row(
        "loss", what, seconds * 1e3, "ms", f"{tokens} tokens, peak +{gib:.2f} GiB, first {first_s:.1f} s"
    )


# The decoder


def build(bench: Bench, mode: str = "off", precision: str = "bf16") -> tuple[Decoder, loss.ChunkTerms]:
    """The decoder as the training loop has it, and the terms of its loss."""
    dtype = fit.DTYPES[precision]
    kernel, _ = attention.choose("auto", bench.device, dtype)
    decoder = Decoder(bench.config.model, compute_dtype=dtype, attention=kernel, seed=1).to(bench.device)
    if mode == "off":
        return decoder, loss.chunk_terms
    decoder.compile_blocks(mode)
    return decoder, loss.compiled_chunk_terms()


def forward_backward(decoder: Decoder, terms: loss.ChunkTerms, ids: Tensor) -> None:
    """Gradients of the mean loss; ids (B, T + 1)."""
    decoder.zero_grad(set_to_none=True)
    hidden = decoder.hidden(ids[:, :-1]).flatten(0, 1)  # (B T, d)
    targets, weight = ids[:, 1:].flatten(), decoder.output_weight
    total = loss.summed_loss(
        hidden, weight, targets, decoder.config.vocab, loss.chunk_tokens(ids.device), terms
    )
    torch.autograd.backward(total / len(targets))


def decoder_speed(bench: Bench) -> Iterator[Row]:
    """Forward and backward at several micro-batches, eager and compiled."""
    for mode in ("off", "default"):
        yield from speeds(bench, "decoder", mode, bench.pick([8, 32, 128], [2]))


def autotune(bench: Bench) -> Iterator[Row]:
    """The same with max-autotune: in a check of its own, since tuning takes long."""
    yield from speeds(bench, "autotune", "max-autotune", bench.pick([32], [2]))


def speeds(bench: Bench, check: str, mode: str, micro_batches: list[int]) -> Iterator[Row]:
    decoder, terms = build(bench, mode)
    for sequences in micro_batches:
        ids, what = bench.ids(sequences, extra=1), f"compile {mode}, micro-batch {sequences}"
        work = partial(forward_backward, decoder, terms, ids)
        try:
            first_s = once_s(bench.device, work)
            seconds, gib = median_s(bench.device, work, 3), peak_gib(bench.device, work)
        except torch.OutOfMemoryError:
            yield Row(check, what, "out of memory")
            continue
        rate = sequences * bench.config.model.context / seconds
        told = training_memory(bench.config.model, sequences)
        more = (
            told.total - told.weights - told.moments
        ) / 2**30  # those are there before, or not at all here
        note = (
            f"{mfu_note(bench, rate)}; first step {first_s:.1f} s, peak +{gib:.1f} GiB, foretold {more:.1f}"
        )
        yield Row(check, what, rate, "tokens/s", note)


def optimizer_step(bench: Bench) -> Iterator[Row]:
    """What a step costs beside forward and backward."""
    decoder, _ = build(bench)
    weights = list(decoder.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    count = sum(w.numel() for w in weights)
    fused = optimizers.build(decoder, bench.config.optimizer, bench.device)
    foreach = torch.optim.AdamW(weights, lr=3e-4, foreach=True, fused=False)
    for name, work in (("AdamW, fused", fused.step), ("AdamW, foreach", foreach.step)):
        seconds = median_s(bench.device, work, 10)
        note = f"{count:,} weights, {28 * count / seconds / 1e9:.0f} GB/s of 7 fp32 passes"
        yield Row("optimizer", name, seconds * 1e3, "ms", note)
    yield Row("optimizer", "norm and clip", median_s(bench.device, partial(clip, weights), 10) * 1e3, "ms")


def clip(weights: list[nn.Parameter]) -> None:
    """As the loop does it."""
    optimizers.clip_(weights, 1.0, optimizers.global_norm(w.grad for w in weights if w.grad is not None))


def micro_batch(bench: Bench) -> Iterator[Row]:
    """What the search before the first step finds, against the most that runs beside optimizer state."""
    decoder, _ = build(bench)
    optimizer = optimizers.build(decoder, bench.config.optimizer, bench.device)
    total = torch.cuda.get_device_properties(0).total_memory if bench.device.type == "cuda" else 64 << 20
    limit = total * GPU_MEMORY_SHARE - 8.0 * sum(p.numel() for p in decoder.parameters())
    begun = time.perf_counter()
    found, how = fit.largest_fitting(bench.config.batch_blocks, probe(bench, decoder), limit)
    note = f"{how}; took {time.perf_counter() - begun:.1f} s"
    yield Row("micro_batch", "largest_fitting", float(found or 0), "sequences", note)
    assemble.dry_run(decoder, 1)
    optimizer.step()  # its state is there from the first step on
    most = largest(lambda n: probe(bench, decoder)(n) is not None, bench.config.batch_blocks)
    yield Row("micro_batch", "most that runs", float(most), "sequences", "any number, divisor or not")
    told = largest_micro_batch(bench.config.model, bench.config.batch_blocks, total / 2**30)
    yield Row("micro_batch", "foretold by the memory model", float(told or 0), "sequences", "model/memory.py")
    divisor = fit.divisors_up_to(bench.config.batch_blocks, most)[0]
    yield Row("micro_batch", "largest divisor that runs", float(divisor), "sequences")


def probe(bench: Bench, decoder: Decoder) -> Callable[[int], float | None]:
    """Peak bytes of a dry run; on a CPU a made-up straight line with an end."""

    def dry_run(sequences: int) -> None:
        decoder.zero_grad(set_to_none=True)
        assemble.dry_run(decoder, sequences)

    if bench.device.type == "cuda":
        return fit.cuda_peak(dry_run, bench.device)
    return lambda n: n * 2.0**20 if n <= 40 else None


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` that fits, by doubling and halving; 0 for none."""
    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


# The real command


def corpus(bench: Bench) -> Path:
    """A corpus of random tokens, the frequent ones much more frequent, written once."""
    folder = bench.folder / "corpus"
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocab = bench.config.model.vocab
    text = tokenizer_json(vocab)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    counts = {"train": bench.pick(8_000_000, 50_000), "val": bench.pick(200_000, 5_000)}
    facts = {split: write_split(folder, split, count, vocab) for split, count in counts.items()}
    manifest = corpus_manifest(vocab, hashlib.sha256(text.encode()).hexdigest(), facts)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def tokenizer_json(vocab: int) -> str:
    """A byte-level BPE of `vocab` ids whose merges are pairs of letters, in the order they come."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocab - len(letters) - 1]
    ids = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer.to_str()


def write_split(folder: Path, split: str, count: int, vocab: int) -> dict[str, Any]:
    rng = np.random.default_rng(len(split))
    tokens = np.exp(rng.random(count) * math.log(vocab - 1)).astype("<u2")  # id i about as often as 1 / i
    tokens[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = vocab - 1
    tokens.tofile(folder / f"{split}.bin")
    starts = range(0, count, DOCUMENT_TOKENS)
    fields = [("start", "<u8"), ("file", "<u4"), ("row", "<u4"), ("domain", "<u2")]
    index = np.array([(start, 0, row, 0) for row, start in enumerate(starts)], dtype=fields)
    np.save(folder / f"{split}.idx.npy", index)
    sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {"tokens": count, "documents": len(index), "bytes": 2 * count, "sha256": sha256}


def corpus_manifest(vocab: int, tokenizer_sha256: str, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    train, val = facts["train"], facts["val"]
    counts = {"train_tokens": train["tokens"], "val_tokens": val["tokens"]}
    counts |= {"documents": train["documents"], "bytes": train["bytes"]}
    source = {"path": "random", "domain": "random", "bytes": 0, "sha256": "0", "skipped": None}
    tokenizer = {"name": "pairs", "vocab_size": vocab, "eot_id": vocab - 1, "sha256": tokenizer_sha256}
    return {
        "schema_version": 1,
        "kind": "corpus",
        "created_utc": now(),
        "x1_version": "0",
        "tokenizer": tokenizer,
        "dtype": "uint16",
        "val_fraction": 0.0,
        "domains": ["random"],
        "train": train,
        "val": val,
        "domain_counts": {"random": counts},
        "val_spans": {"random": [[0, val["tokens"]]]},
        "sources": [source | {"documents": train["documents"]}],
        "dropped": {"empty_documents": 0, "ignored_files": []},
        "versions": {},
        "options": {"tokenizer": "pairs", "text_field": "text", "skip_bad": False},
        "fingerprint": hashlib.sha256(
            (train["sha256"] + val["sha256"] + tokenizer_sha256).encode()
        ).hexdigest(),
    }


class Training:
    """A process of `python -m x1_pretrain.train` in a run folder of its own; its output goes to a file."""

    def __init__(self, bench: Bench, run: str, settings: dict[str, Any], *flags: str) -> None:
        self.folder, self.log = bench.folder / run, bench.folder / f"{run}.log"
        command = [sys.executable, "-m", "x1_pretrain.train", "--config", str(CONFIG), *flags]
        command += ["--data-dir", str(corpus(bench)), "--run-dir", str(self.folder)]
        command += ["--device", bench.device.type]
        for path, value in (bench.overrides | settings).items():
            command += ["--set", f"{path}={json.dumps(value)}"]  # quoted: YAML takes a bare off for false
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        file = self.folder / f"{name}.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def end(self, expected: int = 0) -> None:
        """Wait; an unexpected exit code raises with the last line of output."""
        code = self.process.wait()
        if code != expected:
            last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise RuntimeError(f"the training process ended with {code}, expected {expected}: {last}")

    def wait_for_step(self, step: int) -> None:
        while not any(row["step"] >= step for row in self.rows()):
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended with {self.process.returncode} before step {step}")
            time.sleep(0.005)

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["train/loss"] for row in self.rows() if "train/loss" in row}


def environment() -> dict[str, str]:
    """This checkout first, here and in every process that is started."""
    known = os.environ.get("PYTHONPATH")
    source = str(REPOSITORY / "src")
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{known}" if known else source}


def training(bench: Bench) -> Iterator[Row]:
    """The 50m run as a user starts it, but short."""
    steps, context = bench.pick(40, 6), bench.config.model.context
    settings: dict[str, Any] = {"training.compile": "off" if bench.smoke else bench.compile}
    settings |= {"optimizer.warmup_steps": steps // 2, "training.total_steps": steps}
    settings |= {"training.batch_tokens": bench.pick(128, 8) * context}
    settings |= {"checkpoint.every": steps // 2, "evaluation.every": steps, "log.every": bench.pick(5, 1)}
    settings |= {"evaluation.tokens": 64 * context, "evaluation.sample_tokens": 4}
    begun = time.perf_counter()
    run = Training(bench, "train", settings)
    run.end()
    wall_s = time.perf_counter() - begun
    yield from training_rows(bench, run, steps)
    yield Row("train", "the whole command", wall_s, "s", f"{steps} steps, with evaluations and checkpoints")


def training_rows(bench: Bench, run: Training, steps: int) -> Iterator[Row]:
    facts = json.loads((run.folder / "manifest.json").read_text())
    how = f"micro-batch {facts['micro_batch']}, compile {facts['compile']}, {facts['precision']}"
    late = [row for row in run.rows() if "tokens_per_sec" in row and row["step"] > steps // 4]
    rate = statistics.median(row["tokens_per_sec"] for row in late)
    yield Row("train", "tokens/s", rate, "tokens/s", f"{mfu_note(bench, rate)}; {how}; {facts['attention']}")
    for name in ("mfu", "mfu_causal"):
        values = [row[name] for row in late if name in row]
        yield Row("train", f"{name}, as logged", statistics.median(values) if values else "not logged")
    waits = [row["data/wait_share"] for row in late]
    yield Row("train", "data wait, share of a step", statistics.median(waits), "", f"most {max(waits):.4f}")
    saved = [row["seconds"] for row in run.rows("events") if row["event"] == "checkpoint"]
    yield Row(
        "train",
        "checkpoint",
        statistics.median(saved),
        "s",
        f"{len(saved)} saved, the slowest {max(saved)} s",
    )
    losses = run.losses()
    yield Row("train", "loss, first and last", f"{losses[min(losses)]:.3f} to {losses[max(losses)]:.3f}")


def resume(bench: Bench) -> Iterator[Row]:
    """An interrupted and resumed run against one that was not: the same numbers, bit for bit?"""
    steps, context = bench.pick(20, 150), bench.config.model.context
    settings = {"training.total_steps": steps, "training.batch_tokens": bench.pick(64, 8) * context}
    settings |= {"training.micro_batch": 8, "training.compile": "off", "evaluation.prompts": []}
    settings |= {"optimizer.warmup_steps": steps // 2, "log.every": 1, "evaluation.tokens": 8 * context}
    straight = Training(bench, "straight", settings, "--deterministic")
    straight.end()
    cut = Training(bench, "cut", settings, "--deterministic")
    cut.wait_for_step(5)
    begun = time.perf_counter()
    cut.process.send_signal(signal.SIGTERM)
    cut.end(expected=75)
    at = max(cut.losses())
    yield Row("resume", "SIGTERM to exit 75", time.perf_counter() - begun, "s", f"after step {at} of {steps}")
    again = Training(bench, "cut", settings, "--deterministic")
    again.end()
    yield equality("losses", straight.losses(), again.losses())
    yield equality("final weights and optimizer", *(final_hashes(run) for run in (straight, again)))


def equality(what: str, straight: dict[Any, Any], resumed: dict[Any, Any]) -> Row:
    """Equal, or a failure that names the first difference."""
    keys = sorted(straight.keys() | resumed.keys())
    differing = [key for key in keys if straight.get(key) != resumed.get(key)]
    if not differing:
        return Row("resume", what, "bitwise equal", note=f"{len(keys)} compared")
    first = differing[0]
    values = f"first {first}: {straight.get(first)} and {resumed.get(first)}"
    return Row("resume", what, f"failed: {len(differing)} of {len(keys)} differ", note=values)


def final_hashes(run: Training) -> dict[str, str]:
    newest = max((run.folder / "checkpoints").glob("step-*"))
    files = ("model.safetensors", "optimizer.safetensors")
    return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in files}


# Other libraries


def hugging_face(bench: Bench) -> Iterator[Row]:
    """The same weights in Transformers on this device."""
    from safetensors.torch import save_file

    wider = bench.config.model.model_copy(update={"init_std": 0.05})  # logits of a size worth comparing
    weights = huggingface.disk_state(Decoder(wider, seed=1))
    folder = bench.folder / "hugging_face"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface.config_json(wider, eot_id=0)))
    ids = bench.ids(2)
    for precision in ("fp32", "bf16"):
        ours, _ = build(bench, precision=precision)
        huggingface.load_disk_state(ours, weights)
        yield logits_row(precision, ours, transformers_model(folder, precision, bench.device), ids)


def transformers_model(folder: Path, precision: str, place: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=fit.DTYPES[precision]
    )
    return model.to(place).eval()


@torch.no_grad()
def logits_row(precision: str, ours: Decoder, theirs: nn.Module, ids: Tensor) -> Row:
    a, b = ours(ids).float(), theirs(ids).logits.float()  # (B, T, V)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    note = f"mean KL {kl:.2e} nats; largest logit {b.abs().max().item():.2f}"
    return Row("hugging_face", f"{precision}, largest logit difference", (a - b).abs().max().item(), "", note)


class PlainBlock(nn.Module):
    """A GPT layer as one would write it first, with as many weights in matrices as ours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv, self.size = config.d_model, config.kv_heads * config.head_size, config.head_size
        self.widths = [config.heads * self.size, kv, kv]
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv = nn.Linear(d, sum(self.widths), bias=False)
        self.out = nn.Linear(self.widths[0], d, bias=False)
        hidden = 3 * config.d_ff // 2  # two matrices instead of SwiGLU's three
        self.mlp = nn.Sequential(
            nn.Linear(d, hidden, bias=False), nn.GELU(), nn.Linear(hidden, d, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in split)  # (B, H or K, T, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))  # (B, T, d)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainGPT(nn.Module):
    """The plain peer: learned positions, LayerNorm, GELU, tied embeddings, loss over all logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.layers = nn.Sequential(*(PlainBlock(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.init_std)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]  # (B, T, d)
        logits = F.linear(self.norm(self.layers(x)), self.tokens.weight)  # (B, T, P)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def peers(bench: Bench) -> Iterator[Row]:
    """Whole training steps (forward, backward, clip, fused AdamW), compiled, in turns with two peers."""
    sequences = bench.pick(16, 2)
    ids = bench.ids(sequences, extra=1)
    steps: dict[str, Work] = {}
    makers = {"x1": our_step, "plain GPT": gpt_step, "Transformers Llama": llama_step}
    for name, maker in makers.items():
        try:
            steps[name] = maker(bench, ids)
            seconds = once_s(bench.device, partial(repeat, steps[name], 3))
            yield Row("peers", f"{name}, first three steps", seconds, "s", "compiles")
        except Exception as error:  # one peer that fails leaves the others
            steps.pop(name, None)
            yield Row("peers", name, f"failed: {one_line(error)}")
    yield from peer_rows(bench, steps, sequences * bench.config.model.context)


def peer_rows(bench: Bench, steps: dict[str, Work], tokens: int) -> Iterator[Row]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(bench.pick(9, 2)):
        for name, step in steps.items():
            times[name].append(once_s(bench.device, partial(repeat, step, 4)) / 4)
    for name, seconds in times.items():
        rate = tokens / statistics.median(seconds)
        spread = f"{tokens / max(seconds):,.0f} to {tokens / min(seconds):,.0f}"
        note = f"{mfu_note(bench, rate)}; {spread}" if name == "x1" else spread
        yield Row("peers", f"{name}, training step", rate, "tokens/s", note)
        if name != "x1" and "x1" in times:
            ratio = statistics.median(b / a for a, b in zip(times["x1"], seconds, strict=True))
            yield Row("peers", f"x1 against {name}", ratio, "x", "tokens/s, median of the rounds' ratios")


def our_step(bench: Bench, ids: Tensor) -> Work:
    decoder, terms = build(bench, "default")
    optimizer = optimizers.build(decoder, bench.config.optimizer, bench.device)
    weights = list(decoder.parameters())

    def step() -> None:
        forward_backward(decoder, terms, ids)
        clip(weights)
        optimizer.step()

    return step


def gpt_step(bench: Bench, ids: Tensor) -> Work:
    model = PlainGPT(bench.config.model).to(bench.device)
    run = torch.compile(model)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return plain_step(model, lambda: run(inputs, targets), bench)


def llama_step(bench: Bench, ids: Tensor) -> Work:
    from transformers import LlamaConfig, LlamaForCausalLM

    tree = huggingface.config_json(bench.config.model, eot_id=0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig.from_dict(tree))
    model.to(bench.device)
    run = torch.compile(model)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    call = partial(run, input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
    return plain_step(model, lambda: call().loss, bench)


def plain_step(model: nn.Module, mean_loss: Callable[[], Tensor], bench: Bench) -> Work:
    """fp32 weights, autocast to bf16, clip, fused AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16):
            mean = mean_loss()
        torch.autograd.backward(mean)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


# Running the checks: what matters most comes first, for the time may run out

# The flight recorder


def doctor(bench: Bench) -> Iterator[Row]:
    """What `x1 doctor` finds here, line by line."""
    command = [sys.executable, "-m", "x1_pretrain.cli", "doctor", "--json", "--offline"]
    done = subprocess.run(command, cwd=bench.folder, env=environment(), capture_output=True, text=True)
    for found in json.loads(done.stdout)["findings"]:
        yield Row("doctor", found["check"], found["status"], "", found["found"])
    yield Row("doctor", "exit code", str(done.returncode))


def telemetry(bench: Bench) -> Iterator[Row]:
    """What all that is measured beside the loss costs, of a step."""
    if bench.smoke:
        yield Row("telemetry", "share of a step", "not in a smoke run", "", "benchmarks/telemetry.py")
        return
    script = Path(__file__).with_name("telemetry.py")
    command = [sys.executable, str(script), "--model", "50m", "--device", "cuda", "--pairs", "4"]
    done = subprocess.run(command, cwd=bench.folder, env=environment(), capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if line.startswith(("| all |", "- seconds", "A step"))]
    for line in told:
        yield Row("telemetry", "as printed", line.strip("|- "))
    if done.returncode or not told:
        yield failure("telemetry", one_line(RuntimeError(done.stderr.strip().splitlines()[-1])))


CHECKS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {  # name -> check, its limit in seconds
    "device": (device, 60),
    "ceilings": (ceilings, 60),
    "train": (training, 150),
    "resume": (resume, 150),
    "hugging_face": (hugging_face, 60),
    "peers": (peers, 150),
    "decoder": (decoder_speed, 120),
    "micro_batch": (micro_batch, 60),
    "attention": (attention_kernels, 60),
    "optimizer": (optimizer_step, 40),
    "loss": (loss_chunks, 90),
    "autotune": (autotune, 150),
    "doctor": (doctor, 150),
    "telemetry": (telemetry, 120),
}


def main() -> int:
    args = arguments()
    if args.child:
        return child(args.child, Bench(args.smoke, args.folder, args.compile))
    if not args.smoke and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py: no CUDA device; --smoke runs the same checks tiny on a CPU", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running check is ended too
    if args.smoke:
        os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(args.smoke, Path(folder), args.compile)
        print("| check | | value | note |\n|---|---|---|---|")
        for name in args.only:
            found = in_process(name, bench) if args.smoke else apart(name, bench, remaining_s(args))
            print("\n".join(map(table_line, found)), flush=True)
            rows += found
            write_json(args.output, rows)
    return 1 if any(row.failed for row in rows) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=check_names, default=list(CHECKS), help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--output", type=Path, help="the same rows as JSON, rewritten after each check")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU: does everything run?")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for all checks together")
    parser.add_argument("--compile", default="default", help="training.compile of the training run")
    parser.add_argument("--child", choices=list(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.deadline = time.monotonic() + args.limit_s
    return args


def check_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    return names


def remaining_s(args: argparse.Namespace) -> float:
    left: float = args.deadline - time.monotonic()
    return left


def in_process(name: str, bench: Bench) -> list[Row]:
    """The smoke run: no process for each check, no compiler."""
    torch._dynamo.config.disable = True
    torch.set_num_threads(1)  # a second one only waits for the first
    rows: list[Row] = []
    try:
        rows.extend(CHECKS[name][0](bench))
    except Exception as error:
        rows.append(failure(name, one_line(error)))
    return rows


def child(name: str, bench: Bench) -> int:
    """One check; each row is a line of JSON as soon as it is known."""
    try:
        for row in CHECKS[name][0](bench):
            print(json.dumps(asdict(row)), flush=True)
    except Exception as error:
        print(json.dumps(asdict(failure(name, one_line(error)))), flush=True)
        raise
    return 0


def apart(name: str, bench: Bench, left_s: float) -> list[Row]:
    """A check in a process of its own: the rows it gave, and how it ended if not well."""
    if left_s < LEAST_S:
        return [failure(name, "not run, no time left (--limit-s)")]
    limit_s = min(CHECKS[name][1], left_s)
    out, log = bench.folder / f"{name}.rows", bench.folder / f"{name}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--folder", str(bench.folder)]
    command += ["--compile", bench.compile] + ["--smoke"] * bench.smoke
    with out.open("wb") as stdout, log.open("wb") as stderr:
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(bench.folder / f"{name}.cache")}  # each compiles anew
        env = environment() | compiled
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, start_new_session=True)
        trouble = ending(process, limit_s)
    lines = out.read_text(errors="replace").splitlines(keepends=True)
    rows = [Row(**json.loads(li)) for li in lines if li.startswith('{"check": ') and li.endswith("\n")]
    if trouble and not any(row.failed for row in rows):
        rows.append(failure(name, f"{trouble}; {last_words(bench.folder)}"))
    return rows


def last_words(folder: Path) -> str:
    """The last line of the log that was written to last: of the check, or of a run it started."""
    logs = sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime)
    lines = logs[-1].read_text(errors="replace").strip().splitlines() if logs else []
    return lines[-1][:200] if lines else "no output"


def ending(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait for a check, end what is left of it; what went wrong, or nothing."""
    try:
        code = process.wait(limit_s)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"ended after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure(name: str, why: str) -> Row:
    return Row(name, "", f"failed: {why}")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def table_line(row: Row) -> str:
    cells = (row.check, row.what, f"{shown(row.value)} {row.unit}".strip(), row.note)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_json(file: Path | None, rows: list[Row]) -> None:
    """Strict JSON: a number that is not finite is null."""
    if file is None:
        return
    plain = [asdict(row) for row in rows]
    for row in plain:
        if isinstance(row["value"], float) and not math.isfinite(row["value"]):
            row["value"] = None
    tree = {"written_utc": now(), "argv": sys.argv[1:], "rows": plain}
    file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


if __name__ == "__main__":
    raise SystemExit(main())
