"""The trash of a mirror: out of sight at once, back as it was, gone for good only when it may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import close_session

from tests.mirror.mirrored import keys, mirror_run, writer
from tests.stores.hub import Hub, serving_hub
from tests.stores.s3 import Bucket
from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror import old_corpora, trash
from x1_pretrain.mirror.claim import Me
from x1_pretrain.mirror.head import encode
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.lease import Lease, LostError
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.hub_store import HubStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store

NOW = datetime(2026, 11, 21, 13, 0, tzinfo=UTC)
ENTRY = "trash/tiny-20261121T130000Z.json"
WEEK_S = 7 * 86_400.0


@pytest.fixture(scope="module")
def hub_server() -> Iterator[Hub]:
    with serving_hub() as running:
        yield running


@pytest.fixture(params=["folder", "s3", "hub"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        (tmp_path / "disk").mkdir()
        yield FolderStore(tmp_path / "disk" / "mirror")
        return
    if request.param == "hub":
        hub: Hub = request.getfixturevalue("hub_server")
        hub.repos.clear()
        request.getfixturevalue("monkeypatch").setenv("HF_TOKEN", "writer")
        hub.new("models/user/runs")
        yield HubStore(parse("hf://user/runs"), hub.url, 1)
        close_session()
        return
    s3: Bucket = request.getfixturevalue("s3")
    yield open_store(parse(f"s3://{s3.bucket}/runs"), None)


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "mirror")


def throw(store: Store, name: str = "tiny", now: datetime = NOW) -> str:
    found = look(store, name)
    assert found is not None
    return trash.throw_away(store, found[0], found[1].etag, now, "desk")


def claim(store: Store, who: str = "other", name: str = "tiny") -> Lease:
    me = Me(name, who, "gpu-8", 1)
    return Lease.claim(
        store, me, sleep=lambda _: None, steady=lambda: 0.0, now_utc=lambda: "2026-11-21T13:00:00Z", say=print
    )


def later(store: Store, days: float) -> datetime:
    now = store.now()
    assert now is not None
    return now + timedelta(days=days)


def empty(store: Store, days: float) -> int:
    """What gc does, so many days from now; how many things went."""
    found, trouble = trash.doomed(store, later(store, days), WEEK_S)
    assert trouble == []
    for one in found:
        trash.delete(store, one)
    store.close()
    return len(found)


def test_away_and_back(store: Store) -> None:
    head, before = mirror_run(store), keys(store)
    assert throw(store) == ENTRY
    found = look(store, "tiny")
    assert found is not None
    assert (found[0].writer.state, found[0].trashed_utc) == ("trashed", "2026-11-21T13:00:00Z")
    assert keys(store) == before | {ENTRY}  # not an object was moved
    (one,) = trash.find(store, "tiny")
    trash.put_back(store, one, "desk")
    assert keys(store) == before
    found = look(store, "tiny")
    assert found is not None
    assert replace(found[0], writer=head.writer) == head
    assert (found[0].writer.state, found[0].writer.why) == ("released", "finished")


def test_a_writer_that_was_thought_dead_publishes_nothing_over_the_trash(store: Store) -> None:
    lease = claim(store)
    throw(store)
    with pytest.raises(LostError, match="trash"):
        lease.renew()
    found = look(store, "tiny")
    assert found is not None
    assert found[0].writer.state == "trashed"


def test_a_live_one_is_refused_and_one_that_wrote_meanwhile_too(store: Store) -> None:
    mirror_run(store, who=writer(state="writing"))
    found = look(store, "tiny")
    assert found is not None
    with pytest.raises(RefusedError, match="is being trained on gpu-7"):
        trash.refuse_alive(store, *found)
    before = keys(store)
    store.swap("tiny/head.json", encode(replace(found[0], run_id="tiny-1b")), found[1].etag)
    with pytest.raises(RefusedError, match="was written while"):
        trash.throw_away(store, found[0], found[1].etag, NOW, "desk")
    assert keys(store) == before  # and no entry stays


def test_a_stale_one_may_go(folder: FolderStore) -> None:
    mirror_run(folder, who=writer(state="writing", stale_s=-1.0))
    found = look(folder, "tiny")
    assert found is not None
    trash.refuse_alive(folder, *found)


def test_a_new_run_of_the_name_is_another_and_gc_leaves_it(store: Store) -> None:
    mirror_run(store)
    old = keys(store) - {"tiny/head.json"}
    throw(store)
    lease = claim(store)
    assert lease.epoch == 2
    fresh = look(store, "tiny")
    assert fresh is not None
    assert (fresh[0].checkpoints, fresh[0].records) == ([], {})
    with pytest.raises(RefusedError, match="a run of this name is there again"):
        trash.put_back(store, trash.find(store, "tiny")[0], "desk")
    store.put(f"{lease.space}/files/config.yaml", b"of the new one")
    assert empty(store, days=6.9) == 0
    assert empty(store, days=7.1) == 1
    assert not keys(store) & (old | {ENTRY})
    assert f"{lease.space}/files/config.yaml" in keys(store)
    lease.renew()  # undisturbed


def test_gone_for_good_keeps_the_count_of_epochs(store: Store) -> None:
    mirror_run(store, who=writer(epoch=4))
    throw(store)
    assert empty(store, days=8) == 1
    assert keys(store) == {"tiny/head.json"}
    assert trash.find(store, "tiny") == []
    assert claim(store).epoch == 5


def test_twice_in_one_second_is_two_entries(folder: FolderStore) -> None:
    mirror_run(folder)
    throw(folder)
    mirror_run(folder, run_id="tiny-2", who=writer(epoch=2, token="bbbb2222"))
    assert throw(folder) == "trash/tiny-20261121T130000Z-2.json"
    found = trash.find(folder, "tiny")
    assert {one.head.run_id for one in found} == {"tiny-1", "tiny-2"}
    assert [one.head.run_id for one in trash.find(folder, "tiny-20261121T130000Z")] == ["tiny-1"]
    one = trash.find(folder, "tiny-1")[0]
    trash.put_back(folder, one, "desk")
    assert empty(folder, days=8) == 1
    assert {k for k in keys(folder) if "e0001" in k}
    assert not {k for k in keys(folder) if "e0002" in k}


def test_two_that_throw_it_away_in_one_second_do_not_take_each_others_entry(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror_run(store)
    found = look(store, "tiny")
    assert found is not None
    calls = {name: getattr(store, name) for name in ("put", "create")}

    def late(name: str, key: str, data: bytes) -> object:
        for one, call in calls.items():
            monkeypatch.setattr(store, one, call)
        assert found is not None
        trash.throw_away(store, found[0], found[1].etag, NOW, "laptop")  # another one was faster
        return calls[name](key, data)

    for name in calls:
        monkeypatch.setattr(store, name, partial(late, name))
    with pytest.raises(RefusedError, match="was written while"):
        trash.throw_away(store, found[0], found[1].etag, NOW, "desk")
    (one,) = trash.find(store, "tiny")
    trash.put_back(store, one, "desk")


def test_what_was_restored_since_gc_looked_is_not_deleted(store: Store) -> None:
    mirror_run(store)
    before = keys(store)
    throw(store)
    (one,), _ = trash.doomed(store, later(store, 8), WEEK_S)
    trash.put_back(store, trash.find(store, "tiny")[0], "desk")
    trash.delete(store, one)
    assert keys(store) == before


@pytest.mark.parametrize("restored_after", ["put", "delete"])
def test_what_is_restored_as_gc_begins_is_not_deleted(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch, restored_after: str
) -> None:
    """Between the two changes by which an entry is renamed, and after them."""
    mirror_run(folder)
    before = keys(folder)
    throw(folder)
    (doomed,), _ = trash.doomed(folder, later(folder, 8), WEEK_S)
    one, call = trash.find(folder, "tiny")[0], getattr(folder, restored_after)

    def begun(*given: object) -> object:
        monkeypatch.undo()
        result = call(*given)
        if restored_after == "delete":
            with pytest.raises(RefusedError, match="is being deleted"):
                trash.put_back(folder, one, "desk")
        else:
            trash.put_back(folder, one, "desk")
        return result

    monkeypatch.setattr(folder, restored_after, begun)
    trash.delete(folder, doomed)
    assert keys(folder) == (before if restored_after == "put" else {"tiny/head.json"})


# ------------------------------------------------------------------------------------------------------------
# Corpora


def corpora(store: Store, days: float) -> tuple[set[str], list[str]]:
    found, trouble = old_corpora.old_corpora(store, later(store, days), WEEK_S)
    return {one.mark[0] for one in found}, trouble


def test_a_corpus_goes_once_no_run_names_it(store: Store) -> None:
    """Live or in the trash; and nothing goes that a session did not send."""
    marks = {letter: letter * 64 for letter in "abcdef"}
    mirror_run(store, data={"web": marks["a"]})
    mirror_run(store, "made", fingerprints=[marks["b"]])  # and mirrors it, perhaps, from now on
    mirror_run(store, "gone", data={"web": marks["c"]})
    throw(store, "gone")
    for mark in marks.values():
        store.put(f"data/{mark}/manifest.json", b"{}")
        store.put(f"data/{mark}/train.bin", b"x" * 10)
    mine = {"data/raw/train.bin", f"data/{marks['e']}/notes.txt", f"data/{'A' * 64}/train.bin"}
    for key in mine:
        store.put(key, b"x")
    store.close()
    assert corpora(store, 6) == (set(), [])
    assert corpora(store, 8) == (set("def"), [])
    (entry,) = trash.find(store, "gone")
    found, _ = old_corpora.old_corpora(store, later(store, 8), WEEK_S, {entry.key})
    assert [(one.mark[0], one.bytes) for one in found] == [(letter, 12) for letter in "cdef"]
    before = keys(store)
    found, _ = old_corpora.old_corpora(store, later(store, 8), WEEK_S)
    assert old_corpora.delete(store, found) == (found, [])
    gone = {f"data/{marks[one]}/{name}" for one in "def" for name in ("manifest.json", "train.bin")}
    assert before - keys(store) == gone
    assert not keys(store) - before
    assert mine <= keys(store)


def test_a_run_that_cannot_be_read_keeps_every_corpus(folder: FolderStore) -> None:
    folder.put(f"data/{'a' * 64}/train.bin", b"x")
    mirror_run(folder)
    assert corpora(folder, 8) == ({"a"}, [])
    for key, said in (("tiny/head.json", "tiny/head.json"), ("other/e0001-aaaa1111/files/x", "other: has a")):
        before = folder.get(key)[0] if key in keys(folder) else None
        folder.put(key, b"{")
        found, trouble = corpora(folder, 8)
        assert found == set()
        assert f"{folder.label}/{said}" in trouble[0]
        assert "no corpus goes as long as a run there can't be read" in trouble[-1]
        if before:
            folder.put(key, before)


# ------------------------------------------------------------------------------------------------------------
# Killed in between


def test_killed_before_the_swap(folder: FolderStore) -> None:
    """The entry is there and the run too: gc removes the entry alone."""
    head = mirror_run(folder)
    before = keys(folder)
    folder.put(ENTRY, encode(replace(head, trashed_utc="2026-11-21T13:00:00Z")))
    assert empty(folder, days=8) == 1
    assert keys(folder) == before


def test_killed_before_the_entry_of_a_restored_one_was_deleted(folder: FolderStore) -> None:
    mirror_run(folder)
    before = keys(folder)
    throw(folder)
    entry = folder.get(ENTRY)[0]
    trash.put_back(folder, trash.find(folder, "tiny")[0], "desk")
    folder.put(ENTRY, entry)
    assert empty(folder, days=8) == 1
    assert keys(folder) == before


@pytest.mark.slow
def test_killed_while_gc_deletes(folder: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each delete in turn: what is half gone can't be restored, and the next gc ends it."""
    for at in range(1, 9):
        mirror_run(folder)
        for key in [k for k in keys(folder) if k.startswith("trash/")]:
            folder.delete([key])
        throw(folder)
        calls, plain = 0, FolderStore.delete

        def delete(self: FolderStore, some: object, at: int = at, plain: object = plain) -> None:
            nonlocal calls
            for one in some:  # type: ignore[attr-defined]
                calls += 1
                if calls == at:
                    raise KeyboardInterrupt
                plain(self, [one])  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "delete", delete)
            with suppress(KeyboardInterrupt):
                empty(folder, days=8)
        for one in trash.find(folder, "tiny"):  # only as long as all of it is there
            assert at == 1
            trash.put_back(folder, one, "desk")
            throw(folder)
        empty(folder, days=8)
        assert keys(folder) == {"tiny/head.json"}, at


