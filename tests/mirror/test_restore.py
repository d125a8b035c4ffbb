"""What a run folder is after `restore`: the checkpoint, the rows and the files of one and the same run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.published import (
    RUN_ID,
    Counting,
    Mirrored,
    content,
    epoch,
    event,
    job_of,
    make_checkpoint,
    row,
    rows,
)
from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror import fetch
from x1_pretrain.mirror.choosing import MARKER, given_up
from x1_pretrain.mirror.claim import UNSAID
from x1_pretrain.mirror.corpora import FILES
from x1_pretrain.mirror.merging import common_lines, mended, merged_ledger, rows_only_in
from x1_pretrain.mirror.patience import AwayError
from x1_pretrain.mirror.restore import Restored, ledger_from, restore
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.ledger import read_rows as ledger_rows
from x1_pretrain.numbers import size
from x1_pretrain.records.checkpoint_files import newest_good
from x1_pretrain.records.metrics import rewind
from x1_pretrain.records.mirror_state import MirrorState, write_state
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.store import NotThereError, UnreachableError


@pytest.fixture
def run(tmp_path: Path) -> Mirrored:
    """A run to step 260: checkpoints of 100 and 200."""
    made = Mirrored(FolderStore(tmp_path / "mirror"), tmp_path / "originals")
    made.checkpoint(100)
    made.checkpoint(200)
    made.records = {
        "metrics.jsonl": rows(1, 260, loss=2.5),
        "events.jsonl": event("start", 0) + event("checkpoint", 100) + event("checkpoint", 200),
        "metrics.superseded.jsonl": rows(150, 170, loss=3.0),
    }
    made.files = {"config.yaml": b"name: tiny\n", "manifest.json": json.dumps({"run_id": RUN_ID}).encode()}
    return made


def back(run: Mirrored, folder: Path, store: Any = None, **more: Any) -> Restored:
    return restore(job_of(folder, **more), run.save(), store or run.store, lambda _: None, patience_s=0.5)


def newest(folder: Path) -> str | None:
    path, _ = newest_good(folder / "checkpoints")
    return path.name if path else None


def was_writer(folder: Path, number: int = 1) -> None:
    """The folder's mirror.json: it was the writer of that epoch."""
    write_state(folder, MirrorState("mirror", "mirror/tiny", "tiny", "f" * 16, number, f"{number:08x}"))


def here(run: Mirrored, folder: Path, number: int = 1) -> Path:
    """The run folder as it was on this machine when `number` published what is in the mirror."""
    folder.mkdir()
    for name, data in run.records.items():
        (folder / name).write_bytes(data)
    was_writer(folder, number)
    return folder


# ------------------------------------------------------------------------------------------------------------
# An empty folder


