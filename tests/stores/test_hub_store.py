"""HubStore against a small Hub on loopback."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.mirror.run_folders import RunFolder, check_checkpoint, record
from tests.stores.hub import LARGE, RUNS, File, Hub, opened
from x1_pretrain.command import run as run_app
from x1_pretrain.mirror import push_command
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.preflight import preflight
from x1_pretrain.stores.hub_store import HubStore
from x1_pretrain.stores.store import ChangedError, NotThereError, UnreachableError


@pytest.fixture
def store(hub: Hub) -> HubStore:
    hub.new(RUNS)
    return opened(hub)


def test_nothing_is_there_before_the_commit_and_all_of_it_after(store: HubStore, hub: Hub) -> None:
    store.put("a/small", b"s")
    meta = store.put_stream("a/large", iter([LARGE[:999], LARGE[999:]]), len(LARGE))
    assert (meta.key, meta.bytes) == ("a/large", len(LARGE))
    assert store.stat("a/large").bytes == len(LARGE)
    assert store.get("a/small")[0] == b"s"
    assert hub.files() == {}
    before = len(hub.repos[RUNS].commits)
    etag = store.create("a/head.json", b"{}")
    assert hub.files() == {"a/small": b"s", "a/large": LARGE, "a/head.json": b"{}"}
    assert len(hub.repos[RUNS].commits) == before + 1
    assert store.get("a/head.json") == (b"{}", store.stat("a/head.json"))
    assert store.stat("a/head.json").etag == etag
    assert store.get("a/large")[0] == LARGE
    assert hub.repos[RUNS].commits[-1].files["a/large"].lfs
    assert abs((store.stat("a/large").modified - datetime.now(UTC)).total_seconds()) < 5


def test_create_only_once(store: HubStore, hub: Hub) -> None:
    store.create("head.json", b"1")
    with pytest.raises(ChangedError, match="another version"):
        opened(hub).create("head.json", b"1")
    assert hub.files() == {"head.json": b"1"}


def test_swap_only_the_version_that_is_there(store: HubStore, hub: Hub) -> None:
    first = store.create("head.json", b"1")
    second = store.swap("head.json", b"2", first)
    assert second != first
    other = opened(hub)
    with pytest.raises(ChangedError):
        other.swap("head.json", b"3", first)
    with pytest.raises(ChangedError):
        other.swap("absent.json", b"3", first)
    assert other.swap("head.json", b"3", second)
    assert hub.files() == {"head.json": b"3"}


def test_other_runs_in_the_repository_are_no_conflict(store: HubStore, hub: Hub) -> None:
    etag = store.create("a/head.json", b"1")
    tips = commit_before_each(
        store, lambda: hub.commit(RUNS, {f"b/{len(tips)}": File(b"x", False)}, set()), 3
    )
    store.swap("a/head.json", b"2", etag)
    assert len(tips) == 3
    assert hub.files()["a/head.json"] == b"2"


def test_the_same_object_changed_between_look_and_commit(store: HubStore, hub: Hub) -> None:
    etag = store.create("a/head.json", b"1")
    commit_before_each(store, lambda: hub.commit(RUNS, {"a/head.json": File(b"theirs", False)}, set()), 1)
    with pytest.raises(ChangedError):
        store.swap("a/head.json", b"mine", etag)
    assert hub.files()["a/head.json"] == b"theirs"


def test_a_repository_that_others_commit_to_without_end(store: HubStore, hub: Hub) -> None:
    tips = commit_before_each(
        store, lambda: hub.commit(RUNS, {f"b/{len(tips)}": File(b"x", False)}, set()), 99
    )
    with pytest.raises(UnreachableError, match="others commit"):
        store.create("a/head.json", b"1")
    store.put("a/staged", b"")
    with pytest.raises(UnreachableError, match="others commit"):
        store.close()


def commit_before_each(store: HubStore, commit: Callable[[], str], times: int) -> list[str]:
    """Somebody else commits after each of the next looks at the newest commit."""
    look, tips = store._repository.tip, []

    def tip() -> str:
        seen = look()
        if len(tips) < times:
            tips.append(commit())
        return seen

    store._repository.tip = tip  # type: ignore[method-assign]
    return tips


def test_two_threads_of_two_writers_and_one_winner_each_round(store: HubStore, hub: Hub) -> None:
    etag = store.create("head.json", b"0")
    stores = [store, opened(hub), opened(hub)]
    for number in range(4):
        won: list[str] = []

        def swap(name: int, held: str = etag, number: int = number, won: list[str] = won) -> None:
            with suppress(ChangedError):
                won.append(stores[name].swap("head.json", b"%d %d" % (number, name), held))

        threads = [threading.Thread(target=swap, args=(name,)) for name in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(won) == 1
        etag = won[0]
        assert store.stat("head.json").etag == etag


def test_ranges(store: HubStore) -> None:
    store.put_stream("large", [LARGE], len(LARGE))
    store.put("small", b"0123456789")
    assert store.read("small", 2, 5) == b"234"  # staged
    assert store.read("large", 1000, 3000) == LARGE[1000:3000]  # has to be committed for that
    store.close()
    assert store.read("small", 2, 5) == b"234"
    assert store.read("small", 3, 3) == b""
    with pytest.raises(UnreachableError):
        store.read("small", 5, 20)
    with pytest.raises(UnreachableError):
        store.read("small", 50, 60)


def test_copies_cost_no_upload(store: HubStore, hub: Hub) -> None:
    store.put_stream("e1/model.safetensors", [LARGE], len(LARGE))
    store.put("e1/small", b"s")
    store.copy("e1/model.safetensors", "e2/model.safetensors")  # of what is staged
    store.create("head", b"1")
    sent = hub.count("PUT /blobs/")
    store.copy("e1/small", "e2/small")
    store.copy("e1/model.safetensors", "e3/model.safetensors")
    store.delete(["e1/model.safetensors", "e1/small"])  # before the copy is committed
    assert store.stat("e3/model.safetensors").bytes == len(LARGE)
    store.close()
    assert hub.count("PUT /blobs/") == sent == 1
    assert hub.files() == {
        "e2/model.safetensors": LARGE,
        "e3/model.safetensors": LARGE,
        "e2/small": b"s",
        "head": b"1",
    }
    with pytest.raises(NotThereError):
        store.copy("absent", "e4")


def test_a_copy_whose_source_goes_before_the_commit(store: HubStore, hub: Hub) -> None:
    store.put_stream("e1/large", [LARGE], len(LARGE))
    store.put("e1/small", b"s")
    store.close()
    store.copy("e1/large", "e2/large")
    store.copy("e1/small", "e2/small")
    hub.commit(RUNS, {}, {"e1/large", "e1/small"})
    store.close()
    assert hub.files() == {"e2/large": LARGE, "e2/small": b"s"}


def test_deletes(store: HubStore, hub: Hub) -> None:
    store.put("a", b"1")
    store.put("b", b"2")
    store.close()
    store.put("c", b"3")
    store.delete(["a", "c", "never"])
    for key in ("a", "c"):
        for ask in (store.get, store.stat):
            with pytest.raises(NotThereError):
                ask(key)
    store.put("a", b"again")
    store.close()
    assert hub.files() == {"a": b"again", "b": b"2"}
    store.delete(["a", "b"])
    store.close()
    assert hub.files() == {}
    store.close()


def test_listings_follow_every_page_and_know_what_is_staged(store: HubStore, hub: Hub) -> None:
    for number in range(8):
        store.put(f"run-{number % 5}/files/{number}", b"x" * number)
    assert store.names() == [f"run-{n}" for n in range(5)]
    assert store.names("run-1") == ["files"]
    assert {meta.key: meta.bytes for meta in store.below("run-1")} == {
        "run-1/files/1": 1,
        "run-1/files/6": 6,
    }
    assert store.names("absent") == []
    assert list(store.below("absent")) == []


def test_a_folder_of_a_data_set_repository(hub: Hub) -> None:
    store = opened(hub, "hf://datasets/user/data/some/folder")
    store.create("run/head.json", b"{}")
    store.put_stream("run/large", [LARGE], len(LARGE))
    store.close()
    assert hub.files("datasets/user/data") == {
        "some/folder/run/head.json": b"{}",
        "some/folder/run/large": LARGE,
    }
    assert store.names() == ["run"]
    assert sorted(meta.key for meta in store.below("run")) == ["run/head.json", "run/large"]
    assert store.read("run/large", 5, 9) == LARGE[5:9]


def test_a_new_repository_is_private_and_reading_makes_none(hub: Hub) -> None:
    store = opened(hub)
    assert store.names() == []
    with pytest.raises(NotThereError):
        store.get("run/head.json")
    store.close()
    assert hub.repos == {}
    store.put_stream("run/large", [LARGE], len(LARGE))
    store.create("run/head.json", b"{}")
    assert hub.repos[RUNS].private
    assert set(hub.files()) == {"run/large", "run/head.json"}


def test_large_files_in_parts(store: HubStore, hub: Hub) -> None:
    hub.part_bytes = 700_000
    store.put_stream("large", [LARGE], len(LARGE))
    store.close()
    assert hub.count("PUT /blobs/") == 3
    assert store.get("large")[0] == LARGE


def test_text_of_some_megabytes_goes_with_the_commit(store: HubStore, hub: Hub) -> None:
    text = b"text\n" * 600_000
    meta = store.put("tokenizer.json", text)
    store.close()
    assert hub.files() == {"tokenizer.json": text}
    assert store.stat("tokenizer.json").etag == meta.etag


def test_the_preflight_is_content(store: HubStore, hub: Hub) -> None:
    preflight(store, "run", without_lease=False)
    store.close()
    assert store.conditional
    assert hub.files() == {}


def test_a_run_is_pushed_and_then_read_by_another_machine(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "runs" / "tiny")
    for step in range(1, 11):
        run.step(step)
    run.save(10)
    for _ in range(2):
        where = [str(run.folder), "hf://user/runs", "--endpoint", hub.url]
        assert run_app(push_command.app, where, "x1 push") == 0, capsys.readouterr().err
    assert hub.repos[RUNS].private
    store = opened(hub)
    found = look(store, "tiny")
    assert found is not None
    check_checkpoint(store, found[0], 10)
    assert record(store, found[0], "steps.jsonl") == (run.folder / "steps.jsonl").read_bytes()
    assert found[0].writer.state == "released"
    assert store.names() == ["tiny"]


def test_a_version_is_gits_name_of_the_content(store: HubStore, tmp_path: Path) -> None:
    content = b'{"beat": 1}\n'
    (tmp_path / "head.json").write_bytes(content)
    told = subprocess.run(["git", "hash-object", tmp_path / "head.json"], capture_output=True, text=True)
    if told.returncode:
        pytest.skip("no git here")
    assert store.create("head.json", content) == told.stdout.strip()
    store.put_stream("large", [LARGE], len(LARGE))
    assert store.stat("large").etag == hashlib.sha256(LARGE).hexdigest()


def test_no_torch() -> None:
    program = "import sys, x1_pretrain.stores.hub_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
