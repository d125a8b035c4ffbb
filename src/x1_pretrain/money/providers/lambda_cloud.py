"""Lambda's cloud, API v1: on-demand virtual machines billed by the minute, sales tax on top.

It tells no launch time, no cost and no balance: what a machine has cost comes from our own ledger. An answer
of 200 to an end means that the end has begun. Every machine it describes carries a `jupyter_token`: bodies
are never shown.
"""

from __future__ import annotations

import re
import shlex
from datetime import datetime
from decimal import Decimal
from typing import Any

from x1_pretrain.errors import UserError
from x1_pretrain.model import gpus
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.base import (
    Disk,
    LaunchRequest,
    Machine,
    NoCapacityError,
    Offer,
    ProviderError,
    Status,
    UnknownOutcomeError,
)
from x1_pretrain.money.providers.reading import inner, is_id, objects, price, safe_id, text, word
from x1_pretrain.money.providers.web import MissingError, Web

URL = "https://cloud.lambda.ai/api/v1"
KEY_VARIABLE = "LAMBDA_API_KEY"
TAG_KEY = "x1-run"
SPACING_S, LAUNCH_SPACING_S = 1.0, 12.0  # its documented limits
USER_DATA_BYTES = 1_000_000
# The rate of the worked example at docs.lambda.ai/public-cloud/billing, which says that it may be out of
# date. The price of a new filesystem is shown when it is made: verify it there.
FILESYSTEM_USD_PER_GIB_MONTH = Decimal("0.20")
DAYS_PER_MONTH = 30  # the same page counts 720 hours

STATUSES = {
    "booting": Status.STARTING,
    "active": Status.RUNNING,
    "unhealthy": Status.LOST,
    "preempted": Status.LOST,
    "terminating": Status.TERMINATING,
    "terminated": Status.GONE,
}


class Lambda:
    name, label, taxed = "lambda", "Lambda", True
    storage_usd_per_gib_month = Decimal(0)  # a machine's own disk is in its price

    def __init__(self, key: str, clock: Clock, url: str = URL) -> None:
        self._web = Web(
            self.label,
            url,
            key,
            clock,
            key_variable=KEY_VARIABLE,
            spacing_s=SPACING_S,
            launch_spacing_s=LAUNCH_SPACING_S,
        )

    def offers(self, gpu: str, count: int) -> list[Offer]:
        kind = gpus.kind(gpu)
        types = self._web.record("instance-types").get("data")
        if not isinstance(types, dict):
            raise self._web.malformed("instance-types", "an object under 'data'", types)
        found = [self._offer(item, kind) for item in types.values() if _is_of(item, kind, count)]
        priced = [offer for offer in found if offer]
        if found and not priced:
            raise ProviderError(
                f"{self.label} tells no price for {count}x {kind.label}: nothing to decide on"
            )
        return sorted(priced, key=lambda offer: (offer.usd_per_hr, not offer.available))

    def _offer(self, item: dict[str, Any], kind: gpus.Kind) -> Offer | None:
        cents = price(inner(item, "instance_type", "price_cents_per_hour"))
        if cents is None:
            return None
        regions = [text(region, "name") for region in objects(item.get("regions_with_capacity_available"))]
        return Offer(
            provider=self.name,
            sku=text(item, "instance_type", "name"),
            gpu=kind.label,
            gpu_count=inner(item, "instance_type", "specs", "gpus"),
            usd_per_hr=cents / 100,
            tier="on demand",
            available=bool(regions),
            region=regions[0] if regions else None,
        )

    def launch(self, request: LaunchRequest) -> str:
        if not request.offer.region:
            raise NoCapacityError(f"{self.label}: no region has a {request.offer.sku} free now: wait")
        answer = self._web.launch(
            "instance-operations/launch",
            {
                "region_name": request.offer.region,
                "instance_type_name": request.offer.sku,
                "ssh_key_names": [request.ssh_key or self._only_ssh_key()],
                "name": request.tag,
                "tags": [{"key": TAG_KEY, "value": request.tag}],
                "user_data": user_data(request),
            },
        )
        return self._launched(inner(answer, "data", "instance_ids"))

    def _launched(self, ids: object) -> str:
        """Exactly one. With several, all bill under one tag, and whoever looks for the tag finds them."""
        if isinstance(ids, list) and len(ids) == 1 and is_id(ids[0]):
            return str(ids[0])
        named = [str(i) for i in ids if is_id(i)] if isinstance(ids, list) else []
        what = f"{len(named)} machines ({', '.join(named)})" if named else "a launch without an id"
        raise UnknownOutcomeError(
            f"{self.label} answered with {what} where one machine was asked for: look for the tag, and end "
            f"what is too much"
        )

    def _only_ssh_key(self) -> str:
        names = [text(key, "name") for key in self._web.records("ssh-keys", "data")]
        if len(names) == 1:
            return names[0]
        if not names:
            raise UserError("Lambda needs an SSH key: add one at https://cloud.lambda.ai/ssh-keys")
        raise UserError(
            f"Lambda holds {len(names)} SSH keys: name the one to use, of {', '.join(map(repr, names))}"
        )

    def machine(self, machine_id: str) -> Machine | None:
        path = f"instances/{safe_id(machine_id)}"
        try:
            found = self._web.record(path).get("data")
        except MissingError:
            return None
        if not isinstance(found, dict):
            raise self._web.malformed(path, "an object under 'data'", found)
        return self._machine(found, path)

    def machines(self) -> list[Machine]:
        return [self._machine(item, "instances") for item in self._web.records("instances", "data")]

    def _machine(self, item: dict[str, Any], path: str) -> Machine:
        """Only its id must be there: a machine that is told badly bills all the same."""
        if not text(item, "id"):
            raise self._web.malformed(path, "an id for every machine", item.get("id"))
        said = text(item, "status")
        cents = price(inner(item, "instance_type", "price_cents_per_hour"))
        return Machine(
            id=text(item, "id"),
            tag=_tag(item),
            status=STATUSES.get(said, Status.RUNNING),  # an unknown word may well bill
            said=word(item, "status"),
            usd_per_hr=None if cents is None else cents / 100,
            address=text(item, "ip") or None,
        )

    def terminate(self, machine_id: str) -> None:
        try:
            self._web.ask("POST", "instance-operations/terminate", {"instance_ids": [safe_id(machine_id)]})
        except MissingError:
            return

    def billed_usd(self, machine_id: str, since: datetime) -> Decimal | None:
        return None

    def balance_usd(self) -> Decimal | None:
        return None

    def disks(self) -> list[Disk]:
        return [_disk(item) for item in self._web.records("file-systems", "data")]


