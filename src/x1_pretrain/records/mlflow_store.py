"""An MLflow store, as X1 uses one: where it is, which run in it is ours, what it has, what it lacks.

MLflow is imported by `connect` and nowhere else, so nothing pays for it that does not ask for it.
Every call here may block or fail (a database, a server): the training loop talks to `mlflow_sink` instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from x1_pretrain.config import flatten
from x1_pretrain.errors import UserError
from x1_pretrain.records.formats import VERSIONS
from x1_pretrain.records.run_folder import Row, Run, is_number
from x1_pretrain.records.run_manifest import without_passwords

METRICS_A_BATCH = 1000  # MLflow refuses more
PARAMS_A_BATCH = 100
PARAM_CHARACTERS = 500  # what the oldest stores in use take
NOT_SENT = ("step", "time_utc")  # these are a point's place on the axes

INSTALL = "pip install 'x1-pretrain[mlflow]'"


# -----------------------------------------------------------------------------------------------------------
# Where


def database_uri(uri: str) -> str:
    """The store that is really used for `uri`.

    MLflow 3.13 and newer refuse a store of plain files (`file:` or a folder): it becomes a database in the
    folder.
    """
    folder = _folder_of(uri)
    return uri if folder is None else f"sqlite:///{folder / 'mlflow.db'}"


def _folder_of(uri: str) -> Path | None:
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.netloc + parts.path)).absolute()
    return Path(uri).absolute() if "://" not in uri and ":" not in uri and uri != "databricks" else None


def _artifacts_beside(store: str) -> str | None:
    """The folder for artifacts next to a database file; a server knows its own."""
    if not store.startswith("sqlite:///"):
        return None
    return (Path(store.removeprefix("sqlite:///")).absolute().parent / "artifacts").as_uri()


def without_password(uri: str) -> str:
    """`http://user:secret@host` -> `http://host`: what may be written where others read it."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def reason_of(error: Exception) -> str:
    """The first line of what a store complained about, short, and without a password that it quotes."""
    line = (without_passwords(str(error)).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:200]}"


def connect(uri: str) -> Any:
    """A client of the store. Slow the first time (MLflow is imported, a new database is laid out)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # who calls here tries again by itself
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    store = database_uri(uri)
    if store.startswith("sqlite:///"):
        Path(store.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = importlib.import_module("mlflow.tracking").MlflowClient(store)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised; a traceback too is too much
    return client


# -----------------------------------------------------------------------------------------------------------
# Our run in it


@dataclass
class StoredRun:
    """One run in a store, with the last step it has of each metric. Rows must come in step order."""

    client: Any
    store: str
    experiment: str
    experiment_id: str
    run_id: str
    last: dict[str, int]

    def send(self, rows: Iterable[Row]) -> int:
        """Send what the store lacks; how many points went.

        After an error the run must be opened anew: only the store knows what it took.
        """
        points = [point for row in rows for point in self._missing(row)]
        for start in range(0, len(points), METRICS_A_BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + METRICS_A_BATCH])
        return len(points)

    def _missing(self, row: Row) -> list[Any]:
        metric = importlib.import_module("mlflow.entities").Metric
        step, time_ms = row["step"], _milliseconds(row)
        points = []
        for name, value in row.items():
            key = safe_name(name)
            if name in NOT_SENT or not is_number(value) or step <= self.last.get(key, -1):
                continue
            self.last[key] = step
            points.append(metric(key, float(value), time_ms, step))
        return points

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status=status)

    def pointer(self) -> dict[str, str | int]:
        """What `mlflow.json` of the run folder says."""
        return {
            "schema_version": VERSIONS["mlflow.json"],
            "uri": self.store,
            "experiment": self.experiment,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
        }


def _milliseconds(row: Row) -> int:
    """The time of the row itself, so that a point sent twice would be the same point."""
    text = row.get("time_utc")
    return round(datetime.fromisoformat(text).timestamp() * 1000) if isinstance(text, str) else 0


def safe_name(name: str) -> str:
    """MLflow takes letters, digits and `_-. :/` in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def stored_run(client: Any, uri: str, experiment: str, run: Run) -> StoredRun:
    """Our run in the store: the one that carries its id, continued, or a new one."""
    experiment_id = _experiment_id(client, experiment, database_uri(uri))
    run_id = _find(client, experiment_id, run.manifest["run_id"])
    if run_id is None:
        run_id = client.create_run(experiment_id, tags=_tags(run), run_name=run.name).info.run_id
    else:
        client.update_run(run_id, status="RUNNING")
    _describe(client, run_id, run)
    return StoredRun(client, database_uri(uri), experiment, experiment_id, run_id, last_steps(client, run_id))


def _experiment_id(client: Any, name: str, store: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=_artifacts_beside(store)))
    return str(found.experiment_id)


