"""The demo's rented run: an hour in a minute, at a provider of our own whose price jumps.

Everything but the provider is what a real launch uses: the commands, the guard, the alerts, the ledger. Its
machine is a process on this computer, and a minute of its time is a second of yours.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.demo_commands import must, say, start
from x1_pretrain.errors import UserError
from x1_pretrain.money import ledger
from x1_pretrain.records.metrics import read_rows
from x1_pretrain.records.run_folder import read_json

SPEED = 60
TRAINING_S = 30.0  # real seconds that the run would take undisturbed, by a short measurement
USD_PER_HR = 1.19
JUMP = 3.0


def config_tree(run: Path, steps: int) -> dict[str, Any]:
    """A small run on the demo's corpus, its guard reading every virtual minute."""
    return {
        "name": "x1-rented",
        "run_dir": str(run),
        "model": {"layers": 2, "d_model": 64, "heads": 2, "kv_heads": 2, "d_ff": 176, "context": 64,
                  "vocab_size": 4096},
        "training": {"total_steps": steps, "batch_tokens": 512, "compile": "off"},
        "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "warmup_steps": min(40, steps // 5)},
        "checkpoint": {"every": max(1, steps // 10)},
        "evaluation": {"every": max(1, steps // 4), "tokens": 4096, "prompts": []},
        "log": {"every": max(1, steps // 40)},
        "budget": {"read_every_s": 60.0, "warmup_s": 120.0, "answer_s": 3600.0},
    }  # fmt: skip


def rented_run(folder: Path, corpus: Path, seconds_per_step: Any) -> None:
    """Launch, jump, alert, stop, raise, resume, teardown, as a person would see them."""
    folder.mkdir(parents=True)
    run = folder / "runs" / "rented"
    each_s = seconds_per_step(parse_config(config_tree(run, 100), "demo"), 1.5)[0] * 1.3
    tree = config_tree(run, max(40, int(TRAINING_S / each_s)))
    config = parse_config(tree, "demo")
    file = folder / "rented.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    ceiling = _ceiling(config, each_s)
    launch = ["launch", "--config", str(file), "--provider", "fake", "--data-dir", str(corpus), "--yes"]
    launch += ["--budget-cap-usd", f"{ceiling:.2f}", "--every-s", "60", "--linger", "1m"]
    launch += ["--tokens-per-sec", f"{config.training.batch_tokens / each_s / SPEED:.0f}"]
    with _alerts() as alerts, _provider(folder, alerts) as environment:
        must(_x1(launch, environment), "launch")
        if not (run / "STOP.json").exists():
            say("   (this machine was faster than measured: the run was over before the price could matter)")
            return
        stop = read_json(run / "STOP.json")
        say("\n[bold]-- stopped below the ceiling, its checkpoint saved, its machine gone: --[/bold]")
        say(f"   {stop['reason']}", markup=False)
        say("[bold]-- a person decides: four times the ceiling, at the new price --[/bold]")
        must(_x1([*launch, "--raise-ceiling-to", f"{4 * ceiling:.2f}"], environment), "launch")
        must(_x1(["budget", "show", str(run)], environment), "budget show")
    _check(run, config)


def _ceiling(config: RunConfig, each_s: float) -> float:
    """The run at the first price, and half as much again."""
    hours = config.training.total_steps * each_s * SPEED / 3600
    return round(1.5 * USD_PER_HR * (hours + 0.17) + 0.05, 2)


def _check(run: Path, config: RunConfig) -> None:
    events = [row["event"] for row in ledger.read_rows(run / ledger.NAME)]
    steps = [r["step"] for r in read_rows(run / "metrics.jsonl") if "train/loss" in r]
    if steps[-1] != config.training.total_steps or steps != sorted(set(steps)):
        raise UserError(f"demo: {run} did not reach its last step, each step once")
    machines, gone = events.count("launched"), events.count("terminate_confirmed")
    if machines != 2 or gone != 2:
        raise UserError(
            f"demo: {machines} machines were launched and {gone} seen to be gone, expected 2 and 2"
        )
    say(f"   resumed to step {steps[-1]}, each logged step once; 2 machines launched, 2 confirmed gone")


# ------------------------------------------------------------------------------------------------------------
# The provider, a phone, the commands


@contextlib.contextmanager
def _provider(folder: Path, alerts: str) -> Iterator[dict[str, str]]:
    """The fake provider as a process of its own; the environment that finds it."""
    faults = folder / "faults.json"
    jump = {"kind": "price_jump", "factor": str(JUMP), "after_s": 6 * 60, "times": 1}
    faults.write_text(json.dumps([jump]), encoding="utf-8")
    environment = {
        **os.environ,
        "X1_CLOCK": f"{SPEED}@{time.time():.0f}",
        "X1_ALERTS": alerts,
        "OMP_NUM_THREADS": "1",
    }
    port = folder / "port"
    words = ["fake-provider", "--run-in", str(folder / "machines"), "--faults", str(faults)]
    words += ["--port-file", str(port), "--price", str(USD_PER_HR), "--boot-s", "60"]
    say(f"\n[bold]$ X1_CLOCK={environment['X1_CLOCK']} x1 {shlex.join(words)} &[/bold]")
    process = subprocess.Popen([sys.executable, "-m", "x1_pretrain.cli", *words], env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (port.exists() and port.read_text().strip()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError("demo: the fake provider did not start, see above")
            time.sleep(0.05)
        yield {**environment, "X1_FAKE_URL": f"http://127.0.0.1:{port.read_text().strip()}"}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def _alerts() -> Iterator[str]:
    """What a phone would show: alerts are posted here and printed."""

    class Phone(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            say(f"   [on your phone] {told.get('title')}: {told.get('message')}", markup=False)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Phone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"json://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _x1(words: list[str], environment: Mapping[str, str]) -> int:
    process = start(*words, env=environment)
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
