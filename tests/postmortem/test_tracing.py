"""Which documents a step read: against the blocks that a run logged, and against a search by brute force."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from tests.corpora import write_corpus
from tests.postmortem import spiky
from x1_pretrain.corpus.order import Order
from x1_pretrain.corpus.shards import open_corpus
from x1_pretrain.errors import UserError
from x1_pretrain.postmortem import data as spike_data
from x1_pretrain.postmortem.texture import Texture, compressed_size
from x1_pretrain.postmortem.tracing import (
    corpora_of,
    draws_of,
    injected_tokens,
    pieces_of,
    replaced_by_injection,
)
from x1_pretrain.records.data_order import order_of
from x1_pretrain.records.run_folder import open_run


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Enough for 400 steps in one epoch."""
    return write_corpus(tmp_path / "corpus", documents=1500)


def test_the_documents_of_a_step_are_those_of_its_tokens(tmp_path: Path, large: Path) -> None:
    """By brute force: each token's document from the end ids before it."""
    run = open_run(spiky.natural(tmp_path / "run", large))
    order, corpora, corpus = order_of(run), corpora_of(run), open_corpus(large)
    ends = np.flatnonzero(np.asarray(corpus.train) == corpus.eot_id)
    for step in (1, 57, 300):
        expected: dict[tuple[int, str, int], int] = defaultdict(int)
        for slot, draw in enumerate(draws_of(order, step)):
            for token in range(draw.block * 32, (draw.block + 1) * 32):
                document = corpus.train_docs[int(np.searchsorted(ends, token))]
                expected[slot, corpus.source_path(int(document["file"])), int(document["row"])] += 1
        pieces = pieces_of(step, draws_of(order, step), corpora.opened, 32)
        assert {(p.slot, p.file, p.row): p.tokens for p in pieces} == expected
        assert sum(p.tokens for p in pieces) == spiky.BATCH_TOKENS


def test_jumps_and_injections_are_those_of_the_events(tmp_path: Path, large: Path) -> None:
    events = [
        spiky.event("inject", 50, first_step=50, first_batch=50, steps=5),
        spiky.event("rewind", 221, from_step=221, to_step=180, jumps=[[180, 221]]),
        spiky.event("inject", 300, first_step=300, first_batch=341, steps=5),
    ]
    run = open_run(spiky.build(tmp_path / "run", spiky.step_rows(300, {}, {}), events, large))
    plain = order_of(run, run.events()[:1])
    now = order_of(run)
    assert isinstance(now, Order)
    assert (now.jumps, now.injected) == (((180, 221),), (50, 341))
    assert draws_of(now, 181) == draws_of(plain, 222)  # counted from 1: the 222nd update's data
    assert draws_of(now, 51) == []
    assert replaced_by_injection(now, 51) == draws_of(plain, 51)
    assert draws_of(now, 301) == []
    assert replaced_by_injection(now, 301) == draws_of(plain, 342)
    before_the_rewind = order_of(run, run.events()[:2])
    assert draws_of(before_the_rewind, 222) == draws_of(plain, 222)


def test_the_last_word_on_jumps_counts(tmp_path: Path, large: Path) -> None:
    """A rewind names all jumps that are in force."""
    events = [
        spiky.event("rewind", 90, from_step=90, to_step=80, jumps=[[80, 90]]),
        spiky.event("rewind", 150, from_step=150, to_step=120, jumps=[[80, 90], [120, 160]]),
    ]
    run = open_run(spiky.build(tmp_path / "run", spiky.step_rows(160, {}, {}), events, large))
    assert order_of(run).jumps == ((80, 90), (120, 160))
    assert order_of(run, run.events()[:2]).jumps == ((80, 90),)


def test_an_event_without_its_batch_is_placed_by_its_step(tmp_path: Path, large: Path) -> None:
    events = [spiky.event("inject", 50, first_step=50, steps=5)]
    run = open_run(spiky.build(tmp_path / "run", spiky.step_rows(60, {}, {}), events, large))
    assert order_of(run).injected == (50,)


def test_the_injected_sequence_is_made_again(tmp_path: Path, large: Path) -> None:
    events = [spiky.event("inject", 50, first_step=50, first_batch=50, steps=5)]
    run = open_run(spiky.build(tmp_path / "run", spiky.step_rows(60, {}, {}), events, large))
    order, corpora = order_of(run), corpora_of(run)
    made = injected_tokens(run, order, 51, corpora)
    assert made is not None
    assert len(made) == 33
    counts = np.bincount(np.asarray(open_corpus(large).train), minlength=300)
    assert counts[np.unique(made)].sum() <= 0.01 * counts.sum()
    assert injected_tokens(run, order, 49, corpora) is None


@pytest.mark.parametrize("jumps", [[["x", 1]], [[5]], "none", [[9, 3]]])
def test_a_damaged_record_of_jumps_is_one_line(tmp_path: Path, large: Path, jumps: object) -> None:
    events = [spiky.event("rewind", 9, from_step=9, to_step=5, jumps=jumps)]
    run = open_run(spiky.build(tmp_path / "run", spiky.step_rows(60, {}, {}), events, large))
    with pytest.raises(UserError, match="the order of its data can't be told"):
        order_of(run)


def test_a_corpus_that_is_gone_or_another_is_not_read(tmp_path: Path, large: Path) -> None:
    folder = spiky.natural(tmp_path / "run", large)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"][0]["fingerprint"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = corpora_of(open_run(folder))
    assert found.opened == [None]
    assert "holds other data now" in found.problems[0]
    found = corpora_of(open_run(spiky.natural(tmp_path / "far")))
    assert found.problems == ["/nowhere/corpus is not on this machine"]


