"""Runs of several sizes on one budget of FLOPs, for a scaling law: planned, priced, trained, collected.

x1 isoflop --flops 1.35e17 --sizes 5M,25M,100M --data-dir DIR --output runs/law [--cooldowns 8] [--dry-run]
x1 isoflop --collect runs/A runs/B runs/C --output DIR

The same command goes on where it was interrupted. It ends with `runs.csv` in the output folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import ModelConfig, RunConfig
from x1_pretrain.config_reading import load_config, parse_assignment, parse_config
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.laws import collect, sweep
from x1_pretrain.laws.sweep import Count, Pace, PlannedRun
from x1_pretrain.laws.sweep_run import TABLE, Job, Purse, agree, carry_out, plan_tree
from x1_pretrain.laws.sweep_table import Held, data_lines, hourly, pace_of, table, told
from x1_pretrain.model import shapes
from x1_pretrain.model.flops import GPT2_VOCABULARY
from x1_pretrain.money.gate import ASSUMED_MFU
from x1_pretrain.numbers import parse_amount
from x1_pretrain.records.run_folder import is_run

# What the sweep itself decides for each run, and the flag that has a say in it.
OWN = {
    **{f"model.{name}": "--sizes" for name in ("layers", "d_model", "heads", "kv_heads", "d_ff", "head_dim")},
    "model.context": "--context",
    "training.total_steps": "--flops",
    "training.batch_tokens": "--batch-tokens",
    "optimizer.schedule": "--cooldowns",
    "optimizer.decay_steps": "--cooldowns",
    "checkpoint.at": "--cooldowns",
    "checkpoint.dir": "--output",
    "run_dir": "--output",
    "name": "--output",
    "seed": "--seed",
}

Flag = typer.Option


# ------------------------------------------------------------------------------------------------------------
# What every run has in common


def base_config(file: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Everything that is the same for all runs."""
    for path in overrides:
        if path in OWN:
            raise UserError(f"--set {path}: each run has its own; see {OWN[path]}")
    if file is not None:
        return load_config(file, overrides)
    shape = shapes.shape_for(1e6, GPT2_VOCABULARY, 1024).model_dump(exclude={"vocab_size"})
    tree = {
        "name": "isoflop",
        "model": shape,
        "training": {"total_steps": 10**9},
        "optimizer": {"warmup_steps": 1},
    }
    return parse_config(_with(tree, overrides), "x1 isoflop")


