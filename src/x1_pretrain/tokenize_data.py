"""Raw text -> a corpus folder that training reads.

    python -m x1_pretrain.tokenize_data --input-dir DIR --output-dir DIR --tokenizer gpt2

Reads parquet, JSON lines (plain, .gz, .zst) and plain text, side by side. Interrupted, the same command goes
on where it stopped. The corpus is the same, byte for byte, for any number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from x1_pretrain.command import run, single
from x1_pretrain.corpus.assemble import assemble
from x1_pretrain.corpus.fast_engine import CHECK_BYTES, with_fastest_engine
from x1_pretrain.corpus.progress import Progress
from x1_pretrain.corpus.shards import Manifest, OptionFacts, read_manifest
from x1_pretrain.corpus.sources import Found, file_sha256, find_sources
from x1_pretrain.corpus.tokenizer import Tokenizer
from x1_pretrain.corpus.units import Job, Unit, plan_units, read_facts, text_bytes, write_whole
from x1_pretrain.corpus.vocabulary import (
    SAMPLE_BYTES,
    find_tokenizer,
    sample_texts,
    train_tokenizer,
    training_size,
)
from x1_pretrain.corpus.workers import Crew, remove_partials, usable_workers
from x1_pretrain.errors import INTERRUPTED, RefusedError, UserError

MOST_ROWS = 40  # of the table at the end
SPARSEST_BYTES_PER_TOKEN = 6  # no usual text needs fewer tokens: an estimate of space below any real need


class InterruptedRun(UserError):
    """Stopped by a signal; the parts that are done stay."""

    exit_code = INTERRUPTED


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    input_dir: Path
    output_dir: Path
    tokenizer: str = "gpt2"
    val_fraction: float = 0.001
    workers: int = 1
    text_field: str = "text"
    skip_bad: bool = False
    tokenizer_cache: Path | None = None

    @property
    def parts(self) -> Path:
        return self.output_dir / ".parts"

    @property
    def options(self) -> OptionFacts:
        return OptionFacts(tokenizer=self.tokenizer, text_field=self.text_field, skip_bad=self.skip_bad)


def main(
    input_dir: Annotated[Path, typer.Option(help="Folder of text: .parquet, .jsonl[.gz|.zst], plain text.")],
    output_dir: Annotated[Path, typer.Option(help="The corpus folder to make.")],
    tokenizer: Annotated[
        str, typer.Option(help="gpt2, a path to a tokenizer.json, or train:N (learn N ids from the text).")
    ] = "gpt2",
    val_fraction: Annotated[
        float, typer.Option(help="Share of documents kept for validation, chosen by a hash of their content.")
    ] = 0.001,
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one per core. Does not change the result.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column or JSON field that holds the text.")] = "text",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files that can't be read, instead of stopping.")
    ] = False,
    tokenizer_cache: Annotated[
        Path | None,
        typer.Option(help="Folder with GPT-2's files as tiktoken caches them [TIKTOKEN_CACHE_DIR]."),
    ] = None,
) -> None:
    """Turn a folder of raw text into a corpus folder for training.

    Each folder directly under --input-dir is a domain. After an interruption, run the same command again.
    """
    request = Request(
        input_dir=input_dir,
        output_dir=output_dir,
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        workers=usable_workers() if workers is None else workers,
        text_field=text_field,
        skip_bad=skip_bad,
        tokenizer_cache=tokenizer_cache,
    )
    with _signals_end_it():
        make_corpus(request)


def make_corpus(request: Request) -> Manifest:
    """Make the corpus that `request` asks for, or find it already made."""
    started_s = time.monotonic()
    _check(request)
    found = find_sources(request.input_dir, leave_out=request.output_dir)
    _say_found(request, found)
    done = _already_made(request, found)
    if done:
        shutil.rmtree(request.parts, ignore_errors=True)  # a kill after the manifest may have left some
        print(
            f"already complete: {request.output_dir} holds this corpus ({done.train.tokens:,} train tokens)"
        )
        return done
    with _alone_in(request):
        units = plan_units(found.sources, request.text_field)
        with Crew(min(request.workers, len(units))) as crew:
            tokenizer = _tokenizer(request, found)
            job = _job(request, tokenizer)
            _check_space(request, found, job)
            tokens = _tokenize(units, job, crew)
        manifest = assemble(request.output_dir, units, job, found, tokenizer, request.options)
    _say_made(request, manifest, time.monotonic() - started_s, tokens)
    return manifest


def _check(request: Request) -> None:
    if not 0 <= request.val_fraction < 1:
        raise UserError(f"--val-fraction {request.val_fraction}: expected at least 0 and below 1, e.g. 0.001")
    if request.workers < 1:
        raise UserError(f"--workers {request.workers}: expected 1 or more")
    training_size(request.tokenizer)
    if request.output_dir.exists() and not request.output_dir.is_dir():
        raise UserError(f"--output-dir {request.output_dir}: is a file, not a folder")
    if request.output_dir.resolve() == request.input_dir.resolve():
        raise UserError(f"--output-dir {request.output_dir}: is the input folder; expected another folder")


def _already_made(request: Request, found: Found) -> Manifest | None:
    """The corpus in the output folder, if it is the one asked for; refuses to overwrite any other."""
    folder = request.output_dir
    if not (folder / "manifest.json").exists():
        if (folder / "train.bin").exists() and not request.parts.is_dir():
            raise RefusedError(
                f"--output-dir {folder}: holds a train.bin without a manifest.json, which this command "
                "did not make; move it away or choose another folder"
            )
        return None
    manifest = read_manifest(folder)
    differences = _differences(manifest, request, found)
    if differences:
        raise RefusedError(
            f"--output-dir {folder}: holds another corpus ({'; '.join(differences)}); choose another "
            "folder, or remove that one first"
        )
    return manifest


def _differences(manifest: Manifest, request: Request, found: Found) -> list[str]:
    """What sets a finished corpus apart from what is asked for, in words."""
    options = manifest.options
    pairs = [
        ("--tokenizer", options.tokenizer, request.tokenizer),
        ("--val-fraction", manifest.val_fraction, request.val_fraction),
        ("--text-field", options.text_field, request.text_field),
    ]
    words = [f"{name} was {then}, is {now}" for name, then, now in pairs if then != now]
    if not words and training_size(request.tokenizer) is None:
        now = find_tokenizer(request.tokenizer, request.tokenizer_cache)
        words += ["the tokenizer's file has changed"] if now.sha256 != manifest.tokenizer.sha256 else []
    if any(source.skipped for source in manifest.sources) and not request.skip_bad:
        words += ["--skip-bad was given then"]
    return words + _input_changes(manifest, found)


def _input_changes(manifest: Manifest, found: Found) -> list[str]:
    then = {source.path: source for source in manifest.sources}
    now = {source.relative: source for source in found.sources}
    made_s = datetime.fromisoformat(manifest.created_utc).timestamp()
    changed = then.keys() ^ now.keys()
    for path in then.keys() & now.keys():
        touched = now[path].mtime_ns / 1e9 > made_s
        if then[path].bytes != now[path].size_bytes or (
            touched and file_sha256(now[path].path) != then[path].sha256
        ):
            changed.add(path)
    return [f"input files changed: {len(changed)}, e.g. {min(changed)}"] if changed else []


@contextlib.contextmanager
def _alone_in(request: Request) -> Iterator[None]:
    """Hold the output folder: two runs in one folder would remove each other's parts."""
    try:
        request.parts.mkdir(parents=True, exist_ok=True)
        lock = (request.parts / "lock").open("w")
    except OSError as error:
        raise UserError(f"--output-dir {request.output_dir}: can't be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output-dir {request.output_dir}: another run is writing there") from None
        remove_partials(request.parts)
        try:
            yield
        except OSError as error:
            raise UserError(_cant_write(request.output_dir, error)) from error


