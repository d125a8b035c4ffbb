"""Machines that are lost with their disks: the run goes on at the next one from its mirror alone, its losses
are those of a run that nobody disturbed, and its ledger is one ledger."""

from __future__ import annotations

import random
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest
from tests.corpora import write_config
from tests.end_to_end.processes import Training, rows, wait_until
from tests.end_to_end.rehearsal import Rehearsal, rehearsal
from tests.stores.s3 import Bucket, serving_apart

from x1_pretrain.mirror.heads import look
from x1_pretrain.money.account import account
from x1_pretrain.money.ledger import read_rows
from x1_pretrain.stores.folder_store import FolderStore

STEPS = 1200
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(
        folder / "tiny.yaml",
        training={"total_steps": STEPS, "compile": "off", "micro_batch": 8, "deterministic": True},
        checkpoint={"every": 100},
        evaluation={"every": 600, "prompts": []},
        log={"every": 10},
        budget={"read_every_s": 120.0, "warmup_s": 0.0},
        mirror={"every_s": 0.5, "stale_s": 3.0, "grace_s": 5.0, "storage_usd_per_gib_month": 50.0},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config: Path, corpus: Path) -> dict[int, float]:
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = Training("--config", config, "--data-dir", corpus, "--run-dir", run).end()
    assert code == 0, output
    return losses(run)


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in rows(run / "metrics.jsonl") if "train/loss" in r}


def here(config: Path, folder: Path) -> Path:
    file = folder / "c.yaml"
    file.write_text(config.read_text() + f"run_dir: {folder}/runs/r\n")
    return file


def until_it_published(r: Rehearsal, mirror: Path, moves: int, launched: subprocess.Popen[str]) -> None:
    """The machine after so many moves has mirrored a checkpoint of its own: of two in a row that did not, the
    second is not replaced."""
    began = newest(mirror)
    wait_until(lambda: len(r.ledger("moved")) == moves and newest(mirror) > began, launched)


def newest(mirror: Path) -> int:
    """The newest checkpoint that the mirror has."""
    found = look(FolderStore(mirror), "tiny") if mirror.exists() else None
    return max((one.step for one in found[0].checkpoints), default=-1) if found else -1


def test_a_bucket_that_only_the_launcher_has_the_keys_of(
    tmp_path: Path, config: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    """A real S3 server; what a machine needs to reach it came with the launch request."""
    fault = {"kind": "unhealthy", "after_s": 500, "times": 1}
    with (
        serving_apart() as url,
        rehearsal(tmp_path, here(config, tmp_path), corpus, [fault], disks_die=True) as r,
    ):
        bucket = Bucket(url)
        r.env |= bucket.env
        mirror = f"s3://{bucket.bucket}/runs"
        code, output = r.end(r.start("--mirror", mirror, ceiling="8"), 300)
        assert code == 0, output + r.machine_log()
        assert len(r.ledger("moved")) == 1, output + r.machine_log()
        settled(r, pulled(r, mirror), undisturbed, 2)
        kept = [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "pulled"]
        assert not [file for file in kept if b"testing-secret" in file.read_bytes()]


def pulled(r: Rehearsal, mirror: str) -> Path:
    """The run as its mirror has it: nothing else is left of it."""
    into = r.folder / "pulled"
    code, output = r.x1("pull", f"{mirror}/tiny", "--output", str(into))
    assert code == 0, output
    return into


def settled(r: Rehearsal, run: Path, undisturbed: dict[int, float], machines: int) -> None:
    """What must be true at the end, however many machines it took."""
    assert r.alive() == 0
    assert len(r.fake.world.machines) == machines
    assert not [folder for folder in (r.folder / "machines").iterdir() if folder.is_dir()]  # with their disks
    assert losses(run) == undisturbed
    steps = [row["step"] for row in rows(run / "steps.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    one_ledger(r, run, machines)


def one_ledger(r: Rehearsal, run: Path, machines: int) -> None:
    """Each machine once, the dead ones ended, and never less than was billed."""
    kept = read_rows(run / "ledger.jsonl")
    assert [row["seq"] for row in kept] == list(range(1, len(kept) + 1))
    known = account(kept)
    assert len({m.tag for m in known.machines}) == len(known.machines) == machines
    assert all(m.ended is not None for m in known.machines[:-1])
    home = account(r.ledger())
    for mine, theirs in zip(known.machines[:-1], home.machines[:-1], strict=True):
        assert mine.tag == theirs.tag
        assert mine.ended is not None
        assert theirs.ended is not None
        assert mine.spent_by(mine.ended) >= theirs.spent_by(theirs.ended) - Decimal("0.001")
    for machine in home.machines:
        assert machine.ended is not None
        assert machine.machine_id is not None
        assert machine.spent_by(machine.ended) >= r.fake.world.bill_usd(machine.machine_id) - Decimal("0.05")
    spent = [Decimal(row["spent_usd"]) for row in kept if row["event"] == "poll"]
    assert spent == sorted(spent)  # no count begins anew on a new machine
    assert known.settled_usd() <= home.spent_by(home.machines[-1].ended or home.machines[-1].since) * 2


@pytest.mark.parametrize(
    ("kind", "times", "seed"),
    [("unhealthy", 1, 0), ("preempted", 1, 1), ("unhealthy", 2, 2), ("preempted", 2, 3)],
)
def test_lost_machines_and_an_undisturbed_run(
    kind: str,
    times: int,
    seed: int,
    tmp_path: Path,
    config: Path,
    corpus: Path,
    undisturbed: dict[int, float],
) -> None:
    """Without a warning, or with SIGTERM ten seconds before; at a random moment of the training."""
    dice, mirror = random.Random(seed), tmp_path / "mirror"
    with rehearsal(tmp_path, here(config, tmp_path), corpus, disks_die=True) as r:
        launched = r.start("--mirror", str(mirror), "--provider", "fake,fake", ceiling="8")
        for machine in range(times):
            until_it_published(r, mirror, machine, launched)
            r.fake.fault(kind, machine=f"pod-{machine + 1:04d}-*", after_s=dice.randint(0, 60))
        code, output = r.end(launched, 300)
        assert code == 0, output + r.machine_log()
        moved = r.ledger("moved")
        assert len(moved) == times, output + r.machine_log()
        assert output.count("goes on from step") == len(moved)
        run = pulled(r, str(mirror))
        settled(r, run, undisturbed, len(moved) + 1)
        assert all(row["down_s"] > 0 for row in moved)
