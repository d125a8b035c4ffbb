"""The one memory of what was spent: whole rows in one order, whoever writes, dies or runs out of room."""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.errors import FAULT
from x1_pretrain.money.clock import Clock, parse_stamp
from x1_pretrain.money.ledger import NAME, TAIL_BYTES, Ledger, LedgerError, read_rows, usd

CLOCK = Clock()
WRITER = """
import sys
from pathlib import Path
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger, LedgerError
ledger, name, count = Ledger(Path(sys.argv[1]), Clock()), sys.argv[2], int(sys.argv[3])
"""
APPEND_MANY = WRITER + "for n in range(count): ledger.append('poll', 'word ' * (n % 40), writer=name, n=n)"
APPEND_AND_SAY = WRITER + (
    "for n in range(count): print(ledger.append('poll', 'x' * (n * 97 % 3000), n=n)['seq'], flush=True)"
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / NAME, CLOCK)


def python(script: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def seqs(file: Path) -> list[int]:
    return [row["seq"] for row in read_rows(file)]


# ------------------------------------------------------------------------------------------------------------
# What a row holds


def test_rows_come_back_as_written(ledger: Ledger) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    first = ledger.append("intent", "1x A100 80GB", usd_per_hr=Decimal("1.190"), tags=("a", Decimal("0.10")))
    second = ledger.append("launched", machine_id="i-1", nested={"usd": Decimal("1E+3")}, none=None)
    assert ledger.rows() == [first, second] == [json.loads(x) for x in ledger.file.read_text().splitlines()]
    assert list(first) == ["seq", "time_utc", "event", "usd_per_hr", "tags", "schema_version", "message"]
    assert (first["seq"], second["seq"]) == (1, 2)
    assert (first["usd_per_hr"], first["tags"], second["nested"]) == ("1.190", ["a", "0.10"], {"usd": "1000"})
    assert "message" not in second
    assert first["time_utc"].endswith("Z")
    assert before <= parse_stamp(first["time_utc"]) <= datetime.now(UTC)


@given(amount=st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12))
def test_money_is_exact_to_the_last_digit(amount: Decimal, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "exact" / NAME
    written = Ledger(file, CLOCK).append("poll", spent_usd=amount)
    read = read_rows(file)[-1]
    file.unlink()
    assert written == read
    assert isinstance(read["spent_usd"], str)
    assert "e" not in read["spent_usd"].lower()
    assert usd(read, "spent_usd").as_tuple()[1:] == amount.as_tuple()[1:] or usd(read, "spent_usd") == amount


def test_a_thousand_tenths_are_a_hundred(ledger: Ledger) -> None:
    amounts = [usd(ledger.append("poll", usd=Decimal("0.1")), "usd") for _ in range(100)]
    assert sum(amounts, Decimal(0)) == Decimal("10.0")
    assert sum((usd(row, "usd") for row in ledger.rows()), Decimal(0)) == 10


def test_times_are_utc_wherever_they_come_from(ledger: Ledger) -> None:
    noon = datetime(2026, 5, 23, 12, 0, 1, tzinfo=timezone(timedelta(hours=2)))
    assert ledger.append("launched", since_utc=noon)["since_utc"] == "2026-05-23T10:00:01Z"


@pytest.mark.parametrize("text", ["two\nlines", "naïve ☂", "\u2028", "\x00", 'quote " and \\', "\ud800"])
def test_any_text_stays_one_line(ledger: Ledger, text: str) -> None:
    ledger.append("alert", text)
    ledger.append("next")
    assert ledger.file.read_bytes().count(b"\n") == 2
    first, _ = ledger.rows()
    assert first["message"] == text or "\ud800" in text


def test_no_file_is_no_rows(ledger: Ledger) -> None:
    assert ledger.rows() == []
    assert not ledger.file.exists()


# ------------------------------------------------------------------------------------------------------------
# Several writers


def test_four_processes_write_one_order(ledger: Ledger) -> None:
    writers = [python(APPEND_MANY, ledger.file, name, 60) for name in "abcd"]
    for writer in writers:
        finished(writer)
    rows = ledger.rows()
    assert [row["seq"] for row in rows] == list(range(1, 241))
    for name in "abcd":
        assert [row["n"] for row in rows if row["writer"] == name] == list(range(60))
    assert all(row.get("message", "") == "word " * (row["n"] % 40) for row in rows)


def test_threads_of_one_process_too(ledger: Ledger) -> None:
    threads = [threading.Thread(target=lambda: [ledger.append("poll") for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seqs(ledger.file) == list(range(1, 101))


def test_nobody_appends_while_one_looks(ledger: Ledger) -> None:
    with ledger.locked():
        other = python(APPEND_MANY.replace("for n", "print(flush=True)\nfor n"), ledger.file, "other", 1)
        assert other.stdout is not None
        assert select.select([other.stdout], [], [], 60)[0], "it never began"
        time.sleep(0.2)
        assert ledger.rows() == []
        assert other.poll() is None
        ledger.append("mine")
    finished(other)
    assert [row["event"] for row in ledger.rows()] == ["mine", "poll"]


def test_the_lock_goes_with_its_holder(ledger: Ledger) -> None:
    script = WRITER + "import time\nwith ledger.locked(): print(flush=True); time.sleep(60)"
    holder = python(script, ledger.file, "holder", 0)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    assert ledger.append("poll")["seq"] == 1


def test_an_exception_inside_frees_it(ledger: Ledger) -> None:
    with pytest.raises(ZeroDivisionError), ledger.locked():
        raise ZeroDivisionError
    finished(python(APPEND_MANY, ledger.file, "other", 1))


@pytest.mark.parametrize("when", ["while it waits", "once it has it"])
def test_an_interrupt_on_the_way_in_frees_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Whoever ends the machine after Ctrl-C opens the ledger anew, in this very process."""
    flock = fcntl.flock

    def interrupted(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        if when == "once it has it":
            flock(descriptor, operation)
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.append("poll")
    with ledger.locked(), ledger.file.open() as other, pytest.raises(BlockingIOError):
        flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is really held, and ...
    with ledger.file.open() as other:
        flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # ... really let go


# ------------------------------------------------------------------------------------------------------------
# A signal's handler, in the thread that it interrupts


@pytest.fixture
def elsewhere(ledger: Ledger) -> Iterator[Callable[[], None]]:
    """Another process holds the ledger, until it is told to let go."""
    ledger.append("first")
    with ledger.file.open() as other:  # to the lock, another opening of the file is another process
        fcntl.flock(other.fileno(), fcntl.LOCK_EX)
        yield other.close


def handling(monkeypatch: pytest.MonkeyPatch, handler: Callable[[], object]) -> None:
    """A signal comes while the lock is first waited for."""
    flock = fcntl.flock

    def interrupted(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        handler()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", interrupted)


def test_a_handler_does_not_write_while_another_process_holds_the_lock(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[[], None]
) -> None:
    monkeypatch.setattr("x1_pretrain.money.ledger.HANDLER_S", 0.05)
    said: list[str] = []

    def handler() -> None:
        with pytest.raises(LedgerError) as error:
            ledger.append("handler")
        said.append(one_line(error, ledger.file))
        elsewhere()

    handling(monkeypatch, handler)
    ledger.append("second")
    assert "another process" in said[0]
    assert [row["event"] for row in ledger.rows()] == ["first", "second"]


def test_a_handler_writes_once_the_lock_is_free_and_so_does_what_it_interrupted(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[[], None]
) -> None:
    def handler() -> None:
        threading.Timer(0.1, elsewhere).start()
        ledger.append("handler")

    handling(monkeypatch, handler)
    ledger.append("second")
    assert [(row["seq"], row["event"]) for row in ledger.rows()] == [
        (1, "first"),
        (2, "handler"),
        (3, "second"),
    ]
    with ledger.file.open() as other:
        fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was let go


def test_a_handler_in_the_middle_of_a_row_does_not_write_over_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Ledger._write

    def interrupted(self: Ledger, *row: Any) -> Any:
        monkeypatch.setattr(Ledger, "_write", write)
        ledger.append("handler", "a row of another length")
        return write(self, *row)

    ledger.append("first")
    monkeypatch.setattr(Ledger, "_write", interrupted)
    ledger.append("second")
    assert [row["event"] for row in ledger.rows()] == ["first", "handler", "second"]


def test_a_handler_on_the_way_out_does_not_wait_for_its_own_thread(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come between any two lines; here it does at the one that closes the file."""
    close = os.close

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "close", close)
        with ledger.file.open() as other:  # what the handler would wait for
            fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        ledger.append("handler")
        close(descriptor)

    monkeypatch.setattr(os, "close", interrupted)
    ledger.append("first")
    assert [row["event"] for row in ledger.rows()] == ["first", "handler"]


# ------------------------------------------------------------------------------------------------------------
# Kills


def test_a_kill_at_every_byte_of_the_last_row_loses_that_row_only(ledger: Ledger) -> None:
    for n in range(3):
        ledger.append("poll", "ünïcode and \\n \n", n=n, spent_usd=Decimal("14.20"))
    whole = ledger.file.read_bytes()
    begin = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    before = read_rows(ledger.file)[:2]
    for cut in range(begin, len(whole) + 1):
        ledger.file.write_bytes(whole[:cut])
        survived = read_rows(ledger.file)
        ledger.append("next", n=9)
        rows = ledger.rows()
        assert rows[: len(survived)] == survived
        assert survived[:2] == before
        assert len(survived) == (3 if cut == len(whole) else 2)
        repairs = [row for row in rows if row["event"] == "repaired"]
        assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
        assert [str(cut - begin) in row["message"] for row in repairs] == [True] * (begin < cut < len(whole))
        assert len(rows) == len(survived) + len(repairs) + 1
        assert rows[-1]["n"] == 9


def test_a_torn_first_row(ledger: Ledger) -> None:
    ledger.file.write_bytes(b'{"seq": 1, "ti')
    assert ledger.rows() == []
    ledger.append("poll")
    assert [(row["seq"], row["event"]) for row in ledger.rows()] == [(1, "repaired"), (2, "poll")]


def test_blocks_of_zeros_after_a_power_cut(ledger: Ledger) -> None:
    ledger.append("poll")
    with ledger.file.open("ab") as file:
        file.write(bytes(4096))
    ledger.append("poll")
    assert [row["event"] for row in ledger.rows()] == ["poll", "repaired", "poll"]
    assert ledger.file.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("length", [TAIL_BYTES - 200, TAIL_BYTES + 1, 3 * TAIL_BYTES])
def test_a_very_long_row_is_counted_and_repaired_like_any_other(ledger: Ledger, length: int) -> None:
    ledger.append("first")
    ledger.append("long", "x" * length)
    ledger.append("after")
    assert seqs(ledger.file) == [1, 2, 3]
    data = ledger.file.read_bytes()
    ledger.file.write_bytes(data[: data.rindex(b"x")])  # torn inside the long one
    ledger.append("again")
    assert [(r["seq"], r["event"]) for r in ledger.rows()] == [(1, "first"), (2, "repaired"), (3, "again")]


def test_a_long_ledger_is_numbered_from_its_end(ledger: Ledger) -> None:
    rows = [{"seq": n, "time_utc": "2026-05-23T15:42:01Z", "event": "poll", "n": n} for n in range(1, 5001)]
    ledger.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ledger.append("poll")["seq"] == 5001


def test_what_was_acknowledged_survives_kill_9(ledger: Ledger) -> None:
    """A writer is killed again and again, somewhere in the middle; what it was told is written is there."""
    pause, acknowledged = random.Random(7), []
    for _ in range(12):
        writer = python(APPEND_AND_SAY, ledger.file, "w", 10**6)
        assert writer.stdout is not None
        acknowledged += [int(writer.stdout.readline()) for _ in range(pause.randint(1, 9))]
        time.sleep(pause.random() * 0.002)
        writer.send_signal(signal.SIGKILL)
        out = writer.stdout.read()  # what it said and `readline` took in already, too
        writer.communicate()
        acknowledged += [int(line) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    ledger.append("end")
    rows = ledger.rows()
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    polls = {row["seq"] for row in rows if row["event"] == "poll"}
    assert len(acknowledged) > 12
    assert set(acknowledged) <= polls
    assert len(polls - set(acknowledged)) <= 12  # at most one each that was written and not yet said


# ------------------------------------------------------------------------------------------------------------
# No room, no right


def one_line(error: pytest.ExceptionInfo[LedgerError], file: Path) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert str(file) in said
    assert error.value.exit_code == FAULT
    return said


@contextmanager
def full_after(limit_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leaves_no_half_row(ledger: Ledger) -> None:
    ledger.append("poll", n=1)
    whole = ledger.file.read_bytes()
    for room in range(0, len(whole), 7):
        with full_after(len(whole) + room), pytest.raises(LedgerError) as error:
            ledger.append("poll", "x" * len(whole), n=2)
        assert ledger.file.read_bytes() == whole
        assert "'poll' can't be written" in one_line(error, ledger.file)
    assert ledger.append("poll", n=3)["seq"] == 2  # the lock was let go, and there is room again


def test_no_room_for_the_repair_is_said_as_well(ledger: Ledger) -> None:
    ledger.append("poll", n=1)
    whole = ledger.file.read_bytes()
    ledger.file.write_bytes(whole + b'{"seq": 2, "ti')
    with full_after(len(whole) + 20), pytest.raises(LedgerError) as error:
        ledger.append("poll", n=2)
    one_line(error, ledger.file)
    assert ledger.rows() == [json.loads(whole)]
    ledger.append("poll", n=3)
    assert [row["n"] for row in ledger.rows() if row["event"] == "poll"] == [1, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    ledger = Ledger(small_disk / NAME, CLOCK)
    written = []
    with pytest.raises(LedgerError) as error:
        written.extend(ledger.append("poll", "y" * 500, n=n) for n in range(100))
    assert "No space left" in one_line(error, ledger.file)
    assert ledger.rows() == written
    assert 20 < len(written) < 33  # 16 KiB
    assert ledger.file.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    "place",
    [lambda tmp: Path("/proc/sys/x1") / NAME, lambda tmp: tmp, lambda tmp: tmp / "a file" / NAME],
    ids=["a folder nobody writes to", "a folder", "below a file"],
)
def test_a_place_that_can_not_be_written(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    (tmp_path / "a file").touch()
    ledger = Ledger(place(tmp_path), CLOCK)
    with pytest.raises(LedgerError) as error:
        ledger.append("poll")
    assert "can't be written" in one_line(error, ledger.file)


def test_a_read_only_folder() -> None:
    """As a user without root's rights; what is there can still be read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Ledger(folder / NAME, CLOCK).append("poll")
        (folder / NAME).chmod(0o444)
        folder.chmod(0o555)
        script = WRITER + (
            "import os\nif not os.getuid(): os.setuid(65534)\n"
            "print(len(ledger.rows()))\ntry: ledger.append('poll')\nexcept LedgerError as error: print(error)"
        )
        out, _ = finished(python(script, folder / NAME, "w", 0))
        folder.chmod(0o755)
    assert out.splitlines() == ["1", f"{folder / NAME}: can't be written (Permission denied)"]


# ------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff\xfe", b"[]", b"7", b"null", b'{"seq": 2}', b'{"seq": 2, "event": 3}', bytes(10)],
)
@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_damaged_line_is_named_by_its_number(ledger: Ledger, damage: bytes, line: int) -> None:
    for n in range(3):
        ledger.append("poll", n=n)
    lines = ledger.file.read_bytes().splitlines(keepends=True)
    lines[line - 1] = damage + b"\n"
    ledger.file.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError) as error:
        ledger.rows()
    assert f", line {line}: not a ledger row" in one_line(error, ledger.file)


def test_rows_are_never_changed(ledger: Ledger) -> None:
    """Also after damage in the middle, an append only adds."""
    ledger.append("poll")
    ledger.append("poll")
    data = bytearray(ledger.file.read_bytes())
    data[5] = ord("?")
    ledger.file.write_bytes(data)
    assert ledger.append("poll")["seq"] == 3
    assert ledger.file.read_bytes().startswith(data)


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(LedgerError) as error:
        read_rows(tmp_path)
    assert "can't be read" in one_line(error, tmp_path)
