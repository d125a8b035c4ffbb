"""What the tests of money share: a clock that jumps when somebody waits, a notifier that keeps what it is
told, and a run that has machines at the fake provider."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from tests.mirror.published import Mirrored, event

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FINISHED
from x1_pretrain.mirror import pull_command
from x1_pretrain.money.account import Rented, account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import NAME, Ledger, Row
from x1_pretrain.money.providers.base import LaunchRequest, Provider
from x1_pretrain.money.providers.fake.machines import Machine as Truth
from x1_pretrain.money.providers.fake.server import FakeProvider
from x1_pretrain.money.providers.opened import open_provider
from x1_pretrain.stores.folder_store import FolderStore

START = datetime(2026, 5, 23, 12, 0, tzinfo=UTC)
GIB_USD_PER_HR = Decimal("0.10") / 720  # of disk, the least that a pod has


@dataclass(frozen=True)
class Steps(Clock):
    """A sleep is over at once, and that much later. Its wall clock can be set wrong."""

    state: dict[str, Any] = field(default_factory=lambda: {"at_s": 5000.0, "wall_s": 0.0, "boot": "first"})

    def now(self) -> datetime:
        return START + timedelta(seconds=self.state["at_s"] - 5000.0 + self.state["wall_s"])

    def steady_s(self) -> float:
        return float(self.state["at_s"])

    def sleep(self, seconds: float) -> None:
        self.state["at_s"] += max(0.0, seconds)

    def real_s(self, seconds: float) -> float:
        return seconds  # for `Turns.wait`

    @property
    def boot(self) -> str:  # type: ignore[override]
        return str(self.state["boot"])

    def set_wall(self, seconds: float) -> None:
        """From now on the wall clock is wrong by so much."""
        self.state["wall_s"] = seconds

    def rebooted(self) -> Steps:
        """Another computer, or this one after a restart: its steady clock begins anew."""
        self.state["boot"] = self.state["boot"] + "'"
        return self


class MailServer(Controller):
    """On a port that nobody else can have taken before it listens."""

    def __init__(self, handler: Any) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        port = self.listening.getsockname()[1]
        super().__init__(handler, hostname="127.0.0.1", port=port, ready_timeout=60)

    def _create_server(self) -> Any:
        return self.loop.create_server(self._factory_invoker, sock=self.listening)


class Turns(threading.Event):
    """`stop` for a loop under test: waiting moves the clock, and after so long it is set."""

    def __init__(self, clock: Steps, for_s: float = 1e9) -> None:
        super().__init__()
        self._clock, self._end_s = clock, clock.steady_s() + for_s
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        self._clock.sleep(timeout or 0.0)
        if self._clock.steady_s() >= self._end_s:
            self.set()
        return self.is_set()


def pulled_home(folder: Path, *metrics: dict[str, Any]) -> None:
    """`x1 pull` into the folder that a run was launched from: the rows of its machine are in it now."""
    ledger = (folder / NAME).read_bytes()
    made = Mirrored(FolderStore(folder.parent / "mirror"), folder.parent / "originals", name=folder.name)
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in metrics)
    made.records = {NAME: ledger, "metrics.jsonl": rows, "events.jsonl": event("start", 0)}
    made.files = {"manifest.json": json.dumps({"run_id": made.run_id, "kind": "run"}).encode()}
    made.save()
    words = [str(folder.parent / "mirror" / folder.name), "--output", str(folder)]
    assert run_app(pull_command.app, words, prog="x1 pull") == FINISHED
    assert (folder / "metrics.jsonl").read_bytes() == rows


def waiting(monkeypatch: pytest.MonkeyPatch, turns: Turns) -> None:
    """Have `x1 guard` wait on these turns."""
    monkeypatch.setattr("x1_pretrain.money.guard_command.Request", lambda: turns)


class Alerts:
    """A notifier that keeps what it was told, each key once."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def alert(self, key: str, title: str, body: str, again_after_s: float | None = None) -> bool:
        new = key not in self.told
        self.told[key] = f"{title}: {body}"
        return new

    def close(self, timeout_s: float = 0.0) -> list[Any]:
        return []


class _True(Steps):
    """The provider's own time, untouched by what `set_wall` does."""

    def now(self) -> datetime:
        return START + timedelta(seconds=self.state["at_s"] - 5000.0)


@dataclass
class Rental:
    """A run folder with one machine, launched a moment ago."""

    folder: Path
    clock: Steps
    fake: FakeProvider
    provider: Provider
    ledger: Ledger
    alerts: Alerts = field(default_factory=Alerts)

    def launch(self, tag: str = "x1-run-1", usd_per_hr: str = "1.19", disk_gib: int = 1) -> Rented:
        """The intent, the request and its answer, as `x1 launch` writes them."""
        rate = Decimal(usd_per_hr) + GIB_USD_PER_HR
        self.ledger.append("intent", tag=tag, provider=self.provider.name, usd_per_hr=rate)
        offer = self.provider.offers("a100-80gb", 1)[0]
        request = LaunchRequest(offer, tag, "true", image="none:1", disk_gib=disk_gib)
        machine_id = self.provider.launch(request)
        self.ledger.append("launched", tag=tag, machine_id=machine_id)
        return self.machines()[-1]

    def machines(self) -> list[Rented]:
        return account(self.ledger.rows()).machines

    def rows(self, event: str) -> list[Row]:
        return [row for row in self.ledger.rows() if row["event"] == event]

    def truth(self, machine_id: str | None) -> Truth:
        self.fake.world.advance()
        assert machine_id is not None
        return self.fake.world.machines[machine_id]

    def bill_usd(self) -> Decimal:
        self.fake.world.advance()
        return self.fake.world.bill_usd()


@contextmanager
def renting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, api: str = "fake", **world: Any
) -> Iterator[Rental]:
    """A fake provider that is reached as `api`, and an empty run folder."""
    clock = Steps()
    folder.mkdir(parents=True, exist_ok=True)
    with FakeProvider(_True(state=clock.state), **world) as fake:
        monkeypatch.setenv("X1_FAKE_URL", fake.url)
        monkeypatch.setenv("X1_LAMBDA_URL", f"{fake.url}/api/v1")
        monkeypatch.setenv("X1_RUNPOD_URL", f"{fake.url}/v2")
        monkeypatch.setenv("X1_RUNPOD_GRAPHQL_URL", f"{fake.url}/graphql")
        monkeypatch.setenv("LAMBDA_API_KEY", "fake")
        monkeypatch.setenv("RUNPOD_API_KEY", "fake")
        monkeypatch.delenv("X1_ALERTS", raising=False)
        provider = open_provider(api, clock)
        yield Rental(folder, clock, fake, provider, Ledger(folder / NAME, clock))
