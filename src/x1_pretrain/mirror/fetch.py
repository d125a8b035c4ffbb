"""A published checkpoint comes back: in parallel, by chunks, each verified as it comes, and gone on with.

The files lie in `.fetching-step-000001800`, at their full size from the start. Whatever breaks, a later fetch
reads what is there, keeps the chunks that match their hash, and fetches the others. The folder takes its name
when the last chunk has matched. It is not read again then: the head covers the hash of every chunk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.download import Part, download, held_bytes, in_words
from x1_pretrain.mirror.head import Published, is_plain
from x1_pretrain.mirror.patience import (
    LANES,
    PATIENCE_S,
    Patience,
    UnusableError,
    get_verified,
    told,
)
from x1_pretrain.records.checkpoint_files import (
    FETCHING,
    NEEDED,
    SCHEMA_VERSION,
    folder_name,
    needs_and_has,
    state_problem,
    sync_directory,
    sync_file,
)
from x1_pretrain.stores.store import Store

MANIFEST, CHUNKS = "manifest.json", "chunks.json"
MARGIN_BYTES = 16 << 20  # left free beside what is fetched: records, directory entries


def fetch_checkpoint(
    store: Store,
    run: str,
    published: Published,
    target_folder: Path,
    say: Callable[[str], None],
    *,
    lanes: int = LANES,
    patience_s: float = PATIENCE_S,
    again_s: Sequence[float] | None = None,
    without: Collection[str] = (),
) -> Path:
    """Make the checkpoint appear in `target_folder`, verified, in place of one of its step: that one is
    kept as `bad-...`. With files left out (`without`) it has no manifest: a model, and no checkpoint to
    resume from.

    `say` hears of the progress about once a second; what it raises ends the fetch. UnusableError: the mirror
    does not have it any more, or has something else, and said so for a minute (`again_s`: the pauses before
    it is asked again). RefusedError: no room. AwayError: the store is away.
    """
    patience, what = Patience(patience_s, again_s=again_s), f"checkpoint of step {published.step}"
    final = target_folder / folder_name(published.step)
    partial = target_folder / f"{FETCHING}{final.name}"
    content = told(lambda: _content(store, run, published, patience), patience, what, say)
    parts = [part for part in content.parts if part.name not in without]
    with in_words(partial):
        if partial.is_dir():
            _remove_others(partial, parts)
        require_room({partial: sum(part.bytes for part in parts)}, f"the {what}")
        partial.mkdir(parents=True, exist_ok=True)
        download(store, parts, partial, what, say, lanes, patience)
        _check_state(partial, content.manifest)
        if not without:
            (partial / MANIFEST).write_bytes(content.manifest_text)
            sync_file(partial / MANIFEST)
        _appear(partial, final)
    return final


@dataclass(frozen=True)
class _Content:
    """What a published checkpoint consists of."""

    manifest: dict[str, Any]
    manifest_text: bytes
    parts: list[Part]


def _content(store: Store, run: str, published: Published, patience: Patience) -> _Content:
    base = f"{run}/{published.path}"
    text = get_verified(store, f"{base}/{MANIFEST}", published.manifest_sha256, patience)
    hashes = get_verified(store, f"{base}/{CHUNKS}", published.chunks_sha256, patience)
    try:
        manifest, chunks = json.loads(text), json.loads(hashes)
        parts = [
            Part(
                name,
                f"{base}/{name}",
                int(fact["bytes"]),
                tuple(chunks["files"][name]),
                chunks["chunk_bytes"],
            )
            for name, fact in manifest["files"].items()
        ]
        _refuse_newer(manifest, published)
        problem = _problem(manifest, parts, published)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnusableError(f"its manifests are not as they were written ({error})") from None
    if problem:
        raise UnusableError(problem)
    return _Content(manifest, text, parts)


def _refuse_newer(manifest: dict[str, Any], published: Published) -> None:
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise RefusedError(
            f"the mirrored checkpoint of step {published.step}: schema version {manifest['schema_version']}, "
            f"this x1 reads up to {SCHEMA_VERSION}; update x1"
        )


def _problem(manifest: dict[str, Any], parts: list[Part], published: Published) -> str | None:
    if manifest["step"] != published.step:
        return f"its manifest is of step {manifest['step']}"
    if odd := [part.name for part in parts if not is_plain(part.name) or part.name in (MANIFEST, CHUNKS)]:
        return f"its manifest names a file {odd[0]!r}"
    if short := [part.name for part in parts if len(part.chunks) != part.count]:
        return f"{short[0]} has another number of chunks than its size"
    names = {part.name for part in parts}
    if absent := [name for name in NEEDED if name not in names]:
        return f"{absent[0]} is not in its manifest"
    return None


def require_room(wanted: Mapping[Path, int], what: str) -> None:
    """Before anything is fetched: `wanted` are the bytes of each folder, some of which may be there."""
    missing = {folder: max(0, count - held_bytes(folder)) for folder, count in wanted.items()}
    disks: dict[int, list[Path]] = {}
    there = {one: next(path for path in (one, *one.absolute().parents) if path.exists()) for one in missing}
    for folder, path in there.items():
        disks.setdefault(path.stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed = sum(missing[folder] for folder in folders)
        free = shutil.disk_usage(there[folders[0]]).free
        if needed > 0 and free < needed + MARGIN_BYTES:
            needs, has = needs_and_has(needed + MARGIN_BYTES, free)
            raise RefusedError(
                f"{folders[0].parent}: no room for {what}: it needs {needs}, the disk has {has} free; "
                "free some, or take another disk (--run-dir, --ckpt-dir)"
            )


def _remove_others(partial: Path, parts: list[Part]) -> None:
    names = {part.name for part in parts}
    for path in partial.iterdir():
        if path.name in names and path.is_file() and not path.is_symlink():
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_state(partial: Path, manifest: dict[str, Any]) -> None:
    try:
        problem = state_problem(partial, manifest)
    except (ValueError, LookupError, TypeError) as error:
        problem = f"state.json is not as it was written ({error})"
    if problem:
        raise UnusableError(problem)


def _appear(partial: Path, final: Path) -> None:
    sync_directory(partial)
    if final.exists():  # damaged, or of a branch that was given up: kept beside
        aside = final.with_name(f"bad-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    sync_directory(final.parent)


def is_same(folder: Path, published: Published) -> bool:
    """Whether a local checkpoint claims to be this one: whether it still is, its hashes tell."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == published.manifest_sha256
    except OSError:
        return False
