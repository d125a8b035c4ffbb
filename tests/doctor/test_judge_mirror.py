"""What is said of a mirror: by hand, and that the advice which is given helps."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.doctor.judge_mirror import Run, mirror, pace, span
from x1_pretrain.doctor.mirror import Visit
from x1_pretrain.doctor.trial import Trial

MIB = 1 << 20
STORE = {"label": "s3://bucket/runs", "conditional": True, "look_s": 0.0}
SENT = {"bytes": 40_000_000, "seconds": 0.4, "total_bytes": 61 * MIB}  # 100 MB/s
READ = {"bytes": 40_000_000, "seconds": 0.2, "total_bytes": 61 * MIB}  # 200 MB/s
RUN = Run(
    checkpoint_bytes=1.067e9,
    every=300,
    steps=84_000,
    step_s=2.92,
    write_s=2.134,
    look_s=15.0,
    most_mb_per_s=None,
    usd_per_hr=1.19,
)


def visit(ended: str | None = None, same_disk: bool = False, **parts: dict[str, Any]) -> Visit:
    there = {"store": STORE, "sent": SENT, "read": READ} | parts
    return Visit("s3://bucket/runs", Trial({k: v for k, v in there.items() if v}, ended), same_disk)


def test_a_good_one() -> None:
    found = mirror(visit(), without_lease=False)
    assert (found.status, found.fix) == ("ok", "")
    assert "takes 100 MB/s, gives 200 MB/s (61 MiB sent and 61 MiB read)" in found.found
    assert "keeps two writers apart" in found.found
    assert found.measured["send_bytes_per_sec"] == 1e8
    assert found.measured["read_bytes_per_sec"] == 2e8


def test_none() -> None:
    assert mirror(None, without_lease=False).status == "-"
    assert pace(None, RUN).status == "-"


@pytest.mark.parametrize(
    ("there", "allowed", "status", "said", "fix"),
    [
        (
            visit(refused={"message": "mirror s3://b: there is no such bucket; make it"}),
            False,
            "broken",
            "s3://b: there is no such bucket",
            "make it",
        ),
        (Visit("s3://b", Trial({}, "ended after 25 s")), False, "broken", "s3://b: ended after", "endpoint"),
        (visit(store={**STORE, "conditional": False}), False, "broken", "two writers", "without_lease"),
        (visit(store={**STORE, "conditional": False}), True, "slow", "can't keep two", "unattended"),
        (visit(same_disk=True), False, "slow", "same disk", "bucket"),
        (visit(ended="ended after 25 s", read={}), False, "slow", "ended after 25 s", "once more"),
        (visit(trouble={"kind": "away", "message": "503"}), False, "slow", "503", "once more"),
        (
            visit(trouble={"kind": "denied", "message": "full; free some"}),
            False,
            "broken",
            "full",
            "free some",
        ),
        (visit(trouble={"kind": "damaged", "message": "other bytes"}), False, "broken", "other bytes", ""),
        (
            visit(left={"place": "s3://b/x", "message": "403"}),
            False,
            "slow",
            "s3://b/x could not be",
            "remove",
        ),
        (visit(read={}), False, "ok", "reading not measured (61 MiB sent)", ""),
    ],
)
def test_what_is_wrong_is_said_with_the_next_step(
    there: Visit, allowed: bool, status: str, said: str, fix: str
) -> None:
    found = mirror(there, allowed)
    assert found.status == status
    assert said in found.found
    assert fix in found.fix


def test_the_run_by_hand() -> None:
    """1.067 GB at 100 and 200 MB/s; lost: 300 x 2.92 + 2 x 2.134 + 15 + 10.67 s."""
    found = pace(visit(), RUN)
    lost_s = 300 * 2.92 + 2 * 2.134 + 15 + 10.67
    assert (found.status, found.fix) == ("ok", "")
    assert "sent in 11 s and fetched on a new machine in 5.3 s" in found.found
    assert "one every 14.6 min (300 steps)" in found.found
    assert f"at worst {lost_s / 60:.1f} min are lost with this machine, $0.30" in found.found
    assert found.measured["send_s"] == pytest.approx(10.67)
    assert found.measured["fetch_s"] == pytest.approx(5.335)
    assert found.measured["lost_s"] == pytest.approx(lost_s)


def test_a_seldom_checkpoint_is_fine_for_a_machine_that_stays() -> None:
    found = pace(visit(), replace(RUN, every=1800))
    assert found.status == "ok"
    assert "checkpoint.every=300 loses 15.1 min" in found.fix


def test_a_mirror_that_lags() -> None:
    """1.067 GB at 1 MB/s is 1,067 s, and there is one each 293."""
    slow = visit(sent={**SENT, "seconds": 40.0})
    found = pace(slow, replace(RUN, every=100))
    assert found.status == "slow"
    assert "lags behind" in found.found
    assert "--set checkpoint.every=400" in found.fix  # of 370 that are needed
    assert "3.82 MB/s" in found.fix  # in the 279 s that are left beside the look
    assert pace(slow, replace(RUN, every=400)).status == "ok"


def test_the_limit_is_named_where_it_is_what_holds_the_line() -> None:
    run = replace(RUN, every=100, most_mb_per_s=2.0)
    found = pace(visit(), run)
    assert found.status == "slow"
    assert "as mirror.max_mb_per_s has it" in found.found
    assert "mirror.max_mb_per_s=4" in found.fix
    assert pace(visit(), replace(run, most_mb_per_s=4.0)).status == "ok"
    assert "max_mb_per_s" not in pace(visit(), replace(run, most_mb_per_s=200.0)).found


def test_a_store_that_counts_writes_is_looked_at_less_often() -> None:
    there = visit(store={**STORE, "look_s": 60.0})
    assert pace(there, RUN).measured["lost_s"] == pytest.approx(pace(visit(), RUN).measured["lost_s"] + 45)


def test_without_a_step_the_sending_alone() -> None:
    found = pace(visit(), replace(RUN, step_s=None))
    assert found.status == "-"
    assert "sent in 11 s" in found.found
    assert pace(visit(sent={}, read={}), RUN).status == "-"


@given(
    st.floats(1e3, 1e12),
    st.integers(1, 10**6),
    st.floats(1e-3, 1e3),
    st.floats(0, 1e3),
    st.one_of(st.none(), st.floats(0.001, 1e4)),
    st.floats(1e-4, 1e4),
)
def test_what_is_advised_helps(
    size: float, every: int, step_s: float, write_s: float, most: float | None, seconds: float
) -> None:
    there = visit(sent={**SENT, "seconds": seconds})
    run = Run(size, every, 10**12, step_s, write_s, 15.0, most, None)
    found = pace(there, run)
    if found.status != "slow":
        assert "checkpoint.every" not in found.fix or found.measured["lost_s"] > 1800
        return
    advised = re.search(r"checkpoint\.every=(\d+)", found.fix)
    assert advised
    assert pace(there, replace(run, every=int(advised[1]))).status == "ok"
    if limit := re.search(r"max_mb_per_s=(\d+)", found.fix):
        assert pace(there, replace(run, most_mb_per_s=min(float(limit[1]), math.inf))).status == "ok"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.44, "0.4 s"), (12, "12 s"), (293, "4.9 min"), (7500, "2h05m")]
)
def test_spans(seconds: float, said: str) -> None:
    assert span(seconds) == said
