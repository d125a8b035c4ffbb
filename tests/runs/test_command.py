"""`x1 runs`: what is listed is what is there; what is thrown away comes back; what must not go stays."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.mirror.mirrored import keys, mirror_run, writer
from tests.records.builder import RUN_ID, build_run, event, write_lines
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket
from x1_pretrain.command import run as run_app
from x1_pretrain.mirror.heads import look
from x1_pretrain.mirror.old_corpora import OldCorpus
from x1_pretrain.numbers import size
from x1_pretrain.records import runs_table, trash
from x1_pretrain.records.lock import lock_folder
from x1_pretrain.records.mirror_state import PULLED, MirrorState, go_on_without, write_state
from x1_pretrain.records.runs import Listed
from x1_pretrain.runs import emptying, listing
from x1_pretrain.runs.command import app
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.folder_store import FolderStore
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def runs(self) -> list[dict[str, Any]]:
        return json.loads(self.out)["runs"]  # type: ignore[no-any-return]

    @property
    def one_line(self) -> str:
        assert self.out == ""
        assert self.err.startswith("x1: ")
        assert self.err.count("\n") == 1, self.err
        return self.err


X1 = Callable[..., Said]


@pytest.fixture
def x1(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> X1:
    """`x1 runs`, in an empty folder of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Said:
        capsys.readouterr()
        code = run_app(app, [str(one) for one in args], prog="x1 runs")
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def disk(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "disk")


def begun(name: str = "tiny", steps: int = 42, run_id: str = RUN_ID, **changes: Any) -> Path:
    """A run under runs/, its lock let go of."""
    made = build_run(Path("runs") / name, steps, run_id, **changes)
    (made / "lock").write_text("")
    return made


def both(disk: FolderStore, name: str = "tiny", **changes: Any) -> Path:
    """A run here and in the mirror."""
    made = begun(name, mirror__uri=disk.label, **changes)
    mirror_run(disk, name, RUN_ID)
    state = MirrorState(disk.label, f"{disk.label}/{name}", name, "folder", 1, "aaaa1111", "released")
    write_state(made, state)
    return made


# ------------------------------------------------------------------------------------------------------------
# The list


def test_no_runs_yet(x1: X1) -> None:
    assert x1() == Said(0, "no runs in runs; `x1 train` begins one, `x1 runs URI` lists a mirror\n", "")
    assert x1("nowhere").code == 2
    assert "no such folder" in x1("nowhere").one_line


def test_a_run_here(x1: X1) -> None:
    begun()
    (one,) = x1("--json").runs
    assert (one["name"], one["where"], one["status"], one["stage"]) == (
        "tiny",
        "here",
        "finished",
        "pretrain",
    )
    assert (one["step"], one["total_steps"], one["good_here"], one["good_mirror"]) == (42, 42, 42, None)
    files = [file for file in Path("runs/tiny").rglob("*") if file.is_file() and not file.is_symlink()]
    links = [file for file in Path("runs/tiny").rglob("*") if file.is_symlink()]
    assert one["bytes_here"] == sum(
        f.lstat().st_size for f in [*files, *(k for k in links if not k.is_dir())]
    )
    assert (one["behind"], one["folder"]) == (None, "runs/tiny")
    line = x1().out.splitlines()[1]
    assert line.split()[:3] == ["tiny", "finished", "42/42"]
    assert "no mirror" in line


def test_a_branch_names_its_parent(x1: X1) -> None:
    begun("trunk")
    made = begun("branch", run_id="branch-1")
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["parent"] = {"run_id": RUN_ID, "step": 20, "checkpoint": "/x", "trunk": RUN_ID}
    (made / "manifest.json").write_text(json.dumps(manifest))
    assert "pretrain from trunk@20" in x1().out
    assert x1("rm", "trunk", "--yes").code == 78
    assert "other runs began from it (runs/branch)" in x1("rm", "trunk", "--yes").one_line


def test_here_and_mirrored_is_one_row(x1: X1, disk: FolderStore) -> None:
    made = both(disk)
    mirror_run(disk, "other", "other-1", steps=(7,), who=writer(why="SIGTERM"), status={"state": "running"})
    found = {one["name"]: one for one in x1("--json").runs}
    tiny, other = found["tiny"], found["other"]
    assert (tiny["where"], tiny["good_here"], tiny["good_mirror"]) == ("both", 42, 42)
    assert tiny["bytes_mirror"] == 1020 + 1042 + 13
    assert tiny["behind"]["steps"] == [0]  # the mirror's retention let it go, or it never came there
    assert (other["where"], other["status"], other["folder"]) == ("mirror", "interrupted (SIGTERM)", None)
    assert other["mirror"] == f"{disk.label}/other"
    alone = {one["name"]: one for one in x1("--json", "--local").runs}
    assert alone.keys() == {"tiny"}
    assert alone["tiny"]["where"] == "here"
    shutil.rmtree(made / "checkpoints/step-000000042")
    assert "20 here, 42 mirror" in x1().out


def test_another_run_of_the_same_name_is_a_row_of_its_own(x1: X1, disk: FolderStore) -> None:
    begun(mirror__uri=disk.label)
    mirror_run(disk, "tiny", "tiny-of-somebody-else")
    assert [one["where"] for one in x1("--json").runs] == ["here", "mirror"]


