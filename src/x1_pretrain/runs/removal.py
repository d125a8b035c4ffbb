"""What moving a run to the trash would take away, and why it may not go."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror import trash as mirror_trash
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.identity import another_run_in
from x1_pretrain.numbers import size
from x1_pretrain.records import runs, runs_table, trash
from x1_pretrain.records.behind import copied
from x1_pretrain.records.lock import lock_folder
from x1_pretrain.records.mirror_state import read_state
from x1_pretrain.records.runs import Listed
from x1_pretrain.records.trash import TrashError
from x1_pretrain.runs.listing import Place, is_address, mirror_of, of_head
from x1_pretrain.stores.address import Address, run_address
from x1_pretrain.stores.store import Meta, Store, StoreError

# What a checkpoint folder may hold and still be one run's alone
OWN_NAMES = re.compile(r"(\.?[a-z0-9-]*step-\d+.*|latest|\.latest-new|lock|\.lock-probe-.*)")


@dataclass(frozen=True)
class Mirrored:
    """The run in a mirror, as it was found."""

    place: Place
    store: Store
    head: Head
    meta: Meta
    listed: Listed


@dataclass(frozen=True)
class Removal:
    """All copies of a run that would go, and those that would stay."""

    name: str
    here: Listed | None = None  # goes
    folder: Path | None = None
    checkpoints: Path | None = None  # those that lie elsewhere and go too
    mirrored: Mirrored | None = None  # goes
    stays: tuple[str, ...] = ()  # addresses of copies that stay, and have the newest good checkpoint
    notes: tuple[str, ...] = ()

    @property
    def listed(self) -> Listed:
        """Whichever copy knows more of the run."""
        found = self.here or (self.mirrored.listed if self.mirrored else None)
        assert found is not None, "a removal removes something"
        return found

    @property
    def run_id(self) -> str | None:
        return self.listed.run_id

    @property
    def finished(self) -> bool:
        both = (self.here, self.mirrored.listed if self.mirrored else None)
        return any(one is not None and one.state == "finished" for one in both)

    @property
    def last_copy(self) -> bool:
        """Of a finished run: nothing of it would be left outside the trash."""
        return self.finished and not self.stays


# -----------------------------------------------------------------------------------------------------------
# Finding


def find_folder(text: str, runs_folder: Path) -> Path | None:
    """The run folder that `text` means: a path, or a name under the folder of runs."""
    candidates = (Path(text), runs_folder / text)
    return next((one for one in candidates if runs.is_begun(one)), None)


def where_mirrored(
    text: str, folder: Path | None, listed: Listed | None, mirror: Address | None, endpoint: str | None
) -> tuple[Place, str] | None:
    """The mirror that would have a copy, and the run's name there."""
    if folder is None and is_address(text):
        address, name = run_address(text)
        return Place(address, endpoint), name
    own = mirror_of(folder, listed.config) if folder and listed else None
    if own and mirror in (None, own[0].address):
        return replace(own[0], endpoint=endpoint or own[0].endpoint), own[1]
    if mirror is None:
        return None
    return Place(mirror, endpoint), own[1] if own else (listed.name if listed else text)


def mirrored(place: Place, name: str) -> Mirrored | None:
    """The copy there, if there is one."""
    store = place.open(retries=1)
    found = look(store, name)
    if found is None or found[0].trashed:
        return None
    return Mirrored(place, store, *found, of_head(store, name, *found, store.now()))


def checkpoints_elsewhere(folder: Path, listed: Listed) -> tuple[Path | None, str | None]:
    """The checkpoint folder of a run where it is no part of the run folder, and goes with it; or why not."""
    if listed.config is None:
        return None, None
    inside, place = folder / "checkpoints", listed.config.checkpoint_folder.absolute()
    if inside.is_dir():
        place = inside.resolve()
    if not place.is_dir() or place.is_relative_to(folder.resolve()):
        return None, None
    if folder.resolve().is_relative_to(place):
        return None, f"{place} stays: the run folder lies in it"
    if runs.is_begun(place.parent):
        return None, f"{place} stays: it is of the run folder {place.parent}"
    strange = sorted(one.name for one in place.iterdir() if not OWN_NAMES.fullmatch(one.name))
    if strange:
        return None, f"{place} stays: it also holds {strange[0]}; remove its checkpoints by hand"
    if other := another_run_in(place, listed.run_id):
        return None, f"{place} stays: its checkpoints are of run {other[1]}"
    return place, None


