"""The fake provider's Lambda side: Cloud API v1, as far as a run needs it."""

from __future__ import annotations

import re
from typing import Any

from x1_pretrain.money.clock import stamp
from x1_pretrain.money.providers.fake.catalog import BOXES, Answer, Box, Call, Prices, cents, full
from x1_pretrain.money.providers.fake.machines import Machine, State, World

REGIONS = {"us-east-1": "Virginia, USA", "us-west-1": "California, USA"}
SSH_KEYS = ("fake",)
USER_DATA_BYTES = 1_000_000
SAID = {
    State.BOOTING: "booting",
    State.RUNNING: "active",
    State.UNHEALTHY: "unhealthy",
    State.EXITED: "active",  # a script that ended leaves the machine up
    State.PREEMPTED: "preempted",
    State.ENDING: "terminating",
    State.GONE: "terminated",
}
CODES = {
    401: ("global/invalid-api-key", "API key was invalid, expired, or deleted."),
    403: ("global/account-inactive", "Your account is inactive."),
    404: ("global/object-does-not-exist", "Specified instance does not exist."),
    429: ("global/too-many-requests", "Too many requests."),
    500: ("global/internal-error", "An internal server error occurred."),
}


def operation(call: Call) -> tuple[str, tuple[str, ...]]:
    """What a request does, in the words that faults use, and the machines that it names."""
    match call.method, call.parts:
        case "GET", ("instance-types",):
            return "catalog", ()
        case "GET", ("instances",):
            return "list", ()
        case "GET", ("instances", machine_id):
            return "get", (machine_id,)
        case "POST", ("instance-operations", "launch"):
            body = call.body if isinstance(call.body, dict) else {}
            return "launch", (str(body.get("instance_type_name")), str(body.get("name")))
        case "POST", ("instance-operations", "terminate"):
            return "terminate", tuple(_ids(call) or ())
    return "other", ()


def error(status: int, code: str | None = None, message: str | None = None) -> Answer:
    usual = CODES.get(status, ("global/invalid-parameters", "Invalid request data."))
    told = {"code": code or usual[0], "message": message or usual[1], "suggestion": "This is a rehearsal."}
    return Answer(status, {"error": told})


def no_capacity() -> Answer:
    code = "instance-operations/launch/insufficient-capacity"
    return error(400, code, "Not enough capacity to fulfill launch request.")


def answer(world: World, prices: Prices, call: Call) -> Answer:
    match call.method, call.parts:
        case "GET", ("instance-types",):
            return _data({box.name: _offered(world, prices, box) for box in BOXES})
        case "GET", ("instances",):
            return _data([_instance(world, m) for m in world.listed("lambda")])
        case "GET", ("instances", machine_id):
            machine = world.find("lambda", machine_id)
            return _data(_instance(world, machine)) if machine else error(404)
        case "POST", ("instance-operations", "launch"):
            return _launch(world, prices, call.body)
        case "POST", ("instance-operations", "terminate" | "restart" as what):
            return _operate(world, call, what)
        case "GET", ("ssh-keys",):
            keys = [
                {"id": f"key-{name}", "name": name, "public_key": "ssh-ed25519 AAAA"} for name in SSH_KEYS
            ]
            return _data(keys)
        case "GET", ("file-systems",):
            return _data([])
        case "GET", ("audit-events",):
            return Answer(200, {"data": _events(world), "page_token": None})
    return error(404, "global/not-found", "The requested resource was not found.")


def _data(data: Any) -> Answer:
    return Answer(200, {"data": data})


def _ids(call: Call) -> list[str] | None:
    ids = call.body.get("instance_ids") if isinstance(call.body, dict) else None
    return ids if isinstance(ids, list) and ids and all(isinstance(i, str) for i in ids) else None


# --- launch and end -------------------------------------------------------------------------------


def _launch(world: World, prices: Prices, body: Any) -> Answer:
    if problem := _launch_problem(body):
        return error(400, message=problem)
    box = next((b for b in BOXES if b.name == body["instance_type_name"]), None)
    if box is None or body["region_name"] not in REGIONS or body["ssh_key_names"][0] not in SSH_KEYS:
        return error(404, message="Specified instance type, region or SSH key does not exist.")
    machine = world.launch(
        "lambda",
        str(body.get("name") or ""),
        box.name,
        gpu_count=box.gpu_count,
        usd_per_hr=prices.box(world, box),
        place=body["region_name"],
        asked=body,
    )
    return _data({"instance_ids": [machine.id]})


def _launch_problem(body: Any) -> str | None:
    """The first thing that a launch request gets wrong. Fields it does not know are let pass, as there."""
    if not isinstance(body, dict):
        return "The body is not a JSON object."
    for name in ("region_name", "instance_type_name"):
        if not isinstance(body.get(name), str):
            return f"{name} is required."
    keys = body.get("ssh_key_names")
    if not isinstance(keys, list) or len(keys) != 1 or not isinstance(keys[0], str):
        return "Exactly one SSH key name is required."
    if len(str(body.get("name") or "")) > 64:
        return "name is longer than 64 characters."
    if len(str(body.get("user_data") or "").encode()) > USER_DATA_BYTES:
        return "user_data is larger than 1 MB."
    tags = body.get("tags", [])
    if not isinstance(tags, list) or not all(_is_tag(tag) for tag in tags):
        return "A tag needs a key of a-z, 0-9, - and : and a value of at most 128 characters."
    return None


