"""The demo's law: three tiny models trained for real, a law fitted to them, and a run of twice the FLOPs
of any of them, predicted before it is trained.

The vocabulary is small, so that most of the work is in the layers and the loss falls for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from x1_pretrain.demo_commands import must, say
from x1_pretrain.laws import sweep
from x1_pretrain.laws.collect import collect
from x1_pretrain.laws.fitted import Band, read_fit
from x1_pretrain.model.shapes import shape_for
from x1_pretrain.numbers import human

VOCABULARY, CONTEXT, BATCH = 512, 128, 1024
# Runs of fewer steps are still on the plateau where only frequencies are learned, and follow no law; so do
# shapes of another family (48 wide, or 16 wide and four deep: 0.15 to 0.5 nats off the law of these).
SIZES, FLOPS, COOLDOWNS, SPAN = "8K,33K,65K", 4e11, 3, 4
NEXT_SIZE, NEXT_FLOPS = 65e3, 8e11
LR = 6e-3
LEAST_SHARE = 0.075  # with less the shortest run has no five steps
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # products this small are slower on two

Command = Callable[..., int]


def law(folder: Path, text: Path, x1: Command, share: float = 1.0) -> None:
    """From text to a prediction and its outcome, side by side. A short demo has a `share` of the FLOPs."""
    share = min(1.0, max(LEAST_SHARE, share))
    corpus, runs, fit = folder / "corpus", folder / "runs.csv", folder / "fit.json"
    folder.mkdir(parents=True)
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(_base(), sort_keys=False), encoding="utf-8")
    tokenizer = f"train:{VOCABULARY}"
    must(
        x1(
            "tokenize",
            "--input-dir",
            text,
            "--output-dir",
            corpus,
            "--tokenizer",
            tokenizer,
            "--val-fraction",
            0.02,
        ),
        "tokenize",
    )
    shared = ["--base", base, "--data-dir", corpus, "--batch-tokens", BATCH]
    shared += ["--set", f"optimizer.lr={LR}", "--brief"]
    several = ["--sizes", SIZES, "--cooldowns", COOLDOWNS, "--span", SPAN]
    must(
        x1(
            "isoflop",
            "--flops",
            f"{share * FLOPS:.3g}",
            *several,
            "--output",
            folder,
            *shared,
            env=ONE_THREAD,
        ),
        "isoflop",
    )
    must(x1("fit", "--input", runs, "--output", fit, "--n", f"{NEXT_SIZE:g}"), "fit")

    last = sweep.plan(
        {float(f"{share * NEXT_FLOPS:.3g}"): [shape_for(NEXT_SIZE, VOCABULARY, CONTEXT)]}, "true", 1, BATCH
    )[0]
    told = read_fit(fit).loss(last.matrices, last.tokens)
    size = f"{human(last.matrices)} parameters on {human(last.tokens)} tokens"
    say(f"\n[bold]Predicted[/bold], before it is trained: {size} will end at {shown(told)} nats")
    one = ["--flops", f"{share * NEXT_FLOPS:.3g}", "--sizes", f"{NEXT_SIZE:g}", "--output", folder / "next"]
    must(x1("isoflop", *one, *shared, env=ONE_THREAD), "isoflop")
    say("\n" + outcome(told, measured(folder / "next")))


def shown(band: Band) -> str:
    return f"{band.point:.3f} \\[{band.low:.3f}, {band.high:.3f}]"


def outcome(told: Band, nats: float) -> str:
    """Prediction and measurement in one line, whichever way it went."""
    inside = "inside" if told.low <= nats <= told.high else "[bold]outside[/bold]"
    return (
        f"[bold]Predicted {shown(told)}, measured {nats:.3f}[/bold]: {nats - told.point:+.3f} nats "
        f"({nats / told.point - 1:+.1%}), {inside} the interval"
    )


def measured(folder: Path) -> float:
    (row,) = collect(sorted((folder / "runs").iterdir())).rows
    return float(row["val_loss"])


def _base() -> dict[str, Any]:
    """What all runs share; sizes, steps and schedule are each run's own."""
    shape = shape_for(33e3, VOCABULARY, CONTEXT).model_dump(exclude_none=True)
    return {
        "name": "law",
        "seed": 42,
        "model": shape,
        "training": {"total_steps": 10_000},
        "optimizer": {"warmup_steps": 1, "beta2": 0.98},
        "log": {"every": 1000},
    }
