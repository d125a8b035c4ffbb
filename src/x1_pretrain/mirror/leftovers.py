"""Which objects of a mirrored run nothing needs any more: the one rule for its next writer and for `gc`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from x1_pretrain.mirror.corpora import bytes_of
from x1_pretrain.mirror.head import Head
from x1_pretrain.stores.store import Meta, Store

SPACE = re.compile(r"e(\d{4,})-[0-9a-f]{8}")
SKIPPED = "lost/{space}/skipped"  # below it: the paths of checkpoints that a resume passed over
IS_SKIPPED = re.compile(r"lost/[^/]+/skipped/(.+)")


def leftovers(there: Sequence[Meta], head: Head, heads: Iterable[Head], before_epoch: int) -> Iterator[Meta]:
    """Of `there`, all that lies below the run: those objects of epochs before this one that none of `heads`
    names, and no resume passed over. What another run of this name left behind, of which there is no head any
    more, nobody may take for litter."""
    known = list(heads)
    own = {epoch.space for one in known for epoch in one.epochs}
    named = set[str]().union(*map(paths, known))
    named |= {
        found[1] for one in there if (found := IS_SKIPPED.fullmatch(one.key.removeprefix(f"{head.name}/")))
    }
    for one in there:
        path = one.key.removeprefix(f"{head.name}/")
        name = path.partition("/")[0]
        space = SPACE.fullmatch(name)
        if space is None or name not in own or int(space[1]) >= before_epoch:
            continue
        if path not in named and path.rpartition("/")[0] not in named:
            yield one


def paths(head: Head) -> set[str]:
    """All that the head names; of a checkpoint its folder."""
    return {one.path for one in head.named()}


def mirrored_bytes(head: Head) -> int:
    return sum(one.bytes for one in head.named())


def held_bytes(head: Head, corpora: Mapping[str, str]) -> int:
    """The corpora too, each as large as it is in its folder here."""
    return mirrored_bytes(head) + sum(bytes_of(Path(corpora[name])) for name in head.data if name in corpora)


def lies_there(store: Store, name: str) -> bool:
    """Whether some session of a run of this name sent anything."""
    keys = (meta.key.removeprefix(f"{name}/") for meta in store.below(name))
    return any(SPACE.fullmatch(key.partition("/")[0]) for key in keys)
