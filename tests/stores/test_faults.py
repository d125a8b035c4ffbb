"""Every store through every fault: a call gives the right bytes or one of our errors, in bounded time.

A write that ended in an error left the old content, the new one, or nothing: never a part of it. A wrong byte
may pass only where no hash is known: `get` and `read` of a bucket, whose callers compare with the hashes in
the head and in chunks.json.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

from tests.stores.hub import File, serving_hub
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket
from x1_pretrain.stores import object_store
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.hub_store import HubStore
from x1_pretrain.stores.store import ChangedError, DeniedError, Store, StoreError, UnreachableError

OLD, NEW = random.Random(1).randbytes(3000), random.Random(2).randbytes(3000)
LARGE = random.Random(3).randbytes((5 << 20) + 700_000)  # two parts
READS = ("get", "read", "stat", "below", "names", "now")
WRITES = ("put", "put_stream", "create", "swap", "copy", "delete")
BOUND_S = 20.0
FAULTS: dict[str, dict[str, Any]] = {
    "500": {},
    "503": {},
    "503 with Retry-After": {"retry_after": 1},
    "429": {"retry_after": 1},
    "502": {},
    "403": {},
    "403 ExpiredToken": {"code": "ExpiredToken"},
    "403 RequestTimeTooSkewed": {"code": "RequestTimeTooSkewed"},
    "301": {},
    "404": {},
    "timeout": {},
    "timeout, done": {"done": True},
    "cut": {},
    "cut, done": {"done": True},
    "cut_upload": {},
    "cut_body": {},
    "truncate": {},
    "truncate, honest": {"honest": True},
    "flip": {},
    "stale_list": {},
    "skew": {"by_s": 86_400, "everything": True},
    "slow": {"bytes_per_s": 4e6, "latency_s": 0.05},
    "down": {},
}
QUICK = ("503 with Retry-After", "403 ExpiredToken", "cut, done", "cut_body", "truncate", "down")
DAMAGE = ("flip", "truncate, honest")  # a body is other than it was, and nothing in the answer says so


@dataclass
class Place:
    """A store, the proxy before it, and what is really behind it."""

    store: Store
    proxy: FaultyProxy
    truth: Callable[[], dict[str, bytes]]
    knows_hashes: bool
    etag: str = ""


@pytest.fixture
def bucket(s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    for limits in (object_store.SMALL, object_store.LARGE):
        monkeypatch.setitem(limits, "timeout", 2)
        monkeypatch.setitem(limits, "retry_timeout", 4)
    store = object_store.open_object_store(parse(f"s3://{s3.bucket}/runs"), proxy.url, 1)

    def truth() -> dict[str, bytes]:
        keys = [key for key in s3.keys("runs/") if ".x1-mirror" not in key]
        return {key.removeprefix("runs/"): s3.get(key) for key in keys}

    return Place(store, proxy, truth, knows_hashes=False)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("HF_TOKEN", "writer")
    with serving_hub() as hub, FaultyProxy(hub.url) as proxy:
        hub.new("models/user/runs")
        store = HubStore(parse("hf://user/runs"), proxy.url, 1, timeout_s=2.0)

        def truth() -> dict[str, bytes]:
            store.close()
            return hub.files()

        yield Place(store, proxy, truth, knows_hashes=True)
        close_session()


def prepared(place: Place) -> Place:
    for name in READS + WRITES:
        place.store.put(f"{name}/old", OLD)
    place.etag = place.store.create("swap/head", OLD)
    return place


def call(place: Place, name: str) -> object:
    """The call, and of reads what they gave."""
    store = place.store
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: store.get("get/old")[0],
        "read": lambda: store.read("read/old", 100, 2000),
        "stat": lambda: store.stat("stat/old").bytes,
        "below": lambda: [(meta.key, meta.bytes) for meta in store.below("below")],
        "names": lambda: store.names("names"),
        "now": store.now,
        "put": lambda: store.put("put/old", NEW).bytes,
        "put_stream": lambda: store.put_stream("put_stream/new", [LARGE[:99], LARGE[99:]], len(LARGE)).bytes,
        "create": lambda: store.create("create/new", NEW),
        "swap": lambda: store.swap("swap/head", NEW, place.etag),
        "copy": lambda: store.copy("copy/old", "copy/new"),
        "delete": lambda: store.delete(["delete/old"]),
    }
    return calls[name]()


RIGHT: dict[str, object] = {
    "get": OLD,
    "read": OLD[100:2000],
    "stat": 3000,
    "below": [("below/old", 3000)],
    "names": ["old"],
    "put": 3000,
    "put_stream": len(LARGE),
}
AFTER: dict[str, tuple[str, bytes | None, bytes | None]] = {  # key, content before, content after
    "put": ("put/old", OLD, NEW),
    "put_stream": ("put_stream/new", None, LARGE),
    "create": ("create/new", None, NEW),
    "swap": ("swap/head", OLD, NEW),
    "copy": ("copy/new", None, OLD),
    "delete": ("delete/old", OLD, None),
}


def timed(place: Place, name: str) -> tuple[object, StoreError | None, float]:
    """Anything but a StoreError goes through, and fails the test."""
    before = time.monotonic()
    try:
        return call(place, name), None, time.monotonic() - before
    except StoreError as error:
        return None, error, time.monotonic() - before


def judged(
    place: Place, fault: str, names: tuple[str, ...], done: dict[str, Any]
) -> dict[str, StoreError | None]:
    truth = place.truth()
    for name in names:
        value, error, took_s = done[name]
        assert took_s < BOUND_S, (name, took_s)
        if error is not None:
            check_error(name, fault, error)
        elif name in RIGHT and not (fault in DAMAGE and name in ("get", "read", "stat", "below", "names")):
            assert value == RIGHT[name], name
        elif fault in DAMAGE and place.knows_hashes and name == "get":
            assert value == OLD
        if name in AFTER:
            key, before, after = AFTER[name]
            assert truth.get(key) in ((before, after) if error else (after,)), (name, error)
    assert not set(truth) - {f"{name}/old" for name in READS + WRITES} - {one[0] for one in AFTER.values()}
    return {name: done[name][1] for name in names}


def check_error(name: str, fault: str, error: StoreError) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 400, text
    assert not any(secret in text for secret in ("testing-secret", "Signature", "Bearer")), text
    if isinstance(error, ChangedError):  # only of a write that was in truth done, and then made again
        assert "done" in fault, (name, text)
        assert name in ("create", "swap")


def run(place: Place, fault: str, **more: Any) -> dict[str, StoreError | None]:
    prepared(place)
    place.truth()
    place.proxy.add(fault.split(",")[0].split(" ")[0], **FAULTS[fault], **more)
    with ThreadPoolExecutor(len(READS + WRITES)) as pool:
        done = dict(zip(READS + WRITES, pool.map(lambda one: timed(place, one), READS + WRITES), strict=True))
    place.proxy.clear()
    return judged(place, fault, READS + WRITES, done)


SLOW = [pytest.param(fault, marks=[] if fault in QUICK else [pytest.mark.slow]) for fault in FAULTS]


@pytest.mark.parametrize("fault", SLOW)
def test_a_bucket_and_a_fault_that_stays(bucket: Place, fault: str) -> None:
    errors = run(bucket, fault)
    if fault.startswith("403"):
        assert all(isinstance(error, DeniedError) for name, error in errors.items() if name != "now"), errors
    if fault in ("down", "500", "503", "timeout", "cut"):
        assert all(isinstance(error, UnreachableError) for error in errors.values()), errors
    if fault in ("skew", "slow", "stale_list"):
        assert not any(errors.values()), errors


@pytest.mark.parametrize("fault", SLOW)
def test_a_repository_and_a_fault_that_stays(repository: Place, fault: str) -> None:
    errors = run(repository, fault)
    if fault in ("down", "500", "503", "timeout", "cut"):
        staged = ("put", "delete", "now")  # wait for a commit; the clock is known for a while
        assert all(isinstance(errors[name], UnreachableError) for name in errors if name not in staged), (
            errors
        )
    if fault in ("skew", "slow"):
        assert not any(errors.values()), errors


PASSES = ("500", "503", "503 with Retry-After", "cut", "cut_body", "truncate")


@pytest.mark.parametrize("name", READS + WRITES)
@pytest.mark.parametrize("fault", [pytest.param(one, marks=[pytest.mark.slow]) for one in PASSES])
def test_a_bucket_and_a_fault_that_passes(bucket: Place, fault: str, name: str) -> None:
    """One bad answer is not even seen, but for a write that may have been done."""
    prepared(bucket)
    bucket.proxy.add(fault.split(" ")[0], **FAULTS[fault], times=1)
    value, error, _ = timed(bucket, name)
    judged(bucket, fault, (name,), {name: (value, error, 0.0)})
    assert error is None or isinstance(error, UnreachableError)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_bucket_with_all_of_it_at_once(bucket: Place, seed: int) -> None:
    """Rounds of everything against faults that come and go: no round ends in a lie."""
    prepared(bucket)
    rounds = random.Random(seed)
    for _ in range(4):
        for fault in rounds.sample(["500", "503", "cut", "cut_body", "truncate", "cut_upload", "slow"], 3):
            bucket.proxy.add(fault, **FAULTS[fault], chance=0.3)
        with ThreadPoolExecutor(6) as pool:
            done = dict(zip(READS, pool.map(lambda one: timed(bucket, one), READS), strict=True))
        bucket.proxy.clear()
        judged(bucket, "all", READS, done)


# ------------------------------------------------------------------------------------------------------------
# A folder: its faults are those of a disk


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS", "EACCES", "ESTALE", "EDQUOT"])
@pytest.mark.parametrize("at", ["write", "fsync", "replace", "pread"])
def test_a_folder_on_a_bad_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, code: str) -> None:
    number = getattr(errno, code)

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    store = FolderStore(tmp_path / "mirror")
    place = Place(store, None, lambda: held(tmp_path / "mirror"), knows_hashes=False)  # type: ignore[arg-type]
    prepared(place)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fails) if at == "replace" else broken.setattr(f"os.{at}", fails)
        done = {name: timed(place, name) for name in READS + WRITES}
    errors = judged(place, "disk", READS + WRITES, done)
    touched = {"pread": ("read",)}.get(at, ("put", "put_stream", "create", "swap", "copy"))
    assert all(errors[name] is not None for name in touched), errors
    kind = UnreachableError if code in ("EIO", "ESTALE") else DeniedError
    assert all(isinstance(errors[name], kind) for name in touched), errors
    assert not list((tmp_path / "mirror" / ".x1-mirror" / "writing").iterdir())


def held(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".x1-mirror" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_file_that_was_cut_short_behind_our_back(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "mirror")
    store.put("a", OLD)
    (tmp_path / "mirror" / "a").write_bytes(OLD[:1000])
    with pytest.raises(UnreachableError, match="not 1900"):
        store.read("a", 100, 2000)


def test_a_repository_never_takes_damage_for_content(repository: Place) -> None:
    """The Hub tells the hash of everything, so `get` is never wrong, whatever came."""
    prepared(repository)
    repository.store.close()
    for fault in ("flip", "truncate, honest"):
        struck = repository.proxy.add(fault.split(",")[0], on="GET", path="/blobs/", **FAULTS[fault])
        with pytest.raises(UnreachableError, match="not what the Hub says"):
            repository.store.get("get/old")
        repository.proxy.remove(struck)
        assert repository.store.get("get/old")[0] == OLD


def test_the_files_of_the_fake_hub_are_as_large_as_they_say() -> None:
    assert len(File(OLD, lfs=True).info("a", dated=False)["lfs"]["oid"]) == 64
