"""A mirror in a folder: a second disk, a network disk.

A file appears by rename, after it and its folder are on the disk. `create` and `swap` look and rename under a
lock of the run, so that among processes that see the lock there is one winner. A process that is stopped
while it holds the lock (a thousandth of a second) keeps the others out: for them the store is away.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from x1_pretrain.stores.clock import StoreClock
from x1_pretrain.stores.pieces import callers_errors, counted, whole_range
from x1_pretrain.stores.store import (
    OWN,
    ChangedError,
    DeniedError,
    Meta,
    NotThereError,
    StoreError,
    UnreachableError,
    checked,
)

WRITING = f"{OWN}/writing"  # beside the locks
LOCKED_S, LOOK_S = 10.0, 0.01  # a lock that is held for so long is held by somebody who does not go on
HASHED_BYTES = 1 << 20  # up to this size a version is its content, as on S3; above, size and time
LEFT_BEHIND_S = 86_400  # a temporary file of this age belongs to nobody
COPY_BYTES = 4 << 20
UNLOCKED = ("sshfs", "s3fs", "gcsfuse", "goofys", "rclone", "mount-s3", "mountpoint-s3", "s3ql", "davfs")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.ENODEV, errno.EAGAIN, errno.EBUSY)
NO_WAY = (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENETUNREACH, errno.EMFILE, errno.ENFILE)


class FolderStore:
    """Store in a folder. The folder is made at the first write, the one above it must be there: a disk that
    is not mounted is seldom replaced by a folder on the disk below it."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self.label = str(root)
        self.conditional = file_system(self._root) not in UNLOCKED
        self.every_s_at_least = 0.0
        self._device: int | None = None  # of the root, once it was seen
        self._clock = StoreClock(self._probe)

    # ---- reading

    def get(self, key: str) -> tuple[bytes, Meta]:
        with self._said(key), self._path(key).open("rb") as file:
            data, status = file.read(), os.fstat(file.fileno())
            return data, _meta(key, status, _content_tag(data, status))

    def read(self, key: str, start: int, end: int) -> bytes:
        with self._said(key), self._path(key).open("rb") as file:
            data = os.pread(file.fileno(), end - start, start)
        return whole_range(data, start, end, f"{self.label}/{key}")

    def stat(self, key: str) -> Meta:
        with self._said(key):
            path = self._path(key)
            return _meta(key, path.stat(), _tag(path))

    def below(self, prefix: str) -> Iterator[Meta]:
        """With an empty etag: to know the versions all the files would have to be read."""
        top = self._path(prefix) if prefix else self._root
        with self._said(prefix):
            for folder, folders, files in os.walk(top, onerror=_unless_gone):
                folders[:] = sorted(name for name in folders if name != OWN)
                for name in sorted(files):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        yield _meta(path.relative_to(self._root).as_posix(), path.stat(), "")

    def names(self, prefix: str = "") -> list[str]:
        with self._said(prefix):
            try:
                there = (self._path(prefix) if prefix else self._root).iterdir()
                return sorted({path.name for path in there} - {OWN})
            except (FileNotFoundError, NotADirectoryError):
                return []

    # ---- writing

    def put(self, key: str, data: bytes) -> Meta:
        return self.put_stream(key, [data], len(data))

    def put_stream(self, key: str, pieces: Iterable[bytes], size: int) -> Meta:
        whole = counted(pieces, size, f"{self.label}/{key}")
        with callers_errors(), self._written(key, whole) as temporary:
            self._publish(temporary, key)
        return self.stat(key)

    def create(self, key: str, data: bytes) -> str:
        with self._written(key, [data]) as temporary, self._locked(key):
            if self._path(key).exists():
                raise ChangedError(f"{self.label}/{key}: is already there")
            return self._published_tag(temporary, key, data)

    def swap(self, key: str, data: bytes, etag: str) -> str:
        with self._written(key, [data]) as temporary, self._locked(key):
            try:
                there = _tag(self._path(key))
            except (FileNotFoundError, NotADirectoryError):
                raise ChangedError(f"{self.label}/{key}: is no longer there") from None
            if there != etag:
                raise ChangedError(f"{self.label}/{key}: another version is there")
            return self._published_tag(temporary, key, data)

    def copy(self, source: str, target: str) -> None:
        with self._said(source), self._path(source).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.put_stream(target, iter(lambda: file.read(COPY_BYTES), b""), size)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._said(key), suppress(FileNotFoundError, NotADirectoryError):
                path = self._path(key)
                path.unlink()
                self._remove_empty(path.parent)

    def now(self) -> datetime | None:
        return self._clock.now()

    def close(self) -> None:
        """Nothing is kept open."""

    # ---- how

    def _path(self, key: str) -> Path:
        parts = checked(key, self.label).split("/")
        if OWN in parts:
            raise DeniedError(f"{self.label}: {key!r} is the store's own")
        return self._root.joinpath(*parts)

    def _publish(self, temporary: Path, key: str) -> None:
        path = self._path(key)
        for last in (False, False, False, True):
            try:
                _make_folders(path.parent, self._root)
                temporary.replace(path)
                return _sync_folder(path.parent)
            except FileNotFoundError:  # a `delete` took the folder while it was empty
                if last:
                    raise
        return None

    def _published_tag(self, temporary: Path, key: str, data: bytes) -> str:
        self._publish(temporary, key)
        return _content_tag(data, self._path(key).stat())

    @contextmanager
    def _written(self, key: str, pieces: Iterable[bytes]) -> Iterator[Path]:
        """A temporary file with `pieces`, on the disk; gone at the end if nobody renamed it."""
        with self._said(key):
            self._path(key)  # a wrong key before anything is written
            temporary = self._writing_folder() / f"{os.getpid()}-{secrets.token_hex(8)}"
            try:
                with temporary.open("xb", buffering=0) as file:
                    for piece in pieces:
                        _write_all(file.fileno(), piece)
                    os.fsync(file.fileno())
                yield temporary
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _writing_folder(self) -> Path:
        folder = self._root / WRITING
        if self._device is None or not folder.is_dir():
            self._open_root()
        return folder

    def _open_root(self) -> None:
        """Make the store's own folders; refuse when the disk under the root is not the one it was."""
        self._refuse_other_disk()
        if not self._root.parent.is_dir():
            raise DeniedError(
                f"{self.label}: no folder {self._root.parent}; mount the disk, or make the folder"
            )
        _make_folders(self._root / WRITING, self._root.parent)
        self._device = self._root.stat().st_dev
        try:
            now = self._probe()
        except DeniedError:
            now = datetime.now(UTC)  # a full disk: what is swept may be what fills it
        _sweep(self._root / WRITING, now)

    def _refuse_other_disk(self) -> None:
        """Nothing is "not there" or "new" because the disk was unmounted under us."""
        if self._device is None or (self._root.is_dir() and self._root.stat().st_dev == self._device):
            return
        raise UnreachableError(
            f"{self.label}: the folder is gone, or another disk is there now; mount it again"
        )

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with (self._root / OWN / f"lock-{key.partition('/')[0]}").open("ab") as file:
            until = time.monotonic() + LOCKED_S
            while not _lock(file):
                if time.monotonic() > until:
                    raise UnreachableError(
                        f"{file.name}: another process has held this lock for {LOCKED_S:g} s; is one stopped?"
                    )
                time.sleep(LOOK_S)
            yield  # let go when the file is closed, also by a kill

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:
                return  # something is in it, or someone else removed it
            folder = folder.parent

    def _probe(self) -> datetime:
        """A file of this moment: its time is by the clock of whoever holds the disk."""
        if not self._root.is_dir():
            raise DeniedError(f"{self.label}: no such folder")  # asking the time does not make one
        with self._written("clock", [b"0"]) as temporary:
            return _moment(temporary.stat())

    @contextmanager
    def _said(self, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            self._refuse_other_disk()
            raise _as_store_error(error, self.label, key) from None


# ------------------------------------------------------------------------------------------------------------
# Pure, or of one file


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _as_store_error(error: OSError, label: str, key: str) -> StoreError:
    where, why = f"{label}/{key}".rstrip("/"), os.strerror(error.errno or 0)
    if error.errno in NO_ROOM:
        return DeniedError(f"{where}: no room on that disk ({why}); free some, or choose another folder")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return NotThereError(f"{where}: not there")
    if error.errno == errno.EROFS:
        return DeniedError(f"{where}: the disk is read-only; mount it for writing")
    if error.errno in (errno.EACCES, errno.EPERM):
        return DeniedError(f"{where}: this user may not ({why}); change its owner or mode")
    if error.errno == errno.EXDEV:
        return DeniedError(
            f"{where}: lies on another disk than its mirror; give that disk a mirror of its own"
        )
    if error.errno == errno.EEXIST:
        return DeniedError(f"{where}: a file is there, where a folder should be; name another folder")
    if error.errno in (*NO_DISK, *NO_WAY):
        return UnreachableError(f"{where}: {why}")
    return DeniedError(f"{where}: {why}")


def _tag(path: Path) -> str:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        return _content_tag(file.read() if status.st_size <= HASHED_BYTES else None, status)


def _content_tag(data: bytes | None, status: os.stat_result) -> str:
    if data is None or len(data) > HASHED_BYTES:
        return f"{status.st_mtime_ns}-{status.st_size}"
    return hashlib.sha256(data).hexdigest()


def _meta(key: str, status: os.stat_result, etag: str) -> Meta:
    return Meta(key, status.st_size, etag, _moment(status))


def _unless_gone(error: OSError) -> None:
    """Of a folder that can't be listed: one that a disk does not give now is not an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _moment(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime_ns / 1e9, UTC)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _make_folders(folder: Path, root: Path) -> None:
    """With those between it and `root`, each on the disk before the next."""
    if folder.is_dir():
        return
    if folder != root:
        _make_folders(folder.parent, root)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks can't, and need not
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path, now: datetime) -> None:
    """Remove what killed writers left behind, by the disk's clock: others may be writing."""
    for path in folder.iterdir():
        with suppress(OSError):
            if now.timestamp() - path.stat().st_mtime > LEFT_BEHIND_S:
                path.unlink()


def file_system(path: Path) -> str:
    """The kind of file system that holds `path`, without `fuse.`; empty where Linux doesn't say."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in mounts.splitlines():
        source, where, found, *_ = line.split(" ")
        where = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal.group(1), 8)), where)
        inside = where == "/" or path == Path(where) or Path(where) in path.parents
        if inside and len(where) >= len(best):
            best, kind = where, source if found == "fuse" else found
    return kind.removeprefix("fuse.")
