"""A plan as the YAML that `x1 train --config` runs, and as JSON for machines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config, parse_yaml
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.learning.recipe import Derived
from x1_pretrain.money import gate
from x1_pretrain.numbers import compact, flop, human
from x1_pretrain.planning import cluster, derived
from x1_pretrain.planning.cadence import KEEP_LAST, KEEP_LOCAL
from x1_pretrain.planning.critique import Judged
from x1_pretrain.planning.planner import Plan
from x1_pretrain.planning.ways import napkin, ways

FIRST_LINE = "# Made by x1 plan"
PLACE = "/workspace/data/tokenized"


def write(made: Plan, file: Path, corpora: dict[str, str]) -> RunConfig:
    """Writes the config, after checking that training would take it; never over a person's own work."""
    if file.exists() and not untouched(file):
        raise RefusedError(
            f"--output {file}: is there and was edited since, or was not made by x1 plan; choose another name"
        )
    text = sealed(as_yaml(made, corpora))
    config = parse_config(parse_yaml(text, str(file)), str(file))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {file}: can't be written ({error.strerror})") from None
    return config


def sealed(text: str) -> str:
    """With the hash of what follows in its first line, so that an edit is noticed."""
    return f"{FIRST_LINE}, as {hashlib.sha256(text.encode()).hexdigest()[:12]}; edit at will.\n{text}"


