"""This machine at a stated rate, and providers by their names."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from tests.money.providers.answers import KEY, Reply, WaitingClock, serving

from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.base import LaunchRequest, Offer, ProviderError, Status
from x1_pretrain.money.providers.local import MACHINE_ID, Local
from x1_pretrain.money.providers.opened import NAMES, open_provider

RATE = Decimal("0.08")


def test_the_one_machine_there_is() -> None:
    local = Local(RATE, Clock())
    [offer] = local.offers("a100-80gb", 2)
    assert (offer.gpu, offer.gpu_count, offer.usd_per_hr, offer.available) == ("A100 80GB", 2, RATE, True)
    [machine] = local.machines()
    assert machine.id == MACHINE_ID
    assert local.machine("pod1") is None
    assert (machine.status, machine.usd_per_hr) == (Status.RUNNING, RATE)
    local.terminate(machine.id)
    assert local.machine(machine.id)
    assert local.disks() == []
    assert local.balance_usd() is local.billed_usd(machine.id, datetime.now(UTC)) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux tells when it booted")
def test_it_is_up_since_it_booted() -> None:
    booted_s = next(
        int(line.split()[1])
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith("btime")
    )
    started = Local(RATE, Clock()).machines()[0].started
    assert started
    assert abs(started - datetime.fromtimestamp(booted_s, UTC)) < timedelta(seconds=60)


@pytest.mark.parametrize(("gpu", "label"), [("cpu", "CPU"), ("GTX 1080", "GTX 1080"), ("H100", "H100 SXM")])
def test_a_gpu_at_home_may_be_any(gpu: str, label: str) -> None:
    assert Local(RATE, Clock()).offers(gpu, 1)[0].gpu == label


def test_it_is_not_launched() -> None:
    offer = Offer("local", MACHINE_ID, "CPU", 0, RATE, "own", True)
    with pytest.raises(ProviderError, match="x1 supervise"):
        Local(RATE, Clock()).launch(LaunchRequest(offer, "x1", "true"))


@pytest.mark.parametrize("rate", ["-0.01", "NaN", "Infinity"])
def test_a_rate_is_an_amount(rate: str) -> None:
    with pytest.raises(UserError, match="0 or more"):
        Local(Decimal(rate), Clock())


# ------------------------------------------------------------------------------------------------------------
# By name


@pytest.mark.parametrize(
    ("name", "environment", "words"),
    [
        ("lambda", {}, "LAMBDA_API_KEY is not set: make a key at https://cloud.lambda.ai"),
        (
            "runpod",
            {"RUNPOD_API_KEY": " "},
            "RUNPOD_API_KEY is not set: make a key at https://console.runpod.io",
        ),
        ("runpod", {"RUNPOD_API_KEY": f"{KEY} {KEY}"}, "copy it again"),
        ("runpod", {"RUNPOD_API_KEY": f"{KEY}\x07"}, "copy it again"),
        ("lambda", {"LAMBDA_API_KEY": KEY, "X1_LAMBDA_URL": "http://cloud.example"}, "expected https://"),
        ("lambda", {"LAMBDA_API_KEY": KEY, "X1_LAMBDA_URL": "cloud.example"}, "expected https://"),
        (
            "lambda",
            {"LAMBDA_API_KEY": KEY, "X1_LAMBDA_URL": "http://localhost:1@evil.example"},
            "expected https",
        ),
        ("runpod", {"RUNPOD_API_KEY": KEY, "X1_RUNPOD_URL": "https://[bad"}, "expected https://"),
        ("runpod", {"RUNPOD_API_KEY": KEY, "X1_RUNPOD_GRAPHQL_URL": "ftp://a"}, "expected https://"),
        ("local", {}, "state a rate"),
        ("fake", {}, "x1 fake-provider starts one"),
        ("fake", {"X1_FAKE_URL": "nowhere"}, "X1_FAKE_URL=nowhere"),
        ("aws", {}, "expected lambda, runpod, local, fake"),
    ],
)
def test_what_is_missing_is_named(name: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        open_provider(name, Clock(), environment=environment)
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_name_opens() -> None:
    environment = {"LAMBDA_API_KEY": KEY, "RUNPOD_API_KEY": f" {KEY}\n", "X1_FAKE_URL": "http://fake:9000"}
    opened = [
        open_provider(name, Clock(), rate_usd_per_hr=Decimal(0), environment=environment) for name in NAMES
    ]
    assert tuple(provider.name for provider in opened) == NAMES
    assert [provider.taxed for provider in opened] == [True, False, False, False]
    assert [provider.storage_usd_per_gib_month for provider in opened] == [
        0,
        Decimal("0.10"),
        0,
        Decimal("0.10"),
    ]


@pytest.mark.parametrize(
    ("name", "variable", "tail", "path"),
    [
        ("lambda", "X1_LAMBDA_URL", "/api/v1", "/api/v1/instances"),
        ("runpod", "X1_RUNPOD_URL", "/v2/", "/v2/pods"),
        ("fake", "X1_FAKE_URL", "", "/v2/pods"),
        ("fake", "X1_FAKE_URL", "/runpod/", "/runpod/v2/pods"),
    ],
)
def test_the_address_comes_from_the_environment(name: str, variable: str, tail: str, path: str) -> None:
    with serving() as server:
        server.plays(Reply(200, {"pods": [], "data": []}))
        environment = {"LAMBDA_API_KEY": KEY, "RUNPOD_API_KEY": KEY, variable: server.url + tail}
        assert open_provider(name, WaitingClock(), environment=environment).machines() == []
        assert server.asked[0].path == path
        assert server.asked[0].headers["authorization"] == f"Bearer {'fake' if name == 'fake' else KEY}"


def test_opening_asks_nothing() -> None:
    began = time.monotonic()
    open_provider(
        "lambda", Clock(), environment={"LAMBDA_API_KEY": KEY, "X1_LAMBDA_URL": "https://192.0.2.1"}
    )
    assert time.monotonic() - began < 9  # a connection is waited for 10 s
