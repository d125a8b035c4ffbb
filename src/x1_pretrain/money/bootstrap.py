"""From a job to the texts that start it: a script, cloud-init data, a systemd unit.

`start.sh` beside this module does the work; here its job section is filled in. No text holds a secret but the
one that `cloud_init` makes when it is given values: that goes to the provider and is not kept.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from importlib.resources import files
from textwrap import indent
from typing import NamedTuple

from x1_pretrain.errors import UserError
from x1_pretrain.money.job import CONFIG_END, Job

ENVIRONMENT_FILE = "/etc/x1/environment"
PER_BOOT_SCRIPT = (
    "/var/lib/cloud/scripts/per-boot/x1-start.sh"  # cloud-init runs what lies there at every boot
)
TORCH_AT_LEAST = "2.11"
UV_VERSION = "0.13.8"


class TorchBuild(NamedTuple):
    """A torch wheel, and the CUDA that the driver must be able to run for it."""

    driver_cuda: str
    torch: str
    build: str  # the folder at download.pytorch.org/whl


# Newest first; the first row that the driver satisfies is taken. torch 2.12 and later have no cu128, and
# cu126 has no kernels for Blackwell, so drivers of 12.8 and 12.9 get the last torch that was built for them.
# torch 2.15 has no cu126 any more: to raise the version of that row past 2.14 is to drop those drivers.
TORCH_BUILDS = (
    TorchBuild("13.0", "2.13.0", "cu130"),
    TorchBuild("12.8", "2.11.0", "cu128"),
    TorchBuild("12.6", "2.13.0", "cu126"),
)
TORCH_CPU = "2.13.0 cpu"

_BEGIN, _END = "# >>> job\n", "# <<< job\n"
_UNIT_END = "X1_UNIT_END"


def start_script(job: Job) -> str:
    """The bash script that brings a bare machine to the running job. Names of secrets, never their values."""
    before, rest = _template().split(_BEGIN)
    return before + _BEGIN + _job_section(job) + _END + rest.split(_END)[1]


def _template() -> str:
    return files("x1_pretrain.money").joinpath("start.sh").read_text(encoding="utf-8")


def _job_section(job: Job) -> str:
    values: dict[str, object] = {
        "RUN_NAME": job.run_name,
        "PROVIDER": job.provider,
        "SOURCE": job.source,
        "WORKSPACE": job.workspace,
        "VENV": job.venv,
        "CORPUS": job.corpus_dir,
        "CONFIG": job.config_path,
        "GPUS": job.gpus,
        "DATA_DISK_GIB": job.data_disk_gib,
        "DATA_TIMEOUT_S": job.data_timeout_s,
        "DATA_FROM_MIRROR": int(job.data_from_mirror),
        "TORCH_AT_LEAST": TORCH_AT_LEAST,
        "UV_VERSION": UV_VERSION,
        "TORCH_CPU": TORCH_CPU,
    }
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    lines += _array("TORCH_BUILDS", (" ".join(row) for row in TORCH_BUILDS))
    lines += _array("PASSED_VARIABLES", job.passed_variables)
    lines += _array("DATA_COMMANDS", job.data_commands)
    lines += _array("SUPERVISE", job.supervise_command())
    lines += _function("config_text", CONFIG_END, job.config_text)
    lines += _function("unit_text", _UNIT_END, systemd_unit(job))
    return "\n".join(lines) + "\n"


def _array(name: str, values: Iterable[str]) -> list[str]:
    """Quoted so that nothing expands here; data commands expand on the machine, when they run."""
    quoted = [f"    {shlex.quote(value)}" for value in values]
    return ["# shellcheck disable=SC1003,SC2016", f"{name}=(", *quoted, ")"]


def _function(name: str, end: str, text: str) -> list[str]:
    return [f"{name}() {{", f"    cat <<'{end}'", text.rstrip("\n"), end, "}"]


# ------------------------------------------------------------------------------------------------------------
# A virtual machine: Lambda


def cloud_init(job: Job, environment: Mapping[str, str] | None = None) -> str:
    """The `user_data` of a virtual machine: start.sh at every boot, and what it needs to know.

    `environment` holds the values of `passed_variables`. With them the text is secret: send it, never save.
    """
    parts = ["#cloud-config", "write_files:"]
    if environment:
        parts += _file(ENVIRONMENT_FILE, "0600", json.dumps(environment_file(environment)))
    parts += _file(PER_BOOT_SCRIPT, "0755", "|\n" + indent(start_script(job), " " * 4, lambda _: True))
    return "\n".join(parts) + "\n"


def _file(path: str, permissions: str, content: str) -> list[str]:
    return [f"- path: {path}", f"  permissions: '{permissions}'", f"  content: {content.rstrip(' ')}"]


def environment_file(values: Mapping[str, str]) -> str:
    """NAME="value" lines that bash and systemd read alike."""
    if several := [name for name, value in values.items() if "\n" in value]:
        raise UserError(f"{several[0]} has several lines, which no environment file can hold: use one line")
    return "".join(f'{name}="{_escaped(value)}"\n' for name, value in values.items())


def _escaped(value: str) -> str:
    return "".join(f"\\{char}" if char in '\\"$`' else char for char in value)


def systemd_unit(job: Job) -> str:
    """The job as a service. It is started again when it was killed, never after it ended by itself: exit
    codes 75 to 78 are the supervisor's last word, since it relaunches the trainer on its own."""
    command = " ".join(_systemd_word(word) for word in job.supervise_command())
    return f"""\
[Unit]
Description=X1 run {job.run_name}, supervised
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=3600
StartLimitBurst=3

[Service]
Type=exec
WorkingDirectory={job.workspace}
Environment=HOME=/root PYTHONUNBUFFERED=1
EnvironmentFile=-{ENVIRONMENT_FILE}
ExecStart={command}
Restart=on-abnormal
RestartPreventExitStatus=75 76 77 78
RestartSec=10
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec={job.stop_s}
OOMPolicy=continue
StandardOutput=append:{job.workspace}/logs/supervise.log
StandardError=inherit

[Install]
WantedBy=multi-user.target
"""


def _systemd_word(word: str) -> str:
    """systemd expands % and $, and splits at blanks."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if any(char in word for char in " '\";") or not word else word
