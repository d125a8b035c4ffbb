"""Marks for tests."""

from __future__ import annotations

from typing import Any

from x1_pretrain.report.blocks import Mark


def mark(kind: Any, x: float = 0.0) -> Mark:
    return Mark(x, kind[0].upper() + "1", f"a {kind}", kind)
