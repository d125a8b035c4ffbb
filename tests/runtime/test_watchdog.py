"""No progress is noticed, by an injected clock and in real processes; one that was stopped is not hung."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.config import WatchdogConfig
from x1_pretrain.records.processes import is_alive, started
from x1_pretrain.runtime.crash import crash_report
from x1_pretrain.runtime.watchdog import AT_REST, Hang, Watchdog, counted_s, limit_s

LIMITS = WatchdogConfig(
    first_step_s=1000, step_s=100, data_s=30, evaluation_s=200, checkpoint_s=300, save_s=0.5
)
REPOSITORY = Path(__file__).resolve().parents[2]


class Clock:
    """A clock that a test moves; also one that a test sets back."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def dog(folder: Path, clock: Clock, rank: int = 0) -> SimpleNamespace:
    """A watchdog without its thread: `run(seconds)` is that much time in looks of a second."""
    hangs: list[Hang] = []
    exits: list[int] = []
    made = Watchdog(folder, rank, LIMITS, hangs.append, clock, exit_process=exits.append)

    def run(seconds: int) -> None:
        for _ in range(seconds):
            clock.now += 1
            if not exits:
                made.look()

    return SimpleNamespace(dog=made, run=run, hangs=hangs, exits=exits)


def test_each_phase_has_its_limit(tmp_path: Path) -> None:
    expected = {"data": 30, "step": 100, "update": 100, "evaluation": 200, "sampling": 200, "checkpoint": 300}
    for phase, limit in expected.items():
        it = dog(tmp_path, Clock())
        it.dog.enter("update", 1)
        it.dog.enter(phase, 1)
        it.run(limit)
        assert not it.hangs
        it.run(3)
        assert it.exits == [75]
        (hang,) = it.hangs
        assert (hang.phase, hang.step, hang.limit_s) == (phase, 1, limit)
        assert hang.at_rest == (phase not in ("update", "checkpoint"))


def test_until_the_first_update_there_is_time_to_compile(tmp_path: Path) -> None:
    it = dog(tmp_path, Clock())
    it.run(500)
    it.dog.enter("data", 7)
    it.run(900)
    it.dog.enter("step", 7)
    it.run(900)
    assert not it.exits
    it.run(200)
    assert it.exits == [75]


def test_progress_and_beats_start_the_time_anew(tmp_path: Path) -> None:
    it = dog(tmp_path, Clock())
    it.dog.enter("update", 1)
    for step in range(20):
        it.dog.enter("step", step)
        it.run(90)
        it.dog.beat()
        it.run(90)
    assert not it.exits


def test_a_loop_that_comes_back_is_not_let_in_while_it_is_being_saved(tmp_path: Path) -> None:
    it = dog(tmp_path, Clock())
    it.dog.enter("update", 1)
    it.dog.enter("step", 1)
    it.run(102)
    came_back = threading.Event()

    def loop() -> None:
        it.dog.enter("update", 1)
        came_back.set()

    threading.Thread(target=loop, daemon=True).start()
    assert it.dog._hung
    assert not came_back.wait(0.2)
    it.dog._hung = False  # let the thread go
    assert came_back.wait(60)


