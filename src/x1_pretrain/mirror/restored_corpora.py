"""The data of a run, where its folders are absent and the mirror has it whole (`mirror.data`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from x1_pretrain.errors import RefusedError
from x1_pretrain.mirror.corpora import FILES, MANIFEST, hashes_of
from x1_pretrain.mirror.download import Part, download, in_words
from x1_pretrain.mirror.head import DATA, Head
from x1_pretrain.mirror.identity import mark_in
from x1_pretrain.mirror.patience import LANES, Patience, UnusableError, told
from x1_pretrain.numbers import size
from x1_pretrain.records.checkpoint_files import sha256, sync_directory, sync_file
from x1_pretrain.stores.store import NotThereError, Store

FETCHES = 2  # of a file of a corpus that does not match its hash


def refuse_other_corpora(corpora: Mapping[str, str], head: Head, store: Store) -> None:
    """A corpus that is here must be one the run was made with."""
    for name, folder in corpora.items():
        found = mark_in(Path(folder) / MANIFEST, "fingerprint")  # none: the trainer says what is wrong
        if found and head.fingerprints and found not in head.fingerprints:
            raise RefusedError(
                f"{folder}: the corpus {name} has the fingerprint {found[:12]}, and {store.label}/"
                f"{head.name} was made with {_short(head.fingerprints)}; give that one, or "
                "give this run another name"
            )


def _short(marks: list[str]) -> str:
    return ", ".join(mark[:12] for mark in marks)


def fetch_corpora(
    store: Store,
    corpora: Mapping[str, str],
    head: Head,
    say: Callable[[str], None],
    notes: list[str],
    patience_s: float,
    again_s: Sequence[float] | None = None,
) -> int:
    """Bytes of the corpora that were fetched."""
    total = 0
    for name, folder in absent(corpora, head).items():
        patience = Patience(patience_s, again_s=again_s)
        came = fetch_corpus(store, name, head.data[name], folder, say, patience)
        notes.append(f"fetched the corpus {name} from {store.label}: {size(came)}")
        total += came
    return total


def absent(corpora: Mapping[str, str], head: Head) -> dict[str, Path]:
    """Folders of the corpora that are not here and that the mirror has."""
    folders = {name: Path(where) for name, where in corpora.items() if name in head.data}
    return {name: one for name, one in folders.items() if not (one.exists() and any(one.iterdir()))}


def absent_bytes(store: Store, corpora: Mapping[str, str], head: Head, patience: Patience) -> dict[Path, int]:
    """Of each that is to be fetched, by the folder it is fetched into; of what can't be had nothing."""
    found = {}
    for name, folder in absent(corpora, head).items():
        with suppress(UnusableError):
            found[fetching(folder)] = sum(part.bytes for part in _parts(store, head.data[name], patience))
    return found


def fetching(folder: Path) -> Path:
    return folder.with_name(f".fetching-{folder.name}")


def fetch_corpus(
    store: Store, name: str, mark: str, folder: Path, say: Callable[[str], None], patience: Patience
) -> int:
    """Make the corpus folder appear, verified by its own manifest, which its fingerprint covers."""
    partial, what = fetching(folder), f"corpus {name}"
    with in_words(partial):
        try:
            manifest, parts = told(
                lambda: (
                    patience.insist(lambda: _manifest(store, mark, patience)),
                    patience.insist(lambda: _parts(store, mark, patience)),
                ),
                patience,
                what,
                say,
            )
            partial.mkdir(parents=True, exist_ok=True)
            _fetched(store, partial, parts, hashes_of(json.loads(manifest)), what, say, patience)
        except UnusableError as error:
            raise RefusedError(
                f"{store.label}/{DATA}/{mark}: the corpus {name} can't be restored ({error}); put it at "
                f"{folder} yourself"
            ) from None
        (partial / MANIFEST).write_bytes(manifest)
        sync_file(partial / MANIFEST)
        sync_directory(partial)
        if folder.exists():
            folder.rmdir()  # it is empty
        partial.rename(folder)
        sync_directory(folder.parent)
    return sum(part.bytes for part in parts)


def _manifest(store: Store, mark: str, patience: Patience) -> bytes:
    """With the hashes that its fingerprint is over."""
    try:
        text, _ = patience.ask(lambda: store.get(f"{DATA}/{mark}/{MANIFEST}"))
        manifest = json.loads(text)
        if manifest["fingerprint"] == mark and hashes_of(manifest):
            return text
    except NotThereError:
        raise UnusableError("its manifest is not in the mirror any more") from None
    except (ValueError, LookupError, TypeError):
        pass
    raise UnusableError("its manifest does not match its fingerprint")


def _parts(store: Store, mark: str, patience: Patience) -> list[Part]:
    parts = []
    for name in FILES:
        key = f"{DATA}/{mark}/{name}"
        try:
            parts.append(Part(name, key, patience.ask(lambda key=key: store.stat(key)).bytes))  # type: ignore[misc]
        except NotThereError:
            raise UnusableError(f"{name} is not in the mirror any more") from None
    return parts


def _fetched(
    store: Store,
    partial: Path,
    parts: list[Part],
    hashes: dict[str, str],
    what: str,
    say: Callable[[str], None],
    patience: Patience,
) -> None:
    for part in parts:
        if part.name not in hashes:
            (partial / part.name).unlink(missing_ok=True)  # small, and nothing tells whether it is whole
    for _ in range(FETCHES):
        download(store, parts, partial, what, say, LANES, patience)
        bad = [name for name, want in hashes.items() if sha256(partial / name) != want]
        if not bad:
            return
        for name in bad:
            (partial / name).unlink()
    shutil.rmtree(partial, ignore_errors=True)
    raise UnusableError(f"{bad[0]} does not match its hash, fetched {FETCHES} times")
