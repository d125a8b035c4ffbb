"""RunPod, over a real socket; every request and answer is held against its OpenAPI file."""

from __future__ import annotations

import base64
import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.money.providers.answers import (
    KEY,
    TOKEN,
    Api,
    Asked,
    Reply,
    Server,
    WaitingClock,
    broken,
    discreet,
    serving,
)

from x1_pretrain.errors import UserError
from x1_pretrain.money.providers.base import (
    DeniedError,
    LaunchRequest,
    NoCapacityError,
    Offer,
    ProviderError,
    Status,
    UnknownOutcomeError,
    UnreachableError,
)
from x1_pretrain.money.providers.runpod import ARGS, SCRIPT_FILE, SCRIPT_VARIABLE, RunPod

API = Api("runpod_v2.json")
A100 = "NVIDIA A100 80GB PCIe"
OFFER = Offer("runpod", A100, "A100 80GB", 2, Decimal("3.18"), "community", True)
REQUEST = LaunchRequest(
    OFFER,
    "x1-run-7",
    "echo up\n",
    image="nvcr.io/nvidia/pytorch:26.05-py3",
    disk_gib=80,
    environment={"A": TOKEN},
)
SINCE = datetime(2026, 11, 20, 8, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running.fresh()
    running.asked = [asked for asked in running.asked if asked.path != "/graphql"]
    API.check(running)


@pytest.fixture
def provider(server: Server) -> RunPod:
    return RunPod(KEY, WaitingClock(), f"{server.url}/v2", f"{server.url}/graphql")


def pod(**changes: Any) -> dict[str, Any]:
    return {
        "id": "pod1",
        "name": "x1-run-7",
        "status": "RUNNING",
        "actions": ["stop", "restart", "terminate"],
        "image": "nvcr.io/nvidia/pytorch:26.05-py3",
        "args": ARGS,
        "disk": 80,
        "mounts": {},
        "ports": ["22/tcp"],
        "env": {"JUPYTER_PASSWORD": TOKEN},
        "registry": None,
        "cloud": "COMMUNITY",
        "dataCenterId": "US-KS-2",
        "cudaVersion": "13.0",
        "ssh": {
            "proxy": {"host": "ssh.runpod.io", "port": 22, "username": "pod1-64", "command": "ssh ..."},
            "direct": None,
        },
        "template": None,
        "cost": 1.59,
        "locked": False,
        "runtime": None,
        "createdAt": "2026-11-20T08:31:02Z",
        "startedAt": "2026-11-20T08:32:00Z",
        "globalNetworking": {"enabled": False},
        "gpu": {"id": A100, "count": 1},
        **changes,
    }


def gpu(
    gpu_id: str, secure_usd: Any, community_usd: Any, availability: str = "HIGH", **changes: Any
) -> dict[str, Any]:
    return {
        "id": gpu_id,
        "name": gpu_id.removeprefix("NVIDIA "),
        "pool": None,
        "manufacturer": "NVIDIA",
        "memory": 80,
        "secure": True,
        "community": True,
        "price": {"secure": secure_usd, "community": community_usd},
        "maxCount": {"secure": 8, "community": 4},
        "availability": availability,
        **changes,
    }


def said_no(status: int, title: str, detail: str = TOKEN, **more: Any) -> Reply:
    body = {"title": title, "status": status, "detail": detail, **more}
    return Reply(status, body, {"Content-Type": "application/problem+json"})


# ------------------------------------------------------------------------------------------------------------
# Offers


def test_offers_of_both_tiers(server: Server, provider: RunPod) -> None:
    boards = [
        gpu("NVIDIA A100-SXM4-80GB", 1.49, 1.39),
        gpu(A100, 1.64, 1.19),
        gpu("NVIDIA H100 PCIe", 2.39, 1.99),
    ]
    low = gpu(A100, 1.64, 1.19, "LOW")
    server.plays(
        Reply(200, {"gpus": boards}),
        Reply(200, {"gpus": [gpu("NVIDIA A100-SXM4-80GB", 1.49, 1.39, "NONE"), low]}),
    )
    found = provider.offers("a100-80gb", 2)
    assert [(o.sku, o.tier, o.usd_per_hr, o.available) for o in found] == [
        (A100, "community", Decimal("2.38"), True),
        ("NVIDIA A100-SXM4-80GB", "community", Decimal("2.78"), False),
        ("NVIDIA A100-SXM4-80GB", "secure", Decimal("2.98"), True),
        (A100, "secure", Decimal("3.28"), True),
    ]
    assert {(o.provider, o.gpu, o.gpu_count, o.region) for o in found} == {("runpod", "A100 80GB", 2, None)}
    assert [asked.query["cloud"] for asked in server.asked] == [["SECURE"], ["COMMUNITY"]]
    assert all(
        asked.query["include"] == ["AVAILABILITY"] and asked.query["count"] == ["2"] for asked in server.asked
    )


def test_no_offer_above_the_largest_machine(server: Server, provider: RunPod) -> None:
    server.plays(Reply(200, {"gpus": [gpu(A100, 1.64, 1.19)]}))
    assert [offer.tier for offer in provider.offers("a100-80gb", 5)] == ["secure"]
    assert provider.offers("a100-80gb", 9) == []


def test_a_tier_that_does_not_hold_it(server: Server, provider: RunPod) -> None:
    server.plays(Reply(200, {"gpus": [gpu(A100, 1.64, 0.0, community=False)]}))
    assert [offer.tier for offer in provider.offers("a100-80gb", 1)] == ["secure"]


@pytest.mark.parametrize("usd", [0, None, "on request", float("nan"), []])
def test_an_offer_without_a_price_is_no_offer(server: Server, provider: RunPod, usd: object) -> None:
    server.plays(broken({"gpus": [gpu(A100, usd, usd)]}))
    with pytest.raises(ProviderError, match="tells no price"):
        provider.offers("a100-80gb", 1)


# ------------------------------------------------------------------------------------------------------------
# Launch


def test_a_launch(server: Server, provider: RunPod) -> None:
    server.plays(Reply(201, pod(status="PROVISIONING", cost=0.0)))
    assert provider.launch(REQUEST) == "pod1"
    body = server.asked[0].body
    assert base64.b64decode(body["env"].pop(SCRIPT_VARIABLE)) == b"echo up\n"
    assert body == {
        "name": "x1-run-7",
        "image": "nvcr.io/nvidia/pytorch:26.05-py3",
        "gpu": {"id": A100, "count": 2},
        "cloud": "COMMUNITY",
        "disk": 80,
        "ports": ["22/tcp"],
        "startSsh": True,
        "env": {"A": TOKEN},
        "args": ARGS,
    }


def test_the_args_run_the_script(tmp_path: Path) -> None:
    """Split as a container's runtime would, then run: the script's own exit code, input and arguments."""
    script = """trap 'echo stopped; exit 7' TERM\necho "a 'b' \\"c\\" $((1 + 1))"\ncat\nkill -TERM $$\n"""
    environment = {**os.environ, SCRIPT_VARIABLE: base64.b64encode(script.encode()).decode()}
    words = shlex.split(ARGS.replace(SCRIPT_FILE, str(tmp_path / "start.sh")))
    done = subprocess.run(words, env=environment, input="from outside\n", text=True, capture_output=True)
    assert done.stdout == "a 'b' \"c\" 2\nfrom outside\nstopped\n"
    assert done.returncode == 7


def test_what_can_not_be_launched(server: Server, provider: RunPod) -> None:
    with pytest.raises(UserError, match="name an image"):
        provider.launch(LaunchRequest(OFFER, "x1", "true"))
    with pytest.raises(UserError, match="90001 bytes; RunPod takes 90000"):
        provider.launch(LaunchRequest(OFFER, "x1", "x" * 90_001, image="ubuntu"))
    assert server.asked == []


@pytest.mark.parametrize("answer", [[], {}, None, "pod1", {"id": ""}, {"id": 7}, {"id": "../pods"}])
def test_a_launch_without_an_id_is_an_unknown_outcome(
    server: Server, provider: RunPod, answer: object
) -> None:
    server.plays(broken(answer, 201))
    with pytest.raises(UnknownOutcomeError, match="look for its tag"):
        provider.launch(REQUEST)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (said_no(400, "Bad Request", f"There are no instances available {TOKEN}"), NoCapacityError),
        (said_no(400, "Bad Request", "mounts are mutually exclusive"), ProviderError),
        (said_no(422, "Unprocessable Entity", "capacity", errors=["disk: capacity"]), ProviderError),
        (said_no(402, "Payment Required"), ProviderError),
        (said_no(401, "Unauthorized"), DeniedError),
        (said_no(403, "Forbidden"), DeniedError),
        (said_no(429, "Too Many Requests"), UnreachableError),
        (said_no(500, "Internal Server Error"), UnknownOutcomeError),
    ],
)
def test_a_launch_refused(
    server: Server, provider: RunPod, caplog: pytest.LogCaptureFixture, reply: Reply, kind: type
) -> None:
    caplog.set_level(logging.DEBUG)
    server.plays(reply)
    with pytest.raises(ProviderError) as raised:
        provider.launch(REQUEST)
    assert type(raised.value) is kind or (
        kind is ProviderError and not isinstance(raised.value, NoCapacityError | UnknownOutcomeError)
    )
    discreet(raised.value, caplog.text)
    assert len(server.asked) == 1