def _is_of(item: object, kind: gpus.Kind, count: int) -> bool:
    if not isinstance(item, dict) or inner(item, "instance_type", "specs", "gpus") != count:
        return False
    return kind.matches(text(item, "instance_type", "name"), text(item, "instance_type", "gpu_description"))


def _tag(item: dict[str, Any]) -> str:
    """The tag it was launched with: its name can be changed in the console."""
    for tag in objects(item.get("tags")):
        if text(tag, "key") == TAG_KEY:
            return text(tag, "value")
    return text(item, "name")


def _disk(item: dict[str, Any]) -> Disk:
    gib = max(_bytes(item.get("bytes_used")), Decimal(0)) / 2**30
    return Disk(
        id=text(item, "id"),
        name=text(item, "name"),
        gib=gib,
        usd_per_day=gib * FILESYSTEM_USD_PER_GIB_MONTH / DAYS_PER_MONTH,
    )


def _bytes(value: object) -> Decimal:
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else Decimal(0)


def user_data(request: LaunchRequest) -> str:
    """What cloud-init takes: its own `#cloud-config` as it is, or a script for the first boot."""
    whole = request.script
    if not whole.startswith("#cloud-config"):
        whole = _exporting(request)
    elif request.environment:
        raise UserError("a #cloud-config holds its variables itself: give it none beside it")
    if (size := len(whole.encode())) > USER_DATA_BYTES:
        raise UserError(f"the start-up script has {size} bytes; Lambda takes {USER_DATA_BYTES}")
    return whole


def _exporting(request: LaunchRequest) -> str:
    """The script, which finds the environment set."""
    first, _, rest = request.script.partition("\n")
    if not first.startswith("#!"):
        first, rest = "#!/bin/bash", request.script
    exports = "".join(
        f"export {_variable(name)}={shlex.quote(value)}\n" for name, value in request.environment.items()
    )
    return f"{first}\n{exports}{rest}"


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(f"{name!r} can't be the name of an environment variable")
    return name
