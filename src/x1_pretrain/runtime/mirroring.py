"""The run and its mirror: what is told and recorded, from the start to the last byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from x1_pretrain import config as cfg
from x1_pretrain.config import RunConfig
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.errors import (
    BUDGET_CHECKPOINTED,
    BUDGET_STOPPED,
    FINISHED,
    INTERRUPTED,
    REFUSED,
    UserError,
)
from x1_pretrain.money import storage
from x1_pretrain.money.standing import endpoint_of
from x1_pretrain.records import checkpoint_files
from x1_pretrain.runtime.mirror import Mirror
from x1_pretrain.runtime.run import Run
from x1_pretrain.runtime.saving import prune
from x1_pretrain.runtime.session import Session
from x1_pretrain.stores.address import parse, run_address, same_disk

FINISH_S = 900.0  # at the end of a run, for what is not mirrored yet, while the store answers
AT_ONCE_S = 5.0  # over budget, or another writer has the run


def resumed_from(text: str, config: RunConfig) -> RunConfig:
    """The config with the mirror that --resume-from names."""
    place, name = run_address(text)
    given = config.mirror.uri
    if name != config.name:
        raise UserError(
            f"--resume-from {text}: names the run {name}, this config's name is {config.name}; give "
            f"{text.rstrip('/')}/{config.name} if that is a folder of runs, else add --set name={name}"
        )
    if given is not None and parse(given) != place:
        raise UserError(
            f"--resume-from {text}: the mirror is {given}; a run goes on in one mirror. To move it to "
            f"another: x1 pull {text}, then x1 train --mirror {given}"
        )
    settings = config.mirror.model_copy(update={"uri": str(place)})
    return config.model_copy(update={"mirror": settings})


def publish(mirror: Mirror, config: RunConfig, session: Session, corpora: Mapping[str, Corpus]) -> None:
    """What is in the run folder is the run: the mirror may follow it."""
    fingerprints = [corpus.fingerprint for corpus in corpora.values()]
    mirror.publish(session.run_id, session.step, fingerprints, cfg.step_fields(config))


def begin(run: Run) -> None:
    """What opening the mirror found goes on record, and it begins to follow."""
    if run.mirror is None:
        return
    opened = run.mirror.opened
    for note in opened.notes:
        run.event("mirror", f"  {note}")
    lost = {"lost": opened.lost} if opened.lost else {}
    run.event("mirror", f"  mirrored in {opened.label} (epoch {opened.epoch})", epoch=opened.epoch, **lost)
    if same_disk(parse(run.mirror.job.uri), run.config.folder):
        run.event("mirror", "  the mirror is on the same disk as the run: it dies with it")
    if opened.moved_from is not None:
        moved(run, run.mirror)
    run.mirror.billed_step = run.saved_step
    bill(run, run.mirror)
    publish(run.mirror, run.config, run.session, run.corpora)


def bill(run: Run, mirror: Mirror) -> None:
    """What keeping and fetching cost so far, into the ledger of a run that has one."""
    if run.guard is None:
        return
    settings, opened, sent = run.config.mirror, mirror.opened, mirror.sent_bytes
    said = storage.Bytes(mirror.status.held_bytes, sent - mirror.billed_bytes, opened.restored_bytes)
    mirror.billed_step = newest_step(mirror)
    try:
        storage.record(run.guard.ledger, settings, endpoint_of(settings), opened.epoch, said)
    except UserError as error:  # a full disk; the next row counts this time, and what was sent, too
        run.event("mirror", f"  {error}")
    else:
        mirror.billed_bytes = sent


def newest_step(mirror: Mirror) -> int:
    """Step of the newest mirrored checkpoint; one that was just started again says none at first."""
    return max(mirror.status.mirrored, default=mirror.billed_step)


def moved(run: Run, mirror: Mirror) -> None:
    """The run comes from another machine: how long nothing was learned, what has to be learned again."""
    opened = mirror.opened
    fields: dict[str, Any] = {"from_host": opened.moved_from, "down_s": opened.down_s}
    said = f"  goes on from {opened.moved_from}"
    if opened.down_s is not None:
        said += f", {opened.down_s:.0f} s after its last sign of life"
    if opened.last_step is not None:
        fields["lost_steps"] = lost = max(0, opened.last_step - run.step)
        said += f"; {lost} steps are done again"
        if lost and opened.last_spent_usd and opened.last_step:
            fields["lost_usd"] = round(opened.last_spent_usd * lost / opened.last_step, 4)
            said += f", which had cost ${fields['lost_usd']:.2f}"
    run.event("moved", said, **fields)
    if run.guard:
        run.guard.record("moved", said.strip(), **fields)


def tell(run: Run) -> None:
    """What the mirror has to say since the last time; once an outage, a person hears of it. Whatever comes,
    the ledger knows what was sent up to the newest mirrored checkpoint."""
    if run.mirror is None:
        return
    for name, message, fields in run.mirror.news():
        run.event(name, f"  {message}", **fields)
        if fields.get("alert") and run.guard:
            run.guard.notifier.alert(f"mirror-{run.step}", f"X1 {run.config.name}: not mirrored", message)
    if newest_step(run.mirror) != run.mirror.billed_step and not run.mirror.lost:
        bill(run, run.mirror)


def end(run: Run, code: int) -> int:
    """Send what is left, as long as there is time; say what was not sent. The exit code: a finished run whose
    end is nowhere but here is not over."""
    if run.mirror is None:
        return code
    tell(run)
    if not run.mirror.lost:
        bill(run, run.mirror)
    left = run.mirror.drain(time_left(run.mirror, code), why(run, code), run.watchdog.beat)
    for name, message, fields in run.mirror.news():
        run.event(name, f"  {message}", **fields)
    if run.mirror.lost:
        if code != REFUSED:
            run.event("lease_lost", f"stopped: {run.mirror.lost}", exit_code=REFUSED)
        return REFUSED
    if storage.keeps_all(
        run.mirror.job.uri
    ):  # elsewhere a last row that is not mirrored would tell nothing new
        bill(run, run.mirror)
    report(run.mirror, left, run.event, run.screen.say)
    if run.config.checkpoint.keep_local and run.saved_step >= 0:
        newest = run.config.checkpoint_folder / checkpoint_files.folder_name(run.saved_step)
        prune(run, newest)
    return INTERRUPTED if code == FINISHED and unsafe(left) else code


def unsafe(left: list[str]) -> list[str]:
    """Of what is not mirrored, that which can't be made again: corpora can."""
    return [one for one in left if not one.startswith("corpus ")]


