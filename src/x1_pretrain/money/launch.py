"""`x1 launch`: price a run in one sentence, refuse it or rent its machine, and watch it from here.

x1 launch --config configs/x1-50m-a100.yaml --provider runpod --gpu a100-80gb --budget-cap-usd 35
x1 launch ... --write DIR        # only the files: SkyPilot task, start-up script, systemd unit

Nothing is billed before the sentence is printed, kept in the ledger and agreed to. The launch request is sent
once: its intent is in the ledger first, and when no clear answer comes the machine is looked for by its tag.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain import config as cfg
from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import RunConfig
from x1_pretrain.errors import FAULT, FINISHED, RefusedError, UserError
from x1_pretrain.model.flops import flops_per_token, peak_bf16_flops_per_sec
from x1_pretrain.money import gate, latch, pace
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.channels import VARIABLE, addresses
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import ZERO, dollars, minutes
from x1_pretrain.money.ledger import NAME, Ledger, read_rows
from x1_pretrain.money.machine_jobs import JobOptions, request_for, write_files
from x1_pretrain.money.meter import hourly_storage_usd
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.providers import gpus
from x1_pretrain.money.providers.base import (
    Offer,
    Provider,
    ProviderError,
    Status,
    UnknownOutcomeError,
    UnreachableError,
)
from x1_pretrain.money.providers.opened import open_provider
from x1_pretrain.money.sidecar import TEARDOWN_S
from x1_pretrain.money.teardown import Ending, end_loudly, said_yes
from x1_pretrain.money.watch import watch
from x1_pretrain.records.run_folder import read_jsonl

SALES_TAX = Decimal("0.10")  # where a provider adds it and the user names none
WAIT_ACTIVE_S = 1800.0
LOOK_EVERY_S = 15.0
ASK_PRICE_EVERY_S = 300.0
GPT2_VOCABULARY = 50_257


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    config: RunConfig
    gpu: str
    gpus: int
    ceiling_usd: Decimal
    max_usd_per_hr: Decimal | None
    tax: Decimal
    disk_gib: int
    tokens_per_sec: float | None
    like: Path | None
    wait_s: float
    poll_s: float
    tier: str


# ------------------------------------------------------------------------------------------------------------
# Pricing


def quote(wanted: Wanted, provider: Provider, offer: Offer, ledger: Ledger, clock: Clock) -> gate.Quote:
    """The sentence's numbers for one offer."""
    config, known = wanted.config, account(ledger.rows())
    where = provider.label if offer.tier in ("on demand", "own") else f"{provider.label} {offer.tier}"
    price = gate.Price(
        what=f"{offer.gpu_count}x {offer.gpu}",
        where=where,
        usd_per_hr=offer.usd_per_hr,
        known=f"live price, {clock.now():%H:%MZ}" if provider.name != "local" else "as you state it",
        storage_usd_per_hr=hourly_storage_usd(provider.storage_usd_per_gib_month, wanted.disk_gib),
        tax=wanted.tax if provider.taxed else ZERO,
    )
    done = max((r.get("tokens", 0) for r in read_jsonl(config.folder / "metrics.jsonl").rows), default=0)
    tokens = max(0, config.training.total_steps * config.training.batch_tokens - done)
    setup = ZERO if provider.name in ("local", "fake") else gate.SETUP_H
    return gate.Quote(
        price,
        work(wanted, tokens),
        wanted.ceiling_usd,
        gate.reserve_h(wanted.poll_s, TEARDOWN_S, setup),
        spent_usd=max(known.known_usd, known.spent_by(clock.now())),
    )


def work(wanted: Wanted, tokens: int) -> gate.Work:
    """How fast: stated, measured in a run like it, or assumed from the GPU's peak and named as such."""
    stated = wanted.tokens_per_sec or wanted.config.budget.tokens_per_sec
    if stated:
        return gate.Work(tokens, stated, f"{stated:,.0f} tokens/s, stated")
    for folder in (wanted.like, wanted.config.folder):
        if folder is None:
            continue
        if rate := pace.tokens_per_sec(read_jsonl(folder / "metrics.jsonl").rows):
            return gate.Work(tokens, rate, f"{rate:,.0f} tokens/s, measured in {folder}")
    model = wanted.config.model
    guessed = model.vocab_size is None
    model = model.model_copy(update={"vocab_size": model.vocab_size or GPT2_VOCABULARY})
    peak = peak_bf16_flops_per_sec(gpus.kind(wanted.gpu).device)
    rate = gate.assumed_rate(peak, flops_per_token(model).palm, wanted.gpus)
    if rate is None:
        return gate.Work(tokens, None, "not known")
    more = f", {GPT2_VOCABULARY:,} ids" if guessed else ""
    basis = f"an estimate: {rate:,.0f} tokens/s at an assumed MFU of {gate.ASSUMED_MFU:.2f}{more}"
    return gate.Work(tokens, rate, basis)