# -----------------------------------------------------------------------------------------------------------
# Planning


def plan_removal(
    text: str,
    mirror: Address | None,
    endpoint: str | None,
    only: str | None,
    runs_folder: Path,
    held: ExitStack,
) -> Removal:
    """What would go. Locks the folders of it, and refuses a run that goes on."""
    folder = None if is_address(text) else find_folder(text, runs_folder)
    listed = runs.look(folder, time.time()) if folder else None
    where = where_mirrored(text, folder, listed, mirror, endpoint)
    if folder is None and where is None:
        raise UserError(
            f"{text}: no run folder, and none under {runs_folder}/; `x1 runs` lists them; one only in "
            "a mirror is named by its address"
        )
    pulled = folder is not None and only is None and copied(folder) is not None
    only = "here" if pulled else only
    copy, note = _asked(*where, only) if where else (None, None)
    if copy and pulled:
        note = f"it was pulled: the run itself stays, in {copy.listed.mirror}"
    planned = Removal(copy.listed.name if copy else listed.name if listed else text)
    if copy and folder and listed and _is_another(copy.head, folder, listed):
        note, copy = f"{copy.listed.mirror} is another run of this name, and stays", None
    if copy and only != "here":
        _refuse_alive(copy, folder)
    if folder and only != "mirror":
        trash.refuse_link(folder)
    if folder:
        lock(folder, held)
    return _divided(replace(planned, notes=(note,) if note else ()), listed, folder, copy, only, held)


def _is_another(head: Head, folder: Path, listed: Listed) -> bool:
    """Whether the mirror's run has only its name in common with the folder's. Where an id is not known they
    are one run only if the folder was once its writer."""
    if listed.run_id and head.run_id:
        return listed.run_id != head.run_id
    state = read_state(folder)
    wrote = [(head.writer.epoch, head.writer.token), *((one.epoch, one.token) for one in head.epochs)]
    return state is None or (state.epoch, state.token) not in wrote


def _divided(
    planned: Removal,
    listed: Listed | None,
    folder: Path | None,
    copy: Mirrored | None,
    only: str | None,
    held: ExitStack,
) -> Removal:
    """What of the two copies goes and what stays."""
    stays, here, there = [], listed.good_here if listed else None, copy.listed.good_mirror if copy else None
    if folder and listed and only != "mirror":
        elsewhere, note = checkpoints_elsewhere(folder, listed)
        if elsewhere:
            lock(elsewhere, held)
        planned = replace(planned, here=listed, folder=folder, checkpoints=elsewhere)
        planned = replace(planned, name=listed.name, notes=(*planned.notes, *([note] if note else [])))
    elif folder and _complete(here, there):
        stays.append(str(folder))
    if copy and only != "here":
        planned = replace(planned, mirrored=copy)
    elif copy and _complete(there, here):
        stays.append(str(copy.listed.mirror))
    if planned.here is None and planned.mirrored is None:
        why = f" ({planned.notes[0]})" if planned.notes else ""
        place = "in a mirror" if only == "mirror" else "here"
        raise UserError(f"{planned.name}: there is no copy {place}{why}")
    return replace(planned, stays=tuple(stays))


def _complete(good: int | None, other: int | None) -> bool:
    """Whether a copy has the newest good checkpoint of the run; `other` is that of the other copy."""
    return good is not None and (other is None or good >= other)


def _asked(place: Place, name: str, only: str | None) -> tuple[Mirrored | None, str | None]:
    """The copy in the mirror; or what is to be said where it can't be asked, and need not be."""
    try:
        return mirrored(place, name), None
    except (StoreError, UserError) as error:
        if only == "here":
            return None, f"not known whether {place.address} has a copy ({error})"
        if isinstance(error, UserError):
            raise
        hint = "; `--only here` moves what is here and leaves the mirror"
        raise RefusedError(f"{place.address}: not known whether it has a copy ({error}){hint}") from None