def why(run: Run, code: int) -> str:
    """What the mirror says of a run that is not being written."""
    named = {FINISHED: "finished", REFUSED: "another writer has the run"}
    named |= {BUDGET_CHECKPOINTED: "stopped by the budget", BUDGET_STOPPED: "stopped at once by the budget"}
    return named.get(code) or f"stopped by {run.signals.requested or 'another rank'}"


def time_left(mirror: Mirror, code: int) -> float:
    """For the last things: much at the end of a run, what remains of the grace time after a signal."""
    if code in (BUDGET_STOPPED, REFUSED):
        return AT_ONCE_S
    if code == FINISHED:
        return mirror.grace_s if mirror.status.trouble else FINISH_S
    asked_s = mirror.asked_s
    return mirror.grace_s if asked_s is None else max(1.0, mirror.grace_s - (time.monotonic() - asked_s))


def report(mirror: Mirror, left: list[str], event: Callable[..., None], say: Callable[[str], None]) -> None:
    """What is not mirrored goes on record. That all is does not: it would be a row that is not mirrored."""
    if left:
        listed = "; ".join(left)
        how = f"the same command again sends it, or `x1 push {mirror.job.folder} {mirror.job.uri}`"
        said = f"not mirrored: {listed}. While this machine is there, {how}"
        event("mirror", said, left=left)
    else:
        say(f"  all of it is mirrored in {mirror.opened.label}")


def send_the_rest(
    mirror: Mirror | None,
    config: RunConfig,
    session: Session,
    corpora: Mapping[str, Corpus],
    say: Callable[[str], None],
) -> None:
    """Of a run that was finished before: its end may not have been mirrored."""
    if mirror is None:
        return
    publish(mirror, config, session, corpora)
    left = mirror.drain(time_left(mirror, FINISHED), "finished")
    if unsafe(left):
        raise NotMirroredError(
            f"{config.folder}: not mirrored: {'; '.join(left)}; the same command tries again"
        )
    report(mirror, left, lambda _, message, **__: say(message), say)


class NotMirroredError(UserError):
    exit_code = INTERRUPTED
