"""The fake provider's RunPod side: REST v2, as far as a run needs it, and the balance through GraphQL."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from x1_pretrain.money.clock import parse_stamp, stamp
from x1_pretrain.money.providers.fake.catalog import BOARDS, MAX_COUNT, Answer, Board, Call, Prices, full
from x1_pretrain.money.providers.fake.machines import Machine, State, World

PROBLEM = "application/problem+json"
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    409: "Conflict",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
}
POD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "image": str,
    "templateId": str,
    "args": str,
    "disk": int,
    "env": dict,
    "ports": list,
    "registry": (str, type(None)),
    "cloud": str,
    "cpu": dict,
    "gpu": dict,
    "dataCenterIds": list,
    "globalNetworking": bool,
    "mounts": dict,
    "startJupyter": bool,
    "startSsh": bool,
}
GPU_FIELDS = {"id", "count", "allowedCudaVersions", "minCudaVersion"}
OTHER_AMOUNTS = (  # of an account: nothing else is rented here
    "podCpuAmount",
    "serverlessGpuAmount",
    "serverlessCpuAmount",
    "serverlessDiskAmount",
    "serverlessFeeAmount",
    "storageStandardAmount",
    "storageHighPerformanceAmount",
    "endpointAmount",
    "clusterGpuAmount",
    "clusterDiskAmount",
    "clusterNetworkingAmount",
)
STOPPED = (State.EXITED, State.PREEMPTED)


def operation(call: Call) -> tuple[str, tuple[str, ...]]:
    """What a request does, in the words that faults use, and the machines that it names."""
    match call.method, call.parts:
        case "GET", ("catalog", *_):
            return "catalog", ()
        case "GET", ("billing", *_):
            return "billing", ()
        case "GET", ("pods",):
            return "list", ()
        case "POST", ("pods",):
            body = call.body if isinstance(call.body, dict) else {}
            gpu = body.get("gpu")
            return "launch", (str(gpu.get("id") if isinstance(gpu, dict) else ""), str(body.get("name")))
        case "GET", ("pods", machine_id):
            return "get", (machine_id,)
        case "DELETE", ("pods", machine_id):
            return "terminate", (machine_id,)
        case "POST", ("pods", machine_id, "action"):
            ends = isinstance(call.body, dict) and call.body.get("action") == "terminate"
            return ("terminate" if ends else "other"), (machine_id,)
    return "other", ()


def error(status: int, detail: str = "This is a rehearsal.", errors: list[str] | None = None) -> Answer:
    body = {"title": TITLES.get(status, "Error"), "status": status, "detail": detail}
    return Answer(status, {**body, "errors": errors} if errors else body, PROBLEM)


def no_capacity() -> Answer:
    return error(400, "There is no capacity for this GPU now.")


def answer(world: World, prices: Prices, call: Call) -> Answer:
    match call.method, call.parts:
        case "GET", ("pods",):
            return Answer(200, {"pods": [_pod(world, m) for m in world.listed("runpod")]})
        case "POST", ("pods",):
            return _launch(world, prices, call.body)
        case "GET", ("catalog", "gpus"):
            count = call.query.get("count", "1")
            boards = [b for b in BOARDS if count.isdecimal() and int(count) <= MAX_COUNT]
            return Answer(200, {"gpus": [_gpu(world, prices, b, call) for b in boards]})
        case "GET", ("catalog", "gpus", gpu_id):
            board = _board(gpu_id)
            return Answer(200, _gpu(world, prices, board, call)) if board else error(404, "no such GPU")
        case "GET", ("network-volumes",):
            return Answer(200, {"networkVolumes": []})
        case "GET", ("billing", "pods") | ("billing",):
            return _billing(world, call)
        case (("GET" | "DELETE" | "POST"), ("pods", machine_id, *rest)):
            machine = world.find("runpod", machine_id)
            return _one(world, machine, call, rest) if machine else error(404, "pod not found")
    return error(404, "no such route")


def balance(world: World, call: Call) -> Answer:
    """GraphQL: what it can't do, it says with status 200."""
    query = call.body.get("query") if isinstance(call.body, dict) else None
    if call.method != "POST" or not isinstance(query, str) or "myself" not in query:
        return Answer(200, {"errors": [{"message": "only myself { clientBalance ... } is answered here"}]})
    told = {
        "clientBalance": float(world.told_balance_usd()),
        "currentSpendPerHr": float(world.usd_per_hr()),
        "spendLimit": 80,
        "notifyLowBalance": False,
    }
    return Answer(200, {"data": {"myself": told}})


