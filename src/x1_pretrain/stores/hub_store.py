"""A mirror in a repository of the Hugging Face Hub: hf://user/x1-runs, hf://datasets/user/x1-runs/folder.

The first write makes the repository if it is not there, and makes it private: whether to show runs is for
their owner to say. One that is there stays as public or private as it is.

A commit is the only write that the Hub knows, and it allows some hundred an hour. So `put`, `copy` and
`delete` are staged, and go out together with the next `create` or `swap` in one commit; `close` and listings
send what is staged. Content of large files is sent at once, to where no reader sees it before the commit.
`create` and `swap` are commits onto the commit they looked at: whoever comes second is told, looks again, and
has lost only if that very object is another. Other runs in the repository may commit in between.

Large files go as Git LFS does it (https), not by Xet: the time of every request is bounded, and no cache is
kept in the home folder. LFS wants to know the hash first, so a large file is spooled in the temporary folder
(TMPDIR) while it is sent. The Hub keeps the history of a repository: what is deleted still counts against its
storage until the owner squashes the history.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

from huggingface_hub import CommitOperationCopy
from huggingface_hub.hf_api import RepoFile

from x1_pretrain.stores.address import Address
from x1_pretrain.stores.hub_client import (
    PATIENCE_S,
    ConflictError,
    last_date,
    prepare,
    refuse_offline,
    said,
)
from x1_pretrain.stores.hub_repository import Repository, version_of
from x1_pretrain.stores.hub_staging import Staged, Staging, git_oid, versions
from x1_pretrain.stores.pieces import callers_errors, counted, whole_range
from x1_pretrain.stores.store import (
    ChangedError,
    DeniedError,
    Meta,
    NotThereError,
    StoreError,
    UnreachableError,
    checked,
)

SMALL_BYTES = 1 << 20  # goes with the commit
CLOCK_KEPT_S = 60.0
CONFLICTS = 8  # in a row, before the repository is called too busy
OF_THE_HUB = {".gitattributes", "README.md"}  # at the top of a repository, and no runs


class HubStore:
    """Store in a repository."""

    every_s_at_least = 60.0  # between two looks: each is a commit, and the Hub counts commits by the hour

    def __init__(
        self, address: Address, endpoint: str | None, retries: int = 2, timeout_s: float = 30.0
    ) -> None:
        self.label = str(address)
        self.conditional = True
        refuse_offline(self.label)
        prepare(retries, timeout_s)
        self._repository = Repository(address.bucket, endpoint, retries)
        self._prefix, self._retries = address.prefix, retries
        self._staging = Staging()
        self._committing = threading.RLock()

    # ---- reading

    def get(self, key: str) -> tuple[bytes, Meta]:
        path = self._path(key)
        waiting = self._waiting(key)
        if waiting and waiting.data is not None:
            return waiting.data, self._meta_of(waiting, key)
        if waiting:
            self._commit()
        for _ in range(self._retries + 1):
            meta = self.stat(key)
            with said(self._where(key)):
                data = self._repository.content(path, None)
            if meta.etag in versions(data):
                return data, meta
        raise UnreachableError(f"{self._where(key)}: what came is not what the Hub says is there")

    def read(self, key: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        waiting = self._waiting(key)
        if waiting and waiting.data is not None:
            data = waiting.data[start:end]
        else:
            if waiting:
                self._commit()
            with said(self._where(key)):
                data = self._repository.content(self._path(key), (start, end))
        return whole_range(data, start, end, self._where(key))

    def stat(self, key: str) -> Meta:
        waiting = self._waiting(key)
        if waiting:
            return self._meta_of(waiting, key)
        with said(self._where(key)):
            found = self._repository.files([self._path(key)], None, dated=True)
            if not found:
                raise NotThereError(f"{self._where(key)}: not there")
            return self._meta(found[0])

    def below(self, prefix: str) -> Iterator[Meta]:
        self._commit()
        with suppress(NotThereError), said(self._where(prefix)):
            for found in self._repository.tree(self._folder(prefix), everything=True):
                if isinstance(found, RepoFile):
                    yield self._meta(found)

    def names(self, prefix: str = "") -> list[str]:
        self._commit()
        names: set[str] = set()
        with suppress(NotThereError), said(self._where(prefix)):
            names = {
                found.path.rpartition("/")[2]
                for found in self._repository.tree(self._folder(prefix), everything=False)
            }
        return sorted(names - (set() if self._folder(prefix) else OF_THE_HUB))

    # ---- writing

    def put(self, key: str, data: bytes) -> Meta:
        if len(data) > SMALL_BYTES:
            return self.put_stream(key, [data], len(data))
        return self._stage(key, Staged(len(data), git_oid(data), data))

    def put_stream(self, key: str, pieces: Iterable[bytes], size: int) -> Meta:
        """Spooled, then sent; what `pieces` raises is raised. Small content waits for the commit."""
        whole = counted(pieces, size, self._where(key))
        with callers_errors():
            if size <= SMALL_BYTES:
                return self.put(key, b"".join(whole))
            with self._spooled(key, whole) as file:
                return self._stage(key, self._sent(key, file, size))

    def create(self, key: str, data: bytes) -> str:
        return self._commit_if(key, data, None)

    def swap(self, key: str, data: bytes, etag: str) -> str:
        return self._commit_if(key, data, etag)

    def copy(self, source: str, target: str) -> None:
        """The Hub copies large files by themselves; small ones are fetched and sent with the commit."""
        if self._waiting(source):
            self._commit()
        with said(self._where(source)):
            at = self._repository.tip()
            found = self._repository.files([self._path(source)], at)
            if not found:
                raise NotThereError(f"{self._where(source)}: not there")
            # as it is in this commit: the source may be deleted before the copy is committed
            copied = CommitOperationCopy(self._path(source), self._path(target), src_revision=at)
        self._stage(target, Staged(found[0].size, version_of(found[0]), sent=copied))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._staging.add(self._path(key), Staged())
            if self._staging.much():
                self._commit()

    def now(self) -> datetime | None:
        """By the Date header of the newest answer."""
        told = last_date()
        if told is None or time.monotonic() - told[1] > CLOCK_KEPT_S:
            with suppress(NotThereError), said(self.label):
                self._repository.tip()
        return self._moment()

    def close(self) -> None:
        """Commit what is staged."""
        self._commit()

    # ---- commits

    def _commit(self) -> None:
        """What is staged, onto whatever is there."""
        with self._committing:
            for _ in range(CONFLICTS):
                batch = self._staging.all()
                if not batch:
                    return None
                with suppress(ConflictError), said(self.label):
                    at = self._repository.tip_or_new()
                    self._send_commit(batch, at)
                    return self._staging.done(batch)
            raise UnreachableError(f"{self.label}: others commit there all the time")

    def _commit_if(self, key: str, data: bytes, expected: str | None) -> str:
        """With what is staged, onto a commit in which `key` has this version. An answer that got lost may
        mean that it was done, so look before the next try."""
        path, trouble, busy = self._path(key), None, f"{self._where(key)}: others commit there all the time"
        ours, until = Staged(len(data), git_oid(data), data), time.monotonic() + PATIENCE_S
        with self._committing:
            for _ in range(CONFLICTS):
                with said(self._where(key)):
                    at = self._repository.tip_or_new()
                    there = self._repository.version(path, at)
                if trouble and there in versions(data):
                    return there or ""
                if trouble and time.monotonic() > until:
                    raise trouble
                if there != expected:
                    raise ChangedError(f"{self._where(key)}: another version is there")
                batch = self._staging.all() | {path: ours}
                try:
                    with said(self._where(key)):
                        return self._committed(path, self._send_commit(batch, at), batch, ours)
                except ConflictError:
                    continue
                except UnreachableError as error:
                    if trouble:
                        raise
                    trouble = error
            raise trouble or UnreachableError(busy)

    def _committed(self, path: str, at: str, batch: dict[str, Staged], ours: Staged) -> str:
        self._staging.done(batch)
        try:
            with said(self.label):
                return self._repository.version(path, at) or ours.etag
        except StoreError:
            return ours.etag  # which it is, unless the repository keeps such files as large ones

    def _send_commit(self, batch: dict[str, Staged], at: str) -> str:
        """The commit that did it; ConflictError if `at` is no longer the newest."""
        going = [path for path, staged in batch.items() if staged.gone]
        there = {found.path for found in self._repository.files(going, at)}
        return self._repository.commit(
            [staged.operation(path) for path, staged in batch.items() if not staged.gone or path in there], at
        )

    # ---- large files

    def _sent(self, key: str, file: BinaryIO, size: int) -> Staged:
        """The content on the Hub, for the next commit. A new operation each time, as Staged has it."""
        for last in (*[False] * self._retries, True):
            try:
                with said(self._where(key)):
                    return self._sent_once(self._path(key), file, size)
            except UnreachableError:
                if last:
                    raise
        raise AssertionError("unreachable")

    def _sent_once(self, path: str, file: BinaryIO, size: int) -> Staged:
        operation, sha256 = self._repository.send(path, file)
        if operation is not None:
            return Staged(size, sha256, sent=operation)
        file.seek(0)
        data = file.read()  # text of a few MB: the Hub wants it in the commit
        return Staged(size, git_oid(data), data)

    @contextmanager
    def _spooled(self, key: str, pieces: Iterable[bytes]) -> Iterator[BinaryIO]:
        try:
            with tempfile.TemporaryFile(prefix="x1-mirror-") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                yield file
        except OSError as error:
            raise DeniedError(
                f"{self._where(key)}: no temporary copy of it can be kept ({os.strerror(error.errno or 0)}); "
                "make room, or set TMPDIR to a folder that has some"
            ) from None

    # ---- how

    def _path(self, key: str) -> str:
        if ".git" in checked(key, self.label).split("/"):
            raise DeniedError(f"{self.label}: {key!r} is no key of an object")
        return f"{self._prefix}/{key}" if self._prefix else key

    def _folder(self, prefix: str) -> str:
        return "/".join(part for part in (self._prefix, prefix) if part)

    def _where(self, key: str) -> str:
        return f"{self.label}/{key}".rstrip("/")

    def _stage(self, key: str, staged: Staged) -> Meta:
        self._staging.add(self._path(key), staged)
        if self._staging.much():
            self._commit()
        return self._meta_of(staged, key)

    def _waiting(self, key: str) -> Staged | None:
        staged = self._staging.of(self._path(key))
        if staged and staged.gone:
            raise NotThereError(f"{self._where(key)}: not there")
        return staged

    def _meta_of(self, staged: Staged, key: str) -> Meta:
        return Meta(key, staged.size, staged.etag, self._moment() or datetime.now(UTC))

    def _meta(self, found: RepoFile) -> Meta:
        key = found.path.removeprefix(self._prefix + "/") if self._prefix else found.path
        date = found.last_commit.date if found.last_commit else datetime.now(UTC)
        return Meta(key, found.size, version_of(found), date.astimezone(UTC))

    def _moment(self) -> datetime | None:
        told = last_date()
        return told[0] + timedelta(seconds=time.monotonic() - told[1]) if told else None
