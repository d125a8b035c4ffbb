"""What the data of a spike were: their documents, counted by source, and whether anything sets them apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from x1_pretrain.corpus.order import Draw, Order
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.postmortem.texture import Look, Texture
from x1_pretrain.postmortem.tracing import (
    Corpora,
    Piece,
    block_tokens,
    corpora_of,
    draws_of,
    injected_tokens,
    pieces_of,
    replaced_by_injection,
)
from x1_pretrain.records.run_folder import Run

MOST_STEPS = 10  # whose documents are listed
MOST_BLOCKS = 1_024  # whose tokens are looked at
STEPS_BEFORE, BLOCKS_BEFORE = 16, 512  # that they are compared with
EXCERPTS, EXCERPT_TOKENS, EXCERPT_CHARACTERS = 3, 60, 160

ODD_SHARE, ODD_TIMES = 0.05, 4.0  # of the blocks; and so many times what was odd before
CHANCE = 1e-3  # of so many odd blocks, at the rate before: a small batch has one now and then
SOURCE_SHARE, SOURCE_TIMES = 0.5, 2.5  # of the tokens, from one source
DOCUMENT_SHARE, DOCUMENT_TIMES = 0.2, 4.0  # of the tokens, from one document


@dataclass
class Seen:
    """The data of some steps, as far as they can be told."""

    steps: list[int]  # whose batches are listed ...
    left_out: int  # ... and how many more there were
    injected: list[int]  # those among them that read no corpus
    draws: dict[int, list[Draw]]  # of the others
    replaced: dict[int, list[Draw]]  # what an injected step would have read
    corpora: Corpora
    step_tokens: int  # of one step
    pieces: list[Piece] = field(default_factory=list)
    replaced_pieces: list[Piece] = field(default_factory=list)
    before: list[Piece] = field(default_factory=list)
    looks: dict[tuple[int, int], Look] = field(default_factory=dict)  # by step and slot
    odd_before: float = 0.0  # share of blocks, by the same measure ...
    blocks_before: int = 0  # ... among so many
    excerpts: list[tuple[Piece, str]] = field(default_factory=list)
    injected_excerpt: str | None = None

    @property
    def odd_share(self) -> float:
        return sum(look.odd for look in self.looks.values()) / len(self.looks) if self.looks else 0.0

    @property
    def worst_first(self) -> list[Piece]:
        """By how odd their block is, then by length."""

        def key(piece: Piece) -> tuple[float, int]:
            look = self.looks.get((piece.step, piece.slot))
            return (-look.oddness if look and look.odd else 0.0, -piece.tokens)

        return sorted(self.pieces, key=key)


def data_of(run: Run, order: Order, steps: Sequence[int], onset: int) -> Seen:
    """The data of `steps`, compared with those of the steps before `onset`."""
    listed = [step for step in steps if 1 <= step <= order.total_steps][:MOST_STEPS]
    corpora, context = corpora_of(run), run.config.model.context
    injected = [step for step in listed if order.injects(step - 1)]
    seen = Seen(
        steps=listed,
        left_out=len(steps) - len(listed),
        injected=injected,
        draws={step: draws_of(order, step) for step in listed if step not in injected},
        replaced={step: replaced_by_injection(order, step) for step in injected},
        corpora=corpora,
        step_tokens=run.config.training.batch_tokens,
    )
    for step in listed:
        seen.pieces += pieces_of(step, seen.draws.get(step, []), corpora.opened, context)
        seen.replaced_pieces += pieces_of(step, seen.replaced.get(step, []), corpora.opened, context)
    if corpora.complete:
        _compare(run, order, seen, onset)
        _read_aloud(run, order, seen)
    return seen


def _compare(run: Run, order: Order, seen: Seen, onset: int) -> None:
    """Hold the blocks against those of the steps before."""
    earlier: list[tuple[int, Draw]] = []
    for step in range(onset - 1, max(0, onset - 1 - STEPS_BEFORE), -1):
        earlier += [(step, draw) for draw in draws_of(order, step)]
        if len(earlier) >= BLOCKS_BEFORE:
            break
    if not earlier:
        return
    context, opened = run.config.model.context, seen.corpora.opened
    for step, draws in groupby(earlier, key=lambda one: one[0]):
        seen.before += pieces_of(step, [draw for _, draw in draws], opened, context)
    texture = Texture([_tokens(draw, opened, context) for _, draw in earlier], run.config.model.vocab)
    odd = [texture.look(_tokens(draw, opened, context)).odd for _, draw in earlier]
    seen.odd_before, seen.blocks_before = sum(odd) / len(odd), len(odd)
    places = [(step, slot, draw) for step, draws in seen.draws.items() for slot, draw in enumerate(draws)]
    for step, slot, draw in places[:MOST_BLOCKS]:
        seen.looks[step, slot] = texture.look(_tokens(draw, opened, context))


def _tokens(draw: Draw, opened: Sequence[Corpus | None], context: int) -> npt.NDArray[np.int64]:
    corpus = opened[draw.corpus]
    assert corpus is not None
    return np.asarray(block_tokens(draw, corpus, context)).astype(np.int64)


# -----------------------------------------------------------------------------------------------------------
# What sets them apart


def patterns(seen: Seen) -> list[str]:
    """What stands out in the data, each in words with its numbers; nothing where nothing does."""
    if not seen.pieces or not seen.before:
        return []
    return [*_odd_blocks(seen), *_one_source(seen), *_one_document(seen)]


def _odd_blocks(seen: Seen) -> list[str]:
    """More than usual, and more than chance gives: that is told from the rate before as one odd block and one
    usual one more would have left it, so that none before is not taken for never."""
    looks, share = list(seen.looks.values()), seen.odd_share
    rate = (seen.odd_before * seen.blocks_before + 1) / (seen.blocks_before + 2)
    by_chance = at_least(sum(look.odd for look in looks), len(looks), rate)
    if share < ODD_SHARE or share < ODD_TIMES * seen.odd_before or by_chance >= CHANCE:
        return []
    repetitive, rare = sum(look.repetitive for look in looks), sum(look.rare for look in looks)
    kinds = ["repeat themselves far more"] if repetitive else []
    kinds += ["are made of far rarer tokens"] if rare else []
    odd, before = sum(look.odd for look in looks), f"{seen.odd_before:.1%} of those before"
    blocks = "block" if odd == 1 else "blocks"
    return [f"{odd:,} of its {len(looks):,} {blocks} {' or '.join(kinds)} than is usual ({before})"]


def at_least(found: int, among: int, rate: float) -> float:
    """The chance of `found` or more, each with probability `rate`: the upper tail of the binomial."""
    if found <= 0:
        return 1.0
    logs = [
        math.lgamma(among + 1) - math.lgamma(k + 1) - math.lgamma(among - k + 1)
        + k * math.log(rate) + (among - k) * math.log1p(-rate)
        for k in range(found, among + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))


def _one_source(seen: Seen) -> list[str]:
    """Against its share in any one step before: small batches vary."""
    name, share = _largest(seen.pieces, _file)
    usual = _shares(seen.before, _file).get(name, 0.0)
    highest = max((_shares(step, _file).get(name, 0.0) for step in _by_step(seen.before)), default=0.0)
    if share < SOURCE_SHARE or share < SOURCE_TIMES * usual or share <= highest:
        return []
    return [f"{share:.0%} of its tokens come from one source, `{name}`, which gave {usual:.0%} before"]


def _one_document(seen: Seen) -> list[str]:
    """Against the largest part that any document had in one step before."""
    usual = max((_largest(step, _document)[1] for step in _by_step(seen.before)), default=0.0)
    name, share = max((_largest(step, _document) for step in _by_step(seen.pieces)), key=lambda one: one[1])
    if share < DOCUMENT_SHARE or share < DOCUMENT_TIMES * usual:
        return []
    return [f"{share:.0%} of the tokens of a step are of one document, row {name[1]:,} of `{name[0]}`"]


def _file(piece: Piece) -> str:
    return piece.file


def _document(piece: Piece) -> tuple[str, int]:
    return piece.file, piece.row


def _by_step(pieces: Iterable[Piece]) -> list[list[Piece]]:
    steps: dict[int, list[Piece]] = {}
    for piece in pieces:
        steps.setdefault(piece.step, []).append(piece)
    return list(steps.values())


def _largest(pieces: Sequence[Piece], key: Callable[[Piece], Any]) -> tuple[Any, float]:
    shares = _shares(pieces, key)
    return max(shares.items(), key=lambda item: item[1]) if shares else (("", 0), 0.0)


def _shares(pieces: Iterable[Piece], key: Callable[[Piece], Hashable]) -> dict[Any, float]:
    counts: Counter[Hashable] = Counter()
    for piece in pieces:
        counts[key(piece)] += piece.tokens
    total = counts.total()
    return {name: tokens / total for name, tokens in counts.most_common()} if total else {}


@dataclass(frozen=True)
class SourceCount:
    """One source file's part of the data."""

    corpus: str
    file: str
    domain: str
    documents: int
    tokens: int
    share: float
    share_before: float | None


