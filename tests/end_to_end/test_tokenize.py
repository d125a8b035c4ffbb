"""The tokenize command as a user runs it: results, bad input, interruption, death."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from x1_pretrain import tokenize_data
from x1_pretrain.corpus import fast_engine, units
from x1_pretrain.corpus.shards import SPLITS, Corpus, open_corpus
from x1_pretrain.corpus.sources import find_sources, read_documents
from x1_pretrain.corpus.vocabulary import train_tokenizer
from x1_pretrain.errors import UserError
from x1_pretrain.tokenize_data import Request, make_corpus

TOKENIZER = "train:400"  # needs no file from elsewhere
SMALL_UNITS = """
import sys, time
from x1_pretrain import tokenize_data
from x1_pretrain.command import run
from x1_pretrain.corpus import fast_engine, units
units.SMALLEST_UNIT_BYTES = units.LARGEST_UNIT_BYTES = 40_000
raise SystemExit(run(tokenize_data.app, sys.argv[1:]))
"""
# After 20 parts it waits while the file `hold` lies among them: it can't be done before a test acts.
HELD = SMALL_UNITS.replace(
    "raise SystemExit",
    """
write_parts = tokenize_data.Crew.write_parts
def held(crew, units, job):
    done = 0
    for event in write_parts(crew, units, job):
        yield event
        done += event.kind == "done"
        while done >= 20 and (job.parts / "hold").exists():
            time.sleep(0.01)
