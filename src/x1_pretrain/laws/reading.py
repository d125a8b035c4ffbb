"""`runs.csv` -> points: what was measured, checked before anything is fitted on it.

Four columns are needed (run_id, N, D, val_loss); those that `x1 isoflop` writes beside them are used where
they are there. The table of the Chinchilla points (N, D, C, loss, used_in_fit) is read as well. What is wrong
is one line with the file, the row (its line in the file) and the column.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np

from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import F64, Counts
from x1_pretrain.laws.points import I64, Points
from x1_pretrain.laws.runs_table import Row, Table, decoded, parse, read_bytes
from x1_pretrain.numbers import human, number

HIGHEST_LOSS = 20.0  # nats; guessing among 50,257 tokens is 10.8
SMALLEST = 1000.0  # parameters and tokens: below, a unit was left out
IN_BITS = (1.3, 1.6)  # losses over the published law's: 1 / ln 2 = 1.44 and what a law may be off
# Measured on the runs of OLMo's ladder, whose losses were published along the way.
UNDECAYED = (
    "before the learning rate has come down the loss stands .020 to .067 nats above that of a run which "
    "ended there, 40 to 120 times the noise of a rerun; on OLMo's ladder such points gave D_opt(1B) = 1295 B "
    "where finished runs give 15 to 30 B"
)


def read_points(
    file: Path, counts: Counts | None = None, allow_undecayed: bool = False, in_bits: bool = False
) -> Points:
    """The points of a file. `counts`: total takes N_total for N. `in_bits`: losses are bits per token."""
    data = read_bytes(file)
    table = parse(file, decoded(file, data), in_bits)
    table, left_out = _chosen(table)
    n, what, counted = _sizes(table, counts)
    d, loss = _tokens(table), _losses(table, in_bits)
    _refuse_copies(table, n, d, loss)
    _refuse_other_data(table)
    middle = _undecayed(table, d)
    if middle and not allow_undecayed:
        _refuse_undecayed(table, middle)
    flops, basis = _flops(table, n, d)
    notes = (
        *left_out,
        *counted,
        *_suspicions(n, d, loss, in_bits),
        *_differing(table),
        *_undecayed_note(table, middle),
    )
    return Points(
        n=n,
        d=d,
        loss=loss,
        flops=flops,
        cluster=_clusters(table),
        usd=_usd(table),
        names=tuple(_name(table, row) for row in table.rows),
        counts=what,
        flops_basis=basis,
        origin=str(file),
        sha256=hashlib.sha256(data).hexdigest(),
        notes=notes,
    )


# ------------------------------------------------------------------------------------------------------------
# The columns


def _chosen(table: Table) -> tuple[Table, tuple[str, ...]]:
    """Where a column used_in_fit chooses rows, those."""
    if "used_in_fit" not in table.columns:
        return table, ()
    kept = tuple(row for row in table.rows if table.yes(row, "used_in_fit"))
    if not kept:
        raise UserError(f"{table.file}: column used_in_fit is 1 in no row; there is nothing to fit")
    words = f"{len(kept)} of {len(table.rows)} rows are used: those with used_in_fit = 1"
    return Table(table.file, kept, table.columns), (words,)


def _sizes(table: Table, counts: Counts | None) -> tuple[F64, Counts, tuple[str, ...]]:
    """N, what it counts, and what to say of it."""
    n = _at_least(table, "N", "parameters")
    if "N_total" not in table.columns or not table.filled("N_total"):
        if counts == "total":
            return n, "total", ("there is no column N_total: N is taken to count all parameters, as you say",)
        return n, counts or "as given", ()
    total = _at_least(table, "N_total", "parameters")
    for row, matrices, everything in zip(table.rows, n, total, strict=True):
        if everything < matrices:
            table.refuse(row, "N_total", f"{human(everything)} is below N = {human(matrices)}, a part of it")
    return (total, "total", ()) if counts == "total" else (n, "matrices", ())


def _tokens(table: Table) -> F64:
    return _at_least(table, "D", "tokens")


def _at_least(table: Table, column: str, what: str) -> F64:
    values = table.values(column)
    for row, value in zip(table.rows, values, strict=True):
        if value < SMALLEST:
            text = table.text(row, column)
            table.refuse(row, column, f"{text} {what}; expected the full number, or a unit: {text}M, {text}B")
    return values


def _losses(table: Table, in_bits: bool) -> F64:
    losses = table.values("val_loss") * (math.log(2) if in_bits else 1.0)
    for row, value in zip(table.rows, losses, strict=True):
        if value > HIGHEST_LOSS:
            table.refuse(
                row,
                "val_loss",
                f"{value:.4g} nats per token, where a guess among 50,257 tokens is 10.8: a perplexity, or "
                "a run that diverged?",
            )
    return losses


def _flops(table: Table, n: F64, d: F64) -> tuple[F64, str]:
    """As the file has them, if for every row; never some of one kind and some of another."""
    if table.name_of("flops") not in table.columns or not table.filled("flops"):
        return 6.0 * n * d, "6ND"
    flops = table.values("flops")
    return flops, "6ND" if np.allclose(flops, 6.0 * n * d, rtol=1e-3) else "as measured"


def _usd(table: Table) -> F64:
    return np.array([_cost(table, row) for row in table.rows])


def _cost(table: Table, row: Row) -> float:
    text = table.text(row, "usd_spent").lstrip("$")
    if not text:
        return math.nan
    value = number(text)
    if value is None or value < 0:
        table.refuse(row, "usd_spent", f"{text!r}; expected dollars, 0 or more, or nothing")
    return value


def _name(table: Table, row: Row) -> str:
    return table.text(row, "run_id") or f"row {row.line}"


def _trunk(table: Table, row: Row) -> str:
    """What a row's training began as: rows of one trunk are not independent."""
    return table.text(row, "trunk") or _name(table, row)


