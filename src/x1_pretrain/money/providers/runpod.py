"""RunPod, REST v2: containers ("pods") billed by the second from a prepaid balance.

It tells what it has billed, every five minutes. The balance it tells only through GraphQL, which it means to
retire. A running pod whose `cost` is 0 has been seen: that is a price it does not tell. Pods carry their
environment, so bodies are never shown.
"""

from __future__ import annotations

import base64
from datetime import datetime
from decimal import Decimal
from typing import Any

from x1_pretrain.errors import UserError
from x1_pretrain.model import gpus
from x1_pretrain.money.clock import Clock, parse_stamp, stamp
from x1_pretrain.money.providers.base import (
    Disk,
    LaunchRequest,
    Machine,
    Offer,
    ProviderError,
    Status,
    UnknownOutcomeError,
    UnreachableError,
)
from x1_pretrain.money.providers.reading import amount, inner, is_id, price, safe_id, text, word
from x1_pretrain.money.providers.web import AnswerError, MissingError, Web

URL = "https://api.runpod.io/v2"
GRAPHQL_URL = "https://api.runpod.io/graphql"
KEY_VARIABLE = "RUNPOD_API_KEY"
TIERS = {"secure": "SECURE", "community": "COMMUNITY"}
# Its storage prices, by hand from docs.runpod.io (storage is not in the catalog): check them there.
CONTAINER_USD_PER_GB_MONTH = Decimal("0.10")
STOPPED_USD_PER_GB_MONTH = Decimal("0.20")
VOLUME_USD_PER_GB_MONTH = {"STANDARD": Decimal("0.07"), "HIGH_PERFORMANCE": Decimal("0.14")}
DAYS_PER_MONTH = 30

STATUSES = {
    "PROVISIONING": Status.STARTING,
    "STARTING": Status.STARTING,
    "RUNNING": Status.RUNNING,
    "EXITED": Status.LOST,
    "ERROR": Status.LOST,
    "TERMINATED": Status.GONE,
}

# `args` is one line that is split as a shell would; the script travels beside it, where nothing is split.
# It becomes a file and replaces the shell, so that it is the container's first process and gets its signals.
SCRIPT_VARIABLE = "X1_START_SCRIPT"
SCRIPT_FILE = "/tmp/x1-start.sh"  # in the rented container
ARGS = f"bash -c 'printenv {SCRIPT_VARIABLE} | base64 -d > {SCRIPT_FILE} && exec bash {SCRIPT_FILE}'"
SCRIPT_BYTES = 90_000  # Linux takes 128 KiB in one variable, and base64 adds a third
# Lists have no pages in the documented API. Should one come with a mark of more, it must not pass for whole.
MORE_MARKS = ("nextCursor", "next_cursor", "nextPageToken", "next", "hasMore", "truncated")


