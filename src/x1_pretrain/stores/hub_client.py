"""How the mirror talks to the Hugging Face Hub: time limits, what is asked again, errors as a store's.

`huggingface_hub` waits without a limit and repeats by itself, up to minutes. It lets a program give it the
HTTP client it uses; this one ends every request in bounded time and repeats only what can't do harm.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from huggingface_hub import get_session, get_token, is_offline_mode, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars

from x1_pretrain.stores.store import DeniedError, NotThereError, StoreError, UnreachableError

AGAIN = (408, 425, 429, 500, 502, 503, 504)
WAITS_AT_MOST_S = 15.0  # for a Hub that says when to come again; longer is the mirror's own backoff
PATIENCE_S = 40.0  # no request is made again later than this
NO_ROOM = (402, 413, 507)
NOT_THERE = ("EntryNotFound", "RepoNotFound", "RevisionNotFound")

_preparing, _prepared = threading.Lock(), (-1, 0.0)


class TroubleError(Exception):
    """The Hub did not answer, or asked to come again. No subclass of what the library repeats on."""

    def __init__(self, why: str, again_s: float | None = None) -> None:
        super().__init__(why)
        self.again_s = again_s


class ConflictError(UnreachableError):
    """Somebody committed to the repository first."""


class Client(httpx2.Client):
    """What `huggingface_hub` sends its requests with."""

    def __init__(self, retries: int, timeout_s: float) -> None:
        super().__init__(follow_redirects=True, timeout=httpx2.Timeout(timeout_s, connect=5.0))
        self._retries = retries
        self.told: tuple[datetime, float] | None = None  # the last Date header, and when it came

    def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
        request.extensions["timeout"] = self.timeout.as_dict()  # the library asks for none here and there
        until, tries = time.monotonic() + PATIENCE_S, self._retries if _harmless(request) else 0
        for nth in range(tries + 1):
            try:
                return self._once(request, **how)
            except TroubleError as trouble:
                wait = trouble.again_s if trouble.again_s is not None else 0.3 * 2.0**nth
                if nth == tries or wait > WAITS_AT_MOST_S or time.monotonic() + wait > until:
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _once(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
        try:
            response = super().send(request, **how)
        except (httpx2.RequestError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
            raise TroubleError(why_not(error)) from None
        if response.status_code in AGAIN:
            response.close()
            raise TroubleError(_status(response), _again_s(response))
        with suppress(ValueError):
            told = parsedate_to_datetime(response.headers.get("date", ""))
            self.told = told.astimezone(UTC), time.monotonic()
        return response


def prepare(retries: int, timeout_s: float) -> None:
    """Let the library use this client from now on, in this process. A factory that is set anew closes the
    client of requests that are under way."""
    global _prepared
    with _preparing:
        if _prepared == (retries, timeout_s):
            return
        set_client_factory(lambda: Client(retries, timeout_s))
        _prepared = retries, timeout_s
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is an error of ours
    disable_progress_bars()


def last_date() -> tuple[datetime, float] | None:
    """The Hub's clock as its newest answer told it, and when that was."""
    client = get_session()
    return client.told if isinstance(client, Client) else None


def _harmless(request: httpx2.Request) -> bool:
    """Asking twice does what asking once does, and the body can be sent twice."""
    path = request.url.path
    if request.method in ("GET", "HEAD"):
        return True
    if request.method == "POST":
        return "/commit/" not in path and not path.endswith("/repos/create")
    return False


def _status(response: httpx2.Response) -> str:
    if response.status_code != 429:
        return f"the Hub answers {response.status_code}"
    again = _again_s(response)
    return "the Hub's rate limit is reached" + (f"; it asks to wait {again:.0f} s" if again else "")


def _again_s(response: httpx2.Response) -> float | None:
    """When to come again, as told in seconds: Retry-After, or the reset of a rate limit that is used up."""
    told = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", told):
        return float(told)
    used_up = re.search(r"r=0\s*;\s*t=(\d+)", response.headers.get("ratelimit", ""))
    return float(used_up[1]) if used_up and response.status_code == 429 else None


def why_not(error: BaseException) -> str:
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        return "the Hub can't be reached"
    if isinstance(error, httpx2.TimeoutException):
        return "the Hub did not answer in time"
    return "the connection to the Hub broke"


def refuse_offline(where: str) -> None:
    if is_offline_mode():
        raise DeniedError(f"{where}: HF_HUB_OFFLINE is set; unset it to use a mirror on the Hub")


@contextmanager
def said(where: str) -> Iterator[None]:
    """Errors of the library, whatever they are, as a store's."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise translated(error, where) from None


def translated(error: BaseException, where: str) -> StoreError:
    cause: BaseException | None = error
    while cause is not None:  # a failed upload comes wrapped
        if isinstance(cause, TroubleError):
            return UnreachableError(f"{where}: {cause}")
        if isinstance(cause, HfHubHTTPError | httpx2.HTTPStatusError):
            return _refused(cause.response, where)
        if isinstance(cause, httpx2.HTTPError | httpx2.StreamError):
            return UnreachableError(f"{where}: {why_not(cause)}")
        cause = cause.__cause__
    logging.getLogger(__name__).debug("no error of the Hub", exc_info=error)
    return UnreachableError(f"{where}: the Hub's answer can't be read ({type(error).__name__})")


def _refused(response: httpx2.Response, where: str) -> StoreError:
    status, code = response.status_code, response.headers.get("x-error-code", "")
    if status in (409, 412):
        return ConflictError(f"{where}: somebody else committed first")
    if code in NOT_THERE:  # a 404 of something else on the way is no word about the object
        return NotThereError(f"{where}: not there")
    if status == 401 and get_token() is None:
        return DeniedError(
            f"{where}: the Hub asks who you are; set HF_TOKEN to a token that may write, or `hf auth login`"
        )
    if status == 401:
        return DeniedError(f"{where}: the Hub does not accept this token; set HF_TOKEN to one that is valid")
    if status == 403:
        return DeniedError(
            f"{where}: this token may not do that; use one with the right to write to that repository"
        )
    if status in NO_ROOM:
        return DeniedError(f"{where}: no room there, or too large for it (status {status})")
    if status in (206, 416):
        return UnreachableError(f"{where}: it is shorter than expected")
    return DeniedError(f"{where}: the Hub refuses (status {status})")
