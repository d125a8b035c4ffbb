"""Which data a step read: corpus, source file and row of every document of its blocks, from arithmetic alone.

order = order_of(run)  # of records.data_order
pieces = pieces_of(step, draws_of(order, step), corpora_of(run).opened, run.config.model.context)

The order says which blocks a step read. With the corpus folders at hand each block leads to its documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from x1_pretrain.corpus.injection import injected_rows, rare_tokens
from x1_pretrain.corpus.order import Draw, Order, block_span
from x1_pretrain.corpus.shards import Corpus, open_corpus
from x1_pretrain.errors import UserError
from x1_pretrain.records.run_folder import Run


def draws_of(order: Order, step: int) -> list[Draw]:
    """The blocks of update `step`, counted from 1; none where the batch was injected."""
    return order.step_blocks(step - 1) if 1 <= step <= order.total_steps else []


def replaced_by_injection(order: Order, step: int) -> list[Draw]:
    """The blocks that update `step` would have read without its injection."""
    plain = Order(order.seed, order.sources, order.batch_blocks, order.total_steps, order.jumps)
    return plain.step_blocks(step - 1)


# -----------------------------------------------------------------------------------------------------------
# The corpora


class Corpora(NamedTuple):
    """The corpora of a run in the order of its mixture: opened, or why not."""

    names: list[str]
    opened: list[Corpus | None]
    problems: list[str]

    @property
    def complete(self) -> bool:
        return all(corpus is not None for corpus in self.opened)


def corpora_of(run: Run) -> Corpora:
    """Open the run's corpora where they are on this machine and still hold what was trained on."""
    told = [one for one in run.manifest.get("data") or [] if isinstance(one, dict)]
    names = [str(one.get("name", number)) for number, one in enumerate(told)]
    by_config = {name: c.dir for name, c in run.config.data.mixture().items()}
    found = [
        _opened(one, [one.get("dir"), by_config.get(name)]) for one, name in zip(told, names, strict=True)
    ]
    return Corpora(names, [corpus for corpus, _ in found], [problem for _, problem in found if problem])


def _opened(told: Mapping[str, Any], places: Sequence[object]) -> tuple[Corpus | None, str]:
    """The corpus, or why it can't be read; what was found says more than what was not."""
    absent, wrong = [], []
    for place in dict.fromkeys(place for place in places if isinstance(place, str)):
        if not Path(place).is_dir():
            absent.append(f"{place} is not on this machine")
            continue
        try:
            corpus = open_corpus(Path(place), str(told.get("name")))
        except UserError as error:
            wrong.append(str(error))
            continue
        if corpus.fingerprint == told.get("fingerprint"):
            return corpus, ""
        wrong.append(f"{place} holds other data now than the run was trained on")
    return None, next(iter([*wrong, *absent]), "the manifest does not say where it lies")


# -----------------------------------------------------------------------------------------------------------
# Documents


class Piece(NamedTuple):
    """What one block read of one document."""

    step: int
    slot: int
    corpus: int
    epoch: int
    block: int
    file: str
    row: int
    domain: str
    tokens: int
    start: int  # the document's first token in the corpus
    begin: int  # the piece's first token in the corpus


def pieces_of(
    step: int, draws: Sequence[Draw], corpora: Sequence[Corpus | None], context: int
) -> list[Piece]:
    """Every document of the blocks `draws` of update `step`; of a corpus that is not here none."""
    found: list[Piece] = []
    for slot, draw in enumerate(draws):
        corpus = corpora[draw.corpus]
        if corpus is not None:
            found += _pieces(step, slot, draw, corpus, context)
    return found


def block_tokens(draw: Draw, corpus: Corpus, context: int) -> npt.NDArray[Any]:
    """The inputs of a block and the target of its last."""
    first, last = block_span(draw.block, context)
    return corpus.train[first:last]


def injected_tokens(run: Run, order: Order, step: int, corpora: Corpora) -> npt.NDArray[np.int64] | None:
    """The first injected sequence of update `step`; it can only be made again with the corpora at hand."""
    if not order.injects(step - 1) or not corpora.complete:
        return None
    weights = [source.weight for source in order.sources]
    opened = [corpus for corpus in corpora.opened if corpus is not None]
    rare = rare_tokens(list(zip(opened, weights, strict=True)), run.config.model.vocab)
    rows = injected_rows(rare, order.seed, order.batch_of(step - 1), [0], run.config.model.context + 1)
    return np.asarray(rows[0])


def _pieces(step: int, slot: int, draw: Draw, corpus: Corpus, context: int) -> list[Piece]:
    first, last = draw.block * context, (draw.block + 1) * context  # as inputs
    table = corpus.documents("train", first, last)
    starts = table["start"].astype(np.int64)
    edges = np.append(np.clip(starts, first, last), last)
    return [
        Piece(
            step,
            slot,
            draw.corpus,
            draw.epoch,
            draw.block,
            corpus.source_path(int(row["file"])),
            int(row["row"]),
            corpus.domains[int(row["domain"])],
            int(edges[place + 1] - edges[place]),
            int(starts[place]),
            int(edges[place]),
        )
        for place, row in enumerate(table)
    ]
