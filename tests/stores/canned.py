"""A small HTTP server of objects that answers as it is told: for what a real S3 server can't be made to say.

    with Canned() as server:
        server.say(403, code="ExpiredToken", on="PUT")       # until server.plain()
        server.conditional = "ignored"                        # or "refused", "kept"
        server.requests[-1].body

It keeps objects by path; it knows enough of S3, of Google's XML interface (generations) and of Azure's blobs.
"""

from __future__ import annotations

import email.utils
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    on: str = ""
    path: str = ""
    times: int | None = None


class Canned:
    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}  # path -> content, generation
        self.answers: list[Answer] = []
        self.requests: list[Asked] = []
        self.conditional = "kept"
        self._lock = threading.Lock()
        self._generation = 1000
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Canned:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def say(self, status: int, code: str = "", inner: str = "", on: str = "", **more: Any) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message>{inner}</Error>"
        self.answers.append(Answer(status, body.encode() if code else b"", on=on, **more))

    def plain(self) -> None:
        self.answers.clear()

    def answer(self, asked: Asked) -> Answer:
        with self._lock:
            self.requests.append(asked)
            for one in self.answers:
                if asked.method in (one.on or asked.method).split("|") and one.path in asked.path:
                    if one.times is not None:
                        one.times -= 1
                        if one.times <= 0:
                            self.answers.remove(one)
                    return one
            return getattr(self, f"_{asked.method.lower()}")(asked)

    def _put(self, asked: Asked) -> Answer:
        path = asked.path.split("?")[0]
        there, asks = self.objects.get(path), asked.headers
        must_be_new = asks.get("if-none-match") == "*" or asks.get("x-goog-if-generation-match") == "0"
        wanted = asks.get("if-match") or asks.get("x-goog-if-generation-match")
        if self.conditional == "refused" and (must_be_new or wanted):
            return Answer(501, b"<Error><Code>NotImplemented</Code></Error>")
        if self.conditional == "kept":
            if must_be_new and there:
                azure = "x-ms-version" in asks
                return Answer(409, b"<Error><Code>BlobAlreadyExists</Code></Error>") if azure else Answer(412)
            if wanted and not must_be_new and (not there or wanted not in _versions(*there)):
                return Answer(412)
        self._generation += 1
        self.objects[path] = (asked.body, self._generation)
        return Answer(201 if "x-ms-version" in asks else 200, headers=_headers(*self.objects[path]))

    def _get(self, asked: Asked) -> Answer:
        found = self.objects.get(asked.path.split("?")[0])
        if not found:
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data, headers = found[0], _headers(*found)
        if "range" in asked.headers:
            first, last = (int(part) for part in asked.headers["range"].removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            return Answer(206, data[first : last + 1], headers)
        return Answer(200, data, headers)

    _head = _get

    def _delete(self, asked: Asked) -> Answer:
        missing = self.objects.pop(asked.path.split("?")[0], None) is None
        return Answer(404 if missing else 204)

    def _post(self, asked: Asked) -> Answer:
        if "?delete" not in asked.path:
            return Answer(501)
        bucket = asked.path.split("?")[0]
        keys = [part.split("<")[0] for part in asked.body.decode().split("<Key>")[1:]]
        for key in keys:
            self.objects.pop(f"{bucket}/{key}", None)
        rows = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return Answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        canned = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one packet: else the client waits 40 ms for the second

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                parts = urlsplit(self.path)
                path = unquote(parts.path) + (f"?{parts.query}" if parts.query else "")
                answer = canned.answer(Asked(self.command, path, headers, body))
                self.send_response_only(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _versions(data: bytes, generation: int) -> tuple[str, str]:
    return f'"{hashlib.md5(data).hexdigest()}-{generation}"', str(generation)


def _headers(data: bytes, generation: int) -> dict[str, str]:
    return {
        "ETag": _versions(data, generation)[0],
        "x-goog-generation": str(generation),
        "Last-Modified": email.utils.formatdate(usegmt=True),
    }