def _cant_write(folder: Path, error: OSError) -> str:
    return (
        f"{folder}: can't write ({error.strerror or error}); make room and run the same command: it goes on "
        "where this one stopped"
    )


def _tokenizer(request: Request, found: Found) -> Tokenizer:
    size = training_size(request.tokenizer)
    if size is None:
        tokenizer = find_tokenizer(request.tokenizer, request.tokenizer_cache)
    else:
        print(f"learning a vocabulary of {size:,} from a sample of the text", flush=True)
        tokenizer = train_tokenizer(_sample(request, found, request.val_fraction, SAMPLE_BYTES), size)
        if tokenizer.vocab_size < size:
            print(f"the text gives a vocabulary of {tokenizer.vocab_size:,} only, not {size:,}")
    # A share of 0: the check may look at validation documents too.
    tokenizer, note = with_fastest_engine(tokenizer, _sample(request, found, 0, CHECK_BYTES))
    engine = tokenizer.engine.name + (f" ({note})" if note else "")
    print(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids, run by {engine}", flush=True)
    return tokenizer


def _sample(request: Request, found: Found, val_fraction: float, size: int) -> Iterator[str]:
    return sample_texts(found.sources, request.text_field, val_fraction, request.skip_bad, size)


def _job(request: Request, tokenizer: Tokenizer) -> Job:
    file = request.parts / "tokenizer.json"
    write_whole(file, tokenizer.json_text.encode())
    return Job(
        parts=request.parts,
        tokenizer_file=file,
        tokenizer_sha256=tokenizer.sha256,
        engine=tokenizer.engine.name,
        dtype="uint16" if tokenizer.vocab_size <= 65_536 else "uint32",
        text_field=request.text_field,
        val_fraction=request.val_fraction,
        skip_bad=request.skip_bad,
    )


def _check_space(request: Request, found: Found, job: Job) -> None:
    """Refuse what certainly does not fit: parts and corpus together, less the parts already there."""
    tokens = sum(map(text_bytes, found.sources)) // SPARSEST_BYTES_PER_TOKEN
    there = sum(file.stat().st_size for file in request.parts.iterdir())
    need = 2 * tokens * np.dtype(job.dtype).itemsize - there
    free = shutil.disk_usage(request.output_dir).free
    if need > free:
        raise RefusedError(
            f"--output-dir {request.output_dir}: {free / 2**30:.1f} GiB are free and this corpus needs at "
            f"least {need / 2**30:.1f} GiB while it is made; make room or choose another disk"
        )


def _tokenize(units: Sequence[Unit], job: Job, crew: Crew) -> int:
    """Write the parts that are missing; returns how many tokens that made."""
    missing = [unit for unit in units if read_facts(unit, job) is None]
    if len(missing) < len(units):
        done = len(units) - len(missing)
        print(f"going on: {done} of {len(units)} parts are done and are kept", flush=True)
    files = sum(piece.opens_file for unit in missing for piece in unit.pieces)
    with Progress(sum(unit.text_bytes for unit in missing), files) as progress:
        for event in crew.write_parts(missing, job):
            progress.add(event)
    return progress.tokens


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGINT, SIGTERM and a hang-up end the command with exit code 75; what is done stays done."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # once is enough: the way out must not be cut short
        raise InterruptedRun(
            f"stopped by {signal.Signals(number).name}; what is done is kept, "
            "and the same command goes on from there"
        )

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What is said


def _say_found(request: Request, found: Found) -> None:
    if found.ignored:
        some = ", ".join(found.ignored[:3]) + (", ..." if len(found.ignored) > 3 else "")
        print(f"ignored: {len(found.ignored)} files of unknown endings ({some})")
    if not found.sources:
        raise UserError(
            f"--input-dir {request.input_dir}: no file to read; expected .parquet, .jsonl, .jsonl.gz, "
            ".jsonl.zst or plain text (.txt, .md, .py, ...)"
        )
    domains = sorted({source.domain for source in found.sources})
    size = sum(source.size_bytes for source in found.sources)
    some = ", ".join(domains[:8]) + (f" and {len(domains) - 8} more" if len(domains) > 8 else "")
    print(f"files: {len(found.sources):,}, {size / 1e6:,.1f} MB; domains: {some}", flush=True)


def _say_made(request: Request, manifest: Manifest, seconds: float, tokens: int) -> None:
    print(f"made {request.output_dir}, fingerprint {manifest.fingerprint[:12]}")
    table = Table()
    for name in ("domain", "documents", "train tokens", "val tokens", "bytes/token"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, count in list(manifest.domain_counts.items())[:MOST_ROWS]:
        made = count.train_tokens + count.val_tokens
        cells = (f"{count.documents:,}", f"{count.train_tokens:,}", f"{count.val_tokens:,}")
        table.add_row(domain, *cells, f"{count.bytes / made:.2f}")
    train, val = manifest.train, manifest.val
    ratio = (train.bytes + val.bytes) / (train.tokens + val.tokens)
    if len(manifest.domains) > MOST_ROWS:
        table.add_row(f"and {len(manifest.domains) - MOST_ROWS} more")
    table.add_section()
    documents = f"{train.documents + val.documents:,}"
    table.add_row("all", documents, f"{train.tokens:,}", f"{val.tokens:,}", f"{ratio:.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(_pace(tokens, seconds))
    _say_dropped(manifest)


def _pace(tokens: int, seconds: float) -> str:
    """The whole command's time and rate; the rate shown on the way is higher: of encoding alone."""
    words = f"{tokens:,} tokens in {seconds:.1f} s, start and joining included"
    rate = tokens / seconds / 1e6
    return words if rate < 0.1 else f"{words}: {rate:.2f} M tokens/s over the whole command"


def _say_dropped(manifest: Manifest) -> None:
    dropped = manifest.dropped
    print(f"dropped: {dropped.empty_documents:,} empty documents, {len(dropped.ignored_files)} unknown files")
    if dropped.repaired_documents:
        print(
            f"repaired: {dropped.repaired_documents:,} documents held half a surrogate pair; it is U+FFFD now"
        )
    for source in manifest.sources:
        if source.skipped:
            print(f"left out: {source.path}: {source.skipped}")
    if not manifest.val.tokens and manifest.val_fraction:
        print(
            f"x1: val.bin is empty: no document fell into the validation share of {manifest.val_fraction}; "
            "training will have nothing to evaluate on (a larger --val-fraction would)",
            file=sys.stderr,
        )


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run(app, prog="python -m x1_pretrain.tokenize_data"))
