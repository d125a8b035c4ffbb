"""One HTTP API asked with manners, over real sockets."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from decimal import Decimal

import pytest
from tests.money.providers.answers import (
    KEY,
    TOKEN,
    Reply,
    Server,
    WaitingClock,
    broken,
    discreet,
    refused_port,
    serving,
)

from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers import web
from x1_pretrain.money.providers.base import (
    DeniedError,
    NoCapacityError,
    ProviderError,
    UnknownOutcomeError,
    UnreachableError,
)
from x1_pretrain.money.providers.reading import amount, price, safe_id
from x1_pretrain.money.providers.web import AnswerError, MissingError, Web

BODY = {"jupyter_token": TOKEN, "title": f"Title {KEY}", "detail": TOKEN, "status": 500, "note": "x" * 500}
SAID = json.dumps(BODY).encode()
OK = Reply(200, {"price": 1.19})


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    return running.fresh()


@pytest.fixture
def clock() -> WaitingClock:
    return WaitingClock()


@pytest.fixture
def refused() -> Iterator[str]:
    with refused_port() as url:
        yield url


@pytest.fixture
def quick_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "READ_S", 0.3)
    monkeypatch.setattr(web, "CONNECT_S", 0.2)


def opened(url: str, clock: Clock, **more: float) -> Web:
    return Web("Testcloud", url, KEY, clock, key_variable="TEST_KEY", **more)


# ------------------------------------------------------------------------------------------------------------
# What is worth another try, and what it waits


@pytest.mark.parametrize(
    ("first", "least_s", "most_s"),
    [
        pytest.param(Reply(500, SAID), 0.2, 0.6, id="500"),
        pytest.param(Reply(503, SAID, {"Retry-After": "9"}), 9, 9.1, id="503 with seconds"),
        pytest.param(Reply(429, SAID, {"Retry-After": "7"}), 7, 7.1, id="429 with seconds"),
        pytest.param(
            Reply(429, SAID, {"RateLimit": '"minute";r=0;t=12, "hour";r=2800;t=1812'}), 12, 12.1, id="quota"
        ),
        pytest.param(
            # Ten years off: only the difference between the provider's own two times counts.
            Reply(
                429,
                SAID,
                {
                    "Date": "Sat, 21 Nov 2016 10:00:00 GMT",
                    "Retry-After": "Sat, 21 Nov 2016 10:00:20 GMT",
                },
            ),
            20,
            20.1,
            id="429 with a date",
        ),
        pytest.param(Reply(429, SAID, {"Retry-After": "soon"}), 0.2, 0.6, id="429 with nonsense"),
        pytest.param(broken(b'{"half": '), 0.2, 0.6, id="half a JSON"),
        pytest.param(broken(b"<html>maintenance</html>"), 0.2, 0.6, id="HTML"),
        pytest.param(broken(b""), 0.2, 0.6, id="empty"),
        pytest.param(broken(b"\xff\xfe\x00"), 0.2, 0.6, id="no text"),
        pytest.param(broken(b"[" * 200_000), 0.2, 0.6, id="bottomless"),
        pytest.param(broken(b'{"a": 1e99999999999999999999}'), 0.2, 0.6, id="a number beyond all numbers"),
        pytest.param(Reply(200, b'{"a": 1}', then="break"), 0.2, 0.6, id="broken off"),
        pytest.param(Reply(200, None, then="hang"), 0.2, 0.6, id="closed without an answer"),
        pytest.param(broken(b"no gzip", headers={"Content-Encoding": "gzip"}), 0.2, 0.6, id="bad gzip"),
    ],
)
def test_a_read_is_asked_again(
    server: Server, clock: WaitingClock, first: Reply, least_s: float, most_s: float
) -> None:
    server.plays(first, OK)
    assert opened(server.url, clock).read("prices") == {"price": Decimal("1.19")}
    assert len(server.asked) == 2
    assert least_s <= sum(clock.slept) <= most_s


@pytest.mark.parametrize("reply", [Reply(500, SAID), broken(b"<html>"), Reply(429, SAID)])
def test_patience_ends(server: Server, clock: WaitingClock, reply: Reply) -> None:
    server.plays(reply)
    with pytest.raises(UnreachableError) as raised:
        opened(server.url, clock).read("prices")
    assert 30 < sum(clock.slept) <= 60
    assert 5 <= len(server.asked) <= 15
    assert f"asked {len(server.asked)} times" in discreet(raised.value)


def test_waits_are_jittered(server: Server) -> None:
    server.plays(Reply(500, SAID))
    waits = []
    for _ in range(2):
        clock = WaitingClock()
        with pytest.raises(UnreachableError):
            opened(server.url, clock).read("prices")
        waits.append(clock.slept[:5])
    assert waits[0] != waits[1]


def test_a_wait_longer_than_patience_is_not_begun(server: Server, clock: WaitingClock) -> None:
    server.plays(Reply(429, SAID, {"Retry-After": "3600"}))
    with pytest.raises(UnreachableError, match="asks to wait 3600 s"):
        opened(server.url, clock).read("prices")
    assert len(server.asked) == 1
    assert clock.slept == []


def test_nobody_listens(refused: str, clock: WaitingClock) -> None:
    with pytest.raises(UnreachableError, match="Connection refused") as raised:
        opened(refused, clock).read("prices")
    discreet(raised.value)
    assert sum(clock.slept) <= 60


@pytest.mark.usefixtures("quick_sockets")
def test_a_read_times_out_and_is_asked_again(server: Server, clock: WaitingClock) -> None:
    server.plays(Reply(200, {"late": 1}, delay_s=0.45), OK)
    assert opened(server.url, clock).read("prices") == {"price": Decimal("1.19")}
    assert len(server.asked) >= 2


@pytest.mark.usefixtures("quick_sockets")
def test_a_body_that_trickles_does_not_hold_the_watcher(server: Server, clock: WaitingClock) -> None:
    """Each byte comes before the socket's timeout, so only the whole answer can be too slow."""
    server.plays(Reply(200, b"[" + b" " * 600, then="trickle"), OK)
    began = time.monotonic()
    assert opened(server.url, clock).read("prices") == {"price": Decimal("1.19")}
    assert time.monotonic() - began < 15  # all of it would take 30 s


