"""One tokenizer, whatever it came from: text -> ids -> text, loaded from a Hugging Face `tokenizer.json`.

A byte-level BPE of GPT-2's kind runs through tiktoken, about five times faster than `tokenizers`, after an
exact check that the two must agree; every other tokenizer runs through `tokenizers` itself. Text that looks
like a special token is always plain text here: only the end-of-document id, which the corpus writer appends,
is special.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers

from x1_pretrain.errors import UserError

EngineName = Literal["tiktoken", "tokenizers"]
Ids = npt.NDArray[np.uint32]

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
# How GPT-2 cuts text into pieces before merging: what `ByteLevel` with use_regex does, in tiktoken's dialect.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Engine(Protocol):
    """What turns text into ids."""

    name: str

    def encode(self, text: str) -> Ids: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TiktokenEngine:
    """Byte-level BPE by tiktoken."""

    name = "tiktoken"

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        self._encoding = tiktoken.Encoding(
            "x1", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )

    def encode(self, text: str) -> Ids:
        ids: Ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        # A plain loop: tiktoken's own thread batch is slower per core, and each worker process has one core.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])


class HuggingFaceEngine:
    """Any `tokenizer.json`, by the `tokenizers` library."""

    name = "tokenizers"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # a stored limit would cut documents short without a word
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that looks like a special token is text

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and the engine that runs it. `sha256` over the json is its identity."""

    name: str
    json_text: str = field(repr=False)
    vocab_size: int  # the highest id + 1
    eot_id: int
    eot_text: str
    special_ids: tuple[int, ...]
    engine: Engine = field(repr=False)
    note: str = ""  # why the fast engine is not used; empty when it is

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        """The ids of `text`, without the end of document."""
        return self.engine.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return self.engine.encode_batch(texts)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.engine.decode(list(ids))

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """How many bytes of text each id stands for; 0 for special tokens and for ids without a token."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)  # (V,)
        tree = json.loads(self.json_text)
        byte_level = _uses_byte_letters(tree)
        for token, index in _vocabulary(tree).items():
            if index not in self.special_ids:
                lengths[index] = len(token) if byte_level else _plain_length(token)
        for added in tree.get("added_tokens", []):
            if not added["special"]:
                lengths[added["id"]] = len(added["content"].encode())
        return lengths


def load_tokenizer(path: Path, name: str | None = None, engine: EngineName | None = None) -> Tokenizer:
    """The tokenizer of a corpus folder, or of a `tokenizer.json`; `engine` as in `parse_tokenizer`."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{file}: can't be read as a tokenizer.json ({reason})") from None
    return parse_tokenizer(text, name or str(file), str(file), engine)


def parse_tokenizer(text: str, name: str, origin: str, engine: EngineName | None = None) -> Tokenizer:
    """A tokenizer from the text of a `tokenizer.json`; `origin` is named in errors.

    `engine` is for text that was checked before, and skips the checks; none finds the fitting one.
    """
    try:
        tree = json.loads(text)
        slow = None if engine == "tiktoken" else tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises a bare Exception for a file it can't read
        raise UserError(f"{origin}: not a tokenizer.json that `tokenizers` can read ({error})") from None
    specials = {t["content"]: t["id"] for t in tree.get("added_tokens", []) if t["special"]}
    ends = [end for end in END_NAMES if end in specials]
    if not ends:
        raise UserError(
            f"{origin}: no end-of-document token among its special tokens {sorted(specials)}; "
            f"expected one of {', '.join(END_NAMES)}"
        )
    note = _why_not_tiktoken(tree, slow) if slow and engine is None else ""
    return Tokenizer(
        name=name,
        json_text=text,
        vocab_size=max(*_vocabulary(tree).values(), *(t["id"] for t in tree["added_tokens"])) + 1,
        eot_id=specials[ends[0]],
        eot_text=ends[0],
        special_ids=tuple(sorted(specials.values())),
        engine=HuggingFaceEngine(slow)
        if slow and (note or engine)
        else TiktokenEngine(_ranks(tree), specials),
        note=note,
    )


def byte_letters() -> dict[str, int]:
    """The byte-level alphabet: each of the 256 bytes written as one printable character."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(shown))
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _vocabulary(tree: Mapping[str, Any]) -> dict[str, int]:
    vocab = tree["model"].get("vocab", {})
    if isinstance(vocab, list):  # unigram: [[token, score], ...]
        return {token: index for index, (token, _) in enumerate(vocab)}
    return dict(vocab)


def _uses_byte_letters(tree: Mapping[str, Any]) -> bool:
    decoder = tree.get("decoder") or {}
    return "ByteLevel" in (decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", [])))


def _plain_length(token: str) -> int:
    """Bytes of a token of a SentencePiece-like vocabulary: `<0x0A>` is one byte, U+2581 is a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())


# When may tiktoken stand in for `tokenizers`?
#
# Both merge the adjacent pair of lowest rank, leftmost first. tiktoken merges every pair whose bytes are a
# token and ranks it by id; `tokenizers` merges only listed pairs and ranks them by their place in the list.
# Given the same pieces they agree on every text if (1) ids rise with the place of the merge, and (2) each
# token's own letters merge into that token. For suppose tiktoken were about to merge an unlisted pair into
# token t while both agreed so far: the letters of t have merged as they do alone, and alone they would now be
# stuck at two tokens; by (2) they are not.


def _why_not_tiktoken(tree: Mapping[str, Any], slow: tokenizers.Tokenizer) -> str:
    """Why tiktoken can't stand in; empty when it can."""
    reason = _unlike_gpt2(tree)
    if reason:
        return reason
    tokens, letters = _plain_tokens(tree), byte_letters()
    if not letters.keys() <= tokens.keys() or any(not letters.keys() >= set(t) for t in tokens):
        return "its vocabulary is not made of the 256 bytes"
    products = [tokens.get(left + right, -1) for left, right in _merges(tree)]
    if any(later <= earlier for earlier, later in itertools.pairwise(products)):
        return "its ids do not rise with the order of its merges"
    for token, index in tokens.items():
        if [piece.id for piece in slow.model.tokenize(token)] != [index]:
            return f"its token {index} is not what its own letters merge into"
    return ""


def _ranks(tree: Mapping[str, Any]) -> dict[bytes, int]:
    letters = byte_letters()
    return {bytes(map(letters.__getitem__, token)): index for token, index in _plain_tokens(tree).items()}


def _plain_tokens(tree: Mapping[str, Any]) -> dict[str, int]:
    special_ids = {t["id"] for t in tree["added_tokens"]}
    return {token: index for token, index in _vocabulary(tree).items() if index not in special_ids}


def _merges(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ") if isinstance(m, str) else m for m in tree["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _unlike_gpt2(tree: Mapping[str, Any]) -> str:
    model, cut = tree["model"], tree.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return f"its model is {model.get('type')}, not BPE"
    if cut.get("type") != "ByteLevel" or not cut.get("use_regex", True) or cut.get("add_prefix_space", True):
        return "its pre-tokenizer is not GPT-2's"
    if tree.get("normalizer"):
        return "it normalizes text"
    if any(not token["special"] for token in tree.get("added_tokens", [])):
        return "it has added tokens that match plain text"
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    found = [key for key in (*unusual, "ignore_merges") if model.get(key)]
    return f"its model sets {', '.join(found)}" if found else ""
