"""How a run stands, in a dozen numbers, at a cost that does not grow with it.

    Summary(Path("runs/x1-50m")).look()["step"]

The mirror publishes it, `x1 runs` lists it. Whatever can't be known (yet) is null; nothing is hashed, so the
newest good checkpoint is the newest whose manifest can be read and whose files have its sizes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config, parse_yaml
from x1_pretrain.errors import UserError
from x1_pretrain.money import latch
from x1_pretrain.money.account import account
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.money.ledger import read_rows
from x1_pretrain.records.behind import as_of, copied
from x1_pretrain.records.checkpoint_files import list_checkpoints, step_of
from x1_pretrain.records.following import amount, holder_lives
from x1_pretrain.records.lock import Holder
from x1_pretrain.records.newest import Newest
from x1_pretrain.records.run_folder import ENDINGS, SILENT_S, Row, is_number, moment, read_json

T = TypeVar("T")

STAGE = "pretrain"
NO_CHECKPOINT: tuple[Path | None, int] = (None, 0)
ROWS = {"any": ['"step"'], "evaluation": ['"val/loss"'], "paid": ['"budget/spent_usd"']}
OPENINGS = ("start", "resume", "branch")
EVENTS = {
    "course": [f'"event": "{name}"' for name in ("start", "resume", "finish")],
    "session": [f'"event": "{name}"' for name in (*OPENINGS, *ENDINGS)],
    "any": ['"event"'],
}
WORDS = {"signal": "interrupted", "budget_stopped": "stopped", "over_budget": "stopped"}  # of ENDINGS


class Summary:
    """One run folder, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: RunConfig | None = None
        self._metrics = Newest(folder / "metrics.jsonl", ROWS)
        self._events = Newest(folder / "events.jsonl", EVENTS)
        self._seen: dict[str, tuple[tuple[int, int] | None, Any]] = {}  # a file, as it was -> what it says
        self._trouble: list[str] = []

    def look(self, now_s: float | None = None) -> dict[str, Any]:
        """What is known now. Never an error: what can't be read is said under `trouble`."""
        now_s = time.time() if now_s is None else now_s
        self._trouble = []
        self.config = self._said("config.yaml", _config)
        manifest = self._said("manifest.json", read_json) or {}
        rows, events = self._newest(self._metrics), self._newest(self._events)
        row, evaluation = rows.get("any", {}), rows.get("evaluation", {})
        good, good_bytes = self._attempt(lambda: newest_whole(self.checkpoints), NO_CHECKPOINT)
        return {
            **self._made(manifest),
            "updated_utc": self._updated([row, evaluation, *events.values()]),
            "step": _whole(row.get("step")) or 0,
            "total_steps": self._total(manifest),
            "tokens": _whole(row.get("tokens")) or 0,
            "val_loss": _finite(evaluation.get("val/loss")),
            "val_step": _whole(evaluation.get("step")),
            "spent_usd": self._spent(rows.get("paid", {})),
            "elapsed_s": row["elapsed_s"] if _whole(row.get("elapsed_s")) is not None else None,
            **self._standing(events, _whole(row.get("step")) or 0, self._total(manifest), now_s),
            "newest_good": step_of(good) if good else None,
            "checkpoint_bytes": good_bytes,
            "trouble": "; ".join(self._trouble),
        }

    def _made(self, manifest: Row) -> Row:
        """What it was when it began."""
        return {
            "stage": STAGE,
            "name": self.config.name if self.config else manifest.get("name") or self.folder.name,
            "run_id": _text(manifest.get("run_id")),
            "parent": _parent(manifest.get("parent")),
            "created_utc": _text(manifest.get("created_utc")),
        }

    def _total(self, manifest: Row) -> int | None:
        return self.config.training.total_steps if self.config else _whole(manifest.get("total_steps"))

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie, as `records.run_folder.Run` has it."""
        inside = self.folder / "checkpoints"
        return inside if inside.exists() or self.config is None else self.config.checkpoint_folder

    # -- reading --------------------------------------------------------------------------------------------

    def _attempt(self, look: Callable[[], T], otherwise: T) -> T:
        """A damaged file is one line, and the rest is still told."""
        try:
            return look()
        except (
            OSError,
            UserError,
            ValueError,
            LookupError,
            TypeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            self._trouble.append(str(error))
            return otherwise

    def _said(self, name: str, read: Callable[[Path], Any]) -> Any:
        """What a file says, read again only when it changed; None where there is none."""
        file = self.folder / name
        now, (before, content) = _stamp(file), self._seen.get(name, (None, None))
        if now != before:
            content = None if now is None else self._attempt(lambda: read(file), None)
            self._seen[name] = (now if content is not None else None, content)
        return content

    def _newest(self, file: Newest) -> dict[str, Row]:
        return self._attempt(file.look, {})

    def _updated(self, rows: list[Row]) -> str | None:
        times = [(at, row["time_utc"]) for row in rows if (at := moment(row)) is not None]
        return str(max(times)[1]) if times else None

    def _spent(self, row: Row) -> str | None:
        """As `x1 watch` counts it: the most that ledger, sidecar and trainer know of."""
        ledger = self._said(LEDGER, lambda file: account(read_rows(file)))
        sidecar = self._said("budget.json", read_json) or {}
        known = ledger.settled_usd() if ledger else None
        amounts = [known, amount(sidecar.get("spent_usd")), amount(row.get("budget/spent_usd"))]
        most = max((a for a in amounts if a is not None), default=None)
        return None if most is None else format(most, "f")

    def _holder(self) -> Holder | None:
        """Who the folder's lock names."""
        try:
            return Holder.read((self.folder / "lock").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None

    # -- how it stands --------------------------------------------------------------------------------------

    def _standing(self, events: dict[str, Row], step: int, total: Any, now_s: float) -> Row:
        state, why = self._state(events, step, total, now_s)
        holder = self._holder()
        return {"state": state, "why": why, "host": holder.host if holder else None}

    def _state(self, events: dict[str, Row], step: int, total: Any, now_s: float) -> tuple[str, str]:
        """One word, and why: what the records say first, then the lock, then the latch."""
        course, last = events.get("course", {}).get("event"), events.get("session", {})
        if course == "finish" and is_number(total) and step >= total:
            return "finished", ""
        stop, ended = latch.read(self.folder), last.get("event") in ENDINGS
        alive = holder_lives(self.folder, now_s)
        if alive and not (ended and self._leaving(events)):
            return _at_work(opened=course is not None and not ended, stop=stop)
        if (brought := copied(self.folder)) is not None:
            return "copy", f"as of {as_of(brought)}"
        if stop:
            return "stopped", f"by the {stop.by}: {stop.reason}"
        if ended:
            name = last["event"]
            return WORDS.get(name, "ended"), str(last.get("signal") or last.get("message") or ENDINGS[name])
        if course is None:
            return "waiting", "no records yet"
        if alive is False:
            return "died", "its process is gone, without a word"
        return self._silence(events, now_s)

    def _leaving(self, events: dict[str, Row]) -> bool:
        """Whether the process that holds the lock is the one whose last word was of its end."""
        holder, ending, newest = self._holder(), moment(events["session"]), moment(events["any"])
        begun = moment({"time_utc": holder.since}) if holder else None
        return begun is None or ending is None or (begun <= ending and newest == ending)

    def _silence(self, events: dict[str, Row], now_s: float) -> tuple[str, str]:
        """No lock tells: an older run, or a copy of a folder."""
        times = moment(events.get("any", {})), moment(self._metrics.rows.get("any", {}))
        quiet_s = now_s - max((at.timestamp() for at in times if at is not None), default=0.0)
        return ("silent", "nobody says whether its process lives") if quiet_s > SILENT_S else ("running", "")


def _at_work(opened: bool, stop: latch.Stop | None) -> tuple[str, str]:
    if not opened:
        return "running", "it is being opened"
    return "running", f"and told to stop: {stop.reason}" if stop else ""


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _config(file: Path) -> RunConfig:
    tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    return parse_config(tree if isinstance(tree, dict) else {}, str(file))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    sound = isinstance(value, int | float) and is_number(value) and math.isfinite(value)
    return int(value) if sound else None  # type: ignore[call-overload]


def _parent(told: object) -> dict[str, Any] | None:
    """Of a branch: the run_id, step and checkpoint that it began from, and its trunk."""
    if not isinstance(told, dict):
        return None
    return {str(name): one for name, one in told.items() if isinstance(one, str | int)}


def _finite(value: object) -> float | str | None:
    """JSON has no NaN: it is written as rows have it."""
    if not is_number(value):
        return None
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else str(number)


def newest_whole(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that has what its manifest lists, by size, and its bytes. Nothing is hashed."""
    for path in list_checkpoints(folder):
        if (size := whole_bytes(path)) is not None:
            return path, size
    return NO_CHECKPOINT


def whole_bytes(path: Path) -> int | None:
    """Bytes of a checkpoint whose files have the sizes in its manifest; None of any other."""
    try:
        listed = read_json(path / "manifest.json")["files"]
        sizes = {name: (path / name).stat().st_size for name in listed}
        good = bool(listed) and all(sizes[name] == want["bytes"] for name, want in listed.items())
        return sum(sizes.values()) if good else None
    except (OSError, UserError, LookupError, TypeError, AttributeError):
        return None
