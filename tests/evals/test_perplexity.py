"""Validation loss per domain against a plain computation with Transformers' own model."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.corpora import write_corpus

from x1_pretrain.config import ModelConfig
from x1_pretrain.corpus.shards import open_corpus
from x1_pretrain.evals.perplexity import _cut, evaluate, windows
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.runtime.world import World

ALONE = World(0, 1, torch.device("cpu"))
CONTEXT = 24


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = ModelConfig(layers=2, d_model=32, heads=4, kv_heads=2, d_ff=64, context=CONTEXT, vocab_size=300)
    return Decoder(model, seed=3)


def never() -> bool:
    return False


def test_loss_and_bits_per_byte_are_what_they_say(corpus: Path, decoder: Decoder) -> None:
    opened = open_corpus(corpus)
    row = evaluate(decoder, windows({"c": opened}, CONTEXT, 10**9), 4, ALONE, never)
    assert row is not None
    nats_of_all = tokens_of_all = 0.0
    for domain, spans in opened.val_spans.items():
        nats, text_bytes, tokens = 0.0, 0, 0
        ((start, end),) = spans
        ids = torch.from_numpy(np.asarray(opened.val[start:end], dtype=np.int64))
        for first in range(0, len(ids) - 1, CONTEXT):
            window = ids[first : first + CONTEXT + 1]
            with torch.no_grad():
                logp = decoder(window[None, :-1])[0].log_softmax(-1)
            nats -= float(logp.gather(1, window[1:, None]).sum())
            tokens += len(window) - 1
        # every token but the first is predicted once: the bytes of the text, less those of the first token
        text = opened.tokenizer().decode(ids[1:].tolist()).replace("<|endoftext|>", "")
        text_bytes = len(text.encode())
        assert row[f"val/{domain}/loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert row[f"val/{domain}/bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
        nats_of_all, tokens_of_all = nats_of_all + nats, tokens_of_all + tokens
    assert row["val/loss"] == pytest.approx(nats_of_all / tokens_of_all, rel=1e-5)


def test_the_micro_batch_does_not_matter(corpus: Path, decoder: Decoder) -> None:
    sets = windows({"c": open_corpus(corpus)}, CONTEXT, 10**9)
    one, many = evaluate(decoder, sets, 1, ALONE, never), evaluate(decoder, sets, 7, ALONE, never)
    assert one == pytest.approx(many, rel=1e-6)


def test_a_signal_ends_an_evaluation(corpus: Path, decoder: Decoder) -> None:
    polls = iter([False, True])
    sets = windows({"c": open_corpus(corpus)}, CONTEXT, 10**9)
    assert evaluate(decoder, sets, 1, ALONE, lambda: next(polls)) is None


def test_two_corpora_with_one_domain_name_are_told_apart(tmp_path: Path) -> None:
    opened = {
        n: open_corpus(write_corpus(tmp_path / n, domains=("code",), seed=i)) for i, n in enumerate("ab")
    }
    assert [w.domain for w in windows(opened, CONTEXT, 10**9)] == ["a-code", "b-code"]


def test_special_tokens_count_no_bytes(corpus: Path) -> None:
    opened = open_corpus(corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert opened.token_bytes()[opened.eot_id] == 0
    assert int(opened.token_bytes()[np.asarray(opened.val)].sum()) == manifest["val"]["bytes"]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    context=st.integers(1, 20),
    limit=st.integers(1, 80),
)
def test_windows_cover_each_target_once_up_to_the_limit(lengths: list[int], context: int, limit: int) -> None:
    starts = np.cumsum([0, *lengths])
    spans = [(int(a), int(b)) for a, b in pairwise(starts)]
    cut = _cut(spans, context, limit)
    targets = [t for start, end in cut for t in range(start + 1, end)]
    possible = [t for start, end in spans for t in range(start + 1, end)]
    assert targets == possible[: len(targets)]
    assert all(end - start <= context + 1 for start, end in cut)
    assert len(targets) == len(possible) or limit <= len(targets) < limit + context
