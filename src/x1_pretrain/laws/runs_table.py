"""The table behind `runs.csv`: its lines, its columns and what may stand in a cell."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from x1_pretrain.errors import UserError
from x1_pretrain.laws.forms import F64
from x1_pretrain.numbers import number

NEEDED = ("run_id", "N", "D", "val_loss")
OTHER_NAMES = {"val_loss": "loss", "flops": "C"}
BITS_PER_TOKEN = ("bits", "val_bits", "bits_per_token")
BITS_PER_BYTE = ("bpb", "val_bpb", "bits_per_byte")
YES, NO = ("yes", "true", "1", "y"), ("no", "false", "0", "n")


@dataclass(frozen=True)
class Row:
    line: int  # in the file
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    file: Path
    rows: tuple[Row, ...]
    columns: tuple[str, ...]

    def name_of(self, column: str) -> str:
        """What the file calls it."""
        return column if column in self.columns else OTHER_NAMES.get(column, column)

    def text(self, row: Row, column: str) -> str:
        return row.cells.get(self.name_of(column), "")

    def filled(self, column: str) -> bool:
        """Whether every row has something there."""
        return all(self.text(row, column) for row in self.rows)

    def refuse(self, row: Row, column: str, why: str) -> NoReturn:
        raise UserError(f"{self.file}, row {row.line}, column {self.name_of(column)}: {why}")

    def positive(self, row: Row, column: str) -> float:
        text = self.text(row, column)
        if not text:
            self.refuse(
                row, column, "empty; expected a positive number (a row that starts with # is skipped)"
            )
        if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            self.refuse(
                row, column, f"{text} is not a number; leave the run out (a row that starts with # is)"
            )
        value = number(text)
        if value is None:
            self.refuse(
                row, column, f"{text!r} is not a number; expected one such as 4.66, 5M, 4.5B or 1.35e17"
            )
        if value <= 0:
            self.refuse(row, column, f"{text} is not above zero")
        return value

    def values(self, column: str) -> F64:
        return np.array([self.positive(row, column) for row in self.rows])

    def yes(self, row: Row, column: str) -> bool | None:
        """Yes or no; None where nothing is said."""
        text = self.text(row, column).lower()
        if text in YES or text in NO:
            return text in YES
        if text:
            self.refuse(row, column, f"{text!r} is neither yes nor no")
        return None


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"--input {file}: can't be read ({error.strerror}); expected a table with the columns "
            f"{', '.join(NEEDED)}, such as `x1 isoflop` writes"
        ) from None


def decoded(file: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(file: Path, text: str, in_bits: bool) -> Table:
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if _is_row(line)]
    if not lines:
        raise UserError(f"{file}: empty; expected the columns {', '.join(NEEDED)} and a row a run")
    header = _header(file, lines[0][1], in_bits)
    if len(lines) == 1:
        raise UserError(f"{file}: a header and no rows; expected a row a run")
    return Table(file, tuple(_row(file, i, line, header) for i, line in lines[1:]), header)


def _is_row(line: str) -> bool:
    return bool(line.strip(", \t")) and not line.lstrip().lstrip('"').startswith("#")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True))]


def _header(file: Path, line: str, in_bits: bool) -> tuple[str, ...]:
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if line.count(sign) > line.count(","):
            raise UserError(
                f"{file}: columns are separated by {name}; save it with commas, and points in decimals"
            )
    header = tuple(_cells(line))
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise UserError(f"{file}: there are {header.count(twice)} columns {twice}; keep one")
    header = _without_bits(file, header, in_bits)
    missing = [name for name in NEEDED if name not in header and OTHER_NAMES.get(name) not in header]
    if "used_in_fit" in header and "run_id" in missing:
        missing.remove("run_id")  # the Chinchilla points have no names
    if missing:
        raise UserError(
            f"{file}: no column {', '.join(missing)}; found {', '.join(header)}{_nearest(missing, header)}"
        )
    return header


def _without_bits(file: Path, header: tuple[str, ...], in_bits: bool) -> tuple[str, ...]:
    """Bits per token are the loss where --bits says so; bits per byte never are."""
    if {"val_loss", "loss"} & set(header):
        return header
    if found := next((name for name in header if name.lower() in BITS_PER_TOKEN), None):
        if in_bits:
            return tuple("val_loss" if name == found else name for name in header)
        raise UserError(f"{file}: column {found}, and no val_loss in nats; --bits takes it as bits per token")
    if found := next((name for name in header if name.lower() in BITS_PER_BYTE), None):
        raise UserError(
            f"{file}: column {found} is in bits per byte, which --bits (bits per token) can't read; multiply "
            "it by ln 2 and by the bytes per token of the text, and call it val_loss"
        )
    return header


def _nearest(missing: Sequence[str], header: Sequence[str]) -> str:
    """A hint where a column is there under nearly the name."""
    lower = {name.lower(): name for name in header if name not in NEEDED}
    pairs = [(want, difflib.get_close_matches(want.lower(), lower, 1, 0.6)) for want in missing]
    near = [f"{lower[found[0]]} to {want}" for want, found in pairs if found]
    return f"; rename {' and '.join(near)}?" if near else ""


def _row(file: Path, line: int, text: str, header: tuple[str, ...]) -> Row:
    cells = _cells(text)
    while len(cells) > len(header) and not cells[-1]:
        cells.pop()
    if len(cells) != len(header):
        raise UserError(
            f"{file}, row {line}: {len(cells)} cells under {len(header)} columns; in a number, points are "
            "decimals and commas are not allowed"
        )
    return Row(line, dict(zip(header, cells, strict=True)))
