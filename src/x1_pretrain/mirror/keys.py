"""What a key of an object may be, in every store."""

from __future__ import annotations

from x1_pretrain.mirror.store import DeniedError

OWN = ".x1-mirror"  # keys of the store itself, which no listing shows


def checked(key: str, label: str) -> str:
    """`key`; DeniedError if stores would differ over what it means."""
    if any(part in ("", ".", "..") for part in key.split("/")) or not key.isprintable():
        raise DeniedError(f"{label}: {key!r} is no key of an object")
    return key
