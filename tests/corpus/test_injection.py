"""Injected batches: rare tokens only, the same anywhere, and nothing of the corpus is read for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.corpora import write_corpus

from x1_pretrain.corpus.injection import COUNTED_TOKENS, LEAST_IDS, RARE_SHARE, injected_rows, rare_tokens
from x1_pretrain.corpus.order import INJECTED_STEPS, Order, Source
from x1_pretrain.corpus.reader import Reader, TokenFile
from x1_pretrain.corpus.shards import Corpus, open_corpus


def opened(folder: Path, seed: int = 0) -> Corpus:
    return open_corpus(write_corpus(folder, seed=seed))


def test_the_ids_are_the_rarest_and_hold_one_percent_of_the_text(tmp_path: Path) -> None:
    corpus = opened(tmp_path)
    rare = rare_tokens([(corpus, 1.0)], corpus.vocab_size)
    counts = np.bincount(corpus.train, minlength=corpus.vocab_size)
    others = np.setdiff1d(np.arange(corpus.vocab_size), [*rare.ids, corpus.eot_id])
    assert counts[rare.ids].max() <= counts[others].min()
    assert corpus.eot_id not in rare.ids
    assert counts[rare.ids].sum() <= RARE_SHARE * len(corpus.train)
    next_rarest = counts[others].min()
    assert counts[rare.ids].sum() + next_rarest > RARE_SHARE * len(corpus.train)  # no more would fit


def test_the_rarer_the_likelier(tmp_path: Path) -> None:
    corpus = opened(tmp_path)
    rare = rare_tokens([(corpus, 1.0)], corpus.vocab_size)
    shares = np.maximum(
        np.bincount(corpus.train, minlength=corpus.vocab_size)[rare.ids] / len(corpus.train),
        0.5 / COUNTED_TOKENS,
    )
    expected = -np.log(shares) / -np.log(shares).sum()
    drawn = injected_rows(rare, 1, 7, range(400), 257)
    found = np.array([(drawn == i).mean() for i in rare.ids])
    assert np.allclose(found, expected, atol=5 * np.sqrt(expected.max() / drawn.size))


def test_a_corpus_without_rare_tokens_still_gives_some(tmp_path: Path) -> None:
    corpus = opened(tmp_path)
    ids = rare_tokens([(corpus, 1.0)], 20).ids
    assert len(ids) >= min(LEAST_IDS, 19)


def test_a_mixture_counts_by_weight(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "a"), opened(tmp_path / "b", seed=9)
    alone = rare_tokens([(one, 1.0)], one.vocab_size)
    nearly = rare_tokens([(one, 1.0), (other, 1e-12)], one.vocab_size)
    assert set(alone.ids) == set(nearly.ids)


def test_ranks_share_an_injected_batch_as_any_other(tmp_path: Path) -> None:
    corpus = opened(tmp_path)
    rare = rare_tokens([(corpus, 1.0)], corpus.vocab_size)
    file = TokenFile(corpus.path / "train.bin", corpus.train.dtype)
    order = Order(3, [Source("a", len(corpus.train) // 33)], 4, 12, injected=[3])

    def batches(rank: int, world: int) -> list[np.ndarray]:
        reader = Reader(order, [file], 32, lambda rows: rows, 0, rank, world, injection=rare)
        found = [reader.next()[0] for _ in range(12)]
        reader.close()
        assert [b.injected for b in found if b] == [3 <= s < 3 + INJECTED_STEPS for s in range(12)]
        return [b.tokens for b in found if b]

    alone, halves = batches(0, 1), [batches(r, 2) for r in range(2)]
    for step, whole in enumerate(alone):
        assert (whole[0::2] == halves[0][step]).all()
        assert (whole[1::2] == halves[1][step]).all()
    assert np.isin(alone[3], rare.ids).all()
    assert not (alone[3] == alone[4]).all()
