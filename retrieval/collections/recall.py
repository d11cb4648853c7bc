"""Is what a collection finds what there is to find? Its search against a comparison with every vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from retrieval.collections.opening import Collection, CollectionError


@dataclass(frozen=True)
class Recall:
    """`recall` is the part of the true `k` nearest that searches found, on average over `queries` of `items`."""

    recall: float
    least: float  # of any one query
    k: int
    queries: int
    items: int  # that were compared


def measure_recall(
    collection: Collection, queries: int = 100, k: int = 10, where: str | None = None, seed: int = 0
) -> Recall:
    """Search for `queries` of the stored items, drawn at random, and look for all others; two passes over all vectors.

    An item that is as near as the k-th counts as right. Raises `CollectionError` when there is nothing to look for.
    """
    if queries < 1:
        raise CollectionError(f"recall is measured with at least one query, not {queries}")
    drawn = _draw(collection, queries, seed)
    ids, vectors = list(drawn), numpy.stack(list(drawn.values())) if drawn else numpy.empty((0, collection.dim))
    best = numpy.full((len(ids), k), -numpy.inf, numpy.float32)  # the k highest similarities so far
    rows = {name: row for row, name in enumerate(ids)}
    compared = 0
    for names, part in collection.scan(where):
        compared += len(names)
        scores = vectors @ part.T
        for place, name in enumerate(names):
            if name in rows:  # to find oneself proves nothing
                scores[rows[name], place] = -numpy.inf
        best = numpy.partition(numpy.concatenate([best, scores], axis=1), -k, axis=1)[:, -k:]
    found = []
    for name, vector, nearest in zip(ids, vectors, best, strict=True):
        wanted = int(numpy.isfinite(nearest).sum())
        if not wanted:
            continue
        limit = nearest[numpy.isfinite(nearest)].min() - 1e-5
        hits = [hit for hit in collection.search(vector, k + 1, where) if hit.id != name][:k]
        found.append(sum(hit.score >= limit for hit in hits) / wanted)
    if not found:
        raise CollectionError("recall cannot be measured: no item has another to be found")
    return Recall(float(numpy.mean(found)), float(min(found)), k, len(found), compared)


def _draw(collection: Collection, count: int, seed: int) -> dict[str, numpy.ndarray]:
    """Id -> vector of `count` items, or all; every item with the same probability."""
    rng = numpy.random.default_rng(seed)
    drawn: dict[str, tuple[float, numpy.ndarray]] = {}
    for ids, vectors in collection.scan():
        keys = rng.random(len(ids))
        drawn |= {ids[place]: (keys[place], vectors[place].copy()) for place in numpy.argsort(keys)[:count]}
        drawn = dict(sorted(drawn.items(), key=lambda entry: entry[1][0])[:count])
    return {name: vector for name, (_, vector) in drawn.items()}
