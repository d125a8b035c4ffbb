from __future__ import annotations

import threading

import pytest

from x1_pretrain.mirror.sending import Sender


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it then, and the next try is like any other."""
    woken = list[str]()
    sender = Sender(lambda: woken.append("woken"))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        sender._start(lambda: True, "x1-test")
    assert (sender.busy, sender.failing) == (False, True)
    assert "can't start new thread" in str(sender.error)
    sender.wait(1)
    sender._start(lambda: True, "x1-test")
    sender.wait(10)
    assert (sender.busy, sender.error, woken) == (False, None, ["woken"])
