"""`head.json` in a store: read, written in place of one version, and how old it is."""

from __future__ import annotations

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.head import DATA, NAME, TRASH, Head, damaged, decode
from x1_pretrain.stores.store import ChangedError, Meta, NotThereError, Store

READS = 3


def head_key(name: str) -> str:
    return f"{name}/{NAME}"


def run_names(store: Store) -> list[str]:
    """Of what may be a run in a mirror; a head tells."""
    return [name for name in store.names() if name not in (TRASH, DATA)]


def where(store: Store, name: str) -> str:
    return f"{store.label}/{head_key(name)}"


def look(store: Store, name: str) -> tuple[Head, Meta] | None:
    """The head of a mirrored run, or None where there is no such run. Takes no lease."""
    found = read(store, name)
    return None if found is None else (decoded(store, name, found[0]), found[1])


def decoded(store: Store, name: str, data: bytes) -> Head:
    """RefusedError where it tells of a folder of another name: what it names lies there, and may be gone."""
    head = decode(data, where(store, name))
    if head.name != name:
        raise RefusedError(
            f"{where(store, name)}: is the head of {head.name}: this folder was copied or renamed by hand; "
            f"call it {head.name} again, in a mirror of its own where that name is taken"
        )
    return head


def silence_s(store: Store, meta: Meta) -> float | None:
    """Since the object was written, by the store's clock alone; None where that can't be asked."""
    now = store.now()
    return None if now is None else (now - meta.modified).total_seconds()


def read(store: Store, name: str) -> tuple[bytes, Meta] | None:
    """As it came; what comes damaged is asked for again, and handed on if it stays so."""
    try:
        for _ in range(READS - 1):
            found = store.get(head_key(name))
            if not damaged(found[0]):
                return found
        return store.get(head_key(name))
    except NotThereError:
        return None


def write(store: Store, name: str, data: bytes, etag: str | None) -> str:
    """In place of the version `etag` (None: of nothing); ChangedError if that is not what is there."""
    if not store.conditional:
        return _write_at_own_risk(store, name, data, etag)
    try:
        key = head_key(name)
        return store.create(key, data) if etag is None else store.swap(key, data, etag)
    except NotThereError as error:
        raise ChangedError(str(error)) from None


def _write_at_own_risk(store: Store, name: str, data: bytes, etag: str | None) -> str:
    """The same on a store that can't: look, write, look again. Somebody may come between."""
    found = read(store, name)
    if (found and found[1].etag) != etag:
        raise ChangedError(f"{where(store, name)}: another version is there")
    store.put(head_key(name), data)
    found = read(store, name)
    if found is None or found[0] != data:
        raise ChangedError(f"{where(store, name)}: somebody else wrote it at the same time")
    return found[1].etag
