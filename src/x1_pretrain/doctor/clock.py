"""Whether this machine's clock can be trusted: budgets, signed requests and certificates all go by it.

Three looks: wall clock against the monotonic one while the doctor works, against the `Date` that a server
sends, and, without a network, against the newest file: a clock behind that was set back.
"""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path

URLS = ("http://pypi.org", "http://huggingface.co")  # not https: with a wrong clock no certificate is valid
PATIENCE_S = 4.0

Fetch = Callable[[str, float], str | None]  # address, seconds -> its Date header


@dataclass(frozen=True)
class Watch:
    """Both clocks at one moment."""

    wall: float
    monotonic: float

    def drift_s(self, later: Watch) -> float:
        """How far the wall clock moved beside the monotonic one."""
        return (later.wall - self.wall) - (later.monotonic - self.monotonic)


def now() -> Watch:
    return Watch(time.time(), time.monotonic())


def fetch_date(url: str, patience_s: float) -> str | None:
    """In a thread: a name that does not resolve has no timeout that could be set."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_head(url, patience_s)), daemon=True)
    thread.start()
    thread.join(patience_s)
    return found[0] if found else None


class _Here(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None  # the first answer has a date, and the next may want a certificate


def _head(url: str, patience_s: float) -> str | None:
    request = urllib.request.Request(url, method="HEAD")
    headers: Message | None = None
    try:
        with urllib.request.build_opener(_Here).open(request, timeout=patience_s) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:  # a redirect or a refusal has a date as well
        headers = error.headers
    except (OSError, ValueError):
        return None
    return str(headers["Date"]) if headers and headers["Date"] else None


def ahead_s(
    urls: Sequence[str] = URLS, fetch: Fetch = fetch_date, wall: Callable[[], float] = time.time
) -> tuple[float, str] | None:
    """By how much this clock is ahead of a server's, and whose; None: none answered with a date."""
    for url in urls:
        date = fetch(url, PATIENCE_S)
        try:
            moment = parsedate_to_datetime(date or "")
        except (ValueError, TypeError):
            continue
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return wall() - moment.timestamp(), url
    return None


def newest(files: Iterable[Path]) -> tuple[float, Path] | None:
    """The latest modification among `files` that exist."""
    times = []
    for file in files:
        try:
            times.append((file.stat().st_mtime, file))
        except OSError:
            continue
    return max(times) if times else None
