"""A bare machine is brought to a running job: start.sh is run for real.

It gets the PATH of a bare host, several kinds of nvidia-smi, and wheels of a stub torch and of a stub X1 that
records how it was started. pip, venv, curl, tmux and the processes are real.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from x1_pretrain import train
from x1_pretrain.errors import UserError
from x1_pretrain.money import bootstrap, supervise
from x1_pretrain.money.bootstrap import (
    TORCH_AT_LEAST,
    TORCH_BUILDS,
    cloud_init,
    environment_file,
    start_script,
    systemd_unit,
)
from x1_pretrain.money.job import NGC_IMAGE, Job, fineweb_edu_commands
from x1_pretrain.money.providers import runpod

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "s3cr3t"
STEPS = ["folders", "gpu", "tools", "python", "torch", "install", "check", "data", "doctor"]
TOOLS = (
    "awk base64 basename bash cat chmod date df dirname env expr flock grep gunzip gzip head id ln ls mkdir "
    "mktemp mv nohup printenv ps readlink rm sed setsid sh sleep sort tail tee timeout touch tr uname wc "
    "curl cc git"
)
TORCH = """
import os
__version__ = {version!r}
class cuda:
    is_available = staticmethod(lambda: int(os.environ.get("STUB_GPUS", "0")) > 0)
    device_count = staticmethod(lambda: int(os.environ.get("STUB_GPUS", "0")))
class ones:
    def __init__(self, n, device): self.total = float(n)
    def __add__(self, other): self.total *= 2; return self
    def sum(self): return self
    def item(self): return self.total
"""
X1 = """
import json, os, pathlib, signal, sys, time
def main():
    if sys.argv[1] == "--version": print("x1 9.9"); return 0
    if sys.argv[1] == "--help":
        print("  train  train from a config")
        if os.environ.get("STUB_DOCTOR"): print("  doctor  check this machine")
        return 0
    row = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "cwd": os.getcwd()}
    record = pathlib.Path(os.environ["STUB_RECORD"])
    with record.open("a") as stream: stream.write(json.dumps(row) + "\\n")
    hold = record.with_name("hold")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    while sys.argv[1] == "supervise" and hold.exists(): time.sleep(0.02)
    print("the job's own words")
    return int(os.environ.get("STUB_EXIT", "0"))
"""


def write_wheel(folder: Path, name: str, version: str, module: str, text: str, extra: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{extra}"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", text)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        if module != "torch":
            wheel.writestr(f"{info}/entry_points.txt", f"[console_scripts]\nx1 = {module}:main\n")
        wheel.writestr(f"{info}/RECORD", "")


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def nvidia_smi(said: str, gpus: int = 1) -> str:
    listed = "\n".join(f"GPU {i}: NVIDIA H100" for i in range(gpus))
    return f'if [ "$1" = -L ]; then echo "{listed}"; else echo "| NVIDIA-SMI 5 {said}  |"; fi\n'


@dataclass
class Host:
    """A bare machine under one folder: its PATH, its workspace, what reached it."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    def job(self, **changes: Any) -> Job:
        made = f"echo made >>{self.root}/made; mkdir -p {self.workspace}/data/tokenized"
        given: dict[str, Any] = {
            "run_name": "tiny",
            "tag": "x1-tiny-1",
            "config_text": "name: tiny\n",
            "source": "x1-pretrain==9.9",
            "provider": "lambda",
            "rate_usd_per_hr": Decimal("1.29"),
            "cap_usd": Decimal("35.00"),
            "workspace": str(self.workspace),
            "data_commands": (made, f"echo '{{}}' >{self.workspace}/data/tokenized/manifest.json"),
            "data_disk_gib": 0,
            "passed_variables": ("X1_ALERTS", "HF_TOKEN"),
        }
        return Job(**(given | changes))

    def command(self, job: Job, *words: str) -> list[str]:
        script = self.root / "start.sh"
        script.write_text(start_script(job))
        return [str(self.root / "bin/bash"), str(script), *words]

    def start(self, job: Job, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.command(job, *words), **env)

    def run(self, command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=60)

    def started(self) -> list[dict[str, Any]]:
        record = self.root / "record"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    def log(self) -> str:
        return (self.workspace / "logs/start.log").read_text()

    def has_nvidia_smi(self, text: str | None) -> None:
        path = self.root / "bin/nvidia-smi"
        path.unlink(missing_ok=True)
        if text is not None:
            executable(path, text)


