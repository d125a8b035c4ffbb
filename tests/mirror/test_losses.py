"""What a dead machine takes with it: the formula against a mirror that is simulated second by second, and the
tables of the page against the script that computes them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
TICKS = 4000


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mirror_losses", ROOT / "benchmarks/mirror_losses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["mirror_losses"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


LOSSES = loaded()


def published(train: int, write: int, send: int, look: int, phase: int) -> Iterator[tuple[int, int]]:
    """A mirror that looks every `look` ticks while it is idle, sends the newest it lacks, and publishes it
    when that is done: the tick of each publication, and the tick at which its checkpoint began."""
    period, busy_until, sending, has = train + write, -1, -1, -1
    for now in range(TICKS):
        if sending >= 0 and now == busy_until:
            yield now, sending * period - write
            has, sending, due = sending, -1, now + look
            continue
        if sending < 0 and (now - phase) % look == 0 if has < 0 else sending < 0 and now == due:
            newest = now // period
            if newest > has and newest > 0:
                sending, busy_until = newest, now + send
            elif has >= 0:
                due = now + look


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 150), st.integers(1, 20), st.data())
def test_nothing_more_is_lost_than_the_formula_says_and_it_is_nearly_reached(
    train: int, write: int, send: int, look: int, data: st.DataObject
) -> None:
    one = LOSSES.Timing(train, write, send, look)
    worst = 0
    for phase in data.draw(st.permutations(range(look)))[:5]:
        before = None
        for at, begun in published(train, write, send, look, phase):
            if before is not None:  # it dies a moment before this one is there
                worst = max(worst, at - before)
            before = begun
    assert worst <= one.worst_s()
    assert worst >= one.worst_s() - one.period_s - 2 * look  # and it is no empty bound


def test_by_hand() -> None:
    """A checkpoint every 10 minutes, 2 s to write, 10 s to send, a look every 15 s."""
    one = LOSSES.Timing(600.0, 2.0, 10.0, 15.0)
    assert one.keeps_up
    assert one.worst_s() == 600 + 2 + 2 + 15 + 10
    assert one.worst_steps(3.0) == pytest.approx((600 + 15 + 10) / 3)
    slow = LOSSES.Timing(60.0, 2.0, 100.0, 15.0)
    assert not slow.keeps_up
    assert slow.worst_s() == 60 + 2 + 2 + 2 * 115


def test_the_page_has_what_the_script_says() -> None:
    page = (ROOT / "docs" / "mirror.md").read_text(encoding="utf-8")
    for table in LOSSES.tables().split("\n\n"):
        assert " ".join(table.split()) in " ".join(page.split())
