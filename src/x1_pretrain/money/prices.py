"""What a GPU-hour is listed at, for plans: `prices.toml`, dated and with its sources.

A list price is no offer. A launch asks the provider for the price of the moment and never reads this table.
"""

from __future__ import annotations

from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from x1_pretrain.config import Count, Section
from x1_pretrain.errors import UserError
from x1_pretrain.model.gpus import Date, Text, kinds, read_rows

FILE = Path(__file__).with_name("prices.toml")


class ListPrice(Section):
    """One GPU for one hour, without tax and storage."""

    kind: Text
    provider: Text
    usd_per_hr: Annotated[Decimal, Field(gt=0)]
    gpus: Count = 1  # of the smallest machine at this price
    date: Date
    source: Text


def list_prices(kind_name: str) -> tuple[ListPrice, ...]:
    """Every list price of a kind, cheapest first; none where nobody's is known."""
    names = {kind_name, *(kind.sold_as for kind in kinds() if kind.name == kind_name)}
    found = [price for price in table() if price.kind in names]
    return tuple(sorted(found, key=lambda price: (price.usd_per_hr, price.gpus, price.provider)))


def list_price(kind_name: str, gpu_count: int = 1) -> ListPrice | None:
    """The cheapest that a machine of so many GPUs can be had at; None where nothing is known."""
    fitting = [price for price in list_prices(kind_name) if price.gpus <= gpu_count]
    return fitting[0] if fitting else None


@cache
def table(file: Path = FILE) -> tuple[ListPrice, ...]:
    """Every price, in the file's order."""
    rows = read_rows(file, "price", ListPrice, parse_float=Decimal)
    known = {kind.name for kind in kinds()}
    for row in rows:
        if row.kind not in known:
            near = ", ".join(sorted(known))
            raise UserError(f"{file}: a price for {row.kind!r}, which gpus.toml doesn't have; known: {near}")
    return rows
