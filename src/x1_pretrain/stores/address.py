"""Where a mirror is: `s3://bucket/runs` and its like, or a folder. A typo is named, a secret never shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from x1_pretrain.errors import RefusedError, UserError

SCHEMES = ("s3", "gs", "az", "hf", "file")
OTHER_NAMES = {
    **dict.fromkeys(("s3a", "s3n", "aws", "r2", "b2", "minio"), "s3"),
    **dict.fromkeys(("gcs", "gc", "google"), "gs"),
    **dict.fromkeys(("azure", "abfs", "abfss", "wasb", "wasbs", "adl"), "az"),
    **dict.fromkeys(("hub", "huggingface"), "hf"),
}
BUCKETS = {
    "s3": (r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "3 to 63 of a-z, 0-9, '.' and '-'"),
    "gs": (r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", "3 or more of a-z, 0-9, '.', '_' and '-'"),
    "az": (r"[a-z0-9$][a-z0-9-]{1,61}[a-z0-9]", "a container: 3 to 63 of a-z, 0-9 and '-'"),
    "hf": (
        r"(datasets/)?(?!(datasets|spaces|models)/)[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*",
        "USER/REPOSITORY or datasets/USER/REPOSITORY",
    ),
}
FORMS = (
    "expected s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, az://CONTAINER/FOLDER, hf://USER/REPOSITORY or a folder"
)
RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Address:
    """A folder of runs in a store."""

    scheme: str  # s3, gs, az, hf, file
    bucket: str  # of hf: user/repository or datasets/user/repository; of file: empty
    prefix: str  # without slashes at its ends; of file: the whole path, from the root

    def __str__(self) -> str:
        if self.scheme == "file":
            return self.prefix
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def is_folder(self) -> bool:
        return self.scheme == "file"

    def of_run(self, name: str) -> str:
        """What a person types to name this run of it."""
        return f"{str(self).rstrip('/')}/{name}"


def parse(text: str) -> Address:
    """The address in `text`; UserError names what is wrong with it."""
    text = text.strip()
    if not text:
        raise UserError(f"an empty address of a mirror; {FORMS}")
    if not text.isprintable():
        raise UserError(f"{text!r}: characters that no address has; {FORMS}")
    scheme = _scheme(text)
    if scheme is None:
        return _folder(text)
    if scheme.lower() == "file":
        return _file_uri(text)
    rest = text[len(scheme) :].lstrip(":").lstrip("/")
    if scheme not in SCHEMES or not re.match(rf"{scheme}://(?!/)", text):
        raise UserError(_typo(text, scheme, rest))
    return _in_a_store(scheme, rest)


def is_uri(text: str) -> bool:
    """Whether an address in a store is meant, also one with a typo, and no path."""
    return _scheme(text.strip()) is not None


def refuse_uri(text: str) -> None:
    """UserError where `text` is the address of a mirrored run, for commands that read a folder. A `Path` has
    one slash where there were two."""
    if is_uri(text) and not Path(text).exists():
        address = parse(re.sub(r":/(?=[^/])", "://", text, count=1))
        raise UserError(
            f"{address}: is in a mirror, and this command reads a folder; `x1 pull {address}` fetches it, "
            f"`x1 runs {address}` says how it stands"
        )


def run_address(text: str) -> tuple[Address, str]:
    """The mirror and the run's name in the address of a run, like `s3://bucket/runs/x1-50m`."""
    whole = parse(text)
    parent, _, name = whole.prefix.rpartition("/")
    if not name:
        raise UserError(
            f"{whole}: names a mirror, not a run in it; expected {whole.of_run('NAME')}; "
            f"`x1 runs {whole}` lists them"
        )
    if not re.fullmatch(RUN_NAME, name):
        raise UserError(f"{whole}: {name!r} is no name of a run (letters, digits, '.', '_' and '-')")
    return Address(whole.scheme, whole.bucket, (parent or "/") if whole.is_folder else parent), name


def refuse_overlap(address: Address, name: str, run_folder: Path) -> None:
    """RefusedError if the copy of the run would lie in the run folder, or the run folder in it."""
    if not address.is_folder:
        return
    copy, mine = Path(address.prefix, name).resolve(), run_folder.expanduser().resolve()
    if copy.is_relative_to(mine) or mine.is_relative_to(copy):
        raise RefusedError(
            f"mirror {address}: the copy would lie in {copy}, which is the run folder itself or overlaps "
            "it; name a folder on another disk"
        )


def same_disk(address: Address, folder: Path) -> bool:
    """Whether a mirror in a folder dies with the disk of `folder`."""
    return address.is_folder and _device(Path(address.prefix)) == _device(folder.expanduser().absolute())


