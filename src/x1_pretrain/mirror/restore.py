"""Before a run goes on: what its mirror has and its folder has not is put into the folder.

`restore` is called by the session that holds the lease. Afterwards the trainer finds a folder to resume from,
as if the run had never been elsewhere: the newest checkpoint that verifies, and records that belong to it.
Whatever it breaks off at, the next call goes on with.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from x1_pretrain import config as cfg
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror.choosing import (
    MARKER,
    Candidate,
    Standing,
    candidates,
    given_up,
    of_lost_branch,
    standing,
)
from x1_pretrain.mirror.fetch import fetch_checkpoint, require_room
from x1_pretrain.mirror.head import NAME, Head, Published
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.identity import refuse_another_run, refuse_checkpoints_of_another
from x1_pretrain.mirror.job import Job
from x1_pretrain.mirror.patience import PATIENCE_S, Patience, UnusableError, told
from x1_pretrain.mirror.restored_corpora import absent_bytes, fetch_corpora, refuse_other_corpora
from x1_pretrain.mirror.restored_records import (
    Source,
    fill_in,
    restore_files,
    restore_ledger,
    rows_that_lack,
    take_over,
    write_whole,
)
from x1_pretrain.numbers import size
from x1_pretrain.records.checkpoint_files import (
    FETCHING,
    folder_name,
    spike_in,
    sync_directory,
    verify_folder,
)
from x1_pretrain.records.metrics import read_rows
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import NotThereError, Store, StoreError

Say = Callable[[str], None]
Fetch = Callable[[Published], None]


@dataclass(frozen=True)
class Restored:
    """What was put into the run folder."""

    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # record files of which the mirror lacks rows
    restored_step: int | None = None  # of the checkpoint that was fetched
    restored_bytes: int = 0
    restored_s: float = 0.0
    last_step: int | None = None  # of which the writer before published anything


def restore(
    job: Job,
    head: Head,
    store: Store,
    say: Say,
    *,
    patience_s: float = PATIENCE_S,
    again_s: Sequence[float] | None = None,
) -> Restored:
    """Put into the run folder what is newer in the mirror. `head` is the one that our claim published.

    RefusedError: another run, another config, other data, no room, or nothing to go on from; before a byte is
    fetched where that can be known. AwayError (relaunch): the store does not answer. What `say` raises ends
    it.
    """
    folder, checkpoints = Path(job.folder), Path(job.checkpoints)
    where = f"{store.label}/{head.name}"
    refuse_another_run(head, where, folder, job.run_id)
    refuse_another_config(job, head, where)
    refuse_checkpoints_of_another(checkpoints, where, head.run_id or job.run_id)
    refuse_other_corpora(job.corpora, head, store)
    began = time.monotonic()
    whose = standing(folder, head)
    source = Source(store, head, Patience(patience_s, again_s=again_s), say)
    data = told(
        lambda: absent_bytes(store, job.corpora, head, source.patience), source.patience, "corpora", say
    )
    refuse_without_room(head, folder, checkpoints, whose, data)
    notes = records_back(source, folder, checkpoints, whose)

    came = 0

    def fetch(one: Published) -> None:
        nonlocal came
        fetch_checkpoint(store, head.name, one, checkpoints, say, patience_s=patience_s, again_s=again_s)
        came += one.bytes

    found, begun = candidates(checkpoints, head, whose.ours), time.monotonic()
    chosen, skipped = checkpoint_back(where, head, folder, found, fetch)
    notes += skipped
    fetched = chosen.published if chosen else None
    if fetched:
        took = f"{size(fetched.bytes)} in {time.monotonic() - begun:.1f} s"
        notes.append(f"fetched the checkpoint of step {fetched.step} from {where}: {took}")
        notes += rows_that_lack(source, folder, fetched.step)
    if chosen and job.step_fields.get("stability.policy") == "rewind":
        onset = spike_in(checkpoints / folder_name(chosen.step))
        before = [one for one in found if onset is not None and one.step < onset]
        notes += rewind_target_back(folder, before, fetch)
    if chosen:
        remove_partial(checkpoints)
    came += fetch_corpora(store, job.corpora, head, say, notes, patience_s, again_s)
    seconds = time.monotonic() - began
    step = fetched.step if fetched else None
    return Restored(notes, sorted(source.lost), step, came, seconds, head.last_step())


# ------------------------------------------------------------------------------------------------------------
# Is it the same training


def refuse_another_config(job: Job, head: Head, where: str) -> None:
    if not head.step_fields:
        return
    theirs, ours = dict(head.step_fields), dict(job.step_fields)
    if None in (
        theirs.get("model.vocab_size"),
        ours.get("model.vocab_size"),
    ):  # resolved once there are corpora
        theirs.pop("model.vocab_size", None)
        ours.pop("model.vocab_size", None)
    if changed := cfg.changed_fields(theirs, ours):
        raise RefusedError(
            f"{where}: made with another config, which would change what a step is ({'; '.join(changed)}); "
            "put these back to go on with it, or give this run another name"
        )


# ------------------------------------------------------------------------------------------------------------
# Room


def refuse_without_room(
    head: Head, folder: Path, checkpoints: Path, whose: Standing, corpora: Mapping[Path, int]
) -> None:
    """Before anything is written: for the corpora, and for the newest checkpoint if it is not here. Rows fit
    beside them, or into what the trainer frees."""
    wanted = dict(corpora)
    gone = given_up(read_rows(folder / "events.jsonl")) if whose.ours else {}
    found = candidates(checkpoints, head, whose.ours)
    newest = next((one for one in found if one.local or one.step not in gone), None)
    if newest and newest.published:
        wanted[checkpoints / f"{FETCHING}{folder_name(newest.step)}"] = newest.published.bytes
    require_room(wanted, f"what {head.name} has in the mirror")


# ------------------------------------------------------------------------------------------------------------
# Records


def records_back(source: Source, folder: Path, checkpoints: Path, whose: Standing) -> list[str]:
    """The records as the run left them, wherever it was last. What tells another story is kept apart."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if whose.ours:
            notes = fill_in(source, folder, whose.epoch)
        else:
            write_whole(folder / MARKER, json.dumps({"epoch": whose.epoch}).encode())
            notes = ["events.jsonl is not what the mirror has of it: all rows are put back as they are there"]
            notes = (notes if whose.changed else []) + set_aside(checkpoints, source.head, whose)
            notes += take_over(source, folder, whose.epoch)
            notes += restore_files(source, folder)
        came = restore_ledger(source, folder)
        (folder / MARKER).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: can't be written ({error.strerror}); see --run-dir"
        ) from None
    return [*notes, f"ledger.jsonl: {came} rows from the mirror"] if came and whose.ours else notes


