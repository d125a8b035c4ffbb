"""The pieces that go into a store and come out of it are counted; a caller's errors stay his own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from x1_pretrain.stores.store import StoreError, UnreachableError


class CallersError(Exception):
    """What the caller's iterable raised; a vanished local file is not a missing object."""

    def __init__(self, error: Exception) -> None:
        super().__init__(type(error).__name__)
        self.error = error


def counted(pieces: Iterable[bytes], size: int, where: str) -> Iterator[bytes]:
    """`pieces`, which must be `size` bytes together: what is put is there whole or not at all."""
    count, source = 0, iter(pieces)
    while True:
        try:
            piece = next(source)
        except StopIteration:
            break
        except StoreError:
            raise
        except Exception as error:
            raise CallersError(error) from error
        count += len(piece)
        if count > size:
            break
        yield piece
    if count != size:
        more = "more" if count > size else str(count)
        raise UnreachableError(f"{where}: {more} bytes came, not {size}; not stored")


def whole_range(data: bytes, start: int, end: int, where: str) -> bytes:
    """`data`, which must be the bytes [start, end) of what is `where`."""
    if len(data) != end - start:
        raise UnreachableError(f"{where}: {len(data)} bytes from {start}, not {end - start}")
    return data


@contextmanager
def callers_errors() -> Iterator[None]:
    """Raise again what the caller's iterable raised, as it was."""
    try:
        yield
    except CallersError as wrapped:
        raise wrapped.error from None
