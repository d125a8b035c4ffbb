"""What an object store's library raises becomes one line, and one of four kinds. Pure.

The library's text has the request's address and its inner structures in it; of those only the status, the
store's own code and the kind of the broken connection are read. Nothing of it is passed on as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from x1_pretrain.stores.store import ChangedError, DeniedError, NotThereError, StoreError, UnreachableError

LATER_STATUS = {408, 416, 425, 429, 500, 502, 503, 504, 509}
LATER_CODES = {  # also where the status says that it was our mistake
    "BadDigest": "the bytes came damaged",
    "XAmzContentSHA256Mismatch": "the bytes came damaged",
    "IncompleteBody": "the bytes came incomplete",
    "RequestTimeout": "it waited for bytes that did not come",
    "SlowDown": "it asks to slow down",
    "ConditionalRequestConflict": "another write was under way",
    "OperationAborted": "another write was under way",
    "NoSuchUpload": "the upload was given up there",
    "InternalError": "an error of its own",
}
NEXT_STEPS = {
    "NoSuchBucket": "there is no such bucket; make it, or correct its name",
    "ContainerNotFound": "there is no such container; make it, or correct its name",
    "InvalidAccessKeyId": "it does not know this access key; check AWS_ACCESS_KEY_ID and the endpoint",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key; check AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "it does not know this session token; check AWS_SESSION_TOKEN",
    "ExpiredToken": "the credentials have expired; get new ones",
    "TokenRefreshRequired": "the credentials have expired; get new ones",
    "RequestTimeTooSkewed": "the clock of this machine is too far off; set it (chronyc makestep, or ntpdate)",
    "AuthenticationFailed": "it does not accept these credentials; check the account's key and this clock",
    "EntityTooLarge": "too large for one request",
    "XMinioStorageFull": "it has no room left",
    "QuotaExceeded": "its quota is used up",
    "AllAccessDisabled": "the bucket is closed",
    "AccountProblem": "there is a problem with the account; see its billing page",
    "KMS.DisabledException": "the key that encrypts the bucket is disabled",
    "ServerSideEncryptionConfigurationNotFoundError": "the bucket's encryption is not set up",
}
OF_A_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
MAY_NOT = (
    "these credentials may not do that; allow them to get, put, delete and list there (on S3 s3:GetObject, "
    "s3:PutObject, s3:DeleteObject, s3:ListBucket, s3:AbortMultipartUpload)"
)
NO_CREDENTIALS = {
    "s3": "no credentials that work; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
    "give the machine a role",
    "gs": "no credentials that work; set GOOGLE_APPLICATION_CREDENTIALS to the file of a key, or give the "
    "machine a service account",
    "az": "no credentials that work; set AZURE_STORAGE_ACCOUNT_KEY, or AZURE_CLIENT_ID, AZURE_TENANT_ID and "
    "AZURE_CLIENT_SECRET",
}
TOKEN_SOURCES = (
    "169.254.169.254",
    "169.254.170.2",
    "/latest/api/token",
    "/latest/meta-data/",
    "metadata.google.internal",
    "token request",
    "requesting token",
    "login.microsoftonline.com",
    "oauth2.googleapis.com",
    "sts.amazonaws.com",
    "AssumeRoleWithWebIdentity",
)
BROKEN = (  # in the library's inner structures -> for people; the first that is found counts
    ("dns error", "the name of its server is not known"),
    ("failed to lookup address", "the name of its server is not known"),
    ("invalid peer certificate", "its certificate is not trusted here"),
    ("certificate", "its certificate is not trusted here"),
    ("ConnectionRefused", "nobody listens there (connection refused)"),
    ("TimedOut", "no answer in time"),
    ("kind: Timeout", "no answer in time"),
    ("NetworkUnreachable", "no network"),
    ("HostUnreachable", "no way to its server"),
    ("ConnectionReset", "the connection was cut"),
    ("BrokenPipe", "the connection was cut"),
    ("IncompleteMessage", "the connection was cut"),
    ("UnexpectedEof", "the connection was cut"),
    ("Decode", "the answer came damaged or incomplete"),
)


class UnsupportedError(DeniedError):
    """The store does not know this kind of request, whoever asks."""


@dataclass(frozen=True)
class Said:
    """What an answer of the store says."""

    status: int | None
    code: str
    region: str | None


def read(text: str) -> Said:
    first = text.split("\n\nDebug source")[0]
    status = re.search(r"status code: (\d{3})", first)
    code = re.search(r"<Code>\s*([A-Za-z0-9.]{1,80})\s*</Code>|\"code\":\s*\"([A-Za-z0-9.]{1,80})\"", first)
    region = re.search(r"<Region>\s*([a-z0-9-]{2,40})\s*</Region>|expecting '([a-z0-9-]{2,40})'", first)
    return Said(
        int(status.group(1)) if status else None,
        next((group for group in code.groups() if group), "") if code else "",
        next((group for group in region.groups() if group), None) if region else None,
    )


def translate(error: Exception, scheme: str, where: str) -> StoreError:
    """`where` names the object or the mirror: s3://bucket/runs/x1-50m/head.json."""
    text, kind = str(error), type(error).__name__
    said = read(text)
    if said.status is None or any(source in text.split(" in ")[0] for source in TOKEN_SOURCES):
        early = _before_an_answer(text, kind, scheme, where)
        if early:
            return early
    if said.code in LATER_CODES:
        return UnreachableError(f"{where}: {LATER_CODES[said.code]} ({said.code})")
    if said.code in OF_A_REGION or said.status in (301, 307, 308) or "Received redirect" in text:
        return DeniedError(f"{where}: {wrong_region(said.region)}")
    if said.code in NEXT_STEPS:
        return DeniedError(f"{where}: {NEXT_STEPS[said.code]} ({said.code})")
    return _by_status(said, kind, where)


