"""The data of a run, opened and read as the run will. In a process of its own: a network disk can hang.

In this order, so that reading is measured before hashing has filled the page cache: open, order, reading,
hashes, ids.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.corpus.mixture import make_order, refuse_unfit
from x1_pretrain.corpus.order import Order
from x1_pretrain.corpus.reader import Reader, TokenFile
from x1_pretrain.corpus.shards import SPLITS, Corpus, open_corpus
from x1_pretrain.doctor.trial import Facts, Voice, answered
from x1_pretrain.errors import UserError

FULL_HASH_BYTES = 1 << 30  # larger files are hashed only when asked for
CHUNK = 8 << 20
READING_SHARE = 0.3  # of the time
MOST_BATCHES = 50
AHEAD = 4  # batches that the reading thread may have read before it was stopped


def answer(task: Facts, voice: Voice) -> None:
    """`task`: a config, or folders; how long reading may take; whether to hash everything."""
    config = parse_config(task["config"], "doctor") if task.get("config") else None
    folders = {name: c.dir for name, c in config.data.mixture().items()} if config else task["folders"]
    try:
        corpora = {name: open_corpus(Path(folder), name) for name, folder in folders.items()}
        voice.say("open", corpora=[facts_of(corpus) for corpus in corpora.values()])
        if config:
            refuse_unfit(config, corpora)
            order = make_order(config, corpora)
            voice.say("order", **order_facts(config, order, corpora))
            voice.say("reading", **reading(config, order, corpora, task["gpus"], task["limit_s"]))
        for name, corpus in corpora.items():
            voice.say(f"hash {name}", files=hashes(corpus, task["full_hash"]))
        for name, corpus in corpora.items():
            corpus.check_ids((config and config.model.vocab_size) or corpus.vocab_size)
            voice.say(f"ids {name}", vocab_size=corpus.vocab_size)
    except UserError as error:
        voice.say("refused", message=str(error))


def facts_of(corpus: Corpus) -> Facts:
    return {
        "name": corpus.name,
        "folder": str(corpus.path),
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
        "domains": {d: sum(b - a for a, b in spans) for d, spans in corpus.val_spans.items()},
        "vocab_size": corpus.vocab_size,
        "tokenizer": corpus.manifest.tokenizer.name,
        "tokenizer_sha256": corpus.manifest.tokenizer.sha256,
        "tokenizer_bytes": (corpus.path / "tokenizer.json").stat().st_size,
        "fingerprint": corpus.fingerprint,
    }


def order_facts(config: RunConfig, order: Order, corpora: dict[str, Corpus]) -> Facts:
    return {
        "epochs": dict(zip(corpora, map(float, order.epochs()), strict=True)),
        "asked_tokens": config.training.total_steps * config.training.batch_tokens,
        "there_tokens": sum(len(corpus.train) for corpus in corpora.values()),
    }


def reading(
    config: RunConfig, order: Order, corpora: dict[str, Corpus], gpus: int, limit_s: float
) -> dict[str, Any]:
    """Tokens a second that one rank's reader delivers, from the disk, without the thread's head start."""
    files = [TokenFile(corpus.path / "train.bin", corpus.train.dtype) for corpus in corpora.values()]
    for file in files:
        forget(file.path)
    stage: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]] = lambda rows: rows  # noqa: E731
    reader = Reader(order, files, config.model.context, stage, world=gpus)
    reader.close()  # the thread: from here on it reads when asked
    begun, tokens, batches = time.perf_counter(), 0, 0
    for step in range(AHEAD, min(AHEAD + MOST_BATCHES, order.total_steps)):
        tokens += reader.read(step).tokens[:, 1:].size
        batches += 1
        if time.perf_counter() - begun > READING_SHARE * limit_s:
            break
    took = time.perf_counter() - begun
    return {"tokens_per_sec": tokens / took if batches else None, "batches": batches, "seconds": took}


def forget(file: Path) -> None:
    """Ask the page cache to drop a file, so that the disk is measured and not the memory."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def hashes(corpus: Corpus, everything: bool) -> list[Facts]:
    """Each file: whether its hash is the manifest's; None: too large to be hashed unasked."""
    wanted = {f"{split}.bin": getattr(corpus.manifest, split).sha256 for split in SPLITS}
    wanted["tokenizer.json"] = corpus.manifest.tokenizer.sha256
    return [
        {"file": name, "bytes": size, "same": None if too_large else sha256(file) == sha}
        for name, sha in wanted.items()
        for file in [corpus.path / name]
        for size in [file.stat().st_size]
        for too_large in [size > FULL_HASH_BYTES and not everything]
    ]


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def chunks(file: Path) -> Iterable[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


if __name__ == "__main__":
    answered(answer)
