"""A child may hang, crash or babble: what it had found by then is kept, and nothing of it stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from x1_pretrain.doctor import trial
from x1_pretrain.doctor.trial import Trial
from x1_pretrain.records.processes import is_alive

HEAD = "import os, sys, time, subprocess\nfrom x1_pretrain.doctor.trial import answered\n"


def child(
    folder: Path,
    body: str,
    task: dict[str, object] | None = None,
    on_part: Callable[[str], None] = lambda _: None,
) -> Trial:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "some_child.py").write_text(f"{HEAD}def answer(task, voice):\n{lines}\nanswered(answer)\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return trial.run("some_child", task or {}, 120.0, environment, on_part)


def test_what_a_child_says_arrives_by_part(tmp_path: Path) -> None:
    body = "print('noise', end='', flush=True)\nvoice.say('a', n=task['n'] + 1)\nvoice.say('b', text='x')"
    found = child(tmp_path, body, task={"n": 1})
    assert found == Trial({"a": {"n": 2}, "b": {"text": "x"}}, None)
    assert found.part("c") == {}


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """At its call the time of the child is up."""
    now = [0.0]
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    return lambda _: now.append(now.pop() + 121)


def ends(pid: int) -> None:
    end = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_hang_is_ended_in_time_and_keeps_what_was_found(tmp_path: Path, up: Callable[[str], None]) -> None:
    found = child(tmp_path, "voice.say('a', n=1)\ntime.sleep(600)", on_part=up)
    assert found.parts == {"a": {"n": 1}}
    assert found.trouble is not None
    assert "120 s" in found.trouble


def test_what_a_hanging_child_started_ends_with_it(tmp_path: Path, up: Callable[[str], None]) -> None:
    body = "p = subprocess.Popen(['sleep', '600'])\nvoice.say('a', pid=p.pid)\ntime.sleep(600)"
    ends(child(tmp_path, body, on_part=up).part("a")["pid"])


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
        "import os\nfrom x1_pretrain.doctor import trial\n"
        f"trial.run('other', {{}}, 600, {{**os.environ, 'PYTHONPATH': {str(tmp_path)!r}}}, "
        "on_part=lambda pid: (print(pid, flush=True), os._exit(0)))\n"
    )
    (tmp_path / "other.py").write_text(
        f"{HEAD}def answer(task, voice):\n    voice.say(str(os.getpid()))\n    time.sleep(600)\n"
        "answered(answer)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, timeout=120, check=False)
    ends(int(done.stdout))
