"""`x1-nccl.env`: settings with which the GPUs here can talk. `x1 doctor` writes it, `x1 train` reads it.

Lines of KEY=VALUE and comments. Only NCCL_ and GLOO_ variables: nothing else of a run's environment is set
from a file that lies beside a config. What the environment has already wins. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from x1_pretrain.errors import UserError

NAME = "x1-nccl.env"
HEADER = "# Written by `x1 doctor`"
KEY = re.compile(r"(NCCL|GLOO)_[A-Z0-9_]+")
VALUE = re.compile(r"[!-~]{1,200}")  # printable, no spaces
MAX_BYTES = 16 << 10


def beside(config_file: Path) -> Path:
    """Where `x1 train --config config_file` looks."""
    return config_file.parent / NAME


def read(file: Path) -> dict[str, str]:
    """The settings in `file`; a UserError names the line that is none."""
    try:
        data = file.read_bytes()[: MAX_BYTES + 1]
        text = data.decode()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); `x1 doctor` writes it") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file; remove it, `x1 doctor` writes a new one") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{file}: more than {MAX_BYTES >> 10} KiB; expected a few lines NCCL_...=VALUE")
    settings: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            key, value = _pair(f"{file}:{number}", line.strip())
            if key in settings:
                raise UserError(f"{file}:{number}: {key} is given twice; remove one of the lines")
            settings[key] = value
    return settings


def _pair(where: str, line: str) -> tuple[str, str]:
    key, sign, value = line.partition("=")
    if not sign or not KEY.fullmatch(key):
        raise UserError(
            f"{where}: {line[:80]!r}: expected KEY=VALUE with a key NCCL_... or GLOO_...; nothing else is "
            "set from this file"
        )
    if not VALUE.fullmatch(value):
        raise UserError(f"{where}: {key}={value[:80]!r}: expected a value of 1 to 200 characters, no spaces")
    return key, value


def pick_up(config_file: Path, environment: MutableMapping[str, str]) -> dict[str, str]:
    """Set what the file beside the config says and the environment does not; returns what was set."""
    file = beside(config_file)
    if not file.exists():
        return {}
    new = {key: value for key, value in read(file).items() if key not in environment}
    environment.update(new)
    return new


def write(file: Path, settings: Mapping[str, str], remarks: Sequence[str]) -> None:
    """Replace `file`, unless a person wrote it: then a UserError says so."""
    if file.exists() and not _ours(file):
        raise UserError(
            f"{file}: not written by `x1 doctor`, so it is left alone; move it, or use --env-file"
        )
    lines = [HEADER, *(f"# {' '.join(remark.split())}" for remark in remarks)]
    lines += [f"{key}={value}" for key, value in settings.items()]
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror}); see --env-file") from None


def _ours(file: Path) -> bool:
    try:
        return file.read_bytes().startswith(HEADER.encode())
    except OSError:
        return False
