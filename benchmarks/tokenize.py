"""Tokenizing, end to end: this project's command against plain tiktoken, in turns, on the same files.

    python benchmarks/tokenize.py              tokens/s per domain, medians over rounds
    python benchmarks/tokenize.py --rss        peak memory on 2 GB of text in one file and in many

The peer is what one would write first: read the files, `tiktoken.encode_ordinary_batch`, append the end of
document, write uint16 with NumPy. Both are started as commands, so both pay their start.
Needs GPT-2's vocabulary: TIKTOKEN_CACHE_DIR, or the shared folder beside the checkout.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# This folder leaves the path before anything else: its `tokenize` would hide the standard library's.
sys.path[:] = sys.path[1:]

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("X1_SHARED", REPOSITORY.parent / "shared"))
RSS_TEXT_BYTES = 2_000_000_000
RSS_LIMIT_BYTES = 1_500_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rss", action="store_true", help="measure peak memory instead")
    parser.add_argument("--peer", nargs=2, metavar=("IN", "OUT"), help="run the peer once, and nothing else")
    args = parser.parse_args()
    if (SHARED / "tiktoken").is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    if args.peer:
        peer(Path(args.peer[0]), Path(args.peer[1]))
        return
    print(hardware())
    with tempfile.TemporaryDirectory() as folder:
        if args.rss:
            measure_memory(Path(folder), args.workers)
        else:
            measure_speed(Path(folder), args.rounds, args.workers)


# The peer


def peer(source: Path, out: Path) -> None:
    """Plain tiktoken over a folder of parquet files."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    out.mkdir()
    with (out / "train.bin").open("wb") as file:
        for path in sorted(source.rglob("*.parquet")):
            texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
            for ids in encoding.encode_ordinary_batch(texts):
                np.array([*ids, encoding.eot_token], dtype=np.uint16).tofile(file)


# Speed


