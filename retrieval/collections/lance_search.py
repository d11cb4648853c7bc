"""How a LanceDB table is searched: the cheapest way for what a filter allows, and the rows that it finds.

LanceDB's asynchronous interface is used, since the other one reads the schema three times a search.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from data.records import parse_json
from retrieval.collections.base import Hit
from retrieval.collections.lance_rows import metadata_types, row_metadata
from retrieval.collections.where import parse_where, to_sql

# Up to this many items a search compares all of them: 5,000 x 512 numbers take about as much CPU time as a search of
# the index (bench/speed/collection_speed.py)
EXACT_UP_TO = 5_000
PROBES = b"mmwudao.probes"  # in the metadata of the column `vector`: items to be found -> partitions to look into
UNKNOWN_PROBES = 32  # of an index that was not measured
EF = 300  # candidates that a search of a graph keeps, which earlier versions built
REFINE = 2  # this many times k candidates are compared by their exact vectors, since the index has 8 bits a number
# With a filter, the index tests each of its items, which takes tens of nanoseconds; fetching the vector of an item
# takes about as long as testing this many
FETCH_COST = 200
SPARE = 2.5  # search for this many times the candidates that yield k allowed ones on average
MAX_CANDIDATES = 1_000
KEPT_BYTES = 2**26  # of the vectors that one filter allows, kept for the searches that follow
KEPT_FILTERS = 4  # with their vectors
COUNTED_FILTERS = 256  # with the number of items that they allow

Result = TypeVar("Result")


class Way(NamedTuple):
    """How to search: among `candidates` nearest of all, among all that a filter allows, or by the filtered index."""

    kind: Literal["nearest", "allowed", "filtered"]
    candidates: int = 0


class Found(NamedTuple):
    """Rows without their vectors, and the vectors [n, D]."""

    rows: pa.Table
    vectors: NDArray[numpy.float32]


@dataclass
class Allowed:
    """What a filter allows in one version of the table."""

    version: int
    count: int
    searches: int = 0
    found: Found | None = None


def choose_way(items: int, allowed: int, k: int, dim: int, searches: int) -> Way:
    """The cheapest way to the `k` nearest of `allowed` items; `searches` had the same filter before.

    All ways find the same but for what the index misses. Vectors that fit into memory are fetched where that costs
    less than one search, and for a filter that comes again.
    """
    if items <= EXACT_UP_TO:
        return Way("filtered")  # there is no index, or a small one
    if allowed * FETCH_COST <= items and allowed * dim * 4 <= KEPT_BYTES:
        return Way("allowed")
    candidates = math.ceil(SPARE * k * items / max(1, allowed))
    if candidates <= MAX_CANDIDATES:
        return Way("nearest", candidates)
    return Way("allowed" if searches and allowed * dim * 4 <= KEPT_BYTES else "filtered")


def probes_for(schema: pa.Schema, candidates: int) -> int:
    """How many partitions hold that many of the nearest items, by what was measured when the index was built."""
    measured = parse_json((schema.field("vector").metadata or {}).get(PROBES, b"{}"))
    sizes = sorted(map(int, measured))
    if not sizes:
        return UNKNOWN_PROBES
    return int(measured[str(next((size for size in sizes if REFINE * size >= candidates), sizes[-1]))])


class LanceSearcher:
    """Searches one table; used from several threads."""

    def __init__(self, table: Any, dim: int) -> None:
        self._table = table  # a `lancedb.AsyncTable`
        self._dim = dim
        self._filters: OrderedDict[str, Allowed] = OrderedDict()

    def search(self, query: NDArray[numpy.float32], k: int, where: str | None) -> list[Hit]:
        """The `k` nearest of the rows that `where` allows. Raises `WhereError`, and what LanceDB raises."""
        found = on_loop(self._candidates(query, k, where))
        # in this thread: those of a matrix product wait for each other, which takes longer than a few thousand rows
        scores = numpy.einsum("nd,d->n", found.vectors, query)
        if len(scores) > k:
            best = numpy.argpartition(-scores, k - 1)
            best = numpy.flatnonzero(scores >= scores[best[k - 1]])  # all that are as near as the last, by their ids
        else:
            best = numpy.arange(len(scores))
        rows = found.rows.take(best).to_pylist()
        hits = [Hit(row["id"], float(score), row_metadata(row)) for row, score in zip(rows, scores[best], strict=True)]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]

    async def _candidates(self, query: NDArray[numpy.float32], k: int, where: str | None) -> Found:
        """Rows among which the `k` nearest are."""
        schema = await self._table.schema()
        if where is None:
            return await self._nearest(query, schema, REFINE * k)
        condition = to_sql(parse_where(where, {"id": str, **metadata_types(schema)}))
        items = await self._table.count_rows()
        if items <= EXACT_UP_TO:
            return await self._nearest(query, schema, REFINE * k, condition)
        allowed = await self._allowed(condition)
        way = choose_way(items, allowed.count, k, self._dim, allowed.searches)
        allowed.searches += 1
        if way.kind == "allowed":
            return allowed.found or await self._fetch(condition, allowed)
        if way.kind == "nearest":
            found = await self._nearest(query, schema, way.candidates, condition, after=True)
            if len(found.rows) >= min(k, allowed.count):
                return found
        return await self._nearest(query, schema, REFINE * k, condition)

    async def _nearest(
        self,
        query: NDArray[numpy.float32],
        schema: pa.Schema,
        candidates: int,
        condition: str | None = None,
        *,
        after: bool = False,
    ) -> Found:
        """The nearest `candidates` of those that `condition` allows, or those of the nearest that it allows `after`."""
        builder = self._table.vector_search(query).column("vector").distance_type("cosine").limit(candidates)
        builder = builder.ef(max(EF, candidates)).select([*schema.names, "_distance"])
        if condition is None or after:
            builder = builder.nprobes(probes_for(schema, candidates))
        else:
            # what a filter allows may lie anywhere: every partition is asked
            builder = builder.nprobes(2**31 - 1)
        if condition is not None:
            builder = builder.where(condition)
        return self._found(await (builder.postfilter() if after else builder).to_arrow())

    async def _allowed(self, condition: str) -> Allowed:
        """How many rows a condition allows now, and what was kept of an earlier search."""
        version = await self._table.version()
        known = self._filters.get(condition)
        if known is None or known.version != version:
            # counted after the version was read: the number is of that version or of a later one
            count = await self._table.count_rows(condition)
            known = self._filters[condition] = Allowed(version, count)
        self._filters.move_to_end(condition)
        if len(self._filters) > COUNTED_FILTERS:
            self._filters.popitem(last=False)
        return known

    async def _fetch(self, condition: str, allowed: Allowed) -> Found:
        """All rows that a condition allows; kept unless the table has changed in the meantime."""
        found = self._found(await self._table.query().where(condition).to_arrow())
        if await self._table.version() == allowed.version:
            allowed.found = found
            kept = [one for one in self._filters.values() if one.found is not None]
            for one in kept[:-KEPT_FILTERS]:
                one.found = None
        return found

    def _found(self, rows: pa.Table) -> Found:
        vectors = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self._dim)
        return Found(rows.drop_columns(["vector"]), vectors)


def on_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, which runs in the thread of LanceDB's readers."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lance-readers", daemon=True).start()
    return loop