tokenize_data.Crew.write_parts = held
raise SystemExit""",
)


def command(source: Path, out: Path, *more: str, script: str | None = None) -> list[str]:
    what = ["-c", script] if script else ["-m", "x1_pretrain.tokenize_data"]
    folders = ["--input-dir", str(source), "--output-dir", str(out)]
    ready = source.parent / "tokenizer.json"  # learning one takes seconds that the tests of ends do not have
    tokenizer = str(ready) if ready.exists() else TOKENIZER
    return [sys.executable, *what, *folders, "--tokenizer", tokenizer, "--workers", "2", *more]


def run(*args: Any, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command(*args, **more), env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def start(*args: Any, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def words(rng: random.Random, count: int) -> str:
    syllables = ("ka", "lo", "mi", "ren", "st", "u", "th", "er", "an", " ", " ", ", ", "\n", "é", "漢", "7")
    return "".join(rng.choices(syllables, k=count))


def lines(texts: list[Any]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_text(folder: Path, size: int) -> Path:
    """A folder of every kind of file, in three domains, with documents that are easy to get wrong."""
    rng = random.Random(7)
    texts = [words(rng, rng.randrange(1, size)) for _ in range(240)]
    texts[5:8] = ["", "<|endoftext|>", "a<|endoftext|>b"]
    for name in ("books", "code", "web"):
        (folder / name).mkdir(parents=True)
    pq.write_table(pa.table({"text": texts[:80]}), folder / "books/a.parquet", row_group_size=9)
    pq.write_table(pa.table({"text": [*texts[80:100], None]}), folder / "books/b.parquet")
    (folder / "web/a.jsonl").write_bytes(lines([*texts[100:140], "", None, "half \ud83d pair"]))
    (folder / "web/b.jsonl.gz").write_bytes(gzip.compress(lines(texts[140:170]), mtime=0))
    (folder / "web/c.jsonl.zst").write_bytes(zstandard.compress(lines(texts[170:200])))
    for i, text in enumerate(texts[200:]):
        (folder / "code" / f"{i}.py").write_text(text, encoding="utf-8", newline="")
    (folder / "notes.md").write_text("# notes\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "in", 400)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("made") / "out"
    done = run(source, out, "--val-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    return open_corpus(out)


def expected_documents(source: Path) -> list[tuple[str, int, str]]:
    """(file, row, text) of each document to keep, read apart from the command."""
    found = find_sources(source).sources
    read = [(s.relative, row, text) for s in found for row, text in read_documents(s, "text") if text]
    return [(name, row, text.replace("\ud83d", "\ufffd")) for name, row, text in read]


def decoded(corpus: Corpus) -> list[tuple[str, int, str, str]]:
    """(file, row, split, text) of each document in the corpus."""
    tokenizer = corpus.tokenizer()
    rows = []
    for split in SPLITS:
        tokens, table = np.asarray(corpus.tokens(split)), corpus.document_table(split)
        stops = np.append(table["start"], len(tokens))[1:].astype(int)
        for row, stop in zip(table, stops, strict=True):
            assert tokens[stop - 1] == corpus.eot_id
            text = tokenizer.decode(tokens[int(row["start"]) : stop - 1])
            rows.append((corpus.source_path(int(row["file"])), int(row["row"]), split, text))
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a corpus, but for the manifest's clock and the engine it ran."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["created_utc"], manifest["versions"]["engine"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


# What it makes


def test_every_document_comes_back_from_its_place(source: Path, made: Corpus) -> None:
    back = decoded(made)
    assert sorted((file, row, text) for file, row, _, text in back) == sorted(expected_documents(source))
    assert {split for _, _, split, _ in back} == set(SPLITS)


def test_documents_keep_the_order_of_files_and_rows(source: Path, made: Corpus) -> None:
    places = [(file, row) for file, row, _ in expected_documents(source)]
    for split in SPLITS:
        mine = [(file, row) for file, row, where, _ in decoded(made) if where == split]
        assert mine == [place for place in places if place in set(mine)]


def test_no_end_id_comes_from_text(made: Corpus) -> None:
    for split in SPLITS:
        tokens = np.asarray(made.tokens(split))
        starts = made.document_table(split)["start"].astype(int)
        assert np.flatnonzero(tokens == made.eot_id).tolist() == [*(starts[1:] - 1), len(tokens) - 1]


def test_the_manifest_counts_what_is_there(source: Path, made: Corpus) -> None:
    facts, back = made.manifest, decoded(made)
    for split in SPLITS:
        texts = [text for _, _, where, text in back if where == split]
        assert getattr(facts, split).documents == len(texts)
        assert getattr(facts, split).bytes == sum(len(text.encode()) for text in texts)
    assert made.domains == ["books", "code", "text", "web"]
    for number, domain in enumerate(made.domains):
        at = {split: np.flatnonzero(made.document_table(split)["domain"] == number) for split in SPLITS}
        assert facts.domain_counts[domain].documents == len(at["train"]) + len(at["val"])
    assert facts.dropped.empty_documents == 4
    assert facts.dropped.repaired_documents == 1
    assert facts.dropped.ignored_files == ["picture.png"]
    assert len(facts.sources) == 46
    assert made.token_bytes()[made.train].sum() == facts.train.bytes


def test_validation_spans_hold_their_domain_alone(made: Corpus) -> None:
    for number, domain in enumerate(made.domains):
        for start, end in made.val_spans[domain]:
            assert set(made.documents("val", start, end)["domain"]) == {number}
    spans = [span for runs in made.val_spans.values() for span in runs]
    assert sum(end - start for start, end in spans) == len(made.val)


def test_equal_documents_lie_on_one_side_and_more_files_move_none(
    source: Path, made: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "in/new").mkdir(parents=True)
    for folder in source.iterdir():
        (tmp_path / "in" / folder.name).symlink_to(folder)
    texts = [text for _, _, text in expected_documents(source)]
    (tmp_path / "in/new/again.jsonl").write_bytes(lines([*texts, *(f"{t} new" for t in texts)]))
    (tmp_path / "tokenizer.json").write_bytes((made.path / "tokenizer.json").read_bytes())
    make_corpus(Request(tmp_path / "in", tmp_path / "out", str(tmp_path / "tokenizer.json"), 0.2, 2))
    sides: dict[str, set[str]] = {}
    for _, _, split, text in [*decoded(made), *decoded(open_corpus(tmp_path / "out"))]:
        sides.setdefault(text, set()).add(split)
    assert {len(side) for side in sides.values()} == {1}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_and_any_units_give_the_same_bytes(
    source: Path, made: Corpus, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 5_000 * workers)
    make_corpus(Request(source, tmp_path / "out", TOKENIZER, 0.2, workers))
    assert contents(tmp_path / "out") == contents(made.path)


def test_the_engine_does_not_change_the_bytes(
    source: Path, made: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_engine.importlib.util, "find_spec", lambda name: None)
    make_corpus(Request(source, tmp_path / "out", TOKENIZER, 0.2, 1))
    assert open_corpus(tmp_path / "out").manifest.versions["engine"] == "tiktoken"
    assert contents(tmp_path / "out") == contents(made.path)


def test_the_work_of_joining_grows_with_the_files_and_not_their_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(500):
        (tmp_path / "in" / f"{i}.txt").write_text(f"document {i}")
    asked = []
    key = units.part_key
    monkeypatch.setattr(units, "part_key", lambda unit, job: asked.append(len(unit.pieces)) or key(unit, job))
    make_corpus(Request(tmp_path / "in", tmp_path / "out", "train:300", 0.5, 1))
    assert len(open_corpus(tmp_path / "out").manifest.sources) == 500
    assert sum(asked) <= 5 * 500


def test_large_vocabularies_take_four_bytes(tmp_path: Path, source: Path) -> None:
    end = {"id": 70_000, "content": "</s>", "special": True, "normalized": False}
    vocab = {"[?]": 0} | {str(i): i for i in range(1, 70_000)}
    tree = {
        "version": "1.0",
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "model": {
            "type": "WordLevel",
            "unk_token": "[?]",
            "vocab": vocab,
        },
    }
    (tmp_path / "t.json").write_text(json.dumps(tree))
    make_corpus(Request(source, tmp_path / "out", str(tmp_path / "t.json"), 0.2, 1))
    corpus = open_corpus(tmp_path / "out")
    assert corpus.train.dtype == np.dtype("<u4")
    assert corpus.train[-1] == corpus.eot_id == 70_000
    assert corpus.manifest.dtype == "uint32"


def test_gpt2_as_the_contract_writes_it(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jsonl").write_bytes(lines(["hello <|endoftext|> world", "zwei"]))
    args = ["--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out", "--tokenizer", "gpt2"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "x1_pretrain.cli",
            "tokenize",
            *args,
            "--val-fraction",
            "0.001",
            "--workers",
            "16",
        ],
        env={**os.environ, "TIKTOKEN_CACHE_DIR": str(shared / "tiktoken")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "val.bin is empty" in done.stderr
    # "hello", " <", "|", "endo", "ft", "ext", "|", ">", " world", end; "zw", "ei", end
    assert open_corpus(tmp_path / "out").train.tolist()[0] == 31373
    assert open_corpus(tmp_path / "out").train.tolist().count(50256) == 2


# What it refuses


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.startswith("x1: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("cut.jsonl.gz", gzip.compress(lines(["x" * 1000] * 100))[:-10], "Truncated"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("bad.parquet", b"PAR1 no", ""),
        ("latin.txt", b"\xe9", "not UTF-8"),
        ("field.jsonl", b'{"body": "a"}\n', "line 1: no field 'text'"),
    ],
)
def test_a_bad_file_stops_the_run_or_is_left_out_whole(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "web").mkdir(parents=True)
    (source / "web" / name).write_bytes(data)
    (source / "web/good.jsonl").write_bytes(lines(["good one", "good two"]))
    stopped = run(source, out)
    assert stopped.returncode == 2
    assert f"web/{name}: {reason}" in one_line(stopped)
    assert "--skip-bad" in stopped.stderr
    skipping = run(source, out, "--skip-bad", "--val-fraction", "0")
    assert skipping.returncode == 0, skipping.stderr
    assert f"left out: web/{name}: {reason}" in skipping.stdout
    corpus = open_corpus(out)
    assert [text for *_, text in decoded(corpus)] == ["good one", "good two"]
    assert [reason in (s.skipped or "") for s in corpus.manifest.sources if s.path == f"web/{name}"] == [True]
    assert "--skip-bad was given then" in one_line(run(source, out, "--val-fraction", "0"))


def test_a_folder_that_cannot_be_listed_stops_the_run_or_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "web/shut").mkdir(parents=True)
    (source / "web/a.txt").write_text("good")
    listed = os.scandir

    def scandir(path: Any = ".") -> Any:  # root may list anything: it needs a stand-in
        if str(path) == str(source / "web/shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    said = r"^web/shut: can't be listed \(Permission denied\); .*--skip-bad$"
    with pytest.raises(UserError, match=said):
        make_corpus(Request(source, out, "train:300", 0))
    make_corpus(Request(source, out, "train:300", 0, skip_bad=True))
    printed = capsys.readouterr().out
    assert "left out: web/shut: can't be listed (Permission denied)" in printed
    assert "M tokens/s" not in printed  # a rate of 0.00 would say nothing
    sources = open_corpus(out).manifest.sources
    assert {s.path: s.skipped is not None for s in sources} == {"web/a.txt": False, "web/shut": True}
    make_corpus(Request(source, out, "train:300", 0, skip_bad=True))
    assert "already complete" in capsys.readouterr().out


def test_a_rate_is_said_to_be_of_the_whole_command() -> None:
    assert tokenize_data._pace(5_000_000, 2.0).endswith("included: 2.50 M tokens/s over the whole command")
    assert tokenize_data._pace(4_000, 1.2) == "4,000 tokens in 1.2 s, start and joining included"


def test_a_file_bad_in_its_last_piece_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2000)
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/a.parquet"
    texts = [os.urandom(40).hex() for _ in range(500)]
    pq.write_table(
        pa.table({"text": texts}),
        file,
        row_group_size=50,
        compression="none",
        use_dictionary=False,
        write_statistics=False,  # which would hold the last text once more, were it the first or last of all
    )
    data = bytearray(file.read_bytes())
    at = data.rindex(texts[-1].encode())
    data[at] = 0xFF  # not UTF-8
    file.write_bytes(data)
    (tmp_path / "in/b.txt").write_text("good")
    with pytest.raises(UserError, match=r"a\.parquet: "):
        make_corpus(Request(tmp_path / "in", tmp_path / "out", "train:300", 0, 2))
    make_corpus(Request(tmp_path / "in", tmp_path / "out", "train:300", 0, 2, skip_bad=True))
    corpus = open_corpus(tmp_path / "out")
    assert [text for *_, text in decoded(corpus)] == ["good"]
    assert corpus.manifest.sources[0].skipped


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no file to read"),
        ({"x.png": b"1"}, "no file to read"),
        ({"x.txt": b"", "y.jsonl": b'{"text": ""}\n'}, "none holds text"),
    ],
)
def test_no_text_is_one_line(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    done = run(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 2
    assert reason in one_line(done)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--val-fraction", "1"], "--val-fraction 1.0: expected"),
        (["--val-fraction", "-0.1"], "--val-fraction -0.1: expected"),
        (["--val-fraction", "nan"], "--val-fraction nan: expected"),
        (["--workers", "0"], "--workers 0: expected"),
        (["--tokenizer", "train:4k"], "--tokenizer train:4k: expected train:N"),
        (["--tokenizer", "gpt5"], "--tokenizer gpt5: no such tokenizer"),
        (["--workrs", "2"], "workrs"),
    ],
)
def test_a_bad_option_is_one_line(source: Path, tmp_path: Path, args: list[str], words: str) -> None:
    done = run(source, tmp_path / "out", *args)
    assert done.returncode == 2
    assert words in one_line(done)


def test_without_network_and_cache_gpt2_is_one_line_at_once(source: Path, tmp_path: Path) -> None:
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    done = run(source, tmp_path / "out", "--tokenizer", "gpt2", env=nowhere)
    assert done.returncode == 2
    assert "--tokenizer-cache" in one_line(done)


def test_a_finished_corpus_is_kept_and_another_is_refused(source: Path, made: Corpus, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.path.iterdir()}
    again = run(source, made.path, "--val-fraction", "0.2", "--workers", "1")
    assert again.returncode == 0
    assert "already complete" in again.stdout
    other = run(source, made.path, "--val-fraction", "0.3")
    assert other.returncode == 78
    assert "--val-fraction was 0.2, is 0.3" in one_line(other)
    more = write_text(tmp_path / "in", 400)
    (more / "notes.md").write_text("# other\n")
    changed = run(more, made.path, "--val-fraction", "0.2")
    assert changed.returncode == 78
    assert "input files changed: 1, e.g. notes.md" in one_line(changed)
    assert {p: p.stat().st_mtime_ns for p in made.path.iterdir()} == before


def test_foreign_token_files_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train.bin").write_bytes(b"mine")
    done = run(source, tmp_path / "out")
    assert done.returncode == 78
    assert "without a manifest.json" in one_line(done)
    assert (tmp_path / "out/train.bin").read_bytes() == b"mine"


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, made: Corpus, source: Path
) -> None:
    limited = [
        "bash",
        "-c",
        'ulimit -f 32; exec "$@"',
        "-",
    ]  # files of 32 KiB at most
    args = command(source, tmp_path / "out", "--val-fraction", "0.2")
    done = subprocess.run([*limited, *args], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "can't write (File too large)" in one_line(done)
    assert run(source, tmp_path / "out", "--val-fraction", "0.2").returncode == 0
    assert contents(tmp_path / "out") == contents(made.path)


def test_too_small_a_disk_is_refused_before_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(tokenize_data.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0.0 GiB are free and this corpus needs at least") as caught:
        make_corpus(Request(source, tmp_path / "out", TOKENIZER))
    assert caught.value.exit_code == 78


# How it ends before its time


@pytest.fixture(scope="module")
def much(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that takes a second or two, in some hundred parts of SMALL_UNITS."""
    folder = tmp_path_factory.mktemp("much")
    tokenizer = train_tokenizer([words(random.Random(1), 10_000)], 400)
    (folder / "tokenizer.json").write_text(tokenizer.json_text, encoding="utf-8")
    return write_text(folder / "in", 60_000)