def _clusters(table: Table) -> I64:
    order: dict[str, int] = {}
    return np.array([order.setdefault(_trunk(table, row), len(order)) for row in table.rows], dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------
# What does not go together


def _refuse_copies(table: Table, n: F64, d: F64, loss: F64) -> None:
    """One row twice, or one name for two runs. Equal N and D with another loss are repeats, and welcome."""
    by_name: dict[tuple[str, float], Row] = {}
    by_value: dict[tuple[float, float, float], Row] = {}
    size_of: dict[str, tuple[Row, float]] = {}
    for row, size, tokens, nats in zip(table.rows, n, d, loss, strict=True):
        name = _name(table, row)
        first = by_name.setdefault((name, tokens), row)
        if first is not row:
            table.refuse(row, "run_id", f"{name} is in row {first.line} already, with the same D")
        first = by_value.setdefault((size, tokens, nats), row)
        if first is not row:
            table.refuse(row, "N", f"N, D and loss are those of row {first.line}: the same run twice?")
        first, before = size_of.setdefault(name, (row, size))
        if before != size:
            table.refuse(row, "run_id", f"{name} is in row {first.line} already, with N = {human(before)}")


def _refuse_other_data(table: Table) -> None:
    seen = {table.text(row, "data"): row for row in reversed(table.rows) if table.text(row, "data")}
    if len(seen) > 1:
        (one, first), (other, second) = sorted(seen.items(), key=lambda item: item[1].line)[:2]
        table.refuse(
            second,
            "data",
            f"{other}, but {one} in row {first.line}: losses on different data can't be compared; fit "
            "a file for each",
        )


def _undecayed(table: Table, d: F64) -> list[Row]:
    """Rows whose loss was taken before the learning rate had come down."""
    runs: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    found = []
    for row, tokens in zip(table.rows, d, strict=True):
        decayed = table.yes(row, "decayed")
        schedule = table.text(row, "schedule").lower()
        if decayed is False or (decayed is None and schedule == "constant"):
            found.append(row)
        elif decayed is None:
            runs[_trunk(table, row) if schedule == "cosine" else _name(table, row)].append(
                (float(tokens), row)
            )
    for rows in runs.values():
        longest = max(tokens for tokens, _ in rows)
        found += [row for tokens, row in rows if tokens < longest]
    return sorted(found, key=lambda row: row.line)


def _refuse_undecayed(table: Table, rows: Sequence[Row]) -> NoReturn:
    first = rows[0]
    column = next((c for c in ("decayed", "schedule", "trunk") if table.text(first, c)), "D")
    table.refuse(
        first,
        column,
        f"{_name(table, first)} is from the middle of its schedule ({len(rows)} of {len(table.rows)} rows "
        f"are): {UNDECAYED}; leave such rows out, or say --allow-undecayed",
    )


def _undecayed_note(table: Table, rows: Sequence[Row]) -> tuple[str, ...]:
    if not rows:
        return ()
    share = "all" if len(rows) == len(table.rows) else f"{len(rows)} of {len(table.rows)}"
    return (f"{share} points are from the middle of a schedule and were allowed: {UNDECAYED}",)


def _suspicions(n: F64, d: F64, loss: F64, in_bits: bool) -> Iterable[str]:
    if (d < n).all():
        yield (
            f"D is below N in every row (as in D = {human(d[0])}, N = {human(n[0])}): are the two columns "
            "swapped? They were taken as they are"
        )
    ratio = loss / forms.loss(forms.REFIT.law, n, d)
    if not in_bits and IN_BITS[0] < ratio.min() and ratio.max() < IN_BITS[1]:
        yield (
            f"every loss is {ratio.min():.2f} to {ratio.max():.2f} times what the published law gives; bits "
            "per token would be 1.44 times: if they are, say --bits"
        )


def _differing(table: Table) -> Iterable[str]:
    """What makes losses of one file hard to compare."""
    for column, why in (
        ("context", "a longer context has a lower loss at the same N and D"),
        ("val_tokens", "the losses were taken on different amounts of held-out text"),
    ):
        values = sorted(
            {table.text(row, column) for row in table.rows} - {""}, key=lambda t: number(t) or 0.0
        )
        if len(values) > 1:
            yield f"{column} differs among the rows ({', '.join(values[:4])}): {why}"
    pairs = [(table.text(row, "N"), table.text(row, "D")) for row in table.rows]
    if repeats := sum(a == b for a, b in pairwise(sorted(pairs))):
        yield f"{repeats} rows repeat the N and D of another row: taken as repeats of a run"
    some = [row for row in table.rows if table.text(row, "flops")]
    if some and len(some) < len(table.rows):
        yield f"{len(some)} of {len(table.rows)} rows have FLOPs: 6ND is used for all, as kinds are not mixed"
