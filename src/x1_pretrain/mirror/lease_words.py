"""What people are told about who writes a run."""

from __future__ import annotations

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.head import NAME, Head, Writer, decode
from x1_pretrain.mirror.heads import where
from x1_pretrain.stores.store import Store


def who(writer: Writer) -> str:
    return f"{writer.host} (process {writer.pid}, epoch {writer.epoch})"


def waiting(head: Head, silent_s: float, wait_s: float, patience_s: float) -> str:
    """`patience_s`: for so long it may give signs of life and yet die; 0: the first one settles it."""
    watching = f"watching it for up to {wait_s:.0f} s before this session takes over"
    if patience_s:
        watching = (
            f"this session takes over once it has been silent for {head.writer.stale_s:.0f} s, and gives up "
            f"if it lives on for {patience_s:.0f} s"
        )
    return (
        f"{head.name}: {who(head.writer)} has not given this run back and may live (silent for "
        f"{silent_s:.0f} s or more); {watching}"
    )


def held(store: Store, head: Head, down_s: float | None) -> str:
    holder, seen = head.writer, "seconds ago"
    if down_s is not None:
        seen = f"{max(0.0, down_s):.0f} s ago by the clock of {store.label}"
    return (
        f"{head.name}: is being trained on {holder.host} (process {holder.pid}, epoch {holder.epoch}, last "
        f"sign of life {seen}); stop that one first, or give this run another name"
    )


def lost(store: Store, own: Head, data: bytes | None) -> str:
    """`own`: the head we knew; `data`: the one that is there now, None for none."""
    return f"{own.name}: {_what_became(store, own, data)}; this copy stops and publishes nothing more"


def _what_became(store: Store, own: Head, data: bytes | None) -> str:
    if data is None:
        return f"its mirror {store.label}/{own.name} was removed (there is no {NAME})"
    try:
        now = decode(data, where(store, own.name))
    except RefusedError as error:
        return f"its mirror can't be read any more ({error})"
    if now.trashed:
        return f"it was moved to the trash{_since(now.trashed_utc)}"
    if now.writer.token == own.writer.token:
        return (
            f"another process writes as this very session (epoch {own.writer.epoch}): a copy of this machine "
            f"is running, or an older {NAME} was put back"
        )
    if now.writer.state == "released":
        return f"{who(now.writer)} had taken over this run, and has given it back"
    return f"{who(now.writer)} has taken over this run{_since(now.writer.since_utc)}"


def _since(time_utc: str | None) -> str:
    return f" since {time_utc}" if time_utc else ""


def not_there(store: Store, name: str, trashed: bool) -> str:
    state = "is in the trash; `x1 runs restore` brings it back" if trashed else "is not there"
    return (
        f"{store.label}/{name}: the run to resume from {state}; `x1 runs {store.label}` lists those that are"
    )


def there_already(store: Store, name: str) -> str:
    return (
        f"{store.label}/{name}: the mirror has a run of this name, and --fresh would begin another over it; "
        "leave out --fresh to go on with it, give this run another name, or remove that one (`x1 runs rm`)"
    )


def no_lease(store: Store, name: str) -> str:
    return (
        f"mirror {store.label}: this store can't keep two writers apart (no conditional writes); take one "
        f"that can, or set mirror.without_lease: true if nothing else will ever train {name}"
    )


def at_own_risk(store: Store, name: str) -> str:
    return f"{name}: {store.label} has no conditional writes; that one machine alone trains this is up to you"
