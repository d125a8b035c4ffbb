from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from obstore.store import GCSStore

from tests.mirror.published import digest
from tests.stores.canned import Canned
from tests.stores.contract import Contract, racing
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket, serving_apart
from x1_pretrain.errors import UserError
from x1_pretrain.mirror import download
from x1_pretrain.mirror.download import Part
from x1_pretrain.mirror.patience import Patience, get_verified
from x1_pretrain.stores import object_store
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.object_errors import UnsupportedError
from x1_pretrain.stores.object_store import ObjectStore, open_object_store
from x1_pretrain.stores.store import (
    ChangedError,
    DeniedError,
    NotThereError,
    StoreError,
    UnreachableError,
)

KEY, SECRET = "AKIAOFTHISTEST", "secret-of-this-test"


def opened(s3: Bucket, retries: int = 1) -> ObjectStore:
    return open_object_store(parse(f"s3://{s3.bucket}/runs"), None, retries)


class TestContract(Contract):
    @pytest.fixture
    def store(self, s3: Bucket) -> ObjectStore:
        return opened(s3)

    def test_one_of_many_creates(self, store: ObjectStore) -> None:
        """The server of these tests looks and then writes: only Amazon's decides in one step."""
        results = racing(lambda index: store.create("h", b"%d" % index), many=2)
        assert any(isinstance(one, str) for one in results)

    def test_one_of_many_swaps(self, store: ObjectStore) -> None:
        etag = store.create("h", b"0")
        assert any(
            isinstance(one, str) for one in racing(lambda i: store.swap("h", b"%d" % (i + 1), etag), 2)
        )


class TestContractOfTheBucketItself:
    """Without a folder in it."""

    @pytest.fixture
    def store(self, s3: Bucket) -> ObjectStore:
        return open_object_store(parse(f"s3://{s3.bucket}"), s3.url)

    test_listings = Contract.test_listings
    test_what_is_put_comes_back = Contract.test_what_is_put_comes_back
    test_what_is_not_there = Contract.test_what_is_not_there


# ------------------------------------------------------------------------------------------------------------
# What a store can say


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Canned]:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    with Canned() as server:
        yield server


@pytest.fixture
def store(canned: Canned) -> ObjectStore:
    return open_object_store(parse("s3://bucket/runs"), canned.url, retries=0)


CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("k"),
    "read": lambda store: store.read("k", 0, 1),
    "put": lambda store: store.put("k", b"x"),
    "create": lambda store: store.create("k", b"x"),
    "swap": lambda store: store.swap("k", b"x", '"e"'),
    "copy": lambda store: store.copy("k", "l"),
    "names": lambda store: store.names("k"),
    "below": lambda store: list(store.below("k")),
    "delete": lambda store: store.delete(["k"]),
    "large": lambda store: store.put_stream("k", [b"x" * (9 << 20)], 9 << 20),
}
WITH_A_BODY = sorted(CALLS)
SAID = [  # status, the store's own code -> what it means to a mirror
    (403, "AccessDenied", DeniedError, "may not do that; allow them to get, put, delete and list"),
    (403, "InvalidAccessKeyId", DeniedError, "does not know this access key; check AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", DeniedError, "secret key does not belong to the access key"),
    (403, "RequestTimeTooSkewed", DeniedError, "the clock of this machine is too far off"),
    (400, "ExpiredToken", DeniedError, "the credentials have expired"),
    (403, "AuthenticationFailed", DeniedError, "does not accept these credentials"),
    (401, "", DeniedError, "does not accept these credentials"),
    (404, "NoSuchBucket", DeniedError, "there is no such bucket"),
    (404, "ContainerNotFound", DeniedError, "there is no such container"),
    (501, "NotImplemented", UnsupportedError, "this store can't do that"),
    (507, "XMinioStorageFull", DeniedError, "it has no room left"),
    (400, "WhatEver", UnsupportedError, r"refused it \(400 WhatEver\)"),
    (400, "BadDigest", UnreachableError, "the bytes came damaged"),
    (400, "XAmzContentSHA256Mismatch", UnreachableError, "the bytes came damaged"),
    (400, "RequestTimeout", UnreachableError, "waited for bytes"),
    (409, "ConditionalRequestConflict", UnreachableError, "another write was under way"),
    (409, "OperationAborted", UnreachableError, "another write was under way"),
    (429, "", UnreachableError, "answered 429"),
    (500, "InternalError", UnreachableError, "an error of its own"),
    (503, "SlowDown", UnreachableError, "asks to slow down"),
    (502, "", UnreachableError, "answered 502"),
    (599, "", UnreachableError, "answered 599"),
]


