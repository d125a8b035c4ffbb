from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.stores.contract import Contract
from x1_pretrain.stores import folder_store
from x1_pretrain.stores.folder_store import FolderStore, file_system
from x1_pretrain.stores.store import ChangedError, DeniedError, NotThereError, UnreachableError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


class TestContract(Contract):
    @pytest.fixture
    def store(self, root: Path) -> FolderStore:
        return FolderStore(root)


def test_a_disk_that_stumbles_is_not_empty(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, scandir, wrong = FolderStore(root), os.scandir, [errno.ENOENT, errno.EIO]
    store.put("run/a/b", b"1")
    store.put("run/c", b"2")

    def stumbles(path: str) -> object:
        if Path(path).name == "a":
            raise OSError(code := wrong.pop(0), os.strerror(code), path)
        return scandir(path)

    monkeypatch.setattr(folder_store.os, "scandir", stumbles)
    assert [one.key for one in store.below("run")] == ["run/c"]  # the folder was removed meanwhile
    with pytest.raises(UnreachableError, match="Input/output error"):
        list(store.below("run"))


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_nothing_is_made_by_looking(root: Path) -> None:
    store = FolderStore(root)
    assert store.names() == []
    assert list(store.below("")) == []
    with pytest.raises(NotThereError):
        store.get("a/b")
    assert store.now() is None
    store.delete(["a/b"])
    assert not root.exists()


def test_nothing_half_written_is_left(root: Path) -> None:
    store = FolderStore(root)
    store.put("a/b", b"x")

    def pieces():
        yield b"x" * 100
        assert store.names() == ["a"]
        assert [one.key for one in store.below("")] == ["a/b"]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.put_stream("a/c", pieces(), 200)
    assert files(root) == ["a/b"]


def test_empty_folders_go(root: Path) -> None:
    store = FolderStore(root)
    store.put("run/e0001/checkpoints/step-1/m", b"x")
    store.put("run/head.json", b"x")
    store.delete(["run/e0001/checkpoints/step-1/m"])
    assert not (root / "run/e0001").exists()
    assert (root / "run").is_dir()


def test_what_killed_writers_left_is_swept_after_a_day(root: Path) -> None:
    FolderStore(root).put("a", b"x")
    old, young = root / ".x1-mirror/writing/old", root / ".x1-mirror/writing/young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    FolderStore(root).put("b", b"x")
    assert (old.exists(), young.exists()) == (False, True)


def test_a_newcomer_whose_clock_is_days_off_sweeps_nothing_of_those_who_write(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FolderStore(root).put("a", b"x")
    young = root / ".x1-mirror/writing/young"
    young.write_bytes(b"x")
    ahead = time.time() + 3 * 86_400
    monkeypatch.setattr(time, "time", lambda: ahead)
    FolderStore(root).put("b", b"x")
    assert young.exists()


def test_what_fills_the_disk_is_swept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing can be written, that would tell the disk's time."""
    FolderStore(root).put("a", b"x")
    old, write = root / ".x1-mirror/writing/old", os.write
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)

    def full(descriptor: int, data: bytes) -> int:
        if old.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(folder_store.os, "write", full)
    FolderStore(root).put("b", b"x")
    assert files(root) == ["a", "b"]


def test_the_same_size_and_time_are_not_the_same_version(root: Path) -> None:
    store = FolderStore(root)
    etag = store.create("h", b"1")
    store.put("h", b"2")
    os.utime(root / "h", ns=(0, 0))
    with pytest.raises(ChangedError):
        store.swap("h", b"3", etag)


def test_a_large_file_is_not_read_to_know_its_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_store, "HASHED_BYTES", 100)
    store = FolderStore(root)
    store.put("large", b"x" * 101)
    etag = store.stat("large").etag
    assert str((root / "large").stat().st_mtime_ns) in etag
    assert store.get("large")[1].etag == etag
    assert store.swap("large", b"y" * 200, etag) == store.stat("large").etag


# ------------------------------------------------------------------------------------------------------------
# Disks


def test_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "mnt/disk/runs")
    with pytest.raises(DeniedError, match=rf"no folder {tmp_path}/mnt/disk; mount the disk"):
        store.put("a", b"x")
    assert not (tmp_path / "mnt").exists()
    assert store.now() is None


def test_a_folder_that_goes_away_is_not_an_empty_one(root: Path) -> None:
    store = FolderStore(root)
    etag = store.create("run/head.json", b"x")
    root.rename(root.with_name("elsewhere"))
    for ask in (
        lambda: store.get("run/head.json"),
        lambda: store.stat("run/head.json"),
        lambda: store.put("b", b"x"),
        lambda: store.swap("run/head.json", b"y", etag),
        lambda: store.create("b", b"y"),
    ):
        with pytest.raises(UnreachableError, match="the folder is gone, or another disk is there"):
            ask()
    assert not root.exists()
    root.with_name("elsewhere").rename(root)
    assert store.get("run/head.json")[0] == b"x"


