"""The runs of a mirror, from the heads alone, and how they go together with those that are here."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from x1_pretrain.errors import UserError
from x1_pretrain.mirror.head import NAME, TRASH, Head, decode
from x1_pretrain.mirror.heads import look, run_names
from x1_pretrain.mirror.leftovers import mirrored_bytes
from x1_pretrain.money.clock import stamp
from x1_pretrain.numbers import span
from x1_pretrain.records.following import amount
from x1_pretrain.records.mirror_state import ALONE, MirrorState, read_state
from x1_pretrain.records.runs import Listed, is_begun
from x1_pretrain.records.trash import KEPT
from x1_pretrain.stores.address import Address, is_uri, parse, run_address
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Meta, NotThereError, Store, StoreError

PATIENCE_S = 10.0  # for all mirrors together: a list is for a person who waits
AT_ONCE = 12  # heads that are fetched at the same time


@dataclass(frozen=True)
class Place:
    """A mirror, and how to reach it."""

    address: Address
    endpoint: str | None = None

    def open(self, retries: int = 0) -> Store:
        return open_store(self.address, self.endpoint, retries)


@dataclass
class Seen:
    """What a mirror answered in time."""

    runs: list[Listed] = field(default_factory=list)
    heads: dict[str, Head] = field(default_factory=dict)  # by the address of the run
    trouble: list[str] = field(default_factory=list)


# -----------------------------------------------------------------------------------------------------------
# Which mirrors


def mirror_of(folder: Path, config: Any) -> tuple[Place, str] | None:
    """The mirror of a run folder, and the run's name there: as its last session wrote, else by its config."""
    state = read_state(folder)
    uri = state.uri if state else (config.mirror.uri if config else None)
    if not uri:
        return None
    endpoint = config.mirror.endpoint if config else None
    return Place(parse(uri), endpoint), state.name if state else config.name


def places(runs: Iterable[Listed]) -> tuple[list[Place], list[str]]:
    """The mirrors that runs name, each once; and what is wrong with the names of others."""
    found: dict[Address, Place] = {}
    trouble = []
    for one in runs:
        try:
            named = mirror_of(Path(one.folder), one.config) if one.folder else None
        except UserError as error:
            trouble.append(f"{one.folder}: {error}")
            continue
        if named and (named[0].address not in found or named[0].endpoint):
            found[named[0].address] = named[0]
    return list(found.values()), trouble


def is_address(text: str) -> bool:
    """Of a mirrored run: a URI, or the run's folder in a mirror that is a folder."""
    return is_uri(text) or (not is_begun(Path(text)) and (Path(text) / NAME).is_file())


# -----------------------------------------------------------------------------------------------------------
# Looking


def look_at(all_places: Sequence[Place], patience_s: float = PATIENCE_S) -> Seen:
    """Every run of every mirror; one that does not answer in time is a line."""
    seen, started = Seen(), time.monotonic()
    answers = [(place, _answering(place, started + patience_s)) for place in all_places]
    for place, answer in answers:
        try:
            found = answer.get(timeout=max(0.0, started + patience_s - time.monotonic()) + 0.2)
        except queue.Empty:
            seen.trouble.append(f"{place.address}: did not answer within {patience_s:.0f} s; left out")
            continue
        seen.runs += found.runs
        seen.heads |= found.heads
        seen.trouble += found.trouble
    return seen


def _answering(place: Place, until_s: float) -> queue.Queue[Seen]:
    """A thread that the end of this process does not wait for: a store may hold it for minutes."""
    answer: queue.Queue[Seen] = queue.Queue()

    def work() -> None:
        try:
            answer.put(_seen(place, until_s))
        except Exception as error:  # a thread's traceback would be in the way of the list
            answer.put(Seen(trouble=[_named(str(place.address), error)]))

    threading.Thread(target=work, daemon=True, name="x1-runs").start()
    return answer


def _named(address: str, error: Exception) -> str:
    foreseen = isinstance(error, StoreError | UserError)
    text = str(error) if foreseen else f"{type(error).__name__}: {error}"
    return text if address in text else f"{address}: {text}"