def test_an_empty_folder_becomes_the_run(run: Mirrored, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    told = back(run, folder)
    assert told.restored_step == 200
    assert told.restored_bytes == run.published[-1].bytes
    assert told.last_step == 200
    assert newest(folder) == "step-000000200"
    assert content(folder / "checkpoints" / "step-000000200") == content(run.originals / "step-000000200")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == {**run.records, **run.files}
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000000200"]


def test_a_run_that_published_nothing_yet(tmp_path: Path) -> None:
    run = Mirrored(FolderStore(tmp_path / "mirror"), tmp_path / "originals", epochs=[epoch(1, UNSAID)])
    told = back(run, tmp_path / "run")
    assert (told.restored_step, told.notes) == (None, [])
    folder = tmp_path / "other"
    make_checkpoint(folder / "checkpoints", 50)
    (folder / "metrics.jsonl").write_bytes(rows(1, 50))
    back(run, folder)  # a folder that gets its first mirror
    assert newest(folder) == "step-000000050"
    assert (folder / "metrics.jsonl").read_bytes() == rows(1, 50)


def test_doing_it_again_changes_nothing_and_fetches_nothing(run: Mirrored, tmp_path: Path) -> None:
    back(run, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    store = Counting(run.store)
    told = back(run, tmp_path / "run", store)
    assert store.reads == []
    assert told.restored_step is None
    assert told.notes == []
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


# ------------------------------------------------------------------------------------------------------------
# Which checkpoint


def test_a_newer_local_one_wins_and_an_equal_one(run: Mirrored, tmp_path: Path) -> None:
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    store = Counting(run.store)
    assert back(run, folder, store).restored_step is None
    make_checkpoint(folder / "checkpoints", 300)
    assert back(run, folder, store).restored_step is None
    assert newest(folder) == "step-000000300"
    assert store.reads == []


def test_damaged_ones_are_skipped_wherever_they_are(run: Mirrored, tmp_path: Path) -> None:
    folder = here(run, tmp_path / "run")
    for step in (50, 300):
        bad = make_checkpoint(folder / "checkpoints", step)
        if step == 300:
            (bad / "model.safetensors").write_bytes(b"")
    key = run.key(run.published[1], "model.safetensors")
    run.store.put(key, b"\0" * 20_000)
    told = back(run, folder)
    assert told.restored_step == 100
    assert [note.partition(":")[0] for note in told.notes[:2]] == [
        f"skipped {folder / 'checkpoints' / 'step-000000300'}",
        "skipped the mirrored checkpoint of step 200",
    ]
    assert "does not match its hash" in told.notes[1]
    assert not list((folder / "checkpoints").glob(".fetching*"))


def test_a_damaged_local_one_is_replaced_by_the_mirrored(run: Mirrored, tmp_path: Path) -> None:
    folder = here(run, tmp_path / "run")
    bad = make_checkpoint(folder / "checkpoints", 200)
    (bad / "model.safetensors").write_bytes(b"damaged")
    assert back(run, folder).restored_step == 200
    assert newest(folder) == "step-000000200"
    assert (folder / "checkpoints" / "bad-step-000000200").is_dir()


def test_one_wrong_answer_does_not_cost_the_newest(run: Mirrored, tmp_path: Path) -> None:
    """A 404 now and then, of whatever is asked for: all of it is there."""
    asked: set[str] = set()

    def get(key: str) -> Any:
        if key not in asked:
            asked.add(key)
            raise NotThereError(key)
        return run.store.get(key)

    store: Any = Counting(run.store)
    store.get = get
    told = back(run, tmp_path / "run", store)
    assert told.restored_step == 200
    assert len(told.notes) == 1
    assert all((tmp_path / "run" / name).read_bytes() == data for name, data in run.records.items())


def test_the_checkpoint_folder_of_another_run_is_left_alone(run: Mirrored, tmp_path: Path) -> None:
    """--ckpt-dir was mistyped."""
    other = make_checkpoint(tmp_path / "run" / "checkpoints", 300, run_id="other-1")
    with pytest.raises(
        RefusedError, match=rf"{other}: is a checkpoint of the run other-1, .* {RUN_ID}; .*dir"
    ):
        back(run, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]
    assert newest(tmp_path / "run") == other.name
    (other / "manifest.json").write_text("what?")  # a damaged one is of nobody
    assert back(run, tmp_path / "run").restored_step == 200


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_rows_that_the_mirror_lacks_are_told(run: Mirrored, tmp_path: Path, name: str) -> None:
    run.records["steps.jsonl"] = rows(1, 260)
    run.records[name] = b"".join(row(step) for step in range(10, 191, 10))  # every tenth has a row
    told = back(run, tmp_path / "run")
    (_, said) = told.notes
    assert told.lost == [name]
    assert said.startswith(f"{name}: ends at step 190, and the checkpoint is of step 200")
    run.records[name] += row(200)
    other = back(run, tmp_path / "other")
    assert (len(other.notes), other.lost) == (1, [])
    run.records[name] = b"".join(row(step) for step in range(15, 196, 15))  # the next one is 210's
    assert len(back(run, tmp_path / "third").notes) == 1


def test_never_from_zero_in_silence(run: Mirrored, tmp_path: Path) -> None:
    for one in run.published:
        run.store.delete([run.key(one, "model.safetensors")])
    with pytest.raises(RefusedError, match=r"never restarted from zero by itself.*step 200.*step 100"):
        back(run, tmp_path / "run")


@pytest.mark.parametrize("ours", [True, False])
def test_what_a_rewind_gave_up_is_not_taken(run: Mirrored, tmp_path: Path, ours: bool) -> None:
    """The trainer went back to 100, put that on record, and died before its mirror looked again: the head
    still names the checkpoint of step 200, whose weights saw the spike."""
    rewind = event("rewind", 230, to_step=100, jumps=[[100, 230]], rewinds=1)
    folder = tmp_path / "run"
    if ours:
        here(run, folder)
        (folder / "events.jsonl").write_bytes(run.records["events.jsonl"] + rewind)
    else:
        run.records["events.jsonl"] += rewind
    told = back(run, folder)
    assert told.restored_step == 100
    assert "skipped the mirrored checkpoint of step 200: the run went back to step 100 after it" in told.notes
    run.records["events.jsonl"] += rewind + event("checkpoint", 200)  # made anew, and published
    assert back(run, tmp_path / "later").restored_step == 200


@pytest.mark.parametrize("policy", ["rewind", "skip"])
def test_what_a_rewind_would_need_comes_too(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The machine died while a spike lasted."""
    run.checkpoint(300, stability={"episode": {"onset": 230}})
    run.records["events.jsonl"] += event("checkpoint", 300)
    run.records["metrics.jsonl"] = rows(1, 310, loss=2.5)
    fields = {"stability.policy": policy}
    told = back(run, tmp_path / "run", step_fields=fields)
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    if policy == "skip":
        assert there == ["step-000000300"]
        return
    assert there == ["step-000000200", "step-000000300"]
    assert told.restored_step == 300
    assert told.restored_bytes == run.published[1].bytes + run.published[2].bytes
    assert "fetched the checkpoint of step 200 too, to go back to if the spike stays" in told.notes
    assert back(run, tmp_path / "run", step_fields=fields).restored_bytes == 0
    run.store.delete([run.key(run.published[1], "model.safetensors")])
    assert any("skipped" in note for note in back(run, tmp_path / "other", step_fields=fields).notes)
    assert (tmp_path / "other" / "checkpoints" / "step-000000100").is_dir()
    room = [True, False]  # for one alone: the run goes on all the same

    def require_room(*_: Any) -> None:
        if not room.pop(0):
            raise RefusedError("no room")

    monkeypatch.setattr(fetch, "require_room", require_room)
    said = "there may be nothing to go back to from the spike: no room"
    assert said in back(run, tmp_path / "third", step_fields=fields).notes
    assert newest(tmp_path / "third") == "step-000000300"


def test_which_checkpoints_were_given_up() -> None:
    def of(*events: tuple[str, int]) -> dict[int, int]:
        return given_up(
            {"event": name, "step": step, **({"to_step": step} if name == "rewind" else {})}
            for name, step in events
        )

    saved = [("checkpoint", 0), ("checkpoint", 100), ("checkpoint", 200)]
    assert of() == {}
    assert of(*saved) == {}
    assert of(*saved, ("rewind", 100)) == {200: 100}
    assert of(*saved, ("rewind", 100), ("checkpoint", 200)) == {}
    assert of(*saved, ("resume", 100), ("checkpoint", 150)) == {200: 100}
    assert of(*saved, ("resume", 200)) == {}
    assert of(*saved, ("start", 0)) == {100: 0, 200: 0}
    assert of(*saved, ("rewind", 100), ("checkpoint", 200), ("rewind", 0)) == {100: 0, 200: 0}
    assert given_up([{"event": "rewind", "step": 50}, {"event": "checkpoint"}, {}]) == {}


# ------------------------------------------------------------------------------------------------------------
# Whose rows


def test_the_last_writers_own_rows_are_the_run(run: Mirrored, tmp_path: Path) -> None:
    """The mirror was behind when the trainer was killed; it is relaunched in its own folder."""
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    (folder / "metrics.jsonl").write_bytes(rows(1, 290, loss=2.5))
    assert back(run, folder).notes == []
    assert (folder / "metrics.jsonl").read_bytes() == rows(1, 290, loss=2.5)
    assert not (folder / "config.yaml").exists()  # a latch that was lifted here must not come back either


def test_rows_that_a_power_cut_took_come_back(run: Mirrored, tmp_path: Path) -> None:
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    (folder / "metrics.jsonl").write_bytes(rows(1, 220, loss=2.5) + b'{"step": 2')
    told = back(run, folder)
    assert (folder / "metrics.jsonl").read_bytes() == run.records["metrics.jsonl"]
    assert told.notes == ["metrics.jsonl: 40 rows that were missing here, from the mirror"]


def test_rows_that_a_resume_set_aside_do_not_come_back(run: Mirrored, tmp_path: Path) -> None:
    run.records["metrics.jsonl"] = rows(1, 260, time_utc="2026-11-21T12:00:00Z")
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    kept = rows(1, 200, time_utc="2026-11-21T12:00:00Z")
    (folder / "metrics.jsonl").write_bytes(kept)
    with (folder / "metrics.superseded.jsonl").open("ab") as aside:
        aside.write(rows(201, 260, time_utc="2026-11-21T12:00:00Z"))
    assert back(run, folder).notes == []
    assert (folder / "metrics.jsonl").read_bytes() == kept


def test_a_kill_between_a_resume_and_the_mirrors_next_look_doubles_nothing(
    run: Mirrored, tmp_path: Path
) -> None:
    """Rows without a time come back: their steps may have been done again. The resume moves them anew."""
    run.records["blocks.jsonl"] = rows(1, 240, blocks=[[3, 1]])
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    (folder / "blocks.jsonl").write_bytes(rows(1, 260, blocks=[[3, 1]]))
    for _ in range(3):
        back(run, folder)
        rewind(folder / "blocks.jsonl", 200)
        assert (folder / "blocks.jsonl").read_bytes() == rows(1, 200, blocks=[[3, 1]])
        assert (folder / "blocks.superseded.jsonl").read_bytes() == rows(201, 260, blocks=[[3, 1]])


@pytest.mark.parametrize("last", [45, 50, 60])
def test_rows_that_were_done_again_as_they_were_come_back(run: Mirrored, tmp_path: Path, last: int) -> None:
    """Rows of blocks have no time. A resume from 50 moved those to 80 aside; the power cut came later."""
    run.records["blocks.jsonl"] = rows(1, 100, blocks=[[3, 1]])
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    (folder / "blocks.superseded.jsonl").write_bytes(rows(51, 80, blocks=[[3, 1]]))
    (folder / "blocks.jsonl").write_bytes(rows(1, last, blocks=[[3, 1]]))
    assert back(run, folder).notes == [
        f"blocks.jsonl: {100 - last} rows that were missing here, from the mirror"
    ]
    assert (folder / "blocks.jsonl").read_bytes() == run.records["blocks.jsonl"]


def test_other_rows_of_the_same_step_stay(run: Mirrored, tmp_path: Path) -> None:
    """The row of the training came back; that of the evaluation after it, and a sample, are not sent yet."""
    run.records["metrics.jsonl"] = rows(1, 200, loss=2.5)
    run.records["samples.jsonl"] = row(200, prompt="Once") + row(200, prompt="One")
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    unsent = {"metrics.jsonl": row(200, **{"val/loss": 3.0}), "samples.jsonl": row(200, prompt="Two")}
    (folder / "metrics.jsonl").write_bytes(rows(1, 199, loss=2.5) + unsent["metrics.jsonl"])
    (folder / "samples.jsonl").write_bytes(unsent["samples.jsonl"])
    assert [note.partition(";")[1] for note in back(run, folder).notes] == ["", ""]
    for name, more in unsent.items():
        assert (folder / name).read_bytes() == run.records[name] + more
    assert not list(folder.glob("*.lost-*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "steps.jsonl"])
def test_rows_that_a_hand_cut_out_or_changed_come_back(run: Mirrored, tmp_path: Path, name: str) -> None:
    """Beside rows that the mirror does not have yet, which stay the run's."""
    run.records[name] = rows(1, 260, loss=2.5)
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 300)
    unsent = rows(261, 290, loss=2.4)
    (folder / name).write_bytes(rows(1, 99, loss=2.5) + rows(200, 260, loss=2.5) + unsent)
    assert back(run, folder).notes == [f"{name}: 100 rows that were missing here, from the mirror"]
    assert (folder / name).read_bytes() == run.records[name] + unsent
    changed = rows(50, 50, loss=0.1), rows(259, 260, loss=0.2)
    (folder / name).write_bytes(
        rows(1, 49, loss=2.5) + changed[0] + rows(51, 258, loss=2.5) + changed[1] + unsent
    )
    (said,) = back(run, folder).notes
    assert said.startswith(f"{name}: 3 rows that were missing here, from the mirror; 3 rows of its own")
    assert (folder / name).read_bytes() == run.records[name] + unsent
    aside = folder / f"{name.removesuffix('.jsonl')}.lost-e0001.jsonl"
    assert said.endswith(f"kept in {aside.name}")
    assert aside.read_bytes() == b"".join(changed)
    assert back(run, folder).notes == []


@pytest.mark.parametrize("cut", [False, True])
def test_rows_that_were_done_again_stay_the_runs(run: Mirrored, tmp_path: Path, cut: bool) -> None:
    """A resume from 100 moved the mirror's later rows aside; those of its own are not sent yet."""
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 300)
    again = rows(1, 100, loss=2.5) + rows(101, 290, loss=2.6)
    (folder / "metrics.jsonl").write_bytes(again if not cut else again.replace(rows(40, 60, loss=2.5), b""))
    with (folder / "metrics.superseded.jsonl").open("ab") as aside:
        aside.write(rows(101, 260, loss=2.5))
    said = ["metrics.jsonl: 21 rows that were missing here, from the mirror"]
    assert back(run, folder).notes == (said if cut else [])
    assert (folder / "metrics.jsonl").read_bytes() == again
    (folder / "metrics.superseded.jsonl").unlink()  # what is back of it is judged by first
    run.records["metrics.superseded.jsonl"] += rows(101, 260, loss=2.5)
    assert len(back(run, folder).notes) == 1
    assert (folder / "metrics.jsonl").read_bytes() == again


def test_events_that_a_hand_changed_come_back(run: Mirrored, tmp_path: Path) -> None:
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    odd = event("checkpoint", 150)
    (folder / "events.jsonl").write_bytes(event("start", 0) + odd + event("checkpoint", 200))
    told = back(run, folder)
    assert "events.jsonl is not what the mirror has of it" in told.notes[0]
    assert (folder / "events.jsonl").read_bytes() == run.records["events.jsonl"]
    assert (folder / "events.lost-e0001.jsonl").read_bytes() == odd


lines = st.lists(st.integers(0, 12).map(lambda step: row(step)), max_size=8)


@settings(max_examples=300)
@given(lines, lines, lines)
def test_no_row_is_lost_in_mending(theirs: list[bytes], ours: list[bytes], moved: list[bytes]) -> None:
    mirrored, local, aside = (b"".join(one) for one in (theirs, ours, moved))
    whole, apart, came = mended(mirrored, local, aside)
    assert {*theirs, *ours} <= {*whole.splitlines(True), *apart.splitlines(True), *moved}
    assert came >= len([one for one in theirs if one not in ours + moved])
    if not came:
        assert (whole, apart) == (local, b"")


@dataclass
class Life:
    """A record file, told what happens to the run: as it should be, its superseded rows, its mirror's copy.

    Rows tell their time, and of some steps there are two; or, as blocks do, only what was read, which is the
    same when a step is done again, unless the run jumped.
    """

    timed: bool
    file: list[bytes] = field(default_factory=list)
    aside: list[bytes] = field(default_factory=list)
    mirror: list[bytes] = field(default_factory=list)
    jumps: list[int] = field(default_factory=list)  # steps after which other blocks are read
    written: int = 0

    def runs(self, steps: int) -> None:
        begun = step_in(self.file[-1]) if self.file else 0
        for step in range(begun + 1, begun + 1 + steps):
            kinds: list[dict[str, Any]] = [{"loss": 2.5}, {"val/loss": 3.0}][: 2 if step % 3 == 0 else 1]
            for kind in (
                kinds if self.timed else [{"blocks": [[0, step + 100 * sum(at < step for at in self.jumps)]]}]
            ):
                self.written += 1
                self.file.append(row(step, **kind, **({"time_utc": self.written} if self.timed else {})))

    def goes_back(self, steps: int, jump: bool) -> None:
        target = (step_in(self.file[-1]) if self.file else 0) - steps
        self.aside += [one for one in self.file if step_in(one) > target]
        self.file = [one for one in self.file if step_in(one) <= target]
        self.jumps += [target] * jump

    def is_looked_at(self) -> None:
        self.mirror = list(self.file)


def step_in(line: bytes) -> int:
    return int(json.loads(line)["step"])


happenings = st.lists(
    st.one_of(
        st.tuples(st.just("runs"), st.integers(1, 9)),
        st.tuples(st.just("goes_back"), st.integers(1, 12), st.booleans()),
        st.tuples(st.just("is_looked_at")),
    ),
    max_size=8,
)


@settings(max_examples=250)
@given(st.booleans(), happenings, st.integers(0, 30), st.integers(1, 30))
def test_what_was_cut_out_comes_back_without_hole_or_double(
    timed: bool, happened: list[tuple[Any, ...]], first: int, count: int
) -> None:
    """Whatever the run did before, and whatever the mirror saw of it."""
    life = Life(timed)
    for name, *words in happened:
        getattr(life, name)(*words)
    left = life.file[:first] + life.file[first + count :]
    mirrored, local, aside = (b"".join(one) for one in (life.mirror, left, life.aside))
    whole, apart, _ = mended(mirrored, local, aside)
    wanted = [one for one in life.file if one in life.mirror or one in left]
    found = whole.splitlines(True)
    assert [one for one in found if one in wanted] == wanted
    assert apart == b""
    assert mended(mirrored, whole, aside) == (whole, b"", 0)
    if timed:
        assert found == wanted
    else:  # steps that were given up may be there at the end, until the resume that follows
        steps = [step_in(one) for one in found]
        assert steps == sorted(set(steps))
        assert {one for one in found if one not in wanted} <= {*life.mirror}


@pytest.mark.parametrize("name", ["metrics.jsonl", "blocks.jsonl"])
def test_rows_that_can_not_be_had_are_told(run: Mirrored, tmp_path: Path, name: str) -> None:
    run.records[name] = rows(1, 260, loss=2.5)
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 200)
    (folder / name).write_bytes(rows(1, 20, loss=2.5))
    head = run.save()
    run.store.delete([f"tiny/{head.records[name][3].path}"])
    told = restore(job_of(folder), head, run.store, lambda _: None, patience_s=0.0, again_s=())
    (said,) = told.notes
    assert told.lost == [name]
    assert said.startswith(f"{name}: rows are missing, tiny/e0001")
    assert said.endswith("; what is here stays as it is")
    assert (folder / name).read_bytes() == rows(1, 20, loss=2.5)