# ------------------------------------------------------------------------------------------------------------
# Machines


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("PROVISIONING", Status.STARTING),
        ("STARTING", Status.STARTING),
        ("RUNNING", Status.RUNNING),
        ("EXITED", Status.LOST),
        ("ERROR", Status.LOST),
        ("TERMINATED", Status.GONE),
    ],
)
def test_statuses(server: Server, provider: RunPod, said: str, status: Status) -> None:
    server.plays(Reply(200, pod(status=said)))
    machine = provider.machine("pod1")
    assert machine
    assert (machine.status, machine.said, machine.tag) == (status, said, "x1-run-7")
    assert machine.usd_per_hr == Decimal("1.59")
    assert machine.started == datetime(2026, 11, 20, 8, 31, 2, tzinfo=UTC)
    assert machine.address == "pod1-64@ssh.runpod.io"
    assert TOKEN not in repr(machine)


@pytest.mark.parametrize("said", ["HIBERNATED", "running", "", None, 7, ["RUNNING"]])
def test_an_unknown_state_may_bill(server: Server, provider: RunPod, said: object) -> None:
    server.plays(broken({"pods": [pod(status=said)]}))
    assert provider.machines()[0].status is Status.RUNNING


@pytest.mark.parametrize("cost", [0, 0.0, None, "free", float("nan"), float("inf"), -1, {}])
def test_a_running_pod_that_costs_nothing_tells_no_price(
    server: Server, provider: RunPod, cost: object
) -> None:
    server.plays(broken(pod(cost=cost)))
    machine = provider.machine("pod1")
    assert machine
    assert machine.usd_per_hr is None