# --- pods -----------------------------------------------------------------------------------------


def _launch(world: World, prices: Prices, body: Any) -> Answer:
    if problems := list(_problems(body)):
        return error(422, "The body does not match what a pod is made of.", problems)
    if ("gpu" in body) == ("cpu" in body):
        return error(400, "exactly one of gpu and cpu is needed")
    board, cloud = _board(body.get("gpu", {}).get("id", "")), body.get("cloud", "SECURE")
    count = body.get("gpu", {}).get("count", 1)
    if board is None or count > MAX_COUNT:
        return error(400, "this GPU, or so many of it, can't be placed")
    usd_per_hr = prices.board(world, board, cloud) * count
    if world.balance_usd() < usd_per_hr + world.usd_per_hr():
        return error(402, "The balance does not cover one hour.")
    machine = world.launch(
        "runpod",
        body["name"],
        board.id,
        gpu_count=count,
        usd_per_hr=usd_per_hr,
        place=cloud,
        disk_gb=body.get("disk", 20),
        volume_gb=body.get("mounts", {}).get("persistent", {}).get("size", 0),
        asked=body,
    )
    return Answer(201, _pod(world, machine))


def _problems(body: Any) -> Iterator[str]:
    """Each way in which a body is not a pod's."""
    if not isinstance(body, dict):
        yield "the body is not a JSON object"
        return
    yield from (f"unknown field {name}" for name in body if name not in POD_FIELDS)
    for name, kind in POD_FIELDS.items():
        if name in body and (not isinstance(body[name], kind) or (kind is int and body[name] is True)):
            yield f"{name} has the wrong type"
            return
    if not body.get("name"):
        yield "name is required"
    if "image" not in body and "templateId" not in body:
        yield "image is required without templateId"
    if body.get("cloud", "SECURE") not in ("SECURE", "COMMUNITY"):
        yield "cloud is SECURE or COMMUNITY"
    if body.get("disk", 1) < 1:
        yield "disk is at least 1"
    if not all(isinstance(value, str) for value in body.get("env", {}).values()):
        yield "env holds strings"
    yield from _gpu_problems(body.get("gpu", {"id": ""}))
    yield from _mount_problems(body.get("mounts", {}))


def _gpu_problems(gpu: dict[str, Any]) -> Iterator[str]:
    yield from (f"unknown field gpu.{name}" for name in gpu if name not in GPU_FIELDS)
    if not isinstance(gpu.get("id"), str):
        yield "gpu.id is required"
    if not isinstance(gpu.get("count", 1), int) or gpu.get("count", 1) < 1:
        yield "gpu.count is at least 1"


def _mount_problems(mounts: dict[str, Any]) -> Iterator[str]:
    yield from (f"unknown field mounts.{n}" for n in mounts if n not in ("persistent", "network"))
    volume = mounts.get("persistent", {"size": 10, "path": "/"})
    if set(volume) != {"size", "path"} or not isinstance(volume["size"], int) or volume["size"] < 10:
        yield "mounts.persistent is {size, path} with at least 10 GB"


def _one(world: World, machine: Machine, call: Call, rest: list[str]) -> Answer:
    match call.method, rest:
        case "GET", []:
            return Answer(200, _pod(world, machine))
        case "DELETE", []:
            world.terminate(machine)
            return Answer(204)
        case "POST", ["action"]:
            return _act(world, machine, call.body)
    return error(404, "no such route")