def test_a_folder_that_was_left_behind(run: Mirrored, tmp_path: Path) -> None:
    """Epoch 1 trained here to step 330 while it was cut off; epoch 2 went on elsewhere from step 100."""
    folder = here(run, tmp_path / "run", 1)
    for step in (100, 200, 300):
        make_checkpoint(folder / "checkpoints", step, seed=9 if step > 100 else 0)
    (folder / "metrics.jsonl").write_bytes(rows(1, 150, loss=2.5) + rows(151, 330, loss=9.0))
    (folder / "blocks.jsonl").write_bytes(rows(1, 330))
    (folder / "metrics.superseded.jsonl").write_bytes(
        rows(40, 44, loss=1.0) + run.records["metrics.superseded.jsonl"]
    )
    run.epochs = [epoch(1), epoch(2, 100)]
    run.records["metrics.superseded.jsonl"] += rows(151, 155, loss=9.0)  # of them the mirror had these
    assert (folder / "checkpoints" / "latest").resolve().name == "step-000000300"
    told = back(run, folder)
    assert told.restored_step == 200
    assert newest(folder) == "step-000000200"
    names = {p.name for p in (folder / "checkpoints").iterdir()}  # none called latest: it named one of them
    assert names == {
        "step-000000100",
        "step-000000200",
        "lost-e0001-step-000000200",
        "lost-e0001-step-000000300",
    }
    assert content(folder / "checkpoints" / "step-000000200") == content(run.originals / "step-000000200")
    for name, data in run.records.items():
        assert (folder / name).read_bytes() == data
    assert (folder / "metrics.lost-e0001.jsonl").read_bytes() == rows(156, 330, loss=9.0)
    assert (folder / "blocks.lost-e0001.jsonl").read_bytes() == rows(1, 330)
    assert not (folder / "blocks.jsonl").exists()
    assert (folder / "metrics.superseded.lost-e0001.jsonl").read_bytes() == rows(40, 44, loss=1.0)
    assert (
        f"{175 + 330 + 5} rows that the mirror does not have are set aside in *.lost-e0001.jsonl"
        in told.notes
    )


