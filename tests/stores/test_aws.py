from __future__ import annotations

from pathlib import Path

import pytest

from tests.stores.canned import Canned
from x1_pretrain.errors import UserError
from x1_pretrain.stores.aws import bucket_region, find, region_of

SECRET = "secret-of-this-test"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    return tmp_path


def write(home: Path, name: str, text: str) -> None:
    (home / ".aws" / name).write_text(text, encoding="utf-8")


KEYS = f"aws_access_key_id = AKIA\naws_secret_access_key = {SECRET}\n"


def test_nothing_at_all(home: Path) -> None:
    place = find(None, {"HOME": str(home)})
    assert (place.endpoint, place.region, dict(place.keys)) == (None, "us-east-1", {})


def test_the_default_profile(home: Path) -> None:
    write(
        home, "credentials", f"[default]\n{KEYS}aws_session_token = t%(x)s\n[other]\naws_access_key_id = B\n"
    )
    write(home, "config", "[default]\nregion = eu-west-3\nendpoint_url = https://s3.example.com\n")
    place = find(None, {"HOME": str(home)})
    assert (place.endpoint, place.region) == ("https://s3.example.com", "eu-west-3")
    assert place.keys == {"access_key_id": "AKIA", "secret_access_key": SECRET, "session_token": "t%(x)s"}
    assert SECRET not in repr(place)


def test_a_profile_by_name(home: Path) -> None:
    write(home, "credentials", f"[default]\naws_access_key_id = no\n[lab]\n{KEYS}")
    write(home, "config", "[default]\nregion = us-west-1\n[profile lab]\nregion = eu-north-1\n")
    place = find(None, {"HOME": str(home), "AWS_PROFILE": "lab"})
    assert (place.region, place.keys["access_key_id"]) == ("eu-north-1", "AKIA")


def test_what_is_said_last_counts(home: Path) -> None:
    write(home, "credentials", f"[default]\n{KEYS}")
    write(home, "config", "[default]\nregion = us-west-1\nendpoint_url = https://a.example.com\n")
    environment = {"HOME": str(home), "AWS_ENDPOINT_URL": "https://b.example.com", "AWS_REGION": "eu-west-1"}
    assert find(None, environment).endpoint == "https://b.example.com"
    environment["AWS_ENDPOINT_URL_S3"] = "https://c.example.com/"
    assert find(None, environment).endpoint == "https://c.example.com"
    place = find("http://127.0.0.1:9000", environment | {"AWS_ACCESS_KEY_ID": "mine"})
    assert (place.endpoint, place.region) == ("http://127.0.0.1:9000", "eu-west-1")
    assert not place.keys  # the environment's are taken


@pytest.mark.parametrize("name", ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"])
def test_a_role_comes_before_the_files(home: Path, name: str) -> None:
    write(home, "credentials", f"[default]\n{KEYS}")
    assert not find(None, {"HOME": str(home), name: "x"}).keys


@pytest.mark.parametrize(
    ("credentials", "config", "environment", "words"),
    [
        ("", "", {"AWS_PROFILE": "lab"}, "AWS_PROFILE=lab: no such profile in "),
        ("[default", "", {}, "can't be read as a file of profiles"),
        (f"[default]\n{SECRET}\n", "", {}, "can't be read as a file of profiles"),
        ("", "[default]\nsso_session = s\n", {}, "AWS profile default: has sso_session and no keys"),
        ("", "[profile lab]\nrole_arn = r\n", {"AWS_PROFILE": "lab"}, "export-credentials --profile lab"),
        ("[default]\ncredential_process = p\n", "", {}, "has credential_process and no keys"),
    ],
)
def test_profiles_that_lead_nowhere(
    home: Path, credentials: str, config: str, environment: dict[str, str], words: str
) -> None:
    write(home, "credentials", credentials)
    write(home, "config", config)
    with pytest.raises(UserError, match=words) as caught:
        find(None, environment | {"HOME": str(home)})
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    find(None, environment | {"HOME": str(home), "AWS_ACCESS_KEY_ID": "a"}) if "read" not in words else None


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("s3.example.com", "expected one like https://"),
        ("s3://bucket", "expected one like https://"),
        ("https://", "expected one like https://"),
        (f"https://user:{SECRET}@host", "no password in an address"),
        ("https://host/bucket", "expected the server alone, https://host; the bucket belongs"),
        ("https://host?x=1", "expected the server alone"),
    ],
)
def test_endpoints_that_are_none(home: Path, endpoint: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find(endpoint, {"HOME": str(home)})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "region"),
    [
        (None, "us-east-1"),
        ("http://127.0.0.1:9000", "us-east-1"),
        ("https://minio.example.com", "us-east-1"),
        ("https://0123abcd.r2.cloudflarestorage.com", "auto"),
        ("https://s3.us-west-004.backblazeb2.com", "us-west-004"),
        ("https://s3.eu-central-1.wasabisys.com", "eu-central-1"),
        ("https://s3.fr-par.scw.cloud", "fr-par"),
        ("https://s3.example", "us-east-1"),
    ],
)
def test_what_a_server_calls_its_region(endpoint: str | None, region: str) -> None:
    assert region_of(endpoint) == region


def test_where_a_bucket_is() -> None:
    with Canned() as server:
        server.say(403, headers={"x-amz-bucket-region": "ca-central-1"})
        assert bucket_region("bucket", server.url) == "ca-central-1"
        server.plain()
        server.say(403, headers={"x-amz-bucket-region": "not a region"})
        assert bucket_region("bucket", server.url) is None
        gone = server.url
    assert bucket_region("bucket", gone) is None
