"""The faults of the proxy, requests, answers, and what a fault does to an answer. No sockets here."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CODES = {
    "301": "PermanentRedirect",
    "403": "AccessDenied",
    "404": "NoSuchBucket",
    "412": "PreconditionFailed",
    "429": "TooManyRequests",
    "500": "InternalError",
    "502": "BadGateway",
    "503": "SlowDown",
}
BESIDE = ("slow", "skew")
BREAKS = ("timeout", "cut", "cut_upload", "cut_body", "truncate", "flip")
Row = tuple[str, str, str, str]  # key, modified, etag, size


@dataclass(eq=False)
class Fault:
    """What goes wrong, and when."""

    kind: str
    on: str = ""
    path: str = ""
    times: int | None = None
    skip: int = 0
    chance: float = 1.0
    code: str = ""
    retry_after: float | None = None
    done: bool = False
    at: float = 0.5
    honest: bool = False
    by_s: float = 0.0
    everything: bool = False
    bytes_per_s: float | None = None
    latency_s: float = 0.0
    hits: int = 0  # how often it struck so far
    snapshot: dict[str, list[Row]] = field(default_factory=dict, repr=False)  # bucket -> its objects
    over: threading.Event = field(default_factory=threading.Event, repr=False)

    def fits(self, request: Request) -> bool:
        return (not self.on or request.verb in self.on.split("|")) and self.path in request.where


@dataclass
class Request:
    """What was asked of the store."""

    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    status: int = 0  # of the answer; 0: none
    fault: str = ""
    at: float = field(default_factory=time.monotonic)

    @property
    def where(self) -> str:
        return unquote(self.target)

    @property
    def verb(self) -> str:
        if self.method == "GET" and "list-type=2" in self.target:
            return "LIST"
        return "COPY" if self.method == "PUT" and "x-amz-copy-source" in self.headers else self.method


@dataclass
class Answer:
    """What the client is told."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    length: int | None = None  # what Content-Length says, where it is not the body's

    def head(self, bodyless: bool) -> bytes:
        length = len(self.body) if self.length is None else self.length
        lines = [f"HTTP/1.1 {self.status} {'OK' if self.status < 300 else 'Not so'}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.status != 204:
            lines.append(f"Content-Length: {length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def refusal(fault: Fault) -> Answer:
    code = fault.code or CODES[fault.kind]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault of the test</Message></Error>"
    headers = [("Content-Type", "application/xml"), ("Date", format_datetime(_now(), usegmt=True))]
    if fault.retry_after is not None:
        headers.append(("Retry-After", f"{fault.retry_after:g}"))
    return Answer(int(fault.kind), headers, body.encode())


def spoil(fault: Fault, answer: Answer) -> None:
    """Change a good answer as the fault does."""
    if fault.kind == "skew":
        _shift(answer, timedelta(seconds=fault.by_s), fault.everything)
    if answer.status >= 300 or not answer.body:
        return
    at = min(int(len(answer.body) * fault.at), len(answer.body) - 1)
    if fault.kind == "flip":
        answer.body = answer.body[:at] + bytes([answer.body[at] ^ 1]) + answer.body[at + 1 :]
    if fault.kind == "truncate" and fault.honest:
        answer.body = answer.body[:at]


def _shift(answer: Answer, by: timedelta, everything: bool) -> None:
    names = ("date", "last-modified") if everything else ("date",)
    answer.headers = [
        (n, format_datetime(parsedate_to_datetime(v) + by, usegmt=True) if n.lower() in names else v)
        for n, v in answer.headers
    ]
    if everything and b"<LastModified>" in answer.body:

        def moved(match: re.Match[bytes]) -> bytes:
            there = datetime.fromisoformat(match[1].decode()) + by
            return f"<LastModified>{there:%Y-%m-%dT%H:%M:%S}.000Z</LastModified>".encode()

        answer.body = re.sub(rb"<LastModified>([^<]+)</LastModified>", moved, answer.body)


def stale(fault: Fault, request: Request) -> Answer:
    """A listing of what was there when the fault began."""
    parts = urlsplit(request.target)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = max(query.get("continuation-token", ""), query.get("start-after", ""))
    rows, folders = [], set()
    for row in fault.snapshot.get(unquote(parts.path).strip("/"), []):
        key = row[0]
        if not key.startswith(prefix) or key <= after:
            continue
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(prefix + rest[: rest.index(delimiter) + 1])
        else:
            rows.append(row)
    return Answer(200, [("Content-Type", "application/xml")], _listing(prefix, rows, folders).encode())


def _listing(prefix: str, rows: list[Row], folders: set[str]) -> str:
    objects = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified><ETag>{escape(etag)}</ETag>"
        f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, modified, etag, size in rows
    )
    common = "".join(
        f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>100000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{objects}{common}</ListBucketResult>"
    )


def _now() -> datetime:
    return datetime.now(UTC)
