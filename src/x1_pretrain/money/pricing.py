"""What a launch would cost: the cheapest machine that is free, its price for this run, and what breaks it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import RefusedError
from x1_pretrain.model import gpus
from x1_pretrain.model.flops import GPT2_VOCABULARY, flops_per_token
from x1_pretrain.model.gpus import peak_bf16_flops_per_sec
from x1_pretrain.money import gate, pace
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import TEARDOWN_S, ZERO, dollars, minutes
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.meter import hourly_storage_usd
from x1_pretrain.money.providers.base import Offer, Provider, ProviderError, UnreachableError
from x1_pretrain.records.run_folder import read_jsonl

ASK_PRICE_EVERY_S = 300.0


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
    linger_s: float
    tier: str


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
    done = pace.tokens_done(read_jsonl(config.folder / "metrics.jsonl").rows)
    tokens = max(0, config.training.total_steps * config.training.batch_tokens - done)
    setup = ZERO if provider.name in ("local", "fake") else gate.SETUP_H
    return gate.Quote(
        price,
        work(wanted, tokens, clock.speed),
        wanted.ceiling_usd,
        gate.reserve_h(
            wanted.poll_s, TEARDOWN_S + (wanted.linger_s if provider.name != "local" else 0), setup
        ),
        spent_usd=max(known.known_usd, known.spent_by(clock.now())),
    )


def work(wanted: Wanted, tokens: int, speed: float) -> gate.Work:
    """How fast: stated, measured in a run like it, or assumed from the GPU's peak and named as such. `speed`:
    of the clock; where an hour passes in a minute, a second has few tokens."""
    stated = wanted.tokens_per_sec or wanted.config.budget.tokens_per_sec
    if stated:
        return gate.Work(tokens, stated, f"{stated:,.0f} tokens/s, stated")
    for folder in (wanted.like, wanted.config.folder):
        if folder is None:
            continue
        if rate := pace.tokens_per_sec(read_jsonl(folder / "metrics.jsonl").rows):
            rate /= speed
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
    return offer, priced, refusals(wanted, priced) + poor(provider, priced)


def poor(provider: Provider, priced: gate.Quote) -> list[str]:
    """A prepaid account that runs dry takes its machines, and some providers their disks, with it."""
    try:
        balance = provider.balance_usd()
    except ProviderError:
        return []  # not told: the ceiling holds without it
    needed = priced.total_usd - priced.spent_usd
    if balance is None or balance >= needed:
        return []
    holds, needs = dollars(balance), dollars(needed)
    said = f"the balance: {provider.label} holds {holds}, this needs {needs}, and at $0 its machines end"
    return [f"{said}, with what is on them; load more, or plan less"]


def refused(terms: str, priced: gate.Quote | None, ledger: Ledger) -> RefusedError:
    """The terms with the sentence; a run that has a ledger keeps them."""
    said = f"{terms}. {gate.sentence(priced)}" if priced else terms
    if ledger.file.exists():
        ledger.append("gate", said, verdict="refused", **(priced.fields() if priced else {}))
    return RefusedError(f"refused: {said}")
