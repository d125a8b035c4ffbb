"""What every store must do, whatever it is: the tests of each kind of store inherit these."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from x1_pretrain.stores.store import ChangedError, NotThereError, Store, StoreError, UnreachableError


def racing(work: Callable[[int], object], many: int = 8) -> list[object]:
    """What `work(i)` gave or raised in threads that start together."""
    start, results = threading.Barrier(many), [None] * many

    def one(index: int) -> None:
        start.wait()
        try:
            results[index] = work(index)
        except StoreError as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Contract:
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_what_is_put_comes_back(self, store: Store) -> None:
        for key, data in [("a", b""), ("x1-50m/head.json", b"{}"), ("d/é ü/f=1,b+c@d", b"\0\xff" * 1000)]:
            put = store.put(key, data)
            got, meta = store.get(key)
            assert (got, meta.key, meta.bytes) == (data, key, len(data))
            assert meta == put == store.stat(key)
            assert meta.etag
            assert meta.modified.tzinfo is not None
            assert abs(meta.modified - datetime.now(UTC)) < timedelta(seconds=10)
        assert store.put("a", b"other").bytes == 5
        assert store.get("a")[0] == b"other"

    def test_what_is_not_there(self, store: Store) -> None:
        store.put("a/b", b"x")
        for ask in (store.get, store.stat, lambda key: store.read(key, 0, 1)):
            for key in ("none", "a/none", "a", "a/b/c"):
                with pytest.raises(NotThereError):
                    ask(key)
        with pytest.raises(NotThereError):
            store.copy("none", "c")
        store.delete(["none", "a/none", "a/b/c"])
        store.delete([])
        assert store.names("none") == []
        assert list(store.below("none")) == []
        assert store.get("a/b")[0] == b"x"

    def test_ranges(self, store: Store) -> None:
        data = bytes(range(256)) * 40
        store.put("r", data)
        for start, end in [(0, 1), (0, len(data)), (5000, 5001), (len(data) - 1, len(data)), (7, 7)]:
            assert store.read("r", start, end) == data[start:end]
        for start, end in [(0, len(data) + 1), (len(data), len(data) + 1), (10**9, 10**9 + 1)]:
            with pytest.raises(UnreachableError):
                store.read("r", start, end)

    def test_create_is_of_the_first(self, store: Store) -> None:
        etag = store.create("h", b"1")
        assert store.stat("h").etag == etag
        with pytest.raises(ChangedError):
            store.create("h", b"2")
        assert store.get("h")[0] == b"1"

    def test_swap_is_of_the_version(self, store: Store) -> None:
        first = store.create("h", b"1")
        second = store.swap("h", b"2", first)
        assert second != first
        assert store.stat("h").etag == second
        for etag in (first, '"nonsense"'):
            with pytest.raises(ChangedError):
                store.swap("h", b"3", etag)
        assert store.get("h") == (b"2", store.stat("h"))
        store.delete(["h"])
        with pytest.raises(ChangedError):
            store.swap("h", b"3", second)
        with pytest.raises(ChangedError):
            store.swap("never/was", b"3", second)
        assert store.names() == []

    def test_one_of_many_creates(self, store: Store) -> None:
        results = racing(lambda index: store.create("h", b"%d" % index))
        winners = [index for index, result in enumerate(results) if isinstance(result, str)]
        assert len(winners) == 1
        assert all(isinstance(one, ChangedError) for one in results if not isinstance(one, str))
        assert store.get("h")[0] == b"%d" % winners[0]

    def test_one_of_many_swaps(self, store: Store) -> None:
        etag = store.create("h", b"start")
        for turn in range(3):  # never the content before: on S3 too, the same content is the same version
            before = etag
            results = racing(
                lambda index, turn=turn, etag=before: store.swap("h", b"%d %d" % (turn, index), etag)
            )
            (etag,) = [one for one in results if isinstance(one, str)]
            assert store.stat("h").etag == etag
            assert all(isinstance(one, ChangedError) for one in results if not isinstance(one, str))

    def test_a_stream_of_any_pieces(self, store: Store) -> None:
        data = bytes(range(256)) * 400
        for size in (1, 333, 100_000, 10**6):
            pieces = (data[at : at + size] for at in range(0, len(data), size))
            assert store.put_stream(f"s/{size}", pieces, len(data)).bytes == len(data)
            assert store.get(f"s/{size}")[0] == data
        assert store.put_stream("s/none", [], 0).bytes == 0

    @pytest.mark.parametrize("size", [10, 20_000_000])
    def test_a_stream_of_another_size_is_not_stored(self, store: Store, size: int) -> None:
        store.put("s", b"before")
        for wrong in (size - 1, size + 1):
            with pytest.raises(UnreachableError, match=r"bytes came, not .*; not stored"):
                store.put_stream("s", (b"x" * (size // 10) for _ in range(10)), wrong)
        assert store.get("s")[0] == b"before"

    @pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), RuntimeError("ours"), OSError(5, "I/O")])
    @pytest.mark.parametrize("size", [10, 20_000_000])
    def test_an_error_of_the_caller_stays_his(self, store: Store, error: Exception, size: int) -> None:
        def pieces():
            yield b"x" * (size // 2)
            raise error

        with pytest.raises(type(error)) as caught:
            store.put_stream("s", pieces(), size)
        assert caught.value is error
        assert list(store.below("")) == []

    def test_copies(self, store: Store) -> None:
        store.put("a/b", b"content")
        store.copy("a/b", "c/d/e")
        store.delete(["a/b"])
        assert store.get("c/d/e")[0] == b"content"

    def test_listings(self, store: Store) -> None:
        keys = ["x1/head.json", "x1/e1/m", "x1/e1/n", "x1-50m/head.json", "x10/y", "note.txt"]
        for key in keys:
            store.put(key, key.encode())
        store.now()  # its probe is in no listing
        assert {(one.key, one.bytes) for one in store.below("")} == {(key, len(key)) for key in keys}
        assert sorted(one.key for one in store.below("x1")) == ["x1/e1/m", "x1/e1/n", "x1/head.json"]
        assert store.names() == ["note.txt", "x1", "x1-50m", "x10"]
        assert store.names("x1") == ["e1", "head.json"]
        store.delete(one.key for one in store.below("x1"))
        assert store.names() == ["note.txt", "x1-50m", "x10"]

    def test_keys_that_are_none(self, store: Store) -> None:
        for key in ("", "a//b", "/a", "a/../b", "./a"):
            with pytest.raises(StoreError) as caught:
                store.put(key, b"x")
            assert "\n" not in str(caught.value)

    def test_its_clock_goes_on(self, store: Store) -> None:
        store.put("a", b"x")
        first, second = store.now(), store.now()
        assert first is not None
        assert second is not None
        assert timedelta(0) <= second - first < timedelta(seconds=5)
        assert abs(first - datetime.now(UTC)) < timedelta(seconds=5)