def test_an_entry_without_its_objects_is_not_restored(folder: FolderStore) -> None:
    mirror_run(folder)
    throw(folder)
    folder.delete(["tiny/e0001-aaaa1111/checkpoints/step-000000042/manifest.json"])
    with pytest.raises(RefusedError, match=r"its newest checkpoint \(step 42\) is no longer in the mirror"):
        trash.put_back(folder, trash.find(folder, "tiny")[0], "desk")


# ------------------------------------------------------------------------------------------------------------
# What earlier writers left


def test_left_behind_is_what_nobody_names(folder: FolderStore) -> None:
    before = ((1, "aaaa1111"), (2, "bbbb2222"))
    head = mirror_run(folder, who=writer(epoch=3, token="cccc3333", state="writing"), earlier=before)
    named = keys(folder)
    left = {
        "tiny/e0001-aaaa1111/checkpoints/step-000000020/model.safetensors",  # a dropped one, not deleted
        "tiny/e0002-bbbb2222/records/metrics.jsonl/000000000000-0000000099",
    }
    stays = {
        "tiny/e0003-cccc3333/checkpoints/step-000000050/model.safetensors",  # on its way, perhaps
        "tiny/e0004-dddd4444/files/config.yaml",  # of one that is about to take over
        "tiny/e0001-eeee5555/files/config.yaml",  # of a run of this name whose head somebody removed
        "tiny/lost/e0002-bbbb2222/metrics.jsonl",  # rows that were set apart
        "data/ffff/train.bin",
        "notes.txt",
    }
    for key in left | stays:
        folder.put(key, b"x" * 10)
    assert empty(folder, days=6) == 0
    (one,) = trash.doomed(folder, later(folder, 8), WEEK_S)[0]
    assert (set(one.keys), one.bytes, one.name) == (left, 20, head.name)
    assert empty(folder, days=8) == 1
    assert keys(folder) == named | stays