def test_a_corpus_that_moved_is_found_where_the_config_says(tmp_path: Path, large: Path) -> None:
    folder = spiky.natural(tmp_path / "run", large, data__dir=str(large))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"][0] |= {"dir": "/nowhere", "name": "corpus"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert corpora_of(open_run(folder)).complete


# -----------------------------------------------------------------------------------------------------------
# What sets data apart


def spoil(corpus: Path, order: Order, steps: range, token: int | None) -> None:
    """Overwrite every block of some steps: with one token, or with tokens of no pattern that are rare."""
    tokens = np.memmap(corpus / "train.bin", dtype="<u2", mode="r+")
    rng = np.random.default_rng(1)
    for step in steps:
        for draw in draws_of(order, step):
            span = slice(draw.block * 32, (draw.block + 1) * 32)
            tokens[span] = token if token is not None else rng.integers(5, 250, 32)
    tokens.flush()


@pytest.mark.parametrize(("token", "said"), [(20, "repeat themselves"), (None, "rarer tokens")])
def test_odd_text_is_noticed(tmp_path: Path, large: Path, token: int | None, said: str) -> None:
    run = open_run(spiky.natural(tmp_path / "run", large))
    order = order_of(run)
    spoil(large, order, range(201, 203), token)
    seen = spike_data.data_of(run, order, [201, 202, 203], 201)
    assert seen.odd_share == pytest.approx(8 / 12)
    assert seen.odd_before == 0
    [told] = spike_data.patterns(seen)
    assert said in told
    assert "8 of its 12 blocks" in told
    assert {piece.step for piece in seen.worst_first[:4]} <= {201, 202}


def test_usual_text_is_not(tmp_path: Path, large: Path) -> None:
    run = open_run(spiky.natural(tmp_path / "run", large))
    order = order_of(run)
    told = [spike_data.patterns(spike_data.data_of(run, order, [step], step)) for step in range(40, 240, 10)]
    assert told == [[]] * 20


@pytest.mark.parametrize(
    ("blocks", "odd", "named"), [(8, 1, False), (16, 1, False), (8, 3, True), (16, 3, True)]
)
def test_one_odd_block_of_a_small_batch_is_chance(
    tmp_path: Path, large: Path, blocks: int, odd: int, named: bool
) -> None:
    """One block of a hundred was odd before: a batch of eight has one in one step of thirteen."""
    run = open_run(spiky.natural(tmp_path / "run", large))
    seen = spike_data.data_of(run, order_of(run), [201], 201)
    usual = next(iter(seen.looks.values()))
    odd_one = replace(usual, rare=True)
    seen.looks = {(201, slot): odd_one if slot < odd else usual for slot in range(blocks)}
    seen.odd_before, seen.blocks_before = 0.01, 512
    assert bool(spike_data.patterns(seen)) == named


@pytest.mark.parametrize(
    ("found", "among", "rate"), [(1, 8, 0.01), (3, 16, 0.012), (40, 1024, 0.02), (0, 4, 0.5)]
)
def test_the_tail_of_the_binomial(found: int, among: int, rate: float) -> None:
    assert spike_data.at_least(found, among, rate) == pytest.approx(binom.sf(found - 1, among, rate))


def test_one_source_and_one_document_are_noticed(tmp_path: Path, large: Path) -> None:
    run = open_run(spiky.natural(tmp_path / "run", large))
    seen = spike_data.data_of(run, order_of(run), [201, 202], 201)
    first = seen.pieces[0]
    seen.pieces = [piece._replace(file="odd.txt", row=7) for piece in seen.pieces]
    assert len(spike_data.patterns(seen)) == 2, spike_data.patterns(seen)
    assert "`odd.txt`, which gave 0% before" in spike_data.patterns(seen)[0]
    assert "row 7 of `odd.txt`" in spike_data.patterns(seen)[1]
    assert first.file in ("code", "prose")


def test_counts_by_source_add_up(tmp_path: Path, large: Path) -> None:
    run = open_run(spiky.natural(tmp_path / "run", large))
    seen = spike_data.data_of(run, order_of(run), list(range(201, 206)), 201)
    counts = spike_data.by_source(seen)
    assert sum(one.tokens for one in counts) == 5 * spiky.BATCH_TOKENS
    assert sum(one.share for one in counts) == pytest.approx(1)
    assert sum(one.documents for one in counts) == len({(p.file, p.row) for p in seen.pieces})


def test_a_long_spike_lists_its_first_steps(tmp_path: Path, large: Path) -> None:
    run = open_run(spiky.natural(tmp_path / "run", large))
    seen = spike_data.data_of(run, order_of(run), list(range(201, 260)), 201)
    assert (seen.steps, seen.left_out) == (list(range(201, 211)), 49)


def test_the_measures_of_a_block() -> None:
    rng = np.random.default_rng(0)
    usual = [rng.integers(0, 50, 256) for _ in range(40)]
    texture = Texture(usual, 1000)
    assert compressed_size(np.full(256, 3)) < 0.1 < compressed_size(usual[0])
    assert texture.look(np.full(256, 3)).repetitive
    assert texture.look(rng.integers(500, 1000, 256)).rare
    assert not texture.look(rng.integers(0, 50, 256)).odd


def test_a_phrase_over_and_over_is_repetitive_whatever_its_words() -> None:
    rng = np.random.default_rng(0)
    texture = Texture([rng.integers(0, 50, 256) for _ in range(40)], 1000)
    assert texture.look(np.tile(rng.permutation(50), 5)).repetitive
