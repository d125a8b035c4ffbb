from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stores.canned import Canned
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror import preflight as preflight_module
from x1_pretrain.mirror.heads import write
from x1_pretrain.mirror.preflight import preflight
from x1_pretrain.stores import folder_store
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import ChangedError, DeniedError, NotThereError, Store, UnreachableError


def refused(store: Store, words: str, without_lease: bool = False) -> str:
    with pytest.raises(RefusedError, match=words) as caught:
        preflight(store, "x1-50m", without_lease, sleep=lambda s: None)
    text = str(caught.value)
    assert "\n" not in text
    assert "preflight-" not in text
    assert text.startswith(f"mirror {store.label}")
    return text


def end_requests(proxy: FaultyProxy) -> None:
    """Those that nobody waits for any more."""
    proxy.clear()
    for thread in threading.enumerate():
        if thread.name == "x1-preflight":
            thread.join(10)
            assert not thread.is_alive()


def test_a_good_bucket(s3: Bucket) -> None:
    store = open_store(parse(f"s3://{s3.bucket}/runs"), None)
    preflight(store, "x1-50m", without_lease=False)
    assert store.conditional
    assert s3.keys() == []


def test_a_good_folder(tmp_path: Path) -> None:
    store = open_store(parse(str(tmp_path / "runs")), None)
    preflight(store, "x1-50m", without_lease=False)
    assert store.names() == []


@pytest.mark.parametrize("name", ["data", "trash"])
def test_a_name_that_the_mirror_needs(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"run '{name}': the mirror keeps something else under that name"):
        preflight(FolderStore(tmp_path), name, without_lease=False)


def test_no_such_bucket(s3: Bucket) -> None:
    store = open_store(parse("s3://no-bucket-of-this-name/runs"), None)
    refused(store, "there is no such bucket; make it, or correct its name")


