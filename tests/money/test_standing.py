"""What home reads from a mirror, and what a machine must be handed to reach it: odd heads are no news, a
secret is never shown, and what is missing is named."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.config_reading import parse_config
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror.head import Head, Published, Writer, encode
from x1_pretrain.money import credentials
from x1_pretrain.money.standing import Mirror, Standing, opened, standing, whole
from x1_pretrain.stores.folder_store import FolderStore

STATUS = {"step": 70, "tokens": 7000, "elapsed_s": 35.0, "spent_usd": "1.25", "state": "running", "why": ""}
WRITER = Writer(4, "1a2b3c4d", "folder", "gpu-1", 7, "2026-11-21T10:00:00Z", beat=9, stale_s=45.0)
POINT = Published(60, 4, "p", 10, "0", "0", "2026-11-21T10:00:00Z")
HEAD = Head("tiny", WRITER, checkpoints=[replace(POINT, step=40), POINT], status=STATUS)


def test_what_a_head_says() -> None:
    found = standing(HEAD, 12.5)
    assert found == Standing(
        epoch=4,
        beat=9,
        writing=True,
        host="gpu-1",
        state="running",
        step=70,
        good_step=60,
        tokens_per_sec=200.0,
        spent_usd=Decimal("1.25"),
        silent_s=12.5,
        stale_s=45.0,
    )
    assert found is not None
    assert found.lost_steps == 10


def test_a_run_in_the_trash_has_nothing_to_go_on_with() -> None:
    found = standing(replace(HEAD, writer=replace(WRITER, state="trashed")))
    assert found.trashed
    assert (found.epoch, found.writing, found.good_step, found.spent_usd) == (4, False, 0, None)


@given(
    st.dictionaries(
        st.sampled_from(sorted(STATUS)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())),
    )
)
def test_whatever_the_status_holds_nothing_breaks(status: dict[str, Any]) -> None:
    found = standing(replace(HEAD, status=status))
    assert found is not None
    assert found.good_step == 60
    assert found.tokens_per_sec is None or found.tokens_per_sec > 0
    assert found.spent_usd is None or found.spent_usd >= 0


def test_a_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = Mirror(FolderStore(str(tmp_path)), "tiny")
    assert (mirror.look(), mirror.trouble) == (None, "")
    (tmp_path / "tiny").mkdir()
    file = tmp_path / "tiny" / "head.json"
    file.write_bytes(encode(HEAD))
    found = mirror.look()
    assert found is not None
    assert found.silent_s is not None
    assert 0 <= found.silent_s < 60
    file.write_bytes(encode(HEAD)[:40])
    assert mirror.look() is None
    assert mirror.look() is None
    assert "head.json" in mirror.trouble
    assert capsys.readouterr().out.count("mirror: ") == 1  # said once
    file.write_bytes(encode(HEAD))
    assert mirror.look() is not None
    assert mirror.trouble == ""


def config(**mirror: Any) -> Any:
    model = {"layers": 1, "d_model": 8, "heads": 1, "kv_heads": 1, "d_ff": 8, "context": 8, "vocab_size": 300}
    tree = {"name": "tiny", "model": model, "training": {"total_steps": 4, "batch_tokens": 8}}
    return parse_config({**tree, "optimizer": {"warmup_steps": 0}, "mirror": mirror}, "a test")


def test_a_run_without_a_mirror_has_none() -> None:
    assert opened(config(), ["runpod"]) is None


def test_a_folder_is_seen_by_machines_on_this_computer_alone(tmp_path: Path) -> None:
    found = opened(config(uri=str(tmp_path)), ["fake"])
    assert found is not None
    assert found.look() is None
    assert not (tmp_path / "tiny").exists() or not list((tmp_path / "tiny").iterdir())  # no probe is left
    with pytest.raises(UserError, match="a machine at lambda does not see"):
        opened(config(uri=str(tmp_path)), ["fake", "lambda"])


def test_a_store_that_can_not_keep_two_writers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FolderStore.__init__

    def unsafe(self: FolderStore, *arguments: Any) -> None:
        made(self, *arguments)
        self.conditional = False

    monkeypatch.setattr(FolderStore, "__init__", unsafe)
    with pytest.raises(RefusedError, match="two writers apart"):
        opened(config(uri=str(tmp_path)), ["fake"])
    assert opened(config(uri=str(tmp_path), without_lease=True), ["fake"]) is not None


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as raised:
        opened(config(uri=str(tmp_path / "file" / "x")), ["fake"])
    assert "\n" not in str(raised.value)


def test_an_address_is_good_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert whole("copies") == str(tmp_path / "copies")
    assert whole("s3://bucket/runs/") == "s3://bucket/runs"


# ------------------------------------------------------------------------------------------------------------
# Credentials

AWS = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "very-secret"}


@pytest.mark.parametrize(
    ("uri", "environment", "handed"),
    [
        (
            "s3://bucket/runs",
            {**AWS, "AWS_REGION": "eu-west-1", "AWS_PROFILE": "p", "OTHER": "x"},
            {*AWS, "AWS_REGION"},
        ),
        (
            "s3://bucket/runs",
            {**AWS, "AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL": "https://x"},
            {*AWS, "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"},
        ),
        ("hf://user/repository", {"HF_TOKEN": "hf_x"}, {"HF_TOKEN"}),
        (
            "az://container/runs",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "k"},
            {"AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"},
        ),
        (
            "az://container/runs",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_SAS_TOKEN": "k"},
            {"AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_SAS_TOKEN"},
        ),
        ("/mnt/disk", {}, set()),
        (None, {}, set()),
    ],
)
def test_what_is_handed_over(uri: str | None, environment: dict[str, str], handed: set[str]) -> None:
    found = credentials.values(uri, {"HOME": "/nowhere", **environment})
    assert set(found) == handed
    assert set(found) <= set(credentials.names(uri))
    known = {"AWS_REGION": "us-east-1", **environment}
    assert all(known[name] == value for name, value in found.items())


def test_where_a_profile_says_the_store_is_travels_and_its_keys_do_not(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    text = (
        "[default]\nregion = eu-west-3\nendpoint_url = https://s3.lan\naws_access_key_id = of-the-profile\n"
    )
    (tmp_path / ".aws" / "config").write_text(text)
    found = credentials.values("s3://bucket/runs", {"HOME": str(tmp_path), **AWS})
    assert found == {**AWS, "AWS_REGION": "eu-west-3", "AWS_ENDPOINT_URL": "https://s3.lan"}
    at_r2 = credentials.values(
        "s3://bucket/runs", {"HOME": "/nowhere", **AWS}, "https://x.r2.cloudflarestorage.com"
    )
    assert at_r2 == {**AWS, "AWS_REGION": "auto"}  # its server is in the config
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        credentials.values("s3://bucket/runs", {"HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("uri", "environment", "said"),
    [
        ("s3://bucket/runs", {}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"),
        ("s3://bucket/runs", {"AWS_PROFILE": "default"}, "no profile or login of this computer"),
        (
            "s3://bucket/runs",
            {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": ""},
            "AWS_SECRET_ACCESS_KEY is not set",
        ),
        (
            "az://container/runs",
            {"AZURE_STORAGE_ACCOUNT_KEY": "very-secret"},
            "AZURE_STORAGE_ACCOUNT_NAME is not set",
        ),
        ("hf://user/repository", {}, "HF_TOKEN is not set"),
        ("gs://bucket/runs", {}, "GOOGLE_APPLICATION_CREDENTIALS is not set"),
        (
            "gs://bucket/runs",
            {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere"},
            "/nowhere: can't be read as a key file",
        ),
    ],
)
def test_what_is_missing_is_named(uri: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        credentials.values(uri, environment)
    assert said in str(raised.value)
    assert "very-secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_google_s_key_travels_without_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    key = {
        "type": "service_account",
        "private_key": "-----BEGIN\nvery-secret\n-----END",
        "client_email": "a@b",
    }
    file.write_text(json.dumps(key, indent=2))
    found = credentials.values("gs://bucket/runs", {"GOOGLE_APPLICATION_CREDENTIALS": str(file)})
    assert set(found) == {"GOOGLE_SERVICE_ACCOUNT_KEY"}
    assert json.loads(found["GOOGLE_SERVICE_ACCOUNT_KEY"]) == key
    assert "\n" not in found["GOOGLE_SERVICE_ACCOUNT_KEY"]  # an environment file holds one line each


@pytest.mark.parametrize(
    "content", ['{"type": "authorized_user", "refresh_token": "very-secret"}', "{", "[]", "3"]
)
def test_a_google_login_is_no_key(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.write_text(content)
    with pytest.raises(UserError) as raised:
        credentials.values("gs://bucket/runs", {"GOOGLE_APPLICATION_CREDENTIALS": str(file)})
    assert "very-secret" not in str(raised.value)
