"""`budget.json`: the published form, every kind of damage, real web servers, and a writer that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.errors import UserError
from x1_pretrain.money import budget_file
from x1_pretrain.money.budget_file import MAX_BYTES, Address, BudgetFile, NoReadingError, parse, shown, write

PUBLISHED = (
    b'{"spent_usd": 14.20, "rate_usd_per_hr": 1.10, "hours_elapsed": 12.9, '
    b'"projected_total_usd": 28.4, "last_update_utc": "2026-05-23T15:42:01Z"}'
)
THEN = datetime(2026, 5, 23, 15, 42, 1, tzinfo=UTC)
NOW = THEN + timedelta(minutes=2)


def file_with(**fields: object) -> bytes:
    return json.dumps({"spent_usd": 14.2, "last_update_utc": "2026-05-23T15:42:01Z"} | fields).encode()


def problem(data: bytes) -> str:
    with pytest.raises(NoReadingError) as caught:
        parse(data, NOW)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# What a file says


def test_the_published_form_is_read_to_the_digit() -> None:
    assert parse(PUBLISHED, NOW) == BudgetFile(
        Decimal("14.20"), Decimal("1.10"), Decimal("12.9"), Decimal("28.4"), THEN
    )


def test_what_is_written_is_the_published_form_and_more() -> None:
    mine = BudgetFile(
        Decimal("14.20"), Decimal("1.10"), Decimal("12.9"), Decimal("28.4"), THEN,
        "x1", "runpod", "pod1", "metered", Decimal(35), 7,
    )  # fmt: skip
    tree = json.loads(mine.to_json())
    assert list(tree.items())[:5] == list(json.loads(PUBLISHED).items())
    assert set(tree) - set(json.loads(PUBLISHED)) == {
        "schema_version", "run_id", "provider", "instance_id", "source", "ceiling_usd", "seq",
    }  # fmt: skip
    assert parse(mine.to_json().encode(), NOW) == mine


def test_two_fields_are_enough_and_strange_ones_of_others_do_no_harm() -> None:
    found = parse(file_with(note=["x"], seq=True, source="rumour", run_id=3, rate_usd_per_hr=0), NOW)
    assert (found.spent_usd, found.last_update) == (Decimal("14.2"), THEN)
    assert (found.rate_usd_per_hr, found.seq, found.source, found.run_id) == (None, 0, None, None)


def test_a_file_cut_at_any_byte_is_no_reading() -> None:
    for end in range(len(PUBLISHED)):
        assert "half a file" in problem(PUBLISHED[:end]) or not PUBLISHED[:end]


@pytest.mark.parametrize("key", ["spent_usd", "rate_usd_per_hr", "hours_elapsed", "projected_total_usd"])
@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "-0.01", '"14.2"', "true", "[]", "{}", "1e400",
     "1e999999999999999999999", "9" * 400],
)  # fmt: skip
def test_an_amount_that_is_none_is_no_reading(key: str, value: str) -> None:
    text = b'{"spent_usd": 1, "last_update_utc": "2026-05-23T15:42:01Z", "seq": 1}'
    data = text.replace(b'"spent_usd": 1,', f'"{key}": {value},'.encode()) if key == "spent_usd" else (
        text.replace(b'"seq": 1', f'"{key}": {value}'.encode())
    )  # fmt: skip
    said = problem(data)
    assert key in said or "not valid JSON" in said
    assert len(said) < 160


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"null", "NoneType"),
        (b"[1]", "list"),
        (b"14.2", "expected a JSON object"),
        (b'{"last_update_utc": "2026-05-23T15:42:01Z"}', "spent_usd is missing"),
        (file_with(spent_usd=None), "spent_usd is missing"),
        (b'{"spent_usd": 40, "spent_usd": 1, "last_update_utc": "2026-05-23T15:42:01Z"}', "twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (PUBLISHED + b"\xff", "not valid JSON"),
        (PUBLISHED + PUBLISHED, "not valid JSON"),
        (b"\x00" * 300, "not valid JSON"),
        (PUBLISHED + b" " * MAX_BYTES, "larger than 1024 KiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_budget_says_why(data: bytes, said: str) -> None:
    assert said in problem(data)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_another_encoding_of_json_is_read(encoding: str) -> None:
    assert parse(PUBLISHED.decode().encode(encoding), NOW).spent_usd == Decimal("14.20")


@pytest.mark.parametrize(
    "text",
    ["2026-05-23T15:42:01Z", "2026-05-23T15:42:01", "2026-05-23 15:42:01+00:00", "2026-05-23T17:42:01+02:00",
     "2026-05-23T05:12:01-10:30", "20260523T154201Z", "2026-W21-6T15:42:01Z"],
)  # fmt: skip
def test_one_moment_in_many_zones(text: str) -> None:
    assert parse(file_with(last_update_utc=text), NOW).last_update == THEN


@pytest.mark.parametrize(
    "value",
    [None, 1763694000, "", "yesterday", "2026-13-01T00:00:00Z", "2026-06-30T23:59:60Z",
     "2026-05-23T25:00:00Z",
     "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", ["2026-05-23T15:42:01Z"], "x" * 10_000],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_no_usable_time_is_no_reading(value: object) -> None:
    said = problem(file_with(last_update_utc=value))
    assert said.startswith("last_update_utc")
    assert len(said) <= 120


def test_the_future_is_no_reading_beyond_a_minute_of_clock_difference() -> None:
    near, far = (NOW + timedelta(seconds=s) for s in (59, 62))
    assert parse(file_with(last_update_utc=near.isoformat()), NOW).last_update == near
    assert "62 s in the future" in problem(file_with(last_update_utc=far.isoformat()))


@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["spent_usd", "last_update_utc", "rate_usd_per_hr", "seq"]), inner, max_size=4),
    max_leaves=8,
).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_whatever_comes_it_is_a_good_reading_or_none(data: bytes) -> None:
    try:
        found = parse(data, NOW)
    except NoReadingError:
        return
    assert 0 <= found.spent_usd <= 10**9
    assert found.last_update <= NOW + timedelta(seconds=60)


# ------------------------------------------------------------------------------------------------------------
# Writing

WRITER = """
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from x1_pretrain.money.budget_file import BudgetFile, write
for seq in range(10**9):
    now = datetime.now(UTC)
    write(Path(sys.argv[1]), BudgetFile(Decimal(seq), None, None, None, now, "x" * 200, seq=seq))
