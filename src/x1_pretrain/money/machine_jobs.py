"""From a run and an offer to what the provider is asked to start, and to files for other launchers."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from x1_pretrain import config as cfg
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import to_yaml
from x1_pretrain.errors import FINISHED, UserError
from x1_pretrain.money import bootstrap, credentials
from x1_pretrain.money.channels import VARIABLE as ALERTS_VARIABLE
from x1_pretrain.money.clock import VARIABLE as CLOCK_VARIABLE
from x1_pretrain.money.guard import ZERO
from x1_pretrain.money.job import CONFIG_END, Job, fineweb_edu_commands
from x1_pretrain.money.providers.base import LaunchRequest, Offer
from x1_pretrain.money.providers.opened import FAKE_VARIABLE
from x1_pretrain.money.skypilot import skypilot_task
from x1_pretrain.records.run_manifest import source_state, without_passwords

STOP_S = 60
ALWAYS_PASSED = (ALERTS_VARIABLE, "HF_TOKEN")


@dataclass(frozen=True)
class JobOptions:
    """What the user said about the machine's side."""

    source: str | None
    data_commands: tuple[str, ...]
    data_dir: str | None
    workspace: str
    ssh_key: str | None
    passed: tuple[str, ...]
    assignments: tuple[str, ...]
    before_usd: Decimal = ZERO  # spent by earlier machines: the new one's ledger may not know
    raised_usd: Decimal | None = None  # a person's new ceiling: the machine's disk may hold the latch too
    ended: tuple[str, ...] = ()  # machines of the run that are gone: `money.ended` writes and reads them
    data_from_mirror: bool = False


def job_for(
    config: RunConfig,
    provider: str,
    tag: str,
    usd_per_hr: Decimal,
    cap_usd: Decimal,
    gpus: int,
    options: JobOptions,
    supervise_flags: tuple[str, ...] = (),
) -> Job:
    """The run as a bare machine starts it."""
    refuse_secrets(config)
    tree = config.model_copy(update={"run_dir": None, "data": cfg.DataConfig()})
    return Job(
        run_name=config.name,
        tag=tag,
        config_text=to_yaml(tree),
        source=options.source or this_checkout(),
        provider=provider,
        rate_usd_per_hr=usd_per_hr,
        cap_usd=cap_usd,
        data_commands=options.data_commands or default_data(options),
        workspace=options.workspace,
        corpus=options.data_dir or "",
        passed_variables=passed(config, options),
        supervise_flags=supervise_flags,
        train_flags=(*ranks_flag(gpus), *train_flags(config, options)),
        gpus=gpus,
        data_from_mirror=options.data_from_mirror,
        stop_s=STOP_S + (math.ceil(config.mirror.grace_s) if config.mirror.uri else 0),
    )


def passed(config: RunConfig, options: JobOptions) -> tuple[str, ...]:
    """The names of the variables that a machine is handed, each once."""
    wanted = (*ALWAYS_PASSED, *options.passed, *credentials.names(config.mirror.uri))
    return tuple(dict.fromkeys(wanted))


def ranks_flag(gpus: int) -> tuple[str, ...]:
    """A process for each GPU that is paid for."""
    return ("--ranks", str(gpus)) if gpus > 1 else ()


def train_flags(config: RunConfig, options: JobOptions) -> tuple[str, ...]:
    """With the mirror, a start on an empty machine goes on where the run was."""
    raised = ("--raise-ceiling-to", str(options.raised_usd)) if options.raised_usd else ()
    mirror = ("--mirror", config.mirror.uri) if config.mirror.uri else ()
    return (*mirror, *(("--mirror-data",) if mirror and config.mirror.data else ()), *raised)


def refuse_secrets(config: RunConfig) -> None:
    """The config travels in a script that stays on the machine, and in files for others."""
    for name, uri in (
        ("mlflow.uri", config.mlflow.uri),
        ("budget.curr_cost_uri", config.budget.curr_cost_uri),
    ):
        if uri is not None and without_passwords(uri) != uri:
            raise UserError(
                f"{name}: holds a password or a signed address, which would stand in the start script; take "
                "it out of the config of a rented run"
            )


def default_data(options: JobOptions) -> tuple[str, ...]:
    """FineWeb-Edu; nothing where a corpus is named, which then has to be there."""
    return () if options.data_dir else fineweb_edu_commands(options.workspace)


def git(*words: str) -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def this_checkout() -> str:
    """This checkout's commit, as pip installs it from where it was cloned."""
    state, url = source_state(), git("config", "--get", "remote.origin.url")
    if not state["commit"] or not url.startswith(("https://", "ssh://", "git@")):
        raise UserError(
            "--source: is needed, nothing says where the machine can install X1 from; for example "
            "--source 'x1-pretrain @ git+https://github.com/YOU/x1@COMMIT', or a wheel's address"
        )
    if state["dirty"] or not git("branch", "--remotes", "--contains", str(state["commit"])):
        raise UserError(
            f"--source: this checkout has edits, or its commit {str(state['commit'])[:12]} is not pushed: "
            "the machine would run other code than you see; commit and push, or name another source"
        )
    address = url if "://" in url else "ssh://" + url.replace(":", "/", 1)
    return f"x1-pretrain @ git+{address}@{state['commit']}"