def _refuse_alive(copy: Mirrored, folder: Path | None) -> None:
    try:
        mirror_trash.refuse_alive(copy.store, copy.head, copy.meta)
    except RefusedError as error:
        hint = f"; `--only here` moves {folder} alone" if folder else ""
        raise RefusedError(f"{error}{hint}") from None
    except StoreError as error:
        raise RefusedError(f"{copy.listed.mirror}: not known whether it is being trained ({error})") from None


def lock(folder: Path, held: ExitStack) -> None:
    """Held until the folder is in the trash: nobody can begin to train in it meanwhile."""
    try:
        found = lock_folder(folder)
    except RefusedError as error:
        raise RefusedError(f"{str(error).rpartition(';')[0] or error}; end it first") from None
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    held.callback(found.close)


# -----------------------------------------------------------------------------------------------------------
# Refusing


def refuse_parent(removal: Removal, others: Sequence[Listed], unknown: Sequence[str]) -> None:
    """RefusedError if other runs began from this one, or if that can't be known: `unknown` says why."""
    if found := runs.descendants(removal.run_id, others):
        named = ", ".join(sorted({one.folder or one.mirror or one.name for one in found}))
        raise RefusedError(
            f"{removal.name}: other runs began from it ({named}); they are explained by it, so it stays; "
            "move them to the trash first"
        )
    if unknown and removal.run_id:
        hint = "`--only here` goes on without" if removal.folder else "try again when it answers"
        raise RefusedError(
            f"{removal.name}: not known whether other runs began from it ({'; '.join(unknown)}); {hint}"
        )


def refuse_unnamed(removal: Removal, typed: str | None) -> None:
    """RefusedError if nothing of a finished run would be left, and its name was not typed."""
    if removal.last_copy and typed != removal.name:
        said = f"{typed!r} was typed" if typed else "its name was not typed"
        raise RefusedError(
            f"{removal.name}: is finished, and no copy would be left outside the trash; {said}; add --name "
            f"{removal.name} if that is what you want"
        )


# -----------------------------------------------------------------------------------------------------------
# Doing


def carry_out(removal: Removal, now: datetime, by: str) -> list[str]:
    """Into the trash: the mirror first, whose swap shows whether anybody writes; what was done, in lines.

    Whoever calls holds the locks of the folders that go."""
    done = []
    if there := removal.mirrored:
        try:
            mirror_trash.refuse_alive(there.store, there.head, there.meta)
            key = mirror_trash.throw_away(there.store, there.head, there.meta.etag, now, by)
            there.store.close()  # some stores send the last of it only now
        except StoreError as error:
            raise TrashError(f"{error}; nothing was moved here") from None
        done.append(f"{there.listed.mirror} is in the trash there ({key})")
    if removal.folder:
        try:
            entry = trash.throw_away(removal.folder, removal.checkpoints, removal.name, removal.run_id, now)
        except UserError as error:
            if done:
                raise type(error)(f"{error}; its copy in the mirror is in the trash already") from None
            raise
        done.append(f"{removal.folder} is in {entry.folder}")
        if entry.checkpoints:
            done.append(f"{entry.checkpoints.was} is in {entry.checkpoints.now}")
    return done


def told(planned: Removal) -> list[str]:
    """What would go and what it took to make."""
    one = planned.listed
    said = [f"{planned.name}: {one.status}, step {runs_table.steps(one)}"]
    if made := runs_table.made(one):
        said[0] += f"; it took {made} to make"
    if planned.here:
        said.append(f"  to the trash: {planned.folder} ({size(planned.here.bytes_here or 0)})")
    if planned.checkpoints:
        said.append(f"  to the trash: {planned.checkpoints} (its checkpoints, in that place's own .trash)")
    if planned.mirrored:
        there = planned.mirrored.listed
        said.append(f"  to the trash: {there.mirror} ({size(there.bytes_mirror or 0)})")
    said += [f"  stays: {where}" for where in planned.stays]
    return said + [f"  {note}" for note in planned.notes]
