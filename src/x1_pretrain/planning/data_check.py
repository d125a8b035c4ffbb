"""What there is to train on, and what a number of tokens drawn from it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import F64
from x1_pretrain.money.storage import bytes_per_token

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """One corpus of the mixture."""

    name: str
    tokens: float  # to train on
    share: float  # of what is drawn
    disk_bytes: float


@dataclass(frozen=True)
class Data:
    parts: tuple[Part, ...]
    origin: str
    vocab_size: int | None = None  # none: only stated
    tokenizer: str | None = None

    @property
    def tokens(self) -> float:
        return sum(part.tokens for part in self.parts)

    @property
    def disk_bytes(self) -> float:
        return sum(part.disk_bytes for part in self.parts)

    def epochs(self, tokens: float) -> tuple[float, ...]:
        """How often each corpus is seen."""
        return tuple(part.share * tokens / part.tokens for part in self.parts)

    def effective(self, tokens: float) -> float:
        """What so many drawn tokens are worth in fresh ones: each corpus repeats by itself."""
        return sum(forms.effective_tokens(part.tokens, part.share * tokens) for part in self.parts)

    def drawn_for(self, effective: F64) -> F64:
        """The inverse; infinite where no number of repeats is enough."""
        drawn, worth = self._table
        return np.asarray(np.interp(effective, worth, drawn, right=np.inf))

    @cached_property
    def _table(self) -> tuple[F64, F64]:
        most = max(part.tokens / part.share for part in self.parts)
        drawn = np.concatenate([[0.0], np.geomspace(1e-6 * most, 100.0 * most, 4000)])
        worth = np.array([self.effective(float(d)) for d in drawn])
        rising = np.concatenate([[True], np.diff(worth) > 1e-12 * worth[1:]])
        return drawn[rising], worth[rising]


def stated(tokens: float, vocab_size: int) -> Data:
    """So many tokens of which nothing else is known."""
    return Data((Part("data", tokens, 1.0, tokens * bytes_per_token(vocab_size)),), "--data-tokens")


def read_data(folder: Path) -> Data:
    """A corpus folder, or a folder of them, each then drawn by its size."""
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return _data({folder.resolve().name: (folder, 1.0)}, f"--data {folder}")
    inner = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    if not inner:
        raise UserError(
            f"--data {folder}: no {MANIFEST} in it nor in a folder under it; expected a corpus folder, made "
            "by `python -m x1_pretrain.tokenize_data --input-dir TEXT --output-dir DIR`, or --data-tokens "
            "10B"
        )
    return _data({path.name: (path, None) for path in inner}, f"--data {folder}")


def of_config(config: RunConfig) -> Data | None:
    """The mixture a config names, where all of it is on this machine."""
    mixture = config.data.mixture() if config.data.corpora or config.data.dir else {}
    folders = {name: (Path(corpus.dir), corpus.weight) for name, corpus in mixture.items()}
    if not folders or not all((folder / MANIFEST).is_file() for folder, _ in folders.values()):
        return None
    return _data(folders, "the config's data")


def _data(folders: Mapping[str, tuple[Path, float | None]], origin: str) -> Data:
    from x1_pretrain.corpus.shards import read_manifest  # brings the tokenizers with it

    manifests = {name: (read_manifest(path), weight) for name, (path, weight) in folders.items()}
    if empty := [name for name, (manifest, _) in manifests.items() if not manifest.train.tokens]:
        raise UserError(
            f"{origin}: {empty[0]} has no tokens to train on; make the corpus again from more text"
        )
    known = {m.tokenizer.sha256: m.tokenizer for m, _ in manifests.values()}
    if len(known) > 1:
        names = ", ".join(f"{name}: {m.tokenizer.name}" for name, (m, _) in manifests.items())
        raise UserError(f"{origin}: the corpora have different tokenizers ({names}); a model has only one")
    weights = {
        name: float(m.train.tokens) if weight is None else weight for name, (m, weight) in manifests.items()
    }
    parts = tuple(
        Part(
            name,
            float(m.train.tokens),
            weights[name] / sum(weights.values()),
            float(m.train.tokens + m.val.tokens) * bytes_per_token(m.tokenizer.vocab_size),
        )
        for name, (m, _) in manifests.items()
    )
    tokenizer = next(iter(known.values()))
    return Data(parts, origin, tokenizer.vocab_size, tokenizer.name)
