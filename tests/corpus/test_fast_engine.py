"""The optional faster engine: equal to tiktoken, or not used."""

from __future__ import annotations

import importlib.util
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.corpora import text

from x1_pretrain.corpus import fast_engine
from x1_pretrain.corpus.fast_engine import HARD, FastokensEngine, with_fastest_engine
from x1_pretrain.corpus.tokenizer import Tokenizer
from x1_pretrain.corpus.vocabulary import train_tokenizer

needs_fastokens = pytest.mark.skipif(
    importlib.util.find_spec("fastokens") is None, reason="fastokens is not installed (it is optional)"
)


@cache
def reference() -> Tokenizer:
    return train_tokenizer(text(400, 3), 600)


@cache
def faster() -> Tokenizer:
    return with_fastest_engine(reference(), text(50, 4))[0]


@needs_fastokens
@settings(max_examples=300)
@given(st.lists(st.text(max_size=80), max_size=5))
def test_it_gives_what_tiktoken_gives(texts: list[str]) -> None:
    assert faster().engine.name == "fastokens"
    assert reference().engine.name == "tiktoken"
    ours = [ids.tolist() for ids in faster().encode_batch(texts)]
    assert ours == [ids.tolist() for ids in reference().encode_batch(texts)]


@needs_fastokens
@pytest.mark.slow
def test_it_gives_what_tiktoken_gives_for_every_character() -> None:
    texts = [f"a{chr(c)}a {chr(c)} \n{chr(c)}" for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    pairs = zip(faster().encode_batch(texts), reference().encode_batch(texts), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@needs_fastokens
@pytest.mark.parametrize("sample", [text(20, 5), ["rain <|endoftext|>"], []])
def test_an_engine_that_differs_anywhere_is_not_used(
    sample: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = (sample or list(HARD))[-1]
    right = FastokensEngine.encode_batch

    def wrong(self: FastokensEngine, texts: list[str]) -> list[np.ndarray]:
        return [
            ids[:-1] if one == marked else ids for one, ids in zip(texts, right(self, texts), strict=True)
        ]

    monkeypatch.setattr(FastokensEngine, "encode_batch", wrong)
    tokenizer, note = with_fastest_engine(reference(), sample)
    assert tokenizer.engine.name == "tiktoken"
    assert "fastokens differs on" in note


def test_without_it_tiktoken_runs_and_the_user_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_engine.importlib.util, "find_spec", lambda name: None)
    tokenizer, note = with_fastest_engine(reference(), ["x"])
    assert tokenizer.engine.name == "tiktoken"
    assert "fastokens" in note
    assert "not installed" in note


def test_an_engine_that_cannot_be_imported_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("built for another Python")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(FastokensEngine, "__init__", broken)
    chosen, why = with_fastest_engine(reference(), text(5, 6))
    assert chosen.engine.name == "tiktoken"
    assert why == "fastokens can't be used (ImportError: built for another Python)"