def impatient(made: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for with a limit is not waited for."""
    thread = made._thread
    assert thread is not None
    join = thread.join
    monkeypatch.setattr(thread, "join", lambda timeout=None: join(timeout and 0.01))


def test_a_loop_that_fails_while_it_is_being_saved_does_not_end_the_process_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hung raised in the end: whoever closes waits until the checkpoint is there."""
    saving, saved, closed = threading.Event(), threading.Event(), threading.Event()

    def on_hang(_: Hang) -> None:
        saving.set()
        assert saved.wait(60)

    limits = LIMITS.model_copy(update={"first_step_s": 0.1, "data_s": 0.1, "save_s": 60.0})
    made = Watchdog(tmp_path, 0, limits, on_hang, tick_s=0.05, exit_process=lambda _: None)

    def loop() -> None:
        made.close()
        closed.set()

    made.enter("data", 1)
    made.start()
    impatient(made, monkeypatch)
    assert saving.wait(60)
    threading.Thread(target=loop, daemon=True).start()
    assert not closed.wait(0.3)
    saved.set()
    assert closed.wait(60)


def test_a_look_that_hangs_keeps_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another file's as soon as it is closed."""
    looking, free = threading.Event(), threading.Event()
    made = Watchdog(tmp_path, 0, LIMITS, tick_s=0.05)

    def look() -> None:
        looking.set()
        assert free.wait(60)

    monkeypatch.setattr(made, "look", look)
    made.start()
    impatient(made, monkeypatch)
    assert looking.wait(60)
    made.close()
    os.close(made._spool)
    free.set()


def test_a_loop_that_moves_on_at_the_last_moment_is_not_hung(tmp_path: Path) -> None:
    it = dog(tmp_path, Clock())
    it.dog.enter("update", 1)
    it.dog.enter("step", 1)
    seen = it.dog._mark
    it.dog.enter("update", 1)
    assert not it.dog._condemn(seen)
    it.dog.enter("step", 2)  # does not park


@given(st.floats(0, 1e5), st.sampled_from([0.1, 1.0]))
def test_only_time_in_which_it_ran_counts(between: float, tick: float) -> None:
    counted, away = counted_s(between, tick)
    assert counted <= 2 * tick
    assert counted <= between
    assert (away > 0) == (between - tick > 3)
    assert away == 0 or away == pytest.approx(between - tick)


def test_a_pause_is_no_hang_and_is_told(tmp_path: Path) -> None:
    clock = Clock()
    it = dog(tmp_path, clock)
    it.dog.enter("update", 1)
    it.dog.enter("data", 1)
    it.run(20)
    clock.now += 3600
    it.run(5)
    assert not it.exits
    (seconds,) = it.dog.news()
    assert seconds == pytest.approx(3600, abs=2)
    assert it.dog.news() == []
    it.run(30)
    assert it.exits == [75]  # and a hang after it is still one


def test_a_clock_that_is_set_back_does_nothing(tmp_path: Path) -> None:
    clock = Clock()
    it = dog(tmp_path, clock)
    it.dog.enter("update", 1)
    it.dog.enter("data", 1)
    it.run(10)
    clock.now -= 1e6
    it.run(10)
    assert not it.exits
    assert it.dog.news() == []


def test_limits_are_never_shorter_before_the_first_update() -> None:
    for phase in (
        "start",
        "data",
        "step",
        "update",
        "evaluation",
        "sampling",
        "checkpoint",
        "leaving",
        "other",
    ):
        assert limit_s(phase, LIMITS, warm=False) >= max(1000, limit_s(phase, LIMITS, warm=True))
    assert frozenset({"data", "step", "evaluation", "sampling", "other"}) == AT_REST


def test_the_stacks_are_in_the_folder_with_where_it_stood(tmp_path: Path) -> None:
    it = dog(tmp_path, Clock(), rank=3)
    it.dog._limits = LIMITS.model_copy(update={"save_s": 0.1})
    it.dog.enter("update", 41)
    it.dog.enter("data", 42)

    there, stop = threading.Event(), threading.Event()

    def waiting_for_godot() -> None:
        there.set()
        stop.wait()

    thread = threading.Thread(target=waiting_for_godot, name="godot")
    thread.start()
    assert there.wait(60)
    it.run(32)
    stop.set()
    (hang,) = it.hangs
    assert hang.path is not None
    assert re.fullmatch(r"hang-rank3-\d{8}T\d{12}Z\.txt", hang.path.name)
    text = hang.path.read_text()
    assert "no progress for 31 s in phase data at step 42 (limit 30 s)" in text
    for word in ("rank 3", f"process {os.getpid()} on", "torch", "Python 3", "waiting_for_godot", "godot"):
        assert word in text, word


def test_a_folder_that_is_gone_puts_the_stacks_on_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    it = dog(tmp_path / "absent", Clock())
    it.dog.enter("update", 1)
    it.dog.enter("data", 1)
    it.run(32)
    assert it.exits == [75]
    assert it.hangs[0].path is None
    err = capfd.readouterr().err
    assert "can't be written (No such file or directory)" in err
    assert "test_a_folder_that_is_gone" in err


@pytest.mark.parametrize("trouble", ["raises", "never returns"])
def test_what_goes_wrong_while_saving_does_not_keep_it(
    trouble: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    release = threading.Event()

    def on_hang(_: Hang) -> None:
        if trouble == "raises":
            raise ValueError("no room")
        release.wait(60)

    it = dog(tmp_path, Clock())
    it.dog._limits = LIMITS.model_copy(update={"save_s": 60.0 if trouble == "raises" else 0.1})
    it.dog.on_hang = on_hang
    it.dog.enter("update", 1)
    it.dog.enter("data", 1)
    it.run(32)
    release.set()
    assert it.exits == [75]
    said = "ValueError: no room" if trouble == "raises" else "not done within"
    assert said in capfd.readouterr().err


def test_entering_a_phase_costs_no_more_than_a_few_calls(tmp_path: Path) -> None:
    it = dog(tmp_path, Clock())

    def took(enter: Callable[[str, int], None]) -> float:
        begun = time.process_time()
        for _ in range(20_000):
            enter("step", 5)
        return time.process_time() - begun

    assert median(took(it.dog.enter) / took(lambda *_: None) for _ in range(9)) < 20


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Watchdog(tmp_path, 0, WatchdogConfig(enabled=False)) as watchdog:
        watchdog.enter("step", 1)
        assert set(threading.enumerate()) <= before  # those of earlier tests may end
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------
# Real processes

SCRIPT = """
import ctypes, os, sys, time, threading
from pathlib import Path
from x1_pretrain.config import WatchdogConfig
from x1_pretrain.runtime.watchdog import Watchdog

def saved(hang):
    print("ON_HANG", hang.phase, hang.step, hang.at_rest, flush=True)

short = 2 if sys.argv[2] != "working" else 60
limits = WatchdogConfig(
    first_step_s=short, step_s=short, data_s=short, evaluation_s=2, checkpoint_s=2,
    save_s=int(os.environ.get("SAVE_S", 3)),
)
looked, late_s = threading.Event(), []

class Dog(Watchdog):
    def look(self):
        if late_s:
            time.sleep(late_s.pop())  # as on a busy machine
        if sys.argv[3:] != ["untold"]:
            super().look()
            looked.set()

rank = int(os.environ.get("RANK", 0))
with Dog(Path(sys.argv[1]), rank, limits, saved, tick_s=0.1) as dog:
    dog.enter("update", 8)
    dog.enter("data", 9)
    print("READY", os.getpid(), flush=True)
    if "PEER" in os.environ:
        dog.set_peers([int(os.environ["PEER"])])
    def stuck_here():
        if sys.argv[2] == "python":
            time.sleep(60)
        elif sys.argv[2] == "lock":
            if sys.argv[3] == "told":
                looked.clear()
                looked.wait()
            mutex = ctypes.create_string_buffer(256)
            libc = ctypes.PyDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # for ever, also when a signal comes
        elif sys.argv[2] == "interruptible":
            late_s.append(1.0)
            ctypes.PyDLL(None).sleep(600)  # the request for stacks wakes it up
            looked.clear()
            looked.wait()
        elif sys.argv[2] == "pausing":
            while not dog._away:
                time.sleep(0.05)
                dog.enter("data", 9)
        else:
            while not os.path.exists(sys.argv[3]):
                time.sleep(0.05)
                dog.enter("data", 9)
    stuck_here()
print("NEWS", [round(s) for s in dog.news()], flush=True)
"""


@contextlib.contextmanager
def running(folder: Path, *args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **env},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("READY")
        yield process
    finally:
        process.kill()
        process.communicate()


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_hang_in_python_ends_with_75_and_its_stack(tmp_path: Path) -> None:
    with running(tmp_path, "python") as process:
        guardians = children_of(process.pid)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "ON_HANG data 9 True" in out
    (file,) = tmp_path.glob("hang-rank0-*.txt")
    assert "stuck_here" in file.read_text()
    assert "relaunch the same command" in err
    assert len(guardians) == 1
    wait_for(lambda: not is_alive(guardians[0]))


@pytest.mark.parametrize("when", ["untold", "told"])  # before the first tick, and after one
def test_a_hang_that_holds_pythons_lock_is_killed_with_its_stack(when: str, tmp_path: Path) -> None:
    with running(tmp_path, "lock", when) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, (out, err)
    (file,) = tmp_path.glob("hang-rank0-*.txt")
    text = file.read_text()
    assert "stuck_here" in text
    assert f"phase {'update at step 8' if when == 'untold' else 'data at step 9'}" in text
    assert "torch" in text
    assert "x1: hang" in err
    assert str(file) in err


def test_one_that_wakes_up_when_asked_for_its_stacks_is_not_killed(tmp_path: Path) -> None:
    with running(tmp_path, "interruptible") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stuck_here" in next(tmp_path.glob("hang-rank0-*.txt")).read_text()
    assert "NEWS [" in out


def test_a_process_that_is_stopped_goes_on_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path, "pausing") as process:
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        time.sleep(6)  # three times the limit
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=120)
        took = time.monotonic() - begun
    assert process.returncode == 0, err
    assert (news := re.search(r"NEWS \[(\d+)", out)), out
    assert 5 <= int(news[1]) <= took + 1
    assert not list(tmp_path.iterdir())


