"""Numbers and times as the report writes them."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from x1_pretrain.numbers import compact, human
from x1_pretrain.records.run_folder import moment

NOT_MEASURED = "not measured"


def loss(value: float | None) -> str:
    """Four places, as the log prints it."""
    return number(value, "{:.4f}")


def number(value: float | None, form: str = "{:.4g}") -> str:
    if value is None:
        return NOT_MEASURED
    return form.format(value) if math.isfinite(value) else str(value)


def tokens(value: float | None) -> str:
    """Exact below a million, as other pages say the same number."""
    return NOT_MEASURED if value is None else _exact(value) or human(value)


def _exact(value: float) -> str:
    return f"{value:,.0f}" if 1_000 <= abs(value) < 999_999.5 else ""


def flops(rate: float) -> str:
    """7.58e8 -> 758 MFLOP/s"""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= unit:
            return f"{human(rate / unit)} {name}FLOP/s"
    return f"{human(rate)} FLOP/s"


def share(value: float | None, places: int = 1) -> str:
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.{places}%}"


def usd(amount: Decimal | float | None) -> str:
    """Cents; finer below ten cents."""
    if amount is None or not math.isfinite(amount):
        return NOT_MEASURED
    value = float(amount)
    return f"${value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"${value:,.4f}"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    if abs(seconds) >= 5400:
        return f"{seconds / 3600:,.2f} h"
    if abs(seconds) >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if abs(seconds) >= 0.1 or seconds == 0 else f"{seconds:.3f} s"


def gib(value: float | None) -> str:
    return number(value, "{:.2f} GiB")


def when(stamp: Any) -> str:
    """2026-05-23T15:42:01.123Z -> 23 May 15:42:01; what is no time stays as it is."""
    found = moment({"time_utc": stamp})
    return str(stamp) if found is None else f"{found.day} {found:%b %H:%M:%S}"


def count(amount: int, what: str) -> str:
    """1 spike, 2 spikes."""
    return f"{amount:,} {what}{'' if amount == 1 else 's'}"


def axis(amount: float) -> str:
    """On an axis of tokens: 0, 500K, 1.2B."""
    return compact(amount) if amount >= 1 else f"{amount:.3g}"


def axis_exact(amount: float) -> str:
    """In a read-out: 1.2345 B."""
    return _exact(amount) or human(amount, 5) if amount else "0"
