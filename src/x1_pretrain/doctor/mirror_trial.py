"""Ask a mirror's store what a run will ask of it, and measure how fast it takes and gives bytes.

In a process of its own: a store may not answer for a minute. All that it makes lies below one key, which is
`x1-doctor-<number>` below the run, and is removed at the end, also when the doctor is ended meanwhile: the
parent closes standard input then, and waits a little. What a killed one left is removed by a later one.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from x1_pretrain.doctor.trial import Facts, Voice, answered
from x1_pretrain.errors import UserError
from x1_pretrain.mirror.patience import LANES, StoppedError
from x1_pretrain.mirror.preflight import preflight
from x1_pretrain.stores.address import Address, parse
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import DeniedError, Store, StoreError

MIB = 1 << 20
# Sent one after the other while there is time: the largest tells the rate. 61.25 MiB in all. A repository of
# the Hub keeps what it was once given: less is sent there, nothing of it committed, so nothing can be read.
SIZES, SIZES_HUB = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 40 * MIB), (4 * MIB, 12 * MIB)
FILES = 2  # at a time, as weights and moments go
NAME = "x1-doctor-"
EACH_S = 7.0  # for sending, and for reading
OLD = timedelta(days=1)  # of what an earlier doctor left; whatever is younger may be another's work
CLEANING_S = 4.0  # for what is being sent to end, once nobody wants it any more


class DamagedError(Exception):
    """The store gave other bytes than it was given."""


@dataclass(frozen=True)
class Sample:
    """An object of random bytes: `noise` over and over again."""

    key: str
    noise: bytes
    length: int

    def pieces(self, stop: threading.Event) -> Iterator[bytes]:
        for at in range(0, self.length, len(self.noise)):
            if stop.is_set():
                raise StoppedError
            yield self.noise[: self.length - at]

    def part(self, start: int, end: int) -> bytes:
        turn = start % len(self.noise)
        return (self.noise * ((turn + end - start) // len(self.noise) + 1))[turn : turn + end - start]


class Traffic:
    """What is put below one key of a store, and how fast it went there and back."""

    def __init__(
        self,
        store: Store,
        place: str,
        stop: threading.Event,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store, self.place, self.stop, self._now = store, place, stop, now
        self.rounds: list[list[Sample]] = []

    def send(self, size: int) -> None:
        """Several files at once, each in parts, as a checkpoint goes."""
        each, number = size // FILES, len(self.rounds)
        names = [f"{self.place}/{number}-{file}.safetensors" for file in range(FILES)]
        samples = [Sample(name, os.urandom(min(MIB, each)), each) for name in names]
        self.rounds.append(samples)
        with ThreadPoolExecutor(FILES, "x1-send") as pool:
            jobs = [pool.submit(self._put, sample) for sample in samples]
        for job in jobs:
            job.result()

    def _put(self, sample: Sample) -> None:
        self.store.put_stream(sample.key, sample.pieces(self.stop), sample.length)

    def read(self, number: int) -> None:
        """By ranges, many at a time, as a checkpoint is fetched; DamagedError if it is not what was sent."""
        samples = self.rounds[number]
        step = max(1, -(-sum(sample.length for sample in samples) // LANES))
        spans = [(sample, at) for sample in samples for at in range(0, sample.length, step)]
        with ThreadPoolExecutor(LANES, "x1-read") as pool:
            jobs = [pool.submit(self._get, one, at, min(at + step, one.length)) for one, at in spans]
        for job in jobs:
            job.result()

    def _get(self, sample: Sample, start: int, end: int) -> None:
        if self.stop.is_set():
            raise StoppedError
        if self.store.read(sample.key, start, end) != sample.part(start, end):
            raise DamagedError

    def shown(self, error: StoreError) -> str:
        """Without the key that is nobody's business."""
        return re.sub(rf"/{re.escape(self.place)}(/[^ :]+)?", "", str(error))

    def remove(self) -> None:
        """All of it; StoreError if the store does not do it."""
        self.store.delete([sample.key for samples in self.rounds for sample in samples])
        for old in (self.place, *self._old()):
            self.store.delete([meta.key for meta in self.store.below(old)])
        self.store.close()  # some stores only do it now

    def _old(self) -> Iterator[str]:
        run, before = self.place.rpartition("/")[0], self._now() - OLD
        for name in self.store.names(run):
            old = f"{run}/{name}".lstrip("/")
            if name.startswith(NAME) and all(meta.modified < before for meta in self.store.below(old)):
                yield old


