"""Several sessions on one run, in whatever order hypothesis finds: paused, killed, cut off, in doubt.

What must hold of every history of `head.json`, whoever moved when:

- epochs rise by one and never come back, each has a token of its own;
- nothing that a writer was told is published is ever missing later, and a take-over changes nothing else;
- a writer that lives is not replaced: a claim needs a head given back, or unchanged for its holder's time;
- nobody is told to have lost who has not, and nobody is refused for a holder that gave no sign of life, nor,
  where nobody would start it again, for one that did not live on for long;
- when the faults end, at most one session goes on; one does if any is left, unless one gave the run back, or
  the last to be seen alive was killed after it was seen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.mirror.writers import Session, Troupe, notes
from x1_pretrain.mirror.claim import LIVES
from x1_pretrain.mirror.head import Head, decode, encode
from x1_pretrain.mirror.heads import head_key

KEY = head_key("run")
FAULTS = st.sampled_from([None, None, "fail", "after", "late", "twice"])
FOLDERS = st.sampled_from(["", "", "", "shared"])  # mostly one of its own
STALE_S = st.sampled_from([60.0, 60.0, 30.0, 120.0])
SKEW_S = st.sampled_from([0.0, -3600.0, 86400.0])
WHICH = st.integers(0, 5)
MOST = 6


class Writers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.troupe = Troupe()
        self.checked = 0  # versions of the head
        self.heads: list[tuple[float, Head]] = []
        self.owed: set[str] = set()  # notes that every head must hold from here on
        self.judged: set[str] = set()  # sessions whose end was judged
        self.final = False

    # --- what may happen

    @initialize(tells_time=st.booleans(), skew_s=SKEW_S)
    def open(self, tells_time: bool, skew_s: float) -> None:
        self.troupe = Troupe(tells_time=tells_time, skew_s=skew_s)

    @precondition(lambda self: len(self.troupe.sessions) < MOST)
    @rule(
        folder=FOLDERS,
        stale_s=STALE_S,
        skew_s=SKEW_S,
        careful=st.booleans(),
        unattended=st.booleans(),
        moves=st.integers(0, 6),
    )
    def start(
        self, folder: str, stale_s: float, skew_s: float, careful: bool, unattended: bool, moves: int
    ) -> None:
        folder = folder or f"folder-{len(self.troupe.sessions)}"
        session = self.troupe.start(folder, stale_s, skew_s, careful, unattended)
        for _ in range(moves):
            self.move_one(session, None)

    @precondition(lambda self: self.troupe.living())
    @rule(which=WHICH, fault=FAULTS, more=st.integers(0, 3))
    def move(self, which: int, fault: str | None, more: int) -> None:
        session = self.pick(which)
        self.move_one(session, fault)
        for _ in range(more):
            self.move_one(session, None)

    @precondition(lambda self: self.troupe.living())
    @rule(which=WHICH, fault=st.sampled_from(["fail", "after", "late", "twice"]), more=st.integers(0, 4))
    def next_write_goes_wrong(self, which: int, fault: str, more: int) -> None:
        session = self.pick(which)
        for _ in range(8):
            if session.about_to in ("create", "swap"):
                break
            self.move_one(session, None)
        self.move_one(session, fault)
        for _ in range(more):
            self.move_one(session, None)

    @rule(s=st.sampled_from([1.0, 20.0, 61.0, 121.0]))
    def all_are_paused(self, s: float) -> None:
        self.troupe.clock.t += s

    @rule(s=st.sampled_from([5.0, 16.0, 65.0]), frozen=st.sets(WHICH, max_size=3))
    def time_passes(self, s: float, frozen: set[int]) -> None:
        names = {f"s{one}" for one in frozen}
        self.troupe.pass_time(s, lambda one: one.name in names)

    @precondition(lambda self: self.troupe.store.late)
    @rule(which=WHICH)
    def late_request_arrives(self, which: int) -> None:
        store = self.troupe.store
        store.deliver(which % len(store.late))

    @precondition(lambda self: self.troupe.living())
    @rule(which=WHICH)
    def kill(self, which: int) -> None:
        self.pick(which).kill()

    @precondition(lambda self: self.troupe.living())
    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        self.pick(which).leaving = True

    @precondition(lambda self: self.heads and self.heads[-1][1].writer.state == "released")
    @rule()
    def trash(self) -> None:
        head = self.heads[-1][1]
        self.troupe.store.put(KEY, encode(replace(head, writer=replace(head.writer, state="trashed"))))

    def pick(self, which: int) -> Session:
        living = self.troupe.living()
        return living[which % len(living)]

    def move_one(self, session: Session, fault: str | None) -> None:
        if not session.end:
            session.move(fault)  # type: ignore[arg-type]
            self.every_version()

    # --- what must hold

    @invariant()
    def every_version(self) -> None:
        versions = self.troupe.store.versions(KEY)
        for version in versions[self.checked :]:
            assert version.data is not None
            head = decode(version.data, "")
            if self.heads:
                follows(*self.heads[-1], version.t, head)
            else:
                assert (head.writer.epoch, notes(head)) == (1, [])
            if head.writer.state == "trashed":
                self.owed = set()
            missing = self.owed - set(notes(head))
            assert not missing or self.fresh(head), f"{missing} were published and are gone"
            self.heads.append((version.t, head))
        self.checked = len(versions)
        self.confirmations()
        self.ends()

    def fresh(self, head: Head) -> bool:
        return bool(self.heads) and self.heads[-1][1].writer.state == "trashed"

    def confirmations(self) -> None:
        for session in self.troupe.sessions:
            while session.confirmed:
                note = session.confirmed.pop()
                assert any(note in notes(head) for _, head in self.heads), f"{note} was never there"
                if self.heads and not self.trashed_since(note):
                    assert note in notes(self.heads[-1][1])
                    self.owed.add(note)

    def trashed_since(self, note: str) -> bool:
        there = [number for number, (_, head) in enumerate(self.heads) if note in notes(head)]
        return any(head.writer.state == "trashed" for _, head in self.heads[there[0] :])

    def ends(self) -> None:
        for session in self.troupe.sessions:
            if not session.end or session.name in self.judged:
                continue
            self.judged.add(session.name)
            assert session.end in ("held", "lost", "released", "away", "killed"), session.end
            if session.end == "lost":
                assert session.lease is not None
                later = [head for _, head in self.heads if head.writer.epoch > session.lease.epoch]
                trashed = [head for _, head in self.heads if head.writer.state == "trashed"]
                assert later or trashed, f"{session.name} stopped for nobody"
            if session.end == "held":
                since = [head for t, head in self.heads if t >= session.began_t]
                assert since, f"{session.name} was refused for a holder that gave no sign of life"
                assert not session.me.unattended or self.lived_on(session.began_t), (
                    f"{session.name} was refused for a holder that may have died"
                )

    def lived_on(self, began_t: float) -> bool:
        """Whether a writer gave signs of life for long while it was watched from then on."""
        spans: dict[str, list[float]] = {}
        for t, head in self.heads:
            spans.setdefault(head.writer.token, []).append(t)
        stale_s = {head.writer.token: head.writer.stale_s for _, head in self.heads}
        return any(times[-1] - max(times[0], began_t) >= LIVES * stale_s[one] for one, times in spans.items())

    def teardown(self) -> None:
        try:
            if self.troupe.sessions:
                self.settle_down()
        finally:
            self.troupe.end()

    def settle_down(self) -> None:
        """No more faults: who goes on?"""
        troupe = self.troupe
        while troupe.store.late:
            troupe.store.deliver()
        left_before = sum(head.writer.state == "released" for _, head in self.heads)
        hopeful = [one for one in troupe.living() if not one.leaving]
        for _ in range(12):
            troupe.pass_time(60.0)
            self.every_version()
        left = sum(head.writer.state == "released" for _, head in self.heads) - left_before
        alive = troupe.living()
        assert len(alive) <= 1, "two go on"
        refused = any(one.end == "held" for one in hopeful)  # by one that was killed just after
        away = any(
            one.end == "away" for one in troupe.sessions
        )  # failed for too long, with 75, maybe as holder
        assert alive or left or refused or away or not hopeful, "nobody goes on"
        if alive:
            writer = self.heads[-1][1].writer
            assert alive[0].lease is not None
            assert (writer.token, writer.state) == (alive[0].lease.head.writer.token, "writing")
            assert troupe.clock.t - self.heads[-1][0] < 60.0


def follows(t0: float, before: Head, t1: float, after: Head) -> None:
    """`after` may stand where `before` stood."""
    was, now = before.writer, after.writer
    if now.state == "trashed":
        return
    if now.epoch == was.epoch:
        assert now.token == was.token, "two tokens in one epoch"
        assert now.beat > was.beat
        assert was.state != "trashed"
        own = now.host.removeprefix("host-of-") + "."
        assert others(before, own) == others(after, own), "a writer changed what another one published"
        return
    assert now.epoch == was.epoch + 1, f"epoch {now.epoch} after {was.epoch}"
    tokens = [one.token for one in before.epochs]
    assert now.token not in tokens, "a token was used twice"
    assert was.state != "writing" or now.folder == was.folder or t1 - t0 > was.stale_s, (
        f"{was.host} was replaced {t1 - t0:.0f} s after it gave a sign of life"
    )
    kept = [] if was.state == "trashed" else notes(before)
    assert notes(after) == kept
    assert [one.epoch for one in after.epochs] == [
        *([] if was.state == "trashed" else [one.epoch for one in before.epochs]),
        now.epoch,
    ]


def others(head: Head, own: str) -> list[str]:
    """Notes that are not of the session `own`."""
    return [note for note in notes(head) if not note.startswith(own)]


QUICK = settings(
    max_examples=120,
    stateful_step_count=30,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=1000, stateful_step_count=60)


def test_writers_in_any_order():
    run_state_machine_as_test(Writers, settings=QUICK)


@pytest.mark.slow
def test_writers_in_any_order_for_longer():
    run_state_machine_as_test(Writers, settings=LONG)
