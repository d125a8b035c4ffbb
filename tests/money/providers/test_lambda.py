"""Lambda, over a real socket; every request and answer is held against its OpenAPI file."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.money.providers.answers import (
    KEY,
    TOKEN,
    Api,
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
from x1_pretrain.money.providers.lambda_cloud import Lambda, user_data

API = Api("lambda_openapi.json")
OFFER = Offer("lambda", "gpu_1x_a10", "A10", 1, Decimal("1.29"), "on demand", True, "us-west-1")
REQUEST = LaunchRequest(OFFER, "x1-run-7", "#!/bin/bash\necho up\n", ssh_key="mine")
ID = "0920582c7ff041399e34823a0be62549"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running.fresh()
    API.check(running)


@pytest.fixture
def provider(server: Server) -> Lambda:
    return Lambda(KEY, WaitingClock(), f"{server.url}/api/v1")


def instance_type(name: str, gpu: str, cents: Any, gpus: int) -> dict[str, Any]:
    return {
        "name": name,
        "description": f"{gpus}x {gpu}",
        "gpu_description": gpu,
        "price_cents_per_hour": cents,
        "specs": {"vcpus": 30, "memory_gib": 200, "storage_gib": 512, "gpus": gpus},
    }


def instance(**changes: Any) -> dict[str, Any]:
    actions = ("migrate", "rebuild", "restart", "cold_reboot", "terminate")
    return {
        "id": ID,
        "name": "x1-run-7",
        "ip": "198.51.100.2",
        "status": "active",
        "ssh_key_names": ["mine"],
        "file_system_names": [],
        "region": {"name": "us-west-1", "description": "California"},
        "instance_type": instance_type("gpu_1x_a10", "A10 (24 GB PCIe)", 129, 1),
        "jupyter_token": TOKEN,
        "jupyter_url": f"https://jupyter.example/?token={TOKEN}",
        "actions": {name: {"available": True} for name in actions},
        **changes,
    }


def types(*listed: tuple[dict[str, Any], list[str]]) -> Reply:
    return Reply(
        200,
        {
            "data": {
                kind["name"]: {
                    "instance_type": kind,
                    "regions_with_capacity_available": [{"name": r, "description": r} for r in regions],
                }
                for kind, regions in listed
            }
        },
    )


def said_no(status: int, code: str) -> Reply:
    return Reply(status, {"error": {"code": code, "message": f"no {TOKEN}", "suggestion": TOKEN}})


# ------------------------------------------------------------------------------------------------------------
# Offers


def test_offers_are_of_the_kind_and_count_asked_for(server: Server, provider: Lambda) -> None:
    server.plays(
        types(
            (instance_type("gpu_8x_a100_80gb_sxm4", "A100 (80 GB SXM4)", 2232, 8), ["us-east-1"]),
            (instance_type("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)", 148, 1), []),
            (instance_type("gpu_1x_a100", "A100 (40 GB PCIe)", 129, 1), ["us-south-1", "us-west-1"]),
            (instance_type("gpu_1x_a10", "A10 (24 GB PCIe)", 75, 1), ["us-west-1"]),
            (instance_type("gpu_8x_a100", "A100 (40 GB SXM4)", 1592, 8), ["us-west-1"]),
            (instance_type("cpu_4x_general", "N/A", 20, 0), ["us-west-1"]),
        )
    )
    assert provider.offers("a100-40gb", 1) == [
        Offer("lambda", "gpu_1x_a100", "A100 40GB", 1, Decimal("1.29"), "on demand", True, "us-south-1"),
        Offer("lambda", "gpu_1x_a100_sxm4", "A100 40GB", 1, Decimal("1.48"), "on demand", False, None),
    ]
    assert [offer.usd_per_hr for offer in provider.offers("a100-80gb", 8)] == [Decimal("22.32")]
    assert provider.offers("a100-80gb", 1) == []


@pytest.mark.parametrize("cents", [0, None, "cheap", [], float("nan")])
def test_an_offer_without_a_price_is_no_offer(server: Server, provider: Lambda, cents: object) -> None:
    kinds = [instance_type("gpu_1x_h100_pcie", "H100 (80 GB PCIe)", cents, 1)]
    server.plays(broken(types((kinds[0], ["us-west-1"])).body))
    with pytest.raises(ProviderError, match="tells no price") as raised:
        provider.offers("h100-pcie", 1)
    discreet(raised.value)


# ------------------------------------------------------------------------------------------------------------
# Launch


def test_a_launch(server: Server, provider: Lambda) -> None:
    server.plays(Reply(200, {"data": {"instance_ids": [ID]}}))
    assert provider.launch(REQUEST) == ID
    assert server.asked[0].body == {
        "region_name": "us-west-1",
        "instance_type_name": "gpu_1x_a10",
        "ssh_key_names": ["mine"],
        "name": "x1-run-7",
        "tags": [{"key": "x1-run", "value": "x1-run-7"}],
        "user_data": "#!/bin/bash\necho up\n",
    }


def keys(*names: str) -> Reply:
    return Reply(200, {"data": [{"id": n, "name": n, "public_key": "ssh-ed25519 AAAA"} for n in names]})


def test_the_only_ssh_key_is_taken(server: Server, provider: Lambda) -> None:
    server.plays(keys("laptop"), Reply(200, {"data": {"instance_ids": [ID]}}))
    provider.launch(LaunchRequest(OFFER, "x1-run-7", "true"))
    assert server.asked[1].body["ssh_key_names"] == ["laptop"]


@pytest.mark.parametrize(("held", "words"), [((), "add one"), (("a", "b"), "of 'a', 'b'")])
def test_without_one_ssh_key_nothing_is_launched(
    server: Server, provider: Lambda, held: tuple[str, ...], words: str
) -> None:
    server.plays(keys(*held))
    with pytest.raises(UserError, match=words):
        provider.launch(LaunchRequest(OFFER, "x1-run-7", "true"))
    assert [asked.method for asked in server.asked] == ["GET"]


@pytest.mark.parametrize("ids", [[], None, "i-1", [7], [""], ["i-1", "i-2"], {"0": "i-1"}])
def test_anything_but_one_machine_is_an_unknown_outcome(
    server: Server, provider: Lambda, ids: object
) -> None:
    server.plays(broken({"data": {"instance_ids": ids}}))
    with pytest.raises(UnknownOutcomeError, match="look for the tag") as raised:
        provider.launch(REQUEST)
    line = discreet(raised.value)
    assert ("2 machines (i-1, i-2)" in line) == (ids == ["i-1", "i-2"])
    assert len(server.asked) == 1


def test_no_region_no_request(provider: Lambda, server: Server) -> None:
    nowhere = Offer("lambda", "gpu_1x_a10", "A10", 1, Decimal("1.29"), "on demand", False)
    with pytest.raises(NoCapacityError, match="gpu_1x_a10"):
        provider.launch(LaunchRequest(nowhere, "x1-run-7", "true", ssh_key="mine"))
    assert server.asked == []


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (said_no(400, "instance-operations/launch/insufficient-capacity"), NoCapacityError),
        (said_no(400, "global/quota-exceeded"), ProviderError),
        (said_no(403, "global/account-inactive"), DeniedError),
        (said_no(401, "global/invalid-api-key"), DeniedError),
        (broken({"error": {"code": "provider/internal-unavailable"}}, 500), UnknownOutcomeError),
        (broken(b"<html>", 504), UnknownOutcomeError),
    ],
)
def test_a_launch_refused(
    server: Server, provider: Lambda, caplog: pytest.LogCaptureFixture, reply: Reply, kind: type
) -> None:
    caplog.set_level(logging.DEBUG)
    server.plays(reply)
    with pytest.raises(ProviderError) as raised:
        provider.launch(REQUEST)
    assert isinstance(raised.value, kind)
    discreet(raised.value, caplog.text)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "script", ['printf "%s" "$SECRET" > out\n', '#!/usr/bin/env bash\nprintf "%s" "$SECRET" > out']
)
def test_the_start_up_script_runs_with_its_environment(tmp_path: Path, script: str) -> None:
    """cloud-init starts what begins with `#!` as a program, and so does this test."""
    secret = """a 'quoted' "$HOME" `id`\nand a second line \\"""
    whole = user_data(LaunchRequest(OFFER, "x1", script, environment={"SECRET": secret}))
    program = tmp_path / "user-data"
    program.write_text(whole)
    program.chmod(0o755)
    subprocess.run([program], cwd=tmp_path, check=True)
    assert (tmp_path / "out").read_text() == secret


def test_what_can_not_be_a_start_up_script() -> None:
    with pytest.raises(UserError, match="1000012 bytes; Lambda takes 1000000"):
        user_data(LaunchRequest(OFFER, "x1", "x" * 1_000_000))
    with pytest.raises(UserError, match="environment variable") as raised:
        user_data(LaunchRequest(OFFER, "x1", "true", environment={"A; rm -rf /": TOKEN}))
    discreet(raised.value)


# ------------------------------------------------------------------------------------------------------------
# Machines


def test_a_cloud_config_goes_through_as_it_is() -> None:
    """With a `#!` line before it, cloud-init would run it as a script."""
    text = "#cloud-config\nwrite_files:\n- path: /x\n"
    assert user_data(LaunchRequest(OFFER, "x1", text)) == text
    with pytest.raises(UserError, match="holds its variables itself"):
        user_data(LaunchRequest(OFFER, "x1", text, environment={"A": "b"}))


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("booting", Status.STARTING),
        ("active", Status.RUNNING),
        ("unhealthy", Status.LOST),
        ("preempted", Status.LOST),
        ("terminating", Status.TERMINATING),
        ("terminated", Status.GONE),
    ],
)
def test_statuses(server: Server, provider: Lambda, said: str, status: Status) -> None:
    server.plays(Reply(200, {"data": instance(status=said)}))
    machine = provider.machine(ID)
    assert machine
    assert (machine.status, machine.said) == (status, said)
    assert (machine.id, machine.tag, machine.usd_per_hr) == (ID, "x1-run-7", Decimal("1.29"))
    assert machine.address == "198.51.100.2"
    assert TOKEN not in repr(machine)


@pytest.mark.parametrize("said", ["hibernating", "", None, 7, "a\nb"])
def test_an_unknown_state_may_bill(server: Server, provider: Lambda, said: object) -> None:
    server.plays(broken({"data": instance(status=said)}))
    machine = provider.machine(ID)
    assert machine
    assert machine.status is Status.RUNNING
    assert "\n" not in machine.said


@pytest.mark.parametrize("cents", [0, None, "free", float("nan"), -5, True])
def test_a_machine_without_a_price_is_still_a_machine(
    server: Server, provider: Lambda, cents: object
) -> None:
    server.plays(broken({"data": [instance(instance_type=instance_type("t", "g", cents, 1))]}))
    assert [machine.usd_per_hr for machine in provider.machines()] == [None]


def test_a_price_sent_as_a_string_counts(server: Server, provider: Lambda) -> None:
    server.plays(broken({"data": [instance(instance_type=instance_type("t", "g", "250", 1))]}))
    assert provider.machines()[0].usd_per_hr == Decimal("2.50")


def test_a_renamed_machine_keeps_its_tag(server: Server, provider: Lambda) -> None:
    tags = [{"key": "team", "value": "a"}, {"key": "x1-run", "value": "x1-run-7"}]
    server.plays(
        Reply(200, {"data": [instance(name="renamed by hand", tags=tags), instance(id="b", name="c")]})
    )
    assert [(machine.id, machine.tag) for machine in provider.machines()] == [(ID, "x1-run-7"), ("b", "c")]


def test_gone(server: Server, provider: Lambda) -> None:
    server.plays(said_no(404, "global/object-does-not-exist"))
    assert provider.machine(ID) is None
    provider.terminate(ID)


def test_a_404_without_its_code_is_not_gone(server: Server, provider: Lambda) -> None:
    server.plays(broken(b"<html>nothing here</html>", 404))
    for ask in (lambda: provider.machine(ID), lambda: provider.terminate(ID)):
        with pytest.raises(ProviderError, match="404"):
            ask()


def test_terminate(server: Server, provider: Lambda) -> None:
    server.plays(
        broken({"error": {"code": "global/internal-error"}}, 500),
        Reply(200, {"data": {"terminated_instances": [instance(status="terminating")]}}),
    )
    provider.terminate(ID)
    assert [asked.body for asked in server.asked] == [{"instance_ids": [ID]}] * 2


def test_it_tells_no_money(server: Server, provider: Lambda) -> None:
    assert provider.billed_usd(ID, WaitingClock().now()) is None
    assert provider.balance_usd() is None
    assert server.asked == []


def test_disks(server: Server, provider: Lambda) -> None:
    """Lambda's own example: 1000 GiB for a day at its rate are 6.67 USD."""
    base = {
        "mount_point": "/lambda/nfs/a",
        "created": "2026-01-01T00:00:00Z",
        "created_by": {"id": "u", "email": "a@example.org", "status": "active"},
        "is_in_use": False,
        "region": {"name": "us-west-1", "description": "California"},
    }
    full, new = {"id": "1", "name": "data", "bytes_used": 1000 * 2**30}, {"id": "2", "name": "new"}
    server.plays(Reply(200, {"data": [{**base, **full}, {**base, **new}]}))
    first, second = provider.disks()
    assert (first.name, first.gib, round(first.usd_per_day, 2)) == ("data", 1000, Decimal("6.67"))
    assert (second.gib, second.usd_per_day) == (0, 0)