def test_an_endless_body_is_left(
    server: Server, clock: WaitingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "LARGEST_BYTES", 1000)
    server.plays(Reply(200, {"a": "x" * 2000}), OK)
    assert opened(server.url, clock).read("prices") == {"price": Decimal("1.19")}


def test_a_rehearsal_leaves_sockets_their_time(server: Server) -> None:
    """At 1000 times the speed three slow answers take 600 s of the clock, which is no reason to give up."""
    server.plays(
        Reply(500, SAID, delay_s=0.2), Reply(500, SAID, delay_s=0.2), Reply(200, {"a": 1}, delay_s=0.2)
    )
    assert opened(server.url, Clock(speed=1000.0, anchor_s=time.time())).read("prices") == {"a": 1}


def test_requests_are_spaced(server: Server, clock: WaitingClock) -> None:
    server.plays(OK)
    asking = opened(server.url, clock, spacing_s=1.0, launch_spacing_s=12.0)
    for _ in range(3):
        asking.read("prices")
    assert sum(clock.slept) == pytest.approx(2.0, abs=0.2)
    asking.launch("machines", {})
    asking.launch("machines", {})
    assert sum(clock.slept) == pytest.approx(15.0, abs=0.3)


def test_a_quota_used_up_is_waited_for_before_the_next(server: Server, clock: WaitingClock) -> None:
    server.plays(Reply(200, {}, {"RateLimit": '"minute";r=0;t=5, "hour";r=10;t=900'}), OK)
    asking = opened(server.url, clock)
    asking.read("prices")
    assert clock.slept == []
    asking.read("prices")
    assert sum(clock.slept) == pytest.approx(5.0, abs=0.2)


def test_an_hour_without_quota_does_not_hold_back_an_end(server: Server, clock: WaitingClock) -> None:
    server.plays(Reply(200, {}, {"RateLimit": '"hour";r=0;t=1800'}), Reply(204))
    asking = opened(server.url, clock)
    asking.read("prices")
    assert asking.ask("DELETE", "pods/a") is None
    assert clock.slept == []