@pytest.mark.parametrize(
    ("who", "status", "says"),
    [
        (writer(state="writing", stale_s=60.0), {"state": "running"}, "running on gpu-7"),
        (writer(state="writing", stale_s=-1.0), {"state": "running"}, "died (not heard of for 0 s on gpu-7)"),
        (writer(why="finished"), {"state": "finished"}, "finished"),
        (writer(why="x"), {"state": "stopped", "why": "by the guard: dear"}, "stopped by its budget"),
        (writer(why="x"), {"state": "stopped", "why": "by the person: no"}, "stopped by a person"),
        (writer(why="SIGTERM"), {}, "interrupted (SIGTERM)"),
    ],
)
def test_how_a_mirrored_run_stands(
    x1: X1, disk: FolderStore, who: Any, status: dict[str, Any], says: str
) -> None:
    mirror_run(disk, who=who, status={"state": "", **status})
    (one,) = x1(disk.label, "--json").runs
    assert one["status"] == says


def test_a_run_that_went_on_elsewhere_tells_of_there(x1: X1, disk: FolderStore) -> None:
    made = begun(steps=30, mirror__uri=disk.label)
    state = MirrorState(
        disk.label, f"{disk.label}/tiny", "tiny", "folder", 1, "aaaa1111", "lost", lag_bytes=99
    )
    write_state(made, state)
    who = writer(epoch=2, token="bbbb2222", state="writing")
    mirror_run(disk, "tiny", RUN_ID, who=who, status={"state": "running", "step": 40, "val_loss": 2.25})
    (one,) = x1("--json").runs
    assert (one["status"], one["step"], one["val_loss"]) == ("running on gpu-7", 40, 2.25)
    assert (one["good_here"], one["good_mirror"], one["where"]) == (30, 42, "both")
    assert one["behind"] == {"lag_bytes": 99, "lag_s": 0.0, "trouble": "", "steps": [0, 30]}


def test_a_pulled_copy_tells_of_there(x1: X1, disk: FolderStore) -> None:
    """Nobody trains in it, and what it lacks or has too much is no loss."""
    made = begun(steps=30, mirror__uri=disk.label)
    (made / "events.jsonl").write_text((made / "events.jsonl").read_text().replace("finish", "speak"))
    mirror_run(disk, "tiny", RUN_ID, (42,), writer(state="writing", stale_s=90.0), {"state": "running"})
    state = MirrorState(disk.label, f"{disk.label}/tiny", "tiny", "folder", 1, "aaaa1111", "released", PULLED)
    write_state(made, state)
    (one,) = x1("--json").runs
    assert (one["status"], one["step"], one["behind"]["steps"]) == ("running on gpu-7", 42, [])
    (one,) = x1("--json", "--local").runs
    assert one["status"].startswith("copy as of 20")
    assert (one["step"], one["behind"]["steps"]) == (30, [])
    refused = x1("rm", "tiny", "--yes", "--only", "mirror")
    assert (refused.code, "`--only here` moves runs/tiny alone" in refused.one_line) == (78, True)
    before = keys(disk)
    gone = x1("rm", "tiny", "--yes")
    assert (gone.code, made.exists()) == (0, False), gone.err
    assert f"it was pulled: the run itself stays, in {disk.label}/tiny" in gone.out
    assert keys(disk) == before


def test_a_copy_that_was_trained_on_without_its_mirror_lacks_a_mirror(x1: X1, disk: FolderStore) -> None:
    made = begun(steps=30, mirror__uri=disk.label)
    mirror_run(disk, "tiny", RUN_ID, (42,))
    state = MirrorState(disk.label, f"{disk.label}/tiny", "tiny", "folder", 1, "aaaa1111", "released", PULLED)
    write_state(made, state)
    go_on_without(made)
    for words in ("--json",), ("--json", "--local"):
        (one,) = x1(*words).runs
        assert (one["behind"]["lag_bytes"], one["behind"]["steps"]) == (None, [0, 20, 30])


def test_what_is_not_mirrored_yet_without_asking(x1: X1, disk: FolderStore) -> None:
    made = begun(mirror__uri=disk.label)
    told = MirrorState(disk.label, "l", "tiny", "f", mirrored=[0, 20], lag_bytes=3 << 20, lag_s=8.2)
    write_state(made, told)
    assert "3.15 MB, 8 s, 1 checkpoint" in x1("--local").out


def test_in_s3(x1: X1, s3: Bucket) -> None:
    uri = f"s3://{s3.bucket}/runs"
    mirror_run(open_store(parse(uri), None))
    begun("mine", mirror__uri=uri, run_id="mine-1")
    assert [one["name"] for one in x1(uri, "--json").runs] == ["tiny"]
    found = {one["name"]: one["where"] for one in x1("--json").runs}
    assert found == {"mine": "here", "tiny": "mirror"}


@pytest.mark.slow
def test_a_store_that_does_not_answer_costs_a_line(
    x1: X1, monkeypatch: pytest.MonkeyPatch, s3: Bucket
) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr("x1_pretrain.runs.listing.look_at.__defaults__", (1.0,))
        begun(
            "a", mirror={"uri": "s3://nobody/runs", "endpoint": f"http://127.0.0.1:{deaf.getsockname()[1]}"}
        )
        start = time.monotonic()
        said = x1("--json")
        assert time.monotonic() - start < listing.PATIENCE_S
        assert [one["name"] for one in said.runs] == ["a"]
        assert said.err == "x1: s3://nobody/runs: did not answer within 1 s; left out\n"