# ------------------------------------------------------------------------------------------------------------
# Faults


ASKING: dict[str, Callable[[Lambda], object]] = {
    "offers": lambda provider: provider.offers("a10", 1),
    "machine": lambda provider: provider.machine(ID),
    "machines": lambda provider: provider.machines(),
    "terminate": lambda provider: provider.terminate(ID),
    "disks": lambda provider: provider.disks(),
}


@pytest.mark.parametrize("verb", ASKING)
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (said_no(401, "global/invalid-api-key"), DeniedError),
        (said_no(403, "global/account-inactive"), DeniedError),
        (broken({"error": {"code": "a", "message": TOKEN}}, 500), UnreachableError),
        (broken(TOKEN.encode(), 429, headers={"Retry-After": "90"}), UnreachableError),
        (broken(f"<html>{TOKEN}".encode()), UnreachableError),
        (broken(b""), UnreachableError),
        (broken(f'{{"data": "{TOKEN}'.encode()), UnreachableError),
    ],
)
def test_faults(
    server: Server,
    provider: Lambda,
    caplog: pytest.LogCaptureFixture,
    verb: str,
    reply: Reply,
    kind: type,
) -> None:
    if verb == "terminate" and reply.body == b"":
        return  # an empty yes is a yes
    caplog.set_level(logging.DEBUG)
    server.plays(reply)
    with pytest.raises(kind) as raised:
        ASKING[verb](provider)
    discreet(raised.value, caplog.text)


