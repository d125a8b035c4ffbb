"""Where a tokenizer comes from: `gpt2`, a `tokenizer.json`, or `train:4096` from the corpus itself.

Each way ends in the text of a Hugging Face `tokenizer.json`, which is what the corpus keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from x1_pretrain.corpus.sources import (
    BadSource,
    Source,
    bad_source_line,
    is_validation,
    read_documents,
    to_utf8,
)
from x1_pretrain.corpus.tokenizer import Tokenizer, byte_letters, load_tokenizer, parse_tokenizer
from x1_pretrain.errors import UserError

END = "<|endoftext|>"
DOWNLOAD_LIMIT_S = 60.0
SAMPLE_BYTES = 32 << 20  # of text to learn a vocabulary from
SAMPLE_FILES = 512


class Published(NamedTuple):
    """A published file: where it is, and the hash of what it must hold."""

    url: str
    sha256: str

    @property
    def cache_name(self) -> str:
        return hashlib.sha1(self.url.encode()).hexdigest()  # tiktoken's own naming, so that its cache serves


_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_MERGES = Published(
    f"{_GPT2_URL}/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
)
GPT2_VOCAB = Published(
    f"{_GPT2_URL}/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
)


def training_size(spec: str) -> int | None:
    """The vocabulary size of `train:N`; none when `spec` is another kind of tokenizer."""
    if not spec.startswith("train:"):
        return None
    digits = spec.removeprefix("train:")
    smallest = 256 + 1  # the bytes and the end of document
    if not re.fullmatch(r"[0-9]{1,7}", digits) or int(digits) < smallest:
        raise UserError(
            f"--tokenizer {spec}: expected train:N with N of at least {smallest}, e.g. train:4096"
        )
    return int(digits)


def find_tokenizer(spec: str, cache: Path | None) -> Tokenizer:
    """The tokenizer of `gpt2` or of a path; `train:N` needs text, see `train_tokenizer`."""
    if spec == "gpt2":
        return gpt2_tokenizer(cache)
    path = Path(spec)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {spec}: the folder holds no tokenizer.json")
    if not path.exists():
        raise UserError(
            f"--tokenizer {spec}: no such tokenizer; expected gpt2, a path to a tokenizer.json, or train:4096"
        )
    return load_tokenizer(path, name=(path / "tokenizer.json" if path.is_dir() else path).name)


def gpt2_tokenizer(cache: Path | None = None) -> Tokenizer:
    """GPT-2's vocabulary of 50,257, from tiktoken's cache folder or its published place."""
    folder = cache or default_cache()
    merges = _cached(GPT2_MERGES, folder).decode().split("\n")[1:]
    vocab = json.loads(_cached(GPT2_VOCAB, folder))
    text = byte_level_json(vocab, [m for m in merges if m], vocab[END])
    return parse_tokenizer(text, "gpt2", "gpt2", engine="tiktoken")  # published files, their hash checked


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` ids from `texts`; the same texts give the same tokenizer."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=sorted(byte_letters()), special_tokens=[], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    vocab = model["vocab"] | {END: len(model["vocab"])}
    text = byte_level_json(vocab, merges, vocab[END])
    return parse_tokenizer(text, f"train:{size}", f"train:{size}")


def sample_texts(
    sources: Sequence[Source], text_field: str, val_fraction: float, skip_bad: bool, size: int
) -> Iterator[str]:
    """Documents from all over: the first of each file, or of evenly spaced files if they are many.

    About `size` bytes, and a function of the files alone. Validation documents are left out.
    """
    chosen = sources[:: -(-len(sources) // SAMPLE_FILES)] if sources else []
    total = sum(s.size_bytes for s in chosen) or 1
    for source in chosen:
        wanted = max(size // SAMPLE_FILES, size * source.size_bytes // total)
        try:
            yield from _first_texts(source, text_field, val_fraction, wanted)
        except BadSource as error:
            if not skip_bad:
                raise UserError(bad_source_line(f"{source.relative}: {error}")) from error


def _first_texts(source: Source, text_field: str, val_fraction: float, wanted: int) -> Iterator[str]:
    for _, raw in read_documents(source, text_field):
        text, utf8, _ = to_utf8(raw)
        if not is_validation(utf8, val_fraction):
            yield text[:wanted]
            wanted -= len(utf8)
        if wanted <= 0:
            return


def byte_level_json(vocab: dict[str, int], merges: Sequence[str], end_id: int) -> str:
    """The `tokenizer.json` of a GPT-2-style byte-level BPE."""
    end = {"id": end_id, "content": END, "special": True, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": list(merges),
    }
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level | {"trim_offsets": False},
        "decoder": level,
        "model": model,
    }
    return json.dumps(tree, ensure_ascii=False)


# GPT-2's published files


def default_cache() -> Path:
    """The folder tiktoken itself would use."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _cached(file: Published, folder: Path) -> bytes:
    path = folder / file.cache_name
    if path.is_file() and _is(path.read_bytes(), file):
        return path.read_bytes()
    state = "is damaged" if path.is_file() else "is missing"
    data, reason = _download(file.url)
    if data is not None and not _is(data, file):
        data, reason = None, "what came is not the published file"
    if data is None:
        raise UserError(_how_to_fill(file, path, state, reason))
    _keep(data, path)
    return data


def _is(data: bytes, file: Published) -> bool:
    return hashlib.sha256(data).hexdigest() == file.sha256


def _how_to_fill(file: Published, path: Path, state: str, reason: str) -> str:
    name = file.url.rsplit("/", 1)[1]
    return (
        f"--tokenizer gpt2: {name} {state} in the cache ({path}) and its download failed ({reason}); get "
        f"{GPT2_MERGES.url} and {GPT2_VOCAB.url} on a machine with network, save them in one folder as "
        f"{GPT2_MERGES.cache_name} and {GPT2_VOCAB.cache_name}, and pass it as --tokenizer-cache DIR "
        "(or TIKTOKEN_CACHE_DIR)"
    )


def _download(url: str) -> tuple[bytes | None, str]:
    """The bytes at `url`, or nothing and the reason; never longer than DOWNLOAD_LIMIT_S."""
    outcome: list[tuple[bytes | None, str]] = []

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=15) as answer:
                outcome.append((answer.read(), ""))
        except OSError as error:
            outcome.append((None, str(getattr(error, "reason", error))))

    # A thread, since a name look-up or a trickle of bytes is not bounded by the socket's own timeout.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_LIMIT_S)
    return outcome[0] if outcome else (None, f"no answer within {DOWNLOAD_LIMIT_S:.0f} s")


def _keep(data: bytes, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        print(f"the tokenizer cache {path.parent} can't be written ({error.strerror}); going on without it")
