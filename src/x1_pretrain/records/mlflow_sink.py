"""Copying a run's metrics to MLflow while it trains, without training ever waiting for it or failing with it.

A thread follows `metrics.jsonl` and sends what the store lacks. The file is the truth: what the store has is
asked of the store, so a run that was killed, or whose store was away for an hour, continues where the copy
ended and no point goes twice. A whole copy can be made again at any time:

    python -m x1_pretrain.records.mlflow_sink runs/x1-50m-a100 --uri file:///workspace/mlruns
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import UserError
from x1_pretrain.records import mlflow_store
from x1_pretrain.records.run_folder import Run, find_run, last_step, open_run
from x1_pretrain.records.tail import Tail

POLL_S = 2.0
LONGEST_PAUSE_S = 60.0  # between two tries while the store is away


class MlflowSink:
    """Start it once `config.yaml` and `manifest.json` are in the run folder; `close` it when the run ends.

    `news()` hands over what there is to say, a line each, for the loop to print and to put among the events.
    """

    def __init__(self, run_dir: Path, uri: str, experiment: str, poll_s: float = POLL_S) -> None:
        self._run_dir, self._uri, self._experiment = run_dir, uri, experiment
        self._poll_s = self._pause_s = poll_s
        self._tail = Tail(run_dir / "metrics.jsonl")
        self._stored: mlflow_store.StoredRun | None = None
        self._news: SimpleQueue[str] = SimpleQueue()  # said in the thread, told by the loop
        self._in_trouble = False
        self._status: str | None = None  # set: drain, then close the run with it
        self._given_up = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-sink", daemon=True)
        self._thread.start()

    def news(self) -> list[str]:
        """The lines since the last call."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def close(self, status: str, timeout_s: float = 10.0) -> None:
        """Send the rest and set the terminal status (FINISHED, KILLED, FAILED); give up after `timeout_s`."""
        self._status = status
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up = True
            self._wake.set()
            self._say(f"MLflow still lacks rows after {timeout_s:g} s; {_again(self._run_dir, self._uri)}")

    # -- in the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        if not mlflow_store.is_installed():
            self._say(
                f"MLflow is off: it is not installed ({mlflow_store.INSTALL}); metrics.jsonl has everything"
            )
            return
        while not self._given_up and not self._done():
            self._wake.wait(self._pause_s)
            self._wake.clear()

    def _done(self) -> bool:
        """One look at the file. True once the run is closed in the store."""
        status = self._status  # read before the rows: all rows of a closing run are then in the file
        try:
            stored = self._connected()
            stored.send(self._tail.read())
            if status is not None:
                stored.finish(status)
        except Exception as error:  # whatever ails the store, training must not feel it
            self._trouble(error)
            return False
        self._well_again()
        return status is not None

    def _connected(self) -> mlflow_store.StoredRun:
        if self._stored is None:
            run = open_run(self._run_dir)
            self._say_where(run)
            self._stored = _open_stored(run, self._uri, self._experiment)
            self._tail = Tail(self._run_dir / "metrics.jsonl")  # from the start: the store knows what it has
        return self._stored

    def _say_where(self, run: Run) -> None:
        store = mlflow_store.database_uri(self._uri)
        if store != self._uri and run.mlflow() is None and not self._in_trouble:
            self._say(
                f"MLflow no longer takes plain files ({self._uri}); the metrics go to {store}, "
                f"artifacts beside it (to look: mlflow ui --backend-store-uri {store})"
            )

    def _trouble(self, error: Exception) -> None:
        """Say it once per trouble; ask the store again what it has before anything more is sent."""
        self._stored = None
        if not self._in_trouble:
            self._in_trouble = True
            where = mlflow_store.without_password(mlflow_store.database_uri(self._uri))
            reason = mlflow_store.reason_of(error)
            self._say(f"MLflow at {where}: {reason}; training goes on, tried again later")
        self._pause_s = min(max(2 * self._pause_s, 0.1), LONGEST_PAUSE_S)

    def _well_again(self) -> None:
        if self._in_trouble:
            self._in_trouble = False
            self._say("MLflow takes rows again; nothing is missing")
        self._pause_s = self._poll_s

    def _say(self, line: str) -> None:
        self._news.put(line)


def _again(run_dir: Path, uri: str) -> str:
    command = (
        f"python -m x1_pretrain.records.mlflow_sink {run_dir} --uri {mlflow_store.without_password(uri)}"
    )
    return f"metrics.jsonl has them, `{command}` sends them"


def _open_stored(run: Run, uri: str, experiment: str) -> mlflow_store.StoredRun:
    """Our run in the store, described there and pointed to from the run folder."""
    client = mlflow_store.connect(uri)
    stored = mlflow_store.stored_run(client, uri, experiment, run)
    _point(run.folder, stored)
    mlflow_store.keep_files(stored, run)
    return stored


def _point(folder: Path, stored: mlflow_store.StoredRun) -> None:
    new = folder / ".mlflow.json.new"
    new.write_text(json.dumps(stored.pointer(), indent=1) + "\n", encoding="utf-8")
    new.replace(folder / "mlflow.json")


# -----------------------------------------------------------------------------------------------------------
# The whole copy at once


def rebuild(run_dir: Path, uri: str, experiment: str | None = None) -> int:
    """Bring a store up to the run folder: a new run in an empty store, what is missing in any other.

    Returns how many points were sent.
    """
    run = open_run(run_dir)
    stored = _open_stored(run, uri, experiment or run.config.mlflow.experiment)
    rows = run.rows()
    sent = stored.send(rows)
    stored.finish("FINISHED" if last_step(rows) >= run.total_steps else "KILLED")
    return sent


def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or the name of a run under runs/")],
    uri: Annotated[str | None, typer.Option(help="the store; default: the one of the run's config")] = None,
    experiment: Annotated[str | None, typer.Option(help="default: the one of the run's config")] = None,
) -> None:
    """Copy a run's metrics to an MLflow store, from metrics.jsonl. What the store has is not sent again."""
    folder = find_run(run)
    target = uri or open_run(folder).config.mlflow.uri
    if target is None:
        raise UserError(
            f"{folder}: its config names no MLflow store; pass --uri, for example --uri file:///workspace/mlruns"
        )
    mlflow_store.require_mlflow("copying a run to MLflow")
    sent = rebuild(folder, target, experiment)
    print(f"{sent:,} points sent to {mlflow_store.without_password(mlflow_store.database_uri(target))}")


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.records.mlflow_sink"))
