"""What the run and its mirror come to in the ledger."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.money.fakes import Steps
from x1_pretrain.config import MirrorConfig
from x1_pretrain.errors import INTERRUPTED, REFUSED
from x1_pretrain.mirror.job import Job, Opened
from x1_pretrain.money.account import account
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.runtime import mirror as mirror_module
from x1_pretrain.runtime import mirroring
from x1_pretrain.runtime.mirror import LATE_S, Mirror, MirrorRefusedError
from x1_pretrain.runtime.mirroring import bill, end, tell

GIB = 2**30
HUB = "hf://user/runs"


class Told(Mirror):
    """A mirror whose process is played by the test: `says` is a status of it, the GiB it has sent so far."""

    def __init__(self, epoch: int = 1, fetched: int = 0) -> None:
        signals = SimpleNamespace(requested="SIGTERM", requested_s=None)
        super().__init__(Job("tiny", "folder", "checkpoints", HUB), 1.0, signals, print)  # type: ignore[arg-type]
        self.opened = Opened(HUB, epoch, True, restored_bytes=fetched * GIB)
        self.at_last: Callable[[], None] = lambda: None

    def _start(self, mode: str) -> tuple[Any, Any]:
        return SimpleNamespace(poll=lambda: None), None

    def says(self, sent: float, *mirrored: int, held: float = 0.0) -> None:
        told = {"sent_bytes": int(sent * GIB), "held_bytes": int(held * GIB), "mirrored": list(mirrored)}
        self._take({"is": "status", **told})

    def drain(self, *_: Any) -> list[str]:
        self.at_last()
        return []


class Session:
    """Of a run that has a ledger; at the beginning it has saved `saved_step`."""

    def __init__(self, ledger: Ledger, mirror: Told, uri: str = HUB, saved_step: int = -1) -> None:
        settings = MirrorConfig(uri=uri, storage_usd_per_gib_month=720, egress_usd_per_gib=10)
        config = SimpleNamespace(mirror=settings, checkpoint=SimpleNamespace(keep_local=None))
        signals = mirror._signals
        self.run: Any = SimpleNamespace(
            guard=SimpleNamespace(ledger=ledger),
            config=config,
            mirror=mirror,
            saved_step=saved_step,
            signals=signals,
            watchdog=SimpleNamespace(beat=None),
            screen=SimpleNamespace(say=print),
            event=lambda *_, **__: None,
        )
        mirror.billed_step = saved_step
        bill(self.run, mirror)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl", Steps())


def gib(ledger: Ledger) -> list[float]:
    return [row["gib"] for row in ledger.rows()]


@pytest.mark.parametrize("lost", [[], ["steps.jsonl"]])
def test_which_rows_the_mirror_had_lost_is_on_record(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    monkeypatch.setattr(mirroring, "publish", lambda *_: None)
    mirror, told = Told(), list[dict[str, Any]]()
    mirror._take({"is": "opened", "label": HUB, "epoch": 2, "found": True, "notes": ["a note"], "lost": lost})
    session = Session(ledger, mirror)
    session.run.event = lambda name, _, **fields: told.append({"event": name, **fields})
    session.run.config.folder = ledger.file.parent
    session.run.session, session.run.corpora = None, {}
    mirroring.begin(session.run)
    assert told == [{"event": "mirror"}, {"event": "mirror", "epoch": 2} | ({"lost": lost} if lost else {})]


@pytest.mark.parametrize(("uri", "billed"), [("s3://bucket/runs", 7), (HUB, 12)])
def test_the_bill_is_for_what_the_mirror_holds(uri: str, billed: int, ledger: Ledger) -> None:
    """7 GiB are there of 12 that were sent, and no checkpoint is on this disk: a dollar a GiB and hour."""
    mirror = Told(fetched=2)
    session = Session(ledger, mirror, uri)
    ledger.clock.sleep(3600)
    mirror.says(12, 10, 20, held=7)
    bill(session.run, mirror)
    assert gib(ledger) == [0, billed]
    assert account(ledger.rows()).beside_usd == billed + 2 * 10


def test_what_a_killed_session_sent_is_billed_by_the_next(ledger: Ledger) -> None:
    """A row for each checkpoint that is mirrored, and no other."""
    first = Told()
    session = Session(ledger, first)
    for step in (0, 10, 20, 30):
        first.says(step, *range(max(0, step - 10), step, 10))  # while it is sent
        tell(session.run)
        first.says(10 + step, *range(max(0, step - 10), step + 1, 10), held=2)
        tell(session.run)
        tell(session.run)
    assert gib(ledger) == [0, 10, 20, 30, 40]
    second = Told(epoch=2)
    second.says(0, held=2)
    session = Session(ledger, second, saved_step=30)
    second.says(0.5, 20, 30, held=2)  # nothing new
    tell(session.run)
    second.says(10.5, 30, 40, held=2)
    tell(session.run)
    assert gib(ledger) == [0, 10, 20, 30, 40, 40, 50.5]


def test_a_mirror_that_was_started_again_counts_from_0(ledger: Ledger) -> None:
    mirror = Told()
    session = Session(ledger, mirror)
    mirror.says(5, 10)
    tell(session.run)
    mirror.says(8, 10)  # of the next checkpoint; it dies
    mirror.says(0, held=1)
    mirror.opened = Opened(HUB, 2, True)
    tell(session.run)
    mirror.says(4, 10, 20)
    tell(session.run)
    assert gib(ledger) == [0, 5, 12]


@pytest.mark.parametrize(("lost", "billed"), [(None, [0, 5, 9]), ("host b has it", [0])])
def test_what_is_sent_at_the_end_is_billed(lost: str | None, billed: list[float], ledger: Ledger) -> None:
    """Once, by its writer."""
    mirror = Told()
    session = Session(ledger, mirror)
    mirror.says(5)
    mirror.lost = lost
    mirror.at_last = lambda: mirror.says(9, 10)
    assert end(session.run, INTERRUPTED) == (REFUSED if lost else INTERRUPTED)
    assert gib(ledger) == billed


def test_a_ledger_that_can_not_be_written_misses_nothing(ledger: Ledger) -> None:
    mirror = Told()
    session = Session(ledger, mirror)
    mirror.says(5, 10)
    whole = ledger.file.rename(ledger.file.with_name("aside"))
    ledger.file.mkdir()
    tell(session.run)
    ledger.file.rmdir()
    whole.rename(ledger.file)
    mirror.says(8, 10, 20)
    tell(session.run)
    assert gib(ledger) == [0, 8]


def test_a_mirror_that_died_and_whose_child_holds_its_output_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither while it opens nor at the end."""
    monkeypatch.setattr(mirror_module, "LATE_S", 0.05)
    words = threading.Event()

    class Died(Mirror):
        def _start(self, mode: str) -> tuple[Any, Any]:
            reader = threading.Thread(target=words.wait, daemon=True)
            reader.start()
            return SimpleNamespace(poll=lambda: 3, wait=lambda: 3, stdin=None), reader

    signals: Any = SimpleNamespace(interrupted=lambda: words.wait(0), requested="", requested_s=None)
    timer = threading.Timer(30, words.set)
    timer.start()
    job = Job("tiny", "folder", "checkpoints", HUB)
    with pytest.raises(MirrorRefusedError, match="its process ended with exit code 3"):
        Died.open(job, 1.0, signals, print)
    assert Died(job, 1.0, signals, print).drain(600, "") != []
    assert not words.is_set()
    timer.cancel()
    words.set()


