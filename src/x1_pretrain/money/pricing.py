"""What a launch would cost: the cheapest machine that is free, its price for this run, and what breaks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror import corpora
from x1_pretrain.model import gpus
from x1_pretrain.model.flops import GPT2_VOCABULARY, flops_per_token, parameter_counts
from x1_pretrain.model.gpus import peak_bf16_flops_per_sec
from x1_pretrain.money import gate, pace, storage
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.guard import TEARDOWN_S, ZERO, dollars, minutes
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.meter import hourly_storage_usd
from x1_pretrain.money.providers.base import Offer, Provider, ProviderError, UnreachableError
from x1_pretrain.money.standing import Standing, endpoint_of
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
    standing: Standing | None = None  # of a run that trains elsewhere, by its mirror


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
    tokens = max(0, config.training.total_steps * config.training.batch_tokens - tokens_done(wanted))
    setup = ZERO if provider.name in ("local", "fake") else gate.SETUP_H
    spent = [known.known_usd, known.spent_by(clock.now())]
    if wanted.standing is not None and wanted.standing.spent_usd is not None:
        spent.append(wanted.standing.spent_usd)
    made = gate.Quote(
        price,
        work(wanted, tokens, clock.speed),
        wanted.ceiling_usd,
        gate.reserve_h(
            wanted.poll_s, TEARDOWN_S + (wanted.linger_s if provider.name != "local" else 0), setup
        ),
        spent_usd=max(spent),
    )
    planned = mirror_planned(config)
    return replace(made, mirror_usd=gate.cents(planned.usd(float(made.hours)))) if planned else made


def tokens_done(wanted: Wanted) -> int:
    """What a new machine need not do: up to the newest checkpoint in the mirror, else as the folder says."""
    if wanted.standing is not None:
        return wanted.standing.good_step * wanted.config.training.batch_tokens
    return pace.tokens_done(read_jsonl(wanted.config.folder / "metrics.jsonl").rows)


def mirror_planned(config: RunConfig) -> storage.Planned | None:
    """What the run's mirror is counted at; None for a run without one."""
    mirror, model = config.mirror, config.model
    if mirror.uri is None:
        return None
    counts = parameter_counts(model.model_copy(update={"vocab_size": model.vocab_size or GPT2_VOCABULARY}))
    rates = storage.rates(
        mirror.uri, endpoint_of(mirror), mirror.storage_usd_per_gib_month, mirror.egress_usd_per_gib
    )
    steps, each = config.training.total_steps, storage.CHECKPOINT_BYTES * counts.total / storage.GIB
    held = storage.most_held(mirror.uri, config.checkpoint, steps)
    corpus_gib = corpus_bytes(config) / storage.GIB if mirror.data else 0.0
    return storage.Planned(rates, mirror.uri, held, each, storage.rows_gib(steps), corpus_gib)


def corpus_bytes(config: RunConfig) -> float:
    """Of the corpora that are here; else of every token that is trained on, once."""
    data = config.data.mixture() if config.data.corpora or config.data.dir else {}
    here = [corpora.bytes_of(Path(one.dir)) for one in data.values()]
    if here and all(here):
        return sum(here)
    tokens = config.training.total_steps * config.training.batch_tokens
    return tokens * storage.bytes_per_token(config.model.vocab_size or GPT2_VOCABULARY)


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
    if wanted.standing is not None and (rate := wanted.standing.tokens_per_sec):
        rate /= speed
        return gate.Work(tokens, rate, f"{rate:,.0f} tokens/s, measured where it was")
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
    wanted: Wanted, providers: Sequence[Provider], ledger: Ledger, clock: Clock
) -> tuple[Provider, Offer, gate.Quote]:
    """The first of the providers with an offer that breaks no term; with --wait, within that time."""
    begun = clock.steady_s()
    while True:
        broken, priced = list[str](), None
        for provider in providers:
            offer, found, terms = _looked(wanted, provider, ledger, clock, alone=len(providers) == 1)
            priced = found or priced
            if offer is not None and found is not None and not terms:
                return provider, offer, found
            broken += [f"{provider.label}: {term}" if len(providers) > 1 else term for term in terms]
        left_s = wanted.wait_s - (clock.steady_s() - begun)
        if left_s <= 0:
            raise refused("; ".join(dict.fromkeys(broken)), priced, ledger)
        print(f"waiting (up to {minutes(left_s)} more): {broken[0]}", flush=True)
        clock.sleep(min(ASK_PRICE_EVERY_S, left_s))


def _looked(
    wanted: Wanted, provider: Provider, ledger: Ledger, clock: Clock, *, alone: bool
) -> tuple[Offer | None, gate.Quote | None, list[str]]:
    """One of several that can't answer is passed over."""
    try:
        return look(wanted, provider, ledger, clock)
    except UserError as error:
        if alone:
            raise
        return None, None, [str(error)]


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
    needed = priced.total_usd - priced.spent_usd - priced.mirror_usd  # that is paid elsewhere
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