def wrong_region(region: str | None) -> str:
    if region:
        return f"the bucket is in the region {region}; set AWS_REGION={region}"
    return "the bucket is in another region; set AWS_REGION to the one its page shows"


def _before_an_answer(text: str, kind: str, scheme: str, where: str) -> StoreError | None:
    if any(source in text for source in TOKEN_SOURCES):
        return DeniedError(f"{where}: {NO_CREDENTIALS.get(scheme, 'no credentials found')}")
    if kind == "FileNotFoundError":
        return NotThereError(f"{where}: not there")
    if kind in ("InvalidPathError", "ValueError"):
        return DeniedError(f"{where}: no key that this store takes")
    if kind == "NotSupportedError":
        return UnsupportedError(f"{where}: this store can't do that")
    if kind == "AlreadyExistsError":
        return ChangedError(f"{where}: is already there")
    if kind == "PreconditionError":
        return ChangedError(f"{where}: another version is there")
    if "Received redirect" in text:
        return None
    why = next((words for mark, words in BROKEN if mark in text), "the connection broke")
    return UnreachableError(f"{where}: {why}")


def _by_status(said: Said, kind: str, where: str) -> StoreError:
    shown = " ".join(str(part) for part in (said.status, said.code) if part)
    if kind == "AlreadyExistsError":
        return ChangedError(f"{where}: is already there")
    if kind in ("PreconditionError", "NotModifiedError") or said.status == 412:
        return ChangedError(f"{where}: another version is there")
    if said.status == 409:
        return UnreachableError(f"{where}: another write was under way ({shown})")
    if said.status == 404 or kind == "FileNotFoundError":
        return NotThereError(f"{where}: not there")
    if said.status in LATER_STATUS:
        return UnreachableError(f"{where}: the store answered {shown}")
    if said.status == 401:
        return DeniedError(f"{where}: it does not accept these credentials ({shown}); check them")
    if said.status == 403:
        return DeniedError(f"{where}: {MAY_NOT} ({shown})")
    if said.status in (405, 501):
        return UnsupportedError(f"{where}: this store can't do that ({shown})")
    if said.status == 507:
        return DeniedError(f"{where}: it has no room left ({shown})")
    if said.status is not None and said.status >= 500:
        return UnreachableError(f"{where}: the store answered {shown}")
    kind_of_no = UnsupportedError if said.status == 400 else DeniedError
    return kind_of_no(f"{where}: the store refused it ({shown})")
