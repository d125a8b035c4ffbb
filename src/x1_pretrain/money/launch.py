"""`x1 launch`: price a run in one sentence, refuse it or rent its machine, and guard it from here.

x1 launch --config configs/x1-50m-a100.yaml --provider runpod --gpu a100-80gb --budget-cap-usd 35
x1 launch ... --provider runpod,lambda --mirror s3://bucket/runs   # a lost machine's run goes on at the next
x1 launch ... --write DIR        # only the files: SkyPilot task, start-up script, systemd unit

Nothing is billed before the sentence is printed, kept in the ledger and agreed to.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import load_config, parse_assignment
from x1_pretrain.errors import FINISHED, REFUSED, RefusedError, UserError
from x1_pretrain.model import gpus
from x1_pretrain.money import gate, latch
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.channels import VARIABLE, addresses
from x1_pretrain.money.clock import Clock, duration_s
from x1_pretrain.money.guard import TEARDOWN_S
from x1_pretrain.money.launch_mirror import (
    as_it_stands,
    mirror_for,
    priced_as_it_stands,
    provider_names,
    with_mirror,
)
from x1_pretrain.money.launching import rent_and_guard, start_here
from x1_pretrain.money.ledger import NAME, Ledger, read_rows
from x1_pretrain.money.machine_jobs import JobOptions, write_files
from x1_pretrain.money.moving import MOST_MOVES, Mover
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.pricing import Wanted, agree_on_price, look, refusals, refused, work
from x1_pretrain.money.providers.base import Provider
from x1_pretrain.money.providers.opened import open_provider
from x1_pretrain.money.renting import one_launch
from x1_pretrain.money.teardown import said_yes

SALES_TAX = Decimal("0.10")  # where a provider adds it and the user names none


# ------------------------------------------------------------------------------------------------------------
# What must be true before anything is priced


def refuse_unsafe(
    wanted: Wanted, provider: Provider, ledger: Ledger, clock: Clock, raise_to_usd: Decimal | None
) -> None:
    """No latch, no machine left over, alerts that arrive; else the sentence with what breaks it."""
    config = wanted.config
    try:
        if raise_to_usd is not None:
            latch.refuse_raise(raise_to_usd, config.budget.cap_usd, ledger)
        if (stop := latch.in_force(config.folder, ledger.rows())) and raise_to_usd is None:
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
    notifier = Notifier(addresses(os.environ), ledger, clock, run=config.folder.name)
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


def priced_at_most(wanted: Wanted) -> gate.Quote:
    """For the files of --write: no provider was asked, so every hour counts at the dearest."""
    rate = wanted.max_usd_per_hr
    if rate is None:
        raise UserError("--max-price: is needed with --write, every hour is counted at it; for example 1.40")
    label = gpus.kind(wanted.gpu).label
    price = gate.Price(f"{wanted.gpus}x {label}", "a machine you start", rate, "--max-price")
    tokens = wanted.config.training.total_steps * wanted.config.training.batch_tokens
    reserve_h = gate.reserve_h(wanted.poll_s, TEARDOWN_S)
    priced = gate.Quote(price, work(wanted, tokens, 1.0), wanted.ceiling_usd, reserve_h)
    if terms := refusals(wanted, priced):
        raise RefusedError(f"refused: {'; '.join(terms)}. {gate.sentence(priced)}")
    return priced


def confirmed(yes: bool) -> bool:
    """A person's word, or --yes."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("--yes: is needed, nobody is at a terminal here to agree to the price")
    return said_yes("Start it? [y/N] ")


Flag = typer.Option