@pytest.mark.parametrize("verb", [verb for verb in ASKING if verb != "terminate"])
@pytest.mark.parametrize("answer", [[], {"data": TOKEN}, {"data": None}, {"data": [TOKEN]}, {"data": 7}, {}])
def test_other_shapes(server: Server, provider: Lambda, verb: str, answer: object) -> None:
    server.plays(broken(answer))
    with pytest.raises(UnreachableError) as raised:
        ASKING[verb](provider)
    discreet(raised.value)


@pytest.mark.parametrize("machine_id", [None, "", 7])
def test_a_machine_without_an_id_spoils_the_list(
    server: Server, provider: Lambda, machine_id: object
) -> None:
    server.plays(broken({"data": [instance(), instance(id=machine_id)]}))
    with pytest.raises(UnreachableError, match="an id for every machine"):
        provider.machines()


@pytest.mark.parametrize("machine_id", ["", "..", "a/../b"])
def test_no_request_for_what_is_no_id(server: Server, provider: Lambda, machine_id: str) -> None:
    for ask in (provider.machine, provider.terminate):
        with pytest.raises(UserError):
            ask(machine_id)
    assert server.asked == []


def test_the_schema_does_check(shared: Path) -> None:
    """What the other tests rely on: a request or an answer that the API does not know is caught."""
    for body, reply in (
        ({"instance_ids": "one"}, Reply(200, {"data": {"terminated_instances": []}})),
        ({"instance_ids": ["one"]}, Reply(200, {"data": {"terminated_instances": [{"id": "one"}]}})),
    ):
        with serving() as running:
            running.plays(reply)
            Lambda(KEY, WaitingClock(), f"{running.url}/api/v1").terminate("one")
            asked = running.asked[0]
            running.asked[0] = type(asked)(asked.method, asked.path, {}, {}, body, reply)
            with pytest.raises(jsonschema.ValidationError):
                API.check(running)
