"""Checkpoint folders: published whole or not at all, verified before they are trusted. No torch.

A checkpoint is written under a temporary name, every file flushed to the disk and hashed into
`manifest.json`, and then renamed. So a folder named `step-000001800` is complete, or was damaged later, which
its hashes show. `latest` is a hint for people; nothing here reads it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from x1_pretrain.numbers import size
from x1_pretrain.records import retention

SCHEMA_VERSION = 1
TEMPORARY = ".writing-"
FETCHING = ".fetching-"  # from a mirror; gone on with by the next session
NEEDED = ("model.safetensors", "state.json")  # without these nothing can be resumed
SAFETY_BYTES = 1 << 20  # left free beside a checkpoint, for logs and directory entries


class CheckpointFailedError(Exception):
    """A checkpoint could not be written; the folders that were there are untouched."""


class DiskFullError(CheckpointFailedError):
    """For want of space: removing older checkpoints may help."""


def folder_name(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint folder, newest first, good or not."""
    if not folder.is_dir():
        return []
    named = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{9,}", p.name) and not p.is_symlink()]
    return sorted(named, key=step_of, reverse=True)


# ------------------------------------------------------------------------------------------------------------
# Trust


def verify_folder(path: Path) -> str | None:
    """None if the checkpoint is exactly what was written, else what is wrong with it."""
    if not path.is_dir():
        return "not a folder"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = manifest["files"]
        version, step = int(manifest["schema_version"]), int(manifest["step"])
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"manifest.json can't be read ({error})"
    if version > SCHEMA_VERSION:
        return f"written by a newer version (schema {version}, this one reads {SCHEMA_VERSION})"
    if step != step_of(path):
        return f"its manifest is of step {step}"
    try:
        if absent := [name for name in NEEDED if name not in listed]:
            return f"{absent[0]} is not in its manifest"
        for name, want in listed.items():
            if problem := _file_problem(path / name, want):
                return f"{name} {problem}"
        return state_problem(path, manifest)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"manifest.json is not as it was written ({error})"


def state_problem(path: Path, manifest: dict[str, Any]) -> str | None:
    """state.json must be of the same step and run."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for key in ("step", "run_id"):
        if state[key] != manifest[key]:
            return f"state.json has {key} {state[key]}, the manifest {manifest[key]}"
    return None


def spike_in(path: Path) -> int | None:
    """Where the spike began that lasted as this checkpoint was saved: stability.Episode.onset."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        return int(state["stability"]["episode"]["onset"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _file_problem(file: Path, want: dict[str, Any]) -> str | None:
    try:
        size = file.stat().st_size
        if size != want["bytes"]:
            return f"has {size} bytes, not {want['bytes']}"
        if sha256(file) != want["sha256"]:
            return "does not match its hash"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None


