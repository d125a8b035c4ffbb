"""A real S3 server on loopback, for tests: moto's, in a thread of this process, or in one of its own.

    with serving() as url: ...                       # in this process
    with serving_apart() as url: ...                 # in a process of its own: for timings
    python -m tests.stores.s3                        # prints its address, serves until its input ends

`Bucket` looks past any proxy and past our own store code: what is really there.
"""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode, urlsplit

REGION = "us-east-1"


@dataclass
class Bucket:
    """An empty bucket of a server, and the environment in which the AWS conventions lead to it."""

    url: str  # of the server itself
    bucket: str = field(default_factory=lambda: f"x1-{uuid.uuid4().hex[:12]}")

    def __post_init__(self) -> None:
        self.ask("PUT", "")

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def ask(self, method: str, key: str, body: bytes = b"", query: str = "") -> bytes:
        """The body of the answer; HTTPError-like trouble is an AssertionError: the server is ours."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        path = f"/{self.bucket}/{quote(key)}" if key else f"/{self.bucket}"
        try:
            connection.request(method, path + ("?" + query if query else ""), body, {"Authorization": SIGNED})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status == 404 and method != "PUT":
            raise KeyError(key)
        assert answer.status < 300, (method, key, answer.status, content)
        return content

    def get(self, key: str) -> bytes:
        return self.ask("GET", key)

    def put(self, key: str, data: bytes) -> None:
        self.ask("PUT", key, data)

    def close(self) -> None:
        """The bucket and all in it, gone."""
        for key in self.keys():
            self.delete(key)
        self.ask("DELETE", "")

    def delete(self, key: str) -> None:
        self.ask("DELETE", key)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every key and the size of its object."""
        return {key: int(size) for key, _, _, size in listed(self.url, self.bucket) if key.startswith(prefix)}

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(self.sizes(prefix))


# moto reads the account from a signature of this shape, and never checks it.
SIGNED = (
    f"AWS4-HMAC-SHA256 Credential=testing/20260101/{REGION}/s3/aws4_request, SignedHeaders=host, Signature=0"
)


def listed(url: str, bucket: str) -> list[tuple[str, str, str, str]]:
    """(key, modified, etag, size) of every object, in the order of keys."""
    parts, found, more = urlsplit(url), [], ""
    while True:
        query = {"list-type": "2"} | ({"continuation-token": more} if more else {})
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        connection.request("GET", f"/{bucket}?{urlencode(query)}", headers={"Authorization": SIGNED})
        tree = ElementTree.fromstring(connection.getresponse().read())
        connection.close()
        space = tree.tag[: tree.tag.index("}") + 1] if tree.tag.startswith("{") else ""
        for one in tree.iter(f"{space}Contents"):
            row = [one.findtext(space + name) or "" for name in ("Key", "LastModified", "ETag", "Size")]
            found.append((row[0], row[1], row[2], row[3]))
        more = tree.findtext(f"{space}NextContinuationToken") or ""
        if not more:
            return sorted(found)


def buckets(url: str) -> list[str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    connection.request("GET", "/", headers={"Authorization": SIGNED})
    content = connection.getresponse().read().decode()
    connection.close()
    return re.findall(r"<Bucket>.*?<Name>([^<]+)</Name>", content, re.DOTALL)


@contextmanager
def serving() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def serving_apart() -> Iterator[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.stores.s3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield child.stdout.readline().strip()
    finally:
        child.stdin.close()
        child.wait(timeout=20)


def wait_for(condition: object, within_s: float = 10.0, every_s: float = 0.02) -> None:
    """Until `condition()` is true; AssertionError if it does not become so."""
    assert callable(condition)
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(every_s)


if __name__ == "__main__":
    with serving() as address:
        print(address, flush=True)
        sys.stdin.read()