def test_sigusr1_writes_the_stacks_and_the_run_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, "working", str(tmp_path / "end")) as process:
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: any(tmp_path.glob("hang-*.txt")))
        (tmp_path / "end").touch()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (file,) = tmp_path.glob("hang-rank0-*.txt")
    assert "asked for by SIGUSR1" in file.read_text()
    assert "stuck_here" in file.read_text()
    assert "going on" in err
    assert "NEWS [" in out


def test_a_rank_that_is_asked_for_its_stacks_as_it_leaves_is_not_ended_by_it(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from x1_pretrain.config import WatchdogConfig
from x1_pretrain.runtime.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, WatchdogConfig()):
    pass
os.kill(os.getpid(), signal.SIGUSR1)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60).returncode == 0


def test_a_hang_asks_the_other_ranks_for_their_stacks(tmp_path: Path) -> None:
    with running(tmp_path, "working", "/absent", RANK="1") as other:
        with running(tmp_path, "python", PEER=str(other.pid)) as first:
            first.communicate(timeout=120)
        assert first.returncode == 75
        wait_for(lambda: any(tmp_path.glob("hang-rank1-*.txt")))
        assert other.poll() is None  # it goes on
    (file,) = tmp_path.glob("hang-rank0-*.txt")
    assert f"process {other.pid}: running or waiting" in file.read_text()


