"""Items of a collection with known vectors, and the exact search that an index is compared with."""

from __future__ import annotations

import numpy

from retrieval.collections.opening import Item

DIM = 16


def make_items(count, seed=0, start=0):
    vectors = numpy.random.default_rng(seed).standard_normal((count, DIM)).astype(numpy.float32)
    return [
        Item(
            f"item-{k:05}",
            vectors[k - start] / numpy.linalg.norm(vectors[k - start]),
            {"family": "noto" if k % 10 == 0 else "other", "number": k, "half": k / 2, "even": k % 2 == 0},
        )
        for k in range(start, start + count)
    ]


def exact(items, query, k):
    scores = numpy.stack([item.vector for item in items]) @ (query / numpy.linalg.norm(query))
    return [items[place].id for place in numpy.argsort(-scores)[:k]]
