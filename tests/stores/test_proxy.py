"""The proving ground itself: the S3 server, and every fault of the proxy does what it says."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import pytest

from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import SIGNED, Bucket

BODY = bytes(range(256)) * 64


class Asker:
    """The plainest client there is, through the proxy."""

    def __init__(self, proxy: FaultyProxy, bucket: str) -> None:
        self.proxy, self.bucket = proxy, bucket

    def ask(
        self, method: str, key: str, body: bytes | None = None, timeout: float = 5
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=timeout)
        try:
            connection.request(method, f"/{self.bucket}{key}", body, {"Authorization": SIGNED})
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


@pytest.fixture
def asker(s3: Bucket, proxy: FaultyProxy) -> Asker:
    s3.put("a/b", BODY)
    return Asker(proxy, s3.bucket)


def test_without_faults_it_only_forwards(asker: Asker, proxy: FaultyProxy, s3: Bucket) -> None:
    assert asker.ask("GET", "/a/b")[1] == BODY
    assert asker.ask("PUT", "/new", b"x")[0].status == 200
    assert s3.get("new") == b"x"
    assert asker.ask("HEAD", "/a/b")[0].headers["Content-Length"] == str(len(BODY))
    assert b"<Key>new</Key>" in asker.ask("GET", "?list-type=2")[1]
    assert [proxy.count(verb) for verb in ("GET", "PUT", "HEAD", "LIST")] == [1, 1, 1, 1]
    assert proxy.count("GET", "a/b") == 1
    assert proxy.sent_bytes >= len(BODY)


@pytest.mark.parametrize("kind", ["500", "503", "403", "429"])
def test_a_status_as_often_as_asked(asker: Asker, proxy: FaultyProxy, kind: str) -> None:
    fault = proxy.add(kind, on="GET", path="a/b", times=2, skip=1, retry_after=3)
    seen = [asker.ask("GET", "/a/b")[0] for _ in range(4)]
    assert [one.status for one in seen] == [200, int(kind), int(kind), 200]
    assert seen[1].headers["Retry-After"] == "3"
    assert fault.hits == 2


def test_faults_name_what_they_hit(asker: Asker, proxy: FaultyProxy) -> None:
    proxy.add("403", on="PUT|DELETE", code="ExpiredToken")
    assert asker.ask("GET", "/a/b")[0].status == 200
    answer, content = asker.ask("PUT", "/c", b"")
    assert answer.status == 403
    assert b"ExpiredToken" in content
    proxy.clear()
    assert asker.ask("PUT", "/c", b"")[0].status == 200


@pytest.mark.parametrize("kind", ["cut", "timeout"])
@pytest.mark.parametrize("done", [False, True])
def test_no_answer_though_it_may_be_done(
    asker: Asker, proxy: FaultyProxy, s3: Bucket, kind: str, done: bool
) -> None:
    proxy.add(kind, on="PUT", done=done)
    with pytest.raises(TimeoutError if kind == "timeout" else ConnectionError):
        asker.ask("PUT", "/late", b"x", timeout=0.5 if kind == "timeout" else 60)
    end = time.monotonic() + 60
    while done and "late" not in s3.sizes():  # it may be under way
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ("late" in s3.sizes()) is done


def test_a_cut_upload_leaves_nothing(asker: Asker, proxy: FaultyProxy, s3: Bucket) -> None:
    proxy.add("cut_upload", on="PUT")
    with pytest.raises(OSError):  # noqa: PT011
        asker.ask("PUT", "/half", b"x" * 4_000_000)
    assert s3.keys() == ["a/b"]


def test_a_cut_download(asker: Asker, proxy: FaultyProxy) -> None:
    proxy.add("cut_body", on="GET", times=1)
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        asker.ask("GET", "/a/b")
    assert asker.ask("GET", "/a/b")[1] == BODY


def test_a_truncated_body_with_either_length(asker: Asker, proxy: FaultyProxy) -> None:
    proxy.add("truncate", on="GET", times=1, at=0.25)
    with pytest.raises(http.client.IncompleteRead) as caught:
        asker.ask("GET", "/a/b")
    assert caught.value.partial == BODY[: len(BODY) // 4]
    proxy.add("truncate", on="GET", times=1, honest=True)
    assert asker.ask("GET", "/a/b")[1] == BODY[: len(BODY) // 2]


def test_a_flipped_bit(asker: Asker, proxy: FaultyProxy) -> None:
    proxy.add("flip", on="GET", at=0.5)
    got = asker.ask("GET", "/a/b")[1]
    assert len(got) == len(BODY)
    assert [i for i in range(len(BODY)) if got[i] != BODY[i]] == [len(BODY) // 2]


def test_a_stale_listing(asker: Asker, proxy: FaultyProxy, s3: Bucket) -> None:
    fault = proxy.add("stale_list")
    s3.put("a/new", b"")
    s3.delete("a/b")
    listing = asker.ask("GET", "?list-type=2&prefix=a%2F")[1]
    assert b"<Key>a/b</Key>" in listing
    assert b"a/new" not in listing
    folders = asker.ask("GET", "?list-type=2&delimiter=%2F")[1]
    assert b"<Prefix>a/</Prefix>" in folders
    assert b"<Key>" not in folders
    proxy.remove(fault)
    assert b"<Key>a/new</Key>" in asker.ask("GET", "?list-type=2")[1]


def test_a_wrong_clock(asker: Asker, proxy: FaultyProxy) -> None:
    right = asker.ask("HEAD", "/a/b")[0].headers
    proxy.add("skew", by_s=3600, everything=True)
    wrong = asker.ask("HEAD", "/a/b")[0].headers
    hour = (
        parsedate_to_datetime(wrong[n]) - parsedate_to_datetime(right[n]) for n in ("Date", "Last-Modified")
    )
    assert all(abs(one.total_seconds() - 3600) < 5 for one in hour)


def ask_again(connection: http.client.HTTPConnection, path: str) -> None:
    connection.request("GET", path, headers={"Authorization": SIGNED})
    connection.getresponse()


def test_down_and_up_again(asker: Asker, proxy: FaultyProxy) -> None:
    idle = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    idle.request("GET", f"/{asker.bucket}/a/b", headers={"Authorization": SIGNED})
    assert idle.getresponse().read() == BODY
    fault = proxy.add("down")
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            asker.ask("GET", "/a/b")
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask_again(idle, f"/{asker.bucket}/a/b")
    proxy.remove(fault)
    assert asker.ask("GET", "/a/b")[1] == BODY


def test_slow_for_all_together(asker: Asker, proxy: FaultyProxy) -> None:
    proxy.add("slow", bytes_per_s=len(BODY) * 8)
    before = time.monotonic()
    many = [threading.Thread(target=asker.ask, args=("GET", "/a/b")) for _ in range(4)]
    for one in many:
        one.start()
    for one in many:
        one.join()
    assert 0.4 < time.monotonic() - before < 20


def test_a_timeout_ends_with_its_fault(asker: Asker, proxy: FaultyProxy) -> None:
    fault = proxy.add("timeout", on="GET")
    threading.Timer(0.2, proxy.remove, (fault,)).start()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        asker.ask("GET", "/a/b", timeout=5)
    assert asker.ask("GET", "/a/b")[1] == BODY


def test_another_process_with_a_client_that_keeps_its_connection(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("503", on="PUT", times=1, retry_after=0)
    program = (
        "import os, obstore\n"
        "from obstore.store import S3Store\n"
        "store = S3Store(os.environ['BUCKET'], endpoint=os.environ['AWS_ENDPOINT_URL'],"
        " client_options={'allow_http': True})\n"
        "big = os.urandom(1) * 11_000_000\n"
        "obstore.put(store, 'big', iter([big]), chunk_size=5 << 20)\n"
        "assert bytes(obstore.get(store, 'big').bytes()) == big\n"
        "obstore.copy(store, 'big', 'copy')\n"
        "assert len(obstore.list(store).collect()) == 2\n"
    )
    import os

    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"BUCKET": s3.bucket}, timeout=60
    )
    assert s3.sizes() == {"big": 11_000_000, "copy": 11_000_000}
    assert proxy.count("COPY", "copy") == 1
    assert urlsplit(proxy.url).hostname == "127.0.0.1"