def _find(client: Any, experiment_id: str, run_id: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.`x1.run_id` = '{run_id}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _tags(run: Run) -> dict[str, str]:
    return {
        "x1.run_id": str(run.manifest["run_id"]),
        "x1.run_dir": str(run.folder.absolute()),
        "x1.name": run.name,
        "x1.config_hash": str(run.manifest.get("config_hash", "")),
    }


def _describe(client: Any, run_id: str, run: Run) -> None:
    """Write the parameters that the store lacks (one once stored can't change) and all tags anew."""
    entities = importlib.import_module("mlflow.entities")
    there = client.get_run(run_id).data.params
    params = [entities.Param(key, text) for key, text in _params(run).items() if key not in there]
    for start in range(0, len(params), PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])
    client.log_batch(run_id, tags=[entities.RunTag(key, text) for key, text in _tags(run).items()])


def keep_files(stored: StoredRun, run: Run) -> None:
    """The config and the manifest as artifacts, so that the store alone says what the run was."""
    stored.client.log_text(stored.run_id, public_config(run), "config.yaml")
    stored.client.log_text(
        stored.run_id, without_passwords(json.dumps(run.manifest, indent=1)), "manifest.json"
    )


def public_config(run: Run) -> str:
    """The config as it lies in the run folder, less a password in the MLflow address."""
    text = (run.folder / "config.yaml").read_text(encoding="utf-8")
    uri = run.config.mlflow.uri
    return text.replace(uri, without_password(uri)) if uri else text


def _params(run: Run) -> dict[str, str]:
    fields = flatten(run.config.model_dump(mode="json"))
    if run.config.mlflow.uri:
        fields["mlflow.uri"] = without_password(run.config.mlflow.uri)
    return {safe_name(path): _text(value)[:PARAM_CHARACTERS] for path, value in fields.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def last_steps(client: Any, run_id: str) -> dict[str, int]:
    """The last step the store has of each metric."""
    keys = client.get_run(run_id).data.metrics
    return {key: max(point.step for point in client.get_metric_history(run_id, key)) for key in keys}


# -----------------------------------------------------------------------------------------------------------
# Reading back


@dataclass(frozen=True)
class Found:
    """An X1 run in a store, as `x1 export` lists it."""

    store: str
    experiment_id: str
    run_id: str  # MLflow's
    x1_run_id: str
    name: str
    folder: Path
    status: str
    started_ms: int


def find_runs(client: Any, uri: str, experiment: str | None, name: str | None) -> list[Found]:
    """The X1 runs of a store, the newest first; `name` is a run's name, its X1 id or its MLflow id."""
    places = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
    if not places:
        return []
    runs = client.search_runs(places, "tags.`x1.run_id` LIKE '%'", order_by=["attributes.start_time DESC"])
    found = [_found(run, database_uri(uri)) for run in runs]
    return [run for run in found if name in (None, run.name, run.x1_run_id, run.run_id)]


def _found(run: Any, store: str) -> Found:
    tags, info = run.data.tags, run.info
    return Found(
        store,
        info.experiment_id,
        info.run_id,
        tags["x1.run_id"],
        tags.get("x1.name", tags["x1.run_id"]),
        Path(tags.get("x1.run_dir", "")),
        info.status,
        info.start_time,
    )


def history(client: Any, run_id: str) -> list[Row]:
    """All points of a run as rows, one a step, in step order."""
    rows: dict[int, Row] = {}
    for key in client.get_run(run_id).data.metrics:
        for point in client.get_metric_history(run_id, key):
            rows.setdefault(point.step, {"step": point.step})[key] = point.value
    return [rows[step] for step in sorted(rows)]


def kept_file(client: Any, run_id: str, name: str, folder: Path) -> str | None:
    """A file kept beside the run, read through `folder`; None when the store has none."""
    if name not in {entry.path for entry in client.list_artifacts(run_id)}:
        return None
    return Path(client.download_artifacts(run_id, name, str(folder))).read_text(encoding="utf-8")


def run_uri(store: str, experiment_id: str | None, run_id: str) -> str:
    """An address that identifies the run: the page of MLflow's own interface, behind the store's address."""
    page = f"experiments/{experiment_id}/runs/{run_id}" if experiment_id else f"runs/{run_id}"
    return (
        f"{without_password(store).rstrip('/')}/#/{page}"
        if store.startswith("http")
        else (f"{without_password(store)}#/{page}")
    )


def is_installed() -> bool:
    return importlib.util.find_spec("mlflow") is not None


def require_mlflow(purpose: str) -> None:
    """One line for a person when MLflow is not installed."""
    if not is_installed():
        raise UserError(f"{purpose} needs MLflow, which is not installed; install it: {INSTALL}")


def is_there(uri: str) -> bool:
    """False for a database file that does not exist: asking MLflow would create it."""
    store = database_uri(uri)
    return not store.startswith("sqlite:///") or Path(store.removeprefix("sqlite:///")).exists()
