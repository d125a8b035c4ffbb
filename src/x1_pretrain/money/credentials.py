"""What a rented machine needs to know in order to reach the mirror: variables, by name.

Only what the environment holds can travel. A profile, a role or a login of this computer can't, so a mirror
that needs one is refused before a machine is rented. Values are handed to the provider and never kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from x1_pretrain.errors import UserError
from x1_pretrain.stores import aws
from x1_pretrain.stores.address import parse

GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
GOOGLE_KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"  # the file's content

# all that may be of use, by scheme ...
NAMES = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"),
        *("AWS_DEFAULT_REGION", *aws.ENDPOINTS, "AWS_ALLOW_HTTP", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST"),
    ),
    "gs": (GOOGLE_KEY,),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
        *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET"),
        *("AZURE_STORAGE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID"),
        *("AZURE_ENDPOINT",),
    ),
    "hf": ("HF_TOKEN", "HF_ENDPOINT"),
    "file": (),
}
# ... and of which sets one has to be there
SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "s3": (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),),
    "gs": ((GOOGLE_KEY,),),
    "az": (
        ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_SAS_TOKEN"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_SAS_KEY"),
        *(
            (
                "AZURE_STORAGE_ACCOUNT_NAME",
                f"{prefix}CLIENT_ID",
                f"{prefix}CLIENT_SECRET",
                f"{prefix}TENANT_ID",
            )
            for prefix in ("AZURE_STORAGE_", "AZURE_")
        ),
    ),
    "hf": (("HF_TOKEN",),),
    "file": ((),),
}


def names(uri: str | None) -> tuple[str, ...]:
    """Of the variables that a machine is handed for a mirror."""
    return NAMES[parse(uri).scheme] if uri else ()


def values(uri: str | None, environment: Mapping[str, str], endpoint: str | None = None) -> dict[str, str]:
    """Those that are set here, and where a profile says the store is; UserError names what is missing."""
    if uri is None:
        return {}
    scheme = parse(uri).scheme
    found = {name: environment[name] for name in NAMES[scheme] if environment.get(name)}
    if scheme == "gs" and GOOGLE_KEY not in found:
        found |= _google(environment)
    if not any(set(needed) <= set(found) for needed in SETS[scheme]):
        ways = [" and ".join(needed) for needed in SETS[scheme]]
        missing = [name for name in SETS[scheme][0] if name not in found]
        also = f" (or {'; or '.join(ways[1:])})" if len(ways) > 1 else ""
        raise UserError(
            f"mirror {uri}: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set here{also};"
            " a rented machine gets no profile or login of this computer, only such variables: export them"
        )
    return found | (_place(environment, endpoint) if scheme == "s3" else {})


def _place(environment: Mapping[str, str], endpoint: str | None) -> dict[str, str]:
    """Region and server as this computer finds them, also those of its profile."""
    place = aws.find(endpoint, environment)
    server = {"AWS_ENDPOINT_URL": place.endpoint} if place.endpoint and not endpoint else {}
    return {"AWS_REGION": place.region, **server}


def _google(environment: Mapping[str, str]) -> dict[str, str]:
    """The file stays here: what is in it travels. Only a service account's key is a credential by itself."""
    name = environment.get(GOOGLE_FILE)
    if not name:
        raise UserError(
            f"{GOOGLE_FILE} is not set here: name the key file of a service account that may write to the "
            "bucket; a rented machine gets no login of this computer"
        )
    try:
        tree = json.loads(Path(name).read_text(encoding="utf-8"))
        kind = tree.get("type")
    except (OSError, ValueError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UserError(f"{GOOGLE_FILE}={name}: can't be read as a key file ({what})") from None
    if kind != "service_account":
        raise UserError(
            f"{GOOGLE_FILE}={name}: holds a {kind or 'file'} that is no service account's key; make one for "
            "a service account that may write to the bucket"
        )
    return {GOOGLE_KEY: json.dumps(tree)}