def best_offer(wanted: Wanted, provider: Provider) -> Offer | None:
    """The cheapest machine that is free now."""
    offers = provider.offers(wanted.gpu, wanted.gpus)
    if wanted.tier != "any":
        offers = [o for o in offers if o.tier not in ("secure", "community") or o.tier == wanted.tier]
    if not offers:
        raise RefusedError(
            f"{provider.label} has no price for {wanted.gpus}x {wanted.gpu}: without one nothing starts; try "
            "another --gpu, --gpus or --tier"
        )
    free = [offer for offer in offers if offer.available and offer.usd_per_hr > 0]
    if not free and provider.name != "local":
        return None
    return min(free or offers, key=lambda offer: offer.usd_per_hr)


def refusals(wanted: Wanted, priced: gate.Quote) -> list[str]:
    """The terms that break this launch."""
    found = gate.broken(priced, wanted.max_usd_per_hr)
    if priced.work.hours is None:
        found.append(
            "the hours: nothing says how fast this GPU is; give --tokens-per-sec, or --like an earlier RUN"
        )
    return found


def agree_on_price(
    wanted: Wanted, provider: Provider, ledger: Ledger, clock: Clock
) -> tuple[Offer, gate.Quote]:
    """An offer that breaks no term; with --wait, the first one within that time."""
    begun = clock.steady_s()
    while True:
        offer, priced, terms = look(wanted, provider, ledger, clock)
        if offer is not None and priced is not None and not terms:
            return offer, priced
        left_s = wanted.wait_s - (clock.steady_s() - begun)
        if left_s <= 0:
            raise refused("; ".join(terms), priced, ledger)
        print(f"waiting (up to {minutes(left_s)} more): {terms[0]}", flush=True)
        clock.sleep(min(ASK_PRICE_EVERY_S, left_s))


def look(
    wanted: Wanted, provider: Provider, ledger: Ledger, clock: Clock
) -> tuple[Offer | None, gate.Quote | None, list[str]]:
    """The cheapest machine that is free now, its price for this run, and the terms that break it."""
    try:
        offer = best_offer(wanted, provider)
    except UnreachableError as error:
        if not wanted.wait_s:
            raise
        return None, None, [str(error)]
    if offer is None:
        return None, None, [f"nothing of this kind is free at {provider.label} now (--wait 4h looks again)"]
    priced = quote(wanted, provider, offer, ledger, clock)
    return offer, priced, refusals(wanted, priced)


def refused(terms: str, priced: gate.Quote | None, ledger: Ledger) -> RefusedError:
    """The terms with the sentence; a run that has a ledger keeps them."""
    said = f"{terms}. {gate.sentence(priced)}" if priced else terms
    if ledger.file.exists():
        ledger.append("gate", said, verdict="refused", **(priced.fields() if priced else {}))
    return RefusedError(f"refused: {said}")


# ------------------------------------------------------------------------------------------------------------
# What must be true before anything is priced


def refuse_unsafe(
    wanted: Wanted, provider: Provider, ledger: Ledger, clock: Clock, raise_to_usd: Decimal | None
) -> None:
    """No latch, no machine left over, alerts that arrive; else the sentence with what breaks it."""
    config = wanted.config
    try:
        if (stop := latch.read(config.folder)) and raise_to_usd is None:
            raise latch.refusal(config.folder, stop)
        refuse_left_over(config.folder.parent)
        refuse_silence(config, provider, ledger, clock)
    except RefusedError as error:
        try:
            priced = look(wanted, provider, ledger, clock)[1]
        except UserError:
            priced = None  # what is to be said is the refusal
        raise refused(str(error), priced, ledger) from None


def refuse_left_over(runs: Path) -> None:
    """A machine of an earlier launch that may still bill."""
    if left := open_machines(runs):
        listed = ", ".join(f"{m.machine_id or m.tag} at {m.provider} ({folder})" for folder, m in left)
        raise RefusedError(
            f"machines of earlier launches are open in the ledger: {listed}; `x1 reconcile` shows whether "
            "they run, `x1 teardown RUN` ends them"
        )


