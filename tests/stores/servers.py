"""Stores for any test to use: an S3 server, an empty bucket for each test, a proxy that breaks it, a Hub.

def test_x(s3):                # s3.url, s3.bucket, s3.env (already in os.environ); s3.keys(), s3.get(key)
def test_y(s3, proxy):         # AWS_ENDPOINT_URL leads through the proxy; s3 still looks past it
    proxy.add("503", on="PUT", path="head.json", times=2)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import close_session

from tests.stores.hub import Hub, serving_hub
from tests.stores.proxy import FaultyProxy
from tests.stores.s3 import Bucket, serving
from x1_pretrain.mirror import patience


@pytest.fixture(autouse=True)
def _asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is asked for as often as ever, without the minute that this takes."""
    monkeypatch.setattr(patience, "AGAIN_S", tuple(0.002 for _ in patience.AGAIN_S))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    bucket = Bucket(s3_server)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in bucket.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")  # never this machine's own credentials
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    yield bucket
    bucket.close()


@pytest.fixture
def proxy(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.url) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    with serving_hub() as running:
        yield running


@pytest.fixture
def hub(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for state in (hub_server.repos, hub_server.blobs, hub_server.requests, hub_server.parts):
        state.clear()
    hub_server.part_bytes = hub_server.commits_left = None
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    yield hub_server
    close_session()
