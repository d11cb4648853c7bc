"""What a collection's search finds and costs: recall@10 against exact search, latency and CPU a query, with filters.

    python bench/collection_speed.py [--items 100000] [--dim 512] [--queries 200] [--place FOLDER] [--exact]

Items are noisy points around `--clusters` centres, queries likewise, so that there are neighbours to be found (vectors
that are uniformly random have none, and no model makes such). Filters allow 10 %, 1 % and 0.1 % of the items. `--exact`
measures without an index, `--place` keeps the collection and, when it is there, takes it as it is. CPU is that of the
whole process, all threads. The table has a line for each filter, and the JSON line all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
from numpy.typing import NDArray

from retrieval import lance_collection
from retrieval.index import Collection, Item, open_collection

FILTERS = {"all": None, "10 %": "bucket < 100", "1 %": "bucket < 10", "0.1 %": "bucket < 1"}
BATCH = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--place", type=Path, help="default: a temporary folder")
    parser.add_argument("--exact", action="store_true", help="build no index")
    parser.add_argument("--ef", type=int, default=lance_collection.EF)
    parser.add_argument("--refine", type=int, default=lance_collection.REFINE)
    parser.add_argument("--exact-up-to", type=int, default=lance_collection.EXACT_UP_TO)
    arguments = parser.parse_args()
    lance_collection.EF, lance_collection.REFINE = arguments.ef, arguments.refine
    lance_collection.EXACT_UP_TO = arguments.items if arguments.exact else arguments.exact_up_to
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.place or Path(folder) / "c"
        with open_collection(place, create=True, dim=arguments.dim) as collection:
            record = build(collection, arguments) if collection.count() == 0 else {}
            queries = points(arguments, arguments.queries, seed=-1)
            results = {name: measure(collection, queries, arguments, where) for name, where in FILTERS.items()}
    print("allowed    recall@k  least  median ms  95 % ms  CPU ms")
    for name, result in results.items():
        print(
            f"{name:9}  {result['recall']:8.4f}  {result['least']:5.2f}  {result['median_ms']:9.2f}"
            f"  {result['p95_ms']:7.2f}  {result['cpu_ms']:6.2f}"
        )
    options = {name: value for name, value in vars(arguments).items() if name != "place"}
    print(json.dumps({**options, "cores": os.cpu_count(), **record, "filters": results}))


def points(arguments: argparse.Namespace, count: int, seed: int) -> NDArray[numpy.float32]:
    """Unit vectors [count, D] around centres that are the same for every seed."""
    centres = numpy.random.default_rng(0).standard_normal((arguments.clusters, arguments.dim), numpy.float32)
    rng = numpy.random.default_rng(seed + 2)
    vectors = centres[rng.integers(arguments.clusters, size=count)]
    vectors += rng.standard_normal(vectors.shape, numpy.float32)
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def stored(arguments: argparse.Namespace) -> Iterator[tuple[int, NDArray[numpy.float32]]]:
    """The first number and the vectors of each batch of items."""
    for start in range(0, arguments.items, BATCH):
        yield start, points(arguments, min(BATCH, arguments.items - start), seed=start)


def build(collection: Collection, arguments: argparse.Namespace) -> dict[str, float]:
    adding, busy = 0.0, 0.0
    for start, vectors in stored(arguments):
        # 7919 is prime: the buckets 0 to 999 are spread over items and clusters
        items = [
            Item(str(start + k), vector, {"bucket": (start + k) * 7919 % 1000}) for k, vector in enumerate(vectors)
        ]
        started = time.perf_counter()
        collection.add(items)
        adding += time.perf_counter() - started
    started, busy = time.perf_counter(), time.process_time()
    collection.optimise()
    return {
        "add_s": round(adding, 2),
        "added_per_s": round(arguments.items / adding),
        "optimise_s": round(time.perf_counter() - started, 2),
        "optimise_cpu_s": round(time.process_time() - busy, 2),
    }


def measure(
    collection: Collection, queries: NDArray[numpy.float32], arguments: argparse.Namespace, where: str | None
) -> dict[str, float]:
    k = arguments.k
    best = numpy.full((len(queries), k), -numpy.inf, numpy.float32)
    allowed = 1000 if where is None else int(where.split()[-1])
    for start, vectors in stored(arguments):
        kept = vectors[(numpy.arange(start, start + len(vectors)) * 7919 % 1000) < allowed]
        best = numpy.sort(numpy.concatenate([best, queries @ kept.T], axis=1), axis=1)[:, -k:]
    for query in queries[:5]:
        collection.search(query, k, where)  # warm
    times, found = [], []
    busy = time.process_time()
    for query, nearest in zip(queries, best, strict=True):
        started = time.perf_counter()
        hits = collection.search(query, k, where)
        times.append(1000 * (time.perf_counter() - started))
        limit = nearest[numpy.isfinite(nearest)].min()
        found.append(sum(hit.score >= limit - 1e-5 for hit in hits) / min(k, numpy.isfinite(nearest).sum()))
    return {
        "recall": round(statistics.fmean(found), 4),
        "least": round(min(found), 2),
        "median_ms": round(statistics.median(times), 2),
        "p95_ms": round(float(numpy.percentile(times, 95)), 2),
        "cpu_ms": round(1000 * (time.process_time() - busy) / len(queries), 2),
    }


if __name__ == "__main__":
    main()
