"""What a mirror asks of a store: a bucket, a folder on another disk, a repository of the Hugging Face Hub.

Keys are relative to the folder of runs that the store was opened at, with `/` between their parts. Whatever
is put is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


class StoreError(Exception):
    """A store did not do what it was asked. One line for a person, without credentials."""


class UnreachableError(StoreError):
    """It may do it later: a time-out, a cut connection, 500, 503, a body that came damaged."""


class DeniedError(StoreError):
    """It says no: credentials, permissions, region, a clock too far off, no such bucket, no room."""


class NotThereError(StoreError):
    """No object has this key."""


class ChangedError(StoreError):
    """Somebody else wrote this key first: `create` found it there, or `swap` found another version."""


OWN = ".x1-mirror"  # keys of the store itself, which no listing shows


def checked(key: str, label: str) -> str:
    """`key`; DeniedError if stores would differ over what it means."""
    if any(part in ("", ".", "..") for part in key.split("/")) or not key.isprintable():
        raise DeniedError(f"{label}: {key!r} is no key of an object")
    return key


@dataclass(frozen=True)
class Meta:
    """What a store knows of an object."""

    key: str
    bytes: int
    etag: str  # of this version
    modified: datetime  # by the store's clock


class Store(Protocol):
    """Every method may raise UnreachableError or DeniedError. Safe to use from several threads."""

    label: str  # where it is, for people: s3://bucket/runs
    conditional: bool  # `create` and `swap` are what they say
    every_s_at_least: float  # between two heads: some stores count writes

    def get(self, key: str) -> tuple[bytes, Meta]:
        """A small object, whole."""

    def read(self, key: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of an object; fewer than asked for is an UnreachableError."""

    def stat(self, key: str) -> Meta: ...

    def put(self, key: str, data: bytes) -> Meta:
        """A small object, over whatever was there."""

    def put_stream(self, key: str, pieces: Iterable[bytes], size: int) -> Meta:
        """A large one, from pieces of any length; at most a few of them are in memory at a time."""

    def create(self, key: str, data: bytes) -> str:
        """A small object that must not be there yet; its etag. ChangedError if it is."""

    def swap(self, key: str, data: bytes, etag: str) -> str:
        """In place of the version `etag`; the new etag. ChangedError if another version is there, or none."""

    def copy(self, source: str, target: str) -> None:
        """Within the store, without sending it again."""

    def below(self, prefix: str) -> Iterator[Meta]:
        """Everything below `prefix/`; may be out of date by a while on some stores."""

    def names(self, prefix: str = "") -> list[str]:
        """The first parts of the keys below `prefix/`, each once: what a person would call its folders."""

    def delete(self, keys: Iterable[str]) -> None:
        """What is not there is no error."""

    def now(self) -> datetime | None:
        """The store's own clock, which all writers share; None where it can't be asked."""

    def close(self) -> None: ...


def there(store: Store, key: str) -> Meta | None:
    """What the store knows of an object; None where it is not there."""
    try:
        return store.stat(key)
    except NotThereError:
        return None