def set_aside(checkpoints: Path, head: Head, whose: Standing) -> list[str]:
    notes = []
    for path in of_lost_branch(checkpoints, head, whose):
        aside = path.with_name(f"lost-e{whose.epoch:04d}-{path.name}")
        number = 2
        while aside.exists():
            aside, number = path.with_name(f"lost-e{whose.epoch:04d}-{number}-{path.name}"), number + 1
        path.rename(aside)
        notes.append(
            f"{path.name} is of a branch that was given up: the run went on elsewhere; kept as {aside.name}"
        )
    if notes:
        latest = checkpoints / "latest"
        if latest.is_symlink() and not latest.exists():  # it named one of them
            latest.unlink()
        sync_directory(checkpoints)
    return notes


# ------------------------------------------------------------------------------------------------------------
# The checkpoint


def checkpoint_back(
    where: str, head: Head, folder: Path, found: Sequence[Candidate], fetch: Fetch
) -> tuple[Candidate | None, list[str]]:
    """The newest one that verifies, in the checkpoint folder afterwards; and which were skipped, and why."""
    good, skipped = first_good(folder, found, fetch)
    if good is None and any(one.step > 0 for one in head.checkpoints):
        raise RefusedError(
            f"{where}: no checkpoint verifies, and a run is never restarted from zero by "
            f"itself ({'; '.join(skipped)}); restore one from a copy, or start anew under another name"
        )
    return good, skipped


def rewind_target_back(folder: Path, before: Sequence[Candidate], fetch: Fetch) -> list[str]:
    """A spike lasted as the checkpoint was saved: the newest one from before it is here too, if it can be."""
    try:
        good, notes = first_good(folder, before, fetch)
    except RefusedError as error:
        return [f"there may be nothing to go back to from the spike: {error}"]
    if good and good.published:
        notes.append(f"fetched the checkpoint of step {good.step} too, to go back to if the spike stays")
    return notes


def first_good(folder: Path, found: Sequence[Candidate], fetch: Fetch) -> tuple[Candidate | None, list[str]]:
    gone = given_up(read_rows(folder / "events.jsonl"))
    skipped: list[str] = []
    for one in found:
        problem = None
        if one.local:
            problem = verify_folder(one.local)
        elif one.step in gone:
            problem = f"the run went back to step {gone[one.step]} after it"
        elif one.published:
            try:
                fetch(one.published)
            except UnusableError as error:
                problem = str(error)
        if problem is None:
            return one, skipped
        skipped.append(f"skipped {one}: {problem}")
    return None, skipped


def remove_partial(checkpoints: Path) -> None:
    for path in checkpoints.glob(f"{FETCHING}step-*"):
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# The ledger alone


def ledger_from(uri: str, endpoint: str | None, name: str, folder: Path, patience_s: float = 60.0) -> int:
    """Put the ledger of a mirrored run into a run folder, merged with the one there; how many rows came.

    For the supervisor, before anything may cost: no lease is needed, since rows are only added. A mirror
    without the run is no error: it is a new one.
    """
    store = open_store(parse(uri), endpoint)
    try:
        patience = Patience(patience_s)
        found = patience.ask(lambda: look(store, name))
        if found is None:  # asked for in another way: what the run has cost must not be forgotten
            patience.ask(lambda: store.stat(f"{name}/{NAME}"))
            found = patience.ask(lambda: look(store, name))
        if found is None or found[0].trashed:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        return restore_ledger(Source(store, found[0], patience, lambda _: None), folder)
    except NotThereError:
        return 0
    except StoreError as error:
        raise RefusedError(f"{error}; the ledger of what was spent so far can't be read") from None
    finally:
        store.close()
