"""A small HTTP server that plays scripted answers and keeps what it was asked, and the providers' own schemas
to hold both against."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jsonschema import Draft202012Validator
from tests.conftest import REPOSITORY

from x1_pretrain.money.clock import Clock

KEY = "secret_x1_0123456789abcdef"
TOKEN = "tok-5e1f-never-show-this"  # stands for whatever a body holds that nobody may read


@dataclass(frozen=True)
class WaitingClock(Clock):
    """A clock whose sleeps take no time, and are kept."""

    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def steady_s(self) -> float:
        return time.monotonic() + sum(self.slept)

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=sum(self.slept))


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: Any = None  # bytes are sent as they are, anything else as JSON
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    then: str = (
        "close"  # "break": end the connection before the body is whole; "hang": send nothing; "trickle"
    )

    @property
    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return b"" if self.body is None else json.dumps(self.body).encode()


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any
    reply: Reply


class Server:
    """Plays `script` in order, the last reply again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.script: list[Reply] = []
        self.asked: list[Asked] = []

    def plays(self, *replies: Reply) -> Server:
        self.script = list(replies)
        return self

    def fresh(self) -> Server:
        self.script, self.asked = [], []
        return self

    def next_reply(self) -> Reply:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


@contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(size)
            url = urlsplit(self.path)
            reply = server.next_reply()
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = json.loads(sent) if sent else None
            server.asked.append(Asked(self.command, url.path, parse_qs(url.query), headers, body, reply))
            time.sleep(reply.delay_s)
            if reply.then == "hang":
                return
            self.send_response_only(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if "Transfer-Encoding" not in reply.headers and reply.status != 204:
                self.send_header(
                    "Content-Length", str(len(reply.content) + (9 if reply.then == "break" else 0))
                )
            self.end_headers()
            if reply.then == "trickle":
                self.trickle(reply.content)
            else:
                self.wfile.write(reply.content)

        def trickle(self, content: bytes) -> None:
            with suppress(ConnectionError):  # whoever asked has left
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class Api:
    """A provider's OpenAPI file: which requests it takes, and which answers it may give."""

    def __init__(self, name: str) -> None:
        folder = Path(os.environ.get("X1_SHARED", REPOSITORY.parent / "shared"))
        file = folder / "providers" / name
        self.document = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def check(self, server: Server) -> None:
        """Every request that was sent, and every answer with a declared status that was played to it."""
        for asked in server.asked if self.document else []:
            operation = self._operation(asked.method.lower(), asked.path)
            self.check_request(operation, asked)
            self.check_answer(operation, asked.reply)

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        for template, operations in self.document["paths"].items():
            pattern = re.sub(r"\\\{.*?\\\}", "[^/]+", re.escape(template))
            if re.fullmatch(pattern, path) and method in operations:
                return dict(operations[method])
        raise AssertionError(f"the API has no {method} {path}")

    def check_request(self, operation: dict[str, Any], asked: Asked) -> None:
        declared = {self._whole(p)["name"]: self._whole(p)["schema"] for p in operation.get("parameters", [])}
        for name, values in asked.query.items():
            assert name in declared, f"{name} is no parameter of {asked.method} {asked.path}"
            schema = self._whole(declared[name])
            value: Any = [values[0]] if schema.get("type") == "array" else values[0]
            self.validate(int(values[0]) if schema.get("type") == "integer" else value, schema)
        if "requestBody" in operation:
            content = self._whole(operation["requestBody"])["content"]
            self.validate(asked.body, content["application/json"]["schema"])
        else:
            assert asked.body is None, f"{asked.method} {asked.path} takes no body"

    def check_answer(self, operation: dict[str, Any], reply: Reply) -> None:
        if isinstance(reply.body, bytes):  # broken on purpose
            return
        responses = operation["responses"]
        found = responses.get(str(reply.status), responses.get("default"))
        assert found is not None, f"status {reply.status} is not declared"
        content = self._whole(found).get("content")
        if content:
            self.validate(reply.body, next(iter(content.values()))["schema"])
        else:
            assert reply.body is None

    def validate(self, instance: Any, schema: dict[str, Any]) -> None:
        Draft202012Validator({**schema, "components": self.document["components"]}).validate(instance)

    def _whole(self, part: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in part:
            found: Any = self.document
            for key in part["$ref"].removeprefix("#/").split("/"):
                found = found[key]
            part = found
        return part


def broken(body: Any, status: int = 200, **more: Any) -> Reply:
    """An answer that the API would never give: it is not held against the schema."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status, content, **more)


@contextmanager
def refused_port() -> Iterator[str]:
    """An address of this machine that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def discreet(error: BaseException, log: str = "") -> str:
    """The error's line, after making sure that it is one, and that nothing secret got into it or the log."""
    line = str(error)
    assert line
    assert "\n" not in line
    for secret in (KEY, TOKEN, "jupyter_token", "Bearer"):
        assert secret not in line + repr(error) + log
    assert error.__cause__ is None  # a request hangs on httpx2's own errors, and on it the key
    assert error.__context__ is None or error.__suppress_context__
    return line