def test_a_mirror_that_is_not_there_is_a_line(x1: X1, s3: Bucket) -> None:
    begun("a", mirror__uri="s3://no-such-bucket-here/runs")
    said = x1()
    assert (said.code, said.err.count("\n")) == (0, 1)
    assert "s3://no-such-bucket-here" in said.err
    alone = x1("s3://no-such-bucket-here/runs")
    assert alone.code != 0
    assert "s3://no-such-bucket-here" in alone.one_line
    assert x1("s4://bucket/runs").code == 2


def test_newest_first_and_the_trash_last(x1: X1) -> None:
    for day, name in ((3, "c"), (1, "a"), (2, "b"), (9, "gone")):
        made = begun(name, run_id=f"{name}-1")
        row = {"step": 42, "time_utc": f"2026-11-{20 + day}T00:00:00Z"}
        write_lines(made / "metrics.jsonl", [row])
        write_lines(made / "events.jsonl", [event("start", 0, 1) | {"time_utc": row["time_utc"]}])
    assert x1("rm", "gone", "--yes").code == 0
    assert [one["name"] for one in x1("--json").runs] == ["c", "b", "a", "gone"]
    assert x1("--json").runs[3]["status"].startswith("in trash until ")


def test_odd_neighbours_are_no_runs(x1: X1) -> None:
    begun()
    Path("runs/notes").mkdir()
    Path("runs/notes/config.yaml").write_text("x: 1")
    Path("runs/file").write_text("")
    Path("runs/dangling").symlink_to("nowhere")
    (Path("runs/.trash") / "by-hand").mkdir(parents=True)
    launched = Path("runs/launched")
    launched.mkdir()
    write_lines(launched / "ledger.jsonl", [{"seq": 1, "event": "gate", "verdict": "refused"}])
    assert {one["name"]: one["status"] for one in x1("--json").runs} == {
        "tiny": "finished",
        "launched": "only a ledger",
    }


def test_a_broken_run_is_listed_and_said(x1: X1) -> None:
    made = begun()
    (made / "manifest.json").write_text("{")
    said = x1("--json")
    assert [one["name"] for one in said.runs] == ["tiny"]
    assert "runs/tiny/manifest.json: not valid JSON" in said.err


def test_a_run_of_a_newer_x1_hides_no_other(x1: X1, disk: FolderStore) -> None:
    both(disk)
    newer = begun("newer", run_id="newer-1", mirror__uri=disk.label)
    (newer / "mirror.json").write_text(json.dumps({"schema_version": 99, "kind": "mirror-state"}))
    said = x1("--json")
    assert (said.code, {one["name"] for one in said.runs}) == (0, {"tiny", "newer"})
    assert said.err.count("runs/newer/mirror.json: schema version 99") == 1


