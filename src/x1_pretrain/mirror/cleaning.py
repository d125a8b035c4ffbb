"""Removing what writers of the past sent and never published, or dropped and had no time to delete.

Only objects of epochs before the writer's own that neither its head nor one in the trash names. A writer that
lost its place may still be sending such objects: no head will ever name them.
"""

from __future__ import annotations

from dataclasses import dataclass

from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.leftovers import leftovers
from x1_pretrain.mirror.store import Store
from x1_pretrain.mirror.trash import thrown

AT_ONCE = 500  # keys in one request


@dataclass(frozen=True)
class Cleaned:
    """What was removed."""

    objects: int = 0
    bytes: int = 0


def clean(store: Store, head: Head) -> Cleaned:
    """As the writer that `head` names. Nothing is removed if an entry of the trash can't be read."""
    entries, trouble = thrown(store)
    if trouble:
        return Cleaned()
    heads = [head, *(one.head for one in entries if one.name == head.name)]
    doomed = list(leftovers(list(store.below(head.name)), head, heads, head.writer.epoch))
    for at in range(0, len(doomed), AT_ONCE):
        store.delete(one.key for one in doomed[at : at + AT_ONCE])
    return Cleaned(len(doomed), sum(one.bytes for one in doomed))
