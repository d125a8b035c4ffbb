"""A visit to a store: what it measures, and that nothing of it stays, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from tests.corpora import tiny_config
from tests.stores.hub import Hub
from tests.stores.model_store import Clock, ModelStore
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket, wait_for

from x1_pretrain.config_reading import parse_config
from x1_pretrain.doctor import mirror, mirror_trial
from x1_pretrain.doctor.mirror_trial import SIZES, DamagedError, Traffic, rounds

MIB = 1 << 20


def visit(uri: str, limit_s: float = 120.0, folder: Path = Path("/")) -> mirror.Visit:
    found = mirror.look(None, uri, folder, limit_s, None)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------
# What is measured


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = visit(str(tmp_path / "runs"), folder=tmp_path)
    assert found.trial.trouble is None
    assert found.trial.part("store") == {
        "label": str(tmp_path / "runs"),
        "conditional": True,
        "look_s": 0.0,
    }
    for part in ("sent", "read"):
        facts = found.trial.part(part)
        assert facts["bytes"] in SIZES
        assert facts["bytes"] <= facts["total_bytes"] <= 64 * MIB
    assert found.same_disk
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".x1-mirror"]
    assert not list((tmp_path / "runs/.x1-mirror/writing").iterdir())


def test_a_slow_line_is_measured_and_costs_little(
    s3: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MB/s for all together: more is not told, and no more is sent than there is time for."""
    monkeypatch.setattr(mirror, "EACH_S", 1.0)
    proxy.add("slow", bytes_per_s=4e6)
    found = visit(f"s3://{s3.bucket}/runs").trial
    assert found.trouble is None, found
    for part in ("sent", "read"):
        facts = found.part(part)
        assert 1e5 < facts["bytes"] / facts["seconds"] < 5e6, found
        assert facts["total_bytes"] <= 8 * MIB  # not one of 16 at this rate
    assert s3.keys() == []


def test_rounds_end_where_the_next_would_take_too_long() -> None:
    now = [0.0]

    def work(size: int) -> None:
        now[0] += size / 10

    def told(each_s: float) -> list[tuple[int, float, int]]:
        found = rounds(work, [10, 40, 160], each_s, lambda: now[0])
        return [(one["bytes"], one["seconds"], one["total_bytes"]) for one in found]

    assert told(100) == [(10, 1.0, 10), (40, 4.0, 50), (160, 16.0, 210)]
    assert told(20) == [(10, 1.0, 10), (40, 4.0, 50)]  # 5 + 16 s
    assert told(4.9) == [(10, 1.0, 10)]
    assert told(0) == [(10, 1.0, 10)]


def test_never_more_than_said() -> None:
    assert sum(SIZES) <= 64 * MIB
    assert sum(mirror_trial.SIZES_HUB) <= 64 * MIB


def traffic() -> Traffic:
    return Traffic(ModelStore(Clock()), "run/x1-doctor-0", threading.Event())


def test_what_comes_back_is_compared() -> None:
    one = traffic()
    one.send(3 * MIB + 2)
    one.read(0)
    key = one.rounds[0][1].key
    data = bytearray(one.store.get(key)[0])
    assert len(data) == 3 * MIB // 2 + 1
    data[-1] ^= 1
    one.store.put(key, bytes(data))
    with pytest.raises(DamagedError):
        one.read(0)


@pytest.mark.parametrize("hours", [23, 25])
def test_what_a_killed_doctor_left_is_removed_after_a_day(hours: int) -> None:
    """And nothing else that lies there."""
    store = ModelStore(Clock())
    now = store.clock.now() + timedelta(hours=hours)
    one = Traffic(store, "run/x1-doctor-0", threading.Event(), lambda: now)
    old, others = "run/x1-doctor-1/0-0.safetensors", {"run/e0001-1a2b3c4d/files/a", "other/x1-doctor-2/b"}
    for key in (old, *others):
        store.put(key, b"x")
    store.put("run/x1-doctor-0/preflight-0", b"x")  # it was ended in the middle of that
    one.send(100)
    one.remove()
    left = {meta.key for top in ("run", "other") for meta in store.below(top)}
    assert left == (others if hours > 24 else others | {old})


def test_the_hub_keeps_what_it_is_given_so_nothing_is_committed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    found = visit("hf://user/x1-runs").trial
    assert found.trouble is None, found
    assert found.part("store")["look_s"] >= 60
    assert found.part("sent")["total_bytes"] == 16 * MIB
    assert found.part("read") == {}
    commits = [commit for repo in hub.repos.values() for commit in repo.commits]
    assert commits
    assert not [path for commit in commits for path in commit.files if path.endswith(".safetensors")]


# ------------------------------------------------------------------------------------------------------------
# What is wrong


def test_no_such_bucket_is_one_line(s3: Bucket) -> None:
    found = visit("s3://x1-no-such-bucket/runs").trial
    assert "no such bucket" in found.part("refused")["message"]
    assert "x1-doctor" not in found.part("refused")["message"]


def test_a_store_that_is_lost_on_the_way_is_said_in_its_own_words(s3: Bucket, proxy: FaultyProxy) -> None:
    proxy.add("403", on="PUT", path="safetensors", skip=3)
    found = visit(f"s3://{s3.bucket}/runs").trial
    trouble = found.part("trouble")
    assert trouble["kind"] == "denied"
    assert trouble["message"].startswith(f"s3://{s3.bucket}/runs: ")
    assert found.part("sent")["bytes"] == SIZES[0]  # and what was measured until then
    assert samples(s3) == []


@pytest.mark.parametrize("uri", ["s4://bucket/runs", "s3://key:secret@bucket/runs"])
def test_a_typo_asks_no_store(uri: str) -> None:
    message = visit(uri).trial.part("refused")["message"]
    assert "\n" not in message
    assert "secret" not in message


def test_a_copy_in_the_run_folder_is_none(tmp_path: Path) -> None:
    tree = tiny_config(name="x", run_dir=str(tmp_path / "runs/x"), mirror=str(tmp_path / "runs"))
    found = mirror.look(parse_config(tree, "test"), None, tmp_path, 20.0, None)
    assert found is not None
    assert "overlaps" in found.trial.part("refused")["message"]
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------
# However it ends


@pytest.fixture
def slow(s3: Bucket, proxy: FaultyProxy) -> Bucket:
    """A line on which a visit is still sending after seconds."""
    proxy.add("slow", bytes_per_s=4e6)
    return s3


CALL = """
import signal, sys
from pathlib import Path
from x1_pretrain.doctor import command, mirror
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell starts with &
with command.ended_in_order():
    print(mirror.look(None, sys.argv[1], Path("/"), 60.0, None))
"""


def samples(bucket: Bucket) -> list[str]:
    return [key for key in bucket.sizes() if "safetensors" in key]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_nothing_stays_after_a_signal(slow: Bucket, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM; and of a doctor that is killed its child removes what it sent."""
    command = [sys.executable, "-c", CALL, f"s3://{slow.bucket}/runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        wait_for(lambda: samples(slow), within_s=60)
        os.kill(child.pid, number)
        child.communicate(timeout=120)
    assert child.returncode != 0
    wait_for(lambda: not samples(slow), within_s=60)
    time.sleep(0.3)  # nothing that was under way comes later
    assert not samples(slow)


def test_nothing_stays_when_the_time_is_up(slow: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "LEAVE_S", 120.0)
    found = visit(f"s3://{slow.bucket}/runs", limit_s=1.2).trial
    assert "ended after" in (found.trouble or "") or found.part("sent")
    assert not samples(slow)
