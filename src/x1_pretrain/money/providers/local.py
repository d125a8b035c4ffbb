"""This machine, at a rate that its owner states: electricity, depreciation, or a rent paid elsewhere.

Nothing here starts or ends anything. The machine stays when the run is over, and whatever it costs then is
not the run's.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

from x1_pretrain.errors import UserError
from x1_pretrain.model import gpus
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers.base import Disk, LaunchRequest, Machine, Offer, ProviderError, Status

MACHINE_ID = "this-machine"


class Local:
    name, label, taxed = "local", "this machine", False
    storage_usd_per_gib_month = Decimal(0)

    def __init__(self, rate_usd_per_hr: Decimal, clock: Clock) -> None:
        if not rate_usd_per_hr.is_finite() or rate_usd_per_hr < 0:
            raise UserError(f"a rate of {rate_usd_per_hr} USD per hour: expected 0 or more, such as 0.08")
        self._rate_usd_per_hr, self._clock = rate_usd_per_hr, clock

    def offers(self, gpu: str, count: int) -> list[Offer]:
        """The one machine there is, whatever it holds: `x1 doctor` tells."""
        return [
            Offer(
                provider=self.name,
                sku=MACHINE_ID,
                gpu=_label(gpu),
                gpu_count=count,
                usd_per_hr=self._rate_usd_per_hr,
                tier="own",
                available=True,
            )
        ]

    def launch(self, request: LaunchRequest) -> str:
        raise ProviderError(
            "this machine is up already and can't be launched: start the run with x1 supervise"
        )

    def machine(self, machine_id: str) -> Machine | None:
        return self.machines()[0] if machine_id == MACHINE_ID else None

    def machines(self) -> list[Machine]:
        started = self._clock.now() - timedelta(seconds=self._clock.steady_s())
        return [Machine(MACHINE_ID, "", Status.RUNNING, "up", self._rate_usd_per_hr, started, "127.0.0.1")]

    def terminate(self, machine_id: str) -> None:
        """Nothing to do: nobody bills for it, and it is not ours to switch off."""

    def billed_usd(self, machine_id: str, since: datetime) -> Decimal | None:
        return None

    def balance_usd(self) -> Decimal | None:
        return None

    def disks(self) -> list[Disk]:
        return []


def _label(gpu: str) -> str:
    """A GPU at home need not be in the table of those for rent."""
    for known in gpus.kinds():
        if gpu.lower() == known.name:
            return known.label
    return gpu.upper() if gpu.lower() == "cpu" else gpu
