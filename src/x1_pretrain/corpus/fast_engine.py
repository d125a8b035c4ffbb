"""fastokens, several times faster than tiktoken, where it is installed and proves equal first.

It is young, so tiktoken stays the reference: every job compares the two on its own text before it trusts one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from x1_pretrain.corpus.tokenizer import Ids, Tokenizer

CHECK_BYTES = 1 << 20  # of the text of a job
# Where tokenizers have differed: text that looks special, long runs, odd spaces, combined characters.
HARD = (
    "<|endoftext|> a<|endoftext|>b <|im_start|>",
    "a" * 3000 + " " * 300 + "\n" * 30,
    "I'LL we'll \u00a0\u2003\u3000x \r\n\r \x00\x7f\u200b\ufeff 12²½٣",
    "e\u0301 \u01c5 \u0130ı漢字한글 \U0001f469\u200d\U0001f467\U0001f3fd",
)


class FastokensEngine:
    """Byte-level BPE by fastokens."""

    name = "fastokens"

    def __init__(self, reference: Tokenizer) -> None:
        import fastokens

        self._fast = fastokens.Tokenizer.from_json_str(reference.json_text)
        self._reference = reference.engine

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        flat, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        ids = np.frombuffer(flat, np.uint32)  # (tokens of all texts,)
        ends = np.frombuffer(offsets, np.uint64).tolist()  # (texts + 1,)
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._reference.decode(ids)


def with_fastest_engine(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[Tokenizer, str]:
    """The tokenizer with the fastest engine that agrees with its own on `texts`; why none faster."""
    if tokenizer.engine.name != "tiktoken":
        return tokenizer, tokenizer.note
    if importlib.util.find_spec("fastokens") is None:
        return tokenizer, "fastokens, about ten times as fast, is not installed"
    checked = [*HARD, *texts]
    try:
        faster = with_fastokens(tokenizer)
        encoded = faster.encode_batch(checked)
    except Exception as error:  # built for another Python, or another version of it: tiktoken does the work
        return tokenizer, f"fastokens can't be used ({type(error).__name__}: {error})"
    for text, ids in zip(checked, encoded, strict=True):
        if not np.array_equal(ids, tokenizer.encode(text)):
            return tokenizer, f"fastokens differs on {text[:40]!r}"
    return faster, ""


def with_fastokens(tokenizer: Tokenizer) -> Tokenizer:
    return dataclasses.replace(tokenizer, engine=FastokensEngine(tokenizer))
