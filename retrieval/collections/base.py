"""The collection: vectors with an id and metadata, searched by cosine similarity. One interface for every place.

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

MAX_ID = 512  # characters

Value = str | int | float | bool


class CollectionError(ValueError):
    """What was asked of a collection cannot be done; the message is one line that says why and what to do."""


class IdsThere(CollectionError):
    """`add` met ids that are stored already; nothing was stored."""


@dataclass(frozen=True)
class Item:
    """A vector [D] with a stable id of 1 to `MAX_ID` characters and what is known of it."""

    id: str
    vector: NDArray[numpy.floating]  # of any length but 0: `add` and `upsert` store it L2-normalised
    metadata: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """An item that a search found; `score` is the cosine similarity with the query."""

    id: str
    score: float
    metadata: dict[str, Value]


class Collection(ABC):
    """Items of one dimension, made by one pair of towers. Every method raises `CollectionError` for bad input.

    `add` and `upsert` take items one by one, or many at once as a table of Arrow: its columns are `id` (text), `vector`
    (lists of D numbers) and metadata (text, integers, numbers, true or false; null: the item has none). Tables are
    several times as fast; some 100,000 rows are a good size, since every call looks once through all ids.

    `where` is an expression over metadata, see `retrieval.collections.where`; it chooses the items that are ranked. What a method
    has written when it returns survives the process being killed at any later moment.
    """

    dim: int
    model: str  # the content hash or name of the towers whose vectors these are; "": unknown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give back files and connections. The collection is of no use afterwards."""

    @abstractmethod
    def add(self, items: Sequence[Item] | pa.Table) -> None:
        """Store all of `items`, or none: `IdsThere` names ids that are there already. An id given twice is refused."""

    @abstractmethod
    def upsert(self, items: Sequence[Item] | pa.Table) -> None:
        """Store all of `items`, in place of those with the same ids. An id given twice is refused."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove the items with these ids. Returns how many were there."""

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[Item]:
        """The items with these ids in the order asked; ids that are not there are left out."""

    @abstractmethod
    def search(self, vector: NDArray[numpy.floating], k: int = 10, where: str | None = None) -> list[Hit]:
        """The `k` items most similar to `vector` [D], of any length but 0, among those `where` allows; best first."""

    @abstractmethod
    def count(self, where: str | None = None) -> int:
        """How many items there are, or how many `where` allows."""

    @abstractmethod
    def scan(self, where: str | None = None) -> Iterator[tuple[list[str], NDArray[numpy.float32]]]:
        """Ids and vectors [n, D] of all items, or of those that `where` allows, in parts and in no promised order."""

    @abstractmethod
    def snapshot(self, name: str) -> None:
        """Remember the collection as it is now under a new name of letters, digits, `.`, `_` and `-`."""

    @abstractmethod
    def restore(self, name: str) -> None:
        """Make the collection what it was at that snapshot; all snapshots stay."""

    @abstractmethod
    def drop_snapshot(self, name: str) -> None:
        """Forget a snapshot. What it alone held goes when the collection is next optimised."""

    @abstractmethod
    def snapshots(self) -> list[str]:
        """The names of the snapshots, sorted."""

    @abstractmethod
    def optimise(self) -> None:
        """Merge small files and bring the indexes up to date. Slow: run it in a process that serves nobody."""