def test_what_is_in_the_trash_is_not_left_behind(folder: FolderStore) -> None:
    mirror_run(folder)
    throw(folder)
    claim(folder)
    found, _ = trash.doomed(folder, later(folder, 0.1), 3600.0 * 24)
    assert found == []


def test_a_damaged_head_or_entry_is_a_line_and_nothing_of_it_goes(folder: FolderStore) -> None:
    mirror_run(folder)
    throw(folder)
    before = keys(folder)
    folder.put("tiny/head.json", b"{")
    found, trouble = trash.doomed(folder, later(folder, 9), WEEK_S)
    assert found == []
    assert "tiny/head.json" in trouble[0]
    folder.put(ENTRY, b'{"schema_version": 2, "kind": "mirror"}')
    folder.put("tiny/head.json", encode(mirror_run(folder, who=writer(epoch=9, token="99999999"))))
    found, trouble = trash.doomed(folder, later(folder, 0), WEEK_S)
    assert found == []
    assert trouble == [f"{folder.label}/{ENTRY}: schema version 2, this x1 reads up to 1; update x1"]
    assert before <= keys(folder)


def test_a_copy_made_by_hand_is_no_word_on_the_run_itself(folder: FolderStore) -> None:
    """Its head is that of an earlier day: it lacks what the run published since."""
    copied = mirror_run(folder, steps=(20,))
    mirror_run(folder, steps=(20, 42))
    folder.put("copy-of-tiny/head.json", encode(copied))
    found, (trouble,) = trash.doomed(folder, later(folder, 8), WEEK_S)
    assert found == []
    assert "copy-of-tiny/head.json: is the head of tiny: this folder was copied or renamed by hand" in trouble
    with pytest.raises(RefusedError, match="is the head of tiny"):
        claim(folder, name="copy-of-tiny")


def test_gc_leaves_a_checkpoint_that_a_resume_passed_over(folder: FolderStore) -> None:
    """As the next writer's own cleaning does: it may be the newest there is."""
    who = writer(epoch=5, token="55555555", why="finished")
    head = mirror_run(folder, who=who, earlier=((2, "22222222"), (3, "33333333")))
    passed, gone = "e0002-22222222/checkpoints/step-000000020", "e0002-22222222/checkpoints/step-000000010"
    for path in (passed, gone):
        folder.put(f"{head.name}/{path}/model.safetensors", b"w")
    folder.put(f"{head.name}/lost/e0003-33333333/skipped/{passed}", b"")
    found, trouble = trash.doomed(folder, later(folder, 9), WEEK_S)
    assert not trouble
    doomed = {key for one in found for key in one.keys}
    assert f"{head.name}/{gone}/model.safetensors" in doomed
    assert f"{head.name}/{passed}/model.safetensors" not in doomed