def _is_tag(tag: Any) -> bool:
    if not isinstance(tag, dict):
        return False
    key, value = str(tag.get("key", "")), str(tag.get("value", ""))
    return re.fullmatch(r"[a-z][a-z0-9-:]+", key) is not None and len(key) <= 55 and len(value) <= 128


def _operate(world: World, call: Call, what: str) -> Answer:
    """Terminate or restart: all of the machines named, or, when one is not there, none."""
    ids = _ids(call)
    if ids is None:
        return error(400, message="instance_ids is required.")
    machines = [machine for i in ids if (machine := world.find("lambda", i))]
    if len(machines) != len(ids):
        return error(404)
    if what == "restart":
        if any(m.state is not State.RUNNING for m in machines):
            return error(409, "global/conflict", "The instance can't be restarted now.")
        for machine in machines:
            world.start(machine)
        return _data({"restarted_instances": [_instance(world, m) for m in machines]})
    for machine in machines:
        world.terminate(machine)
    return _data({"terminated_instances": [_instance(world, m, ending=True) for m in machines]})


# --- shapes ---------------------------------------------------------------------------------------


def _type(box: Box, price_cents_per_hour: int) -> dict[str, Any]:
    return {
        "name": box.name,
        "description": f"{box.gpu_count}x {box.gpu_description}",
        "gpu_description": box.gpu_description,
        "price_cents_per_hour": price_cents_per_hour,
        "specs": {
            "vcpus": box.vcpus,
            "memory_gib": box.memory_gib,
            "storage_gib": box.storage_gib,
            "gpus": box.gpu_count,
        },
    }


def _offered(world: World, prices: Prices, box: Box) -> dict[str, Any]:
    regions = [] if full(world, "lambda", (box.name,)) else [_region(name) for name in REGIONS]
    described = _type(box, cents(prices.box(world, box)))
    return {"instance_type": described, "regions_with_capacity_available": regions}


def _region(name: str) -> dict[str, str]:
    return {"name": name, "description": REGIONS[name]}


def _instance(world: World, machine: Machine, *, ending: bool = False) -> dict[str, Any]:
    """`ending`: in the answer to terminate, which says so whether it is so or not."""
    box = next(b for b in BOXES if b.name == machine.sku)
    price = 0 if world.lie("cost_zero", machine, fire=True) else cents(machine.usd_per_hr)
    told: dict[str, Any] = {
        "id": machine.id,
        "name": machine.name,
        "status": "terminating" if ending else SAID[machine.state],
        "ssh_key_names": machine.asked["ssh_key_names"],
        "file_system_names": [],
        "region": _region(machine.place),
        "instance_type": _type(box, price),
        "hostname": machine.id,
        "actions": _actions(machine.state),
        "tags": machine.asked.get("tags", []),
    }
    if machine.running_s is not None:
        secret = {"jupyter_token": f"secret-{machine.id}", "jupyter_url": f"http://127.0.0.1/?{machine.id}"}
        told |= {"ip": "127.0.0.1", "private_ip": "127.0.0.1", **secret}
    return told


def _actions(state: State) -> dict[str, Any]:
    reasons = {State.BOOTING: "vm-has-not-launched", State.ENDING: "vm-is-terminating"}
    reason = reasons.get(state)
    possible = {"available": reason is None} | ({"reason_code": reason} if reason else {})
    end = {"available": state is not State.ENDING}
    return {**dict.fromkeys(("migrate", "rebuild", "restart", "cold_reboot"), possible), "terminate": end}


def _events(world: World) -> list[dict[str, Any]]:
    """When machines were made and were gone: all that Lambda tells of time."""
    told = []
    for machine in world.machines.values():
        if machine.api == "lambda":
            told.append(_event(world, machine, "launch", stamp(world.stated(machine.created_s))))
            if machine.gone_s is not None:
                told.append(_event(world, machine, "terminate", stamp(world.stated(machine.gone_s))))
    return told


def _event(world: World, machine: Machine, action: str, moment: str) -> dict[str, Any]:
    lrn = f"lrn:fake:instance:{machine.id}"
    return {
        "service_name": "cloud",
        "resource_name": "instance",
        "action": action,
        "catalog_version": "1",
        "event_id": f"{machine.id}-{action}",
        "event_time": moment,
        "actor_lrn": None,
        "resource_lrns": [lrn],
        "resource_owner_lrn": None,
        "request_api_key_lrn": None,
        "additional_details": {"instance_lrn": lrn, "instance_type": machine.sku, "region": machine.place},
    }
