"""An HTTP proxy that breaks things on purpose, in front of a store. Any process on this machine can use it.

    with FaultyProxy(s3.url) as proxy:          # proxy.url is the endpoint to use
        fault = proxy.add("503", on="PUT|COPY", path="head.json", times=2, retry_after=1)
        ...
        proxy.remove(fault)                     # or proxy.clear(); both while it runs, from any thread
        proxy.count("PUT", "head.json")         # requests so far; proxy.requests has every one

`on` names verbs: GET HEAD PUT POST DELETE, and of S3 also LIST (a listing), COPY (a PUT that copies); empty
is any. `path` is a part of the path with its query, unquoted. `times` is how often (None: until removed),
`skip` how many matching requests pass first, `chance` the share that is hit (drawn with the proxy's seed).
The first fault in the list that matches a request hits it; `slow` and `skew` act beside another one.

    500 502 503 429   that status; retry_after: seconds, sent as a header
    403 404 412 301   that status; code: AccessDenied, ExpiredToken, RequestTimeTooSkewed, NoSuchBucket, ...
    timeout           never answers (done=True: what was asked is done nevertheless); ends with the fault
    cut               connection reset before the answer (done=True: it is done nevertheless; ambiguous)
    cut_upload        connection reset in the middle of the request's body
    cut_body          connection reset in the middle of the answer's body; at: the share that arrives (0.5)
    truncate          the body ends early and cleanly; honest=True: its Content-Length says so too
    flip              one bit of a body is another; at: where (0.5)
    stale_list        listings are those of the moment the fault was added
    skew              the Date header is off by `by_s`; everything=True: Last-Modified and listings too
    slow              all traffic together has `bytes_per_s`; `latency_s` before each answer
    down              nobody listens: connection refused; open connections are reset
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import urlsplit

from tests.stores.faults import BESIDE, BREAKS, CODES, Answer, Fault, Request, refusal, spoil, stale
from tests.stores.s3 import buckets, listed

PIECE = 1 << 16
HOP = ("connection", "transfer-encoding", "content-length", "keep-alive")


class CutError(Exception):
    """The connection ends here, without a word."""


class FaultyProxy:
    """Forwards to `target`, but for its faults. Threads of this process; close() ends them."""

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = target
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.sent_bytes = 0  # of bodies, to the clients
        self.received_bytes = 0
        self._lock = threading.RLock()
        self._random = random.Random(seed)
        self._open: set[socket.socket] = set()
        self._free_at = 0.0  # when the slow link has carried what it was given
        self._closing = threading.Event()
        self._listener = _bound(0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._listen()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what tests say

    def add(self, kind: str, **how: object) -> Fault:
        known = (*CODES, *BESIDE, *BREAKS, "stale_list", "down")
        assert kind in known, f"{kind} is none of {', '.join(known)}"
        fault = Fault(kind, **how)  # type: ignore[arg-type]
        if kind == "stale_list":
            fault.snapshot = {bucket: listed(self.target, bucket) for bucket in buckets(self.target)}
        with self._lock:
            if kind == "down" and not self._is_down():
                self._refuse()
            self.faults.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        with self._lock:
            if fault not in self.faults:
                return
            self.faults.remove(fault)
            fault.over.set()
            if fault.kind == "down" and not self._is_down() and not self._closing.is_set():
                self._listen()

    def clear(self) -> None:
        for fault in list(self.faults):
            self.remove(fault)

    def count(self, on: str = "", path: str = "") -> int:
        """How many such requests there were so far."""
        wanted = Fault("cut", on, path)
        with self._lock:
            return sum(wanted.fits(one) for one in self.requests)

    def close(self) -> None:
        self._closing.set()
        self.clear()
        self._refuse()
        self._listener.close()

    # ---- sockets

    def _is_down(self) -> bool:
        return any(one.kind == "down" for one in self.faults)

    def _listen(self) -> None:
        self._listener.listen(128)
        threading.Thread(
            target=self._accept, args=(self._listener,), name="faulty-proxy", daemon=True
        ).start()

    def _refuse(self) -> None:
        """Close, and keep the port: bound, but nobody listens."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._listener = _bound(self.port)
        with self._lock:
            for connection in list(self._open):
                _reset(connection)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = connection.makefile("rb")
        try:
            while not self._closing.is_set() and self._one(connection, stream):
                pass
        except CutError:
            _reset(connection)
        except (OSError, ValueError, http.client.HTTPException):
            pass  # the client went away, or was sent away
        finally:
            with self._lock:
                self._open.discard(connection)
            stream.close()
            with contextlib.suppress(OSError):
                connection.close()

    # ---- one request

    def _one(self, connection: socket.socket, stream: BinaryIO) -> bool:
        """Answer the next request; False when the connection is over."""
        request = _read_head(stream)
        if request is None:
            return False
        faults = self._struck(request)
        broken = next((one for one in faults if one.kind not in BESIDE), None)
        self._read_body(request, connection, stream, broken, faults)
        if broken and broken.kind in ("timeout", "cut", "down") and not broken.done:
            self._silence(broken)
        if broken and broken.kind in CODES:
            answer = refusal(broken)
        elif broken and broken.kind == "stale_list":
            answer = stale(broken, request)
        else:
            answer = self._forward(request)
        if broken and broken.kind in ("timeout", "cut"):
            self._silence(broken)
        request.status = answer.status
        for fault in faults:
            spoil(fault, answer)
        return self._send(connection, request, answer, broken, faults)

    def _struck(self, request: Request) -> list[Fault]:
        """Note the request; the faults that hit it."""
        with self._lock:
            self.requests.append(request)
            hit: list[Fault] = []
            for fault in list(self.faults):
                full = fault.kind not in BESIDE and any(one.kind not in BESIDE for one in hit)
                if not full and self._hits(fault, request):
                    hit.append(fault)
            request.fault = next((one.kind for one in hit if one.kind not in BESIDE), "")
            return hit

    def _hits(self, fault: Fault, request: Request) -> bool:
        if fault.kind == "stale_list" and request.verb != "LIST":
            return False
        if fault.kind in ("flip", "truncate", "cut_body") and request.method == "HEAD":
            return False
        if not fault.fits(request) or (fault.times is not None and fault.hits >= fault.times):
            return False
        if fault.skip > 0:
            fault.skip -= 1
            return False
        if fault.chance < 1 and self._random.random() >= fault.chance:
            return False
        fault.hits += 1
        return True

    def _read_body(
        self,
        request: Request,
        connection: socket.socket,
        stream: BinaryIO,
        broken: Fault | None,
        faults: list[Fault],
    ) -> None:
        if request.headers.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(request.headers.get("content-length", 0))
        cut_at = int(length * broken.at) if broken and broken.kind == "cut_upload" else None
        pieces: list[bytes] = []
        for piece in _pieces(stream, request):
            pieces.append(piece)
            self._carry(len(piece), faults)
            if cut_at is not None and sum(map(len, pieces)) >= cut_at:
                raise CutError
        if cut_at is not None:
            raise CutError
        request.body = b"".join(pieces)
        with self._lock:
            self.received_bytes += len(request.body)

    def _carry(self, count: int, faults: list[Fault]) -> None:
        """Wait until the slow link, which all connections share, has carried so many bytes."""
        rate = min((one.bytes_per_s for one in faults if one.bytes_per_s), default=None)
        if rate is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / rate
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))

    def _silence(self, fault: Fault) -> None:
        """The connection of a request that gets no answer."""
        if fault.kind == "timeout":
            fault.over.wait()
        raise CutError

    def _forward(self, request: Request) -> Answer:
        parts = urlsplit(self.target)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        left_out = ("connection", "transfer-encoding", "expect", "content-length", "proxy-connection")
        headers = {name: value for name, value in request.headers.items() if name not in left_out}
        if request.body or request.method in ("PUT", "POST"):
            headers["content-length"] = str(len(request.body))
        try:
            connection.request(request.method, request.target, request.body or None, headers)
            answer = connection.getresponse()
            body = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP]
            declared = answer.getheader("Content-Length") if request.method == "HEAD" else None
            return Answer(answer.status, kept, body, int(declared) if declared else None)
        finally:
            request.body = b""  # the note of the request need not keep it
            connection.close()

    def _send(
        self,
        connection: socket.socket,
        request: Request,
        answer: Answer,
        broken: Fault | None,
        faults: list[Fault],
    ) -> bool:
        time.sleep(sum(one.latency_s for one in faults))
        connection.sendall(answer.head(bodyless=request.method == "HEAD"))
        if request.method == "HEAD":
            return True
        body, ends = answer.body, None
        if broken and broken.kind in ("cut_body", "truncate") and not broken.honest:
            ends = int(len(body) * broken.at)
        for start in range(0, len(body[:ends]), PIECE):
            piece = body[start : min(start + PIECE, len(body) if ends is None else ends)]
            self._carry(len(piece), faults)
            connection.sendall(piece)
            with self._lock:
                self.sent_bytes += len(piece)
        if ends is not None and broken and broken.kind == "cut_body":
            raise CutError
        return ends is None


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


def _reset(connection: socket.socket) -> None:
    """End it as a dead machine's firewall does: RST instead of FIN, and whoever reads from it wakes up."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def _read_head(stream: BinaryIO) -> Request | None:
    first = stream.readline(65536).decode("latin-1").split()
    if len(first) != 3:
        return None
    headers: dict[str, str] = {}
    while (line := stream.readline(65536).decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    target = first[1]
    if target.startswith("http://"):  # asked as a forward proxy
        target = target[target.index("/", len("http://")) :]
    return Request(first[0], target, headers)


def _pieces(stream: BinaryIO, request: Request) -> Iterator[bytes]:
    """The body as it comes, of a given length or in HTTP's chunks."""
    if "chunked" not in request.headers.get("transfer-encoding", ""):
        yield from _exactly(stream, int(request.headers.get("content-length", 0)))
        return
    while (length := int(stream.readline().split(b";")[0], 16)) > 0:
        yield from _exactly(stream, length)
        stream.readline()
    while stream.readline().strip():
        pass


def _exactly(stream: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0:
        piece = stream.read(min(PIECE, length))
        if not piece:
            raise ConnectionError("the client went away")
        length -= len(piece)
        yield piece
