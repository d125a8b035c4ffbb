"""`x1 plan`: from dollars to a run, each number with its formula and source; or what is wrong with a plan.

x1 plan --dollars 35 --gpu a100-80gb --output plan.yaml
x1 plan --config configs/x1-50m-a100.yaml --gpu a100-80gb --data-tokens 10B --tokens-per-sec 500k

Nothing is rented and nothing is asked of a provider: prices are the list's, and say of which day.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import load_config
from x1_pretrain.errors import UserError
from x1_pretrain.model import shapes
from x1_pretrain.model.flops import GPT2_VOCABULARY
from x1_pretrain.money import gate
from x1_pretrain.numbers import for_json, parse_amount
from x1_pretrain.planning import config_file, critique, data_check, remarks, screen
from x1_pretrain.planning.cluster import NODE_GPUS
from x1_pretrain.planning.flags import (
    DISK_GIB,
    USUAL_BATCH,
    Wanted,
    ask_for,
    belief_for,
    corpora,
    judged_speed,
    machine_for,
    mirror_for,
    read_data,
    refuse_contradictions,
)
from x1_pretrain.planning.planner import BUFFER, Ask, Plan, plan

DEFAULT = Path("plan.yaml")
MOST = {"--n": 1e13, "--flops": 1e30, "--flops-per-sec": 1e24, "--dollars": 1e10, "--usd-per-hr": 1e7}
Flag = typer.Option


def main(
    config: Annotated[
        Path | None, Flag(help="price a plan that exists, and say what is wrong with it", show_default=False)
    ] = None,
    dollars: Annotated[str | None, Flag(help="what all of it may cost")] = None,
    gpu: Annotated[str, Flag(help="a100-80gb, h100, rtx4090, ...")] = "a100-80gb",
    gpu_count: Annotated[int, Flag("--gpus", min=1, help="GPUs, all training together")] = 1,
    hours: Annotated[float | None, Flag(help="of training, at most")] = None,
    tokens: Annotated[str | None, Flag(help="train on so many: 10B")] = None,
    n: Annotated[str | None, Flag(help="parameters in the layers' matrices: 50M")] = None,
    steps: Annotated[str | None, Flag(help=f"of --batch-tokens [{USUAL_BATCH:,}]")] = None,
    flops: Annotated[str | None, Flag(help="training FLOPs, the true ones: 4e19")] = None,
    ratio: Annotated[
        str | None, Flag(help="tokens per parameter in matrices, with --n [20 in the table]")
    ] = None,
    inference_tokens: Annotated[
        str | None, Flag(help="tokens the model will serve: a smaller one pays")
    ] = None,
    data: Annotated[Path | None, Flag(help="corpus folder, or a folder of them")] = None,
    data_tokens: Annotated[str | None, Flag(help="how many tokens there are to train on: 10B")] = None,
    fit: Annotated[Path | None, Flag(help="a law of your own: fit.json")] = None,
    usd_per_hr: Annotated[str | None, Flag(help="of one GPU [the list price]")] = None,
    mfu: Annotated[float | None, Flag(help=f"share of the peak, PaLM's count [{gate.ASSUMED_MFU}]")] = None,
    tokens_per_sec: Annotated[str | None, Flag(help="measured, of all GPUs; needs --n or --config")] = None,
    flops_per_sec: Annotated[str | None, Flag(help="reached by one GPU, PaLM's count: 150e12")] = None,
    like: Annotated[str | None, Flag(help="an earlier run on this GPU whose speed is taken")] = None,
    context: Annotated[int | None, Flag(min=16, help="tokens a sequence [by size]")] = None,
    batch_tokens: Annotated[str | None, Flag(help="tokens a step [by rule]")] = None,
    vocab: Annotated[int | None, Flag(min=2, help=f"ids [of --data, else {GPT2_VOCABULARY:,}]")] = None,
    buffer: Annotated[float, Flag(min=0, max=0.9, help="share of the dollars that is kept back")] = BUFFER,
    disk_gib: Annotated[int, Flag(min=10, help="disk of the machine")] = DISK_GIB,
    tax: Annotated[float | None, Flag(min=0, max=1, help="sales tax [0.10 at Lambda]")] = None,
    mirror: Annotated[
        str | None, Flag(help="copies of the run go there, which costs: s3://bucket/runs [mirror.uri]")
    ] = None,
    mirror_data: Annotated[bool, Flag("--mirror-data", help="the corpora too [mirror.data]")] = False,
    output: Annotated[
        Path | None, Flag(help="the config for x1 train [plan.yaml; none with --json]", show_default=False)
    ] = None,
    explain: Annotated[bool, Flag("--explain", help="each formula with its numbers put in")] = False,
    as_json: Annotated[bool, Flag("--json", help="for machines")] = False,
) -> None:
    """One dial, dollars: a whole run, each number with its formula and source."""
    wanted = Wanted(
        gpu=gpu,
        gpus=gpu_count,
        dollars=_money("--dollars", dollars),
        hours=_above("--hours", hours),
        tokens=_amount("--tokens", tokens),
        n=_amount("--n", n),
        steps=_whole("--steps", steps),
        flops=_amount("--flops", flops),
        ratio=_amount("--ratio", ratio),
        inference_tokens=_amount("--inference-tokens", inference_tokens) or 0.0,
        data=data,
        data_tokens=_amount("--data-tokens", data_tokens),
        fit=fit,
        usd_per_hr=_money("--usd-per-hr", usd_per_hr),
        mfu=_above("--mfu", mfu),
        tokens_per_sec=_amount("--tokens-per-sec", tokens_per_sec),
        flops_per_sec=_amount("--flops-per-sec", flops_per_sec),
        like=like,
        context=context,
        batch_tokens=_whole("--batch-tokens", batch_tokens),
        vocab=vocab,
        buffer=buffer,
        disk_gib=disk_gib,
        tax=None if tax is None else Decimal(str(tax)),
        mirror=mirror,
        mirror_data=mirror_data,
    )
    refuse_contradictions(wanted, config)
    if config is not None:
        if output is not None:
            raise UserError("--output: is for a new plan; --config only judges the one that is there")
        _judge(load_config(config), wanted, explain, as_json)
    else:
        _plan(wanted, output, explain, as_json)


def _plan(wanted: Wanted, output: Path | None, explain: bool, as_json: bool) -> None:
    made = plan(ask_for(wanted))
    notes = remarks.notes(made)
    dialled = (wanted.dollars is not None or wanted.hours is not None) and not as_json
    if output is None and dialled and (not DEFAULT.exists() or config_file.untouched(DEFAULT)):
        output = DEFAULT
    if output is not None:
        written = config_file.write(made, output, corpora(wanted, made))
        ranks = f" --ranks {wanted.gpus}" if 1 < wanted.gpus <= NODE_GPUS else ""
        notes.append(f"{output}: written; `x1 train --config {output}{ranks}` runs it as {written.name}")
        notes.append(f"to rent its machine: {launch_line(made, output, wanted)}")
    if as_json:
        print(_json(config_file.tree(made, wanted.steps, wanted.flops, wanted.ratio, notes)))
        return
    if output is None and dialled:
        notes.append(f"not written: {DEFAULT} is there and is not as x1 plan wrote it; --output NAME")
    if not explain:
        notes.append("--explain puts numbers into the formulas")
    screen.show(made, wanted.steps, wanted.flops, wanted.ratio, notes, explain)


def launch_line(made: Plan, output: Path, wanted: Wanted) -> str:
    """What rents the machine of this plan, under its ceiling."""
    provider, _, tier = made.ask.machine.price.where.lower().partition(" ")
    known = provider in ("runpod", "lambda")
    where = f"--provider {provider}" if known else "--provider runpod"
    more = f" --tier {tier}" if known and tier in ("secure", "community") else ""
    more += f" --gpus {wanted.gpus}" if wanted.gpus > 1 else ""
    ceiling = f"--budget-cap-usd {made.quote.ceiling_usd:.2f}"
    return f"x1 launch --config {output} {where}{more} --gpu {wanted.gpu} {ceiling}"


def _judge(config: RunConfig, wanted: Wanted, explain: bool, as_json: bool) -> None:
    data = read_data(wanted, GPT2_VOCABULARY) or data_check.of_config(config)
    vocab = config.model.vocab_size or (data.vocab_size if data else None) or wanted.vocab or GPT2_VOCABULARY
    model = config.model.model_copy(update={"vocab_size": vocab})
    config = config.model_copy(update={"model": model})
    machine = machine_for(wanted)
    speed, claim = judged_speed(wanted, machine, config)
    ask = Ask(
        machine,
        speed,
        belief_for(wanted),
        tuple(shapes.ladder(vocab)),
        dollars=wanted.dollars,
        hours=wanted.hours,
        data=data,
        buffer=wanted.buffer,
        every=(config.checkpoint.every, config.evaluation.every),
        mirror=mirror_for(wanted, config),
    )
    judged = critique.judge(config, ask, claim)
    notes = remarks.notes_on_judged(judged.priced)
    if as_json:
        print(_json(config_file.judged_tree(judged, notes)))
    else:
        screen.show_judged(judged, notes, explain)


# ------------------------------------------------------------------------------------------------------------
# Amounts


def _amount(flag: str, text: str | None) -> float | None:
    if text is None:
        return None
    value, most = parse_amount(text, flag), MOST.get(flag, 1e18)
    if value > most:
        raise UserError(f"{flag} {text}: more than {most:g}, beyond anything that can be planned")
    return value


def _whole(flag: str, text: str | None) -> int | None:
    value = _amount(flag, text)
    if value is not None and value != int(value):
        raise UserError(f"{flag} {text}: expected a whole number such as 20k or 524_288")
    return None if value is None else int(value)


def _money(flag: str, text: str | None) -> Decimal | None:
    if text is None:
        return None
    return Decimal(repr(_amount(flag, text.strip().removeprefix("$"))))


def _above(flag: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"{flag} {value}: expected a number above 0")
    return value


def _json(tree: Any) -> str:
    return json.dumps(for_json(tree), indent=1, ensure_ascii=False, allow_nan=False)


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 plan"))
