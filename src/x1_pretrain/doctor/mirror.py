"""The store that a run's copies go to: tried and measured in a process of its own. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from x1_pretrain.config import MirrorConfig, RunConfig
from x1_pretrain.doctor import trial
from x1_pretrain.doctor.trial import Trial
from x1_pretrain.errors import UserError
from x1_pretrain.stores.address import parse, refuse_overlap, same_disk

EACH_S = 7.0  # for sending, and for reading
LEAVE_S = 15.0  # for removing what was sent, where the time was up or somebody pressed Ctrl-C


@dataclass(frozen=True)
class Visit:
    """What came of it."""

    uri: str
    trial: Trial
    same_disk: bool = False  # as the run's own folder


def look(
    config: RunConfig | None,
    uri: str | None,
    folder: Path,
    limit_s: float,
    environment: Mapping[str, str] | None,
) -> Visit | None:
    """Of the config, or at `uri`. None: there is no mirror. `folder`: where checkpoints will go."""
    settings = config.mirror if config else MirrorConfig(uri=uri)
    if settings.uri is None:
        return None
    try:
        address = parse(settings.uri)
        if config:
            refuse_overlap(address, config.name, config.folder)
    except UserError as error:
        return Visit(settings.uri, Trial({"refused": {"message": str(error)}}))
    task = {
        "uri": str(address),
        "endpoint": settings.endpoint,
        "run": config.name if config else "",
        "each_s": min(EACH_S, limit_s / 4),
    }
    found = trial.run("x1_pretrain.doctor.mirror_trial", task, limit_s, environment, leave_s=LEAVE_S)
    return Visit(str(address), found, same_disk(address, folder))
