"""A mirror that can't be used, or a run there that is not this one: one line before any compute is spent.

Each case is a real `x1 train` with the mirror's real process. What was there before is there afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.corpora import write_config
from tests.end_to_end.in_process import Outcome, train_here
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket

from x1_pretrain import cli, train
from x1_pretrain.command import run as run_app
from x1_pretrain.mirror.claim import Me
from x1_pretrain.mirror.head import Head, decode, encode
from x1_pretrain.mirror.keeper import Keeper
from x1_pretrain.mirror.lease import Lease
from x1_pretrain.records.metrics import utc_now
from x1_pretrain.stores.folder_store import FolderStore

Capture = pytest.CaptureFixture[str]

MISTAKE, REFUSED = 2, 78
SECRET = "wJalrXUtnFEMI/K7MDENG-of-this-test"


class Made(NamedTuple):
    """A run that finished, and its copy."""

    config: Path
    run: Path
    mirror: Path

    @property
    def head_file(self) -> Path:
        return self.mirror / "tiny" / "head.json"

    @property
    def head(self) -> Head:
        return decode(self.head_file.read_bytes(), "head.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Made:
    folder = tmp_path_factory.mktemp("made")
    config = write_config(
        folder / "tiny.yaml",
        training={"total_steps": 4, "batch_tokens": 128},
        optimizer={"warmup_steps": 1},
        checkpoint={"every": 4},
        evaluation={"every": 4, "prompts": []},
        mirror={"every_s": 0.2, "stale_s": 3.0},
    )
    made = Made(config, folder / "run", folder / "mirror")
    made.mirror.mkdir()
    words = ["--config", config, "--data-dir", corpus, "--run-dir", made.run, "--mirror", made.mirror]
    assert run_app(train.app, [str(word) for word in words], prog="x1 train") == 0
    return made


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """To be spoilt."""
    mirror = tmp_path / "mirror"
    shutil.copytree(original.mirror, mirror)
    return original._replace(mirror=mirror)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The run folder of an empty machine."""
    return tmp_path / "here" / "run"


@pytest.fixture
def words(made: Made, corpus: Path, here: Path) -> list[str | Path]:
    return ["--config", made.config, "--data-dir", corpus, "--run-dir", here]


def published(head: Head) -> dict[str, Any]:
    """Of a head, all but who wrote it last: a session that is refused may have been its writer."""
    return {name: value for name, value in asdict(head).items() if name not in ("writer", "epochs")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects(mirror: Path) -> dict[str, bytes]:
    """What is there but for the head, and for the locks of a store that is a folder."""
    return {k: v for k, v in contents(mirror).items() if not (k.endswith("head.json") or "/." in f"/{k}")}


@contextmanager
def unharmed(made: Made) -> Iterator[None]:
    """The mirrored run is, afterwards, what it was, and free for whoever comes next."""
    data, head = objects(made.mirror), made.head
    yield
    assert objects(made.mirror) == data
    assert published(made.head) == published(head)
    assert made.head.writer.state == head.writer.state


def refused(outcome: Outcome, code: int, *said: str) -> None:
    """One line that has these words, and no secret anywhere."""
    line = outcome.one_line
    assert SECRET not in outcome.out + outcome.err
    assert "testing-secret" not in outcome.out + outcome.err
    assert outcome.code == code, line
    for one in said:
        assert one in line


def nothing_trained(run: Path) -> None:
    """At most the mirror's own few files lie there."""
    kept = contents(run) if run.exists() else {}
    assert not [name for name in kept if "step-" in name or name.endswith((".jsonl", "config.yaml"))], kept
    assert not any(b"testing-secret" in data or SECRET.encode() in data for data in kept.values())


# ------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3:/bucket/runs", "did you mean s3://bucket/runs?"),
        ("S3://bucket/runs", "did you mean s3://bucket/runs?"),
        ("s4://bucket/runs", "did you mean s3://bucket/runs?"),
        ("ftp://bucket/runs", "'ftp' is no store that x1 knows; expected s3://BUCKET/FOLDER"),
        ("https://bucket.s3.amazonaws.com/runs", "a web address; expected s3://BUCKET/FOLDER"),
        ("s3://", "is no name of a bucket there; expected 3 to 63"),
        ("s3://Bucket_/runs", "'Bucket_' is no name of a bucket there"),
        ("", "mirror.uri: expected"),
        (f"s3://key:{SECRET}@bucket/runs", "no account or password in an address"),
        (f"s3://bucket/runs?X-Amz-Signature={SECRET}", "a signed link is no mirror"),
        (f"https://key:{SECRET}@bucket/runs", "expected s3://BUCKET/FOLDER"),
    ],
)
def test_an_address_with_a_mistake(
    text: str, said: str, words: list[str | Path], here: Path, capfd: Capture
) -> None:
    refused(train_here(capfd, *words, "--mirror", text), MISTAKE, said)
    assert not here.exists()