def test_an_unforeseen_error_of_one_run_is_a_line(
    x1: X1, disk: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror_run(disk, "odd", "odd-1")
    mirror_run(disk, "tiny", RUN_ID)

    def found(store: Store, name: str, *rest: Any) -> Listed:
        return listing_of(store, name, *rest) if name == "tiny" else {}[name]  # type: ignore[no-any-return]

    listing_of = listing.of_head
    monkeypatch.setattr(listing, "of_head", found)
    started = time.monotonic()
    said = x1(disk.label, "--json")
    assert [one["name"] for one in said.runs] == ["tiny"]
    assert said.err == f"x1: {disk.label}: KeyError: 'odd'\n"
    assert time.monotonic() - started < listing.PATIENCE_S / 2


@pytest.mark.parametrize("spent", ["some", 24.9, None, {"usd": 3}])
def test_what_the_mirror_says_was_spent_may_be_no_amount(x1: X1, disk: FolderStore, spent: Any) -> None:
    both(disk, "tiny")
    mirror_run(disk, "tiny", RUN_ID, status={"spent_usd": spent})
    mirror_run(disk, "alone", "alone-1", status={"spent_usd": spent})
    assert x1().code == 0
    assert {one["name"] for one in x1("--json").runs} == {"tiny", "alone"}
    assert x1(disk.label).code == 0


def test_the_run_itself_can_be_named(x1: X1, disk: FolderStore) -> None:
    made = both(disk)
    mirror_run(disk, "other", "other-1")
    before = keys(disk)
    for named in (made, f"{disk.label}/tiny", f"file://{disk.label}/tiny"):
        assert [one["name"] for one in x1(named, "--json").runs] == ["tiny"]
    assert keys(disk) == before  # no probe of a clock in the run's own folder


def test_a_run_in_a_bucket_can_be_named(x1: X1, s3: Bucket) -> None:
    uri = f"s3://{s3.bucket}/runs"
    mirror_run(open_store(parse(uri), None), "tiny")
    assert [one["name"] for one in x1(f"{uri}/tiny", "--json").runs] == ["tiny"]


def test_help_tells_the_options_of_the_list(x1: X1) -> None:
    said = x1("--help").out
    for word in ("--mirror", "--endpoint", "--local", "--json", "[FOLDER|URI]", "restore", "gc"):
        assert word in said


@pytest.mark.slow
def test_two_hundred_runs_are_listed_soon(x1: X1, disk: FolderStore) -> None:
    made = both(disk)
    rows = [{"step": s, "tokens": s, "val/loss": 2.0, "pad": "x" * 400} for s in range(3_000)]
    write_lines(made / "metrics.jsonl", rows)
    mirrored = Path(disk.label)
    for number in range(199):
        copy = Path(f"runs/r{number}")
        shutil.copytree(made, copy, copy_function=os.link)
        shutil.copytree(mirrored / "tiny", mirrored / f"r{number}", copy_function=os.link)
    start = time.perf_counter()
    assert len(x1("--json").runs) >= 200
    assert time.perf_counter() - start < 15  # 4 s measured beside seven other processes on two cores


# ------------------------------------------------------------------------------------------------------------
# The table

listed = st.builds(
    Listed,
    name=st.text("abc-0", min_size=1, max_size=40),
    state=st.sampled_from(["running", "finished", "died", "stopped", "waiting"]),
    why=st.sampled_from(["", "by the guard: it costs too much", "its process is gone " * 4]),
    where=st.sampled_from(["here", "mirror", "both"]),
    step=st.integers(0, 10**7),
    total_steps=st.none() | st.integers(0, 10**7),
    tokens=st.integers(0, 10**13),
    val_loss=st.none() | st.floats(0, 20) | st.just("nan"),
    spent_usd=st.none() | st.just("24.803") | st.just("x"),
    good_here=st.none() | st.integers(0, 10**7),
    good_mirror=st.none() | st.integers(0, 10**7),
    bytes_here=st.none() | st.integers(0, 10**13),
    host=st.none() | st.just("a-host-with-a-rather-long-name"),
    parent=st.none() | st.just({"run_id": "x", "step": 3}),
)


@example([Listed("0" * 12, "running", step=10**7, total_steps=10**3, host="a-host-with-a-long-name")], 50)
@given(st.lists(listed, min_size=1, max_size=5), st.integers(50, 250))
def test_no_line_is_wider_than_the_terminal(runs: list[Listed], width: int) -> None:
    lines = runs_table.lines(runs, width)
    assert max(map(len, lines)) <= width
    assert len(lines) in (len(runs) + 1, len(runs) + 2)  # one row a run
    assert [line[:3] for line in lines[1 : len(runs) + 1]] == [f"{r.name:<3}"[:3] for r in runs]


def test_a_terminal_of_60_columns_leaves_out_the_least_needed() -> None:
    one = Listed("x1-50m-a100", "running", host="gpu-7", step=12_345, total_steps=19_073, val_loss=3.21)
    said = runs_table.lines([one], 60)
    assert said[0].split() == ["RUN", "STATUS", "STEP"]
    assert said[1].split("  ") == ["x1-50m-a100", "running on gpu-7", "12,345/19,073 64%"]
    assert "too narrow for: stage" not in said[2]
    assert said[2].startswith("too narrow for: ")
    assert "NOT MIRRORED" in runs_table.lines([one], None)[0]


# ------------------------------------------------------------------------------------------------------------
# rm and restore


@pytest.fixture
def desert(monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(one.relative_to(folder)): one.read_bytes() if one.is_file() else None
        for one in sorted(folder.rglob("*"))
        if one.name != "lock"
    }


def test_away_and_back_here_and_there(x1: X1, disk: FolderStore) -> None:
    made = both(disk)
    before, there = tree(made), keys(disk)
    said = x1("rm", "tiny", "--yes", "--name", "tiny")
    assert said.code == 0
    assert "finished, step 42/42 100%; it took 4 s to make" in said.out
    assert not made.exists()
    (entry,) = Path("runs/.trash").iterdir()
    assert tree(entry).keys() - before.keys() == {"trashed.json"}
    assert any(key.startswith("trash/tiny-") for key in keys(disk))
    statuses = [(one["where"], one["status"][:8]) for one in x1("--json", "--mirror", disk.label).runs]
    assert statuses == [("here", "in trash"), ("mirror", "in trash")]
    assert x1("restore", "tiny") == Said(
        0, f"{disk.label}/tiny is back\n{Path.cwd()}/runs/tiny is back\n", ""
    )
    assert (tree(made), keys(disk)) == (before, there)
    assert x1("--json").runs[0]["status"] == "finished"


def test_what_it_cost_is_said(x1: X1, disk: FolderStore) -> None:
    mirror_run(disk)
    said = x1("rm", f"file://{disk.label}/tiny", "--yes", "--name", "tiny")
    assert said.code == 0, said.err
    assert "it took $24.80 and 21 h to make" in said.out


def test_checkpoints_elsewhere_go_too_and_come_back(x1: X1, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big" / "ckpt"
    made = begun(checkpoint__dir=str(elsewhere))
    elsewhere.parent.mkdir()
    shutil.move(made / "checkpoints", elsewhere)
    (made / "checkpoints").symlink_to(elsewhere)
    before = tree(elsewhere)
    assert x1("--json").runs[0]["bytes_here"] > 3 * 1000
    said = x1("rm", "tiny", "--yes", "--name", "tiny")
    assert said.code == 0
    assert not elsewhere.exists()
    (entry,) = (elsewhere.parent / ".trash").iterdir()
    assert str(entry) in said.out
    assert x1("restore", "tiny").code == 0
    assert tree(elsewhere) == before
    assert x1("--json").runs[0]["good_here"] == 42


@pytest.mark.parametrize("why", ["strange", "another"])
def test_a_checkpoint_folder_that_is_not_the_runs_alone_stays(x1: X1, tmp_path: Path, why: str) -> None:
    elsewhere = tmp_path / "big"
    made = begun(checkpoint__dir=str(elsewhere))
    shutil.move(made / "checkpoints", elsewhere)
    if why == "strange":
        (elsewhere / "thesis.txt").write_text("three years of work")
    else:
        manifest = elsewhere / "step-000000020/manifest.json"
        manifest.write_text(manifest.read_text().replace(RUN_ID, "another-1"))
    said = x1("rm", "tiny", "--yes", "--name", "tiny")
    assert said.code == 0
    assert f"{elsewhere} stays: " in said.out
    assert (elsewhere / "step-000000042").is_dir()


def test_the_checkpoints_of_another_folder_of_the_run_stay(x1: X1, disk: FolderStore) -> None:
    """`x1 pull --only report` brings a config that names the checkpoints of the folder it was trained in."""
    made = both(disk, checkpoint__dir="runs/tiny/checkpoints")
    shutil.copytree(made, "report", ignore=lambda place, names: {"checkpoints"} & {*names})
    before = tree(made)
    said = x1("rm", "report", "--yes", "--only", "here")
    assert (said.code, Path("report").exists()) == (0, False), said.err
    assert "runs/tiny/checkpoints stays: it is of the run folder" in said.out
    assert tree(made) == before


def test_what_only_the_mirror_threw_away_comes_back_by_its_name(x1: X1, disk: FolderStore) -> None:
    both(disk)
    for run in ("tiny", "runs/tiny"):
        assert x1("rm", "tiny", "--yes", "--only", "mirror").code == 0
        assert look(disk, "tiny")[0].writer.state == "trashed"  # type: ignore[index]
        assert x1("restore", run).out == f"{disk.label}/tiny is back\n"
        assert look(disk, "tiny")[0].writer.state == "released"  # type: ignore[index]


def test_a_running_one_stays(x1: X1, disk: FolderStore) -> None:
    made = both(disk)
    lock = lock_folder(made)
    try:
        said = x1("rm", "tiny", "--yes", "--name", "tiny")
        assert said.code == 78
        assert "is training here" in said.one_line
    finally:
        lock.close()
    mirror_run(disk, "tiny", RUN_ID, who=writer(state="writing"))
    said = x1("rm", "tiny", "--yes", "--name", "tiny")
    assert said.code == 78
    assert "is being trained on gpu-7" in said.one_line
    assert made.is_dir()


def test_the_last_copy_of_a_finished_run_needs_its_name(x1: X1, disk: FolderStore) -> None:
    made = both(disk)
    for typed in ([], ["--name", "tinny"], ["--only", "here", "--name", "x", "--mirror", f"{disk.label}-2"]):
        said = x1("rm", "tiny", "--yes", *typed)
        assert (said.code, made.is_dir()) == (78, True)
        assert "no copy would be left outside the trash" in said.err
    assert x1("rm", "tiny", "--yes", "--only", "here").code == 0  # a copy stays in the mirror
    assert x1("rm", f"file://{disk.label}/tiny", "--yes").code == 78  # the last one
    assert look(disk, "tiny")[0].writer.state == "released"  # type: ignore[index]


def test_a_mirror_without_the_final_checkpoint_is_no_copy(x1: X1, disk: FolderStore) -> None:
    both(disk)
    mirror_run(disk, "tiny", RUN_ID, steps=(20,))
    assert x1("rm", "tiny", "--yes", "--only", "here").code == 78
    assert x1("rm", "tiny", "--yes", "--only", "mirror").code == 0


def test_unfinished_ones_need_no_name(x1: X1) -> None:
    begun(steps=30)
    assert x1("rm", "tiny", "--yes").code == 0


def test_a_person_types_the_name(x1: X1, monkeypatch: pytest.MonkeyPatch) -> None:
    made = begun()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "tin")
    assert (x1("rm", "tiny").code, made.is_dir()) == (78, True)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "tiny")
    assert (x1("rm", "tiny").code, made.is_dir()) == (0, False)
    assert "type its name (tiny)" in asked[0]


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("", False), ("n", False)])
def test_a_person_is_asked(x1: X1, monkeypatch: pytest.MonkeyPatch, answer: str, goes: bool) -> None:
    made = begun(steps=30)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert x1("rm", "tiny").code == (0 if goes else 78)  # as `x1 launch` ends when it is told no
    assert made.is_dir() is not goes


