"""An address becomes a store. What a kind of store needs is imported when one is opened."""

from __future__ import annotations

from x1_pretrain.stores.address import Address
from x1_pretrain.stores.store import Store


def open_store(address: Address, endpoint: str | None, retries: int = 2) -> Store:
    """The store at `address`. Nothing is asked of it yet; UserError where it can't even be tried.

    `endpoint` is the server of a store that speaks S3; `retries` is how often one request is made again.
    """
    if address.scheme == "file":
        from x1_pretrain.stores.folder_store import FolderStore

        return FolderStore(address.prefix)
    if address.scheme == "hf":
        from x1_pretrain.stores.hub_store import HubStore

        return HubStore(address, endpoint, retries)
    from x1_pretrain.stores.object_store import open_object_store

    return open_object_store(address, endpoint, retries)