def _seen(place: Place, until_s: float) -> Seen:
    """Heads and trash of one mirror, several at a time; or one run, where `place` is the run's own."""
    store = place.open()
    names = run_names(store)
    if NAME in names:
        address, name = run_address(str(place.address))
        store, names = replace(place, address=address).open(), [name]
        return _answers(store, names, [], until_s)
    thrown = [name for name in store.names(TRASH) if name.endswith(".json")]
    return _answers(store, names, thrown, until_s)


def _answers(store: Store, names: Sequence[str], thrown: Sequence[str], until_s: float) -> Seen:
    now = _clock(store) if names else None  # asking writes a probe: not into a folder that holds no run
    jobs: list[Callable[[], tuple[Listed, Head | None] | None]] = [
        *(lambda name=name: _run(store, name, now) for name in names),
        *(lambda name=name: _trashed(store, name) for name in thrown),
    ]
    seen = Seen()
    for result in side_by_side(jobs, until_s):
        if isinstance(result, Exception):
            seen.trouble.append(_named(store.label, result))
        elif result:
            seen.runs.append(result[0])
            if result[1] and result[0].mirror:
                seen.heads[result[0].mirror] = result[1]
    if len(seen.runs) + len(seen.trouble) < len(jobs) and time.monotonic() >= until_s:
        seen.trouble.append(f"{store.label}: some of its {len(jobs)} runs did not come in time; left out")
    return seen


def _clock(store: Store) -> datetime | None:
    try:
        return store.now()
    except StoreError:
        return None


def side_by_side(jobs: Sequence[Callable[[], Any]], until_s: float) -> list[Any]:
    """What the jobs give, or the error of each; of those that are done in time."""
    waiting: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while time.monotonic() < until_s:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put(job())
            except Exception as error:
                done.put(error)

    for _ in range(min(AT_ONCE, len(jobs))):
        threading.Thread(target=work, daemon=True, name="x1-runs").start()
    found: list[Any] = []
    while len(found) < len(jobs) and (left := until_s - time.monotonic()) > 0:
        try:
            found.append(done.get(timeout=left))
        except queue.Empty:
            break
    return found


def _run(store: Store, name: str, now: datetime | None) -> tuple[Listed, Head] | None:
    found = look(store, name)
    if found is None or found[0].trashed:
        return None
    return of_head(store, name, *found, now), found[0]


def _trashed(store: Store, name: str) -> tuple[Listed, None] | None:
    """A run in the mirror's trash."""
    try:
        data, meta = store.get(f"{TRASH}/{name}")
    except NotThereError:
        return None  # restored, or gone, in this moment
    head = decode(data, f"{store.label}/{TRASH}/{name}")
    listed = of_head(store, head.name, head, meta, None)
    until = stamp(meta.modified + KEPT)
    return replace(listed, state="in trash", why="", trash_until_utc=until), None


# -----------------------------------------------------------------------------------------------------------
# One run


def silent_s(meta: Meta, now: datetime | None) -> float | None:
    """How long its writer has not been heard of, by the store's clock."""
    return None if now is None else max(0.0, (now - meta.modified).total_seconds())


def of_head(store: Store, name: str, head: Head, meta: Meta, now: datetime | None) -> Listed:
    """A mirrored run, as its head tells of it."""
    told, newest = head.status, head.newest()
    spent = told.get("spent_usd")
    state, why = standing(head, silent_s(meta, now))
    parent = told.get("parent")
    return Listed(
        name=name,
        state=state,
        why=why,
        where="mirror",
        run_id=head.run_id or None,
        stage=told.get("stage"),
        parent=parent if isinstance(parent, dict) else None,
        step=head.last_step() or 0,
        total_steps=told.get("total_steps"),
        tokens=told.get("tokens") or 0,
        val_loss=told.get("val_loss"),
        spent_usd=str(spent) if amount(spent) is not None else None,
        elapsed_s=told.get("elapsed_s"),
        host=head.writer.host,
        updated_utc=told.get("updated_utc") or head.writer.beat_utc or stamp(meta.modified),
        mirror=f"{store.label.rstrip('/')}/{name}",
        good_mirror=newest.step if newest else None,
        bytes_mirror=mirrored_bytes(head),
    )