@pytest.mark.usefixtures("desert")
def test_without_a_terminal_nothing_goes_unasked(x1: X1) -> None:
    made = begun(steps=30)
    said = x1("rm", "tiny")
    assert (said.code, made.is_dir()) == (2, True)
    assert "add --yes" in said.err


def test_another_run_of_the_name_in_the_mirror_stays(x1: X1, disk: FolderStore) -> None:
    begun(steps=30, mirror__uri=disk.label)
    mirror_run(disk, "tiny", "somebody-else")
    said = x1("rm", "tiny", "--yes")
    assert said.code == 0
    assert "is another run of this name, and stays" in said.out
    assert look(disk, "tiny")[0].writer.state == "released"  # type: ignore[index]


def test_a_mirror_that_can_not_be_asked(x1: X1, s3: Bucket) -> None:
    made = begun(steps=30, mirror__uri="s3://no-such-bucket-here/runs")
    said = x1("rm", "tiny", "--yes")
    assert (said.code, made.is_dir()) == (78, True)
    assert "not known whether it has a copy" in said.one_line


def test_a_mirror_that_says_no_in_the_middle(x1: X1, s3: Bucket, proxy: FaultyProxy) -> None:
    uri = f"s3://{s3.bucket}/runs"
    made = begun(mirror__uri=uri)
    mirror_run(open_store(parse(uri), None), "tiny", RUN_ID)
    proxy.add("403", on="PUT", path="trash", times=9)
    said = x1("rm", "tiny", "--yes", "--name", "tiny")
    assert (said.code, made.is_dir(), said.err.count("\n")) == (1, True, 1)
    assert "nothing was moved here" in said.err
    assert "testing" not in said.err  # the key
    proxy.faults.clear()
    assert x1("rm", "tiny", "--yes", "--name", "tiny").code == 0
    proxy.add("403", on="PUT", path="head.json", times=9)
    said = x1("restore", "tiny")
    assert (said.code, made.is_dir()) == (1, True)  # what is here is back
    assert "its copy in the mirror stays in the trash" in said.err
    proxy.faults.clear()
    assert x1("restore", f"{uri}/tiny").code == 0
    assert x1("--json").runs[0]["where"] == "both"