def test_a_rank_waits_for_the_first_one_to_save(tmp_path: Path) -> None:
    with (
        running(tmp_path, "working", "/absent") as first,
        running(tmp_path, "python", RANK="1", PEER=str(first.pid), SAVE_S="600") as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline().startswith("ON_HANG")
        time.sleep(0.3)  # one that does not wait is gone by then
        assert other.poll() is None
        first.kill()
        first.wait()
        assert other.wait(120) == 75


def test_a_stranger_with_the_id_of_a_dead_rank_is_left_alone(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "30"])  # SIGUSR1 would end it
    it = dog(tmp_path, Clock())
    it.dog.set_peers([sleeper.pid])
    it.dog._peers = {sleeper.pid: "1"}  # started at another time: another process
    it.dog._ask_peers()
    time.sleep(0.2)
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()
    assert started(os.getpid()) != "-"


def test_the_guardian_ends_with_a_killed_trainer(tmp_path: Path) -> None:
    with running(tmp_path, "python") as process:
        (guardian,) = children_of(process.pid)
        assert is_alive(guardian)
        process.kill()
        process.wait()
        wait_for(lambda: not is_alive(guardian))


def wait_for(condition: object, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------
# Crashes


def test_a_crash_is_kept_with_the_last_rows() -> None:
    try:
        {}["absent"]
    except KeyError as error:
        kept = crash_report(error, [{"step": s} for s in range(200)])
    assert kept["type"] == "KeyError"
    assert kept["last_rows"] == [{"step": s} for s in range(150, 200)]
    assert "test_a_crash_is_kept_with_the_last_rows" in kept["traceback"]


def test_a_deep_recursion_is_kept_short_and_a_mute_error_is_kept_at_all() -> None:
    def deeper(n: int) -> int:
        return deeper(n + 1) + deeper(n + 2)

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with pytest.raises(RecursionError) as caught:
        deeper(0)
    assert len(crash_report(caught.value, [])["traceback"]) < 21_000
    with contextlib.suppress(RuntimeError):
        assert crash_report(MuteError(), [])["error"] == "(its text can't be made)"
