"""The demo's lost machine: a run with a mirror is killed, all of its folder is deleted, and it goes on from
the mirror on another machine.

A machine is a folder here, and the mirror another one; an object store differs in its address alone.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from x1_pretrain.config_reading import parse_config
from x1_pretrain.demo_commands import must, say, start
from x1_pretrain.errors import UserError
from x1_pretrain.mirror.head import NAME as HEAD
from x1_pretrain.mirror.head import decode
from x1_pretrain.records.metrics import read_rows

TRAINING_S, LEAST_S = 12.0, 6.0  # that the run would take undisturbed, by a short measurement
DIES_AT = 0.5  # of the run
STALE_S = 3.0  # the shortest there is: the demo waits for it
NAME = "x1-moved"


def config_tree(steps: int) -> dict[str, Any]:
    """A small run on the demo's corpus, with many checkpoints."""
    return {
        "name": NAME,
        "model": {"layers": 2, "d_model": 64, "heads": 2, "kv_heads": 2, "d_ff": 176, "context": 64,
                  "vocab_size": 4096},
        "training": {"total_steps": steps, "batch_tokens": 512, "compile": "off", "deterministic": True,
                     "micro_batch": 8},
        "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "warmup_steps": min(40, steps // 5)},
        "checkpoint": {"every": max(1, steps // 8)},
        "evaluation": {"every": max(1, steps // 4), "tokens": 4096, "prompts": []},
        "log": {"every": max(1, steps // 16)},
        "mirror": {"every_s": 0.5, "stale_s": STALE_S},
    }  # fmt: skip


def moved_run(folder: Path, corpus: Path, seconds_per_step: Callable[..., Any], share: float = 1.0) -> None:
    """Train, die, go on elsewhere, as a person would see it. A short demo has a `share` of the time."""
    mirror, one, other = folder / "mirror", folder / "machine-a", folder / "machine-b"
    shutil.copytree(corpus, one / "corpus")
    each_s = seconds_per_step(parse_config(config_tree(100), "demo"), 1.5)[0] * 1.3
    steps = max(40, int(max(LEAST_S, TRAINING_S * min(1.0, share)) / each_s))
    file = folder / "moved.yaml"
    file.write_text(yaml.safe_dump(config_tree(steps), sort_keys=False), encoding="utf-8")
    train: list[str | Path] = ["train", "--config", file]
    trainer = start(*train, *_places(one), "--mirror", mirror, "--mirror-data")
    died_at = die(trainer, one / "run", mirror / NAME, steps)
    if died_at is None:
        say("   (this machine was faster than measured: the run was over before its machine could die)")
        return
    shutil.rmtree(one)
    said = f"at step {died_at} trainer and mirror are killed and {one} is deleted, the corpus with it"
    say(f"\n[bold]-- {said} --[/bold]")
    must(_waited(start("runs", mirror)), "runs")
    say("\n[bold]-- the same run, on a machine that has nothing but the config: --[/bold]")
    resumed = start(*train, *_places(other), "--resume-from", mirror / NAME, "--mirror-data")
    must(_waited(resumed), "train")
    say("   " + check(other / "run", steps, died_at), markup=False)


def _places(machine: Path) -> list[str | Path]:
    return ["--data-dir", machine / "corpus", "--run-dir", machine / "run"]


def die(trainer: subprocess.Popen[bytes], run: Path, mirrored: Path, steps: int) -> int | None:
    """Half way, and once the mirror has a checkpoint and the corpus: kill -9 of the trainer and its mirror.
    The step that was reached; None of a run that ended by itself."""
    try:
        while trainer.poll() is None:
            if _last_step(run) >= DIES_AT * steps and is_enough(mirrored):
                reached = _last_step(run)
                kill(trainer)
                return reached
            time.sleep(0.05)
    except BaseException:
        kill(trainer)
        raise
    must(trainer.returncode, "train")
    return None


def is_enough(mirrored: Path) -> bool:
    """Whether the mirror alone has what another machine needs."""
    try:
        head = decode((mirrored / HEAD).read_bytes(), str(mirrored))
    except FileNotFoundError:
        return False
    return bool(head.data) and any(one.step for one in head.checkpoints)


def kill(trainer: subprocess.Popen[bytes]) -> None:
    """As a machine dies: all of its processes at once, without a word."""
    with suppress(psutil.NoSuchProcess):
        doomed = psutil.Process(trainer.pid)
        all_of_it = [doomed, *doomed.children(recursive=True)]
        for process in all_of_it:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(all_of_it[1:], timeout=10)
    trainer.wait()


def check(run: Path, steps: int, died_at: int) -> str:
    """Every step is on record once, though they were made on two machines."""
    made = [row["step"] for row in read_rows(run / "steps.jsonl")]
    if made != list(range(1, steps + 1)):
        raise UserError(f"demo: the steps in {run / 'steps.jsonl'} have a gap or a double")
    resumes = [row["step"] for row in read_rows(run / "events.jsonl") if row["event"] == "resume"]
    if not resumes or not 0 < resumes[-1] <= died_at:
        raise UserError(f"demo: {run} did not go on from a checkpoint of the machine that died")
    again = done_again(run)
    return (
        f"went on from step {resumes[-1]}; of the {died_at - resumes[-1]} steps that were done again the "
        f"mirror knew {again}, and their losses are the same to the last bit; all {steps:,} steps are on "
        "record, each once"
    )


def done_again(run: Path) -> int:
    """Steps of which the mirror had a row that the new machine made again, with the very same loss."""
    now = {row["step"]: row["loss"] for row in read_rows(run / "steps.jsonl")}
    before = {row["step"]: row["loss"] for row in read_rows(run / "steps.superseded.jsonl")}
    if other := [step for step, loss in before.items() if now[step] != loss]:
        raise UserError(f"demo: the loss of step {other[0]} is {now[other[0]]}, it was {before[other[0]]}")
    return len(before)


def _last_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "steps.jsonl")), default=0)


# ------------------------------------------------------------------------------------------------------------
# The commands


def _waited(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
