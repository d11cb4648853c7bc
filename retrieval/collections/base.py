"""The collection: vectors with ids and metadata, searched by cosine similarity, behind one interface for every store.

`retrieval.collections.opening.open_collection` opens one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "mmwudao-collection/1"
MAX_ID = 512  # characters

Value = str | int | float | bool


class CollectionError(ValueError):
    """A collection cannot do what it was asked to do; the message is one line that says why and what to do."""


class ExistingIdsError(CollectionError):
    """`add` was given ids that are stored already; nothing was stored."""


@dataclass(frozen=True)
class Item:
    """A vector [D] with a stable id of 1 to `MAX_ID` characters and its metadata."""

    id: str
    vector: NDArray[numpy.floating]  # of any length but 0: `add` and `upsert` store it L2-normalised
    metadata: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """An item that a search returned; `score` is its cosine similarity to the query."""

    id: str
    score: float
    metadata: dict[str, Value]


class Collection(ABC):
    """Items of one dimension, made by one pair of towers. Every method raises `CollectionError` for bad input.

    `add` and `upsert` take a sequence of items, or many at once as an Arrow table with the columns `id` (text),
    `vector` (lists of D numbers) and metadata (text, integers, floats or booleans; a null means that the item lacks
    the value). Tables are several times as fast. About 100,000 rows a call work well, since every call scans all ids
    once.

    `where` is a boolean expression over metadata (see `retrieval.collections.where`); only items for which it is true
    are ranked. What a method has written when it returns survives if the process is killed at any later moment.
    """

    dim: int
    model: str  # the content hash or name of the towers that made the vectors; "" if unknown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release files and connections. The collection cannot be used afterwards."""

    @abstractmethod
    def add(self, items: Sequence[Item] | pa.Table) -> None:
        """Store all of `items`, or none of them.

        Raises `ExistingIdsError` if an id is stored already, and `CollectionError` if an id is given twice.
        """

    @abstractmethod
    def upsert(self, items: Sequence[Item] | pa.Table) -> None:
        """Store all of `items`, replacing stored items with the same ids. Raises if an id is given twice."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove the items with these ids. Returns how many of them existed."""

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[Item]:
        """The items with these ids, in the order asked for; unknown ids are left out."""

    @abstractmethod
    def search(self, vector: NDArray[numpy.floating], k: int = 10, where: str | None = None) -> list[Hit]:
        """The `k` most similar of the items that `where` allows, best first; `vector` [D] has any length but 0."""

    @abstractmethod
    def count(self, where: str | None = None) -> int:
        """The number of items, or of those that `where` allows."""

    @abstractmethod
    def scan(self, where: str | None = None) -> Iterator[tuple[list[str], NDArray[numpy.float32]]]:
        """Ids and vectors [n, D] of all items, or of those that `where` allows, in batches and in no fixed order."""

    def ids(self, where: str | None = None) -> Iterator[list[str]]:
        """The ids of all items, or of those that `where` allows, in batches and in no fixed order."""
        for ids, _ in self.scan(where):
            yield ids

    @abstractmethod
    def snapshot(self, name: str) -> None:
        """Record the present state under a new name of letters, digits, `.`, `_` and `-`."""

    @abstractmethod
    def restore(self, name: str) -> None:
        """Return the collection to the state of that snapshot; all snapshots are kept."""

    @abstractmethod
    def drop_snapshot(self, name: str) -> None:
        """Delete a snapshot. The next `optimise` frees the space that only the snapshot used."""

    @abstractmethod
    def snapshots(self) -> list[str]:
        """The names of the snapshots, sorted."""

    @abstractmethod
    def optimise(self) -> None:
        """Merge small files and update the indexes. This is slow: run it in a process that serves no requests."""


def check_identity(collection: Collection, location: str, dim: int, model: str) -> None:
    """Raise `CollectionError` unless the opened collection has this `dim` (0: any) and `model` ("": any)."""
    if model and collection.model and model != collection.model:
        hashes = f"{collection.model[:12]}, not {model[:12]}"
        raise CollectionError(
            f"{location} holds vectors of other towers ({hashes}): use the model that made them, by the part that made "
            "them (--by)"
        )
    if dim and dim != collection.dim:
        raise CollectionError(f"{location} holds vectors of dimension {collection.dim}, not {dim}")
