"""Removing what writers of the past sent and never published, or dropped and had no time to delete.

Only objects of epochs before the writer's own that neither its head nor one in the trash names. A writer that
lost its place may still be sending such objects: no head will ever name them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.store import Meta, Store
from x1_pretrain.mirror.trash import thrown

SPACE = re.compile(r"e(\d{4,})-[0-9a-f]{8}")
AT_ONCE = 500  # keys in one request
SKIPPED = "lost/{space}/skipped"  # below it: the paths of checkpoints that a resume passed over
IS_SKIPPED = re.compile(r"lost/[^/]+/skipped/(.+)")


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
    doomed = list(leftovers(list(store.below(head.name)), head, heads))
    for at in range(0, len(doomed), AT_ONCE):
        store.delete(one.key for one in doomed[at : at + AT_ONCE])
    return Cleaned(len(doomed), sum(one.bytes for one in doomed))


def leftovers(there: Sequence[Meta], head: Head, heads: Iterable[Head]) -> Iterator[Meta]:
    """Those objects of the run's earlier epochs that none of `heads` names, and no resume passed over."""
    named = set[str]().union(*map(paths, heads))
    named |= {
        found[1] for one in there if (found := IS_SKIPPED.fullmatch(one.key.removeprefix(f"{head.name}/")))
    }
    for one in there:
        path = one.key.removeprefix(f"{head.name}/")
        space = SPACE.fullmatch(path.partition("/")[0])
        if space is None or int(space[1]) >= head.writer.epoch:
            continue
        if path not in named and path.rpartition("/")[0] not in named:
            yield one


def paths(head: Head) -> set[str]:
    """All that the head names, below the run; of a checkpoint its folder."""
    pieces = [piece.path for many in head.records.values() for piece in many]
    small = [one.path for one in head.files.values()]
    return {*pieces, *small, *(one.path for one in head.checkpoints)}