def refuse_silence(config: RunConfig, provider: Provider, ledger: Ledger, clock: Clock) -> None:
    """Alerts that do not get through. Rehearsals and runs at home may do without any."""
    notifier = Notifier(addresses(os.environ), ledger, clock, run=config.name)
    try:
        if not notifier.channels and provider.name in ("local", "fake"):
            return
        failed = [one for one in notifier.test() if not one.delivered]
    finally:
        notifier.close(0.0)
    if failed:
        said = ", ".join(f"{one.channel}: {one.result}" for one in failed)
        raise RefusedError(
            f"{VARIABLE}: the test alert did not get through ({said}); a run that can't reach you is not "
            "launched: docs/alerts.md sets it up in two minutes"
        )


def open_machines(runs: Path) -> list[tuple[Path, Rented]]:
    """Every machine of any run here that may still bill."""
    found = []
    for file in sorted(runs.glob(f"*/{NAME}")):
        found += [(file.parent, m) for m in account(read_rows(file)).open_machines()]
    return found


def confirmed(yes: bool) -> bool:
    """A person's word, or --yes."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("--yes: is needed, nobody is at a terminal here to agree to the price")
    return said_yes("Start it? [y/N] ")


def raise_ceiling(config: RunConfig, ceiling: Decimal, ledger: Ledger) -> None:
    """A person's own word: it clears the latch, and the ledger keeps it."""
    known, stop = account(ledger.rows()), latch.read(config.folder)
    before = known.ceiling_usd or Decimal(str(config.budget.cap_usd or 0))
    if ceiling < before:
        raise RefusedError(
            f"--raise-ceiling-to {ceiling}: the ceiling is {dollars(before)}; name that or a higher one"
        )
    said = f"a person set the ceiling to {dollars(ceiling)}" + (f" after: {stop.reason}" if stop else "")
    ledger.append("raised", said, ceiling_usd=ceiling, before_usd=before)
    latch.clear(config.folder)


# ------------------------------------------------------------------------------------------------------------
# Launching


def new_tag(name: str) -> str:
    """Names one attempt: at the provider, in the ledger and in every log."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return f"x1-{short}-{secrets.token_hex(4)}"


def rent(
    wanted: Wanted, provider: Provider, offer: Offer, priced: gate.Quote, ledger: Ledger, clock: Clock,
    options: JobOptions,
) -> Rented:  # fmt: skip
    """Intent, one request, and whatever became of it."""
    tag = new_tag(wanted.config.name)
    all_in = priced.price.all_in_usd_per_hr
    request = request_for(
        wanted.config, offer, tag, all_in, wanted.ceiling_usd, wanted.disk_gib, options, priced.price.tax
    )
    row = {"tag": tag, "provider": provider.name, "usd_per_hr": round(all_in, 6), "sku": offer.sku}
    parts = {"storage_usd_per_hr": round(priced.price.storage_usd_per_hr, 6), "tax": priced.price.tax}
    ledger.append("intent", f"launch {priced.price.what} on {priced.price.where}", **row, **parts)
    machine = account(ledger.rows()).machines[-1]
    try:
        machine.machine_id = provider.launch(request)
    except UnknownOutcomeError as error:
        print(f"{error}\nlooking for it by its tag {tag} ...", flush=True)
        ending = Ending(provider, machine, ledger, clock, print)
        if not ending.resolve():
            raise RefusedError(f"{provider.label} made no machine; nothing is billed. Run it again") from None
        if machine.machine_id is None:
            raise UnknownOutcomeError(
                f"{provider.label} does not say whether {tag} was launched. It stays open in {ledger.file} "
                f"and may bill: look at the provider's own page, then run `x1 teardown {ledger.file.parent}`"
            ) from None
        return machine
    except UserError as error:
        ledger.append("launch_failed", str(error), tag=tag)
        raise
    ledger.append("launched", tag=tag, machine_id=machine.machine_id)
    return machine


def wait_active(provider: Provider, machine: Rented, ledger: Ledger, clock: Clock) -> bool:
    """Until it runs; False when it won't, or was not seen to in half an hour."""
    assert machine.machine_id is not None
    begun, said = clock.steady_s(), ""
    while clock.steady_s() - begun < WAIT_ACTIVE_S:
        try:
            found = provider.machine(machine.machine_id)
            word = found.said if found else "not listed yet"
        except ProviderError as error:
            found, word = None, str(error)
        if word != said:
            print(f"{machine.machine_id}: {word}", flush=True)
            said = word
        if found and found.status is Status.RUNNING:
            ledger.append("active", tag=machine.tag, machine_id=machine.machine_id)
            return True
        if found and found.status in (Status.LOST, Status.TERMINATING, Status.GONE):
            return False
        clock.sleep(LOOK_EVERY_S)
    return False