@pytest.mark.parametrize("verb", [[], ["rm"], ["restore"], ["gc"]])
@pytest.mark.parametrize(
    ("typed", "meant"), [("s3:/bucket/r", "s3://bucket/r"), ("r2://bucket/r", "s3://bucket/r")]
)
def test_a_typo_in_an_address_is_named(x1: X1, verb: list[str], typed: str, meant: str) -> None:
    begun()
    assert f"did you mean {meant}" in x1(*verb, typed).one_line


@pytest.mark.parametrize(
    "args", [["rm", "nothing"], ["restore", "nothing"], ["rm", "x", "--only", "there"], ["gc", "no"]]
)
def test_mistakes_are_one_line(x1: X1, args: list[str]) -> None:
    said = x1(*args)
    assert said.code == 2
    assert said.one_line


def test_restored_over_nothing(x1: X1) -> None:
    made = begun(steps=30)
    x1("rm", "tiny", "--yes")
    begun(steps=20, run_id="tiny-2")
    said = x1("restore", "tiny")
    assert said.code == 78
    assert "runs/tiny: is there already" in said.one_line
    x1("rm", "tiny", "--yes")
    said = x1("restore", "tiny")
    assert json.loads((made / "manifest.json").read_text())["run_id"] == "tiny-2"
    assert "an older one of this name stays in the trash: tiny-" in said.out


def test_a_link_to_a_run_stays(x1: X1, tmp_path: Path) -> None:
    made = begun(steps=30)
    shutil.move(made, tmp_path / "real")
    made.symlink_to(tmp_path / "real")
    said = x1("rm", "tiny", "--yes")
    assert said.code == 78
    assert "is a link to" in said.err


# ------------------------------------------------------------------------------------------------------------
# What rm must not take for granted


def test_a_stale_folder_here_is_no_copy_of_what_only_the_mirror_has(x1: X1, disk: FolderStore) -> None:
    made = both(disk, steps=20)  # the run went on elsewhere and finished there, at 42
    said = x1("rm", "tiny", "--yes", "--only", "mirror")
    assert said.code == 78
    assert "no copy would be left outside the trash" in said.err
    assert f"stays: {made}" not in said.out
    assert look(disk, "tiny")[0].writer.state == "released"  # type: ignore[index]


def test_finished_and_its_lease_never_given_back(x1: X1, disk: FolderStore) -> None:
    mirror_run(disk, who=writer(state="writing", stale_s=-1.0))
    said = x1("rm", f"file://{disk.label}/tiny", "--yes")
    assert said.code == 78
    assert "no copy would be left outside the trash" in said.err


@pytest.mark.parametrize("known", [False, True])
def test_a_folder_without_a_manifest(x1: X1, disk: FolderStore, known: bool) -> None:
    """The mirror's run of its name is its own only if its mirror.json says so."""
    made = both(disk, steps=30)
    (made / "manifest.json").unlink()
    if not known:
        (made / "mirror.json").unlink()
        said = x1("rm", "tiny", "--yes", "--only", "mirror")
        assert (said.code, said.err.count("\n")) == (2, 1)
        assert "is another run of this name" in said.err
    said = x1("rm", "tiny", "--yes", "--name", "tiny")
    assert (said.code, made.exists()) == (0, False)
    assert ("is another run of this name" in said.out) is not known
    assert look(disk, "tiny")[0].writer.state == ("trashed" if known else "released")  # type: ignore[index]


