"""Where S3 is and who we are there: the environment, a profile of ~/.aws, an S3-compatible server."""

from __future__ import annotations

import configparser
import http.client
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from x1_pretrain.errors import UserError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
GIVEN = (  # with one of these the library finds the keys by itself
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
LOOK_UP_S = 5.0
ROLE_S = 1.0
EXPORT = 'eval "$(aws configure export-credentials --profile {} --format env)"'


@dataclass(frozen=True)
class Place:
    """A server that speaks S3, and the keys for it. Never shown: it has no repr of its keys."""

    endpoint: str | None  # none: Amazon's own
    region: str
    keys: Mapping[str, str]  # of a profile; empty: the environment or the machine's role has them

    def __repr__(self) -> str:
        return f"Place({self.endpoint!r}, {self.region!r})"


def find(endpoint: str | None, environment: Mapping[str, str]) -> Place:
    """The conventions of AWS: what is given, then the environment, then the profile."""
    profile = _profile(environment)
    chosen = endpoint or next((environment[name] for name in ENDPOINTS if environment.get(name)), None)
    chosen = _checked(chosen or profile.get("endpoint_url"))
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or profile.get("region")
    return Place(chosen, region or region_of(chosen), _keys(profile, environment))


def region_of(endpoint: str | None) -> str:
    """What an S3-compatible server calls its region, where its name tells; us-east-1 is what most take."""
    host = urlsplit(endpoint or "").hostname or ""
    if host.endswith(".r2.cloudflarestorage.com"):
        return "auto"
    named = re.match(r"s3[.-]([a-z]{2,}[a-z0-9-]*)\.", host)
    return named.group(1) if named and host.count(".") > 1 else "us-east-1"


def _checked(endpoint: str | None) -> str | None:
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    shown = f"{parts.scheme}://{parts.hostname or ''}" if "@" in endpoint else endpoint
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"endpoint {shown}: no address of a server; expected one like https://s3.example.com")
    if "@" in parts.netloc:
        raise UserError(f"endpoint {shown}: no password in an address; credentials come from the environment")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(
            f"endpoint {parts.scheme}://{parts.netloc}{parts.path}: expected the server alone, "
            f"{parts.scheme}://{parts.netloc}; the bucket belongs into the mirror's address"
        )
    return f"{parts.scheme}://{parts.netloc}"


# ------------------------------------------------------------------------------------------------------------
# Profiles


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE")
    home = Path(environment.get("HOME") or Path.home())
    shared = environment.get("AWS_SHARED_CREDENTIALS_FILE") or str(home / ".aws/credentials")
    config = environment.get("AWS_CONFIG_FILE") or str(home / ".aws/config")
    wanted = name or "default"
    found = _section(config, "default" if wanted == "default" else f"profile {wanted}")
    found |= _section(shared, wanted)
    if name and not found and not given(environment):
        raise UserError(f"AWS_PROFILE={name}: no such profile in {shared} or {config}")
    return found


def _section(file: str, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        parser.read_string(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    except configparser.Error:  # its text shows lines of the file
        raise UserError(f"{file}: can't be read as a file of profiles; correct it") from None
    return dict(parser[name]) if parser.has_section(name) else {}


def _keys(profile: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    if given(environment):
        return {}
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    keys = {ours: profile[theirs] for theirs, ours in names.items() if profile.get(theirs)}
    if "access_key_id" in keys and "secret_access_key" in keys:
        return keys
    indirect = next((key for key in profile if key.startswith("sso_") or key == "credential_process"), None)
    indirect = indirect or ("role_arn" if "role_arn" in profile else None)
    if indirect:
        name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default"
        raise UserError(
            f"AWS profile {name}: has {indirect} and no keys, which x1 does not follow; run "
            f"{EXPORT.format(name)} first"
        )
    return {}


def given(environment: Mapping[str, str]) -> bool:
    """Whether the environment says by itself who we are, or that it does not matter."""
    return any(environment.get(one) for one in GIVEN)


def role_answers(environment: Mapping[str, str]) -> bool:
    """Whether anybody can be asked for this machine's role. Else the library tries for most of a minute."""
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    parts = urlsplit(environment.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=ROLE_S).close()
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------
# A wrong region


def bucket_region(bucket: str, endpoint: str | None) -> str | None:
    """Where the bucket is, by the header that even a refusal has; None where nobody says."""
    parts = urlsplit(endpoint or "https://s3.amazonaws.com")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=LOOK_UP_S)
    try:
        connection.request("HEAD", f"/{bucket}")
        found = connection.getresponse().getheader("x-amz-bucket-region") or ""
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return found if re.fullmatch(r"[a-z0-9-]{2,40}", found) else None