def test_another_checkpoint_of_the_same_step(run: Mirrored, tmp_path: Path) -> None:
    """The rows are the mirror's, so are the weights."""
    folder = here(run, tmp_path / "run", 1)
    make_checkpoint(folder / "checkpoints", 200, seed=9)
    run.epochs = [epoch(1), epoch(2, 200)]
    run.records["metrics.jsonl"] += rows(261, 290, loss=2.0)
    assert back(run, folder).restored_step == 200
    path = folder / "checkpoints" / "step-000000200"
    assert content(path) == content(run.originals / path.name)


def test_a_later_session_that_never_went_on_took_nothing(run: Mirrored, tmp_path: Path) -> None:
    """Epoch 2, elsewhere, claimed the run and was refused its config: the folder of epoch 1 is the run."""
    folder = here(run, tmp_path / "run", 1)
    make_checkpoint(folder / "checkpoints", 300)
    (folder / "metrics.jsonl").write_bytes(rows(1, 330, loss=2.5))
    run.epochs = [epoch(1), epoch(2, UNSAID)]
    assert back(run, folder).restored_step is None
    assert newest(folder) == "step-000000300"
    assert (folder / "metrics.jsonl").read_bytes() == rows(1, 330, loss=2.5)


def test_an_older_copy_of_the_writers_own_folder(run: Mirrored, tmp_path: Path) -> None:
    """Copied with its mirror.json while that session went on: fewer events than the mirror has tell it."""
    folder = here(run, tmp_path / "run", 1)
    make_checkpoint(folder / "checkpoints", 100)
    (folder / "events.jsonl").write_bytes(event("start", 0) + event("checkpoint", 100))
    (folder / "metrics.jsonl").write_bytes(rows(1, 120, loss=2.5) + rows(121, 130, loss=8.0))
    told = back(run, folder)
    assert told.restored_step == 200
    assert (folder / "metrics.jsonl").read_bytes() == run.records["metrics.jsonl"]
    assert (folder / "metrics.lost-e0001.jsonl").read_bytes() == rows(121, 130, loss=8.0)
    assert (folder / "checkpoints" / "step-000000100").is_dir()


