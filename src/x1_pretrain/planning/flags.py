"""The flags of `x1 plan` and what the planner takes: machine, price, speed, law, data."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from x1_pretrain.config import MirrorConfig, ModelConfig, RunConfig
from x1_pretrain.errors import UserError
from x1_pretrain.laws.fitted import read_fit
from x1_pretrain.model import gpus, shapes
from x1_pretrain.model.flops import GPT2_VOCABULARY, flops_per_token, mfu
from x1_pretrain.money import gate, pace, storage
from x1_pretrain.money.guard import TEARDOWN_S, ZERO
from x1_pretrain.money.launch import SALES_TAX
from x1_pretrain.money.meter import hourly_storage_usd
from x1_pretrain.money.prices import list_price
from x1_pretrain.money.providers.lambda_cloud import Lambda
from x1_pretrain.money.providers.runpod import RunPod
from x1_pretrain.money.standing import endpoint_of
from x1_pretrain.planning import critique, data_check
from x1_pretrain.planning.belief import REFIT, Belief
from x1_pretrain.planning.critique import Claim
from x1_pretrain.planning.data_check import Data
from x1_pretrain.planning.planner import Ask, Machine, Mirror, Plan, Speed
from x1_pretrain.records.run_folder import find_run, open_run
from x1_pretrain.stores.address import Address, parse

POLL_S, LINGER_S, DISK_GIB = 300.0, 900.0, 200  # x1 launch's defaults: the plan and the gate agree
USUAL_BATCH = 524_288  # of --steps, where no batch is given


@dataclass(frozen=True)
class Wanted:
    """The flags, read."""

    gpu: str
    gpus: int
    dollars: Decimal | None
    hours: float | None
    tokens: float | None
    n: float | None
    steps: int | None
    flops: float | None
    ratio: float | None
    inference_tokens: float
    data: Path | None
    data_tokens: float | None
    fit: Path | None
    usd_per_hr: Decimal | None
    mfu: float | None
    tokens_per_sec: float | None
    flops_per_sec: float | None
    like: str | None
    context: int | None
    batch_tokens: int | None
    vocab: int | None
    buffer: float
    disk_gib: int
    tax: Decimal | None
    mirror: str | None = None
    mirror_data: bool = False


def refuse_contradictions(wanted: Wanted, config: Path | None) -> None:
    """Flags that can't both be meant."""
    shaping = (
        "n",
        "tokens",
        "steps",
        "flops",
        "ratio",
        "context",
        "batch_tokens",
        "inference_tokens",
        "vocab",
    )
    if config is not None and (given := [name for name in shaping if getattr(wanted, name)]):
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{flag}: contradicts --config {config}, which says it; leave one of them out")
    if wanted.data is not None and wanted.data_tokens is not None:
        raise UserError(f"--data-tokens: contradicts --data {wanted.data}, which is counted; leave one out")
    speeds = [f"--{s.replace('_', '-')}" for s in ("mfu", "flops_per_sec", "like") if getattr(wanted, s)]
    if wanted.tokens_per_sec and config is None:
        speeds.append("--tokens-per-sec")
    if len(speeds) > 1:
        raise UserError(f"{speeds[1]}: contradicts {speeds[0]}; one of them says how fast it is")
    if wanted.ratio and not wanted.n:
        raise UserError("--ratio: is tokens per parameter, and needs --n; without it the law chooses both")
    if wanted.tokens and (wanted.steps or wanted.flops or wanted.ratio):
        other = "--steps" if wanted.steps else "--flops" if wanted.flops else "--ratio"
        raise UserError(f"{other}: contradicts --tokens, which fixes how long it is; leave one of them out")
    if wanted.inference_tokens and (wanted.n or wanted.tokens or wanted.steps or wanted.flops):
        raise UserError(
            "--inference-tokens: decides the size under --dollars or --hours; leave out what fixes it"
        )


def ask_for(wanted: Wanted) -> Ask:
    machine = machine_for(wanted)
    belief = belief_for(wanted)
    known = read_data(wanted, wanted.vocab or GPT2_VOCABULARY)
    vocab = (known.vocab_size if known else None) or wanted.vocab or GPT2_VOCABULARY
    if known and known.vocab_size and wanted.vocab and wanted.vocab != known.vocab_size:
        raise UserError(
            f"--vocab {wanted.vocab}: contradicts {known.origin}, which has {known.vocab_size:,} ids"
        )
    models = (
        (shapes.shape_for(wanted.n, vocab, wanted.context),)
        if wanted.n
        else tuple(shapes.ladder(vocab, wanted.context))
    )
    batch = wanted.batch_tokens or (USUAL_BATCH if wanted.steps else None)
    if batch is not None:
        models = refuse_odd_batch(batch, models, wanted)
    ask = Ask(
        machine,
        speed_for(wanted, machine, models),
        belief,
        models,
        dollars=wanted.dollars,
        hours=wanted.hours,
        tokens=wanted.tokens,
        flops=wanted.flops,
        ratio=wanted.ratio,
        steps=wanted.steps,
        data=known,
        inference_tokens=wanted.inference_tokens,
        batch_tokens=batch,
        buffer=wanted.buffer,
        asked_n=wanted.n,
        mirror=mirror_for(wanted, None),
    )
    if not any((wanted.dollars, wanted.hours, wanted.tokens, wanted.n, wanted.steps, wanted.flops)):
        raise UserError("--dollars: is needed, or --hours, --tokens or --n; for example --dollars 35")
    return ask


