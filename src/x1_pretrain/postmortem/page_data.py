"""The paragraphs of a post-mortem that say what the data were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from x1_pretrain.numbers import human
from x1_pretrain.postmortem.data import Seen, SourceCount, by_source
from x1_pretrain.postmortem.tracing import Piece
from x1_pretrain.postmortem.words import code, count, joined, sentence, spans, table

if TYPE_CHECKING:
    from x1_pretrain.postmortem.findings import Findings

SOURCES_SHOWN, DOCUMENTS_SHOWN, BLOCKS_SHOWN = 8, 10, 12


def data(found: Findings, csv: str) -> list[str]:
    """A paragraph or a table an entry."""
    if found.seen is None:
        return [f"They can't be told: {found.no_data}."]
    return documents_and_sources(found.seen, found.patterns, csv)


def documents_and_sources(seen: Seen, patterns: Sequence[str], csv: str) -> list[str]:
    """What some steps read, or what was put in its place."""
    return [*injected(seen), *ordinary(seen, patterns), everything(seen, csv)]


def injected(seen: Seen) -> list[str]:
    """What was put in the place of the corpus."""
    if not seen.injected:
        return []
    tokens = len(seen.injected) * seen.step_tokens
    blocks = sum(map(len, seen.replaced.values()))
    many = len(seen.injected) > 1
    unread = "that the order had there is" if blocks == 1 else "that the order had there are"
    told = (
        f"The {'batches' if many else 'batch'} of {'steps' if many else 'step'} {spans(seen.injected)} "
        f"{'were' if many else 'was'} injected: sequences of the corpus's rarest tokens, no source document "
        f"among them. Their {human(tokens)} tokens are not counted as trained. The {count(blocks, 'block')} "
        f"{unread} not read in this epoch"
    )
    parts = [sentence(told)]
    if seen.injected_excerpt:
        parts.append(f"One of the injected sequences begins: {code(seen.injected_excerpt)}")
    return parts


def ordinary(seen: Seen, patterns: Sequence[str]) -> list[str]:
    """What was read from the corpora by the steps that stood out."""
    steps = [step for step in seen.steps if step not in seen.injected]
    if not steps:
        return []
    if not seen.corpora.complete:
        return [_elsewhere(seen)]
    documents = len({(piece.corpus, piece.file, piece.row) for piece in seen.pieces})
    sources = by_source(seen)
    blocks = sum(len(draws) for draws in seen.draws.values())
    files = count(len({source.file for source in sources}), "source file")
    what = f"read {count(blocks, 'block')}, with parts of {count(documents, 'document')} from {files}"
    if seen.injected:
        them = f"step {spans(steps)}" if len(steps) == 1 else f"steps {spans(steps)}"
        told = f"The ordinary {'batch' if len(steps) == 1 else 'batches'} of {them}, read by weights that the"
        return [
            f"{told} injected ones had moved, stood out too; {'it' if len(steps) == 1 else 'they'} {what}."
        ]
    who = f"Step {steps[0]:,}" if len(steps) == 1 else f"Steps {spans(steps)}"
    apart = [f"What sets them apart: {joined(patterns)}."] if patterns else [_alike(seen)]
    return [
        f"{who} {what}.",
        _sources(sources),
        *(part for part in apart if part),
        _documents(seen),
        *_excerpts(seen),
    ]


def _alike(seen: Seen) -> str:
    if not seen.looks:
        return ""
    return (
        f"Nothing sets them apart from the steps before. Blocks that repeat themselves or hold rare tokens "
        f"beyond the usual: {seen.odd_share:.1%} of {len(seen.looks):,}, {seen.odd_before:.1%} before."
    )


def _sources(sources: Sequence[SourceCount]) -> str:
    rows = [
        [
            one.corpus,
            code(one.file),
            one.domain,
            f"{one.documents:,}",
            f"{one.tokens:,}",
            f"{one.share:.1%}",
            "" if one.share_before is None else f"{one.share_before:.1%}",
        ]
        for one in sources[:SOURCES_SHOWN]
    ]
    if more := sources[SOURCES_SHOWN:]:
        documents, tokens = sum(one.documents for one in more), sum(one.tokens for one in more)
        share = f"{sum(one.share for one in more):.1%}"
        rows.append(["", f"{len(more):,} more", "", f"{documents:,}", f"{tokens:,}", share, ""])
    header = ["corpus", "source file", "domain", "documents", "tokens", "share", "share before"]
    return table(header, rows, left=3)


def _documents(seen: Seen) -> str:
    """The oddest first; where none is odd, those with the most tokens."""

    def row(piece: Piece) -> list[str]:
        look = seen.looks.get((piece.step, piece.slot))
        kind = (
            "repeats itself" if look and look.repetitive else "rare tokens" if look and look.rare else "usual"
        )
        size = [f"{look.size:.2f}", f"{look.surprise:.2f}", kind] if look else ["", "", ""]
        return [f"{piece.step:,}", code(piece.file), f"{piece.row:,}", f"{piece.tokens:,}", *size]

    rows = [row(piece) for piece in seen.worst_first[:DOCUMENTS_SHOWN]]
    header = ["step", "source file", "row", "tokens", "compressed to", "surprise (nats)", "its block"]
    return table(header, rows, left=2)


def _excerpts(seen: Seen) -> list[str]:
    lines = [
        f"- row {piece.row:,} of {code(piece.file)}: {code(text)}" for piece, text in seen.excerpts if text
    ]
    return ["In the words of the first of them:", "\n".join(lines)] if lines else []


def _elsewhere(seen: Seen) -> str:
    """Blocks only."""
    said = []
    for step, draws in list(seen.draws.items())[:3]:
        shown = [f"{seen.corpora.names[draw.corpus]} {draw.block:,}" for draw in draws[:BLOCKS_SHOWN]]
        more = f" and {len(draws) - BLOCKS_SHOWN:,} more" if len(draws) > BLOCKS_SHOWN else ""
        said.append(f"step {step:,} read the blocks {', '.join(shown)}{more}")
    why = joined([problem.rstrip(".") for problem in seen.corpora.problems])
    return f"Their documents can't be named here ({why}). {sentence('; '.join(said))}"


def everything(seen: Seen, csv: str) -> str:
    left_out = f" of the first {len(seen.steps)} of these steps" if seen.left_out else ""
    what = "document" if seen.corpora.complete else "block"
    only = " that was replaced" if seen.injected and not seen.draws else ""
    return f"Every {what}{only}{left_out} is in `{csv}`."
