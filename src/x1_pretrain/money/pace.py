"""How long a run still takes, by the pace in its own metrics: evaluation and checkpoints included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from x1_pretrain.config_reading import parse_config, parse_yaml
from x1_pretrain.errors import UserError
from x1_pretrain.records.behind import copied
from x1_pretrain.records.run_folder import is_number, is_train, read_jsonl

Row = dict[str, Any]
FEWEST_ROWS = 3  # of one session, the first of which is still warming up


def tokens_per_sec(rows: Sequence[Row]) -> float | None:
    """Of the newest session that is long enough, from its first row to its last."""
    own = [row for row in rows if is_train(row) and _has(row, "elapsed_s") and _has(row, "tokens")]
    for _, group in reversed([(k, list(g)) for k, g in groupby(own, key=lambda r: r.get("session"))]):
        if len(group) < FEWEST_ROWS:
            continue
        first, last = group[0], group[-1]
        seconds, tokens = last["elapsed_s"] - first["elapsed_s"], last["tokens"] - first["tokens"]
        if seconds > 0 and tokens > 0:
            return float(tokens / seconds)
    return None


def _has(row: Row, name: str) -> bool:
    value: Any = row.get(name)
    return is_number(value) and -1e18 < value < 1e18  # neither NaN nor infinite


def left_s(folder: Path, speed: float = 1.0) -> float | None:
    """Seconds that a run folder's run still needs, on a clock of that speed; None while nothing can be
    said."""
    rows = read_jsonl(folder / "metrics.jsonl").rows
    rate = tokens_per_sec(rows)
    total = _total_tokens(folder)
    if rate is None or total is None:
        return None
    return max(0.0, float(total - tokens_done(rows)) / rate) * speed


def trains_here(folder: Path) -> bool:
    """Whether a run's rows are written into this folder by whoever trains it."""
    return (folder / "metrics.jsonl").exists() and copied(folder) is None


def tokens_done(rows: Sequence[Row]) -> int:
    """By the newest row: a resume goes back a little."""
    return int(next((row["tokens"] for row in reversed(rows) if _has(row, "tokens")), 0))


def _total_tokens(folder: Path) -> int | None:
    file = folder / "config.yaml"
    try:
        config = parse_config(parse_yaml(file.read_text(encoding="utf-8"), str(file)), str(file))
    except (OSError, UserError):
        return None  # not written yet
    return config.training.total_steps * config.training.batch_tokens