def refuse_odd_batch(batch: int, models: tuple[ModelConfig, ...], wanted: Wanted) -> tuple[ModelConfig, ...]:
    """A batch is whole sequences on every rank."""
    fitting = tuple(model for model in models if batch % (model.context * wanted.gpus) == 0)
    if not fitting:
        unit = models[0].context * wanted.gpus
        nearest = max(1, round(batch / unit)) * unit
        raise UserError(
            f"--batch-tokens {batch:,}: not whole sequences of {models[0].context:,} tokens on "
            f"{wanted.gpus:,} GPUs; the nearest is {nearest:,}"
        )
    return fitting


def mirror_for(wanted: Wanted, config: RunConfig | None) -> Mirror | None:
    """Where copies go, by the flag or by the config, and what the store bills."""
    section = config.mirror if config else MirrorConfig()
    uri = wanted.mirror or section.uri
    if uri is None:
        return None
    address = parse(uri)  # a typo is refused here
    bills = storage.rates(
        str(address),
        endpoint_of(section.model_copy(update={"uri": str(address)})),
        section.storage_usd_per_gib_month,
        section.egress_usd_per_gib,
    )
    kept = storage.most_kept(config.checkpoint, config.training.total_steps) if config else None
    look_s = max(section.every_s, looks_at_least_s(address))
    data = wanted.mirror_data or section.data
    return Mirror(str(address), bills, kept, data, look_s, section.max_mb_per_s)


def looks_at_least_s(address: Address) -> float:
    """Some stores count writes."""
    if address.scheme != "hf":
        return 0.0
    from x1_pretrain.stores.hub_store import HubStore

    return HubStore.every_s_at_least


def belief_for(wanted: Wanted) -> Belief:
    return REFIT if wanted.fit is None else Belief(read_fit(wanted.fit), own=True)


def read_data(wanted: Wanted, vocab: int) -> Data | None:
    if wanted.data is not None:
        return data_check.read_data(wanted.data)
    return None if wanted.data_tokens is None else data_check.stated(wanted.data_tokens, vocab)


def corpora(wanted: Wanted, made: Plan) -> dict[str, str]:
    if wanted.data is None or made.ask.data is None:
        return {}
    parts = made.ask.data.parts
    if (wanted.data / data_check.MANIFEST).is_file():
        return {parts[0].name: str(wanted.data)}
    return {part.name: str(wanted.data / part.name) for part in parts}


def machine_for(wanted: Wanted) -> Machine:
    """The GPU by the table and its price by the list, unless stated."""
    try:
        kind = gpus.kind(wanted.gpu)
    except UserError as error:
        if wanted.usd_per_hr is None or not (wanted.tokens_per_sec or wanted.flops_per_sec or wanted.like):
            raise UserError(
                f"--gpu {wanted.gpu}: {error}; a GPU that is not in the table needs --usd-per-hr and "
                "--tokens-per-sec (with --n or --config), nothing is guessed"
            ) from None
        return Machine(wanted.gpu, wanted.gpus, _price(wanted, wanted.gpu, None), _reserve())
    return Machine(
        kind.label,
        wanted.gpus,
        _price(wanted, kind.label, kind.name),
        _reserve(),
        kind.peak_flops_per_sec,
        kind.memory_gib,
        kind.link_gb_per_sec,
        wanted.disk_gib,
    )


def _reserve() -> Decimal:
    return gate.reserve_h(POLL_S, TEARDOWN_S + LINGER_S)


def _price(wanted: Wanted, label: str, kind: str | None) -> gate.Price:
    what = f"{wanted.gpus}x {label}"
    if wanted.usd_per_hr is not None:
        return gate.Price(
            what,
            "a machine of yours",
            wanted.usd_per_hr * wanted.gpus,
            "--usd-per-hr",
            tax=wanted.tax or ZERO,
        )
    listed = list_price(kind, wanted.gpus) if kind else None
    if listed is None:
        raise UserError(f"--usd-per-hr: is needed, no list price is known for {what}; for example 1.19")
    sold_by = RunPod if listed.provider.startswith("RunPod") else Lambda
    default = SALES_TAX if sold_by.taxed else ZERO
    return gate.Price(
        what,
        listed.provider,
        listed.usd_per_hr * wanted.gpus,
        f"list price of {listed.date}",
        hourly_storage_usd(sold_by.storage_usd_per_gib_month, wanted.disk_gib),
        default if wanted.tax is None else wanted.tax,
    )


