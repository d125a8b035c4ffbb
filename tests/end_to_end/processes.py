"""Real training processes for tests: start, watch, signal, and read what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class Training:
    """One `x1_pretrain.train` process in a process group of its own."""

    def __init__(
        self, *args: str | Path, script: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        what = [str(script)] if script else ["-m", "x1_pretrain.train"]
        self.process = subprocess.Popen(
            [sys.executable, "-u", *what, *map(str, args)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_line(self, word: str) -> str:
        """All output up to the first line with `word`."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if word in line:
                return "".join(seen)
        raise AssertionError(f"no line with {word!r}:\n{''.join(seen)}")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of the process and everything it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def end(self, timeout_s: float = 300) -> tuple[int, str]:
        """Exit code and the rest of the output."""
        try:
            output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        ended = process.poll()  # before the look: it may do it and end
        if condition():
            return
        assert ended is None, f"ended early with {ended}"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.001)


def rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl, from its last complete line."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return -1
    complete = file.read_bytes()[-4000:].split(b"\n")[:-1]
    return int(json.loads(complete[-1])["step"]) if complete and complete[-1].startswith(b"{") else -1


TIMES = (
    "time_utc",
    "elapsed_s",
    "session",
    "tokens_per_sec",
    "flops_per_sec",
    "data/wait_share",
    "memory/rss_gib",
)
TIMED = ("time/", "gpu/", "host/", "disk/", "mirror/")


def curve(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    kept = lambda key: key not in TIMES and not key.startswith(TIMED)  # noqa: E731
    return [{k: v for k, v in row.items() if kept(k)} for row in rows(run / "metrics.jsonl")]


def weights(run: Path) -> bytes:
    """The newest checkpoint's weights and optimizer, as bytes."""
    newest = max((run / "checkpoints").glob("step-*"))
    return (newest / "model.safetensors").read_bytes() + (newest / "optimizer.safetensors").read_bytes()
