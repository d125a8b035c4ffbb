"""The fake provider's sockets: requests read, answers written, late or never where a fault wants it so."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from x1_pretrain.money.providers.fake.catalog import Answer, Call

LARGEST_BODY_BYTES = 4_000_000
LATE = "X-Fake-Late"  # not sent: real seconds that an answer is kept back


class Silence(NamedTuple):
    """No answer: the socket is held for so many real seconds, then closed."""

    hold_s: float


class Server(ThreadingHTTPServer):
    """`answer` is asked for each request: the API's root, the rest, the Authorization header."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        port: int,
        answer: Callable[[str, Call, str], Answer | Silence],
        stated: Callable[[], datetime],
        leaving: threading.Event,
    ) -> None:
        self.answer, self.stated, self.leaving = answer, stated, leaving
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in mid-answer is everyday here; anything else is a fault of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body leave together: in two pieces a client waits 40 ms for the second
    disable_nagle_algorithm = True
    server_version, sys_version = "x1-fake", ""

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_DELETE = do_PATCH = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `state` counts requests, and a URL in a log helps nobody."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header goes by the provider's clock, right or wrong."""
        return super().date_time_string(self.server.stated().timestamp())

    def _handle(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(min(length, LARGEST_BODY_BYTES))
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None  # which no route takes for what it needs
        root, parts = _below_root([unquote(part) for part in url.path.split("/") if part])
        if not root:
            return self._send(Answer(404, {"error": "there are /api/v1, /v2, /graphql and /fake"}))
        call = Call(self.command, parts, dict(parse_qsl(url.query)), body)
        answer = self.server.answer(root, call, self.headers.get("Authorization", ""))
        if isinstance(answer, Silence):
            self.server.leaving.wait(answer.hold_s)
            self.close_connection = True
            return None
        return self._send(answer)

    def _send(self, answer: Answer) -> None:
        headers = dict(answer.headers)
        self.server.leaving.wait(float(headers.pop(LATE, 0)))
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        data = b"" if answer.body is None else text.encode()
        self.send_response(answer.status)
        if data:
            headers["Content-Type"] = answer.content_type
        if answer.status != 204:
            headers["Content-Length"] = str(len(data))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _below_root(parts: list[str]) -> tuple[str, tuple[str, ...]]:
    """Which API a path is of, and what of it: instances/abc."""
    for root in ("api/v1", "v2", "graphql", "fake"):
        depth = root.count("/") + 1
        if "/".join(parts[:depth]) == root:
            return root, tuple(parts[depth:])
    return "", ()
