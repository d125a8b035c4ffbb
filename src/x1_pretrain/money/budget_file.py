"""`budget.json`: what a watcher says was spent; written by the sidecar or by a user's own script, read by the
trainer from a path, a `file://` or an `http(s)://` address.

{"spent_usd": 14.20, "rate_usd_per_hr": 1.10, "hours_elapsed": 12.9, "projected_total_usd": 28.4,
 "last_update_utc": "2026-05-23T15:42:01Z"}

Only `spent_usd` and `last_update_utc` are needed. What is not a finite number from 0 up, has no usable time
or lies in the future is no reading: the reader says why, and keeps the last good one.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import parse_stamp, stamp

SCHEMA_VERSION = 1
FUTURE_S = 60  # clocks of two machines differ by less
MAX_BYTES = 1 << 20
HTTP_TIMEOUT_S = 5.0  # for one step of a request ...
HTTP_TOTAL_S = 10.0  # ... and for all of it


class NoReadingError(Exception):
    """Why what was read can't be used, in a few words."""


@dataclass(frozen=True)
class BudgetFile:
    """One state of the file."""

    spent_usd: Decimal
    rate_usd_per_hr: Decimal | None
    hours_elapsed: Decimal | None
    projected_total_usd: Decimal | None
    last_update: datetime
    run_id: str | None = None
    provider: str | None = None
    instance_id: str | None = None
    source: Literal["billed", "metered", "estimated"] | None = None
    ceiling_usd: Decimal | None = None
    seq: int = 0

    def to_json(self) -> str:
        """The published five fields first, as plain numbers; then ours."""

        def number(value: Decimal | None) -> float | None:
            return None if value is None else float(round(value, 6))

        tree = {
            "spent_usd": number(self.spent_usd),
            "rate_usd_per_hr": number(self.rate_usd_per_hr),
            "hours_elapsed": number(self.hours_elapsed),
            "projected_total_usd": number(self.projected_total_usd),
            "last_update_utc": stamp(self.last_update),
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "provider": self.provider,
            "instance_id": self.instance_id,
            "source": self.source,
            "ceiling_usd": number(self.ceiling_usd),
            "seq": self.seq,
        }
        return json.dumps(tree, indent=1) + "\n"


def write(file: Path, budget: BudgetFile) -> None:
    """The old content or the new one, never a half, and on the disk."""
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new.open("w", encoding="utf-8") as out:
            out.write(budget.to_json())
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------------------
# Reading


def parse(data: bytes, now: datetime) -> BudgetFile:
    """What the bytes say, or `NoReadingError`."""
    tree = _tree(data)
    updated = _moment(tree.get("last_update_utc"), now)
    spent = _amount(tree, "spent_usd")
    if spent is None:
        raise NoReadingError("spent_usd is missing")
    source = tree.get("source")
    return BudgetFile(
        spent_usd=spent,
        rate_usd_per_hr=_amount(tree, "rate_usd_per_hr") or None,
        hours_elapsed=_amount(tree, "hours_elapsed"),
        projected_total_usd=_amount(tree, "projected_total_usd"),
        last_update=updated,
        run_id=_text(tree, "run_id"),
        provider=_text(tree, "provider"),
        instance_id=_text(tree, "instance_id"),
        source=source if source in ("billed", "metered", "estimated") else None,
        ceiling_usd=_amount(tree, "ceiling_usd"),
        seq=seq if isinstance(seq := tree.get("seq"), int) and not isinstance(seq, bool) else 0,
    )


def _tree(data: bytes) -> dict[str, Any]:
    if not data.strip():
        raise NoReadingError("the file is empty")
    if len(data) > MAX_BYTES:
        raise NoReadingError(f"larger than {MAX_BYTES >> 10} KiB: not a budget.json")
    try:
        tree = json.loads(data, parse_float=Decimal, object_pairs_hook=_once)
    except (ValueError, ArithmeticError, RecursionError):  # half a file, not JSON, not UTF-8
        raise NoReadingError("not valid JSON, or half a file") from None
    if not isinstance(tree, dict):
        raise NoReadingError(f"expected a JSON object, found {type(tree).__name__}")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A field that is there twice has no one value."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise NoReadingError("a field is there twice")
    return tree


