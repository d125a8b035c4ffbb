"""What is known of a run while it goes on: its files followed, each look at the cost of what is new.

`seen.look(now_s)` takes what was written since; `seen.state(now_s)` says how the run stands.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from x1_pretrain.config_reading import parse_config, parse_yaml
from x1_pretrain.errors import UserError
from x1_pretrain.money import latch
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.ledger import NAME as LEDGER
from x1_pretrain.money.ledger import read_rows
from x1_pretrain.records.behind import as_of, copied, last_word
from x1_pretrain.records.goodput import Goodput, goodput
from x1_pretrain.records.lock import STALE_S, Holder
from x1_pretrain.records.mirror_state import MirrorState
from x1_pretrain.records.run_folder import (
    ENDINGS,
    SILENT_S,
    Row,
    Run,
    find_run,
    is_number,
    is_run,
    is_train,
    moment,
    open_run,
    read_json,
)
from x1_pretrain.records.tail import Tail

CURVE_POINTS = 512  # at most, of a curve of any length
PACE_ROWS = 64  # training rows that the time left is counted from
GONE_S = 90.0  # an ended trainer may be relaunched: so long it is waited for
GOODPUT_S = 60.0  # between two looks at all files, and never more than a 50th of the time

Kind = Literal["waiting", "running", "finished", "stopped", "ended", "died", "silent", "copy"]


@dataclass(frozen=True)
class State:
    """How a run stands, in one word; why; and whether nothing more will come by itself."""

    kind: Kind
    why: str = ""
    over: bool = False


@dataclass
class Curve:
    """A curve of any length in at most `CURVE_POINTS` means; each of as many values as the others.

    A mean may hide a single value, so the lowest and the highest are kept as well.
    """

    means: list[float] = field(default_factory=list)
    each: int = 1
    lowest: float = math.inf
    highest: float = -math.inf
    first_step: int | None = None
    last_step: int | None = None
    _sum: float = 0.0
    _count: int = 0

    def add(self, value: object, step: int | None = None) -> None:
        """What is not finite has no place on a curve; the events tell of it."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            return
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        self.first_step = step if self.first_step is None else self.first_step
        self.last_step = step
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self.each:
            return
        self.means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.means) >= CURVE_POINTS:
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means, self.each = [(one + other) / 2 for one, other in pairs], 2 * self.each


@dataclass
class Metrics:
    """Of metrics.jsonl: the newest value of each column, and a few last rows."""

    latest: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    train: deque[Row] = field(default_factory=lambda: deque(maxlen=PACE_ROWS))
    evaluated: Row | None = None
    before: Row | None = None  # the evaluation before it
    loss: Curve = field(default_factory=Curve)

    def take(self, row: Row) -> None:
        if not is_number(row.get("step")):
            return
        self.step = max(self.step, int(row["step"]))
        self.latest.update(row)
        if is_train(row):
            self.train.append(row)
            self.loss.add(row["train/loss"], int(row["step"]))
        elif "val/loss" in row:
            self.before, self.evaluated = self.evaluated, row


@dataclass
class Steps:
    """Of steps.jsonl."""

    last: Row | None = None
    loss: Curve = field(default_factory=Curve)

    def take(self, row: Row) -> None:
        if is_number(row.get("step")):
            self.last = row
            self.loss.add(row.get("loss"), int(row["step"]))


@dataclass
class Spike:
    """One spike, as the events tell of it."""

    onset: int
    recovered: int | None = None  # the step from which the loss was back
    closed: bool = False
    rewound_to: int | None = None


@dataclass
class Spikes:
    """Those of a run as it stands: a resume from before an onset forgets it, since its steps are done
    again; a rewind closes what it undoes."""

    known: list[Spike] = field(default_factory=list)

    def take(self, event: Row) -> None:
        kind, onset = event.get("event"), event.get("onset")
        back_to = event.get("to_step" if kind == "rewind" else "step")
        if kind in ("spike", "spike_end") and isinstance(onset, int):
            self._told(event, onset)
        elif kind == "rewind" and isinstance(back_to, int):
            for one in self.known:
                if one.rewound_to is None and one.onset > back_to:
                    one.rewound_to = back_to
        elif kind in ("start", "resume") and isinstance(back_to, int):
            self.known = [s for s in self.known if s.rewound_to is not None or s.onset <= back_to]

    def _told(self, event: Row, onset: int) -> None:
        """The begin or the end of one; one without its other half is still one."""
        same = next((s for s in reversed(self.known) if s.onset == onset and s.rewound_to is None), None)
        if same is None:
            same = Spike(onset)
            self.known.append(same)
        if event["event"] == "spike_end":
            back = event.get("recovered")
            same.closed, same.recovered = True, back if isinstance(back, int) else None


