"""`x1 launch` and the run's mirror: what is there already, and what a machine needs in order to reach it."""

from __future__ import annotations

import os
from dataclasses import replace

from x1_pretrain.config import RunConfig
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.money import credentials, ended
from x1_pretrain.money.account import account
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.machine_jobs import JobOptions
from x1_pretrain.money.pricing import Wanted
from x1_pretrain.money.standing import Mirror, opened, whole


def with_mirror(config: RunConfig, uri: str | None, data: bool) -> RunConfig:
    """The config as the machine gets it: an address that is good in any folder."""
    uri = uri or config.mirror.uri
    if uri is None:
        return config
    changes = {"uri": whole(uri), "data": data or config.mirror.data}
    return config.model_copy(update={"mirror": config.mirror.model_copy(update=changes)})


def provider_names(text: str, config: RunConfig) -> list[str]:
    """`runpod,lambda`: in the order in which they are tried."""
    names = [name.strip() for name in text.split(",")]
    if len(names) > 1 and "local" in names:
        raise UserError(f"--provider {text}: a run on this machine is not moved; leave `local` out")
    if len(names) > 1 and config.mirror.uri is None:
        raise UserError(
            f"--provider {text}: a lost machine's run can go on at another provider only with a mirror; add "
            "--mirror s3://BUCKET/FOLDER, or name one provider"
        )
    return names


def mirror_for(config: RunConfig, names: list[str]) -> Mirror | None:
    """The run's mirror, and what a machine needs in order to reach it: tried before anything is priced."""
    credentials.values(config.mirror.uri, os.environ, config.mirror.endpoint)
    return opened(config, names)


def as_it_stands(
    wanted: Wanted, options: JobOptions, mirror: Mirror, ledger: Ledger
) -> tuple[Wanted, JobOptions]:
    """A run that is in its mirror goes on from there; one that somebody trains is left alone."""
    now = mirror.before = mirror.look()
    if mirror.trouble:
        raise RefusedError(f"{mirror.trouble}; a machine that can't reach its mirror is not paid for")
    told = tuple(map(str, ended.of(account(ledger.rows()))))
    if now is None or now.trashed:
        return wanted, replace(options, ended=told)
    if now.writing and now.silent_s is not None and now.silent_s <= now.stale_s:
        raise RefusedError(
            f"{mirror.store.label}/{mirror.name}: is being trained on {now.host} (last sign of life "
            f"{now.silent_s:.0f} s ago by the store's clock); a second machine would be refused there: end "
            f"that one, or wait {now.stale_s:.0f} s after it died"
        )
    return replace(wanted, standing=now), replace(options, ended=told, data_from_mirror=now.has_data)


def priced_as_it_stands(wanted: Wanted, names: list[str]) -> Wanted:
    """What is left is priced, by one look at the mirror; one that does not answer is said, and prices all."""
    mirror = opened(wanted.config, names, False)
    now = mirror.look() if mirror is not None else None
    return wanted if now is None or now.trashed else replace(wanted, standing=now)
