"""Mirrored runs made by hand, object by object: what a head names is there, and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from x1_pretrain.mirror.head import Epoch, Head, Object, Published, Writer, encode
from x1_pretrain.stores.store import Store

SINCE = "2026-11-21T10:15:00Z"


def writer(epoch: int = 1, token: str = "aaaa1111", state: str = "released", **more: Any) -> Writer:
    return Writer(epoch, token, "folder", "gpu-7", 4242, SINCE, beat=3, state=state, **more)  # type: ignore[arg-type]


def mirror_run(
    store: Store,
    name: str = "tiny",
    run_id: str = "tiny-1",
    steps: tuple[int, ...] = (20, 42),
    who: Writer | None = None,
    status: dict[str, Any] | None = None,
    earlier: tuple[tuple[int, str], ...] = (),
    **fields: Any,
) -> Head:
    """A run in `store`, its last writer `who`, with checkpoints of a few bytes. `earlier`: the epochs and
    tokens of the writers before; `fields`: others of the head."""
    who = who or writer(why="finished")
    told = {"state": "finished", "step": 42, "total_steps": 42, "tokens": 2688, "stage": "pretrain"}
    told |= {"spent_usd": "24.80", "elapsed_s": 75_600.0, "val_loss": 2.1214, "updated_utc": SINCE}
    writers = [*earlier, (who.epoch, who.token)]
    head = Head(name, who, run_id, epochs=[Epoch(epoch, token, who.host, SINCE) for epoch, token in writers])
    row = b'{"step": 42}\n'
    piece = f"{who.space}/records/metrics.jsonl/000000000000-0000000013"
    store.put(f"{name}/{piece}", row)
    records = {"metrics.jsonl": [Object(piece, len(row), hashlib.sha256(row).hexdigest())]}
    checkpoints = []
    for step in steps:
        path = f"{who.space}/checkpoints/step-{step:09d}"
        for file in ("model.safetensors", "manifest.json", "chunks.json"):
            store.put(f"{name}/{path}/{file}", f"{file} of {step}".encode())
        checkpoints.append(Published(step, who.epoch, path, 1000 + step, "0" * 64, "1" * 64, SINCE, 2.5))
    head = replace(head, checkpoints=checkpoints, records=records, status=told | (status or {}), **fields)
    store.put(f"{name}/head.json", encode(head))
    store.close()  # some stores send the last of it only now
    return head


def keys(store: Store) -> set[str]:
    return {meta.key for meta in store.below("")} - {".gitattributes"}  # the Hub's own
