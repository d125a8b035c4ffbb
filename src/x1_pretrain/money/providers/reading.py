"""Reading what a provider tells, without belief: every field may be absent, of another type, or no number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from x1_pretrain.errors import UserError


def amount(value: object) -> Decimal | None:
    """A finite number below a million, also when it was sent as a string; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}(\.\d{1,20})?", value):
        value = Decimal(value)
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    number = Decimal(value)
    return number if number.is_finite() and abs(number) < 1_000_000 else None


def price(value: object) -> Decimal | None:
    """What something costs. Nothing costs 0 or less: that is a provider that does not say."""
    number = amount(value)
    return number if number is not None and number > 0 else None


def inner(record: Mapping[str, Any], *keys: str) -> Any:
    """record[a][b]..., None where a part is absent or no object."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def text(record: Mapping[str, Any], *keys: str) -> str:
    """A string out of a record, "" where there is none."""
    value = inner(record, *keys)
    return value if isinstance(value, str) else ""


def word(record: Mapping[str, Any], *keys: str) -> str:
    """A provider's own word for something, fit to print in a line."""
    return re.sub(r"[^A-Za-z0-9_ -]", "?", text(record, *keys))[:40] or "nothing"


def objects(value: object) -> Iterator[dict[str, Any]]:
    """The objects of what should be a list of them."""
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def is_id(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value))


def safe_id(machine_id: str) -> str:
    """An id as a part of a URL. An empty or a crooked one would name something else: all machines, say."""
    if not is_id(machine_id):
        raise UserError(f"{machine_id!r} is no machine's id: expected letters, digits, '-', '_' or '.'")
    return machine_id