def test_a_folder_without_a_word_on_its_mirror(run: Mirrored, tmp_path: Path) -> None:
    """It has all that the mirror has, and more: it is the run. Or another story: then it is set aside."""
    folder = here(run, tmp_path / "run")
    (folder / "mirror.json").unlink()
    make_checkpoint(folder / "checkpoints", 300)
    (folder / "metrics.jsonl").write_bytes(rows(1, 330, loss=2.5))
    assert back(run, folder).restored_step is None
    assert newest(folder) == "step-000000300"
    (folder / "metrics.jsonl").write_bytes(rows(1, 330, loss=4.5))
    assert back(run, folder).restored_step == 200
    assert (folder / "metrics.lost-e0000.jsonl").read_bytes() == rows(1, 330, loss=4.5)
    assert (folder / "checkpoints" / "lost-e0000-step-000000300").is_dir()


@pytest.mark.parametrize("reads", range(0, 24, 3))
def test_broken_off_anywhere_and_done_again(run: Mirrored, tmp_path: Path, reads: int) -> None:
    """A folder that was left behind, cut off after so many answers of the store. Whatever was done by then,
    the next call must not take half of the mirror's rows for the folder's own."""
    folder = here(run, tmp_path / "run", 1)
    make_checkpoint(folder / "checkpoints", 300, seed=9)
    (folder / "metrics.jsonl").write_bytes(rows(1, 150, loss=2.5) + rows(151, 330, loss=9.0))
    (folder / "events.jsonl").write_bytes(run.records["events.jsonl"] + event("checkpoint", 300))
    run.epochs = [epoch(1), epoch(2, 100)]
    run.records["events.jsonl"] += event("resume", 100) + event("checkpoint", 200)

    class Dies:
        asked = 0

        def __getattr__(self, name: str) -> Any:
            if name not in ("get", "read"):
                return getattr(run.store, name)

            def ask(*words: Any) -> Any:
                self.asked += 1
                if self.asked > reads:
                    raise UnreachableError("the machine is gone")
                return getattr(run.store, name)(*words)

            return ask

    with pytest.raises(AwayError):
        restore(job_of(folder), run.save(), Dies(), lambda _: None, patience_s=0.0)  # type: ignore[arg-type]
    back(run, folder)
    for name, data in run.records.items():
        assert (folder / name).read_bytes() == data
    assert (folder / "metrics.lost-e0001.jsonl").read_bytes() == rows(151, 330, loss=9.0)
    assert newest(folder) == "step-000000200"
    assert not (folder / MARKER).exists()


