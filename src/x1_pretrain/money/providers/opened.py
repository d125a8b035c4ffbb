"""A provider by its name, with the key and the address that the environment holds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from decimal import Decimal

import httpx2

from x1_pretrain.errors import UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.providers import lambda_cloud, runpod, web
from x1_pretrain.money.providers.base import Provider
from x1_pretrain.money.providers.lambda_cloud import Lambda
from x1_pretrain.money.providers.local import Local
from x1_pretrain.money.providers.runpod import RunPod

NAMES = ("lambda", "runpod", "local", "fake")
KEYS_AT = {
    lambda_cloud.KEY_VARIABLE: "https://cloud.lambda.ai/api-keys",
    runpod.KEY_VARIABLE: "https://console.runpod.io/user/settings",
}
FAKE_VARIABLE = "X1_FAKE_URL"


def open_provider(
    name: str,
    clock: Clock,
    *,
    rate_usd_per_hr: Decimal | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Provider:
    """Ready to be asked; nothing is sent yet. `rate_usd_per_hr` is for `local` alone."""
    match name:
        case "lambda":
            url = _url(environment, "X1_LAMBDA_URL", lambda_cloud.URL)
            return Lambda(_key(environment, lambda_cloud.KEY_VARIABLE), clock, url)
        case "runpod":
            url = _url(environment, "X1_RUNPOD_URL", runpod.URL)
            graphql_url = _url(environment, "X1_RUNPOD_GRAPHQL_URL", runpod.GRAPHQL_URL)
            return RunPod(_key(environment, runpod.KEY_VARIABLE), clock, url, graphql_url)
        case "local":
            if rate_usd_per_hr is None:
                raise UserError(
                    "what does this machine cost? state a rate in USD per hour, such as 0.08, or 0"
                )
            return Local(rate_usd_per_hr, clock)
        case "fake":
            return _fake(clock, environment)
    raise UserError(f"no provider is called {name!r}: expected {', '.join(NAMES)}")


def _fake(clock: Clock, environment: Mapping[str, str]) -> Provider:
    """Speaks RunPod's API on a server of ours. Its key is no secret, so any address will do."""
    if not environment.get(FAKE_VARIABLE, "").strip():
        raise UserError(f"{FAKE_VARIABLE} is not set: x1 fake-provider starts one and prints its address")
    root = _url(environment, FAKE_VARIABLE, "", secret=False)
    return RunPod(
        "fake",
        clock,
        f"{root}/v2",
        f"{root}/graphql",
        name="fake",
        label="the fake provider",
        key_variable=FAKE_VARIABLE,
    )


def _key(environment: Mapping[str, str], variable: str) -> str:
    key = environment.get(variable, "").strip()
    if not key:
        raise UserError(f"{variable} is not set: make a key at {KEYS_AT[variable]} and export it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{variable} holds something that can't be a key (a space, a line break): copy it again"
        )
    return key


def _url(environment: Mapping[str, str], variable: str, default: str, *, secret: bool = True) -> str:
    """An address; one that a key may be sent to is encrypted, or on this machine."""
    found = environment.get(variable, "").strip().rstrip("/") or default
    try:
        url = httpx2.URL(found)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    plain_is_fine = not secret or url.host in web.THIS_MACHINE
    named = re.fullmatch(r"[A-Za-z0-9.:-]+", url.host)
    if named and (url.scheme == "https" or (url.scheme == "http" and plain_is_fine)):
        return found
    raise UserError(f"{variable}={found}: expected https://..., or http://127.0.0.1:PORT on this machine")
