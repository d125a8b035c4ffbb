"""The model on a CPU: its speed against Transformers' Llama, and the time and memory of its loss.

    python benchmarks/model.py                     both tables, minutes
    python benchmarks/model.py --only decoder      forward and backward, in turns with the peer
    python benchmarks/model.py --only loss         chunked loss against all logits, a process each

The peer is `LlamaForCausalLM` of the same shape with the same weights, trained the plain way: its own loss,
`torch.autocast` for bf16, `torch.compile` on the whole model. The two losses are compared before the times.
"""

from __future__ import annotations

import sys

sys.path.sort(key=__file__.rpartition("/")[0].__eq__)  # this folder last: it has another `tokenize`

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from x1_pretrain.config import ModelConfig
from x1_pretrain.model import huggingface, loss
from x1_pretrain.model.decoder import Decoder

Step = Callable[[], float]  # one forward and backward; the mean loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = ModelConfig(layers=4, d_model=256, heads=4, kv_heads=2, d_ff=704, context=256, vocab_size=4096)
SEQUENCES, DECODER_CHUNK_TOKENS = 16, 512
AGREEMENT = {"fp32": 1e-4, "bf16": 1e-2}  # of the two losses: bf16 has 8 bits

LOSS_TOKENS, LOSS_WIDTH, LOSS_VOCAB, LOSS_PADDED = 8192, 256, 50257, 50304
LOSS_WAYS = ("full", "256", "1024", "2048", "4096", "1024 compiled", "4096 compiled")
LOSS_NAMES = {"full": "`F.cross_entropy` on all logits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["decoder", "loss"])
    parser.add_argument("--rounds", type=int, default=12, help="of the decoder; of the loss a quarter")
    parser.add_argument(
        "--threads", type=int, help="of torch; 1 is steadier on a machine that does other work"
    )
    parser.add_argument("--loss-child", nargs=2, metavar=("WAY", "PRECISION"), help="measure one, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.loss_child:
        print(json.dumps(loss_alone(*args.loss_child)))
        return
    print(hardware())
    if args.only != "loss":
        measure_decoder(args.rounds)
    if args.only != "decoder":
        measure_loss(max(1, args.rounds // 4))


# The decoder


def measure_decoder(rounds: int) -> None:
    tokens = SEQUENCES * SHAPE.context
    print(f"\nforward and backward, {tokens} tokens; tokens/s, median (least to most) of {rounds} rounds\n")
    print("| | x1 | Transformers Llama | ratio | first step, s |")
    print("|---|---|---|---|---|")
    for precision in DTYPES:
        for compiled in (False, True):
            torch.compiler.reset()
            print(decoder_row(precision, compiled, rounds, tokens), flush=True)


def decoder_row(precision: str, compiled: bool, rounds: int, tokens: int) -> str:
    ids = torch.randint(0, SHAPE.vocab, (SEQUENCES, SHAPE.context + 1))  # (B, T + 1)
    decoder = Decoder(SHAPE, compute_dtype=DTYPES[precision])
    steps = {"x1": ours(decoder, ids, compiled), "peer": llama(decoder, ids, precision, compiled)}
    first = {name: timed(step) for name, step in steps.items()}
    losses = {name: step() for name, step in steps.items()}
    if abs(losses["x1"] - losses["peer"]) > AGREEMENT[precision]:
        raise SystemExit(f"{precision}: the losses differ, so the speeds mean nothing: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    ratio = statistics.median(b / a for a, b in zip(seconds["x1"], seconds["peer"], strict=True))
    name = f"{precision}, {'compiled' if compiled else 'eager'}"
    cells = f"{rates(tokens, seconds['x1'])} | {rates(tokens, seconds['peer'])} | {ratio:.2f}"
    return f"| {name} | {cells} | {first['x1']:.1f} and {first['peer']:.1f} |"


def ours(decoder: Decoder, ids: Tensor, compiled: bool) -> Step:
    """As the training loop does it."""
    terms: loss.ChunkTerms = loss.chunk_terms
    if compiled:
        decoder.compile_blocks("default")
        terms = loss.compiled_chunk_terms()
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()  # (B, T), (B T,)

    def step() -> float:
        decoder.zero_grad(set_to_none=True)
        hidden = decoder.hidden(inputs).flatten(0, 1)  # (B T, d)
        weight, vocab = decoder.output_weight, decoder.config.vocab
        mean = loss.summed_loss(hidden, weight, targets, vocab, DECODER_CHUNK_TOKENS, terms) / len(targets)
        torch.autograd.backward(mean)
        return float(mean.detach())

    return step


def llama(decoder: Decoder, ids: Tensor, precision: str, compiled: bool) -> Step:
    """The peer: the same weights in Transformers, its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_dict(huggingface.config_json(decoder.config, eot_id=0)))
    model.load_state_dict(huggingface.disk_state(decoder), strict=False)  # tied: no lm_head of its own
    run = torch.compile(model) if compiled else model
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T) each

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            mean = run(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        mean.backward()
        return float(mean.detach())

    return step


# The loss


def measure_loss(rounds: int) -> None:
    shape = f"{LOSS_TOKENS} tokens, d = {LOSS_WIDTH}, vocabulary {LOSS_VOCAB}"
    print(f"\nloss, forward and backward: {shape}; median of {rounds} processes\n")
    print("| | bf16: time | bf16: peak memory | fp32: time | fp32: peak memory |")
    print("|---|---|---|---|---|")
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for way in LOSS_WAYS:
            for precision in ("bf16", "fp32"):
                found.setdefault((way, precision), []).append(loss_in_process(way, precision))
    for way in LOSS_WAYS:
        cells = [cell for precision in ("bf16", "fp32") for cell in loss_cells(found[way, precision])]
        print(
            f"| {LOSS_NAMES.get(way) or 'chunks of ' + way.replace(' ', ', ')} | {' | '.join(cells)} |",
            flush=True,
        )


def loss_cells(results: list[tuple[float, float]]) -> tuple[str, str]:
    seconds, gib = (statistics.median(column) for column in zip(*results, strict=True))
    return f"{seconds:.2f} s", f"{gib:.2f} GiB"


def loss_in_process(way: str, precision: str) -> tuple[float, float]:
    """Seconds and peak GiB, from a process of its own: its peak memory is that of nothing else."""
    command = [sys.executable, str(Path(__file__).resolve()), "--loss-child", way, precision]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, gib = json.loads(done.stdout.splitlines()[-1])
    return seconds, gib


def loss_alone(way: str, precision: str) -> tuple[float, float]:
    """Median seconds of three steps after the first, and what all four added to the peak memory."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(LOSS_TOKENS, LOSS_WIDTH, generator=generator).to(DTYPES[precision])  # (N, d)
    weight = torch.randn(LOSS_PADDED, LOSS_WIDTH, generator=generator) * 0.02  # (P, d)
    targets = torch.randint(0, LOSS_VOCAB, (LOSS_TOKENS,), generator=generator)  # (N,)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    before_gib = peak_rss_gib()
    step = loss_step(way, *leaves, targets)
    step()
    seconds = statistics.median(timed(step) for _ in range(3))
    return seconds, peak_rss_gib() - before_gib


def loss_step(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Step:
    chunk, _, compiled = way.partition(" ")
    terms = loss.compiled_chunk_terms() if compiled else loss.chunk_terms

    def total() -> Tensor:
        if way != "full":
            return loss.summed_loss(hidden, weight, targets, LOSS_VOCAB, int(chunk), terms)
        logits = F.linear(hidden, weight.to(hidden.dtype))[:, :LOSS_VOCAB]  # (N, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def step() -> float:
        hidden.grad = weight.grad = None
        mean = total() / LOSS_TOKENS
        torch.autograd.backward(mean)
        return float(mean.detach())

    return step


# Time, memory, machine


def timed(step: Step) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def rates(tokens: int, seconds: list[float]) -> str:
    speeds = sorted(tokens / s for s in seconds)
    return f"{tokens / statistics.median(seconds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"


def peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    load = os.getloadavg()[0]
    software = f"torch {torch.__version__}, transformers {version('transformers')}"
    return f"{cpu}, {torch.get_num_threads()} threads, load {load:.1f} at the start; {software}"


if __name__ == "__main__":
    main()
