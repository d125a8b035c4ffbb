"""A mirror in S3 and what speaks it (R2, MinIO, ...), Google Cloud Storage or Azure: obstore does the work.

Small requests have 20 s each and are made again within 40 s; a part of a large object has 50 s and is made
again only in the first 10 s. So a store that dies is known as dead within a minute. On a line that is too
slow for that, what is large is sent in single, smaller parts, with twice the time after each failure, up to
400 s; what is small, and so the looks that notice a store's death, keeps its 20 s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from x1_pretrain.errors import UserError
from x1_pretrain.stores import aws, object_errors
from x1_pretrain.stores.address import Address
from x1_pretrain.stores.clock import StoreClock
from x1_pretrain.stores.pieces import callers_errors, counted, whole_range
from x1_pretrain.stores.store import OWN, DeniedError, Meta, NotThereError, UnreachableError, checked

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 3
LEAST_PART_BYTES = 5 << 20  # of S3
SMALL_BYTES = 256 << 10
MOST_PARTS = 9_000  # S3 takes 10,000
KEYS_AT_ONCE = 1000  # in one request of a deletion
SMALL = {"timeout": 20, "retry_timeout": 40}  # seconds
LARGE = {"timeout": 50, "retry_timeout": 10}
MOST_TIMES = 8  # LARGE's timeout: for 40 kB/s
CONNECT_S = 5


def open_object_store(address: Address, endpoint: str | None, retries: int = 2) -> ObjectStore:
    """UserError where the environment can't lead to a store; the store itself is not asked yet."""
    if endpoint and address.scheme != "s3":
        raise UserError(f"{address}: mirror.endpoint is for s3:// alone; leave it out")
    place = aws.find(endpoint, os.environ) if address.scheme == "s3" else None
    if place and not (place.keys or aws.given(os.environ) or aws.role_answers(os.environ)):
        raise UserError(f"{address}: {object_errors.NO_CREDENTIALS['s3']}")
    try:
        small = _client(address, place, retries, SMALL)
        single = _client(address, place, retries, SMALL, disable_bulk_delete=True) if place else small
    except (BaseError, ValueError) as error:
        raise UserError(f"{address}: {_why_not_opened(address.scheme, error)}") from None
    large = cache(lambda limit_s: _client(address, place, retries, LARGE | {"timeout": limit_s}))
    return ObjectStore(address, small, large, place.endpoint if place else None, single)


