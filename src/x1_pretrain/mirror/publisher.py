"""What of a run folder is in its mirror, and how the rest comes there: one look after the other.

A look takes things in an order in which no head can name a checkpoint without the rows before it, nor rows of
steps that were gone back over: the checkpoints here, then the sizes of the record files (events last), then
the checkpoints again. Data go first; one swap of the head makes all of it exist; what it no longer names is
deleted after that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from x1_pretrain.mirror.choosing import given_up
from x1_pretrain.mirror.corpora import CorpusSender
from x1_pretrain.mirror.head import Head, Published
from x1_pretrain.mirror.job import Job, Status
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.lease import Lease
from x1_pretrain.mirror.leftovers import SKIPPED, held_bytes, paths
from x1_pretrain.mirror.local import Local, LocalCheckpoints
from x1_pretrain.mirror.outbox import Outbox, Parcel, path_of
from x1_pretrain.mirror.records import Records
from x1_pretrain.mirror.sending import Rate
from x1_pretrain.mirror.small_files import SmallFiles
from x1_pretrain.mirror.trash import clean
from x1_pretrain.numbers import size
from x1_pretrain.records.checkpoint_files import spike_in
from x1_pretrain.records.metrics import read_rows
from x1_pretrain.records.retention import kept, to_go_back_to
from x1_pretrain.records.summary import Summary
from x1_pretrain.stores.store import DeniedError, Store, StoreError, UnreachableError

MB = 1_000_000
TRIES = 5  # of a look, each after training went back meanwhile
SLICE_S = 5.0  # of sending records, before what was sent is published


@dataclass
class Identity:
    """What the run is; empty until the trainer has said it."""

    run_id: str = ""
    from_step: int = 0
    fingerprints: list[str] = field(default_factory=list)
    step_fields: dict[str, Any] = field(default_factory=dict)


class Publisher:
    """Of one session, which holds the lease."""

    def __init__(
        self,
        job: Job,
        store: Store,
        lease: Keeper | Lease,
        identity: Identity,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,  # not moved when a clock is set
    ) -> None:
        head = lease.head
        self.job, self.store, self.lease, self.identity, self.clock = job, store, lease, identity, clock
        self.space = head.writer.space
        self.folder = Path(job.folder)
        self.rate = Rate(job.max_mb_per_s * MB if job.max_mb_per_s else None)
        self.records = Records(self.folder, job.name, self.space, head.records)
        self.files = SmallFiles(self.folder, job.name, self.space, head.files, job.corpora)
        self.local = LocalCheckpoints(Path(job.checkpoints), identity.run_id or None, clock)
        self.outbox = Outbox(store, job.name, self.rate, on_change)
        corpora = job.corpora if job.data else {}
        self.corpora = CorpusSender(store, corpora, head.data, self.rate, on_change)
        self.summary = Summary(self.folder)
        self.behind = False  # more records wait than one look takes
        self.news: list[str] = []  # lines for the run's events
        self._bad: set[str] = set()  # manifests whose checkpoints are not what they say
        self._spikes: dict[str, int | None] = {}  # by manifests: where one began that lasted then
        self._told: set[str] = set()  # corpora that can't be sent
        self._gone_back = [] if job.goes_on else [identity.from_step]
        self._resumed_at = None if job.goes_on else identity.from_step  # until the first head of this session
        self._aside: set[str] = set()  # paths of checkpoints that the resume passed over: they stay
        self._went_back = False  # training did, at the last look
        self._unsent_since: dict[str, float] = {}
        self._dropped: set[str] = set()  # paths that no head may name any more
        self._undeleted = False  # the store refused to delete, it was told
        self._copies: tuple[str, dict[tuple[str, str], str]] = ("", {})

    # --- one look ------------------------------------------------------------------------------------------

    def look(self) -> Status:
        """Send and publish what is new. A StoreError leaves all as it is; what was sent is remembered."""
        self.lease.settle()
        here = self._follow()
        if here is None:
            self.lease.publish(self.lease.head)
            return self.status()
        sent = None if self.behind else self.outbox.ready()
        head = self._publish(self._next_head(here, sent))
        if sent:
            self.outbox.forget()
        failed = self.outbox.error or self.corpora.error
        self.outbox.error = self.corpora.error = None  # told once
        self._feed(head, here)
        self._feed_corpora()
        self._delete_dropped(head)
        if failed:
            raise failed
        return self.status()

    @property
    def failing(self) -> bool:
        """What is large did not arrive at the last try, whatever else works."""
        return self.outbox.failing or self.corpora.failing

    @property
    def arrived(self) -> int:
        """Files of what is large, in this session."""
        return self.outbox.arrived + self.corpora.arrived

    def _follow(self) -> dict[int, Local] | None:
        """Send what is new but the checkpoints; those that were here all the while. None if training went
        back again and again meanwhile: then nothing that was read is fit to be published."""
        for _ in range(TRIES):
            if self._went_back:
                self.records.distrust()
            first = self.local.look()
            sizes = self.sizes()
            self.behind = not self._advance(sizes)
            self._went_back = bool(self.records.rewinds)
            self._go_back()
            if self.records.rewound(sizes):
                self._went_back = True
                continue
            self.files.look(self.store, self.rate)
            second = self.local.look()
            return {step: one for step, one in second.items() if _same(first.get(step), one)}
        return None

    def _advance(self, sizes: dict[str, int]) -> bool:
        until = self.clock() + SLICE_S
        return self.records.advance(sizes, self.store, self.rate, lambda: self.clock() > until)

    def sizes(self) -> dict[str, int]:
        sizes, now = self.records.sizes(), self.clock()
        unsent = self.records.unsent(sizes)
        self._unsent_since = {name: self._unsent_since.get(name, now) for name in unsent}
        return sizes

    def _go_back(self) -> None:
        self._gone_back += self.records.rewinds
        self.records.rewinds = []
        for step in self._gone_back:
            self.outbox.void(step)

    def _next_head(self, here: Mapping[int, Local], sent: Parcel | None) -> Head:
        head = self.lease.head
        published = surviving(head.checkpoints, here, self._gone_back)
        if sent and sent.bad and sent.local.manifest_sha256 not in self._bad:
            self._bad.add(sent.local.manifest_sha256)
            self.news.append(f"checkpoint {sent.local.path}: {sent.bad}; it is not mirrored")
        if sent and (sent.bad or sent.void):
            self._dropped.add(sent.path)
        elif sent and sent.published:
            published = [one for one in published if one.step != sent.local.step] + [sent.published]
        losses = self.records.losses
        published = [replace(one, val_loss=losses.get(one.step, one.val_loss)) for one in published]
        keep = self._kept([one.step for one in published], published)
        keep |= self._to_go_back_to(published, here)
        return replace(
            head,
            run_id=self.identity.run_id or head.run_id,
            step_fields=self.identity.step_fields or head.step_fields,
            fingerprints=self.identity.fingerprints or head.fingerprints,
            checkpoints=sorted(
                (one for one in published if one.step in keep | here.keys()), key=lambda one: one.step
            ),
            records=self.records.pieces(),
            files=dict(sorted(self.files.objects.items())),
            data=head.data | self.corpora.whole,
            status=self.summary.look(),
        )

    def _kept(self, steps: list[int], published: list[Published]) -> set[int]:
        losses = {one.step: one.val_loss for one in published if one.val_loss is not None}
        job = self.job
        return kept(
            steps, job.keep_last, job.keep_every, job.keep_at, losses | self.records.losses, job.keep_best
        )

    def _to_go_back_to(self, published: list[Published], here: Mapping[int, Local]) -> set[int]:
        """What a run that goes on from the mirror's newest checkpoint, or from a newer one here, needs if the
        spike that lasted then does not end."""
        fields = self.identity.step_fields or self.job.step_fields
        if fields.get("stability.policy") != "rewind":
            return set()
        for one in here.values():
            if one.manifest_sha256 not in self._spikes:
                self._spikes[one.manifest_sha256] = spike_in(one.path)
        marks = {one.step: one.manifest_sha256 for one in published}
        marks |= {step: one.manifest_sha256 for step, one in here.items()}
        newest = max((one.step for one in published), default=0)
        found = [self._spikes.get(mark) for step, mark in marks.items() if step >= newest]
        return to_go_back_to(marks.keys(), [onset for onset in found if onset is not None])

    def _publish(self, new: Head) -> Head:
        self._keep_aside(new)
        self._dropped |= paths(self.lease.head) - paths(new) - self._aside
        head = self.lease.publish(new)
        self._gone_back, self._resumed_at = [], None
        return head

    def _keep_aside(self, new: Head) -> None:
        """Checkpoints that the resume passed over, for whatever reason, and that no rewind gave up: the run
        goes on without them, but they stay where they are."""
        at = self._resumed_at
        over = [one for one in self.lease.head.checkpoints if at is not None and one.step > at]
        if not over:
            return
        rows = read_rows(self.folder / "events.jsonl")
        gone = given_up(row for row in rows if row.get("event") in ("checkpoint", "rewind"))
        for one in over:
            if one.step in gone or one.path in self._aside or new.published(one.step) == one:
                continue
            key = f"{self.job.name}/{SKIPPED.format(space=self.space)}/{one.path}"
            self.store.put(key, json.dumps(asdict(one)).encode())
            self._aside.add(one.path)
            self.news.append(
                f"the mirrored checkpoint of step {one.step} was passed over and is no longer the run's; its "
                f"objects stay in {self.store.label}/{self.job.name}/{one.path}"
            )

    def _delete_dropped(self, head: Head) -> None:
        """Only what the head in the store does not name any more. A store that does not let go of it is no
        reason to send nothing to it."""
        run, doomed = self.job.name, self._dropped - paths(head)
        try:
            for path in sorted(doomed):
                self.store.delete([f"{run}/{path}"] if not _is_folder(path) else self._keys_below(path))
                self._dropped.discard(path)
        except DeniedError as error:
            if not self._undeleted:
                self._undeleted = True
                self.news.append(f"what the mirror no longer needs can't be removed from it: {error}")
        except UnreachableError:
            return  # the next look tries again

    def _keys_below(self, path: str) -> list[str]:
        return [meta.key for meta in self.store.below(f"{self.job.name}/{path}")]

    # --- checkpoints ---------------------------------------------------------------------------------------

    def wanted(self, head: Head, here: Mapping[int, Local]) -> list[Local]:
        """Those here that the mirror lacks and would keep: what a rewind may need, then the newest first."""
        have = {one.step for one in head.checkpoints}
        needed = self._to_go_back_to(head.checkpoints, here)
        keep = self._kept([*have, *here], head.checkpoints) | needed
        lacking = [one for step, one in here.items() if step in keep and step not in have]
        lacking = [one for one in lacking if one.manifest_sha256 not in self._bad]
        return sorted(lacking, key=lambda one: (one.step not in needed, -one.step))

    def _feed(self, head: Head, here: Mapping[int, Local]) -> None:
        if self.outbox.busy or self.outbox.ready():
            return
        lacking = self.wanted(head, here)
        self.outbox.failing = self.outbox.failing and bool(lacking)
        for local in lacking[:1]:
            named = paths(head) | self._dropped
            path = path_of(self.space, local, named.__contains__)
            if (before := self.outbox.parcel) and before.local.manifest_sha256 != local.manifest_sha256:
                self._dropped.add(before.path)  # it was given up
            self.outbox.begin(Parcel(local, head.writer.epoch, path, self._copies_of(head)))

    def _feed_corpora(self) -> None:
        if self.outbox.busy or self.behind:
            self.corpora.pause()
        else:
            self.corpora.go_on()
        for name in sorted(self.corpora.bad.keys() - self._told):
            self._told.add(name)
            self.news.append(f"the corpus {name} is not mirrored: {self.corpora.bad[name]}")

    def _copies_of(self, head: Head) -> dict[tuple[str, str], str]:
        """Files of the newest checkpoint in the mirror, by name and hash."""
        newest = head.newest()
        if newest is None:
            return {}
        if self._copies[0] != newest.manifest_sha256:
            place = f"{self.job.name}/{newest.path}"
            try:
                listed = json.loads(self.store.get(f"{place}/manifest.json")[0])["files"]
                found = {(name, one["sha256"]): f"{place}/{name}" for name, one in listed.items()}
            except (StoreError, ValueError, LookupError, TypeError, AttributeError):
                return {}  # then they are sent
            self._copies = (newest.manifest_sha256, found)
        return self._copies[1]

    # --- how far -------------------------------------------------------------------------------------------

    def status(self, trouble: str = "") -> Status:
        """By what is here now; the store is not asked."""
        head, here, now = self.lease.head, self.local.look(), self.clock()
        lacking, unsent = self.wanted(head, here), self.records.unsent(self.sizes())
        since = [one.since for one in lacking] + list(self._unsent_since.values())
        return Status(
            lag_s=round(max(0.0, now - min(since, default=now)), 1),
            lag_bytes=sum(one.bytes for one in lacking) + sum(unsent.values()),
            mirrored=[one.step for one in head.checkpoints],
            held_bytes=held_bytes(head, self.job.corpora),
            trouble=trouble,
            sent_bytes=self.rate.sent_bytes,
        )

    def take_news(self) -> list[str]:
        return [self.news.pop(0) for _ in range(len(self.news))]  # one may come meanwhile

    def left(self) -> list[str]:
        """What the mirror lacks, a line each, but for corpora."""
        lacking = self.wanted(self.lease.head, self.local.look())
        lines = [f"checkpoint of step {one.step} ({size(one.bytes)})" for one in lacking]
        for name in self.records.unsent(self.records.sizes()):
            if rows := self.records.tail(name).count(b"\n"):
                lines.append(f"{rows} row{'s' * (rows > 1)} of {name}")
        return lines + self.files.unsent()

    def corpora_left(self) -> list[str]:
        return [f"corpus {name}" for name in self.corpora.left()]

    def bad(self) -> list[str]:
        """What can't be mirrored as it is: damaged checkpoints, corpora."""
        damaged = [one for one in self.local.look().values() if one.manifest_sha256 in self._bad]
        lines = [f"checkpoint of step {one.step}: damaged here" for one in damaged]
        return lines + [f"corpus {name}: {why}" for name, why in self.corpora.bad.items()]

    # --- besides -------------------------------------------------------------------------------------------

    def wait(self, within_s: float) -> None:
        """Until something that is being sent is there, or the time is over."""
        (self.outbox if self.outbox.busy else self.corpora).wait(within_s)

    def stop(self) -> None:
        """Send no more; what is on its way breaks off."""
        self.outbox.stop()
        self.corpora.stop()

    def clean_up(self) -> None:
        """Once, from any thread: remove what sessions before this one left that nothing needs."""
        try:
            gone = clean(self.store, self.lease.head)
        except StoreError:
            return  # the next session tries
        if gone:
            freed = size(sum(one.bytes for one in gone))
            self.news.append(
                f"removed {len(gone)} objects ({freed}) from the mirror that earlier sessions sent and "
                "nothing names"
            )

    def save_aside(self) -> str:
        """Of a session that lost the run: its rows that were not published, under keys of its own."""
        head = self.lease.head
        place = f"{self.job.name}/lost/{self.space}"
        for name, rows in self.records.unpublished(head.records).items():
            self.store.put(f"{place}/{name}", rows)
        return place


def _same(before: Local | None, now: Local) -> bool:
    return before is not None and before.manifest_sha256 == now.manifest_sha256


def surviving(published: list[Published], here: Mapping[int, Local], gone_back: list[int]) -> list[Published]:
    """Those of the mirror's checkpoints that are of the run as it now stands: none of the steps that were
    gone back over, none that was made anew here."""
    return [
        one
        for one in published
        if all(one.step <= step for step in gone_back)
        and (one.step not in here or here[one.step].manifest_sha256 == one.manifest_sha256)
    ]


def _is_folder(path: str) -> bool:
    return path.split("/")[1:2] == ["checkpoints"]
