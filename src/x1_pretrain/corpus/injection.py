"""Batches made to cause a loss spike: sequences of a corpus's rarest tokens, the rarer the likelier.

For rehearsals: what does the run do, what do the alarms say, how long does it take to recover? Such a batch
is arithmetic like the order of the data: the same on any number of ranks and after any resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from x1_pretrain.corpus.order import uniform
from x1_pretrain.corpus.shards import Corpus

RARE_SHARE = 0.01  # of all tokens: the rarest ids that together make up no more
LEAST_IDS = 16  # but at least so many ids
COUNTED_TOKENS = 1 << 24  # of each corpus, in evenly spaced pieces
PIECES = 64


@dataclass(frozen=True)
class Rare:
    """Ids to draw from, and the running total of their weights, up to 1."""

    ids: npt.NDArray[np.int64]
    cumulative: npt.NDArray[np.float64]


def rare_tokens(corpora: Sequence[tuple[Corpus, float]], vocab: int) -> Rare:
    """The bottom of the unigram distribution of a weighted mixture, weighted by surprise, -log p."""
    shares = np.zeros(vocab)
    total = sum(weight for _, weight in corpora)
    for corpus, weight in corpora:
        shares += weight / total * unigram_shares(corpus, vocab)
    allowed = np.ones(vocab, dtype=bool)
    allowed[[corpus.eot_id for corpus, _ in corpora]] = False
    by_rarity = np.lexsort((np.arange(vocab), shares))
    by_rarity = by_rarity[allowed[by_rarity]]
    among = max(LEAST_IDS, int(np.searchsorted(np.cumsum(shares[by_rarity]), RARE_SHARE, side="right")))
    ids = by_rarity[:among]
    weights = -np.log(np.maximum(shares[ids], 0.5 / COUNTED_TOKENS))
    return Rare(ids.astype(np.int64), np.cumsum(weights) / weights.sum())


def unigram_shares(corpus: Corpus, vocab: int) -> npt.NDArray[np.float64]:
    """How often each id occurs, of all tokens looked at."""
    tokens, piece = corpus.train, COUNTED_TOKENS // PIECES
    counts: npt.NDArray[np.int64] = np.zeros(vocab, dtype=np.int64)
    if len(tokens) <= COUNTED_TOKENS:
        starts, piece = [0], len(tokens)
    else:
        starts = [i * (len(tokens) - piece) // (PIECES - 1) for i in range(PIECES)]
    for start in starts:
        counts += np.bincount(tokens[start : start + piece], minlength=vocab)[:vocab]
    shares: npt.NDArray[np.float64] = counts / counts.sum()
    return shares


def injected_rows(
    rare: Rare, seed: int, batch: int, slots: Sequence[int], length: int
) -> npt.NDArray[np.int64]:
    """The sequences of some slots of a batch, (slots, length)."""
    rows = []
    for slot in slots:
        key = hashlib.blake2b(f"x1-injection-1/{seed}/{batch}/{slot}".encode(), digest_size=8).digest()
        drawn = uniform(np.arange(length, dtype=np.uint64), np.frombuffer(key, dtype="<u8")[0])
        places = np.searchsorted(rare.cumulative, drawn, side="right")
        rows.append(rare.ids[np.minimum(places, len(rare.ids) - 1)])
    return np.stack(rows)
