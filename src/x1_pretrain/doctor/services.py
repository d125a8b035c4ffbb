"""What a run talks to: alerts, budget file, MLflow. Nothing is sent or written unless asked for. No torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import UserError
from x1_pretrain.money import budget_file, channels
from x1_pretrain.records import mlflow_store

TITLE = "X1 doctor"
BODY = "A test: this is how alerts of the run arrive."


@dataclass(frozen=True)
class Alerts:
    """The channels by what may be shown of them, what became of a test message, or why they can't be used."""

    channels: tuple[str, ...] = ()
    results: tuple[str, ...] = ()  # of the test; empty: none was sent
    trouble: str | None = None


def alerts(environment: Mapping[str, str], send: bool) -> Alerts:
    try:
        found = channels.labelled(channels.addresses(environment))
    except UserError as error:
        return Alerts(trouble=str(error))
    results = tuple(channels.send(url, TITLE, BODY) for url in found.values()) if send else ()
    return Alerts(tuple(found), results)


@dataclass(frozen=True)
class Budget:
    """The file that says what was spent."""

    address: str
    spent_usd: float | None = None
    usd_per_hr: float | None = None
    absent: bool = False  # not there yet: the sidecar writes it
    trouble: str | None = None


def budget(config: RunConfig, now: datetime) -> Budget | None:
    """None: the config names none."""
    uri = config.budget.curr_cost_uri
    if not uri:
        return None
    try:
        address = budget_file.Address(uri)
    except UserError as error:
        return Budget(budget_file.shown(uri), trouble=str(error))
    if address.path is not None and not address.path.exists():
        return Budget(str(address), absent=True)
    try:
        found = budget_file.parse(address.fetch(), now)
    except budget_file.NoReadingError as error:
        return Budget(str(address), trouble=str(error))
    rate = None if found.rate_usd_per_hr is None else float(found.rate_usd_per_hr)
    return Budget(str(address), float(found.spent_usd), rate)


@dataclass(frozen=True)
class Store:
    """MLflow's store, before anything is asked of it."""

    address: str
    file: Path | None  # of a store on this machine
    installed: bool
    writable: bool  # of a store on this machine: its file, or the folder it will be made in


def store(config: RunConfig) -> Store | None:
    """None: MLflow is off."""
    if not config.mlflow.uri:
        return None
    address = mlflow_store.database_uri(config.mlflow.uri)
    file = Path(address.removeprefix("sqlite:///")) if address.startswith("sqlite:///") else None
    place = file
    while place is not None and not place.exists() and place != place.parent:
        place = place.parent
    writable = place is None or os.access(place, os.W_OK)
    return Store(
        mlflow_store.without_password(address),
        file,
        importlib.util.find_spec("mlflow") is not None,
        writable,
    )
