"""What the doctor found: one `Finding` a check, as a table for a person or as JSON for a program."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from x1_pretrain.errors import FAULT, FINISHED
from x1_pretrain.numbers import for_json

Status = Literal["ok", "slow", "broken", "-"]
SHOWN: dict[Status, str] = {"ok": "OK", "slow": "slow", "broken": "BROKEN", "-": "-"}


@dataclass(frozen=True)
class Finding:
    """One check. slow: it works, worse than it should; -: does not apply here, or was not measured."""

    check: str
    status: Status
    found: str  # the measured value in words
    fix: str = ""
    measured: dict[str, Any] = field(default_factory=dict)  # the same as plain numbers, for --json


def exit_code(findings: Iterable[Finding]) -> int:
    """A slow machine may train; a broken one may not."""
    return FAULT if any(finding.status == "broken" for finding in findings) else FINISHED


def table(findings: Sequence[Finding], width: int) -> str:
    """Status, check, value; below them the fix. Fits into `width` columns, 50 at least."""
    name = max((len(finding.check) for finding in findings), default=0)
    return "\n".join(line for finding in findings for line in _lines(finding, name, max(50, width)))


def _lines(finding: Finding, name: int, width: int) -> list[str]:
    head = f"{SHOWN[finding.status]:<7} {finding.check:<{name}}  "
    indent = " " * len(head)
    lines = textwrap.wrap(
        finding.found, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
    )
    if finding.fix:
        fix = f"fix: {finding.fix}"
        lines += textwrap.wrap(
            fix, width, initial_indent=indent, subsequent_indent=f"{indent}     ", break_on_hyphens=False
        )
    return lines or [head.rstrip()]


def size(count: float) -> str:
    """1.21 GiB, 640 MiB, 12 KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(count) >= unit:
            return f"{count / unit:,.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"
    return f"{count / 1024:,.3g} KiB"


def summary(findings: Iterable[Finding]) -> str:
    """17 ok, 1 slow (disk), 0 broken."""
    parts = []
    for status, word in (("ok", "ok"), ("slow", "slow"), ("broken", "broken")):
        names = [finding.check for finding in findings if finding.status == status]
        listed = f" ({', '.join(names)})" if names and status != "ok" else ""
        parts.append(f"{len(names)} {word}{listed}")
    return ", ".join(parts)


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = for_json([asdict(finding) for finding in findings])
    return rows
