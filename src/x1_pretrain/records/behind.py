"""How far behind a run's mirror is, in words: by what it wrote last into the run folder."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

from x1_pretrain.errors import UserError
from x1_pretrain.numbers import size
from x1_pretrain.records.console import duration
from x1_pretrain.records.mirror_state import ALONE, NAME, MirrorState, read_state

SILENT_S = 60.0  # its process looks every few seconds, and writes down what it finds


def last_word(folder: Path) -> MirrorState | None:
    """What the mirror of a run folder said last; None where it has none, or the file tells nothing. UserError
    where it tells something odd."""
    found = read_state(folder)
    if found is None:
        return None
    numbers = [
        found.lag_s,
        found.lag_bytes,
        *(found.mirrored if isinstance(found.mirrored, list) else [None]),
    ]
    words = [found.trouble, found.why, found.updated_utc, found.state]
    if not all(_is_number(one) for one in numbers) or not all(isinstance(one, str) for one in words):
        raise UserError(f"{folder / NAME}: holds values that no mirror wrote")
    return found


def copied(folder: Path) -> MirrorState | None:
    """Of a folder that is what `x1 pull` brought, and that nobody trained in since: what was brought."""
    try:
        found = last_word(folder)
    except UserError:
        return None
    return found if found and found.is_copy else None


def as_of(found: MirrorState) -> str:
    """When a copy was brought: 2026-11-21 15:46 UTC."""
    return f"{found.updated_utc[:16].replace('T', ' ')} UTC"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def behind(found: MirrorState, running: bool, now_s: float) -> str:
    """A mirror of a running trainer that says nothing is behind by that time too."""
    if found.is_copy:
        return f"this is a copy as of {as_of(found)}"
    if found.why == ALONE:
        return ALONE
    silent_s = silence_s(found, now_s) if running else 0.0
    silent_s = silent_s if silent_s > SILENT_S else 0.0
    if not found.lag_bytes:
        return f"no word for {duration(silent_s)}" if silent_s else "all of it"
    return f"behind by {duration(found.lag_s + silent_s)}, {size(found.lag_bytes)}"


def silence_s(found: MirrorState, now_s: float) -> float:
    """Since its last word."""
    try:
        return max(0.0, now_s - datetime.fromisoformat(found.updated_utc).timestamp())
    except (ValueError, OverflowError):
        return 0.0


def newest(found: MirrorState) -> str:
    return f"checkpoint of step {max(found.mirrored):,}" if found.mirrored else "no checkpoint yet"
