"""Which objects of a mirrored run nothing needs any more: the one rule for its next writer and for `gc`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from x1_pretrain.mirror.corpora import bytes_of
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.store import Meta

SPACE = re.compile(r"e(\d{4,})-[0-9a-f]{8}")
SKIPPED = "lost/{space}/skipped"  # below it: the paths of checkpoints that a resume passed over
IS_SKIPPED = re.compile(r"lost/[^/]+/skipped/(.+)")


def leftovers(there: Sequence[Meta], head: Head, heads: Iterable[Head], before_epoch: int) -> Iterator[Meta]:
    """Of `there`, all that lies below the run: those objects of epochs before this one that none of `heads`
    names, and no resume passed over."""
    named = set[str]().union(*map(paths, heads))
    named |= {
        found[1] for one in there if (found := IS_SKIPPED.fullmatch(one.key.removeprefix(f"{head.name}/")))
    }
    for one in there:
        path = one.key.removeprefix(f"{head.name}/")
        space = SPACE.fullmatch(path.partition("/")[0])
        if space is None or int(space[1]) >= before_epoch:
            continue
        if path not in named and path.rpartition("/")[0] not in named:
            yield one


def paths(head: Head) -> set[str]:
    """All that the head names, below the run; of a checkpoint its folder."""
    pieces = [piece.path for many in head.records.values() for piece in many]
    small = [one.path for one in head.files.values()]
    return {*pieces, *small, *(one.path for one in head.checkpoints)}


def mirrored_bytes(head: Head) -> int:
    """Of all that the head names; the corpora apart, which other runs share."""
    pieces = [one.bytes for many in head.records.values() for one in many]
    files = [one.bytes for one in head.files.values()]
    return sum([*pieces, *files, *(one.bytes for one in head.checkpoints)])


def held_bytes(head: Head, corpora: Mapping[str, str]) -> int:
    """The corpora too, each as large as it is in its folder here."""
    return mirrored_bytes(head) + sum(bytes_of(Path(corpora[name])) for name in head.data if name in corpora)