@pytest.mark.parametrize("held", [False, True])
def test_a_mirror_that_died_is_heard_to_the_end_before_it_is_started_again(
    held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last words would be taken for those of the next one. But where a child of it holds its output there
    is no end."""
    clock = Steps()
    monkeypatch.setattr("x1_pretrain.runtime.mirror.time", SimpleNamespace(monotonic=clock.steady_s))
    mirror, started, words = Told(), list[str](), threading.Event()
    reader = threading.Thread(target=words.wait, daemon=True)
    reader.start()
    mirror._process = SimpleNamespace(poll=lambda: 1, returncode=1)  # type: ignore[assignment]
    mirror._reader, mirror._started_s = reader, -math.inf
    again = SimpleNamespace(poll=lambda: None), None
    mirror._start = lambda mode: started.append(mode) or again  # type: ignore[assignment, func-returns-value]
    assert mirror.news() == []
    assert not started
    clock.sleep(LATE_S)
    assert mirror.news() == []
    if held:
        clock.sleep(0.1)
    else:
        words.set()
        reader.join(60)
    assert [fields["exit_code"] for _, _, fields in mirror.news()] == [1]
    assert started == ["a"]
    words.set()


def test_a_refusal_reaches_the_other_ranks_as_it_is() -> None:
    """It is sent to them pickled."""
    there = pickle.loads(pickle.dumps(MirrorRefusedError("held by process 7", 78)))
    assert (str(there), there.exit_code) == ("held by process 7", 78)
