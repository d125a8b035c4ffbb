"""What stays on a disk and what goes: the policy, the mirror, a full disk, and what a fetch left behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.records.test_checkpoint_files import content
from x1_pretrain.records import checkpoint_files as files
from x1_pretrain.records.retention import kept


def steps_in(folder: Path) -> set[int]:
    return set(map(files.step_of, files.list_checkpoints(folder)))


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Checkpoints of the steps 0, 10, ..., 90."""
    for step in range(0, 100, 10):
        files.publish(tmp_path, step, "run", content())
    return tmp_path


def newest(folder: Path) -> Path:
    return files.list_checkpoints(folder)[0]


def test_the_best_stay(ten: Path) -> None:
    losses = {0: 9.0, 10: 5.0, 20: 3.0, 30: 3.1, 40: 4.0}
    files.prune(ten, newest(ten), 2, None, keep_best=2, losses=losses)
    assert steps_in(ten) == {90, 80, 20, 30}


def test_without_a_mirror_keep_local_removes_nothing_that_is_kept(ten: Path) -> None:
    files.prune(ten, newest(ten), 3, None, keep_at=[10], keep_local=1)
    assert steps_in(ten) == {90, 80, 70, 10}


def test_copies_go_once_they_are_mirrored(ten: Path) -> None:
    policy = {"keep_last": 3, "keep_every": None, "keep_at": [10, 40], "keep_local": 1}
    removed = files.prune(ten, newest(ten), **policy, mirrored=[10, 80])
    assert steps_in(ten) == {90, 70, 40}
    assert {10, 80} <= set(map(files.step_of, removed))
    files.prune(ten, newest(ten), **policy, mirrored=[10, 40, 70, 80, 90])
    assert steps_in(ten) == {90}  # the newest verified one, mirrored or not


def test_what_the_mirror_alone_has_counts_among_the_kept(ten: Path) -> None:
    """Or the best of what happens to lie here would be kept for ever in place of the best of the run."""
    files.prune(ten, newest(ten), 2, None, keep_best=1, losses={5: 1.0, 20: 2.0}, mirrored=[5])
    assert steps_in(ten) == {90, 80}


def test_what_is_needed_stays_mirrored_or_not(ten: Path) -> None:
    files.prune(ten, newest(ten), 2, None, needed=[30, 80], mirrored=[30, 80, 90], keep_local=1)
    assert steps_in(ten) == {90, 80, 30}


def test_what_the_mirror_says_of_later_steps_is_of_no_use_to_an_earlier_one(ten: Path) -> None:
    """After a rewind the mirror still names steps that are given up."""
    files.prune(ten, ten / files.folder_name(50), 2, None, mirrored=[70, 80, 90])
    assert steps_in(ten) == {50, 40, 60, 70, 80, 90}


SOME = st.sets(st.integers(0, 12), max_size=8)


@given(
    st.sets(st.integers(0, 12), min_size=1, max_size=10),
    st.data(),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 6)),
    SOME,
    SOME,
    SOME,
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_nothing_is_removed_that_something_holds(
    here: set[int],
    data: st.DataObject,
    last: int,
    every: int | None,
    at: set[int],
    needed: set[int],
    mirrored: set[int],
    local: int | None,
) -> None:
    now = data.draw(st.sampled_from(sorted(here)))
    folder = Path(tempfile.mkdtemp(prefix="prune-"))
    try:
        for step in here:
            (folder / files.folder_name(step)).mkdir()
        files.prune(
            folder,
            folder / files.folder_name(now),
            last,
            every,
            at,
            needed=needed,
            mirrored=mirrored,
            keep_local=local,
        )
        left = steps_in(folder)
    finally:
        shutil.rmtree(folder)
    older = {step for step in here if step < now}
    policy = kept({now, *older, *(m for m in mirrored if m < now)}, last, every, at, {}, 0)
    assert here - older <= left  # the newest, and whatever is newer
    for step in older:
        wanted = step in policy
        newer_here = len({s for s in policy & here if s > step})
        copy_elsewhere = local is not None and newer_here >= local and step in mirrored
        assert (step in left) == (step in needed or (wanted and not copy_elsewhere))


