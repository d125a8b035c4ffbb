"""What the manifest says of the command."""

from __future__ import annotations

import pytest

from x1_pretrain.records import run_manifest


def test_the_command_is_recorded_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/usr/bin/x1", "train", "--mlflow-uri", "http://me:se@cret@host:5000/a@b"]
    monkeypatch.setattr("sys.argv", [*typed, "--set", "mlflow.uri=https://me:secret@host", "a@b:c"])
    told = [
        "x1",
        "train",
        "--mlflow-uri",
        "http://host:5000/a@b",
        "--set",
        "mlflow.uri=https://host",
        "a@b:c",
    ]
    assert run_manifest.argv() == told


def test_every_address_in_a_text_loses_its_password() -> None:
    text = "no 'http://me:secret@host/x' nor sqlite:////x.db nor postgresql://me:pw@db"
    assert run_manifest.without_passwords(text) == (
        "no 'http://host/x' nor sqlite:////x.db nor postgresql://db"
    )
