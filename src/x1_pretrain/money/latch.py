"""`STOP.json`: why a run may not go on. It is written before anything stops; every start looks for it first.

Nothing but a person's `--raise-ceiling-to` removes it; the ledger keeps the stop and the raise.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from x1_pretrain.errors import RefusedError
from x1_pretrain.money.account import account
from x1_pretrain.money.guard import dollars
from x1_pretrain.money.ledger import Ledger, Row
from x1_pretrain.records.formats import VERSIONS
from x1_pretrain.records.run_folder import read_json

NAME = "STOP.json"


@dataclass(frozen=True)
class Stop:
    """One stop, as the file holds it."""

    reason: str
    by: str  # "guard", "person", "sidecar"
    exit_code: int
    time_utc: str
    spent_usd: str | None = None
    ceiling_usd: str | None = None


def read(folder: Path) -> Stop | None:
    """The latch of a run; a damaged one is a stop all the same."""
    file = folder / NAME
    if not os.path.lexists(file):
        return None
    try:
        tree: dict[str, Any] = read_json(file)
    except Exception as error:
        if not os.path.lexists(file):  # cleared meanwhile
            return None
        return Stop(f"{NAME} is there but can't be read ({error})", "unknown", 78, "unknown")
    fields = {name: tree.get(name) for name in Stop.__dataclass_fields__}
    texts = {k: str(v) if v is not None else None for k, v in fields.items() if k != "exit_code"}
    code = fields["exit_code"] if isinstance(fields["exit_code"], int) else 78
    known = {k: v or "not said" for k, v in texts.items() if k in ("reason", "by", "time_utc")}
    return Stop(**known, exit_code=code, spent_usd=texts["spent_usd"], ceiling_usd=texts["ceiling_usd"])


def write(folder: Path, stop: Stop) -> None:
    """Latch, on the disk when this returns. The first reason stays: a later stop does not cover it."""
    file = folder / NAME
    if os.path.lexists(file):
        return
    folder.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{NAME}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        with new.open("w", encoding="utf-8") as out:
            out.write(json.dumps({"schema_version": VERSIONS[NAME], **asdict(stop)}, indent=1) + "\n")
            out.flush()
            os.fsync(out.fileno())
        _name(new, file)
    except OSError:
        file.touch()  # a full disk still takes an empty file, and that is a stop too
    finally:
        new.unlink(missing_ok=True)
    _sync(folder)


def _name(new: Path, file: Path) -> None:
    """Give it its name unless another process was first."""
    try:
        os.link(new, file)
    except FileExistsError:
        return
    except OSError:  # no hard links here (some network and FUSE disks): an empty file claims the name
        with suppress(FileExistsError):
            file.touch(exist_ok=False)
            new.replace(file)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear(folder: Path) -> None:
    (folder / NAME).unlink(missing_ok=True)


def refusal(folder: Path, stop: Stop) -> RefusedError:
    """What a start says when it finds the latch."""
    spent = f" at ${stop.spent_usd} of ${stop.ceiling_usd}" if stop.spent_usd and stop.ceiling_usd else ""
    return RefusedError(
        f"{folder / NAME}: stopped {stop.time_utc}{spent}: {stop.reason}. To go on from the last checkpoint, "
        "add --raise-ceiling-to USD (the same ceiling will do where it was not the ceiling that stopped it)"
    )


def refuse_raise(ceiling: Decimal, cap_usd: float | None, ledger: Ledger) -> Decimal:
    """A raise that raises nothing is refused; the ceiling before."""
    known = account(ledger.rows())
    before = known.ceiling_usd or Decimal(str(cap_usd or 0))
    if ceiling <= known.known_usd:
        raise RefusedError(
            f"--raise-ceiling-to {ceiling}: {dollars(known.known_usd)} are spent already; name a higher one"
        )
    if ceiling < before:
        raise RefusedError(
            f"--raise-ceiling-to {ceiling}: the ceiling is {dollars(before)}; name that or a higher one"
        )
    return before


def raise_ceiling(folder: Path, ceiling: Decimal, cap_usd: float | None, ledger: Ledger) -> None:
    """A person's own word: it clears the latch, and the ledger keeps it. Repeated by a relaunch, it is no
    news."""
    before = refuse_raise(ceiling, cap_usd, ledger)
    rows, stop = ledger.rows(), read(folder)
    if stop is None and last_stop(rows) is None and account(rows).raised and ceiling == before:
        return
    said = f"a person set the ceiling to {dollars(ceiling)}" + (f" after: {stop.reason}" if stop else "")
    ledger.append("raised", said, ceiling_usd=ceiling, before_usd=before)
    clear(folder)


def last_stop(rows: Sequence[Row]) -> Row | None:
    """The stop that no raise followed: it holds also when somebody removed the file."""
    last = next((row for row in reversed(rows) if row["event"] in ("stop", "raised")), None)
    return last if last is not None and last["event"] == "stop" else None


def in_force(folder: Path, rows: Sequence[Row]) -> Stop | None:
    """Why a run may not go on: by its latch, or by its ledger."""
    if (found := read(folder)) is not None:
        return found
    if (row := last_stop(rows)) is None:
        return None
    reason = f"{row.get('message', 'stopped')} (by its ledger; {NAME} was removed)"
    code = row.get("exit_code")
    return Stop(reason, "guard", code if isinstance(code, int) else 78, row["time_utc"])
