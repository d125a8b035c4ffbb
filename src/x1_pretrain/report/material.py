"""What a report knows of a run: its files, read once, whatever state they are in.

Nothing here fails because a file is missing, torn or odd: what could not be read stands in `problems`, and
the page says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from pydantic import ValidationError

from x1_pretrain.corpus.shards import Manifest as CorpusManifest
from x1_pretrain.errors import UserError
from x1_pretrain.money import latch
from x1_pretrain.money.account import Account, account
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.money.ledger import read_rows
from x1_pretrain.postmortem.episodes import Spike, episodes, tokens_after
from x1_pretrain.records.behind import last_word
from x1_pretrain.records.data_order import injected_stretches
from x1_pretrain.records.goodput import Goodput, goodput
from x1_pretrain.records.mirror_state import MirrorState
from x1_pretrain.records.run_folder import (
    POSTMORTEM,
    Row,
    Run,
    is_number,
    is_train,
    last_step,
    read_jsonl,
    validation_losses,
    with_numbers,
)
from x1_pretrain.records.run_manifest import without_passwords
from x1_pretrain.report.blocks import F64
from x1_pretrain.review.check import Check
from x1_pretrain.review.command import verify

T = TypeVar("T")
PNG = b"\x89PNG\r\n\x1a\n"
PICTURE_BYTES, TEXT_BYTES = 600_000, 200_000
STEM = POSTMORTEM.removesuffix(".md")
LONGEST = 100_000  # steps of one injection that are believed
LARGEST = 1e150  # beyond it a difference may overflow: drawn as not finite


@dataclass(frozen=True)
class Corpus:
    """One corpus of the run: what the run's manifest says, and its own manifest where that is at hand."""

    facts: dict[str, Any]
    manifest: CorpusManifest | None
    problem: str


@dataclass(frozen=True)
class PostMortem:
    name: str
    target: str  # where it is from the page
    text: str


