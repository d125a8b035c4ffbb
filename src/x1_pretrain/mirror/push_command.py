"""Send a run that nobody trains now to a mirror, or what a mirror lacks of it.

x1 push x1-50m-a100 s3://bucket/runs
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Annotated

import typer

from x1_pretrain.command import single
from x1_pretrain.errors import FAULT, FINISHED, RefusedError, UserError
from x1_pretrain.mirror.choosing import standing
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.identity import refuse_another_run
from x1_pretrain.mirror.job import Job, of_config
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.looks import Looks, claim_for
from x1_pretrain.mirror.outage import Outage
from x1_pretrain.mirror.patience import Patience
from x1_pretrain.mirror.preflight import preflight
from x1_pretrain.mirror.publisher import Identity, Publisher
from x1_pretrain.mirror.restore import records_back
from x1_pretrain.mirror.restored_records import Source
from x1_pretrain.numbers import size
from x1_pretrain.records.checkpoint_files import list_checkpoints, step_of
from x1_pretrain.records.lock import lock_folder
from x1_pretrain.records.mirror_state import MirrorState, folder_id, write_state
from x1_pretrain.records.run_folder import Run, find_run, last_step, open_run
from x1_pretrain.stores.address import Address, parse
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store, StoreError

TICK_S = 5.0  # between two lines of progress
PATIENCE_S = 300.0  # with a store that answers nothing

Say = Callable[[str], None]


def push(
    run: Annotated[str, typer.Argument(help="A run folder, or the name of one under runs/.")],
    uri: Annotated[
        str, typer.Argument(help="The mirror: s3://bucket/runs, gs://, az://, hf:// or a folder.")
    ],
    endpoint: Annotated[str | None, typer.Option(help="Server of a store that speaks S3.")] = None,
    mirror_data: Annotated[bool, typer.Option("--mirror-data", help="The corpora too.")] = False,
    max_mb_per_s: Annotated[float | None, typer.Option(min=0.001, help="Send no faster.")] = None,
) -> int:
    """Send a run that nobody trains now to a mirror. What is there already is not sent again."""
    opened, address = open_run(find_run(run)), parse(uri)
    refuse_run_address(address, uri, opened.name)
    try:
        lock = lock_folder(opened.folder)
    except RefusedError as error:
        raise RefusedError(f"{error}. A run with --mirror needs no push while it is trained") from None
    try:
        job = job_of(opened, uri, endpoint, mirror_data, max_mb_per_s)
        with closing(open_store(address, endpoint)) as store:
            return send(opened, job, store, tell)
    except StoreError as error:
        raise RefusedError(str(error)) from None
    finally:
        lock.close()


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse_run_address(address: Address, uri: str, name: str) -> None:
    """The URI is of the folder of runs."""
    whole = uri.rstrip("/")
    if whole.endswith(f"/{name}"):
        runs = whole.removesuffix(name)
        raise UserError(f"{uri}: ends with the name of the run; give the folder of runs, {runs}")


def job_of(run: Run, uri: str, endpoint: str | None, data: bool, max_mb_per_s: float | None) -> Job:
    return of_config(
        run.config,
        run.folder,
        run.checkpoints,
        uri,
        endpoint=endpoint,
        data=data,
        max_mb_per_s=max_mb_per_s,
        run_id=run.manifest.get("run_id"),
    )


def send(run: Run, job: Job, store: Store, say: Say) -> int:
    """Claim, publish, give back; the exit code."""
    preflight(store, job.name, job.without_lease)
    found = look(store, job.name)
    if found and not found[0].trashed:
        refuse_other(run, job, found[0], f"{store.label}/{job.name}")
    state = MirrorState(job.uri, f"{store.label}/{job.name}", job.name, folder_id(run.folder))
    keeper = Keeper(claim_for(job, store, state.folder, say=say))
    keeper.start()
    publisher = None
    try:
        before = keeper.lease.before
        if before and not before.trashed:
            refuse_other(run, job, before, state.label)  # it may have gone on while we waited
            for note in rows_back(run, store, before):
                say(note)
        step = step_here(run)
        keeper.resumed_from(step)
        writer = keeper.head.writer
        state = replace(state, epoch=writer.epoch, token=writer.token)
        write_state(run.folder, state)
        publisher = Publisher(job, store, keeper, identity_of(run, job, step))
        left = everything(publisher, say)
    finally:
        if publisher:
            publisher.stop()
        keeper.release("pushed" if publisher else "nothing was pushed")
        if publisher:
            status = publisher.status()
            state = replace(state, mirrored=status.mirrored, lag_bytes=status.lag_bytes)
            write_state(run.folder, replace(state, state="released", why="pushed"))
    for line in left:
        say(f"not in the mirror: {line}")
    if not left:
        say(f"all of it is in {state.label} ({size(status.sent_bytes)} sent)")
    return FAULT if left else FINISHED


def refuse_other(run: Run, job: Job, head: Head, where: str) -> None:
    """RefusedError where the mirror's run is another one, or further on than the folder."""
    refuse_another_run(head, where, run.folder, job.run_id)
    here, there = step_here(run), head.last_step() or 0
    if there > here or not standing(run.folder, head).ours:
        raise RefusedError(
            f"{where}: is newer than {run.folder} (step {there} there, step {here} here): the run went on "
            f"elsewhere, on {head.writer.host}; `x1 pull` fetches it, and nothing was sent"
        )


def rows_back(run: Run, store: Store, head: Head) -> list[str]:
    """As a session that begins has them: what was cut out of the folder's is not cut out of the mirror's."""
    source = Source(store, head, Patience(PATIENCE_S), lambda _: None)
    return records_back(source, run.folder, run.checkpoints, standing(run.folder, head))


def step_here(run: Run) -> int:
    """How far the folder's run came, by its checkpoints and its records."""
    saved = max(map(step_of, list_checkpoints(run.checkpoints)), default=0)
    return max(saved, last_step(run.rows()))


def identity_of(run: Run, job: Job, step: int) -> Identity:
    data = run.manifest.get("data") or []
    marks = [one["fingerprint"] for one in data if isinstance(one, dict) and one.get("fingerprint")]
    return Identity(job.run_id or "", step, marks, job.step_fields)


def everything(publisher: Publisher, say: Say) -> list[str]:
    """Look and send until nothing is left, or the store has not answered for long; what is left."""
    looks, begun, told = Looks(publisher, Outage(PATIENCE_S), TICK_S), time.monotonic(), 0.0
    total = publisher.status().lag_bytes
    while True:
        looked = looks.look()
        for line in publisher.take_news():
            say(line)
        left = [line for part in looks.left() for line in part]
        if looked.failed:
            say(f"{looked.failed}; trying again")
        if looks.troubled_s() > PATIENCE_S:
            return left
        if not (left or looked.failed):
            publisher.clean_up()
            return publisher.bad()
        if not looked.failed and time.monotonic() - told >= TICK_S:
            told = time.monotonic()
            say(progress(publisher.rate.sent_bytes, total, told - begun, left))
        looks.pause(looked, TICK_S)


def progress(sent: int, total: int, seconds: float, left: list[str]) -> str:
    """How far, and how long it still takes at this pace."""
    said = f"{size(sent)} of {size(max(total, sent))} sent"
    if sent and seconds > 0 and total > sent:
        rate = sent / seconds
        said += f", {size(rate)}/s, about {(total - sent) / rate:,.0f} s left"
    return f"{said}; now {left[0]}"


app = single(push)