"""


def test_a_writer_killed_at_any_time_never_leaves_half_a_file(tmp_path: Path) -> None:
    file, seen = tmp_path / "budget.json", set()
    write(file, BudgetFile(Decimal(0), None, None, None, datetime.now(UTC)))
    for turn in range(8):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(file)])
        try:
            before, end = len(seen), time.monotonic() + 60
            while len(seen) < before + 3 and time.monotonic() < end:  # it has begun
                seen.add((turn, parse(Address(str(file)).fetch(), datetime.now(UTC)).seq))
            end = time.monotonic() + 0.037 * turn
            while time.monotonic() < end:
                seen.add((turn, parse(Address(str(file)).fetch(), datetime.now(UTC)).seq))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        parse(file.read_bytes(), datetime.now(UTC))
    assert len(seen) > 10, "the reader must have raced with the writer"


def test_a_full_disk_keeps_the_old_state_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "budget.json"
    file.write_bytes(PUBLISHED)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(file, parse(PUBLISHED, NOW))
    assert file.read_bytes() == PUBLISHED
    assert list(tmp_path.iterdir()) == [file]


# ------------------------------------------------------------------------------------------------------------
# Files by their address


def test_a_file_by_its_path_and_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "budget.json").write_bytes(PUBLISHED)
    monkeypatch.chdir(folder)
    spaced = f"file://{folder}/budget.json"
    for uri in (str(folder / "budget.json"), "budget.json", spaced, spaced.replace(" ", "%20"),
                spaced.replace("file://", "file://localhost"), spaced.replace("file://", "FILE://"),
                f"file:{folder}/budget.json"):  # fmt: skip
        assert Address(uri).fetch() == PUBLISHED, uri


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("file://budget.json", "three slashes"),
        ("file://workspace/budget.json", "three slashes"),
        ("s3://bucket/budget.json", "found s3://"),
        ("FTP://me:s3cr3t@host/budget.json", "found ftp://"),
        ("http://", "names no host"),
        ("http:///budget.json", "names no host"),
        ("http://me:s3cr3t@host:port/b?token=s3cr3t", "not a valid address"),
        ("http://me:s3cr3t@host:99999/b", "not a valid address"),
        ("http://[::1/b", "not a valid address"),
    ],
)
def test_an_address_that_can_mean_nothing_is_refused_at_once(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Address(uri)
    assert "--budget-curr-cost-uri" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_what_is_no_plain_file_never_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "looped").symlink_to("looped")
    begun = time.monotonic()
    for name in ("absent", "", "looped", "a%00b"):
        with pytest.raises(NoReadingError):
            Address(f"file://{tmp_path}/{name}").fetch()
    assert Address(str(tmp_path / "pipe")).fetch() == b""
    assert "larger" in problem(Address("/dev/zero").fetch())
    assert time.monotonic() - begun < 9  # one that waits is left after 10 s


# ------------------------------------------------------------------------------------------------------------
# Web servers

Serve = Callable[[Callable[[BaseHTTPRequestHandler], None]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                try:
                    answer(self)
                except OSError:
                    self.close_connection = True  # the reader left

            def log_message(self, *_: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/budget.json"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def body(data: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return answer


def test_a_web_address_is_read(serve: Serve) -> None:
    assert parse(Address(serve(body(PUBLISHED))).fetch(), NOW).spent_usd == Decimal("14.20")


def test_a_password_in_the_address_is_used_and_never_shown(serve: Serve) -> None:
    asked: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.headers["Authorization"])
        body(b"", 401)(request)

    uri = serve(answer).replace("http://", "http://me:s3cr3t@") + "?token=s3cr3t#s3cr3t"
    with pytest.raises(NoReadingError, match="answered 401") as caught:
        Address(uri).fetch()
    assert asked == ["Basic bWU6czNjcjN0"]
    assert "s3cr3t" not in str(caught.value) + str(Address(uri))
    assert shown("http://a:b@[::1]:80/x?y") == "http://[::1]:80/x"


@pytest.mark.parametrize("status", [204, 301, 302, 401, 403, 404, 429, 500, 503])
def test_any_other_answer_is_no_reading(serve: Serve, status: int) -> None:
    with pytest.raises(NoReadingError, match=f"answered {status}, expected 200"):
        Address(serve(body(PUBLISHED if status != 204 else b"", status, Location="/elsewhere"))).fetch()


def test_too_much_is_no_reading_and_not_all_of_it_is_taken(serve: Serve) -> None:
    found = Address(serve(body(b"1" * (40 * MAX_BYTES)))).fetch()
    assert len(found) < 3 * MAX_BYTES
    assert "larger" in problem(found)


def test_an_answer_cut_short_is_no_reading(serve: Serve) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(PUBLISHED)))
        request.end_headers()
        request.wfile.write(PUBLISHED[:40])

    with pytest.raises(NoReadingError, match="can't be reached"):
        Address(serve(answer)).fetch()


def test_a_server_that_hangs_is_left_in_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_file, "HTTP_TIMEOUT_S", 0.2)
    let_go = threading.Event()
    begun = time.monotonic()
    with pytest.raises(NoReadingError, match="can't be reached"):
        Address(serve(lambda _: let_go.wait(60) and None)).fetch()
    assert time.monotonic() - begun < 9  # in all it would take 10 s
    let_go.set()


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_drips_is_left_in_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(budget_file, "HTTP_TOTAL_S", 0.4)
    end = time.monotonic() + 60

    def answer(request: BaseHTTPRequestHandler) -> None:
        head = b"HTTP/1.0 200 OK\r\n"
        request.wfile.write(head if part == "head" else head + b"\r\n")
        while time.monotonic() < end:
            request.wfile.write(b"x")
            time.sleep(0.05)

    begun = time.monotonic()
    with pytest.raises(NoReadingError, match=r"within 0\.4 s|not valid"):
        parse(Address(serve(answer)).fetch(), NOW)
    assert time.monotonic() - begun < 30
    end = 0.0


def test_nobody_there_is_no_reading() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen; while it is bound nobody else does either
        port = probe.getsockname()[1]
        with pytest.raises(NoReadingError, match="ConnectError"):
            Address(f"http://127.0.0.1:{port}/budget.json").fetch()
