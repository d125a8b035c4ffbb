"""A store in memory that keeps to the protocol, with a clock of its own and faults where a test wants them.

clock = Clock()
store = ModelStore(clock)
store.faults.append(Fault("after", on="swap"))   # the next swap goes through and says it did not
store.before = lambda op, key: ...               # called ahead of each operation: to wait, to count, to raise
store.history                                    # every version of every object, in their order
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

from x1_pretrain.stores.store import ChangedError, DeniedError, Meta, NotThereError, UnreachableError

T = TypeVar("T")
START = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
Kind = Literal["fail", "after", "late", "twice", "denied"]


@dataclass
class Clock:
    """Time that passes only when it is told to, or when somebody sleeps."""

    t: float = 0.0

    def steady(self) -> float:
        return self.t

    def sleep(self, s: float) -> None:
        self.t += s

    def now(self) -> datetime:
        return START + timedelta(seconds=self.t)

    def utc(self) -> str:
        return self.now().strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Fault:
    """What goes wrong with the next `times` operations `on`, on keys that hold `key`.

    fail    not done, UnreachableError          after  done, UnreachableError all the same
    late    UnreachableError, and done when `deliver` is called: a request that was long under way
    twice   done, then tried again inside the store: a conditional write then meets its own first try
    denied  not done, DeniedError
    """

    kind: Kind
    on: str = (
        ""  # of put, put_stream, create, swap, get, read, stat, copy, below, names, delete, now; "": any
    )
    key: str = ""
    times: int = 1


@dataclass(frozen=True)
class Version:
    t: float  # by the clock without the store's error
    key: str
    data: bytes | None  # None: deleted
    etag: str


@dataclass
class ModelStore:
    clock: Clock
    label: str = "model://runs"
    conditional: bool = True
    every_s_at_least: float = 0.0
    tells_time: bool = True
    skew_s: float = 0.0  # its clock is off by so much
    before: Callable[[str, str], None] = lambda op, key: None
    faults: list[Fault] = field(default_factory=list)
    history: list[Version] = field(default_factory=list)
    late: list[Callable[[], object]] = field(default_factory=list)
    objects: dict[str, tuple[bytes, Meta]] = field(default_factory=dict)
    operations: list[tuple[str, str]] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    # --- the protocol

    def get(self, key: str) -> tuple[bytes, Meta]:
        return self._do("get", key, lambda: self._at(key))

    def read(self, key: str, start: int, end: int) -> bytes:
        def piece() -> bytes:
            data = self._at(key)[0][start:end]
            if len(data) < end - start:
                raise UnreachableError(f"{key}: {len(data)} of {end - start} bytes came")
            return data

        return self._do("read", key, piece)

    def stat(self, key: str) -> Meta:
        return self._do("stat", key, lambda: self._at(key)[1])

    def put(self, key: str, data: bytes) -> Meta:
        return self._do("put", key, lambda: self._write(key, data))

    def put_stream(self, key: str, pieces: Iterable[bytes], size: int) -> Meta:
        data = b"".join(pieces)
        if len(data) != size:
            raise UnreachableError(f"{key}: {len(data)} bytes given, {size} announced")
        return self._do("put_stream", key, lambda: self._write(key, data))

    def create(self, key: str, data: bytes) -> str:
        def there() -> str:
            if key in self.objects:
                raise ChangedError(f"{key}: is there")
            return self._write(key, data).etag

        self._must_be_conditional()
        return self._do("create", key, there)

    def swap(self, key: str, data: bytes, etag: str) -> str:
        def same() -> str:
            if key not in self.objects or self.objects[key][1].etag != etag:
                raise ChangedError(f"{key}: another version is there")
            return self._write(key, data).etag

        self._must_be_conditional()
        return self._do("swap", key, same)

    def copy(self, source: str, target: str) -> None:
        self._do("copy", source, lambda: self._write(target, self._at(source)[0]))

    def below(self, prefix: str) -> Iterator[Meta]:
        def all_of_them() -> list[Meta]:
            start = f"{prefix}/" if prefix else ""
            return [meta for key, (_, meta) in sorted(self.objects.items()) if key.startswith(start)]

        return iter(self._do("below", prefix, all_of_them))

    def names(self, prefix: str = "") -> list[str]:
        def first_parts() -> list[str]:
            start = f"{prefix}/" if prefix else ""
            rest = [key.removeprefix(start) for key in self.objects if key.startswith(start)]
            return sorted({key.split("/")[0] for key in rest})

        return self._do("names", prefix, first_parts)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._do("delete", key, lambda key=key: self._drop(key))  # type: ignore[misc]

    def now(self) -> datetime | None:
        return self._do("now", "", self._time) if self.tells_time else None

    def close(self) -> None: ...

    # --- for tests

    def deliver(self, which: int = 0) -> None:
        """A request that was under way arrives; nobody hears what became of it."""
        with contextlib.suppress(ChangedError, NotThereError):
            self.late.pop(which)()

    def versions(self, key: str) -> list[Version]:
        return [one for one in self.history if one.key == key]

    def content(self) -> dict[str, bytes]:
        return {key: data for key, (data, _) in self.objects.items()}

    # --- inside

    def _do(self, op: str, key: str, act: Callable[[], T]) -> T:
        self.before(op, key)
        with self._lock:
            self.operations.append((op, key))
            kind = self._fault(op, key)
            if kind is None:
                return act()
            return self._go_wrong(kind, op, key, act)

    def _go_wrong(self, kind: Kind, op: str, key: str, act: Callable[[], T]) -> T:
        if kind == "denied":
            raise DeniedError(f"{self.label}/{key}: 403 at {op}")
        if kind == "late":
            self.late.append(act)
        elif kind != "fail":
            result = act()
            if kind == "twice":
                return act() if op in ("create", "swap") else result
        raise UnreachableError(f"{self.label}/{key}: {op} timed out")

    def _fault(self, op: str, key: str) -> Kind | None:
        for fault in self.faults:
            if fault.on in ("", op) and fault.key in key:
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                return fault.kind
        return None

    def _must_be_conditional(self) -> None:
        if not self.conditional:
            raise AssertionError("a conditional write on a store that has none")

    def _time(self) -> datetime:
        return self.clock.now() + timedelta(seconds=self.skew_s)

    def _at(self, key: str) -> tuple[bytes, Meta]:
        if key not in self.objects:
            raise NotThereError(f"{self.label}/{key}: is not there")
        return self.objects[key]

    def _write(self, key: str, data: bytes) -> Meta:
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()  # as S3: the same content, the same etag
        meta = Meta(key, len(data), etag, self._time())
        self.objects[key] = bytes(data), meta
        self.history.append(Version(self.clock.t, key, bytes(data), etag))
        return meta

    def _drop(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self.history.append(Version(self.clock.t, key, None, ""))
