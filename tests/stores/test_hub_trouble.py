"""HubStore where something is wrong: tokens, limits, lost answers, broken uploads, a silent Hub."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import get_session

from tests.stores.hub import LARGE, RUNS, Hub, opened
from tests.stores.proxy import FaultyProxy
from x1_pretrain.stores.address import parse
from x1_pretrain.stores.hub_store import HubStore
from x1_pretrain.stores.store import DeniedError, UnreachableError


@pytest.fixture
def store(hub: Hub) -> HubStore:
    hub.new(RUNS)
    return opened(hub)


def test_what_the_caller_raises_is_raised_and_nothing_is_stored(store: HubStore, hub: Hub) -> None:
    def pieces() -> Iterator[bytes]:
        yield LARGE
        raise FileNotFoundError("vanished")

    with pytest.raises(FileNotFoundError, match="vanished"):
        store.put_stream("large", pieces(), 2 * len(LARGE))
    for size in (1, len(LARGE) - 1, len(LARGE) + 1, 2):
        with pytest.raises(UnreachableError, match="not stored"):
            store.put_stream("large", [LARGE], size)
    store.close()
    assert hub.files() == {}


def test_no_room_for_the_copy_that_is_sent(store: HubStore, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w+b", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda prefix: full)
        with pytest.raises(DeniedError, match=r"No space left on device.*TMPDIR"):
            store.put_stream("large", [LARGE], len(LARGE))


@pytest.mark.parametrize(
    ("token", "said"),
    [("", "set HF_TOKEN"), ("made-up", "does not accept this token"), ("reader", "right to write")],
)
def test_tokens(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, said: str) -> None:
    hub.new(RUNS, private=True)
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: None)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DeniedError, match=said) as caught:
        opened(hub).create("run/head.json", b"{}")
    assert "made-up" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_somebody_elses_name_space(hub: Hub) -> None:
    with pytest.raises(DeniedError, match=r"hf://usre/runs.*right to write"):
        opened(hub, "hf://usre/runs").create("run/head.json", b"{}")


def test_offline_mode_is_respected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DeniedError, match="HF_HUB_OFFLINE"):
        opened(hub)


def test_out_of_commits_is_said_at_once_and_nothing_is_lost(store: HubStore, hub: Hub) -> None:
    hub.commits_left = 0
    store.put("run/rows", b"rows")
    with pytest.raises(UnreachableError, match="rate limit is reached; it asks to wait 1800 s"):
        store.create("run/head.json", b"{}")
    hub.commits_left = None
    store.create("run/head.json", b"{}")
    assert hub.files() == {"run/rows": b"rows", "run/head.json": b"{}"}


def test_a_part_of_a_large_file_is_not_the_whole_of_it(
    store: HubStore, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several lanes would hold all of it in memory."""
    store.put_stream("large", [LARGE], len(LARGE))
    store.close()
    monkeypatch.setattr(hub, "ranges", False)
    assert store.read("large", 5, len(LARGE) - 5) == LARGE[5:-5]
    with pytest.raises(DeniedError, match=r"runs/large: the whole of it was sent for a part"):
        store.read("large", 5, 1000)


def test_a_second_mirror_leaves_the_requests_of_the_first_alone(store: HubStore, hub: Hub) -> None:
    session = get_session()
    opened(hub)
    assert get_session() is session
    opened(hub, timeout_s=7.0)
    assert get_session() is not session


def test_a_short_rate_limit_is_waited_for(store: HubStore, hub: Hub) -> None:
    store.create("run/head.json", b"{}")
    with FaultyProxy(hub.url) as proxy:
        proxy.add("429", times=1, retry_after=0.1)
        assert HubStore(parse("hf://user/runs"), proxy.url, 1).get("run/head.json")[0] == b"{}"


def test_a_long_rate_limit_is_not(store: HubStore, hub: Hub) -> None:
    before = time.monotonic()
    with FaultyProxy(hub.url) as proxy:
        proxy.add("429", times=1, retry_after=25)
        with pytest.raises(UnreachableError, match="asks to wait 25 s"):
            HubStore(parse("hf://user/runs"), proxy.url, 1).stat("run/head.json")
    assert time.monotonic() - before < 15


def test_a_commit_whose_answer_got_lost(hub: Hub) -> None:
    hub.new(RUNS)
    with FaultyProxy(hub.url) as proxy:
        store = HubStore(parse("hf://user/runs"), proxy.url, 1)
        store.put_stream("large", [LARGE], len(LARGE))
        proxy.add("cut", path="/commit/", done=True, times=1)
        etag = store.create("run/head.json", b"1")
        assert hub.files() == {"large": LARGE, "run/head.json": b"1"}
        proxy.add("cut", path="/commit/", times=1)  # and one that was not done
        second = store.swap("run/head.json", b"2", etag)
        assert second == store.stat("run/head.json").etag != etag
        assert hub.files()["run/head.json"] == b"2"
        store.close()


def test_an_upload_that_broke_is_sent_whole_the_next_time(hub: Hub) -> None:
    hub.new(RUNS)
    with FaultyProxy(hub.url) as proxy:
        store = HubStore(parse("hf://user/runs"), proxy.url, 1)
        proxy.add("cut_upload", on="PUT", times=1)
        store.put_stream("large", [LARGE], len(LARGE))
        proxy.add("cut_upload", on="PUT", times=1)
        store.put("small.safetensors", LARGE[:1000])  # small, and the Hub wants it as a large one
        with pytest.raises(UnreachableError):
            store.close()
        store.close()
        assert hub.files() == {"large": LARGE, "small.safetensors": LARGE[:1000]}


def test_a_hub_that_never_answers_is_given_up(hub: Hub) -> None:
    """The library asks some of its questions without a limit of time."""
    hub.new(RUNS)
    with FaultyProxy(hub.url) as proxy:
        store = HubStore(parse("hf://user/runs"), proxy.url, 0, timeout_s=0.2)
        proxy.add("timeout")
        before = time.monotonic()
        for ask in (store.names, lambda: store.stat("a"), lambda: store.create("a", b"")):
            with pytest.raises(UnreachableError, match="did not answer in time"):
                ask()
        assert time.monotonic() - before < 30


def test_the_clock_is_the_hubs(hub: Hub) -> None:
    hub.new(RUNS)
    with FaultyProxy(hub.url) as proxy:
        proxy.add("skew", by_s=-3600)
        now = HubStore(parse("hf://user/runs"), proxy.url, 1).now()
    assert now is not None
    assert abs((datetime.now(UTC) - now).total_seconds() - 3600) < 5
