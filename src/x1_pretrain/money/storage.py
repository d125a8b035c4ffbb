"""What it costs to keep a run in a store, and to fetch it from there. Pure, but for the table of list prices.

A month counts as 720 hours. Requests are not counted: a look every 15 s, with new rows in three files, is at
most 23,000 writes and 17,000 reads a day (as counted at a store), 12 cents where a thousand cost $0.005 and
$0.0004. The bytes of an upload are free at every store of the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from x1_pretrain.config import CheckpointConfig, MirrorConfig, Section
from x1_pretrain.model.gpus import Date, Text, read_rows
from x1_pretrain.money.clock import parse_stamp, stamp
from x1_pretrain.money.guard import ZERO
from x1_pretrain.money.ledger import Ledger, Row
from x1_pretrain.stores.address import parse

FILE = Path(__file__).with_name("storage.toml")
MONTH_H = 720
GIB = 2**30
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two moments
STEP_BYTES = 600  # of rows, as counted in runs: 256 of steps, 143 of blocks, 1,400 of metrics every ten steps
EVENT = "storage"  # of the ledger's rows

Usd = Annotated[Decimal, Field(ge=0)]


class StoragePrice(Section):
    """A store's list price, from `storage.toml`."""

    name: Text
    scheme: Text  # of a mirror's address
    host: str = ""  # how the host of the endpoint ends; empty: the scheme's own
    usd_per_gb_month: Usd
    egress_usd_per_gb: Usd  # to the internet
    gb: Literal["binary", "decimal"]  # what the store calls a GB: 2^30 bytes or 10^9
    date: Date
    source: Text


@dataclass(frozen=True)
class Rates:
    """What a GiB costs, and how that is known."""

    usd_per_gib_month: Decimal
    egress_usd_per_gib: Decimal
    said: str
    known: bool = True

    def kept_usd(self, gib: float, hours: float) -> Decimal:
        """So much, for so long."""
        return self.usd_per_gib_month * exactly(gib) * exactly(hours) / MONTH_H

    def fetched_usd(self, gib: float) -> Decimal:
        return self.egress_usd_per_gib * exactly(gib)


def exactly(number: float) -> Decimal:
    """Never below 0."""
    return max(ZERO, Decimal(repr(float(number))))


@cache
def table(file: Path = FILE) -> tuple[StoragePrice, ...]:
    return read_rows(file, "storage", StoragePrice, parse_float=Decimal)


def rates(
    uri: str,
    endpoint: str | None = None,
    usd_per_gib_month: float | None = None,
    egress_usd_per_gib: float | None = None,
) -> Rates:
    """Of the store that an address names; what the user states is above the list."""
    listed = list_rates(uri, endpoint)
    if usd_per_gib_month is None and egress_usd_per_gib is None:
        return listed
    month = listed.usd_per_gib_month if usd_per_gib_month is None else exactly(usd_per_gib_month)
    egress = listed.egress_usd_per_gib if egress_usd_per_gib is None else exactly(egress_usd_per_gib)
    both = usd_per_gib_month is not None and egress_usd_per_gib is not None
    return Rates(month, egress, "as stated" if both else f"in part as stated, {listed.said}", True)


def list_rates(uri: str, endpoint: str | None = None) -> Rates:
    """By the list; a store that is not in it counts 0, and says so."""
    scheme, found, _ = uri.partition("://")
    if not found or scheme == "file":
        return Rates(ZERO, ZERO, "a folder: no store bills for it")
    price = _listed(scheme, host(endpoint))
    if price is None:
        where = f"the store at {host(endpoint)}" if endpoint else f"{scheme}://"
        said = f"no list price is known of {where}: counted as $0; mirror.storage_usd_per_gib_month states it"
        return Rates(ZERO, ZERO, said, known=False)
    unit = Decimal(GIB) / 10**9 if price.gb == "decimal" else Decimal(1)
    said = f"list price of {price.name}, {price.date}, second hand"
    return Rates(price.usd_per_gb_month * unit, price.egress_usd_per_gb * unit, said)


def host(endpoint: str | None) -> str:
    """Of an address: without scheme, user, port and path."""
    rest = (endpoint or "").partition("://")[2] or (endpoint or "")
    return rest.partition("/")[0].rpartition("@")[2].partition(":")[0].lower()


def _listed(scheme: str, at: str) -> StoragePrice | None:
    """An endpoint of one's own is never billed as the scheme's own store."""
    for price in table():
        if price.scheme != scheme:
            continue
        if price.host and (at == price.host or at.endswith(f".{price.host}")):
            return price
        if not price.host and not at:
            return price
    return None


# ------------------------------------------------------------------------------------------------------------
# In a plan


def keeps_all(uri: str) -> bool:
    """Whether the store counts what was deleted too: a repository has a history."""
    return parse(uri).scheme == "hf"


def most_made(every: int, total_steps: int, at: int = 0) -> int:
    """Checkpoints of a run, at most: those of step 0 and of the end too."""
    return total_steps // every + 2 + at