@dataclass(frozen=True)
class Material:
    """All of one run."""

    run: Run
    now: datetime
    rows: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)  # one a step, where the run kept them
    events: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    redone: int = 0  # rows of steps that were done again
    ledger: list[Row] = field(default_factory=list)
    money: Account | None = None
    stop: latch.Stop | None = None
    mirror: MirrorState | None = None
    paid_time: Goodput | None = None
    spikes: list[Spike] = field(default_factory=list)
    corpora: list[Corpus] = field(default_factory=list)
    postmortems: list[PostMortem] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)  # of the post-mortems
    checks: list[Check] | None = None
    problems: list[str] = field(default_factory=list)
    _columns: dict[str, tuple[F64, F64]] = field(default_factory=dict)  # those asked for before

    @property
    def manifest(self) -> dict[str, Any]:
        return self.run.manifest

    @cached_property
    def step(self) -> int:
        return max(last_step(self.rows), last_step(self.steps))

    @property
    def finished(self) -> bool:
        return self.step >= self.run.total_steps

    @cached_property
    def trained(self) -> list[Row]:
        return [row for row in self.rows if is_train(row)]

    @cached_property
    def trained_to(self) -> int:
        """The step of the last row that tells a loss."""
        return last_step([row for row in self.trained if value(row, "train/loss") is not None])

    @cached_property
    def validations(self) -> list[str]:
        return validation_losses(self.rows)

    @cached_property
    def places(self) -> tuple[F64, F64]:
        """Steps and the tokens trained by then, from the rows; the origin first."""
        known = {0: 0.0}
        for row in self.rows:
            if (tokens := finite(row, "tokens")) is not None:
                known[row["step"]] = tokens
        steps = sorted(known)
        return np.array(steps, dtype=float), np.array([known[s] for s in steps])

    @cached_property
    def injected(self) -> F64:
        """The updates on injected sequences, which add no tokens; from the steps, and from the events where
        those are not kept."""
        made = {row["step"] for row in self.steps if row.get("injected") is True}
        try:
            for first, last in injected_stretches(self.events):
                made.update(range(first, min(last, first + LONGEST) + 1))
        except (TypeError, ValueError, OverflowError):  # events made by anyone: the steps are enough
            pass
        return np.array(sorted(made), dtype=float)

    def tokens_at(self, step: float) -> float:
        """Trained tokens after a step."""
        return float(self._trained_by(np.array([step], dtype=float))[0])

    def _trained_by(self, steps: F64) -> F64:
        """From the last row before each step (the first row, for those before it), a batch a step that was
        not injected."""
        known, tokens = self.places
        at = np.searchsorted(known, steps, side="right") - 1
        at = np.clip(at, min(1, len(known) - 1), None)
        made = self._injected_by(steps) - self._injected_by(known[at])
        found = tokens[at] + (steps - known[at] - made) * self.run.config.training.batch_tokens
        return np.asarray(np.maximum(found, 0.0))

    def _injected_by(self, steps: F64) -> F64:
        return np.searchsorted(self.injected, steps, side="right").astype(float)

    @property
    def tokens(self) -> float:
        return self.tokens_at(self.step)

    @property
    def inherited_tokens(self) -> float:
        """Of a branch: those of its parent, up to the step that it began from."""
        parent = self.manifest.get("parent")
        step = parent.get("step") if isinstance(parent, dict) else None
        return float(tokens_after(self.run, step, self._begun())) if isinstance(step, int) else 0.0

    def _begun(self) -> list[Row]:
        """The events before the first session: what a branch inherited."""
        opened = next((n for n, one in enumerate(self.events) if one.get("event") in ("start", "resume")), 0)
        return self.events[:opened]

    @property
    def total_tokens(self) -> float:
        return float(self.run.total_steps * self.run.config.training.batch_tokens)

    def column(self, name: str) -> tuple[F64, F64]:
        """Tokens and values of one metric."""
        if name not in self._columns:
            placed = zip(self._xs, self.rows, strict=True)
            found = [(x, v) for x, row in placed if name in row and (v := value(row, name)) is not None]
            pairs = np.array(found, dtype=float).reshape(-1, 2)
            self._columns[name] = pairs[:, 0], pairs[:, 1]
        return self._columns[name]

    @cached_property
    def _xs(self) -> list[float]:
        return [self.x_of(row) for row in self.rows]

    @cached_property
    def _names(self) -> set[str]:
        return {name for row in self.rows for name in row}

    def x_of(self, row: Row) -> float:
        tokens = finite(row, "tokens")
        return self.tokens_at(row["step"]) if tokens is None else tokens

    def every_step(self, name: str, otherwise: str) -> tuple[F64, F64]:
        """A column of steps.jsonl where there is one, else `otherwise` of the rows."""
        found = [(row["step"], v) for row in self.steps if (v := value(row, name)) is not None]
        if len(found) < len(self.trained):
            return self.column(otherwise)
        pairs = np.array(found, dtype=float).reshape(-1, 2)
        return self._trained_by(pairs[:, 0]), pairs[:, 1]

    def last(self, name: str) -> float | None:
        values = self.column(name)[1]
        return float(values[-1]) if len(values) else None

    def named(self, prefix: str) -> list[str]:
        """The metrics that begin so."""
        return sorted(name for name in self._names if name.startswith(prefix))

    def told(self, *names: str) -> list[Row]:
        return [event for event in self.events if event.get("event") in names]


def value(row: Row, name: str) -> float | None:
    """A number a curve can hold, also one that is not finite."""
    found = row.get(name)
    if not is_number(found):
        return None
    assert isinstance(found, int | float)
    if abs(found) > LARGEST:
        return math.inf if found > 0 else -math.inf
    return float(found)


def finite(row: Row, name: str) -> float | None:
    found = value(row, name)
    return found if found is not None and math.isfinite(found) else None


# ------------------------------------------------------------------------------------------------------------
# Reading


def gather(run: Run, now: datetime, with_checks: bool = False, page_folder: Path | None = None) -> Material:
    """Read everything. `page_folder`: where the page will lie, for its links."""
    problems: list[str] = []
    events = [public(with_numbers(row)) for row in _lines(run.folder / "events.jsonl", problems)]
    rows = [with_numbers(row) for row in _lines(run.folder / "metrics.jsonl", problems) if _has_step(row)]
    steps = [with_numbers(row) for row in _lines(run.folder / "steps.jsonl", problems) if _has_step(row)]
    ledger: list[Row] = _attempt(problems, lambda: read_rows(run.folder / LEDGER), [])
    money = _attempt(problems, lambda: account(ledger), None) if ledger else None
    return Material(
        run=run,
        now=now,
        rows=sorted(rows, key=lambda row: row["step"]),
        steps=sorted(steps, key=lambda row: row["step"]),
        events=events,
        samples=[row for row in _lines(run.folder / "samples.jsonl", problems) if _has_step(row)],
        redone=_redone(run.folder),
        ledger=[public(row) for row in ledger],
        money=money,
        stop=latch.read(run.folder),
        mirror=_attempt(problems, lambda: last_word(run.folder), None),
        paid_time=_attempt(problems, lambda: goodput(run), None),
        spikes=_attempt(problems, lambda: episodes(run), []),
        corpora=_corpora(run),
        postmortems=_postmortems(run.folder, page_folder or run.folder, problems),
        pictures=_pictures(run.folder),
        checks=verify(run) if with_checks else None,
        problems=[clean(problem) for problem in problems],
    )


