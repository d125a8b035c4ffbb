"""A mirrored run -> a folder here, to look at or to use. Takes no lease: whoever trains it does not notice.

    x1 pull s3://bucket/runs/x1-50m                   runs/x1-50m: newest checkpoint, records, report
    x1 pull s3://bucket/runs/x1-50m --only final      x1-50m-final: the model, for transformers
    x1 pull s3://bucket/runs/x1-50m --only report     runs/x1-50m without weights

Run it again to have what is new, or to go on with one that broke off. The folder that the run was launched
from, which holds its ledger, may take it too: the rows of both are kept, and what the guard there wrote.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror.choosing import MARKER, given_up, standing
from x1_pretrain.mirror.fetch import fetch_checkpoint, is_same
from x1_pretrain.mirror.head import Head, Published
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.identity import mark_in, run_id_of
from x1_pretrain.mirror.patience import Patience, UnusableError, in_lanes
from x1_pretrain.mirror.restore import records_back, refuse_without_room, remove_partial
from x1_pretrain.mirror.restored_records import Source, restore_files
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.records.checkpoint_files import folder_name, verify_folder
from x1_pretrain.records.lock import lock_folder
from x1_pretrain.records.metrics import read_rows
from x1_pretrain.records.mirror_state import (
    PULLED,
    PULLED_HOME,
    MirrorState,
    folder_id,
    read_state,
    write_state,
)
from x1_pretrain.records.run_folder import parse_row
from x1_pretrain.stores.address import run_address
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store, StoreError

PATIENCE_S = 120.0
GUARDS = ("STOP.json", "guard.json", "termination.json")
Say = Callable[[str], None]


class Only(StrEnum):
    final = "final"
    report = "report"


# ------------------------------------------------------------------------------------------------------------
# What is there


def mirrored_head(store: Store, name: str, patience: Patience) -> Head:
    """The head as it is now, as if ours came next: every epoch in it is another writer's."""
    (found,) = in_lanes([lambda: patience.ask(lambda: look(store, name))], patience.stop, lambda: None)
    where = f"{store.label}/{name}"
    if found is None and (below := store.names(name)):
        raise UserError(f"{where}: is no run; it holds {', '.join(below[:5])}; `x1 runs {where}` lists them")
    if found is None:
        raise UserError(f"{where}: there is no such run; `x1 runs {store.label}` lists those that are there")
    head = found[0]
    if head.trashed:
        raise RefusedError(f"{where}: was moved to the trash; `x1 runs restore` brings it back")
    return replace(head, writer=replace(head.writer, epoch=head.writer.epoch + 1))


def newest(
    store: Store, head: Head, target: Path, gone: dict[int, int], say: Say, without: tuple[str, ...] = ()
) -> tuple[Published, Path] | None:
    """The newest published checkpoint that verifies, fetched into `target` unless it is there."""
    skipped = []
    for one in reversed(head.checkpoints):
        here = target / folder_name(one.step)
        if one.step in gone:
            skipped.append(f"step {one.step}: the run went back to step {gone[one.step]} after it")
        elif is_same(here, one) and verify_folder(here) is None:
            return one, here
        else:
            try:
                folder = fetch_checkpoint(
                    store, head.name, one, target, say, patience_s=PATIENCE_S, without=without
                )
                return one, folder
            except UnusableError as error:
                skipped.append(f"step {one.step}: {error}")
        print(f"skipped the checkpoint of {skipped[-1]}")
    if skipped:
        raise RefusedError(f"{store.label}/{head.name}: no checkpoint verifies ({'; '.join(skipped)})")
    return None


# ------------------------------------------------------------------------------------------------------------
# A run folder


def pull_run(store: Store, head: Head, uri: str, output: Path, weights: bool, say: Say) -> None:
    """Make `output` the run as the mirror has it. What only `output` has stays, apart."""
    source = Source(store, head, Patience(PATIENCE_S), say)
    if launched_here(output):
        refuse_another_ledger(output, source)
    else:
        refuse_what_is_there(output, head)
    before = what_it_is(output)
    if weights:
        refuse_without_room(head, output, output / "checkpoints", standing(output, head), {})
    output.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(output)
    try:
        whose = standing(output, head)
        if before:
            whose = replace(whose, changed=False)  # a copy is behind, and that is no fault
        notes = records_back(source, output, output / "checkpoints", whose)
        if before or not whose.ours:
            notes += files_back(source, output, home=before == PULLED_HOME)
        for note in notes:
            print(note)
        if weights:
            (output / "checkpoints").mkdir(exist_ok=True)
            gone = given_up(read_rows(output / "events.jsonl"))
            if newest(store, head, output / "checkpoints", gone, say) is None:
                print(f"{head.name}: has no checkpoint in the mirror yet")
            remove_partial(output / "checkpoints")
        if before or not whose.ours:
            remember(store, head, uri, output, before or PULLED)
    finally:
        lock.close()


def what_it_is(output: Path) -> str | None:
    """Why its mirror.json was, or will be, written, where what is in it is the mirror's."""
    state = read_state(output)
    if launched_here(output):
        return PULLED_HOME
    return state.why if state and state.is_copy else None


def files_back(source: Source, output: Path, home: bool) -> list[str]:
    """The small files, in place of those here; but what a guard at home wrote stays."""
    keep = [name for name in GUARDS if home and (output / name).exists()]
    files = {name: item for name, item in source.head.files.items() if name not in keep}
    return restore_files(replace(source, head=replace(source.head, files=files)), output, replace=True)