@dataclass
class Seen:
    """One run, followed."""

    run: Run
    metrics: Metrics = field(default_factory=Metrics)
    steps: Steps = field(default_factory=Steps)
    events: deque[Row] = field(default_factory=lambda: deque(maxlen=100))  # without those of checkpoints
    spikes: Spikes = field(default_factory=Spikes)
    checkpoint: Row | None = None  # the event of the newest
    fresh_events: list[Row] = field(default_factory=list)  # of the last look
    sample: Row | None = None
    newest_s: float | None = None  # when the newest record was written
    finished: bool = False
    opened: bool = False  # a session has begun
    goodput: Goodput | None = None
    trouble: str = ""  # why something could not be read
    machines: list[Rented] = field(default_factory=list)  # rented, and not seen to end
    spent_usd: Decimal | None = None
    ceiling_usd: Decimal | None = None
    mirror: MirrorState | None = None  # none: it has none
    _tails: dict[str, Tail] = field(default_factory=dict)
    _goodput_due_s: float = 0.0

    def __post_init__(self) -> None:
        names = ("metrics", "steps", "events", "samples")
        self._tails = {name: Tail(self.run.folder / f"{name}.jsonl") for name in names}

    # -- looking --------------------------------------------------------------------------------------------

    def look(self, now_s: float, whole: bool = True) -> None:
        """Take in what is new. `whole`: the goodput too, when it is due."""
        self.trouble = ""
        try:
            self._follow()
            self._money()
            self.mirror = last_word(self.run.folder)
            if whole:
                self._count(now_s)
        except (OSError, UserError) as error:  # a file in the middle of being replaced: said, and read again
            self.trouble = str(error)

    def recount(self, now_s: float) -> None:
        """The goodput of this very moment, due or not: for what is looked at longest, the last screen."""
        self._goodput_due_s = 0.0
        try:
            self._count(now_s)
        except (OSError, UserError) as error:
            self.trouble = str(error)

    def _follow(self) -> None:
        rows = self._new("metrics")
        self.metrics = Metrics() if self._tails["metrics"].again else self.metrics
        for row in rows:
            self.metrics.take(row)
        steps = self._new("steps")
        self.steps = Steps() if self._tails["steps"].again else self.steps
        for row in steps:
            self.steps.take(row)
        self.fresh_events = self._new("events")
        if self._tails["events"].again:
            self.events.clear()
            self.spikes, self.checkpoint = Spikes(), None
        for event in self.fresh_events:
            self._take_event(event)
        if samples := self._new("samples"):
            self.sample = samples[-1]

    def _new(self, name: str) -> list[Row]:
        rows = self._tails[name].read()
        times = [at.timestamp() for row in rows[-1:] if (at := moment(row)) is not None]
        self.newest_s = max((*times, *([self.newest_s] if self.newest_s is not None else [])), default=None)
        return rows

    def _take_event(self, event: Row) -> None:
        if event.get("event") == "checkpoint":  # many, and each like the other: they would push out the rest
            self.checkpoint = event
            return
        self.events.append(event)
        self.spikes.take(event)
        if event.get("event") in ("start", "resume"):
            self.opened, self.finished = True, False
        self.finished = self.finished or event.get("event") == "finish"

    def _money(self) -> None:
        """Both files are short, and the ledger grows by a line every few minutes."""
        folder = self.run.folder
        rows = read_rows(folder / LEDGER)
        known = account(rows)
        self.machines = known.open_machines()
        counted = self.metrics.latest.get("budget/spent_usd")
        told = read_json(folder / "budget.json") if (folder / "budget.json").exists() else {}
        amounts = [amount(told.get("spent_usd")), amount(counted), known.settled_usd() if rows else None]
        self.spent_usd = max((a for a in amounts if a is not None), default=None)
        ceiling = known.ceiling_usd or amount(told.get("ceiling_usd"))
        self.ceiling_usd = ceiling or amount(self.run.config.budget.cap_usd)

    def _count(self, now_s: float) -> None:
        if now_s < self._goodput_due_s:
            return
        begun = time.perf_counter()
        self.goodput = goodput(self.run)
        self._goodput_due_s = now_s + max(GOODPUT_S, 50 * (time.perf_counter() - begun))

    # -- how it stands --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The newest step on record."""
        return int(self.steps.last["step"]) if self.steps.last else self.metrics.step

    @property
    def session(self) -> int | None:
        last = self.events[-1] if self.events else self.metrics.latest
        return last.get("session")

    def quiet_s(self, now_s: float) -> float:
        """Since the newest record."""
        return max(0.0, now_s - self.newest_s) if self.newest_s is not None else 0.0

    def state(self, now_s: float) -> State:
        """From the records, the latch and the lock."""
        if self.finished and self.metrics.step >= self.run.total_steps:
            return State("finished", over=True)
        alive, stop = holder_lives(self.run.folder, now_s), latch.read(self.run.folder)
        quiet = self.quiet_s(now_s)
        if alive and self.opened:
            return State("running", f"and told to stop: {stop.reason}" if stop else "")
        if alive:
            return State("waiting", "it is being opened")
        if (brought := copied(self.run.folder)) is not None:
            return State("copy", self._elsewhere(brought, stop), over=True)
        if stop:
            return State("stopped", f"by the {stop.by}: {stop.reason}", over=alive is False or quiet > GONE_S)
        if not self.opened:
            return State("waiting", "no records yet", over=quiet > SILENT_S)
        if (ending := self._ending()) is not None:
            why = f"{ENDINGS[ending['event']]}: {ending.get('message', '')}"
            return State("ended", why, over=alive is False and quiet > GONE_S)
        if alive is False:
            why = "its process is gone, without a word; the same command goes on from its newest checkpoint"
            return State("died", why, over=quiet > GONE_S)
        if quiet > SILENT_S:
            return State("silent", "nobody says whether its process lives", over=True)
        return State("running")

    def _elsewhere(self, brought: MirrorState, stop: latch.Stop | None) -> str:
        """Where a run is that was pulled, and what its records said when it was."""
        ending, then = self._ending(), ""
        if stop:
            then = f", then stopped by the {stop.by}: {stop.reason}"
        elif ending is not None:
            then = f", then {ENDINGS[ending['event']]}: {ending.get('message', '')}"
        run = brought.label
        return (
            f"of {run} as of {as_of(brought)}{then}; `x1 runs {run}` says how it stands now, "
            f"`x1 pull {run} --output {self.run.folder}` fetches what is new"
        )

    def _ending(self) -> Row | None:
        """The last word of a session that nothing followed."""
        openings = ("start", "resume", "branch")
        for event in reversed(self.events):
            if event.get("event") in openings:
                return None
            if event.get("event") in ENDINGS:
                return event
        return None

    def eta_s(self, now_s: float) -> float | None:
        """By the pace of the last rows of this session, evaluations and checkpoints included."""
        rows = [row for row in self.metrics.train if row.get("session") == self.session]
        if len(rows) < 2:
            return None
        first, last = moment(rows[0]), moment(rows[-1])
        steps = rows[-1]["step"] - rows[0]["step"]
        if first is None or last is None or steps <= 0 or last <= first:
            return None
        left = (last - first).total_seconds() / steps * (self.run.total_steps - rows[-1]["step"])
        return float(max(0.0, left - max(0.0, now_s - last.timestamp())))


