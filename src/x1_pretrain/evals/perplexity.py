"""Validation loss per domain, in nats a token and in bits a byte, over the same tokens every time.

Each domain's validation tokens are cut into windows of the context, the first ones up to a limit; the last
window of a span may be short. Nothing is drawn at random, so two evaluations differ only by the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from x1_pretrain.corpus.reader import TokenFile
from x1_pretrain.corpus.shards import Corpus
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import IGNORED, chunk_tokens, token_losses
from x1_pretrain.runtime.world import World


@dataclass(frozen=True)
class Windows:
    """The validation windows of one domain: token spans, each one target longer than its inputs."""

    domain: str
    spans: tuple[tuple[int, int], ...]
    file: TokenFile
    bytes_of: npt.NDArray[np.int32]  # of text, per token id

    @property
    def tokens(self) -> int:
        return sum(end - start - 1 for start, end in self.spans)


def windows(corpora: Mapping[str, Corpus], context: int, limit_tokens: int) -> list[Windows]:
    """What to evaluate, per domain; a domain that two corpora have is named `<corpus>-<domain>`."""
    names = [domain for corpus in corpora.values() for domain in corpus.val_spans]
    found = []
    for name, corpus in corpora.items():
        for domain, spans in corpus.val_spans.items():
            label = domain if names.count(domain) == 1 else f"{name}-{domain}"
            cut = _cut(spans, context, limit_tokens)
            if cut:
                file = TokenFile(corpus.path / "val.bin", corpus.val.dtype)
                found.append(Windows(label, cut, file, corpus.token_bytes()))
    return found


def _cut(spans: Sequence[Sequence[int]], context: int, limit_tokens: int) -> tuple[tuple[int, int], ...]:
    cut: list[tuple[int, int]] = []
    room = limit_tokens
    for start, end in spans:
        for first in range(start, end - 1, context):
            if room <= 0:
                return tuple(cut)
            last = min(first + context + 1, end)
            cut.append((first, last))
            room -= last - first - 1
    return tuple(cut)


@torch.no_grad()
def evaluate(
    decoder: Decoder, sets: Sequence[Windows], micro_batch: int, world: World, interrupted: Callable[[], bool]
) -> dict[str, float] | None:
    """`val/loss`, `val/<domain>/loss` and `val/<domain>/bpb`; None if it was interrupted."""
    row: dict[str, float] = {}
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for one in sets:
        sums = _domain_sums(decoder, one, micro_batch, world, interrupted)
        if sums is None:
            return None
        total += sums
        nats, tokens, size = sums.tolist()
        row[f"val/{one.domain}/loss"] = nats / tokens
        row[f"val/{one.domain}/bpb"] = nats / math.log(2) / size
    return {"val/loss": float(total[0] / total[1]), **row} if sets else {}


def _domain_sums(
    decoder: Decoder, one: Windows, micro_batch: int, world: World, interrupted: Callable[[], bool]
) -> torch.Tensor | None:
    """Nats, tokens and bytes over all windows of a domain, summed over ranks."""
    mine = one.spans[world.rank :: world.size]
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(mine), micro_batch):
        if interrupted() and world.size == 1:  # asked in any case: it says that there is progress
            return None
        tokens = _padded(one.file, mine[first : first + micro_batch], micro_batch, decoder.config.context)
        inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:].reshape(-1)
        hidden = decoder.hidden(inputs.to(world.device)).flatten(0, 1)  # (B T, d)
        losses = token_losses(
            hidden,
            decoder.output_weight,
            targets.to(world.device),
            decoder.config.vocab,
            chunk_tokens(world.device),
        )
        counted = targets[targets != IGNORED]
        sums += torch.tensor(
            [losses.double().sum().item(), len(counted), int(one.bytes_of[counted.numpy()].sum())],
            dtype=torch.float64,
        )
    return world.sum_(sums.to(world.device)).cpu()


def _padded(file: TokenFile, spans: Sequence[tuple[int, int]], rows: int, context: int) -> torch.Tensor:
    """The spans as rows of one fixed shape, (rows, context + 1); what is missing is `IGNORED`."""
    tokens = np.full((rows, context + 1), IGNORED, dtype=np.int64)
    for row, (start, end) in enumerate(spans):
        tokens[row, : end - start] = file.span(start, end)
    return torch.from_numpy(tokens)
