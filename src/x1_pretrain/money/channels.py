"""Where alerts go and how one is sent: addresses hold secrets, and sending may hang.

Addresses come from the environment alone and are shown as scheme and host. apprise works in a child process
(this module, run as a command): a service that hangs is killed with it, and what apprise and its libraries
log, which may quote an address, reaches nobody.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from x1_pretrain.errors import UserError

VARIABLE = "X1_ALERTS"
SUCCESS = "SUCCESS"
ANSWER_S = 10.0  # real seconds that a service has to take a message
CHILD_S = 13.5  # real seconds after which the sending process is killed

# ------------------------------------------------------------------------------------------------------------
# Addresses: secret but for scheme and host

# Where apprise reads the host part of an address as a server; elsewhere it may be a token or a topic.
SERVERS = re.compile(r"https?|(json|xml|form|mailto|ntfy|gotify|mmost|matrix|rocket|signal)s?")


def addresses(environment: Mapping[str, str]) -> list[str]:
    """The addresses in X1_ALERTS; a UserError names the first that apprise does not understand."""
    found = list(dict.fromkeys(environment.get(VARIABLE, "").split()))
    if not found:
        return []
    answer = _ask({"check": found})
    if "known" not in answer:
        raise UserError(f"{VARIABLE}: the addresses can't be checked: {answer['result']}")
    for number, (url, known) in enumerate(zip(found, answer["known"], strict=True), start=1):
        if not known or re.search(r",[a-z]+://", url):
            raise UserError(
                f"{VARIABLE}: address {number} of {len(found)} ({scheme(url)}, the rest is not shown) is "
                "not one that apprise understands; docs/alerts.md shows their forms, with spaces between them"
            )
    return found


def scheme(url: str) -> str:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]{0,15})://", url)
    return f"{found[1].lower()}://" if found else "no scheme"


def shown(url: str) -> str:
    """What of an address may be seen: its scheme, and the server where there surely is one."""
    name = scheme(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return name
    loose = [pair for pair in parts.query.split("&") if "@" in pair.partition("=")[0]]
    if "@" in parts.path + parts.fragment or loose:  # a password with / ? or # in it: the split went wrong
        return name
    server = re.fullmatch(r"localhost|[a-z0-9-]+(\.[a-z0-9-]+)+|[0-9a-f:]+:[0-9a-f:]*", host)
    if not server or not SERVERS.fullmatch(name.removesuffix("://")):
        return name
    host = f"[{host}]" if ":" in host else host
    return f"{name}{host}:{port}" if port else f"{name}{host}"


def labelled(urls: Sequence[str]) -> dict[str, str]:
    """Address by what is shown of it; a second one that looks the same is numbered."""
    labels: dict[str, str] = {}
    for url in urls:
        name, number = shown(url), 2
        while name in labels:
            name, number = f"{shown(url)} ({number})", number + 1
        labels[name] = url
    return labels


# ------------------------------------------------------------------------------------------------------------
# Sending, in a process of its own


def send(url: str, title: str, body: str) -> str:
    """One attempt on one channel: SUCCESS, or why not, in words that hold nothing of the address."""
    return str(_ask({"url": url, "title": title, "body": body})["result"])


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    """Have the child answer; it is killed when it takes too long. Never raises."""
    command = [sys.executable, "-P", "-m", "x1_pretrain.money.channels"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(question).encode(),  # not an argument: `ps` shows those
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=CHILD_S,
            check=False,
            start_new_session=True,  # Ctrl-C is for the run, not for the alert that tells of it
        )
    except subprocess.TimeoutExpired:
        return {"result": f"no answer within {CHILD_S:g} s"}
    except OSError as error:
        return {"result": f"the sending process could not start ({error.strerror})"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"result": f"the sending process ended with status {done.returncode} and no answer"}
    return answer if isinstance(answer, dict) else {"result": "the sending process gave no answer"}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        import apprise
    except ImportError:
        return {"result": "apprise is not installed here; run: pip install 'apprise>=2.2,<3'"}
    log = logging.getLogger("apprise")
    log.setLevel(logging.DEBUG)  # the reason of a failed connection is told at this level
    log.propagate = False
    asset = apprise.AppriseAsset(
        app_id="X1", app_desc="X1", image_url_mask=None, image_url_logo=None, storage_mode="memory"
    )
    if "check" in question:
        return {"known": [bool(apprise.Apprise.instantiate(url, asset=asset)) for url in question["check"]]}
    channel = apprise.Apprise(asset=asset)
    if not channel.add(question["url"]):
        return {"result": "not an address that apprise understands"}
    told = channel.notify(
        question["body"],
        question["title"],
        notify_type="warning",
        body_format="text",
        timeout=ANSWER_S,
        log_level=logging.DEBUG,
    )
    # An address with ?optional=yes reports success whatever happened: the attempts tell.
    attempts = [attempt.status.name for service in told.results for attempt in service.attempts[-1:]]
    if attempts and set(attempts) == {SUCCESS}:
        return {"result": SUCCESS}
    return {"result": reason(told.status.name, "\n".join(entry.message for entry in told.logs()))}


REASONS = {
    r"error=404\b": "HTTP 404: no such hook; it was removed, or the address is mistyped",
    r"error=40[13]\b": "HTTP 401 or 403: the token or password is refused",
    r"error=429\b": "HTTP 429: too many messages, the service slows them down",
    r"\(53[45], b": "the mail server refuses user and password (Gmail wants an app password)",
    r"Connection refused": "connection refused: nothing listens there",
    r"NameResolutionError|Name or service not known|Temporary failure in name": "no such host name",
    r"[Tt]imed out|did not finish": f"no answer within {ANSWER_S:g} s",
    r"SSL|CERTIFICATE": "no TLS connection: wrong port, or a certificate that is not trusted",
    r"unreachable|No route to host": "the network does not reach it",
}


def reason(status: str, log: str) -> str:
    """Why a message was not taken. Only words of ours: a log line may hold the address."""
    if status == "TIMEOUT":
        return f"no answer within {ANSWER_S:g} s"
    for pattern, words in REASONS.items():
        if re.search(pattern, log):
            return words
    code = re.search(r"error=(\d{3})\b", log) or re.search(r"\((\d{3}), b", log)
    return f"the service answered with error {code[1]}" if code else "not taken, and apprise does not say why"


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))), flush=True)
    os._exit(0)  # a thread that still waits for a service must not hold the process
