"""The whole way in minutes, with nothing to download: text, tokens, a plan, a run that is interrupted and
resumed, its evaluation, a rented machine under a ceiling, a machine that dies with its disk, a scaling law
that predicts a run, its artifacts.

The text is this machine's own Python installation: the standard library's source (domain `code`), its
docstrings and help topics (domain `prose`).
"""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.demo_budget import rented_run
from x1_pretrain.demo_commands import must, say, start
from x1_pretrain.demo_law import law
from x1_pretrain.demo_mirror import moved_run
from x1_pretrain.errors import INTERRUPTED, UserError
from x1_pretrain.records.console import compact, duration
from x1_pretrain.records.metrics import read_rows

# Installed packages, tests, and modules that are tables: of characters, or of text that `prose` has anyway.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
CONTEXT, BATCH_BLOCKS = 256, 8
MINUTES = 2.75  # of training
SPIKE_AT, SPIKE_LINES = 0.7, 8  # of the run; of its post-mortem
SPIKE_STEPS = 100  # a shorter run does not know yet what is usual, and does not recover
PARTS = ("rented", "moved", "law")  # that can be left out
PROMPTS = ["def read(self, ", "import os\n", "Return the "]


# ------------------------------------------------------------------------------------------------------------
# 1. Text


def write_text(folder: Path) -> dict[str, int]:
    """The standard library as two domains under `folder`; bytes of each."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in library.rglob("*.py") if not LEFT_OUT & set(p.relative_to(library).parts))
    if not files:
        raise UserError(f"{library}: this Python has no standard library source to read; use another Python")
    sizes = {"code": 0, "prose": 0}
    (folder / "prose").mkdir(parents=True, exist_ok=True)
    with (folder / "prose" / "docs.jsonl").open("w", encoding="utf-8") as prose:
        for topic in _help_topics():
            sizes["prose"] += _write_row(prose, topic)
        for file in files:
            source = _read(file)
            if source is None:
                continue
            copy = folder / "code" / file.relative_to(library)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source, encoding="utf-8")
            sizes["code"] += len(source.encode())
            sizes["prose"] += sum(_write_row(prose, text) for text in _docstrings(source))
    return sizes


def _read(file: Path) -> str | None:
    """The text of a source file; None for the few that are not UTF-8 or hold nothing."""
    try:
        return file.read_text(encoding="utf-8") or None
    except (UnicodeDecodeError, OSError):
        return None


def _help_topics() -> list[str]:
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings long enough to be prose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules are no news to a reader of the demo
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 80:
                yield text


def _write_row(file: Any, text: str) -> int:
    file.write(json.dumps({"text": text}) + "\n")
    return len(text.encode())


# ------------------------------------------------------------------------------------------------------------
# 2. A plan


def config_tree(total_steps: int) -> dict[str, Any]:
    """The demo's run: a small decoder on a small batch, evaluated ten times, but no two in five steps."""
    tenth = max(5, total_steps // 10)
    return {
        "name": "x1-demo",
        "seed": 42,
        "model": {
            "layers": 4,
            "d_model": 192,
            "heads": 3,
            "kv_heads": 3,
            "d_ff": 512,
            "context": CONTEXT,
            "vocab_size": 4096,
        },
        "training": {"total_steps": total_steps, "batch_tokens": BATCH_BLOCKS * CONTEXT},
        "optimizer": {
            "lr": 3e-3,
            "min_lr": 1e-4,
            "warmup_steps": min(40, total_steps // 5),
            "weight_decay": 0.1,
            "beta2": 0.98,
        },
        "checkpoint": {"every": tenth},
        "evaluation": {
            "every": tenth,
            "tokens": 64 * CONTEXT,
            "prompts": PROMPTS,
            "sample_tokens": 40,
            "temperature": 0.6,
        },
        "log": {"every": max(1, tenth // 5)},
    }


def seconds_per_step(config: RunConfig, budget_s: float = 8.0) -> tuple[float, str]:
    """Measured here: forward and backward passes of the demo's model, and in which precision."""
    import torch

    from x1_pretrain.runtime import assemble, world

    here = world.World(0, 1, torch.device("cpu"))
    decoder, _, machine = assemble.build_model(config, here, None)
    blocks = config.batch_blocks
    assemble.dry_run(decoder, blocks)
    times: list[float] = []
    begun = time.perf_counter()
    while not times or time.perf_counter() - begun < budget_s:
        started = time.perf_counter()
        assemble.dry_run(decoder, blocks)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2], machine.precision


def plan(minutes: float) -> RunConfig:
    """From minutes to steps, by measuring."""
    from x1_pretrain.model.flops import flops_per_token, parameter_counts

    draft = parse_config(config_tree(100), "demo")
    each_s, precision = seconds_per_step(draft, min(8.0, 20 * minutes))
    steps = int(minutes * 60 / (each_s * 1.15))  # the optimizer and the evaluations take their part
    steps = max(20, steps // 10 * 10)
    config = parse_config(config_tree(steps), "demo")
    counts, flops = parameter_counts(config.model), flops_per_token(config.model)
    tokens = steps * config.training.batch_tokens
    table = Table("", "value", "from", show_header=True, box=None, pad_edge=False)
    table.add_row("parameters", f"{counts.total:,}", f"{counts.matrices:,} in matrices + embeddings + norms")
    table.add_row(
        "a step", f"{config.training.batch_tokens:,} tokens", f"{config.batch_blocks} blocks x {CONTEXT}"
    )
    table.add_row(
        "speed", f"{config.training.batch_tokens / each_s:,.0f} tokens/s", f"measured here, {precision}"
    )
    table.add_row("steps", f"{steps:,}", f"{minutes:g} minutes at that speed")
    table.add_row("tokens", f"{tokens:,}", "steps x tokens a step")
    table.add_row("FLOPs", f"{tokens * flops.causal:.2e}", f"{flops.causal:.3e} per token (causal count)")
    say(table)
    return config


# ------------------------------------------------------------------------------------------------------------
# 3. The commands, as anyone would type them


def x1(*args: str | Path, env: Mapping[str, str] | None = None) -> int:
    """Show a command and run it; `env` is added to its environment."""
    return _wait(start(*args, env=env))


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:  # the child got the same Ctrl-C and saves
        code = process.wait()
        raise UserError(f"interrupted; the demo's files stay (last command: exit {code})") from None


def train_with_an_interruption(command: list[str | Path], run: Path, at_step: int) -> None:
    """Train; at `at_step` send SIGTERM, as a preempted machine would get it; then the same command again."""
    process = start(*command)
    try:
        while process.poll() is None and _last_step(run) < at_step:
            time.sleep(0.2)
        if process.poll() is None:
            say("\n[bold]-- the demo sends SIGTERM now, as a cloud that takes its machine back --[/bold]")
            process.send_signal(signal.SIGTERM)
        code = _wait(process)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code == INTERRUPTED:
        say(
            f"[bold]-- it saved and left with exit code {INTERRUPTED}: safe to relaunch. The same command: "
            "--[/bold]"
        )
        code = x1(*command)
    must(code, "train")


def _last_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


# ------------------------------------------------------------------------------------------------------------
# 4. What came of it


def show_learning(run: Path) -> None:
    """Validation by domain and what the model said, at the beginning, at a tenth, at the end."""
    rows = [r for r in read_rows(run / "metrics.jsonl") if "val/loss" in r]
    steps = [r["step"] for r in rows]
    last = steps[-1]
    shown = [steps[0], steps[1] if len(steps) > 2 else last, last]
    table = Table("step", "tokens", "code bits/byte", "prose bits/byte", box=None, pad_edge=False)
    for row in rows:
        if row["step"] in shown:
            bits = [f"{row[f'val/{d}/bpb']:.3f}" for d in ("code", "prose")]
            table.add_row(f"{row['step']} ({row['step'] / last:.0%})", compact(row["tokens"]), *bits)
    say("\n[bold]What it learned[/bold] (bits per byte of held-out text; lower is better)")
    say(table)
    say("\n[bold]What it said[/bold]")
    for sample in read_rows(run / "samples.jsonl"):
        if sample["step"] in shown:
            text = (sample["prompt"] + sample["text"]).replace("\n", "\n        ")
            say(f"  at {sample['step'] / last:4.0%}  {text}", markup=False)


def show_spike(run: Path) -> None:
    """What the run itself wrote about the spike: the beginning of its post-mortem."""
    file = run / "spike-postmortem.md"
    say("\n[bold]The spike[/bold] (five batches of rare tokens, injected; the run wrote this by itself)")
    if not file.exists():
        raise UserError(f"demo: the spike left no {file}; see {run / 'events.jsonl'}")
    lines = file.read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if line.strip() and not line.startswith("![")][:SPIKE_LINES]
    say("\n".join(f"  {line}" for line in shown), markup=False)
    say(f"  ... {file}", markup=False)


def check_resume(run: Path, steps: int) -> str:
    """The interruption left no gap and no double: every logged step is there once."""
    logged = [r["step"] for r in read_rows(run / "metrics.jsonl") if "train/loss" in r]
    resumes = [r["step"] for r in read_rows(run / "events.jsonl") if r["event"] == "resume"]
    if logged != sorted(set(logged)) or logged[-1] != steps:
        raise UserError(f"demo: the steps in {run / 'metrics.jsonl'} have a gap or a double")
    where = f"resumed at step {resumes[0]}" if resumes else "ran through without an interruption"
    return f"{where}; {len(logged)} log rows, each step once"


def main(
    output: Annotated[Path, typer.Option(help="folder for all the demo makes")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="minutes of training")] = MINUTES,
    skip: Annotated[list[str], typer.Option(help="leave out rented, moved or law; repeatable")] = [],  # noqa: B006
) -> None:
    """The whole way in minutes, on this machine's own Python as text. Nothing is downloaded."""
    begun = time.perf_counter()
    if (output / "run").exists():
        raise UserError(
            f"{output / 'run'} is there from an earlier demo; remove {output} or pass --output DIR"
        )
    if unknown := set(skip) - set(PARTS):
        raise UserError(f"--skip {min(unknown)}: expected one of {', '.join(PARTS)}")
    text, corpus, run, artifacts = (output / n for n in ("text", "corpus", "run", "artifacts"))

    say("[bold]1. Text[/bold]: this Python's standard library")
    sizes = write_text(text)
    say("   " + ", ".join(f"{domain}: {size / 1e6:.1f} MB" for domain, size in sizes.items()))

    say("\n[bold]2. Tokens[/bold]: a vocabulary of 4096 learned from it, then all of it as one flat file")
    tokenize: list[str | Path] = ["tokenize", "--input-dir", text, "--output-dir", corpus]
    must(x1(*tokenize, "--tokenizer", "train:4096", "--val-fraction", "0.02", "--workers", "2"), "tokenize")

    say("\n[bold]3. A plan[/bold]: what fits into the time")
    config = plan(minutes)
    file = output / "config.yaml"
    file.write_text(
        yaml.safe_dump(config_tree(config.training.total_steps), sort_keys=False), encoding="utf-8"
    )

    steps = config.training.total_steps
    spike = " and one loss spike" if steps >= SPIKE_STEPS else ""
    say(f"\n[bold]4. Training[/bold], with one interruption{spike} on purpose")
    command: list[str | Path] = ["train", "--config", file, "--data-dir", corpus, "--run-dir", run]
    if steps >= SPIKE_STEPS:
        command += ["--inject-spike-at-step", str(math.ceil(steps * SPIKE_AT))]
    train_with_an_interruption(command, run, math.ceil(steps * 0.45))
    say("   " + check_resume(run, steps))
    show_learning(run)
    if steps >= SPIKE_STEPS:
        show_spike(run)

    if "rented" not in skip:
        say("\n[bold]5. Under a ceiling[/bold]: a rented machine, its hour in a minute, a price that jumps")
        rented_run(output / "rented", corpus, seconds_per_step)

    if "moved" not in skip:
        say("\n[bold]6. A lost machine[/bold]: a run is killed with its disk, and goes on from its mirror")
        moved_run(output / "moved", corpus, seconds_per_step, minutes / MINUTES)

    if "law" not in skip:
        say("\n[bold]7. A law[/bold]: three sizes on a budget; a run of twice the FLOPs, predicted first")
        law(output / "law", text, x1, minutes / MINUTES)

    say("\n[bold]8. Artifacts[/bold]: what to show others, and a reviewer's checks")
    must(x1("report", run), "report")
    must(x1("export", run, "--output", artifacts), "export")
    must(x1("verify", run, "--export", artifacts), "verify")
    last_words(output, artifacts, run, time.perf_counter() - begun)


def last_words(output: Path, artifacts: Path, run: Path, seconds: float) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    pictures = ", ".join(p.name for p in sorted(artifacts.glob("*.png")))
    say(f"\n[bold]Done in {duration(seconds)}.[/bold]")
    say(f"  pictures   {artifacts}{os.sep} ({pictures})")
    say(f"  the report {run / 'report.html'} (open it in a browser; nothing is loaded from elsewhere)")
    if (output / "law").exists():
        say(f"  the law    {output / 'law'}{os.sep} (fit.json, prediction.md, iso-flop.png)")
    say(f"  the model  {newest} (loads with transformers.AutoModelForCausalLM.from_pretrained)")
    say("\nThree commands to try next:")
    say(
        f"  x1 train --config {output}/config.yaml --data-dir {output}/corpus --run-dir {output}/second \\",
        markup=False,
    )
    say(
        "      --set seed=43 --set optimizer.lr=1e-3        # another seed, another learning rate",
        markup=False,
    )
    say(
        f"  x1 tokenize --input-dir YOUR_TEXT --output-dir {output}/mine --tokenizer train:8192", markup=False
    )
    say(
        "  x1 train --config configs/x1-50m-a100.yaml --data-dir CORPUS   # the real one, on a GPU",
        markup=False,
    )


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.demo"))