def _with(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with dotted paths set."""
    for path, value in values.items():
        *parents, leaf = path.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = value
    return tree


def held(base: RunConfig) -> Held | None:
    """None where a corpus folder is not on this machine."""
    from x1_pretrain.corpus.shards import read_manifest  # brings the tokenizers with it

    folders = [Path(corpus.dir) for corpus in base.data.mixture().values()]
    if not all((folder / "manifest.json").is_file() for folder in folders):
        return None
    manifests = [read_manifest(folder) for folder in folders]
    whole = sum(corpus.weight for corpus in base.data.mixture().values())
    domains = [sum(end - start for start, end in s) for m in manifests for s in m.val_spans.values()]
    return Held(
        vocab_size=max(m.tokenizer.vocab_size for m in manifests),
        fingerprints=tuple(m.fingerprint for m in manifests),
        train_tokens=sum(m.train.tokens for m in manifests),
        drawn_most=max(
            corpus.weight / whole / m.train.tokens
            for corpus, m in zip(base.data.mixture().values(), manifests, strict=True)
            if m.train.tokens
        ),
        val_tokens=max(domains, default=0),
    )


def no_corpus(base: RunConfig) -> str:
    folders = [corpus.dir for corpus in base.data.mixture().values()]
    absent = next(folder for folder in folders if not (Path(folder) / "manifest.json").is_file())
    return (
        f"{absent}: no such corpus folder; pass --data-dir DIR, or make one with `python -m "
        "x1_pretrain.tokenize_data --input-dir TEXT --output-dir DIR`"
    )


# ------------------------------------------------------------------------------------------------------------
# The plan


def models_for(
    budgets: Sequence[float], sizes: Sequence[float], count: Count, base: ModelConfig
) -> dict[float, list[ModelConfig]]:
    """The architectures on each budget: of the sizes asked for, else around the expected optimum."""
    kept = {name: getattr(base, name) for name in ("tied_embeddings", "qk_norm", "rope_theta", "norm_eps")}
    kept |= {name: getattr(base, name) for name in ("init_std", "vocab_multiple")}
    found: dict[float, list[ModelConfig]] = {}
    for budget in budgets:
        plain = [shapes.shape_for(n, base.vocab, base.context) for n in sizes]
        plain = plain or sweep.default_models(budget, count, base.vocab, base.context)
        found[budget] = [model.model_copy(update=kept) for model in plain]
    return found


def job_of(
    run: PlannedRun,
    base: RunConfig,
    output: Path,
    seed: int | None,
    overrides: Mapping[str, Any],
    val_tokens: int,
) -> Job:
    """The run's config: the base, what the plan decided, and last what a person set."""
    values: dict[str, Any] = {
        "model": run.model.model_dump(),
        "name": run.name,
        "run_dir": str(folder_of(run.name, output)),
        "seed": base.seed if seed is None else seed,
        "training.total_steps": run.steps,
        "training.batch_tokens": run.batch_tokens,
        "optimizer.lr": run.lr,
        "optimizer.min_lr": run.min_lr,
        "optimizer.schedule": "wsd",
        "optimizer.warmup_steps": run.warmup_steps,
        "optimizer.decay_steps": run.decay_steps,
        "checkpoint.dir": None,
        "checkpoint.every": -(-run.steps // 5),
        "checkpoint.at": list(run.save_at),
        "evaluation.every": run.steps,
        "evaluation.tokens": val_tokens,
        "evaluation.prompts": base.evaluation.prompts if _stated(base, "prompts") else [],
        "log.every": max(1, min(base.log.every, run.steps // 20)),
    }
    values |= overrides
    config = parse_config(_with(base.model_dump(mode="json"), values), f"x1 isoflop: {run.name}")
    source = folder_of(run.trunk, output) / "checkpoints" / f"step-{run.branch_step:09d}"
    return Job(run, config, None if run.is_trunk else source)


def folder_of(name: str, output: Path) -> Path:
    return output / "runs" / name


def evaluated(base: RunConfig, found: Held | None) -> int:
    """Tokens of each domain: what somebody stated, else the whole held-out part, the same for every run."""
    if _stated(base, "tokens") or found is None:
        return base.evaluation.tokens
    return max(1, found.val_tokens)


def _stated(base: RunConfig, name: str) -> bool:
    """Whether somebody chose this field of the evaluation."""
    return name in base.evaluation.model_fields_set


# ------------------------------------------------------------------------------------------------------------
# The command


def amounts(texts: Sequence[str], flag: str) -> list[float]:
    """From a repeated flag, a comma list, or both; each once."""
    words = [word for text in texts for word in text.split(",") if word.strip()]
    return list(dict.fromkeys(parse_amount(word, flag) for word in words))


def refuse_dear(
    planned: Sequence[PlannedRun], pace: Pace, usd_per_hr: Decimal | None, cap_usd: float | None
) -> None:
    """A ceiling is for all runs together; each is priced once more before it starts."""
    seconds = [pace.seconds(run) for run in planned]
    if cap_usd is None or usd_per_hr is None or None in seconds:
        return
    usd = usd_per_hr * Decimal(repr(sum(second or 0.0 for second in seconds))) / 3600
    if usd > Decimal(str(cap_usd)):
        raise RefusedError(
            f"--budget-cap-usd {cap_usd:g}: the {len(planned)} runs cost about ${usd:.2f}; take fewer sizes, "
            "fewer --cooldowns or fewer --flops, or raise the ceiling"
        )


def collected(names: Sequence[str], output: Path, usd_per_hr: Decimal | None, unfinished: bool) -> None:
    """`--collect`: existing runs as a table."""
    if not names:
        raise UserError("--collect: name the run folders, for example x1 isoflop --collect runs/A runs/B")
    found = collect.collect(collect.named_runs(names), usd_per_hr, unfinished)
    for line in found.left_out:
        print(f"left out {line}" + ("" if unfinished else " (--include-unfinished takes it as it stands)"))
    if not found.rows:
        raise UserError(f"--collect: none of the {len(names)} runs is a point yet; nothing was written")
    collect.write_table(output / TABLE, found.rows)
    print(f"{len(found.rows)} points in {output / TABLE}")


def main(
    output: Annotated[Path, Flag(help="folder for the runs and runs.csv", show_default=False)],
    runs: Annotated[
        list[str] | None, typer.Argument(help="with --collect: run folders", metavar="RUN...")
    ] = None,
    flops: Annotated[
        list[str] | None, Flag(help="budget in FLOPs, e.g. 1.35e17; repeatable, or a,b,c")
    ] = None,
    sizes: Annotated[
        list[str] | None, Flag(help="parameters in matrices, e.g. 5M,25M,100M [default: around the optimum]")
    ] = None,
    cooldowns: Annotated[
        int, Flag(min=1, help="points from each size, by branches with their own decay")
    ] = 1,
    span: Annotated[
        float, Flag(min=1.5, help="the shortest cooldown has the longest's tokens over this")
    ] = sweep.SPAN,
    count: Annotated[
        Literal["true", "6n"], Flag(help="what a budget counts: all the work, or 6 x matrices x tokens")
    ] = "true",
    data_dir: Annotated[str | None, Flag(help="corpus folder [default: the base config's]")] = None,
    base: Annotated[Path | None, Flag(help="a config for everything that is not a size's own")] = None,
    batch_tokens: Annotated[int | None, Flag(min=1, help="tokens a step [default: by rule]")] = None,
    context: Annotated[int | None, Flag(min=1, help="tokens a sequence [default: the base config's]")] = None,
    seed: Annotated[int | None, Flag(min=0, help="of every run [default: the base config's]")] = None,
    set_: Annotated[
        list[str],
        Flag("--set", metavar="FIELD=VALUE", help="override a config field in every run; repeatable"),
    ] = [],  # noqa: B006
    gpu: Annotated[str | None, Flag(help="price the plan for this GPU, e.g. a100-80gb")] = None,
    mfu: Annotated[
        float | None, Flag(min=0.0, max=1.0, help=f"share of its peak [assumed: {ASSUMED_MFU}]")
    ] = None,
    flops_per_sec: Annotated[float | None, Flag(min=1.0, help="measured speed, all the work counted")] = None,
    usd_per_hr: Annotated[
        float | None, Flag(min=0.0, help="price of an hour [default: a GPU's list price]")
    ] = None,
    budget_cap_usd: Annotated[float | None, Flag(help="one ceiling for all runs together")] = None,
    budget_curr_cost_uri: Annotated[str | None, Flag(help="where a sidecar says what was spent")] = None,
    raise_ceiling_to: Annotated[
        float | None, Flag(help="a person's decision to go on after the guard stopped a run")
    ] = None,
    device: Annotated[str, Flag(help="cpu, cuda or auto")] = "auto",
    brief: Annotated[bool, Flag("--brief", help="a line a run; what they say goes into OUTPUT/logs")] = False,
    dry_run: Annotated[bool, Flag("--dry-run", help="print the plan and leave")] = False,
    collect_: Annotated[bool, Flag("--collect", help="only make runs.csv of the runs named")] = False,
    include_unfinished: Annotated[bool, Flag("--include-unfinished", help="with --collect")] = False,
) -> int:
    """Runs of several sizes on one budget of FLOPs, for a law: planned, priced, trained, collected."""
    given_usd_per_hr = None if usd_per_hr is None else Decimal(str(usd_per_hr))
    if collect_:
        collected(runs or [], output, given_usd_per_hr, include_unfinished)
        return 0
    if runs:
        raise UserError(f"{runs[0]}: run folders are named with --collect only")
    budgets = amounts(flops or [], "--flops")
    if not budgets:
        raise UserError("--flops: missing; for example --flops 1.35e17 (or --collect RUN... to read runs)")
    wanted = amounts(sizes or [], "--sizes")
    overrides = dict(map(parse_assignment, set_)) | ({"data.dir": data_dir} if data_dir else {})
    shared = base_config(base, overrides)
    found = held(shared)
    if found is None and not dry_run:
        raise UserError(no_corpus(shared))
    vocab = shared.model.vocab_size or (found.vocab_size if found else GPT2_VOCABULARY)
    model = shared.model.model_copy(update={"vocab_size": vocab, "context": context or shared.model.context})
    models = models_for(budgets, wanted, count, model)
    planned = sweep.plan(models, count, cooldowns, batch_tokens, span)
    if len(wanted) > (shapes_made := len({run.model for run in planned if run.budget == budgets[0]})):
        print(f"--sizes: {len(wanted)} were asked for, and their nearest shapes are {shapes_made}")
    if (lr := overrides.get("optimizer.lr")) is not None:
        planned = tuple(replace(run, lr=float(lr)) for run in planned)
    hour, basis = hourly(gpu, usd_per_hr)
    pace = pace_of(gpu, mfu, flops_per_sec)
    tokens = evaluated(shared, found)
    print("\n".join([*table(planned, pace, hour), "", *told(planned, pace, hour, basis, count)]))
    print("\n".join(data_lines(planned, found, tokens, vocab)))
    jobs = [job_of(run, shared, output, seed, overrides, tokens) for run in planned]
    if dry_run or found is None:
        return 0
    cap = max((usd for usd in (budget_cap_usd, raise_ceiling_to) if usd is not None), default=None)
    refuse_dear(planned, pace, hour, cap)
    if is_run(output) or (output / "train.bin").exists():
        raise RefusedError(f"--output {output}: is a run or a corpus; give the sweep a folder of its own")
    agree(output, plan_tree(jobs, found.fingerprints))
    purse = Purse(budget_cap_usd, budget_curr_cost_uri, raise_ceiling_to)
    return carry_out(jobs, output, ["--device", device], purse, given_usd_per_hr, brief)


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.laws.isoflop"))