def test_nobody_there(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("down")
    slept: list[float] = []
    store = open_store(parse(f"s3://{s3.bucket}/runs"), None, retries=0)
    with pytest.raises(RefusedError, match=r"nobody listens there .*; check the network and mirror.endpoint"):
        preflight(store, "x1-50m", without_lease=False, sleep=slept.append)
    assert slept == [1.0, 3.0]


@pytest.mark.parametrize("done", [False, True])
def test_a_store_that_accepts_connections_and_never_answers(
    s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    monkeypatch.setattr(preflight_module, "FIRST_S", 0.3)
    store = open_store(parse(f"s3://{s3.bucket}/runs"), None)
    proxy.add("timeout", done=done)
    begun = time.monotonic()
    refused(store, r"no answer within 0.3 s; check the network and mirror.endpoint")
    assert time.monotonic() - begun < 10  # of 20 s that a request has
    while done and not s3.keys():
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    end_requests(proxy)
    assert s3.keys() == []  # what it made all the same is removed


def test_a_store_that_breaks_off_and_then_never_answers(
    s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the removal of what may be there ends in time, and nothing is begun after that."""
    monkeypatch.setattr(preflight_module, "FIRST_S", 0.5)
    proxy.add("timeout", on="POST|DELETE")
    proxy.add("cut", on="PUT")
    slept: list[float] = []
    begun = time.monotonic()
    with pytest.raises(RefusedError, match="check the network"):
        preflight(open_store(parse(f"s3://{s3.bucket}/runs"), None, 0), "x1-50m", False, sleep=slept.append)
    assert time.monotonic() - begun < 10
    assert slept == []
    end_requests(proxy)


def test_a_slow_store_is_none_that_never_answers(
    s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_module, "FIRST_S", 1.0)  # for the first answer, also on a busy machine
    proxy.add("slow", latency_s=0.12)
    begun = time.monotonic()
    preflight(open_store(parse(f"s3://{s3.bucket}/runs"), None), "x1-50m", without_lease=False)
    assert time.monotonic() - begun > preflight_module.FIRST_S
    assert s3.keys() == []


def test_an_unknown_server(s3: Bucket) -> None:
    store = open_store(parse(f"s3://{s3.bucket}/runs"), "http://no-such-host.invalid:9", 0)
    refused(store, "check the network and mirror.endpoint")


def test_a_short_outage_is_waited_for(s3: Bucket, proxy: FaultyProxy) -> None:
    fault = proxy.add("503")
    store = open_store(parse(f"s3://{s3.bucket}/runs"), None, retries=0)
    preflight(store, "x1-50m", without_lease=False, sleep=lambda s: proxy.remove(fault))
    assert fault.hits > 0
    assert s3.keys() == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("AccessDenied", "these credentials may not do that; allow them to get, put, delete and list"),
        ("ExpiredToken", "the credentials have expired; get new ones"),
        ("InvalidAccessKeyId", "does not know this access key"),
        ("RequestTimeTooSkewed", "the clock of this machine is too far off; set it"),
    ],
)
def test_credentials_that_may_not(s3: Bucket, proxy: FaultyProxy, code: str, words: str) -> None:
    proxy.add("403", code=code)
    refused(open_store(parse(f"s3://{s3.bucket}/runs"), None, 0), words)


def test_credentials_that_may_only_read(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("403", on="PUT|POST|DELETE")
    refused(open_store(parse(f"s3://{s3.bucket}/runs"), None, 0), "may not do that")
    assert s3.keys() == []


def test_credentials_that_may_not_list(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("403", on="GET", path="-none")
    refused(
        open_store(parse(f"s3://{s3.bucket}/runs"), None, 0), "may not list the bucket.*allow s3:ListBucket"
    )
    assert s3.keys() == []


def test_credentials_that_may_not_delete(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("403", on="DELETE|POST")
    refused(open_store(parse(f"s3://{s3.bucket}/runs"), None, 0), "allow deleting")


def test_a_store_that_knows_no_deletion_of_many(s3: Bucket) -> None:
    with Canned() as server:
        server.say(501, code="NotImplemented", on="POST")
        store = open_store(parse(f"s3://{s3.bucket}/runs"), server.url, 0)
        preflight(store, "x1-50m", without_lease=False)
        assert server.objects == {}


def test_the_wrong_region(s3: Bucket) -> None:
    with Canned() as server:
        server.say(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-3"})
        store = open_store(parse(f"s3://{s3.bucket}/runs"), server.url, 0)
        refused(store, "the bucket is in the region eu-west-3; set AWS_REGION=eu-west-3")


def test_bytes_that_come_back_changed(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("flip", on="GET")
    refused(open_store(parse(f"s3://{s3.bucket}/runs"), None, 0), "gives back other bytes")


def test_answers_that_are_lost(s3: Bucket, proxy: FaultyProxy) -> None:
    """The write is done, nobody hears of it, the library asks again: that is no store without conditions."""
    for skip in (0, 1, 2, 3, 4):
        fault = proxy.add("cut", on="PUT", times=1, skip=skip, done=True)
        store = open_store(parse(f"s3://{s3.bucket}/runs"), None, retries=2)
        preflight(store, "x1-50m", without_lease=False, sleep=lambda s: None)
        assert store.conditional
        assert fault.hits == 1 or skip > 2
        proxy.clear()


# ------------------------------------------------------------------------------------------------------------
# Conditional writes


@pytest.fixture
def plain(s3: Bucket) -> Iterator[Canned]:
    with Canned() as server:
        yield server


@pytest.mark.parametrize("how", ["ignored", "refused"])
def test_a_store_without_conditional_writes(plain: Canned, how: str) -> None:
    plain.conditional = how
    store = open_store(parse("s3://bucket/runs"), plain.url, 0)
    refused(store, r"can't keep two writers apart .*mirror.without_lease: true if nothing else will")
    store = open_store(parse("s3://bucket/runs"), plain.url, 0)
    preflight(store, "x1-50m", without_lease=True)
    assert not store.conditional
    assert plain.objects == {}
    etag = write(store, "x1-50m", b"1", None)  # from then on it looks first: enough for one writer
    write(store, "x1-50m", b"2", etag)
    assert store.get("x1-50m/head.json")[0] == b"2"
    with pytest.raises(ChangedError):
        write(store, "x1-50m", b"3", etag)


def test_a_store_that_guards_creation_but_not_replacement(plain: Canned) -> None:
    store = open_store(parse("s3://bucket/runs"), plain.url, 0)
    swap = store.swap

    def unguarded(key: str, data: bytes, etag: str) -> str:
        return store.put(key, data).etag

    store.swap = unguarded  # type: ignore[method-assign]
    refused(store, "can't keep two writers apart")
    store.swap = swap  # type: ignore[method-assign]
    assert plain.objects == {}


def test_a_network_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_store, "file_system", lambda path: "sshfs")
    refused(FolderStore(tmp_path / "runs"), "can't keep two writers apart")
    preflight(FolderStore(tmp_path / "runs"), "x1-50m", without_lease=True)


# ------------------------------------------------------------------------------------------------------------
# Folders


def test_a_disk_that_is_not_there(tmp_path: Path) -> None:
    refused(FolderStore(tmp_path / "mnt/disk"), "no folder .*/mnt; mount the disk, or make the folder")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(FolderStore(tmp_path / "file"), "a file is there, where a folder should be")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(FolderStore(tmp_path), "this user may not")


# ------------------------------------------------------------------------------------------------------------
# One bad call at a time, on a store that is good otherwise


class Odd(FolderStore):
    """`how[name]` is done instead of the call."""

    def __init__(self, root: Path, **how: Callable[..., object]) -> None:
        super().__init__(root)
        for name, done in how.items():
            setattr(self, name, done)


def _say(error: Exception) -> Callable[..., object]:
    def say(*_: object) -> object:
        raise error

    return say


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("create", UnreachableError("{}: x"), "check the network"),
        ("put", DeniedError("{}: no put"), "no put"),
        ("read", UnreachableError("{}: short"), "short"),
        ("read", NotThereError("{}: gone"), "gone"),
        ("delete", DeniedError("{}: no"), "no; old checkpoints could never be removed there"),
    ],
)
def test_any_call_that_fails(tmp_path: Path, name: str, error: Exception, words: str) -> None:
    store = Odd(tmp_path / "runs", **{name: _say(type(error)(str(error).format(tmp_path / "runs")))})
    refused(store, words)


@pytest.mark.parametrize("name", ["create", "swap"])
def test_a_write_that_is_done_and_denied(tmp_path: Path, name: str) -> None:
    """A library that asks again after a lost answer finds its own write in the way."""
    store = Odd(tmp_path / "runs")
    write, times = getattr(store, name), []

    def done(*what: object) -> object:
        times.append(what)
        result = write(*what)
        if len(times) == 1:
            raise ChangedError("it was we")
        return result

    setattr(store, name, done)
    preflight(store, "x1-50m", without_lease=False)
    assert store.conditional
    assert len(times) == 2


def test_what_is_deleted_stays(tmp_path: Path) -> None:
    refused(Odd(tmp_path / "runs", delete=lambda keys: None), "keeps what is deleted")


def test_it_answers_for_everything(tmp_path: Path) -> None:
    store = Odd(tmp_path / "runs")
    get, known = store.get, []

    def answer(key: str):  # type: ignore[no-untyped-def]
        known.append(key)
        return get(key.removesuffix("-none"))

    store.get = answer  # type: ignore[method-assign]
    refused(store, "answers for objects that are not there")
    assert any(key.endswith("-none") for key in known)
