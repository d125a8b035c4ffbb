"""What the manifest says of the command."""

from __future__ import annotations

import html
import json

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


PRIVATE = "secret", "hunter2", "ABC", "XXXX", "T00", "zz"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("postgresql://h/db?password=zz", "postgresql://h/db"),
        ("postgresql+psycopg2://me:zz@h:5432/db?sslmode=require", "postgresql+psycopg2://h:5432/db"),
        ("http://u:p/secret@host", "http://host"),
        ("http://u:secret?zz@host/x", "http://host/x"),
        ("http://u:secret#zz@host", "http://host"),
        (
            "https://bucket.s3.amazonaws.com/b.json?X-Amz-Signature=hunter2",
            "https://bucket.s3.amazonaws.com/b.json",
        ),
        ("s3://bucket/b.json?token=zz", "s3://bucket/b.json"),
        ("tgram://123:ABC/456", "tgram://"),
        ("slack://T00/B00/XXXX", "slack://"),
        ("mailto://me:secret@example.org?to=you@example.org", "mailto://"),
        ("https://hooks.slack.com/services/T00/B00/XXXX", "https://hooks.slack.com"),
        ("https://discord.com/api/webhooks/123/XXXX", "https://discord.com"),
        ("https://api.telegram.org/bot123:ABC/sendMessage", "https://api.telegram.org"),
        ("https://chat.example.org:8065/hooks/XXXX", "https://chat.example.org:8065"),
        ("https://ntfy.sh/secret", "https://ntfy.sh"),
    ],
)
def test_nothing_secret_of_an_address_is_left(address: str, public: str) -> None:
    assert run_manifest.without_passwords(address) == public
    for text in (f"reads '{address}', twice", f'{{"uri": "{address}", "n": 1}}', f"<a>{address}</a>"):
        assert run_manifest.without_passwords(text) == text.replace(address, public)
    assert not any(word in public for word in PRIVATE)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b",
        "http://[::1]:5000/a@b",
        "sqlite:////x@y.db",
        "file:///budget.json",
        "https://arxiv.org/abs/2309.14322",
        "github.com/me/webhooks and a/b://c",
        "s3://bucket/runs/x1/",
        "hf://datasets/HuggingFaceFW/fineweb-edu",
        '<svg xmlns="http://www.w3.org/2000/svg">',
        "see `https://www.runpod.io/pricing`, (https://pypi.org).",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert run_manifest.without_passwords(text) == text.replace("a/b://c", "a/b://")


def test_json_and_html_stay_whole() -> None:
    said = {
        "a": 'the address "http://h/x?t=zz" is\nno reading: http://u:zz@h/y?z\nnor this',
        "b": ["http://h?q", "c@d"],
    }
    found = json.loads(run_manifest.without_passwords(json.dumps(said)))
    assert found == {
        "a": 'the address "http://h/x" is\nno reading: http://h/y\nnor this',
        "b": ["http://h", "c@d"],
    }
    page = f"<p>{html.escape(said['a'], quote=True)}</p>"
    clean = html.unescape(run_manifest.without_passwords(page))
    assert clean == f"<p>{found['a']}</p>"
