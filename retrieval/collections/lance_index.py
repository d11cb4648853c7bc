"""The indexes of a LanceDB table: how they are built, and how far a search has to look into them.

The index of the vectors holds 8 bits a number in partitions of neighbours. A graph takes seven times the CPU time to
build and more to search, and cannot leave out what a filter does not allow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
from lancedb.index import BTree, IvfSq
from numpy.typing import NDArray

from retrieval.collections.lance_search import PROBES, REFINE

ROWS_A_PARTITION = 1_000
TRAINED_ON = 64  # items a partition that k-means sees, in this many rounds: a quarter and a third of LanceDB's
ROUNDS = 15
QUERIES = 64  # stored items whose neighbours are looked for
SIZES = (10, 100, 500)  # how many of their neighbours
TARGET = 0.99  # of them are to be found, on average
MARGIN = 2  # times the partitions that suffice: a text lies farther from pictures than pictures from each other

Commit = Callable[[Callable[[], Any]], Any]


def build_vector_index(table: Any, commit: Commit) -> None:
    """Index the vectors anew, and record how many partitions a search has to look into."""
    partitions = max(1, table.count_rows() // ROWS_A_PARTITION)
    index = IvfSq(distance_type="cosine", num_partitions=partitions, sample_rate=TRAINED_ON, max_iterations=ROUNDS)
    commit(lambda: table.create_index("vector", config=index, replace=True))
    record_probes(table, measure_probes(table, partitions), commit)


def record_probes(table: Any, probes: dict[int, int], commit: Commit) -> None:
    """Keep what was measured with the index that it was measured of: `restore` brings back both."""
    metadata = {"path": "vector", "metadata": {PROBES.decode(): json.dumps(probes)}}
    commit(lambda: table.update_field_metadata(metadata))


def index_columns(table: Any, names: Sequence[str], commit: Commit) -> None:
    """Index ids and metadata: without these indexes, LanceDB reads all rows to find those that a filter allows."""
    indexed = {column for index in table.list_indices() for column in index.columns}
    for name in names:
        if name not in indexed:
            commit(partial(table.create_index, name, config=BTree()))


def measure_probes(table: Any, partitions: int) -> dict[int, int]:
    """Size -> the fewest partitions, doubled from 1 on, that hold `TARGET` of so many neighbours, times `MARGIN`.

    The neighbours of items drawn at random are compared with those of a pass over all vectors.
    """
    items = table.count_rows()
    offsets = numpy.random.default_rng(0).choice(items, min(QUERIES, items), replace=False)
    drawn = table.take_offsets(sorted(offsets.tolist())).select(["vector"]).to_arrow()
    queries = drawn["vector"].combine_chunks().flatten().to_numpy().reshape(len(drawn), -1)
    nearest = _nearest_rows(table, queries, min(max(SIZES) + 1, items))
    measured, probes = {}, 1
    for size in SIZES:
        while probes < partitions and _share_found(table, queries, nearest[:, 1 : size + 1], probes) < TARGET:
            probes *= 2
        measured[size] = min(MARGIN * probes, partitions)
    return measured


def _share_found(table: Any, queries: NDArray[numpy.float32], nearest: NDArray[numpy.uint64], probes: int) -> float:
    """How much of `nearest`, row ids [Q, size], is among the candidates of a search."""
    size = nearest.shape[1]
    if not size:
        return 1.0
    shares = []
    for query, wanted in zip(queries, nearest, strict=True):
        builder = table.search(query, vector_column_name="vector").distance_type("cosine").select(["_distance"])
        found = builder.with_row_id(True).limit(REFINE * size + 1).nprobes(probes).to_arrow()["_rowid"].to_numpy()
        shares.append(numpy.isin(wanted, found).mean())
    return float(numpy.mean(shares))


def _nearest_rows(table: Any, queries: NDArray[numpy.float32], count: int) -> NDArray[numpy.uint64]:
    """The ids [Q, count] of the rows that are nearest to each query, itself among them, best first."""
    scores = numpy.full((len(queries), count), -numpy.inf, numpy.float32)
    rows = numpy.zeros((len(queries), count), numpy.uint64)
    for batch in table.search().select(["vector"]).with_row_id(True).to_batches(8192):
        vectors = batch["vector"].flatten().to_numpy().reshape(len(batch), -1)
        scores = numpy.concatenate([scores, queries @ vectors.T], axis=1)
        rows = numpy.concatenate([rows, numpy.broadcast_to(batch["_rowid"], (len(queries), len(batch)))], axis=1)
        best = numpy.argpartition(-scores, count - 1, axis=1)[:, :count]
        scores, rows = numpy.take_along_axis(scores, best, 1), numpy.take_along_axis(rows, best, 1)
    return numpy.take_along_axis(rows, numpy.argsort(-scores, axis=1), 1)
