"""Processes that stand for ranks: how they are started, asked to stop, waited for, and what is made of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from x1_pretrain.errors import UserError
from x1_pretrain.runtime import ranks
from x1_pretrain.runtime.ranks import outcome
from x1_pretrain.runtime.world import ranks_wanted

START = "import os, signal, sys, time; from pathlib import Path; rank = int(os.environ['RANK']); "
READY = "Path(f'{sys.argv[1]}/{rank}').write_text(str(os.getpid())); "
LEAVES = "signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); "
SLEEPS = "time.sleep(600)"
PARENT = """
import sys
from x1_pretrain.runtime import ranks
sys.exit(ranks.run(int(sys.argv[1]), sys.argv[3:], float(sys.argv[2])))
"""


class Parent:
    """A process with ranks; `ready` once each has written its process id."""

    def __init__(self, folder: Path, code: str, size: int = 2, settle_s: float = 60.0) -> None:
        self.folder, self.size = folder, size
        rank = [sys.executable, "-c", START + code, str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(size), str(settle_s), *rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ready(self) -> list[int]:
        until(lambda: all(self._said(rank) for rank in range(self.size)))
        return [int(self._said(rank)) for rank in range(self.size)]

    def _said(self, rank: int) -> str:
        file = self.folder / str(rank)
        return file.read_text() if file.exists() else ""

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    made: list[Parent] = []

    def make(code: str, **how: float) -> Parent:
        made.append(Parent(tmp_path, code, **how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()


# ------------------------------------------------------------------------------------------------------------
# What is made of the codes


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, 1], 0),  # the first writes the records: its end is the run's
        ([75, 75], 75),
        ([75, 1], 75),  # its peers are gone, which is a fault to them
        ([1, 75], 75),
        ([1, -9], -9),
        ([1, 1, -6, 1], -6),
        ([78, 1], 78),
        ([1, 78], 78),
        ([76, 75], 76),
        ([77, 1, 76], 77),
        ([2, 2], 2),
        ([75, -9], -9),
        ([1, 1], 1),
        ([0], 0),
        ([3, 0], 3),
        ([None, 0, 75], 75),  # the first hung and was ended: its place counts
        ([None, None], 0),
    ],
)
def test_the_code_of_a_run_is_made_of_those_of_its_ranks(codes: list[int | None], expected: int) -> None:
    assert outcome(codes) == expected


def test_a_number_of_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [ranks_wanted(text, None) for text in ("auto", "2", "4")] == [4, 2, 4]
    assert [ranks_wanted(text, "cpu") for text in ("auto", "8")] == [1, 8]
    with pytest.raises(UserError, match=r"--ranks 8: this machine has 4 GPU\(s\)"):
        ranks_wanted("8", "auto")
    assert capsys.readouterr().out == ""
    assert ranks_wanted("1", None) == 1
    assert "1 of the 4 GPUs here is used; --ranks 4 uses them all" in capsys.readouterr().out
    for wrong in ("0", "-1", "two", "1.5", ""):
        with pytest.raises(UserError, match="expected a number of processes"):
            ranks_wanted(wrong, None)
    monkeypatch.setenv("RANK", "1")
    assert ranks_wanted("2", None) == 2  # left over from elsewhere
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks_wanted("2", None) == 2
    assert ranks.place() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [ranks_wanted(text, None) for text in ("1", "auto")] == [1, 1]
    with pytest.raises(UserError, match="--ranks 2: WORLD_SIZE=2 says that this is one of several"):
        ranks_wanted("2", None)
    monkeypatch.setenv("X1_MEETING", "7")
    assert ranks_wanted("2", None) == 1  # it is one of them
    assert ranks.place() == (1, 2)


def test_a_program_from_standard_input_can_not_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "-"):
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(UserError, match="can't be read twice"):
            ranks.run(2)


# ------------------------------------------------------------------------------------------------------------
# Real processes


def test_each_rank_knows_its_place_and_one_holds_the_meeting(parent: Callable[..., Parent]) -> None:
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')"
    held = "os.path.exists('/proc/self/fd/' + os.environ['X1_MEETING'])"
    words = f"' '.join(map(str, [*(os.environ[n] for n in {names}), {held}, os.getpgrp() == os.getpid()]))"
    running = parent(f"os.write(1, {words}.encode() + b'\\n')", size=3)
    said, _ = running.process.communicate(timeout=120)
    assert sorted(said.splitlines()) == [
        "0 0 3 127.0.0.1 True True",
        "1 1 3 127.0.0.1 False True",
        "2 2 3 127.0.0.1 False True",
    ]
    assert running.process.returncode == 0


def test_a_request_reaches_every_rank_once(parent: Callable[..., Parent]) -> None:
    """Also where each process is sent it: `timeout` and the end of a process group do so."""
    waits = "end = time.time() + 60\n    while not s.requested and time.time() < end: time.sleep(.01)\n"
    code = "from x1_pretrain.runtime.signals import Signals\nwith Signals(quiet=rank != 0) as s:\n"
    running = parent(f"{code}    {READY}\n    {waits}    time.sleep(.3); sys.exit(75)")
    pids = running.ready()
    for pid in (running.process.pid, *pids, running.process.pid):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.02)
    code, said = running.end()
    assert code == 75
    assert said.splitlines()[1:] == [
        "x1: SIGTERM: saving a checkpoint, then leaving (once more: leave at once)"
    ]


def test_a_request_for_stacks_does_not_end_a_rank_that_starts(parent: Callable[..., Parent]) -> None:
    running = parent(f"{READY}time.sleep(.3); sys.exit(0)")
    running.ready()
    running.process.send_signal(signal.SIGUSR1)
    assert running.end() == (0, "")


def test_ctrl_c_is_passed_on(parent: Callable[..., Parent]) -> None:
    running = parent(f"signal.signal(signal.SIGINT, lambda *_: os._exit(75)); {READY}{SLEEPS}")
    running.ready()
    running.process.send_signal(signal.SIGINT)
    assert running.end() == (75, "")


def test_a_hang_up_ends_nothing(parent: Callable[..., Parent]) -> None:
    running = parent(LEAVES + READY + SLEEPS)
    pids = running.ready()
    running.process.send_signal(signal.SIGHUP)
    for pid in pids:
        os.kill(pid, signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == (75, "")


def test_a_killed_rank_ends_the_others_and_is_what_the_parent_dies_of(parent: Callable[..., Parent]) -> None:
    running = parent(READY + SLEEPS, settle_s=0.2)
    pids = running.ready()
    os.kill(pids[1], signal.SIGKILL)
    code, said = running.end()
    assert code == -signal.SIGKILL
    assert said.splitlines() == [
        "x1: rank 1 was killed by SIGKILL; the others get 0 s",
        "x1: rank 0 did not follow within 0 s: killed",
    ]
    assert gone(pids[0])


def test_an_aborted_rank_is_what_the_parent_dies_of(parent: Callable[..., Parent]) -> None:
    code, said = parent(
        "os.kill(os.getpid(), signal.SIGABRT) if rank else time.sleep(600)", settle_s=0.2
    ).end()
    assert code == -signal.SIGABRT
    assert "rank 1 was killed by SIGABRT" in said


def test_a_rank_that_hangs_does_not_change_the_code_of_one_that_left(parent: Callable[..., Parent]) -> None:
    """The watchdog of the first rank leaves with 75; its peers sit in a collective."""
    running = parent(f"{READY}sys.exit(75) if rank == 0 else {SLEEPS}", settle_s=0.2)
    code, said = running.end()
    assert code == 75
    assert said == "x1: rank 1 did not follow within 0 s: killed\n"


def test_a_finished_first_rank_is_not_undone_by_one_that_can_not_leave(parent: Callable[..., Parent]) -> None:
    code, said = parent(f"sys.exit(0) if rank == 0 else {SLEEPS}", settle_s=0.2).end()
    assert code == 0
    assert "rank 1 did not follow" in said


def test_a_first_rank_that_saves_for_long_is_waited_for(parent: Callable[..., Parent]) -> None:
    """The others have left with 0; that is no reason to hurry."""
    assert parent("time.sleep(0 if rank else .6)", settle_s=0.1).end() == (0, "")


def test_no_rank_outlives_the_parent(parent: Callable[..., Parent]) -> None:
    running = parent(f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}{SLEEPS}")
    pids = running.ready()
    running.process.kill()
    until(lambda: all(map(gone, pids)))


def test_what_all_refuse_is_said_once(parent: Callable[..., Parent]) -> None:
    code, said = parent("print('x1: no such file', file=sys.stderr); sys.exit(2)", size=4).end()
    assert (code, said) == (2, "x1: no such file\n")


def test_what_the_others_say_of_a_lost_rank_is_kept_in_a_file(parent: Callable[..., Parent]) -> None:
    """A killed rank says nothing; its peers print tracebacks, some of them at once."""
    waits = "while os.path.exists(f'/proc/{pid}') and open(f'/proc/{pid}/stat').read().split()[2] != 'Z':"
    reads = (
        "file = Path(sys.argv[1] + '/1')\nwhile not (file.exists() and file.read_text()): time.sleep(.01)\n"
    )
    peer = f"{reads}pid = file.read_text()\n{waits} time.sleep(.001)\nraise ConnectionError('closed by peer')"
    code = f"{READY}\nif rank: {SLEEPS}\n{peer}"
    running = parent(code)
    until(lambda: running.ready())
    os.kill(running.ready()[1], signal.SIGKILL)
    code_, said = running.end()
    assert code_ == -signal.SIGKILL
    first, second = said.splitlines()
    assert first.startswith("x1: rank 1 was killed by SIGKILL")
    kept = Path(second.rpartition(" is in ")[2])
    assert second.startswith("x1: what the other ranks said to it (")
    assert "closed by peer" in kept.read_text()
    kept.unlink()


def test_a_pipe_that_nobody_reads_holds_nothing_up(parent: Callable[..., Parent]) -> None:
    running = parent(
        f"{READY}[sys.stderr.write('x' * 99 + '\\n') for _ in range(3000)]; time.sleep(600)", settle_s=0.2
    )
    os.kill(running.ready()[1], signal.SIGKILL)
    assert running.process.wait(60) == -signal.SIGKILL  # while nobody reads what is said


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_files_do_not_take_the_meeting_s_place(tmp_path: Path, closed: str) -> None:
    held = "import os, sys; os.fstat(int(os.environ['X1_MEETING'])) if os.environ['RANK'] == '0' else 0"
    words = [sys.executable, "-c", PARENT, "2", "60", sys.executable, "-c", held]
    assert subprocess.call(["sh", "-c", f'"$@" {closed}', "sh", *words], timeout=120) == 0


def test_what_one_alone_says_has_its_number(parent: Callable[..., Parent]) -> None:
    words = "print('x1: no GPU' if rank else 'x1: hello', file=sys.stderr); print('more', file=sys.stderr); "
    code, said = parent(f"{words}sys.exit(2)").end()
    assert code == 2
    assert sorted(said.splitlines()) == ["more", "rank 1: more", "rank 1: x1: no GPU", "x1: hello"]
