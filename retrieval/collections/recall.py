"""The recall of a collection's approximate search, measured against a comparison with every vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from retrieval.collections.items import check_search
from retrieval.collections.opening import Collection, CollectionError


@dataclass(frozen=True)
class SearchRecall:
    """`recall` is the share of the true `k` nearest items that a search returns, on average over `queries`."""

    recall: float
    least: float  # of any one query
    k: int
    queries: int
    items: int  # that were compared


def measure_search_recall(
    collection: Collection, queries: int = 100, k: int = 10, where: str | None = None, seed: int = 0
) -> SearchRecall:
    """Search for the neighbours of `queries` stored items, drawn at random; reads all vectors twice.

    A returned item that is as near as the k-th nearest counts as right. Raises `CollectionError` if no drawn item has
    a neighbour.
    """
    if queries < 1:
        raise CollectionError(f"recall is measured with at least one query, not {queries}")
    check_search(k)
    drawn = _draw(collection, queries, seed)
    ids, vectors = list(drawn), numpy.stack(list(drawn.values())) if drawn else numpy.empty((0, collection.dim))
    best = numpy.full((len(ids), k), -numpy.inf, numpy.float32)  # the k highest similarities so far
    rows = {name: row for row, name in enumerate(ids)}
    compared = 0
    for names, batch in collection.scan(where):
        compared += len(names)
        scores = vectors @ batch.T
        for column, name in enumerate(names):
            if name in rows:  # a query is no neighbour of itself
                scores[rows[name], column] = -numpy.inf
        best = numpy.partition(numpy.concatenate([best, scores], axis=1), -k, axis=1)[:, -k:]
    recalls = []
    for name, vector, nearest in zip(ids, vectors, best, strict=True):
        wanted = int(numpy.isfinite(nearest).sum())
        if not wanted:
            continue
        limit = nearest[numpy.isfinite(nearest)].min() - 1e-5
        hits = [hit for hit in collection.search(vector, k + 1, where) if hit.id != name][:k]
        recalls.append(sum(hit.score >= limit for hit in hits) / wanted)
    if not recalls:
        raise CollectionError("recall cannot be measured: no item has a neighbour")
    return SearchRecall(float(numpy.mean(recalls)), float(min(recalls)), k, len(recalls), compared)


def _draw(collection: Collection, count: int, seed: int) -> dict[str, numpy.ndarray]:
    """Id -> vector of `count` items (or of all, if there are fewer), each drawn with the same probability."""
    rng = numpy.random.default_rng(seed)
    drawn: dict[str, tuple[float, numpy.ndarray]] = {}
    for ids, vectors in collection.scan():
        keys = rng.random(len(ids))
        drawn |= {ids[row]: (keys[row], vectors[row].copy()) for row in numpy.argsort(keys)[:count]}
        drawn = dict(sorted(drawn.items(), key=lambda entry: entry[1][0])[:count])
    return {name: vector for name, (_, vector) in drawn.items()}
