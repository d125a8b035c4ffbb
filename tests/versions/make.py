"""Make the folder that tests keep of a version: a small run from its first step to its last, its corpus, its
copy in a mirror, and the files of a run that costs money.

    python -m tests.versions.make v2

Do it once, when a number in x1_pretrain/records/formats.py goes up (or the schema version of a corpus or of a
mirror's head), with the code that writes the new version, and commit what it made. From then on every later
version must read it: a folder that is there is never made again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from tests.corpora import write_config, write_corpus
from x1_pretrain.money import budget_file, latch
from x1_pretrain.money.clock import Clock, stamp
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.teardown import write_proof

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SMALL = {"layers": 1, "d_model": 8, "heads": 2, "kv_heads": 1, "d_ff": 8, "context": 32}


def make(target: Path) -> None:
    """In a folder of its own, with relative paths: nothing of this machine's is in what is kept."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_corpus(work / "corpus", documents=30, domains=("code", "prose"))
        write_config(
            work / "config.yaml",
            name="kept",
            model=SMALL,
            training={"total_steps": 12, "batch_tokens": 128},
            optimizer={"warmup_steps": 3},
            checkpoint={"every": 8, "keep_last": 2},
            evaluation={"every": 6, "tokens": 128},
            data={"dir": "corpus"},
            run_dir="run",
        )
        _x1(work, "train", "--config", "config.yaml")
        _tidy(work / "run")
        _x1(work, "push", "run", "mirror")
        shutil.rmtree(work / "mirror" / ".x1-mirror")  # the store's own
        for name in ("lock", "mirror.json"):
            (work / "run" / name).unlink(missing_ok=True)
        _spend(work / "money")
        target.mkdir(parents=True)
        for name in ("run", "corpus", "mirror", "money"):
            shutil.move(work / name, target / name)


def _x1(work: Path, *args: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "x1_pretrain.cli", *args], cwd=work, env=environment, check=True)


def _tidy(run: Path) -> None:
    """Without what is of use, or true, only on the machine that made it."""
    for name in ("lock", "checkpoints/lock", "checkpoints/latest"):
        (run / name).unlink(missing_ok=True)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["hardware"] |= {"cpu": "a cpu", "system": "Linux"}
    (run / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _spend(folder: Path) -> None:
    """A ledger, the sidecar's word, a stop and the proof of an end, by the code that writes them."""
    ledger = Ledger(folder / "ledger.jsonl", Clock())
    ledger.append("intent", "1x A100", tag="x1-kept", provider="fake", usd_per_hr=Decimal("1.19"))
    ledger.append("launched", tag="x1-kept", machine_id="i-1")
    ledger.append("poll", tag="x1-kept", machine_usd=Decimal("24.803"), usd_per_hr=Decimal("1.19"))
    ledger.append("terminate_confirmed", tag="x1-kept", machine_id="i-1", billed_usd=Decimal("24.91"))
    write_proof(folder, ledger)
    latch.write(folder, latch.Stop("above the ceiling", "guard", 77, stamp(Clock().now()), "24.91", "25.00"))
    rate, now = Decimal("1.19"), Clock().now()
    budget = budget_file.BudgetFile(Decimal("24.91"), rate, Decimal("20.9"), Decimal("24.91"), now)
    budget_file.write(folder / "budget.json", budget)


def main(names: list[str]) -> int:
    if len(names) != 1 or not names[0].startswith("v") or not names[0][1:].isdigit():
        print(__doc__)
        return 2
    target = HERE / names[0]
    if target.exists():
        print(f"{target}: is there already, and every later version must read it as it is")
        return 78
    make(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