def test_a_piece_that_is_gone(run: Mirrored, tmp_path: Path) -> None:
    """Of a curve: said, and left out. Of the events or the ledger: refused."""
    head = run.save()
    run.store.delete([f"tiny/{head.records['metrics.jsonl'][1].path}"])
    told = restore(job_of(tmp_path / "run"), head, run.store, lambda _: None)
    assert any(note.startswith("metrics.jsonl: rows are missing, tiny/e0001") for note in told.notes)
    assert told.lost == ["metrics.jsonl"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_bytes()) < len(run.records["metrics.jsonl"])
    run.store.delete([f"tiny/{head.records['events.jsonl'][0].path}"])
    with pytest.raises(RefusedError, match=r"without all of events\.jsonl"):
        restore(job_of(tmp_path / "other"), head, run.store, lambda _: None)


def test_files_are_put_only_where_there_are_none(run: Mirrored, tmp_path: Path) -> None:
    run.files |= {"STOP.json": b"{}", "corpus-web.json": b"{}"}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: mine")
    head = run.save()
    head.files["../evil"] = head.files["STOP.json"]
    head.records["../evil.jsonl"] = head.records["metrics.jsonl"]
    restore(job_of(folder), head, run.store, lambda _: None)
    assert (folder / "config.yaml").read_text() == "name: mine"
    assert (folder / "STOP.json").read_bytes() == b"{}"
    assert not (folder / "corpus-web.json").exists()
    assert not list(tmp_path.glob("evil*"))


# ------------------------------------------------------------------------------------------------------------
# Another run


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        ({"training.total_steps": 100}, {"training.total_steps": 200}, r"training\.total_steps: 100 -> 200"),
        ({"seed": 1, "a": 2}, {"seed": 1}, r"a: 2 -> \(absent\)"),
        ({"model.vocab_size": 300}, {"model.vocab_size": 400}, r"model\.vocab_size: 300 -> 400"),
        ({"model.vocab_size": 300}, {"model.vocab_size": None}, None),
        ({"training.z_loss": 0.0}, {}, None),  # a field that came later, at the value that changes nothing
    ],
)
def test_another_config_is_refused_before_a_byte(
    run: Mirrored, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], named: str | None
) -> None:
    run.step_fields = theirs
    store = Counting(run.store)
    store.get = lambda key: pytest.fail(key) if named else run.store.get(key)  # type: ignore[method-assign,assignment]
    if named is None:
        assert back(run, tmp_path / "run", store, step_fields=ours).restored_step == 200
        return
    with pytest.raises(RefusedError, match=named):
        back(run, tmp_path / "run", store, step_fields=ours)
    assert not (tmp_path / "run").exists()


def test_another_run_of_this_name_is_refused(run: Mirrored, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=f"holds the run {RUN_ID}, and .* is the run other-1"):
        back(run, tmp_path / "run", run_id="other-1")


# ------------------------------------------------------------------------------------------------------------
# The ledger


def money(seq: int, usd: int, **more: Any) -> bytes:
    return json.dumps({"seq": seq, "event": "cost", "usd": str(usd), **more}).encode() + b"\n"


def ledger_of(*amounts: int, first: int = 1) -> bytes:
    return b"".join(money(seq, usd) for seq, usd in enumerate(amounts, start=first))


def test_the_ledger_loses_no_row(run: Mirrored, tmp_path: Path) -> None:
    """The launcher wrote rows on the new machine before anything of the old one was here."""
    folder = tmp_path / "run"
    ledger = Ledger(folder / "ledger.jsonl", Clock())
    folder.mkdir()
    ledger.append("intent", usd=Decimal("7"))
    run.records["ledger.jsonl"] = ledger_of(1, 2, 3)
    back(run, folder)
    ledger.append("cost", usd=Decimal("8"))
    found = ledger_rows(folder / "ledger.jsonl")
    assert [r["usd"] for r in found] == ["1", "2", "3", "7", "8"]
    assert [r["seq"] for r in found] == [1, 2, 3, 4, 5]
    back(run, folder)
    assert ledger_rows(folder / "ledger.jsonl") == found
    assert not list(folder.glob(".ledger*"))