def _act(world: World, machine: Machine, body: Any) -> Answer:
    action = body.get("action") if isinstance(body, dict) and set(body) == {"action"} else None
    if action not in ("start", "stop", "restart", "terminate"):
        return error(422, "action is start, stop, restart or terminate", ["action"])
    if action not in _actions(machine.state):
        return error(409, f"{action} is not possible now")
    if action == "terminate":
        world.terminate(machine)
        return Answer(204)
    if action == "stop":
        world.stop(machine)
    else:
        world.start(machine)
    return Answer(200, _pod(world, machine))


def _actions(state: State) -> list[str]:
    if state is State.ENDING:
        return ["terminate"]
    return ["start", "terminate"] if state in STOPPED else ["stop", "restart", "terminate"]


def _said(world: World, machine: Machine) -> str:
    """RunPod has no word for an end under way: a pod is RUNNING until it is not there."""
    if machine.state is State.BOOTING and machine.due_s is not None:
        return "PROVISIONING" if machine.due_s - world.at_s > world.boot_s / 2 else "STARTING"
    if machine.state in STOPPED:
        return "EXITED"
    return "ERROR" if machine.state is State.UNHEALTHY else "RUNNING"


def _pod(world: World, machine: Machine) -> dict[str, Any]:
    asked, said = machine.asked, _said(world, machine)
    nothing = machine.state in STOPPED or world.lie("cost_zero", machine, fire=True) is not None
    started = machine.running_s
    up = said == "RUNNING" and started is not None
    return {
        "id": machine.id,
        "name": machine.name,
        "status": said,
        "actions": _actions(machine.state),
        "image": asked.get("image", ""),
        "args": asked.get("args", ""),
        "disk": machine.disk_gb,
        "mounts": asked.get("mounts", {}),
        "ports": asked.get("ports", []),
        "env": asked.get("env", {}),  # as there: whoever logs a body logs these
        "registry": asked.get("registry"),
        "gpu": {"id": machine.sku, "count": machine.gpu_count},
        "cloud": machine.place,
        "dataCenterId": "EU-RO-1",
        "cudaVersion": "13.0",
        "ssh": {"proxy": None, "direct": None},
        "template": asked.get("templateId"),
        "cost": 0.0 if nothing else float(machine.usd_per_hr),
        "locked": False,
        "globalNetworking": {"enabled": False},
        "runtime": _runtime(world, machine, started) if up and started is not None else None,
        "createdAt": stamp(world.stated(machine.created_s)),
        "startedAt": None if started is None else stamp(world.stated(started)),
    }


def _runtime(world: World, machine: Machine, started_s: Decimal) -> dict[str, Any]:
    busy = {"util": 97, "memoryUtil": 80}
    return {
        "uptime": int(world.at_s - started_s),
        "gpus": [busy] * machine.gpu_count,
        "cpu": {"util": 10},
        "memory": {"util": 20},
        "ports": [],
    }


# --- catalogue ------------------------------------------------------------------------------------


def _board(gpu_id: str) -> Board | None:
    return next((b for b in BOARDS if b.id == gpu_id), None)


def _gpu(world: World, prices: Prices, board: Board, call: Call) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": board.id,
        "name": board.name,
        "pool": board.pool,
        "manufacturer": "NVIDIA",
        "memory": board.memory_gb,
        "secure": True,
        "community": True,
        "price": {
            "secure": float(prices.board(world, board, "SECURE")),
            "community": float(prices.board(world, board, "COMMUNITY")),
        },
        "maxCount": {"secure": MAX_COUNT, "community": MAX_COUNT},
    }
    if call.query.get("include") == "AVAILABILITY":
        told["availability"] = "NONE" if full(world, "runpod", (board.id,)) else "HIGH"
    return told


# --- billing --------------------------------------------------------------------------------------


