"""A provider's HTTP API, asked with manners: spaced, retried where that is safe, and discreet.

Three ways to ask, because they fail differently. `read` and `ask` may be sent again, so they are, within a
minute. `launch` may not: it is sent once, and whatever leaves the outcome open is an `UnknownOutcomeError`.
No error here carries a body, a header or a key: bodies hold tokens and passwords. What a provider says of a
refusal is its error code, if that is short and plain.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from x1_pretrain import __version__
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.base import (
    DeniedError,
    NoCapacityError,
    ProviderError,
    UnknownOutcomeError,
    UnreachableError,
)

CONNECT_S, READ_S = 10.0, 20.0  # of the real clock: sockets know no other
PATIENCE_S = 60.0  # one question with all its retries
QUIET_S = 15.0  # the longest wait for a quota before a first try
LARGEST_BYTES = 16 << 20
# Raised before the first byte of a request left: whatever was asked surely did not happen.
NOT_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)
HINTS = {
    402: "the balance is too low: top it up",
    409: "it conflicts with what is there",
    410: "this API was retired: a newer x1 may know its successor",
    413: "the request is too large",
    422: "the request does not fit the API: a newer x1 may",
}


class AnswerError(ProviderError):
    """A plain no: a 4xx that another try would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class MissingError(AnswerError):
    """404 in the API's own form: it knows no such thing. A 404 of some other server is not this."""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: httpx2.Headers
    body: bytes | None  # None: it broke off


@dataclass(frozen=True)
class _Again:
    """Worth another try."""

    why: str
    wait_s: float | None = None  # as the provider asks


@dataclass(frozen=True)
class _Refusal:
    """What may be known and repeated of a body that says no."""

    code: str | None = None
    missing: bool = False
    full: bool = False


THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
_BROKEN = object()


