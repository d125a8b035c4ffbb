"""`manifest.json` of a run: what it was made with, so that others can judge the numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from x1_pretrain import __version__
from x1_pretrain.records.processes import cores

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
        "cores": cores(),
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


# One address in a text. JSON's escapes and HTML's entities end it, so that what it stands in stays whole.
ADDRESS = re.compile(
    r"""(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>(?:(?!&(?:\#|quot;|lt;|gt;))[^\s"<>\\])*)""", re.IGNORECASE
)
AUTHORITY = re.compile(r"(\[[0-9a-f:.]*\]|[^:@\[\]]*)(:\d*)?", re.IGNORECASE)  # host and port, nobody's name
CLOSING = re.compile(r"[`'),.;]*$")  # of the text around it
# Where what follows is a place. Any other scheme may be one of alerts, whose very host may be a token.
PLACES = re.compile(
    r"(https?|wss?|grpcs?|tcp|udp|unix|file|sqlite|postgres(ql)?|mysql|mariadb|mssql|oracle|mongodb|redis|"
    r"s?ftp|ftps|ssh|git|hf|s3|gs|gcs|r2|wasbs?|abfss?|azure|hdfs|dbfs|databricks|runs|models|"
    r"mlflow-artifacts)(\+\w+)?",
    re.IGNORECASE,
)
HOOKS = re.compile(  # web addresses whose path is the secret
    r"(hooks\.slack\.com|api\.telegram\.org|[\w.-]*webhook\.office\.com|[\w.-]*\.logic\.azure\.com|"
    r"chat\.googleapis\.com|maker\.ifttt\.com|hc-ping\.com|ntfy\.sh)(:\d*)?(/|$)|"
    r"([^/]*)/([^/]+/)*(hooks?|webhooks?)(/|$)",
    re.IGNORECASE,
)


def without_passwords(text: str) -> str:
    """`... http://user:secret@host/path?token=x ...` -> `... http://host/path ...`, every address in a text.

    Of an address that alerts go to only the scheme is left, of a web hook the host.
    """
    return ADDRESS.sub(_public, text)


def _public(found: re.Match[str]) -> str:
    scheme, rest = found["scheme"], found["rest"]
    closing = CLOSING.search(rest)
    end = closing[0] if closing else ""
    rest = rest.removesuffix(end)
    if not PLACES.fullmatch(scheme):
        return f"{scheme}://{end}"
    head = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in head:
        rest = head.rpartition("@")[2] + rest[len(head) :]
    elif "@" in rest and not AUTHORITY.fullmatch(head):  # a password with / ? or # in it
        rest = rest.rpartition("@")[2]
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]  # a signed address has its secret behind the ?
    return f"{scheme}://{rest.partition('/')[0] if HOOKS.match(rest) else rest}{end}"
