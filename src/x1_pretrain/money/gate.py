"""The sentence that prices a run before anything is billed, and the reasons to refuse it. Pure.

Hours come from measured tokens a second where there are any, else from a GPU's peak and an assumed share of
it, and then the sentence says so. What is not known (hours, price) is a reason to refuse a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_UP, Decimal
from typing import Any

from x1_pretrain.money.guard import ZERO, dollars

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

    @property
    def hours(self) -> Decimal | None:
        if self.tokens_per_sec is None or self.tokens_per_sec <= 0:
            return None
        return Decimal(repr(self.tokens / self.tokens_per_sec)) / 3600


@dataclass(frozen=True)
class Quote:
    """A run, priced. `spent_usd`: what it has cost before."""

    price: Price
    work: Work
    ceiling_usd: Decimal
    reserve_h: Decimal  # paid but not training: setting up, one poll unseen, ending the machine
    spent_usd: Decimal = ZERO

    @property
    def compute_usd(self) -> Decimal:
        return self.price.usd_per_hr * (self.work.hours or ZERO)

    @property
    def disk_usd(self) -> Decimal:
        return self.price.storage_usd_per_hr * ((self.work.hours or ZERO) + self.reserve_h)

    @property
    def reserve_usd(self) -> Decimal:
        """Tax on everything, and the hours that are paid but not trained."""
        idle = self.price.usd_per_hr * self.reserve_h
        return idle + self.price.tax * (self.compute_usd + self.disk_usd + idle)

    @property
    def total_usd(self) -> Decimal:
        return self.spent_usd + self.compute_usd + self.disk_usd + self.reserve_usd

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
            "compute_usd": round(self.compute_usd, 4),
            "disk_usd": round(self.disk_usd, 4),
            "reserve_usd": round(self.reserve_usd, 4),
            "before_usd": round(self.spent_usd, 4),
            "total_usd": round(self.total_usd, 4),
            "ceiling_usd": self.ceiling_usd,
        }


def reserve_h(poll_s: float, end_s: float, setup_h: Decimal = SETUP_H) -> Decimal:
    """What may pass between a limit and the end of the bill."""
    return setup_h + Decimal(repr(poll_s + end_s)) / 3600


def assumed_rate(peak_flops_per_sec: float | None, palm_flops: float, gpus: int) -> float | None:
    """Tokens a second at the assumed share of the peak; None for a GPU without a known peak."""
    return None if peak_flops_per_sec is None else ASSUMED_MFU * peak_flops_per_sec * gpus / palm_flops


def sentence(quote: Quote, verb: str = "start") -> str:
    """The price of a run in one sentence; each amount rounded up to the cent."""
    price, work = quote.price, quote.work
    tax = " incl. tax" if price.tax else ""
    before = f"{_up(quote.spent_usd)} spent before + " if quote.spent_usd else ""
    if work.hours is None:
        return (
            f"This will {verb} {price.what} on {price.where} at {dollars(price.usd_per_hr)}/h ({price.known})"
            f" for {billions(work.tokens)} tokens in hours not known yet ({work.basis}); "
            f"{dollars(quote.spent_usd)} of your {dollars(quote.ceiling_usd)} ceiling spent before."
        )
    room = (
        f"{_down(quote.buffer_usd)} buffer" if quote.buffer_usd >= 0 else f"{_up(-quote.buffer_usd)} too much"
    )
    return (
        f"This will {verb} {price.what} on {price.where} at {dollars(price.usd_per_hr)}/h ({price.known}), "
        f"run about {_long(work.hours)} for {billions(work.tokens)} tokens ({work.basis}) = "
        f"{_up(quote.compute_usd)}, + disk {_up(quote.disk_usd)} + reserve{tax} {_up(quote.reserve_usd)} = "
        f"{before}{_up(quote.total_usd)} of your {dollars(quote.ceiling_usd)} ceiling; {room}."
    )


def broken(quote: Quote, max_usd_per_hr: Decimal | None) -> list[str]:
    """The terms that break it, each with what would mend it."""
    found = []
    if max_usd_per_hr is not None and quote.price.usd_per_hr > max_usd_per_hr:
        found.append(
            f"the price: {dollars(quote.price.usd_per_hr)}/h is above --max-price "
            f"{dollars(max_usd_per_hr)}/h (--wait 4h looks again for so long)"
        )
    if quote.buffer_usd < 0:
        found.append(
            f"the total: {_up(quote.total_usd)} is above the ceiling of {dollars(quote.ceiling_usd)}"
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
    fixed = quote.spent_usd + hourly * quote.reserve_h
    hours = (quote.ceiling_usd - fixed) / hourly if hourly else ZERO
    if hours <= 0:
        return "; not even the reserve fits"
    tokens = int(hours / quote.work.hours * quote.work.tokens)
    return f"; it pays for about {billions(tokens)} tokens"


def billions(tokens: int) -> str:
    return f"{tokens / 1e9:.1f} B" if tokens >= 10**8 else f"{tokens / 1e6:.2f} M"


def _up(amount: Decimal) -> str:
    return dollars(amount.quantize(CENT, rounding=ROUND_UP))


def _down(amount: Decimal) -> str:
    return dollars(amount.quantize(CENT, rounding="ROUND_DOWN"))
