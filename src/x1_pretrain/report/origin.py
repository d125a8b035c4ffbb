"""Sections of where it came from: the data, the checks, the manifest, the config."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from x1_pretrain.config_reading import to_yaml
from x1_pretrain.report import state, words
from x1_pretrain.report.blocks import Block, Folded, Line, Section, Table, Verbatim
from x1_pretrain.report.learning import steps_up
from x1_pretrain.report.material import Corpus, Material, clean
from x1_pretrain.review.check import FAILED, PASSED

REASONS_SHOWN = 8


def data(m: Material) -> Section:
    if not m.corpora:
        return Section("data", "Data", [Line("The manifest names no corpus.", "note")])
    rows = [_corpus(m, one, share) for one, share in zip(m.corpora, _shares(m), strict=True)]
    head = ["corpus", "share", "tokens", "drawn by now", "epochs", "documents", "tokenizer"]
    blocks: list[Block] = [Table("Corpora", head, rows, frozenset({0, 6}))]
    if injected := state.injected_tokens(m):
        blocks.append(
            Line(
                f"{words.tokens(injected)} injected tokens were trained on beside them; they are in no count."
            )
        )
    for one in m.corpora:
        blocks += _details(one)
    return Section("data", "Data", blocks)


def _shares(m: Material) -> list[float]:
    """Of the tokens so far: by the weights; where the mixture changed on the way, by the rows."""
    weights = [_weight(one) for one in m.corpora]
    columns = [m.column(f"mixture/{one.facts.get('name')}") for one in m.corpora]
    limit = 0.05 + 1 / m.run.config.batch_blocks
    if any(len(x) and steps_up(y, limit) for x, y in columns):
        sizes = [float((np.diff(x, prepend=0.0) * y).sum()) for x, y in columns]
        weights = sizes if min(sizes) >= 0 and sum(sizes) > 0 else weights
    whole = sum(weights) or 1.0
    return [weight / whole for weight in weights]


def _weight(one: Corpus) -> float:
    weight = one.facts.get("weight", 1.0)
    return float(weight) if isinstance(weight, int | float) else 1.0


def _corpus(m: Material, one: Corpus, share: float) -> list[str]:
    tokens = one.facts.get("train_tokens")
    known = float(tokens) if isinstance(tokens, int | float) and tokens > 0 else None
    drawn = m.tokens * share
    manifest = one.manifest
    return [
        str(one.facts.get("name", "?")),
        words.share(share),
        words.tokens(known),
        words.tokens(drawn),
        "not known" if known is None else f"{drawn / known:.3g}",
        f"{manifest.train.documents:,}" if manifest else "not at hand",
        f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids" if manifest else "not at hand",
    ]


def _details(one: Corpus) -> list[Block]:
    name, manifest = one.facts.get("name", "?"), one.manifest
    if manifest is None:
        return [Line(f"More of {name} is not shown: {one.problem}.", "note")]
    head = ["domain", "train tokens", "validation tokens", "documents", "MB of text"]
    rows = [
        [d, f"{c.train_tokens:,}", f"{c.val_tokens:,}", f"{c.documents:,}", f"{c.bytes / 1e6:,.1f}"]
        for d, c in manifest.domain_counts.items()
    ]
    return [Table(f"Domains of {name}", head, rows), Line(_dropped(one)), *_skipped(one)]


def _dropped(one: Corpus) -> str:
    assert one.manifest is not None
    dropped, files = one.manifest.dropped, one.manifest.sources
    return (
        f"{one.facts.get('name', '?')}: {words.count(len(files), 'source file')}, of which "
        f"{sum(bool(file.skipped) for file in files):,} were left out; {len(dropped.ignored_files):,} other "
        f"files ignored, {words.count(dropped.empty_documents, 'empty document')} dropped, "
        f"{dropped.repaired_documents:,} repaired. Content {one.manifest.fingerprint[:12]}."
    )


def _skipped(one: Corpus) -> list[Block]:
    assert one.manifest is not None
    reasons = Counter(file.skipped for file in one.manifest.sources if file.skipped)
    rows = [[why, f"{count:,}"] for why, count in reasons.most_common(REASONS_SHOWN)]
    return [Folded("Why files were left out", [Table("Left out", ["why", "files"], rows)])] if rows else []


# ------------------------------------------------------------------------------------------------------------
# Checks, manifest, config


def checks(m: Material) -> Section:
    if m.checks is None:
        said = (
            "Not run for this page: `x1 report --verify` runs the checks of `x1 verify` (hashes take time)."
        )
        return Section("checks", "Checks", [Line(said, "note")])
    counts = Counter(check.result for check in m.checks)
    said = ", ".join(f"{count} {result}" for result, count in counts.items())
    bad = counts[FAILED] > 0
    rows = [[_sign(check.result), check.name, clean(check.evidence)] for check in m.checks]
    table = Table("The checks of x1 verify", ["result", "check", "evidence"], rows, frozenset({0, 1, 2}))
    return Section("checks", "Checks", [Line(f"{said}.", "bad" if bad else "good"), table])


def _sign(result: str) -> str:
    return {PASSED: "✓ passed", FAILED: "✗ FAILED"}.get(result, result)


def records(m: Material) -> Section:
    manifest = json.dumps(clean(m.manifest), indent=1, ensure_ascii=False)
    blocks: list[Block] = [Line(problem, "bad") for problem in m.problems]
    blocks.append(Folded("manifest.json", [Verbatim(manifest)]))
    blocks.append(Folded("config.yaml, resolved", [Verbatim(clean(to_yaml(m.run.config)))]))
    return Section("records", "Records", [*_versions(m), *blocks])


def _versions(m: Material) -> Sequence[Block]:
    versions = m.manifest.get("versions")
    said = ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else ""
    commit = m.manifest.get("commit")
    dirty = ", with local changes" if m.manifest.get("dirty") else ""
    source = f"commit {str(commit)[:12]}{dirty}" if commit else "no commit on record"
    seed = f"seed {m.manifest.get('seed', m.run.config.seed)}"
    argv = m.manifest.get("argv")
    command = " ".join(map(str, clean(argv))) if isinstance(argv, list) else "not recorded"
    return [Line(f"{seed}; {source}; {said or 'no versions on record'}."), Line(f"Command: {command}")]