def one_line(error: BaseException, canned: Canned) -> None:
    text = str(error) + repr(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 400
    for secret in (KEY, SECRET, canned.url, "127.0.0.1", "Debug", "<", "Signature="):
        assert secret not in text
    assert error.__cause__ is None  # nor in a traceback
    assert error.__suppress_context__


@pytest.mark.parametrize(("status", "code", "kind", "words"), SAID)
def test_what_a_store_says(
    canned: Canned, store: ObjectStore, status: int, code: str, kind: type[StoreError], words: str
) -> None:
    canned.say(status, code)
    for name in WITH_A_BODY:
        with pytest.raises(StoreError) as caught:
            CALLS[name](store)
        assert type(caught.value) is kind, name
        assert re.search(words, str(caught.value)), (name, str(caught.value))
        assert str(caught.value).startswith("s3://bucket/runs"), name
        one_line(caught.value, canned)


def test_a_missing_object_and_a_missing_bucket(canned: Canned, store: ObjectStore) -> None:
    canned.say(404, "NoSuchKey")
    for name in ("get", "read", "copy"):
        with pytest.raises(NotThereError):
            CALLS[name](store)
    with pytest.raises(ChangedError):
        CALLS["swap"](store)
    for name in ("put", "create"):  # they ask for no object
        with pytest.raises(DeniedError, match="no such bucket"):
            CALLS[name](store)


@pytest.mark.parametrize("call", WITH_A_BODY)
def test_the_wrong_region(canned: Canned, store: ObjectStore, call: str) -> None:
    canned.say(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-3"})
    with pytest.raises(DeniedError, match="the bucket is in the region eu-west-3; set AWS_REGION=eu-west-3"):
        CALLS[call](store)
    canned.plain()
    canned.say(400, "AuthorizationHeaderMalformed", "<Region>ap-south-1</Region>")
    with pytest.raises(DeniedError, match="set AWS_REGION=ap-south-1") as caught:
        CALLS[call](store)
    one_line(caught.value, canned)
    canned.plain()
    canned.say(301)
    with pytest.raises(DeniedError, match="in another region; set AWS_REGION to the one its page shows"):
        CALLS[call](store)


def test_a_body_that_ends_early(canned: Canned, store: ObjectStore) -> None:
    store.put("k", b"x" * 1000)
    canned.say(200, on="GET")
    with pytest.raises(UnreachableError):
        store.read("k", 0, 10)


def test_a_body_is_signed_with_its_hash(canned: Canned, store: ObjectStore) -> None:
    """So that a store which checks signatures refuses one that came damaged, on every S3-compatible store."""
    store.put("k", b"hello")
    (put,) = [one for one in canned.requests if one.method == "PUT"]
    assert put.headers["x-amz-content-sha256"] == hashlib.sha256(b"hello").hexdigest()
    assert "x-amz-content-sha256" in put.headers["authorization"]
    assert not [name for name in put.headers if "checksum" in name or "sdk" in name]


def test_amazon_is_asked_to_keep_the_checksum(canned: Canned) -> None:
    mine, amazons = (open_object_store(parse("s3://bucket/runs"), url) for url in (canned.url, None))
    assert amazons._small.config["checksum_algorithm"] == "SHA256"
    assert "checksum_algorithm" not in mine._small.config


def test_a_store_may_be_asked_to_keep_checksums(
    s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "SHA256")
    store, data = opened(s3), bytes(range(256)) * 50_000
    store.put("small", b"x")
    store.put_stream("large", [data], len(data))
    store.copy("large", "copied")
    assert store.get("copied")[0] == data
    sent = [one for one in proxy.requests if one.verb == "PUT"]
    sums = {one.headers["x-amz-checksum-sha256"] for one in sent}
    parts = (b"x", data[: object_store.PART_BYTES], data[object_store.PART_BYTES :])
    assert sums == {b64encode(hashlib.sha256(part).digest()).decode() for part in parts}


def test_nothing_shows_the_credentials(canned: Canned, store: ObjectStore) -> None:
    assert SECRET not in repr(store) + str(store) + store.label
    assert KEY not in repr(store)


# ------------------------------------------------------------------------------------------------------------
# Other stores


def google(canned: Canned) -> ObjectStore:
    limits = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    config = {"base_url": canned.url, "bearer_token": "t"}
    client = GCSStore("bucket", prefix="runs", config=config, **limits)
    return ObjectStore(parse("gs://bucket/runs"), client, lambda _: client, None)


def test_google_takes_one_write_a_second_of_an_object(canned: Canned, store: ObjectStore) -> None:
    assert google(canned).every_s_at_least == 1.0
    assert store.every_s_at_least == 0.0


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_key_that_is_refused_keeps_no_other(canned: Canned, store: ObjectStore, scheme: str) -> None:
    canned.say(501, code="NotImplemented", on="POST")
    store = google(canned) if scheme == "gs" else store
    for key in "abcd":
        store.put(key, b"1")
    canned.say(403, code="AccessDenied", on="DELETE", path="/a")
    canned.say(403, code="AccessDenied", on="DELETE", path="/c")
    with pytest.raises(DeniedError, match=r"runs/a: .*may not do that"):
        store.delete([*"abcd", "none"])
    assert sorted(path.rpartition("/")[2] for path in canned.objects) == ["a", "c"]


def test_google_swaps_by_generation(canned: Canned) -> None:
    store = google(canned)
    etag = store.create("h", b"1")
    assert etag == store.stat("h").etag == store.get("h")[1].etag == "1001"
    with pytest.raises(ChangedError):
        store.create("h", b"1")
    assert store.swap("h", b"2", etag) == "1002"
    with pytest.raises(ChangedError):
        store.swap("h", b"3", etag)
    assert store.get("h")[0] == b"2"
    store.delete(["h"])
    with pytest.raises(NotThereError):
        store.get("h")


def test_azure(canned: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", canned.url)
    store = open_object_store(parse("az://container/runs"), None, 0)
    etag = store.create("h", b"1")
    assert etag == store.stat("h").etag
    with pytest.raises(ChangedError):  # Azure says it with 409
        store.create("h", b"1")
    second = store.swap("h", b"2", etag)
    with pytest.raises(ChangedError):
        store.swap("h", b"3", etag)
    assert store.get("h") == (b"2", store.stat("h"))
    assert store.stat("h").etag == second


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.mark.usefixtures("bare")
def test_without_an_account_of_azure() -> None:
    with pytest.raises(UserError, match="no storage account; set AZURE_STORAGE_ACCOUNT_NAME") as caught:
        open_object_store(parse("az://container/x"), None)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("bare")
def test_with_a_key_file_of_google_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/none.json")
    with pytest.raises(UserError, match="can't be read; set GOOGLE_APPLICATION_CREDENTIALS") as caught:
        open_object_store(parse("gs://bucket/x"), None)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("bare")
def test_an_endpoint_is_for_s3_alone() -> None:
    with pytest.raises(UserError, match=r"mirror.endpoint is for s3:// alone"):
        open_object_store(parse("gs://bucket/x"), "https://s3.example.com")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("status", [404, 403, 500])
def test_without_credentials(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """The machine's own role is asked for; here is none."""
    with Canned() as metadata, Canned() as server:
        metadata.say(status)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata.url)
        store = open_object_store(parse("s3://bucket/x"), server.url, 0)
        with pytest.raises(DeniedError, match="no credentials that work; set AWS_ACCESS_KEY_ID") as caught:
            store.get("k")
        assert server.requests == []
        one_line(caught.value, metadata)


@pytest.mark.usefixtures("bare")
def test_without_credentials_and_nobody_to_ask_for_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(
                UserError, match="s3://bucket/x: no credentials that work; set AWS_ACCESS_KEY_ID"
            ):
                open_object_store(parse("s3://bucket/x"), "http://127.0.0.1:1")
            patch.setenv("AWS_SKIP_SIGNATURE", "true")
            open_object_store(parse("s3://bucket/x"), "http://127.0.0.1:1")


# ------------------------------------------------------------------------------------------------------------
# A bad network


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in (object_store.SMALL, object_store.LARGE):
        monkeypatch.setitem(limits, "timeout", 1)
        monkeypatch.setitem(limits, "retry_timeout", 1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["timeout", "cut", "cut_upload", "cut_body", "500", "down"])
def test_a_network_that_breaks(s3: Bucket, proxy: FaultyProxy, kind: str) -> None:
    store = opened(s3, retries=0)
    store.put("k", b"x" * 1000)
    writes, reads = ("put", "create"), ("get", "names")  # an answer to a write has no body to cut
    calls = {"cut_upload": writes, "cut_body": reads, "timeout": ("create",)}.get(kind, writes + reads)
    proxy.add(kind)
    for name in calls:
        begun = time.monotonic()
        with pytest.raises(UnreachableError) as caught:
            CALLS[name](store)
        assert time.monotonic() - begun < 15  # of 20 s that a small request has
        assert "\n" not in str(caught.value)
        assert "127.0.0.1" not in str(caught.value)
    proxy.clear()
    assert store.get("k")[1].bytes in (1, 1000)


def test_it_tries_again(s3: Bucket, proxy: FaultyProxy) -> None:
    store = opened(s3, retries=2)
    store.put("k", b"x")
    for kind in ("503", "cut"):
        fault = proxy.add(kind, times=2)
        assert store.get("k")[0] == b"x"
        assert fault.hits == 2
    proxy.add("500", times=3)
    with pytest.raises(UnreachableError):
        store.get("k")


def test_a_large_object_that_fails_is_given_up(s3: Bucket, proxy: FaultyProxy) -> None:
    """What becomes of a part that was under way is the server's affair: this one breaks over some."""
    store = opened(s3, retries=0)
    proxy.add("500", on="PUT", path="partNumber=2")
    with pytest.raises(UnreachableError):
        store.put_stream("large", [b"x" * (10 << 20)] * 3, 30 << 20)
    with pytest.raises(RuntimeError):
        store.put_stream("large", (_raise() if i == 2 else b"x" * (10 << 20) for i in range(3)), 30 << 20)
    assert proxy.count("DELETE", "uploadId") == 2
    assert s3.keys() == []


def _raise() -> bytes:
    raise RuntimeError


def test_a_store_that_loses_a_part_is_found_out(s3: Bucket, proxy: FaultyProxy) -> None:
    store = opened(s3)
    with pytest.raises(UnreachableError, match="bytes are there, not 1000; send it again"):
        store._sent(store.put("k", b"x" * 999).key, 1000)


@pytest.mark.usefixtures("impatient")
def test_a_large_object_to_a_dead_store_ends(s3: Bucket, proxy: FaultyProxy) -> None:
    store = opened(s3)
    proxy.add("timeout", on="PUT|DELETE")
    begun = time.monotonic()
    with pytest.raises(UnreachableError):
        store.put_stream("large", [b"x" * (10 << 20)] * 3, 30 << 20)
    assert time.monotonic() - begun < 30  # of 50 s that a part has


@pytest.mark.slow
def test_a_slow_line_gets_more_time(
    s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """0.2 MB/s, with a second for fifty: three files of a checkpoint, a backlog of rows, and back."""
    monkeypatch.setattr(download, "READ_S", download.READ_S / 50)
    for limits in (object_store.SMALL, object_store.LARGE):
        monkeypatch.setitem(limits, "timeout", limits["timeout"] / 50)
    monkeypatch.setitem(object_store.LARGE, "retry_timeout", object_store.LARGE["retry_timeout"] / 50)
    sizes, store = (12 << 20, 9 << 20, 6 << 20), opened(s3, retries=0)
    slow = proxy.add("slow", bytes_per_s=0.2e6 * 50)
    tries: Counter[int] = Counter()

    def send(index: int) -> None:
        while tries[index] < 6:
            tries[index] += 1
            with suppress(UnreachableError):
                store.put_stream(f"k{index}", [bytes([index]) * sizes[index]], sizes[index])
                return

    racing(send, 3)
    assert [s3.sizes()[f"runs/k{index}"] for index in range(3)] == list(sizes)
    assert max(tries.values()) < 5
    print(f"tries: {dict(tries)}, then {store._limit_s * 50:.0f} s for a part")
    rows = b"r" * (4 << 20)
    store.put("rows", rows)
    patience = Patience()
    many = racing(lambda _: get_verified(store, "rows", digest(rows), patience, size=len(rows)), 2)
    assert many == [rows] * 2
    parts = [Part(f"k{index}", f"k{index}", size) for index, size in enumerate(sizes)]
    before = proxy.sent_bytes
    download.download(opened(s3, retries=0), parts, tmp_path, "k", lambda _: None, 8, patience)
    assert all((tmp_path / f"k{i}").read_bytes() == bytes([i]) * size for i, size in enumerate(sizes))
    assert proxy.sent_bytes - before < 1.2 * sum(sizes)  # hardly a byte for nothing
    proxy.remove(slow)
    for _ in range(3):
        store.put_stream("k", [bytes(64 << 20)], 64 << 20)
    assert store._limit_s == object_store.LARGE["timeout"]


def test_threads_share_a_store(s3: Bucket) -> None:
    store = opened(s3)

    def work(index: int) -> bool:
        data = bytes([index]) * 9_000_000
        store.put_stream(f"k{index}", [data], len(data))
        return store.read(f"k{index}", 0, len(data)) == data

    assert racing(work, 4) == [True] * 4
    assert threading.active_count() < 100


# ------------------------------------------------------------------------------------------------------------
# Memory and time, for real

SENDER = """
import resource, sys
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.opened import open_store
store = open_store(parse(sys.argv[1]), None)
store.put("warm", b"x" * 1000)
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
before = resident()
store.put_stream("large", (bytes([i % 256]) * (4 << 20) for i in range(75)), 300 << 20)
print(resident() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_apart() as url:
        bucket = Bucket(url)
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-c", SENDER, f"s3://{bucket.bucket}/runs"]
        grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert bucket.sizes()["runs/large"] == 300 << 20
    parts = object_store.PARTS_AT_ONCE * object_store.PART_BYTES / 2**20
    assert grown < 3 * parts, grown


@pytest.mark.slow
def test_a_dead_connection_is_known_within_a_minute(s3: Bucket, proxy: FaultyProxy) -> None:
    store = open_object_store(parse(f"s3://{s3.bucket}/runs"), None)
    store.put("k", b"x" * 1000)
    proxy.add("timeout")

    def timed(index: int) -> float:
        begun = time.monotonic()
        with pytest.raises(UnreachableError):
            (CALLS["large"], CALLS["get"], CALLS["create"], CALLS["read"])[index](store)
        return time.monotonic() - begun

    taken = racing(timed, 4)
    assert all(isinstance(one, float) and one < 66 for one in taken), taken
