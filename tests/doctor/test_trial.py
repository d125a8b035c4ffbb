"""A child may hang, crash or babble: what it had found by then is kept, and nothing of it stays behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from x1_pretrain.doctor import trial
from x1_pretrain.doctor.trial import Trial

HEAD = "import os, sys, time, subprocess\nfrom x1_pretrain.doctor.trial import answered\n"


def child(folder: Path, body: str, limit_s: float = 20.0, task: dict[str, object] | None = None) -> Trial:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "some_child.py").write_text(f"{HEAD}def answer(task, voice):\n{lines}\nanswered(answer)\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return trial.run("some_child", task or {}, limit_s, environment)


def test_what_a_child_says_arrives_by_part(tmp_path: Path) -> None:
    body = "print('noise', end='', flush=True)\nvoice.say('a', n=task['n'] + 1)\nvoice.say('b', text='x')"
    found = child(tmp_path, body, task={"n": 1})
    assert found == Trial({"a": {"n": 2}, "b": {"text": "x"}}, None)
    assert found.part("c") == {}


def test_a_hang_is_ended_in_time_and_keeps_what_was_found(tmp_path: Path) -> None:
    begun = time.monotonic()
    found = child(tmp_path, "voice.say('a', n=1)\ntime.sleep(600)", limit_s=3.0)
    assert time.monotonic() - begun < 6
    assert found.parts == {"a": {"n": 1}}
    assert found.trouble is not None
    assert "3 s" in found.trouble


def test_what_a_hanging_child_started_ends_with_it(tmp_path: Path) -> None:
    body = "p = subprocess.Popen(['sleep', '600'])\nvoice.say('a', pid=p.pid)\ntime.sleep(600)"
    pid = child(tmp_path, body, limit_s=3.0).part("a")["pid"]
    end = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('a bad day')", "ValueError: a bad day"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(7)", "exit code 7"),
        ("sys.stderr.write('line one\\nlast line\\n'); sys.stderr.flush(); os._exit(3)", "last line"),
    ],
)
def test_a_crash_says_why(tmp_path: Path, body: str, words: str) -> None:
    found = child(tmp_path, f"voice.say('a')\n{body}")
    assert found.parts == {"a": {}}
    assert words in str(found.trouble)


def test_a_child_ends_when_its_parent_does(tmp_path: Path) -> None:
    parent = (
        "import os, threading\nfrom x1_pretrain.doctor import trial\n"
        "threading.Timer(4.0, lambda: os._exit(0)).start()\n"
        f"trial.run('other', {{}}, 600, {{**os.environ, 'PYTHONPATH': {str(tmp_path)!r}}})\n"
    )
    pid_file = tmp_path / "pid"
    (tmp_path / "other.py").write_text(
        f"{HEAD}def answer(task, voice):\n"
        f"    open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\nanswered(answer)\n"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", parent], timeout=60, check=False)
    pid, end = int(pid_file.read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid):
        assert time.monotonic() < end
        time.sleep(0.05)