Flag = typer.Option


def main(
    config: Annotated[Path, Flag(help="the run's YAML file", show_default=False)],
    provider: Annotated[str, Flag(help="lambda, runpod, local or fake")],
    gpu: Annotated[str, Flag(help="a100-80gb, h100, rtx4090, ...")] = "a100-80gb",
    gpu_count: Annotated[int, Flag("--gpus", min=1, help="GPUs of one machine")] = 1,
    tier: Annotated[str, Flag(help="RunPod: secure, community or any")] = "secure",
    budget_cap_usd: Annotated[float | None, Flag(help="the ceiling [budget.cap_usd]")] = None,
    max_price: Annotated[
        float | None, Flag(help="refuse a dearer hour [budget.max_usd_per_hr]", show_default=False)
    ] = None,
    wait: Annotated[str, Flag(help="look again for so long when it is too dear or not free: 4h, 30m")] = "0",
    tokens_per_sec: Annotated[float | None, Flag(help="measured speed that prices the hours")] = None,
    like: Annotated[Path | None, Flag(help="an earlier run whose measured speed prices the hours")] = None,
    rate_usd_per_hr: Annotated[float | None, Flag(help="what an hour of this machine costs (local)")] = None,
    disk_gib: Annotated[int, Flag(min=10, help="disk of the machine")] = 200,
    tax: Annotated[float | None, Flag(min=0, max=1, help="sales tax on Lambda's prices")] = None,
    source: Annotated[
        str | None, Flag(help="what pip installs there [default: this checkout's commit]", show_default=False)
    ] = None,
    data_command: Annotated[
        list[str], Flag(help="bash that makes the corpus there; repeatable [FineWeb-Edu 10 B]")
    ] = [],  # noqa: B006
    data_dir: Annotated[str | None, Flag(help="the corpus folder there")] = None,
    workspace: Annotated[str, Flag(help="the folder there that outlives a restart")] = "/workspace",
    ssh_key: Annotated[str | None, Flag(help="name of your SSH key at the provider")] = None,
    pass_variable: Annotated[
        list[str], Flag(help="hand this variable over (names only); X1_ALERTS and HF_TOKEN always are")
    ] = [],  # noqa: B006
    poll_s: Annotated[float, Flag(min=1, help="seconds between polls of the watch")] = 300.0,
    linger: Annotated[str, Flag(help="end a machine that stopped working after so long")] = "1h",
    raise_ceiling_to: Annotated[
        float | None, Flag(help="a new ceiling for a run that a limit stopped; clears its STOP.json")
    ] = None,
    yes: Annotated[bool, Flag("--yes", help="agree to the price in advance")] = False,
    detach: Annotated[
        bool, Flag("--detach", help="leave after the start; run `x1 watch RUN` elsewhere")
    ] = False,
    price_only: Annotated[bool, Flag("--price-only", help="print the sentence and leave")] = False,
    write: Annotated[Path | None, Flag(help="write the launch files there and leave")] = None,
    set_: Annotated[
        list[str], Flag("--set", metavar="FIELD=VALUE", help="override any config field; repeatable")
    ] = [],  # noqa: B006
) -> int:
    """Price a run, rent its machine, and watch it until it is gone."""
    overrides = dict(cfg.parse_assignment(text) for text in set_)
    loaded = cfg.load_config(config, overrides)
    clock = Clock.from_environment()
    raised = positive("--raise-ceiling-to", raise_ceiling_to)
    cap = raised or positive("--budget-cap-usd", budget_cap_usd) or positive("cap_usd", loaded.budget.cap_usd)
    if cap is None:
        raise UserError("--budget-cap-usd: is needed, no run starts without a ceiling; for example 35")
    wanted = Wanted(
        config=loaded,
        gpu=gpu,
        gpus=gpu_count,
        ceiling_usd=cap,
        max_usd_per_hr=positive(
            "--max-price", max_price if max_price is not None else loaded.budget.max_usd_per_hr
        ),
        tax=SALES_TAX if tax is None else Decimal(str(tax)),
        disk_gib=disk_gib,
        tokens_per_sec=float(positive("--tokens-per-sec", tokens_per_sec) or 0) or None,
        like=like,
        wait_s=duration_s(wait, "--wait"),
        poll_s=poll_s,
        tier=one_of("--tier", tier, ("secure", "community", "any")),
    )
    options = JobOptions(
        source, tuple(data_command), data_dir, workspace, ssh_key, tuple(pass_variable), tuple(set_)
    )
    if write is not None:
        return write_files(write, loaded, gpu, gpu_count, cap, wanted.max_usd_per_hr, options)
    if provider == "local" and rate_usd_per_hr is None:
        raise UserError("--rate-usd-per-hr: is needed with --provider local; for example 0.08, or 0")
    if like is not None and not (like / "metrics.jsonl").exists():
        raise UserError(f"--like {like}: no metrics.jsonl in it; name the folder of a run that has trained")
    rate = None if rate_usd_per_hr is None else Decimal(str(rate_usd_per_hr))
    linger_s = duration_s(linger, "--linger")
    ledger = Ledger(loaded.folder / NAME, clock)
    rented_from = open_provider(provider, clock, rate_usd_per_hr=rate)
    if not price_only:
        refuse_unsafe(wanted, rented_from, ledger, clock, raised)
    offer, priced = agree_on_price(wanted, rented_from, ledger, clock)
    sentence = gate.sentence(priced)
    print(sentence, flush=True)
    if price_only:
        return FINISHED
    if not confirmed(yes):
        print("not started; nothing is billed")
        return FINISHED
    if raised is not None:
        raise_ceiling(loaded, raised, ledger)
    ledger.append("gate", sentence, verdict="passed", **priced.fields())
    if provider == "local":
        return start_here(loaded, config, wanted, rate, options)
    machine = rent(wanted, rented_from, offer, priced, ledger, clock, options)
    if (code := bring_up(loaded.folder, rented_from, machine, ledger, clock)) != FINISHED:
        return code
    if detach:
        print(f"running. Nobody ends it at the ceiling until you start: x1 watch {loaded.folder}")
        return FINISHED
    return watch(loaded.folder, clock, wanted.ceiling_usd, wanted.poll_s, linger_s)