class RunPod:
    taxed = False  # credits are bought beforehand, and what they pay for is the price
    storage_usd_per_gib_month = CONTAINER_USD_PER_GB_MONTH

    def __init__(
        self,
        key: str,
        clock: Clock,
        url: str = URL,
        graphql_url: str = GRAPHQL_URL,
        *,
        name: str = "runpod",
        label: str = "RunPod",
        key_variable: str = KEY_VARIABLE,
    ) -> None:
        self.name, self.label = name, label
        self._web = Web(label, url, key, clock, key_variable=key_variable)
        self._graphql = Web(label, graphql_url, key, clock, key_variable=key_variable)

    # ---- prices

    def offers(self, gpu: str, count: int) -> list[Offer]:
        """One offer for each board and tier. Stock is told for one tier at a time, so each is asked for."""
        kind = gpus.kind(gpu)
        found = [offer for tier in TIERS for offer in self._offers_in(tier, kind, count)]
        return sorted(found, key=lambda offer: (offer.usd_per_hr, not offer.available))

    def _offers_in(self, tier: str, kind: gpus.Kind, count: int) -> list[Offer]:
        listed = self._web.records(
            "catalog/gpus", "gpus", include="AVAILABILITY", product="POD", count=count, cloud=TIERS[tier]
        )
        mine = [item for item in listed if kind.matches(text(item, "id")) and item.get(tier) is True]
        held = [item for item in mine if (amount(inner(item, "maxCount", tier)) or 0) >= count]
        priced = [offer for item in held if (offer := self._offer(item, tier, kind, count))]
        if held and not priced:
            raise ProviderError(f"{self.label} tells no price for {kind.label} {tier}: nothing to decide on")
        return priced

    def _offer(self, item: dict[str, Any], tier: str, kind: gpus.Kind, count: int) -> Offer | None:
        usd_per_gpu_hr = price(inner(item, "price", tier))
        if usd_per_gpu_hr is None:
            return None
        return Offer(
            provider=self.name,
            sku=text(item, "id"),
            gpu=kind.label,
            gpu_count=count,
            usd_per_hr=usd_per_gpu_hr * count,
            tier=tier,
            available=text(item, "availability") != "NONE",
        )

    # ---- machines

    def launch(self, request: LaunchRequest) -> str:
        answer = self._web.launch("pods", _pod_request(request))
        if isinstance(answer, dict) and is_id(answer.get("id")):
            return text(answer, "id")
        raise UnknownOutcomeError(
            f"{self.label} answered a launch without the pod's id: look for its tag before sending another"
        )

    def machine(self, machine_id: str) -> Machine | None:
        path = f"pods/{safe_id(machine_id)}"
        try:
            return self._machine(self._web.record(path), path)
        except MissingError:
            return None

    def machines(self) -> list[Machine]:
        return [self._machine(pod, "pods") for pod in self._pods()]

    def _pods(self) -> list[dict[str, Any]]:
        answer = self._web.record("pods")
        pods = answer.get("pods")
        if not isinstance(pods, list) or not all(isinstance(pod, dict) for pod in pods):
            raise self._web.malformed("pods", "a list of objects under 'pods'", pods)
        if any(answer.get(mark) for mark in MORE_MARKS):
            raise UnreachableError(f"{self.label} lists its pods in pages now; this x1 can't read the others")
        return pods

    def _machine(self, pod: dict[str, Any], path: str) -> Machine:
        """Only its id must be there: a pod that is told badly bills all the same."""
        if not text(pod, "id"):
            raise self._web.malformed(path, "an id for every pod", pod.get("id"))
        said = text(pod, "status")
        return Machine(
            id=text(pod, "id"),
            tag=text(pod, "name"),
            status=STATUSES.get(said, Status.RUNNING),  # an unknown word may well bill
            said=word(pod, "status"),
            usd_per_hr=price(pod.get("cost")),
            started=_moment(pod.get("createdAt")),  # when it began to bill; `startedAt` moves with restarts
            address=_address(pod),
        )

    def terminate(self, machine_id: str) -> None:
        try:
            self._web.ask("DELETE", f"pods/{safe_id(machine_id)}")
        except MissingError:
            return
        except AnswerError as error:
            if error.status == 409:
                raise AnswerError(
                    f"{self.label}: pod {machine_id} belongs to a cluster: end the cluster in the console",
                    409,
                ) from None
            raise

    # ---- money

    def billed_usd(self, machine_id: str, since: datetime) -> Decimal | None:
        """Compute and disk together, up to the last five minutes or so."""
        path = "billing/pods"
        answer = self._web.record(path, podId=machine_id, startTime=stamp(since), bucketSize="hour")
        records = answer.get("records")
        if not isinstance(records, list):
            raise self._web.malformed(path, "a list under 'records'", records)
        sums = [amount(inner(record, "totalAmount")) for record in records]
        total = amount(inner(answer, "metadata", "totals", "totalAmount"))
        if None in sums:
            raise self._web.malformed(path, "an amount in every record", None)
        # The greater of the two: records may have been cut into pages, totals left out.
        return max(sum((s for s in sums if s is not None), Decimal(0)), total or Decimal(0))

    def balance_usd(self) -> Decimal | None:
        """None also when the API no longer answers such questions: nothing may depend on it."""
        try:
            answer = self._graphql.ask("POST", "", {"query": "query { myself { clientBalance } }"})
        except AnswerError as error:
            if error.status in (404, 410):
                return None
            raise
        return amount(inner(answer, "data", "myself", "clientBalance")) if isinstance(answer, dict) else None

    def disks(self) -> list[Disk]:
        volumes = self._web.records("network-volumes", "networkVolumes")
        return [_volume(item) for item in volumes] + [
            disk for pod in self._pods() if (disk := _left_behind(pod))
        ]


def _pod_request(request: LaunchRequest) -> dict[str, Any]:
    """`startSsh` brings in the account's public keys; an image that honours them listens on port 22."""
    if not request.image:
        raise UserError("RunPod starts containers: name an image to start")
    script = request.script.encode()
    if len(script) > SCRIPT_BYTES:
        raise UserError(f"the start-up script has {len(script)} bytes; RunPod takes {SCRIPT_BYTES}")
    return {
        "name": request.tag,
        "image": request.image,
        "gpu": {"id": request.offer.sku, "count": request.offer.gpu_count},
        "cloud": TIERS[request.offer.tier],
        "disk": request.disk_gib,
        "ports": ["22/tcp"],
        "startSsh": True,
        "env": {**request.environment, SCRIPT_VARIABLE: base64.b64encode(script).decode()},
        "args": ARGS,
    }


def _moment(value: object) -> datetime | None:
    try:
        return parse_stamp(value)
    except ValueError:
        return None


def _address(pod: dict[str, Any]) -> str | None:
    """host:port of its own sshd if that is reachable, else user@host of RunPod's proxy."""
    if host := text(pod, "ssh", "direct", "host"):
        return f"{host}:{inner(pod, 'ssh', 'direct', 'port')}"
    if host := text(pod, "ssh", "proxy", "host"):
        return f"{text(pod, 'ssh', 'proxy', 'username')}@{host}"
    return None


def _volume(item: dict[str, Any]) -> Disk:
    """Of an unknown kind: at the dearest rate. RunPod counts in GB; a GiB is 7 % more, and taken as one."""
    rate = VOLUME_USD_PER_GB_MONTH.get(text(item, "type"), max(VOLUME_USD_PER_GB_MONTH.values()))
    size = amount(item.get("size")) or Decimal(0)
    return Disk(text(item, "id"), text(item, "name"), size, size * rate / DAYS_PER_MONTH)


def _left_behind(pod: dict[str, Any]) -> Disk | None:
    """A stopped pod keeps its own disk, and that bills at twice the rate."""
    size = amount(inner(pod, "mounts", "persistent", "size"))
    if text(pod, "status") != "EXITED" or not size:
        return None
    name = f"the disk of the stopped pod {text(pod, 'name')}"
    return Disk(text(pod, "id"), name, size, size * STOPPED_USD_PER_GB_MONTH / DAYS_PER_MONTH)
