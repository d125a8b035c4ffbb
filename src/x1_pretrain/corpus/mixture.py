"""The corpora of a run and the order of their blocks, from its config: what can be mixed, and in which order.

corpora = open_corpora(config)
order = make_order(config, corpora)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from x1_pretrain.config import RunConfig
from x1_pretrain.corpus.order import Order, Source, block_count
from x1_pretrain.corpus.shards import Corpus, open_corpus
from x1_pretrain.errors import UserError


def open_corpora(config: RunConfig) -> dict[str, Corpus]:
    """The corpora of the mixture, by name; each checked to be usable by this model."""
    corpora = {name: open_corpus(Path(c.dir), name) for name, c in config.data.mixture().items()}
    refuse_unfit(config, corpora)
    return corpora


def refuse_unfit(config: RunConfig, corpora: Mapping[str, Corpus]) -> None:
    """Corpora that can't be mixed, or that hold not a single block."""
    tokenizers = {c.manifest.tokenizer.sha256 for c in corpora.values()}
    if len(tokenizers) > 1:
        raise UserError(
            f"data: the corpora {', '.join(corpora)} were tokenized differently; one model has one "
            "tokenizer: tokenize them again with the same tokenizer.json"
        )
    _refuse_twins(corpora)
    for name, corpus in corpora.items():
        if block_count(len(corpus.train), config.model.context) < 1:
            raise UserError(
                f"{corpus.path}: corpus '{name}' has {len(corpus.train)} training tokens, less than one "
                f"block of {config.model.context} + 1; add text or set a smaller model.context"
            )


def _refuse_twins(corpora: Mapping[str, Corpus]) -> None:
    """The same data under two names would be read twice, in the same order."""
    seen: dict[str, str] = {}
    for name, corpus in corpora.items():
        if twin := seen.get(corpus.fingerprint):
            raise UserError(
                f"data.corpora: '{twin}' and '{name}' hold the same data; name it once, with both weights"
            )
        seen[corpus.fingerprint] = name


def make_order(
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    jumps: Sequence[tuple[int, int]] = (),
    injected: Sequence[int] = (),
) -> Order:
    """The order of the run's blocks, with what it jumped over and where others were put in."""
    mixture, context = config.data.mixture(), config.model.context
    sources = [
        Source(c.fingerprint, block_count(len(c.train), context), mixture[name].weight)
        for name, c in corpora.items()
    ]
    total_steps = config.training.total_steps
    return Order(config.seed, sources, config.batch_blocks, total_steps, jumps, injected)
