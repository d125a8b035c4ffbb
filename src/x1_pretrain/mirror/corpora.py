"""Sending the corpora of a run, where that was asked for: once for all runs of a mirror, and after all else.

`data/<fingerprint>/` is whole when its manifest is there, which is sent last, and nobody deletes it: nobody
begins to once a head names it, so it is looked at only after that (old_corpora.py). A thread of its own
sends; it pauses between two pieces while a checkpoint is on its way.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from x1_pretrain.mirror.head import DATA
from x1_pretrain.mirror.patience import StoppedError
from x1_pretrain.mirror.sending import OtherContentError, Rate, Sender, hash_file, send_file
from x1_pretrain.stores.store import Meta, Store, StoreError, UnreachableError, there

FILES = ("tokenizer.json", "val.idx.npy", "train.idx.npy", "val.bin", "train.bin")
MANIFEST = "manifest.json"
GOING = "going"  # beside it: `x1 runs gc` deletes the corpus
GOING_S = 900.0  # of that age it was left by one that was killed
AGAIN_S = 2.0
FOR_GOOD = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # else: tried again


class CorpusSender(Sender):
    """The corpora of one run. `whole` maps those that the mirror has to their fingerprints."""

    def __init__(
        self,
        store: Store,
        corpora: Mapping[str, str],
        whole: Mapping[str, str],
        rate: Rate,
        on_change: Callable[[], None] = lambda: None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(on_change)
        self.whole = dict(whole)
        self.bad: dict[str, str] = {}  # names of corpora that can't be sent, and why; of the last try
        self._store, self._corpora, self._rate = store, dict(corpora), rate
        self._free, self._steady = threading.Event(), steady
        self._seen: dict[str, float] = {}  # since when, by etag: signs of a gc

    def left(self) -> list[str]:
        """Those that are not there whole, and could be."""
        return [name for name in self._corpora if name not in self.whole and name not in self.bad]

    def go_on(self) -> None:
        """Nothing else is to be sent."""
        self._free.set()
        if self.left() and not self.busy:
            self._start(self._work, "x1-data")

    def pause(self) -> None:
        self._free.clear()

    def _work(self) -> bool:
        try:
            for name in self.left():
                self._corpus(name, Path(self._corpora[name]))
            self.failing = False
        except StoreError as error:
            self.error, self.failing = error, True
            return False
        except StoppedError:
            return False
        return True

    def _corpus(self, name: str, folder: Path) -> None:
        try:
            manifest = (folder / MANIFEST).read_bytes()
            tree = json.loads(manifest)
            place, hashes = f"{DATA}/{tree['fingerprint']}", hashes_of(tree)
            self._outlast_gc(place)
            if not self._has(f"{place}/{MANIFEST}", len(manifest)):
                for file in FILES:
                    self._file(f"{place}/{file}", folder / file, hashes.get(file))
                self._store.put(f"{place}/{MANIFEST}", manifest)
            self.whole[name] = tree["fingerprint"]
        except (*FOR_GOOD, ValueError, LookupError, TypeError, OtherContentError) as error:
            self.bad[name] = str(error)
        except OSError as error:
            raise UnreachableError(f"{folder}: can't be read ({error.strerror})") from None

    def _outlast_gc(self, place: str) -> None:
        """What it said of the corpus before our head named it, it does."""
        while (found := going(self._store, place)) is not None:
            sign, age_s = found
            since = self._seen.setdefault(sign.etag, self._steady())
            if max(age_s, self._steady() - since) > GOING_S:  # some stores don't tell the time
                return self._store.delete([f"{place}/{GOING}"])
            if self._stop.wait(AGAIN_S):
                raise StoppedError
        return None

    def _has(self, key: str, size: int) -> bool:
        found = there(self._store, key)
        return found is not None and found.bytes == size

    def _file(self, key: str, path: Path, want: str | None) -> None:
        with path.open("rb") as file:
            if self._has(key, path.stat().st_size):
                content = hash_file(file, self._pausing)
            else:
                content = send_file(self._store, key, file, self._rate, self._pausing)
                self.arrived += 1
        if want is not None and content.sha256 != want:
            raise OtherContentError(f"{path} does not match its hash")

    def _pausing(self) -> bool:
        """Wait here while something else is sent; True to stop."""
        while not self._free.wait(0.5):
            if self._stop.is_set():
                return True
        return self._stop.is_set()


def going(store: Store, place: str) -> tuple[Meta, float] | None:
    """The sign of a gc that deletes the corpus, and its age by the store's clock, 0 where it has
    none; None: nobody does."""
    sign = there(store, f"{place}/{GOING}")
    return (sign, ((store.now() or sign.modified) - sign.modified).total_seconds()) if sign else None


def bytes_of(folder: Path) -> int:
    """Of what is sent of a corpus; of what is missing nothing."""
    found = 0
    for name in (*FILES, MANIFEST):
        with suppress(OSError):
            found += (folder / name).stat().st_size
    return found


def hashes_of(manifest: dict[str, Any]) -> dict[str, str]:
    """sha256 of the files whose hashes the manifest has; its fingerprint must be over them."""
    hashes = {f"{split}.bin": str(manifest[split]["sha256"]) for split in ("train", "val")}
    hashes["tokenizer.json"] = str(manifest["tokenizer"]["sha256"])
    content = hashes["train.bin"] + hashes["val.bin"] + hashes["tokenizer.json"]
    if hashlib.sha256(content.encode()).hexdigest() != manifest["fingerprint"]:
        raise ValueError("its fingerprint is not of its files")
    return hashes
