"""One process a GPU, started and watched by the command itself: `x1 train --ranks 8`. No torch here.

The command starts itself once a rank, with torchrun's variables, and stays as their parent. Against torchrun:
the exit code is the run's own, so that whoever supervises knows what to do; ranks whose peer is gone are
waited for and then ended; on Linux no rank outlives the parent; what all ranks refuse is said once; and the
port at which they meet is taken before anyone is told of it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from x1_pretrain.errors import (
    BUDGET_CHECKPOINTED,
    BUDGET_STOPPED,
    FINISHED,
    INTERRUPTED,
    REFUSED,
    USAGE,
    UserError,
)
from x1_pretrain.records.processes import cores, dies_with_parent

SETTLE_S = 30.0  # for the other ranks, once one has left: saving is done by then, waiting for it is not
POLL_S = 0.05
HELD_S = 0.5  # the other ranks' words: the first may be about to say the same
LAST_WORDS_S = 1.0
OURS = b"x1: "
MEETING = "X1_MEETING"  # the open socket at which the first rank waits for the others
DECIDED = (REFUSED, BUDGET_STOPPED, BUDGET_CHECKPOINTED, USAGE)  # what a rank ends with on purpose
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def place() -> tuple[int, int]:
    """This process's rank, and of how many: ours, torchrun's, or the only one."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), size) if size > 1 else (0, 1)


def run(size: int, command: Sequence[str] | None = None, settle_s: float = SETTLE_S) -> int:
    """This very command, once a rank; its exit code. A signal that ended the ranks ends this process too."""
    command = command or again()
    open_standard_files()
    ranks = Ranks(settle_s)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # and so in a rank, until it has stacks to write
    with ranks.passing_on():
        try:
            with socket.create_server(("127.0.0.1", 0)) as meeting:  # only the first rank keeps it open
                for number in range(size):
                    ranks.children.append(Rank(number, start(command, number, size, meeting)))
                    ranks.words.listen(number, ranks.children[-1].process.stderr)
            signal.signal(signal.SIGUSR1, lambda number, _: ranks.pass_on(number))
            for number in ranks.asked:  # before all were there
                ranks.pass_on(number)
            code = ranks.wait()
        except BaseException:
            ranks.pass_on(signal.SIGKILL)
            raise
    if code < 0:
        end_by(-code)
    return code


def again() -> list[str]:
    """The command that started this process."""
    if sys.argv[0] in ("", "-"):
        raise UserError(
            "--ranks: each rank starts the program anew, which can't be read twice from standard input; put "
            "it into a file, or use `x1 train`"
        )
    return [sys.executable, *sys.orig_argv[1:]]


def open_standard_files() -> None:
    """Where one is closed, the next file that is opened would take its place."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def start(command: Sequence[str], number: int, size: int, meeting: socket.socket) -> subprocess.Popen[bytes]:
    here = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": meeting.getsockname()[1],
        MEETING: meeting.fileno(),
    }
    usual = {"OMP_NUM_THREADS": str(max(1, cores() // size))}
    usual |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return subprocess.Popen(
        list(command),
        env={**usual, **os.environ, **{name: str(value) for name, value in here.items()}},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=[meeting.fileno()] if number == 0 else [],
        preexec_fn=dies_with_parent(signal.SIGKILL),
    )


def end_by(number: int) -> None:
    """As the rank did. What it left to debug with is its own."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------------------------------------
# Waiting for them


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    told: bool = False  # that it left
    ended: bool = False  # by us: its code says nothing


