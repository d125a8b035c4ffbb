"""`manifest.json` of a run: what it was made with, so that others can judge the numbers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from x1_pretrain import __version__

PACKAGES = {"torch": "torch", "flash_attn": "flash-attn", "transformers": "transformers", "numpy": "numpy"}


def versions() -> dict[str, str | None]:
    """The versions that decide the numbers; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "x1_pretrain": __version__}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_state() -> dict[str, str | bool | None]:
    """Commit of the checkout this code runs from and whether it was edited; None outside a checkout."""
    here = Path(__file__).resolve().parent
    commit = _git("rev-parse", "HEAD", cwd=here)
    changes = _git("status", "--porcelain", "--untracked-files=no", cwd=here) if commit else None
    return {"commit": commit or None, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def host() -> dict[str, Any]:
    """The machine without its accelerator."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def argv() -> list[str]:
    """The command as typed, without this machine's path to it and without passwords: others read it."""
    program, arguments = Path(sys.argv[0]), [without_passwords(text) for text in sys.argv[1:]]
    if program.suffix != ".py":
        return [program.name, *arguments]
    command = ["x1"] if program.stem == "cli" else ["python", "-m", f"x1_pretrain.{program.stem}"]
    return [*command, *arguments]


def without_passwords(text: str) -> str:
    """`... http://user:secret@host ...` -> `... http://host ...`, for every address inside a text."""
    text = re.sub(r"://[^\s/?#]*@", "://", text)
    return re.sub(r"(https?://[^\s?#]*)[?#]\S*", r"\1", text)  # a signed address has its secret behind the ?