def main(
    config: Annotated[Path, Flag(help="the run's YAML file", show_default=False)],
    provider: Annotated[
        str, Flag(help="lambda, runpod, local or fake; several of them, as runpod,lambda, with a mirror")
    ],
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
    every_s: Annotated[float, Flag(min=1, help="seconds between polls of the guard")] = 300.0,
    linger: Annotated[
        str, Flag(help="end a machine that stopped working after so long; it is in the price")
    ] = "15m",
    mirror: Annotated[
        str | None,
        Flag(help="copies of the run: s3://bucket/runs, ... [mirror.uri]", show_default=False),
    ] = None,
    mirror_data: Annotated[bool, Flag("--mirror-data", help="the corpora too [mirror.data]")] = False,
    moves: Annotated[
        int, Flag(min=0, help="to another machine when one is lost, at most; needs a mirror")
    ] = MOST_MOVES,
    raise_ceiling_to: Annotated[
        float | None, Flag(help="a new ceiling for a run that a limit stopped; clears its STOP.json")
    ] = None,
    yes: Annotated[bool, Flag("--yes", help="agree to the price in advance")] = False,
    detach: Annotated[
        bool, Flag("--detach", help="leave after the start; run `x1 guard RUN` elsewhere")
    ] = False,
    price_only: Annotated[bool, Flag("--price-only", help="print the sentence and leave")] = False,
    write: Annotated[Path | None, Flag(help="write the launch files there and leave")] = None,
    set_: Annotated[
        list[str], Flag("--set", metavar="FIELD=VALUE", help="override any config field; repeatable")
    ] = [],  # noqa: B006
) -> int:
    """Price a run, rent its machine, and guard it until it is gone."""
    overrides = dict(parse_assignment(text) for text in set_)
    loaded = with_mirror(load_config(config, overrides), mirror, mirror_data)
    loaded.blocks_per_rank(gpu_count)
    names = provider_names(provider, loaded)
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
        poll_s=every_s,
        linger_s=duration_s(linger, "--linger"),
        tier=one_of("--tier", tier, ("secure", "community", "any")),
    )
    options = JobOptions(
        source,
        tuple(data_command),
        data_dir,
        workspace,
        ssh_key,
        tuple(pass_variable),
        tuple(set_),
        raised_usd=raised,
    )
    if write is not None:
        print(gate.sentence(priced_at_most(wanted)))
        return write_files(write, loaded, gpu, gpu_count, cap, wanted.max_usd_per_hr, options)
    at_home = names == ["local"]
    if at_home and rate_usd_per_hr is None:
        raise UserError("--rate-usd-per-hr: is needed with --provider local; for example 0.08, or 0")
    if like is not None and not (like / "metrics.jsonl").exists():
        raise UserError(f"--like {like}: no metrics.jsonl in it; name the folder of a run that has trained")
    rate = None if rate_usd_per_hr is None else Decimal(str(rate_usd_per_hr))
    ledger = Ledger(loaded.folder / NAME, clock)
    if raised is None and ledger.file.exists():
        wanted = replace(wanted, ceiling_usd=account(ledger.rows()).in_force(cap))
    providers = [open_provider(name, clock, rate_usd_per_hr=rate) for name in names]
    if price_only:
        wanted = priced_as_it_stands(wanted, names)
        print(gate.sentence(agree_on_price(wanted, providers, ledger, clock)[2]))
        return FINISHED
    kept = None if at_home else mirror_for(loaded, names)
    if kept is not None:
        wanted, options = as_it_stands(wanted, options, kept, ledger)
    with one_launch(loaded.folder.parent) as lock:
        refuse_unsafe(wanted, providers[0], ledger, clock, raised)
        agreed = agree_on_price(wanted, providers, ledger, clock)
        sentence = gate.sentence(agreed[2])
        print(sentence, flush=True)
        if not confirmed(yes):
            print("not started; nothing is billed")
            return REFUSED
        if raised is not None:
            latch.raise_ceiling(loaded.folder, raised, loaded.budget.cap_usd, ledger)
        ledger.append("gate", sentence, verdict="passed", **agreed[2].fields())
        if at_home:
            start_here(loaded, config, wanted, rate, options)
        mover = None if kept is None else Mover(wanted, providers, options, ledger, clock, kept, most=moves)
        return rent_and_guard(wanted, agreed, options, ledger, clock, lock, mover, detach)


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