class ObjectStore:
    """Store in a bucket."""

    def __init__(
        self,
        address: Address,
        small: Any,
        large: Callable[[int], Any],
        endpoint: str | None,
        single: Any = None,  # as `small`, but deletes one object in a request
    ) -> None:
        self._address, self._small, self._large, self._endpoint = address, small, large, endpoint
        self._single = single or small
        self._limit_s = LARGE["timeout"]  # for what is large, as the line is now
        self._version = "version" if address.scheme == "gs" else "e_tag"
        self.label = str(address)
        self.conditional = True  # until a preflight finds that it is not so
        self.every_s_at_least = 1.0 if address.scheme == "gs" else 0.0  # Google: one write a second of a key
        self._clock = StoreClock(self._probe)

    # ---- reading

    def get(self, key: str) -> tuple[bytes, Meta]:
        with self._said(key):
            found = obstore.get(self._small, checked(key, self.label))
            data, meta = bytes(found.bytes()), self._meta(found.meta)
        if len(data) != meta.bytes:
            raise UnreachableError(f"{self.label}/{key}: {len(data)} bytes came, not {meta.bytes}")
        return data, meta

    def read(self, key: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        with self._in_time(end - start) as large, self._said(key):
            data = bytes(obstore.get_range(large, checked(key, self.label), start=start, end=end))
        return whole_range(data, start, end, f"{self.label}/{key}")

    def stat(self, key: str) -> Meta:
        with self._said(key):
            return self._meta(obstore.head(self._small, checked(key, self.label)))

    def below(self, prefix: str) -> Iterator[Meta]:
        with self._said(prefix):
            for page in obstore.list(self._small, prefix or None, chunk_size=1000):
                for found in page:
                    if not found["path"].startswith(OWN + "/"):
                        yield self._meta(found)

    def names(self, prefix: str = "") -> list[str]:
        with self._said(prefix):
            found = obstore.list_with_delimiter(self._small, prefix or None)
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths} - {OWN})

    # ---- writing

    def put(self, key: str, data: bytes) -> Meta:
        self._send_whole(key, data, None)
        return self._sent(key, len(data))

    def put_stream(self, key: str, pieces: Iterable[bytes], size: int) -> Meta:
        """In parts of at least PART_BYTES, PARTS_AT_ONCE of them in memory."""
        whole = counted(pieces, size, f"{self.label}/{key}")
        with callers_errors():  # any error of `whole` ends the upload, and the store forgets its parts
            if size <= PART_BYTES:
                self._send_whole(key, b"".join(whole), None)
            else:
                self._send_in_parts(key, whole, size)
        return self._sent(key, size)

    def create(self, key: str, data: bytes) -> str:
        return self._send_whole(key, data, "create")

    def swap(self, key: str, data: bytes, etag: str) -> str:
        return self._send_whole(key, data, {self._version: etag})

    def copy(self, source: str, target: str) -> None:
        """S3 copies up to 5 GiB in one request; DeniedError above."""
        with self._said(source):
            obstore.copy(self._small, checked(source, self.label), checked(target, self.label))

    def delete(self, keys: Iterable[str]) -> None:
        """One refused key does not keep the others."""
        wanted = list(keys)
        for first in range(0, len(wanted), KEYS_AT_ONCE):
            self._delete_some(wanted[first : first + KEYS_AT_ONCE])

    def now(self) -> datetime | None:
        return self._clock.now()

    def close(self) -> None:
        """obstore keeps nothing that has to be closed."""

    # ---- how

    def _send_whole(self, key: str, data: bytes, mode: Any) -> str:
        small = len(data) <= SMALL_BYTES or mode is not None
        try:
            with self._in_time(len(data)) as large, self._said(key):
                sent: Mapping[str, Any] = obstore.put(
                    self._small if small else large,
                    checked(key, self.label),
                    data,
                    mode=mode,
                    use_multipart=False,
                )
        except NotThereError:  # no object was asked for
            raise DeniedError(
                f"{self.label}: there is no such bucket; make it, or correct its name"
            ) from None
        return str(sent[self._version] or "") or self.stat(key).etag

    def _send_in_parts(self, key: str, pieces: Iterator[bytes], size: int) -> None:
        usual = self._limit_s == LARGE["timeout"]
        least, at_once = (PART_BYTES, PARTS_AT_ONCE) if usual else (LEAST_PART_BYTES, 1)
        many: dict[str, Any] = {
            "chunk_size": max(least, -(-size // MOST_PARTS)),
            "max_concurrency": at_once,
        }
        with self._in_time(size) as large, self._said(key):
            obstore.put(large, checked(key, self.label), pieces, use_multipart=True, **many)

    @contextmanager
    def _in_time(self, size: int) -> Iterator[Any]:
        """The client for so many bytes. What took too long gets twice the time, until the line is fast."""
        limit_s, begun = self._limit_s, time.monotonic()
        try:
            yield self._large(limit_s)
        except UnreachableError:
            if time.monotonic() - begun >= limit_s:
                more_s = min(2 * limit_s, MOST_TIMES * LARGE["timeout"])
                self._limit_s = max(self._limit_s, more_s)
            raise
        usual = PARTS_AT_ONCE * PART_BYTES / LARGE["timeout"]  # bytes a second
        if size >= LEAST_PART_BYTES and size / (time.monotonic() - begun) > 2 * usual:
            self._limit_s = LARGE["timeout"]

    def _sent(self, key: str, size: int) -> Meta:
        """What is there now; a store that lost a part of it is found out."""
        meta = self.stat(key)
        if meta.bytes != size:
            raise UnreachableError(
                f"{self.label}/{key}: {meta.bytes} bytes are there, not {size}; send it again"
            )
        return meta

    def _delete_some(self, keys: list[str]) -> None:
        if not keys:
            return
        try:
            with self._said(keys[0]):
                obstore.delete(self._small, keys)
        except (NotThereError, DeniedError):  # of one of them, or there is no deletion of many at once
            refused = None
            for key in keys:
                try:
                    with suppress(NotThereError), self._said(key):
                        obstore.delete(self._single, checked(key, self.label))
                except DeniedError as error:
                    refused = refused or error
            if refused:
                raise refused from None

    def _meta(self, found: Mapping[str, Any]) -> Meta:
        etag = found.get(self._version) or found.get("e_tag") or ""
        return Meta(found["path"], found["size"], str(etag), found["last_modified"].astimezone(UTC))

    def _probe(self) -> datetime:
        """One object, written over again and again: no listing shows it, nothing has to be deleted."""
        return self.put(f"{OWN}/clock", b"0").modified

    @contextmanager
    def _said(self, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, FileNotFoundError, ValueError, TimeoutError) as error:
            raise self._translated(error, f"{self.label}/{key}".rstrip("/")) from None

    def _translated(self, error: Exception, where: str) -> Exception:
        found = object_errors.translate(error, self._address.scheme, where)
        if self._address.scheme == "s3" and str(found).endswith(object_errors.wrong_region(None)):
            region = aws.bucket_region(self._address.bucket, self._endpoint)
            return DeniedError(f"{where}: {object_errors.wrong_region(region)}")
        return found


# ------------------------------------------------------------------------------------------------------------
# Clients


def _client(
    address: Address, place: aws.Place | None, retries: int, limits: Mapping[str, int], **of_s3: Any
) -> Any:
    options: dict[str, Any] = {
        "timeout": f"{limits['timeout']}s",
        "connect_timeout": f"{CONNECT_S}s",
        "user_agent": "x1-pretrain",
    }
    waits = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=5), "base": 2}
    retry = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=limits["retry_timeout"]),
        "backoff": waits,
    }
    shared: dict[str, Any] = {
        "prefix": address.prefix or None,
        "client_options": options,
        "retry_config": retry,
    }
    if address.scheme == "gs":
        return GCSStore(address.bucket, **shared)
    if address.scheme == "az":
        return AzureStore(address.bucket, **shared)
    assert place is not None
    return S3Store(address.bucket, config=_s3_config(place, options) | of_s3, **shared)


def _s3_config(place: aws.Place, options: dict[str, Any]) -> Any:
    """Every body is signed with its sha256, so that a store refuses one that came damaged. Amazon also keeps
    it as the object's checksum; other stores know some checksums or none and are not asked to."""
    config: dict[str, Any] = {"region": place.region, **place.keys}
    if place.endpoint is None:
        return config | {"checksum_algorithm": "SHA256"}
    options["allow_http"] = place.endpoint.startswith("http://")
    return config | {"endpoint": place.endpoint}


def _why_not_opened(scheme: str, error: Exception) -> str:
    text = str(error)
    if "Account must be specified" in text:
        return "no storage account; set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or a role"
    if "service account file" in text or "credential" in text.lower():
        return f"its credentials can't be read; {object_errors.NO_CREDENTIALS[scheme].partition('; ')[2]}"
    return "can't be opened with this environment; see docs/mirror.md for what it needs"
