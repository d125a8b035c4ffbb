"""The SkyPilot task: its structure here, and in a slow test what SkyPilot itself says of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from x1_pretrain.errors import UserError
from x1_pretrain.money.job import NGC_IMAGE, Job, fineweb_edu_commands
from x1_pretrain.money.skypilot import skypilot_task

SKYPILOT = "skypilot==0.14.1"
READ = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.name, *task.resources, sep='\\n')"


def job(**changes: Any) -> Job:
    given: dict[str, Any] = {
        "run_name": "x1-50m",
        "tag": "x1-50m-7f3a",
        "config_text": "name: x1-50m\n# it's: |\n\t{odd}\n\n  indented\n",
        "source": "x1-pretrain @ git+https://example.org/x1@0123abc",
        "provider": "runpod",
        "rate_usd_per_hr": Decimal("1.19"),
        "cap_usd": Decimal("35"),
        "data_commands": fineweb_edu_commands(),
        "passed_variables": ("X1_ALERTS", "HF_TOKEN"),
        "gpus": 2,
    }
    return Job(**(given | changes))


def task(**changes: Any) -> str:
    return skypilot_task(job(**changes), "a100-80gb", Decimal("1.40"))


def test_the_task_says_what_a_capped_run_needs() -> None:
    read = yaml.safe_load(task())
    resources = read["resources"]
    assert resources["accelerators"] == "A100-80GB:2"
    assert [choice["infra"] for choice in resources["any_of"]] == ["lambda", "runpod"]
    assert [choice.get("image_id") for choice in resources["any_of"]] == [None, f"docker:{NGC_IMAGE}"]
    assert resources["max_hourly_cost"] == 1.4
    assert resources["use_spot"] is False
    assert resources["disk_size"] == 200
    assert resources["autostop"] == {"idle_minutes": 5, "down": True}
    recovery = {"strategy": "FAILOVER", "max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert resources["job_recovery"] == recovery
    assert read["envs"] == {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    assert read["name"] == "x1-50m-7f3a"


def test_secrets_are_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X1_ALERTS", "s3cr3t")
    text = task()
    assert "s3cr3t" not in text
    assert yaml.safe_load(text)["secrets"] == {"X1_ALERTS": None, "HF_TOKEN": None}
    assert "--secret X1_ALERTS --secret HF_TOKEN" in text
    assert yaml.safe_load(task(passed_variables=()))["secrets"] == {}


def test_the_comments_say_what_it_can_not_do() -> None:
    comments = "\n".join(line for line in task().splitlines() if line.startswith("#"))
    for limit in (
        "cap the total",
        "mounts no buckets",
        "controller",
        "confirm that a machine is gone",
        "spot",
    ):
        assert limit in comments.replace("\n#     ", " ")


def test_setup_and_run_do_what_they_say(tmp_path: Path) -> None:
    """`setup` is run with the preparation cut off: the script it writes is whole; `run` then is the job."""
    workspace = tmp_path / "workspace"
    given = job(workspace=str(workspace))
    read = yaml.safe_load(skypilot_task(given, "h100", Decimal("2.50")))
    setup = read["setup"].replace(
        f"bash {workspace}/start.sh prepare", f"bash {workspace}/start.sh step folders"
    )
    assert setup != read["setup"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "bin/sudo").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", setup], check=True, env=env, capture_output=True)
    assert Path(given.config_path).read_text() == given.config_text
    x1 = Path(given.venv) / "bin/x1"
    x1.parent.mkdir(parents=True)
    x1.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 75\n')
    x1.chmod(0o755)
    ran = subprocess.run(["bash", "-c", read["run"]], env=env, capture_output=True, text=True)
    assert ran.returncode == 75, ran.stderr  # what SkyPilot recovers on
    words = ran.stdout.splitlines()
    assert words[words.index("--rate-usd-per-hr") + 1] == "2.50"  # the most it may cost, so never too little
    assert words[words.index("--provider") + 1] == "local"


def test_what_can_not_be_a_task_is_refused() -> None:
    with pytest.raises(UserError, match="max_hourly_cost"):
        skypilot_task(job(), "h100", Decimal(0))
    with pytest.raises(UserError, match="gpus 0"):
        skypilot_task(job(gpus=0), "h100", Decimal(1))


@pytest.fixture(scope="module")
def sky_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has SkyPilot, in a folder that is thrown away."""
    folder = tmp_path_factory.mktemp("skypilot")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv/bin/python")
    got = subprocess.run([python, "-m", "pip", "install", "-q", SKYPILOT], capture_output=True, text=True)
    if got.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"{SKYPILOT} can't be had here: {got.stderr.strip().splitlines()[-1]}")
    return python


def skypilot_reads(python: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """SkyPilot's own reading, without an account and without a word to anyone."""
    path = folder / "task.yaml"
    path.write_text(text)
    quiet = {"HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PATH": os.environ["PATH"]}
    return subprocess.run([python, "-c", READ, str(path)], env=quiet, capture_output=True, text=True)


@pytest.mark.slow
def test_skypilot_accepts_the_task(sky_python: str, tmp_path: Path) -> None:
    result = skypilot_reads(sky_python, task(), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "x1-50m-7f3a" in result.stdout
    assert "Lambda({'A100-80GB': 2}, disk_size=200, max_cost=$1.4/hr)" in result.stdout
    assert f"RunPod({{'A100-80GB': 2}}, image_id=docker:{NGC_IMAGE}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("max_hourly_cost:", "max_hourly_price:", "did you mean 'max_hourly_cost'"),
        ("idle_minutes:", "idle_minute:", "idle_minute"),
        ("recover_on_exit_codes: [75]", "recover_on_exit_codes: [300]", "300"),
        ("\nsecrets:", "\nsecret:", "did you mean 'secrets'"),
        ("infra: lambda", "infra: lambada", "lambada"),
    ],
)
def test_skypilot_refuses_a_wrong_key(
    sky_python: str, tmp_path: Path, good: str, bad: str, said: str
) -> None:
    assert task().count(good) == 1
    result = skypilot_reads(sky_python, task().replace(good, bad), tmp_path)
    assert result.returncode != 0
    assert said in result.stderr
