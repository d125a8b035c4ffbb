"""How long a run takes to go on on a machine that has nothing of it: hardly longer than its bytes need."""

from __future__ import annotations

import shutil
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import psutil
import pytest

from tests.corpora import write_config
from tests.end_to_end.processes import Training, last_step, wait_until
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket, serving_apart
from x1_pretrain.mirror.head import Published
from x1_pretrain.mirror.heads import look
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.opened import open_store

LINK = 20e6  # bytes a second, of the store's side: all connections together
RANGE = 8 << 20


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A model of 20 million weights, so a checkpoint of 240 MB, whose steps are short nevertheless."""
    return write_config(
        tmp_path / "tiny.yaml",
        model={"layers": 4, "d_model": 384, "heads": 6, "kv_heads": 2, "d_ff": 4096, "context": 32},
        training={"total_steps": 100_000, "batch_tokens": 64, "micro_batch": 2},
        checkpoint={"every": 50_000},
        evaluation={"every": 50_000, "tokens": 64, "prompts": ["the cat"], "sample_tokens": 2},
        mirror={"every_s": 1.0, "stale_s": 10.0},
    )


def first_step_s(step: int, run: Path, *words: str | Path) -> float:
    """From the command to the first step after `step`, in seconds; then it is killed."""
    began = time.perf_counter()
    training = Training("--run-dir", run, *words)
    while last_step(run) <= step:
        assert training.process.poll() is None, training.end()[1]
        assert time.perf_counter() - began < 180, "nothing happened in time"
        time.sleep(0.01)
    took = time.perf_counter() - began
    training.kill()
    for process in psutil.process_iter(["cmdline"]):  # its mirror lives in a session of its own
        if str(run) in (process.info["cmdline"] or []):
            process.kill()
            process.wait(10)
    return took


def stored(url: str, bucket: Bucket) -> tuple[int, Published]:
    """The newest checkpoint that is in the mirror."""
    store = open_store(parse(f"s3://{bucket.bucket}/runs"), url)
    try:
        found = look(store, "tiny")
        assert found is not None
        newest = found[0].newest()
        assert newest is not None
        return newest.step, newest
    finally:
        store.close()


def raw_rate(url: str, bucket: Bucket, one: Published) -> float:
    """Bytes a second that the store gives for the files of a checkpoint: read in the same ranges, by as many
    lanes, by the library alone, and thrown away."""
    raw = obstore.store.S3Store(bucket.bucket, endpoint=url, client_options={"allow_http": True})
    sizes = bucket.sizes(f"runs/tiny/{one.path}/")
    spans = [(key, at, min(at + RANGE, size)) for key, size in sizes.items() for at in range(0, size, RANGE)]
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        got = sum(pool.map(lambda x: len(obstore.get_range(raw, x[0], start=x[1], end=x[2])), spans))
    assert got == sum(sizes.values()) >= one.bytes
    return got / (time.perf_counter() - began)


@pytest.mark.slow
def test_from_an_empty_folder_to_the_first_step(
    tmp_path: Path, config: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1.3 times what the store needs for the bytes, and an ordinary start for the rest."""
    with serving_apart() as url, FaultyProxy(url) as proxy:
        bucket = Bucket(url)
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        words: list[str | Path] = ["--config", config, "--data-dir", corpus]
        mirrored: list[str | Path] = [*words, "--mirror", f"s3://{bucket.bucket}/runs"]
        made = Training("--run-dir", tmp_path / "made", *mirrored)
        wait_until(lambda: last_step(tmp_path / "made") >= 5, made.process, 180)
        made.send(signal.SIGTERM)  # it saves, and its mirror sends that
        code, output = made.end(180)
        assert code == 75, output
        step, one = stored(url, bucket)
        assert step == last_step(tmp_path / "made")
        assert one.bytes > 200e6

        ordinary = []
        for number in range(2):
            copy = tmp_path / f"ordinary-{number}"
            shutil.copytree(tmp_path / "made", copy, symlinks=True)
            ordinary.append(first_step_s(step, copy, *words))
            shutil.rmtree(copy)
        shutil.rmtree(tmp_path / "made")

        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.add("slow", bytes_per_s=LINK)
        rate = raw_rate(proxy.url, bucket, one)
        sent = proxy.sent_bytes
        took = first_step_s(step, tmp_path / "new", *mirrored)
        sent = proxy.sent_bytes - sent
    shutil.rmtree(tmp_path / "new")
    start = statistics.median(ordinary)
    ratio = took / (one.bytes / rate + start)
    print(
        f"{one.bytes / 1e6:.0f} MB ({sent / 1e6:.0f} came) at {rate / 1e6:.1f} MB/s: "
        f"{one.bytes / rate:.1f} s; ordinary starts {', '.join(f'{s:.1f}' for s in ordinary)} s; "
        f"from nothing to the first step {took:.1f} s, {ratio:.2f} times their sum"
    )
    assert ratio <= 1.3