# ------------------------------------------------------------------------------------------------------------
# What is not worth another try


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (
            Reply(401, {"error": {"code": "global/invalid-api-key"}}),
            DeniedError,
            "401, global/invalid-api-key",
        ),
        (Reply(401, SAID), DeniedError, "check TEST_KEY"),
        (Reply(403, {"title": "Forbidden", "status": 403, "detail": TOKEN}), DeniedError, "403, Forbidden"),
        (Reply(403, b"<html>" + TOKEN.encode()), DeniedError, "403"),
        (Reply(402, {"title": "Payment Required", "status": 402}), AnswerError, "top it up"),
        (
            Reply(400, {"error": {"code": "global/invalid-parameters"}}),
            AnswerError,
            "global/invalid-parameters",
        ),
        (Reply(410, SAID), AnswerError, "retired"),
        (Reply(404, SAID), MissingError, "not there"),
        (Reply(404, {"error": {"code": "global/object-does-not-exist"}}), MissingError, "not there"),
        (Reply(422, {"title": "Unprocessable Entity", "errors": [TOKEN]}), AnswerError, "does not fit"),
    ],
)
def test_a_plain_no_is_asked_once(
    server: Server,
    clock: WaitingClock,
    caplog: pytest.LogCaptureFixture,
    reply: Reply,
    kind: type[ProviderError],
    words: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.plays(reply)
    with pytest.raises(ProviderError) as raised:
        opened(server.url, clock).read("prices")
    assert type(raised.value) is kind
    assert words in discreet(raised.value, caplog.text)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body", [b"<html>no such page</html>", b"", b"{}", b'{"error": {"code": "global/not-found"}}']
)
def test_a_404_of_some_other_server_is_not_a_machine_that_is_gone(
    server: Server, clock: WaitingClock, body: bytes
) -> None:
    """A mistyped address answers 404 too, and must not confirm an end."""
    server.plays(Reply(404, body))
    with pytest.raises(AnswerError) as raised:
        opened(server.url, clock).read("pods/a")
    assert not isinstance(raised.value, MissingError)


def test_a_redirect_is_not_followed(server: Server, clock: WaitingClock) -> None:
    with serving() as elsewhere:
        elsewhere.plays(OK)
        server.plays(Reply(301, b"", {"Location": f"{elsewhere.url}/prices"}))
        with pytest.raises(ProviderError, match="redirected") as raised:
            opened(server.url, clock).read("prices")
        discreet(raised.value)
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    "code", [KEY, f"a {KEY}", "x" * 25, "two\nlines", "a" * 10 + " b" * 40, "rpa_ABC", 7, None, {"a": 1}]
)
def test_only_short_plain_codes_are_repeated(server: Server, clock: WaitingClock, code: object) -> None:
    server.plays(Reply(400, {"error": {"code": code, "message": TOKEN}}))
    with pytest.raises(AnswerError) as raised:
        opened(server.url, clock).read("prices")
    assert "refused (400):" in discreet(raised.value)


def test_a_key_that_could_be_a_code_is_not_repeated(server: Server, clock: WaitingClock) -> None:
    key = "0123abcd4567"
    server.plays(Reply(400, {"error": {"code": f"bad key {key}"}}))
    with pytest.raises(AnswerError) as raised:
        Web("Testcloud", server.url, key, clock, key_variable="TEST_KEY").read("prices")
    assert key not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------