def test_an_address_with_a_mistake_in_the_config(words: list[str | Path], here: Path, capfd: Capture) -> None:
    outcome = train_here(capfd, *words, "--set", "mirror.uri=s3:/bucket/runs")
    refused(outcome, MISTAKE, "did you mean s3://bucket/runs?")
    assert not here.exists()


def test_a_mirror_inside_the_run_folder(words: list[str | Path], here: Path, capfd: Capture) -> None:
    outcome = train_here(capfd, *words, "--mirror", here / "copies")
    refused(outcome, REFUSED, str(here), "name a folder on another disk")
    nothing_trained(here)


def test_a_run_folder_inside_its_own_copy(made: Made, corpus: Path, capfd: Capture) -> None:
    run = made.mirror / "tiny" / "run"
    with unharmed(made):
        words = ["--config", made.config, "--data-dir", corpus, "--run-dir", run, "--mirror", made.mirror]
        refused(train_here(capfd, *words), REFUSED, "overlaps", "name a folder on another disk")
    assert not run.exists()


def test_a_second_disk_that_is_not_mounted(
    words: list[str | Path], tmp_path: Path, here: Path, capfd: Capture
) -> None:
    place = tmp_path / "disk2" / "far" / "runs"
    outcome = train_here(capfd, *words, "--mirror", place)
    refused(outcome, REFUSED, str(tmp_path / "disk2"), "mount the disk, or make the folder")
    assert not (tmp_path / "disk2").exists()
    nothing_trained(here)


def test_a_file_where_the_mirror_should_be(
    words: list[str | Path], tmp_path: Path, here: Path, capfd: Capture
) -> None:
    place = tmp_path / "runs"
    place.write_text("precious")
    outcome = train_here(capfd, *words, "--mirror", place)
    refused(outcome, REFUSED, f"mirror {place}")
    assert place.read_text() == "precious"
    nothing_trained(here)


# ------------------------------------------------------------------------------------------------------------
# Stores


def test_no_such_bucket(words: list[str | Path], s3: Bucket, here: Path, capfd: Capture) -> None:
    outcome = train_here(capfd, *words, "--mirror", "s3://no-bucket-of-this-name/runs")
    refused(outcome, REFUSED, "s3://no-bucket-of-this-name/runs", "there is no such bucket; make it, or")
    nothing_trained(here)