def bring_up(folder: Path, provider: Provider, machine: Rented, ledger: Ledger, clock: Clock) -> int:
    """Until it works; a machine that does not, or that nobody waits for, is ended here."""
    try:
        if wait_active(provider, machine, ledger, clock):
            return FINISHED
        said = "it does not run: ending it"
    except KeyboardInterrupt:
        said = "interrupted before it ran: ending it"
    print(said, flush=True)
    end_loudly(folder, clock)
    return FAULT


def start_here(
    config: RunConfig, file: Path, wanted: Wanted, rate: Decimal | None, options: JobOptions
) -> int:
    """This machine is the provider: the supervisor takes over this process."""
    command = [sys.executable, "-m", "x1_pretrain.money.supervise", "--provider", "local"]
    command += ["--rate-usd-per-hr", str(rate), "--", "--config", str(file)]
    command += ["--budget-cap-usd", str(wanted.ceiling_usd), "--run-dir", str(config.folder)]
    command += ["--data-dir", options.data_dir] if options.data_dir else []
    for assignment in options.assignments:
        command += ["--set", assignment]
    print(f"x1 supervise: starting here, {dollars(wanted.ceiling_usd)} at most", flush=True)
    os.execv(command[0], command)


def duration_s(text: str, flag: str) -> float:
    """`4h`, `30m`, `90s`, or seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hms]?)", text.strip())
    if not found:
        raise UserError(f"{flag} {text}: expected a time such as 4h, 30m or 90s")
    return float(found[1]) * {"h": 3600, "m": 60, "s": 1, "": 1}[found[2]]


def positive(flag: str, value: float | None) -> Decimal | None:
    """An option's amount, if it was given."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError(f"{flag} {value}: expected a number above 0")
    return None if value is None else Decimal(str(value))


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"{flag} {value}: expected {', '.join(allowed[:-1])} or {allowed[-1]}")
    return value


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="x1 launch"))