def test_a_price_sent_as_a_string_counts(server: Server, provider: RunPod) -> None:
    server.plays(broken(pod(cost="2.74")))
    machine = provider.machine("pod1")
    assert machine
    assert machine.usd_per_hr == Decimal("2.74")


@pytest.mark.parametrize("created", [None, "yesterday", 7, ""])
def test_a_start_that_is_no_time(server: Server, provider: RunPod, created: object) -> None:
    server.plays(broken({"pods": [pod(createdAt=created)]}))
    assert provider.machines()[0].started is None


def test_its_own_ssh_port_is_preferred(server: Server, provider: RunPod) -> None:
    direct = {"host": "198.51.100.7", "port": 10022, "username": "root", "command": "ssh ..."}
    server.plays(Reply(200, {"pods": [pod(ssh={"proxy": None, "direct": direct})]}))
    assert provider.machines()[0].address == "198.51.100.7:10022"


def test_a_list_with_more_keys_is_read(server: Server, provider: RunPod) -> None:
    server.plays(Reply(200, {"pods": [pod(), pod(id="pod2")], "total": 2, "nextCursor": None}))
    assert [machine.id for machine in provider.machines()] == ["pod1", "pod2"]


def test_a_list_that_is_not_whole_does_not_pass_for_one(server: Server, provider: RunPod) -> None:
    """A machine on another page would look as if it did not exist."""
    server.plays(Reply(200, {"pods": [pod()], "nextCursor": "abc"}))
    with pytest.raises(UnreachableError, match="pages"):
        provider.machines()


