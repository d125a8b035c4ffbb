"""How a run stands that trains elsewhere, as its mirror says: for who guards it, or would move it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from x1_pretrain.config import MirrorConfig, RunConfig
from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.mirror import heads
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.preflight import preflight
from x1_pretrain.stores import aws
from x1_pretrain.stores.address import Address, parse
from x1_pretrain.stores.opened import open_store
from x1_pretrain.stores.store import Store, StoreError

HERE = ("local", "fake")  # providers whose machines see this computer's disk
TOLD_TO_STOP = "told to stop"  # why a run is stopping, as its status has it


@dataclass(frozen=True)
class Standing:
    """One look at the head of a mirrored run."""

    epoch: int  # of the writer; each session of the trainer raises it
    beat: int  # of the writer; each write raises it
    writing: bool  # it has not said that it left
    host: str
    state: str = "waiting"  # of the run: finished, stopped, ended, died, ... as `x1 runs` has it
    why: str = ""
    step: int = 0
    good_step: int = 0  # of the newest checkpoint in the mirror: where a new machine begins
    tokens_per_sec: float | None = None  # of its whole training, evaluation and saving included
    spent_usd: Decimal | None = None
    silent_s: float | None = None  # since the last beat, by the store's clock
    stale_s: float = 90.0
    has_data: bool = False  # its corpora are in the mirror too

    @property
    def trashed(self) -> bool:
        return self.state == "trashed"

    @property
    def lost_steps(self) -> int:
        """They were done, and have to be done again."""
        return max(0, self.step - self.good_step)


def standing(head: Head, silent_s: float | None = None) -> Standing:
    """A run in the trash has nothing to go on with."""
    if head.trashed:
        return Standing(head.writer.epoch, head.writer.beat, False, head.writer.host, "trashed")
    said, newest = head.status, head.newest()
    return Standing(
        epoch=head.writer.epoch,
        beat=head.writer.beat,
        writing=head.writer.state == "writing",
        host=head.writer.host,
        state=str(said.get("state") or "waiting"),
        why=str(said.get("why") or ""),
        step=head.last_step() or 0,
        good_step=newest.step if newest else 0,
        tokens_per_sec=_rate(said),
        spent_usd=_dollars(said.get("spent_usd")),
        silent_s=silent_s,
        stale_s=head.writer.stale_s,
        has_data=bool(head.data),
    )


def _number(said: dict[str, Any], name: str) -> float | None:
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _rate(said: dict[str, Any]) -> float | None:
    tokens, seconds = _number(said, "tokens"), _number(said, "elapsed_s")
    return tokens / seconds if tokens and seconds and tokens > 0 and seconds > 0 else None


def _dollars(value: object) -> Decimal | None:
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        return None
    return amount if amount.is_finite() and amount >= 0 else None


# ------------------------------------------------------------------------------------------------------------
# What it means for a machine that works no more


def verdict(now: Standing | None, before: Standing | None) -> tuple[Literal["over", "fault", "move"], str]:
    """Whether a run whose machine is lost goes on elsewhere, and why (not): it is over, or a person has to
    look first. `before`: as the mirror stood when that machine was launched."""
    if now is not None and now.trashed and not (before is not None and before.trashed):
        return "over", "the run was thrown away"
    if now is None or published_nothing(now, before):
        return "move", "it had published nothing"
    if now.state == "finished":
        return "over", "the run is finished"
    if now.trashed:
        return "over", "the run was thrown away"
    if now.state == "stopped" or TOLD_TO_STOP in now.why:
        return "over", f"the run was stopped: {now.why}"
    began = before.good_step if before is not None else 0
    if now.state == "ended" and now.good_step <= began:
        return "fault", f"the run ended without a new checkpoint ({now.why}): that is a person's to look at"
    return "move", f"the run is at step {now.step:,}"


def published_nothing(now: Standing | None, before: Standing | None) -> bool:
    """The machine that was launched at `before` never got as far as writing to the mirror."""
    return now is None or (before is not None and now.epoch <= before.epoch)


# ------------------------------------------------------------------------------------------------------------
# Looking


@dataclass
class Mirror:
    """A run in its store, looked at from elsewhere. A look that fails is said once, and is no news."""

    store: Store
    name: str
    before: Standing | None = None  # when the machine that is guarded was launched
    trouble: str = ""

    def look(self) -> Standing | None:
        try:
            found = heads.look(self.store, self.name)
            told = standing(found[0], heads.silence_s(self.store, found[1])) if found else None
        except (StoreError, UserError) as error:
            if str(error) != self.trouble:
                print(f"mirror: {error}", flush=True)
            self.trouble = str(error)
            return None
        self.trouble = ""
        return told


def endpoint_of(mirror: MirrorConfig) -> str | None:
    """The server that bills for it; none: the one that its address names."""
    at_s3 = mirror.uri is not None and parse(mirror.uri).scheme == "s3"
    return aws.find(mirror.endpoint, os.environ).endpoint if at_s3 else mirror.endpoint


def whole(uri: str) -> str:
    """The address as any folder can use it: a path from the root."""
    return str(parse(uri))


def opened(config: RunConfig, providers: list[str], to_write: bool = True) -> Mirror | None:
    """The run's mirror, tried before a cent is spent; None for a run without one. One that can't keep two
    writers apart is refused there, since nobody watches the moves. Not `to_write`: nothing is tried."""
    if config.mirror.uri is None:
        return None
    address = parse(config.mirror.uri)
    _refuse_unreachable(address, providers)
    store = open_store(address, config.mirror.endpoint)
    if not to_write:
        return Mirror(store, config.name)
    try:
        preflight(store, config.name, config.mirror.without_lease)
    except StoreError as error:
        raise RefusedError(f"{error}; put the mirror right before a machine is paid") from None
    return Mirror(store, config.name)


def _refuse_unreachable(address: Address, providers: list[str]) -> None:
    away = [name for name in providers if name not in HERE]
    if address.is_folder and away:
        raise UserError(
            f"mirror {address}: a folder of this computer, which a machine at {away[0]} does not see; name a "
            "store, such as s3://BUCKET/FOLDER"
        )