def _lines(file: Path, problems: list[str]) -> list[Row]:
    try:
        found = read_jsonl(file)
    except UserError as error:
        problems.append(str(error))
        return []
    if found.damaged:
        places = ", ".join(map(str, found.damaged[:5])) + (" ..." if len(found.damaged) > 5 else "")
        problems.append(f"{file.name}: {len(found.damaged)} damaged lines are left out (line {places})")
    if found.torn:
        problems.append(f"{file.name}: the last line is torn, from a kill in mid-write, and is left out")
    return found.rows


def _has_step(row: Row) -> bool:
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53


def _attempt(problems: list[str], read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except UserError as error:
        problems.append(str(error))
    except Exception as error:  # files made by anyone may hold anything
        problems.append(f"the records hold something odd ({_named(error)})")
    return otherwise


def _named(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())


def _redone(folder: Path) -> int:
    """Steps done again, as far as a row tells of them."""
    for name in ("steps.superseded.jsonl", "metrics.superseded.jsonl"):
        try:
            if rows := [row for row in read_jsonl(folder / name).rows if is_train(row) or "loss" in row]:
                return len(rows)
        except UserError:
            continue
    return 0


def _postmortems(folder: Path, page_folder: Path, problems: list[str]) -> list[PostMortem]:
    found = []
    for file in sorted(folder.glob(f"{STEM}*.md")):
        target = quote(os.path.relpath(file.resolve(), page_folder.resolve()))
        found.append(PostMortem(file.name, target, clean(_text(file, problems))))
    return found


def _text(file: Path, problems: list[str]) -> str:
    """As much of it as a page can carry."""
    try:
        data = file.read_bytes()
    except OSError as error:
        problems.append(f"{file}: can't be read ({error.strerror})")
        return ""
    if len(data) > TEXT_BYTES:
        problems.append(f"{file.name}: longer than {TEXT_BYTES:,} bytes, only its beginning is on the page")
    return data[:TEXT_BYTES].decode("utf-8", errors="replace")


def _pictures(folder: Path) -> list[bytes]:
    """Of the post-mortems, as many as a page can carry."""
    found: list[bytes] = []
    for file in sorted(folder.glob(f"{STEM}*.png")):
        try:
            data = file.read_bytes()
        except OSError:
            continue
        if data.startswith(PNG) and len(data) + sum(map(len, found)) <= PICTURE_BYTES:
            found.append(data)
    return found


def _corpora(run: Run) -> list[Corpus]:
    data = run.manifest.get("data")
    return [_corpus(facts) for facts in data if isinstance(facts, dict)] if isinstance(data, list) else []


def _corpus(facts: dict[str, Any]) -> Corpus:
    file = Path(str(facts.get("dir", ""))) / "manifest.json"
    try:
        manifest = CorpusManifest.model_validate_json(file.read_bytes())
    except OSError:
        return Corpus(facts, None, f"its folder ({facts.get('dir')}) is not at hand here")
    except ValidationError:
        return Corpus(facts, None, f"{file} is not a corpus manifest that this version reads")
    if manifest.fingerprint != facts.get("fingerprint"):
        return Corpus(facts, None, f"{file} is of another content than the run was trained on")
    return Corpus(facts, manifest, "")


# ------------------------------------------------------------------------------------------------------------
# The page is for others


def public(found: Row) -> Row:
    """A row without the passwords of the addresses in it."""
    return {name: clean(inner) for name, inner in found.items()}


def clean(found: Any) -> Any:
    if isinstance(found, str):
        return without_passwords(found)
    if isinstance(found, dict):
        return {name: clean(inner) for name, inner in found.items()}
    if isinstance(found, Iterable) and not isinstance(found, bytes):
        return [clean(inner) for inner in found]
    return found