def test_no_credentials(
    words: list[str | Path], s3: Bucket, here: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    outcome = train_here(capfd, *words, "--mirror", f"s3://{s3.bucket}/runs")
    refused(outcome, MISTAKE, f"s3://{s3.bucket}/runs", "no credentials that work; set AWS_ACCESS_KEY_ID")
    assert s3.keys() == []
    nothing_trained(here)


FAULTS = [
    ({"kind": "403", "on": "PUT|POST|DELETE"}, "these credentials may not do that; allow them to get, put"),
    ({"kind": "403", "code": "InvalidAccessKeyId"}, "does not know this access key; check AWS_ACCESS_KEY_ID"),
    ({"kind": "301"}, "the bucket is in another region; set AWS_REGION"),
    ({"kind": "403", "code": "RequestTimeTooSkewed"}, "the clock of this machine is too far off; set it"),
]


@pytest.mark.parametrize(
    ("fault", "said"), FAULTS, ids=["read-only credentials", "an unknown key", "wrong region", "wrong clock"]
)
def test_a_bucket_that_says_no(
    fault: dict[str, Any],
    said: str,
    words: list[str | Path],
    s3: Bucket,
    here: Path,
    capfd: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with FaultyProxy(s3.url) as proxy:
        proxy.add(**fault)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        outcome = train_here(capfd, *words, "--mirror", f"s3://{s3.bucket}/runs")
    refused(outcome, REFUSED, f"mirror s3://{s3.bucket}/runs", said)
    assert s3.keys() == []
    nothing_trained(here)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["down", "timeout", "cut", "503"])
def test_an_endpoint_that_does_not_answer(
    kind: str,
    words: list[str | Path],
    s3: Bucket,
    here: Path,
    capfd: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FaultyProxy(s3.url) as proxy:
        proxy.add(kind)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        began = time.monotonic()
        outcome = train_here(capfd, *words, "--mirror", f"s3://{s3.bucket}/runs")
        assert time.monotonic() - began < 300
    refused(outcome, REFUSED, f"mirror s3://{s3.bucket}/runs", "check the network and mirror.endpoint")
    nothing_trained(here)


# ------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_of_another_config(made: Made, words: list[str | Path], here: Path, capfd: Capture) -> None:
    with unharmed(made):
        outcome = train_here(capfd, *words, "--mirror", made.mirror, "--set", "optimizer.beta2=0.9")
    refused(outcome, REFUSED, f"{made.mirror}/tiny", "another config", "optimizer.beta2", "another name")
    nothing_trained(here)


def test_another_run_in_the_folder(
    made: Made, original: Made, corpus: Path, tmp_path: Path, capfd: Capture
) -> None:
    """A run of the same name and config that was never mirrored: neither is taken for the other."""
    run = tmp_path / "other" / "run"
    words = ["--config", made.config, "--data-dir", corpus, "--run-dir", run]
    assert train_here(capfd, *words).code == 0
    before = contents(run)
    with unharmed(made):
        outcome = train_here(capfd, *words, "--mirror", made.mirror)
    refused(outcome, REFUSED, f"{made.mirror}/tiny", "holds the run", str(run), "another name")
    after = contents(run)
    assert {name: after.get(name) for name in before} == before


def test_no_room_for_what_is_to_be_fetched(
    made: Made, words: list[str | Path], here: Path, capfd: Capture
) -> None:
    enlarge(made)
    with unharmed(made):
        outcome = train_here(capfd, *words, "--mirror", made.mirror)
    said = "no room for what tiny has in the mirror: it needs 577,000 TB"
    refused(outcome, REFUSED, str(here.parent), said, "free some, or take another")
    assert not list(here.rglob("*.jsonl"))
    assert not list(here.rglob("step-*"))


def enlarge(made: Made) -> None:
    """By its manifests, the newest checkpoint has more than any disk holds."""
    one = made.head.checkpoints[-1]
    folder = made.mirror / "tiny" / one.path
    manifest, chunks = (json.loads((folder / name).read_bytes()) for name in ("manifest.json", "chunks.json"))
    manifest["files"]["optimizer.safetensors"]["bytes"] = 1 << 59
    chunks["chunk_bytes"] = 1 << 60
    shas = []
    for name, content in (("manifest.json", manifest), ("chunks.json", chunks)):
        (folder / name).write_text(json.dumps(content))
        shas.append(hashlib.sha256((folder / name).read_bytes()).hexdigest())
    huge = replace(one, bytes=1 << 59, manifest_sha256=shas[0], chunks_sha256=shas[1])
    made.head_file.write_bytes(encode(replace(made.head, checkpoints=[*made.head.checkpoints[:-1], huge])))


def test_the_run_to_resume_from_is_not_there(
    made: Made, words: list[str | Path], here: Path, capfd: Capture
) -> None:
    shutil.rmtree(made.mirror / "tiny")
    outcome = train_here(capfd, *words, "--resume-from", made.mirror / "tiny")
    refused(outcome, REFUSED, f"{made.mirror}/tiny", "the run to resume from is not there", "lists those")
    assert objects(made.mirror) == {}
    nothing_trained(here)


def test_the_run_to_resume_from_has_another_name(
    made: Made, words: list[str | Path], here: Path, capfd: Capture
) -> None:
    with unharmed(made):
        outcome = train_here(capfd, *words, "--resume-from", made.mirror / "tony")
    refused(outcome, MISTAKE, "tony, this config's name is tiny", "--set name=tony")
    assert not here.exists()


def test_two_mirrors(made: Made, words: list[str | Path], here: Path, capfd: Capture) -> None:
    with unharmed(made):
        more = ["--resume-from", made.mirror / "tiny", "--mirror", made.mirror.parent / "another"]
        outcome = train_here(capfd, *words, *more)
    refused(outcome, MISTAKE, "a run goes on in one mirror", "x1 pull")
    assert not here.exists()


def test_fresh_over_a_mirrored_run(made: Made, words: list[str | Path], here: Path, capfd: Capture) -> None:
    with unharmed(made):
        outcome = train_here(capfd, *words, "--mirror", made.mirror, "--fresh")
    refused(outcome, REFUSED, f"{made.mirror}/tiny", "the mirror has a run of this name", "leave out --fresh")
    nothing_trained(here)


def test_a_run_in_the_trash(made: Made, words: list[str | Path], here: Path, capfd: Capture) -> None:
    typed = ["runs", "rm", f"file://{made.mirror}/tiny", "--yes", "--name", "tiny"]
    with pytest.raises(SystemExit) as ended:
        cli.main(typed)
    assert not ended.value.code
    with unharmed(made):
        outcome = train_here(capfd, *words, "--resume-from", made.mirror / "tiny")
    refused(outcome, REFUSED, f"{made.mirror}/tiny", "is in the trash; `x1 runs restore` brings it back")
    nothing_trained(here)


def test_a_run_that_is_being_trained(made: Made, words: list[str | Path], here: Path, capfd: Capture) -> None:
    me = Me("tiny", "another-folder", "gpu-7", 4242, stale_s=3.0)
    lease = Lease.claim(
        FolderStore(made.mirror),
        me,
        sleep=time.sleep,
        steady=time.monotonic,
        now_utc=utc_now,
        say=lambda text: None,
    )
    keeper = Keeper(lease)
    keeper.start()
    try:
        with unharmed(made):
            outcome = train_here(capfd, *words, "--mirror", made.mirror)
    finally:
        keeper.release("the end of this test")
    refused(outcome, REFUSED, "tiny: is being trained on gpu-7 (process 4242, epoch 2", "stop that one first")
    assert made.head.writer.epoch == 2
    nothing_trained(here)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return b""


def altered(data: bytes) -> bytes:
    assert b'"step":4' in data
    return data.replace(b'"step":4', b'"step":5')


def newer(data: bytes) -> bytes:
    return json.dumps({**json.loads(data), "schema_version": 99}).encode()


def another_kind(data: bytes) -> bytes:
    return b'{"schema_version": 1, "kind": "corpus"}'


def nonsense(data: bytes) -> bytes:
    return b"\xff\x00<html>"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "not the head of a mirrored run"),
        pytest.param(emptied, "not the head of a mirrored run", marks=pytest.mark.slow),
        (altered, "not the head of a mirrored run (its hash is another)"),
        pytest.param(another_kind, "not the head of a mirrored run (kind 'corpus')", marks=pytest.mark.slow),
        pytest.param(nonsense, "not the head of a mirrored run", marks=pytest.mark.slow),
        (newer, "schema version 99, this x1 reads up to 1; update x1"),
    ],
)
def test_a_head_that_can_not_be_read(
    spoil: Callable[[bytes], bytes],
    said: str,
    made: Made,
    words: list[str | Path],
    here: Path,
    capfd: Capture,
) -> None:
    made.head_file.write_bytes(spoil(made.head_file.read_bytes()))
    before = contents(made.mirror)
    outcome = train_here(capfd, *words, "--mirror", made.mirror)
    refused(outcome, REFUSED, f"{made.mirror}/tiny/head.json", said)
    assert contents(made.mirror) == before
    nothing_trained(here)


def test_no_corpus_here_and_none_there(made: Made, tmp_path: Path, here: Path, capfd: Capture) -> None:
    words = ["--config", made.config, "--data-dir", tmp_path / "gone", "--run-dir", here]
    with unharmed(made):
        outcome = train_here(capfd, *words, "--mirror", made.mirror)
    assert outcome.code in (MISTAKE, REFUSED)
    refused(outcome, outcome.code, str(tmp_path / "gone"))
    assert not (tmp_path / "gone").exists()


def test_another_corpus(made: Made, tmp_path: Path, here: Path, capfd: Capture) -> None:
    from tests.corpora import write_corpus

    words = ["--config", made.config, "--data-dir", write_corpus(tmp_path / "other", seed=5)]
    with unharmed(made):
        outcome = train_here(capfd, *words, "--run-dir", here, "--mirror", made.mirror)
    refused(outcome, REFUSED, f"{made.mirror}/tiny")
    nothing_trained(here)
