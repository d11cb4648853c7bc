"""Fills a collection with items, from a folder that `embed` wrote or directly from shards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.reading import expand_shards
from retrieval.collections.opening import Collection, CollectionError, open_collection
from retrieval.towers.base import Towers
from retrieval.vectors.embed import embed_shards
from retrieval.vectors.parquet import Vectors, is_vectors, open_vectors, read_vectors

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def open_source(
    sources: Sequence[str], load_towers: Callable[[], Towers], *, progress: bool = False
) -> Iterator[Vectors]:
    """The vectors in `sources`: one folder that `embed` wrote, or shards, which are embedded into a temporary folder.

    `load_towers` is called for shards only. Raises `DataError` if there is nothing at `sources`.
    """
    if len(sources) == 1 and is_vectors(Path(sources[0])):
        yield open_vectors(Path(sources[0]))
        return
    shards = {shard.stem: shard.resolve() for shard in expand_shards(list(sources))}
    with tempfile.TemporaryDirectory(prefix="mmwudao-vectors-") as folder:
        embed_shards(load_towers(), list(sources), folder, progress=progress)
        yield open_vectors(Path(folder), shards)


def build_collection(
    vectors: Vectors, location: str | Path, kind: str = "image", *, durable: bool = False, progress: bool = False
) -> int:
    """Make a collection of the vectors of that `kind` (see `read_vectors`), with its indexes. Returns the item count.

    Raises `CollectionError` if `location` holds items already.
    """
    with open_collection(location, create=True, dim=vectors.dim, model=vectors.model, durable=durable) as collection:
        if collection.count():
            raise CollectionError(f"{location} holds items: use `mmwudao index add` (--replace to replace them)")
        count = _store(vectors, kind, collection.add, progress)
        collection.optimise()
    return count


def add_vectors(
    collection: Collection, vectors: Vectors, kind: str = "image", *, replace: bool = False, progress: bool = False
) -> int:
    """Store the vectors of that `kind`; `replace` overwrites items with the same ids. Returns how many were stored.

    Raises `ExistingIdsError` if, without `replace`, an id is stored already.
    """
    return _store(vectors, kind, collection.upsert if replace else collection.add, progress)


def _store(vectors: Vectors, kind: str, store: Callable[[pa.Table], None], progress: bool) -> int:
    from tqdm import tqdm

    count = 0
    with tqdm(unit=" items", disable=not progress) as bar:
        for items in read_vectors(vectors, kind):
            store(items)
            bar.update(len(items))
            count += len(items)
    return count