def untouched(file: Path) -> bool:
    """As it was written: a new plan may take its place."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--output {file}: can't be read ({error.strerror})") from None
    return text == sealed(text.partition("\n")[2])


def as_yaml(made: Plan, corpora: dict[str, str]) -> str:
    """`corpora`: name -> folder; none: where the labs put theirs."""
    return "\n".join([*_head(made), *_model(made), *_data(made, corpora), *_training(made), *_rest(made), ""])


def _head(made: Plan) -> list[str]:
    quote = made.quote
    what = (
        f"{human(made.tokens)} tokens on {quote.price.what}, {gate.exact(quote.total_usd)} with all around it"
    )
    size = f"{human(made.counts.matrices)} parameters in matrices, {human(made.counts.total)} in all"
    return [
        f"# {what[0].upper()}{what[1:]}.",
        f"# {size}.",
        f"name: {name_of(made)}",
        "seed: 42",
        "",
    ]


def name_of(made: Plan) -> str:
    return f"x1-{compact(made.counts.matrices, 2).lower()}-{compact(made.tokens, 2).lower()}-tokens"


def _model(made: Plan) -> list[str]:
    model = made.model
    return [
        "model:",
        f"  layers: {model.layers}",
        f"  d_model: {model.d_model}",
        f"  heads: {model.heads}",
        f"  kv_heads: {model.kv_heads}",
        *([f"  head_dim: {model.head_dim}"] if model.head_dim else []),
        f"  d_ff: {model.d_ff} # SwiGLU",
        f"  context: {model.context}",
        f"  vocab_size: {model.vocab_size}",
        f"  tied_embeddings: {'true' if model.tied_embeddings else 'false'}",
        "",
    ]


def _data(made: Plan, corpora: dict[str, str]) -> list[str]:
    if len(corpora) < 2:
        return ["data:", f"  dir: {_quoted(next(iter(corpora.values()), PLACE))} # --data-dir", ""]
    assert made.ask.data is not None
    shares = {part.name: part.share for part in made.ask.data.parts}
    rows = [
        f"    {_quoted(name)}: {{dir: {_quoted(path)}, weight: {shares[name]:.6g}}}"
        for name, path in corpora.items()
    ]
    return ["data:", "  corpora:", *rows, ""]


def _quoted(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"'


def _training(made: Plan) -> list[str]:
    done = made.recipe
    micro = f"{made.micro_batch} by the memory model" if made.micro_batch else "found by trying"
    return [
        "training:",
        f"  total_steps: {done.steps} # x {done.batch_tokens:,} = {human(done.tokens, 4)} tokens",
        f"  batch_tokens: {done.batch_tokens} # {made.product}",
        f"  micro_batch: auto # {micro}",
        "",
        "optimizer:",
        f"  lr: {done.lr:.1e} # {_why(made, 'learning rate')}",
        f"  min_lr: {done.min_lr:.1f}",
        f"  warmup_steps: {done.warmup_steps} # {_why(made, 'warm-up')}",
        "  schedule: wsd # warm-up, stable, decay: a run that has to end early decays early",
        f"  decay_steps: {done.decay_steps} # {_why(made, 'decay')}",
        "  weight_decay: 0.1 # matrices only",
        "  clip: 1.0",
        "",
    ]


def _why(made: Plan, name: str) -> str:
    return next(line.formula for line in made.recipe.lines if line.name == name)


def _rest(made: Plan) -> list[str]:
    price = made.ask.machine.price.usd_per_hr
    dearest = gate.cents(price * (1 + Decimal(str(made.ask.buffer))))
    rows = [
        "checkpoint:",
        *_saving(made),
        "",
        "evaluation:",
        f"  every: {made.evaluation_every}",
        "",
        "budget:",
    ]
    rows += [
        f"  max_usd_per_hr: {dearest} # {gate.exact(price)} and the plan's buffer; a dearer hour is refused"
    ]
    if made.ask.speed.measured:
        rows += [f"  tokens_per_sec: {made.tokens_per_sec:.1f} # {made.ask.speed.said}"]
    if made.ask.mirror is not None:
        rows += ["", "mirror:", f"  uri: {_quoted(made.ask.mirror.uri)}"]
        rows += ["  data: true"] if made.ask.mirror.data else []
    loss = made.expected
    if made.ask.belief.own and loss.has_interval:
        rows += ["", "verify:", f"  loss_band: [{loss.low:.3f}, {loss.high:.3f}] # {made.ask.belief.name}"]
    return rows


def _saving(made: Plan) -> list[str]:
    every, losing = made.checkpoint_every, made.losing
    if losing is None:
        return [f"  every: {every}"]
    return [
        f"  every: {every} # a lost machine takes {derived.minutes(losing.worst_s())} with it, at worst",
        f"  keep_last: {KEEP_LAST}",
        f"  keep_local: {KEEP_LOCAL} # of those, once the mirror has them",
    ]


# ------------------------------------------------------------------------------------------------------------
# JSON


def tree(
    made: Plan, steps: int | None, flops: float | None, ratio: float | None, notes: Iterable[str]
) -> Any:
    by_hand = napkin(made)
    return {
        "model": made.model.model_dump(),
        "tokens": made.tokens,
        "decided_by": made.binding,
        "sentence": gate.sentence(made.quote),
        "quote": {key: _plain(value) for key, value in made.quote.fields().items()},
        "mfu_palm": made.mfu,
        "loss": made.expected._asdict(),
        "law": made.ask.belief.name,
        "law_counts": made.ask.belief.counts,
        "lines": [_renamed(line) for line in derived.lines(made)],
        "ways": [vars(way) for way in ways(made, steps, flops, ratio)],
        "napkin": None if by_hand is None else vars(by_hand),
        "cluster": [vars(made.shared.width(gpus)) for gpus in cluster.WIDTHS],
        "widest_data_parallel": made.shared.widest(),
        "serving": None if made.serving is None else _serving(made),
        "notes": list(notes),
    }


def _renamed(line: Derived) -> dict[str, Any]:
    fields = dict(vars(line))
    return {"what": fields.pop("name"), **fields}


def _serving(made: Plan) -> dict[str, Any]:
    assert made.serving is not None
    return {**vars(made.serving), "instead_of": made.serving.instead_of.model_dump()}


def judged_tree(judged: Judged, notes: Iterable[str]) -> Any:
    instead = judged.instead
    return {
        "config": judged.config.name,
        "plan": tree(judged.priced, None, None, None, notes),
        "findings": [vars(finding) for finding in judged.findings],
        "same_hours_at_the_optimum": None if instead is None else tree(instead, None, None, None, ()),
    }


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


def summary(made: Plan) -> str:
    """One line of what it is."""
    return (
        f"{human(made.counts.matrices)} parameters in matrices ({human(made.counts.total)} in all) x "
        f"{human(made.tokens)} tokens = {flop(made.flops)} FLOPs in {made.hours:,.1f} h"
    )
