"""A whole rented run with real processes, an hour in a minute: fake provider, launch and guard, the machine's
supervisor, sidecar and trainer, and a hook that counts alerts."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
from tests.end_to_end.processes import REPOSITORY, rows

from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import read_rows
from x1_pretrain.money.providers.fake.machines import State
from x1_pretrain.money.providers.fake.server import FakeProvider

SPEED = 60.0
POLL_S = 60.0


class Rehearsal:
    """`with rehearsal(tmp_path) as r: r.launch(...)`; everything it started is gone afterwards."""

    def __init__(
        self, folder: Path, config: Path, corpus: Path, fake: FakeProvider, env: dict[str, str]
    ) -> None:
        self.folder, self.config, self.corpus, self.fake, self.env = folder, config, corpus, fake, env
        self.run = folder / "runs" / "r"
        self.told: list[dict[str, Any]] = []

    def start(self, *more: str, ceiling: str = "5", linger: str = "2m") -> subprocess.Popen[str]:
        """`x1 launch`, which stays as guard."""
        words = ["launch", "--config", str(self.config), "--budget-cap-usd", ceiling]
        words += [] if "--provider" in more else ["--provider", "fake"]
        words += ["--tokens-per-sec", "3000", "--data-dir", str(self.corpus), "--yes"]
        words += ["--every-s", str(POLL_S), "--linger", linger, *more]
        return self._x1(words)

    def x1(self, *words: str) -> tuple[int, str]:
        process = self._x1(list(words))
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def _x1(self, words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "x1_pretrain.cli", *words],
            cwd=REPOSITORY,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def end(self, process: subprocess.Popen[str], limit_s: float = 300) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"did not end in time:\n{output}\n{self.machine_log()}") from None
        return process.returncode, output

    # --- what came of it --------------------------------------------------------------------------------

    def machine_log(self) -> str:
        logs = [*(self.folder / "machines").glob("*/log"), *(self.folder / "machines").glob("*.log")]
        return "\n".join(log.read_text()[-3000:] for log in sorted(logs))

    def alive(self) -> int:
        self.fake.world.advance()
        return sum(m.state is not State.GONE for m in self.fake.world.machines.values())

    def true_usd(self) -> Decimal:
        return self.fake.world.bill_usd()

    def ledger(self, event: str | None = None) -> list[dict[str, Any]]:
        return [r for r in read_rows(self.run / "ledger.jsonl") if event in (None, r["event"])]

    def counted_usd(self) -> Decimal:
        return account(self.ledger()).spent_by(Clock.from_environment().now())

    def rate_usd_per_hr(self) -> Decimal:
        return max(Decimal(r["usd_per_hr"]) for r in self.ledger("poll"))

    def losses(self) -> dict[int, float]:
        return {r["step"]: r["train/loss"] for r in rows(self.run / "metrics.jsonl") if "train/loss" in r}

    def step(self) -> int:
        return max(self.losses(), default=0)

    # --- doing harm -------------------------------------------------------------------------------------

    def processes(self, module: str) -> list[psutil.Process]:
        """Those of this rehearsal's run that run a module of ours."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words[1:3] == ["-m", f"x1_pretrain.{module}"] and str(self.run) in words:
                    found.append(process)
        return found

    def kill(self, module: str) -> bool:
        """kill -9 of one of them."""
        for process in self.processes(module):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
                return True
        return False

    def harass(
        self, launched: subprocess.Popen[str], seed: int, modules: list[str], kills: int = 6
    ) -> list[str]:
        """kill -9 random processes at random moments of a training that gets on between two of them."""
        dice, killed, reached = random.Random(seed), list[str](), 0
        while launched.poll() is None and len(killed) < kills:
            time.sleep(0.02)
            if self.step() < reached + dice.randint(30, 300):
                continue
            module = dice.choice(modules)
            if self.kill(module):
                killed.append(module)
                reached = self.step()
        return killed


@contextlib.contextmanager
def rehearsal(
    folder: Path, config: Path, corpus: Path, faults: list[Mapping[str, Any]] | None = None, **world: Any
) -> Iterator[Rehearsal]:
    """The provider, the hook and the clock of one rehearsal."""
    anchor = time.time()
    clock = Clock(SPEED, anchor)
    told: list[dict[str, Any]] = []
    with hook(told) as alerts:
        env = {k: v for k, v in os.environ.items() if not k.startswith("X1_")}
        env |= {"X1_CLOCK": f"{SPEED}@{anchor}", "X1_ALERTS": alerts, "OMP_NUM_THREADS": "1"}
        with FakeProvider(clock, run_in=folder / "machines", faults=faults or [], **world) as fake:
            env["X1_FAKE_URL"] = fake.url
            made = Rehearsal(folder, config, corpus, fake, env)
            made.told = told
            yield made
        for module in ("money.launch", "money.supervise", "budget_guard", "train"):
            while made.kill(module):
                time.sleep(0.05)


@contextlib.contextmanager
def hook(told: list[dict[str, Any]]) -> Iterator[str]:
    """A service that takes alerts; apprise's json:// address of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"json://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
