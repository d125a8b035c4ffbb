"""Sending a checkpoint, in a thread of its own, so that records follow and the lease is kept meanwhile.

Every file is read once, hashed on the way and sent; one that an earlier checkpoint in the mirror has is
copied there instead. What was sent is remembered: a checkpoint that breaks off goes on with the next file.
The files are opened before the first byte: one that is removed while it is sent is sent all the same, unless
the disk needs its room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from x1_pretrain.mirror.head import CHUNK_BYTES, Published
from x1_pretrain.mirror.local import MANIFEST, Local
from x1_pretrain.mirror.patience import StoppedError
from x1_pretrain.mirror.sending import (
    Content,
    OtherContentError,
    Rate,
    Sender,
    check_size,
    hash_file,
    send_file,
)
from x1_pretrain.records.checkpoint_files import folder_name
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.stores.store import DeniedError, NotThereError, Store, StoreError, UnreachableError

AT_ONCE = 3  # files
ROOM = 1.25  # of a checkpoint's size: with less free, one that was removed is let go
Key = tuple[str, str]  # name and sha256 of a file


@dataclass
class Parcel:
    """A checkpoint on its way."""

    local: Local
    epoch: int
    path: str  # below the run
    copies: Mapping[Key, str]  # keys of files that the mirror has
    sent: dict[str, Content] = field(default_factory=dict)
    published: Published | None = None  # it is all there
    bad: str = ""  # it is not what its manifest says
    void: bool = False  # its steps were gone back over


class Outbox(Sender):
    """One checkpoint at a time."""

    def __init__(self, store: Store, run: str, rate: Rate, on_change: Callable[[], None]) -> None:
        super().__init__(on_change)
        self._store, self._name, self._rate = store, run, rate
        self.parcel: Parcel | None = None
        self._begun: dict[str, Parcel] = {}  # by the hash of the manifest

    def begin(self, parcel: Parcel) -> None:
        """Send it; or go on with it, where it was begun before."""
        assert not self.busy, "one at a time"
        before = self._begun.get(parcel.local.manifest_sha256)
        if before:
            parcel = replace(parcel, path=before.path, sent=before.sent)
        self._begun = {parcel.local.manifest_sha256: parcel}
        self.parcel = parcel
        self._stop.clear()
        self._start(lambda: self._work(parcel), "x1-send")

    def ready(self) -> Parcel | None:
        """What was sent, or turned out bad; until it is forgotten."""
        if self.busy or self.parcel is None or not (self.parcel.published or self.parcel.bad):
            return None
        return self.parcel

    def forget(self) -> None:
        """What is ready: the head in the store knows of it."""
        self.parcel, self._begun = None, {}

    def void(self, step: int) -> None:
        """Training went back to `step`: what is newer is not to be published."""
        if self.parcel and self.parcel.local.step > step:
            self.parcel.void = True

    def _work(self, parcel: Parcel) -> bool:
        try:
            parcel.published = self._send(parcel)
        except OtherContentError as error:
            parcel.bad = str(error)
        except StoreError as error:
            self.error = error
        except FileNotFoundError as error:
            if parcel.local.path.exists():  # else all of it is gone from the disk
                parcel.bad = f"{Path(error.filename).name} is missing"
        except StoppedError:
            pass  # nobody wants it any more
        except OSError as error:  # too many open files, a disk that stumbled: not the checkpoint's fault
            self.error = UnreachableError(f"{parcel.local.path}: can't be read ({error.strerror})")
        arrived = bool(parcel.published or parcel.bad)
        self.failing = not arrived and (self.failing or self.error is not None)
        return arrived  # an error is said at the next look, which is not hastened by it

    def _send(self, parcel: Parcel) -> Published:
        local = parcel.local
        with ExitStack() as stack:
            names = sorted(local.files, key=lambda name: -local.files[name][0])
            opened = {name: stack.enter_context((local.path / name).open("rb")) for name in names}
            with ThreadPoolExecutor(AT_ONCE, "x1-send") as pool:
                jobs = [pool.submit(self._file, parcel, name, opened[name]) for name in names]
            for job in jobs:
                job.result()
        chunks = {name: parcel.sent[name].chunks for name in sorted(local.files)}
        text = json.dumps({"chunk_bytes": CHUNK_BYTES, "files": chunks}, separators=(",", ":")).encode()
        for name, data in (("chunks.json", text), (MANIFEST, local.manifest)):
            self._store.put(self._key(parcel, name), data)
            self._rate.count(len(data))
        return Published(
            step=local.step,
            epoch=parcel.epoch,
            path=parcel.path,
            bytes=local.bytes + len(text),
            manifest_sha256=local.manifest_sha256,
            chunks_sha256=hashlib.sha256(text).hexdigest(),
            time_utc=utc_now(),
        )

    def _key(self, parcel: Parcel, name: str) -> str:
        return f"{self._name}/{parcel.path}/{name}"

    def _file(self, parcel: Parcel, name: str, file: BinaryIO) -> None:
        if name in parcel.sent:
            return
        want, key = parcel.local.files[name], self._key(parcel, name)
        if os.fstat(file.fileno()).st_size != want[0]:
            raise OtherContentError(f"{name} has {os.fstat(file.fileno()).st_size} bytes, not {want[0]}")
        stop = Stop(parcel, self._stop)
        source = parcel.copies.get((name, want[1]))
        content = self._copied(source, key, file, stop) if source else None
        content = content or send_file(self._store, key, file, self._rate, stop)
        if content.sha256 != want[1]:
            raise OtherContentError(f"{name} does not match its hash")
        parcel.sent[name] = content
        self.arrived += 1

    def _copied(self, source: str, key: str, file: BinaryIO, stop: Stop) -> Content | None:
        """Within the store; None if it has lost the source, or does not copy that."""
        content = hash_file(file, stop)
        try:
            self._store.copy(source, key)
            check_size(self._store, self._store.stat(key), content.bytes)
        except (NotThereError, DeniedError):
            return None
        return content


class Stop:
    """Whether to stop in the middle of a file; asked at every piece."""

    def __init__(self, parcel: Parcel, told: threading.Event) -> None:
        self._parcel, self._told, self._asked = parcel, told, 0

    def __call__(self) -> bool:
        self._asked += 1
        needed = self._asked % 64 == 0 and not self._parcel.local.path.exists()
        return self._told.is_set() or self._parcel.void or (needed and self._is_short_of_room())

    def _is_short_of_room(self) -> bool:
        local = self._parcel.local
        free = shutil.disk_usage(local.path.parent).free
        return free < ROOM * local.bytes


def path_of(space: str, local: Local, taken: Callable[[str], bool]) -> str:
    """Where a checkpoint goes below the run: never over one that the head names, or named."""
    path = f"{space}/checkpoints/{folder_name(local.step)}"
    return f"{path}-{local.manifest_sha256[:8]}" if taken(path) else path
