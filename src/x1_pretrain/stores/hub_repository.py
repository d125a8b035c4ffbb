"""A repository of the Hugging Face Hub: what of `huggingface_hub` the mirror uses, in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token, hf_hub_url
from huggingface_hub.hf_api import RepoFile, RepoFolder

from x1_pretrain.stores.hub_client import said
from x1_pretrain.stores.hub_staging import Operation
from x1_pretrain.stores.store import DeniedError, NotThereError

PATHS_AT_ONCE = 500  # the Hub tells of at most 1000
MAIN = "main"


class Repository:
    """`name` is user/repository, or datasets/user/repository. Errors are the library's own."""

    def __init__(self, name: str, endpoint: str | None, retries: int) -> None:
        self._label, self._retries = f"hf://{name}", retries
        self._kind = "dataset" if name.startswith("datasets/") else "model"
        self._name = name.removeprefix("datasets/")
        self._endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._api = HfApi(endpoint=self._endpoint)
        self._seen = False

    def tip(self) -> str:
        """The newest commit."""
        info = self._api.repo_info(self._name, repo_type=self._kind, revision=MAIN)
        self._seen = True
        return str(info.sha)

    def tip_or_new(self) -> str:
        try:
            with said(self._label):
                return self.tip()
        except NotThereError:
            self._api.create_repo(self._name, repo_type=self._kind, private=True, exist_ok=True)
            return self.tip()

    def files(self, paths: list[str], at: str | None, dated: bool = False) -> list[RepoFile]:
        """Those of `paths` that are files in the commit `at`."""
        found: list[RepoFile | RepoFolder] = []
        for first in range(0, len(paths), PATHS_AT_ONCE):
            some = paths[first : first + PATHS_AT_ONCE]
            found += self._api.get_paths_info(
                self._name, some, expand=dated, revision=at or MAIN, repo_type=self._kind
            )
        return [one for one in found if isinstance(one, RepoFile) and one.path in paths]

    def version(self, path: str, at: str) -> str | None:
        found = self.files([path], at)
        return version_of(found[0]) if found else None

    def tree(self, folder: str, everything: bool) -> Iterator[RepoFile | RepoFolder]:
        """What lies in `folder`; `everything`: all below it, with dates."""
        yield from self._api.list_repo_tree(
            self._name,
            folder or None,
            recursive=everything,
            expand=everything,
            revision=MAIN,
            repo_type=self._kind,
        )

    def content(self, path: str, span: tuple[int, int] | None) -> bytes:
        for _ in range(self._retries):
            with suppress(httpx2.TransportError):  # the body broke off; an answer that never came is another
                return self._content_once(path, span)
        return self._content_once(path, span)

    def _content_once(self, path: str, span: tuple[int, int] | None) -> bytes:
        url = hf_hub_url(self._name, path, repo_type=self._kind, revision=MAIN, endpoint=self._endpoint)
        headers = {"Accept-Encoding": "identity"}
        if token := get_token():
            headers["Authorization"] = f"Bearer {token}"
        if span:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        with get_session().stream("GET", url, headers=headers) as response:
            response.raise_for_status()
            if span and response.status_code == 200:
                whole = int(response.headers.get("content-length") or 0)
                if whole > 2 * (span[1] - span[0]):  # not into memory, and not for each part again
                    raise DeniedError(
                        f"{self._label}/{path}: the whole of it was sent for a part (no Range requests "
                        "there, or a proxy that drops them)"
                    )
            data = response.read()
        return data[span[0] : span[1]] if span and response.status_code == 200 else data

    def send(self, path: str, file: BinaryIO) -> tuple[CommitOperationAdd | None, str]:
        """Send the content of a large file ahead of the commit that shows it: the operation for that commit,
        and its sha256. None where the Hub wants the content within the commit."""
        if not self._seen:
            self.tip_or_new()
        file.seek(0)
        operation = CommitOperationAdd(path, file)
        sha256 = operation.upload_info.sha256.hex()
        self._api.preupload_lfs_files(
            self._name, [operation], repo_type=self._kind, revision=MAIN, num_threads=1
        )
        sent = operation.path_or_fileobj == b""  # what the library leaves of content that was sent
        return (operation if sent else None), sha256

    def commit(self, operations: list[Operation], at: str) -> str:
        """The commit that did them; none is made if there is nothing to do."""
        if not operations:
            return at
        done = self._api.create_commit(
            self._name,
            operations,
            commit_message="x1 mirror",
            repo_type=self._kind,
            revision=MAIN,
            parent_commit=at,
            num_threads=1,  # more would read one file at once where two have the same content
        )
        return done.oid


def version_of(found: RepoFile) -> str:
    return found.lfs.sha256 if found.lfs else found.blob_id