# ------------------------------------------------------------------------------------------------------------
# How fast


def speed_for(wanted: Wanted, machine: Machine, models: tuple[ModelConfig, ...]) -> Speed:
    """Stated, measured in a run like it, or an assumed share of the peak."""
    if wanted.tokens_per_sec:
        if len(models) > 1:
            raise UserError(
                "--tokens-per-sec: is the speed of one model, and needs --n or --config; --flops-per-sec or "
                "--like RUN hold for any size"
            )
        speed = Speed(wanted.tokens_per_sec * flops_per_token(models[0]).palm, "stated", True)
        return refuse_impossible(speed, machine, "--tokens-per-sec")
    if wanted.flops_per_sec:
        said = f"{wanted.flops_per_sec / 1e12:,.0f} TFLOP/s a GPU, stated"
        return refuse_impossible(
            Speed(wanted.flops_per_sec * wanted.gpus, said, True), machine, "--flops-per-sec"
        )
    if wanted.like:
        return refuse_impossible(_like(wanted.like, wanted), machine, "--like")
    return assumed(machine, wanted.mfu)


def assumed(machine: Machine, share: float | None) -> Speed:
    """A share of the data sheet's peak, by PaLM's count."""
    if machine.peak_flops_per_sec is None:
        raise UserError(
            f"--tokens-per-sec: is needed (with --n or --config), no peak is known for {machine.label} and "
            "none is guessed; --like RUN takes a measured one"
        )
    if share is not None and share > 1:
        raise UserError(f"--mfu {share:g}: expected a share of the peak, for example 0.4")
    used = share or gate.ASSUMED_MFU
    word = "an MFU of" if share else "an assumed MFU of"
    said = f"{word} {used:.2f}" if share else f"an estimate at {word} {used:.2f}"
    return Speed(used * machine.peak_flops_per_sec * machine.gpus, said, False)


def refuse_impossible(speed: Speed, machine: Machine, flag: str) -> Speed:
    if machine.peak_flops_per_sec is not None:
        share = mfu(1.0, speed.flops_per_sec, machine.peak_flops_per_sec, machine.gpus)
        if share > 1:
            raise UserError(
                f"{flag}: needs {share:.0%} of the peak of {machine.price.what} (PaLM's count), which is "
                "impossible; measure it again, or leave it out for an assumed MFU"
            )
    return speed


def judged_speed(wanted: Wanted, machine: Machine, config: RunConfig) -> tuple[Speed, Claim | None]:
    """A stated speed that can't be is a finding, and then the hours come from an assumed one."""
    stated = wanted.tokens_per_sec or config.budget.tokens_per_sec
    if stated is None:
        return speed_for(wanted, machine, (config.model,)), None
    claim = Claim(stated)
    if wanted.flops_per_sec or wanted.mfu or wanted.like:
        return speed_for(replace(wanted, tokens_per_sec=None), machine, (config.model,)), claim
    palm = flops_per_token(config.model).palm
    peak = machine.peak_flops_per_sec
    if peak is not None and mfu(stated, palm, peak, machine.gpus) > critique.UNLIKELY_MFU:
        return assumed(machine, None), claim
    return Speed(stated * palm, "stated", True), claim


def _like(text: str, wanted: Wanted) -> Speed:
    """What a finished run reached, for any size of model: FLOP/s travel, tokens/s do not."""
    run = open_run(find_run(text))
    rate = pace.tokens_per_sec(run.rows())
    if rate is None:
        raise UserError(f"--like {run.folder}: too few rows of metrics to tell a speed; name a longer run")
    hardware = run.manifest.get("hardware") or {}
    device, ranks = str(hardware.get("device", "unknown")), int(hardware.get("world_size") or 1)
    _refuse_other_device(device, wanted.gpu, run.folder)
    palm = flops_per_token(run.config.model).palm
    return Speed(rate * palm * wanted.gpus / ranks, f"{rate:,.0f} tokens/s measured in {run.folder}", True)


def _refuse_other_device(device: str, gpu: str, folder: Path) -> None:
    try:
        kind = gpus.kind(gpu)
    except UserError:
        return  # not in the table: the user knows what it is
    if not re.search(kind.pattern, device.upper().replace("_", "-")):
        raise UserError(
            f"--like {folder}: was measured on {device}, not on {kind.label}; name a run on the same GPU, or "
            "leave it out for an assumed MFU"
        )
