"""Amounts as people write them ("1.5B", "4.5 B", "1.35e17", "500_000") and as they like to read them."""

from __future__ import annotations

import math
import re
from typing import Any

from x1_pretrain.errors import UserError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_AMOUNT = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+|\d{1,3}(?:,\d{3})+)(?:e[+-]?\d+)?)\s*([kmbgt]?)", re.I)


def number(text: str) -> float | None:
    """The number that is meant, of either sign; None where it is none (also for "nan" and "inf")."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        return None
    value = float(found[1].replace(",", "").replace("_", "")) * UNITS[found[2].lower()]
    return value if math.isfinite(value) else None


def parse_amount(text: str, what: str = "amount") -> float:
    """A positive amount; `what` names the flag or the column in the message."""
    value = number(text)
    if value is None or value <= 0:
        raise UserError(f"{what} {text}: expected a positive amount such as 50M, 1.5B, 20_000 or 1.35e17")
    return value


def human(value: float, digits: int = 3) -> str:
    """22.6 B, 345 M, 8,800; powers of ten where no word is short enough."""
    if not math.isfinite(value):
        return "unknown"
    unit, name = _unit(value, digits)
    return f"{_rounded(value / unit, digits)} {name}".strip()


def compact(value: float, digits: int = 3) -> str:
    """The same without the space, as on an axis or a flag: 5M, 32K, 1.35e17."""
    if 10_000 <= value < 1e6 * (1 - 0.5 * 10.0**-digits):
        return f"{_rounded(value / 1e3, digits)}K"
    return human(value, digits).replace(" ", "").replace(",", "")


def flop(value: float) -> str:
    """1.35e17: FLOPs have no words."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def size(count: float) -> str:
    """1.07 GB, 612 MB, 3.5 kB, 12 bytes: in powers of ten, since stores are priced by such GB."""
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * unit:
            return f"{_rounded(count / unit, max(3, len(f'{count / unit:.0f}')))} {name}"
    return f"{count:.0f} byte{'' if round(count) == 1 else 's'}"


def span(seconds: float) -> str:
    """40 s, 15 min, 7 h, 3 d: from two of a unit on, in that unit."""
    for unit_s, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s"


def interval(low: float, high: float, point: float | None = None, digits: int = 3) -> str:
    """[20.1, 25.3], in the unit of the point where that reads well; else each end with its own unit."""
    unit, name = _unit(high if point is None else point, digits)
    if not 0.01 <= low / unit <= high / unit < 1_000:
        return f"[{human(low, digits)}, {human(high, digits)}]"
    ends = ", ".join(_rounded(end / unit, digits) for end in (low, high))
    return f"[{ends}]" if point is not None else f"[{ends}] {name}".rstrip()


def with_interval(point: float, low: float, high: float, digits: int = 3) -> str:
    """22.6 B [20.1, 25.3]; the point alone where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return human(point, digits)
    return f"{human(point, digits)} {interval(low, high, point, digits)}"


def _unit(value: float, digits: int) -> tuple[float, str]:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if unit * (1 - 0.5 * 10.0**-digits) <= abs(value) < 1e16:  # 999.96 M is 1 B
            return unit, name
    return 1.0, ""


def _rounded(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e16:
        return flop(float(f"{value:.{digits - 1}e}"))
    places = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    text = f"{round(value, places):,.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def for_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is not known is null."""
    if isinstance(value, dict):
        return {key: for_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
