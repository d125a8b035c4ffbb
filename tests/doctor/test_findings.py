"""The page: its exit code, its lines, its JSON."""

from __future__ import annotations

import json

import pytest

from x1_pretrain.doctor import findings
from x1_pretrain.doctor.findings import Finding, Status


@pytest.mark.parametrize(
    ("statuses", "code"),
    [([], 0), (["ok", "-"], 0), (["ok", "slow"], 0), (["slow", "broken"], 1), (["broken"], 1)],
)
def test_only_what_is_broken_is_a_fault(statuses: list[Status], code: int) -> None:
    assert findings.exit_code([Finding("a", status, "") for status in statuses]) == code


@pytest.mark.parametrize("width", [50, 80, 200])
def test_every_word_is_on_the_page_and_no_line_is_too_long(width: int) -> None:
    found, fix = " ".join(f"word{n}" for n in range(40)), " ".join(f"mend{n}" for n in range(30))
    page = findings.table([Finding("a check", "broken", found, fix), Finding("b", "ok", "")], width)
    assert max(map(len, page.splitlines())) <= width
    assert page.split()[:3] == ["BROKEN", "a", "check"]
    assert all(word in page.split() for word in (*found.split(), *fix.split(), "fix:"))
    assert page.splitlines()[-1].split() == ["OK", "b"]
    assert findings.table([], width) == ""


def test_the_summary_names_what_is_not_well() -> None:
    rows = [
        Finding("a", "ok", ""),
        Finding("disk", "slow", ""),
        Finding("x", "-", ""),
        Finding("y", "broken", ""),
    ]
    assert findings.summary(rows) == "1 ok, 1 slow (disk), 1 broken (y)"


def test_json_has_no_nan() -> None:
    rows = findings.as_json([Finding("a", "ok", "x", measured={"v": float("nan"), "w": [float("inf"), 1.5]})])
    assert json.loads(json.dumps(rows, allow_nan=False))[0]["measured"] == {"v": None, "w": [None, 1.5]}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 KiB"),
        (512, "0.5 KiB"),
        (398 << 10, "398 KiB"),
        (5 << 20, "5 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (3 << 50, "3,145,728 GiB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert findings.size(count) == text