class Web:
    """`label` and `key_variable` are for people; `spacing_s` is the least time between two requests."""

    def __init__(
        self,
        label: str,
        url: str,
        key: str,
        clock: Clock,
        *,
        key_variable: str,
        spacing_s: float = 0.0,
        launch_spacing_s: float = 0.0,
    ) -> None:
        self.label, self._url, self._key, self._clock = label, url.rstrip("/"), key, clock
        self._key_variable = key_variable
        self._spacing_s, self._launch_spacing_s = spacing_s, launch_spacing_s
        self._free_at_s = self._launch_free_at_s = 0.0
        self._client = httpx2.Client(
            headers={
                "Authorization": f"Bearer {key}",
                "User-Agent": f"x1/{__version__}",
                "Accept": "application/json",
            },
            follow_redirects=False,  # a key must not travel
            trust_env=not _on_this_machine(url),  # no proxy lies between this machine and itself
            # A fresh connection each time: one that the other side closed unseen would make a launch's
            # outcome unknown for nothing.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

    # ---- asking

    def read(self, path: str, **params: Any) -> Any:
        """GET, retried. Numbers with a point come as Decimal; NaN and Infinity too, as what they are."""
        return self._retried("GET", path, params, None)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What may be asked twice, such as an end; retried like a read. None where the answer is empty."""
        return self._retried(method, path, {}, body)

    def launch(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST, sent exactly once."""
        self._wait_until(max(self._launch_free_at_s, self._free_at_s))
        self._launch_free_at_s = self._clock.steady_s() + self._launch_spacing_s
        what = f"{self.label}: POST {path}"
        try:
            answer = self._send("POST", path, {}, body, READ_S)
        except NOT_SENT as error:
            raise UnreachableError(f"{what}: {_words(error)}; nothing was launched, try again") from None
        except httpx2.TransportError as error:
            raise _unknown(what, f"{_words(error)} after it was sent") from None
        if answer.status == 429:
            wait_s = self._asked_wait_s(answer)
            hint = f"wait {wait_s:.0f} s" if wait_s else "wait a minute"
            raise UnreachableError(f"{what}: too many requests (429), nothing was launched: {hint}")
        if not 200 <= answer.status < 300 and not (400 <= answer.status < 500 and answer.status != 408):
            raise _unknown(what, f"answered {answer.status}")
        self._refuse(answer, what)
        parsed = _parsed(answer.body)
        if parsed is _BROKEN:
            raise _unknown(what, f"answered {answer.status} with what is not whole JSON")
        return parsed

    def record(self, path: str, **params: Any) -> dict[str, Any]:
        """Read one JSON object."""
        answer = self.read(path, **params)
        if not isinstance(answer, dict):
            raise self.malformed(path, "an object", answer)
        return answer

    def records(self, path: str, key: str, **params: Any) -> list[dict[str, Any]]:
        """Read the list of objects under `key`. One that is no object spoils it: it may be a machine."""
        found = self.record(path, **params).get(key)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise self.malformed(path, f"a list of objects under {key!r}", found)
        return found

    def malformed(self, path: str, expected: str, found: object) -> UnreachableError:
        return UnreachableError(
            f"{self.label}: {path}: expected {expected}, found {_kind(found)}; its API may have changed"
        )

    # ---- sending

    def _retried(self, method: str, path: str, params: Mapping[str, Any], body: Any) -> Any:
        """Patience counts waits in this clock's time and sockets in real time, which is the same thing
        everywhere but in a rehearsal."""
        spent_s, tries = 0.0, 0
        while True:
            tries += 1
            began_s = self._clock.steady_s()
            outcome = self._attempt(method, path, params, body, PATIENCE_S - spent_s)
            spent_s += self._clock.real_s(self._clock.steady_s() - began_s)
            if not isinstance(outcome, _Again):
                return outcome
            wait_s = max(outcome.wait_s or 0.0, _backoff_s(tries))
            if spent_s + wait_s > PATIENCE_S:
                raise self._gave_up(f"{method} {path}", outcome, tries)
            self._clock.sleep(wait_s)
            spent_s += wait_s

    def _gave_up(self, what: str, last: _Again, tries: int) -> UnreachableError:
        times = "once" if tries == 1 else f"{tries} times"
        asks = ""
        if last.wait_s and last.wait_s > QUIET_S:
            asks = f", and asks to wait {last.wait_s:.0f} s"
        return UnreachableError(
            f"{self.label}: {what}: no usable answer, asked {times}; it last {last.why}{asks}; "
            f"try later, or see its status page"
        )

    def _attempt(
        self, method: str, path: str, params: Mapping[str, Any], body: Any, left_s: float
    ) -> Any | _Again:
        try:
            answer = self._send(method, path, params, body, min(READ_S, max(left_s, 2.0)))
        except httpx2.TransportError as error:
            return _Again(f"failed with: {_words(error)}")
        if answer.status in (408, 425, 429) or answer.status >= 500:
            return _Again(f"answered {answer.status}", self._asked_wait_s(answer))
        self._refuse(answer, f"{self.label}: {method} {path}")
        if answer.body == b"" and (answer.status == 204 or method != "GET"):
            return None
        parsed = _parsed(answer.body)
        return _Again("answered with what is not whole JSON") if parsed is _BROKEN else parsed

    def _send(self, method: str, path: str, params: Mapping[str, Any], body: Any, read_s: float) -> _Answer:
        self._wait_until(self._free_at_s)
        began_s = self._clock.steady_s()
        self._free_at_s = began_s + self._spacing_s
        timeout = httpx2.Timeout(read_s, connect=min(CONNECT_S, read_s))
        url = f"{self._url}/{path}" if path else self._url
        with self._client.stream(method, url, params=params, json=body, timeout=timeout) as response:
            content = self._content(response, began_s)
        self._heed_quota(response.headers)
        return _Answer(response.status_code, response.headers, content)

    def _content(self, response: httpx2.Response, began_s: float) -> bytes | None:
        """The whole body; None if it breaks off, is endless, or trickles. The status is known by then."""
        content = bytearray()
        try:
            for chunk in response.iter_bytes():
                content += chunk
                slow = self._clock.real_s(self._clock.steady_s() - began_s) > CONNECT_S + READ_S
                if slow or len(content) > LARGEST_BYTES:
                    return None
        except (httpx2.TransportError, httpx2.DecodingError):
            return None
        return bytes(content)

    # ---- what the answer asks for

    def _wait_until(self, moment_s: float) -> None:
        wait_s = moment_s - self._clock.steady_s()
        if wait_s > 0:
            self._clock.sleep(wait_s)

    def _heed_quota(self, headers: httpx2.Headers) -> None:
        """A quota that is used up and soon renewed is waited for. A longer wait is for a 429 to say, so that
        an end can always be asked for."""
        wait_s = _quota_wait_s(headers)
        if wait_s <= QUIET_S:
            self._free_at_s = max(self._free_at_s, self._clock.steady_s() + wait_s)

    def _asked_wait_s(self, answer: _Answer) -> float | None:
        text = answer.headers.get("Retry-After", "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d*)?", text):
            return float(text)
        if text:
            return self._seconds_until(text, answer.headers)
        return _quota_wait_s(answer.headers) or None

    def _seconds_until(self, date: str, headers: httpx2.Headers) -> float | None:
        """Counted on the provider's own clock where it tells it: ours may be wrong."""
        try:
            then = parsedate_to_datetime(date)
            sent = headers.get("Date")
            now = parsedate_to_datetime(sent) if sent else self._clock.now()
            return max(0.0, (then - now).total_seconds())
        except (ValueError, TypeError):  # no date at all, or one without a zone
            return None

    def _refuse(self, answer: _Answer, what: str) -> None:
        """Raise what a 3xx or 4xx means; return if it is neither."""
        status = answer.status
        if 200 <= status < 300:
            return
        refusal = _refusal(status, answer.body)
        code = refusal.code if refusal.code and self._key not in refusal.code else None
        said = f"{status}, {code}" if code else f"{status}"
        if status in (401, 403):
            raise DeniedError(f"{what}: refused ({said}): check {self._key_variable} and the account")
        if status < 400:
            raise AnswerError(f"{what}: redirected ({said}), which is not followed: check its URL", status)
        if refusal.missing:
            raise MissingError(f"{what}: not there ({said})", status)
        if refusal.full:
            raise NoCapacityError(
                f"{what}: nothing of this kind is free now ({said}): wait, or ask for another"
            )
        hint = HINTS.get(status, "see the provider's console")
        raise AnswerError(f"{what}: refused ({said}): {hint}", status)


# ------------------------------------------------------------------------------------------------------------
# Reading what came


def _parsed(body: bytes | None) -> Any:
    try:
        return json.loads(body or b"", parse_float=Decimal, parse_constant=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        return _BROKEN


def _refusal(status: int, body: bytes | None) -> _Refusal:
    """Lambda says {"error": {"code", ...}}, RunPod a problem object {"title", "status", "detail"}."""
    parsed = _parsed(body)
    if not isinstance(parsed, dict):
        return _Refusal()
    error = parsed.get("error")
    if isinstance(error, dict):
        code = _plain(error.get("code"))
        return _Refusal(
            code,
            missing=status == 404 and code == "global/object-does-not-exist",
            full=bool(code and code.endswith("/insufficient-capacity")),
        )
    code = _plain(parsed.get("title"))
    # RunPod has no code for "nothing free": it is a 400 that only its words tell from a bad request.
    words = str(parsed.get("detail", "")) if status == 400 and not parsed.get("errors") else ""
    known = parsed.get("status") == 404 or isinstance(parsed.get("title"), str)
    return _Refusal(code, missing=status == 404 and known, full=bool(_FULL.search(words)))


_FULL = re.compile(
    r"capacity|out of stock|sold out|no longer any|no (instances|machines|gpus|resources)\b|not enough"
    r"|not have the resources|could not be placed|unavailable",
    re.IGNORECASE,
)


def _plain(code: object) -> str | None:
    """An error code that is fit to print: short words, nothing that looks like a key or a sentence."""
    if not isinstance(code, str) or not re.fullmatch(r"[A-Za-z0-9/ -]{1,60}", code.strip()):
        return None
    return code.strip() if all(len(word) <= 24 for word in re.split(r"[/ -]", code)) else None


def _quota_wait_s(headers: httpx2.Headers) -> float:
    """RateLimit: "minute";r=0;t=12, "hour";r=2800;t=1812 -> 12: until every used-up window is renewed."""
    windows = re.findall(r'"[^"]*"\s*;\s*r=(\d{1,9})\s*;\s*t=(\d{1,9})', headers.get("RateLimit", ""))
    return max((float(t) for r, t in windows if int(r) == 0), default=0.0)


def _backoff_s(tries: int) -> float:
    """Half a second, doubling to a quarter of a minute, less up to half at random."""
    return min(15.0, 0.5 * 2.0 ** min(tries - 1, 10)) * random.uniform(0.5, 1.0)


def _words(error: httpx2.TransportError) -> str:
    match error:
        case httpx2.ConnectTimeout() | httpx2.PoolTimeout():
            return f"no connection within {CONNECT_S:.0f} s"
        case httpx2.TimeoutException():
            return f"no answer within {READ_S:.0f} s"
        case httpx2.ConnectError():
            reason = re.sub(r"[^A-Za-z0-9 _.:,'\[\]-]+", " ", str(error))[:80].strip()
            return f"no connection ({reason})"
        case httpx2.ProxyError():
            return "no connection through the proxy"
        case httpx2.UnsupportedProtocol():
            return "no connection (its URL must start with https://)"
        case _:
            return "the connection broke"


def _unknown(what: str, why: str) -> UnknownOutcomeError:
    return UnknownOutcomeError(
        f"{what}: {why}: a machine may exist and bill; look for its tag before sending another"
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _on_this_machine(url: str) -> bool:
    return httpx2.URL(url).host in THIS_MACHINE
