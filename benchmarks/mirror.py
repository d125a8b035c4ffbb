"""What a mirror costs: the demo's training with a mirror at work and with it held still, in turns; its pace.

    python benchmarks/mirror.py                 about eight minutes on a CPU
    python benchmarks/mirror.py --look-every 1 --every 4    15 times the looks, 6 times the bytes

The store is an S3 server of PyPI's moto on loopback, a process of its own. Blocks of steps with the mirror's
process running and with it stopped (SIGSTOP) follow each other in alternating order; the ratio of each pair
is one measurement. A machine's pace wanders over seconds: many pairs of short blocks say more than few long
ones. The mirror looks every 15 s, as by default. One block with it in 25 begins with a new checkpoint of
31 MB: as many bytes a second of training as the 50M run sends on an A100 with a checkpoint every 300 steps
(1.07 GB in 880 s). The server has the same cores, so this is an upper bound.
"""

from __future__ import annotations

import sys

sys.path.sort(key=__file__.rpartition("/")[0].__eq__)  # this folder last: it has another `tokenize`

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

import telemetry
from x1_pretrain.mirror.job import Job
from x1_pretrain.records import checkpoint_files
from x1_pretrain.runtime.run import Run
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.start import get_ready, started

LIMIT = 0.01  # of a step
SERVER = """
import sys, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bench")
print(f"http://{host}:{port}", flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
CREDENTIALS |= {"AWS_DEFAULT_REGION": "us-east-1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="of blocks; 0: the pace alone")
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--every", type=int, default=25, help="blocks with a mirror for one new checkpoint")
    parser.add_argument(
        "--look-every", type=float, default=15.0, help="seconds between two looks of the mirror"
    )
    parser.add_argument("--megabytes", type=int, default=200, help="of the checkpoint whose pace is measured")
    parser.add_argument("--threads", type=int, help="of torch; fewer than cores leaves one for the mirror")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory() as name, server() as endpoint, Signals() as signals:
        folder = Path(name)
        if args.pairs:
            config = telemetry.config_of("demo", "cpu", "auto", folder)
            with started(config, signals, True, "cpu") as run:
                assert run is not None
                ratios = step_ratios(run, endpoint, args)
            tell_ratios(ratios, args)
        tell_pace(pace(folder / "pace", endpoint, args.megabytes))


@contextmanager
def server() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **CREDENTIALS},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


class Mirror:
    """A mirror's process, and the last that it said of each kind."""

    def __init__(self, job: Job) -> None:
        self.said: dict[str, dict[str, Any]] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "x1_pretrain.mirror.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.tell(do="open", **asdict(job))
        self.until("opened")
        self.tell(do="publish", run_id=job.run_id, from_step=0)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            happening = json.loads(line)
            self.said[happening["is"]] = happening

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def until(self, what: str, step: int | None = None, within_s: float = 300.0) -> dict[str, Any]:
        """Until it said so, and has the checkpoint of `step`."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if "refused" in self.said:
                raise SystemExit(self.said["refused"]["message"])
            found = self.said.get(what)
            if found and (step is None or step in found["mirrored"]):
                return found
            time.sleep(0.005)
        raise SystemExit(f"no {what} within {within_s} s")

    def cpu_s(self) -> float:
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def drain(self) -> None:
        self.tell(do="drain", within_s=60.0, why="measured")
        self.until("drained")
        self.process.wait(30)


def job_of(folder: Path, name: str, run_id: str, endpoint: str, every_s: float = 1.0) -> Job:
    return Job(
        name=name,
        folder=str(folder),
        checkpoints=str(folder / "checkpoints"),
        uri="s3://bench/runs",
        endpoint=endpoint,
        every_s=every_s,
        stale_s=3600.0,
        run_id=run_id,
    )


# Step time


def step_ratios(run: Run, endpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    pairs, count, every = args.pairs, args.steps, args.every
    get_ready(run)
    telemetry.steps(run, 2 * telemetry.BLOCK)
    run.screen.say = lambda *_: None  # type: ignore[method-assign]
    folder = run.config.folder
    mirror = Mirror(job_of(folder, run.config.name, run.session.run_id, endpoint, args.look_every))
    size = copies_of(run, 1 + -(-pairs // every))
    publish(run, 0)
    mirror.until("status", step=0)
    ratios, step_s, begun, cpu = [], [], time.monotonic(), mirror.cpu_s()
    for n in range(pairs):
        took: dict[bool, float] = {}
        for on in (bool(n % 2), not n % 2):
            os.kill(mirror.process.pid, signal.SIGCONT if on else signal.SIGSTOP)
            if on and n % every == 0:
                publish(run, 1 + n // every)
            took[on] = telemetry.steps(run, count) / count
        ratios.append(took[True] / took[False])
        step_s.append(took[False])
    os.kill(mirror.process.pid, signal.SIGCONT)
    mirror.until("status", step=1 + (pairs - 1) // every)
    busy = (mirror.cpu_s() - cpu) / (time.monotonic() - begun)
    idle = idle_share(mirror, args.look_every)
    rss = psutil.Process(mirror.process.pid).memory_info().rss
    mirror.drain()
    return {"ratios": ratios, "step_s": step_s, "busy": busy, "idle": idle, "rss": rss, "bytes": size}


def idle_share(mirror: Mirror, every_s: float) -> float:
    """CPU of one look with nothing new."""
    looks, before = max(2, round(10 / every_s)), mirror.cpu_s()
    time.sleep(looks * every_s)
    return (mirror.cpu_s() - before) / looks


def copies_of(run: Run, count: int) -> int:
    """Checkpoints beside the run, to be moved into its folder: writing them is the trainer's cost, not the
    mirror's. Their weights are of the demo's size and differ."""
    size = 3 * 4 * sum(w.numel() for w in run.decoder.parameters())
    for step in range(count):
        make_checkpoint(run.config.folder / "later", step, run.session.run_id, size)
    return size


def make_checkpoint(folder: Path, step: int, run_id: str, size: int) -> Path:
    def write(path: Path) -> None:
        for name, part in (("model", 3), ("optimizer", 3 / 2)):
            (path / f"{name}.safetensors").write_bytes(os.urandom(int(size / part)))
        (path / "state.json").write_text(json.dumps({"step": step, "run_id": run_id}))

    return checkpoint_files.publish(folder, step, run_id, write)


def publish(run: Run, step: int) -> None:
    name = checkpoint_files.folder_name(step)
    target = run.config.folder / "checkpoints"
    target.mkdir(exist_ok=True)
    (run.config.folder / "later" / name).rename(target / name)


# Pace


def pace(folder: Path, endpoint: str, megabytes: int) -> dict[str, Any]:
    """One checkpoint, from the moment that it lies there to the moment that the mirror has it."""
    later, ready = folder / "later", folder / "run" / "checkpoints"
    ready.mkdir(parents=True)
    path = make_checkpoint(later, 1, "pace", megabytes * 1_000_000)
    mirror = Mirror(job_of(folder / "run", "pace", "pace", endpoint))
    mirror.until("status")
    process, peak = psutil.Process(mirror.process.pid), 0
    rest, cpu = process.memory_info().rss, mirror.cpu_s()
    path.rename(ready / path.name)
    begun = time.monotonic()
    while 1 not in mirror.said["status"]["mirrored"]:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.01)
    took = time.monotonic() - begun
    cpu = mirror.cpu_s() - cpu
    idle = idle_share(mirror, 1.0)
    mirror.drain()
    shutil.rmtree(folder)
    return {"mb": megabytes, "seconds": took, "rest": rest, "peak": peak, "cpu": cpu, "idle": idle}


def mean_and_interval(ratios: list[float]) -> tuple[float, float, float]:
    """By resampling the pairs. The mean: most blocks have no checkpoint to send, so the median has none."""
    draws = random.Random(0)
    means = sorted(statistics.fmean(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    return means[50], statistics.fmean(ratios), means[1949]


def tell_ratios(found: dict[str, Any], args: argparse.Namespace) -> None:
    low, middle, high = (one - 1 for one in mean_and_interval(found["ratios"]))
    step_ms, size_mb = 1000 * statistics.median(found["step_s"]), found["bytes"] / 1e6
    print(
        f"\nStep time with a mirror at work over without, {args.pairs} pairs of {args.steps} steps of "
        f"{step_ms:,.0f} ms, {torch.get_num_threads()} threads of torch on {os.cpu_count()} cores, "
        f"a look every {args.look_every:g} s, a checkpoint of {size_mb:,.0f} MB in one block of "
        f"{args.every}:\n\n- {middle:+.2%} (95 % interval {low:+.2%} to {high:+.2%}; the median "
        f"{statistics.median(found['ratios']) - 1:+.2%}): "
        f"{'below' if high < LIMIT else 'not shown to be below'} {LIMIT:.0%}"
    )
    print(
        f"- the mirror's process took {found['busy']:.1%} of one core meanwhile; a look with nothing new "
        f"takes {1000 * found['idle']:.1f} ms of CPU, swap included; {found['rss'] / 1e6:,.0f} MB resident"
    )


def tell_pace(found: dict[str, Any]) -> None:
    rate = found["mb"] / found["seconds"]
    print("\n| checkpoint | s till there | MB/s | CPU s | memory at rest | at most | CPU of an idle look |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {found['mb']} MB | {found['seconds']:.1f} | {rate:.0f} | {found['cpu']:.1f} | "
        f"{found['rest'] / 1e6:.0f} MB | {found['peak'] / 1e6:.0f} MB | {1000 * found['idle']:.1f} ms |"
    )


if __name__ == "__main__":
    main()
