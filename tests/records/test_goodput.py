"""Goodput: a made-up history of seconds, written as records, comes out again part by part."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.records.builder import TOKENS_PER_STEP, build_run, write_lines

from x1_pretrain.money.clock import Clock
from x1_pretrain.records import goodput as g
from x1_pretrain.records.run_folder import open_run

BEGIN = datetime(2026, 11, 21, 10, tzinfo=UTC).timestamp()


def utc(second: float) -> str:
    moment = datetime.fromtimestamp(BEGIN + second, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class History:
    """Writes what a loop writes while its time passes; keeps the truth beside it."""

    folder: Path
    now: float = 0.0
    session: int = 0
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    lost: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"metrics": [], "steps": []})
    phases: dict[str, float] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=lambda: dict.fromkeys(g.PARTS, 0.0))

    def open(self, start_s: float) -> None:
        """A session begins `start_s` before its first step is done; the first event comes halfway."""
        self.session += 1
        self.phases = dict.fromkeys(("start", "wait", "step", "evaluation", "checkpoint", "other"), 0.0)
        self.now += start_s / 2
        self.event("resume" if self.session > 1 else "start")
        self.now += start_s / 2
        self.phases["start"] += start_s
        self.truth[g.START] += start_s
        self.step += 1
        self.steps.append(self.place() | {"step_s": start_s / 3, "wait_s": 0.0})

    def place(self) -> dict[str, Any]:
        return {"step": self.step, "time_utc": utc(self.now), "session": self.session}

    def event(self, name: str, **more: Any) -> None:
        self.events.append(self.place() | {"event": name, "message": name} | more)

    def spend(self, phase: str, part: str, seconds: float) -> None:
        self.now += seconds
        self.phases[phase] += seconds
        self.truth[part] += seconds

    def one_step(self, step_s: float, wait_s: float) -> None:
        self.step += 1
        self.spend("wait", g.WAIT, wait_s)
        self.spend("step", g.STEP, step_s)
        self.steps.append(self.place() | {"step_s": step_s + wait_s, "wait_s": wait_s})

    def log(self) -> None:
        times = {f"time/{phase}_s": seconds for phase, seconds in self.phases.items()}
        tokens = self.step * TOKENS_PER_STEP
        self.rows.append(self.place() | {"tokens": tokens, "train/loss": 3.0} | times)

    def go_back(self, step: int) -> None:
        """The records after `step` are set aside; their steps were of no use."""
        for name, rows in (("metrics", self.rows), ("steps", self.steps)):
            self.lost[name] += [row for row in rows if row["step"] > step]
            rows[:] = [row for row in rows if row["step"] <= step]
        self.step = step

    def write(self) -> None:
        build_run(self.folder)
        write_lines(self.folder / "metrics.jsonl", self.rows)
        write_lines(self.folder / "steps.jsonl", self.steps)
        write_lines(self.folder / "events.jsonl", self.events)
        for name, rows in self.lost.items():
            if rows:
                write_lines(self.folder / f"{name}.superseded.jsonl", rows)

    def found(self) -> g.Goodput:
        self.write()
        return g.goodput(open_run(self.folder))


def parts(found: g.Goodput) -> dict[str, float]:
    return {part.name: part.seconds for part in found.parts}


def expect(found: g.Goodput, truth: dict[str, float]) -> None:
    there = parts(found)
    for name, seconds in truth.items():
        assert there.get(name, 0.0) == pytest.approx(seconds, abs=0.01), name
    assert sum(there.values()) == pytest.approx(found.paid_s)
    assert found.paid_s == pytest.approx(sum(truth.values()), rel=0.01)


def two_sessions(folder: Path) -> History:
    """40 steps, killed at 37 with a checkpoint of 30: seven of them are done again after a pause."""
    told = History(folder)
    told.open(30.0)
    for step in range(2, 38):
        told.one_step(2.0, 0.1)
        if step % 5 == 0:
            told.spend("other", g.OTHER, 0.2)
            told.log()
        if step % 10 == 0:
            told.spend("evaluation", g.EVALUATION, 4.0)
            told.spend("checkpoint", g.CHECKPOINT, 1.5)
            told.event("checkpoint", seconds=1.5)
    told.go_back(30)
    told.truth[g.STEP] -= 7 * 2.0
    told.truth[g.TWICE] += 7 * 2.0
    told.now += 100.0
    told.truth[g.BETWEEN] += 100.0
    told.open(20.0)
    while told.step < 40:
        told.one_step(2.0, 0.1)
    told.log()
    told.spend("checkpoint", g.CHECKPOINT, 1.5)  # after the last row: only the event tells of it
    told.event("checkpoint", seconds=1.5)
    told.spend("other", g.OTHER, 0.5)
    told.event("finish")
    return told


def test_every_second_is_in_its_part(tmp_path: Path) -> None:
    told = two_sessions(tmp_path / "run")
    found = told.found()
    expect(found, told.truth)
    assert found.useful_s == pytest.approx(told.truth[g.STEP])
    assert found.share == pytest.approx(told.truth[g.STEP] / sum(told.truth.values()))
    assert [part.name for part in found.parts if part.useful] == [g.STEP]
    assert all(part.usd is None for part in found.parts)
    assert "no machine in a ledger" in found.note
    assert "not measured" not in found.note


def test_rows_set_aside_twice_count_once(tmp_path: Path) -> None:
    """A kill between the copy and the cut leaves a row there twice."""
    told = two_sessions(tmp_path / "run")
    told.lost["steps"] *= 2
    told.lost["metrics"] *= 2
    expect(told.found(), told.truth)


def test_steps_done_again_within_one_session(tmp_path: Path) -> None:
    told = History(tmp_path / "run")
    told.open(3.0)
    for _ in range(9):
        told.one_step(1.0, 0.0)
    told.log()
    told.go_back(4)
    for _ in range(6):
        told.one_step(1.0, 0.0)
    told.log()
    told.truth[g.STEP] -= 6
    told.truth[g.TWICE] += 6
    expect(told.found(), told.truth)


def test_a_session_without_a_row_of_metrics(tmp_path: Path) -> None:
    told = History(tmp_path / "run")
    told.open(40.0)
    for _ in range(5):
        told.one_step(1.0, 0.25)
    told.truth[g.START] -= 20.0  # before its first event nothing tells of it
    expect(told.found(), told.truth)


def test_back_to_before_the_session_began(tmp_path: Path) -> None:
    """Its first step too is done again; what that took to compile was counted with the start."""
    told = History(tmp_path / "run")
    told.open(9.0)
    for _ in range(4):
        told.one_step(1.0, 0.0)
    told.log()
    told.go_back(0)
    for _ in range(6):
        told.one_step(1.0, 0.0)
    told.log()
    told.truth[g.STEP] -= 4
    told.truth[g.TWICE] += 4
    expect(told.found(), told.truth)


machine_gone = {"tag": "x1-a", "provider": "lambda", "machine_id": "m-1"}


def ledger(folder: Path, since: float, ended: float | None, usd: str = "3.60") -> None:
    rows: list[dict[str, Any]] = [
        {"event": "intent", "time_utc": utc(since), "usd_per_hr": "1.20"} | machine_gone,
        {"event": "launched", "time_utc": utc(since + 5)} | machine_gone,
        {"event": "poll", "time_utc": utc(since + 50), "machine_usd": usd, "usd_per_hr": "1.20"}
        | machine_gone,
    ]
    if ended is not None:
        end = {"event": "terminate_confirmed", "time_utc": utc(ended), "billed_usd": usd}
        rows.append(end | machine_gone)
    lines = [json.dumps({"seq": number} | row) for number, row in enumerate(rows, start=1)]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")


def test_a_rented_machine_is_paid_before_and_after(tmp_path: Path) -> None:
    told = two_sessions(tmp_path / "run")
    told.write()
    ledger(told.folder, -90.0, told.now + 60.0)
    told.truth |= {g.BEFORE: 90.0, g.AFTER: 60.0}
    found = g.goodput(open_run(told.folder))
    expect(found, told.truth)
    assert found.paid_s == pytest.approx(told.now + 150.0)  # exactly the machine's time
    amounts = [part.usd for part in found.parts if part.usd is not None]
    spent = 3.60 + 1.20 * (told.now + 60.0 + 90.0 - 50.0) / 3600  # the poll's, and from there at the rate
    assert float(sum(amounts)) == pytest.approx(spent, abs=0.001)
    of_steps = next(part.usd for part in found.parts if part.name == g.STEP)
    assert isinstance(of_steps, Decimal)
    assert float(of_steps) == pytest.approx(spent * told.truth[g.STEP] / found.paid_s, abs=1e-3)


def test_an_open_machine_is_counted_so_far(tmp_path: Path) -> None:
    told = two_sessions(tmp_path / "run")
    told.write()
    ledger(told.folder, -90.0, None)
    found = g.goodput(open_run(told.folder))
    expect(found, told.truth | {g.BEFORE: 90.0})
    assert "by now" in found.note


def test_two_machines_are_not_paid_between(tmp_path: Path) -> None:
    """The first ended in the pause: only what it stood there for was paid."""
    told = two_sessions(tmp_path / "run")
    told.write()
    pause = next(e for e in told.events if e["event"] == "resume")
    opened = datetime.fromisoformat(pause["time_utc"]).timestamp() - BEGIN - 10.0
    ledger(told.folder, -10.0, opened - 80.0)
    second = {"tag": "x1-b", "provider": "lambda", "machine_id": "m-2"}
    more = [
        {"seq": 9, "event": "intent", "time_utc": utc(opened - 30.0), "usd_per_hr": "1.20"} | second,
        {"seq": 10, "event": "launched", "time_utc": utc(opened - 29.0)} | second,
        {"seq": 11, "event": "terminate_confirmed", "time_utc": utc(told.now)} | second,
    ]
    with (told.folder / "ledger.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in more)
    expect(
        g.goodput(open_run(told.folder)),
        told.truth | {g.BETWEEN: 0.0, g.BEFORE: 10.0 + 30.0, g.AFTER: 20.0},
    )


def test_a_ledger_of_another_time_is_said(tmp_path: Path) -> None:
    told = two_sessions(tmp_path / "run")
    told.write()
    ledger(told.folder, -90_000.0, -80_000.0)
    found = g.goodput(open_run(told.folder))
    expect(found, told.truth)
    assert "do not fit" in found.note
    assert sum(part.usd or 0 for part in found.parts) > 3


def test_a_session_on_no_paid_machine_is_left_out(tmp_path: Path) -> None:
    """At home first, then rented: the rental's dollars are of the rental's seconds alone."""
    told = two_sessions(tmp_path / "run")
    told.write()
    opened = next(row for row in told.events if row["event"] == "resume")
    begun = g.at(opened) - BEGIN - 10.0  # its first event comes halfway through a start of 20 s
    ledger(told.folder, begun - 5.0, told.now + 15.0)
    found = g.goodput(open_run(told.folder))
    rented = told.now - begun
    assert found.paid_s == pytest.approx(rented + 20.0)
    there = parts(found)
    assert (there[g.BEFORE], there[g.AFTER]) == (pytest.approx(5.0), pytest.approx(15.0))
    assert there[g.START] == pytest.approx(20.0)
    assert found.useful_s == pytest.approx(2.0 * 9, abs=0.01)  # nine steps after the one that compiles
    assert float(sum(part.usd or 0 for part in found.parts)) == pytest.approx(3.60, abs=0.01)
    assert "paid: 1 machine in ledger.jsonl; 1 session on none of them left out" in found.note


def test_a_rehearsed_ledger_is_read_by_its_clock(tmp_path: Path) -> None:
    """60 times as fast: an hour of the ledger was a minute of the run."""
    told = two_sessions(tmp_path / "run")
    told.write()
    ledger(told.folder, 60 * -90.0, 60 * (told.now + 60.0))
    found = g.goodput(open_run(told.folder), Clock(60.0, BEGIN))
    expect(found, told.truth | {g.BEFORE: 90.0, g.AFTER: 60.0})
    text = (told.folder / "ledger.jsonl").read_text().replace('"lambda"', '"fake"')
    (told.folder / "ledger.jsonl").write_text(text)
    expect(g.goodput(open_run(told.folder)), told.truth)  # without that clock its times say nothing


def test_a_machine_of_ones_own_costs_only_while_it_works(tmp_path: Path) -> None:
    told = two_sessions(tmp_path / "run")
    told.write()
    row = {"seq": 1, "event": "adopted", "time_utc": utc(0), "usd_per_hr": "0.5", "bills_idle": False}
    row |= {"tag": "here", "provider": "local", "machine_id": "here"}
    (told.folder / "ledger.jsonl").write_text(json.dumps(row) + "\n")
    expect(g.goodput(open_run(told.folder)), told.truth | {g.BETWEEN: 0.0})


def test_an_older_run_is_measured_by_its_speed(tmp_path: Path) -> None:
    """No time columns: 64 tokens a step at 32 tokens a second are 2 s a step, a tenth of it waiting."""
    folder = build_run(tmp_path / "run")
    rows = [
        {"step": step, "session": 1, "time_utc": utc(10 + 2 * step), "tokens": 64 * step, "train/loss": 3.0}
        | {"tokens_per_sec": 32.0, "data/wait_share": 0.1}
        for step in range(5, 45, 5)
    ]
    events = [{"event": "start", "step": 0, "session": 1, "time_utc": utc(0)}]
    events += [{"event": "finish", "step": 40, "session": 1, "time_utc": utc(95)}]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "events.jsonl", events)
    found = g.goodput(open_run(folder))
    steps = 39 * 2.0  # the first compiles: it is in the start
    expect(found, {g.STEP: 0.9 * steps, g.WAIT: 0.1 * steps, g.START: 12.0, g.OTHER: 5.0})
    assert "not measured" in found.note


def test_nothing_yet(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).write_text("")
    found = g.goodput(open_run(folder))
    assert (found.parts, found.paid_s, found.share) == ([], 0.0, None)
    assert found.note == "not measured: the run has no records yet"


json_value = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(-5, 50), st.text(max_size=5))
ODD = ("step", "session", "event", "time/step_s", "time/wait_s", "step_s", "seconds", "tokens_per_sec")
odd_row = st.dictionaries(
    st.sampled_from((*ODD, "train/loss", "data/wait_share")),
    json_value,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(odd_row, max_size=6), min_size=5, max_size=5),
    when=st.lists(st.integers(0, 100), min_size=30, max_size=30),
)
def test_odd_records_never_break_the_sum(tmp_path: Path, files: list[list[Any]], when: list[int]) -> None:
    """Whatever the records hold, the parts are not negative and sum to what was paid."""
    folder = tmp_path / "run"
    if not folder.exists():
        build_run(folder)
    names = ("metrics", "metrics.superseded", "steps", "steps.superseded", "events")
    seconds = iter(when)
    for name, rows in zip(names, files, strict=True):
        write_lines(folder / f"{name}.jsonl", [row | {"time_utc": utc(next(seconds))} for row in rows])
    found = g.goodput(open_run(folder))
    assert all(part.seconds >= 0 for part in found.parts)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.paid_s)
    assert found.useful_s <= found.paid_s or found.useful_s == pytest.approx(found.paid_s)