# ------------------------------------------------------------------------------------------------------------
# A full disk


def test_a_full_disk_frees_what_is_mirrored_first(ten: Path) -> None:
    good = newest(ten)
    free = {"keep_at": [10, 20], "needed": [30], "mirrored": [20, 30, 40, 90]}
    first = files.free(ten, good, **free)
    assert sorted(map(files.step_of, first)) == [20, 40]  # also one that `at` keeps: it is not lost
    files.free(ten, good, **free)
    assert steps_in(ten) == {90, 30, 10}
    assert files.free(ten, good, **free) == []


def test_a_full_disk_without_a_mirror_frees_all_but_the_newest_good_one(ten: Path) -> None:
    files.free(ten, newest(ten), [10])
    assert steps_in(ten) == {90, 10}
    assert files.free(ten, newest(ten), [10]) == []


@settings(max_examples=25)
@given(SOME, SOME, SOME, SOME)
def test_room_for_counts_exactly_what_free_frees(
    here: set[int], at: set[int], needed: set[int], mirrored: set[int]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="room-"))
    try:
        for step in here | {13}:
            files.publish(folder, step, "run", content())
        good = folder / files.folder_name(13)
        each = 1000
        for path in files.list_checkpoints(folder):  # of equal size, whatever its step's digits
            short = each - files.size_of(path)
            (path / "padding").write_bytes(b" " * short)
        removable = 0
        rules = {"keep_at": at, "needed": needed, "mirrored": mirrored}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=files.SAFETY_BYTES))
            counted = [files.room_for(folder, n * each, good, **rules) for n in range(14)]
        while gone := files.free(folder, good, **rules):
            removable += len(gone)
        assert counted == [n <= removable for n in range(14)]
        assert good.exists()
    finally:
        shutil.rmtree(folder)


def test_a_vanishing_file_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there").write_bytes(b"123")
    assert files.size_of(tmp_path) == 3
    assert files.size_of(tmp_path / "no-such-folder") == 0


# ------------------------------------------------------------------------------------------------------------
# What a fetch, or a lost branch, left behind


def test_a_fetch_that_is_over_or_overtaken_goes(ten: Path) -> None:
    for name in (".fetching-step-000000090", ".fetching-step-000000015", ".fetching-step-000000100"):
        (ten / name).mkdir()
        (ten / name / "model.safetensors.part").write_bytes(b"half")
    (ten / ".fetching-step-odd").mkdir()
    gone = files.remove_fetching(ten, newest(ten))
    assert {path.name for path in gone} == {".fetching-step-000000090", ".fetching-step-000000015"}
    left = {path.name for path in ten.glob(".fetching-*")}
    assert left == {".fetching-step-000000100", ".fetching-step-odd"}  # newer: gone on with


def test_pruning_removes_them_too(ten: Path) -> None:
    (ten / ".fetching-step-000000015").mkdir()
    files.prune(ten, newest(ten), 2, None)
    assert not list(ten.glob(".fetching-*"))


def test_what_was_set_aside_stays_and_is_told(ten: Path) -> None:
    lost = (ten / files.folder_name(80)).rename(ten / "lost-e0003-step-000000080")
    bad = (ten / files.folder_name(70)).rename(ten / "bad-step-000000070")
    files.prune(ten, newest(ten), 1, None)
    files.free(ten, newest(ten))
    told = dict(files.set_aside(ten))
    assert told == {lost: files.size_of(lost), bad: files.size_of(bad)}
    assert all(told.values())
    assert steps_in(ten) == {90}
    assert f"{bad.name}, {lost.name}: {sum(told.values())} bytes that" in files.aside_words(ten)


def test_a_folder_without_anything_set_aside_has_nothing_to_say(ten: Path) -> None:
    assert files.set_aside(ten) == []
    assert files.aside_words(ten) == ""
    assert files.aside_words(ten / "no-such-folder") == ""