class Ending:
    """How a visit ends: by itself, or when the doctor does not want to wait any more."""

    def __init__(self) -> None:
        self.stop, self._done = threading.Event(), threading.Event()
        self.traffic: Traffic | None = None

    def told(self) -> None:
        """In a thread of its own: the visit removes what it made, or this does if the visit hangs."""
        self.stop.set()
        if not self._done.wait(CLEANING_S) and self.traffic:
            with suppress(StoreError):
                self.traffic.remove()

    @contextmanager
    def visiting(self, traffic: Traffic, voice: Voice) -> Iterator[None]:
        self.traffic = traffic
        try:
            yield
        finally:
            self._removed(traffic, voice)
            self._done.set()

    def _removed(self, traffic: Traffic, voice: Voice) -> None:
        try:
            traffic.remove()
        except StoreError as error:
            with suppress(OSError):  # nobody may listen any more
                voice.say("left", place=f"{traffic.store.label}/{traffic.place}", message=str(error))


def answer(ending: Ending, task: Facts, voice: Voice) -> None:
    try:
        address = parse(task["uri"])
        store = open_store(address, task["endpoint"], retries=1)
    except (UserError, StoreError) as error:
        voice.say("refused", message=str(error))
        return
    place = "/".join(part for part in (task["run"], f"{NAME}{secrets.token_hex(8)}") if part)
    traffic = Traffic(store, place, ending.stop)
    with ending.visiting(traffic, voice):
        try:
            preflight(store, traffic.place, without_lease=True)
            facts = {"conditional": store.conditional, "look_s": store.every_s_at_least}
            voice.say("store", label=store.label, **facts)
            measure(traffic, address, voice, task["each_s"])
        except UserError as error:
            voice.say("refused", message=str(error))
        except StoppedError:
            pass  # nobody waits for the rest


def measure(traffic: Traffic, address: Address, voice: Voice, each_s: float) -> None:
    """Say how it went after each size, and what went wrong."""
    on_hub = address.scheme == "hf"
    try:
        for facts in rounds(traffic.send, SIZES_HUB if on_hub else SIZES, each_s):
            voice.say("sent", **facts)
        if on_hub:
            return
        if address.is_folder:
            forget(Path(address.prefix), traffic)
        sizes = [sum(sample.length for sample in samples) for samples in traffic.rounds]
        numbers = iter(range(len(sizes)))
        for facts in rounds(lambda _: traffic.read(next(numbers)), sizes, each_s):
            voice.say("read", **facts)
    except DamagedError:
        voice.say("trouble", kind="damaged", message="it gives back other bytes than it was given")
    except StoreError as error:
        kind = "denied" if isinstance(error, DeniedError) else "away"
        voice.say("trouble", kind=kind, message=traffic.shown(error))


def rounds(
    do: Callable[[int], None],
    sizes: Sequence[int],
    each_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Facts]:
    """Each size once, in order, as far as the time is enough: bytes and seconds of it, and bytes in all."""
    begun, total = clock(), 0
    for number, size in enumerate(sizes):
        before = clock()
        do(size)
        now, total = clock(), total + size
        yield {"bytes": size, "seconds": max(now - before, 1e-6), "total_bytes": total}
        following = sizes[number + 1] if number + 1 < len(sizes) else 0
        if now - begun + following * (now - before) / size > each_s:
            return


def forget(root: Path, traffic: Traffic) -> None:
    """Out of the page cache: what was just written would be read from memory."""
    for sample in (sample for samples in traffic.rounds for sample in samples):
        with suppress(OSError, AttributeError), (root / sample.key).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    ENDING = Ending()
    answered(partial(answer, ENDING), ENDING.told)