def test_another_disk_at_its_place(root: Path) -> None:
    store = FolderStore(root)
    store.put("a", b"x")
    assert store._device is not None
    store._device += 1
    with pytest.raises(UnreachableError, match="another disk"):
        store.get("none")


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, DeniedError, "no room on that disk"),
        (errno.EDQUOT, DeniedError, "no room on that disk"),
        (errno.EROFS, DeniedError, "read-only"),
        (errno.EACCES, DeniedError, "may not"),
        (errno.EIO, UnreachableError, "error"),
        (errno.ESTALE, UnreachableError, "handle"),
        (errno.ETIMEDOUT, UnreachableError, "timed out"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_errors_of_a_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], words: str, call: str
) -> None:
    store = FolderStore(root)
    store.put("run/head.json", b"before")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(folder_store.os, call, fail)
        for write in (lambda: store.put("run/head.json", b"after"), lambda: store.create("new", b"after")):
            with pytest.raises(kind, match=rf"(?i){words}") as caught:
                write()
            assert "\n" not in str(caught.value)
    assert store.get("run/head.json")[0] == b"before"
    assert [one for one in files(root) if not one.startswith(".x1-mirror/lock-")] == ["run/head.json"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeniedError, match="a file is there"):
        FolderStore(tmp_path / "file").put("a", b"x")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DeniedError, match="this user may not"):
        FolderStore(tmp_path / "runs").put("a", b"x")
    tmp_path.chmod(0o700)


def test_the_kind_of_file_system() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) not in ("", "proc")


def test_a_file_system_without_locks_between_machines(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FolderStore(root).conditional
    monkeypatch.setattr(folder_store, "file_system", lambda path: "sshfs")
    assert not FolderStore(root).conditional


# ------------------------------------------------------------------------------------------------------------
# Many processes

SWAPPER = """
import sys
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.store import ChangedError
store, wins = FolderStore(sys.argv[1]), 0
while wins < int(sys.argv[2]):
    data, meta = store.get("count")
    try:
        store.swap("count", b"%d" % (int(data) + 1), meta.etag)
        wins += 1
    except ChangedError:
        pass
"""


def swapper(root: Path, times: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SWAPPER, str(root), str(times)])


def test_no_swap_of_several_processes_is_lost(root: Path) -> None:
    store = FolderStore(root)
    store.create("count", b"0")
    children = [swapper(root, 20) for _ in range(3)]
    assert [child.wait(30) for child in children] == [0, 0, 0]
    assert store.get("count")[0] == b"60"


@pytest.mark.parametrize("call", ["create", "swap"])
def test_it_looks_only_when_it_has_the_lock(root: Path, call: str) -> None:
    """What another process does while it holds the lock is seen."""
    store = FolderStore(root)
    etag = store.put("h", b"1").etag
    with (root / ".x1-mirror/lock-h").open("ab") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if call == "create":
            (root / "h").unlink()
            waiting = pool.submit(store.create, "h", b"mine")
        else:
            waiting = pool.submit(store.swap, "h", b"mine", etag)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        (root / "h").write_bytes(b"theirs")
        fcntl.flock(lock, fcntl.LOCK_UN)
        with pytest.raises(ChangedError):
            waiting.result(10)
    assert store.get("h")[0] == b"theirs"


def test_a_killed_writer_leaves_neither_a_lock_nor_a_half_file(root: Path) -> None:
    store = FolderStore(root)
    store.create("count", b"0")
    child = swapper(root, 10**9)
    while int(store.get("count")[0]) < 10:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    data, meta = store.get("count")
    assert int(data) >= 10
    store.swap("count", b"mine", meta.etag)
    assert store.get("count")[0] == b"mine"


class AgainstAModel(RuleBasedStateMachine):
    """Any sequence of calls against a dictionary."""

    keys = st.sampled_from(["a", "b", "d/a", "d/e/f", "d/e/g"])
    contents = st.binary(max_size=4)

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = FolderStore(Path(self.folder.name) / "m")
        self.model: dict[str, bytes] = {}
        self.etags: dict[tuple[str, bytes], str] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(key=keys, data=contents)
    def put(self, key: str, data: bytes) -> None:
        self.etags[key, data] = self.store.put(key, data).etag
        self.model[key] = data

    @rule(key=keys, data=contents)
    def create(self, key: str, data: bytes) -> None:
        if key in self.model:
            with pytest.raises(ChangedError):
                self.store.create(key, data)
        else:
            self.etags[key, data] = self.store.create(key, data)
            self.model[key] = data

    @rule(key=keys, data=contents, of=contents)
    def swap(self, key: str, data: bytes, of: bytes) -> None:
        etag = self.etags.get((key, of), "none")
        if self.model.get(key) == of and etag != "none":
            self.etags[key, data] = self.store.swap(key, data, etag)
            self.model[key] = data
        else:
            with pytest.raises(ChangedError):
                self.store.swap(key, data, etag)

    @rule(some=st.lists(keys))
    def delete(self, some: list[str]) -> None:
        self.store.delete(some)
        for key in some:
            self.model.pop(key, None)

    @rule(source=keys, to=keys)
    def copy(self, source: str, to: str) -> None:
        if source in self.model:
            self.store.copy(source, to)
            self.model[to] = self.model[source]
        else:
            with pytest.raises(NotThereError):
                self.store.copy(source, to)

    @invariant()
    def is_the_model(self) -> None:
        assert {one.key: self.store.get(one.key)[0] for one in self.store.below("")} == self.model
        assert self.store.names() == sorted({key.split("/")[0] for key in self.model})


AgainstAModel.TestCase.settings = settings(max_examples=10, stateful_step_count=20)
TestAgainstAModel = AgainstAModel.TestCase


def test_a_writer_that_was_stopped_with_the_lock_keeps_others_out_but_not_for_ever(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_store, "LOCKED_S", 0.2)
    store, stopped = FolderStore(root), FolderStore(root)
    etag = store.create("tiny/head.json", b"1")
    with stopped._locked("tiny/head.json"):
        with pytest.raises(
            UnreachableError, match=r"lock-tiny: another process has held this lock for 0\.2 s"
        ):
            store.swap("tiny/head.json", b"2", etag)
        store.create("other/head.json", b"1")
    assert store.swap("tiny/head.json", b"2", etag)