def _billing(world: World, call: Call) -> Answer:
    """What was charged, by pod and bucket, as of the last billing run."""
    size = call.query.get("bucketSize", "day")
    if size not in ("hour", "day", "week", "month", "year"):
        return error(400, f"bucketSize {size} is none of hour, day, week, month, year")
    now = world.stated(world.at_s)
    try:
        begin, end = _window(call, size, now)
    except ValueError as problem:
        return error(400, str(problem))
    pods = call.parts[-1] == "pods"
    sums = _sums(world, size, call.query.get("podId") if pods else None, split=pods)
    rows = [
        {"startTime": stamp(bucket), "endTime": stamp(_next(bucket, size)), **_amounts(gpu, disk, pod)}
        for (bucket, pod), (gpu, disk) in sorted(sums.items(), key=lambda item: item[0])
        if begin <= bucket < end
    ]
    return Answer(200, {"records": rows, "metadata": _metadata(rows, begin, end, size, pods, call)})


def _window(call: Call, size: str, now: datetime) -> tuple[datetime, datetime]:
    """Which buckets are asked for: from the one that holds the start."""
    query = call.query
    end = parse_stamp(query["endTime"]) if "endTime" in query else now
    if "lastN" in query:
        if "startTime" in query or "endTime" in query:
            raise ValueError("lastN excludes startTime and endTime")
        begin, end = _floor(now, size), _next(_floor(now, size), size)
        for _ in range(int(query["lastN"]) - 1):
            begin = _floor(begin - timedelta(seconds=1), size)
        return begin, end
    begin = parse_stamp(query["startTime"]) if "startTime" in query else now - timedelta(days=30)
    return _floor(begin, size), end if _floor(end, size) == end else _next(_floor(end, size), size)


Sums = dict[tuple[datetime, str], tuple[Decimal, Decimal]]


def _sums(world: World, size: str, only: str | None, *, split: bool) -> Sums:
    sums: Sums = {}
    for machine in world.machines.values():
        if machine.api != "runpod" or (only is not None and machine.id != only):
            continue
        for hour, amounts in machine.told.items():
            key = (_floor(datetime.fromtimestamp(hour * 3600, UTC), size), machine.id if split else "")
            gpu, disk = sums.get(key, (Decimal(0), Decimal(0)))
            sums[key] = (gpu + amounts.gpu_usd, disk + amounts.disk_usd)
    return sums


def _amounts(gpu: Decimal, disk: Decimal, pod: str) -> dict[str, Any]:
    if pod:
        split = {"gpuAmount": float(gpu), "cpuAmount": 0.0, "diskAmount": float(disk)}
        return {"podId": pod, "totalAmount": float(gpu + disk), **split}
    pods = {"podGpuAmount": float(gpu), "podDiskAmount": float(disk)}
    return {"totalAmount": float(gpu + disk), **pods, **dict.fromkeys(OTHER_AMOUNTS, 0.0)}


def _metadata(
    rows: list[dict[str, Any]], begin: datetime, end: datetime, size: str, pods: bool, call: Call
) -> dict[str, Any]:
    query: dict[str, Any] = {"startTime": stamp(begin), "endTime": stamp(end), "bucketSize": size}
    blank = _amounts(Decimal(0), Decimal(0), "-" if pods else "")
    names = [name for name in blank if name.endswith("Amount")]
    told: dict[str, Any] = {
        "recordCount": len(rows),
        "totals": {name: float(sum(Decimal(repr(row[name])) for row in rows)) for name in names},
    }
    if pods:
        query["podId"] = call.query.get("podId")
        told["uniquePodCount"] = len({row["podId"] for row in rows})
    return {"query": query, **told}


def _floor(moment: datetime, size: str) -> datetime:
    """The start of the bucket that holds a moment, in UTC; weeks begin on Monday."""
    hour = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    match size:
        case "hour":
            return hour
        case "week":
            return day - timedelta(days=day.weekday())
        case "month":
            return day.replace(day=1)
        case "year":
            return day.replace(month=1, day=1)
    return day


def _next(start: datetime, size: str) -> datetime:
    longest = {"hour": 1, "day": 24, "week": 24 * 7, "month": 24 * 31, "year": 24 * 366}[size]
    return _floor(start + timedelta(hours=longest), size)