def test_a_merge_that_was_killed_is_done_again(run: Mirrored, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run.records["ledger.jsonl"] = ledger_of(1, 2, 3)
    run.save()
    local, merged = ledger_of(7, 8), ledger_of(1, 2, 3, 7, 8)
    for cut in range(0, len(merged), 7):  # the kernel wrote so much over the old rows
        (folder / "ledger.jsonl").write_bytes(merged[:cut] + local[cut:])
        (folder / ".ledger.jsonl.merging").write_bytes(merged)
        ledger_from(str(tmp_path / "mirror"), None, "tiny", folder)
        assert [r["usd"] for r in ledger_rows(folder / "ledger.jsonl")] == ["1", "2", "3", "7", "8"], cut


def test_a_ledger_line_that_is_no_row(run: Mirrored, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ledger.jsonl").write_bytes(b"what?\n")
    run.records["ledger.jsonl"] = ledger_of(1)
    with pytest.raises(Exception, match=r"ledger\.jsonl: a line of it.* is not a ledger row") as told:
        back(run, folder)
    assert getattr(told.value, "exit_code", None) == 1
    assert (folder / "ledger.jsonl").read_bytes() == b"what?\n"


amounts = st.lists(st.integers(0, 3), max_size=6)


@settings(max_examples=100)
@given(shared=amounts, theirs=amounts, ours=amounts)
def test_any_two_ledgers(shared: list[int], theirs: list[int], ours: list[int]) -> None:
    """Rows told apart by more than their number, as real ones are by their time."""

    def lines(tag: str, values: list[int], first: int) -> bytes:
        return b"".join(money(first + n, v, at=f"{tag}{n}") for n, v in enumerate(values))

    base = lines("s", shared, 1)
    one = base + lines("t", theirs, 1 + len(shared))
    other = base + lines("o", ours, 1 + len(shared))
    merged = merged_ledger(one, other)
    found = [json.loads(line) for line in merged.splitlines()]
    assert [int(r["usd"]) for r in found] == [*shared, *theirs, *ours]
    assert [r["seq"] for r in found] == list(range(1, len(found) + 1))
    assert merged_ledger(one, merged) == merged
    assert merged_ledger(merged, other).count(b"\n") == merged.count(b"\n")


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([b"a\n", b"bb\n", b"c\n"])), st.lists(st.sampled_from([b"a\n", b"bb\n", b"b\n"]))
)
def test_the_lines_two_files_begin_with(one: list[bytes], other: list[bytes]) -> None:
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    assert common_lines(b"".join(one), b"".join(other)) == len(b"".join(one[:same]))
    assert rows_only_in(b"".join(one), b"".join(other)) == b"".join(x for x in one if x not in other)


def test_two_equal_rows_are_two() -> None:
    """Only so many of ours are the mirror's as the mirror has."""
    merged = merged_ledger(ledger_of(1, 5), ledger_of(9, 5, 5))
    assert [json.loads(line)["usd"] for line in merged.splitlines()] == ["1", "5", "9", "5"]


