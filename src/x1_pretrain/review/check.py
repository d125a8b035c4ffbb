"""One line of `x1 verify`: a name, a result, and what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from x1_pretrain.errors import UserError

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"


@dataclass(frozen=True)
class Check:
    name: str
    result: str
    evidence: str


def judged(name: str, problems: Sequence[str], evidence: str) -> Check:
    """Failed with its problems, or passed with its evidence."""
    if not problems:
        return Check(name, PASSED, evidence)
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return Check(name, FAILED, "; ".join(problems[:5]) + more)


def attempted(name: str, check: Callable[[], Check]) -> Check:
    """A record too odd to be judged (a null time, ranks of 0) fails its check, and no other."""
    try:
        return check()
    except UserError as error:
        return Check(name, FAILED, str(error))
    except Exception as error:  # files made by anyone may hold anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name, FAILED, f"can't be judged, the records hold something odd ({reason})")
