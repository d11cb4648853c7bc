"""Where collections are: a folder or a bucket (`s3://...`) as a LanceDB table, or a Milvus server (`http://...`)."""

from __future__ import annotations

from pathlib import Path

from retrieval.collections.base import MAX_ID, Collection, CollectionError, Hit, IdsThere, Item, Value

__all__ = ["MAX_ID", "Collection", "CollectionError", "Hit", "IdsThere", "Item", "Value", "open_collection"]


def open_collection(
    location: str | Path, *, create: bool = False, dim: int = 0, model: str = "", durable: bool = False
) -> Collection:
    """The collection at `location`: a folder, `s3://bucket/prefix`, or `http://host:port/name` of a Milvus server.

    With `create`, one that is not there is made, for vectors of `dim`; one that is there is opened. A `dim` or `model`
    that is given must be the collection's own. `durable` calls fsync on what was written before a method returns: it
    survives a loss of power, not only of the process (local folders; buckets and servers have ways of their own).
    Raises `CollectionError`.
    """
    place = str(location)
    if place.startswith(("http://", "https://")):
        from retrieval.collections.milvus import open_milvus

        return open_milvus(place, create=create, dim=dim, model=model, durable=durable)
    from retrieval.collections.lance import open_lance

    return open_lance(place, create=create, dim=dim, model=model, durable=durable)