def test_the_supervisor_gets_the_ledger_first(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.records["ledger.jsonl"] = ledger_of(4, 5)
    run.save()
    mirror = str(tmp_path / "mirror")
    assert ledger_from(mirror, None, "tiny", tmp_path / "run") == 2
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == ledger_of(4, 5)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["ledger.jsonl"]
    assert ledger_from(mirror, None, "tiny", tmp_path / "run") == 0
    gone = [NotThereError("tiny/head.json")]  # a gateway says so, once
    honest = FolderStore.get

    def get(store: FolderStore, key: str) -> Any:
        if gone:
            raise gone.pop()
        return honest(store, key)

    monkeypatch.setattr(FolderStore, "get", get)
    assert ledger_from(mirror, None, "tiny", tmp_path / "later") == 2
    assert not gone
    assert ledger_from(mirror, None, "no-such-run", tmp_path / "new") == 0
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------
# The data


@pytest.fixture
def mirrored_corpus(run: Mirrored, corpus: Path) -> str:
    mark = str(json.loads((corpus / "manifest.json").read_bytes())["fingerprint"])
    for name in ("train.bin", "val.bin", "train.idx.npy", "val.idx.npy", "tokenizer.json", "manifest.json"):
        run.store.put(f"data/{mark}/{name}", (corpus / name).read_bytes())
    run.data, run.fingerprints = {"web": mark}, [mark]
    return mark


def test_the_corpus_comes_too_where_it_is_absent(
    run: Mirrored, tmp_path: Path, corpus: Path, mirrored_corpus: str
) -> None:
    from x1_pretrain.corpus.shards import open_corpus

    target = tmp_path / "data" / "web"
    told = back(run, tmp_path / "run", corpora={"web": str(target), "other": str(tmp_path / "none")})
    alone = size(run.published[-1].bytes)  # the corpus has a line of its own
    said = f"fetched the checkpoint of step 200 from {run.store.label}/tiny: {alone} in "
    assert any(note.startswith(said) for note in told.notes)
    assert open_corpus(target).fingerprint == mirrored_corpus
    assert any(note.startswith("fetched the corpus web") for note in told.notes)
    assert not (tmp_path / "none").exists()
    assert [p.name for p in target.parent.iterdir()] == ["web"]
    store = Counting(run.store)
    back(run, tmp_path / "run", store, corpora={"web": str(target)})
    assert store.reads == []


def test_a_corpus_goes_on_where_it_broke_off_and_damage_is_seen(
    run: Mirrored, tmp_path: Path, corpus: Path, mirrored_corpus: str
) -> None:
    target, partial = tmp_path / "data" / "web", tmp_path / "data" / ".fetching-web"
    partial.mkdir(parents=True)
    (partial / "train.bin").write_bytes((corpus / "train.bin").read_bytes())
    (partial / "val.bin").write_bytes(b"\1" * (corpus / "val.bin").stat().st_size)
    store = Counting(run.store)
    back(run, tmp_path / "run", store, corpora={"web": str(target)})
    read = [name for name, _, _ in store.reads if "safetensors" not in name]
    assert "train.bin" not in read  # it was whole
    assert hashlib.sha256((target / "val.bin").read_bytes()).digest() == (
        hashlib.sha256((corpus / "val.bin").read_bytes()).digest()
    )
    data = bytearray((corpus / "train.bin").read_bytes())
    data[10] ^= 1
    run.store.put(f"data/{mirrored_corpus}/train.bin", bytes(data))
    with pytest.raises(RefusedError, match=r"the corpus web can't be restored \(train\.bin does not match"):
        back(run, tmp_path / "run", corpora={"web": str(tmp_path / "data" / "again")})
    assert not (tmp_path / "data" / "again").exists()


def test_another_corpus_is_refused_before_a_byte(run: Mirrored, tmp_path: Path, corpus: Path) -> None:
    run.fingerprints = ["0" * 64]
    with pytest.raises(RefusedError, match=r"the corpus web has the fingerprint .* made with 000000000000"):
        back(run, tmp_path / "run", corpora={"web": str(corpus)})
    assert not (tmp_path / "run").exists()


def test_a_manifest_of_another_corpus(run: Mirrored, tmp_path: Path, mirrored_corpus: str) -> None:
    run.data = {"web": "1" * 64}
    run.store.put(f"data/{'1' * 64}/manifest.json", run.store.get(f"data/{mirrored_corpus}/manifest.json")[0])
    with pytest.raises(RefusedError, match="its manifest does not match its fingerprint"):
        back(run, tmp_path / "run", corpora={"web": str(tmp_path / "web")})


# ------------------------------------------------------------------------------------------------------------
# The disk and the store


def test_no_right_to_write_is_one_line(run: Mirrored, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(Exception, match="can't be written") as told:
        back(run, tmp_path / "run")
    assert getattr(told.value, "exit_code", None) == 2


class Disk:
    """So much is free on each disk, whatever is written."""

    def __init__(self, free: int) -> None:
        self.free, self.asked = free, list[Path]()

    def disk_usage(self, path: Path) -> Any:
        self.asked.append(path)
        return self


@pytest.mark.parametrize("with_data", [False, True])
def test_no_room_is_known_before_anything_is_written(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrored_corpus: str, with_data: bool
) -> None:
    corpora = {"web": str(tmp_path / "data" / "web")} if with_data else {}
    wanted = run.published[-1].bytes + fetch.MARGIN_BYTES
    sizes = [run.store.stat(f"data/{mirrored_corpus}/{name}").bytes for name in FILES] if with_data else []
    disk = Disk(wanted + sum(sizes) - 1)
    monkeypatch.setattr(fetch.shutil, "disk_usage", disk.disk_usage)
    with pytest.raises(RefusedError, match=r"no room for what tiny has in the mirror: it needs 1[67]"):
        back(run, tmp_path / "run", corpora=corpora)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists()
    disk.free += 1
    assert back(run, tmp_path / "run", corpora=corpora).restored_step == 200
    disk.free = 0  # what is here needs none
    assert back(run, tmp_path / "run", corpora=corpora).restored_step is None


def test_a_full_disk_is_no_reason_where_no_checkpoint_is_to_be_fetched(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer frees mirrored checkpoints itself. Here a resume moved rows aside, and a rewind gave up the
    newest checkpoint of the mirror."""
    folder = here(run, tmp_path / "run")
    make_checkpoint(folder / "checkpoints", 100)
    rewind = event("rewind", 230, to_step=100, jumps=[[100, 230]], rewinds=1)
    (folder / "events.jsonl").write_bytes(run.records["events.jsonl"] + rewind)
    (folder / "metrics.jsonl").write_bytes(rows(1, 100, loss=2.5))
    with (folder / "metrics.superseded.jsonl").open("ab") as aside:
        aside.write(rows(101, 260, loss=2.5))
    monkeypatch.setattr(fetch.shutil, "disk_usage", Disk(0).disk_usage)
    assert back(run, folder).restored_step is None
    assert newest(folder) == "step-000000100"


@pytest.mark.parametrize("lacking", [1, 0])
def test_what_a_broken_fetch_left_needs_no_room_again(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int
) -> None:
    """Nor is what lies there too much counted for another folder on the same disk."""
    partial, other = tmp_path / ".fetching-one", tmp_path / ".fetching-other"
    partial.mkdir()
    (partial / "file").write_bytes(b"x" * 8192)
    on_disk = 512 * (partial / "file").stat().st_blocks
    monkeypatch.setattr(fetch.shutil, "disk_usage", Disk(fetch.MARGIN_BYTES + 1000 - lacking).disk_usage)
    wanted = {partial: on_disk - 4096, other: 1000}
    if lacking:
        with pytest.raises(RefusedError, match="no room for it: it needs"):
            fetch.require_room(wanted, "it")
    else:
        fetch.require_room(wanted, "it")
    monkeypatch.setattr(fetch.shutil, "disk_usage", Disk(0).disk_usage)
    fetch.require_room({partial: on_disk}, "it")


def test_a_head_of_nothing_but_names(tmp_path: Path) -> None:
    """Empty records, a record of no pieces."""
    run = Mirrored(FolderStore(tmp_path / "mirror"), tmp_path / "originals")
    run.records = {"metrics.jsonl": b""}
    head = replace(run.save(), checkpoints=[])
    told = restore(job_of(tmp_path / "run"), head, run.store, lambda _: None)
    assert told.restored_step is None
    assert row(1) == b'{"step": 1}\n'
