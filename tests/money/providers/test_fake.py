"""The fake provider, on real sockets: its answers against the published schemas, its meter against
arithmetic, each fault against what it says, and its machines as processes that really end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import psutil
import pytest
import yaml

from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.fake.faults import KINDS, read_fault, read_faults
from x1_pretrain.money.providers.fake.server import FakeProvider

START = datetime(2026, 11, 21, 12, 58, tzinfo=UTC)
A100 = "NVIDIA A100 80GB PCIe"
POD = {"name": "run-1", "image": "pytorch", "gpu": {"id": A100, "count": 1}, "disk": 100}
BOX = {
    "name": "run-2",
    "region_name": "us-east-1",
    "instance_type_name": "gpu_1x_a10",
    "ssh_key_names": ["fake"],
}
HOUR = Decimal(3600)


class Hands:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now(self) -> datetime:
        return START + timedelta(seconds=self.at_s - 1000.0)

    def steady_s(self) -> float:
        return self.at_s

    def sleep(self, seconds: float) -> None:
        self.at_s += seconds


class Client:
    """Plain requests; whatever is answered must be what the published schema says, where one is at hand."""

    def __init__(self, fake: FakeProvider, specs: dict[str, Any] | None = None) -> None:
        self.fake, self.specs = fake, specs or {}
        self.http = httpx2.Client(headers={"Authorization": "Bearer fake"}, timeout=5)
        self.validated: set[tuple[str, str, int]] = set()

    def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> httpx2.Response:
        answer = self.http.request(method, self.fake.url + path, json=body, **more)
        side = "lambda" if path.startswith("/api/v1") else "runpod"
        if side in self.specs and not path.startswith(("/fake", "/graphql")):
            self._validate(self.specs[side], method.lower(), path.split("?")[0], answer)
        return answer

    def _validate(self, spec: dict[str, Any], method: str, path: str, answer: httpx2.Response) -> None:
        template = next(known for known in spec["paths"] if _fits(known, path))
        responses = spec["paths"][template][method]["responses"]
        told = responses.get(str(answer.status_code)) or responses["default"]
        if "$ref" in told:
            told = spec["components"]["responses"][told["$ref"].rpartition("/")[2]]
        self.validated.add((method, template, answer.status_code))
        if "content" not in told:
            assert answer.content == b""
            return
        [(content_type, content)] = told["content"].items()
        assert answer.headers["Content-Type"] == content_type
        validator = jsonschema.Draft202012Validator({"components": spec["components"], **content["schema"]})
        validator.validate(answer.json())

    def launch(self, **more: Any) -> str:
        return str(self("POST", "/v2/pods", {**POD, **more}).json()["id"])

    def launch_box(self, **more: Any) -> str:
        answer = self("POST", "/api/v1/instance-operations/launch", {**BOX, **more})
        [machine_id] = answer.json()["data"]["instance_ids"]
        return str(machine_id)

    def end_box(self, machine_id: str) -> httpx2.Response:
        return self("POST", "/api/v1/instance-operations/terminate", {"instance_ids": [machine_id]})

    def pods(self) -> dict[str, Any]:
        return {pod["id"]: pod for pod in self("GET", "/v2/pods").json()["pods"]}

    def boxes(self) -> dict[str, Any]:
        return {box["id"]: box for box in self("GET", "/api/v1/instances").json()["data"]}

    def state(self) -> dict[str, Any]:
        return dict(self("GET", "/fake/state").json())

    def bill(self) -> Decimal:
        return Decimal(self.state()["bill_usd"])


def _fits(template: str, path: str) -> bool:
    wanted, given = template.split("/"), path.split("/")
    return len(wanted) == len(given) and all(
        w == g or w.startswith("{") for w, g in zip(wanted, given, strict=True)
    )


@pytest.fixture
def clock() -> Hands:
    return Hands()


@pytest.fixture
def fake(clock: Hands) -> Iterator[FakeProvider]:
    with FakeProvider(clock, boot_s=30, term_s=15) as provider:
        yield provider


@pytest.fixture
def ask(fake: FakeProvider) -> Client:
    return Client(fake)


@pytest.fixture
def specs(shared: Path) -> dict[str, Any]:
    folder = shared / "providers"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    names = {"lambda": "lambda_openapi.json", "runpod": "runpod_v2.json"}
    return {side: json.loads((folder / name).read_text()) for side, name in names.items()}


def until(true: Callable[[], object], within_s: float = 8.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def near(found: Decimal, expected: Decimal) -> bool:
    return abs(found - expected) < Decimal("1e-15")


# --- the two APIs ---------------------------------------------------------------------------------


def test_answers_match_the_published_runpod_schemas(
    fake: FakeProvider, clock: Hands, specs: dict[str, Any]
) -> None:
    ask = Client(fake, specs)
    assert ask("GET", "/v2/catalog/gpus?include=AVAILABILITY&product=POD&count=1").status_code == 200
    assert ask("GET", f"/v2/catalog/gpus/{A100}").status_code == 200
    assert ask("GET", "/v2/catalog/gpus/none").status_code == 404
    assert ask("POST", "/v2/pods", {**POD, "spot": True}).status_code == 422
    assert ask("POST", "/v2/pods", {**POD, "gpu": {"id": "none"}}).status_code == 400
    pod = ask.launch(mounts={"persistent": {"size": 50, "path": "/workspace"}}, env={"SECRET": "s"})
    for seconds, said in ((0, "PROVISIONING"), (16, "STARTING"), (20, "RUNNING")):
        clock.sleep(seconds)
        assert ask("GET", f"/v2/pods/{pod}").json()["status"] == said
        assert ask.pods()[pod]["status"] == said
    act = f"/v2/pods/{pod}/action"
    assert ask("POST", act, {"action": "start"}).status_code == 409
    assert ask("POST", act, {"action": "sing"}).status_code == 422
    stopped = ask("POST", act, {"action": "stop"}).json()
    assert (stopped["status"], stopped["cost"]) == ("EXITED", 0.0)
    clock.sleep(600)
    assert ask("POST", act, {"action": "start"}).json()["status"] == "PROVISIONING"
    for path in ("billing/pods?bucketSize=hour", "billing/pods?lastN=2", "billing", "network-volumes"):
        assert ask("GET", f"/v2/{path}").status_code == 200
    assert ask("DELETE", f"/v2/pods/{pod}").status_code == 204
    clock.sleep(15)
    assert ask("GET", f"/v2/pods/{pod}").status_code == ask("DELETE", f"/v2/pods/{pod}").status_code == 404
    assert ask.pods() == {}
    for kind, status in (("401", 401), ("403", 403), ("429", 429), ("500", 500), ("no_capacity", 400)):
        fake.fault(kind, on="launch")
        assert ask("POST", "/v2/pods", POD).status_code == status
    assert {code for _, _, code in ask.validated} >= {200, 201, 204, 400, 401, 403, 404, 409, 422, 429, 500}


def test_answers_match_the_published_lambda_schemas(
    fake: FakeProvider, clock: Hands, specs: dict[str, Any]
) -> None:
    ask = Client(fake, specs)
    offered = ask("GET", "/api/v1/instance-types").json()["data"]
    assert offered["gpu_1x_a10"]["instance_type"]["price_cents_per_hour"] == 129
    launch = "/api/v1/instance-operations/launch"
    assert ask("POST", launch, {**BOX, "ssh_key_names": []}).status_code == 400
    assert ask("POST", launch, {**BOX, "name": "x" * 65}).status_code == 400
    assert ask("POST", launch, {**BOX, "tags": [{"key": "Bad", "value": ""}]}).status_code == 400
    assert ask("POST", launch, {**BOX, "instance_type_name": "none"}).status_code == 404
    box = ask.launch_box(tags=[{"key": "x1-run", "value": "a"}], quantity=1)  # unknown fields are let pass
    assert ask.boxes()[box]["status"] == "booting"
    assert "jupyter_token" not in ask.boxes()[box]
    clock.sleep(30)
    told = ask("GET", f"/api/v1/instances/{box}").json()["data"]
    assert told["status"] == "active"
    assert told["jupyter_token"]
    for path in ("ssh-keys", "file-systems", "audit-events"):
        assert ask("GET", f"/api/v1/{path}").status_code == 200
    restart = "/api/v1/instance-operations/restart"
    assert ask("POST", restart, {"instance_ids": [box]}).status_code == 200
    assert ask("POST", restart, {"instance_ids": [box]}).status_code == 409
    assert ask.end_box(box).json()["data"]["terminated_instances"][0]["status"] == "terminating"
    assert ask.boxes()[box]["status"] == "terminating"
    clock.sleep(15)
    assert ask.boxes() == {}
    assert ask("GET", f"/api/v1/instances/{box}").status_code == ask.end_box(box).status_code == 404
    assert [e["action"] for e in ask("GET", "/api/v1/audit-events").json()["data"]] == ["launch", "terminate"]
    for kind, status in (("401", 401), ("403", 403), ("no_capacity", 400)):
        fake.fault(kind, on="launch")
        assert ask("POST", launch, BOX).status_code == status
    assert {code for _, _, code in ask.validated} == {200, 400, 401, 403, 404, 409}


PODS: list[dict[str, Any]] = [
    POD,
    {**POD, "env": {"A": "b"}, "ports": ["22/tcp"], "args": "true", "startSsh": True, "cloud": "COMMUNITY"},
    {**POD, "mounts": {"persistent": {"size": 10, "path": "/w"}}},
    {**POD, "interruptible": True},
    {**POD, "name": ""},
    {**POD, "disk": 0},
    {**POD, "disk": "100"},
    {**POD, "cloud": "SPOT"},
    {**POD, "env": {"A": 1}},
    {**POD, "gpu": {"count": 1}},
    {**POD, "gpu": {"id": A100, "count": 0}},
    {**POD, "gpu": {"id": A100, "bid": 1}},
    {**POD, "mounts": {"persistent": {"size": 9, "path": "/w"}}},
    {**POD, "mounts": {"tape": {}}},
    {"name": "no-image", "gpu": {"id": A100}},
]


@pytest.mark.parametrize("body", PODS, ids=range(len(PODS)))
def test_a_pod_request_is_refused_exactly_when_the_schema_refuses_it(
    ask: Client, specs: dict[str, Any], body: dict[str, Any]
) -> None:
    spec = specs["runpod"]
    schema = {"components": spec["components"], "$ref": "#/components/schemas/CreatePodRequest"}
    good = jsonschema.Draft202012Validator(schema).is_valid(body)
    assert ask("POST", "/v2/pods", body).status_code == (201 if good else 422)


def test_a_key_is_needed_and_either_scheme_will_do(fake: FakeProvider) -> None:
    for path in ("/v2/pods", "/api/v1/instances", "/graphql"):
        method = "POST" if path == "/graphql" else "GET"
        assert httpx2.request(method, fake.url + path).status_code == 401
        wrong = {"Authorization": "Bearer other"}
        assert httpx2.request(method, fake.url + path, headers=wrong).status_code == 401
    assert httpx2.get(fake.url + "/api/v1/instances", auth=("fake", "")).status_code == 200


def test_runpod_answers_carry_the_rate_limit(ask: Client) -> None:
    left = [ask("GET", "/v2/pods").headers["RateLimit"] for _ in range(2)]
    assert left == ['"minute";r=5999;t=60', '"minute";r=5998;t=60']


def test_lambda_takes_one_launch_in_twelve_seconds(clock: Hands) -> None:
    with FakeProvider(clock, launch_every_s=12) as fake:
        ask = Client(fake)
        ask.launch_box()
        clock.sleep(5)
        answer = ask("POST", "/api/v1/instance-operations/launch", BOX)
        assert answer.status_code == 429
        clock.sleep(int(answer.headers["Retry-After"]))
        ask.launch_box()
        assert ask.state()["alive"] == 2


def test_a_price_of_your_own_holds_in_both_apis(clock: Hands) -> None:
    with FakeProvider(clock, gpu="A100 80GB", price_usd_per_hr="0.99") as fake:
        ask = Client(fake)
        boards = {g["id"]: g["price"]["secure"] for g in ask("GET", "/v2/catalog/gpus").json()["gpus"]}
        assert (boards[A100], boards["NVIDIA L40S"]) == (0.99, 0.86)
        types = ask("GET", "/api/v1/instance-types").json()["data"]
        cents = {name: item["instance_type"]["price_cents_per_hour"] for name, item in types.items()}
        assert (cents["gpu_8x_a100_80gb_sxm4"], cents["gpu_1x_a10"]) == (792, 129)


# --- the meter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("looks_s", [4800.0, 7.0])
def test_the_meter_is_exact_over_a_price_jump_a_disk_and_a_slow_end(
    fake: FakeProvider, clock: Hands, ask: Client, looks_s: float
) -> None:
    """2 GPUs and 100 GB, +25 % after 600 s, asked to end at 3600, stuck for 600; looked at often or once."""
    fake.fault("price_jump", factor="1.25", after_s=600)
    fake.fault("stuck_terminating", for_s=600)
    pod = ask.launch(gpu={"id": A100, "count": 2})
    for end_s, then in ((3600.0, lambda: ask("DELETE", f"/v2/pods/{pod}")), (4800.0, lambda: None)):
        while (left := 1000.0 + end_s - clock.at_s) > 0:
            clock.sleep(min(looks_s, left))
            fake.world.advance()
        then()
    price, disk = Decimal("2.38"), 100 * Decimal("0.10") / 720
    expected = (price * 600 + price * Decimal("1.25") * 3600 + disk * 4200) / HOUR
    assert near(ask.bill(), expected)
    assert ask.state()["alive"] == 0


def test_lambda_bills_from_running_until_gone(clock: Hands, ask: Client) -> None:
    box = ask.launch_box()
    clock.sleep(30)
    assert ask.bill() == 0
    clock.sleep(1000)
    ask.end_box(box)
    clock.sleep(500)
    assert near(ask.bill(), Decimal("1.29") * (1000 + 15) / HOUR)


def test_a_stopped_pod_bills_its_volume_twice_and_nothing_else(clock: Hands, ask: Client) -> None:
    pod = ask.launch(mounts={"persistent": {"size": 50, "path": "/w"}})
    clock.sleep(60)
    ask("POST", f"/v2/pods/{pod}/action", {"action": "stop"})
    before = ask.bill()
    assert near(before, (Decimal("1.19") + 150 * Decimal("0.10") / 720) * 60 / HOUR)
    clock.sleep(7200)
    assert near(ask.bill() - before, 50 * Decimal("0.20") / 720 * 2)


def test_billing_follows_the_meter_every_five_minutes_in_hours(clock: Hands, ask: Client) -> None:
    """The run begins at 12:58, so its first two minutes are the 12 o'clock hour's."""
    pod = ask.launch()
    path = f"/v2/billing/pods?bucketSize=hour&podId={pod}"
    clock.sleep(100)
    assert ask("GET", path).json()["records"] == []
    clock.sleep(800)  # 13:13
    told = ask("GET", path).json()
    rate = 1.19 + 100 * 0.10 / 720
    hours = {row["startTime"]: row["totalAmount"] for row in told["records"]}
    assert hours == {
        "2026-11-21T12:00:00Z": pytest.approx(rate * 120 / 3600, abs=1e-12),
        "2026-11-21T13:00:00Z": pytest.approx(rate * 600 / 3600, abs=1e-12),  # as of 13:10
    }
    totals = told["metadata"]["totals"]
    assert totals["totalAmount"] == pytest.approx(totals["gpuAmount"] + totals["diskAmount"], abs=1e-12)
    assert totals["gpuAmount"] == pytest.approx(1.19 * 720 / 3600, abs=1e-12)
    balance = ask("POST", "/graphql", {"query": "{ myself { clientBalance } }"}).json()
    assert balance["data"]["myself"]["clientBalance"] == pytest.approx(100 - rate * 720 / 3600, abs=1e-9)
    assert ask("GET", f"{path}&lastN=1").json()["metadata"]["recordCount"] == 1
    assert ask("GET", "/v2/billing/pods?podId=other").json()["records"] == []


def test_graphql_says_what_it_cannot_do_with_status_200(ask: Client) -> None:
    answer = ask("POST", "/graphql", {"query": "mutation { podTerminate }"})
    assert (answer.status_code, list(answer.json())) == (200, ["errors"])


def test_at_balance_zero_all_machines_end_and_not_a_cent_later(clock: Hands) -> None:
    with FakeProvider(clock, balance_usd="5") as fake:
        ask = Client(fake)
        first, second = ask.launch(), ask.launch()
        rate = 2 * (Decimal("1.19") + 100 * Decimal("0.10") / 720)
        clock.sleep(float(5 / rate * 3600) - 1)
        assert set(ask.pods()) == {first, second}
        clock.sleep(10_000)
        assert ask.pods() == {}
        assert 5 <= ask.bill() < Decimal("5.000001")
        assert ask("POST", "/v2/pods", POD).status_code == 402


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v2/pods", "/api/v1/instances"])
@pytest.mark.parametrize("kind", ["401", "403", "429", "500"])
def test_a_refusal_is_given_so_many_times(ask: Client, kind: str, path: str) -> None:
    row = {"kind": kind, "on": "list", "times": 2, "retry_after_s": 7}
    assert ask("POST", "/fake/faults", row).status_code == 200
    answers = [ask("GET", path) for _ in range(3)]
    assert [a.status_code for a in answers] == [int(kind), int(kind), 200]
    assert answers[0].headers.get("Retry-After") == ("7" if kind == "429" else None)
    assert ask.state()["faults"][0]["fired"] == 2


def test_a_fault_keeps_to_its_time_operation_api_and_machine(
    fake: FakeProvider, clock: Hands, ask: Client
) -> None:
    fake.fault("500", on="get", api="runpod", machine="run-1*", after_s=10, for_s=20)
    mine, other, box = ask.launch(name="run-1a"), ask.launch(name="other"), ask.launch_box()

    def statuses() -> list[int]:
        paths = (f"/v2/pods/{mine}", f"/v2/pods/{other}", "/v2/pods", f"/api/v1/instances/{box}")
        return [ask("GET", path).status_code for path in paths]

    seen = []
    for seconds in (0, 9.9, 0.1, 19.9, 0.1):
        clock.sleep(seconds)
        seen.append(statuses())
    assert seen == [[200] * 4] * 2 + [[500, 200, 200, 200]] * 2 + [[200] * 4]


@pytest.mark.parametrize("kind", ["timeout", "timeout_after_create"])
def test_no_answer_to_a_launch_with_and_without_a_machine(fake: FakeProvider, ask: Client, kind: str) -> None:
    fake.fault(kind, on="launch", hold_s=0.2)
    begun = time.monotonic()
    with pytest.raises(httpx2.RemoteProtocolError):  # closed without a word
        ask("POST", "/v2/pods", POD)
    assert time.monotonic() - begun >= 0.2
    made = [pod["name"] for pod in ask.pods().values()]
    assert made == (["run-1"] if kind == "timeout_after_create" else [])


def test_an_error_after_the_machine_was_made(fake: FakeProvider, ask: Client) -> None:
    fake.fault("500_after_create")
    assert ask("POST", "/api/v1/instance-operations/launch", BOX).status_code == 500
    assert len(ask.boxes()) == 1


def test_answers_that_are_not_json(fake: FakeProvider, ask: Client) -> None:
    fake.fault("malformed", on="list")
    broken = ask("GET", "/v2/pods")
    assert broken.status_code == 200
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        broken.json()
    fake.fault("html", on="list")
    page = ask("GET", "/api/v1/instances")
    assert (page.status_code, page.headers["Content-Type"]) == (502, "text/html")


def test_a_slow_answer_is_right_in_the_end(fake: FakeProvider, ask: Client) -> None:
    fake.fault("slow", on="list", hold_s=0.3)
    begun = time.monotonic()
    assert ask("GET", "/v2/pods").json() == {"pods": []}
    assert time.monotonic() - begun >= 0.3


def test_no_capacity_shows_in_the_catalogue_and_at_launch(fake: FakeProvider, ask: Client) -> None:
    fake.fault("no_capacity", machine=A100, times=1)
    fake.fault("no_capacity", machine="gpu_1x_a10", times=1)

    def free() -> tuple[bool, bool, bool]:
        gpus = ask("GET", "/v2/catalog/gpus?include=AVAILABILITY").json()["gpus"]
        levels = {gpu["id"]: gpu["availability"] != "NONE" for gpu in gpus}
        types = ask("GET", "/api/v1/instance-types").json()["data"]
        return (
            levels[A100],
            levels["NVIDIA L40S"],
            bool(types["gpu_1x_a10"]["regions_with_capacity_available"]),
        )

    assert free() == (False, True, False)
    assert ask("POST", "/v2/pods", POD).status_code == 400
    refused = ask("POST", "/api/v1/instance-operations/launch", BOX).json()["error"]["code"]
    assert refused == "instance-operations/launch/insufficient-capacity"
    assert free() == (True, True, True)
    assert ask("POST", "/v2/pods", POD).status_code == 201


def test_launched_but_not_listed_yet(fake: FakeProvider, clock: Hands, ask: Client) -> None:
    fake.fault("not_listed_yet", for_s=45)
    pod = ask.launch()
    clock.sleep(44)
    assert ask.pods() == {}
    assert ask("GET", f"/v2/pods/{pod}").status_code == ask("DELETE", f"/v2/pods/{pod}").status_code == 404
    state = ask.state()
    assert (state["alive"], state["faults"][0]["fired"]) == (1, 1)
    clock.sleep(1)
    assert ask.pods()[pod]["status"] == "RUNNING"


def test_stuck_in_terminating_until_the_fault_is_lifted(
    fake: FakeProvider, clock: Hands, ask: Client
) -> None:
    fake.fault("stuck_terminating")
    box = ask.launch_box()
    clock.sleep(30)
    ask.end_box(box)
    clock.sleep(36_000)
    ask.end_box(box)
    assert ask.boxes()[box]["status"] == "terminating"
    assert near(ask.bill(), Decimal("1.29") * 10)  # and it bills all the while
    ask("DELETE", "/fake/faults")
    clock.sleep(15)
    assert ask.boxes() == {}


def test_terminate_that_is_answered_and_ignored(fake: FakeProvider, clock: Hands, ask: Client) -> None:
    fake.fault("terminate_ignored", times=2)
    pod, box = ask.launch(), ask.launch_box()
    clock.sleep(30)
    assert ask("DELETE", f"/v2/pods/{pod}").status_code == 204
    assert ask.end_box(box).json()["data"]["terminated_instances"][0]["status"] == "terminating"
    clock.sleep(3600)
    assert (ask.pods()[pod]["status"], ask.boxes()[box]["status"]) == ("RUNNING", "active")
    ask("DELETE", f"/v2/pods/{pod}")
    clock.sleep(15)
    assert ask.pods() == {}


def test_a_running_machine_that_is_said_to_cost_nothing(
    fake: FakeProvider, clock: Hands, ask: Client
) -> None:
    pod, box = ask.launch(), ask.launch_box()
    fake.fault("cost_zero", for_s=100)
    assert ask.pods()[pod]["cost"] == 0.0
    assert ask.boxes()[box]["instance_type"]["price_cents_per_hour"] == 0
    clock.sleep(100)
    assert ask.pods()[pod]["cost"] == 1.19
    assert ask.boxes()[box]["instance_type"]["price_cents_per_hour"] == 129
    assert ask.bill() > 100 * Decimal("1.19") / HOUR  # it was charged none the less


def test_a_price_jump_of_the_market_or_of_one_machine(fake: FakeProvider, clock: Hands, ask: Client) -> None:
    first, second, box = ask.launch(), ask.launch(), ask.launch_box()
    clock.sleep(30)
    fake.fault("price_jump", machine=first, factor=2)
    fake.fault("price_jump", factor="1.25", after_s=60)
    clock.sleep(59)
    assert [ask.pods()[pod]["cost"] for pod in (first, second)] == [2.38, 1.19]
    clock.sleep(1)
    assert [ask.pods()[pod]["cost"] for pod in (first, second)] == [2.975, 1.4875]
    assert ask.boxes()[box]["instance_type"]["price_cents_per_hour"] == 162  # 161.25, whole cents
    third = ask.launch()
    assert ask.pods()[third]["cost"] == 1.4875
    assert ask("GET", f"/v2/catalog/gpus/{A100}").json()["price"]["secure"] == 1.4875


@pytest.mark.parametrize(
    ("kind", "pod_says", "box_says"),
    [
        ("preempted", "EXITED", "preempted"),
        ("unhealthy", "ERROR", "unhealthy"),
        ("exited", "EXITED", "active"),
    ],
)
def test_a_machine_is_lost_at_its_moment(clock: Hands, kind: str, pod_says: str, box_says: str) -> None:
    """A scripted file counts from when the machine runs."""
    fault = {"kind": kind, "after_s": 600, "times": 2}
    with FakeProvider(clock, faults=[fault], boot_s=30) as fake:
        ask = Client(fake)
        clock.sleep(1000)
        pod, box = ask.launch(), ask.launch_box()
        clock.sleep(629)
        assert (ask.pods()[pod]["status"], ask.boxes()[box]["status"]) == ("RUNNING", "active")
        clock.sleep(1)
        assert (ask.pods()[pod]["status"], ask.boxes()[box]["status"]) == (pod_says, box_says)
        ask("DELETE", f"/v2/pods/{pod}")
        ask.end_box(box)
        clock.sleep(15)
        assert ask.state()["alive"] == 0


@pytest.mark.parametrize("skew_s", [5400, -5400])
def test_a_clock_that_is_wrong_either_way(fake: FakeProvider, clock: Hands, ask: Client, skew_s: int) -> None:
    fake.fault("clock_skew", skew_s=skew_s)
    pod = ask.launch()
    wrong = START + timedelta(seconds=skew_s)
    assert ask.pods()[pod]["createdAt"] == wrong.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert parsedate_to_datetime(ask("GET", "/v2/pods").headers["Date"]) == wrong
    assert ask.state()["faults"][0]["fired"] > 0


SLIPS: list[Any] = [
    {"kind": "503"},
    {"kind": "429", "time": 2},
    {"kind": "500", "on": "start"},
    {"kind": "500", "after_s": "soon"},
    {"on": "list"},
    "429",
]


def test_every_kind_of_fault_is_read_from_a_file_and_slips_are_refused(tmp_path: Path) -> None:
    rows = [{"kind": kind if not kind.isdigit() else int(kind)} for kind in KINDS]
    (tmp_path / "faults.yaml").write_text(yaml.safe_dump(rows))
    assert [fault.kind for fault in read_faults(tmp_path / "faults.yaml")] == list(KINDS)
    for slip in SLIPS:
        with pytest.raises(UserError):
            read_fault(slip)


def test_a_slip_in_a_posted_fault_is_answered_and_reset_ends_all(fake: FakeProvider, ask: Client) -> None:
    assert ask("POST", "/fake/faults", {"kind": "nothing"}).status_code == 400
    fake.fault("500", times=9)
    fake.world.launch("runpod", "x", A100, gpu_count=1, usd_per_hr=Decimal(1), place="SECURE")
    assert ask("POST", "/fake/reset").json()["alive"] == 0
    assert ask.pods() == {}


# --- machines as processes ------------------------------------------------------------------------

# leaves a daemon in a session of its own, as tmux does, and one that takes no SIGTERM
DAEMONS = """
echo "I am $X1_INSTANCE_ID with $TOKEN"
setsid sleep 600 & echo $! >> pids
(trap '' TERM; echo $BASHPID >> pids; touch up; while true; do sleep 0.1; done) &
"""


def pids(folder: Path) -> list[int]:
    """Once they are all up."""
    until(lambda: list(folder.glob("*/up")))
    return [int(line) for file in folder.glob("*/pids") for line in file.read_text().split()]


def dead(numbers: list[int]) -> bool:
    return not any(
        psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE for n in numbers
    )


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[FakeProvider]:
    """60 times as fast as outside: it boots in a fifth of a second."""
    clock = Clock(speed=60, anchor_s=time.time())
    with FakeProvider(clock, boot_s=12, term_s=18, grace_s=15, run_in=tmp_path / "machines") as provider:
        yield provider


def test_a_pod_runs_and_is_really_dead_after_terminate(rehearsal: FakeProvider, tmp_path: Path) -> None:
    ask = Client(rehearsal)
    begun = time.monotonic()
    pod = ask.launch(args=DAEMONS + "sleep 600", env={"TOKEN": "t0k"})
    until(lambda: ask.pods()[pod]["status"] == "RUNNING")
    assert time.monotonic() - begun >= 0.2  # 12 virtual seconds at 60x
    started = pids(tmp_path / "machines")
    assert len(started) == 2
    assert not dead(started)
    assert (tmp_path / "machines" / pod / "log").read_text() == f"I am {pod} with t0k\n"
    ask("DELETE", f"/v2/pods/{pod}")
    until(lambda: dead(started))
    until(lambda: ask.pods() == {})


def test_a_pod_whose_command_ends_is_exited_and_a_box_stays_active(
    rehearsal: FakeProvider, tmp_path: Path
) -> None:
    ask = Client(rehearsal)
    pod, box = ask.launch(args="exit 3"), ask.launch_box(user_data="#!/bin/bash\n" + DAEMONS)
    until(lambda: ask.pods()[pod]["status"] == "EXITED")
    assert ask.pods()[pod]["cost"] == 0.0
    started = pids(tmp_path / "machines")
    assert (dead(started), ask.boxes()[box]["status"]) == (False, "active")
    rehearsal.fault("preempted", machine=box)
    until(lambda: dead(started))
    assert ask.boxes()[box]["status"] == "preempted"


def test_the_script_has_its_grace_to_save_what_it_has(rehearsal: FakeProvider, tmp_path: Path) -> None:
    ask = Client(rehearsal)
    pod = ask.launch(
        args="trap 'sleep 0.1; touch saved; exit' TERM; touch up; while true; do sleep 0.02; done"
    )
    until(lambda: list(tmp_path.glob("machines/*/up")))
    rehearsal.fault("preempted", machine=pod)
    until(lambda: (tmp_path / "machines" / pod / "saved").exists())


def test_a_restarted_pod_runs_its_command_again(rehearsal: FakeProvider, tmp_path: Path) -> None:
    ask = Client(rehearsal)
    pod = ask.launch(args="echo boot; sleep 600")
    log = tmp_path / "machines" / pod / "log"
    until(lambda: log.exists() and log.read_text() == "boot\n")
    assert ask("POST", f"/v2/pods/{pod}/action", {"action": "restart"}).status_code == 200
    until(lambda: log.read_text() == "boot\nboot\n")


def test_a_host_that_is_killed_takes_its_command_with_it(rehearsal: FakeProvider, tmp_path: Path) -> None:
    ask = Client(rehearsal)
    pod = ask.launch(args="echo $PPID > host; echo $$ > pids; touch up; while true; do sleep 0.05; done")
    started = pids(tmp_path / "machines")
    os.kill(int((tmp_path / "machines" / pod / "host").read_text()), signal.SIGKILL)
    until(lambda: dead(started) and ask.pods()[pod]["status"] == "EXITED")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_server(tmp_path: Path, end: signal.Signals) -> None:
    """However it ends: the command itself, told to stop, interrupted, or killed without a word."""
    (tmp_path / "faults.yaml").write_text("- {kind: 500, on: list}\n")
    files = {"--port-file": "port", "--run-in": "machines", "--faults": "faults.yaml"}
    flags = [text for flag, name in files.items() for text in (flag, str(tmp_path / name))]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "x1_pretrain.money.providers.fake.server",
            *flags,
            "--price",
            "0.5",
            "--boot-s",
            "6",
        ],
        env={**os.environ, "X1_CLOCK": f"60@{time.time():.3f}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: (tmp_path / "port").exists())
        url = f"http://127.0.0.1:{(tmp_path / 'port').read_text().strip()}"
        headers = {"Authorization": "Bearer fake"}
        assert httpx2.get(f"{url}/v2/pods", headers=headers).status_code == 500  # the file's fault
        body = {**POD, "args": DAEMONS + "sleep 600"}
        assert httpx2.post(f"{url}/v2/pods", headers=headers, json=body).json()["cost"] == 0.5
        started = pids(tmp_path / "machines")
        assert not dead(started)
        server.send_signal(end)
        printed = server.communicate(timeout=10)[0]
        assert server.returncode == (-9 if end is signal.SIGKILL else 0)
        until(lambda: dead(started))
        assert f"export X1_FAKE_URL={url}\n" in printed
        assert ("the true bill: $0.0" in printed) == (end is not signal.SIGKILL)
    finally:
        server.kill()
        server.wait()


def test_the_virtual_clock_meters_sixty_seconds_in_one(rehearsal: FakeProvider) -> None:
    ask = Client(rehearsal)
    ask.launch()
    before = time.monotonic()
    first = ask.bill()
    time.sleep(0.4)
    second = ask.bill()
    real_s = time.monotonic() - before
    rate = Decimal("1.19") + 100 * Decimal("0.10") / 720
    virtual_s = float((second - first) / rate * HOUR)
    assert 0.4 * 60 <= virtual_s <= real_s * 60
