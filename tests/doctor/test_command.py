"""`x1 doctor` as a user runs it, on whatever machine the tests run on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.corpora import write_config

from x1_pretrain.command import run
from x1_pretrain.doctor import all_reduce, command, conclusion, examination, nccl_env
from x1_pretrain.doctor.all_reduce import Attempt
from x1_pretrain.doctor.examination import Examined, Options
from x1_pretrain.doctor.machine import look
from x1_pretrain.records.processes import is_alive

CALL = (
    "import sys; from x1_pretrain.doctor.command import app; from x1_pretrain.command import run; "
    "sys.exit(run(app, sys.argv[1:], prog='x1 doctor'))"
)


def doctor(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CALL, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        check=False,
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in json.loads(done.stdout)["findings"]}


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    return write_config(folder / "tiny.yaml", data={"dir": str(corpus)}, run_dir=str(folder / "run"))


@pytest.fixture(scope="module")
def whole(config: Path) -> subprocess.CompletedProcess[str]:
    return doctor("--config", config, "--device", "cpu", "--offline", "--usd-per-hr", "2", "--json")


def test_a_config_is_examined_and_priced(whole: subprocess.CompletedProcess[str]) -> None:
    assert whole.returncode == 0, whole.stdout + whole.stderr
    tree, found = json.loads(whole.stdout), rows(whole)
    assert tree["exit_code"] == 0
    assert {row["status"] for row in found.values()} <= {"ok", "slow", "-"}
    for check in ("torch", "matmul", "disk", "data", "data hashes", "data reading", "dry run", "compile"):
        assert found[check]["status"] in ("ok", "slow"), found[check]
    estimate = tree["estimate"]
    low, high = estimate["tokens_per_sec_spread"]
    assert low <= estimate["tokens_per_sec"] <= high
    assert estimate["usd"] == pytest.approx(2 * estimate["hours"])
    assert estimate["hours"] * 3600 == pytest.approx(sum(estimate["seconds"].values()))
    assert "offline" in found["clock"]["found"]


def test_nothing_is_left_behind(whole: subprocess.CompletedProcess[str], config: Path) -> None:
    assert whole.returncode == 0
    assert [path.name for path in config.parent.iterdir()] == [config.name]


@pytest.mark.parametrize("later_s", [0.0, 1.5])
def test_sigterm_ends_the_children_and_leaves_no_file(tmp_path: Path, later_s: float) -> None:
    """At the very moment that a child is started, and while it works."""
    args = [sys.executable, "-c", CALL, "--offline", "--device", "cpu", "--ckpt-dir", str(tmp_path)]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as found:
        process = psutil.Process(found.pid)
        end = time.monotonic() + 60
        while not (children := process.children()) and time.monotonic() < end:
            time.sleep(0.02)
        assert children
        time.sleep(later_s)
        found.terminate()
        _, errors = found.communicate(timeout=120)
    assert found.returncode == 143, errors
    assert b"Traceback" not in errors
    assert not any(is_alive(child.pid) for child in children)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_nobody_has_in_hand_yet_is_ended_and_those_of_others_are_not() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    started: list[subprocess.Popen[bytes]] = []

    def terminated_beside() -> None:
        with command.ended_in_order():
            started.append(subprocess.Popen(sleep, start_new_session=True))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    other = subprocess.Popen(sleep)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            terminated_beside()
        assert ended.value.code == 143
        assert not is_alive(started[0].pid)
        assert other.poll() is None
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        other.kill()
        other.wait()


def test_without_a_config_the_machine_alone() -> None:
    done = doctor("--offline", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "With --config FILE" in done.stdout
    assert "matmul" in done.stdout
    assert "data hashes" not in done.stdout


def test_a_torch_that_cannot_be_imported_is_a_finding(config: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    done = doctor("--config", config, "--offline", "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    found = rows(done)
    assert found["torch"]["status"] == "broken"
    assert "libcudart.so.13" in found["torch"]["found"]
    assert found["torch"]["fix"]
    assert found["dry run"]["status"] == "broken"
    assert found["data"]["status"] == "ok"  # what needs no torch is still examined
    assert json.loads(done.stdout)["estimate"] is None


def test_a_torch_that_crashes_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nos.abort()\n")
    done = doctor("--offline", "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "SIGABRT" in rows(done)["torch"]["found"]


@pytest.mark.slow
def test_missing_data_and_missing_gpus_are_broken_and_the_rest_is_examined(
    config: Path, tmp_path: Path
) -> None:
    done = doctor(
        "--config", config, "--offline", "--json", "--gpus", "64", "--data-dir", tmp_path / "none",
        "--set", "training.batch_tokens=2048",
    )  # fmt: skip
    found = rows(done)
    assert done.returncode == 1
    assert found["data"]["status"] == "broken"
    assert found["GPUs"]["status"] == "broken"
    assert "64 wanted" in found["GPUs"]["found"]
    assert found["GPUs"]["fix"]
    assert found["dry run"]["status"] == "ok"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--device", "tpu"], "--device tpu"),
        (["--limit-s", "1"], "--limit-s 1"),
        (["--limit-s", "nan"], "--limit-s nan"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--set", "seed=1"], "no config"),
        (["--gpus", "0"], "--gpus"),
        (["--usd-per-hr", "-1"], "--usd-per-hr"),
        (["--usd-per-hr", "inf"], "--usd-per-hr inf"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], words: str) -> None:
    done = doctor(*args)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_is_quick_because_torch_is_not_imported() -> None:
    code = f"import sys; sys.argv[1:] = ['--help']\ntry:\n    exec({CALL!r})\nexcept SystemExit: pass\n"
    check = "assert 'torch' not in sys.modules, 'torch'; print('free of torch')"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert "free of torch" in done.stdout, done.stderr
    assert "--env-file" in done.stdout


def test_progress_goes_to_a_terminal_only(capfd: pytest.CaptureFixture[str]) -> None:
    progress = command.Progress(time.monotonic(), quiet=False)
    progress.say("the machine")
    progress.clear()
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------
# Settings that were needed end in the file that `x1 train` reads


def examined(attempts: list[Attempt]) -> Examined:
    return Examined(look(), None, attempts=attempts, ranks=2)


def options() -> Options:
    return Options(None, None, Path(), 2, "cpu", False, False, True, 100.0, (), {})


def test_the_settings_that_work_are_written_and_picked_up(tmp_path: Path) -> None:
    hung = Attempt({}, "hangs", "no sign of life for 15 s after 'x' of rank 0")
    works = Attempt({"NCCL_P2P_DISABLE": "1"}, "works", "", 2e9)
    page = conclusion.conclude(options(), examined([hung, works]), tmp_path / "x1-nccl.env", None)
    row = next(row for row in page.findings if row.check == "all-reduce")
    assert row.status == "slow"
    assert "x1 train picks it up" in row.fix
    environment: dict[str, str] = {}
    assert nccl_env.pick_up(tmp_path / "run.yaml", environment) == {"NCCL_P2P_DISABLE": "1"}
    text = (tmp_path / "x1-nccl.env").read_text()
    assert "as it is: hangs" in text
    assert "2.0 GB/s" in text


def test_no_file_where_none_is_needed_and_a_persons_own_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "x1-nccl.env"
    conclusion.conclude(options(), examined([Attempt({}, "works", "", 2e9)]), file, None)
    assert not file.exists()
    file.write_text("NCCL_NET=mine\n")
    attempts = [Attempt({}, "hangs"), Attempt({"NCCL_NET": "Socket"}, "works", "", 2e9)]
    page = conclusion.conclude(options(), examined(attempts), file, None)
    row = next(row for row in page.findings if row.check == "all-reduce")
    assert file.read_text() == "NCCL_NET=mine\n"
    assert "left alone" in row.found
    assert "export NCCL_NET=Socket" in row.fix


def test_two_ranks_on_the_cpu_are_tried_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined([])
    found.compute.parts["torch"] = {"version": "x"}
    tried: list[int] = []

    def search(command: Any, ranks: int, *_: Any, **__: Any) -> list[Attempt]:
        tried.append(ranks)
        return [Attempt({}, "works", "", 1e9)]

    monkeypatch.setattr(all_reduce, "search", search)
    examination.reduce(options(), found, lambda _: None)
    assert (tried, len(found.attempts)) == ([2], 1)


def test_a_typo_in_the_mirror_ends_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command.app, ["--mirror", "s4://bucket/runs"], "x1 doctor") == 2
    assert "did you mean s3://" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mirror_of_a_config_and_the_one_of_a_flag(config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "--device", "cpu", "--offline", "--json")
    done = doctor(*words, "--mirror", tmp_path / "there")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done)
    assert found["mirror"]["status"] == "slow"
    assert "same disk" in found["mirror"]["found"]
    assert found["mirror pace"]["status"] in ("ok", "slow")
    assert found["mirror pace"]["measured"]["lost_s"] > 0
    assert list((tmp_path / "there").glob("[!.]*")) == []
    broken = doctor(*words, "--set", f"mirror.uri={tmp_path}/no/folder/runs")
    assert broken.returncode == 1
    assert rows(broken)["mirror"]["status"] == "broken"
    assert "make the folder" in rows(broken)["mirror"]["fix"]
    alone = doctor("--device", "cpu", "--offline", "--json", "--mirror", tmp_path / "there")
    assert rows(alone)["mirror"]["status"] == "slow"
    assert "mirror pace" not in rows(alone)
