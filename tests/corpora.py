"""Small corpora and configs for tests: written in the corpus format by hand, without the tokenize command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "it",
    "was",
    "good",
    "while",
    "rain",
    "fell",
    "over",
    "hills",
    "far",
    "away",
    "from",
    "any",
    "town",
]


def text(documents: int, seed: int) -> list[str]:
    """Sentences with a grammar small enough to learn in a few steps."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(rng.integers(5, 60)))) + "." for _ in range(documents)]


def tokenizer(vocab_size: int = 300) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found.train_from_iterator(text(400, 1), trainer)
    return found


def _split(domains: dict[str, list[str]], tok: Tokenizer) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    eot, tokens, rows, spans, sizes = tok.token_to_id(END), [], [], {}, dict.fromkeys(domains, 0)
    for number, (domain, documents) in enumerate(domains.items()):
        first = len(tokens)
        for row, document in enumerate(documents):
            rows.append((len(tokens), number, row, number))
            tokens += [*tok.encode(document).ids, eot]
            sizes[domain] += len(document.encode())
        spans[domain] = [[first, len(tokens)]]
    index = np.array(rows, dtype=[("start", "<u8"), ("file", "<u4"), ("row", "<u4"), ("domain", "<u2")])
    return np.array(tokens, dtype="<u2"), index, {"spans": spans, "bytes": sizes}


def _tokens(spans: list[list[int]]) -> int:
    return sum(end - begin for begin, end in spans)


def write_corpus(
    folder: Path, documents: int = 400, domains: tuple[str, ...] = ("code", "prose"), seed: int = 0
) -> Path:
    """A corpus of sentences in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizer()
    (folder / "tokenizer.json").write_text(tok.to_str(), encoding="utf-8")
    facts: dict[str, Any] = {}
    for split, count, offset in (("train", documents, 10), ("val", max(2, documents // 20), 20)):
        texts = {d: text(count, seed * 1000 + offset + i) for i, d in enumerate(domains)}
        tokens, index, more = _split(texts, tok)
        tokens.tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.idx.npy", index)
        sha = hashlib.sha256(tokens.tobytes()).hexdigest()
        size = sum(more["bytes"].values())
        facts[split] = {"tokens": len(tokens), "documents": len(index), "bytes": size, "sha256": sha}
        facts[f"{split}_spans"], facts[f"{split}_bytes"] = more["spans"], more["bytes"]
        facts[f"{split}_documents"] = {d: len(t) for d, t in texts.items()}
    tok_sha = hashlib.sha256(tok.to_str().encode()).hexdigest()
    fingerprint = hashlib.sha256(
        (facts["train"]["sha256"] + facts["val"]["sha256"] + tok_sha).encode()
    ).hexdigest()
    manifest = {
        "schema_version": 1,
        "kind": "corpus",
        "created_utc": "2026-01-01T00:00:00Z",
        "x1_version": "0",
        "tokenizer": {
            "name": "test",
            "vocab_size": tok.get_vocab_size(),
            "eot_id": tok.token_to_id(END),
            "sha256": tok_sha,
        },
        "dtype": "uint16",
        "val_fraction": 0.05,
        "domains": list(domains),
        "train": facts["train"],
        "val": facts["val"],
        "domain_counts": {
            d: {
                "train_tokens": _tokens(facts["train_spans"][d]),
                "val_tokens": _tokens(facts["val_spans"][d]),
                "documents": facts["train_documents"][d] + facts["val_documents"][d],
                "bytes": facts["train_bytes"][d] + facts["val_bytes"][d],
            }
            for d in domains
        },
        "val_spans": facts["val_spans"],
        "sources": [
            {"path": d, "domain": d, "bytes": 0, "sha256": "0", "documents": documents, "skipped": None}
            for d in domains
        ],
        "dropped": {"empty_documents": 0, "ignored_files": []},
        "versions": {},
        "options": {"tokenizer": "test", "text_field": "text", "skip_bad": False},
        "fingerprint": fingerprint,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def tiny_config(**sections: dict[str, Any]) -> dict[str, Any]:
    """A run of a model that trains in seconds; `sections` update the defaults."""
    config: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "model": {"layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 64, "context": 32},
        "training": {"total_steps": 30, "batch_tokens": 256, "precision": "fp32", "deterministic": True},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 5},
        "checkpoint": {"every": 10},
        "evaluation": {"every": 10, "tokens": 512, "prompts": ["the cat"], "sample_tokens": 8},
        "log": {"every": 1, "blocks": True},
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(values, dict) and name in config else values
    return config


def write_config(file: Path, **sections: Any) -> Path:
    file.write_text(yaml.safe_dump(tiny_config(**sections)), encoding="utf-8")
    return file
