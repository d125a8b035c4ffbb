"""`x1 doctor`: is this machine fit for this run? Two minutes, before money is burnt.

    x1 doctor                                   the machine alone
    x1 doctor --config run.yaml --gpus 2        the machine for this run, and what the run will cost on it

First everything is measured (`examination`), then judged, then printed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from x1_pretrain import __version__
from x1_pretrain.command import single
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import load_config, parse_assignment
from x1_pretrain.doctor import conclusion, findings
from x1_pretrain.doctor.examination import Options, examine
from x1_pretrain.doctor.trial import DYING_S
from x1_pretrain.errors import UserError
from x1_pretrain.numbers import for_json
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.stores.address import parse

Flag = typer.Option
LIMIT_S = 115.0
SHORTEST_S = 10.0


class Progress:
    """One line that is written over, on a terminal only."""

    def __init__(self, begun: float, quiet: bool) -> None:
        self._begun, self._quiet = begun, quiet or not sys.stderr.isatty()

    def say(self, what: str) -> None:
        if not self._quiet:
            line = f"[{time.monotonic() - self._begun:3.0f} s] {what} ..."
            print(
                f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        if not self._quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(
    config: Annotated[Path | None, Flag(help="the run's YAML file; without it the machine alone")] = None,
    gpus: Annotated[int | None, Flag(help="GPUs of the run [with a GPU: all that are there]", min=1)] = None,
    data_dir: Annotated[str | None, Flag(help="corpus folder [config: data.dir]")] = None,
    ckpt_dir: Annotated[str | None, Flag(help="where checkpoints will go [config: checkpoint.dir]")] = None,
    device: Annotated[str, Flag(help="cpu, cuda or auto")] = "auto",
    mirror: Annotated[
        str | None,
        Flag(help="where copies of the run go: tried with up to 64 MiB each way, then removed [mirror.uri]"),
    ] = None,
    usd_per_hr: Annotated[float | None, Flag(help="price of the whole machine", min=0)] = None,
    alerts: Annotated[
        bool, Flag("--alerts", help="send a test message to each channel in X1_ALERTS")
    ] = False,
    full_hash: Annotated[bool, Flag("--full-hash", help="hash token files above 1 GiB as well")] = False,
    offline: Annotated[bool, Flag("--offline", help="ask no server for the time")] = False,
    env_file: Annotated[
        Path | None, Flag(help="where working NCCL settings go [x1-nccl.env beside the config]")
    ] = None,
    limit_s: Annotated[float, Flag(help="seconds for everything; a hanging all-reduce may add 90")] = LIMIT_S,
    as_json: Annotated[bool, Flag("--json", help="print JSON instead of the table")] = False,
    set_: Annotated[list[str], Flag("--set", metavar="FIELD=VALUE", help="override any config field")] = [],  # noqa: B006
) -> int:
    """Measure this machine, judge it, say what the run will cost on it. Exit code 1: something is broken."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: expected cpu, cuda or auto")
    if not limit_s >= SHORTEST_S:
        raise UserError(f"--limit-s {limit_s:g}: expected at least {SHORTEST_S:g} seconds")
    if usd_per_hr is not None and not math.isfinite(usd_per_hr):
        raise UserError(f"--usd-per-hr {usd_per_hr:g}: expected the dollars of an hour, such as 2.49")
    begun = time.monotonic()
    if mirror is not None:
        parse(mirror)  # a typo ends here
    loaded = _loaded(config, data_dir, ckpt_dir, mirror, set_)
    options = Options(
        config=loaded,
        data_dir=data_dir,
        folder=loaded.checkpoint_folder if loaded else Path(ckpt_dir or "."),
        gpus=gpus,
        device=device,
        alerts=alerts,
        full_hash=full_hash,
        offline=offline,
        limit_s=limit_s,
        dated_files=tuple(file for file in (config, Path(__file__)) if file),
        environment={key: value for key, value in os.environ.items() if key not in TORCHRUN},
        mirror=mirror,
    )
    progress = Progress(begun, as_json)
    try:
        with ended_in_order():
            facts = examine(options, progress.say)
    finally:
        progress.clear()
    target = env_file or (config.parent if config else Path()) / conclusion.ENV_NAME
    page = conclusion.conclude(options, facts, target, usd_per_hr)
    took_s = time.monotonic() - begun
    print(_as_json(page, took_s) if as_json else _as_text(page, loaded, took_s))
    return findings.exit_code(page.findings)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that every child is ended and every file removed; exit code 143."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there signals can be taken
        yield
        return
    others = set(psutil.Process().children())
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        _end_all(set(psutil.Process().children()) - others)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_all(children: set[psutil.Process]) -> None:
    """A signal may come while a child is being started, before anyone has it in hand."""
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(list(children), timeout=DYING_S)


# Left by torchrun: with them a trial would wait for ranks that nobody started.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _loaded(
    config: Path | None,
    data_dir: str | None,
    ckpt_dir: str | None,
    mirror: str | None,
    assignments: list[str],
) -> RunConfig | None:
    if config is None:
        if assignments:
            raise UserError(f"--set {assignments[0]}: there is no config to change; give --config FILE")
        return None
    flags = {"data.dir": data_dir, "checkpoint.dir": ckpt_dir, "mirror.uri": mirror}
    given: dict[str, Any] = {path: value for path, value in flags.items() if value is not None}
    loaded = load_config(config, given | dict(parse_assignment(text) for text in assignments))
    if data_dir and loaded.data.corpora:
        raise UserError(
            f"--data-dir {data_dir}: the config names several corpora ({', '.join(loaded.data.corpora)}); "
            "set their folders with --set data.corpora.NAME.dir=DIR"
        )
    return loaded


def _as_text(page: conclusion.Page, config: RunConfig | None, took_s: float) -> str:
    width = shutil.get_terminal_size((110, 24)).columns
    parts = [
        findings.table(page.findings, width),
        "",
        f"{findings.summary(page.findings)}, in {took_s:.0f} s",
    ]
    if page.estimate_text:
        parts += ["", page.estimate_text]
    elif config is None:
        parts.append("With --config FILE: the data, a dry run, and what the run will cost here.")
    return "\n".join(parts)


def _as_json(page: conclusion.Page, took_s: float) -> str:
    tree = {
        "schema_version": 1,
        "kind": "doctor",
        "x1_version": __version__,
        "time_utc": utc_now(),
        "seconds": round(took_s, 1),
        "exit_code": findings.exit_code(page.findings),
        "findings": findings.as_json(page.findings),
        "estimate": for_json(page.estimate.to_json()) if page.estimate else None,
    }
    return json.dumps(tree, indent=1)


app = single(main)