def test_gone(server: Server, provider: RunPod) -> None:
    server.plays(said_no(404, "Not Found"))
    assert provider.machine("pod1") is None
    provider.terminate("pod1")


def test_terminate(server: Server, provider: RunPod) -> None:
    server.plays(said_no(500, "Internal Server Error"), Reply(204))
    provider.terminate("pod1")
    assert [(asked.method, asked.path) for asked in server.asked] == [("DELETE", "/v2/pods/pod1")] * 2


def test_a_pod_of_a_cluster_is_not_ended_here(server: Server, provider: RunPod) -> None:
    server.plays(said_no(409, "Conflict"))
    with pytest.raises(ProviderError, match="pod1 belongs to a cluster") as raised:
        provider.terminate("pod1")
    discreet(raised.value)


# ------------------------------------------------------------------------------------------------------------
# Money


def bill(*usd: Any, total: Any = 0.0) -> dict[str, Any]:
    hour = {"startTime": "2026-11-20T08:00:00Z", "endTime": "2026-11-20T09:00:00Z"}
    parts = {"gpuAmount": 0.0, "cpuAmount": 0.0, "diskAmount": 0.0}
    return {
        "records": [{**hour, **parts, "podId": "pod1", "totalAmount": amount} for amount in usd],
        "metadata": {
            "query": {**hour, "bucketSize": "hour", "podId": "pod1"},
            "recordCount": len(usd),
            "uniquePodCount": 1,
            "totals": {**parts, "totalAmount": total},
        },
    }


def test_what_was_billed(server: Server, provider: RunPod) -> None:
    server.plays(Reply(200, bill(0.1, 0.2, 1.07, total=1.37)))
    assert provider.billed_usd("pod1", SINCE) == Decimal("1.37")  # no float adds up to that
    assert server.asked[0].query == {
        "podId": ["pod1"],
        "startTime": ["2026-11-20T08:30:00Z"],
        "bucketSize": ["hour"],
    }


@pytest.mark.parametrize(
    ("answer", "usd"),
    [
        (bill(), Decimal(0)),
        (bill(1.5, total=4.0), Decimal("4.0")),
        (bill(1.5, 1.5), Decimal("3.0")),
        ({"records": [{"totalAmount": 1}], "metadata": None}, Decimal(1)),
    ],
)
def test_the_greater_of_records_and_totals(
    server: Server, provider: RunPod, answer: object, usd: Decimal
) -> None:
    server.plays(broken(answer))
    assert provider.billed_usd("pod1", SINCE) == usd


@pytest.mark.parametrize(
    "answer", [bill(1.0, None), bill("much"), bill(float("nan")), {"records": [TOKEN]}, {}]
)
def test_a_bill_that_can_not_be_added_up_is_none(server: Server, provider: RunPod, answer: object) -> None:
    server.plays(broken(answer))
    with pytest.raises(UnreachableError) as raised:
        provider.billed_usd("pod1", SINCE)
    discreet(raised.value)


@pytest.mark.parametrize(
    ("reply", "usd"),
    [
        (Reply(200, {"data": {"myself": {"clientBalance": 27.4}}}), Decimal("27.4")),
        (Reply(200, {"data": {"myself": {"clientBalance": 0}}}), Decimal(0)),
        (Reply(200, {"errors": [{"message": TOKEN}], "data": None}), None),
        (Reply(200, {"errors": [{"message": TOKEN}], "data": {"myself": None}}), None),
        (Reply(200, {"data": {"myself": {"clientBalance": "?"}}}), None),
        (Reply(200, []), None),
        (Reply(410, {"message": "retired"}), None),
        (Reply(404, b"<html>"), None),
    ],
)
def test_the_balance(server: Server, provider: RunPod, reply: Reply, usd: Decimal | None) -> None:
    server.plays(reply)
    assert provider.balance_usd() == usd
    assert (server.asked[0].method, server.asked[0].path) == ("POST", "/graphql")
    assert "clientBalance" in server.asked[0].body["query"]