def bare_host(root: Path) -> Host:
    binaries, wheels = root / "bin", root / "wheels"
    for folder in (binaries, wheels, root / "home"):
        folder.mkdir(parents=True)
    for tool in TOOLS.split():
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is missing here: start.sh can't be run for real")
        (binaries / tool).symlink_to(found)
    base = Path(sys.base_prefix) / f"bin/python3.{sys.version_info.minor}"
    executable(binaries / "python3.12", f'exec {shlex.quote(str(base))} "$@"\n')
    for _, version, build in TORCH_BUILDS:
        write_wheel(
            wheels, "torch", f"{version}+{build}", "torch", TORCH.format(version=f"{version}+{build}")
        )
    write_wheel(wheels, "x1_pretrain", "9.9", "x1_stub", X1, "Requires-Dist: torch>=2.11\n")
    env = {
        "PATH": str(binaries),
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "home"),
        "TMUX_TMPDIR": str(root),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "X1_ENVIRONMENT_FILE": str(root / "etc/environment"),
        "X1_UNIT_FOLDER": str(root / "units"),
        "X1_START_MODE": "foreground",
        "STUB_RECORD": str(root / "record"),
        "STUB_GPUS": "1",
        "X1_ALERTS": SECRET,
    }
    return Host(root, env)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return bare_host(tmp_path / "host")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A machine on which a first start went through, with everything installed for real."""
    host = bare_host(tmp_path_factory.mktemp("machine") / "host")
    host.has_nvidia_smi(nvidia_smi("Driver Version: 570.8    CUDA Version: 12.8"))
    held = host.root / "constraint.txt"  # as an old NGC image holds pip to its own torch
    held.write_text("torch==2.5.0\n")
    first = host.start(host.job(), STUB_EXIT="76", PIP_CONSTRAINT=str(held))
    assert "job runs in the foreground" in first.stdout, first.stdout + first.stderr
    (host.root / "first.json").write_text(json.dumps([first.returncode, first.stdout, host.started()]))
    forget(host)
    return host


def forget(host: Host) -> None:
    """What one start left is no matter of the next test; what it installed stays."""
    for name in ("hold", "record", "made", "pid", "workspace/START_FAILED"):
        (host.root / name).unlink(missing_ok=True)
    shutil.rmtree(host.workspace / "data", ignore_errors=True)


@pytest.fixture(autouse=True)
def _forget(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "ready" in request.fixturenames:
        forget(request.getfixturevalue("ready"))


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------------------
# From nothing to the job


def test_a_bare_machine_comes_to_run_the_job(ready: Host) -> None:
    code, out, rows = json.loads((ready.root / "first.json").read_text())
    assert code == 76  # the job's own exit code: it is the foreground process
    assert re.findall(r"^\S+Z == (\w+)$", out, re.MULTILINE) == STEPS
    assert "the job's own words" in out
    job = ready.job()
    (row,) = rows
    assert row["argv"] == job.supervise_command()[1:]
    assert row["argv"][:7] == shlex.split(
        "supervise --provider lambda --rate-usd-per-hr 1.29 --tag x1-tiny-1"
    )
    trainer = row["argv"][row["argv"].index("--") + 1 :]
    assert trainer[trainer.index("--budget-cap-usd") + 1] == "35.00"
    assert trainer[trainer.index("--budget-curr-cost-uri") + 1] == f"{ready.workspace}/budget.json"
    assert (row["env"]["X1_ALERTS"], row["cwd"]) == (SECRET, str(ready.workspace))
    assert Path(trainer[trainer.index("--config") + 1]).read_text() == "name: tiny\n"
    version = [str(ready.workspace / "venv/bin/python"), "-c", "import torch; print(torch.__version__)"]
    assert subprocess.check_output(version, text=True) == "2.11.0+cu128\n"
    stamped = [
        line for line in ready.log().splitlines() if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line)
    ]
    assert len(stamped) == len(ready.log().splitlines()) > len(STEPS)
    kept = [path.read_bytes() for path in ready.workspace.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in kept)


def test_a_second_start_does_nothing_again_but_the_job(ready: Host) -> None:
    assert ready.start(ready.job()).returncode == 0
    made, venv = (ready.root / "made").read_text(), (ready.workspace / "venv").stat()
    again = ready.start(ready.job(), PIP_FIND_LINKS="/nowhere")  # nothing could be installed now
    assert again.returncode == 0, again.stdout
    assert (ready.root / "made").read_text() == made
    assert (ready.workspace / "venv").stat().st_ctime_ns == venv.st_ctime_ns
    assert len(ready.started()) == 2
    assert "X1 is installed: x1 9.9" in again.stdout
    assert "the corpus is there" in again.stdout


def test_another_driver_gets_another_torch(host: Host) -> None:
    calls, state, venv = host.root / "calls", host.workspace / ".start", host.workspace / "venv"
    record = f'echo "$@" >>{calls}; case "$*" in "-m venv "*) mkdir -p $3/bin; cp $0 $3/bin/python;; esac\n'
    executable(host.root / "bin/some-python", record + "exec true\n")
    (host.root / "bin/cp").symlink_to(shutil.which("cp") or "/bin/cp")
    (host.root / "bin/true").symlink_to(shutil.which("true") or "/bin/true")
    state.mkdir(parents=True)
    (state / "python").write_text(f"wheel {host.root}/bin/some-python\n")
    for build in ("2.13.0 cu130", "2.13.0 cu130", "2.13.0 cu126"):
        (state / "torch").write_text(f"{build}\n")
        done = host.start(host.job(), "step", "torch")
        assert done.returncode == 0, done.stderr
    pip = "-m pip install --quiet --retries 5 --index-url https://download.pytorch.org/whl"
    assert calls.read_text().splitlines() == [
        f"-m venv {venv}",
        f"{pip}/cu130 torch==2.13.0",
        "-c import torch",  # the second time: it is there, and it works
        f"-m venv {venv}",
        f"{pip}/cu126 torch==2.13.0",
    ]


@pytest.mark.parametrize(
    ("said", "build"),
    [
        ("Driver Version: 580.1    CUDA Version: 13.0", "2.13.0 cu130"),
        ("KMD Version: 610.57    CUDA UMD Version: 13.3", "2.13.0 cu130"),
        ("Driver Version: 575.1    CUDA Version: 12.9", "2.11.0 cu128"),
        ("Driver Version: 570.8    CUDA Version: 12.8", "2.11.0 cu128"),
        ("Driver Version: 560.3    CUDA Version: 12.6", "2.13.0 cu126"),
        ("Driver Version: 550.5    CUDA Version: 12.4", None),
        ("Driver Version: 550.5", None),
    ],
)
def test_the_driver_decides_the_torch_build(host: Host, said: str, build: str | None) -> None:
    host.has_nvidia_smi(nvidia_smi(said))
    result = host.start(host.job(), "step", "gpu")
    assert (result.returncode == 0) == (build is not None)
    if build:
        assert (host.workspace / ".start/torch").read_text().strip() == build
    elif "CUDA Version" in said:
        assert "runs CUDA 12.4; torch >= 2.11 needs 12.6 or newer" in result.stderr


def test_no_gpu_is_said_and_a_rented_one_is_insisted_on(host: Host) -> None:
    none = host.start(host.job(gpus=0), "step", "gpu")
    assert none.returncode == 0
    assert (host.workspace / ".start/torch").read_text() == "2.13.0 cpu\n"
    assert "no GPU" in none.stdout
    assert "needs 1 GPU(s)" in host.start(host.job(), "step", "gpu").stderr
    host.has_nvidia_smi(nvidia_smi("CUDA Version: 13.0", gpus=1))
    assert "1 GPU(s) found, the run needs 2" in host.start(host.job(gpus=2), "step", "gpu").stderr
    host.has_nvidia_smi("echo driver/library version mismatch; exit 18\n")
    assert "version mismatch" in host.start(host.job(), "step", "gpu", X1_GPU_WAIT_S="0").stderr


def test_without_a_good_python_uv_brings_one(host: Host) -> None:
    base = (host.root / "bin/python3.12").read_text()
    (host.root / "bin/python3.12").unlink()
    executable(host.root / "bin/python3", "exit 1\n")  # too old to run what it is asked
    uv = f"case $2 in install) mkdir -p $UV_PYTHON_INSTALL_DIR;; find) echo {host.root}/uv-python;; esac\n"
    executable(host.root / "bin/uv", uv)
    (host.root / "uv-python").write_text(base)
    host.workspace.mkdir()
    result = host.start(host.job(), "step", "python")
    assert result.returncode == 0, result.stderr
    assert (host.workspace / ".start/python").read_text() == f"wheel {host.root}/uv-python\n"
    assert (host.workspace / "python").is_dir()


def test_missing_tools_are_installed_or_named(host: Host) -> None:
    (host.root / "bin/git").unlink()
    git, calls = host.root / "bin/git", host.root / "calls"
    executable(host.root / "bin/apt-get", f'echo "$*" >>{calls}; case $* in *install*) touch {git};; esac\n')
    assert host.start(host.job(), "step", "tools").returncode == 0
    assert not calls.exists()  # this source needs no git
    result = host.start(host.job(source="x1-pretrain @ git+https://example.org/x1@0123abc"), "step", "tools")
    if os.geteuid() == 0:
        assert result.returncode == 0, result.stderr
        assert re.search(r" update\n.* install git\n$", calls.read_text())
    else:
        assert "Run: sudo apt-get install git" in result.stderr


@pytest.mark.parametrize(
    ("version", "gpus", "used"),
    [("2.13.0a0+a1.nv26.7", "1", True), ("2.5.0a0", "1", False), ("2.13.0a0", "0", False)],
)
def test_the_torch_of_an_image_is_used_if_it_serves(host: Host, version: str, gpus: str, used: bool) -> None:
    write_wheel(host.root, "torch", version, "torch", TORCH.format(version=version))
    with zipfile.ZipFile(host.root / f"torch-{version}-py3-none-any.whl") as wheel:
        wheel.extractall(host.root / "image")
    (host.root / "bin/python3").symlink_to(host.root / "bin/python3.12")
    host.env |= {"PYTHONPATH": str(host.root / "image"), "STUB_GPUS": gpus}
    result = host.start(host.job(), "step", "python")
    chosen = (host.workspace / ".start/python").read_text().split()
    assert chosen[0] == ("own" if used else "wheel"), result.stdout + result.stderr
    if used:  # and pip leaves it alone when X1 is installed over it
        (host.workspace / ".start/torch").write_text("2.13.0 cu130\n")
        for step in ("torch", "install"):
            done = host.start(host.job(), "step", step)
            assert done.returncode == 0, done.stderr
        assert (host.workspace / "venv/x1-source").exists()
    else:
        assert f"its torch {'is ' if gpus == '1' else ''}{version}" in result.stdout


# ------------------------------------------------------------------------------------------------------------
# When it goes wrong


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    heard: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{SECRET}", heard
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_failed_step_is_loud_and_the_next_start_mends_it(
    ready: Host, hook: tuple[str, list[dict[str, Any]]]
) -> None:
    address, heard = hook
    bad = ready.job(data_commands=("false", "touch /never"))
    result = ready.start(bad, X1_ALERT_HOOK=address)
    assert result.returncode == 1
    assert "START FAILED: step data ended with exit code 1" in result.stdout
    assert "machine still bills" in result.stdout
    assert "guard off this machine" in result.stdout
    assert "step data" in (ready.workspace / "START_FAILED").read_text()
    assert not ready.started()
    assert len(heard) == 1
    assert re.search(r"tiny on lambda: step data .* x1 teardown tiny", heard[0]["text"])
    assert SECRET not in ready.log() + result.stdout
    assert ready.start(ready.job()).returncode == 0
    assert not (ready.workspace / "START_FAILED").exists()
    assert len(ready.started()) == 1


def test_a_step_that_hangs_is_stopped_with_all_it_started(ready: Host) -> None:
    pid = ready.root / "pid"
    result = ready.start(ready.job(data_commands=(f"sleep 60 & echo $! >{pid}; wait",), data_timeout_s=1))
    assert result.returncode == 1
    assert "step data was stopped at its limit of 1 s" in result.stdout
    until(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_disk_gib": 10**7}, "the data needs 10000000: rent a larger disk"),
        ({"data_commands": ("true",)}, "the data commands ended, and there is no"),
        ({"data_commands": ()}, "and no command that makes one"),
    ],
)
def test_data_that_can_not_be_had(ready: Host, changes: dict[str, Any], said: str) -> None:
    result = ready.start(ready.job(**changes), "step", "data")
    assert result.returncode == 1
    assert said in result.stderr
    assert not (ready.root / "made").exists()


def test_a_corpus_that_is_in_the_mirror_is_left_to_the_trainer(ready: Host) -> None:
    """On any machine but the first one nothing is made anew, and no room for it is asked for."""
    job = ready.job(data_from_mirror=True, data_disk_gib=10**7)
    result = ready.start(job, "step", "data")
    assert result.returncode == 0, result.stderr
    assert "the trainer fetches it" in result.stdout
    assert not (ready.root / "made").exists()


def test_after_five_failures_it_is_not_tried_again(ready: Host) -> None:
    (ready.workspace / "START_FAILED").write_text("x\n" * 5)
    result = ready.start(ready.job())
    assert result.returncode == 1
    assert "Remove that file to try again" in result.stderr
    assert "==" not in result.stdout


def test_a_torch_without_this_gpu_fails_before_any_data_is_fetched(ready: Host) -> None:
    result = ready.start(ready.job(), STUB_GPUS="0")
    assert result.returncode == 1
    assert "sees 0 GPU(s), 1 needed" in result.stdout
    assert "== data" not in result.stdout


def test_a_container_that_is_stopped_stops_its_preparation(ready: Host) -> None:
    pid = ready.root / "pid"
    job = ready.job(data_commands=(f"echo $$ >{pid}; exec sleep 60",))
    process = subprocess.Popen(ready.command(job), env=ready.env, stdout=subprocess.PIPE, text=True)
    until(lambda: pid.exists() and pid.read_text().strip() != "")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped" in out
    until(lambda: not alive(int(pid.read_text())))


# ------------------------------------------------------------------------------------------------------------
# How the job is kept running


def test_a_line_that_drops_during_the_preparation_does_not_end_it(ready: Host) -> None:
    begun, go = ready.root / "begun", ready.root / "go"
    waits = f"touch {begun}; until [ -e {go} ]; do sleep 0.02; done"
    job = ready.job(data_commands=(waits, *ready.job().data_commands))
    line = subprocess.Popen(ready.command(job), env=ready.env, start_new_session=True, stdout=subprocess.PIPE)
    until(begun.exists)
    assert line.stdout is not None
    line.stdout.close()  # the terminal is gone
    os.killpg(line.pid, signal.SIGHUP)
    go.touch()
    assert line.wait(timeout=60) == 1  # the stub could not print its words: it did run
    assert len(ready.started()) == 1
    assert "the job runs in the foreground" in ready.log()


@pytest.mark.parametrize("mode", ["nohup", "tmux"])
def test_a_dropped_line_kills_nothing(ready: Host, mode: str) -> None:
    if mode == "tmux":
        tmux = shutil.which("tmux")
        if tmux is None:
            pytest.skip("tmux is not installed")
        (ready.root / "bin/tmux").unlink(missing_ok=True)
        (ready.root / "bin/tmux").symlink_to(tmux)
    (ready.root / "hold").touch()
    job = ready.job(run_name=f"tiny-{os.getpid()}")
    line = subprocess.Popen(
        ready.command(job),
        env=ready.env | {"X1_START_MODE": mode},
        start_new_session=True,
        stdout=-1,
        text=True,
    )
    out, _ = line.communicate(timeout=60)  # returns: nothing of the job holds this output open
    assert line.returncode == 0, out
    until(lambda: bool(ready.started()))
    row = ready.started()[0]
    assert row["env"]["X1_ALERTS"] == SECRET
    for process in Path("/proc").glob("[0-9]*"):  # what a terminal does that goes away
        try:
            if os.getsid(int(process.name)) == line.pid:
                os.kill(int(process.name), signal.SIGHUP)
        except ProcessLookupError:
            continue
    again = ready.start(job, X1_START_MODE=mode)
    assert "the job is running already" in again.stdout
    assert alive(row["pid"])
    assert len(ready.started()) == 1
    (ready.root / "hold").unlink()
    until(lambda: not alive(row["pid"]))
    assert "the job's own words" in (ready.workspace / "logs/supervise.log").read_text()


def test_under_systemd_the_unit_is_written_enabled_and_started(ready: Host) -> None:
    calls = ready.root / "calls"
    calls.unlink(missing_ok=True)
    executable(ready.root / "bin/systemctl", f'echo "$@" >>{calls}\n')
    (ready.root / "units").mkdir(exist_ok=True)
    tricky = "a\"b'c $HOME `id` \\ d"
    result = ready.start(ready.job(), X1_START_MODE="systemd", HF_TOKEN=tricky)
    assert result.returncode == 0, result.stdout
    assert (ready.root / "units/x1-tiny.service").read_text() == systemd_unit(ready.job())
    assert calls.read_text().split("\n")[:3] == [
        "daemon-reload",
        "enable --quiet x1-tiny.service",
        "start x1-tiny.service",
    ]
    kept = ready.root / "etc/environment"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.read_text() == environment_file({"X1_ALERTS": SECRET, "HF_TOKEN": tricky})
    printed = subprocess.check_output(["bash", "-c", f'. {kept}; printf %s "$HF_TOKEN"'], text=True)
    assert printed == tricky
    kept.unlink()


def test_systemd_accepts_the_unit(ready: Host, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "x1-tiny.service"
    unit.write_text(systemd_unit(ready.job(train_flags=("--set", "run.note=100% of $5"))))
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=perhaps"))
    assert subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True).stderr


def test_the_unit_is_restarted_when_killed_and_never_when_it_ended() -> None:
    unit = systemd_unit(Host(Path("/x")).job(train_flags=("--set", "a=100% of $5")))
    assert "Restart=on-abnormal" in unit
    assert "RestartPreventExitStatus=75 76 77 78" in unit
    assert "KillSignal=SIGTERM" in unit
    assert "TimeoutStopSec=60" in unit
    assert unit.count('"a=100%% of $$5"') == 1


def test_a_pod_runs_the_job_as_its_own_process(ready: Host) -> None:
    """By the arguments that RunPod is given, split as it splits them."""
    job = ready.job(provider="runpod", supervise_flags=("--disk-gib", "200"))
    words = shlex.split(runpod.ARGS.replace(runpod.SCRIPT_FILE, str(ready.root / "pod.sh")))
    assert len(words) == 3  # the form that an image's entry point takes
    words[0] = str(ready.root / "bin/bash")
    script = base64.b64encode(start_script(job).encode()).decode()
    assert len(start_script(job)) < runpod.SCRIPT_BYTES
    result = ready.run(words, RUNPOD_POD_ID="pod7", STUB_EXIT="77", **{runpod.SCRIPT_VARIABLE: script})
    assert result.returncode == 77, result.stdout + result.stderr
    argv = ready.started()[-1]["argv"]
    assert argv[:3] == ["supervise", "--instance-id", "pod7"]
    assert argv[3:5] == ["--provider", "runpod"]
    assert argv[argv.index("--") - 2 : argv.index("--")] == ["--disk-gib", "200"]


def test_as_the_first_process_of_a_container_it_stays_in_the_foreground(ready: Host) -> None:
    shut_off = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*shut_off, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for this user")
    env = {name: value for name, value in ready.env.items() if name != "X1_START_MODE"}
    command = [*shut_off, *ready.command(ready.job())]
    result = subprocess.run(
        command, env=env | {"STUB_EXIT": "75"}, capture_output=True, text=True, timeout=60,
        executable=shutil.which("unshare"),
    )  # fmt: skip
    assert result.returncode == 75, result.stdout + result.stderr
    assert "the job runs in the foreground" in result.stdout
    assert ready.started()[-1]["pid"] == 1


# ------------------------------------------------------------------------------------------------------------
# The texts


def nasty(host: Host) -> Job:
    text = "name: tiny # $(touch pwned) `touch pwned` '\"\\ ${HOME}\n\tlast"
    return host.job(
        config_text=text,
        train_flags=("--set", "a=$(touch pwned) 'b' \"c\" \\"),
        data_commands=("echo \"$HF_TOKEN\" 'it' | wc -c",),
        source="x1-pretrain @ git+https://example.org/x1@0123abc",
    )


def test_nothing_is_expanded_on_the_way(ready: Host) -> None:
    odd = nasty(ready)
    job = replace(odd, source="x1-pretrain==9.9", data_commands=ready.job().data_commands)
    assert ready.start(job).returncode == 0
    assert Path(job.config_path).read_text() == f"{job.config_text}\n"
    assert ready.started()[-1]["argv"][-1] == job.train_flags[-1]
    assert not list(ready.root.rglob("pwned"))
    ready.start(ready.job(), "step", "folders")


def test_every_script_passes_shellcheck(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed (it comes with the dev extra)")
    host = Host(tmp_path)
    jobs = [host.job(), nasty(host), host.job(gpus=0, passed_variables=(), data_commands=())]
    jobs.append(host.job(data_commands=fineweb_edu_commands(), provider="runpod"))
    scripts = [Path(bootstrap.__file__).with_name("start.sh")]
    for i, job in enumerate(jobs):
        scripts.append(tmp_path / f"start-{i}.sh")
        scripts[-1].write_text(start_script(job))
    result = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    (tmp_path / "bad.sh").write_text(start_script(jobs[0]) + "\necho $undefined\n")
    assert subprocess.run([shellcheck, str(tmp_path / "bad.sh")], capture_output=True).returncode == 1


def test_no_text_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X1_ALERTS", SECRET)
    job = Host(tmp_path).job()
    for text in (start_script(job), cloud_init(job), systemd_unit(job), repr(job)):
        assert SECRET not in text
    assert SECRET in cloud_init(job, {"X1_ALERTS": SECRET})  # the one that is sent and never kept


def test_cloud_init_carries_the_script_and_the_values(tmp_path: Path) -> None:
    job = nasty(Host(tmp_path))
    text = cloud_init(job, {"HF_TOKEN": 'a"$b'})
    assert text.startswith("#cloud-config\n")
    assert len(text) < 1_000_000  # what Lambda takes
    values, script = yaml.safe_load(text)["write_files"]
    assert script["content"] == start_script(job)
    assert script["path"].startswith("/var/lib/cloud/scripts/per-boot/")  # after a reboot it goes on
    assert (values["permissions"], script["permissions"]) == ("0600", "0755")
    assert values["content"] == 'HF_TOKEN="a\\"\\$b"\n'
    assert values["path"] in systemd_unit(job)
    with pytest.raises(UserError, match="several lines"):
        environment_file({"KEY": "a\nb"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": "nvcr.io/nvidia/pytorch:latest"}, "pinned tag"),
        ({"image": "nvcr.io/nvidia/pytorch"}, "pinned tag"),
        ({"passed_variables": (f"X1_ALERTS={SECRET}",)}, "never NAME=value"),
        ({"tag": "Big Tag"}, "tag"),
        ({"run_name": "a/../b"}, "run_name"),
        ({"workspace": "/work space"}, "workspace"),
        ({"cap_usd": Decimal("NaN")}, "cap_usd"),
        ({"rate_usd_per_hr": Decimal(-1)}, "rate_usd_per_hr"),
        ({"config_text": "a: 1\nX1_CONFIG_END\n"}, "X1_CONFIG_END"),
        ({"source": " "}, "source"),
        ({"train_flags": ("a\nb",)}, "one line"),
        ({"supervise_flags": ("--tax", "0.1", "--")}, "train_flags"),
    ],
)
def test_a_job_that_can_not_be_written_down_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Host(Path("/x")).job(**changes)


def test_a_mode_that_there_is_not_is_refused_at_once(host: Host) -> None:
    result = host.start(host.job(), X1_START_MODE="screen")
    assert result.returncode == 1
    assert "X1_START_MODE=screen: expected foreground, systemd, tmux or nohup" in result.stderr
    assert not host.workspace.exists()


def test_supervisor_and_trainer_know_every_flag_they_are_given() -> None:
    told = ("--ended", "x1-tiny-0=2026-05-23T15:42:01Z=3.12", "--spent-before-usd", "3.12")
    more = ("--mirror", "s3://bucket/runs", "--mirror-data")
    words = Host(Path("/x")).job(supervise_flags=told, train_flags=more).supervise_command()
    cut = words.index("--")
    for app, given in ((supervise.app, [*words[2:cut], "--instance-id"]), (train.app, words[cut + 1 :])):
        known = {option for parameter in get_command(app).params for option in parameter.opts}
        assert {word for word in given if word.startswith("--")} <= known


def test_the_template_alone_starts_nothing() -> None:
    script = Path(bootstrap.__file__).with_name("start.sh")
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "no job is filled in" in result.stderr


def test_one_fact_one_place() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"torch>={TORCH_AT_LEAST}" in project["dependencies"]
    oldest = tuple(map(int, TORCH_AT_LEAST.split(".")))
    assert all(tuple(map(int, row.torch.split(".")[:2])) >= oldest for row in TORCH_BUILDS)
    needs = [tuple(map(int, row.driver_cuda.split("."))) for row in TORCH_BUILDS]
    assert needs == sorted(needs, reverse=True)
    assert re.findall(r"^FROM (\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE) == [NGC_IMAGE]
