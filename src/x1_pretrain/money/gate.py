"""The sentence that prices a run before anything is billed, and the reasons to refuse it. Pure.

Each amount is rounded up to the cent before it is added, so that what is printed adds up.

Hours come from measured tokens a second where there are any, else from a GPU's peak and an assumed share of
it, and then the sentence says so. What is not known (hours, price) is a reason to refuse a launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_UP, Decimal
from typing import Any, Literal

from x1_pretrain.money.guard import ZERO

ASSUMED_MFU = 0.35  # small models on one A100 or H100 were seen at 0.35 to 0.45 (PaLM convention)
SETUP_H = Decimal("0.5")  # a bare machine to its first step: drivers, torch, data
CENT = Decimal("0.01")


@dataclass(frozen=True)
class Price:
    """What an hour costs, where, and how fresh that knowledge is."""

    what: str  # "1x A100 80GB"
    where: str  # "RunPod secure"
    usd_per_hr: Decimal  # the machine
    known: str  # "live price, 12:03Z"
    storage_usd_per_hr: Decimal = ZERO
    tax: Decimal = ZERO

    @property
    def all_in_usd_per_hr(self) -> Decimal:
        return (self.usd_per_hr + self.storage_usd_per_hr) * (1 + self.tax)


@dataclass(frozen=True)
class Work:
    """What is left to do, and how long that takes."""

    tokens: int
    tokens_per_sec: float | None
    basis: str  # "measured in runs/x1-50m", "assumed MFU 0.35 ..."
    kind: Literal["measured", "stated", "assumed"] = "assumed"

    @property
    def hours(self) -> Decimal | None:
        if self.tokens_per_sec is None or not 0 < self.tokens_per_sec < math.inf:
            return None
        return Decimal(repr(self.tokens / self.tokens_per_sec)) / 3600


@dataclass(frozen=True)
class Quote:
    """A run, priced, in whole cents. `spent_usd`: what it has cost before."""

    price: Price
    work: Work
    ceiling_usd: Decimal
    reserve_h: Decimal  # paid but not training: setting up, one poll unseen, ending the machine
    spent_usd: Decimal = ZERO
    mirror_usd: Decimal = ZERO  # for the store that keeps a copy, in whole cents

    @property
    def hours(self) -> Decimal:
        """From the first to the last hour that is paid."""
        return (self.work.hours or ZERO) + self.reserve_h

    @property
    def compute_usd(self) -> Decimal:
        return cents(self.price.usd_per_hr * (self.work.hours or ZERO))

    @property
    def disk_usd(self) -> Decimal:
        return cents(self.price.storage_usd_per_hr * self.hours)

    @property
    def reserve_usd(self) -> Decimal:
        """The hours that are paid but not trained, and tax on everything."""
        tax = self.price.tax * (self.price.usd_per_hr + self.price.storage_usd_per_hr) * self.hours
        return cents(self.price.usd_per_hr * self.reserve_h + tax)

    @property
    def before_usd(self) -> Decimal:
        return cents(self.spent_usd)

    @property
    def total_usd(self) -> Decimal:
        return self.before_usd + self.compute_usd + self.disk_usd + self.mirror_usd + self.reserve_usd

    @property
    def buffer_usd(self) -> Decimal:
        return self.ceiling_usd - self.total_usd

    def fields(self) -> dict[str, Any]:
        """For the ledger."""
        return {
            "usd_per_hr": round(self.price.all_in_usd_per_hr, 6),
            "hours": None if self.work.hours is None else round(self.work.hours, 3),
            "tokens": self.work.tokens,
            "basis": self.work.basis,
            "compute_usd": self.compute_usd,
            "disk_usd": self.disk_usd,
            "mirror_usd": self.mirror_usd,
            "reserve_usd": self.reserve_usd,
            "before_usd": self.before_usd,
            "total_usd": self.total_usd,
            "ceiling_usd": self.ceiling_usd,
        }


def reserve_h(poll_s: float, end_s: float, setup_h: Decimal = SETUP_H) -> Decimal:
    """What may pass between a limit and the end of the bill."""
    return setup_h + Decimal(repr(poll_s + end_s)) / 3600


def assumed_rate(peak_flops_per_sec: float | None, palm_flops: float, gpus: int) -> float | None:
    """Tokens a second at the assumed share of the peak; None for a GPU without a known peak."""
    return None if peak_flops_per_sec is None else ASSUMED_MFU * peak_flops_per_sec * gpus / palm_flops


def sentence(quote: Quote, verb: str = "start") -> str:
    """The price of a run in one sentence."""
    price, work, ceiling = quote.price, quote.work, exact(quote.ceiling_usd)
    begin = f"This will {verb} {price.what} on {price.where} at {exact(price.usd_per_hr)}/h ({price.known})"
    if work.hours is None:
        return (
            f"{begin} for {billions(work.tokens)} tokens in hours not known yet ({work.basis}); "
            f"{exact(quote.before_usd)} of your {ceiling} ceiling spent before."
        )
    before = f" + {exact(quote.before_usd)} spent before" if quote.before_usd else ""
    mirror = f" + mirror {exact(quote.mirror_usd)}" if quote.mirror_usd else ""
    buffer = quote.buffer_usd
    room = f"{exact(buffer)} buffer" if buffer >= 0 else f"{exact(-buffer)} too much"
    return (
        f"{begin}, run about {_long(work.hours)} for {billions(work.tokens)} tokens ({work.basis}) = "
        f"{exact(quote.compute_usd)}, + disk {exact(quote.disk_usd)}{mirror} + tax/reserve "
        f"{exact(quote.reserve_usd)}{before} = {exact(quote.total_usd)} of your {ceiling} ceiling; {room}."
    )


def broken(quote: Quote, max_usd_per_hr: Decimal | None) -> list[str]:
    """The terms that break it, each with what would mend it."""
    found = []
    if max_usd_per_hr is not None and quote.price.usd_per_hr > max_usd_per_hr:
        found.append(
            f"the price: {exact(quote.price.usd_per_hr)}/h is above --max-price "
            f"{exact(max_usd_per_hr)}/h (budget.max_usd_per_hr; x1 launch --wait 4h looks again for so long)"
        )
    if quote.buffer_usd < 0:
        found.append(
            f"the total: {exact(quote.total_usd)} is above the ceiling of {exact(quote.ceiling_usd)}"
            f"{_what_fits(quote)}"
        )
    return found


def _long(hours: Decimal) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _what_fits(quote: Quote) -> str:
    """How many tokens the ceiling does pay for."""
    if not quote.work.hours or quote.buffer_usd >= 0:
        return ""
    hourly = quote.price.all_in_usd_per_hr
    room_usd = quote.ceiling_usd - quote.before_usd - quote.mirror_usd
    room_usd -= 3 * CENT  # the three other amounts are rounded up
    hours = room_usd / hourly - quote.reserve_h if hourly else ZERO
    if hours <= 0:
        return "; not even the reserve fits"
    tokens = int(hours / quote.work.hours * quote.work.tokens)
    unit = next(u for u in (10**8, 10**4, 1) if tokens >= u or u == 1)  # as `billions` shows it, rounded down
    return f"; it pays for about {billions(tokens - tokens % unit)} tokens"


def billions(tokens: int) -> str:
    if tokens < 10**4:
        return f"{tokens:,}"
    return f"{tokens / 1e9:.1f} B" if tokens >= 10**8 else f"{tokens / 1e6:.2f} M"


def cents(amount: Decimal) -> Decimal:
    """Up to the next whole cent."""
    return amount.quantize(CENT, rounding=ROUND_UP)


def exact(amount: Decimal) -> str:
    """$1.19, and $0.345 where the price is finer than a cent."""
    whole, _, part = f"{amount:,.4f}".rstrip("0").partition(".")
    return f"${whole}.{part:0<2}"