def most_kept(checkpoint: CheckpointConfig, total_steps: int) -> int:
    """Checkpoints that a mirror names at once, at most: those that are kept, and one on its way."""
    every = total_steps // checkpoint.keep_every + 1 if checkpoint.keep_every else 0
    kept = checkpoint.keep_last + checkpoint.keep_best + len(checkpoint.at) + every + 1
    return min(kept, most_made(checkpoint.every, total_steps, len(checkpoint.at)))


def history(every: int, total_steps: int, at: int = 0) -> float:
    """Checkpoints that a store which keeps all bills at most, in the mean over the run: one comes each
    `every` steps, so half of those in the end; of those `at` other steps all, which may come at once."""
    return most_made(every, total_steps) / 2 + at


def most_held(uri: str, checkpoint: CheckpointConfig, total_steps: int) -> float:
    """Checkpoints that its store bills at once, at most."""
    if keeps_all(uri):
        return history(checkpoint.every, total_steps, len(checkpoint.at))
    return most_kept(checkpoint, total_steps)


def bytes_per_token(vocab_size: int) -> int:
    """Of a corpus."""
    return 2 if vocab_size <= 65_536 else 4


def rows_gib(total_steps: int) -> float:
    """Of the run's records, at its end."""
    return STEP_BYTES * total_steps / GIB


@dataclass(frozen=True)
class Planned:
    """What a run's mirror is counted at before it starts: all that it holds, all the time, and one fetch.
    The ledger counts the same things, as large as they are."""

    rates: Rates
    label: str
    checkpoints: float  # of a history in the mean
    checkpoint_gib: float
    rows_gib: float = 0.0
    corpus_gib: float = 0.0  # of what is mirrored of the data

    @property
    def gib(self) -> float:
        return self.checkpoints * self.checkpoint_gib + self.rows_gib + self.corpus_gib

    @property
    def fetched_gib(self) -> float:
        """A machine is lost once: one checkpoint, the rows, and the data."""
        return self.checkpoint_gib + self.rows_gib + self.corpus_gib

    def usd(self, hours: float) -> Decimal:
        return self.rates.kept_usd(self.gib, hours) + self.rates.fetched_usd(self.fetched_gib)


# ------------------------------------------------------------------------------------------------------------
# In the ledger


@dataclass(frozen=True)
class Bytes:
    """What a session says of itself."""

    held: float  # what the mirror names of the run now
    sent: float  # since the last row
    fetched: float


def record(ledger: Ledger, mirror: MirrorConfig, endpoint: str | None, epoch: int, said: Bytes) -> None:
    """A session's row, at its start (what was fetched), at its end, and as often between as one likes.

    `epoch` is that of its lease. A run without a mirror has none. A store with a history holds what the rows
    came to before, and what was sent since. Nobody sees from here that a history was squashed.
    """
    if mirror.uri is None:
        return
    bills = rates(mirror.uri, endpoint, mirror.storage_usd_per_gib_month, mirror.egress_usd_per_gib)
    with ledger.locked():
        now, rows = ledger.clock.now(), ledger.rows()
        place = f"{parse(mirror.uri)} e"  # each mirror counts its epochs from 1
        stored = said.held / GIB
        if keeps_all(mirror.uri):
            here = [row for row in rows if row["event"] == EVENT and str(row["session"]).startswith(place)]
            before = max((float(row["gib"]) for row in here), default=0.0)
            stored = max(stored, before + said.sent / GIB)
        row = storage_row(rows, f"{place}{epoch:04d}", stored, said.fetched / GIB, bills, now, now)
        ledger.append(EVENT, **row)


def storage_row(
    rows: Iterable[Row],
    session: str,
    stored_gib: float,
    fetched_gib: float,
    rates: Rates,
    begun: datetime,
    now: datetime,
) -> dict[str, Any]:
    """The fields of a session's row.

    `session` names it in all copies of the ledger; `stored_gib` is there now, `fetched_gib` was fetched in
    this session so far. Each row holds the session's sum up to it, so that it may write one as often as it
    likes: the account counts the last. A session begins where the newest row of another one ended, since the
    store bills on while nobody trains; the first at `begun`.
    """
    ours, others = _rows_of(rows, session)
    if ours:
        since, before_usd = parse_stamp(ours[-1]["until_utc"]), Decimal(str(ours[-1]["kept_usd"]))
    else:
        ends = [parse_stamp(row["until_utc"]) for row in others]
        since, before_usd = max(ends, default=begun), ZERO
    hours = max(0.0, (now - since).total_seconds() / 3600)
    kept_usd = before_usd + rates.kept_usd(stored_gib, hours)
    fetched_usd = rates.fetched_usd(fetched_gib)
    return {
        "session": session,
        "gib": round(stored_gib, 6),
        "fetched_gib": round(fetched_gib, 6),
        "until_utc": stamp(max(now, since)),
        "kept_usd": round(kept_usd, 9),
        "fetched_usd": round(fetched_usd, 9),
        "storage_usd": round(kept_usd + fetched_usd, 9),
        "basis": rates.said,
    }


def _rows_of(rows: Iterable[Row], session: str) -> tuple[list[Row], list[Row]]:
    """This session's, and the others'."""
    kept = [row for row in rows if row["event"] == EVENT]
    ours = [row for row in kept if row.get("session") == session]
    return ours, [row for row in kept if row.get("session") != session]
