"""Fetching a checkpoint: exactly what was published, or nothing under its name; never a byte twice."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.published import CHUNK, Counting, Mirrored, content, digest, make_checkpoint, publish
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket, serving_apart, wait_for
from x1_pretrain.errors import INTERRUPTED, RefusedError
from x1_pretrain.mirror import fetch, patience
from x1_pretrain.mirror.download import Progress
from x1_pretrain.mirror.fetch import fetch_checkpoint
from x1_pretrain.mirror.patience import AGAIN_S, AwayError, UnusableError
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.checkpoint_files import needs_and_has, verify_folder
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import DeniedError, NotThereError, UnreachableError


@pytest.fixture
def run(tmp_path: Path) -> Mirrored:
    return Mirrored(FolderStore(tmp_path / "mirror"), tmp_path / "originals")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "TELL_S", 0.05)


def quiet(_: str) -> None:
    pass


def test_it_comes_back_as_it_was(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    said: list[str] = []
    path = fetch_checkpoint(run.store, run.name, one, tmp_path / "here", said.append)
    assert path == tmp_path / "here" / "step-000000100"
    assert content(path) == content(run.originals / path.name)
    assert verify_folder(path) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert said[0].startswith("fetching the checkpoint of step 100: 0 bytes of 60.1 kB")


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    chunk=st.sampled_from([1, 7, 1000, 4096]),
    lanes=st.integers(1, 9),
    left=st.integers(0, 2**32),
)
def test_any_sizes_and_whatever_an_earlier_fetch_left(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    chunk: int,
    lanes: int,
    left: int,
) -> None:
    """What was left may be anything: right in parts, too long, or of another checkpoint."""
    base = tmp_path_factory.mktemp("any")
    store = FolderStore(base / "mirror")

    rng = random.Random(left)

    def write(target: Path) -> None:
        for number, size in enumerate(sizes):
            (target / f"part-{number}").write_bytes(rng.randbytes(min(size, 300 * chunk)))
        (target / "model.safetensors").write_bytes(b"w")
        (target / "state.json").write_text(json.dumps({"step": 7, "run_id": "r"}))

    original = checkpoint_files.publish(base / "originals", 7, "r", write)
    one = publish(store, "tiny", "e1/step", original, chunk)
    partial = base / "here" / ".fetching-step-000000007"
    partial.mkdir(parents=True)
    for file in original.iterdir():
        data = bytearray(file.read_bytes())
        for _ in range(rng.randrange(3)):
            if data:
                data[rng.randrange(len(data))] ^= 1
        (partial / file.name).write_bytes(
            bytes(data[: rng.randrange(len(data) + 1)]) + b"x" * rng.randrange(3)
        )
    (partial / "of-another").write_bytes(b"?")
    (partial / "folder").mkdir()
    path = fetch_checkpoint(store, "tiny", one, base / "here", quiet, lanes=lanes)
    assert content(path) == content(original)


def test_it_goes_on_where_it_broke_off(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    store, here = Counting(run.store), tmp_path / "here"
    store.instead = {number: DeniedError("403 in the middle") for number in range(6, 1000)}
    with pytest.raises(DeniedError):
        fetch_checkpoint(store, run.name, one, here, quiet, lanes=1)
    assert not (here / "step-000000100").exists()
    assert len(store.reads) == 7
    again = Counting(run.store)
    path = fetch_checkpoint(again, run.name, one, here, quiet, lanes=3)
    assert content(path) == content(run.originals / path.name)
    assert set(again.reads).isdisjoint(store.reads[:6])  # nothing twice
    total = sum(end - start for _, start, end in store.reads[:6] + again.reads)
    assert total == sum(f.stat().st_size for f in path.iterdir() if f.name != "manifest.json")


def test_a_damaged_object_is_asked_for_again_and_then_given_up(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    key = run.key(one, "optimizer.safetensors")
    data = bytearray(run.store.get(key)[0])
    data[5 * CHUNK + 1] ^= 4
    run.store.put(key, bytes(data))
    store = Counting(run.store)
    with pytest.raises(UnusableError, match=r"optimizer\.safetensors does not match its hash \(bytes 20,480"):
        fetch_checkpoint(store, run.name, one, tmp_path / "here", quiet)
    assert Counter(store.reads)[("optimizer.safetensors", 5 * CHUNK, 6 * CHUNK)] == 1 + len(patience.AGAIN_S)
    assert not (tmp_path / "here" / "step-000000100").exists()


def test_a_bit_that_flipped_on_the_way_is_fetched_again(
    s3: Bucket, proxy: FaultyProxy, tmp_path: Path
) -> None:
    run = Mirrored(open_store(parse(f"s3://{s3.bucket}/runs"), s3.url), tmp_path / "originals")
    one = run.checkpoint(100)
    proxy.add("flip", on="GET", path="model.safetensors", times=1)
    store = open_store(parse(f"s3://{s3.bucket}/runs"), None)
    path = fetch_checkpoint(store, run.name, one, tmp_path / "here", quiet)
    assert content(path) == content(run.originals / path.name)
    assert proxy.count("GET", "model.safetensors") == 6  # five chunks, and one of them again


@pytest.mark.parametrize("times", [1, 7])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "chunks.json"])
@pytest.mark.parametrize("kind", ["404", "flip"])
def test_what_is_wrong_for_a_while_is_not_given_up(
    run: Mirrored, tmp_path: Path, name: str, kind: str, times: int
) -> None:
    """A gateway that says 'not there', or answers with other bytes, of what is whole."""
    one, left, said = run.checkpoint(100), [times], list[str]()
    store: Any = Counting(run.store)

    def wrong(key: str, data: bytes) -> bytes:
        if not key.endswith(name) or left[0] == 0:
            return data
        left[0] -= 1
        if kind == "404":
            raise NotThereError(key)
        return b"?" * len(data)

    store.read = lambda key, start, end: wrong(key, run.store.read(key, start, end))
    store.get = lambda key: (wrong(key, run.store.get(key)[0]), run.store.get(key)[1])
    pauses = (0.001,) * 6 + (0.12,)
    path = fetch_checkpoint(store, run.name, one, tmp_path / "here", said.append, lanes=1, again_s=pauses)
    assert content(path) == content(run.originals / path.name)
    assert left == [0]
    if times == 7:  # nobody wonders what it waits for
        assert any("; waiting: " in line and name in line and "asking again" in line for line in said)


def test_it_is_asked_again_for_about_a_minute() -> None:
    assert 55 <= sum(AGAIN_S) <= 90
    assert sorted(AGAIN_S) == list(AGAIN_S)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "chunks.json"])
def test_an_object_that_is_gone_or_another(run: Mirrored, tmp_path: Path, name: str) -> None:
    one = run.checkpoint(100)
    kept = run.store.get(run.key(one, name))[0]
    run.store.delete([run.key(one, name)])
    with pytest.raises(UnusableError, match=name.replace(".", r"\.") + r" is not in the mirror any more"):
        fetch_checkpoint(run.store, run.name, one, tmp_path / "here", quiet)
    run.store.put(run.key(one, name), b"{" + kept[1:-1] + b" ")
    with pytest.raises(UnusableError, match="does not match its hash"):
        fetch_checkpoint(run.store, run.name, one, tmp_path / "here", quiet)


@pytest.mark.parametrize("kept", [0, 1, 0.5])
def test_an_object_that_became_shorter_is_not_waited_for(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """A bucket says 416 or breaks off, as one does that is in trouble."""
    run = Mirrored(open_store(parse(f"s3://{s3.bucket}/runs"), None), tmp_path / "originals")
    one = run.checkpoint(100)
    key = run.key(one, "model.safetensors")
    data = run.store.get(key)[0]
    run.store.put(key, data[: int(kept * len(data))] if kept < 1 else data[:-1])
    began = time.monotonic()
    with pytest.raises(UnusableError, match=r"model\.safetensors has .* bytes in the mirror, not 20,"):
        fetch_checkpoint(run.store, run.name, one, tmp_path / "here", quiet)
    assert time.monotonic() - began < 20  # and not the time for which a store may be away


@pytest.mark.parametrize("name", ["../evil", "/evil", ".hidden", "a/b", "", "manifest.json"])
def test_a_name_that_leads_out_of_the_folder(run: Mirrored, tmp_path: Path, name: str) -> None:
    one = run.checkpoint(100)
    manifest = json.loads(run.store.get(run.key(one, "manifest.json"))[0])
    chunks = json.loads(run.store.get(run.key(one, "chunks.json"))[0])
    manifest["files"][name] = {"bytes": 1, "sha256": digest(b"x")}
    chunks["files"][name] = [digest(b"x")]
    texts = {"manifest.json": json.dumps(manifest).encode(), "chunks.json": json.dumps(chunks).encode()}
    for file, text in texts.items():
        run.store.put(run.key(one, file), text)
    one = replace(
        one, manifest_sha256=digest(texts["manifest.json"]), chunks_sha256=digest(texts["chunks.json"])
    )
    with pytest.raises(UnusableError, match="names a file"):
        fetch_checkpoint(run.store, run.name, one, tmp_path / "here", quiet)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"step": 101},
        {"files": None},
        {"files": {}},
        {"files": {"model.safetensors": {"bytes": "many"}}},
        {"files": {"model.safetensors": {"bytes": 1, "sha256": "0"}}},
    ],
)
def test_manifests_that_nobody_wrote(run: Mirrored, tmp_path: Path, change: dict[str, object]) -> None:
    one = run.checkpoint(100)
    manifest = json.loads(run.store.get(run.key(one, "manifest.json"))[0]) | change
    text = json.dumps(manifest).encode()
    run.store.put(run.key(one, "manifest.json"), text)
    with pytest.raises(UnusableError):
        fetch_checkpoint(
            run.store, run.name, replace(one, manifest_sha256=digest(text)), tmp_path / "here", quiet
        )


def test_a_newer_schema_is_refused(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    text = json.dumps(
        json.loads(run.store.get(run.key(one, "manifest.json"))[0]) | {"schema_version": 99}
    ).encode()
    run.store.put(run.key(one, "manifest.json"), text)
    with pytest.raises(RefusedError, match="schema version 99"):
        fetch_checkpoint(
            run.store, run.name, replace(one, manifest_sha256=digest(text)), tmp_path / "here", quiet
        )


def test_no_room_is_known_before_the_first_byte(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run.checkpoint(100)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: Usage(1 << 30, 0, 10 << 20))
    store = Counting(run.store)
    with pytest.raises(RefusedError, match=r"here: no room .* needs 16\.9 MB, the disk has 10\.4 MB free"):
        fetch_checkpoint(store, run.name, one, tmp_path / "here", quiet)
    assert store.reads == []
    assert not (tmp_path / "here").exists()


@given(st.integers(0, 10**14), st.integers(1, 10**9))
def test_what_is_not_enough_does_not_read_as_enough(free: int, more: int) -> None:
    needs, has = (parse_size(text) for text in needs_and_has(free + more, free))
    assert has <= free < free + more <= needs
    assert needs - has < more + 0.02 * (free + more)


def parse_size(text: str) -> Decimal:
    count, unit = text.replace(",", "").split()
    factor = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 1000, "byte": 1, "bytes": 1}
    return Decimal(count) * factor[unit]


def test_a_damaged_folder_of_that_name_is_kept_beside(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    old = make_checkpoint(tmp_path / "here", 100, seed=1)
    (old / "model.safetensors").write_bytes(b"damaged")
    path = fetch_checkpoint(run.store, run.name, one, tmp_path / "here", quiet)
    assert content(path) == content(run.originals / path.name)
    assert (tmp_path / "here" / "bad-step-000000100" / "model.safetensors").read_bytes() == b"damaged"


def test_a_store_that_is_away_is_waited_for_and_then_given_up(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    store = Counting(run.store)
    store.instead = {number: UnreachableError("no answer") for number in range(3, 8)}
    path = fetch_checkpoint(store, run.name, one, tmp_path / "here", quiet)
    assert content(path) == content(run.originals / path.name)
    store = Counting(run.store)
    store.dead_from = 3
    began = time.monotonic()
    with pytest.raises(
        AwayError, match=r"no answer; nothing came for \d s; what was fetched is kept"
    ) as told:
        fetch_checkpoint(store, run.name, one, tmp_path / "there", quiet, patience_s=0.2)
    assert told.value.exit_code == INTERRUPTED
    assert time.monotonic() - began < 60  # of the 300 s that are usual
    assert (tmp_path / "there" / ".fetching-step-000000100").is_dir()


def test_what_say_raises_ends_it_at_once(run: Mirrored, tmp_path: Path) -> None:
    class Gone(Exception):
        pass

    one = run.checkpoint(100)
    store = Counting(run.store)
    store.dead_from = 0

    def say(text: str) -> None:
        if "waiting: no answer" in text:
            raise Gone

    with pytest.raises(Gone):
        fetch_checkpoint(store, run.name, one, tmp_path / "here", say)
    before = len(store.reads)
    time.sleep(0.5)
    assert len(store.reads) == before  # no lane goes on


def test_no_right_to_write(run: Mirrored, tmp_path: Path) -> None:
    one = run.checkpoint(100)
    (tmp_path / "here").write_text("a file")
    with pytest.raises(Exception, match=r"can't be written \(Not a directory\)") as told:
        fetch_checkpoint(run.store, run.name, one, tmp_path / "here", quiet)
    assert getattr(told.value, "exit_code", None) == 2


def test_what_is_told_of_the_progress() -> None:
    progress = Progress("checkpoint of step 5", 1000 << 20, 10.0, kept=100 << 20)
    assert progress.text(15.0) == "fetching the checkpoint of step 5: 105 MB of 1.05 GB"
    progress.came = 300 << 20
    assert progress.text(20.0).endswith("419 MB of 1.05 GB, 31.5 MB/s, 20 s left")
    assert progress.text(310.0).endswith("1.05 MB/s, 10 min left")
    assert progress.text(20.0, "503").endswith("419 MB of 1.05 GB; waiting: 503")


# ------------------------------------------------------------------------------------------------------------
# A network that breaks


@contextmanager
def cutting(target: str, after: int) -> Iterator[tuple[str, list[int]]]:
    """In front of a server: every connection is reset once so many bytes came through it."""
    to = urlsplit(target)
    listener = socket.create_server(("127.0.0.1", 0))
    cuts: list[int] = []

    def pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        sent = 0
        try:
            while data := source.recv(8192):
                sink.sendall(data if limit is None else data[: limit - sent])
                sent += len(data)
                if limit is not None and sent >= limit:
                    cuts.append(sent)
                    break
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((to.hostname or "", to.port or 80))
            threading.Thread(target=pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, after), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", cuts
    finally:
        listener.close()


def test_connections_that_never_last_for_a_chunk(s3: Bucket, tmp_path: Path) -> None:
    """A chunk is 1 MiB here, and no connection carries more than 300 kB."""
    run = Mirrored(open_store(parse(f"s3://{s3.bucket}/runs"), s3.url), tmp_path / "originals")
    one = run.checkpoint(100, size=1_500_000, chunk=1 << 20)
    with cutting(s3.url, 300_000) as (url, cuts):
        store = open_store(parse(f"s3://{s3.bucket}/runs"), url, retries=0)
        path = fetch_checkpoint(store, run.name, one, tmp_path / "here", quiet, lanes=4)
    assert content(path) == content(run.originals / path.name)
    assert len(cuts) > 4


FETCH = """
import json, sys
from pathlib import Path
from x1_pretrain.stores.address import parse
from x1_pretrain.mirror.fetch import fetch_checkpoint
from x1_pretrain.mirror.head import Published
from x1_pretrain.stores.opened import open_store
uri, endpoint, one, target = sys.argv[1:]
store = open_store(parse(uri), endpoint)
fetch_checkpoint(store, "tiny", Published(**json.loads(one)), Path(target), print)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_and_going_on(s3: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    uri = f"s3://{s3.bucket}/runs"
    run = Mirrored(open_store(parse(uri), s3.url), tmp_path / "originals")
    one = run.checkpoint(100, size=8 << 20, chunk=128 << 10)  # 24 MiB
    proxy.add("slow", bytes_per_s=8 << 20)
    words = [sys.executable, "-c", FETCH, uri, proxy.url, json.dumps(one.__dict__), str(tmp_path / "here")]
    for _ in range(3):
        before = proxy.sent_bytes
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        wait_for(lambda before=before: proxy.sent_bytes - before > 5 << 20, 60)
        child.kill()
        child.wait()
        assert not (tmp_path / "here" / "step-000000100").exists()
    proxy.clear()
    before = proxy.sent_bytes
    subprocess.run(words, check=True, timeout=60, stdout=subprocess.DEVNULL)
    path = tmp_path / "here" / "step-000000100"
    assert content(path) == content(run.originals / path.name)
    left = proxy.sent_bytes - before
    assert left < 16 << 20, "what three killed ones had fetched was fetched again"
    print(f"the last of four fetches took {left / 2**20:.1f} of 24 MiB")


@pytest.mark.slow
def test_the_time_it_takes_is_that_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to a verified folder within 1.3 times what the store needs for the same bytes: asked for
    by the same library, in the same ranges, by as many lanes, and thrown away."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore

    with serving_apart() as url:
        bucket = Bucket(url)
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        store = open_store(parse(f"s3://{bucket.bucket}/runs"), url)
        run = Mirrored(store, tmp_path / "originals")
        one = run.checkpoint(100, size=128 << 20, chunk=8 << 20)  # 384 MiB
        raw = obstore.store.S3Store(
            bucket.bucket, prefix="runs", endpoint=url, client_options={"allow_http": True}
        )
        spans = [
            (run.key(one, name), start, min(start + (8 << 20), size))
            for name, size in (("model.safetensors", 128 << 20), ("optimizer.safetensors", 256 << 20))
            for start in range(0, size, 8 << 20)
        ]

        def raw_s() -> float:
            began = time.perf_counter()
            with ThreadPoolExecutor(8) as pool:
                got = pool.map(
                    lambda span: len(obstore.get_range(raw, span[0], start=span[1], end=span[2])), spans
                )
                assert sum(got) == 384 << 20
            return time.perf_counter() - began

        def fetch_s(number: int) -> float:
            began = time.perf_counter()
            fetch_checkpoint(store, run.name, one, tmp_path / f"here-{number}", quiet)
            took = time.perf_counter() - began
            shutil.rmtree(tmp_path / f"here-{number}")
            return took

        pairs = [(raw_s(), fetch_s(number)) for number in range(5)]
    ratios = sorted(took / bare for bare, took in pairs)
    rates = [f"{384 / bare:.0f} and {384 / took:.0f} MiB/s" for bare, took in pairs]
    print(f"store and fetch: {'; '.join(rates)}; ratios {', '.join(f'{r:.2f}' for r in ratios)}")
    assert ratios[len(ratios) // 2] < 1.3
