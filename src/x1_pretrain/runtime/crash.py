"""What is kept of an exception that nobody caught: the event of the run's last minute."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from x1_pretrain.records.metrics import plain

ROWS = 50
LONGEST = 20_000  # characters of traceback: a recursion's has thousands of lines


def crash_report(error: BaseException, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the `fault` event: type, message, traceback, and the last rows of metrics."""
    text = "".join(traceback.format_exception(error))
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    return {
        "type": type(error).__name__,
        "error": _said(error),
        "traceback": text,
        "last_rows": [plain(row) for row in rows[-ROWS:]],
    }


def _said(error: BaseException) -> str:
    """`str` of a foreign exception may itself raise."""
    try:
        return str(error)
    except Exception:
        return "(its text can't be made)"
