"""What goes wrong at the fake provider, as scripted: each fault is a few plain fields.

    {"kind": "429", "on": "list", "times": 3, "retry_after_s": 5}
    {"kind": "price_jump", "factor": "1.25", "after_s": 600}
    {"kind": "terminate_ignored", "machine": "pod-0001"}

Three families. *Answers* spoil the answer to one request. *Events* happen to a machine at a moment. *Lies*
hold for a while: what is said, or done, is not what is so. All seconds are virtual but `hold_s`, a real
socket's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from x1_pretrain.errors import UserError

ANSWERS = {
    "401": "the key is refused",
    "403": "the account is refused",
    "429": "too many requests, with Retry-After",
    "500": "an internal error; nothing was done",
    "timeout": "no answer; nothing was done",
    "slow": "the right answer, late",
    "malformed": "the request is done; half of the answer arrives",
    "html": "a page of a proxy in place of the answer; nothing was done",
    "no_capacity": "nothing of this kind is free",
    "timeout_after_create": "the machine is made; no answer comes",
    "500_after_create": "the machine is made; the answer is an internal error",
}
EVENTS = {
    "price_jump": "the true price is multiplied by `factor`",
    "preempted": "the machine is taken away",
    "unhealthy": "its host fails",
    "exited": "its container ends",
}
LIES = {
    "cost_zero": "a running machine is said to cost 0",
    "clock_skew": "every time that is stated is wrong by `skew_s`",
    "not_listed_yet": "a machine made just now is absent and 404, for `for_s`",
    "stuck_terminating": "terminating never ends, or lasts `for_s`",
    "terminate_ignored": "terminate is answered as done, and the machine runs on",
}
KINDS = {**ANSWERS, **EVENTS, **LIES}
OPERATIONS = ("launch", "list", "get", "terminate", "catalog", "billing", "balance", "other", "any")
APIS = ("lambda", "runpod", "any")
_LAUNCH_ONLY = {"no_capacity", "timeout_after_create", "500_after_create"}
_ONCE = {*ANSWERS, *EVENTS, "terminate_ignored"}  # where neither `times` nor `for_s` is given


@dataclass
class Fault:
    """One thing that goes wrong. Text fields match with `*` and `?`."""

    kind: str
    on: str = "any"
    api: str = "any"
    machine: str | None = None  # its id or its name
    after_s: Decimal = Decimal(0)  # since it was scripted; for a machine, since it runs, whichever is later
    for_s: Decimal | None = None
    times: int | None = None
    factor: Decimal = Decimal("1.25")
    skew_s: Decimal = Decimal(3600)
    hold_s: float = (
        30.0  # real seconds: how long a socket is held (`timeout`) or an answer kept back (`slow`)
    )
    retry_after_s: int = 2
    given_s: Decimal = Decimal(0)  # when it was scripted, set by the world
    fired: int = 0
    hit: set[str] = field(default_factory=set)  # machines that it has happened to

    def spent(self) -> bool:
        return self.times is not None and self.fired >= self.times

    def active(self, at_s: Decimal) -> bool:
        """Whether it holds at this moment of the world."""
        begin = self.given_s + self.after_s
        lasting = self.kind in ("not_listed_yet", "stuck_terminating")  # there `for_s` is each machine's own
        over = self.for_s is not None and not lasting and at_s >= begin + self.for_s
        return at_s >= begin and not over and not self.spent()

    def concerns(self, names: Iterable[str]) -> bool:
        """Whether it is about the machine that goes by these names."""
        return self.machine is None or any(fnmatchcase(name, self.machine) for name in names)

    def matches(self, api: str, operation: str, names: Iterable[str]) -> bool:
        return self.api in ("any", api) and self.on in ("any", operation) and self.concerns(names)

    def fire(self) -> Fault:
        self.fired += 1
        return self

    def row(self) -> dict[str, Any]:
        """For people: what was scripted, and how often it happened."""
        shown = ("kind", "on", "api", "machine", "after_s", "for_s", "times")
        values = {name: getattr(self, name) for name in shown}
        told = {name: str(value) if isinstance(value, Decimal) else value for name, value in values.items()}
        return {**told, "fired": max(self.fired, len(self.hit))}


def read_fault(raw: object) -> Fault:
    """A fault from its plain fields. A slip is refused, or a test would pass for want of its fault."""
    if not isinstance(raw, Mapping):
        raise UserError(f"fault {raw!r}: expected fields such as {{kind: 429, on: list, times: 3}}")
    raw = {"on" if name is True else name: value for name, value in raw.items()}  # YAML reads `on` as true
    known = {f.name for f in fields(Fault)} - {"given_s", "fired", "hit"}
    if unknown := sorted(set(map(str, raw)) - known):
        raise UserError(
            f"fault {dict(raw)}: unknown field {unknown[0]}; there are {', '.join(sorted(known))}"
        )
    values = {name: _value(name, value) for name, value in raw.items() if value is not None}
    kind = values.get("kind", "")
    if kind not in KINDS:
        raise UserError(f"fault kind {kind!r}: expected one of {', '.join(KINDS)}")
    if kind in _LAUNCH_ONLY:
        values.setdefault("on", "launch")
    if kind in _ONCE and "for_s" not in values:
        values.setdefault("times", 1)
    if kind == "not_listed_yet":
        values.setdefault("for_s", Decimal(60))
    fault = Fault(**values)
    _among("on", fault.on, OPERATIONS)
    _among("api", fault.api, APIS)
    return fault


def _among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"fault field {name}: found {value!r}, expected one of {', '.join(allowed)}")


def _value(name: str, value: object) -> Any:
    try:
        if name in ("after_s", "for_s", "factor", "skew_s"):
            return _finite(Decimal(str(value)), name)
        if name in ("times", "retry_after_s"):
            return int(str(value))
        return float(str(value)) if name == "hold_s" else str(value)
    except (ValueError, InvalidOperation):
        raise UserError(f"fault field {name}: found {value!r}, expected a number") from None


def _finite(number: Decimal, name: str) -> Decimal:
    if not number.is_finite() or (number < 0 and name != "skew_s"):
        raise UserError(f"fault field {name}: found {number}, expected a number that is not negative")
    return number


def read_faults(path: Path) -> list[Fault]:
    """A YAML or JSON list of faults."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read as a list of faults ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {type(rows).__name__}, expected a list of faults")
    return [read_fault(row) for row in rows]