def by_source(seen: Seen) -> list[SourceCount]:
    """Counts by source, the largest first."""

    def source(piece: Piece) -> tuple[int, str, str]:
        return piece.corpus, piece.file, piece.domain

    shares, before = _shares(seen.pieces, source), _shares(seen.before, source)
    documents = Counter(one[:3] for one in {(*source(p), p.row) for p in seen.pieces})
    tokens: Counter[Hashable] = Counter()
    for piece in seen.pieces:
        tokens[source(piece)] += piece.tokens
    return [
        SourceCount(
            seen.corpora.names[key[0]],
            key[1],
            key[2],
            documents[key],
            tokens[key],
            share,
            before.get(key, 0.0) if before else None,
        )
        for key, share in shares.items()
    ]


# -----------------------------------------------------------------------------------------------------------
# A few words of them


def _read_aloud(run: Run, order: Order, seen: Seen) -> None:
    """Excerpts, where the tokenizer can be read."""
    corpus = next((one for one in seen.corpora.opened if one is not None), None)
    if corpus is None:
        return
    tokenizer = corpus.tokenizer()

    def text(ids: npt.NDArray[Any]) -> str:
        kept = [int(i) for i in ids[:EXCERPT_TOKENS] if int(i) < tokenizer.vocab_size]
        words = " ".join(tokenizer.decode(kept).split())[:EXCERPT_CHARACTERS]
        return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)

    for piece in seen.worst_first[:EXCERPTS]:
        own = seen.corpora.opened[piece.corpus]
        if own is not None:
            ids = own.train[piece.begin : piece.begin + min(piece.tokens, EXCERPT_TOKENS)]
            seen.excerpts.append((piece, text(ids)))
    if seen.injected:
        made = injected_tokens(run, order, seen.injected[0], seen.corpora)
        seen.injected_excerpt = text(made) if made is not None else None


