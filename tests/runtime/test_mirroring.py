"""What the run and its mirror come to in the ledger."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.money.fakes import Steps
from x1_pretrain.config import MirrorConfig
from x1_pretrain.mirror.job import Opened, Status
from x1_pretrain.money.account import account
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.runtime.mirroring import bill

GIB = 2**30


@pytest.mark.parametrize(("uri", "gib"), [("s3://bucket/runs", 7), ("hf://user/runs", 12)])
def test_the_bill_is_for_what_the_mirror_holds(uri: str, gib: int, tmp_path: Path) -> None:
    """7 GiB are there of 12 that were sent, and no checkpoint is on this disk: a dollar a GiB and hour."""
    ledger = Ledger(tmp_path / "ledger.jsonl", Steps())
    mirror = MirrorConfig(uri=uri, storage_usd_per_gib_month=720, egress_usd_per_gib=10)
    config = SimpleNamespace(mirror=mirror, checkpoint_folder=tmp_path / "checkpoints")
    run: Any = SimpleNamespace(guard=SimpleNamespace(ledger=ledger), config=config)
    opened, status = Opened(uri, 1, True, restored_bytes=2 * GIB), Status()
    told: Any = SimpleNamespace(opened=opened, status=status)
    bill(run, told)
    ledger.clock.sleep(3600)
    told.status = Status(mirrored=[10, 20], held_bytes=7 * GIB, sent_bytes=12 * GIB)
    bill(run, told)
    assert [row["gib"] for row in ledger.rows()] == [0, gib]
    assert account(ledger.rows()).beside_usd == gib + 2 * 10