@pytest.fixture(scope="module")
def whole(much: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(much, out).returncode == 0
    return out


def finished_parts(out: Path) -> dict[str, int]:
    """Name -> time of writing of each finished part."""
    found = {}
    for file in (out / ".parts").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # the run is removing them: it has its corpus
            found[file.name] = file.stat().st_mtime_ns
    return {name: written for name, written in found.items() if len(Path(name).stem) == 32}


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 300
    while len(finished_parts(out)) < count and process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def hold(out: Path) -> Path:
    """The file that keeps a run of HELD from ending."""
    (out / ".parts").mkdir(parents=True, exist_ok=True)
    (out / ".parts/hold").touch()
    return out / ".parts/hold"


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end after the test, whatever happens."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9; the workers, each in a group of its own, end by themselves."""
    workers = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=120)[1] == []


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(
    much: Path, whole: Path, tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    rng, kills, kept, done = random.Random(20261121), 0, 0, False
    out = tmp_path / "out"
    while True:
        before = finished_parts(out)
        if kills < 2:
            hold(out)
        else:
            (out / ".parts/hold").unlink(missing_ok=True)
        process = start(much, out, script=HELD)
        ended.append(process)
        wait_for_parts(out, len(before) + rng.randrange(0, 20 if kills > 1 else 5), process)
        time.sleep(rng.random() * 0.05)
        if process.poll() is not None or kills == 8:
            output, _ = process.communicate(timeout=300)
            break
        kill_group(process)
        kills += 1
        after = finished_parts(out)
        done = (out / "manifest.json").exists()
        assert done or before.items() <= after.items(), "a finished part was written again"
        kept = len(after)
    assert process.returncode == 0, output
    assert kills >= 2
    assert ("already complete" if done else f"going on: {kept} of ") in output or not kept
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(
    much: Path, whole: Path, tmp_path: Path, ended: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    hold(out)
    process = start(much, out, script=HELD)
    ended.append(process)
    wait_for_parts(out, 5, process)
    os.killpg(process.pid, number)  # to the whole group, as Ctrl-C does
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert f"stopped by {number.name}" in output
    assert run(much, out, script=SMALL_UNITS).returncode == 0
    assert contents(out) == contents(whole)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "workers import serve" in " ".join(child.cmdline())]


def test_a_worker_that_is_killed_is_an_error_at_once(
    much: Path, tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    held = hold(tmp_path / "out")
    process = start(much, tmp_path / "out", script=HELD)
    ended.append(process)
    wait_for_parts(tmp_path / "out", 3, process)
    workers_of(process)[0].kill()
    held.unlink(missing_ok=True)  # gone, if the run noticed and ended at once
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "was ended by SIGKILL while reading" in output
    assert "Traceback" not in output


def test_workers_end_when_their_parent_is_killed(
    much: Path, tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    hold(tmp_path / "out")
    process = start(much, tmp_path / "out", script=HELD)
    ended.append(process)
    wait_for_parts(tmp_path / "out", 3, process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []


def test_two_runs_do_not_share_a_folder(
    much: Path, tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    held = hold(tmp_path / "out")
    first = start(much, tmp_path / "out", script=HELD)
    ended.append(first)
    wait_for_parts(tmp_path / "out", 1, first)
    second = run(much, tmp_path / "out")
    assert second.returncode == 2
    assert "another run is writing there" in one_line(second)
    held.unlink()
    assert first.communicate(timeout=300)
    assert first.returncode == 0


def test_another_option_reuses_no_part(
    much: Path, tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    hold(tmp_path / "out")
    process = start(much, tmp_path / "out", script=HELD)
    ended.append(process)
    wait_for_parts(tmp_path / "out", 5, process)
    kill_group(process)
    done = run(much, tmp_path / "out", "--val-fraction", "0.5", script=SMALL_UNITS)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stdout
    clean = run(much, tmp_path / "clean", "--val-fraction", "0.5")
    assert clean.returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.slow
def test_memory_stays_flat_on_two_gigabytes() -> None:
    """One .jsonl, one .parquet, many .parquet; 1.5 GB for all processes together is the limit."""
    benchmark = Path(__file__).resolve().parents[2] / "benchmarks/tokenize.py"
    done = subprocess.run(
        [sys.executable, str(benchmark), "--rss"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| one", "| many"))]
    assert len(rows) == 3
    assert all(float(row[4]) < 1500 for row in rows)