def _device(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.stat().st_dev


# ------------------------------------------------------------------------------------------------------------
# Folders


def _scheme(text: str) -> str | None:
    """The word before `://` or what may be meant for it; None of a path, also with a colon in it, like
    ./a:b/c, or `runs//old`."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/*(?=[^/]|$)|([A-Za-z0-9]{2,5})//", text)
    scheme = (found.group(1) or found.group(2)) if found else None
    known = scheme is not None and (scheme.lower() in (*SCHEMES, *OTHER_NAMES) or "://" in text)
    return scheme if known else None


def _folder(text: str) -> Address:
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: no home folder of that user; write the whole path") from None
    return Address("file", "", str(Path(_normal(path.absolute()))))


def _normal(path: Path) -> Path:
    """Without `..`, as far as names go: a link is not followed, so that the label stays what was typed."""
    parts: list[str] = []
    for part in path.parts[1:]:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return Path(path.anchor, *parts)


def _file_uri(text: str) -> Address:
    rest = text[len("file:") :]
    if rest.startswith("//localhost/"):
        rest = rest[len("//localhost") :]
    if not re.match(r"(///?)?(?=/)/[^/]", rest) or re.match(r"//[^/]", rest):
        path = "/" + rest.strip("/")
        raise UserError(
            f"{text}: expected three slashes and a whole path, like file://{path}, or just {path}"
        )
    return _folder("/" + rest.lstrip("/"))


# ------------------------------------------------------------------------------------------------------------
# Stores


def _in_a_store(scheme: str, rest: str) -> Address:
    _refuse_extras(scheme, rest)
    parts = rest.rstrip("/").split("/")
    size = 1 if scheme != "hf" else 3 if parts[0] in ("datasets", "spaces", "models") else 2
    bucket, prefix = "/".join(parts[:size]), parts[size:]
    pattern, rule = BUCKETS[scheme]
    if not re.fullmatch(pattern, bucket):
        raise UserError(f"{scheme}://{rest}: {bucket!r} is no name of a bucket there; expected {rule}")
    for part in prefix:
        if (
            part in ("", ".", "..")
            or not re.fullmatch(r"[\w!.'()+=@, -]+", part, re.ASCII)
            or part != part.strip()
        ):
            raise UserError(
                f"{scheme}://{rest}: {part!r} is no part of a key; expected letters, digits and _ - . + = @"
            )
    return Address(scheme, bucket, "/".join(prefix))


def _refuse_extras(scheme: str, rest: str) -> None:
    """A password or a signature in an address would end up in configs and logs."""
    if _may_hold_a_secret(rest):
        raise UserError(
            f"{scheme}://...{_short(_after_the_secret(rest))}: no account or password in an address; "
            f"credentials come from the environment (docs/mirror.md); expected {scheme}://BUCKET/FOLDER"
        )
    if "?" in rest or "#" in rest:
        plain = re.split(r"[?#]", rest)[0]
        raise UserError(f"{scheme}://{plain}: expected no '?' or '#' after it; a signed link is no mirror")


def _may_hold_a_secret(rest: str) -> bool:
    """`user:password@bucket`; a password may hold any character, also `/`. No name or key has a colon."""
    return ":" in rest or "%40" in rest or "@" in rest.split("/")[0]


def _after_the_secret(rest: str) -> str:
    """From the last `@` on; nothing where none tells where a secret ends."""
    return rest[max(rest.rfind("@"), rest.rfind("%40")) :] if re.search("@|%40", rest) else ""


def _typo(text: str, scheme: str, rest: str) -> str:
    known = scheme.lower()
    shown = _short(re.split(r"[?#]", text)[0])
    secret = _may_hold_a_secret(rest)
    if secret:
        shown = f"{scheme}://..."
    if known in ("http", "https"):
        return (
            f"{shown}: a web address; {FORMS}, with the server of an S3-compatible store as mirror.endpoint"
        )
    meant = known if known in SCHEMES else OTHER_NAMES.get(known)
    if meant is None:
        near = get_close_matches(known, [*SCHEMES, *OTHER_NAMES], n=1, cutoff=0.5)
        meant = OTHER_NAMES.get(near[0], near[0]) if near else None
    if meant is None or secret:
        return f"{shown}: {scheme!r} is no store that x1 knows; {FORMS}"
    extra = ", with the server's address as mirror.endpoint" if known in ("r2", "b2", "minio") else ""
    return f"{shown}: did you mean {meant}://{_short(re.split(r'[?#]', rest)[0])}{extra}?"


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