def standing(head: Head, silence: float | None) -> tuple[str, str]:
    """One word, and why: by the lease first, then by what the run last said of itself."""
    writer, said = head.writer, str(head.status.get("state", ""))
    if writer.state == "writing":
        if silence is None or silence <= writer.stale_s:
            return "running", ""
        if said == "finished":
            return "finished", ""
        return "died", f"not heard of for {span(silence)} on {writer.host}"
    if said == "finished" or writer.why.startswith("finished"):
        return "finished", ""
    if said in ("stopped", "interrupted", "ended"):
        return said, str(head.status.get("why") or writer.why)
    return "interrupted", writer.why


# -----------------------------------------------------------------------------------------------------------
# Together


def joined(here: Sequence[Listed], there: Sequence[Listed], heads: Mapping[str, Head]) -> list[Listed]:
    """One row a run: those that are here and in a mirror become one."""
    by_address = {one.mirror: one for one in there if one.trash_until_utc is None}
    taken: set[str | None] = set()
    rows = []
    for one in here:
        address = _address(one) if one.trash_until_utc is None else None
        other = by_address.get(address)
        if other is None or not _same_run(one, other):
            rows.append(_alone(one))
            continue
        taken.add(other.mirror)
        rows.append(_both(one, other, heads.get(other.mirror or "")))
    return rows + [one for one in there if one.trash_until_utc is not None or one.mirror not in taken]


def _address(one: Listed) -> str | None:
    try:
        named = mirror_of(Path(one.folder), one.config) if one.folder else None
    except UserError:
        return None
    return f"{str(named[0].address).rstrip('/')}/{named[1]}" if named else None


def _same_run(one: Listed, other: Listed) -> bool:
    return one.run_id is None or other.run_id is None or one.run_id == other.run_id


def _alone(one: Listed) -> Listed:
    """A run that no mirror was seen to have; one whose mirror was not asked says what its files say."""
    state = _state(one) if one.trash_until_utc is None else None
    return replace(one, behind=_behind(one, state, state.mirrored)) if state else one


def _state(one: Listed) -> MirrorState | None:
    try:
        return read_state(Path(one.folder)) if one.folder else None
    except UserError:
        return None  # `places` says what is wrong with it


def _both(one: Listed, other: Listed, head: Head | None) -> Listed:
    """Its numbers are those of the later writer."""
    state = _state(one)
    published = [two.step for two in head.checkpoints] if head else []
    moved = head is not None and (state is None or head.writer.epoch > state.epoch)
    elsewhere = moved or (head is not None and one.state == "copy")
    base = replace(other, folder=one.folder, stage=other.stage or one.stage) if elsewhere else one
    if elsewhere and one.state == "running":  # a session here that has not claimed yet
        base = one
    return replace(
        base,
        where="both",
        parent=one.parent or other.parent,
        run_id=one.run_id or other.run_id,
        spent_usd=_most(one.spent_usd, other.spent_usd),
        mirror=other.mirror,
        good_here=one.good_here,
        good_mirror=other.good_mirror,
        bytes_here=one.bytes_here,
        bytes_mirror=other.bytes_mirror,
        steps_here=one.steps_here,
        behind=_behind(one, state, published),
        trouble=one.trouble,
        config=one.config,
    )


def _most(*amounts: str | None) -> str | None:
    known = [text for text in amounts if text is not None]
    return max(known, key=float, default=None)


def _behind(one: Listed, state: MirrorState | None, published: Sequence[int]) -> dict[str, Any]:
    """What is here and not there: rows by what the last session said, checkpoints by their steps."""
    steps = [step for step in one.steps_here if step not in published]
    unknown = {"lag_bytes": None, "lag_s": None, "trouble": ""}
    if state is None or state.why == ALONE:
        return {**unknown, "steps": steps}
    told = {name: getattr(state, name) for name in unknown}
    return {**told, "steps": [] if state.is_copy else steps}