class Ranks:
    """The parent's view: who lives, how those that left ended."""

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self.children: list[Rank] = []
        self.words = Words()
        self.asked: list[int] = []
        self._settle_s = settle_s
        self._deadline: float | None = None

    def wait(self) -> int:
        """Until all have ended; the run's exit code, negative for a signal."""
        while not all(one.told for one in self.children):
            for _ in range(2):  # who fails because of another is seen to have left no earlier than that one
                left = [one for one in self.children if not one.told and one.process.poll() is not None]
            for one in sorted(left, key=lambda one: one.process.returncode >= 0):  # a killed one is the cause
                self._left(one)
            if self._deadline and time.monotonic() > self._deadline:
                self._end_the_rest()
            self.words.tell()
            time.sleep(POLL_S)
        self.words.close()
        return outcome([None if one.ended else one.process.returncode for one in self.children])

    def _left(self, one: Rank) -> None:
        one.told, code = True, one.process.returncode
        others = not all(other.told for other in self.children)
        unexpected = code not in (FINISHED, INTERRUPTED, *DECIDED) and not one.ended
        if unexpected and self.words.lost is None:  # what the others end with comes of it
            then = f"; the others get {self._settle_s:.0f} s" if others and not self._deadline else ""
            self.words.say(f"x1: rank {one.number} {ending(code)}{then}")
            self.words.lost = one.number
        if code or one.number == 0:
            self._deadline = self._deadline or time.monotonic() + self._settle_s

    def _end_the_rest(self) -> None:
        """They wait for one that is gone, in a library that no request reaches."""
        for one in self.children:
            if one.ended and not one.told:
                self.words.say(f"x1: rank {one.number} can't be killed: it waits for a driver or a disk")
                one.told = True
            elif not one.told:
                self.words.say(f"x1: rank {one.number} did not follow within {self._settle_s:.0f} s: killed")
                one.ended = True
                one.process.kill()
        self._deadline = time.monotonic() + SETTLE_S

    @contextlib.contextmanager
    def passing_on(self) -> Iterator[None]:
        """Requests go to every rank. A closed terminal ends nothing, as with one process."""
        before = {number: signal.signal(number, self._on_request) for number in PASSED_ON}
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._on_pause)
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_request(self, number: int, _: FrameType | None) -> None:
        self.asked.append(number)
        self.pass_on(number)

    def _on_pause(self, number: int, _: FrameType | None) -> None:
        """Ctrl-Z, and `fg`: the ranks are not in the terminal's group."""
        self.pass_on(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.pass_on(signal.SIGCONT)

    def pass_on(self, number: int) -> None:
        for one in self.children:
            one.process.send_signal(number)


def ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    named = -code in set(signal.Signals)
    return f"was killed by {signal.Signals(-code).name if named else f'signal {-code}'}"


def outcome(codes: Sequence[int | None]) -> int:
    """Of a run, from those of its ranks in their order; None: we ended it. When one is gone the others fail
    as well, so what a rank decided counts before a fault, and the first rank's 0 says that all is done."""
    known = [code for code in codes if code is not None]
    if codes[0] == FINISHED:
        return FINISHED
    killed = [code for code in known if code < 0]
    order = [*DECIDED, *killed, INTERRUPTED, *known]
    return next((code for code in order if code in known and code), FINISHED)


# ------------------------------------------------------------------------------------------------------------
# What they say on stderr


class Words:
    """The ranks' lines: under their number, but for the first's and for what was said already. After a rank
    was lost, what the others say of it goes into a file: it is long, and not the cause.

    Lines are held for a moment, so that it is known by then who was lost; ours, `x1: ...`, of the first rank
    are not. A thread of its own writes: nobody may read the other end."""

    def __init__(self) -> None:
        self.lost: int | None = None
        self._held: deque[tuple[float, int, bytes]] = deque()
        self._said: deque[bytes] = deque(maxlen=50)
        self._aside: list[bytes] = []
        self._readers: list[threading.Thread] = []
        self._queue: queue.Queue[bytes | None] = queue.Queue(10_000)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def listen(self, number: int, words: IO[bytes] | None) -> None:
        self._readers.append(threading.Thread(target=self._read, args=(number, words), daemon=True))
        self._readers[-1].start()

    def _read(self, number: int, words: IO[bytes]) -> None:
        for line in words:
            if number == 0 and (line.startswith(OURS) or line == b"\n"):
                self._say(line)
            else:
                self._held.append((time.monotonic() + HELD_S, number, line))
            while len(self._held) > 10_000:
                time.sleep(POLL_S)

    def tell(self, all_of_it: bool = False) -> None:
        while self._held and (all_of_it or self._held[0][0] < time.monotonic()):
            _, number, line = self._held.popleft()
            before = f"rank {number}: ".encode() if number else b""
            if line.startswith(OURS) and line in self._said:
                continue
            if self.lost not in (None, number) and not line.startswith(OURS):
                self._aside.append(before + line)
            else:
                self._say(line, before)

    def close(self) -> None:
        """What they said last; a process that a rank left behind may hold the pipe open."""
        for thread in self._readers:
            thread.join(LAST_WORDS_S)
        self.tell(all_of_it=True)
        if self._aside:
            self.say(f"x1: what the other ranks said to it ({len(self._aside)} lines) is in {self._kept()}")
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._writer.join(LAST_WORDS_S)

    def _kept(self) -> str:
        with contextlib.suppress(OSError):
            with tempfile.NamedTemporaryFile(prefix="x1-ranks-", suffix=".txt", delete=False) as file:
                file.writelines(self._aside)
            return file.name
        return "no file: none could be written"

    def say(self, text: str) -> None:
        self._say(text.encode() + b"\n")

    def _say(self, line: bytes, before: bytes = b"") -> None:
        self._said.append(line)
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(before + line)

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            with contextlib.suppress(OSError):  # nobody looks any more
                os.write(2, line)
