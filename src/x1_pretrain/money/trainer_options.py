"""The trainer's own options, as its supervisor is handed them: what follows `--`, a list of words."""

from __future__ import annotations

from collections.abc import Sequence

from x1_pretrain.config import RunConfig
from x1_pretrain.stores.address import parse, run_address


def trainer_options(arguments: Sequence[str], flag: str) -> list[str]:
    """All values of an option that may be repeated, given as `--flag value` or `--flag=value`."""
    found, words = list[str](), iter(arguments)
    for word in words:
        if word == flag:
            found += [value] if (value := next(words, None)) is not None else []
        elif word.startswith(f"{flag}="):
            found.append(word.partition("=")[2])
    return found


def trainer_option(arguments: Sequence[str], flag: str) -> str | None:
    """The first."""
    return next(iter(trainer_options(arguments, flag)), None)


def without_option(arguments: Sequence[str], flag: str) -> list[str]:
    """A person's word is given once: a relaunch does not repeat it."""
    kept = [word for word in arguments if not word.startswith(f"{flag}=")]
    while flag in kept:
        place = kept.index(flag)
        del kept[place : place + 2]
    return kept


def mirror_of(config: RunConfig, arguments: Sequence[str]) -> tuple[str, str] | None:
    """The mirror's address and the run's name in it, as the trainer takes them."""
    if run := trainer_option(arguments, "--resume-from"):
        address, name = run_address(run)
        return str(address), name
    uri = trainer_option(arguments, "--mirror") or config.mirror.uri
    return (str(parse(uri)), config.name) if uri else None
