"""One process a GPU, started and watched by the command itself: `x1 train --ranks 8`. No torch here.

The command starts itself once a rank, with torchrun's variables, and stays as their parent. Against torchrun:
the exit code is the run's own, so that whoever supervises knows what to do; ranks whose peer is gone are
waited for and then ended; on Linux no rank outlives the parent; what all ranks refuse is said once; and the
port at which they meet is taken before anyone is told of it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from x1_pretrain.errors import BUDGET_CHECKPOINTED, BUDGET_STOPPED, FINISHED, INTERRUPTED, REFUSED, USAGE
from x1_pretrain.records.processes import cores, dies_with_parent

SETTLE_S = 30.0  # for the other ranks, once one has left: saving is done by then, waiting for it is not
POLL_S = 0.05
HELD_S = 0.5  # the other ranks' words: the first may be about to say the same
LAST_WORDS_S = 1.0
MEETING = "X1_MEETING"  # the open socket at which the first rank waits for the others
DECIDED = (REFUSED, BUDGET_STOPPED, BUDGET_CHECKPOINTED, USAGE)  # what a rank ends with on purpose
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def is_rank() -> bool:
    """Whether this process is one already: ours, or torchrun's."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks: the first rank, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run(size: int, command: Sequence[str] | None = None, settle_s: float = SETTLE_S) -> int:
    """This very command, once a rank; its exit code. A signal that ended the ranks ends this process too."""
    command = command or [sys.executable, *sys.orig_argv[1:]]
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


def start(command: Sequence[str], number: int, size: int, meeting: socket.socket) -> subprocess.Popen[bytes]:
    place = {
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
        env={**usual, **os.environ, **{name: str(value) for name, value in place.items()}},
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
            for one in self.children:
                if not one.told and one.process.poll() is not None:
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
        if code not in (FINISHED, INTERRUPTED, *DECIDED) and not one.ended:
            then = f"; the others get {self._settle_s:.0f} s" if others and not self._deadline else ""
            self.words.say(f"x1: rank {one.number} {ending(code)}{then}")
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


@dataclass
class Words:
    """The first rank's lines at once; the others' under their number, but for what was said already."""

    held: deque[tuple[float, int, bytes]] = field(default_factory=deque)
    said: deque[bytes] = field(default_factory=lambda: deque(maxlen=50))
    threads: list[threading.Thread] = field(default_factory=list)

    def listen(self, number: int, words: IO[bytes] | None) -> None:
        thread = threading.Thread(target=self._read, args=(number, words), daemon=True)
        thread.start()
        self.threads.append(thread)

    def _read(self, number: int, words: IO[bytes]) -> None:
        for line in words:
            if number:
                self.held.append((time.monotonic() + HELD_S, number, line))
            else:
                self._write(line)

    def tell(self, all_of_it: bool = False) -> None:
        while self.held and (all_of_it or self.held[0][0] < time.monotonic()):
            _, number, line = self.held.popleft()
            if not (line.startswith(b"x1: ") and line in self.said):
                self._write(line, f"rank {number}: ".encode())

    def close(self) -> None:
        """What they said last; a process that a rank left behind may hold the pipe open."""
        for thread in self.threads:
            thread.join(LAST_WORDS_S)
        self.tell(all_of_it=True)

    def say(self, text: str) -> None:
        self._write(text.encode() + b"\n")

    def _write(self, line: bytes, before: bytes = b"") -> None:
        self.said.append(line)
        with contextlib.suppress(OSError):  # nobody looks any more
            os.write(2, before + line)
