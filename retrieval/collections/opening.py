"""Opens a collection: a LanceDB table in a folder or bucket (`s3://...`), or one on a Milvus server (`http://...`)."""

from __future__ import annotations

import os
from pathlib import Path

from retrieval.collections.base import MAX_ID, Collection, CollectionError, ExistingIdsError, Hit, Item, Value

__all__ = ["MAX_ID", "Collection", "CollectionError", "ExistingIdsError", "Hit", "Item", "Value", "open_collection"]


def open_collection(
    location: str | Path, *, create: bool = False, dim: int = 0, model: str = "", durable: bool = False
) -> Collection:
    """The collection at `location`: a folder, `s3://bucket/prefix`, or `http://host:port/name` of a Milvus server.

    `create` makes a collection for vectors of `dim` if there is none, and opens an existing one. A given `dim` or
    `model` must be the collection's own. `durable` calls fsync on everything a method wrote before it returns, so
    that it survives a power failure as well as the end of the process. It applies to local folders; buckets and
    servers provide durability themselves.

    Raises `CollectionError` if there is no such collection, or if it does not fit `dim` or `model`.
    """
    text = str(location)
    if text.startswith(("http://", "https://")):
        from retrieval.collections.milvus import open_milvus

        return open_milvus(text, create=create, dim=dim, model=model, durable=durable)
    os.environ.setdefault("LANCE_LOG", "error")  # else it warns of partitions that stay empty
    from retrieval.collections.lance import open_lance

    return open_lance(text, create=create, dim=dim, model=model, durable=durable)
