"""What a session found in the mirror when it claimed the run there: for the trainer, and for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from x1_pretrain.mirror.claim import UNSAID
from x1_pretrain.mirror.head import Head
from x1_pretrain.mirror.job import Opened
from x1_pretrain.mirror.lease import Lease
from x1_pretrain.records.mirror_state import MirrorState

if TYPE_CHECKING:
    from x1_pretrain.mirror.restore import Restored


def is_ours(found: Head, lease: Lease, before: MirrorState | None) -> bool:
    """Whether what was found is of this folder's sessions: of the one that its state names, or of one that
    was killed before it could write its name there."""
    me, writer = lease.me, found.writer
    if before is None or not before.token:
        return writer.folder == me.folder or writer.host == me.host
    trained = [one for one in found.epochs if one.epoch > before.epoch and one.from_step != UNSAID]
    known = writer.folder == me.folder or (writer.epoch, writer.token) == (before.epoch, before.token)
    return known and all(one.host == me.host for one in trained)


def as_opened(lease: Lease, restored: Restored | None, state: MirrorState) -> Opened:
    """What was found, for the trainer."""
    before = lease.before if lease.before and not lease.before.trashed else None
    moved = before is not None and before.writer.folder != lease.me.folder
    said = before.status if before else {}
    notes = list(restored.notes) if restored else []
    if before is None and lease.before is not None:
        thrown = f"an earlier run of this name was moved to the trash at {lease.before.trashed_utc or '?'}"
        notes.append(f"{thrown}; this is a new one (`x1 runs` shows the trash)")
    return Opened(
        label=state.label,
        epoch=lease.epoch,
        found=before is not None,
        run_id=lease.head.run_id,
        notes=notes,
        lost=restored.lost if restored else [],
        restored_step=restored.restored_step if restored else None,
        restored_bytes=restored.restored_bytes if restored else 0,
        restored_s=restored.restored_s if restored else 0.0,
        moved_from=before.writer.host if before and moved else None,
        down_s=lease.down_s if moved else None,
        last_step=restored.last_step if restored else before.last_step() if before else None,
        last_spent_usd=_dollars(said.get("spent_usd")),
    )


def _dollars(text: object) -> float | None:
    try:
        return None if text is None else float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