def measure_speed(folder: Path, rounds: int, workers: int) -> None:
    domains = prepare(folder / "in")
    commands = {
        "x1": [sys.executable, "-m", "x1_pretrain.tokenize_data", "--workers", str(workers)],
        "peer": [sys.executable, str(Path(__file__).resolve())],
    }
    print(f"{rounds} rounds, {workers} workers, start-up included; medians, in brackets least and most\n")
    print("| | | | M tokens/s | | | M tokens per core-second | | |")
    print("| domain | MB of text | M tokens | x1 | tiktoken batch | ratio | x1 | tiktoken batch | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for domain in [*domains, "all"]:
        source = folder / "in" if domain == "all" else folder / "in" / domain
        print(row(domain, source, folder, commands, rounds), flush=True)


def row(domain: str, source: Path, folder: Path, commands: dict[str, list[str]], rounds: int) -> str:
    """One line of the table, from `rounds` runs of each command in turns."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for round_number in range(rounds):
        for name, command in commands.items():
            out = folder / f"{name}-{domain}-{round_number}"
            runs[name].append(timed(command + options(name, source, out)))
    check_equal(folder, domain)
    facts = json.loads((folder / f"x1-{domain}-0/manifest.json").read_text())["train"]
    tokens = facts["tokens"]
    cells = [f"{facts['bytes'] / 1e6:.1f}", f"{tokens / 1e6:.1f}"]
    for which in (0, 1):  # seconds on the clock, seconds of cores
        ours, theirs = ([run[which] for run in runs[name]] for name in ("x1", "peer"))
        ratio = statistics.median(theirs) / statistics.median(ours)
        cells += [rates(tokens, ours), rates(tokens, theirs), f"{ratio:.2f}"]
    return f"| {domain} | {' | '.join(cells)} |"


def options(name: str, source: Path, out: Path) -> list[str]:
    if name == "peer":
        return ["--peer", str(source), str(out)]
    folders = ["--input-dir", str(source), "--output-dir", str(out)]
    return [*folders, "--tokenizer", "gpt2", "--val-fraction", "0"]


def timed(command: Sequence[str]) -> tuple[float, float]:
    """(seconds on the clock, seconds of all cores) of one run and everything it started."""
    began_s, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    passed_s, after = time.perf_counter() - began_s, os.times()
    cores_s = after.children_user + after.children_system - before.children_user - before.children_system
    return passed_s, cores_s


def check_equal(folder: Path, domain: str) -> None:
    """A speed means nothing if the bytes differ."""
    ours, theirs = ((folder / f"{n}-{domain}-0/train.bin").read_bytes() for n in ("x1", "peer"))
    if ours != theirs:
        raise SystemExit(f"{domain}: the token files differ")


def rates(tokens: int, seconds: Sequence[float]) -> str:
    speeds = sorted(tokens / s / 1e6 for s in seconds)
    return f"{tokens / statistics.median(seconds) / 1e6:.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f})"


# Memory


def measure_memory(folder: Path, workers: int) -> None:
    print(f"{RSS_TEXT_BYTES / 1e9:.0f} GB of text, {workers} workers; peak resident memory in MB\n")
    print("| input | parent | largest worker | all together | M tokens/s |")
    print("|---|---|---|---|---|")
    texts = [text for paths in real_text().values() for text in paths]
    for name in ("one .jsonl", "one .parquet", "many .parquet"):
        source = folder / name / "in"
        source.mkdir(parents=True)
        write_repeated(source, name, texts)
        print(memory_row(name, source, folder / name / "out", workers), flush=True)
        subprocess.run(["rm", "-r", str(folder / name)], check=True)


def memory_row(name: str, source: Path, out: Path, workers: int) -> str:
    command = [sys.executable, "-m", "x1_pretrain.tokenize_data", "--workers", str(workers)]
    began_s = time.perf_counter()
    process = subprocess.Popen(command + options("x1", source, out), stdout=subprocess.DEVNULL)
    parent, worker, together = watch(process)
    seconds = time.perf_counter() - began_s
    if process.returncode or together > RSS_LIMIT_BYTES:
        raise SystemExit(f"{name}: exit code {process.returncode}, {together / 1e6:.0f} MB together")
    tokens = json.loads((out / "manifest.json").read_text())["train"]["tokens"]
    cells = f"{parent / 1e6:.0f} | {worker / 1e6:.0f} | {together / 1e6:.0f}"
    return f"| {name} | {cells} | {tokens / seconds / 1e6:.2f} |"


def watch(process: subprocess.Popen[bytes]) -> tuple[int, int, int]:
    """Peak resident bytes of the parent, of any worker and of all, looked at every 20 ms until the end."""
    parent = worker = together = 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            sizes = [member.memory_info().rss for member in family]
        except psutil.NoSuchProcess:
            continue
        parent, worker = max(parent, sizes[0]), max([worker, *sizes[1:]])
        together = max(together, sum(sizes))
        time.sleep(0.02)
    return parent, worker, together


def write_repeated(folder: Path, name: str, texts: Sequence[str]) -> None:
    files = 16 if name.startswith("many") else 1
    for number in range(files):
        batches = repeated(texts, RSS_TEXT_BYTES // files)
        if name.endswith(".jsonl"):
            with (folder / f"{number}.jsonl").open("w") as file:
                for batch in batches:
                    file.writelines(json.dumps({"text": text}) + "\n" for text in batch)
        else:
            schema = pa.schema([("text", pa.string())])
            with pq.ParquetWriter(folder / f"{number}.parquet", schema) as writer:
                for batch in batches:
                    writer.write_table(pa.table({"text": batch}, schema))


def repeated(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    """The texts over and over, a thousand at a time, until `size` bytes are reached."""
    while True:
        for start in range(0, len(texts), 1000):
            batch = list(texts[start : start + 1000])
            yield batch
            size -= sum(len(text.encode()) for text in batch)
            if size <= 0:
                return


# Text and machine


def real_text() -> dict[str, list[str]]:
    """Domain -> documents: the shared texts, or the modules of Python's own library."""
    files = sorted((SHARED / "text").glob("*.parquet"))
    if not files:
        modules = sorted(Path(os.__file__).parent.rglob("*.py"))
        return {"python": [path.read_text(encoding="utf-8", errors="replace") for path in modules]}
    domains: dict[str, list[str]] = {}
    for file in files:
        texts = pq.read_table(file, columns=["text"])["text"].to_pylist()
        domains.setdefault(file.stem.split("-")[0], []).extend(texts)
    return domains


def prepare(folder: Path) -> list[str]:
    """Write the text as parquet files of at most 4,000 documents, a folder a domain."""
    domains = real_text()
    for domain, texts in domains.items():
        (folder / domain).mkdir(parents=True)
        for start in range(0, len(texts), 4000):
            table = pa.table({"text": texts[start : start + 4000]})
            file = folder / domain / f"{start // 4000:03}.parquet"
            pq.write_table(table, file, row_group_size=1000, compression="zstd")
    return list(domains)


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {len(psutil.Process().cpu_affinity())} cores, {memory_gib:.0f} GiB; "
        f"Python {platform.python_version()}, tiktoken {version('tiktoken')}, pyarrow {pa.__version__}"
    )


def version(package: str) -> str:
    from importlib.metadata import version as installed

    return installed(package)


if __name__ == "__main__":
    main()