def newest_good(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and those newer ones that do not, each with the reason."""
    skipped: list[tuple[Path, str]] = []
    for path in list_checkpoints(folder):
        problem = verify_folder(path)
        if problem is None:
            return path, skipped
        skipped.append((path, problem))
    return None, skipped


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Writing


def publish(
    folder: Path, step: int, run_id: str, write: Callable[[Path], None], needed_bytes: int = 0
) -> Path:
    """Make the checkpoint of `step` appear in `folder` at once, with the files that `write` puts into a
    temporary folder. On any failure the temporary is removed and a CheckpointFailedError says why."""
    final = folder / folder_name(step)
    if final.exists() and verify_folder(final) is None:
        return final
    temporary = folder / f"{TEMPORARY}{final.name}"
    with _cleaned_up(temporary):
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        _require_space(folder, needed_bytes)
        temporary.mkdir()
        write(temporary)
        _seal(temporary, step, run_id)
        if final.exists():  # damaged: kept beside, for whoever wants to know why
            bad = folder / f"bad-{final.name}"
            shutil.rmtree(bad, ignore_errors=True)
            final.rename(bad)
        temporary.rename(final)
        sync_directory(folder)
    _point_latest(folder, final.name)
    return final


@contextmanager
def _cleaned_up(temporary: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else CheckpointFailedError
        raise kind(error.strerror or str(error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _require_space(folder: Path, needed_bytes: int) -> None:
    free, needed_bytes = shutil.disk_usage(folder).free, needed_bytes + SAFETY_BYTES
    if free < needed_bytes:
        needs, has = needs_and_has(needed_bytes, free)
        raise DiskFullError(f"the disk of {folder} has {has} free, a checkpoint needs {needs}")


def needs_and_has(needed: int, free: int) -> tuple[str, str]:
    """In words, the one rounded up and the other down: what is not enough does not read as if it were."""
    unit, step = (10 ** max(0, len(str(count)) - 3) for count in (needed, free))
    return size(-(-needed // unit) * unit), size(free // step * step)


def _seal(temporary: Path, step: int, run_id: str) -> None:
    """Flush every file to the disk, then write the manifest of their hashes, then flush that."""
    files = {}
    for file in sorted(temporary.iterdir()):
        sync_file(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": "checkpoint",
        "step": step,
        "run_id": run_id,
        "files": files,
    }
    target = temporary / "manifest.json"
    target.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync_file(target)
    sync_directory(temporary)


def sync_file(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_latest(folder: Path, name: str) -> None:
    """A hint for people. Some file systems have no links; then there is no hint."""
    link = folder / ".latest-new"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(folder / "latest")
    except OSError:
        return


# ------------------------------------------------------------------------------------------------------------
# Room


def remove_temporaries(folder: Path) -> None:
    """What a killed writer left behind. Only the one writer of a run calls this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_fetching(folder: Path, good: Path) -> list[Path]:
    """What is left of fetching a checkpoint that is here by now, or is older than `good`, which verifies: it
    will not be gone on with. Only the one writer of a run calls this, when nothing is being fetched."""
    done = []
    for path in folder.glob(f"{FETCHING}step-*"):
        whole = folder / path.name.removeprefix(FETCHING)
        if re.fullmatch(r"step-\d{9,}", whole.name) and (whole.exists() or step_of(whole) <= step_of(good)):
            shutil.rmtree(path, ignore_errors=True)
            done.append(path)
    return done


def prune(
    folder: Path,
    newest: Path,
    keep_last: int,
    keep_every: int | None,
    keep_at: Collection[int] = (),
    *,
    keep_best: int = 0,
    losses: Mapping[int, float] = MappingProxyType({}),
    needed: Collection[int] = (),
    mirrored: Collection[int] = (),
    keep_local: int | None = None,
) -> list[Path]:
    """Remove checkpoints older than `newest`, which was just verified, that the policy (retention.kept) does
    not keep. Of those it keeps, `keep_local` stay here (none: all), the newest ones; the others go once they
    are `mirrored`. Whatever is `needed` here stays, and so does what is newer than `newest`. Returns what was
    removed."""
    remove_fetching(folder, newest)
    older = [path for path in list_checkpoints(folder) if step_of(path) < step_of(newest)]
    here = {step_of(newest), *map(step_of, older)}
    known = here | {step for step in mirrored if step < step_of(newest)}
    stay = retention.kept(known, keep_last, keep_every, keep_at, losses, keep_best)
    if keep_local is not None:
        beyond = sorted(stay & here, reverse=True)[max(1, keep_local) :]
        stay -= set(beyond).intersection(mirrored)
    return _remove([path for path in older if step_of(path) not in stay.union(needed)])


def free(
    folder: Path,
    good: Path,
    keep_at: Collection[int] = (),
    *,
    needed: Collection[int] = (),
    mirrored: Collection[int] = (),
) -> list[Path]:
    """One step of making room on a full disk: all that is `mirrored` and older than `good`, whatever the
    policy keeps; if there is none, all that is older but for `keep_at`. Returns what was removed: nothing
    when there is nothing left to remove."""
    spare = _spare(folder, good, keep_at, needed, mirrored)
    return _remove([path for path in spare if step_of(path) in mirrored] or spare)


def room_for(
    folder: Path,
    needed_bytes: int,
    kept: Path | None,
    keep_at: Collection[int] = (),
    *,
    needed: Collection[int] = (),
    mirrored: Collection[int] = (),
) -> bool:
    """Whether a checkpoint would fit, counting all that `free` could remove beside `kept`."""
    spare = _spare(folder, kept, keep_at, needed, mirrored) if kept else []
    removable = sum(map(size_of, spare))
    return shutil.disk_usage(folder).free + removable >= needed_bytes + SAFETY_BYTES


def _spare(
    folder: Path, good: Path, keep_at: Collection[int], needed: Collection[int], mirrored: Collection[int]
) -> list[Path]:
    """Checkpoints older than `good` that may go when there is no room."""
    fixed = set(keep_at).difference(mirrored).union(needed)
    older = [path for path in list_checkpoints(folder) if step_of(path) < step_of(good)]
    return [path for path in older if step_of(path) not in fixed]


def _remove(doomed: Iterable[Path]) -> list[Path]:
    """First out of sight: a kill in between leaves no half folder under a good name."""
    removed = []
    for path in doomed:
        hidden = path.rename(path.with_name(f"{TEMPORARY}removing-{path.name}"))
        shutil.rmtree(hidden, ignore_errors=True)
        removed.append(path)
    return removed


def remove_newer(folder: Path, good: Path) -> None:
    """Remove what is newer than `good`, for good: out of sight on the disk itself before anything else."""
    doomed = []
    for path in list_checkpoints(folder):
        if step_of(path) > step_of(good):
            doomed.append(path.rename(folder / f"{TEMPORARY}removing-{path.name}"))
    sync_directory(folder)
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> list[tuple[Path, int]]:
    """Folders that nothing here removes, with their bytes: damaged checkpoints (`bad-`) and those of a branch
    that another writer's run gave up (`lost-`)."""
    found = [path for kind in ("bad-", "lost-") for path in folder.glob(f"{kind}*") if path.is_dir()]
    return [(path, size_of(path)) for path in sorted(found)]


def aside_words(folder: Path) -> str:
    """What a person may remove by hand when there is no room; empty where there is nothing."""
    aside = set_aside(folder)
    names, total = ", ".join(path.name for path, _ in aside), size(sum(count for _, count in aside))
    return f"; {names}: {total} that were set aside, remove them if you need the room" if aside else ""


def size_of(path: Path) -> int:
    """Bytes of the files in a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for file in path.glob("*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total