def test_a_balance_that_is_denied(server: Server, provider: RunPod) -> None:
    server.plays(broken(b"", 401))
    with pytest.raises(DeniedError):
        provider.balance_usd()


def test_disks(server: Server, provider: RunPod) -> None:
    volume = {"id": "v1", "name": "data", "size": 300, "dataCenter": "EU-RO-1", "type": "STANDARD"}
    kept = {"persistent": {"size": 30, "path": "/workspace"}}
    pods = [pod(), pod(id="pod2", status="EXITED", cost=0.0, mounts=kept), pod(id="pod3", mounts=kept)]
    server.plays(
        Reply(200, {"networkVolumes": [volume, {**volume, "id": "v2", "type": "HIGH_PERFORMANCE"}]}),
        Reply(200, {"pods": pods}),
    )
    # 300 GB at 0.07 USD a month are 21 USD in 30 days; 30 GB at 0.20 are 6.
    assert [(disk.id, disk.gib, disk.usd_per_day) for disk in provider.disks()] == [
        ("v1", 300, Decimal("0.7")),
        ("v2", 300, Decimal("1.4")),
        ("pod2", 30, Decimal("0.2")),
    ]


# ------------------------------------------------------------------------------------------------------------
# Faults


ASKING: dict[str, Callable[[RunPod], object]] = {
    "offers": lambda provider: provider.offers("a100-80gb", 1),
    "machine": lambda provider: provider.machine("pod1"),
    "machines": lambda provider: provider.machines(),
    "terminate": lambda provider: provider.terminate("pod1"),
    "billed": lambda provider: provider.billed_usd("pod1", SINCE),
    "disks": lambda provider: provider.disks(),
    "balance": lambda provider: provider.balance_usd(),
}


@pytest.mark.parametrize("verb", ASKING)
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (said_no(401, "Unauthorized"), DeniedError),
        (said_no(403, "Forbidden"), DeniedError),
        (said_no(500, "Internal Server Error"), UnreachableError),
        (said_no(429, "Too Many Requests"), UnreachableError),
        (broken(f"<html>{TOKEN}".encode()), UnreachableError),
        (broken(f'{{"pods": "{TOKEN}'.encode()), UnreachableError),
    ],
)
def test_faults(
    server: Server,
    provider: RunPod,
    caplog: pytest.LogCaptureFixture,
    verb: str,
    reply: Reply,
    kind: type,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.plays(reply)
    with pytest.raises(kind) as raised:
        ASKING[verb](provider)
    discreet(raised.value, caplog.text)


@pytest.mark.parametrize("verb", ["offers", "machine", "machines", "billed", "disks"])
@pytest.mark.parametrize("answer", [[], {}, {"pods": TOKEN, "gpus": 7}, {"pods": [TOKEN], "gpus": [None]}])
def test_other_shapes(server: Server, provider: RunPod, verb: str, answer: object) -> None:
    server.plays(broken(answer))
    with pytest.raises(UnreachableError) as raised:
        ASKING[verb](provider)
    discreet(raised.value)


def test_the_schema_does_check(shared: Path) -> None:
    """What the other tests rely on: a field that the API does not know is caught."""
    body = {"name": "x1", "image": "ubuntu", "gpu": {"id": A100, "count": 1}}
    operation = API._operation("post", "/v2/pods")
    asked = Asked("POST", "/v2/pods", {}, {}, body, Reply(201, pod()))
    API.check_request(operation, asked)
    API.check_answer(operation, asked.reply)
    for wrong in ({**body, "gpuCount": 1}, {**body, "disk": "80"}, {"name": "x1"}):
        with pytest.raises(Exception, match=r"(?i)unevaluated|not of type|required"):
            API.check_request(operation, Asked("POST", "/v2/pods", {}, {}, wrong, asked.reply))
    with pytest.raises(Exception, match="not one of"):
        API.check_answer(operation, Reply(201, pod(status="HIBERNATED")))