# A launch


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (Reply(500, SAID), UnknownOutcomeError, "answered 500"),
        (Reply(502, b"<html>"), UnknownOutcomeError, "answered 502"),
        (Reply(408, SAID), UnknownOutcomeError, "answered 408"),
        (Reply(303, b"", {"Location": "/pods/1"}), UnknownOutcomeError, "answered 303"),
        (Reply(200, b'{"data": '), UnknownOutcomeError, "whole JSON"),
        (Reply(201, b""), UnknownOutcomeError, "whole JSON"),
        (Reply(200, b"<html>"), UnknownOutcomeError, "whole JSON"),
        (Reply(200, b'{"a": 1}', then="break"), UnknownOutcomeError, "whole JSON"),
        (Reply(200, None, then="hang"), UnknownOutcomeError, "connection broke"),
        (Reply(429, SAID, {"Retry-After": "12"}), UnreachableError, "nothing was launched: wait 12 s"),
        (Reply(401, SAID), DeniedError, "check TEST_KEY"),
        (Reply(402, SAID), AnswerError, "top it up"),
        (Reply(400, SAID, then="break"), AnswerError, "refused"),
        (Reply(422, SAID), AnswerError, "does not fit"),
        (
            Reply(400, {"error": {"code": "instance-operations/launch/insufficient-capacity"}}),
            NoCapacityError,
            "nothing of this kind is free",
        ),
        (
            Reply(
                400, {"title": "Bad Request", "status": 400, "detail": "There are no longer any instances"}
            ),
            NoCapacityError,
            "nothing of this kind is free",
        ),
        (
            Reply(400, {"title": "Bad Request", "status": 400, "detail": "capacity", "errors": ["disk"]}),
            AnswerError,
            "Bad Request",
        ),
    ],
)
def test_a_launch_is_sent_once(
    server: Server,
    clock: WaitingClock,
    caplog: pytest.LogCaptureFixture,
    reply: Reply,
    kind: type[ProviderError],
    words: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.plays(reply, Reply(200, {"id": "second"}))
    with pytest.raises(ProviderError) as raised:
        opened(server.url, clock).launch("machines", {"name": "x1"})
    assert type(raised.value) is kind
    assert words in discreet(raised.value, caplog.text)
    time.sleep(0.02)
    assert len(server.asked) == 1
    assert clock.slept == []


@pytest.mark.usefixtures("quick_sockets")
def test_a_launch_that_was_carried_out_and_not_answered(server: Server, clock: WaitingClock) -> None:
    server.plays(Reply(200, {"id": "a"}, delay_s=0.45))
    with pytest.raises(UnknownOutcomeError, match="look for its tag") as raised:
        opened(server.url, clock).launch("machines", {})
    discreet(raised.value)
    time.sleep(0.2)
    assert len(server.asked) == 1


def test_a_launch_that_never_left_is_clean(refused: str, clock: WaitingClock) -> None:
    with pytest.raises(UnreachableError, match="nothing was launched") as raised:
        opened(refused, clock).launch("machines", {})
    discreet(raised.value)


def test_what_is_sent(server: Server, clock: WaitingClock) -> None:
    server.plays(Reply(200, {"id": "a"}))
    assert opened(f"{server.url}/v9/", clock).launch("machines", {"name": "x1"}) == {"id": "a"}
    asked = server.asked[0]
    assert (asked.method, asked.path, asked.body) == ("POST", "/v9/machines", {"name": "x1"})
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["user-agent"].startswith("x1/")


def test_no_proxy_between_this_machine_and_itself(
    refused: str, server: Server, clock: WaitingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, refused)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.plays(OK)
    assert opened(server.url, clock).read("prices") == {"price": Decimal("1.19")}


# ------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("answer", [[], [1], "text", 7, None, True])
def test_an_answer_of_another_shape_is_no_answer(server: Server, clock: WaitingClock, answer: object) -> None:
    server.plays(broken(answer))
    with pytest.raises(UnreachableError, match="expected an object"):
        opened(server.url, clock).record("prices")


@pytest.mark.parametrize("found", [None, {}, "text", [1], [{}, None], [[]]])
def test_one_bad_entry_spoils_a_list(server: Server, clock: WaitingClock, found: object) -> None:
    """It may be a machine that bills."""
    server.plays(broken({"data": found, "token": TOKEN}))
    with pytest.raises(UnreachableError) as raised:
        opened(server.url, clock).records("instances", "data")
    discreet(raised.value)


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (b"1.19", Decimal("1.19")),
        (b"149", Decimal(149)),
        (b'"0.74"', Decimal("0.74")),
        (b"0", None),
        (b"0.0", None),
        (b"-1", None),
        (b"null", None),
        (b"true", None),
        (b"NaN", None),
        (b"Infinity", None),
        (b"-Infinity", None),
        (b"1e300", None),
        (b'"NaN"', None),
        (b'"free"', None),
        (b"[]", None),
        (b"{}", None),
    ],
)
def test_prices(server: Server, clock: WaitingClock, sent: bytes, read: Decimal | None) -> None:
    server.plays(broken(b'{"price": ' + sent + b"}"))
    assert price(opened(server.url, clock).record("prices")["price"]) == read


def test_an_amount_may_be_nothing_or_less() -> None:
    assert amount(0) == 0
    assert amount(Decimal("-1.5")) == Decimal("-1.5")
    assert amount(1.5) is None  # a float got past the parser: no money is a float


@pytest.mark.parametrize("crooked", ["", "..", "../pods", "a/b", "a?b", "a b", "a\n", "ä", "a" * 129])
def test_an_id_is_a_name_and_no_path(crooked: str) -> None:
    with pytest.raises(UserError, match="no machine's id"):
        safe_id(crooked)
