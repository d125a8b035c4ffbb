"""What a page is made of, as plain data. A section says something; how it looks is decided in `page`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Tone = Literal["", "good", "bad", "note"]


@dataclass(frozen=True)
class Line:
    """A sentence."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Facts:
    """Key figures: a value, its name, and what it counts."""

    items: Sequence[tuple[str, str, str]]  # name, value, aside


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset({0})  # the others hold numbers, set to the right


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `style` is its place in the palette: its colour and its dashes."""

    name: str
    x: F64
    y: F64
    style: int = 0
    faint: bool = False  # the raw values below their smoothed self: not in the legend, not read out
    last: str = ""  # what the legend says of its end: the last value itself
    line: str = ""  # what the line is of the values, where it is not they: "median of 5"

    @property
    def title(self) -> str:
        return f"{self.name}, {self.line}" if self.line else self.name


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place: a thin line with a short label above it."""

    x: float
    label: str  # "S1"
    text: str  # what the label stands for
    kind: Literal["spike", "rewind", "resume", "inject", "mixture", "context"]


@dataclass(frozen=True)
class Level:
    """A horizontal line, or a band where low < high."""

    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. `id` is its anchor in the page."""

    id: str
    title: str
    y_name: str
    curves: Sequence[Curve]
    x_name: str = "tokens"
    x_log: bool = False
    y_log: bool = False
    y_zero: bool = False  # the axis begins at zero
    y_share: bool = False  # the values are shares, shown in per cent
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    marks: Sequence[Mark] = ()
    levels: Sequence[Level] = ()
    notes: Sequence[str] = ()
    tall: bool = False


@dataclass(frozen=True)
class Views:
    """The same chart in several ways; one is shown at a time, all are printed but the last."""

    id: str
    views: Sequence[tuple[str, Chart]]  # the name of the view, the chart


@dataclass(frozen=True)
class Part:
    """A piece of a whole: its name, its size in words, more columns for the table, whether it is useful."""

    name: str
    size: float
    columns: Sequence[str]
    useful: bool = False


@dataclass(frozen=True)
class Stack:
    """A bar of parts, with the table that says what they are."""

    id: str
    title: str
    head: Sequence[str]
    parts: Sequence[Part]


@dataclass(frozen=True)
class Strip:
    """Rows of cells, darker where the value is larger: one row a layer, one column a place on the axis."""

    id: str
    title: str
    names: Sequence[str]  # of the rows, from the top
    values: F64  # (rows, columns); NaN where nothing was measured
    x_from: str
    x_to: str
    note: str = ""


@dataclass(frozen=True)
class Said:
    """What the model said to one prompt, from checkpoint to checkpoint."""

    prompt: str
    texts: Sequence[tuple[str, str]]  # where ("step 1,800, 0.94 B tokens"), the text
    more: Sequence[tuple[str, str]] = ()  # the checkpoints in between, folded


@dataclass(frozen=True)
class Happened:
    """A list of events in time: when, where, what kind, the words."""

    rows: Sequence[tuple[str, str, str, str]]
    more: Sequence[tuple[str, str, str, str]] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG, carried inside the page."""

    png: bytes
    text: str


@dataclass(frozen=True)
class Link:
    """A file beside the page."""

    target: str
    text: str


@dataclass(frozen=True)
class Folded:
    """Opened by whoever wants to read it; printed in full."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Verbatim:
    text: str


@dataclass(frozen=True)
class Markdown:
    """A text that somebody wrote with headings and tables."""

    text: str


Block: TypeAlias = (
    Line
    | Facts
    | Table
    | Chart
    | Views
    | Stack
    | Strip
    | Said
    | Happened
    | Picture
    | Link
    | Folded
    | Verbatim
    | Markdown
)


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """All of it. `refresh_s`: it will be written again, and reloads itself."""

    title: str
    kicker: str  # above the title: what this is, when it was made
    state: str
    tone: Tone
    share_done: float | None
    lead: Sequence[Block]
    sections: Sequence[Section] = field(default_factory=list)
    refresh_s: float | None = None