# -----------------------------------------------------------------------------------------------------------
# All of them

CSV_COLUMNS = (
    *("spike_onset", "step", "slot", "read", "corpus", "epoch", "block", "file", "row", "domain", "tokens"),
    *("compressed_size", "surprise_nats"),
)


def csv_rows(seen: Seen, onset: int) -> list[list[object]]:
    """A row a document; a row a block of a corpus that is not here."""
    rows: list[list[object]] = []
    for pieces, read in ((seen.pieces, "yes"), (seen.replaced_pieces, "no, replaced by an injection")):
        for piece in pieces:
            look = seen.looks.get((piece.step, piece.slot)) if read == "yes" else None
            place = [onset, piece.step, piece.slot, read, seen.corpora.names[piece.corpus], piece.epoch]
            measured = [f"{look.size:.4f}", f"{look.surprise:.4f}"] if look else ["", ""]
            what = [piece.block, piece.file, piece.row, piece.domain, piece.tokens]
            rows.append([*place, *what, *measured])
    for draws, read in ((seen.draws, "yes"), (seen.replaced, "no, replaced by an injection")):
        for step, one in draws.items():
            rows += [
                [onset, step, slot, read, seen.corpora.names[d.corpus], d.epoch, d.block, *[""] * 6]
                for slot, d in enumerate(one)
                if seen.corpora.opened[d.corpus] is None
            ]
    return sorted(rows, key=lambda row: (str(row[1]).zfill(12), str(row[2]).zfill(8)))