def _amount(tree: dict[str, Any], key: str) -> Decimal | None:
    """A finite number of at least 0; None where there is none."""
    value = tree.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise NoReadingError(f"{key} is {value!r:.40}, expected a number")
    amount = Decimal(str(value))
    if not amount.is_finite() or amount < 0 or amount > 10**9:
        raise NoReadingError(f"{key} is {value!s:.40}, expected a number from 0 up")
    return amount


def _moment(text: object, now: datetime) -> datetime:
    try:
        updated = parse_stamp(text)
    except (ValueError, OverflowError) as error:
        raise NoReadingError(f"last_update_utc: {error}"[:120]) from None
    ahead_s = (updated - now).total_seconds()
    if ahead_s > FUTURE_S:
        raise NoReadingError(f"last_update_utc is {ahead_s:.0f} s in the future: a clock is wrong")
    return updated


def _text(tree: dict[str, Any], key: str) -> str | None:
    value = tree.get(key)
    return value[:200] if isinstance(value, str) else None


class Address:
    """Where the file is. `fetch` never raises anything but `NoReadingError` and never waits for long."""

    def __init__(self, uri: str) -> None:
        try:
            parts = urlsplit(uri)
            parts.port  # noqa: B018  (raises where it is no number)
        except ValueError as error:
            raise UserError(f"--budget-curr-cost-uri {shown(uri)}: not a valid address ({error})") from None
        self.uri = uri
        self.path: Path | None = None
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost"):
                raise UserError(f"--budget-curr-cost-uri {uri}: a file:// address has three slashes")
            self.path = Path(unquote(parts.path))
        elif parts.scheme in ("http", "https"):
            if not parts.hostname:
                raise UserError(f"--budget-curr-cost-uri {shown(uri)}: the address names no host")
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri):
            raise UserError(
                f"--budget-curr-cost-uri {shown(uri)}: expected a path, file:// or http(s)://, found "
                f"{parts.scheme}://"
            )
        else:
            self.path = Path(uri)

    def __str__(self) -> str:
        return shown(self.uri)

    def fetch(self) -> bytes:
        """In a thread of its own: a network disk that hangs, a server that drips bytes and a name that does
        not resolve have no timeout that could be set."""
        said: queue.SimpleQueue[bytes | NoReadingError] = queue.SimpleQueue()
        answer = self._answer if self.path is None else self._content
        threading.Thread(target=lambda: said.put(answer()), name="x1-budget-uri", daemon=True).start()
        try:
            found = said.get(timeout=HTTP_TOTAL_S)
        except queue.Empty:
            raise NoReadingError(f"{self} gave no whole answer within {HTTP_TOTAL_S:g} s") from None
        if isinstance(found, NoReadingError):
            raise found
        return found

    def _content(self) -> bytes | NoReadingError:
        assert self.path is not None
        try:
            with open(self.path, "rb", opener=_at_once) as file:
                return file.read(MAX_BYTES + 1) or b""  # None: a pipe that holds nothing now
        except OSError as error:
            return NoReadingError(f"{self.path}: {error.strerror}")
        except Exception as error:  # whatever it was, it must reach the one who waits
            return NoReadingError(f"{self.path}: {error}")

    def _answer(self) -> bytes | NoReadingError:
        import httpx2

        end, data = time.monotonic() + HTTP_TOTAL_S, b""
        try:
            with httpx2.stream("GET", self.uri, timeout=HTTP_TIMEOUT_S) as answer:
                if answer.status_code != 200:
                    return NoReadingError(f"{self} answered {answer.status_code}, expected 200")
                for chunk in answer.iter_bytes():
                    data += chunk
                    if len(data) > MAX_BYTES or time.monotonic() > end:
                        break
        except Exception as error:  # whatever it was, it must reach the one who waits
            return NoReadingError(f"{self} can't be reached ({type(error).__name__})")
        return data


def _at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to is no reason to wait."""
    return os.open(path, flags | os.O_NONBLOCK)


def shown(uri: str) -> str:
    """An address without its password and query: others read logs."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.lower() == "file":
        return uri
    host, slash, path = re.split(r"[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
