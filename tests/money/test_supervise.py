"""The supervisor with stand-ins for trainer and sidecar: what comes back, what does not, what ends too."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from x1_pretrain.config_reading import parse_config
from x1_pretrain.errors import UserError
from x1_pretrain.mirror.head import Head, Object, Writer, encode
from x1_pretrain.money import latch, supervise
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger, read_rows
from x1_pretrain.money.supervise import Supervisor, trainer_option, trainer_options, without_option

# writes its file once, then waits; a second argument is how long it lives
SIDECAR = """
import json, sys, time, pathlib
file = pathlib.Path(sys.argv[1])
with open(file.with_name("sidecars"), "a") as f: f.write("x")
file.write_text(json.dumps({"last_update_utc": str(time.time())}))
time.sleep(float(sys.argv[2]))
"""

# one session: notes itself, makes steps, and ends as the n-th word says (a code, "kill", "wait")
TRAINER = """
import json, os, pathlib, signal, sys, time
folder, moves, *ends = pathlib.Path(sys.argv[1]), *sys.argv[2:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(folder / "sessions", "a") as f: f.write("x")
n = len((folder / "sessions").read_text())
with open(folder / "events.jsonl", "a") as f: f.write(json.dumps({"event": "batch"}) + "\\n")
if moves == "moves":
    with open(folder / "metrics.jsonl", "a") as f: f.write(json.dumps({"step": n}) + "\\n")
end = ends[min(n, len(ends)) - 1]
time.sleep(0.3)
if end == "kill": os.kill(os.getpid(), signal.SIGKILL)
if end == "wait": time.sleep(60)
sys.exit(int(end) if end != "wait" else 0)
"""


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Supervisor]:
    (tmp_path / "sidecar.py").write_text(SIDECAR)
    (tmp_path / "trainer.py").write_text(TRAINER)

    def make(*ends: str, moves: bool = True, sidecar_lives: float = 60, **more: object) -> Supervisor:
        trainer = [
            sys.executable,
            str(tmp_path / "trainer.py"),
            str(tmp_path),
            "moves" if moves else "stands",
        ]
        sidecar = [sys.executable, str(tmp_path / "sidecar.py"), str(tmp_path / "budget.json")]
        return Supervisor(
            folder=tmp_path,
            budget=tmp_path / "budget.json",
            trainer_command=[*trainer, *ends],
            sidecar_command=[*sidecar, str(sidecar_lives)],
            ledger=Ledger(tmp_path / "ledger.jsonl", Clock()),
            clock=Clock(),
            pause_s=0.0,
            **more,  # type: ignore[arg-type]
        )

    return make


def sessions(tmp_path: Path) -> int:
    file = tmp_path / "sessions"
    return len(file.read_text()) if file.exists() else 0


def told(supervisor: Supervisor, event: str) -> list[dict[str, object]]:
    return [row for row in supervisor.ledger.rows() if row["event"] == event]


@pytest.mark.parametrize("code", [0, 1, 2, 76, 77, 78])
def test_these_end_it(code: int, made: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = made(str(code))
    assert supervisor.run() == code
    assert sessions(tmp_path) == 1
    assert supervisor.sidecar is not None
    assert supervisor.sidecar.poll() is not None  # nothing is left behind


@pytest.mark.parametrize("end", ["75", "kill"])
def test_an_interrupted_trainer_comes_back(end: str, made: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = made(end, end, "0")
    assert supervisor.run() == 0
    assert sessions(tmp_path) == 3
    assert len(told(supervisor, "relaunch")) == 2
    down = [row["down_s"] for row in told(supervisor, "back")]
    assert len(down) == 2
    assert all(isinstance(s, float) and 0 <= s < 30 for s in down)


def test_a_session_that_is_over_at_the_next_look_was_back_too(made: Callable[..., Supervisor]) -> None:
    supervisor = made("75", "0")
    look = supervisor._note_return

    def slow() -> None:
        look()
        assert supervisor.trainer is not None
        supervisor.trainer.wait(60)

    supervisor._note_return = slow  # type: ignore[method-assign]
    assert supervisor.run() == 0
    assert len(told(supervisor, "back")) == 1


def test_there_is_a_limit(made: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = made("75", max_relaunches=2)
    assert supervisor.run() == 75
    assert sessions(tmp_path) == 3


@pytest.mark.parametrize(("end", "code"), [("75", 75), ("kill", 1)])
def test_sessions_that_make_no_step_are_not_paid_for_ever(
    end: str, code: int, made: Callable[..., Supervisor], tmp_path: Path
) -> None:
    assert made(end, moves=False).run() == code
    assert sessions(tmp_path) == supervise.NO_PROGRESS


def test_a_latch_is_read_before_every_start(made: Callable[..., Supervisor], tmp_path: Path) -> None:
    latch.write(tmp_path, latch.Stop("too dear", "guard", 76, "2026-01-01T00:00:00Z"))
    assert made("0").run() == 78
    assert sessions(tmp_path) == 0


def test_a_latch_that_appears_between_two_sessions_holds(
    made: Callable[..., Supervisor], tmp_path: Path
) -> None:
    supervisor = made("75", "0")
    stop = latch.Stop("a person", "person", 76, "2026-01-01T00:00:00Z")
    supervisor._pause = lambda: latch.write(tmp_path, stop)  # type: ignore[method-assign]
    assert supervisor.run() == 78
    assert sessions(tmp_path) == 1


def test_nothing_trains_before_the_sidecar_has_written(
    made: Callable[..., Supervisor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(supervise, "FIRST_READING_S", 0.5)
    supervisor = made("0")
    supervisor.sidecar_command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert supervisor.run() == 78
    assert "wrote no" in capfd.readouterr().err
    monkeypatch.setattr(supervise, "FIRST_READING_S", 60.0)
    supervisor.sidecar_command = [sys.executable, "-c", "raise SystemExit(2)"]
    assert supervisor.run() == 78
    assert "exit code 2" in capfd.readouterr().err
    assert sessions(tmp_path) == 0


def test_a_dead_sidecar_comes_back(
    made: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "SIDECAR_PAUSE_S", 0.1)
    supervisor = made("75", "75", "75", "0", sidecar_lives=0.3)
    assert supervisor.run() == 0
    assert len((tmp_path / "sidecars").read_text()) >= 3
    assert told(supervisor, "sidecar")[0]["exit_code"] == 0


RUN = """
import sys
from pathlib import Path
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.supervise import Supervisor
f = Path(sys.argv[1])
t = [sys.executable, str(f / "trainer.py"), str(f), "moves", "wait"]
s = [sys.executable, str(f / "sidecar.py"), str(f / "budget.json"), "60"]
sys.exit(Supervisor(f, f / "budget.json", t, s, Ledger(f / "ledger.jsonl", Clock()), Clock()).run())
"""


@pytest.fixture
def running(
    made: Callable[..., Supervisor], tmp_path: Path
) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    made("wait")  # for its scripts
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)])
    deadline = time.monotonic() + 60
    while sessions(tmp_path) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    return process, children


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_goes_on_to_the_trainer(
    number: int, running: tuple[subprocess.Popen[bytes], list[psutil.Process]]
) -> None:
    process, children = running
    process.send_signal(number)
    assert process.wait(60) == 75
    assert psutil.wait_procs(children, 30)[1] == []


def test_nothing_trains_without_its_supervisor(
    running: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    process, children = running
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, 30)[1] == []


SLOW_START = """
import os, signal, sys, time
from x1_pretrain.money import supervise
supervisor, in_time = os.getpid(), supervise.dies_with_parent(signal.SIGTERM)
def late():
    os.kill(supervisor, signal.SIGKILL)
    while os.getppid() == supervisor: time.sleep(0.01)
    in_time()
supervise.dies_with_parent = lambda number: late
supervise.start(["echo", "it trains"])
"""


def test_nothing_trains_when_the_supervisor_is_killed_while_it_starts_it() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_START], stdout=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_a_hang_up_is_nothing(running: tuple[subprocess.Popen[bytes], list[psutil.Process]]) -> None:
    process, children = running
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert all(child.is_running() for child in children)
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_request_in_the_pause_is_heard(made: Callable[..., Supervisor], tmp_path: Path) -> None:
    """Between two sessions there is no trainer to send it on to."""
    supervisor = made("kill")
    supervisor.pause_s = 30.0

    def ask() -> None:
        while not told(supervisor, "relaunch"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    begun = time.monotonic()
    assert supervisor.run() == 75
    assert time.monotonic() - begun < 20
    assert sessions(tmp_path) == 1


def test_a_raise_is_given_once(made: Callable[..., Supervisor], tmp_path: Path) -> None:
    """A relaunch that repeated it would clear a stop that came meanwhile."""
    supervisor = made("75", "0")
    supervisor.trainer_command = [*supervisor.trainer_command, "--raise-ceiling-to", "40"]
    latch.write(tmp_path, latch.Stop("old", "guard", 76, "2026-01-01T00:00:00Z"))
    supervisor._pause = lambda: latch.clear(tmp_path)  # type: ignore[method-assign]  # as the trainer does
    assert supervisor.run() == 0
    assert "--raise-ceiling-to" not in supervisor.trainer_command
    assert without_option(["a", "--x", "1", "--x=2", "b"], "--x") == ["a", "b"]


def test_a_ledger_that_can_not_be_written_ends_nothing(
    made: Callable[..., Supervisor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    assert made("75", "0").run() == 0
    assert "ledger.jsonl: can't be written" in capfd.readouterr().err


def test_the_file_it_keeps_is_a_path(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "x1_pretrain.cli",
        "supervise",
        "--",
        "--config",
        "configs/x1-50m-a100.yaml",
    ]
    words += ["--budget-cap-usd", "35", "--budget-curr-cost-uri", "http://127.0.0.1:1/b.json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "give a path" in done.stderr


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--config", "a"], "a"),
        (["--x", "--config=b"], "b"),
        (["--config"], None),
        (["--configs", "a"], None),
    ],
)
def test_the_trainers_options_are_read_as_it_reads_them(words: list[str], value: str | None) -> None:
    assert trainer_option(words, "--config") == value


def test_the_command_needs_a_ceiling(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "x1_pretrain.cli",
        "supervise",
        "--",
        "--config",
        "configs/x1-50m-a100.yaml",
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "--budget-cap-usd" in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.dumps(done.stdout) == '""'


def test_options_that_may_be_repeated() -> None:
    words = ["--set", "a=1", "--x", "--set=b=2", "--set", "c=3"]
    assert trainer_options(words, "--set") == ["a=1", "b=2", "c=3"]
    assert trainer_options(["--x"], "--set") == []


# ------------------------------------------------------------------------------------------------------------
# A run that comes from elsewhere

CONFIG = {
    "name": "tiny",
    "model": {
        "layers": 1,
        "d_model": 8,
        "heads": 1,
        "kv_heads": 1,
        "d_ff": 8,
        "context": 8,
        "vocab_size": 300,
    },
    "training": {"total_steps": 4, "batch_tokens": 8},
    "optimizer": {"warmup_steps": 0},
}
EARLIER = (
    b'{"seq": 1, "time_utc": "2026-05-23T11:00:00Z", "event": "adopted", "tag": "x1-a", "provider": "local", '
    b'"usd_per_hr": "1.00", "since_utc": "2026-05-23T11:00:00Z"}\n'
    b'{"seq": 2, "time_utc": "2026-05-23T12:00:00Z", "event": "poll", "tag": "x1-a", "machine_usd": "1.00", '
    b'"usd_per_hr": "1.00", "spent_usd": "1.00"}\n'
)


def mirrored(folder: Path, ledger: bytes = EARLIER) -> str:
    """A mirror in a folder, in which the run has a ledger."""
    piece = Object("e0001-1a2b3c4d/records/ledger.jsonl/0", len(ledger), hashlib.sha256(ledger).hexdigest())
    file = folder / "tiny" / piece.path
    file.parent.mkdir(parents=True)
    file.write_bytes(ledger)
    writer = Writer(1, "1a2b3c4d", "f", "gpu-1", 7, "2026-05-23T11:00:00Z")
    (folder / "tiny" / "head.json").write_bytes(
        encode(Head("tiny", writer, records={"ledger.jsonl": [piece]}))
    )
    return str(folder)


def brought(run: Path, *flags: str, **mirror: object) -> list[dict[str, object]]:
    supervise.bring_ledger(parse_config({**CONFIG, "mirror": mirror}, "a test"), flags, run)
    return read_rows(run / "ledger.jsonl")


@pytest.mark.parametrize("how", ["config", "--mirror", "--resume-from"])
def test_the_ledger_comes_along(how: str, tmp_path: Path) -> None:
    uri = mirrored(tmp_path / "mirror")
    flags = {"config": [], "--mirror": ["--mirror", uri], "--resume-from": [f"--resume-from={uri}/tiny"]}[how]
    rows = brought(tmp_path / "run", *flags, **({"uri": uri} if how == "config" else {}))
    assert [row["event"] for row in rows] == ["adopted", "poll"]
    assert brought(tmp_path / "run", *flags, **({"uri": uri} if how == "config" else {})) == rows


def test_without_a_mirror_or_a_run_in_it_there_is_none(tmp_path: Path) -> None:
    assert brought(tmp_path / "run") == []
    assert brought(tmp_path / "run", uri=str(tmp_path / "empty")) == []


def test_nothing_starts_where_the_ledger_can_not_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """But a machine that has one goes on: it is the newer one."""
    monkeypatch.setattr(supervise, "LEDGER_PATIENCE_S", 0.1)
    uri = mirrored(tmp_path / "mirror")
    piece = next((tmp_path / "mirror").rglob("ledger.jsonl")) / "0"
    piece.write_bytes(piece.read_bytes()[:50])
    with pytest.raises(UserError) as raised:
        brought(tmp_path / "run", uri=uri)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "ledger.jsonl").write_bytes(EARLIER[: EARLIER.index(b"\n") + 1])
    assert len(brought(tmp_path / "run", uri=uri)) == 1
    assert "going on with the ledger that is here" in capfd.readouterr().err


def test_a_request_before_the_first_reading_is_an_interruption(
    made: Callable[..., Supervisor], tmp_path: Path
) -> None:
    supervisor = made("0")
    supervisor.sidecar_command = [sys.executable, "-c", "import time; time.sleep(60)"]

    def ask() -> None:
        while supervisor.sidecar is None:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    assert supervisor.run() == 75
    assert sessions(tmp_path) == 0
