"""The watchdog and the search, with workers that hang until a setting is there; and real ranks once."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from x1_pretrain.doctor import all_reduce
from x1_pretrain.doctor.all_reduce import SAFE_NCCL, Attempt, Patience
from x1_pretrain.records.processes import is_alive

QUICK = Patience(start_s=60.0, first_s=1.5, quiet_s=1.0)  # a word is followed by the next at once
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/bin:/bin"}
RESULT = """
def done(rate, right=True):
    print(json.dumps({"stage": "done", "bus_bytes_per_sec": rate, "right": right}), flush=True)
"""


def worker(folder: Path, body: str) -> list[str]:
    file = folder / "worker.py"
    file.write_text(f"import json, os, sys, time\n{RESULT}\nrank = int(os.environ['RANK'])\n{body}\n")
    return [sys.executable, str(file)]


def hangs_unless(condition: str, rate: str = "1e9") -> str:
    return (
        "print(json.dumps({'stage': 'torch is imported'}), flush=True)\n"
        f"if not ({condition}):\n    time.sleep(600)\ndone({rate})"
    )


def search(folder: Path, body: str, deadline_s: float = 60.0, ranks: int = 2) -> list[Attempt]:
    deadline = time.monotonic() + deadline_s
    return all_reduce.search(worker(folder, body), ranks, SAFE_NCCL, deadline, QUICK, environment=ENVIRONMENT)


def test_what_works_is_not_searched_further(tmp_path: Path) -> None:
    found = search(tmp_path, "done(5e9)")
    assert found == [Attempt({}, "works", "", 5e9)]
    assert all_reduce.best(found) == found[0]


def test_a_hang_is_ended_and_each_setting_alone_is_tried(tmp_path: Path) -> None:
    body = hangs_unless(
        "'NCCL_P2P_DISABLE' in os.environ or 'NCCL_NET' in os.environ",
        "3e9 if 'NCCL_NET' in os.environ else 2e9",
    )
    found = search(tmp_path, body)
    outcomes = [(one.outcome, dict(one.settings)) for one in found]
    assert outcomes == [
        ("hangs", {}),
        ("works", {"NCCL_P2P_DISABLE": "1"}),
        ("hangs", {"NCCL_IB_DISABLE": "1"}),
        ("hangs", {"NCCL_SOCKET_IFNAME": "lo"}),
        ("works", {"NCCL_NET": "Socket", "NCCL_NET_PLUGIN": "none"}),
    ]
    assert "torch is imported" in found[0].reason
    best = all_reduce.best(found)
    assert best is not None
    assert best.bus_bytes_per_sec == 3e9  # the faster of the two that work


def test_all_together_where_none_helps_alone(tmp_path: Path) -> None:
    together = {key: value for settings in SAFE_NCCL for key, value in settings.items()}
    condition = f"all(os.environ.get(k) == v for k, v in {together!r}.items())"
    found = search(tmp_path, hangs_unless(condition))
    assert [one.outcome for one in found] == ["hangs"] * 5 + ["works"]
    assert dict(found[-1].settings) == together
    assert len(together) == 5


def test_one_rank_that_hangs_is_enough_and_none_stays_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = (
        f"open({str(pids)!r} + str(rank), 'w').write(str(os.getpid()))\n"
        "print(json.dumps({'stage': 'begun'}), flush=True)\n"
        "time.sleep(600) if rank == 1 else done(1e9)"
    )
    found = search(tmp_path, body, deadline_s=0.0)
    assert found[0].outcome == "hangs"
    assert "rank 1" in found[0].reason
    assert {one.outcome for one in found[1:]} == {"not tried"}
    for rank in (0, 1):
        assert not is_alive(int(Path(f"{pids}{rank}").read_text()))


def test_silence_from_the_start_counts_from_the_start(tmp_path: Path) -> None:
    begun = time.monotonic()
    patience = Patience(start_s=1.0, first_s=600.0, quiet_s=600.0)
    found = all_reduce.attempt(worker(tmp_path, "time.sleep(900)"), 2, {}, patience, ENVIRONMENT)
    assert found.outcome == "hangs"
    assert 1.0 < time.monotonic() - begun < 300


@pytest.mark.parametrize(
    ("body", "outcome", "words"),
    [
        ("raise RuntimeError('NCCL error: unhandled system error')", "fails", "unhandled system error"),
        ("sys.exit(3)", "fails", "exit code 3"),
        ("os.abort() if rank else time.sleep(600)", "fails", "SIGABRT"),
        ("done(1e9, right=rank == 0)", "wrong", "wrong"),
        ("print('chatter')", "fails", "without a result"),
        ("print('[1, 2]'); print('x'); done(1e9)", "works", ""),
    ],
)
def test_failures_and_wrong_sums(tmp_path: Path, body: str, outcome: str, words: str) -> None:
    found = all_reduce.attempt(worker(tmp_path, body), 2, {}, QUICK, ENVIRONMENT)
    assert found.outcome == outcome
    assert words in found.reason


def test_a_command_that_does_not_exist_leaves_nothing_running() -> None:
    with pytest.raises(FileNotFoundError):
        all_reduce.attempt(["/no/such/program"], 2, {}, QUICK, ENVIRONMENT)


def test_real_ranks_sum_on_the_cpu() -> None:
    found = all_reduce.search(all_reduce.worker("gloo"), 2, all_reduce.SAFE_GLOO, time.monotonic() + 300)
    best = all_reduce.best(found)
    assert best is not None, found
    assert best.bus_bytes_per_sec is not None
    assert 1e6 < best.bus_bytes_per_sec < 1e12


def test_combinations_end_with_everything() -> None:
    alone = [{"A": "1"}, {"B": "2", "C": "3"}]
    assert all_reduce.combinations(alone) == [*alone, {"A": "1", "B": "2", "C": "3"}]
    assert all_reduce.combinations(alone[:1]) == alone[:1]
