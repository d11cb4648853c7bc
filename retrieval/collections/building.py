"""Fills a collection with items, from a folder that `embed` wrote or directly from shards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.reading import expand_shards, shard_stem
from data.sample import DataError
from retrieval.collections.opening import Collection, CollectionError, open_collection
from retrieval.towers.base import Towers
from retrieval.vectors.embed import embed_shards
from retrieval.vectors.parquet import KIND_NAMES, Vectors, check_kind, has_rows, is_vectors, open_vectors, read_vectors
from retrieval.vectors.settings import EmbedSettings

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def open_source(
    sources: Sequence[str], load_towers: Callable[[], Towers], kind: str = "all", *, progress: bool = False
) -> Iterator[Vectors]:
    """The vectors in `sources`: one folder that `embed` wrote, or shards, which are embedded into a temporary folder.

    `load_towers` is called for shards only, and of these only what belongs to `kind` (see `read_vectors`) is embedded.
    Raises `DataError` if there is nothing at `sources`.
    """
    check_kind(kind)
    if len(sources) == 1 and is_vectors(Path(sources[0])):
        yield open_vectors(Path(sources[0]))
        return
    settings = EmbedSettings(images=kind != "text", texts=kind != "image")
    shards = {shard_stem(shard): shard.resolve() for shard in expand_shards(list(sources))}
    with tempfile.TemporaryDirectory(prefix="mmwudao-vectors-") as folder:
        embed_shards(load_towers(), list(sources), folder, settings, progress=progress)
        yield open_vectors(Path(folder), shards)


def build_collection(
    vectors: Vectors, location: str | Path, kind: str = "image", *, durable: bool = False, progress: bool = False
) -> int:
    """Make a collection of the vectors of that `kind` (see `read_vectors`), with its indexes. Returns the item count.

    Raises `CollectionError` if `location` holds items already, and `DataError` if there is nothing to store.
    """
    check_unfilled(location)
    if not has_rows(vectors, kind):
        raise DataError(f"nothing to store: the vectors hold no {KIND_NAMES[kind]}")
    with (
        _no_empty_folder(location),
        open_collection(location, create=True, dim=vectors.dim, model=vectors.model, durable=durable) as collection,
    ):
        count = _store(vectors, kind, collection.add, progress)
        collection.optimise()
    return count


@contextmanager
def _no_empty_folder(location: str | Path) -> Iterator[None]:
    """Remove a folder that was made for a collection if nothing was stored in it."""
    folder = Path(location)
    fresh = "://" not in str(location) and not folder.exists()
    try:
        yield
    except BaseException:
        if fresh and folder.exists():
            with open_collection(location) as collection:
                empty = not collection.count()
            if empty:
                shutil.rmtree(folder)
        raise


def check_unfilled(location: str | Path) -> None:
    """Raise `CollectionError` if there are items at `location`, where a collection is to be built."""
    try:
        with open_collection(location) as collection:
            count = collection.count()
    except CollectionError:  # there is none, or none that can be opened, which making it will tell
        return
    if count:
        raise CollectionError(f"{location} holds items: use `mmwudao index add` (--replace to replace them)")


def add_vectors(
    collection: Collection, vectors: Vectors, kind: str = "image", *, replace: bool = False, progress: bool = False
) -> int:
    """Store the vectors of that `kind`; `replace` overwrites items with the same ids. Returns how many were stored.

    Raises `ExistingIdsError` if, without `replace`, an id is stored already, and `DataError` if there is nothing to
    store.
    """
    if not has_rows(vectors, kind):
        raise DataError(f"nothing to store: the vectors hold no {KIND_NAMES[kind]}")
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