def request_for(
    config: RunConfig,
    offer: Offer,
    tag: str,
    usd_per_hr: Decimal,
    cap_usd: Decimal,
    disk_gib: int,
    options: JobOptions,
    tax: Decimal = ZERO,
) -> LaunchRequest:
    """What the provider is asked for. Values of passed variables are in it: it is sent, never kept."""
    environment = {name: os.environ[name] for name in passed(config, options) if name in os.environ}
    environment |= credentials.values(config.mirror.uri, os.environ, config.mirror.endpoint)
    if offer.provider == "fake":
        script = on_this_computer(config, offer, tag, usd_per_hr, cap_usd, disk_gib, options)
        environment |= {k: os.environ[k] for k in (FAKE_VARIABLE, CLOCK_VARIABLE) if k in os.environ}
        return LaunchRequest(offer, tag, script, "none:1", disk_gib, environment)
    flags = (
        "--disk-gib",
        str(disk_gib),
        "--tax",
        str(tax),
        *told(options),
    )  # where the machine has the provider's key
    job = job_for(config, offer.provider, tag, usd_per_hr, cap_usd, offer.gpu_count, options, flags)
    if offer.provider == "lambda":
        script = bootstrap.cloud_init(job, environment)
        return LaunchRequest(offer, tag, script, None, disk_gib, {}, options.ssh_key)
    environment |= {"X1_START_MODE": "foreground"}
    return LaunchRequest(offer, tag, bootstrap.start_script(job), job.image, disk_gib, environment)


def told(options: JobOptions) -> list[str]:
    """What only the launcher knows of the run's earlier machines."""
    words = ["--spent-before-usd", str(options.before_usd)]
    for one in options.ended:
        words += ["--ended", one]
    return words


def on_this_computer(
    config: RunConfig,
    offer: Offer,
    tag: str,
    usd_per_hr: Decimal,
    cap_usd: Decimal,
    disk_gib: int,
    options: JobOptions,
) -> str:
    """The fake provider's machines are processes here: the supervisor starts in this very installation. With
    a mirror each of them has a run folder of its own, as a real one has."""
    refuse_secrets(config)
    mirrored = config.mirror.uri is not None
    folder = Path("runs", config.name) if mirrored else config.folder.absolute()
    words = [sys.executable, "-m", "x1_pretrain.money.supervise", "--provider", "fake", "--tag", tag]
    words += ["--rate-usd-per-hr", str(usd_per_hr), "--disk-gib", str(disk_gib), "--every-s", "60"]
    words += [*(told(options) if mirrored else []), "--"]
    words += ["--config", str(folder / "launch.yaml"), "--run-dir", str(folder)]
    words += ranks_flag(offer.gpu_count)
    words += ["--budget-cap-usd", str(cap_usd), *(train_flags(config, options) if mirrored else [])]
    words += ["--data-dir", str(Path(options.data_dir).absolute())] if options.data_dir else []
    if not mirrored:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "launch.yaml").write_text(to_yaml(config), encoding="utf-8")
        return f"#!/bin/bash\nexec {shlex.join(words)}\n"
    text = to_yaml(config.model_copy(update={"run_dir": None}))
    write = f"mkdir -p {folder}\ncat >{folder}/launch.yaml <<'{CONFIG_END}'\n{text}{CONFIG_END}\n"
    return f"#!/bin/bash\n{write}exec {shlex.join(words)}\n"


def write_files(
    folder: Path,
    config: RunConfig,
    gpu: str,
    gpus: int,
    cap_usd: Decimal,
    max_usd_per_hr: Decimal | None,
    options: JobOptions,
) -> int:
    """The launch as files, for SkyPilot or for a person's own hands. No values of variables are in them."""
    rate = max_usd_per_hr
    if rate is None:
        raise UserError("--max-price: is needed with --write, every hour is counted at it; for example 1.40")
    short = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:40]
    job = job_for(config, "local", f"x1-{short}", rate, cap_usd, gpus, options)
    files: Mapping[str, str] = {
        "start.sh": bootstrap.start_script(job),
        "cloud-init.yaml": bootstrap.cloud_init(job),
        f"x1-{config.name}.service": bootstrap.systemd_unit(job),
        "skypilot.yaml": skypilot_task(job, gpu, rate),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            print(folder / name)
    except OSError as error:
        raise UserError(
            f"--write {folder}: can't be written ({error.strerror}); name another folder"
        ) from None
    return FINISHED