def amount(value: object) -> Decimal | None:
    """Dollars in a record, if that is what it is."""
    if value is None or isinstance(value, bool):
        return None
    try:
        found = Decimal(str(value))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def holder_lives(folder: Path, now_s: float) -> bool | None:
    """Whether a trainer holds the run folder: by its process here, by its heartbeat elsewhere. None: an older
    run's lock, or none at all, does not say. A trainer that ended in order leaves no name."""
    file = folder / "lock"
    try:
        text, beaten_s = file.read_text(encoding="utf-8", errors="replace"), file.stat().st_mtime
    except OSError:
        return None
    holder = Holder.read(text)
    if holder is None:
        return None if text.strip() else False
    if holder.on_this_boot:
        return holder.runs_here()
    return now_s - beaten_s <= 2 * STALE_S


def open_followed(text: str) -> Run:
    """The run that is meant, also one that has only begun: the manifest comes after it was compiled."""
    for folder in (Path(text), Path("runs") / text):
        if is_run(folder):
            return open_run(folder)
        file = folder / "config.yaml"
        if file.is_file():
            tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            return Run(folder, parse_config(tree if isinstance(tree, dict) else {}, str(file)), {})
        if (folder / LEDGER).is_file():
            raise UserError(_elsewhere(folder))
    return open_run(find_run(text))


def _elsewhere(folder: Path) -> str:
    """A run that was launched from here has only its ledger here."""
    machines = account(read_rows(folder / LEDGER)).open_machines()
    if not machines:
        return f"{folder}: holds a ledger and no run; the run's folder is on the machine it trained on"
    name = machines[-1].machine_id or machines[-1].tag
    return (
        f"{folder}: its trainer runs on {name} ({machines[-1].provider}), and so do its records: "
        f"`ssh MACHINE x1 watch RUN` shows them; `x1 guard {folder}` is what ends the machine"
    )