def launched_here(output: Path) -> bool:
    """A folder with the money of a run that is on a rented machine, and nothing else of it."""
    own = ("config.yaml", "manifest.json", "events.jsonl", "metrics.jsonl")
    return (output / LEDGER).is_file() and not any((output / name).exists() for name in own)


def refuse_another_ledger(output: Path, source: Source) -> None:
    """A launch that the mirrored run's ledger knows nothing of was another run's."""
    here = (output / LEDGER).read_bytes()
    there = source.content(LEDGER, here)[0] if LEDGER in source.head.records else b""
    if not launches(here) & launches(there):
        raise RefusedError(
            f"{output}: holds the ledger of another run, or of a launch that has not come to the mirror yet; "
            "name another --output"
        )


def launches(ledger: bytes) -> set[str]:
    """The tags of its machines."""
    found = (parse_row(line) or {} for line in ledger.split(b"\n"))
    begun = (row.get("tag") for row in found if row.get("event") in ("intent", "adopted"))
    return {tag for tag in begun if isinstance(tag, str)}


def refuse_what_is_there(output: Path, head: Head) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise RefusedError(f"{output}: is a file; name another --output")
    state = read_state(output)
    here = run_id_of(output) or (head.run_id if state and state.name == head.name else None)
    if here is None and (output / MARKER).exists():
        return  # one that broke off among the records: what is there is set aside if it is not this run's
    if here is None:
        raise RefusedError(f"{output}: holds something that is no run; name another --output")
    if here != head.run_id:
        raise RefusedError(
            f"{output}: is the run {here}, and the mirrored one is {head.run_id}; name another --output"
        )


def remember(store: Store, head: Head, uri: str, output: Path, why: str) -> None:
    """Which state of the run this folder has, for whoever trains in it one day."""
    address, _ = run_address(uri)
    own = head.epochs[-1] if head.epochs else None
    state = MirrorState(
        uri=str(address),
        label=f"{store.label}/{head.name}",
        name=head.name,
        folder=folder_id(output),
        epoch=own.epoch if own else 0,
        token=own.token if own else "",
        state="released",
        why=why,
        mirrored=[one.step for one in head.checkpoints],
    )
    write_state(output, state)


# ------------------------------------------------------------------------------------------------------------
# A model


def pull_final(store: Store, head: Head, output: Path, say: Say) -> Published:
    """The newest model as the folder `output`: appears whole, in place of an earlier one of this run. Without
    the optimizer's state, which is twice as large."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        here = mark_in(output / "state.json", "run_id")
        if here != head.run_id:
            what = f"a checkpoint of the run {here}" if here else "something that is no checkpoint"
            raise RefusedError(
                f"{output}: holds {what}, the mirrored run is {head.run_id}; name another --output"
            )
    workshop = output.with_name(f".pulling-{output.name}")
    workshop.mkdir(parents=True, exist_ok=True)
    source = Source(store, head, Patience(PATIENCE_S), say)
    events = source.content("events.jsonl", b"")[0] if "events.jsonl" in head.records else b""
    (workshop / "events.jsonl").write_bytes(events)
    gone = given_up(read_rows(workshop / "events.jsonl"))
    found = newest(store, head, workshop, gone, say, without=("optimizer.safetensors",))
    if found is None:
        shutil.rmtree(workshop)
        raise UserError(f"{store.label}/{head.name}: has no checkpoint in the mirror yet; try again later")
    published, folder = found
    if output.exists():
        shutil.rmtree(workshop / "before", ignore_errors=True)  # of one that was killed here
        output.rename(workshop / "before")
    folder.rename(output)
    shutil.rmtree(workshop)
    return published


# ------------------------------------------------------------------------------------------------------------
# The command


class Line:
    """One line that is written over on a terminal; in a log one every ten seconds."""

    def __init__(self) -> None:
        self._terminal, self._told, self._open = sys.stderr.isatty(), time.monotonic(), False

    def say(self, text: str) -> None:
        if self._terminal:
            self._open = True
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._told >= 10:
            self._told = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._open:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(
    uri: Annotated[str, typer.Argument(help="of the run: s3://bucket/runs/x1-50m, or a folder")],
    only: Annotated[Only | None, typer.Option(help="final: the model alone; report: no weights")] = None,
    output: Annotated[Path | None, typer.Option(help="none: runs/NAME; of the model NAME-final")] = None,
    endpoint: Annotated[str | None, typer.Option(help="of a store that speaks S3")] = None,
) -> None:
    """Fetch a mirrored run, or a part of it, into a folder here."""
    address, name = run_address(uri)
    store, line = open_store(address, endpoint), Line()
    try:
        head = mirrored_head(store, name, Patience(PATIENCE_S))
        if only is Only.final:
            target = output or Path(f"{name}-final")
            published = pull_final(store, head, target, line.say)
            line.close()
            print(f"{target}: the model of step {published.step} of {head.run_id}")
        else:
            target = output or Path("runs") / name
            pull_run(store, head, uri, target, only is None, line.say)
            line.close()
            print(f"{target}: the run {head.run_id} as it is in {store.label}")
    except StoreError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or output}: can't be written ({error.strerror})") from None
    finally:
        line.close()
        store.close()


app = single(main)

if __name__ == "__main__":
    sys.exit(run_app(app, prog="x1 pull"))
