"""Before a cent is spent: does this store take, keep and guard what a mirror will put there?

An object of a moment is made, found, replaced, read and removed, with the calls that the run will make. It
lies below the run, so that what is allowed there is what is tried.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror.head import DATA, TRASH
from x1_pretrain.mirror.lease_words import no_lease
from x1_pretrain.stores.object_errors import UnsupportedError
from x1_pretrain.stores.store import (
    ChangedError,
    DeniedError,
    NotThereError,
    Store,
    StoreError,
    UnreachableError,
)

T = TypeVar("T")


class AbsentError(RefusedError):
    """The store does not answer."""


PAUSES_S = (1.0, 3.0)  # between tries of a store that does not answer
FIRST_S = 20.0  # for its first answer, which somebody waits for; while a run goes on a store has longer
FIRST, SECOND = b'{"kind": "preflight"}', b'{"kind": "preflight", "again": true}'


def preflight(
    store: Store, run: str, without_lease: bool, sleep: Callable[[float], None] = time.sleep
) -> None:
    """RefusedError, in one line, where the store can't be the mirror of `run`.

    Where conditional writes turn out not to work, `store.conditional` is false from then on.
    """
    if run in (DATA, TRASH):
        raise UserError(f"run {run!r}: the mirror keeps something else under that name; give it another")
    try:
        _patiently(store, run, sleep)
    except UnreachableError as error:
        raise AbsentError(
            f"mirror {_shown(error)}; check the network and mirror.endpoint, or train without the mirror"
        ) from None
    except StoreError as error:
        raise RefusedError(f"mirror {_shown(error)}") from None
    if not (store.conditional or without_lease):
        raise RefusedError(no_lease(store, run))


def _shown(error: StoreError) -> str:
    """Without the name of the object of a moment."""
    return re.sub(r"/[^/ ]+/preflight-[0-9a-f]{16}", "", str(error))


def _patiently(store: Store, run: str, sleep: Callable[[float], None]) -> None:
    until = time.monotonic() + FIRST_S
    for pause_s in PAUSES_S:
        try:
            return _tried(store, f"{run}/preflight-{secrets.token_hex(8)}", until)
        except UnreachableError:
            if time.monotonic() + pause_s > until:
                raise
            sleep(pause_s)
    return _tried(store, f"{run}/preflight-{secrets.token_hex(8)}", until)


def _tried(store: Store, probe: str, until: float) -> None:
    made = _begun(lambda: _made(store, probe), until)
    if not made.done():
        made.add_done_callback(lambda _: _remove(store, probe))
        raise UnreachableError(f"{store.label}: no answer within {FIRST_S:g} s")
    try:
        etag = made.result()
    except UnreachableError:  # it may be there all the same
        _begun(lambda: _remove(store, probe), until)
        raise
    try:
        if store.conditional and not _keeps_two_apart(store, probe, etag):
            store.conditional = False
        store.put(probe, FIRST)
        _gives_back(store, probe)
        _says_what_is_not_there(store, probe)
    except StoreError:
        _remove(store, probe)
        raise
    _forgets(store, probe)


def _begun(work: Callable[[], T], until: float) -> Future[T]:
    """In a thread of its own, since a request can't be called off: done, or past that time still at it."""
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, name="x1-preflight", daemon=True).start()
    wait([future], max(0.0, until - time.monotonic()))
    return future


def _remove(store: Store, probe: str) -> None:
    with suppress(StoreError):  # the first error is the one to tell
        store.delete([probe])


def _made(store: Store, probe: str) -> str:
    try:
        return store.create(probe, FIRST)
    except ChangedError:  # it went through, its answer was lost, and it was asked again
        return store.stat(probe).etag
    except UnsupportedError:
        etag = store.put(probe, FIRST).etag
        store.conditional = False
        return etag


def _keeps_two_apart(store: Store, probe: str, etag: str) -> bool:
    """Whether a second `create` and a `swap` of another version fail, and the right swap does not."""
    try:
        if not _fails(lambda: store.create(probe, FIRST)):
            return False
        replaced = _replaced(store, probe, etag)
        if not _fails(lambda: store.swap(probe, FIRST, etag)):
            return False
        return store.get(probe)[1].etag == store.stat(probe).etag == replaced
    except (ChangedError, UnsupportedError):
        return False


def _replaced(store: Store, probe: str, etag: str) -> str:
    try:
        return store.swap(probe, SECOND, etag)
    except ChangedError:
        data, meta = store.get(probe)
        if data != SECOND:
            raise
        return meta.etag  # as above: its answer was lost


def _fails(write: Callable[[], object]) -> bool:
    try:
        write()
    except ChangedError:
        return True
    return False


def _gives_back(store: Store, probe: str) -> None:
    data, meta = store.get(probe)
    if data != FIRST or meta.bytes != len(FIRST) or store.read(probe, 1, 5) != FIRST[1:5]:
        raise DeniedError(f"{store.label}: gives back other bytes than were put there; it can't be a mirror")


def _says_what_is_not_there(store: Store, probe: str) -> None:
    """Without the right to list, S3 says 403 of a missing object: a new run would look forbidden."""
    with suppress(NotThereError):
        try:
            store.get(f"{probe}-none")
        except DeniedError:
            raise DeniedError(
                f"{store.label}: these credentials may not list the bucket, so that a missing object looks "
                "like a forbidden one; allow s3:ListBucket too"
            ) from None
        raise DeniedError(f"{store.label}: answers for objects that are not there; it can't be a mirror")


def _forgets(store: Store, probe: str) -> None:
    try:
        store.delete([probe])
        store.stat(probe)
    except NotThereError:
        return
    except DeniedError as error:
        raise DeniedError(
            f"{error}; old checkpoints could never be removed there: allow deleting (s3:DeleteObject)"
        ) from None
    raise DeniedError(f"{store.label}: keeps what is deleted; old checkpoints could never be removed there")
