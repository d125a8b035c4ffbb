"""What a run talks to, without a word being sent unasked."""

from __future__ import annotations

import http.server
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import tiny_config

from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.doctor import services, trial

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def config(**sections: Any) -> RunConfig:
    return parse_config(tiny_config(**sections), "test")


def test_no_channel_and_one_that_is_none() -> None:
    assert services.alerts({}, send=True) == services.Alerts()
    found = services.alerts({"X1_ALERTS": "nonsense-secret"}, send=False)
    assert found.trouble is not None
    assert "secret" not in found.trouble


def test_a_test_message_goes_out_only_when_asked_for() -> None:
    taken: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response_only(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"X1_ALERTS": f"json://127.0.0.1:{server.server_port}/hook"}
        quiet = services.alerts(environment, send=False)
        assert (quiet.results, taken) == ((), [])
        sent = services.alerts(environment, send=True)
        server.shutdown()
    assert sent.results == ("SUCCESS",)
    assert len(taken) == 1
    assert services.TITLE in taken[0]


def test_the_budget_file(tmp_path: Path) -> None:
    assert services.budget(config(), NOW) is None
    file = tmp_path / "budget.json"
    named = config(budget={"curr_cost_uri": str(file)})
    absent = services.budget(named, NOW)
    assert absent is not None
    assert absent.absent
    file.write_text(
        json.dumps({"spent_usd": 1.5, "rate_usd_per_hr": 2, "last_update_utc": "2026-11-20T00:00:00Z"})
    )
    good = services.budget(named, NOW)
    assert good is not None
    assert (good.spent_usd, good.usd_per_hr) == (1.5, 2.0)
    file.write_text("{")
    damaged = services.budget(named, NOW)
    assert damaged is not None
    assert "JSON" in str(damaged.trouble)
    odd = services.budget(config(budget={"curr_cost_uri": "ftp://user:secret@h/x"}), NOW)
    assert odd is not None
    assert odd.trouble is not None
    assert "secret" not in odd.trouble + odd.address


def test_mlflow_is_looked_for_without_making_anything(tmp_path: Path) -> None:
    assert services.store(config()) is None
    found = services.store(config(mlflow={"uri": f"file://{tmp_path}/runs"}))
    assert found is not None
    assert found.file == tmp_path / "runs" / "mlflow.db"
    assert found.writable
    assert list(tmp_path.iterdir()) == []
    server = services.store(config(mlflow={"uri": "https://me:secret@host/ml"}))
    assert server is not None
    assert (server.file, server.writable) == (None, True)
    assert "secret" not in server.address


def test_a_store_that_does_not_answer_is_a_finding() -> None:
    pytest.importorskip("mlflow")
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    found = trial.run("x1_pretrain.doctor.mlflow_trial", {"uri": "http://127.0.0.1:9"}, 60, environment)
    assert "trouble" in found.part("store"), found
