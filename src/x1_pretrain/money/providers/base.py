"""What money needs of a provider: prices, launch, what is there, terminate, what was billed.

A provider's answer is a claim. `None` stands for "it does not say": a running machine that costs 0 is
reported with no price, and the caller counts it at the price it was launched at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Protocol

from x1_pretrain.errors import FAULT, UserError


class Status(StrEnum):
    """What a machine's own word for its state amounts to."""

    STARTING = "starting"
    RUNNING = "running"
    LOST = "lost"  # preempted, unhealthy, exited, failed: it does no work, and may still bill
    TERMINATING = "terminating"
    GONE = "gone"  # the provider says it no longer exists


@dataclass(frozen=True)
class Offer:
    """A machine for rent."""

    provider: str
    sku: str  # what `launch` names it by
    gpu: str  # as people say it: "A100 80GB"
    gpu_count: int
    usd_per_hr: Decimal  # the whole machine
    tier: str  # "on demand", "secure", "community"
    available: bool
    region: str | None = None  # one that has it; None: the provider chooses


@dataclass(frozen=True)
class Machine:
    """A rented machine as the provider tells it."""

    id: str
    tag: str  # the name it was launched under
    status: Status
    said: str  # the provider's own word
    usd_per_hr: Decimal | None  # now, as the provider says; None where it says nothing or 0
    started: datetime | None = None
    address: str | None = None


@dataclass(frozen=True)
class Disk:
    """Storage that bills whether a machine runs or not."""

    id: str
    name: str
    gib: Decimal
    usd_per_day: Decimal


@dataclass(frozen=True)
class LaunchRequest:
    """What to start. `tag` is unique to this attempt: it finds the machine again when the answer was lost."""

    offer: Offer
    tag: str  # at most 64 characters of a-z, 0-9 and -
    script: str  # bash, run once as root when the machine is up
    image: str | None = None  # for providers that start containers
    disk_gib: int = 100
    environment: Mapping[str, str] = field(default_factory=dict)  # may hold secrets: never logged
    ssh_key: str | None = None  # its name at the provider, where one is needed


class Provider(Protocol):
    """One account at one provider."""

    name: str  # "lambda", "runpod", "local", "fake"
    label: str  # "Lambda", "RunPod"
    taxed: bool  # sales tax comes on top of its prices
    storage_usd_per_gib_month: Decimal  # of the disk that a running machine is launched with; 0 if included

    def offers(self, gpu: str, count: int) -> list[Offer]:
        """Machines with `count` GPUs of a kind (`a100-80gb`), cheapest first, those without capacity too."""

    def launch(self, request: LaunchRequest) -> str:
        """Start one machine, never retried; its id. `UnknownOutcomeError` where it may exist all the same."""

    def machine(self, machine_id: str) -> Machine | None:
        """One machine; None where the provider says that it does not exist."""

    def machines(self) -> list[Machine]:
        """All machines of the account that the provider lists."""

    def terminate(self, machine_id: str) -> None:
        """Ask for its end. An answer, also "not found", means asked, never that it has ended."""

    def billed_usd(self, machine_id: str, since: datetime) -> Decimal | None:
        """What the provider says it has billed for a machine; None where it does not tell."""

    def balance_usd(self) -> Decimal | None:
        """What the account still holds; None where it does not tell."""

    def disks(self) -> list[Disk]:
        """Disks that bill by themselves."""


class ProviderError(UserError):
    """A provider refused or could not be understood. Never carries a body or a header: those hold secrets."""

    exit_code = FAULT


class DeniedError(ProviderError):
    """401 or 403: the key."""


class NoCapacityError(ProviderError):
    """Nothing of this kind is free now."""


class UnreachableError(ProviderError):
    """No usable answer after all retries: down, too many requests, malformed. Says nothing of the machine."""


class UnknownOutcomeError(ProviderError):
    """A launch was sent and no clear answer came: look for its tag before sending another."""