def elsewhere(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A mirror that only its endpoint finds, as that of a store which is not Amazon's."""
    uri = f"s3://{s3.bucket}/runs"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("x1_pretrain.runs.listing.look_at.__defaults__", (2.0,))
    return uri, s3.url


def test_children_are_looked_for_at_the_endpoint_of_the_config(
    x1: X1, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, endpoint = elsewhere(s3, monkeypatch)
    store = open_store(parse(uri), endpoint)
    made = begun(steps=30, mirror={"uri": uri, "endpoint": endpoint})
    mirror_run(store, "tiny", RUN_ID, status={"state": "interrupted"})
    child = {"run_id": RUN_ID, "step": 20, "checkpoint": "/x", "trunk": RUN_ID}
    mirror_run(store, "child", "child-1", status={"parent": child})
    said = x1("rm", "tiny", "--yes")
    assert (said.code, made.is_dir()) == (78, True)
    assert f"other runs began from it ({uri}/child)" in said.one_line
    assert x1("rm", f"{uri}/tiny", "--yes", "--endpoint", endpoint, "--name", "tiny").code == 78
    assert x1("rm", f"{uri}/child", "--yes", "--endpoint", endpoint, "--name", "child").code == 0
    restored = x1("restore", f"{uri}/child", "--endpoint", endpoint)
    assert restored.code == 0, restored.err


def test_whoever_may_know_of_children_must_answer(x1: X1, s3: Bucket) -> None:
    made = begun(steps=30)
    begun("other", run_id="other-1", mirror__uri="s3://no-such-bucket-here/runs")
    said = x1("rm", "tiny", "--yes")
    assert (said.code, made.is_dir()) == (78, True)
    assert "not known whether other runs began from it" in said.one_line
    assert "s3://no-such-bucket-here" in said.err
    assert x1("rm", "tiny", "--yes", "--only", "here").code == 0
    assert not made.exists()


def test_a_link_is_refused_before_anything_moves(x1: X1, disk: FolderStore, tmp_path: Path) -> None:
    made = both(disk)
    shutil.move(made, tmp_path / "real")
    made.symlink_to(tmp_path / "real")
    before = keys(disk)
    assert x1("rm", "tiny", "--yes", "--name", "tiny").code == 78
    assert keys(disk) == before
    assert look(disk, "tiny")[0].writer.state == "released"  # type: ignore[index]


def test_only_here_needs_no_mirror(x1: X1, disk: FolderStore, s3: Bucket) -> None:
    made = begun("away", steps=30, mirror__uri="s3://no-such-bucket-here/runs")
    said = x1("rm", "away", "--yes", "--only", "here")
    assert (said.code, made.exists()) == (0, False), said.err
    assert "not known whether s3://no-such-bucket-here/runs has a copy" in said.out
    done = begun("done", run_id="done-1", mirror__uri="s3://no-such-bucket-here/runs")
    assert (x1("rm", "done", "--yes", "--only", "here").code, done.is_dir()) == (78, True)  # the last known
    shutil.rmtree(done)
    stale = both(disk, steps=20)  # while the run trains elsewhere
    mirror_run(disk, "tiny", RUN_ID, who=writer(state="writing"), status={"state": "running"})
    said = x1("rm", "tiny", "--yes", "--only", "here")
    assert (said.code, stale.exists()) == (0, False), said.err
    assert look(disk, "tiny")[0].writer.state == "writing"  # type: ignore[index]


@pytest.mark.parametrize(
    "where", ["here", "another folder", "the mirror", "a path", "a mirror that was named"]
)
def test_what_it_says_brings_it_back(x1: X1, disk: FolderStore, where: str) -> None:
    if where == "here":
        both(disk)
        said = x1("rm", "tiny", "--yes", "--name", "tiny")
    elif where == "another folder":
        both(disk)
        shutil.move("runs", "old runs")
        said = x1("rm", "old runs/tiny", "--yes", "--name", "tiny")
    elif where == "the mirror":
        mirror_run(disk)
        said = x1("rm", f"file://{disk.label}/tiny", "--yes", "--name", "tiny")
    elif where == "a path":
        mirror_run(disk)
        said = x1("rm", f"{disk.label}/tiny", "--yes", "--name", "tiny")
        assert x1("rm", f"{disk.label}/tiny", "--yes", "--name", "tiny").code == 2  # it is not there any more
    else:
        begun()
        mirror_run(disk, "tiny", RUN_ID)
        said = x1("rm", "tiny", "--yes", "--name", "tiny", "--mirror", disk.label)
    assert said.code == 0, said.err
    command = said.out.splitlines()[-1].split("`")[1]
    assert command.startswith("x1 runs restore ")
    if where == "here":
        assert command == "x1 runs restore tiny"
    restored = x1(*shlex.split(command)[2:])
    assert restored.code == 0, restored.err
    assert look(disk, "tiny")[0].writer.state == "released"  # type: ignore[index]
    folders = {"here": "runs", "another folder": "old runs", "a mirror that was named": "runs"}
    if where in folders:
        assert (Path(folders[where]) / "tiny/config.yaml").is_file()


def test_what_a_lost_lease_set_aside_is_the_runs_own(x1: X1, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big"
    made = begun(steps=30, checkpoint__dir=str(elsewhere))
    shutil.move(made / "checkpoints", elsewhere)
    (elsewhere / "step-000000020").rename(elsewhere / "lost-e0003-step-000000020")
    (elsewhere / "step-000000000").rename(elsewhere / "lost-e0003-2-step-000000000")
    said = x1("rm", "tiny", "--yes")
    assert said.code == 0, said.err
    assert not elsewhere.exists()


# ------------------------------------------------------------------------------------------------------------
# gc


def test_gc_is_a_dry_run_until_told(x1: X1, disk: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    both(disk)
    begun("young", steps=30, run_id="young-1")
    x1("rm", "tiny", "--yes", "--name", "tiny")
    assert "nothing in the trash is older than 7d" in x1("gc", "--mirror", disk.label).out
    note = next(Path("runs/.trash").glob("tiny-*/trashed.json"))
    note.write_text(_aged(note))
    x1("rm", "young", "--yes")
    before, there = tree(Path("runs")), keys(disk)
    said = x1("gc", "--mirror", disk.label)
    assert said.code == 0
    assert "nothing was deleted: add --yes" in said.out
    assert "young" not in said.out
    bytes_ = sum(file.lstat().st_size for file in note.parent.rglob("*") if not file.is_dir())
    assert f"  {size(bytes_)}  step 42/42 100%, made for 4 s" in said.out
    assert f"{size(bytes_)} would be freed" in said.out
    assert (tree(Path("runs")), keys(disk)) == (before, there)
    assert x1("gc", "--yes").code == 0
    assert [one.name[:5] for one in Path("runs/.trash").iterdir()] == ["young"]
    assert any("e0001" in key for key in keys(disk))  # young there: by the store's clock
    assert x1("gc", "--yes", "--older-than", "0s", "--mirror", disk.label).code == 0
    assert keys(disk) == {"tiny/head.json"}
    assert list(Path("runs/.trash").iterdir()) == []


def _aged(note: Path) -> str:
    tree = json.loads(note.read_text())
    return json.dumps(tree | {"trashed_utc": "2020-01-01T00:00:00Z"})


def test_gc_frees_corpora_that_no_run_names(x1: X1, disk: FolderStore, s3: Bucket) -> None:
    """With what they cost a month where somebody bills for them."""
    there = open_store(parse(f"s3://{s3.bucket}/corpora"), None)
    for store in (disk, there):
        mirror_run(store, data={"web": "a" * 64})
        for mark in ("a" * 64, "b" * 64):
            store.put(f"data/{mark}/train.bin", b"x" * 3000)
        before = keys(store)
        assert "corpus" not in x1("gc", store.label).out
        said = x1("gc", store.label, "--older-than", "0s")
        assert said.code == 0
        cost = "" if store is disk else ", of no known price"
        assert f"{store.label}/data/{'b' * 64}  3 kB  corpus that no run names{cost}\n" in said.out
        assert "3 kB would be freed; nothing was deleted: add --yes" in said.out
        assert keys(store) == before
        assert x1("gc", store.label, "--older-than", "0s", "--yes").out.endswith("3 kB freed\n")
        assert before - keys(store) == {f"data/{'b' * 64}/train.bin"}


def test_gc_frees_a_corpus_with_the_last_run_that_named_it(x1: X1, disk: FolderStore) -> None:
    mirror_run(disk, data={"web": "a" * 64})
    disk.put(f"data/{'a' * 64}/train.bin", b"x" * 3000)
    x1("rm", f"{disk.label}/tiny", "--yes", "--name", "tiny")
    assert "corpus" not in x1("gc", disk.label).out
    assert "corpus that no run names" in x1("gc", disk.label, "--older-than", "0s").out
    x1("gc", disk.label, "--older-than", "0s", "--yes")
    assert keys(disk) == {"tiny/head.json"}


@pytest.mark.parametrize(
    ("uri", "gib", "said"),
    [
        ("s3://bucket/runs", 12, ", $0.28 a month"),
        ("s3://bucket/runs", 0.1, ", under $0.01 a month"),
        ("hf://user/runs", 12, ", $0.23 a month; billed until its history is squashed"),
        ("/disk2/runs", 12, ""),
    ],
)
def test_what_a_corpus_costs_a_month(
    uri: str, gib: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    place = listing.Place(parse(uri))
    assert emptying._a_month(place, OldCorpus("data/a", (), int(gib * 2**30))) == said


def test_gc_touches_only_what_rm_put_there(x1: X1) -> None:
    mine = Path("runs/.trash/mine")
    mine.mkdir(parents=True)
    (mine / "work").write_text("x")
    broken = Path("runs/.trash/tiny-20200101T000000Z")
    broken.mkdir()
    (broken / "trashed.json").write_text("{")
    x1("gc", "--yes", "--older-than", "0s")
    assert (mine / "work").exists()
    assert broken.exists()


def test_gc_finishes_what_was_killed(x1: X1) -> None:
    half = Path("runs/.trash/.removing-tiny-20200101T000000Z/checkpoints")
    half.mkdir(parents=True)
    x1("gc")
    assert half.exists()
    x1("gc", "--yes")
    assert not half.parent.exists()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_gc_killed_at_any_time_is_finished_by_the_next(
    x1: X1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """With checkpoints on another disk: of both trashes nothing stays, and half a run never comes back."""
    elsewhere = tmp_path / "big" / "ckpt"
    made = begun(steps=30, checkpoint__dir=str(elsewhere))
    elsewhere.parent.mkdir()
    shutil.move(made / "checkpoints", elsewhere)
    x1("rm", "tiny", "--yes")
    calls, remove = 0, trash._remove

    def dying(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                if plain is remove:  # in the middle of it
                    next(args[0].rglob("*.json")).unlink()
                raise KeyboardInterrupt
            return plain(*args, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(trash, "_rename", dying(trash._rename))
        patch.setattr(trash, "_remove", dying(trash._remove))
        assert x1("gc", "--yes", "--older-than", "0s").code == 130
    if at > 1:
        assert x1("restore", "tiny").code == 2
        assert "half deleted" in x1("gc", "--older-than", "0s").out
    assert x1("gc", "--yes", "--older-than", "0s").code == 0
    assert list(Path("runs/.trash").iterdir()) == []
    assert list((elsewhere.parent / ".trash").iterdir()) == []


def test_gc_without_the_stores_clock_says_so(
    x1: X1, disk: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that may not write can't ask what time it is there."""
    mirror_run(disk)
    monkeypatch.setattr(FolderStore, "now", lambda self: None)
    said = x1("gc", "--mirror", disk.label)
    assert said.code == 1
    assert f"x1: {disk.label}: does not say what time it is there" in said.err


@pytest.mark.parametrize("text", ["7", "7 ", "x", "-1d", "1w"])
def test_an_age_is_a_time(x1: X1, text: str) -> None:
    assert "--older-than" in x1("gc", f"--older-than={text}").one_line
