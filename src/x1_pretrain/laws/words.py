"""The words and small sentences that the pages about a fit share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from x1_pretrain.laws.fitted import Band
from x1_pretrain.laws.forms import Law
from x1_pretrain.numbers import human

FEW = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}


def formula(law: Law) -> str:
    e, a, alpha, b, beta = map(float, law)
    return f"{e:.4g} + {a:.4g} / N^{alpha:.4g} + {b:.4g} / D^{beta:.4g}"


def nats(band: Band) -> str:
    ends = f" [{band.low:.3f}, {band.high:.3f}]" if band.has_interval else ""
    return f"{band.point:.3f}{ends} nats per token"


def ends(band: Band, form: str) -> str:
    return f"{band.low:{form}} to {band.high:{form}}" if band.has_interval else "none"


def between(band: Band, write: Callable[[float], str]) -> str:
    return f"{write(band.low)} to {write(band.high)}"


def words_between(band: Band) -> str:
    return f"between {human(band.low)} and {human(band.high)}"


def factor(band: Band) -> float:
    """From the middle to an end, on average, of an interval in logarithms."""
    return float(np.sqrt(band.high / band.low))


def count(number: int, what: str) -> str:
    if number == 1:
        return f"one {what}"
    return f"{FEW.get(number, f'{number:,}')} {what}s"


def sentence(text: str) -> str:
    return text.strip().rstrip(".")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
